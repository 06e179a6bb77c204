"""Ranges of shards kept on a local disk, found by what they contain.

Used by pipeline.samples where fetch.cache_dir is set. An entry is a file named after the shard's
hash and the range, so another snapshot or run that holds the same shard finds it too, and a shard
that was replaced never does. Nothing here is trusted: a file carries the CRC32C of its range, which
is checked when a process first meets it, and the samples in it are checked whenever they are read.

An epoch reads everything once, in a random order. To drop the least recently used entry would
drop what is needed soonest, so nothing that this run has used is ever dropped: what earlier runs
left goes first, oldest first, and once the directory is full of this run's own, no more is let in.

Several processes may share a directory, of containers and machines that know nothing of each
other, so nothing depends on process IDs. How many bytes it holds stands in a file of its own, which
is locked and changed with every entry; opening counts anew, and removes what killed processes were
writing once it is an hour old. Entries appear by a rename, whole or not at all.
"""

import contextlib
import fcntl
import heapq
import logging
import os
import re
import secrets
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.shards import crc32c
from pipeline.telemetry import Telemetry

_TRAILER = struct.Struct("<I")  # CRC32C of all before it
_COUNT = struct.Struct("<q")
_COUNT_NAME = "bytes"
_PARTS = ".*.part"  # entries that are being written
_STALE_S = 3600.0  # since a part's last byte: nobody is writing it any more
_SHARD_FOLDER = re.compile(r"[0-9a-f]{2}")
_MOST_CANDIDATES = 10_000  # for dropping; found by looking at every file, so not often

_log = logging.getLogger(__name__)


