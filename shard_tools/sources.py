"""What there is to pack: files, rows of URL lists or tars, as one stream in a fixed order.

    files    every file under a folder or prefix, by path
    urls     the rows of URL lists, in the lists' order (see shard_tools.lists)
    tars     the images inside tars, which are packed anew
    adopt    shards that stay where they are and only get an index

A listing comes in whatever order the store likes. It is cut into runs that fit in memory, each is
sorted and spilled to a local file, and the runs are merged: an external merge sort, so that a plan
of a billion files needs disk, not memory.
"""

import heapq
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.store import SourceFile, find_file, list_files, refuse_credentials
from shard_tools.lists import SUFFIXES, is_list, read_list
from shard_tools.tars import tar_spans
from shard_tools.urls import redact

Kind = Literal["files", "urls", "tars", "adopt"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

RUN_FILES = 500_000  # of about 300 bytes each in memory
MERGED_RUNS = 64  # at once: so many files are open, and a batch of each in memory

_RUN_SCHEMA = pa.schema(
    [("path", pa.string()), ("url", pa.string()), ("size_bytes", pa.int64()), ("tag", pa.string())]
)
_BATCH_ROWS = 1000
_GROUP_ROWS = 10_000
_PEEKED_FILES = 100
_BLOCK_BYTES = 512
_GZIP_RATIO = 1032  # deflate packs no tighter


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """Something to pack: one image, or for tars a piece of one with all images in it."""

    row: int  # its number in the plan; a piece of a tar has as many numbers as blocks
    source: str  # URL, redacted
    size_bytes: int | None = None  # of the whole file, where it is known
    tag: str | None = None
    label: str | None = None
    origin: str | None = None  # "list#position", where redaction took something
    start_bytes: int | None = None  # the piece of a tar
    end_bytes: int | None = None
    replaces: str | None = None  # key of the reject that this is another try of
    columns: dict[str, str | None] = field(default_factory=dict)  # carried into the index


def kind_of(source: str) -> Kind:
    """What a source holds, by the names of its files: tars, lists or images.

    Raises UsageError, naming the source, if there is nothing.
    """
    if is_list(source):
        return "urls"
    names = [file.path.lower() for file in islice(_files(source), _PEEKED_FILES)]
    if all(name.endswith(TAR_SUFFIXES) for name in names):
        return "tars"
    # A folder of text is not taken for lists unless it is said to be.
    if all(is_list(name) and ".txt" not in name for name in names):
        return "urls"
    return "files"


def planned_inputs(
    source: str, kind: Kind, *, url_column: str | None, span_bytes: int
) -> Iterator[PlannedInput]:
    """Everything a source holds, in the order in which it is packed.

    Args:
        url_column: of URL lists, None for the usual names. span_bytes: tars twice as large as this
        are cut into pieces of about this size.

    Raises UsageError, naming the source, if there is nothing of its kind.
    """
    if kind == "urls":
        return _listed_urls(source, url_column)
    if kind == "files":
        return (
            PlannedInput(row, file.url, file.size_bytes, file.tag, label_of(file.path))
            for row, file in enumerate(sorted_files(source))
        )
    return _pieces(source, span_bytes if kind == "tars" else None)


def _listed_urls(source: str, url_column: str | None) -> Iterator[PlannedInput]:
    row = -1
    for file in _files_named(source, SUFFIXES, "list of URLs"):
        for listed in read_list(file.url, url_column):
            row += 1
            url = redact(listed.url)
            origin = f"{file.url}#{listed.position}" if url != listed.url else None
            yield PlannedInput(row, url, label=listed.label, origin=origin, columns=listed.columns)
    if row < 0:
        raise UsageError(f"{source}: its lists are empty")


def _pieces(source: str, span_bytes: int | None) -> Iterator[PlannedInput]:
    row = 0
    for file in _files_named(source, TAR_SUFFIXES, "tar"):
        zipped = not file.path.endswith(".tar")
        spans = [(0, file.size_bytes)]
        if span_bytes is not None and file.size_bytes > 2 * span_bytes and not zipped:
            spans = tar_spans(file, span_bytes)
        for start, end in spans:
            yield PlannedInput(
                row, file.url, file.size_bytes, file.tag, start_bytes=start, end_bytes=end
            )
            # No member is shorter than a block: so many numbers are enough without counting.
            row += (end - start) * (_GZIP_RATIO if zipped else 1) // _BLOCK_BYTES + 1


def _files_named(source: str, suffixes: tuple[str, ...], noun: str) -> Iterator[SourceFile]:
    """The files with these suffixes (or gzipped), by path."""
    found = False
    for file in sorted_files(source):
        if file.path.lower().removesuffix(".gz").endswith(suffixes):
            found = True
            yield file
    if not found:
        names = " or ".join(suffixes)
        raise UsageError(f"{source}: no {noun} there; expected files named {names}")


def sorted_files(source: str, *, run_files: int = RUN_FILES) -> Iterator[SourceFile]:
    """Every file under a source, sorted by its path there; a single file is a source too.

    Raises UsageError, naming the source, if there is none.
    """
    files = _files(source)
    with tempfile.TemporaryDirectory(prefix="shard_tools-") as folder:
        runs: list[Path] = []
        while run := sorted(islice(files, run_files), key=_path):
            runs.append(Path(folder) / f"{len(runs)}.parquet")
            _spill(iter(run), runs[-1])
        while len(runs) > MERGED_RUNS:
            starts = range(0, len(runs), MERGED_RUNS)
            runs = [_merge_into_one(runs[start : start + MERGED_RUNS]) for start in starts]
        yield from _merged(runs)


def _files(source: str) -> Iterator[SourceFile]:
    """The source's files as they are listed. Raises UsageError if there is none."""
    url = source_url(source)
    if (file := find_file(url)) is not None:
        return iter([file])
    files = list_files(url)
    first = next(files, None)
    if first is None:
        raise UsageError(f"{source}: no files there; give a folder or prefix that holds images")
    return chain([first], files)


def source_url(source: str) -> str:
    """A source as an absolute URL, the same one however it is spelt, without a slash at its end.

    Raises UsageError for a URL with credentials or a signature in it.
    """
    refuse_credentials(source)
    if "://" in source and redact(source) != source:
        raise UsageError(
            f"{redact(source)}: the URL has a signature, which would be stored with the plan; "
            "download the list and give the file"
        )
    scheme, separator, path = source.partition("://")
    if not separator or scheme == "file":
        path = os.path.normpath(Path(path if separator else source).absolute())
        return f"file:///{path.lstrip('/')}"
    if "::" in source or scheme in ("http", "https"):  # fsspec takes chains apart; "//" counts
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
