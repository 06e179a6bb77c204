"""WebDataset tars without an index, streamed through the webdataset library: no order, no state.

Called by pipeline.streaming. The library expands the tars' names and groups members to samples.
What is ours: the order of the tars, a function of the seed and of where the run begins; every byte
comes through pipeline.store, so that no URL ever starts a shell, as the library's own `pipe:` and
`s3:` openers do; nothing is decoded or unpickled; memory is bounded, where the library reads
members whatever size they claim and counts the samples of its shuffle buffer, not their bytes; and
losses are told. The library, and `tarfile` below it, take a tar that is cut or damaged between two
members for its end without a word; and it merges `a.1.jpg` and `a.2.jpg` into one sample, since a
key ends at its first dot.
"""

import gzip
import hashlib
import itertools
import logging
import random
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys

from pipeline.decode import MAX_BYTES
from pipeline.errors import (
    DataError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    UsageError,
)
from pipeline.randomness import mix64
from pipeline.samples import RawSample
from pipeline.shards import BLOCK_BYTES, Input
from pipeline.store import find_file, open_stream, refuse_credentials
from pipeline.telemetry import Telemetry

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_JPEG = ("jpg", "jpeg", "jpe", "jfif")
_OTHER_IMAGES = ("avif", "bmp", "gif", "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp")
_IMAGE_ENDINGS = frozenset(_JPEG + _OTHER_IMAGES)
_STREAM = 0x57D5  # keeps these draws independent of others at the same coordinates
_WITHOUT_BODY = frozenset(b"123456")  # links, devices, folders: none, whatever their size says
_ABOUT_OTHERS = frozenset(b"xgXLK")  # long names and the like, which tarfile reads whole
_MOST_ABOUT_BYTES = 1 << 20  # of these; what is real has some hundred
_META = re.compile(r"__[^/]*__($|/)")  # to webdataset, members about the tar itself

# The tar is at fault, not the way to it: it is left, and the stream goes on.
_BAD_TAR = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    ObjectMissingError,
    ObjectChangedError,
)

_LISTED = 20  # lost tars that are named
_MERGED = (
    "%s of %s has the images %s, of which only the first is used: to webdataset, a key ends at its "
    "first dot"
)
_LARGE = (
    "%s of %s has %d bytes and is left out: of a sample, %d bytes of images are read at most; pack "
    "smaller images. Further ones are counted as lost_members"
)

_log = logging.getLogger(__name__)

Member = dict[str, Any]  # of webdataset: fname, data, __url__; empty behind the last of a tar


def names_tars(dataset: str) -> bool:
    """Whether a data set's URL names tars, by itself or by braces, instead of a packed data set."""
    return "{" in dataset or dataset.endswith(_TAR_ENDINGS)


def expand_tars(dataset: str) -> list[str]:
    """The URLs that webdataset's notation stands for: {000..123}, {a,b}, lists joined by ::.

    Raises UsageError for braces that do not hold, commands, and what is no tar.
    """
    try:
        urls: list[str] = expand_urls(dataset)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"loader.dataset={dataset} cannot be expanded: {error}") from None
    for url in urls:
        if url.lstrip().startswith("pipe:"):
            raise UsageError(
                f"loader.dataset names a command, {url!r}, and commands are not run; name the tars "
                "by their URLs: any that fsspec opens will do"
            )
        if not url.endswith(_TAR_ENDINGS):
            raise UsageError(
                f"loader.dataset={dataset}: {url!r} is no tar ({', '.join(_TAR_ENDINGS)}); name "
                "tars, or the prefix of a packed data set"
            )
        refuse_credentials(url)
    return urls


