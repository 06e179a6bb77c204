"""Worker processes: killed, stopped, hung, orphaned; the batches stay the same, nothing is left."""

import gc
import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.errors import DataError, UsageError
from pipeline.loader import Batch, LoaderConfig, MultiCropLoader
from pipeline.messages import Assignment
from pipeline.ring import Pulse, Ring
from pipeline.telemetry import Telemetry
from pipeline.worker import serve
from pipeline.workers import Workers
from tests.support.dataset import pictures, write_dataset
from tests.support.launch import ROOT

CROPS = CropsConfig(global_size_px=32, local_crops=2, local_size_px=16)
COUNT = 64
LIMIT_S = 60
SHARED = ("cropstream", "psm_", "sem.", "torch_")  # ours, Python's and torch's own names


def loader_of(url: str, **settings: Any) -> MultiCropLoader:
    arguments = {name: settings.pop(name) for name in ("epochs", "state") if name in settings}
    sizes = {"global_batch": 8, "lanes": 4, "chunk": 4, "window": 2, "workers": 1, "threads": 2}
    config = LoaderConfig(dataset=url, **(sizes | settings))
    return MultiCropLoader(config, CROPS, AugmentConfig(), seed=3, **arguments)


def digest(batch: Batch) -> str:
    whole = hashlib.sha256(batch.samples.tobytes())
    for crops in batch.crops:
        whole.update(crops.contiguous().numpy().tobytes())
    return whole.hexdigest()


def digests(loader: MultiCropLoader, count: int = 1000) -> list[str]:
    with loader:
        return [digest(batch) for _, batch in zip(range(count), loader, strict=False)]


def workers_of(pid: int | str = "self") -> list[int]:
    """The loader workers among a process's children."""
    return _children(pid, b"pipeline.worker")


def _children(pid: int | str, module: bytes) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found += map(int, task.read_text().split())
    return sorted(child for child in set(found) if module in _command(child))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def leftovers() -> dict[str, Any]:
    """What a loader could leave behind."""
    gc.collect()
    return {
        "workers": workers_of(),
        "descriptors": len(names("/proc/self/fd")),
        "threads": threading.active_count(),
        "rings": Path("/proc/self/maps").read_text().count("cropstream-ring"),
        "shared": [name for name in names("/dev/shm") if name.startswith(SHARED)],
        "files": [name for name in names(tempfile.gettempdir()) if "ring" in name],
    }


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_dataset(str(tmp_path / "data"), pictures(COUNT))
    return str(tmp_path / "data")


@pytest.fixture
def expected(folder: str) -> list[str]:
    """Two epochs, undisturbed."""
    return digests(loader_of(folder, workers=0, epochs=2))


def test_a_worker_is_small_and_has_no_torch(folder):
    with loader_of(folder) as loader:
        batches = iter(loader)
        next(batches)
        (worker,) = workers_of()
        maps = Path(f"/proc/{worker}/maps").read_text()
        status = Path(f"/proc/{worker}/status").read_text()
    assert "cropstream-ring" in maps
    assert "torch" not in maps
    threads = next(line for line in status.splitlines() if line.startswith("Threads:"))
    assert int(threads.split()[1]) < 20 + 32, "32 may be reading files"
    program = "import json, sys, pipeline.worker; json.dump(sorted(sys.modules), sys.stdout)"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT)
    assert {"torch", "torchvision"}.isdisjoint(json.loads(child.stdout))


def test_a_killed_worker_is_replaced_and_nothing_is_left(folder, expected, caplog):
    loader_of(folder)  # whatever is made once and stays
    digests(loader_of(folder, workers=2), 2)
    before = leftovers()
    loader = loader_of(folder, workers=2, epochs=2)
    found = []
    with loader, caplog.at_level(logging.WARNING):
        for number, batch in enumerate(loader):
            found.append(digest(batch))
            del batch
            if number in (3, 9):
                os.kill(workers_of()[number % 2], signal.SIGKILL)
    assert found == expected
    assert loader.telemetry.total("worker_restarts") == 2
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "rank 0" in told[0]
    assert "was killed by SIGKILL" in told[0]
    now = leftovers()  # fewer descriptors: of an earlier test, closed meanwhile
    assert now.pop("descriptors") <= before.pop("descriptors")
    assert now == before


def test_a_death_is_noticed_while_nobody_waits(folder):
    with loader_of(folder) as loader:
        batches = iter(loader)
        next(batches)
        (first,) = workers_of()
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: workers_of() not in ([], [first]))
        assert len(workers_of()) == 1


def test_a_worker_whose_heart_stops_is_replaced(folder, expected):
    loader = loader_of(folder, epochs=2, decode_timeout_s=2.0)
    found = []
    with loader:
        for number, batch in enumerate(loader):
            found.append(digest(batch))
            if number == 4:
                os.kill(workers_of()[0], signal.SIGSTOP)
    assert found == expected
    assert loader.telemetry.total("worker_restarts") >= 1


