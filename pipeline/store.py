"""One object store: a prefix on S3 (or what speaks it) or a local directory, same promises.

Everything that is committed goes through here: whole objects appear or do not (`Store.writer`), and
one of many contenders wins (`Store.put_if_absent`). The hot paths run on obstore, which takes a
third of s3fs's CPU time for a large object and a tenth for a small one; sources (`list_files`,
`read_file`) may be whatever fsspec opens, S3 listed through s3fs. No other module knows these
libraries, nor S3 itself.

S3 is configured only by the standard AWS environment variables and files, read by botocore for both
libraries: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE,
AWS_ENDPOINT_URL[_S3], AWS_REGION or AWS_DEFAULT_REGION, ~/.aws/*.

An opened store must not be used in a forked child (obstore's runtime does not survive a fork):
start workers by spawn or forkserver. Stores pickle by their URL.
"""

import asyncio
import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import fsspec
import obstore
from obstore import exceptions as obstore_errors
from obstore.store import LocalStore, S3Store

from pipeline.errors import (
    AccessDeniedError,
    CropstreamError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    ThrottledError,
    UsageError,
)

if TYPE_CHECKING:
    from obstore.store import S3Config  # not importable at run time

PART_BYTES = 8 * 2**20  # S3 takes at most 10,000 parts: objects up to 80 GB
_FILE_PART_BYTES = 2 * 2**20  # of a local file: written while they are in the processor's cache
PARTS_IN_FLIGHT = 4
_FILE_THREADS = 32
SHORT_BODY_ATTEMPTS = 3
_JUMP_BYTES = 64 * 2**10  # fetched first behind bytes that were passed over

_CLIENT_ERRORS = (obstore_errors.BaseError, OSError, ValueError)  # what obstore raises

# Finite, so that a wrong endpoint ends in a message within seconds and a stalled read is tried
# again.
_CONNECT_TIMEOUT_S = 3
_READ_TIMEOUT_S = 20
_REQUEST_TIMEOUT_S = 120
_MAX_RETRIES = 4

# Of streamed ranges, whose reader watches their pace itself: only against what it cannot see.
_STREAM_SILENCE_S = 120
_STREAM_TIMEOUT_S = 3600

# obstore asks again this long before a credential expires; botocore itself renews 15 minutes ahead.
_CREDENTIAL_LIFE = timedelta(minutes=10)

_ACCESS_ADVICE = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE and ~/.aws/credentials), "
    "and that they may list, read and write there"
)
_NETWORK_ADVICE = "check the network, AWS_ENDPOINT_URL and AWS_REGION, then run the command again"
_LOCAL_ADVICE = "check the path, its permissions and the disk, then run the command again"
_OTHER_ADVICE = "check the URL and what its library needs, then run the command again"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about an object.

    `tag` is the S3 ETag; a file has none that would survive a copy.
    """

    key: str
    size_bytes: int
    tag: str | None
    modified: datetime


@dataclass(frozen=True, slots=True)
class UnfinishedWrite:
    """What a writer that died has left: a multipart upload, or the file it was writing to.

    No reader ever sees it, but it takes space. `begun` is when the upload began, or when the file
    was written to last.
    """

    key: str  # of the object that it would have become
    name: str  # the upload's id, or the file's path
    size_bytes: int | None  # S3 does not say
    begun: datetime


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source: URL, path below the source, size, a word that changes with it.

    Not every store tells the size; the tag is "" where it tells none.
    """

    url: str
    path: str
    size_bytes: int | None
    tag: str


