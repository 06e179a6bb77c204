"""The bytes of a unit's inputs, in order: read ahead from stores, downloaded, or out of tars."""

import contextlib
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.decode import TOO_LARGE
from pipeline.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    SampleError,
    StoreError,
    UsageError,
)
from pipeline.store import SourceFile, find_file, read_file
from shard_tools.blame import CHANGED, reject_of
from shard_tools.download import DownloadSettings
from shard_tools.lists import read_urls
from shard_tools.sources import Kind, PlannedInput
from shard_tools.tars import TarInput, read_tar_file
from shard_tools.urls import redact

READ_AHEAD_BYTES = 64 * 2**20  # a worker
READERS = 8  # requests at once, a worker
GROUP_FILES, GROUP_BYTES = 16, 2 * 2**20  # local files that are fetched in one go
UNPLANNED_BYTES = 8 * 2**20  # that a file of unknown size counts for in what is read ahead
NEAR_S = 1e-3  # that it takes at most to open a file that is near

_LOCAL = "file://"
_SAMPLED_FILES = 8
# None: a local file, which the kernel has been told to read.
_Fetched = bytes | SampleError | StoreError | None


@dataclass(slots=True)
class Arrival:
    """One input: its number in the plan, what the index says of it, its bytes or why not."""

    row: int
    columns: dict[str, Any]
    data: bytes | SampleError


def read_inputs(
    planned: Sequence[PlannedInput],
    kind: Kind,
    *,
    max_bytes: int,
    url_column: str | None,
    download: DownloadSettings,
) -> Iterator[Arrival]:
    """Every input of a unit, in order; of tars, every image in them.

    What is wrong with one input becomes its SampleError. Raises StoreError if a store fails, see
    shard_tools.blame for the difference.
    """
    if kind == "urls":
        yield from _download(planned, download, url_column, max_bytes)
    elif kind == "tars":
        for piece in planned:
            yield from _unpack(piece, planned, max_bytes)
    else:
        yield from _read_ahead(planned, max_bytes)


def described(planned: PlannedInput) -> dict[str, Any]:
    """The index columns that are known before an input is read."""
    return {**planned.columns, "source": planned.source, "label": planned.label}


# ----------------------------------------------------------------------------------------
# files


def _read_ahead(files: Sequence[PlannedInput], max_bytes: int) -> Iterator[Arrival]:
    """Every file, those that come next being fetched meanwhile."""
    pending: deque[_Group] = deque()
    ahead_bytes = 0
    unit = _Unit(files, max_bytes)
    with _Fetchers(max_bytes) as fetchers:
        for group in _groups(files):
            size = sum(_expected_bytes(file, max_bytes) for file in group)
            while pending and (
                ahead_bytes + size > READ_AHEAD_BYTES or len(pending) >= 2 * READERS
            ):
                ahead_bytes -= pending[0].size_bytes
                yield from _arrivals(pending.popleft(), unit)
            pending.append(_Group(group, size, fetchers.begin(group)))
            ahead_bytes += size
        for rest in pending:
            yield from _arrivals(rest, unit)


def _expected_bytes(file: PlannedInput, max_bytes: int) -> int:
    return min(UNPLANNED_BYTES if file.size_bytes is None else file.size_bytes, max_bytes)


def _groups(files: Sequence[PlannedInput]) -> Iterator[Sequence[PlannedInput]]:
    """What is fetched in one go: with local files, handing over costs more than fetching."""
    group: list[PlannedInput] = []
    group_bytes = 0
    for file in files:
        group.append(file)
        group_bytes += file.size_bytes or 0
        if not _is_local(file) or len(group) >= GROUP_FILES or group_bytes >= GROUP_BYTES:
            yield group
            group, group_bytes = [], 0
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class _Group:
    """Files that are being fetched."""

    files: Sequence[PlannedInput]
    size_bytes: int
    fetched: Future[list[_Fetched]]


def _arrivals(group: _Group, unit: "_Unit") -> Iterator[Arrival]:
    for file, fetched in zip(group.files, group.fetched.result(), strict=True):
        data = _bytes_or_error(file, unit.max_bytes) if fetched is None else fetched
        if isinstance(data, bytes):
            unit.last_read = file
        else:
            data = unit.settle(file, data)
        yield Arrival(file.row, described(file), data)