def slow_jpeg(size_px: int = 6000, scans: int = 85) -> bytes:
    """68 kB within all caps that take libjpeg many seconds: scans that refine nothing."""
    body = io.BytesIO()
    Image.new("L", (size_px, size_px), 90).save(body, "JPEG", progressive=True)
    data = body.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * scans + data[-2:]


def _kill_while_it_probes() -> None:
    """The worker, and see that the probe goes with it."""
    wait_until(lambda: [each for pid in workers_of() for each in _children(pid, b"pipeline.probe")])
    (worker,) = workers_of()
    (probe,) = _children(worker, b"pipeline.probe")
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not _command(probe))


def test_an_image_that_never_ends_is_a_bad_sample(tmp_path):
    """Even where the worker that probes it dies meanwhile: the next one has the same suspects."""
    images = pictures(16)
    images[5] = slow_jpeg()
    write_dataset(str(tmp_path), images)
    settings = {"global_batch": 4, "lanes": 2, "epochs": 1, "decode_timeout_s": 2.0}
    loader = loader_of(str(tmp_path), **settings)
    with ThreadPoolExecutor(1) as killer:
        killed = killer.submit(_kill_while_it_probes)
        found = digests(loader)
        killed.result()
    (entry,) = loader.quarantine.before(1, 0)
    assert entry["number"] == 5
    assert entry["reason"].startswith("decoder hung")
    damaged = [*images[:5], b"no image", *images[6:]]
    write_dataset(str(tmp_path / "damaged"), damaged)
    other = loader_of(str(tmp_path / "damaged"), **(settings | {"workers": 0}))
    assert found == digests(other), "substituted as any bad sample"


def test_what_is_in_hand_when_a_decoder_crashes_is_probed(tmp_path):
    """The signal of a crash, while the worker decodes: the image was not at fault, and stays."""
    write_dataset(str(tmp_path), [_large_png(), *pictures(15)])
    loader = loader_of(str(tmp_path), workers=0, epochs=1, prefetch_batches=1)
    with loader:
        expected = [[block.copy() for block in batch.blocks] for batch in loader.cut_batches()]
    telemetry = Telemetry()
    with working(loader_of(str(tmp_path), epochs=1, prefetch_batches=1), telemetry) as (
        workers,
        ring,
    ):
        wait_until(lambda: any(held.number == 0 for held in ring.pulse(0).in_hand()))
        (pid,) = workers_of()
        os.kill(pid, signal.SIGSEGV)
        for step, blocks in enumerate(expected):
            (done,) = workers.wait(step)
            assert done.replaced == []
            for mine, theirs in zip(ring.blocks(step), blocks, strict=True):
                np.testing.assert_array_equal(mine, theirs)
        assert telemetry.total("worker_restarts") == 1


def _large_png() -> bytes:
    body = io.BytesIO()
    Image.effect_noise((3000, 3000), 90).save(body, "PNG", compress_level=1)
    return body.getvalue()


def test_a_worker_that_dies_again_and_again_ends_the_run(folder):
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.02):
            for pid in workers_of():
                with suppress(ProcessLookupError):  # buried meanwhile
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    loader = loader_of(folder)
    killer.start()
    try:
        with pytest.raises(DataError) as caught:
            digests(loader)
    finally:
        done.set()
        killer.join()
    message = str(caught.value)
    assert "died 3 times" in message
    assert "rank 0 (lanes 0 to 3)" in message
    assert "step 0 of epoch 0" in message
    assert folder in message
    assert workers_of() == []


def test_errors_of_a_worker_are_raised_here_with_their_message(folder):
    for tar in Path(folder, "data").rglob("*.tar"):
        tar.unlink()
    loader = loader_of(folder)
    with pytest.raises(DataError, match=r"no sample of lane \d(.|\n)*shard_tools verify"):
        digests(loader)
    assert workers_of() == []


def test_the_traceback_of_a_bug_survives(folder):
    with (
        working(loader_of(folder), Telemetry(), crops=None) as (workers, _),
        pytest.raises(AttributeError) as caught,
    ):
        workers.wait(0)
    (note,) = caught.value.__notes__
    assert "pipeline/batches.py" in note


def test_an_error_that_looks_like_a_closed_line_is_told(folder):
    class Broken(Ring):
        def pulse(self, worker: int) -> Pulse:
            raise ConnectionResetError("of something else")

    loader = loader_of(folder)
    layout = loader._layout()
    (share,) = loader._shares(colour=False)
    ours, theirs = (Connection(end.detach()) for end in socketpair())
    with ours, theirs:
        assignment = Assignment(
            share=share, layout=layout, worker=0, step=0, suspects=(), probe_limit_s=1.0
        )
        ring = Broken.create(layout)
        serve(theirs, assignment, ring)
        ring.close()
        assert "of something else" in str(ours.recv().error)


def test_one_of_our_own_threads_may_close(folder):
    """As a garbage collection in it does."""

    class Closing(Telemetry):
        def merge(self, *args: Any) -> None:
            workers.close()

    with working(loader_of(folder), Closing()) as (workers, _):
        wait_until(lambda: workers_of() == [] and workers._failure)
        with pytest.raises(UsageError, match="closed"):
            workers.wait(0)


