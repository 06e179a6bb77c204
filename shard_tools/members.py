"""Any tar as members: the headers of every dialect, walked strictly from start to end.

Called by shard_tools.tars. Reads USTAR, V7, PAX and GNU long names and sizes, gzipped or not.
A reader of our own instead of the standard library's: `tarfile` takes a damaged header, and a file
that ends before or inside one, for the end of the archive, without a word; so does webdataset,
which is built on it.
Here whatever cannot be followed to a proper end is an error that says where. (The reader in
pipeline.shards takes our own shards only.)
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.decode import TRUNCATED
from pipeline.errors import SampleError
from pipeline.shards import BLOCK_BYTES, Input, SkippingInput

DAMAGED_TAR = "damaged tar"

MAX_MEMBERS = 1_000_000  # of a tar or piece that is read: a gzipped one may hold any number

_MAX_EXTENSION_BYTES = 2**20  # of a PAX header or a GNU long name
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_SKIPPED_BYTES = 2**20

_FILES = b"\x0007"  # V7's, USTAR's, and the contiguous file of old systems
_WITHOUT_BODY = b"123456"  # links, devices and folders have none, whatever their size says
_FOLDER = b"5"
_SPARSE = b"S"
_PAX, _PAX_GLOBAL = b"xX", b"g"
_GNU_NAME, _GNU_LINK = b"L", b"K"
_EXTENSIONS = _PAX + _PAX_GLOBAL + _GNU_NAME + _GNU_LINK


@dataclass(slots=True)
class TarMember:
    """One header, with what its extensions say. `start` is where the first of those begins."""

    name: str
    kind: bytes
    start: int
    offset: int
    size_bytes: int
    header: bytes
    sparse: bool = False
    data: bytes | None = None

    @property
    def is_file(self) -> bool:
        return self.kind in _FILES and not self.sparse

    @property
    def body_bytes(self) -> int:
        """What follows the header, without padding."""
        return 0 if self.kind in _WITHOUT_BODY else self.size_bytes


class GunzippingReader:
    """A forward reader of what a gzipped stream holds, with bounded memory."""

    def __init__(self, stream: Input) -> None:
        self._file = gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[call-overload]

    def read(self, length_bytes: int) -> bytes:
        """The next bytes, fewer only at the end. Raises SampleError if the stream is damaged."""
        try:
            return bytes(self._file.read(length_bytes))
        except EOFError:
            raise SampleError(TRUNCATED, "the gzipped stream ends too early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise SampleError(DAMAGED_TAR, f"gzip: {error}") from None


class TarWalk:
    """Iterates over a tar's members; whoever iterates takes each body, by `body`, before the next.

    Raises SampleError (TRUNCATED or DAMAGED_TAR) where the tar cannot be followed any further, or
    has more than `max_members`; `position` is the offset reached, `reading` the member whose body
    was being read, if any.
    """

    def __init__(
        self,
        stream: Input,
        where: str,
        start_bytes: int,
        end_bytes: int | None,
        max_members: int = MAX_MEMBERS,
    ) -> None:
        self._stream = stream
        self._where = where
        self._end = end_bytes
        self.position = 0
        self.reading: TarMember | None = None
        self._first_bytes = start_bytes
        self._max_members = max_members

    def __iter__(self) -> Iterator[TarMember]:
        self._skip(self._first_bytes)
        members = 0
        while self._end is None or self.position < self._end:
            member = self._next_member()
            if member is None:
                return
            if member.kind != _FOLDER:
                members += 1
                if members > self._max_members:
                    raise self._damaged(f"more than {self._max_members} members")
                self.reading = member
                yield member
                self.reading = None

    def body(self, member: TarMember, wanted_bytes: int) -> bytes | None:
        """Read a member's body, or pass over it if `wanted_bytes` is 0 and it is not empty."""
        length = member.body_bytes
        if wanted_bytes < length:
            self._skip(_padded(length))
            return None
        body = self._read(length)
        self._read(_padded(length) - length)
        return body

    def _next_member(self) -> TarMember | None:
        """The next header with its extensions; None at the end of the archive."""
        start = self.position
        extensions: dict[str, str] = {}
        while (header := self._read(BLOCK_BYTES)) != _ZERO_BLOCK:
            member = self._parse(header, start)
            if member.kind in _EXTENSIONS:
                extensions |= self._read_extension(member)
            else:
                return self._extended(member, extensions)
        if extensions:
            raise self._damaged("the archive ends behind an extended header")
        self._expect_nothing_more()
        return None

    def _parse(self, header: bytes, start: int) -> TarMember:
        checksum = _octal(header[148:156])
        unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if checksum != unsigned and checksum != unsigned - _signed_excess(header):
            gzip = "; it is gzipped, name it .tar.gz" if header.startswith(b"\x1f\x8b") else ""
            raise self._damaged(f"no tar header at byte {self.position - BLOCK_BYTES}{gzip}")
        size = _number(header[124:136])
        if size is None:
            raise self._damaged(f"no size in the header at byte {self.position - BLOCK_BYTES}")
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0]
        if header[257:263] == b"ustar\0" and prefix:
            name = prefix + b"/" + name
        kind = header[156:157]
        if kind in b"\x000" and name.endswith(b"/"):
            kind = _FOLDER  # as V7 had it
        sparse = kind == _SPARSE
        return TarMember(_decoded(name), kind, start, self.position, size, header, sparse)

    def _read_extension(self, member: TarMember) -> dict[str, str]:
        """What a PAX header or a GNU long name says of the member behind it."""
        if member.size_bytes > _MAX_EXTENSION_BYTES:
            raise self._damaged(f"an extended header of {member.size_bytes} bytes")
        body = self._read(_padded(member.size_bytes))[: member.size_bytes]
        if member.kind == _GNU_NAME:
            return {"path": _decoded(body.partition(b"\0")[0])}
        if member.kind == _GNU_LINK:
            return {}
        records = _pax_records(body)
        if records is None:
            raise self._damaged("an extended header that is no list of records")
        if member.kind == _PAX_GLOBAL and _names_members(records):
            raise self._damaged("one name or size for all members")
        return {} if member.kind == _PAX_GLOBAL else records

    def _extended(self, member: TarMember, extensions: dict[str, str]) -> TarMember:
        member.offset = self.position
        member.name = extensions.get("path", member.name)
        member.sparse |= any(name.startswith("GNU.sparse") for name in extensions)
        if (size := extensions.get("size")) is not None:
            if not re.fullmatch(r"[0-9]{1,18}", size):
                raise self._damaged(f"the size {size[:20]!r}")
            member.size_bytes = int(size)
        if member.kind == _SPARSE:
            self._skip_sparse_map(member)
        return member

    def _skip_sparse_map(self, member: TarMember) -> None:
        """Old GNU sparse files put more blocks, of a list of holes, behind the header."""
        more = member.header[482]
        while more:
            more = self._read(BLOCK_BYTES)[504]
        member.offset = self.position

    def _expect_nothing_more(self) -> None:
        """Behind the first zero block of the end there may only be zeros.

        One block is enough: whatever was cut behind it was none of the members.
        """
        while rest := self._stream.read(_SKIPPED_BYTES):
            if rest.strip(b"\0"):
                raise self._damaged("more bytes behind the end of the archive")
            self.position += len(rest)

    def _read(self, length_bytes: int) -> bytes:
        body = self._stream.read(length_bytes)
        self.position += len(body)
        if len(body) != length_bytes:
            missing = length_bytes - len(body)
            raise SampleError(
                TRUNCATED, f"{self._where} ends at byte {self.position}, {missing} bytes too early"
            )
        return body

    def _skip(self, length_bytes: int) -> None:
        if isinstance(self._stream, SkippingInput):
            self._stream.skip(length_bytes)
            self.position += length_bytes
            return
        while length_bytes:
            length_bytes -= len(self._read(min(length_bytes, _SKIPPED_BYTES)))

    def _damaged(self, what: str) -> SampleError:
        return SampleError(DAMAGED_TAR, f"{self._where}: {what}, before byte {self.position}")


