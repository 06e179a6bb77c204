"""Judging images where a decoder that dies or hangs does no harm.

A decoder is C code fed by strangers: once in many millions of images it crashes its process, or
never returns and never lets go of the interpreter. Two means together keep that to one image:

- `judge.watched`, around every image in an ordinary worker, costs a microsecond. It has the kernel
  kill the process if one image takes too long, so that the engine sees a dead worker and runs its
  task again, carefully.
- `Sandbox`, only for such a task, judges every image in a child process. If the child dies or
  hangs, that image is rejected and the next one gets a fresh child. The results are judge's.

Child and parent talk over a shard_tools.channel. A process that decodes hostile bytes is not to be
trusted with its parent's interpreter, so an answer counts only if `judge` could have given it, and
the child's environment has no credentials: only what Python, its libraries and their caches need. A
filter that reads any other variable finds it unset here. The child remains the user's process, with
the user's files and network: this contains bugs, not whoever has made use of one to run code.
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CropstreamError
from shard_tools.channel import Channel
from shard_tools.filters import Filter, load_filter
from shard_tools.judge import (
    TIME_LIMIT_S,
    Accepted,
    ImageSettings,
    RejectedError,
    extension_of,
    judge,
    watched,
)

DECODER_DIED = "decoder died"
DECODER_HUNG = "decoder hung"

MEMORY_BYTES = 4 * 2**30
_BYTES_A_PIXEL = 32  # at the peak of the dearest conversion
_START_LIMIT_S = 120.0  # the child imports numpy and Pillow, and the filter whatever it needs
_GRACE_S = 5.0  # the child's own watchdog is to strike before its parent's
_EXIT_LIMIT_S = 5.0
_ATTEMPTS = 2
# By the kernel short of memory, or by a person: the image, perhaps innocent, has one more try.
_KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_MAX_MESSAGE_CHARACTERS = 2**16  # of an error: at most 12 bytes each in JSON
_STDERR = 2
_INHERITED = (
    *("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV"),
    *("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TORCH_HOME"),
    "CUDA_VISIBLE_DEVICES",
)
_INHERITED_PREFIXES = ("PYTHON", "LC_", "OMP_")

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_NEEDED_COLUMNS = frozenset({"width", "height", "format"})


class Sandbox:
    """Judges images in a child process; a context manager, to be used in one thread.

    Args:
        settings: as for judge.
        filter_name: the Python filter that the command line named, imported in the child.
        time_limit_s: for one image.
        memory_bytes: the decoder's heap; more where the pixel cap demands it. A filter's own memory
            is its own affair, here as in an ordinary worker.
    """

    def __init__(
        self,
        settings: ImageSettings,
        filter_name: str | None = None,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._orders = _Orders(
            dataclasses.asdict(settings),
            filter_name,
            time_limit_s,
            max(memory_bytes, _BYTES_A_PIXEL * settings.max_pixels),
        )
        self._child: _Child | None = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop()

    def judge(self, data: bytes) -> Accepted:
        """As judge.judge; also raises RejectedError with DECODER_DIED or DECODER_HUNG.

        Raises CropstreamError if the child cannot be started, or cannot import the filter.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self._running_child().judge(data, self._orders.time_limit_s + _GRACE_S)
            except TimeoutError:
                code = -signal.SIGALRM
                self._drop()
            except (ConnectionError, EOFError):
                code = self._drop()
            except ValueError as error:
                self._drop()
                raise _decoder_died(f"its process answered with {error}") from None
            if code not in _KILLED_FROM_OUTSIDE:
                break
        if code == -signal.SIGALRM:
            message = f"{DECODER_HUNG}: no verdict within {self._orders.time_limit_s:g} s"
            raise RejectedError(DECODER_HUNG, message, {})
        raise _decoder_died(f"its process ended with code {code}")

    def _running_child(self) -> "_Child":
        if self._child is not None and not self._child.is_alive():
            self._drop()  # it died idle: no image's fault
        if self._child is None:
            self._child = _Child(self._orders)
        return self._child

    def _drop(self) -> int:
        """End the child, if there is one, and tell how it ended."""
        child, self._child = self._child, None
        return child.end() if child is not None else 0


def _decoder_died(how: str) -> RejectedError:
    return RejectedError(DECODER_DIED, f"{DECODER_DIED}: {how}", {})


@dataclass(frozen=True)
class _Orders:
    """What a child is told at its start."""

    settings: dict[str, Any]
    filter_name: str | None
    time_limit_s: float
    memory_bytes: int


class _Child:
    """One child process, ready to judge."""

    def __init__(self, orders: _Orders) -> None:
        self._settings = ImageSettings(**orders.settings)
        end, far_end = socket.socketpair()
        self._channel = Channel(end, max_body_bytes=_max_body_bytes(self._settings))
        with far_end:
            try:
                self._process = _spawn(far_end.fileno())
            except CropstreamError:
                self._channel.close()
                raise
        try:
            self._start(orders)
        except BaseException:
            self.end()
            raise

    def _start(self, orders: _Orders) -> None:
        self._channel.set_deadline(_START_LIMIT_S)
        try:
            self._channel.send(dataclasses.asdict(orders))
            answer, _ = self._channel.receive()
        except (TimeoutError, ConnectionError, EOFError, ValueError) as error:
            raise _not_started(error) from None
        match answer:
            case {"failed": str(message)}:
                raise CropstreamError(message)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def judge(self, data: bytes, time_limit_s: float) -> Accepted:
        """Raises RejectedError; CropstreamError if the filter is broken.

        Also TimeoutError; ConnectionError or EOFError; ValueError for an answer that is none.
        """
        self._channel.set_deadline(time_limit_s)
        self._channel.send({}, data)
        answer, body = self._channel.receive()
        return _read_answer(answer, body, data, self._settings)

    def end(self) -> int:
        self._channel.close()  # an idle child ends by itself
        try:
            return self._process.wait(_EXIT_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _spawn(file_descriptor: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(file_descriptor)],
            pass_fds=[file_descriptor],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,  # the command's own is its result
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the command's to handle
        )
    except OSError as error:
        raise _not_started(error) from None


