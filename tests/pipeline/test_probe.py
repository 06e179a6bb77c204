"""Probes of suspects: what ends badly with a child process that reads it."""

import sys
from dataclasses import replace

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
        ("import ctypes; ctypes.string_at(8)", f"{DIED}: signal 11"),
        ("os.abort()", f"{DIED}: signal 6"),
        ("os._exit(3)", f"{DIED}: exit code 3"),  # libjpeg's own handler of errors does that
        ("import time; time.sleep(60)", f"{HUNG}: no end within 0.5 s"),
    ],
)
def test_how_a_child_ends_says_what_it_read(program: str, reason: str | None) -> None:
    command = [sys.executable, "-S", "-c", READY + program]
    assert run_probe(command, b"image", 0.5) == reason


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
    command = [sys.executable, "-c", program, TRIAL.to_json()]
    assert run_probe(command, image, 20) == f"{DIED}: signal 11"
    assert run_probe(command, b"no image", 20) is None


def test_a_trial_reaches_the_child_as_it_is() -> None:
    crops = CropsConfig(local_crops=0, global_scale=(0.3, 0.9), reduced_decode=False)
    for trial in (TRIAL, replace(TRIAL, crops=crops, epoch=7)):
        assert Trial.from_json(trial.to_json()) == trial


def test_a_child_that_ends_before_it_reads_has_died() -> None:
    assert run_probe([sys.executable, "-S", "-c", "raise SystemExit(1)"], b"x" * 10**6, 5) == (
        f"{DIED}: exit code 1"
    )
