"""Sets of ten million strings, and the lists they come from.

A takedown list may be longer than memory is wide: held is a 128-bit BLAKE2b of each value, 16
bytes, sorted. Two of n values have the same with a probability of n² / 2^129, nothing for any n.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.lists import open_list

COLUMNS = ("key", "sha256", "source", "url")

_FINGERPRINT_BYTES = 16
_BATCH_ROWS = 10_000

Flags = npt.NDArray[np.bool_]


class FingerprintSet:
    """A set of byte strings that knows which of them were ever asked for."""

    def __init__(self, values: Iterable[bytes]) -> None:
        high, low = _fingerprints(values)
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        is_first = np.ones(len(high), np.bool_)
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self._high, self._low = high[is_first], low[is_first]
        self._found = np.zeros(len(self._high), np.bool_)

    def __len__(self) -> int:
        return len(self._high)

    @property
    def num_found(self) -> int:
        """How many members some call of `contains` has asked for."""
        return int(self._found.sum())

    def contains(self, values: Sequence[bytes]) -> Flags:
        """Which of the values are members, bool [len(values)]."""
        high, low = _fingerprints(values)
        result = np.zeros(len(high), np.bool_)
        place = np.searchsorted(self._high, high)
        open_ = np.arange(len(high))  # values whose high half may still be met further on
        while len(open_ := open_[place[open_] < len(self)]):
            open_ = open_[self._high[place[open_]] == high[open_]]
            equal = open_[self._low[place[open_]] == low[open_]]
            result[equal] = True
            self._found[place[equal]] = True
            place[open_] += 1
        return result


def read_values(url: str, preferred: Sequence[str] = COLUMNS) -> Iterator[str | bytes]:
    """The values of a list, streamed: its lines, or one column of a Parquet, CSV or TSV file.

    The suffix says which, `.gz` behind it is understood. Of several columns it is the first of
    `preferred` there is, else the first; a CSV's first line is a header if it names one of COLUMNS.
    Binary columns give bytes. Blank and null values are skipped.

    Raises UsageError, naming the list, if it is not what its suffix says; StoreError.
    """
    name = url.lower().removesuffix(".gz")
    with open_list(url) as file:
        if name.endswith(".parquet"):
            values = _parquet_column(file, preferred)
        elif name.endswith((".csv", ".tsv")):
            values = _delimited_column(file, "\t" if name.endswith(".tsv") else ",", preferred)
        else:
            values = (line.strip() for line in _lines(file))
        yield from filter(None, values)


def _fingerprints(
    values: Iterable[bytes],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The two halves of every value's fingerprint."""
    digests = bytearray()
    for value in values:
        digests += hashlib.blake2b(value, digest_size=_FINGERPRINT_BYTES).digest()
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    return halves[:, 0].copy(), halves[:, 1].copy()


def _parquet_column(file: BinaryIO, preferred: Sequence[str]) -> Iterator[Any]:
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        chosen = names[_choose(names, preferred)]
        kind = parquet.schema_arrow.field(chosen).type
        if not any(is_kind(kind) for is_kind in _TEXT_KINDS):
            raise ValueError(f"column {chosen!r} is {kind}, not text; the columns are {names}")
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[chosen], use_threads=False):
            yield from batch.column(0).to_pylist()


def _delimited_column(
    file: BinaryIO, delimiter: str, preferred: Sequence[str]
) -> Iterator[str | None]:
    rows = csv.reader(_lines(file), delimiter=delimiter)
    first = next(rows, [])
    has_header = not {name.strip().lower() for name in first}.isdisjoint(COLUMNS)
    number = _choose(first, preferred)
    for row in rows if has_header else chain([first], rows):
        yield row[number].strip() if len(row) > number else None


def _choose(names: Sequence[str], preferred: Sequence[str]) -> int:
    lowered = [name.strip().lower() for name in names]
    return next((lowered.index(name) for name in preferred if name in lowered), 0)


def _lines(file: BinaryIO) -> Iterator[str]:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield from text


_TEXT_KINDS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)
