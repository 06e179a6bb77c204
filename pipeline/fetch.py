"""Reading ahead: samples fetched in the order of their need, handed out one by one.

Called by the loader's workers. A piece is a run of consecutive samples that one window of one lane
needs. Pieces are requested in the order in which their samples will be needed, as long as the bytes
requested, and those arrived and not yet taken, stay within a budget. Reading itself happens on one
asyncio loop (pipeline.ranges); whoever decodes asks from a thread of its own. The loop never waits
for such a thread while that works out which pieces come next.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from time import perf_counter

from pipeline.errors import StoreError
from pipeline.mixture import Window
from pipeline.ranges import FetchConfig, begin
from pipeline.samples import BadSample, RawSample, SampleReader

__all__ = ["FetchConfig", "Piece", "Prefetcher", "pieces_in_order", "split_into_pieces"]

Samples = dict[int, RawSample | BadSample]


@dataclass(frozen=True)
class Piece:
    """Consecutive samples [first, last] of a source, of which a window needs some."""

    source: int
    epoch: int
    first: int
    last: int
    needed: frozenset[int]


class Prefetcher:
    """Fetches pieces ahead of their need and hands out their samples one by one.

    Args:
        readers: one for every source.
        pieces: in the order of need; consumed lazily, by whatever thread takes a sample.
        ahead_bytes: of samples requested or held and not yet taken. A sample that is waited for is
            fetched whatever this says: too little slows a run down but never stops it. The process
            takes more: up to one piece by which it is exceeded, the body of the one piece that is
            being cut into samples, and the holes that freed samples leave. With ranges.
            READER_ENVIRONMENT that was a quarter of 150 MiB, four fifths with the usual arenas.
        sample_bytes: mean size of a sample of every source, the estimate until a piece has arrived.
    """

    def __init__(
        self,
        readers: Sequence[SampleReader],
        pieces: Iterator[Piece],
        *,
        ahead_bytes: int,
        sample_bytes: Sequence[float],
    ) -> None:
        self._readers = readers
        self._pieces = pieces
        self._ahead_bytes = ahead_bytes
        self._sample_bytes = sample_bytes
        self._telemetry = readers[0].telemetry
        self._waiting: dict[tuple[int, int, int], Future[Samples]] = {}  # sample -> its piece
        self._held_bytes = 0.0
        self._closed = False
        self._lock = threading.Lock()  # of the pieces; long, while the next ones are worked out
        self._counting = threading.Lock()  # of the bytes; the loop, on which all reading waits

    def is_here(self, source: int, epoch: int, number: int) -> bool:
        """Whether `take` would return this sample at once."""
        fetched = self._waiting.get((source, epoch, number))
        return fetched is not None and fetched.done()

    def take(self, source: int, epoch: int, number: int) -> RawSample | BadSample:
        """Wait for a sample and release its memory here. It can be taken once an epoch.

        From any thread. The seconds waited are counted as `sample_wait_s`. Raises StoreError when
        the store stays out of reach, or when the prefetcher is closed meanwhile.
        """
        name = (source, epoch, number)
        with self._lock:
            self._request_until(name)
            fetched = self._waiting.pop(name)
            if fetched.done():
                return self._release(fetched.result(), number)
        samples = self._wait(fetched)
        with self._lock:
            return self._release(samples, number)

    def close(self) -> None:
        """End all reading now; whoever waits for a sample gets a StoreError."""
        with self._lock:
            self._closed = True
            begun = set(self._waiting.values())
        for reader in self._readers:
            reader.close()
        wait(begun)

    def _release(self, samples: Samples, number: int) -> RawSample | BadSample:
        sample = samples.pop(number)
        if isinstance(sample, RawSample):
            self._count(-len(sample.data))
        self._request_ahead()
        return sample

    def _wait(self, fetched: Future[Samples]) -> Samples:
        start = perf_counter()
        try:
            return fetched.result()
        finally:
            self._telemetry.record("sample_wait_s", start, perf_counter())

    def _request_until(self, name: tuple[int, int, int]) -> None:
        while name not in self._waiting:
            if self._closed:
                raise StoreError("reading was ended: the loader was closed")
            piece = next(self._pieces, None)
            if piece is None:
                raise LookupError(f"no piece is left that holds (source, epoch, number) = {name}")
            self._request(piece)
        self._request_ahead()

    def _request_ahead(self) -> None:
        while self._held_bytes < self._ahead_bytes and not self._closed:
            piece = next(self._pieces, None)
            if piece is None:
                return
            self._request(piece)

    def _request(self, piece: Piece) -> None:
        estimate = self._sample_bytes[piece.source] * len(piece.needed)
        self._count(estimate)
        fetched = begin(self._fetch(piece, estimate))
        for number in piece.needed:
            self._waiting[piece.source, piece.epoch, number] = fetched

    async def _fetch(self, piece: Piece, estimate: float) -> Samples:
        samples = await self._readers[piece.source].read_async(piece.first, piece.last)
        needed = {sample.number: sample for sample in samples if sample.number in piece.needed}
        held = sum(len(s.data) for s in needed.values() if isinstance(s, RawSample))
        self._count(held - estimate)
        return needed

    def _count(self, more_bytes: float) -> None:
        with self._counting:
            self._held_bytes += more_bytes


def split_into_pieces(window: Window, chunk: int) -> list[Piece]:
    """Group a window's samples by chunk, in the order in which each chunk is first needed."""
    by_chunk: dict[int, list[int]] = {}
    for number in window.numbers:
        by_chunk.setdefault(number // chunk, []).append(number)
    return [
        Piece(window.source, window.epoch, min(numbers), max(numbers), frozenset(numbers))
        for numbers in by_chunk.values()
    ]


def pieces_in_order(windows: Iterable[Window], chunks: Sequence[int]) -> Iterator[Piece]:
    """The pieces of windows after one another; `chunks`: samples of a chunk of every source."""
    for window in windows:
        yield from split_into_pieces(window, chunks[window.source])
