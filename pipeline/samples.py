"""Samples by number: which bytes of which shard they are, fetched and checked.

Called by pipeline.fetch, which reads ahead, by pipeline.sequential, and by whoever needs a single
sample. A run of samples is one ranged GET per shard it touches; where they lie says the shard's
index, which is read once and kept while there is room. Every sample's CRC32C is checked here,
before anybody decodes it, whether it came from a store or from the disk cache.

A difference may have come about on the way, so what does not fit is fetched once more before it
counts. A damaged sample or shard is no exception here but a `BadSample`: the loader decides what
replaces it. A store out of reach is an error: what is trained on never depends on the network.

An index may have come from elsewhere (an adopted shard), so it is not believed either: nothing is
asked for that lies outside the shard, is larger than what would be decoded, or between two samples
that are far apart.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.decode import MAX_BYTES, TOO_LARGE
from pipeline.errors import DataError, ObjectChangedError, ObjectMissingError
from pipeline.manifest import Snapshot
from pipeline.ranges import FetchConfig, RangeReader, begin
from pipeline.shards import crc32c, kept_rows, read_index
from pipeline.store import Store, resolve
from pipeline.telemetry import Telemetry

_INDEX_CACHE_BYTES = 128 << 20  # some 50 bytes a row: a thousand shards of 2,500 images
_MOST_GAP_BYTES = 8 << 20  # between two samples of a request; more of it would take longer than two

# The data is at fault, not the way to it: these samples are replaced and the run goes on.
_BAD_DATA = (DataError, ObjectMissingError, ObjectChangedError)


@dataclass(slots=True)  # not frozen: that takes a microsecond
class RawSample:
    """One image as it lies in its shard; `number` counts within the snapshot."""

    number: int
    key: str
    shard: str
    data: bytes
    label: str | None


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used, and why."""

    number: int
    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class _Rows:
    """Where the kept samples of one shard lie: numpy columns, and Arrow ones for what is text."""

    store: Store
    name: str  # of the tar, in `store`
    url: str  # of the tar, as the snapshot has it
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    key: pa.Array
    label: pa.Array
    is_usable: NDArray[np.bool_]
    breaks: NDArray[np.int64]  # rows that do not belong to the same request as the one before

    @property
    def size_bytes(self) -> int:
        arrays = (self.offset, self.length, self.crc32c, self.key, self.label, self.is_usable)
        return sum(int(array.nbytes) for array in arrays)

    def runs(self, start: int, stop: int) -> list["_Run"]:
        """Rows start … stop - 1, in as many requests as they take."""
        inner = self.breaks[(self.breaks > start) & (self.breaks < stop)].tolist()
        return [_Run(self, *each) for each in pairwise([start, *inner, stop])]

    def why_bad(self, row: int) -> str:
        """What is wrong with a row whose bytes were not found."""
        offset, length = int(self.offset[row]), int(self.length[row])
        if self.is_usable[row]:
            return "checksum differs"
        if length > MAX_BYTES:
            return f"{TOO_LARGE}: {length} bytes, allowed are {MAX_BYTES}"
        return (
            f"the index places {length} bytes at {offset}, which is outside the shard or in the "
            "sample before; adopt or pack it again"
        )