class Store:
    """A prefix on an object store; keys are relative to it. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        backend: S3Store | LocalStore,
        prefix: str,
        open_streams: Callable[[], S3Store] | None = None,
    ) -> None:
        self.url = url
        self._backend = backend
        self._open_streams = open_streams  # the client of `stream_range`; None: a directory
        self._prefix = f"{prefix}/" if prefix else ""

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[Callable[[str], "Store"], tuple[str]]:
        return open_store, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether it is a directory."""
        return self._open_streams is None

    def url_of(self, key: str) -> str:
        """The absolute URL of an object."""
        return f"{self.url}{key}" if self.url.endswith("/") else f"{self.url}/{key}"

    def head(self, key: str) -> ObjectInfo | None:
        """What the store knows of an object, or None if there is none."""
        try:
            with self._translated("look up", key):
                return self._info(obstore.head(self._backend, self._path(key)))
        except ObjectMissingError:
            return None

    def get(self, key: str) -> bytes:
        """A whole object. Raises ObjectMissingError."""
        with self._translated("read", key):
            return bytes(obstore.get(self._backend, self._path(key)).bytes())

    def get_range(
        self, key: str, start_bytes: int, length_bytes: int, *, tag: str | None = None
    ) -> bytes:
        """Exactly `length_bytes` bytes from `start_bytes` on.

        Raises ObjectChangedError if the object is shorter than that, or has not the `tag`. A body
        that was cut on the way is asked for again.
        """
        if length_bytes == 0:
            return b""
        for _ in range(SHORT_BODY_ATTEMPTS):
            try:
                body = self._get_range_once(key, start_bytes, length_bytes, tag)
            except StoreError as error:
                self._refuse_if_shorter(key, start_bytes + length_bytes, error)
                raise
            if len(body) == length_bytes:
                return body
        self._refuse_if_shorter(key, start_bytes + length_bytes)
        raise StoreError(
            f"cannot read {self.url_of(key)}: asked for {length_bytes} bytes at {start_bytes}, "
            f"got {len(body)}; {_failure_advice(self.url)}"
        )

    async def stream_range(
        self,
        key: str,
        start_bytes: int,
        length_bytes: int,
        *,
        tag: str | None = None,
        part_bytes: int = 1,
    ) -> AsyncIterator[bytes]:
        """The bytes of a range as they come in: one request, not repeated whatever happens.

        For a reader that resumes, waits and repeats by itself (pipeline.ranges). A part has at
        least `part_bytes` bytes, but for the last; a stream that breaks loses what it had of the
        next. It may end early without an error: who asks counts. A directory answers with one
        part.

        Raises ThrottledError, ObjectChangedError if the object is shorter or has not the `tag`, and
        the other kinds of StoreError.
        """
        if self._open_streams is None:
            path = f"/{self._path(key)}"
            with self._translated("read", key):
                job = _FileJob(path, start_bytes, length_bytes)
                size, body = await asyncio.wrap_future(_file_threads().submit(job))
            self._check_reach(key, start_bytes + length_bytes, size)
            yield body
            return
        options: Any = {"range": (start_bytes, start_bytes + length_bytes)}
        if tag is not None:
            options["if_match"] = tag
        with self._translated("read", key):
            result = await obstore.get_async(self._open_streams(), self._path(key), options=options)
            self._check_reach(key, start_bytes + length_bytes, result.meta["size"])
            async for part in result.stream(min_chunk_size=part_bytes):
                yield part

    def _check_reach(self, key: str, end_bytes: int, size_bytes: int) -> None:
        if size_bytes < end_bytes:
            raise ObjectChangedError(
                f"{self.url_of(key)} has {size_bytes} bytes, recorded were at least "
                f"{end_bytes}; restore it, `python -m shard_tools verify` finds all like it"
            )

    def _refuse_if_shorter(self, key: str, end_bytes: int, error: StoreError | None = None) -> None:
        """Tell a range behind the end, which stores answer in many ways, from an outage."""
        if isinstance(error, AccessDeniedError | ObjectMissingError | ObjectChangedError):
            return
        info = self.head(key)
        if info is not None:
            self._check_reach(key, end_bytes, info.size_bytes)

    def put_if_absent(self, key: str, body: bytes) -> bool:
        """Write a small object by one conditional PUT; False if there is an object already.

        The request is repeated if its answer is lost, so False may also mean that our own first try
        came through: who needs to know reads the object back and compares (see
        pipeline.manifest.commit).
        """
        try:
            with self._translated("write", key):
                obstore.put(
                    self._backend, self._path(key), bytes(body), mode="create", use_multipart=False
                )
        except _AlreadyExistsError:
            return False
        return True

    def writer(self, key: str, *, content_type: str | None = None) -> "ObjectWriter":
        """A context that streams an object: it appears, whole, on a clean exit, else not at all.

        content_type: what a browser is told that it is, by stores that tell.
        """
        return ObjectWriter(self, key, content_type)

    def reader(self, key: str, size_bytes: int, *, tag: str | None = None) -> "ObjectReader":
        """A forward reader of an object whose size is known; checks `tag` as `get_range` does."""
        return ObjectReader(self, key, size_bytes, tag)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects below the folder `prefix`, streamed page by page, in no order to rely on."""
        folder = (self._prefix + prefix).strip("/")
        with self._translated("list", prefix):
            for page in obstore.list(self._backend, folder or None):
                for meta in page:
                    yield self._info(meta)

    def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""
        with contextlib.suppress(ObjectMissingError), self._translated("delete", key):
            obstore.delete(self._backend, self._path(key))

    def unfinished(self) -> Iterator[UnfinishedWrite]:
        """What writers have left below the prefix, or are just writing; streamed, in any order."""
        with source_errors("list", self.url):
            if isinstance(self._backend, S3Store):
                yield from self._multipart_uploads()
            else:
                yield from self._staging_files(Path(f"/{self._prefix}"))

    def abort(self, write: UnfinishedWrite) -> None:
        """Remove what a writer left; it is no error if it is gone or finished by now."""
        if not isinstance(self._backend, S3Store):
            with source_errors("delete", write.name):
                Path(write.name).unlink(missing_ok=True)
            return
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        key = f"{prefix}/{write.key}" if prefix else write.key
        with (
            contextlib.suppress(ObjectMissingError),
            source_errors("abort the upload of", self.url_of(write.key)),
        ):
            _open_s3fs(_aws_environment()).call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=write.name
            )

    def _multipart_uploads(self) -> Iterator[UnfinishedWrite]:
        bucket = self.url.removeprefix("s3://").partition("/")[0]
        filesystem = _open_s3fs(_aws_environment())
        marker: dict[str, str] = {}
        while True:
            page = filesystem.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=self._prefix, **marker
            )
            for upload in page.get("Uploads", ()):
                key = upload["Key"].removeprefix(self._prefix)
                yield UnfinishedWrite(key, upload["UploadId"], None, upload["Initiated"])
            if not page.get("IsTruncated"):
                return
            marker = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _staging_files(self, root: Path) -> Iterator[UnfinishedWrite]:
        """obstore writes to "<name>#<number>", which it never lists, and renames that."""
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                if not re.search(r"#\d+$", name):
                    continue
                with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                    stat = path.stat()
                    key = path.relative_to(root).as_posix().rpartition("#")[0]
                    begun = datetime.fromtimestamp(stat.st_mtime, UTC)
                    yield UnfinishedWrite(key, str(path), stat.st_size, begun)

    def _path(self, key: str) -> str:
        return self._prefix + key

    def _info(self, meta: Mapping[str, Any]) -> ObjectInfo:
        # A local ETag is inode, time and size: recorded in a manifest it would forbid copying the
        # directory.
        tag = meta["e_tag"] if isinstance(self._backend, S3Store) else None
        key = str(meta["path"]).removeprefix(self._prefix)
        return ObjectInfo(key, int(meta["size"]), tag, meta["last_modified"])

    def _get_range_once(
        self, key: str, start_bytes: int, length_bytes: int, tag: str | None
    ) -> bytes:
        options: dict[str, Any] = {"range": (start_bytes, start_bytes + length_bytes)}
        if tag is not None:
            options["if_match"] = tag
        with self._translated("read", key):
            result = obstore.get(self._backend, self._path(key), options=options)  # type: ignore[arg-type]
            return bytes(result.bytes())

    @contextlib.contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        """Turn what obstore raises into our errors, naming the object."""
        try:
            yield
        except _CLIENT_ERRORS as error:
            raise _translate(error, verb, self.url_of(key)) from None


class ObjectWriter:
    """Streams one object. See `Store.writer`.

    Large objects go up as an explicit multipart upload that is aborted on any exception; a process
    that dies leaves an upload that never becomes an object. `info` is set after a clean exit, its
    size checked by HEAD.
    """

    info: ObjectInfo

    def __init__(self, store: Store, key: str, content_type: str | None = None) -> None:
        self._store = store
        self._key = key
        self._content_type = content_type
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """The number of bytes written so far."""
        return self._size_bytes

    def __enter__(self) -> Self:
        is_s3 = isinstance(self._store._backend, S3Store)  # a file has no type
        has_type = is_s3 and self._content_type is not None
        with self._translated():
            self._file = obstore.open_writer(
                self._store._backend,
                self._store._path(self._key),
                attributes={"Content-Type": self._content_type or ""} if has_type else None,
                buffer_size=PART_BYTES if is_s3 else _FILE_PART_BYTES,
                max_concurrency=PARTS_IN_FLIGHT,
            )
            self._file.__enter__()
        return self

    def write(self, data: bytes) -> None:
        """Append bytes. They are not copied: never pass a buffer that will change."""
        try:  # not by _translated: a context costs more than the writing of a header
            self._file.write(data)
        except _CLIENT_ERRORS as error:
            raise _translate(error, "write", self._store.url_of(self._key)) from None
        self._size_bytes += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            with contextlib.suppress(CropstreamError), self._translated():
                self._file.__exit__(kind, error, traceback)
            return
        with self._translated():
            self._file.__exit__(None, None, None)
        self.info = self._verified()

    def _verified(self) -> ObjectInfo:
        info = self._store.head(self._key)
        seen = info.size_bytes if info else None
        if info is None or seen != self._size_bytes:
            url = self._store.url_of(self._key)
            raise StoreError(
                f"cannot write {url}: the store reports {seen} bytes of {self._size_bytes} "
                f"written; {_failure_advice(url)}"
            )
        return info

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        return self._store._translated("write", self._key)


class ObjectReader:
    """Reads an object from start to end by ranged GETs of `PART_BYTES`. See `Store.reader`.

    What is skipped is not fetched, beyond what was fetched already; behind a long skip the GETs
    begin small and grow, so that a walk from header to header of large members stays cheap.
    """

    def __init__(self, store: Store, key: str, size_bytes: int, tag: str | None) -> None:
        self._store, self._key, self._size_bytes, self._tag = store, key, size_bytes, tag
        self._position = 0  # of the next range
        self._ahead_bytes = PART_BYTES
        self._rest = memoryview(b"")

    def read(self, length_bytes: int) -> bytes:
        """The next bytes, fewer only at the end. Raises ObjectChangedError, StoreError."""
        pieces = [self._take(length_bytes)]
        missing = length_bytes - len(pieces[0])
        while missing and self._position < self._size_bytes:
            self._fetch()
            pieces.append(self._take(missing))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def skip(self, length_bytes: int) -> None:
        """Pass over the next bytes, or over all that are left."""
        beyond = length_bytes - len(self._rest)
        self._rest = self._rest[length_bytes:]
        if beyond > 0:
            self._position = min(self._position + beyond, self._size_bytes)
        if beyond > PART_BYTES:
            self._ahead_bytes = _JUMP_BYTES

    def _take(self, length_bytes: int) -> memoryview:
        taken, self._rest = self._rest[:length_bytes], self._rest[length_bytes:]
        return taken

    def _fetch(self) -> None:
        length = min(self._ahead_bytes, self._size_bytes - self._position)
        self._ahead_bytes = min(2 * self._ahead_bytes, PART_BYTES)
        body = self._store.get_range(self._key, self._position, length, tag=self._tag)
        self._rest = memoryview(body)
        self._position += length


class FileReader:
    """Reads a file of any fsspec URL from start to end. See `open_stream`."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url

    def read(self, length_bytes: int) -> bytes:
        """The next bytes, fewer only at the end. Raises StoreError."""
        with source_errors("read", self._url):
            pieces = [self._file.read(length_bytes)]
            missing = length_bytes - len(pieces[0])
            while missing and pieces[-1]:
                pieces.append(self._file.read(missing))
                missing -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def skip(self, length_bytes: int) -> None:
        """Pass over the next bytes."""
        with source_errors("read", self._url):
            self._file.seek(length_bytes, os.SEEK_CUR)


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open "s3://bucket/prefix", "file:///directory" or a local path; nothing is asked or created.

    Raises UsageError on any other URL and AccessDeniedError if there are no AWS credentials.
    """
    text = os.fspath(url)
    refuse_credentials(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _open_directory(Path(text).absolute())
    if scheme == "file" and rest.startswith("/"):
        return _open_directory(Path(rest))
    if scheme == "s3" and rest.strip("/") and not rest.startswith("/"):
        bucket, _, prefix = rest.strip("/").partition("/")
        environment = _aws_environment()
        streams = functools.partial(_open_bucket, bucket, environment, streams=True)
        backend = _open_bucket(bucket, environment)
        return Store(f"s3://{bucket}/{prefix}".rstrip("/"), backend, prefix, streams)
    raise UsageError(
        f"{text!r} is no store: expected s3://bucket/prefix, file:///directory or a local path"
    )


def refuse_credentials(url: str) -> None:
    """Raise UsageError, which does not repeat it, for a URL like s3://key:secret@bucket/prefix.

    A URL ends up in plans, logs and checkpoints.
    """
    host = url.partition("://")[2].partition("/")[0]
    if "@" in host:
        raise UsageError(
            "a URL must not hold credentials (user:password@…): take them out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; treat those as leaked"
        )


def resolve(base: Store, key_or_url: str) -> tuple[Store, str]:
    """The store and key of a manifest's entry: a key below `base`, or an absolute URL."""
    if "://" not in key_or_url:
        return base, key_or_url
    folder, _, name = key_or_url.rpartition("/")
    return open_store(f"{folder}/"), name