class TarStream:
    """Encoded images of some tars, over and over.

    Args:
        urls: of all tars; a rank reads each world_size-th of them as they are shuffled.
        shuffle_samples: images held in memory to be shuffled.
        budget_bytes: what these may take together; fewer are held where it is not enough.

    Raises UsageError when there is not a tar for every rank.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        seed: int,
        shuffle_samples: int,
        telemetry: Telemetry,
        budget_bytes: int = 2 << 30,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(urls) < world_size:
            raise UsageError(
                f"loader.dataset names {len(urls)} tars for {world_size} ranks, and a tar is not "
                "shared; start fewer ranks, or index the tars: python -m shard_tools adopt"
            )
        self.urls = urls
        self._seed = seed
        self._shuffle_samples, self._budget_bytes = shuffle_samples, budget_bytes
        self._telemetry = telemetry
        self._rank, self._world_size = rank, world_size
        self._lost: set[str] = set()  # tars
        self._told: set[str] = set()
        self._closed = threading.Event()  # of what `samples` returned last

    def close(self) -> None:
        """End what `samples` returned last: it raises StoreError instead of reading on.

        Returns at once, from any thread. A read that is under way ends by itself, which takes as
        long as the store's patience, so whoever waits for it should not wait for long.
        """
        self._closed.set()

    def samples(
        self, epoch: int, step: int, *, is_known: Callable[[int], bool] | None = None
    ) -> Generator[RawSample, None, None]:
        """Images for a run that begins at a step: pass after pass, each with another order.

        `number` is made of the tar's URL and the key. `is_known` is asked of each, and says which
        to leave out. What an earlier call has returned is closed.

        While iterating, raises DataError when a pass finds nothing, StoreError when a store stays
        out of reach or behind `close`.
        """
        self.close()
        self._closed = threading.Event()
        return self._passes(epoch, step, is_known, self._closed)

    def _passes(
        self,
        epoch: int,
        step: int,
        is_known: Callable[[int], bool] | None,
        closed: threading.Event,
    ) -> Generator[RawSample, None, None]:
        for turn in itertools.count():
            found = 0
            for sample in self._one_pass(epoch, step, turn, closed):
                if is_known is None or not is_known(sample.number):
                    found += 1
                    yield sample
            if closed.is_set():  # an end that was asked for, perhaps before the first image
                return
            if not found:
                raise DataError(
                    f"no image can be used in any tar of this rank, of {len(self.urls)} tars from "
                    f"{self.urls[0]} on; look at the warnings above, and that images end in .jpg, "
                    ".png, .webp, …"
                )

    def _one_pass(
        self, epoch: int, step: int, turn: int, closed: threading.Event
    ) -> Iterator[RawSample]:
        drawn = mix64(_STREAM, self._seed, epoch, step, turn, np.arange(len(self.urls)))
        tars = [self.urls[number] for number in np.argsort(drawn)]
        members = self._members(tars[self._rank :: self._world_size], closed)
        return shuffled(
            self._images(group_by_keys(members, handler=self._skip_member)),
            random.Random(int(mix64(_STREAM, self._seed, epoch, step, turn, self._rank))),
            num_samples=self._shuffle_samples,
            budget_bytes=self._budget_bytes,
        )

    def _members(self, urls: Iterable[str], closed: threading.Event) -> Iterator[Member]:
        """The files in some tars, each tar's followed by an empty one, however it ended."""
        for url in urls:
            try:
                with self._opened(url, closed) as stream:
                    yield from self._read_tar(url, stream)
                if not stream.has_ended:
                    raise tarfile.ReadError(f"cut or damaged at byte {stream.offset}")
            except _BAD_TAR as error:
                self._leave_tar(url, error)
            yield {}

    @contextmanager
    def _opened(self, url: str, closed: threading.Event) -> "Iterator[_WatchedTar]":
        _refuse_closed(closed, url)
        file = find_file(url)
        if file is None:
            raise ObjectMissingError("there is no such file; check the URL")
        with open_stream(url, file.size_bytes or 0, tag=file.tag) as stream:
            counted: Any = _CountedStream(stream, url, self._telemetry, closed)
            if url.endswith(".tar"):
                yield _WatchedTar(counted)
            else:
                with gzip.GzipFile(fileobj=counted) as unzipped:
                    yield _WatchedTar(unzipped)

    def _read_tar(self, url: str, stream: Any) -> Iterator[Member]:
        """The files in a tar: images with their bytes, as many as are allowed a sample."""
        key, room_bytes = "", MAX_BYTES
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in iter(tar.next, None):
                tar.members = []  # type: ignore[attr-defined]  # it would grow with the tar
                if not member.isreg() or _META.match(member.name):
                    continue
                last, key = key, base_plus_ext(member.name)[0]
                room_bytes = room_bytes if key == last else MAX_BYTES
                data = b""
                if _is_image(member.name.lower()):
                    if member.size > room_bytes:
                        self._tell_large(url, member)
                        continue
                    data = _body(tar, member)
                    room_bytes -= len(data)
                yield {"fname": member.name, "data": data, "__url__": url}

    def _leave_tar(self, url: str, error: Exception) -> None:
        if url not in self._lost:
            self._lost.add(url)
            self._telemetry.add(lost_tars=1)
            self._tell_lost(url, str(error))

    def _tell_lost(self, url: str, reason: str) -> None:
        if len(self._lost) <= _LISTED:
            _log.warning("what is left of %s is lost: %s; restore it from a copy", url, reason)
        if len(self._lost) == _LISTED:
            _log.warning("further lost tars are counted as lost_tars, and not named any more")

    def _tell_large(self, url: str, member: tarfile.TarInfo) -> None:
        self._telemetry.add(lost_members=1)
        self._tell_once("large", _LARGE, member.name, url, member.size, MAX_BYTES)

    def _skip_member(self, error: Exception) -> bool:
        """A handler of webdataset, for two members of one name: the first one counts."""
        if not isinstance(error, ValueError):
            raise error
        self._telemetry.add(lost_members=1)
        self._tell_once("twice", "a tar has two members of one name, the second is lost: %s", error)
        return True

    def _images(self, samples: Iterable[dict[str, Any]]) -> Iterator[RawSample]:
        for sample in samples:
            key, url = sample["__key__"], sample["__url__"]
            names = [name for name in sample if _is_image(name)]
            names.sort(key=lambda name: name.count("."))  # jpg rather than mask.png
            if not names:
                self._telemetry.add(samples_without_image=1)
                continue
            if len(names) > 1:
                self._telemetry.add(lost_members=len(names) - 1)
                self._tell_once("merged", _MERGED, key, url, ", ".join(names))
            yield RawSample(_number_of(url, key), key, url, sample[names[0]], None)

    def _tell_once(self, what: str, message: str, *details: object) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.warning(message, *details)