def _not_started(error: Exception) -> CropstreamError:
    return CropstreamError(
        f"the process to judge images in did not start: {error!r}; see what it wrote to stderr, "
        "and whether the machine has memory and processes left"
    )


def _environment() -> dict[str, str]:
    """The child finds the modules that its parent does, starts no threads, and knows no secret."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_written_side(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[1-9][0-9]{0,9}", value) is not None


def _is_hash(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


_COLUMNS: Mapping[str, Callable[[Any], bool]] = {
    "width": _is_side,
    "height": _is_side,
    "format": _FORMATS.__contains__,
    "phash": _is_hash,
    "original_width": _is_written_side,
    "original_height": _is_written_side,
}


def _max_body_bytes(settings: ImageSettings) -> int:
    """What judge may return instead of an image's own bytes."""
    plain = ImageSettings()
    names = ("resize", "encode", "orientation")
    encodes = any(getattr(settings, name) != getattr(plain, name) for name in names)
    return settings.max_bytes if encodes else 0


def _read_answer(answer: Any, body: bytes, data: bytes, settings: ImageSettings) -> Accepted:
    """What the child says of `data`, if it is what judge could say: see `_answer`.

    Raises RejectedError; CropstreamError if the filter is broken; ValueError for a wrong answer.
    """
    match answer:
        case {"same": bool(same), "columns": dict(columns), **rest} if not rest:
            _check_columns(columns)
            if same != (not body):
                raise ValueError(f"{len(body)} bytes for an image, the same: {same}")
            if not columns.keys() >= _NEEDED_COLUMNS:
                raise ValueError(f"an image that has no {_NEEDED_COLUMNS - columns.keys()}")
            return Accepted(data if same else body, extension_of(columns["format"]), columns)
        case {"reason": str(reason), "message": str(message), "columns": dict(columns), **rest} if (
            reason and reason.isprintable() and not rest and not body
        ):
            _check_columns(columns)
            raise RejectedError(reason, message, columns)
        case {"failed": str(message), **rest} if settings.filter and not rest and not body:
            raise CropstreamError(message)
    raise ValueError("what is no verdict")


def _check_columns(columns: dict[str, Any]) -> None:
    """Raises ValueError for a column that judge does not know, or with a value it cannot have."""
    for name, value in columns.items():
        if name not in _COLUMNS or not _COLUMNS[name](value):
            raise ValueError(f"a column {name[:40]!r} that is none, or cannot have its value")


def _child_main(file_descriptor: int) -> None:
    """What a child does: take orders, then judge image after image until the parent is gone."""
    _die_with_parent()
    channel = Channel(socket.socket(fileno=file_descriptor))
    orders = _Orders(**channel.receive()[0])
    settings = ImageSettings(**orders.settings)
    try:
        keep = load_filter(orders.filter_name) if orders.filter_name else None
    except CropstreamError as error:
        channel.send(_failed(error))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_heap(orders.memory_bytes)
    if keep is not None:
        keep = _without_limit(keep, orders.memory_bytes)
    channel.send({})
    with watched(orders.time_limit_s) as watch:
        while True:
            _, data = channel.receive()
            channel.send(*watch(_answer, data, settings, keep))


def _answer(
    data: bytes, settings: ImageSettings, keep: Filter | None
) -> tuple[dict[str, Any], bytes]:
    try:
        accepted = judge(data, settings, keep=keep)
    except RejectedError as error:
        message = str(error)[:_MAX_MESSAGE_CHARACTERS]
        return {"reason": error.reason, "message": message, "columns": error.columns}, b""
    except CropstreamError as error:  # the filter is broken
        return _failed(error), b""
    same = accepted.data is data
    return {"same": same, "columns": accepted.columns}, b"" if same else accepted.data


def _failed(error: CropstreamError) -> dict[str, Any]:
    return {"failed": str(error)[:_MAX_MESSAGE_CHARACTERS]}


def _limit_heap(memory_bytes: int) -> None:
    """Allow this process that much more than it has (Linux)."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        most = int(status.partition("VmData:")[2].split()[0]) * 1024 + memory_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)  # perhaps set by whoever started us
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _without_limit(keep: Filter, memory_bytes: int) -> Filter:
    """A filter that may load its model when it is first called, as in an ordinary worker."""

    def ask(pixels: NDArray[np.uint8], columns: Mapping[str, Any]) -> bool:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        try:
            return keep(pixels, columns)
        finally:
            _limit_heap(memory_bytes)

    return ask


def _die_with_parent() -> None:
    """Have the kernel end this process with its parent, even while a decoder hangs (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):
        _child_main(int(sys.argv[1]))