def list_files(url: str) -> Iterator[SourceFile]:
    """Every file below any fsspec URL, streamed, in no order to rely on.

    Raises ObjectMissingError if there is nothing under the URL, UsageError if it is a local file;
    an S3 prefix without objects yields nothing.
    """
    with source_errors("list", url):
        if (folder := _local_path(url)) is not None:
            if folder.is_file():
                raise UsageError(f"{url} is a file, give a folder")
            yield from _list_directory(folder, "", frozenset())
            return
        filesystem, root = _open_source(url)
        if "s3" in _protocols(filesystem):
            yield from _list_s3(filesystem, root)
        else:
            yield from _walk(filesystem, root, url)


def find_file(url: str) -> SourceFile | None:
    """The file that a URL of any fsspec kind names; None if it names a folder, or nothing."""
    with source_errors("look at", url):
        if (path := _local_path(url)) is not None:
            if not path.is_file():
                return None
            stat = path.stat()
            return SourceFile(f"file://{path}", path.name, stat.st_size, str(stat.st_mtime_ns))
        filesystem, root = _open_source(url)
        try:
            info = filesystem.info(root)
        except FileNotFoundError:
            return None
        return _described(filesystem, info, root.rpartition("/")[2], url)


def open_file(url: str) -> BinaryIO:
    """One file under any fsspec URL, seekable, read as it is needed. Close it.

    Raises StoreError and its kinds; what fails while it is read comes as the client's own error,
    for `source_errors` to translate.
    """
    with source_errors("read", url):
        if (path := _local_path(url)) is not None:
            return path.open("rb")
        filesystem, root = _open_source(url)
        file: BinaryIO = filesystem.open(root, "rb")
        return file


