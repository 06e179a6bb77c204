"""Ranges of objects, whatever becomes of the requests for them.

Called by pipeline.samples for everything a loader reads. A range is asked for by one GET at a time
and is done when its last byte is there:

- A request that breaks, or whose body is short, is followed by one for the rest: from behind the
  last part that was handed over. Parts are as large as what usually comes in a sixteenth of
  `stall_s`, a megabyte at most, which is what a break loses; each costs some 50 microseconds, so
  they take a tenth less of the CPU than parts of 256 kB. Where nothing is known yet, and behind a
  failure, bytes are handed over as they come in, so that breaks without end still leave progress.
- One that falls silent, or below a floor of bytes a second, is dropped and followed likewise; the
  next is given twice the time unless bytes have come. Silence is as fine as the parts: less than a
  sixteenth of the usual rate looks the same, once.
- One that takes longer than nearly all others did gets a second beside it, for the rest (a hedge,
  after Dean and Barroso, "The Tail at Scale", 2013); whoever is done first wins. What the loser had
  read meanwhile is wasted, so hedges spend from a small share of all bytes read.
- A store that asks for fewer requests gets fewer: the number in flight is cut by half, and grows
  again with every range that arrives (additive increase, multiplicative decrease, as TCP does).
- Between two attempts there are pauses, which double and are drawn at random (pipeline.pacing).
- A range that fails twice in a row without a byte lowers the number in flight likewise, and pauses
  then count as requests: in an outage about one range at a time finds out whether it is over.

All reading of a process happens on one asyncio loop in one thread (`fetch_loop`): hundreds of
requests cost no threads, and what follows needs no locks. Denied access is told at once; that an
object is missing or has changed counts once a second request says so too, since something on the
way may have said it; everything else is waited for, for `patience_s` without a byte. So is a file
whose disk or mount does not answer: the thread that reads it cannot be ended, but nobody waits for
it any longer.
"""

import asyncio
import functools
import logging
import math
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le

from pipeline.cache import RangeCache
from pipeline.errors import AccessDeniedError, StoreError, ThrottledError
from pipeline.pacing import HedgeBudget, Limiter, Pace, Patience
from pipeline.store import Store
from pipeline.telemetry import Telemetry

