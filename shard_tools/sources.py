"""What there is to pack: the files under a folder or prefix, in a fixed order, with bounded memory.

A listing comes in whatever order the store likes. It is cut into runs that fit in memory, each is
sorted and spilled to a local file, and the runs are merged: an external merge sort, so that a plan
of a billion files needs disk, not memory.
"""

import heapq
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.store import SourceFile, list_files, refuse_credentials

RUN_FILES = 500_000  # of about 300 bytes each in memory
MERGED_RUNS = 64  # at once: so many files are open, and a batch of each in memory

_RUN_SCHEMA = pa.schema(
    [("path", pa.string()), ("url", pa.string()), ("size_bytes", pa.int64()), ("tag", pa.string())]
)
_BATCH_ROWS = 1000
_GROUP_ROWS = 10_000


def sorted_files(source: str, *, run_files: int = RUN_FILES) -> Iterator[SourceFile]:
    """Every file under a source, sorted by its path there.

    Raises UsageError, naming the source, if there is none.
    """
    files = list_files(source_url(source))
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        runs: list[Path] = []
        while run := sorted(islice(files, run_files), key=_path):
            runs.append(Path(folder) / f"{len(runs)}.parquet")
            _spill(iter(run), runs[-1])
        if not runs:
            raise UsageError(f"{source}: no files there; give a folder or prefix that holds images")
        while len(runs) > MERGED_RUNS:
            starts = range(0, len(runs), MERGED_RUNS)
            runs = [_merge_into_one(runs[start : start + MERGED_RUNS]) for start in starts]
        yield from _merged(runs)


def source_url(source: str) -> str:
    """A source as an absolute URL, the same one however it is spelt, without a slash at its end.

    Raises UsageError for a URL with credentials in it.
    """
    refuse_credentials(source)
    scheme, separator, path = source.partition("://")
    if not separator or scheme == "file":
        path = os.path.normpath(Path(path if separator else source).absolute())
        return f"file:///{path.lstrip('/')}"
    if "::" in source:  # a chain of URLs, which fsspec takes apart
        return source.rstrip("/")
    return f"{scheme}://{re.sub('/+', '/', path)}".rstrip("/")


def label_of(path: str) -> str | None:
    """The label of a file of a source: the first folder's name, None for a file at the top."""
    folder, separator, _ = path.partition("/")
    return folder if separator else None


def _path(file: SourceFile) -> str:
    return file.path


def _spill(files: Iterator[SourceFile], target: Path) -> None:
    """Write files as they come, with memory for one row group."""
    with pq.ParquetWriter(target, _RUN_SCHEMA) as writer:
        while group := list(islice(files, _GROUP_ROWS)):
            writer.write_table(_as_table(group))


def _as_table(files: list[SourceFile]) -> pa.Table:
    columns = [[getattr(file, name) for file in files] for name in _RUN_SCHEMA.names]
    try:
        return pa.table(columns, schema=_RUN_SCHEMA)
    except UnicodeEncodeError:
        raise UsageError(f"{_unencodable(files)}: the name is not UTF-8; rename the file") from None


def _merge_into_one(runs: list[Path]) -> Path:
    """Merge sorted runs into one, which replaces them on the disk."""
    target = runs[0].with_name(f"merged-{runs[0].name}")
    _spill(_merged(runs), target)
    for run in runs:
        run.unlink()
    return target


def _merged(runs: list[Path]) -> Iterator[SourceFile]:
    return iter(heapq.merge(*map(_read_run, runs), key=_path))


def _unencodable(files: list[SourceFile]) -> str:
    return next(ascii(f.url) for f in files if f.url != f.url.encode(errors="ignore").decode())


def _read_run(run: Path) -> Iterator[SourceFile]:
    with pq.ParquetFile(run) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                yield SourceFile(**row)
