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
from shard_tools.lists import SUFFIXES, ColumnNames, is_list, read_list
from shard_tools.tars import is_gzipped, tar_spans
from shard_tools.urls import redact

Kind = Literal["files", "urls", "tars", "adopt"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_GZIP_SPANS = 16  # a gzipped tar that is larger cannot be cut, and would be one shard

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
_NOUNS = {"tars": "tars", "urls": "lists of URLs", "files": "other files"}
_HTTP = re.compile(r"(\w+::)*https?://")  # itself, or through one of fsspec's caches


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
    """What a source holds, by the names of its first files: tars, lists or images.

    Listings come in any order, so a mixture may not show yet: `planned_inputs` looks at the rest.
    Raises UsageError, naming the source, if there is nothing, or a mixture.
    """
    if is_list(source):
        return "urls"
    files = islice(_files(source), _PEEKED_FILES)
    first = next(files)
    kind = _kind_by_name(first)
    for file in files:
        _refuse_mixture(source, kind, file)
    return kind


def _kind_by_name(file: SourceFile) -> Kind:
    name = file.path.lower()
    if name.endswith(TAR_SUFFIXES):
        return "tars"
    # Text is not taken for a list unless it is said to be, or is the source itself.
    return "urls" if is_list(name) and not name.removesuffix(".gz").endswith(".txt") else "files"


def _refuse_mixture(source: str, kind: Kind, file: SourceFile) -> None:
    if (other := _kind_by_name(file)) != kind:
        raise UsageError(
            f"{source} holds {_NOUNS[kind]} and also {_NOUNS[other]}, such as {file.path}: say by "
            "--kind which of them to pack (files takes every file for an image)"
        )


def planned_inputs(
    source: str, kind: Kind, *, url_column: str | None, span_bytes: int, guessed: bool = False
) -> Iterator[PlannedInput]:
    """Everything a source holds, in the order in which it is packed.

    Args:
        url_column: of URL lists, None for the usual names. span_bytes: tars twice as large as this
        are cut into pieces of about this size. guessed: the kind is from `kind_of`, so files of
        another kind are refused; otherwise who named the kind has asked to leave them out.

    Raises UsageError, naming the source, if there is nothing of its kind, or what cannot be packed.
    """
    files = sorted_files(source)
    if guessed and not is_list(source):
        files = _of_one_kind(source, kind, files)
    if kind == "urls":
        return _listed_urls(source, files, url_column)
    if kind == "files":
        return (
            PlannedInput(row, file.url, file.size_bytes, file.tag, label_of(file.path))
            for row, file in enumerate(files)
        )
    return _pieces(source, files, span_bytes, adopt=kind == "adopt")


def _of_one_kind(source: str, kind: Kind, files: Iterator[SourceFile]) -> Iterator[SourceFile]:
    for file in files:
        _refuse_mixture(source, kind, file)
        yield file


def _listed_urls(
    source: str, files: Iterator[SourceFile], url_column: str | None
) -> Iterator[PlannedInput]:
    row = -1
    names = ColumnNames()
    for file in _files_named(source, files, SUFFIXES, "list of URLs"):
        for listed in read_list(file.url, url_column, names=names):
            row += 1
            url = redact(listed.url)
            # A fragment is not needed to fetch the image, a signature is.
            is_whole = url in (listed.url, listed.url.partition("#")[0])
            origin = None if is_whole else f"{file.url}#{listed.position}"
            yield PlannedInput(row, url, label=listed.label, origin=origin, columns=listed.columns)
    if row < 0:
        raise UsageError(f"{source}: its lists are empty")


def _pieces(
    source: str, files: Iterator[SourceFile], span_bytes: int, *, adopt: bool
) -> Iterator[PlannedInput]:
    row = 0
    for file in _files_named(source, files, TAR_SUFFIXES, "tar"):
        zipped = is_gzipped(file.path)
        if zipped:
            _refuse_gzipped(file, span_bytes, adopt)
        for start, end in _spans(file, None if adopt or zipped else span_bytes):
            yield PlannedInput(
                row, file.url, file.size_bytes, file.tag, start_bytes=start, end_bytes=end
            )
            # No member is shorter than a block: so many numbers are enough without counting, with
            # one for damage and one for a change behind the last member.
            row += (end - start) * (_GZIP_RATIO if zipped else 1) // _BLOCK_BYTES + 2


def _refuse_gzipped(file: SourceFile, span_bytes: int, adopt: bool) -> None:
    if adopt:
        raise UsageError(
            f"{file.url}: a gzipped tar cannot be adopted, since nothing in it can be read by its "
            "place: pack it, or unpack the file first"
        )
    if (file.size_bytes or 0) > MAX_GZIP_SPANS * span_bytes:
        raise UsageError(
            f"{file.url}: a gzipped tar of {file.size_bytes} bytes cannot be cut into shards, and "
            f"one shard takes at most {MAX_GZIP_SPANS} * {span_bytes} bytes of it: unpack it first"
        )


def _spans(file: SourceFile, span_bytes: int | None) -> list[tuple[int, int]]:
    """The pieces in which a tar is read: one, unless it is much larger than `span_bytes`."""
    if file.size_bytes is None:
        raise UsageError(f"{file.url}: its store does not tell how large it is; copy the tar first")
    if span_bytes is None or file.size_bytes <= 2 * span_bytes:
        return [(0, file.size_bytes)]
    return tar_spans(file, span_bytes)


def _files_named(
    source: str, files: Iterator[SourceFile], suffixes: tuple[str, ...], noun: str
) -> Iterator[SourceFile]:
    """The files with these suffixes (or gzipped)."""
    num_others = 0
    found = False
    for file in files:
        if file.path.lower().removesuffix(".gz").endswith(suffixes):
            found = True
            yield file
        else:
            num_others += 1
    if not found:
        names = " or ".join(suffixes)
        raise UsageError(
            f"{source}: no {noun} there, but {num_others} other files; expected are names that end "
            f"in {names}"
        )


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
    if _HTTP.match(url) and not (is_list(url) or url.lower().endswith(TAR_SUFFIXES)):
        raise UsageError(
            f"{source}: over HTTP nobody can see what a folder holds; write the URLs of the images "
            "into a list (.txt with a URL a line, .csv, .parquet), and give that"
        )
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
    if "::" in source:  # fsspec takes chains apart; what lies innermost may be a local file
        outer, _, inner = source.rpartition("::")
        return f"{outer}::{source_url(inner) if inner else inner}".rstrip("/")
    if scheme in ("http", "https"):  # there "//" counts
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
