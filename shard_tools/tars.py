"""Any tar as inputs: read once from start to end, to be packed anew or to be adopted where it is.

Called by pack (tars as a source), by adopt, and by the plan, which cuts large tars into pieces. A
link, device or sparse file is an input that is rejected; a folder is none. Nothing is missing
without a word: the last input of a tar that is cut, damaged, without its end or followed by more
bytes has a `problem` that says where.

WebDataset keeps what belongs to an image in members beside it: consecutive members of one key (the
path up to the first dot of its last part) are a sample, and SIDECARS of it become columns. Unlike
webdataset, which would merge them, two images of one key are two inputs: in a plain tar `a.1.jpg`
and `a.2.jpg` are different images.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.decode import NOT_AN_IMAGE, TOO_LARGE
from pipeline.errors import ObjectChangedError, ObjectMissingError, SampleError
from pipeline.shards import Input
from pipeline.store import SourceFile, find_file, open_stream
from shard_tools.members import GunzippingReader, TarMember, TarWalk
from shard_tools.urls import redact

NOT_A_FILE = "not a file"

GZIP_SUFFIXES = (".gz", ".tgz")

SIDECARS: dict[str, str | None] = {
    "caption": "txt",
    "cls": "label",
    "csv": None,
    "id": None,
    "index": None,
    "json": "json",
    "label": "label",
    "md5": None,
    "npy": None,
    "npz": None,
    "pth": None,
    "pyd": None,
    "text": "txt",
    "txt": "txt",
    "url": "url",
    "xml": None,
    "yaml": None,
}
"""What lies beside an image, by the last part of its name, and the column it becomes, if any."""

COLUMNS = ("label", "txt", "json", "url")
MAX_SIDECAR_BYTES = 64 * 1024  # longer ones are dropped

MAX_GROUP_MEMBERS = 64
MAX_GROUP_BYTES = 64 * 2**20  # of images held until the sidecars behind them are read


@dataclass(slots=True)
class TarInput:
    """One input of a tar: an image, or why there is none.

    `data` is None where `problem` says why; otherwise it is the whole body, looked at by nobody.
    """

    name: str  # the member's path in the tar
    offset: int  # of the body's first byte in the tar
    header: bytes  # the 512 bytes right before the body
    size_bytes: int
    data: bytes | None = None
    columns: dict[str, str] = field(default_factory=dict)  # of COLUMNS, those that it has
    problem: SampleError | None = None


def read_tar_file(
    file: SourceFile, *, start_bytes: int = 0, end_bytes: int | None = None, max_bytes: int
) -> Iterator[TarInput]:
    """The inputs of a tar under any fsspec URL, or of a piece of it; see `read_tar`.

    A gzipped one is unpacked on the way and read whole. Raises ObjectMissingError if the file is
    gone; ObjectChangedError if it is not the one that is described, or not any more; StoreError if
    it cannot be read.
    """
    refuse_changed(file)
    with open_tar(file) as stream:
        if end_bytes is not None and (end_bytes >= size_of(file) or is_gzipped(file.url)):
            end_bytes = None
        yield from read_tar(
            stream,
            where=file.url,
            start_bytes=start_bytes,
            end_bytes=end_bytes,
            max_bytes=max_bytes,
        )
    refuse_changed(file)


@contextlib.contextmanager
def open_tar(file: SourceFile) -> Iterator[Input]:
    """A context with a forward reader of a tar, unpacked if its name says that it is gzipped."""
    with open_stream(file.url, size_of(file), tag=file.tag) as stream:
        yield GunzippingReader(stream) if is_gzipped(file.url) else stream


def is_gzipped(url: str) -> bool:
    """Whether the name is that of a gzipped tar."""
    return url.lower().endswith(GZIP_SUFFIXES)


def size_of(file: SourceFile) -> int:
    """A tar's size in bytes: no plan holds a tar of which it is not known."""
    assert file.size_bytes is not None
    return file.size_bytes


def refuse_changed(file: SourceFile) -> None:
    """Hold a file against its listing.

    Raises ObjectMissingError if it is gone, ObjectChangedError if it has another size or tag.
    """
    now = find_file(file.url)
    if now is None:
        raise ObjectMissingError(f"{file.url} is gone; put it back, or plan what is left")
    if (now.size_bytes, now.tag) != (file.size_bytes, file.tag):
        raise ObjectChangedError(
            f"{file.url} has changed: listed were {file.size_bytes} bytes and tag {file.tag}, now "
            f"it has {now.size_bytes} bytes and tag {now.tag}; put the old file back, or plan the "
            "new one"
        )


def read_tar(
    stream: Input,
    *,
    where: str,
    start_bytes: int = 0,
    end_bytes: int | None = None,
    max_bytes: int,
) -> Iterator[TarInput]:
    """The inputs of a tar, in its order, from a stream that stands at its first byte.

    Args:
        where: the tar's URL, for the text of problems. start_bytes, end_bytes: the piece to read,
        as `tar_spans` cut it; without an end, up to the end of the archive, which must be there.
        max_bytes: larger members are rejected as "too large" and never held in memory.

    Memory: one group of members, at most MAX_GROUP_BYTES and one image more.
    """
    walk = TarWalk(stream, where, start_bytes, end_bytes)
    group: list[TarMember] = []
    try:
        for member in walk:
            if _begins_group(group, member):
                yield from _inputs(group, max_bytes)
                group = []
            member.data = walk.body(member, _wanted_bytes(member, max_bytes))
            group.append(member)
    except SampleError as problem:
        yield from _inputs(group, max_bytes)
        yield _last(walk, problem)
    else:
        yield from _inputs(group, max_bytes)


