"""Lists of image URLs: Parquet, CSV, TSV, JSON lines or plain text, gzipped or not.

A list is read in its own order and streamed, a batch at a time. One column holds the URL, `label`
becomes the label, every other column is carried into the index as text, URLs in it redacted. What
is stored of the URL is its redacted form too (see shard_tools.urls); where that lost something that
is needed to fetch the image, such as a signature, the list is read again when the image is fetched.
One malformed row among many is an input like any other, to be rejected; it does not end the job.
"""

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.shards import INDEX_SCHEMA
from pipeline.store import open_file, source_errors
from shard_tools.urls import redact, redact_text

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
URL_COLUMNS = ("url", "image_url", "uri")  # the first that a list has
BAD_ROW = "bad_row"  # the column that says what is wrong with a row

MAX_FIELD_BYTES = 16 * 2**20  # of CSV; the standard library's own limit is 128 KiB

_BATCH_ROWS = 10_000
_TRIED_ROWS = 100  # with none among them that can be read, it is no list
_QUOTED_CHARACTERS = 200  # of a bad row
_LABEL = "label"
_OURS = (_LABEL, "original_width", "original_height", BAD_ROW)
_TAKEN = frozenset(name.lower() for name in (*INDEX_SCHEMA.names, *_OURS))

Record = dict[str, Any]
_Row = Callable[[], Record]  # parses a row; ValueError if it is malformed


@dataclass(frozen=True, slots=True)
class ListedUrl:
    """One row of a list: its URL as it stands there, and what the list says of it, redacted."""

    position: int  # in its list, from 0
    url: str
    label: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)


class ColumnNames(dict[str, str]):
    """From a list's column to its name in the index: no two that differ in case only.

    SQL does not tell those apart. The index's own names are taken, and names are given in the order
    in which columns are first seen. Lists that share an index share one of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken = set(_TAKEN)

    def __missing__(self, column: str) -> str:
        plain = column.encode(errors="replace").decode()
        base = f"input_{plain}" if not plain or plain.lower() in _TAKEN else plain
        name, number = base, 1
        while name.lower() in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name.lower())
        self[column] = name
        return name


def is_list(path: str) -> bool:
    """Whether the name is that of a list."""
    return path.lower().removesuffix(".gz").endswith(SUFFIXES)


def read_list(
    url: str, url_column: str | None = None, *, names: ColumnNames | None = None
) -> Iterator[ListedUrl]:
    """The rows of a list, in order. A row without a URL has the URL "".

    So has a malformed row, whose only column, BAD_ROW, says what is wrong.

    Args:
        url: of the list; its suffix says what it is. url_column: the column with the URLs, by
        default the first of URL_COLUMNS that there is. names: of the columns, which it extends.

    Raises UsageError, naming the list and the line, if it is not what its suffix says, begins with
    nothing but malformed rows or has no column of URLs; StoreError if it cannot be read.
    """
    names = ColumnNames() if names is None else names
    with open_list(url) as file:
        first, rows = _first_record(_READERS[_suffix(url)](file))
        if first is None:
            return
        column = _url_column(first, url_column, url)
        for position, row in enumerate(rows):
            try:
                record = row()
            except ValueError as error:
                yield ListedUrl(position, "", columns={BAD_ROW: _as_text(str(error))})
            else:
                yield _listed(position, record, column, names)


def read_urls(url: str, positions: Iterable[int], url_column: str | None = None) -> dict[int, str]:
    """The URLs at some positions of a list, by position; those beyond its end are absent.

    The rows before them are not parsed and, in Parquet, not read. Raises as `read_list`.
    """
    wanted = sorted(set(positions))
    with open_list(url) as file:
        read = _urls_in_parquet if _suffix(url) == ".parquet" else _urls_in_rows
        return {position: _as_text(value) or "" for position, value in
                read(file, url, wanted, url_column)}  # fmt: skip


def _urls_in_rows(
    file: BinaryIO, url: str, wanted: list[int], url_column: str | None
) -> Iterator[tuple[int, Any]]:
    first, rows = _first_record(_READERS[_suffix(url)](file))
    column = _url_column(first, url_column, url) if first is not None else ""
    position = -1
    for each in wanted:
        row = next(islice(rows, each - position - 1, None), None)
        if row is None:
            return
        position = each
        with contextlib.suppress(ValueError):
            yield each, row().get(column)


def _urls_in_parquet(
    file: BinaryIO, url: str, wanted: list[int], url_column: str | None
) -> Iterator[tuple[int, Any]]:
    """Of the row groups that hold wanted positions, the column of URLs."""
    with pq.ParquetFile(file) as parquet:
        column = _url_column(dict.fromkeys(parquet.schema_arrow.names), url_column, url)
        start = 0
        for group in range(parquet.num_row_groups):
            end = start + parquet.metadata.row_group(group).num_rows
            inside = [position for position in wanted if start <= position < end]
            if inside:
                values = parquet.read_row_group(group, [column], use_threads=False)[column]
                for position in inside:
                    yield position, values[position - start].as_py()
            start = end


def _first_record(rows: Iterator[_Row]) -> tuple[Record | None, Iterator[_Row]]:
    """The first row that can be parsed, None if there are no rows; and all rows from the first on.

    Raises ValueError, about the first row, if none of those at the beginning can.
    """
    seen: list[_Row] = []
    problem: ValueError | None = None
    for row in islice(rows, _TRIED_ROWS):
        seen.append(row)
        try:
            return row(), chain(seen, rows)
        except ValueError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None, iter(())


def _listed(position: int, record: Record, column: str, names: ColumnNames) -> ListedUrl:
    columns = {
        names[name]: _carried(value)
        for name, value in record.items()
        if name not in (column, _LABEL)
    }
    url = _as_text(record.get(column)) or ""
    return ListedUrl(position, url, _carried(record.get(_LABEL)), columns)


def _carried(value: Any) -> str | None:
    """A value as it is stored: URLs in it without secrets."""
    text = _as_text(value)
    return None if text is None else redact_text(text)


def _url_column(record: Record, wanted: str | None, url: str) -> str:
    if wanted is not None and wanted in record:
        return wanted
    if wanted is None:
        names = {name.lower(): name for name in reversed(record)}
        for candidate in URL_COLUMNS:
            if candidate in names:
                return names[candidate]
    missing = f"no column {wanted!r}" if wanted else "no column of URLs"
    columns = ", ".join(record)
    raise UsageError(f"{url} has {missing}: name one of {columns} by --url-column")


def _as_text(value: Any) -> str | None:
    """A value as text that UTF-8 can hold: JSON may name half a surrogate pair."""
    if value is None:
        return None
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value) if isinstance(value, int | float) else json.dumps(value, default=str)


@contextlib.contextmanager
def open_list(url: str) -> Iterator[BinaryIO]:
    """A list's bytes, unpacked if its name says that it is gzipped.

    Inside the block, what is wrong with them is raised as UsageError, naming the list, and what
    fails in reading them as StoreError.
    """
    with contextlib.ExitStack() as stack, source_errors("read", url):
        file = stack.enter_context(open_file(url))
        if url.lower().endswith(".gz"):
            file = cast(BinaryIO, stack.enter_context(gzip.open(file)))
        try:
            yield file
        except (pa.ArrowException, csv.Error, ValueError, EOFError, gzip.BadGzipFile) as error:
            what = f"not what its name says it is: {error}"
            raise UsageError(f"{redact(url)}: {what}") from None


# ----------------------------------------------------------------------------------------
# the formats


def _suffix(url: str) -> str:
    name = url.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise UsageError(f"{url}: no list of URLs; a list's name ends in {' '.join(SUFFIXES)}")
    return suffix


def _read_parquet(file: BinaryIO) -> Iterator[_Row]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            for record in batch.to_pylist():
                yield partial(_itself, record)


def _itself(record: Record) -> Record:
    return record


def _read_delimited(file: BinaryIO, delimiter: str) -> Iterator[_Row]:
    csv.field_size_limit(MAX_FIELD_BYTES)
    reader = csv.reader(_lines(file), delimiter=delimiter)
    header = _distinct(next(reader, []))
    while True:
        try:
            for fields in reader:
                if fields:
                    yield partial(_delimited_record, header, fields, reader.line_num)
            return
        except csv.Error as error:  # the reader goes on behind the line
            yield partial(_refuse, f"line {reader.line_num}: {error}")


def _distinct(header: list[str]) -> list[str]:
    """A header's names, the second of two that are the same with a number."""
    seen: dict[str, None] = {}
    for name in header:
        number, distinct = 1, name
        while distinct in seen:
            number += 1
            distinct = f"{name}_{number}"
        seen[distinct] = None
    return list(seen)


