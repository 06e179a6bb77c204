"""The ring: two processes' views of one memory, and nothing of it on any file system."""

import gc
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.ring import FETCH_LOOP, INTERPRETER, Ring, RingLayout
from tests.support.launch import ROOT

LAYOUT = RingLayout(
    shapes=((2, 4, 8, 8, 3), (3, 4, 5, 5, 3)), num_slots=3, num_workers=2, threads=2
)


def test_slots_do_not_overlap_and_are_whole_pages():
    ring = Ring.create(LAYOUT)
    for slot in range(3):
        for number, block in enumerate(ring.blocks(slot)):
            assert block.shape == LAYOUT.shapes[number]
            assert block.flags.c_contiguous
            block[:] = 10 * slot + number + 1
    ring.pulse(1).beat(INTERPRETER)
    for slot in range(3):
        for number, block in enumerate(ring.blocks(slot)):
            assert (block == 10 * slot + number + 1).all()
    assert ring.slots.__array_interface__["data"][0] % os.sysconf("SC_PAGESIZE") == 0
    assert LAYOUT.slot_bytes % os.sysconf("SC_PAGESIZE") == 0
    ring.close()


_CHILD = """
import sys, time
from pipeline.ring import FETCH_LOOP, INTERPRETER, Ring, RingLayout
from tests.pipeline.test_ring import LAYOUT
ring = Ring(LAYOUT, int(sys.argv[1]))
ring.blocks(2)[1][2, 3] = 7
pulse = ring.pulse(1)
pulse.beat(INTERPRETER)
pulse.beat(FETCH_LOOP)
with pulse.holding(1, 123):
    import os; os.kill(os.getpid(), 9)
"""


def test_what_a_process_wrote_and_held_outlives_it():
    ring = Ring.create(LAYOUT)
    for worker in range(2):
        ring.pulse(worker).clear()
    command = [sys.executable, "-c", _CHILD, str(ring.fd)]
    child = subprocess.run(command, pass_fds=[ring.fd], cwd=ROOT, check=False)
    assert child.returncode == -9
    block = ring.blocks(2)[1]
    assert (block[2, 3] == 7).all()
    assert block.sum(dtype=int) == 7 * block[2, 3].size
    (held,) = ring.pulse(1).in_hand()
    age_s = ring.pulse(1).beat_age_s()
    assert held.number == 123
    assert age_s is not None
    assert 0 <= held.age_s <= age_s
    assert ring.pulse(0).in_hand() == []
    assert ring.pulse(0).beat_age_s() is None
    ring.close()


def test_a_worker_is_as_old_as_what_moved_longest_ago():
    ring = Ring.create(LAYOUT)
    pulse = ring.pulse(0)
    for first, second in ((INTERPRETER, FETCH_LOOP), (FETCH_LOOP, INTERPRETER)):
        pulse.clear()
        pulse.beat(first)
        assert pulse.beat_age_s() is None, "nothing of the other yet"
        time.sleep(0.05)
        pulse.beat(second)
        age_s = pulse.beat_age_s()
        assert age_s is not None
        assert age_s >= 0.05
    ring.close()


def test_a_ring_without_room_says_what_to_lower():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LAYOUT.slot_bytes, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"3 batches of .* lower loader\.prefetch_batches"):
            Ring.create(LAYOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_whole_ring_is_allocated_at_once():
    ring = Ring.create(LAYOUT)
    assert os.fstat(ring.fd).st_blocks * 512 >= LAYOUT.size_bytes
    ring.close()


def test_hands_are_empty_after_an_error_too():
    ring = Ring.create(LAYOUT)
    pulse = ring.pulse(0)
    pulse.clear()
    with pytest.raises(ZeroDivisionError), pulse.holding(0, 0):
        1 / (len(pulse.in_hand()) - 1)  # it was one
    assert pulse.in_hand() == []
    ring.close()


def test_memory_goes_with_the_last_view_and_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for memfd in (True, False):  # as where there is no memfd
        if not memfd:
            monkeypatch.delattr(os, "memfd_create")
        ring = Ring.create(LAYOUT)
        kept = ring.blocks(1)[0]
        kept[:] = 5
        ring.close()
        ring.close()
        assert np.all(kept == 5)
        assert "cropstream-ring" in Path("/proc/self/maps").read_text()
        del kept
        gc.collect()
        assert "cropstream-ring" not in Path("/proc/self/maps").read_text()
        assert list(tmp_path.iterdir()) == []
