"""Lists of image URLs: Parquet, CSV, TSV, JSON lines or plain text, gzipped or not.

A list is read in its own order and streamed, a batch at a time. One column holds the URL, `label`
becomes the label, every other column is carried into the index as text. What is stored of a URL is
its redacted form (see shard_tools.urls); where that lost something that is needed to fetch the
image, such as a signature, the list itself is read again when the image is fetched.
"""

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError, UsageError
from pipeline.shards import INDEX_SCHEMA
from pipeline.store import open_file

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
URL_COLUMNS = ("url", "image_url", "uri")  # the first that a list has

_BATCH_ROWS = 10_000
_LABEL = "label"
_TAKEN = frozenset(name.lower() for name in INDEX_SCHEMA.names)

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ListedUrl:
    """One row of a list: its URL as it stands there, and what the list says of it."""

    position: int  # in its list, from 0
    url: str
    label: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)


def is_list(path: str) -> bool:
    """Whether the name is that of a list."""
    return path.lower().removesuffix(".gz").endswith(SUFFIXES)


def read_list(url: str, url_column: str | None = None) -> Iterator[ListedUrl]:
    """The rows of a list, in order. A row without a URL has the URL "".

    Args:
        url: of the list; its suffix says what it is. url_column: the column with the URLs, by
        default the first of URL_COLUMNS that there is.

    Raises UsageError, naming the list and the line, if it is not what its suffix says or has no
    column of URLs; StoreError if it cannot be read.
    """
    with _opened(url) as file, _explained(url):
        records = iter(_READERS[_suffix(url)](file))
        first = next(records, None)
        if first is None:
            return
        column = _url_column(first, url_column, url)
        names = {name: _carried_name(name) for name in first if name not in (column, _LABEL)}
        for position, record in enumerate(chain([first], records)):
            yield _listed(position, record, column, names)


def read_urls(url: str, positions: Iterable[int], url_column: str | None = None) -> dict[int, str]:
    """The URLs at some positions of a list, by position; those beyond its end are absent."""
    wanted = set(positions)
    last = max(wanted, default=-1)
    found = {}
    for row in read_list(url, url_column):
        if row.position > last:
            break
        if row.position in wanted:
            found[row.position] = row.url
    return found


def _listed(position: int, record: Record, column: str, names: dict[str, str]) -> ListedUrl:
    for name in record.keys() - names.keys():  # JSON lines need not all have the same keys
        if name not in (column, _LABEL):
            names[name] = _carried_name(name)
    columns = {names[name]: _text(value) for name, value in record.items() if name in names}
    return ListedUrl(position, _text(record.get(column)) or "", _text(record.get(_LABEL)), columns)


def _carried_name(name: str) -> str:
    """The name of a list's column in the index, whose own names (in any case) are taken."""
    return f"input_{name}" if name.lower() in _TAKEN else name


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


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value) if isinstance(value, int | float) else json.dumps(value, default=str)


# ----------------------------------------------------------------------------------------
# the formats


def _suffix(url: str) -> str:
    name = url.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise UsageError(f"{url}: no list of URLs; a list's name ends in {' '.join(SUFFIXES)}")
    return suffix


@contextlib.contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_file(url))
        if url.lower().endswith(".gz"):
            file = cast(BinaryIO, stack.enter_context(gzip.open(file)))
        yield file


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, csv.Error, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{url}: not what its name says it is: {error}") from None
    except OSError as error:
        raise StoreError(f"cannot read {url}: {error}; run the command again") from None


def _read_parquet(file: BinaryIO) -> Iterator[Record]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            yield from batch.to_pylist()


def _read_delimited(file: BinaryIO, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(_lines(file), delimiter=delimiter)
    header = next(reader, [])
    for fields in reader:
        if len(fields) > len(header):
            line = reader.line_num
            raise ValueError(f"line {line} has {len(fields)} fields, the first {len(header)}")
        if fields:
            yield dict(zip(header, fields + [None] * (len(header) - len(fields)), strict=True))


def _read_csv(file: BinaryIO) -> Iterator[Record]:
    return _read_delimited(file, ",")


def _read_tsv(file: BinaryIO) -> Iterator[Record]:
    return _read_delimited(file, "\t")


def _read_json_lines(file: BinaryIO) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            yield _json_object(line, number)


def _json_object(line: str, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"line {number} is no JSON object")
    return record


def _read_text(file: BinaryIO) -> Iterator[Record]:
    for line in _lines(file):
        if url := line.strip():
            yield {URL_COLUMNS[0]: url}


def _lines(file: BinaryIO) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    try:
        yield from text
    finally:
        with contextlib.suppress(ValueError):  # it is closed already
            text.detach()  # else the file is its owner's to close


_READERS: dict[str, Callable[[BinaryIO], Iterator[Record]]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".txt": _read_text,
}