def _delimited_record(header: list[str], fields: list[str], line: int) -> Record:
    missing = len(header) - len(fields)
    if missing < 0:
        raise ValueError(
            f"line {line} has {len(fields)} fields, the first {len(header)}: {_quoted(str(fields))}"
        )
    return dict(zip(header, [*fields, *[None] * missing], strict=True))


def _refuse(problem: str) -> Record:
    raise ValueError(problem)


def _quoted(text: str) -> str:
    """The beginning of a bad row, which may be kept."""
    return redact_text(text)[:_QUOTED_CHARACTERS]


def _read_csv(file: BinaryIO) -> Iterator[_Row]:
    return _read_delimited(file, ",")


def _read_tsv(file: BinaryIO) -> Iterator[_Row]:
    return _read_delimited(file, "\t")


def _read_json_lines(file: BinaryIO) -> Iterator[_Row]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            yield partial(_json_object, line, number)


def _json_object(line: str, number: int) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}: {_quoted(line.strip())}") from None
    if not isinstance(record, dict):
        raise ValueError(f"line {number} is no JSON object: {_quoted(line.strip())}")
    return record


def _read_text(file: BinaryIO) -> Iterator[_Row]:
    for line in _lines(file):
        if url := line.strip():
            yield partial(_itself, {URL_COLUMNS[0]: url})


def _lines(file: BinaryIO) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    try:
        yield from text
    finally:
        with contextlib.suppress(ValueError):  # it is closed already
            text.detach()  # else the file is its owner's to close


_READERS: dict[str, Callable[[BinaryIO], Iterator[_Row]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".txt": _read_text,
}
