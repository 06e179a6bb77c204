"""Judging images where a decoder that dies or hangs does no harm.

A decoder is C code fed by strangers: once in many millions of images it crashes its process, or
never returns and never lets go of the interpreter. Two means together keep that to one image:

- `judge.watched`, around every image in an ordinary worker, costs a microsecond. It has the kernel
  kill the process if one image takes too long, so that the engine sees a dead worker and runs its
  task again, carefully.
- `Sandbox`, only for such a task, judges every image in a child process. If the child dies or
  hangs, that image is rejected and the next one gets a fresh child. The results are judge's.

Child and parent talk over a socket, in messages of JSON with an image's bytes behind it. No pickle:
a process that decodes hostile bytes is not to be trusted with its parent's interpreter.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CropstreamError
from shard_tools.filters import Filter, load_filter
from shard_tools.judge import TIME_LIMIT_S, Accepted, ImageSettings, RejectedError, judge, watched

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
_HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes of image


class Sandbox:
    """Judges images in a child process; a context manager, to be used in one thread.

    Args:
        settings: as for judge.
        filter_name: the Python filter that the command line named, imported in the child.
        time_limit_s: for one image.
        memory_bytes: the child's heap; more where the pixel cap demands it.
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
            except (ConnectionError, EOFError, ValueError):  # or it sends nonsense
                code = self._drop()
            if code not in _KILLED_FROM_OUTSIDE:
                break
        if code == -signal.SIGALRM:
            message = f"{DECODER_HUNG}: no verdict within {self._orders.time_limit_s:g} s"
            raise RejectedError(DECODER_HUNG, message, {})
        raise RejectedError(DECODER_DIED, f"{DECODER_DIED}: its process ended with code {code}", {})

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
        self._channel, far_end = socket.socketpair()
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
        self._channel.settimeout(_START_LIMIT_S)
        try:
            _send(self._channel, dataclasses.asdict(orders))
            answer, _ = _receive(self._channel)
        except (TimeoutError, ConnectionError, EOFError) as error:
            raise _not_started(error) from None
        if "failed" in answer:
            raise CropstreamError(answer["failed"])

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def judge(self, data: bytes, time_limit_s: float) -> Accepted:
        """Raises RejectedError, CropstreamError, TimeoutError, and ConnectionError or EOFError."""
        self._channel.settimeout(time_limit_s)
        _send(self._channel, {}, data)
        answer, body = _receive(self._channel)
        if "failed" in answer:
            raise CropstreamError(answer["failed"])
        if "reason" in answer:
            raise RejectedError(answer["reason"], answer["message"], answer["columns"])
        same = answer["same"]
        return Accepted(data if same else body, answer["extension"], answer["columns"])

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
            env=os.environ | _environment(),
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
    """The child finds the modules that its parent does, and starts no threads."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _send(channel: socket.socket, message: dict[str, Any], body: bytes = b"") -> None:
    text = json.dumps(message).encode()
    channel.sendall(_HEAD.pack(len(text), len(body)) + text)
    channel.sendall(body)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], bytes]:
    text_bytes, body_bytes = _HEAD.unpack(_receive_exactly(channel, _HEAD.size))
    message: dict[str, Any] = json.loads(_receive_exactly(channel, text_bytes))
    return message, _receive_exactly(channel, body_bytes)


def _receive_exactly(channel: socket.socket, size_bytes: int) -> bytes:
    """Raises EOFError if the other end is gone."""
    received = bytearray()
    while len(received) < size_bytes:
        if not (part := channel.recv(min(size_bytes - len(received), 2**20))):
            raise EOFError
        received += part
    return bytes(received)


def _child_main(file_descriptor: int) -> None:
    """What a child does: take orders, then judge image after image until the parent is gone."""
    _die_with_parent()
    with socket.socket(fileno=file_descriptor) as channel:
        orders = _Orders(**_receive(channel)[0])
        settings = ImageSettings(**orders.settings)
        try:
            keep = load_filter(orders.filter_name) if orders.filter_name else None
        except CropstreamError as error:
            _send(channel, {"failed": str(error)})
            return
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_DATA, orders.memory_bytes)
        _send(channel, {})
        with watched(orders.time_limit_s) as watch:
            while True:
                _, data = _receive(channel)
                answer, body = watch(_answer, data, settings, keep)
                _send(channel, answer, body)


def _answer(
    data: bytes, settings: ImageSettings, keep: Filter | None
) -> tuple[dict[str, Any], bytes]:
    try:
        accepted = judge(data, settings, keep=keep)
    except RejectedError as error:
        return {"reason": error.reason, "message": str(error), "columns": error.columns}, b""
    except CropstreamError as error:  # the filter is broken
        return {"failed": str(error)}, b""
    same = accepted.data is data
    answer = {"same": same, "extension": accepted.extension, "columns": accepted.columns}
    return answer, b"" if same else accepted.data


def _limit(kind: int, most: int) -> None:
    """Limit this process, which may already live under a lower limit that it cannot raise."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _die_with_parent() -> None:
    """Have the kernel end this process with its parent, even while a decoder hangs (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):
        _child_main(int(sys.argv[1]))
