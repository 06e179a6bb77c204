"""The sandbox: judge's results, through real crashes, hangs and kills of the child.

The filters below stand for a decoder with a bug: the child imports this module to find them.
"""

import contextlib
import ctypes
import io
import json
import os
import signal
import socket
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

from pipeline import decode
from pipeline.errors import CropstreamError
from shard_tools import sandbox as sandboxes
from shard_tools.channel import HEAD
from shard_tools.judge import Accepted, ImageSettings, RejectedError, judge
from shard_tools.sandbox import DECODER_DIED, DECODER_HUNG, Sandbox

ROOT = Path(__file__).parents[2]
MARK = "TMPDIR"  # an environment variable that the child has too: where filters leave traces

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
    mark = Path(os.environ[MARK], "mark")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def die_always(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    with Path(os.environ[MARK], "mark").open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return True


LOADED: list[Pixels] = []


def load_a_model(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    """Load a gigabyte for good, when first asked."""
    if not LOADED:
        LOADED.append(np.empty(2**30, np.uint8))
    return True


def spoil_the_decoder(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    """From the next image on, a decoder that wants a gigabyte more than it should."""

    def greedy(*arguments: Any, **options: Any) -> Pixels:
        return np.empty(2**30, np.uint8)

    sys.modules["shard_tools.judge"].decode_pixels = greedy  # type: ignore[attr-defined]
    return True


def forge(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    """What somebody might do who makes a decoder run code: speak in the child's stead."""
    if is_fatal(pixels):
        end = socket.socket(fileno=int(sys.argv[1]))
        end.sendall(Path(os.environ[MARK], "forged").read_bytes())
        end.detach()
    return True


def dribble(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    """Answer so slowly that no single read takes long."""
    if is_fatal(pixels):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        end = socket.socket(fileno=int(sys.argv[1]))
        with contextlib.suppress(OSError):
            for byte in HEAD.pack(1000, 0) + b" " * 1000:
                end.send(bytes([byte]))
                time.sleep(0.1)
        os._exit(0)
    return True


def tell_environment(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    Path(os.environ[MARK], "environment").write_text(json.dumps(dict(os.environ)))
    return True


def chatter(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    print("a filter may print", flush=True)
    return not is_fatal(pixels)


def tell_process(pixels: Pixels, columns: Mapping[str, Any]) -> bool:
    Path(os.environ[MARK], "child").write_text(str(os.getpid()))
    return hang(pixels, columns)


def sandbox_of(function: str, *, max_pixels: int = 2**20, **options: Any) -> Sandbox:
    name = f"{__name__}:{function}"
    return Sandbox(ImageSettings(filter=name, max_pixels=max_pixels), name, **options)


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
    assert reason == f"filtered:{__name__}:chatter"
    assert columns == {"width": 12, "height": 8, "format": "PNG"}
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", "a filter may print")


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
    monkeypatch.setenv(MARK, str(tmp_path))
    with sandbox_of("die_from_outside") as sandbox:
        assert sandbox.judge(GOOD).data == GOOD
    assert (tmp_path / "mark").exists()


def test_but_not_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    with sandbox_of("die_always") as sandbox, pytest.raises(RejectedError, match="code -9"):
        sandbox.judge(GOOD)
    assert (tmp_path / "mark").read_text() == "xx"


def test_a_decoder_s_memory_is_limited() -> None:
    with sandbox_of("spoil_the_decoder", max_pixels=10**6, memory_bytes=2**29) as sandbox:
        assert sandbox.judge(GOOD).data is GOOD
        with pytest.raises(RejectedError, match="MemoryError") as caught:
            sandbox.judge(GOOD)
        assert caught.value.reason == "undecodable"


def test_a_filter_s_memory_is_not() -> None:
    """Else a filter that works in an ordinary worker would end the job in a careful one."""
    with sandbox_of("load_a_model", max_pixels=10**6, memory_bytes=2**29) as sandbox:
        for _ in range(2):
            assert sandbox.judge(GOOD).data is GOOD


HEADER = {"width": 12, "height": 8, "format": "PNG"}
ENCODED = {**HEADER, "original_width": "24", "original_height": "16"}


def message(answer: Any, body: bytes = b"") -> bytes:
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return HEAD.pack(len(text), len(body)) + text + body


FORGED = [
    message({}),
    message({"same": True, "extension": "../../x.y", "columns": HEADER}),
    message({"same": False, "columns": HEADER}, b"bytes that the settings keep"),
    HEAD.pack(2, 2**60) + b"{}",
    message(b"[" * 10**5),
    message(b"\xff"),
]


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_an_answer_that_is_none_takes_its_image_only(
    forged: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    (tmp_path / "forged").write_bytes(forged)
    with sandbox_of("forge") as sandbox:
        with pytest.raises(RejectedError, match="its process answered with ") as caught:
            sandbox.judge(FATAL)
        assert (caught.value.reason, caught.value.columns) == (DECODER_DIED, {})
        assert sandbox.judge(GOOD).data is GOOD


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ([], b""),
        (None, b""),
        ("failed", b""),
        ({"reason": 1}, b""),
        ({"reason": 1, "message": "", "columns": {}}, b""),
        ({"reason": "", "message": "", "columns": {}}, b""),
        ({"reason": "\ud800", "message": "", "columns": {}}, b""),
        ({"reason": "bomb\x1b[2J", "message": "", "columns": {}}, b""),
        ({"reason": "bomb", "message": "", "columns": []}, b""),
        ({"reason": "bomb", "message": "", "columns": {}, "more": 1}, b""),
        ({"reason": "bomb", "message": "", "columns": {"source": "x"}}, b""),
        ({"reason": "bomb", "message": "", "columns": {}}, b"body"),
        ({"failed": "a filter that there is not"}, b""),
        ({"same": 1, "columns": HEADER}, b""),
        ({"same": True, "columns": HEADER}, b"body"),
        ({"same": False, "columns": HEADER}, b""),
        ({"same": True, "columns": {"width": 12, "height": 8}}, b""),
        *(
            ({"same": True, "columns": {**ENCODED, name: value}}, b"")
            for name, value in [
                ("key", "x"),
                ("offset", 0),
                ("status", "ok"),
                ("width", True),
                ("width", 0),
                ("width", 12.0),
                ("height", 2**31),
                ("format", "../../x.y"),
                ("format", ["PNG"]),
                ("phash", -1),
                ("phash", 2**64),
                ("original_width", 24),
                ("original_width", "9" * 99),
                ("original_height", "\ud800"),
            ]
        ),
    ],
)
def test_only_what_judge_could_say_is_believed(answer: Any, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        sandboxes._read_answer(answer, body, GOOD, ImageSettings())


def test_all_that_judge_could_say_is_believed() -> None:
    settings = ImageSettings(resize="longest", size_px=12)
    kept = {**HEADER, "phash": 2**64 - 1}
    accepted = sandboxes._read_answer({"same": True, "columns": kept}, b"", GOOD, settings)
    assert accepted == Accepted(GOOD, "png", kept)
    encoded = {**ENCODED, "format": "JPEG"}
    accepted = sandboxes._read_answer({"same": False, "columns": encoded}, b"!", GOOD, settings)
    assert accepted == Accepted(b"!", "jpg", encoded)
    assert {image_format for *_, image_format in decode._DECODED} == set(sandboxes._FORMATS)


def test_an_answer_that_trickles_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard_tools.sandbox._GRACE_S", 0.5)
    with sandbox_of("dribble", time_limit_s=1.0) as sandbox:
        assert sandbox.judge(GOOD).data is GOOD
        with pytest.raises(RejectedError, match="within 1 s") as caught:
            sandbox.judge(FATAL)
        assert caught.value.reason == DECODER_HUNG


def test_the_child_knows_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "s", "GOOGLE_API_KEY": "s"}
    wanted = {MARK: str(tmp_path), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "HF_HOME": "/models"}
    for name, value in {**secrets, **wanted}.items():
        monkeypatch.setenv(name, value)
    with sandbox_of("tell_environment") as sandbox:
        sandbox.judge(GOOD)
    told = json.loads((tmp_path / "environment").read_text())
    assert not secrets.keys() & told.keys()
    assert wanted.items() <= told.items()
    assert told["PATH"] == os.environ["PATH"]


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
        env={**os.environ, MARK: str(tmp_path)},
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