def shuffled(
    samples: Iterable[RawSample], rng: random.Random, *, num_samples: int, budget_bytes: int
) -> Iterator[RawSample]:
    """Samples drawn from a buffer of so many, of fewer if these take more than budget_bytes.

    As webdataset's, it hands out from being half full on, and takes two for one until it is full.
    """
    held: list[RawSample] = []
    held_bytes = 0
    for number, sample in enumerate(samples):
        held.append(sample)
        held_bytes += len(sample.data)
        is_due = number % 2 == 1 and len(held) >= num_samples // 2
        while held and (is_due or len(held) > num_samples or held_bytes > budget_bytes):
            picked = _pick(held, rng)
            held_bytes -= len(picked.data)
            is_due = False
            yield picked
    while held:
        yield _pick(held, rng)


def _pick(held: list[RawSample], rng: random.Random) -> RawSample:
    place = rng.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] in _IMAGE_ENDINGS


def _body(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "a regular file"
    return file.read()


def _refuse_closed(closed: threading.Event, url: str) -> None:
    if closed.is_set():
        raise StoreError(f"reading {url} was ended: the stream was closed")


class _CountedStream:
    """Counts what is read of a stream, and the time it takes. Raises StoreError once closed."""

    def __init__(
        self, stream: Input, url: str, telemetry: Telemetry, closed: threading.Event
    ) -> None:
        self._stream, self._url, self._telemetry, self._closed = stream, url, telemetry, closed

    def read(self, length_bytes: int) -> bytes:
        _refuse_closed(self._closed, self._url)
        with self._telemetry.timed("fetch_s"):
            data = self._stream.read(length_bytes)
        self._telemetry.add(fetch_bytes=len(data))
        return data


class _WatchedTar:
    """Hands a tar on and follows its headers, to tell its end from a cut.

    Raises ReadError instead of reading on behind a header about others that is too large to hold.

    Attributes:
        offset: where the header stands that comes next, or that cannot be followed. has_ended:
        whether a block of zeros was met where a header should be.
    """

    def __init__(self, stream: Any) -> None:
        self.offset = 0
        self.has_ended = False
        self._stream = stream
        self._header = b""
        self._body_bytes = 0  # still to come before the next header
        self._lost = False
        self._refused = ""  # why there is no reading on

    def read(self, length_bytes: int) -> bytes:
        if self._refused:
            raise tarfile.ReadError(self._refused)
        data: bytes = self._stream.read(length_bytes)
        rest = memoryview(data)
        while rest and not (self.has_ended or self._lost):
            rest = self._follow(rest)
        return data

    def _follow(self, data: memoryview) -> memoryview:
        """Take a part of a body or of a header; returns what is behind it."""
        if self._body_bytes:
            taken = min(self._body_bytes, len(data))
            self._body_bytes -= taken
            return data[taken:]
        missing = BLOCK_BYTES - len(self._header)
        self._header += data[:missing]
        if len(self._header) == BLOCK_BYTES:
            self._end_header()
        return data[missing:]

    def _end_header(self) -> None:
        try:
            member = tarfile.TarInfo.frombuf(self._header, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            self.has_ended = True
            return
        except tarfile.HeaderError:
            self._lost = True
            return
        if member.type[0] in _ABOUT_OTHERS and member.size > _MOST_ABOUT_BYTES:
            self._refused = f"a header of {member.size} bytes at byte {self.offset}"
        has_body = member.type[0] not in _WITHOUT_BODY
        self._body_bytes = -(-member.size // BLOCK_BYTES) * BLOCK_BYTES if has_body else 0
        self.offset += BLOCK_BYTES + self._body_bytes
        self._header = b""


def _number_of(url: str, key: str) -> int:
    """The same in every pass, run and rank: 63 bits."""
    digest = hashlib.blake2b(f"{url}\n{key}".encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest()) >> 1