@contextlib.contextmanager
def open_stream(
    url: str, size_bytes: int, *, tag: str | None = None
) -> Iterator[ObjectReader | FileReader]:
    """A context with a forward reader of one file under any fsspec URL.

    `size_bytes` and `tag` are what SourceFile says of it. On S3 every read is refused with
    ObjectChangedError once the object is another one; elsewhere a change may go unseen, so look at
    `find_file` again behind the last read.
    """
    if (path := _local_path(url)) is not None:
        yield open_store(path.parent).reader(path.name, size_bytes)
    elif url.startswith("s3://") and _suits_obstore(url):
        folder, _, name = url.rpartition("/")
        yield open_store(folder).reader(name, size_bytes, tag=tag)
    else:
        with open_file(url) as file:
            yield FileReader(file, url)


def read_file(url: str, *, size_bytes: int | None = None, tag: str | None = None) -> bytes:
    """The bytes of one file under any fsspec URL.

    `size_bytes` and `tag` are what SourceFile says of it: with a size no more than a byte above it
    is held in memory, whatever the file has become. Raises ObjectChangedError if the file is larger
    by now or has another tag; a smaller one is returned. StoreError and its kinds otherwise.
    """
    # obstore takes a tenth of s3fs's time for a small file.
    if url.startswith("s3://") and _suits_obstore(url):
        return _get_at_most(url, size_bytes, tag)
    if tag or size_bytes == 0:  # an empty range is no range
        _refuse_changed(url, size_bytes, tag)
    with source_errors("read", url):
        if (file := _local_path(url)) is not None:
            with file.open("rb") as opened:
                body = opened.read(-1 if size_bytes is None else size_bytes + 1)
        else:
            filesystem, path = _open_source(url)
            end = size_bytes + 1 if size_bytes else None
            body = bytes(filesystem.cat_file(path, start=0 if end else None, end=end))
    if size_bytes is not None and len(body) > size_bytes:
        raise _changed(url, size_bytes, "more")
    return body


