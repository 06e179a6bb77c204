"""Tar shards and their indexes: what a data set is made of on the store.

A shard is a plain USTAR file that any WebDataset reader opens: one member `<key>.<extension>` a
sample, time 0, fixed owner and mode, so the same samples give the same bytes. Its index is a
Parquet table with one row for every *input* of the shard, rejects included, which says where each
sample's bytes lie and what they must hash to.

Three checksums: CRC32C of a sample, checked whenever it is read; SHA-256 of a sample, its identity;
and the shard's hash, SHA-256 over (member header ‖ sample SHA-256) of all members, so that it
covers every byte although the pixels are hashed once.

A shard that was adopted is a tar that somebody else wrote and that stays as it is: only its index
is ours. What its index and its hash vouch for are the samples and the 512 bytes before each (the
member's header), folded by the same rule; what lies between them (other members, extended headers,
the end) is nobody's business.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ShardError

BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
MAX_SAMPLE_BYTES = 8**11 - 1  # eleven octal digits
INDEX_VERSION = b"1"

_FRESH_ROWS = 10_000

_VERSION_KEY = b"cropstream.index"
_MAX_NAME_BYTES = 100
_OWNER = b"cropstream".ljust(32, b"\0")
# The parts of a header that all members share, and what they add to its checksum.
_MODE_AND_IDS = b"0000644\x000000000\x000000000\x00"
_TIME = b"\x0000000000000\x00"
_HEADER_TAIL = (
    b"0" + bytes(100) + b"ustar\x0000" + _OWNER + _OWNER + b"0000000\x000000000\x00"
).ljust(356, b"\0")
_HEADER_SUM = sum(_MODE_AND_IDS + _TIME + b" " * 8 + _HEADER_TAIL)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        ("offset", pa.int64()),  # of the sample's first byte in the tar
        ("length", pa.int64()),
        ("crc32c", pa.uint32()),
        ("sha256", pa.binary(32)),
        ("phash", pa.uint64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "ok" or "rejected"
        ("reason", pa.string()),  # of a rejection
    ],
    metadata={_VERSION_KEY: INDEX_VERSION},
)
"""The columns every index has; the input's own columns (`label`, …) follow as strings."""


class Output(Protocol):
    """Where a shard goes: an ObjectWriter, or a file."""

    def write(self, data: bytes, /) -> object: ...


class Input(Protocol):
    """Where a shard comes from: an ObjectReader, or a file."""

    def read(self, length_bytes: int, /) -> bytes: ...