class _Unit:
    """The files of a unit, which tell what is one's own fault from what is the store's."""

    def __init__(self, files: Sequence[PlannedInput], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._files = files
        self.last_read: PlannedInput | None = None

    def settle(self, file: PlannedInput, problem: SampleError | StoreError) -> bytes | SampleError:
        """What becomes of a file. Raises StoreError if it is the store that fails."""
        if isinstance(problem, SampleError):
            return problem
        reject = reject_of(file.source, problem, self._others())
        again = _bytes_or_error(file, self.max_bytes)  # the store may have been away for a moment
        return reject if isinstance(again, StoreError) else again

    def _others(self) -> list[str]:
        step = max(len(self._files) // _SAMPLED_FILES, 1)
        last = [] if self.last_read is None else [self.last_read]
        return [other.source for other in (*last, *self._files[::step])]


class _Fetchers(ThreadPoolExecutor):
    """Fetch groups of files.

    Of a local file the kernel is told to read it; the caller copies the bytes when it is their
    turn, since bytes that one thread reads and another gives back are fresh memory every time,
    whose page faults cost more than all else here. Where even opening takes long, as on a network
    file system, threads do that too.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(READERS)
        self._max_bytes = max_bytes
        self._is_near = True

    def begin(self, files: Sequence[PlannedInput]) -> Future[list[_Fetched]]:
        """Begin to fetch a group."""
        if not (self._is_near and _is_local(files[0])):
            return self.submit(self._fetch, files)
        started = time.perf_counter()
        done: Future[list[_Fetched]] = Future()
        done.set_result(self._fetch(files))
        self._is_near = time.perf_counter() - started < NEAR_S * len(files)
        return done

    def _fetch(self, files: Sequence[PlannedInput]) -> list[_Fetched]:
        if not _is_local(files[0]):
            return [_bytes_or_error(file, self._max_bytes) for file in files]
        with contextlib.suppress(OSError):  # what is wrong with a file shows when it is its turn
            for file in files:
                _prefetch(file)
        return [None] * len(files)


def _is_local(file: PlannedInput) -> bool:
    return file.source.startswith(_LOCAL)


def _prefetch(file: PlannedInput) -> None:
    """Have the kernel read a local file. Raises OSError."""
    descriptor = os.open(file.source.removeprefix(_LOCAL), os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _bytes_or_error(file: PlannedInput, max_bytes: int) -> bytes | SampleError | StoreError:
    try:
        return _read(file, max_bytes)
    except (SampleError, StoreError) as error:
        return error


def _read(file: PlannedInput, max_bytes: int) -> bytes:
    """A file's bytes.

    Raises SampleError if it is too large or not what was planned; StoreError if it cannot be read.
    """
    planned_bytes = file.size_bytes
    if planned_bytes is not None and planned_bytes > max_bytes:
        raise _too_large(planned_bytes, max_bytes)
    data = _read_local(file, max_bytes) if _is_local(file) else _read_remote(file, max_bytes)
    if planned_bytes is None:
        if len(data) > max_bytes:
            raise _too_large(len(data), max_bytes)
    elif planned_bytes != len(data):
        raise SampleError(CHANGED, f"{len(data)} bytes, planned were {planned_bytes}")
    return data


def _too_large(size_bytes: int, max_bytes: int) -> SampleError:
    return SampleError(TOO_LARGE, f"{size_bytes} bytes, allowed are {max_bytes}")


def _read_local(file: PlannedInput, max_bytes: int) -> bytes:
    """A byte more than planned, or allowed, at most. read_file would cost twice as much."""
    try:
        descriptor = os.open(file.source.removeprefix(_LOCAL), os.O_RDONLY)
        try:
            planned_bytes = file.size_bytes
            if planned_bytes is None:
                planned_bytes = min(os.fstat(descriptor).st_size, max_bytes)
            data = os.read(descriptor, planned_bytes + 1)
            if len(data) != planned_bytes:
                data = _read_on(descriptor, data, planned_bytes + 1)
            # Last, so that a change while it is read shows.
            if file.tag is not None and str(os.fstat(descriptor).st_mtime_ns) != file.tag:
                raise SampleError(CHANGED, f"{file.source}: another time than was planned")
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectMissingError(f"{file.source}: {error.strerror}") from None
    except OSError as error:
        raise StoreError(f"{file.source}: {error.strerror}") from None
    return data


def _read_on(descriptor: int, data: bytes, length_bytes: int) -> bytes:
    """All of `length_bytes`, or up to the end: network file systems may read less at once."""
    pieces = [data]
    while pieces[-1] and (missing := length_bytes - sum(map(len, pieces))):
        pieces.append(os.read(descriptor, missing))
    return b"".join(pieces)


def _read_remote(file: PlannedInput, max_bytes: int) -> bytes:
    size_bytes, tag = file.size_bytes, file.tag
    if size_bytes is None:  # another try, or a store that did not tell
        size_bytes, tag = _size_now(file, max_bytes), None
    at_most = max_bytes if size_bytes is None else size_bytes
    try:
        data = read_file(file.source, size_bytes=at_most, tag=tag)
        if size_bytes not in (None, len(data)):  # some clients pass a cut body as success
            data = read_file(file.source, size_bytes=at_most, tag=tag)
    except ObjectChangedError as error:
        raise SampleError(TOO_LARGE if size_bytes is None else CHANGED, str(error)) from None
    return data


def _size_now(file: PlannedInput, max_bytes: int) -> int | None:
    """A file's size, None where nobody knows.

    Raises SampleError if it is too large or not what was planned; ObjectMissingError.
    """
    now = find_file(file.source)
    if now is None:
        raise ObjectMissingError(f"{file.source}: there is nothing")
    if file.tag is not None and file.tag != now.tag:
        raise SampleError(CHANGED, f"{file.source} has tag {now.tag}, planned was {file.tag}")
    if now.size_bytes is not None and now.size_bytes > max_bytes:
        raise _too_large(now.size_bytes, max_bytes)
    return now.size_bytes


# ----------------------------------------------------------------------------------------
# URLs


def _download(
    planned: Sequence[PlannedInput],
    settings: DownloadSettings,
    url_column: str | None,
    max_bytes: int,
) -> Iterator[Arrival]:
    from shard_tools.downloader import Downloader  # with an HTTP client: an eighth of a second

    urls = _whole_urls(planned, url_column)
    with Downloader(settings, max_bytes=max_bytes) as downloader:
        fetched = downloader.fetch(urls.get(item.row, item.source) for item in planned)
        for item, data in zip(planned, fetched, strict=True):
            yield Arrival(item.row, described(item), data)


def _whole_urls(planned: Sequence[PlannedInput], url_column: str | None) -> dict[int, str]:
    """By row, the URLs of which the plan has only the redacted form: from their lists.

    Raises UsageError if a list has changed since the plan was made.
    """
    wanted: dict[str, dict[int, PlannedInput]] = defaultdict(dict)
    for item in planned:
        if item.origin is not None:
            listing, _, position = item.origin.rpartition("#")
            wanted[listing][int(position)] = item
    whole = {}
    for listing, items in wanted.items():
        found = read_urls(listing, items, url_column)
        for number, item in items.items():
            url = found.get(number, "")
            if redact(url) != item.source:
                raise UsageError(
                    f"{listing} has changed since the plan was made: its row {number} was "
                    f"{item.source}; put the old list back, or plan the new one: --new-plan"
                )
            whole[item.row] = url
    return whole


# ----------------------------------------------------------------------------------------
# tars


def _unpack(piece: PlannedInput, unit: Sequence[PlannedInput], max_bytes: int) -> Iterator[Arrival]:
    """The images of a tar, or of a piece of it; behind them a reject if it is gone or changed."""
    row = piece.row
    try:
        for member in _members(piece, max_bytes):
            columns = {"label": None, **member.columns, "source": f"{piece.source}#{member.name}"}
            data = member.problem if member.data is None else member.data
            assert data is not None
            yield Arrival(row, columns, data)
            row += 1
    # Other failures may pass, and the rest of a tar is too much to lose for one: they end the job.
    except (ObjectMissingError, ObjectChangedError, AccessDeniedError) as error:
        reject = reject_of(piece.source, error, (other.source for other in unit))
        yield Arrival(row, described(piece), reject)


def _members(piece: PlannedInput, max_bytes: int) -> Iterator[TarInput]:
    return read_tar_file(
        tar_file(piece),
        start_bytes=piece.start_bytes or 0,
        end_bytes=piece.end_bytes,
        max_bytes=max_bytes,
    )


def tar_file(piece: PlannedInput) -> SourceFile:
    """The tar of a plan's input, as it was listed."""
    assert piece.size_bytes is not None
    assert piece.tag is not None
    return SourceFile(piece.source, piece.source, piece.size_bytes, piece.tag)