def _get_at_most(url: str, size_bytes: int | None, tag: str | None) -> bytes:
    """An object of S3 by one GET, whose body is not fetched if it is too large."""
    folder, _, name = url.rpartition("/")
    store = open_store(folder)
    with store._translated("read", name):
        options: Any = {"if_match": tag} if tag else None
        result = obstore.get(store._backend, store._path(name), options=options)
        if size_bytes is None or result.meta["size"] <= size_bytes:
            return bytes(result.bytes())
        seen = result.meta["size"]
    raise _changed(url, size_bytes, f"{seen} bytes")


def _refuse_changed(url: str, size_bytes: int | None, tag: str | None) -> None:
    """Raise ObjectChangedError unless the file has the tag, and the size where one is given."""
    now = find_file(url)
    if now is None:
        raise ObjectMissingError(f"cannot read {url}: there is nothing; check the path")
    if size_bytes is not None and now.size_bytes not in (None, size_bytes):
        raise _changed(url, size_bytes, f"{now.size_bytes} bytes")
    if tag and now.tag != tag:
        raise ObjectChangedError(f"{url} has changed: listed was tag {tag}, now it has {now.tag}")


def _changed(url: str, size_bytes: int, seen: str) -> ObjectChangedError:
    return ObjectChangedError(
        f"{url} has changed: listed were {size_bytes} bytes, now it has {seen}"
    )