def _names_members(records: dict[str, str]) -> bool:
    return any(name in ("path", "size") for name in records)


def _padded(length_bytes: int) -> int:
    return length_bytes + -length_bytes % BLOCK_BYTES


def _decoded(name: bytes) -> str:
    """A name as text; names in other encodings than UTF-8 stay different names."""
    return name.decode("utf-8", "backslashreplace")


def _signed_excess(header: bytes) -> int:
    """What some old systems, which summed signed bytes, got less."""
    return 256 * sum(byte >= 128 for byte in header[:148] + header[156:])


def _octal(text: bytes) -> int | None:
    digits = text.partition(b"\0")[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if set(digits) <= set(b"01234567") else None


def _number(field_bytes: bytes) -> int | None:
    """A size: octal digits or, from GNU and star, base 256. None if it is neither, or negative."""
    if field_bytes[0] == 0x80:
        size = int.from_bytes(field_bytes[1:], "big")
        return size if size < 2**62 else None
    return _octal(field_bytes)


def _pax_records(body: bytes) -> dict[str, str] | None:
    """The records "<length> <name>=<value>\\n" of an extended header; None if they are not."""
    records = {}
    while body.strip(b"\0"):
        match = re.match(rb"(\d{1,7}) ", body)
        length = int(match[1]) if match else 0
        record = body[match.end() : length] if match else b""
        name, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n") or length > len(body):
            return None
        records[_decoded(name)] = _decoded(value[:-1])
        body = body[length:]
    return records