def tar_spans(file: SourceFile, span_bytes: int) -> list[tuple[int, int]]:
    """Cut a tar into pieces of about `span_bytes`, (start, end) in bytes, where samples begin.

    Their inputs together are those of the whole. Only headers are looked at, and long bodies not
    fetched. A tar that is damaged ends in a piece that will say so.
    """
    starts = [0]
    with open_tar(file) as stream:
        walk = TarWalk(stream, file.url, 0, None, max_members=sys.maxsize)
        group: list[TarMember] = []
        with contextlib.suppress(SampleError):
            for member in walk:
                if _begins_group(group, member):
                    group = []
                    if member.start - starts[-1] >= span_bytes:
                        starts.append(member.start)
                walk.body(member, 0)
                group.append(member)
    return list(zip(starts, [*starts[1:], size_of(file)], strict=True))


def _begins_group(group: Sequence[TarMember], member: TarMember) -> bool:
    """Whether a member belongs to another sample than the ones before it.

    A group that grows too large is closed: a plain tar may hold any number of files of one key.
    Depends on headers only, so that pieces can be cut without reading bodies.
    """
    if not group:
        return False
    last = group[-1]
    if not (member.is_file and last.is_file and _key(member.name) == _key(last.name)):
        return True
    if len(group) >= MAX_GROUP_MEMBERS:
        return True
    held = sum(each.size_bytes for each in group if not _is_sidecar(each))
    return bool(held) and not _is_sidecar(member) and held + member.size_bytes > MAX_GROUP_BYTES


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _stem(name: str) -> str:
    """A member's name without the last part of its extension."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0] or base}"


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _is_sidecar(member: TarMember) -> bool:
    return member.is_file and _extension(member.name) in SIDECARS


def _wanted_bytes(member: TarMember, max_bytes: int) -> int:
    """How much of a member's body is to be held: all or nothing."""
    if not member.is_file:
        return 0
    limit = MAX_SIDECAR_BYTES if _is_sidecar(member) else max_bytes
    return member.size_bytes if member.size_bytes <= limit else 0


def _inputs(group: Sequence[TarMember], max_bytes: int) -> Iterator[TarInput]:
    """A group's images with the columns that lie beside them; at least one input."""
    images = [member for member in group if not _is_sidecar(member)]
    sidecars = [member for member in group if _is_sidecar(member)]
    for image in images:
        belonging = sidecars if len(images) == 1 else _belonging(image, sidecars)
        yield _input(image, belonging, _problem(image, max_bytes))
    if sidecars and not images:
        names = ", ".join(member.name for member in sidecars[:3])
        yield _input(sidecars[0], sidecars, SampleError(NOT_AN_IMAGE, f"no image beside {names}"))


def _belonging(image: TarMember, sidecars: Sequence[TarMember]) -> list[TarMember]:
    """Where several images have one key: what has an image's own name, or the key of them all."""
    stems = (_stem(image.name), _key(image.name))
    return [member for member in sidecars if _stem(member.name) in stems]


def _problem(member: TarMember, max_bytes: int) -> SampleError | None:
    if not member.is_file:
        kind = "sparse" if member.sparse else f"type {member.kind!r}"
        return SampleError(NOT_A_FILE, f"{member.name} is a tar member of {kind}")
    if member.size_bytes > max_bytes:
        return SampleError(TOO_LARGE, f"{member.size_bytes} bytes, allowed are {max_bytes}")
    return None


def _input(
    member: TarMember, sidecars: Sequence[TarMember], problem: SampleError | None
) -> TarInput:
    return TarInput(
        name=member.name,
        offset=member.offset,
        header=member.header,
        size_bytes=member.size_bytes,
        data=None if problem else member.data,
        columns=_columns(member.name, sidecars),
        problem=problem,
    )


def _last(walk: TarWalk, problem: SampleError) -> TarInput:
    """The input that stands for everything that could not be read."""
    member = walk.reading
    if member is None:
        return TarInput(f"@{walk.position}", walk.position, b"", 0, problem=problem)
    return TarInput(member.name, member.offset, member.header, member.size_bytes, problem=problem)


def _columns(name: str, sidecars: Sequence[TarMember]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for member in sidecars:
        column = SIDECARS[_extension(member.name)]
        if column is not None and (text := _text(member.data, column)) is not None:
            columns.setdefault(column, text)
    if "json" in columns:
        columns |= _redacted_json(columns)
    folder = name.removeprefix("./").lstrip("/").partition("/")
    if folder[1] and folder[0]:
        columns.setdefault("label", folder[0])
    return columns


def _text(body: bytes | None, column: str) -> str | None:
    """A sidecar as text, None if it was too long or is none."""
    try:
        text = body.decode() if body is not None else None
    except UnicodeDecodeError:
        return None
    if text is None or column == "json":
        return text
    text = redact(text.strip()) if column == "url" else text.strip()
    return text or None


def _redacted_json(columns: dict[str, str]) -> dict[str, str]:
    """The JSON without secrets in the URLs it names, and its URL where no other is known."""
    try:
        document = json.loads(columns["json"])
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    urls = {name: value for name, value in document.items() if _is_url(value)}
    redacted = {name: redact(value) for name, value in urls.items()}
    found = {"json": json.dumps({**document, **redacted})} if redacted != urls else {}
    if "url" not in columns and "url" in redacted:
        found["url"] = redacted["url"].encode("utf-8", "replace").decode()
    return found


def _is_url(value: object) -> bool:
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None