# ----------------------------------------------------------------------------------------
# opening


def _open_directory(path: Path) -> Store:
    # Rooted at "/" so that opening (to read, with a typing error perhaps) never creates the
    # directory.
    text = os.path.normpath(path)
    return Store(f"file://{text}", LocalStore(), text.strip("/"))


@functools.lru_cache(maxsize=64)
def _open_bucket(
    bucket: str, environment: tuple[tuple[str, str], ...], *, streams: bool = False
) -> S3Store:
    """One client, hence one pool of connections, for all prefixes of a bucket.

    streams: the client of `Store.stream_range`. It repeats nothing: a repeating one would hide that
    the store asks for fewer requests, and would wait in silence where the reader knows better.
    """
    settings = _read_aws_settings(environment)
    endpoint: S3Config = {"endpoint": settings.endpoint} if settings.endpoint else {}
    return S3Store(
        bucket,
        config=endpoint,
        region=settings.region,
        credential_provider=settings.credentials,
        client_options={
            "allow_http": (settings.endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=_STREAM_SILENCE_S if streams else _READ_TIMEOUT_S),
            "timeout": timedelta(seconds=_STREAM_TIMEOUT_S if streams else _REQUEST_TIMEOUT_S),
        },
        retry_config={
            "max_retries": 0 if streams else _MAX_RETRIES,
            "retry_timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
            "backoff": {
                "base": 2,
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
            },
        },
    )


class _FileJob:
    """To read a range of a file; `done` is the file's size and the bytes, which may end early."""

    def __init__(self, path: str, start_bytes: int, length_bytes: int) -> None:
        self._path, self._start_bytes, self._length_bytes = path, start_bytes, length_bytes
        self.done: Future[tuple[int, bytes]] = Future()

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self._read())
        except (OSError, ValueError, MemoryError) as error:  # a name with a zero is a ValueError
            self.done.set_exception(error)

    def _read(self) -> tuple[int, bytes]:
        file = os.open(self._path, os.O_RDONLY)
        try:
            return os.fstat(file).st_size, os.pread(file, self._length_bytes, self._start_bytes)
        finally:
            os.close(file)