_FORK = """
import os, sys, warnings
from tests.pipeline.test_worker import loader_of
warnings.simplefilter("ignore")
with loader_of(sys.argv[1], workers=2, epochs=1) as loader:
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if child == 0:
        batches.close()
        loader.close()
        os._exit(0)
    os.waitpid(child, 0)
    print(len(list(batches)), loader.telemetry.total("worker_restarts"))
"""


def test_a_forked_process_that_ends_leaves_the_workers_alone(folder):
    child = subprocess.run(
        [sys.executable, "-c", _FORK, folder], capture_output=True, cwd=ROOT, text=True, check=True
    )
    assert child.stdout.split() == [str(COUNT // 8 - 1), "0"]


def test_interpreter_and_fetch_loop_of_a_worker_show_that_they_run(folder):
    with working(loader_of(folder), Telemetry()) as (_, ring):
        wait_until(lambda: ring.pulse(0).beat_age_s() is not None)


_STUCK = """
import threading
from pipeline.ranges import fetch_loop
from pipeline.ring import INTERPRETER, Ring
from pipeline.worker import _beat_on_loop
from tests.pipeline.test_ring import LAYOUT
from tests.pipeline.test_worker import wait_until
ring = Ring.create(LAYOUT)
pulse = ring.pulse(0)
def age_s():
    pulse.beat(INTERPRETER)
    return pulse.beat_age_s()
fetch_loop().call_soon_threadsafe(_beat_on_loop, pulse)
wait_until(lambda: age_s() is not None)
free = threading.Event()
fetch_loop().call_soon_threadsafe(free.wait)
wait_until(lambda: age_s() > 1)
free.set()
wait_until(lambda: age_s() < 1)
"""


def test_a_stuck_fetch_loop_shows_though_the_interpreter_runs():
    subprocess.run([sys.executable, "-c", _STUCK], cwd=ROOT, check=True, timeout=LIMIT_S)


@contextmanager
def working(
    loader: MultiCropLoader, telemetry: Telemetry, **changes: Any
) -> Iterator[tuple[Workers, Ring]]:
    """The one worker of a loader, with nobody to take over what it does."""
    ring = Ring.create(loader._layout())
    (share,) = loader._shares(colour=False)
    workers = Workers(
        [replace(share, **changes)],
        ring,
        step=0,
        in_process=False,
        decode_timeout_s=20.0,
        telemetry=telemetry,
        rank=0,
        num_steps=loader.steps_per_epoch,
    )
    try:
        workers.allow(ring.layout.num_slots)
        yield workers, ring
    finally:
        workers.close()
        ring.close()


_RUN = """
import json, os, sys
from pathlib import Path
from tests.pipeline.test_worker import digest, loader_of, workers_of
url, log, state = sys.argv[1:]
state = json.loads(Path(state).read_text()) if Path(state).exists() else None
with loader_of(url, workers=2, epochs=2, state=state) as loader, open(log, "a") as output:
    for batch in loader:
        Path(sys.argv[3] + ".new").write_text(json.dumps(loader.state_dict()))
        print(digest(batch), *workers_of(), file=output, flush=True)
        os.replace(sys.argv[3] + ".new", sys.argv[3])
"""


def test_a_killed_training_process_leaves_nothing_and_resumes_exactly(folder, expected, tmp_path):
    """From a folder that has a `pipeline` of its own, which is none of ours."""
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('a stranger')")
    log, state = tmp_path / "log", tmp_path / "state"
    before = leftovers()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, folder, str(log), str(state)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def lines() -> list[list[str]]:
        text = log.read_text() if log.exists() else ""
        return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]

    process = start()
    wait_until(lambda: len(lines()) >= 3 and state.exists())
    process.kill()
    process.wait(LIMIT_S)
    workers = [int(pid) for line in lines() for pid in line[1:]]
    assert workers
    wait_until(lambda: not any(b"pipeline.worker" in _command(pid) for pid in workers))
    after = leftovers()
    assert (after["shared"], after["files"]) == (before["shared"], before["files"])

    first = json.loads(state.read_text())
    done = first["epoch"] * (COUNT // 8) + first["step"]
    assert start().wait(LIMIT_S) == 0
    found = [line[0] for line in lines()]
    assert found[-len(expected) + done :] == expected[done:]
    assert found[:done] == expected[:done]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_the_device_gets_the_same_batches(folder):
    expected = [batch.crops for batch in loader_of(folder, workers=0, epochs=1)]
    config = loader_of(folder).config
    loader = MultiCropLoader(config, CROPS, AugmentConfig(), seed=3, epochs=1, device="cuda")
    with loader:
        for mine, theirs in zip(loader, expected, strict=True):
            for crops, others in zip(mine.crops, theirs, strict=True):
                torch.testing.assert_close(crops.cpu(), others, rtol=0, atol=0)
    assert loader.telemetry.total("transfer_s") > 0


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    yield
    assert workers_of() == []