class SampleReader:
    """Reads runs of samples of one snapshot.

    Args:
        dataset: the data set's prefix, against which the snapshot's relative keys are resolved.
        snapshot: which shards, and how many kept rows each.
        fetch: how to read; not used where `ranges` is given.
        ranges: another reader's, so that all sources of a process share its limits and its cache.

    Raises UsageError if fetch.cache_dir cannot be used.
    """

    def __init__(
        self,
        dataset: Store,
        snapshot: Snapshot,
        telemetry: Telemetry,
        *,
        fetch: FetchConfig = FetchConfig(),  # noqa: B008 - frozen
        ranges: RangeReader | None = None,
    ) -> None:
        self.telemetry = telemetry
        self.ranges = ranges or RangeReader(fetch, telemetry)
        self._dataset = dataset
        self._snapshot = snapshot
        self._indexes = _Indexes(_INDEX_CACHE_BYTES)

    def read(self, first: int, last: int) -> list[RawSample | BadSample]:
        """Samples first … last, one GET per shard; damaged ones come back as BadSamples.

        Blocks; not for the fetch loop. Raises StoreError when the store itself stays out of reach
        or refuses, which says nothing about the samples, or when the reader is closed.
        """
        return begin(self.read_async(first, last)).result()

    async def read_async(self, first: int, last: int) -> list[RawSample | BadSample]:
        """`read`, on the fetch loop."""
        found: list[RawSample | BadSample] = []
        for shard, start, stop in self._shards_of(first, last):
            found += await self._read_rows(shard, start, stop)
        return found

    def close(self) -> None:
        """End all reading at once."""
        self.ranges.close()

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

    async def _read_rows(self, shard: int, start: int, stop: int) -> list[RawSample | BadSample]:
        number = int(self._snapshot.first_row[shard])
        try:
            rows = await self._indexes.get(shard, self._load_rows)
            runs = rows.runs(start, stop)
            data = [await self._read_run(shard, run) for run in runs]
        except _BAD_DATA as error:
            url = self._snapshot.tar[shard]
            return [BadSample(number + i, "", url, str(error)) for i in range(start, stop)]
        found = zip(runs, data, strict=True)
        return [s for run, each in found for s in run.samples(each, number + run.start)]

    async def _read_run(self, shard: int, run: "_Run") -> list[bytes | None]:
        """The bytes of every sample of a run, None where they are damaged."""
        if not run.is_usable:
            return [None]
        content, cache = self._snapshot.tar_hash[shard], self.ranges.cache
        if cache is not None:
            cached = await asyncio.to_thread(cache.get, content, run.begin, run.num_bytes)
            if cached is not None:
                data = run.cut([cached])
                if None not in data:
                    return data
                cache.remove(content, run.begin, run.num_bytes)
        parts = await self._read_parts(shard, run)
        whole = b"" if cache is None else b"".join(parts)
        data = run.cut(parts)
        if None in data:
            return await self._read_again(shard, run, data)
        if cache is not None:
            await asyncio.to_thread(cache.put, content, run.begin, whole)
        return data

    async def _read_again(
        self, shard: int, run: "_Run", data: list[bytes | None]
    ) -> list[bytes | None]:
        """Fetch what was damaged once more: from the first such sample to the last, by one GET."""
        damaged = [i for i, found in enumerate(data) if found is None]
        self.telemetry.add(fetch_rereads=len(damaged))
        again = _Run(run.rows, run.start + damaged[0], run.start + damaged[-1] + 1)
        fresh = again.cut(await self._read_parts(shard, again))
        for i in damaged:  # not the good ones between them, which may have suffered this time
            data[i] = fresh[i - damaged[0]]
        return data

    async def _read_parts(self, shard: int, run: "_Run") -> list[bytes]:
        rows, tag = run.rows, self._snapshot.tar_tag[shard]
        return await self.ranges.read_parts(
            rows.store, rows.name, run.begin, run.num_bytes, tag=tag
        )

    async def _load_rows(self, shard: int) -> _Rows:
        mask = await self._read_mask(shard)
        name, sha256 = self._snapshot.index[shard], self._snapshot.index_sha256[shard]
        size, tag = int(self._snapshot.index_bytes[shard]), self._snapshot.index_tag[shard]
        body = await self._read_whole(name, size, tag, sha256)
        return await asyncio.to_thread(self._parse_rows, shard, body, mask)

    def _parse_rows(self, shard: int, body: bytes, mask: bytes | None) -> _Rows:
        where = resolve_url(self._dataset, self._snapshot.index[shard])
        table = read_index(body, where=where, sha256=self._snapshot.index_sha256[shard])
        rows = kept_rows(table, mask)
        expected = int(self._snapshot.kept[shard])
        if len(rows) != expected:
            raise DataError(
                f"{where} keeps {len(rows)} rows where the snapshot says {expected}; "
                f"run `python -m shard_tools verify`"
            )
        url = self._snapshot.tar[shard]
        store, name = resolve(self._dataset, url)
        numbers = {c: _numbers(rows[c]) for c in ("offset", "length", "crc32c")}
        offset, length = numbers["offset"], numbers["length"]
        is_usable = _find_usable(offset, length, int(self._snapshot.tar_bytes[shard]))
        breaks = _find_breaks(offset, length, is_usable)
        has_labels = "label" in rows.column_names
        labels = rows["label"].combine_chunks() if has_labels else pa.nulls(len(rows))
        keys = rows["key"].combine_chunks()
        return _Rows(
            store, name, url, **numbers, key=keys, label=labels, is_usable=is_usable, breaks=breaks
        )

    async def _read_mask(self, shard: int) -> bytes | None:
        name, sha256 = self._snapshot.mask[shard], self._snapshot.mask_sha256[shard]
        if name is None:
            return None
        size = -(-int(self._snapshot.rows[shard]) // 8)  # a bit for every row of the index
        mask = await self._read_whole(name, size, None, sha256)
        if hashlib.sha256(mask).digest() != sha256:
            raise DataError(
                f"{resolve_url(self._dataset, name)}: the mask's SHA-256 is not the recorded one; "
                f"restore the object, or read an older version of the data set"
            )
        return mask

    async def _read_whole(self, name: str, size: int, tag: str | None, sha256: bytes) -> bytes:
        """An object, read once more if its hash differs; the caller checks it again."""
        store, key = resolve(self._dataset, name)
        body = await self.ranges.read(store, key, 0, size, tag=tag)
        if hashlib.sha256(body).digest() == sha256:
            return body
        self.telemetry.add(fetch_rereads=1)
        return await self.ranges.read(store, key, 0, size, tag=tag)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A column of an index, -1 where it says nothing."""
    numbers: NDArray[np.int64] = column.cast(pa.int64()).fill_null(-1).to_numpy()
    return numbers


def _find_usable(
    offset: NDArray[np.int64], length: NDArray[np.int64], tar_bytes: int
) -> NDArray[np.bool_]:
    """Which rows lie in the tar behind the one before, and are no larger than what is decoded."""
    has_size = (length >= 0) & (length <= MAX_BYTES)
    is_inside = has_size & (offset >= 0) & (offset <= tar_bytes - np.where(has_size, length, 0))
    ends = np.maximum.accumulate(np.where(is_inside, offset + length, 0))
    is_inside[1:] &= offset[1:] >= ends[:-1]
    return is_inside


def _find_breaks(
    offset: NDArray[np.int64], length: NDArray[np.int64], is_usable: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Rows before which a request ends: of two, one is not usable or they are far apart."""
    far = offset[1:] - (offset[:-1] + length[:-1]) > _MOST_GAP_BYTES
    return np.flatnonzero(far | ~(is_usable[1:] & is_usable[:-1])) + 1


class _Run:
    """Consecutive rows of one shard, and the range of bytes from the first to the last.

    A row that is not usable makes a run of its own, which must not be read.
    """

    def __init__(self, rows: _Rows, start: int, stop: int) -> None:
        self.rows, self.start, self._stop = rows, start, stop
        self.is_usable = bool(rows.is_usable[start])
        self._offsets: list[int] = rows.offset[start:stop].tolist()
        self._lengths: list[int] = rows.length[start:stop].tolist()
        self._crcs: list[int] = rows.crc32c[start:stop].tolist()
        self.begin = self._offsets[0]
        self.num_bytes = self._offsets[-1] + self._lengths[-1] - self.begin

    def cut(self, parts: list[bytes]) -> list[bytes | None]:
        """Every sample's bytes, None where their CRC32C is not the recorded one.

        Copies, each byte once: views would hold the parts until the last of their samples is used,
        which is a window later. `parts` is emptied on the way, so that nothing is held twice.
        """
        body = _Body(parts)
        data: list[bytes | None] = []
        for offset, length, expected in zip(self._offsets, self._lengths, self._crcs, strict=True):
            found = body.copy(offset - self.begin, length)
            data.append(found if crc32c(found) == expected else None)
        return data

    def samples(self, data: list[bytes | None], number: int) -> list[RawSample | BadSample]:
        """What `cut` found, as samples numbered from `number` on."""
        part, url = slice(self.start, self._stop), self.rows.url
        keys = self.rows.key[part].to_pylist()
        labels = self.rows.label[part].to_pylist()
        return [
            BadSample(number + i, key, url, self.rows.why_bad(self.start + i))
            if found is None
            else RawSample(number + i, key, url, found, label)
            for i, (found, key, label) in enumerate(zip(data, keys, labels, strict=True))
        ]


class _Body:
    """Bytes that come in several parts, read from start to end; `parts` is emptied."""

    def __init__(self, parts: list[bytes]) -> None:
        self._coming = parts
        self._coming.reverse()
        self._part = parts.pop() if parts else b""
        self._origin = 0  # where the part begins

    def copy(self, start: int, length: int) -> bytes:
        """So many bytes from `start` on, or what there is of them; no start before an earlier end.

        Parts before `start` are forgotten.
        """
        end = start + length
        pieces = [self._within(start, end)]
        while self._origin + len(self._part) < end and self._coming:
            self._origin += len(self._part)
            self._part = self._coming.pop()
            pieces.append(self._within(start, end))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _within(self, start: int, end: int) -> bytes:
        return self._part[max(0, start - self._origin) : max(0, end - self._origin)]


LoadRows = Callable[[int], Awaitable[_Rows]]


class _Indexes:
    """Rows by shard, the least recently used ones dropped; on the fetch loop only."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held_bytes = 0
        self._rows: OrderedDict[int, _Rows] = OrderedDict()
        self._loading: dict[int, asyncio.Task[_Rows]] = {}

    async def get(self, shard: int, load: LoadRows) -> _Rows:
        """Loaded once by `load(shard)`, whoever else asks meanwhile waits for it."""
        if (rows := self._rows.get(shard)) is not None:
            self._rows.move_to_end(shard)
            return rows
        task = self._loading.get(shard)
        if task is None:
            task = self._loading[shard] = asyncio.create_task(self._load(shard, load))
        return await task

    async def _load(self, shard: int, load: LoadRows) -> _Rows:
        try:
            rows = await load(shard)
        finally:
            del self._loading[shard]
        self._rows[shard] = rows
        self._held_bytes += rows.size_bytes
        while self._held_bytes > self._budget_bytes and len(self._rows) > 1:
            self._held_bytes -= self._rows.popitem(last=False)[1].size_bytes
        return rows


def resolve_url(dataset: Store, name: str) -> str:
    """The absolute URL of a snapshot's entry, for messages."""
    return name if "://" in name else dataset.url_of(name)
