"""How many requests, how soon again, when a second one: what pipeline.ranges decides by.

Used on the fetch loop only, so nothing here is locked.
"""

import asyncio
import contextlib
import math
import random
from collections import deque
from time import monotonic

from pipeline.errors import ObjectChangedError, ObjectMissingError, StoreError

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.2, 5.0
_MOST_DOUBLINGS = 7
_LEAST_DOUBT_S, _MOST_DOUBT_S = 0.1, 0.3  # before it is asked again whether an object is gone

_LATE_QUANTILE, _LATE_FACTOR, _LEAST_LATE_S = 0.95, 1.5, 0.2
_PACE_SAMPLES, _LEAST_PACE_SAMPLES = 256, 32
_PACE_FADING = 0.95  # of what is known of the rate, with every range

_LIMIT_STEP, _LIMIT_FACTOR = 0.25, 0.5  # a range that arrived; a store that asks for fewer
_LIMIT_REST_S = 1.0  # requests that were on their way together are refused together


class Limiter:
    """How many requests may be in flight: falls by half when the store complains, then recovers.

    While nothing has arrived since it fell (`falls` counts how often), a range that failed keeps
    its turn as long as it pauses (`pause`). Otherwise the others that wait would come to the same
    store meanwhile, and all of them together without any pause.
    """

    def __init__(self, most: int) -> None:
        self.limit = float(most)
        self.falls = 0  # since the last range arrived
        self._most = most
        self._active = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._fell = -math.inf
        self._arrived = asyncio.Event()  # since it fell
        self._stalls = 0  # since the last range arrived

    async def __aenter__(self) -> None:
        if self._active >= int(self.limit) or self._queue:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()
                raise
        else:
            self._active += 1

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def is_resting(self) -> bool:
        """Whether the store complained a moment ago."""
        return monotonic() - self._fell < _LIMIT_REST_S

    def throttled(self) -> None:
        """The store asked for fewer requests; those sent together count once."""
        if not self.is_resting():
            self._fell = monotonic()
            self.limit = max(1.0, self.limit * _LIMIT_FACTOR)
            self.falls += 1
            self._arrived.clear()

    def stalled(self) -> None:
        """A request came to nothing; if most do, there are too many for the way to the store."""
        self._stalls += 1
        if self._stalls > max(2, self._active / 2):
            self.throttled()

    def succeeded(self) -> None:
        """A range has arrived."""
        self._stalls = self.falls = 0
        self._arrived.set()
        self.limit = min(float(self._most), self.limit + _LIMIT_STEP)
        self._admit()

    async def pause(self, seconds: float) -> float:
        """Keep the turn for a pause, or until a range arrives; what is left of the pause."""
        ends = monotonic() + seconds
        if self.falls:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), seconds)
        return max(0.0, ends - monotonic())

    def _release(self) -> None:
        self._active -= 1
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._active < int(self.limit):
            turn = self._queue.popleft()
            if not turn.done():
                self._active += 1
                turn.set_result(None)


class HedgeBudget:
    """Bytes that second requests may waste: a share of all that were read, and never more."""

    def __init__(self, share: float) -> None:
        self.left_bytes = 0.0
        self._share = share

    def earn(self, num_bytes: int) -> None:
        self.left_bytes += self._share * num_bytes

    def reserve(self, num_bytes: int) -> bool:
        """Set aside what a hedge may waste at most; give back with `refund` what it did not."""
        if num_bytes > self.left_bytes:
            return False
        self.left_bytes -= num_bytes
        return True

    def refund(self, num_bytes: int) -> None:
        self.left_bytes += num_bytes


class Pace:
    """How long ranges took, and so from when on one is late; ranges of about one size compared."""

    def __init__(self) -> None:
        self._recent_bytes = self._recent_s = 0.0
        self._seconds: dict[int, deque[float]] = {}
        self._late_s: dict[int, float] = {}

    @property
    def bytes_per_s(self) -> float:
        """Of a request, in the recent past; 0 while nothing is known."""
        return self._recent_bytes / self._recent_s if self._recent_s else 0.0

    def add(self, length_bytes: int, seconds: float) -> None:
        self._recent_bytes = self._recent_bytes * _PACE_FADING + length_bytes
        self._recent_s = self._recent_s * _PACE_FADING + seconds
        size = length_bytes.bit_length()
        seen = self._seconds.setdefault(size, deque(maxlen=_PACE_SAMPLES))
        seen.append(seconds)
        if len(seen) >= _LEAST_PACE_SAMPLES:
            usual = sorted(seen)[int(_LATE_QUANTILE * len(seen))]
            self._late_s[size] = max(_LEAST_LATE_S, _LATE_FACTOR * usual)

    def late_s(self, length_bytes: int) -> float:
        """Infinite while too few are known."""
        return self._late_s.get(length_bytes.bit_length(), math.inf)


class Patience:
    """How long to wait before the next attempt, and when to give up; for one range.

    Pauses double, and are drawn at random from nothing to all of their length ("full jitter"), so
    that the ranks of a large run do not come back together. That an object is missing or has
    changed is believed when it is said for the second time; waiting would not bring it back.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.renew()

    def renew(self) -> None:
        """Bytes have come."""
        self.since = math.inf  # the first failure
        self.failures = 0  # at most _MOST_DOUBLINGS
        self._is_gone = False  # the object, as one answer has it

    def begin(self, now: float) -> None:
        """Something has been wrong since then, if not before."""
        self.since = min(self.since, now)

    def left_s(self, now: float) -> float:
        return self._patience_s - (now - self.since)

    def pause_s(self, error: StoreError, *, falls: int = 0) -> float:
        """After one more failure. Raises `error` when patience has run out.

        `falls` are the limiter's: whoever is new to an outage does not begin with short pauses.
        """
        if isinstance(error, ObjectMissingError | ObjectChangedError):
            return self._doubt_s(error)
        now = monotonic()
        self.begin(now)
        left = self.left_s(now)
        if left <= 0:
            raise error
        pause = min(_FIRST_PAUSE_S * 2 ** max(self.failures, falls), _LAST_PAUSE_S)
        self.failures = min(self.failures + 1, _MOST_DOUBLINGS)
        return min(left, random.uniform(0, pause))

    def _doubt_s(self, error: StoreError) -> float:
        if self._is_gone:
            raise error
        self._is_gone = True
        return random.uniform(_LEAST_DOUBT_S, _MOST_DOUBT_S)
