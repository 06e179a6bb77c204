"""Garbage collection: what killed writers have left, and nothing else.

Called by `python -m shard_tools gc`, for data sets and for runs. Garbage is what lies where writers
write (data/, masks/, dedup/, plans/ before their plan.json, a run's objects/, probes), is named by
no snapshot, commit or checkpoint manifest, and is older than a grace. A writer at work is safe: its
objects are younger than that, or named. Snapshots, commits, committed plans and manifests are never
removed, nor is anything whose name no writer of ours would give.

The old objects are listed first and then struck off as documents name them, so what is committed
meanwhile is still seen. A document that cannot be read ends it: nobody knows what that names.
Memory: what the store says of every object that is older than the grace, some 380 bytes each (for
400,000 shards with their indexes 300 MB).

One thing is not proof against bad luck: a plan that was left unfinished for longer than the grace,
and is finished in the instant between our last look at it and its removal, loses its units.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.manifest import latest_version, new_attempt, read_commit, read_snapshot
from pipeline.store import ObjectInfo, Store, UnfinishedWrite

GRACE_S = 24 * 3600.0
WORKERS = 16

_BATCH_KEYS = 1000
_HASH = r"[0-9a-f]{16}"
_ATTEMPT = r"[0-9a-f]{16,32}"  # perhaps behind the word of its job
_WRITTEN = re.compile(
    rf"data/[0-9a-f]{{2}}/[0-9a-f]{{8}}-\d{{8}}-{_ATTEMPT}\.(tar|parquet)"
    rf"|masks/[0-9a-f]{{2}}/{_ATTEMPT}"
    rf"|dedup/{_ATTEMPT}/[^/]+"
    rf"|plans/{_HASH}/[^/]+"
    rf"|objects/\d+-{_ATTEMPT}/[^/]+"
    rf"|\.probe-{_ATTEMPT}"
)
"""Exactly the names that pack, mask, dedup, plan and checkpoints give: a prefix given by mistake,
full of somebody's own data/, loses nothing."""

_COMMITTED = ("snapshots/", "commits/", "manifests/")
_SNAPSHOT = re.compile(r"snapshots/v(\d+)\.parquet")
_WORD = re.compile(r"[^\s,;()]+")


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something nobody will miss."""

    key: str
    size_bytes: int | None  # None: parts of an upload, of which S3 does not say
    age_s: float
    is_unfinished: bool  # a write that was never finished; otherwise an object


@dataclass(frozen=True)
class GcReport:
    """What was found, and whether it was removed."""

    orphans: tuple[Orphan, ...]
    deleted: bool

    @property
    def num_objects(self) -> int:
        """Whole objects among the orphans."""
        return sum(not orphan.is_unfinished for orphan in self.orphans)

    @property
    def num_unfinished(self) -> int:
        """Multipart uploads and staging files among the orphans."""
        return sum(orphan.is_unfinished for orphan in self.orphans)

    @property
    def size_bytes(self) -> int:
        """The orphans' bytes, as far as the store tells them."""
        return sum(orphan.size_bytes or 0 for orphan in self.orphans)


def collect_garbage(
    dataset: Store,
    *,
    grace_s: float = GRACE_S,
    delete: bool = False,
    now: datetime | None = None,
) -> GcReport:
    """Find what killed writers left below a data set's or a run's prefix; remove it if `delete`.

    Args:
        grace_s: what is younger stays, and must: a writer may be about to name it. now: the time to
        reckon with; by default the store's own if anything is to be deleted, else this machine's.

    Raises UsageError for a negative grace, ManifestError if a document that names objects cannot be
    read (then nothing was deleted), StoreError.
    """
    if not grace_s >= 0:
        raise UsageError(f"a grace of {grace_s} s: give 0 or more")
    now = now or (_store_time(dataset) if delete else datetime.now(UTC))
    limit = now - timedelta(seconds=grace_s)
    suspects = {
        info.key: info
        for info in dataset.list()
        if info.modified < limit and _WRITTEN.fullmatch(info.key)
    }
    _strike_off(dataset, suspects)
    unfinished = [each for each in _unfinished(dataset) if each.begun < limit]
    if delete:
        _delete_all(dataset.delete, suspects)
        _delete_all(dataset.abort, unfinished)
    orphans = [
        Orphan(info.key, info.size_bytes, (now - info.modified).total_seconds(), False)
        for info in suspects.values()
    ]
    orphans += [
        Orphan(each.key, each.size_bytes, (now - each.begun).total_seconds(), True)
        for each in unfinished
    ]
    return GcReport(tuple(sorted(orphans, key=lambda orphan: orphan.key)), delete)


