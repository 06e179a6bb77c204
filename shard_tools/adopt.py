"""Adopting: an existing shard gets an index and stays where it is, not a byte of it rewritten.

Called by pack for plans of the kind "adopt", a shard a unit. The index is like that of a shard of
ours: a row for every input, with the place and the checksums of every image that can be used, so
the loader reads adopted shards as it reads all others. Two differences follow from the bytes not
being ours: a key is not the member's name, which is not unique among tars (`source` has it), and an
image is kept as it is or rejected, never encoded again.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.decode import MAX_BYTES
from pipeline.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    SampleError,
    UsageError,
)
from pipeline.shards import IndexRows, ShardHash, crc32c
from pipeline.store import SourceFile, open_store, resolve
from shard_tools.blame import reject_of
from shard_tools.judge import Accepted, RejectedError
from shard_tools.tars import TarInput, is_gzipped, read_tar_file

Row = dict[str, Any]


class AdoptedShard(NamedTuple):
    """What a snapshot and an index say of an adopted shard.

    `rows` have the columns of `shard_tools.tars.COLUMNS` as extra ones; `tar_hash` is as
    `pipeline.shards` describes it. Of a tar that is gone, or another one by now, there is one row,
    a reject, and `is_readable` is False.
    """

    rows: IndexRows
    tar_hash: bytes
    tar_tag: str | None  # for the snapshot: an ETag, which a file does not have
    is_readable: bool = True


def index_tar(
    file: SourceFile,
    *,
    keys: Callable[[int], str],
    judge: Callable[[bytes], Accepted],
    on_image: Callable[[bool], None] = lambda rejected: None,
    max_bytes: int = MAX_BYTES,
) -> AdoptedShard:
    """Read a tar on a store once and describe what it holds.

    Args:
        file: as it was listed. keys: from an input's number in the tar to its key. judge: accepts
        an image or raises SampleError. on_image: called for every input, with whether it was
        rejected. max_bytes: of one image; larger ones are passed over.

    Raises UsageError for a gzipped tar, or one that lies where the loader cannot read it;
    StoreError if a store fails, see shard_tools.blame.
    """
    tag = _readable_tag(file)
    rows = IndexRows()
    folded = ShardHash()
    try:
        for number, item in enumerate(read_tar_file(file, max_bytes=max_bytes)):
            row = _describe(item, judge)
            row |= {"key": keys(number), "source": f"{file.url}#{item.name}", **item.columns}
            if row["status"] == "ok":
                folded.add(item.header, row["sha256"])
            rows.append(row)
            on_image(row["status"] != "ok")
    except (ObjectMissingError, ObjectChangedError, AccessDeniedError) as error:
        return _unreadable(file, keys(0), reject_of(file.url, error))
    return AdoptedShard(rows, folded.digest(), tag)


def _unreadable(file: SourceFile, key: str, problem: SampleError) -> AdoptedShard:
    """One reject for all, also for what was read before a change: its places are no more."""
    rows = IndexRows()
    rows.append({"key": key, "source": file.url, "status": "rejected", "reason": problem.reason})
    return AdoptedShard(rows, ShardHash().digest(), None, is_readable=False)


def _readable_tag(file: SourceFile) -> str | None:
    """The tag that a reader may ask for. Raises UsageError if none could read the shard there."""
    if is_gzipped(file.url):
        raise UsageError(
            f"{file.url}: a gzipped tar cannot be adopted, since nothing in it can be read by its "
            "place: pack it, or unpack the file first"
        )
    store, key = resolve(open_store("/"), file.url)
    try:
        info = store.head(key)
    except AccessDeniedError:  # it shows again when the tar is read
        return None
    return info.tag if info is not None else None


def _describe(item: TarInput, judge: Callable[[bytes], Accepted]) -> Row:
    """An input's columns but for key, source and what lies beside it."""
    if item.data is None:
        assert item.problem is not None
        return {"status": "rejected", "reason": item.problem.reason}
    try:
        accepted = judge(item.data)
    except SampleError as error:
        known = error.columns if isinstance(error, RejectedError) else {}
        return {**known, "status": "rejected", "reason": error.reason}
    if accepted.data != item.data:
        raise UsageError(
            f"{item.name}: what is adopted cannot be encoded again; leave out settings that change "
            "images, or pack the tar"
        )
    return {
        **accepted.columns,
        "status": "ok",
        "offset": item.offset,
        "length": len(item.data),
        "crc32c": crc32c(item.data),
        "sha256": hashlib.sha256(item.data).digest(),
    }