READER_ENVIRONMENT = {
    "TOKIO_WORKER_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""For processes that mainly read, set before they start: a quarter less of CPU time a sample.

One thread of obstore's is enough for a gigabyte a second, and more of them mostly wake each other;
buffers that one thread allocates and another frees go back to the kernel less often from one arena,
and from glibc not at all while they are few: to map a chunk's memory anew, page by page, took 7 of
33 microseconds a sample from a local disk.
"""

_TICK_S = 0.1  # between two looks at a request's pace
_PART_SHARE = 1 / 16  # of stall_s: how often a request should be heard of
_MOST_PART_BYTES = 1 << 20
_MANY_FAILURES = 2  # of a range in a row; one of a range says nothing while others arrive
_QUIET_S = 5.0  # of failures before anybody is told
_REPEAT_S = 60.0  # between two messages
_ADVICE_TO_REPEAT = ", then run the command again"  # is none for somebody whose run goes on

_log = logging.getLogger(__name__)
_starting = threading.Lock()
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Section `fetch`: how samples are read from the store."""

    requests: Annotated[int, Gt(0)] = 32  # in flight at most, a rank
    stall_s: Annotated[float, Gt(0)] = 3.0  # without a byte, or below the floor: asked again
    floor_bytes_per_s: Annotated[int, Ge(0)] = 64 << 10  # of one request
    hedge_share: Annotated[float, Ge(0), Le(1)] = 0.05  # of all bytes, for second requests
    patience_s: Annotated[float, Ge(0)] = 300.0  # with a store that is out of reach
    cache_dir: str = ""  # where to keep what was read; empty: nowhere
    cache_bytes: Annotated[int, Ge(0)] = 0  # all processes of a machine together

    def __post_init__(self) -> None:
        if self.cache_dir and not self.cache_bytes:
            raise ValueError("cache_dir needs cache_bytes, how much may be kept there")
        if self.cache_bytes and not self.cache_dir:
            raise ValueError("cache_bytes needs cache_dir, the folder to keep them in")


def fetch_loop() -> asyncio.AbstractEventLoop:
    """The loop on which all reading of this process happens, in a thread of its own."""
    with _starting:  # functools.cache alone lets two first callers start one each
        return _start_loop()


@functools.cache
def _start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fetch", daemon=True).start()
    return loop


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start reading on the fetch loop."""
    return asyncio.run_coroutine_threadsafe(work, fetch_loop())


class RangeReader:
    """Reads ranges; see the module. Use it on `fetch_loop`, but `close` from anywhere.

    One for all sources of a process, so that they share the limits. `cache` is the disk cache of
    the configuration, or None.
    """

    def __init__(self, config: FetchConfig, telemetry: Telemetry) -> None:
        self.config = config
        self.telemetry = telemetry
        self.cache = (
            RangeCache(config.cache_dir, config.cache_bytes, telemetry)
            if config.cache_dir
            else None
        )
        self.limiter = Limiter(config.requests)
        self.hedges = HedgeBudget(config.hedge_share)
        self.pace = Pace()
        self._tasks: set[asyncio.Task[object]] = set()
        self._closed = False
        self._outages: dict[str, _Outage] = {}  # by the URL of the store

    async def read(
        self, store: Store, key: str, start_bytes: int, length_bytes: int, *, tag: str | None = None
    ) -> bytes:
        """Exactly `length_bytes` bytes from `start_bytes` on.

        Raises AccessDeniedError at once, ObjectMissingError and ObjectChangedError (also of an
        object that is shorter) at the second such answer, StoreError after `patience_s` without a
        byte, or because of `close`.
        """
        parts = await self.read_parts(store, key, start_bytes, length_bytes, tag=tag)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_parts(
        self, store: Store, key: str, start_bytes: int, length_bytes: int, *, tag: str | None = None
    ) -> list[bytes]:
        """`read`, in the parts in which the bytes came: joining them would copy them."""
        if length_bytes == 0:
            return []
        wanted = _Range(store, key, start_bytes, length_bytes, tag)
        wanted.part_bytes = self._part_bytes()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            self._check_open(wanted)
            return await self._complete(wanted)
        except asyncio.CancelledError:
            self._check_open(wanted)
            raise
        finally:
            self._tasks.discard(task)

    def close(self) -> None:
        """End all reading at once, also what waits for a store: everybody gets a StoreError."""
        self._closed = True
        fetch_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _part_bytes(self) -> int:
        usual = self.pace.bytes_per_s * self.config.stall_s * _PART_SHARE
        return max(1, min(int(usual), _MOST_PART_BYTES))

    def _check_open(self, wanted: "_Range") -> None:
        if self._closed:
            raise StoreError(f"reading {wanted.url} was ended: the loader was closed")

    async def _complete(self, wanted: "_Range") -> list[bytes]:
        patience = Patience(self.config.patience_s)
        while wanted.missing_bytes:
            async with self.limiter:
                pause_s = await self._attempt(wanted, patience)
                pause_s = await self.limiter.pause(pause_s)
            await asyncio.sleep(pause_s)
        self.limiter.succeeded()
        self._outage_of(wanted).end()
        self.hedges.earn(wanted.length_bytes)
        self.telemetry.add(fetch_bytes=wanted.length_bytes)
        return wanted.parts

    async def _attempt(self, wanted: "_Range", patience: Patience) -> float:
        """The seconds to wait before the next; 0 when the range is whole."""
        before = wanted.missing_bytes
        try:
            await (self._copy if wanted.store.is_local else self._race)(wanted, patience)
        except AccessDeniedError:
            raise
        except StoreError as error:
            if wanted.missing_bytes < before:
                patience.renew()
                self._outage_of(wanted).end()
            return self._fail(wanted, patience, error)
        return 0.0

    def _fail(self, wanted: "_Range", patience: Patience, error: StoreError) -> float:
        """Having waited for a turn during an outage counts as waiting for the store."""
        outage = self._outage_of(wanted)
        patience.begin(max(outage.since, wanted.asked))
        pause_s = patience.pause_s(error, falls=self.limiter.falls)
        if patience.failures >= _MANY_FAILURES or self.limiter.falls:
            self.limiter.throttled()
        self._count_failure(wanted)
        wanted.part_bytes = 1
        outage.tell(wanted, error, patience)
        return pause_s

    def _outage_of(self, wanted: "_Range") -> "_Outage":
        return self._outages.setdefault(wanted.store.url, _Outage(wanted.store.url))

    async def _copy(self, wanted: "_Range", patience: Patience) -> None:
        """A file's range: there is nothing to gain from asking a disk twice."""
        request = _Request(self, wanted)
        try:
            await self._outwait(request, wanted, patience)
        finally:
            request.task.cancel()
            self.telemetry.record("fetch_s", request.started, perf_counter())
        wanted.append(request)
        request.check()

    async def _outwait(self, request: "_Request", wanted: "_Range", patience: Patience) -> None:
        """Wait for a request, and say so; raise StoreError once patience has run out."""
        began = monotonic()
        look_s = min(_QUIET_S, max(self.config.stall_s, self.config.patience_s))
        while not (await asyncio.wait([request.task], timeout=look_s))[0]:
            now = monotonic()
            patience.begin(began)
            error = StoreError(
                f"cannot read {wanted.url}: its file system has not answered for {now - began:.0f} "
                "s; check the disk or the mount"
            )
            if patience.left_s(now) <= 0:
                raise error
            self._outage_of(wanted).tell(wanted, error, patience)

    async def _race(self, wanted: "_Range", patience: Patience) -> None:
        race = _Race(self, wanted, self.config.stall_s * 2**patience.failures)
        try:
            await race.run()
        finally:
            race.stop()

    def _count_failure(self, wanted: "_Range") -> None:
        resumed = wanted.missing_bytes < wanted.length_bytes
        self.telemetry.add(fetch_retries=1, fetch_resumes=resumed)


class _Outage:
    """Whether a store answers at all, and what is said about it: one voice for all ranges."""

    def __init__(self, url: str) -> None:
        self.since = math.inf  # the first failure behind the last answer
        self._url = url
        self._answered = self._told = -math.inf
        self._is_told = False

    def tell(self, wanted: "_Range", error: StoreError, patience: Patience) -> None:
        """A range has failed. Where others arrive meanwhile, only its object is spoken of."""
        now = monotonic()
        self.since = min(self.since, max(patience.since, self._answered))
        if now - self._told < _REPEAT_S or now - patience.since <= _QUIET_S:
            return
        reason = str(error).replace(_ADVICE_TO_REPEAT, "")
        if patience.since >= self._answered:
            self._is_told = True
            reason = reason.removeprefix(f"cannot read {wanted.url}: ")
            reason = f"{self._url} cannot be reached: {reason}"
        self._told = now
        _log.warning("%s; waiting for it, up to %.0f s", reason, patience.left_s(now))

    def end(self) -> None:
        """Bytes have come."""
        now = monotonic()
        if self._is_told:
            _log.warning("%s answers again after %.0f s", self._url, now - self.since)
            self._is_told, self._told = False, -math.inf
        self.since, self._answered = math.inf, now


class _Range:
    """A range and what of it has arrived."""

    def __init__(
        self, store: Store, key: str, start_bytes: int, length_bytes: int, tag: str | None
    ) -> None:
        self.store, self.key, self.tag = store, key, tag
        self.start_bytes, self.length_bytes = start_bytes, length_bytes
        self.missing_bytes = length_bytes
        self.part_bytes = 1  # as they come in
        self.asked = monotonic()
        self.parts: list[bytes] = []

    @property
    def url(self) -> str:
        return self.store.url_of(self.key)

    def stream_rest(self) -> AsyncIterator[bytes]:
        reached = self.start_bytes + self.length_bytes - self.missing_bytes
        return self.store.stream_range(
            self.key, reached, self.missing_bytes, tag=self.tag, part_bytes=self.part_bytes
        )

    def append(self, request: "_Request") -> None:
        """Take over what a request for the rest has read; it starts anew from there."""
        self.parts += request.parts
        self.missing_bytes -= request.num_bytes
        request.restart(self.missing_bytes)


class _Request:
    """One GET for the rest of a range."""

    def __init__(self, reader: RangeReader, wanted: _Range) -> None:
        self.started = perf_counter()
        self.restart(wanted.missing_bytes)
        self._url = wanted.url
        self._unseen_bytes = wanted.part_bytes - 1  # that may have come, at most
        self._error: StoreError | None = None
        self._last_byte = self._window_start = monotonic()
        self._window_bytes = 0
        self.task = asyncio.create_task(self._run(wanted.stream_rest()))
        reader.telemetry.add(fetch_requests=1)

    def restart(self, wanted_bytes: int) -> None:
        self.parts: list[bytes] = []
        self.num_bytes, self._wanted_bytes = 0, wanted_bytes

    async def _run(self, stream: AsyncIterator[bytes]) -> None:
        try:
            async for part in stream:
                if self.num_bytes + len(part) > self._wanted_bytes:
                    raise StoreError(
                        f"cannot read {self._url}: more bytes came than were asked for"
                    )
                self.parts.append(part)
                self.num_bytes += len(part)
                self._window_bytes += len(part)
                self._last_byte = monotonic()
        except StoreError as error:
            self._error = error

    def check(self) -> None:
        """Raise what ended a request that is done before its last byte came."""
        self.task.result()
        if self._error is not None:
            raise self._error
        if self.num_bytes < self._wanted_bytes:
            raise StoreError(
                f"cannot read {self._url}: the answer ended {self._wanted_bytes - self.num_bytes} "
                "bytes early; check the network and what lies between here and the store"
            )

    def is_stalled(self, window_s: float, floor_bytes_per_s: float) -> bool:
        """Whether nothing came for the length of a window, or too little in the last one."""
        now = monotonic()
        if now - self._last_byte > window_s:
            return True
        if now - self._window_start < window_s:
            return False
        seen = self._window_bytes + self._unseen_bytes
        slow = seen < floor_bytes_per_s * (now - self._window_start)
        self._window_start, self._window_bytes = now, 0
        return slow


class _Race:
    """The rest of a range by one request or, once that is late, by two."""

    def __init__(self, reader: RangeReader, wanted: _Range, stall_s: float) -> None:
        self._reader, self._wanted, self._stall_s = reader, wanted, stall_s
        self._started = perf_counter()
        self._running = [_Request(reader, wanted)]
        self._begun = list(self._running)
        self._reserved_bytes = 0

    async def run(self) -> None:
        """Return when the range is whole; raise StoreError when the last request has failed."""
        while True:
            tasks = [request.task for request in self._running]
            await asyncio.wait(tasks, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
            for request in list(self._running):
                self._look_at(request)
                if not self._wanted.missing_bytes:
                    return
            self._hedge_if_late()

    def stop(self) -> None:
        """End what still runs, and account for what was read twice."""
        for request in self._running:
            request.task.cancel()
        now = perf_counter()
        for request in self._begun:
            self._reader.telemetry.record("fetch_s", request.started, now)
        wasted = min(self._reserved_bytes, sum(request.num_bytes for request in self._begun))
        self._reader.hedges.refund(self._reserved_bytes - wasted)
        self._reader.telemetry.add(fetch_hedge_bytes=wasted)

    def _look_at(self, request: _Request) -> None:
        if request.task.done():
            self._finish(request)
        elif request.is_stalled(self._stall_s, self._reader.config.floor_bytes_per_s):
            self._drop(request)

    def _finish(self, request: _Request) -> None:
        try:
            request.check()
        except AccessDeniedError:
            raise
        except ThrottledError as error:
            self._reader.limiter.throttled()
            self._reader.telemetry.add(fetch_throttled=1)
            self._lose(request, error)
        except StoreError as error:
            self._lose(request, error)
        else:
            self._wanted.append(request)
            self._reader.pace.add(self._wanted.length_bytes, perf_counter() - self._started)

    def _drop(self, request: _Request) -> None:
        request.task.cancel()
        self._reader.limiter.stalled()
        self._reader.telemetry.add(fetch_stalls=1)
        reason = f"hardly a byte came for {self._stall_s:g} s"
        self._lose(request, StoreError(f"cannot read {self._wanted.url}: {reason}"))

    def _lose(self, request: _Request, error: StoreError) -> None:
        self._running.remove(request)
        if not self._running:
            self._wanted.append(request)
            raise error

    def _hedge_if_late(self) -> None:
        """What has arrived by now is common to both; the second request asks for the rest."""
        reader, wanted, request = self._reader, self._wanted, self._running[0]
        rest = wanted.missing_bytes - request.num_bytes
        late = perf_counter() - self._started > reader.pace.late_s(wanted.length_bytes)
        if len(self._running) > 1 or rest <= 0 or not late or reader.limiter.is_resting():
            return
        if reader.hedges.reserve(rest):
            self._reserved_bytes += rest
            wanted.append(request)
            self._running.append(_Request(reader, wanted))
            self._begun.append(self._running[-1])
            reader.telemetry.add(fetch_hedges=1)