class _FileThreads:
    """Read files, on threads that end with the process.

    Not asyncio.to_thread: at its exit the interpreter waits for those, for ever if one of them
    waits for a mount that hangs.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_FileJob] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._num_threads = 0

    def submit(self, job: _FileJob) -> "Future[tuple[int, bytes]]":
        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and self._num_threads < _FILE_THREADS:
            self._num_threads += 1
            threading.Thread(target=self._work, name="file", daemon=True).start()
        return job.done

    def _work(self) -> None:
        while True:
            self._jobs.get().run()
            self._idle.release()


@functools.cache
def _file_threads() -> _FileThreads:
    return _FileThreads()


@dataclass(frozen=True)
class _AwsSettings:
    endpoint: str | None  # None: Amazon's own
    region: str
    credentials: Callable[[], Any]


def _aws_environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.lru_cache(maxsize=4)
def _read_aws_settings(environment: tuple[tuple[str, str], ...]) -> _AwsSettings:
    """What the AWS files and `environment` (os.environ's part, the key of the cache) say.

    Raises AccessDeniedError without credentials, UsageError if the files contradict themselves.
    """
    # Imported here: a quarter of a second that a run on local files need not pay.
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        session = Session()
        endpoint = ConfiguredEndpointProvider(
            full_config=session.full_config,
            scoped_config=session.get_scoped_config(),
            client_name="s3",
        ).provide()
        # botocore knows AWS_DEFAULT_REGION only; every other AWS library reads AWS_REGION first.
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        credentials = session.get_credentials()
    except BotoCoreError as error:
        raise UsageError(f"the AWS configuration does not hold: {error}") from None
    if credentials is None:
        raise AccessDeniedError(f"no AWS credentials found; {_ACCESS_ADVICE}")
    return _AwsSettings(endpoint, region or "us-east-1", functools.partial(_frozen, credentials))


def _frozen(credentials: Any) -> dict[str, Any]:
    """One set of keys for obstore, renewed by botocore where they expire."""
    keys = credentials.get_frozen_credentials()
    return {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": keys.token,
        "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE,
    }


# ----------------------------------------------------------------------------------------
# sources: whatever fsspec opens


def _local_path(url: str) -> Path | None:
    """The path that a URL means, None elsewhere. fsspec would take "::" in a name for a chain."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(url).absolute()
    return Path(rest).absolute() if scheme == "file" else None


def _open_source(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path there."""
    if not url.startswith("s3://"):
        filesystem, path = fsspec.core.url_to_fs(url)
        return filesystem, path
    return _open_s3fs(_aws_environment()), url.removeprefix("s3://").rstrip("/")


@functools.lru_cache(maxsize=4)
def _open_s3fs(environment: tuple[tuple[str, str], ...]) -> Any:
    settings = _read_aws_settings(environment)
    # SeaweedFS, MinIO and most others serve buckets as paths only.
    style = {"s3": {"addressing_style": "path"}} if settings.endpoint else {}
    return fsspec.filesystem(
        "s3",
        client_kwargs={"region_name": settings.region, "endpoint_url": settings.endpoint},
        config_kwargs={
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": _MAX_RETRIES},
            **style,
        },
        skip_instance_cache=True,  # its cache does not notice that the environment has changed
    )


def _suits_obstore(url: str) -> bool:
    """Whether obstore can read it: it takes no key with empty or dotted parts."""
    return {"", ".", ".."}.isdisjoint(url.partition("://")[2].split("/"))


def _protocols(filesystem: Any) -> Sequence[str]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else protocol


def _list_s3(filesystem: Any, root: str) -> Iterator[SourceFile]:
    """Page by page: s3fs's own find and walk hold a whole folder in memory."""
    bucket, _, prefix = root.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    token: dict[str, str] = {}
    while True:
        page = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **token)
        for entry in page.get("Contents", ()):
            key = entry["Key"]
            if not key.endswith("/"):  # a folder drawn by some console
                path = key.removeprefix(prefix)
                yield SourceFile(f"s3://{bucket}/{key}", path, entry["Size"], entry["ETag"])
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _list_directory(
    root: Path, folder: str, ancestors: frozenset[tuple[int, int]]
) -> Iterator[SourceFile]:
    """Links to folders are followed, but never back into a folder we are in."""
    here = (root / folder).stat()
    identity = (here.st_dev, here.st_ino)
    if identity in ancestors:
        return
    with os.scandir(root / folder) as entries:
        for entry in entries:
            path = f"{folder}{entry.name}"
            if entry.is_dir():
                yield from _list_directory(root, f"{path}/", ancestors | {identity})
            elif entry.is_file():
                stat = entry.stat()
                yield SourceFile(f"file://{root}/{path}", path, stat.st_size, str(stat.st_mtime_ns))


def _walk(filesystem: Any, root: str, source: str) -> Iterator[SourceFile]:
    for _, _, files in filesystem.walk(root, detail=True, on_error="raise"):
        for info in files.values():
            path = str(info["name"]).removeprefix(root).lstrip("/")
            if (file := _described(filesystem, info, path, source)) is not None:
                yield file


def _described(
    filesystem: Any, info: Mapping[str, Any], path: str, source: str
) -> SourceFile | None:
    """What fsspec says of a file, which lies at `path` in its source; None for a folder."""
    if info["type"] == "directory":
        return None
    tag = info.get("ETag") or info.get("mtime") or info.get("created") or info.get("CRC") or ""
    url = _in_chain(source, filesystem.unstrip_protocol(str(info["name"])))
    size = info.get("size")
    return SourceFile(url, path, None if size is None else int(size), str(tag))


def _in_chain(source: str, url: str) -> str:
    """A file's URL with what it lies in: zip://folder::s3://bucket/images.zip is a chain of links.

    fsspec tells the file's own URL only. Its link is the one with its protocol; caches have a link
    of their own, without a path.
    """
    links = source.split("::")
    protocols = [link.partition("://")[0] for link in links]
    protocol = url.partition("://")[0]
    if len(links) == 1:
        return url
    links[protocols.index(protocol) if protocol in protocols else -1] = url
    return "::".join(links)


# ----------------------------------------------------------------------------------------
# errors


class _AlreadyExistsError(StoreError):
    """A conditional PUT found an object."""


@contextlib.contextmanager
def source_errors(verb: str, url: str) -> Iterator[None]:
    """Turn what fsspec and s3fs raise into our errors, naming the source."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except (PermissionError, NoCredentialsError) as error:
        message = f"cannot {verb} {_shown(url)}: {_first_line(error)}; {_access_advice(url)}"
        raise AccessDeniedError(message) from None
    except (FileNotFoundError, NotADirectoryError):
        # fsspec says so too of a web server that fails or does not answer.
        what = "nothing, or no server that answers" if _is_web(url) else "nothing"
        message = f"cannot {verb} {_shown(url)}: there is {what}; check the path"
        raise ObjectMissingError(message) from None
    except _web_errors() as error:
        reason = getattr(error, "message", "") or type(error).__name__
        message = f"cannot {verb} {_shown(url)}: {reason.splitlines()[0]}; {_failure_advice(url)}"
        raise StoreError(message) from None
    except (BotoCoreError, ClientError, OSError, TimeoutError) as error:
        message = f"cannot {verb} {_shown(url)}: {_first_line(error)}; {_failure_advice(url)}"
        raise StoreError(message) from None
    except (
        ImportError,
        ValueError,
    ) as error:  # fsspec knows no such protocol, or lacks its library
        raise UsageError(f"cannot {verb} {_shown(url)}: {_first_line(error)}") from None


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _shown(url: str) -> str:
    """A URL as it may be printed: a web address without user information and query."""
    if not _is_web(url):
        return url
    return re.sub(r"//[^/?#]*@", "//", re.sub(r"[?#].*", "?…", url, flags=re.DOTALL))


def _web_errors() -> tuple[type[Exception], ...]:
    """What fsspec's HTTP client raises, if it was loaded: it takes an eighth of a second."""
    client = sys.modules.get("aiohttp")
    return (client.ClientError,) if client is not None else ()


def _access_advice(url: str) -> str:
    return _ACCESS_ADVICE if url.startswith("s3://") else _failure_advice(url)


def _failure_advice(url: str) -> str:
    if url.startswith("s3://"):
        return _NETWORK_ADVICE
    return _OTHER_ADVICE if _local_path(url) is None else _LOCAL_ADVICE


def _translate(error: Exception, verb: str, url: str) -> StoreError:
    what, reason = f"cannot {verb} {url}", _reason(error)
    if isinstance(error, obstore_errors.AlreadyExistsError):
        return _AlreadyExistsError(f"{what}: there is an object already")
    if isinstance(error, FileNotFoundError):
        if "NoSuchBucket" in str(error):
            return ObjectMissingError(f"{what}: there is no such bucket; check the URL")
        return ObjectMissingError(
            f"{what}: there is no such object; check the URL or, if a snapshot names it, "
            "restore it: `python -m shard_tools verify` finds all like it"
        )
    if "Not a directory" in str(error):
        return StoreError(
            f"{what}: {_file_in(url)} is a file, and a folder is expected there; name the folder "
            "of a data set or a run (tars to be streamed end in .tar)"
        )
    if isinstance(error, obstore_errors.PreconditionError):
        return ObjectChangedError(
            f"{what}: the object is not the one that was recorded; seal or adopt the data set again"
        )
    denied = (
        obstore_errors.PermissionDeniedError,
        obstore_errors.UnauthenticatedError,
        PermissionError,
    )
    # The rest comes as a generic error, as does a refusal to list; only the text tells.
    if re.search(r"status code: (503|429)\b|<Code>SlowDown<", str(error)):
        return ThrottledError(f"{what}: {reason}; try again, with fewer requests at a time")
    if re.search(r"status code: 416\b", str(error)):
        return ObjectChangedError(
            f"{url} has fewer bytes than were recorded ({reason}); restore it, "
            "`python -m shard_tools verify` finds all like it"
        )
    if isinstance(error, denied) or re.search(r"status code: 40[13]\b", str(error)):
        return AccessDeniedError(f"{what}: {reason}; {_access_advice(url)}")
    return StoreError(f"{what}: {reason}; {_failure_advice(url)}")


def _file_in(url: str) -> str:
    """What is no folder on the way to a local path, though there is something below it."""
    path = _local_path(url)
    return str(next((each for each in path.parents if each.is_file()), path) if path else url)


def _reason(error: Exception) -> str:
    """The few words that matter of obstore's message, which fills pages and quotes requests."""
    text = str(error)
    words = []
    if status := re.search(r"status code: (\d+ [A-Za-z ]+)", text):
        words.append(status[1].strip())
    if code := re.search(r"<Code>(\w+)</Code>", text):
        words.append(code[1])
    if not words and "kind: Connect" in text:
        words.append("no connection")
    return " ".join(words) or _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
