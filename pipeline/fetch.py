"""Samples by number: which bytes of which shard they are, read ahead in the order of need.

Called by the loader. A piece is a run of consecutive samples: one ranged GET per shard it touches.
Pieces are requested in the order in which their samples will be needed and as long as the bytes in
flight and not yet consumed stay within a budget; every sample's CRC32C is checked before anybody
decodes it.

Threads, not processes: the time goes into the store's client, which releases the GIL, and its
client does not survive a fork. A damaged sample or shard is no exception here but a `BadSample`:
the loader decides what replaces it. A store out of reach is waited for, and then an error: what is
trained on never depends on the network.
"""

import hashlib
import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.errors import (
    AccessDeniedError,
    DataError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
)
from pipeline.manifest import Snapshot
from pipeline.shards import crc32c, kept_rows, read_index
from pipeline.store import Store, resolve
from pipeline.telemetry import Telemetry

_INDEX_CACHE_BYTES = 128 << 20  # some 50 bytes a row: a thousand shards of 2,500 images
_COLUMNS = ("key", "offset", "length", "crc32c")
_PATIENCE_S = 300.0  # with a store that cannot be reached
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0

# The data is at fault, not the way to it: these samples are replaced and the run goes on.
_BAD_DATA = (DataError, ObjectMissingError, ObjectChangedError)

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RawSample:
    """One image as it lies in its shard."""

    number: int
    key: str
    shard: str
    data: bytes
    label: str | None


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, and why."""

    number: int
    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Piece:
    """Consecutive samples [first, last] that one window of one lane needs."""

    epoch: int
    first: int
    last: int
    needed: frozenset[int]


class _Index:
    """The kept rows of one shard, once somebody has loaded them."""

    def __init__(self) -> None:
        self.rows: pa.Table | None = None
        self.lock = threading.Lock()


class SampleReader:
    """Reads runs of samples of one snapshot.

    Args:
        dataset: the data set's prefix, against which the snapshot's relative keys are resolved.
        snapshot: which shards, and how many kept rows each.
        patience_s: how long a store may be out of reach before reading fails.
    """

    def __init__(
        self,
        dataset: Store,
        snapshot: Snapshot,
        telemetry: Telemetry,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._dataset = dataset
        self._snapshot = snapshot
        self._telemetry = telemetry
        self._patience_s = patience_s
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._index_bytes = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def read(self, first: int, last: int) -> list[RawSample | BadSample]:
        """Samples first … last, one GET per shard; damaged ones come back as BadSamples.

        Raises StoreError when the store itself stays out of reach or refuses: that says nothing
        about the samples.
        """
        found: list[RawSample | BadSample] = []
        for shard, start, stop in self._shards_of(first, last):
            found += self._read_rows(shard, start, stop)
        return found

    def close(self) -> None:
        """Give up waiting for a store that is out of reach."""
        self._closed.set()

    def _shards_of(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first kept row, end) of every shard that the samples touch."""
        starts = self._snapshot.first_row
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        while first <= last:
            begin, end = int(starts[shard]), int(starts[shard + 1])
            stop = min(last + 1, end)
            if stop > first:
                yield shard, first - begin, stop - begin
            first, shard = max(first, stop), shard + 1

    def _read_rows(self, shard: int, start: int, stop: int) -> list[RawSample | BadSample]:
        url = self._snapshot.tar[shard]
        number = int(self._snapshot.first_row[shard]) + start
        try:
            index = self._patiently(lambda: self._index(shard))
            rows = index.slice(start, stop - start).to_pydict()
            body, origin = self._patiently(lambda: self._read_range(shard, rows))
        except _BAD_DATA as error:
            return [BadSample(number + i, "", url, str(error)) for i in range(stop - start)]
        labels = rows.get("label") or [None] * len(rows["key"])
        samples: list[RawSample | BadSample] = []
        for i, (key, offset, length, expected) in enumerate(
            zip(rows["key"], rows["offset"], rows["length"], rows["crc32c"], strict=True)
        ):
            data = body[offset - origin : offset - origin + length]
            if crc32c(data) == expected:
                samples.append(RawSample(number + i, key, url, data, labels[i]))
            else:
                samples.append(BadSample(number + i, key, url, "checksum differs"))
        return samples

    def _patiently(self, work: Callable[[], T]) -> T:
        """Try again, with pauses that double, while the store cannot be reached."""
        deadline, pause_s = time.monotonic() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return work()
            except (AccessDeniedError, *_BAD_DATA):
                raise
            except StoreError as error:
                if time.monotonic() + pause_s > deadline or self._closed.is_set():
                    raise
                _log.warning("%s; trying again in %.1f s", error, pause_s)
            self._telemetry.add(fetch_retries=1)
            self._closed.wait(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _read_range(self, shard: int, rows: dict[str, Any]) -> tuple[bytes, int]:
        origin = rows["offset"][0]
        length = rows["offset"][-1] + rows["length"][-1] - origin
        store, key = resolve(self._dataset, self._snapshot.tar[shard])
        with self._telemetry.timed("fetch_s"):
            body = store.get_range(key, origin, length, tag=self._snapshot.tar_tag[shard])
        self._telemetry.add(fetch_requests=1, fetch_bytes=len(body))
        return body, origin

    def _index(self, shard: int) -> pa.Table:
        """The kept rows of a shard: one GET, then from memory; concurrent callers wait for it."""
        with self._lock:
            entry = self._indexes.setdefault(shard, _Index())
            self._indexes.move_to_end(shard)
        with entry.lock:
            if entry.rows is None:
                entry.rows = self._load_index(shard)
                self._make_room(entry.rows.nbytes)
            return entry.rows

    def _make_room(self, added_bytes: int) -> None:
        with self._lock:
            self._index_bytes += added_bytes
            while self._index_bytes > _INDEX_CACHE_BYTES and len(self._indexes) > 1:
                _, oldest = self._indexes.popitem(last=False)
                self._index_bytes -= oldest.rows.nbytes if oldest.rows is not None else 0

    def _load_index(self, shard: int) -> pa.Table:
        store, key = resolve(self._dataset, self._snapshot.index[shard])
        body = store.get(key)
        self._telemetry.add(fetch_requests=1, fetch_bytes=len(body))
        table = read_index(
            body, where=f"{store.url}/{key}", sha256=self._snapshot.index_sha256[shard]
        )
        names = [*_COLUMNS, *(("label",) if "label" in table.column_names else ())]
        rows = kept_rows(table, self._read_mask(shard)).select(names)
        expected = int(np.diff(self._snapshot.first_row[shard : shard + 2])[0])
        if len(rows) != expected:
            raise DataError(
                f"{store.url}/{key} keeps {len(rows)} rows where the snapshot says {expected}; "
                f"run `python -m shard_tools verify`"
            )
        return rows

    def _read_mask(self, shard: int) -> bytes | None:
        name = self._snapshot.mask[shard]
        if name is None:
            return None
        store, key = resolve(self._dataset, name)
        mask = store.get(key)
        if hashlib.sha256(mask).digest() != self._snapshot.mask_sha256[shard]:
            raise DataError(
                f"{store.url_of(key)}: the mask's SHA-256 is not the recorded one; restore the "
                f"object, or read an older version of the data set"
            )
        return mask


class Prefetcher:
    """Fetches pieces ahead of their need and hands out their samples one by one.

    Args:
        pieces: in the order of need; consumed lazily.
        ahead_bytes: of samples requested or held and not yet taken. A sample that is waited for is
            fetched whatever this says: too little slows a run down but never stops it.
        sample_bytes: mean size of a sample, the estimate until a piece has arrived.
    """

    def __init__(
        self,
        reader: SampleReader,
        pieces: Iterator[Piece],
        *,
        ahead_bytes: int,
        sample_bytes: float,
        threads: int,
    ) -> None:
        self._reader = reader
        self._pieces = pieces
        self._ahead_bytes = ahead_bytes
        self._sample_bytes = sample_bytes
        self._waiting: dict[tuple[int, int], Future[None]] = {}  # (epoch, sample) -> its piece
        self._arrived: dict[tuple[int, int], RawSample | BadSample] = {}
        self._held_bytes = 0.0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")

    def take(self, epoch: int, number: int) -> RawSample | BadSample:
        """Wait for a sample and release its memory here. A sample can be taken once an epoch."""
        name = (epoch, number)
        with self._lock:
            self._request_until(name)
            future = self._waiting.pop(name)
        future.result()
        with self._lock:
            sample = self._arrived.pop(name)
            if isinstance(sample, RawSample):
                self._held_bytes -= len(sample.data)
            self._request_ahead()
        return sample

    def close(self) -> None:
        self._reader.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _request_until(self, name: tuple[int, int]) -> None:
        while name not in self._waiting:
            self._request(next(self._pieces))
        self._request_ahead()

    def _request_ahead(self) -> None:
        while self._held_bytes < self._ahead_bytes:
            piece = next(self._pieces, None)
            if piece is None:
                return
            self._request(piece)

    def _request(self, piece: Piece) -> None:
        estimate = self._sample_bytes * len(piece.needed)
        self._held_bytes += estimate
        future = self._pool.submit(self._fetch, piece, estimate)
        for number in piece.needed:
            self._waiting[piece.epoch, number] = future

    def _fetch(self, piece: Piece, estimate: float) -> None:
        samples = [
            s for s in self._reader.read(piece.first, piece.last) if s.number in piece.needed
        ]
        held = sum(len(s.data) for s in samples if isinstance(s, RawSample))
        with self._lock:
            self._held_bytes += held - estimate
            for sample in samples:
                self._arrived[piece.epoch, sample.number] = sample


def split_into_pieces(epoch: int, samples: Sequence[int], chunk: int) -> list[Piece]:
    """Group a window's samples by chunk, in the order in which each chunk is first needed."""
    by_chunk: OrderedDict[int, list[int]] = OrderedDict()
    for number in samples:
        by_chunk.setdefault(number // chunk, []).append(number)
    return [
        Piece(epoch, min(numbers), max(numbers), frozenset(numbers))
        for numbers in by_chunk.values()
    ]


def pieces_in_order(windows: Iterator[tuple[int, Sequence[int]]], chunk: int) -> Iterator[Piece]:
    """The pieces of (epoch, samples of a window) after one another."""
    for epoch, samples in windows:
        yield from split_into_pieces(epoch, samples, chunk)
