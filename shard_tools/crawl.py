"""Many downloads at once: which starts when, and what follows from how it went.

The loop's half of the downloader. READ_AHEAD_BYTES of bodies are held at most, whole or in parts:
when three quarters are taken up no new request starts; a body that does not fit even so is dropped,
and asked for again when there is room. The one the caller waits for is exempt, so there is always
progress. (A body that waited half-read for room would keep its connection from others, and would
run out of its time through no fault of the server.)

A request that fails for a reason that may pass is repeated, from the URL of the list on: after a
pause that doubles each time, of which a random part is waited ("full jitter": Brooker, Exponential
Backoff And Jitter, 2015), or after as long as the server asks for, and then its whole host is left
alone that long. A host that asks for more than RETRY_AFTER_S, or that did not answer HOST_FAILURES
requests in a row, is not asked again at all: every other URL there fails for the same reason. So a
dead host with thousands of URLs costs minutes, not days.

What may start is looked for whenever that may have changed: a request ended, a pause is over, a
host opens, URLs were added, room was made, the caller began to wait. Should that ever fail, the
caller has it looked for again every RECHECK_S.
"""

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.errors import SampleError
from shard_tools.hosts import HostQueue
from shard_tools.request import (
    TIMEOUT,
    TOO_MANY_REDIRECTS,
    UNREACHABLE,
    Client,
    PassingError,
    RedirectedError,
    Target,
)
from shard_tools.urls import redact

READ_AHEAD_BYTES = 128 * 2**20
RETRY_AFTER_S = 60.0  # the longest that is waited
HOST_FAILURES = 32
RECHECK_S = 10.0

_START_BYTES = READ_AHEAD_BYTES * 3 // 4
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 20.0
_USUAL_BYTES = 64 * 1024  # a body, until it is known better


class Download:
    """One URL on its way. Only the loop writes to it, except for `number` and `url`."""

    __slots__ = ("attempts", "expected_bytes", "held_bytes", "hops", "number", "outcome", "target",
                 "url")  # fmt: skip

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self.url = url
        self.target: Target | None = None
        self.attempts = 0
        self.hops = 0
        self.expected_bytes = 0  # known from an answer that did not fit
        self.held_bytes = 0  # of the bound on what is read ahead
        self.outcome: bytes | BaseException | None = None