def _store_time(dataset: Store) -> datetime:
    """The time by the clock that also dates the objects."""
    key = f".probe-{new_attempt()}"
    dataset.put_if_absent(key, b"what time is it")
    try:
        info = dataset.head(key)
    finally:
        dataset.delete(key)
    return datetime.now(UTC) if info is None else info.modified


def _unfinished(dataset: Store) -> Iterator[UnfinishedWrite]:
    """Every write that was begun below the prefix, of an object that a writer of ours writes.

    Commits, snapshots and manifests are small single PUTs; on a directory even these can leave a
    staging file.
    """
    for write in dataset.unfinished():
        if _WRITTEN.fullmatch(write.key) or write.key.startswith(_COMMITTED):
            yield write


# ----------------------------------------------------------------------------------------
# what is named


def _strike_off(dataset: Store, suspects: dict[str, ObjectInfo]) -> None:
    """Remove from the suspects what any document names; reads no more documents than it must."""
    for names in (_named_by_snapshots, _named_by_documents):
        if not suspects:
            return
        for name in names(dataset):
            suspects.pop(name.removeprefix(dataset.url_of("")), None)
    # Last, since a job that was left may be taken up again at any time.
    for key in _in_living_plans(dataset, suspects):
        del suspects[key]


def _named_by_snapshots(dataset: Store) -> Iterator[str]:
    """What any version names. Versions are listed and probed: either alone might miss one."""
    matches = (_SNAPSHOT.fullmatch(info.key) for info in dataset.list("snapshots"))
    versions = {int(match[1]) for match in matches if match} | {latest_version(dataset)} - {0}
    for version in sorted(versions):
        snapshot = read_snapshot(dataset, version)
        for column in snapshot.table.columns:
            if pa.types.is_string(column.type):
                yield from (name for name in column.unique().to_pylist() if name)
        yield from _WORD.findall(snapshot.note)  # a table of clusters


def _named_by_documents(dataset: Store) -> Iterator[str]:
    """Every string in every commit and every checkpoint manifest."""
    for folder in ("commits", "manifests"):
        keys = (info.key for info in dataset.list(folder) if info.key.endswith(".json"))
        with ThreadPoolExecutor(WORKERS) as readers:
            while batch := list(islice(keys, _BATCH_KEYS)):  # map alone would read all ahead
                for document in readers.map(lambda key: _read_document(dataset, key), batch):
                    yield from _strings(document)


def _read_document(dataset: Store, key: str) -> dict[str, Any]:
    """A commit, which may be gone since it was listed: old checkpoints are removed by their run."""
    return read_commit(dataset, key) or {}


def _strings(value: object) -> Iterator[str]:
    """The strings in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _in_living_plans(dataset: Store, suspects: Iterable[str]) -> list[str]:
    """The suspects in plans that are committed, or of which any object is young."""
    old = {key for key in suspects if key.startswith("plans/")}
    living = {
        _folder(info.key)
        for info in dataset.list("plans")
        if info.key not in old or info.key.endswith("/plan.json")
    }
    return [key for key in old if _folder(key) in living]


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


# ----------------------------------------------------------------------------------------
# removal


def _delete_all(delete: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(WORKERS) as workers:
        for _ in workers.map(delete, items):
            pass
