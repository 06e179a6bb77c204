"""Which rows of a data set are meant: by key, hash, URL, pattern of the source, or a condition.

Called by shard_tools.mask. All that is given is combined by OR: a row is meant if anything names
it, so that one command can carry out several takedown lists.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.manifest import Snapshot
from pipeline.store import Store
from shard_tools.fingerprints import FingerprintSet, read_values
from shard_tools.indexes import Flags, ShardRows, read_rows
from shard_tools.predicate import Predicate
from shard_tools.urls import redact, redact_text

MODES = ("drop", "keep")
_LOOKED_AT = 64  # shards, for the columns that a condition names
_SHA256_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows that match any of what is given.

    Attributes:
        keys, hashes, urls: lists of keys, SHA-256 in hexadecimal, and source URLs; each the URL of
        a file, see shard_tools.fingerprints.read_values. URLs are compared as they are stored,
        without user information and signatures, with the source and with the column `url` that
        tars carry. patterns: globs of the whole of either, case matters.
        where: a condition on index columns in SQL, see shard_tools.predicate. mode: "drop" hides
        the rows, "keep" hides all others.
    """

    keys: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    where: str | None = None
    mode: str = "drop"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        if not (self.keys or self.hashes or self.urls or self.patterns or self.where):
            raise UsageError(
                "nothing is selected: give a list of keys, hashes or URLs, a pattern of sources, "
                "or a condition"
            )

    @property
    def note(self) -> str:
        """One line that says what is selected."""
        parts = [
            f"{what} in {redact(url)}"
            for what in ("keys", "hashes", "urls")
            for url in getattr(self, what)
        ]
        parts += [f"source like {redact(pattern)}" for pattern in self.patterns]
        parts += [f"where {redact_text(self.where)}"] if self.where else []
        return " ".join(f"{self.mode} {' or '.join(parts)}".split())


class Chooser:
    """A selection that was read in, ready to be asked about rows. Safe to share between threads.

    Raises UsageError on construction if a list, a hash on it or the condition is wrong.
    """

    def __init__(self, selection: Selection) -> None:
        self._keeps = selection.mode == "keep"
        self._predicate = Predicate(selection.where) if selection.where else None
        patterns = "|".join(map(fnmatch.translate, selection.patterns))
        self._matches_pattern = re.compile(patterns).match if patterns else None
        self._keys = _read_set(selection.keys, ("key",), _key)
        self._hashes = _read_set(selection.hashes, ("sha256",), _sha256)
        self._urls = _read_set(selection.urls, ("url", "source"), _stored_url)

    @property
    def num_listed(self) -> int:
        """Distinct values on all lists."""
        return sum(map(len, (self._keys, self._hashes, self._urls)))

    @property
    def num_found(self) -> int:
        """Distinct values on the lists that a row had which was asked about."""
        return sum(listed.num_found for listed in (self._keys, self._hashes, self._urls))

    def decide(self, tar: str, rows: ShardRows) -> Flags:
        """The bits that may stay, bool [rows].

        A reject that is named loses its bit too, or a retry would bring back what was taken down;
        but that it is not named among what to keep says nothing of a reject.
        """
        chosen = self.chosen(rows)
        stays: Flags = chosen | ~rows.is_ok if self._keeps else ~chosen
        return stays

    def chosen(self, rows: ShardRows) -> Flags:
        """Which rows match, bool [rows]."""
        table = rows.table
        chosen = np.zeros(len(table), np.bool_)
        if len(self._keys):
            chosen |= self._keys.contains(_encoded(table["key"]))
        if len(self._hashes):
            chosen |= self._hashes.contains([value or b"" for value in table["sha256"].to_pylist()])
        for column in {"source", "url"} & set(table.column_names):  # url: what a tar says of itself
            texts = [text or "" for text in table[column].to_pylist()]
            if len(self._urls):
                chosen |= self._urls.contains([text.encode() for text in texts])
            if self._matches_pattern is not None:
                matched = map(bool, map(self._matches_pattern, texts))
                chosen |= np.fromiter(matched, bool, len(table))
        if self._predicate is not None:
            chosen |= self._predicate.holds(table)
        return chosen

    def check_columns(self, dataset: Store, snapshot: Snapshot) -> None:
        """Look whether the condition's columns exist: those of the inputs differ between shards.

        Raises UsageError if none of up to 64 shards, evenly spread, has one of them.
        """
        missing = self._predicate.columns if self._predicate is not None else frozenset()
        seen: dict[str, None] = {}
        shards = np.unique(np.linspace(0, len(snapshot) - 1, _LOOKED_AT).astype(int))
        for shard in shards if missing else ():
            seen |= dict.fromkeys(read_rows(dataset, snapshot, shard).table.column_names)
            missing -= {name.lower() for name in seen}
            if not missing:
                return
        if missing:
            raise UsageError(
                f"the condition names {', '.join(sorted(missing))}, which {len(shards)} of "
                f"{len(snapshot)} shards have not; the columns are {', '.join(seen)}"
            )


def _read_set(
    lists: Iterable[str], columns: tuple[str, ...], encode: Callable[[Any], bytes]
) -> FingerprintSet:
    return FingerprintSet(chain.from_iterable(_encode_list(url, columns, encode) for url in lists))


def _encode_list(
    url: str, columns: tuple[str, ...], encode: Callable[[Any], bytes]
) -> Iterator[bytes]:
    for number, value in enumerate(read_values(url, columns), 1):
        try:
            yield encode(value)
        except ValueError as error:
            raise UsageError(f"{url}: value {number}, {value[:80]!r}: {error}") from None


def _key(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _sha256(value: str | bytes) -> bytes:
    digest = value if isinstance(value, bytes) else bytes.fromhex(value)
    if len(digest) != _SHA256_BYTES:
        raise ValueError(f"{len(digest)} bytes are no SHA-256, which has {_SHA256_BYTES}")
    return digest


def _stored_url(value: str | bytes) -> bytes:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    # Of an adopted shard's member ("….tar#name") the fragment is part of the name.
    tar, mark, member = text.partition(".tar#")
    return f"{redact(f'{tar}.tar')}#{member}".encode() if mark else redact(text).encode()


def _encoded(column: Any) -> list[bytes]:
    return [value.encode() for value in column.to_pylist()]