class _NoRoomError(Exception):
    """A body of so many bytes does not fit into what is read ahead."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes = num_bytes


class Crawl:
    """The loop's side: which download starts when, and what follows from how it went.

    `call` and `take` are for the caller's thread, all else runs in the loop.
    """

    def __init__(
        self,
        client: Client,
        *,
        queue: HostQueue[Download],
        concurrency: int,
        retries: int,
        max_redirects: int,
    ) -> None:
        self._client = client
        self._queue = queue
        self._concurrency = concurrency
        self._retries = retries
        self._max_redirects = max_redirects
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None  # for a host that opens again
        self._mean_bytes = float(_USUAL_BYTES)
        self._held_bytes = 0  # counted up by the loop
        self._taken_bytes = 0  # of these, counted up by the caller
        self._is_full = False
        self._refusals: dict[str, tuple[str, str]] = {}  # by host not asked again: reason, and why
        self._failures: Counter[str] = Counter()  # by host, requests in a row without an answer
        self._awaited: Download | None = None  # the caller waits for it
        self._ready = threading.Event()  # it is there
        self._failure: BaseException | None = None  # nothing more will come

    # The caller's side.

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have a method called in the loop. Once the loop has ended, nothing is done."""
        with contextlib.suppress(RuntimeError):  # all it ever means is that the loop is closed
            self._loop.call_soon_threadsafe(self._guard, function, *arguments)

    def take(self, download: Download) -> bytes | SampleError:
        """Wait for a download's outcome and take it out. Raises what made the loop end early."""
        if download.outcome is None:
            self._wait_for(download)
        outcome = self._failure if download.outcome is None else download.outcome
        if isinstance(outcome, bytes):
            self._taken_bytes += download.held_bytes
            if self._is_full and self._read_ahead_bytes < _START_BYTES * 3 // 4:
                self._is_full = False
                self.call(self._start_waiting)
            return outcome
        if isinstance(outcome, SampleError):
            return outcome
        assert outcome is not None
        raise outcome

    def _wait_for(self, download: Download) -> None:
        self._ready.clear()
        self.call(self._expect, download)
        # A failure from before `clear` is seen here; a later one sets the event again.
        while self._failure is None and not self._ready.wait(RECHECK_S):
            self.call(self._start_waiting)

    def fail(self, error: BaseException) -> None:
        """Give the caller an error for all that has no outcome yet, now and from now on."""
        self._failure = error
        self._ready.set()

    # The loop's side.

    async def run_until_stopped(self) -> None:
        """Run until `stop`, then end what still runs."""
        try:
            await self._stopped.wait()
        finally:
            self.stop()  # also if this was cancelled, so that nothing new is started
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def stop(self) -> None:
        """End everything."""
        self._stopped.set()
        if self._alarm:
            self._alarm.cancel()

    def add(self, downloads: Sequence[Download]) -> None:
        """Take on downloads."""
        for download in downloads:
            try:
                download.target = Target.parse(download.url)
            except SampleError as error:
                self._settle(download, error)
            else:
                self._enqueue(download)
        self._start_waiting()

    def drop(self, downloads: Sequence[Download]) -> None:
        """Forget downloads whose outcome nobody wants any more: all there are."""
        for download in downloads:
            self._release(download)
            if download.outcome is None:
                download.outcome = asyncio.CancelledError()
        for task in self._running:
            task.cancel()
        self._queue.clear(self._loop.time())
        self._awaited = None

    def _guard(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function as the loop's callback: nobody else would see its errors."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - a bug; the caller would wait for ever
            self.fail(error)

    def _expect(self, download: Download) -> None:
        self._awaited = download
        if download.outcome is not None:
            self._ready.set()
        else:
            self._start_waiting()

    def _enqueue(self, download: Download) -> None:
        if download.outcome is not None:  # dropped meanwhile
            return
        assert download.target is not None
        host = download.target.host
        if host in self._refusals:
            self._refuse(download, host)
        else:
            self._queue.push(host, download.number, download, self._loop.time())

    def _start_waiting(self) -> None:
        """Start what may start."""
        now = self._loop.time()
        while len(self._running) < self._concurrency and not self._stopped.is_set():
            download = self._queue.first(now)
            if download is None:
                self._set_alarm()
                return
            expected_bytes = max(download.expected_bytes, int(self._mean_bytes))
            room_bytes = _START_BYTES - self._read_ahead_bytes
            if expected_bytes > room_bytes and download is not self._awaited:
                self._is_full = True
                self._set_alarm()  # for the awaited one, whose host may be closed
                return
            host, _ = self._queue.start(now)
            self._hold(download, expected_bytes)
            task = self._loop.create_task(self._attempt(download, host))
            self._running.add(task)
            task.add_done_callback(partial(self._guard, self._finish, download, host))

    def _set_alarm(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        opens_at = self._queue.opens_at()
        self._alarm = None
        if opens_at is not None:
            self._alarm = self._loop.call_at(opens_at, self._guard, self._start_waiting)

    async def _attempt(self, download: Download, host: str) -> None:
        """One request, and what follows from its outcome."""
        assert download.target is not None
        try:
            body = await self._client.get(
                download.target,
                on_bytes=partial(self._hold, download),
                keep_alive=self._queue.has_waiting(host),
            )
        except RedirectedError as redirect:
            self._failures.pop(host, None)
            self._follow(download, redirect.target)
        except PassingError as error:
            self._count_failure(host, error)
            self._repeat(download, host, error)
        except _NoRoomError as error:
            download.expected_bytes = 2 * error.num_bytes
            self._release(download)
            self._enqueue(download)
        except SampleError as error:
            self._failures.pop(host, None)
            self._settle(download, error)
        else:
            self._failures.pop(host, None)
            self._mean_bytes += (len(body) - self._mean_bytes) / 64
            self._settle(download, body)

    def _finish(self, download: Download, host: str, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._queue.finish(host, self._loop.time())
        if self._stopped.is_set():
            return  # what ended the loop is told by `fail`
        if task.cancelled():  # after `drop` nobody sees this error
            error = RuntimeError(f"{redact(download.url)}: the request was cancelled")
            self._settle(download, error)
        elif bug := task.exception():  # for the caller to see
            self._settle(download, bug)
        self._start_waiting()

    def _follow(self, download: Download, target: Target) -> None:
        self._release(download)
        download.hops += 1
        download.target = target
        if download.hops > self._max_redirects:
            what = f"{redact(download.url)}: more than {self._max_redirects}"
            self._settle(download, SampleError(TOO_MANY_REDIRECTS, what))
        else:
            self._enqueue(download)

    def _repeat(self, download: Download, host: str, error: PassingError) -> None:
        """Begin again from the first URL, some time later."""
        self._release(download)
        download.attempts += 1
        wait_s = error.retry_after_s
        too_long = wait_s is not None and wait_s > RETRY_AFTER_S
        if too_long:
            self._give_up(host, error.sample_error.reason, "wants to be left alone for long")
        elif wait_s is not None:
            self._queue.close_until(host, self._loop.time() + wait_s)
        if too_long or download.attempts > self._retries:
            self._settle(download, error.sample_error)
            return
        download.hops = 0
        download.target = Target.parse(download.url)
        if wait_s is not None:
            self._enqueue(download)
            return
        longest_s = min(_FIRST_PAUSE_S * 2 ** (download.attempts - 1), _LAST_PAUSE_S)
        wait_s = random.uniform(0, longest_s)
        self._loop.call_later(wait_s, self._guard, self._again, download)

    def _count_failure(self, host: str, error: PassingError) -> None:
        reason = error.sample_error.reason
        if reason not in (TIMEOUT, UNREACHABLE):
            self._failures.pop(host, None)
            return
        self._failures[host] += 1
        if self._failures[host] == HOST_FAILURES:
            self._give_up(host, reason, f"did not answer {HOST_FAILURES} requests in a row")

    def _give_up(self, host: str, reason: str, why: str) -> None:
        """Ask a host no more."""
        self._refusals[host] = (reason, why)
        for download in self._queue.remove(host):
            self._refuse(download, host)

    def _refuse(self, download: Download, host: str) -> None:
        reason, why = self._refusals[host]
        what = f"{redact(download.url)}: not asked, since {host} {why}"
        self._settle(download, SampleError(reason, what))

    def _again(self, download: Download) -> None:
        self._enqueue(download)
        self._start_waiting()

    def _settle(self, download: Download, outcome: bytes | BaseException) -> None:
        """A download is done, with its body or an error."""
        self._release(download)
        if download.outcome is not None:  # dropped
            return
        if isinstance(outcome, bytes):
            download.held_bytes = len(outcome)
            self._held_bytes += len(outcome)
        download.outcome = outcome
        if download is self._awaited:
            self._awaited = None
            self._ready.set()

    @property
    def _read_ahead_bytes(self) -> int:
        return self._held_bytes - self._taken_bytes

    def _hold(self, download: Download, num_bytes: int) -> None:
        """Count a body that is at least this long. Raises _NoRoomError if it must wait."""
        more_bytes = num_bytes - download.held_bytes
        if more_bytes <= 0:
            return
        if self._read_ahead_bytes + more_bytes > READ_AHEAD_BYTES and download is not self._awaited:
            raise _NoRoomError(num_bytes)
        self._held_bytes += more_bytes
        download.held_bytes = num_bytes

    def _release(self, download: Download) -> None:
        self._held_bytes -= download.held_bytes
        download.held_bytes = 0
