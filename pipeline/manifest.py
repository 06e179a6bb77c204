"""Commits and snapshots: how processes agree on what exists, without locks, renames or listings.

The commit protocol, for shards and checkpoints alike: write immutable objects under names that no
other attempt uses, then `commit` a small JSON document that names them, by one conditional PUT. The
first document under a key wins and is never changed; what no document names does not exist.

A snapshot is such a commit too: `snapshots/v000001.parquet`, one row a shard, is the whole data set
as readers see it. A later version replaces nothing, so a run keeps reading the one it began with.
"""

import io
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import AccessDeniedError, ManifestError, ObjectMissingError, StoreError
from pipeline.shards import parse_parquet
from pipeline.store import Store

Numbers = npt.NDArray[np.int64]

SNAPSHOT_FORMAT = b"1"

SNAPSHOT_SCHEMA = pa.schema(
    [
        pa.field(
            "tar", pa.string(), nullable=False
        ),  # a key below the data set, or an absolute URL
        pa.field("index", pa.string(), nullable=False),
        pa.field("tar_bytes", pa.int64(), nullable=False),
        pa.field("index_bytes", pa.int64(), nullable=False),
        ("tar_tag", pa.string()),  # the store's ETag, where it has one
        ("index_tag", pa.string()),
        pa.field("tar_hash", pa.binary(32), nullable=False),  # see pipeline.shards.ShardHash
        pa.field("index_sha256", pa.binary(32), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),  # of the index, rejects included
        pa.field("kept", pa.int64(), nullable=False),  # rows that readers see
        ("mask", pa.string()),  # a bitmap object, see pipeline.shards.kept_rows
        ("mask_sha256", pa.binary()),
    ]
)
"""The columns of a snapshot, one row a shard, in the order of the samples."""

_FORMAT_KEY = b"cropstream.snapshot"
_PARENT_KEY = b"cropstream.parent"
_PLANS_KEY = b"cropstream.plans"
_ATTEMPT_KEY = b"cropstream.attempt"
_NOTE_KEY = b"cropstream.note"


def new_attempt() -> str:
    """A word that no other attempt at anything will have."""
    return secrets.token_hex(8)


def prove_conditional_put(store: Store) -> None:
    """Check that the store lets exactly one of two conditional PUTs win, or refuse to write there.

    Raises StoreError if it does not: two writers could both believe they had committed.
    """
    key = f".probe-{new_attempt()}"
    first, second = b"first", b"second"
    store.put_if_absent(
        key, first
    )  # False if a retry met our own object: the reading below decides
    try:
        if store.put_if_absent(key, second) or store.get(key) != first:
            raise StoreError(
                f"{store.url} ignores If-None-Match: a second conditional PUT replaced the first. "
                "Commits would not be safe there; use a store that honours conditional writes"
            )
    finally:
        store.delete(key)


def commit(store: Store, key: str, document: Mapping[str, Any], *, attempt: str) -> dict[str, Any]:
    """Commit a JSON document under `key` unless there is one, and return the one that is there.

    The caller has won if the returned document's "attempt" is its own; a loser must stop and may
    delete what it wrote. Raises StoreError if it stayed unknown whether the document arrived.
    """
    body = _encode({**document, "attempt": attempt})
    return _decode(_put_first(store, key, body), store.url_of(key))


def read_commit(store: Store, key: str) -> dict[str, Any] | None:
    """The document committed under `key`, or None. Raises ManifestError if it is damaged."""
    try:
        body = store.get(key)
    except ObjectMissingError:
        return None
    return _decode(body, store.url_of(key))


class Column(Sequence[Any]):
    """A column that stays in Arrow's memory; an item becomes a Python value on access."""

    def __init__(self, array: pa.ChunkedArray) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "Column": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Column(self._array[index])
        return self._array[int(index)].as_py()


