"""Counters of where a loader's time and bytes go: many threads add, the log reads.

Workers (pipeline.worker) keep their own and send what they counted along with every batch; the
loader adds it to its own, which the training loop takes once a logged step. For a timeline
(pipeline.profile) the same timed blocks are kept one by one, as spans.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

_MOST_SPANS = 100_000  # a minute of a busy rank; older ones are not overwritten, newer not kept


class Span(NamedTuple):
    """A block of time of one thread. Seconds of time.perf_counter, one clock for a machine."""

    name: str  # as the counter's, without its unit: "fetch", "decode", …
    thread: str
    start_s: float
    end_s: float


class Telemetry:
    """Thread-safe named sums.

    Names end in their unit: `fetch_bytes`, `fetch_requests`, `fetch_s`, `decode_s`, `data_wait_s`,
    `substituted_samples`, … A name that was never added to reads as 0.

    Args:
        record_spans: also keep every timed block, for `take_spans`.
    """

    def __init__(self, *, record_spans: bool = False) -> None:
        self.record_spans = record_spans
        self._sums: Counter[str] = Counter()
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        self.merge(amounts)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall seconds of the block to `name`, which ends in `_s`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.record(name, start, perf_counter())

    def record(self, name: str, start_s: float, end_s: float) -> None:
        """Add a block of time that was measured by perf_counter, as `timed` does."""
        spans: tuple[Span, ...] = ()
        if self.record_spans and len(self._spans) < _MOST_SPANS:
            thread = threading.current_thread().name
            spans = (Span(name.removesuffix("_s"), thread, start_s, end_s),)
        self.merge({name: end_s - start_s}, spans)

    def total(self, name: str) -> float:
        with self._lock:
            return self._sums[name]

    def take(self) -> dict[str, float]:
        """All sums since the last take; they start at 0 again."""
        with self._lock:
            sums, self._sums = self._sums, Counter()
        return dict(sums)

    def take_spans(self) -> list[Span]:
        """All spans since the last take."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans

    def merge(self, sums: Mapping[str, float], spans: Iterable[Span] = ()) -> None:
        """Add what another Telemetry has taken."""
        with self._lock:
            for name, amount in sums.items():
                self._sums[name] += amount  # type: ignore[assignment]
            self._spans.extend(spans)