class RangeCache:
    """A directory with at most `budget_bytes` of ranges. Safe to share between threads.

    Raises UsageError if nothing can be written there. What fails later is only a warning: ranges
    come from the store then.
    """

    def __init__(self, directory: str, budget_bytes: int, telemetry: Telemetry) -> None:
        self._folder = Path(directory)
        self._budget_bytes = budget_bytes
        self._telemetry = telemetry
        self._known: set[str] = set()  # entries that this process has checked or written
        self._lock = threading.Lock()
        self._is_full = self._is_broken = self._was_damaged = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._count_file = os.open(self._folder / _COUNT_NAME, os.O_RDWR | os.O_CREAT, 0o644)
            self._begun = self._now()
            self._recount()
        except OSError as error:
            raise UsageError(
                f"fetch.cache_dir: cannot use {directory!r}: {error.strerror}; give a directory "
                "that can be written to, or leave it empty"
            ) from None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._count_file)

    def get(self, content: bytes, start_bytes: int, length_bytes: int) -> bytes | None:
        """A range of the shard with the hash `content`, or None."""
        name = _name(content, start_bytes, length_bytes)
        try:
            body = self._read(name, length_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._stop_writing(error)
            return None
        if body is None:
            self._drop_damaged(name)
            return None
        self._telemetry.add(cache_hits=1, cache_hit_bytes=length_bytes)
        return body

    def put(self, content: bytes, start_bytes: int, body: bytes) -> None:
        """Keep a range, if there is room and it is not there yet. It must have been checked."""
        name = _name(content, start_bytes, len(body))
        if self._is_broken or self._path(name).exists():
            return
        part = self._folder / f".{secrets.token_hex(8)}.part"
        try:
            if self._reserve(part, len(body) + _TRAILER.size):
                self._write(part, name, body)
            else:
                self._telemetry.add(cache_refused=1)
        except OSError as error:
            self._stop_writing(error)
            self._release(part)

    def remove(self, content: bytes, start_bytes: int, length_bytes: int) -> None:
        """Forget a range whose samples are damaged."""
        self._drop_damaged(_name(content, start_bytes, length_bytes))

    def _read(self, name: str, length_bytes: int) -> bytes | None:
        """The range of an entry; None if it is damaged."""
        with self._path(name).open("rb") as file:
            body, trailer = file.read(length_bytes), file.read()
            if len(body) != length_bytes or len(trailer) != _TRAILER.size:
                return None
            if name not in self._known:
                if _TRAILER.pack(crc32c(body)) != trailer:
                    return None
                os.utime(file.fileno())  # so that nobody of this run drops it
                self._known.add(name)
        return body

    def _write(self, part: Path, name: str, body: bytes) -> None:
        with part.open("r+b") as file:
            file.write(body)
            file.write(_TRAILER.pack(crc32c(body)))
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        with self._counting() as count:
            if path.exists():  # another process was faster: one of two counts
                count[0] -= _unlink(part)
            else:
                part.replace(path)
                self._known.add(name)

    def _reserve(self, part: Path, size: int) -> bool:
        """Take `size` bytes if they fit, for the file `part`, dropping what this run has not used.

        The file has its size at once, so that a process that counts anew meanwhile counts it too.
        """
        if self._is_full:
            return False
        with self._counting() as count:
            while count[0] + size > self._budget_bytes:
                freed = self._drop_oldest()
                if freed is None:
                    self._stop_growing()
                    return False
                count[0] -= freed
            with part.open("wb") as file:
                file.truncate(size)
            count[0] += size
        return True

    def _release(self, part: Path) -> None:
        with contextlib.suppress(OSError), self._counting() as count:
            count[0] -= _unlink(part)

    def _drop_damaged(self, name: str) -> None:
        """Remove an entry; told once."""
        if not self._was_damaged:
            self._was_damaged = True
            _log.warning(
                "fetch.cache_dir: %s is damaged and removed; its range is read from the store, as "
                "with further ones, which are not told: if they are many, look at that disk",
                self._path(name),
            )
        self._known.discard(name)
        with contextlib.suppress(OSError), self._counting() as count:
            count[0] -= _unlink(self._path(name))

    def _drop_oldest(self) -> int | None:
        """The bytes freed, None if all that is left was used by this run."""
        while True:
            if not self._candidates and self._has_more:
                self._find_candidates()
            if not self._candidates:
                return None
            path = self._candidates.popleft()
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if path.stat().st_mtime < self._begun:
                    return _unlink(path)

    def _now(self) -> float:
        """The time on the disk's own clock, which may lag behind or be another machine's."""
        os.utime(self._count_file)
        return os.fstat(self._count_file).st_mtime

    def _recount(self) -> None:
        """Count what is there, and remove what killed processes were writing."""
        with self._counting() as count:
            for path in self._folder.glob(_PARTS):
                if _is_older(path, self._begun - _STALE_S):
                    path.unlink(missing_ok=True)
            # Parts first: one that is renamed meanwhile counts twice, not never.
            parts = sum(map(_size, self._folder.glob(_PARTS)))
            count[0] = parts + self._find_candidates()

    def _find_candidates(self) -> int:
        """Look at every entry: remember the oldest, return the bytes of all."""
        entries = list(_entries(self._folder))
        earlier = (entry for entry in entries if entry[0] < self._begun)
        oldest = heapq.nsmallest(_MOST_CANDIDATES, earlier)
        self._candidates = deque(Path(path) for _, path, _ in oldest)
        self._has_more = len(oldest) == _MOST_CANDIDATES
        return sum(size for _, _, size in entries)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[list[int]]:
        """The number of bytes held, a list of one to change, locked against all processes."""
        with self._lock:
            fcntl.flock(self._count_file, fcntl.LOCK_EX)
            try:
                stored = os.pread(self._count_file, _COUNT.size, 0)
                count = list(_COUNT.unpack(stored)) if len(stored) == _COUNT.size else [0]
                yield count
                os.pwrite(self._count_file, _COUNT.pack(count[0]), 0)
            finally:
                fcntl.flock(self._count_file, fcntl.LOCK_UN)

    def _stop_growing(self) -> None:
        """Let no more in; told once."""
        self._is_full = True
        _log.warning(
            "fetch.cache_dir: %s holds all of fetch.cache_bytes=%d that this run has used; what "
            "else it needs is read from the store every time",
            self._folder,
            self._budget_bytes,
        )

    def _stop_writing(self, error: OSError) -> None:
        """No more writing after an error; told once."""
        if not self._is_broken:
            self._is_broken = True
            _log.warning(
                "fetch.cache_dir: %s is not written to any more: %s; what it holds is still used, "
                "the rest is read from the store every time",
                self._folder,
                error.strerror,
            )

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name


def _name(content: bytes, start_bytes: int, length_bytes: int) -> str:
    return f"{content.hex()}-{start_bytes}-{length_bytes}"


def _entries(folder: Path) -> Iterator[tuple[float, str, int]]:
    """(time of last use, path, size) of every entry."""
    for path in folder.iterdir():
        if _SHARD_FOLDER.fullmatch(path.name):
            with os.scandir(path) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                        stat = entry.stat()
                        yield stat.st_mtime, entry.path, stat.st_size


def _is_older(path: Path, time_s: float) -> bool:
    """Whether a file was last written before a time; False if it is gone."""
    try:
        return path.stat().st_mtime < time_s
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    """0 if it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _unlink(path: Path) -> int:
    """Remove a file; the bytes that it had."""
    size = _size(path)
    path.unlink(missing_ok=True)
    return size
