"""Messages between a sandbox and its child: JSON, and an image's bytes behind it, over a socket.

No pickle: who reads a message must not be at the mercy of who wrote it. Lengths are checked before
anything is held, and one deadline covers a whole answer.
"""

import json
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes of image
_MAX_TEXT_BYTES = 2**20


class Channel:
    """One end of the socket; a message is JSON, and bytes that may follow it.

    Its methods raise ConnectionError or EOFError if the other end is gone, and TimeoutError.
    """

    def __init__(self, end: socket.socket, *, max_body_bytes: int = sys.maxsize) -> None:
        self._end = end
        self._max_body_bytes = max_body_bytes
        self._deadline_s: float | None = None

    def set_deadline(self, limit_s: float) -> None:
        """Give all that follows that long, counted from now."""
        self._deadline_s = time.monotonic() + limit_s

    def close(self) -> None:
        self._end.close()

    def send(self, message: Mapping[str, Any], body: bytes = b"") -> None:
        text = json.dumps(message).encode()
        self._watch_clock()
        self._end.sendall(HEAD.pack(len(text), len(body)) + text)
        self._watch_clock()
        self._end.sendall(body)

    def receive(self) -> tuple[Any, bytes]:
        """The JSON of a message and its bytes; ValueError if it is too long or no JSON."""
        text_bytes, body_bytes = HEAD.unpack(self._receive_exactly(HEAD.size))
        if text_bytes > _MAX_TEXT_BYTES or body_bytes > self._max_body_bytes:
            raise ValueError(f"too much: {text_bytes} bytes of text and {body_bytes} bytes")
        try:
            message = json.loads(self._receive_exactly(text_bytes))
        except (ValueError, RecursionError):  # the latter if it is nested too deep
            raise ValueError("text that is no JSON") from None
        return message, self._receive_exactly(body_bytes)

    def _receive_exactly(self, size_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < size_bytes:
            self._watch_clock()
            if not (part := self._end.recv(min(size_bytes - len(received), 2**20))):
                raise EOFError
            received += part
        return bytes(received)

    def _watch_clock(self) -> None:
        """Have the socket's next operation end in time."""
        if self._deadline_s is None:
            return
        if (rest_s := self._deadline_s - time.monotonic()) <= 0:
            raise TimeoutError
        self._end.settimeout(rest_s)