class Snapshot:
    """One version of a data set: its shards in order; columns as in SNAPSHOT_SCHEMA, by shard.

    Attributes:
        version: 1, 2, … plans: the plans whose shards it holds. parent: the version it was made
        from, 0 for none. attempt: who committed it. note: how it came about, a line for people.
        table: the whole table; the columns below are views of it. first_row: int64
        [num_shards + 1], the number of each shard's first kept row, then the total.
    """

    def __init__(self, table: pa.Table, version: int) -> None:
        metadata = table.schema.metadata or {}
        self.version = version
        self.parent = int(metadata.get(_PARENT_KEY, b"0"))
        self.plans: tuple[str, ...] = tuple(json.loads(metadata.get(_PLANS_KEY, b"[]")))
        self.attempt = metadata.get(_ATTEMPT_KEY, b"").decode()
        self.note = metadata.get(_NOTE_KEY, b"").decode()
        self.table = table = table.combine_chunks()
        self.tar = Column(table["tar"])
        self.index = Column(table["index"])
        self.tar_bytes: Numbers = table["tar_bytes"].to_numpy()
        self.index_bytes: Numbers = table["index_bytes"].to_numpy()
        self.tar_tag = Column(table["tar_tag"])
        self.index_tag = Column(table["index_tag"])
        self.tar_hash = Column(table["tar_hash"])
        self.index_sha256 = Column(table["index_sha256"])
        self.rows: Numbers = table["rows"].to_numpy()
        self.kept: Numbers = table["kept"].to_numpy()
        self.mask = Column(table["mask"])
        self.mask_sha256 = Column(table["mask_sha256"])
        self.first_row: Numbers = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.kept)])

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_kept(self) -> int:
        """Samples that readers see."""
        return int(self.first_row[-1])


def snapshot_key(version: int) -> str:
    """Where a version lies."""
    return f"snapshots/v{version:06d}.parquet"


def latest_version(store: Store) -> int:
    """The newest snapshot's version, 0 if there is none.

    Versions have no gaps, so a few HEADs find the last: doubling until one is missing, then
    halving.
    """
    present, missing = 0, 1
    while store.head(snapshot_key(missing)) is not None:
        present, missing = missing, 2 * missing
    while missing - present > 1:
        middle = (present + missing) // 2
        if store.head(snapshot_key(middle)) is not None:
            present = middle
        else:
            missing = middle
    return present


def read_snapshot(store: Store, version: int | None = None) -> Snapshot:
    """A version of the data set, by default the newest.

    Raises ManifestError if there is none, or if it is damaged (its pages carry checksums).
    """
    version = latest_version(store) if version is None else version
    key = snapshot_key(version)
    if version < 1 or store.head(key) is None:
        raise ManifestError(
            f"{store.url} has no snapshot{f' {version}' if version else ''}: check the URL or pack "
            f"and seal the data set: `python -m shard_tools pack SOURCE {store.url}`"
        )
    return _parse_snapshot(store.get(key), version, store.url_of(key))


def commit_snapshot(
    store: Store,
    table: pa.Table,
    *,
    version: int,
    attempt: str,
    plans: Sequence[str] = (),
    note: str = "",
) -> Snapshot:
    """Commit a table of SNAPSHOT_SCHEMA as a version and return the snapshot that is there now.

    The caller has won if its `attempt` is the returned one's; a loser reads the newest version and
    starts over. Raises StoreError if it stayed unknown whether the snapshot arrived.
    """
    metadata = {
        _FORMAT_KEY: SNAPSHOT_FORMAT,
        _PARENT_KEY: str(version - 1).encode(),
        _PLANS_KEY: json.dumps(list(plans)).encode(),
        _ATTEMPT_KEY: attempt.encode(),
        _NOTE_KEY: note.encode(),
    }
    output = io.BytesIO()
    table = table.cast(SNAPSHOT_SCHEMA).replace_schema_metadata(metadata)
    pq.write_table(table, output, compression="zstd", write_page_checksum=True)
    key = snapshot_key(version)
    return _parse_snapshot(_put_first(store, key, output.getvalue()), version, store.url_of(key))


def _parse_snapshot(body: bytes, version: int, where: str) -> Snapshot:
    try:
        table = parse_parquet(body)
        found = (table.schema.metadata or {}).get(_FORMAT_KEY)
        if found == SNAPSHOT_FORMAT and table.schema.equals(SNAPSHOT_SCHEMA):
            return Snapshot(table, version)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"{where}: damaged, restore it from a copy: {error}") from None
    raise ManifestError(
        f"{where}: no snapshot of format {SNAPSHOT_FORMAT.decode()} (it says {found!r}); "
        "it was written by another program or version"
    )


def _put_first(store: Store, key: str, body: bytes) -> bytes:
    """Put the body under `key` unless there is an object; return the object that is there."""
    try:
        if store.put_if_absent(key, body):
            return body
    except AccessDeniedError:
        raise
    except (
        StoreError
    ):  # the answer was lost: only the object itself tells whether the request was not
        if store.head(key) is None:
            raise
    return store.get(key)


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False).encode()


def _decode(body: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError as error:
        raise ManifestError(f"{where}: damaged, no JSON: {error}; restore it from a copy") from None
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: damaged, no JSON object; restore it from a copy")
    return document
