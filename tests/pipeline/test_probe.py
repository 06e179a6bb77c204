"""Probes of suspects: what ends badly with a child process that reads it."""

import sys

import pytest

from pipeline.probe import DIED, HUNG, probe, run_probe
from tests.support.dataset import pictures

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


def test_images_that_decode_or_are_refused_in_order_are_harmless() -> None:
    (image,) = pictures(1)
    for data in (image, image[:200], b"", b"\0" * 100):
        assert probe(data, max_pixels=10**6, limit_s=20) is None


def test_a_child_that_ends_before_it_reads_has_died() -> None:
    assert run_probe([sys.executable, "-S", "-c", "raise SystemExit(1)"], b"x" * 10**6, 5) == (
        f"{DIED}: exit code 1"
    )