@runtime_checkable
class SkippingInput(Input, Protocol):
    """An input that passes over bytes for less than reading them."""

    def skip(self, length_bytes: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sample lies in its shard and what its bytes hash to: index columns by name."""

    offset: int
    length: int
    crc32c: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it lies in a shard."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar: its header's 512 bytes and its body, which begins at `offset`."""

    name: str
    header: bytes
    offset: int
    data: bytes


class ShardHash:
    """Folds members into the hash of a shard."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, header: bytes, sample_sha256: bytes) -> None:
        """Fold in the next member: its 512-byte header and the SHA-256 of its body."""
        self._hash.update(header)
        self._hash.update(sample_sha256)

    def digest(self) -> bytes:
        """The hash of all members so far, 32 bytes."""
        return self._hash.digest()


class ShardWriter:
    """Streams samples into one shard, with memory for one sample whatever the shard's size.

    Close it with `finish`: a tar without its end is a cut one.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._hash = ShardHash()
        self._padding = b""  # of the last sample, written with what follows
        self.size_bytes = 0
        self.num_samples = 0

    def add(self, key: str, extension: str, data: bytes, sha256: bytes | None = None) -> Entry:
        """Append one sample, whose SHA-256 is computed unless it is known.

        Raises ValueError on a key that is empty or has a dot or slash, or a name over 100 bytes.
        """
        if "." in key or "/" in key or not key:
            raise ValueError(f"{key!r} is no key: readers split names at the first dot")
        header = member_header(f"{key}.{extension}", len(data))
        entry = Entry(
            offset=self.size_bytes + BLOCK_BYTES,
            length=len(data),
            crc32c=crc32c(data),
            sha256=sha256 or hashlib.sha256(data).digest(),
        )
        self._output.write(self._padding + header)
        self._output.write(data)  # joining it to the others would copy it
        self._padding = bytes(-len(data) % BLOCK_BYTES)
        self.size_bytes = entry.offset + len(data) + len(self._padding)
        self._hash.add(header, entry.sha256)
        self.num_samples += 1
        return entry

    def finish(self) -> bytes:
        """Write the end of the archive and return the shard's hash (32 bytes)."""
        self._output.write(self._padding + END_OF_ARCHIVE)
        self.size_bytes += len(END_OF_ARCHIVE)
        return self._hash.digest()


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC of the bytes, 32 bits."""
    return int(google_crc32c.value(data))


def sample_key(plan: str, row: int) -> str:
    """The key of a plan's input row: 8 letters of the plan's hash, 12 digits; so of fixed width."""
    return f"{plan[:8]}{row:012d}"


def row_of_key(key: str) -> int:
    """The row of a plan that `sample_key` made this key of."""
    return int(key[8:])


def member_header(name: str, size_bytes: int) -> bytes:
    """A USTAR header block (POSIX.1-1988) for a file of mode 0644, time 0, user and group 0.

    Raises ValueError if the name or the size does not fit.
    """
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES:
        raise ValueError(f"member name {name!r} has more than {_MAX_NAME_BYTES} bytes")
    if not 0 <= size_bytes <= MAX_SAMPLE_BYTES:
        raise ValueError(f"{name}: {size_bytes} bytes do not fit into a USTAR member (8 GiB)")
    size = b"%011o" % size_bytes
    checksum = b"%06o\0 " % (_HEADER_SUM + sum(encoded) + sum(size))
    name_field = encoded.ljust(_MAX_NAME_BYTES, b"\0")
    return b"".join((name_field, _MODE_AND_IDS, size, _TIME, checksum, _HEADER_TAIL))


class IndexRows:
    """The rows of an index that is being made, all but the last 10,000 in Arrow's memory."""

    def __init__(self) -> None:
        self._fresh: list[Mapping[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._extra: dict[str, None] = {"label": None}  # columns in the order of appearance

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row with the columns of INDEX_SCHEMA (absent ones are null) and strings of its own.

        The mapping is kept for a while: it must not change any more.
        """
        self._fresh.append(row)
        if len(self._fresh) == _FRESH_ROWS:
            self._settle()

    def table(self) -> pa.Table:
        """All rows; the columns are INDEX_SCHEMA's, `label`, then the others."""
        if self._fresh or not self._tables:
            self._settle()
        schema = _index_schema(self._extra)
        whole = pa.concat_tables(self._tables, promote_options="default")
        return whole.select(schema.names).cast(schema)

    def _settle(self) -> None:
        names = dict.fromkeys(chain.from_iterable(self._fresh))
        self._extra |= {name: None for name in names if name not in INDEX_SCHEMA.names}
        self._tables.append(pa.Table.from_pylist(self._fresh, _index_schema(self._extra)))
        self._fresh = []


def encode_index(rows: Sequence[Mapping[str, Any]], extra_columns: Sequence[str] = ()) -> bytes:
    """An index as Parquet bytes; equal rows give equal bytes.

    Args:
        rows: one mapping a row with the columns of INDEX_SCHEMA (absent ones are null) and the
        extra ones. extra_columns: names of further string columns, in order.
    """
    return encode_index_table(pa.Table.from_pylist(list(rows), _index_schema(extra_columns)))


def encode_index_table(table: pa.Table) -> bytes:
    """`encode_index` of what IndexRows collected."""
    output = io.BytesIO()
    pq.write_table(table, output, compression="zstd")
    return output.getvalue()


def _index_schema(extra_columns: Iterable[str]) -> pa.Schema:
    fields = [*INDEX_SCHEMA, *(pa.field(name, pa.string()) for name in extra_columns)]
    return pa.schema(fields, metadata=INDEX_SCHEMA.metadata)


def read_index(body: bytes, *, where: str, sha256: bytes | None = None) -> pa.Table:
    """Parse an index. `where` is its URL, for messages.

    Raises ShardError if it is no index of this version or, given `sha256`, not the recorded bytes.
    """
    if sha256 is not None and hashlib.sha256(body).digest() != sha256:
        raise ShardError(
            f"{where}: the index's SHA-256 is {hashlib.sha256(body).hexdigest()}, recorded was "
            f"{sha256.hex()}; restore the object or pack its unit again"
        )
    try:
        table = parse_parquet(body)
    except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8
        raise ShardError(f"{where}: not a readable Parquet file: {error}") from None
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    fields = [table.schema.field(name) for name in table.column_names[: len(INDEX_SCHEMA)]]
    if version != INDEX_VERSION or fields != list(INDEX_SCHEMA):
        raise ShardError(
            f"{where}: not a shard index of version {INDEX_VERSION.decode()} (it says {version!r}, "
            f"columns {table.column_names}); it was written by another program or version"
        )
    return table


def parse_parquet(body: bytes) -> pa.Table:
    """A Parquet file as a table; page checksums, where it has some, are verified.

    One thread, not pyarrow.parquet.read_table: that leaves threads behind on which the interpreter
    now and then aborts when it exits, a known fault of Arrow. Raises pa.ArrowException, OSError,
    ValueError.
    """
    with pq.ParquetFile(pa.BufferReader(body), page_checksum_verification=True) as file:
        return file.read(use_threads=False)


def kept_rows(index: pa.Table, mask: bytes | None) -> pa.Table:
    """The rows readers see: status "ok" and, where there is a mask, its bit set.

    Args:
        mask: one bit for every row of the index, the first row in the lowest bit of the first byte.

    Raises ShardError if the mask is of another length.
    """
    kept = pc.equal(index["status"], "ok")
    if mask is not None:
        if len(mask) != -(-len(index) // 8):
            raise ShardError(
                f"a mask of {len(mask)} bytes does not fit an index of {len(index)} rows"
            )
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        kept = pc.and_(kept, pa.chunked_array([bits[: len(index)].astype(bool)]))
    return index.filter(kept)


def read_members(stream: Input, *, where: str) -> Iterator[Member]:
    """Walk a tar of plain files strictly.

    Raises ShardError, naming `where` and the offset, on anything cut, on a header whose checksum
    does not hold, on a member that is no plain file, and on an archive without its end. What is cut
    exactly behind a member lacks the end, so no cut goes unseen.
    """
    offset = 0
    while (header := _read_exactly(stream, BLOCK_BYTES, where, offset)) != bytes(BLOCK_BYTES):
        name, size = _parse_header(header, where, offset)
        padded = size + -size % BLOCK_BYTES
        body = _read_exactly(stream, padded, where, offset + BLOCK_BYTES)
        yield Member(name, header, offset + BLOCK_BYTES, body[:size])
        offset += BLOCK_BYTES + padded
    if _read_exactly(stream, BLOCK_BYTES, where, offset + BLOCK_BYTES) != bytes(BLOCK_BYTES):
        raise ShardError(f"{where}: a single zero block at byte {offset} where the archive ends")


def read_samples(
    stream: Input, index: pa.Table, *, where: str, shard_hash: bytes
) -> Iterator[Sample]:
    """Every sample of a shard, checked in full against its index and its hash.

    Raises ShardError, naming `where`, the key and the offset, on the first difference; the hash is
    known last, so nothing may be trusted before the iterator is exhausted.
    """
    rows = index.filter(pc.equal(index["status"], "ok"))
    expected = _entries(rows)
    folded = ShardHash()
    for member in read_members(stream, where=where):
        key, entry = next(expected, ("", None))
        if entry is None:
            raise ShardError(f"{where}: {member.name!r} at byte {member.offset} is in no index row")
        _check_member(member, key, entry, where)
        folded.add(member.header, entry.sha256)
        yield Sample(key, member.data)
    if missing := [key for key, _ in expected]:
        raise ShardError(
            f"{where}: ends without the last {len(missing)} samples, from {missing[0]} on"
        )
    _check_hash(folded, where, shard_hash)


def read_adopted_samples(
    stream: SkippingInput, index: pa.Table, *, where: str, shard_hash: bytes
) -> Iterator[Sample]:
    """Every sample of an adopted shard, found by its index and checked as `read_samples` does.

    Raises ShardError on the first difference; bytes that belong to no sample are not looked at.
    """
    folded = ShardHash()
    position = 0
    for key, entry in _entries(index.filter(pc.equal(index["status"], "ok"))):
        begin = entry.offset - BLOCK_BYTES
        if begin < position:
            raise ShardError(
                f"{where}: sample {key} at byte {entry.offset} overlaps the one before"
            )
        stream.skip(begin - position)
        header = _read_exactly(stream, BLOCK_BYTES, where, begin)
        data = _read_exactly(stream, entry.length, where, entry.offset)
        _check_body(data, key, entry, where)
        folded.add(header, entry.sha256)
        position = entry.offset + entry.length
        yield Sample(key, data)
    _check_hash(folded, where, shard_hash)


def _entries(rows: pa.Table) -> Iterator[tuple[str, Entry]]:
    names = ["offset", "length", "crc32c", "sha256"]
    for key, *values in zip(*rows.select(["key", *names]).to_pydict().values(), strict=True):
        yield key, Entry(*values)


def _check_member(member: Member, key: str, entry: Entry, where: str) -> None:
    """Compare a member with its index row."""
    seen_key = member.name.partition(".")[0]
    if (seen_key, member.offset, len(member.data)) != (key, entry.offset, entry.length):
        raise ShardError(
            f"{where}: sample {key} at byte {entry.offset} should have {entry.length} bytes; found "
            f"{member.name!r} with {len(member.data)} bytes at byte {member.offset}"
        )
    _check_body(member.data, key, entry, where)


def _check_body(data: bytes, key: str, entry: Entry, where: str) -> None:
    """Compare a sample's bytes with its index row."""
    place = f"{where}: sample {key} at byte {entry.offset}"
    if (crc := crc32c(data)) != entry.crc32c:
        raise ShardError(f"{place}: CRC32C is {crc:#010x}, recorded was {entry.crc32c:#010x}")
    digest = hashlib.sha256(data).digest()
    if digest != entry.sha256:
        raise ShardError(f"{place}: SHA-256 is {digest.hex()}, recorded was {entry.sha256.hex()}")


def _check_hash(folded: ShardHash, where: str, shard_hash: bytes) -> None:
    if folded.digest() != shard_hash:
        raise ShardError(
            f"{where}: the shard's hash is {folded.digest().hex()}, recorded was {shard_hash.hex()}"
        )


def _read_exactly(stream: Input, length_bytes: int, where: str, offset: int) -> bytes:
    body = stream.read(length_bytes)
    if len(body) != length_bytes:
        raise ShardError(
            f"{where}: cut at byte {offset + len(body)}: {length_bytes} bytes were to follow "
            f"byte {offset}, {len(body)} do"
        )
    return body


def _parse_header(header: bytes, where: str, offset: int) -> tuple[str, int]:
    """Name and size of a member. Raises ShardError."""
    recorded = header[148:156].rstrip(b"\0 ")
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    size = header[124:136].rstrip(b"\0 ")
    if header[257:262] != b"ustar" or recorded != b"%06o" % checksum or not _is_octal(size):
        raise ShardError(f"{where}: no tar header at byte {offset}")
    if header[156:157] != b"0" or header[345]:
        raise ShardError(f"{where}: the member at byte {offset} is no plain file with a short name")
    return header[:_MAX_NAME_BYTES].rstrip(b"\0").decode("utf-8", "replace"), int(size, 8)


def _is_octal(text: bytes) -> bool:
    return bool(text) and set(text) <= set(b"01234567")
