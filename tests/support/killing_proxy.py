"""A reverse proxy before an S3 server that shows every write, so that a test can end the writer.

    with KillingProxy(server.url, strike) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url

`strike(write, moment)` is called twice for every PUT, POST and DELETE, multipart uploads included:
when the request has ARRIVED whole and nothing of it was forwarded, and when the server has ANSWERED
it and nothing of that was passed on. It may take its time; while it does, only this request waits.
If it returns True the request, or the answer, is dropped and the connection closed.

Requests reach the server as they are, the Host header too: SigV4 signs it, and the server checks
the signature against the header that it gets. Only "Connection: close" is added, so a connection
carries one request and the end of an answer need not be searched for. A thread a connection, not
asyncio: a strike waits for dead processes, or for another client.
"""

import contextlib
import re
import socket
import socketserver
import threading
from collections.abc import Callable
from enum import Enum, auto
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

WRITES = frozenset({"PUT", "POST", "DELETE"})
_RECEIVE_BYTES = 2**16


class Moment(Enum):
    """When a strike is asked."""

    ARRIVED = auto()  # the server knows nothing of the write
    ANSWERED = auto()  # it has done, or refused, it


class Write(NamedTuple):
    """A request that may change the store."""

    method: str
    target: str  # path and query: /bucket/key?uploads


Strike = Callable[[Write, Moment], bool]
"""(write, moment) -> whether to drop it. Called from several threads."""


class KillingProxy:
    """Listens on a random port of loopback until the context ends."""

    def __init__(self, server_url: str, strike: Strike) -> None:
        server = urlsplit(server_url)
        assert server.hostname is not None
        assert server.port is not None
        self._listener = _Listener((server.hostname, server.port), strike)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        """The endpoint for clients."""
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server: tuple[str, int], strike: Strike) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.server = server
        self.strike = strike


class _Exchange(socketserver.StreamRequestHandler):
    """One request and its answer."""

    server: _Listener

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is dead, perhaps by our strike
            self._exchange()

    def _exchange(self) -> None:
        if (head := self._read_head()) is None:
            return
        body = self._read_body(head)
        method, target, _ = head.decode("latin-1").split(" ", 2)
        write = Write(method, target) if method in WRITES else None
        if write is not None and self.server.strike(write, Moment.ARRIVED):
            return
        answer = self._ask(head, body)
        if write is not None and self.server.strike(write, Moment.ANSWERED):
            return
        self.wfile.write(answer)

    def _read_head(self) -> bytes | None:
        """The request line and headers without the empty line; None if none came."""
        lines = []
        while (line := self.rfile.readline()) != b"\r\n":
            if not line.endswith(b"\r\n"):
                return None
            lines.append(line)
        return b"".join(lines)

    def _read_body(self, head: bytes) -> bytes:
        assert b"\r\ntransfer-encoding:" not in head.lower(), "the store's clients announce lengths"
        length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head, re.IGNORECASE)
        size_bytes = int(length[1]) if length is not None else 0
        body = self.rfile.read(size_bytes)
        if len(body) < size_bytes:
            raise ConnectionResetError("the client went away in the middle of a body")
        return body

    def _ask(self, head: bytes, body: bytes) -> bytes:
        with socket.create_connection(self.server.server) as server:
            server.sendall(head + b"Connection: close\r\n\r\n" + body)
            return b"".join(iter(lambda: server.recv(_RECEIVE_BYTES), b""))
