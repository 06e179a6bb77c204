"""The sandbox: judge's results, through real crashes, hangs and kills of the child.

The filters below stand for a decoder with a bug: the child imports this module to find them.
"""

import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import CropstreamError
from shard_tools.judge import Accepted, ImageSettings, RejectedError, judge
from shard_tools.sandbox import DECODER_DIED, DECODER_HUNG, Sandbox

ROOT = Path(__file__).parents[2]
MARK = "CROPSTREAM_TEST_MARK"  # an environment variable: where `die_from_outside` leaves a trace

Pixels = NDArray[np.uint8]


def png(red: int, size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "JPEG")
    return file.getvalue()


GOOD, FATAL = png(1), png(250)


def is_fatal(pixels: Pixels) -> bool:
    return int(pixels[0, 0, 0]) == 250


def crash(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    if is_fatal(pixels):
        ctypes.string_at(0)  # a read from address 0, as of a bug in C
    return True


def hang(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    if is_fatal(pixels):
        ctypes.PyDLL(None).sleep(1000)  # PyDLL holds the interpreter
    return True


def hang_deaf(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    """As `hang`, and the child's own alarm does not help."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    return hang(pixels, columns)


def die_from_outside(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    """Be killed, but the first time only: as by a kernel short of memory."""
    mark = Path(os.environ[MARK])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def die_always(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    with Path(os.environ[MARK]).open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def devour(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    return np.empty(2**30, np.uint8).size > 0


def chatter(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    print("a filter may print", flush=True)
    return not is_fatal(pixels)


def tell_process(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    Path(os.environ[MARK]).write_text(str(os.getpid()))
    return hang(pixels, columns)


def sandbox_of(function: str, **options: Any) -> Sandbox:
    name = f"{__name__}:{function}"
    return Sandbox(ImageSettings(filter=name), name, **options)


def outcome(function: Any, data: bytes) -> Accepted | tuple[str, str, dict[str, Any]]:
    try:
        result: Accepted = function(data)
    except RejectedError as error:
        return error.reason, str(error), error.columns
    return result


@pytest.mark.parametrize(
    "settings",
    [
        ImageSettings(),
        ImageSettings(decode=False),
        ImageSettings(resize="crop", size_px=6, encode="webp", min_size_px=8, max_pixels=10**5),
    ],
)
def test_results_are_those_of_judge(settings: ImageSettings) -> None:
    images = [GOOD, jpeg(), jpeg()[:-200], b"", b"<html>", png(9, (4, 4)), png(9, (2000, 900))]
    images.append(b"\xff\xd8\xff" + bytes(3 * 2**20))
    with Sandbox(settings) as sandbox:
        for data in images:
            expected = outcome(lambda data: judge(data, settings), data)
            assert outcome(sandbox.judge, data) == expected


def test_a_filter_works_inside_and_may_print(capfd: pytest.CaptureFixture[str]) -> None:
    with sandbox_of("chatter") as sandbox:
        assert sandbox.judge(GOOD).data is GOOD
        reason, _, columns = outcome(sandbox.judge, FATAL)  # type: ignore[misc]
    assert reason == f"filtered: {__name__}:chatter"
    assert columns == {"width": 12, "height": 8, "format": "PNG"}
    assert "a filter may print" in capfd.readouterr().out


def test_a_decoder_that_crashes_takes_its_image_only() -> None:
    with sandbox_of("crash") as sandbox:
        before = sandbox.judge(GOOD)
        for _ in range(2):
            with pytest.raises(RejectedError, match="code -11") as caught:
                sandbox.judge(FATAL)
            assert caught.value.reason == DECODER_DIED
            assert sandbox.judge(GOOD) == before


@pytest.mark.parametrize("function", ["hang", "hang_deaf"])
def test_a_decoder_that_hangs_takes_its_image_only(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.sandbox._GRACE_S", 0.5)
    monkeypatch.setattr("shard_tools.sandbox._EXIT_LIMIT_S", 0.2)
    with sandbox_of(function, time_limit_s=2.0) as sandbox:
        before = sandbox.judge(GOOD)
        with pytest.raises(RejectedError, match="within 2 s") as caught:
            sandbox.judge(FATAL)
        assert caught.value.reason == DECODER_HUNG
        assert sandbox.judge(GOOD) == before


def test_an_image_whose_child_was_killed_from_outside_has_one_more_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    with sandbox_of("die_from_outside") as sandbox:
        assert sandbox.judge(GOOD).data == GOOD
    assert (tmp_path / "mark").exists()


def test_but_not_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    with sandbox_of("die_always") as sandbox, pytest.raises(RejectedError, match="code -9"):
        sandbox.judge(GOOD)
    assert (tmp_path / "mark").read_text() == "xx"


def test_memory_is_limited() -> None:
    name = f"{__name__}:devour"
    settings = ImageSettings(filter=name, max_pixels=10**6)
    with (
        Sandbox(settings, name, memory_bytes=2**29) as sandbox,
        pytest.raises(CropstreamError, match="Unable to allocate") as caught,
    ):
        sandbox.judge(GOOD)
    assert not isinstance(caught.value, RejectedError)
    with Sandbox(settings, name, memory_bytes=2**32) as sandbox:
        assert sandbox.judge(GOOD).data is GOOD


def test_a_filter_that_cannot_be_imported_ends_the_job() -> None:
    with (
        sandbox_of("no_such_function") as sandbox,
        pytest.raises(CropstreamError, match="no attribute 'no_such_function'"),
    ):
        sandbox.judge(GOOD)


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/file"])
def test_a_child_that_cannot_start_is_not_the_image_s_fault(
    executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with (
        Sandbox(ImageSettings()) as sandbox,
        pytest.raises(CropstreamError, match="did not start") as caught,
    ):
        sandbox.judge(GOOD)
    assert not isinstance(caught.value, RejectedError)


_PARENT = f"""
import sys
from {__name__} import FATAL, GOOD, sandbox_of
with sandbox_of("tell_process") as sandbox:
    sandbox.judge(GOOD)
    print("judged", flush=True)
    sandbox.judge(FATAL if sys.argv[1] == "hanging" else GOOD)
    sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_the_child_ends_with_a_killed_parent(state: str, tmp_path: Path) -> None:
    mark = tmp_path / "child"
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, MARK: str(mark)},
        cwd=ROOT,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"judged\n"
        time.sleep(0.3)  # for the second image to reach its filter
        child = int(mark.read_text())
        assert is_running(child)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process: int) -> bool:
    """Whether there is such a process, other than as a zombie that nobody has buried yet."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_child_that_died_idle_is_no_image_s_fault() -> None:
    with Sandbox(ImageSettings()) as sandbox:
        before = sandbox.judge(GOOD)
        assert sandbox._child is not None
        process = sandbox._child._process
        process.kill()
        process.wait()
        assert sandbox.judge(GOOD) == before


def test_nothing_is_left_running() -> None:
    with Sandbox(ImageSettings()) as sandbox:
        sandbox.judge(GOOD)
        assert sandbox._child is not None
        process = sandbox._child._process
    assert process.returncode == 0
