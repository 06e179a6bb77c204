"""Probes of suspects: what ends badly with a child process that reads it."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.crops import CropsConfig
from pipeline.probe import DIED, HUNG, Trial, probe, run_probe
from tests.support.dataset import pictures

TRIAL = Trial(max_pixels=10**6, crops=CropsConfig(), seed=3, epoch=1, sample=42)

READY = "import os, sys; os.write(1, b'+'); data = sys.stdin.buffer.read(); "


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert data == b'image'", None),
        # libjpeg-turbo and others crash like this: a read from an address that is none.
        ("import ctypes; ctypes.string_at(8)", f"{DIED}: SIGSEGV"),
        ("os.abort()", f"{DIED}: SIGABRT"),
        ("os.kill(os.getpid(), 24)", f"{HUNG}: no end within 0.3 s of CPU time"),  # SIGXCPU
        ("os.kill(os.getpid(), 9)", None),  # as when memory is short
        ("raise MemoryError", None),
        ("os._exit(3)", None),
        ("import time; time.sleep(60)", None),  # on a busy machine everybody waits
    ],
)
def test_how_a_child_ends_says_what_it_read(program: str, reason: str | None) -> None:
    command = [sys.executable, "-S", "-c", READY + program]
    assert run_probe(command, b"image", 0.3) == reason


def test_an_end_that_may_be_chance_is_tried_once_more(tmp_path: Path) -> None:
    """Killed at first, and the second time it crashes: that is the image's doing."""
    program = (
        f"before = os.path.exists({str(tmp_path / 'once')!r}); "
        f"open({str(tmp_path / 'once')!r}, 'w'); os.kill(os.getpid(), 11 if before else 9)"
    )
    command = [sys.executable, "-S", "-c", READY + program]
    assert run_probe(command, b"image", 10) == f"{DIED}: SIGSEGV"


_CONFINED = """
import os, sys
from pipeline.probe import confine
confine(int(sys.argv[1]), 1.0)
os.write(1, b"+")
while True: pass
"""


def test_cpu_time_has_a_limit_whoever_started_it_ignores_signals() -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # is inherited
    try:
        command = [sys.executable, "-P", "-c", _CONFINED, str(os.getpid())]
        reason = run_probe(command, b"", 30.0)
    finally:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    assert reason == f"{HUNG}: no end within 30 s of CPU time"


def test_images_that_can_be_cut_or_are_refused_in_order_are_harmless() -> None:
    (image,) = pictures(1)
    for data in (image, image[:200]):
        assert probe(data, TRIAL, limit_s=20) is None


def test_what_dies_of_cutting_alone_is_caught() -> None:
    (image,) = pictures(1)
    program = (
        "import ctypes, pipeline.crops, pipeline.probe\n"
        "pipeline.crops.resize_regions = lambda *_, **__: ctypes.string_at(8)\n"
        "pipeline.probe.main()"
    )
    command = [sys.executable, "-c", program, str(os.getpid()), "20", TRIAL.to_json()]
    assert run_probe(command, image, 20) == f"{DIED}: SIGSEGV"
    assert run_probe(command, b"no image", 20) is None


def test_a_trial_reaches_the_child_as_it_is() -> None:
    crops = CropsConfig(local_crops=0, global_scale=(0.3, 0.9), reduced_decode=False)
    for trial in (TRIAL, replace(TRIAL, crops=crops, epoch=7)):
        assert Trial.from_json(trial.to_json()) == trial


def test_a_child_may_end_before_it_reads(caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-S", "-c", "raise SystemExit(1)"]
    assert run_probe(command, b"x" * 10**6, 5) is None
    assert "exit code 1" in caplog.text
