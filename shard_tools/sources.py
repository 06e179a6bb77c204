"""What there is to pack: the files under a folder or prefix, in a fixed order, with bounded memory.

A listing comes in whatever order the store likes. It is cut into runs that fit in memory, each is
sorted and spilled to a local file, and the runs are merged: an external merge sort, so that a plan
of a billion files needs disk, not memory.
"""

import heapq
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.store import SourceFile, list_files

RUN_FILES = 500_000  # of about 300 bytes each in memory

_RUN_SCHEMA = pa.schema(
    [("path", pa.string()), ("url", pa.string()), ("size_bytes", pa.int64()), ("tag", pa.string())]
)
_BATCH_ROWS = 10_000


def sorted_files(source: str, *, run_files: int = RUN_FILES) -> Iterator[SourceFile]:
    """Every file under a source, sorted by its path there.

    Raises UsageError, naming the source, if there is none.
    """
    files = list_files(source_url(source))
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        runs: list[Path] = []
        while run := sorted(islice(files, run_files), key=_path):
            runs.append(Path(folder) / f"{len(runs)}.parquet")
            _spill(run, runs[-1])
        if not runs:
            raise UsageError(f"{source}: no files there; give a folder or prefix that holds images")
        yield from heapq.merge(*map(_read_run, runs), key=_path)


def source_url(source: str) -> str:
    """A source as an absolute URL without a slash at its end."""
    return (source if "://" in source else f"file://{Path(source).absolute()}").rstrip("/")


def label_of(path: str) -> str | None:
    """The label of a file of a source: the first folder's name, None for a file at the top."""
    folder, separator, _ = path.partition("/")
    return folder if separator else None


def _path(file: SourceFile) -> str:
    return file.path


def _spill(run: list[SourceFile], target: Path) -> None:
    columns = [[getattr(file, name) for file in run] for name in _RUN_SCHEMA.names]
    try:
        table = pa.table(columns, schema=_RUN_SCHEMA)
    except UnicodeEncodeError:
        raise UsageError(f"{_unencodable(run)}: the name is not UTF-8; rename the file") from None
    pq.write_table(table, target, row_group_size=_BATCH_ROWS)


def _unencodable(run: list[SourceFile]) -> str:
    return next(ascii(f.url) for f in run if f.url != f.url.encode(errors="ignore").decode())


def _read_run(run: Path) -> Iterator[SourceFile]:
    with pq.ParquetFile(run) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                yield SourceFile(**row)
