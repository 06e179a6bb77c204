"""Counters of where a loader's time and bytes go: many threads add, the log reads."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Telemetry:
    """Thread-safe named sums.

    Names end in their unit: `fetch_bytes`, `fetch_requests`, `fetch_s`, `decode_s`, `data_wait_s`,
    `substituted_samples`, … A name that was never added to reads as 0.
    """

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount  # type: ignore[assignment]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall seconds of the block to `name`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(**{name: perf_counter() - start})

    def total(self, name: str) -> float:
        with self._lock:
            return self._sums[name]

    def take(self) -> dict[str, float]:
        """All sums since the last take; they start at 0 again."""
        with self._lock:
            sums, self._sums = self._sums, Counter()
        return dict(sums)
