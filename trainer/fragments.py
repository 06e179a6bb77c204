"""The format of a checkpoint: named tensors, made of pieces in immutable objects, and a manifest.

    objects/<step>-<attempt>/rank-00000.bin …   tensors, raw and little-endian, back to back
    objects/<step>-<attempt>/metrics.jsonl      metrics, as the loop wrote them
    manifests/<step>.json                       which bytes of which object are which tensor

`trainer.checkpoint` decides what is written and who reads it. Here it is only tensors: each is
flattened and made of pieces, which may lie anywhere and come from any rank, so a reader need not
know how the writers had divided them. (DeepSpeed's own checkpoints are tied to the ZeRO stage and
the world size, are loaded by pickle, and are named `latest` before they are complete.)

Every piece and every object carries a CRC32C, the manifest a SHA-256 of itself.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import google_crc32c
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, ManifestError
from pipeline.manifest import read_commit
from pipeline.store import Store

FORMAT = 1
PIECE_BYTES = 8 * 2**20  # also what a writer copies to the host at a time
READ_BYTES = 16 * 2**20  # at most, in one request
READS_IN_FLIGHT = 4

_MANIFEST_KEY = re.compile(r"manifests/(\d{9})\.json")


class Piece(NamedTuple):
    """`length` elements of a flattened tensor, from `start` on, and where they are stored."""

    start: int
    length: int
    object: int  # number in Checkpoint.objects
    offset_bytes: int
    size_bytes: int
    crc32c: int

    def overlap(self, start: int, length: int) -> range:
        """Which of `length` elements from `start` on it holds, perhaps none."""
        return range(max(self.start, start), min(self.start + self.length, start + length))


@dataclass
class StoredTensor:
    """One tensor of a checkpoint: `pieces` in no order, together every element once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class StoredObject:
    """One immutable object of a checkpoint."""

    key: str
    size_bytes: int
    crc32c: int


@dataclass(frozen=True)
class Checkpoint:
    """What a manifest says.

    `queue` is None or what the queue parts do not say: num_pushes and batch_size (per rank).
    `damaged` names the manifests of newer checkpoints that did not verify.
    """

    step: int
    attempt: str
    world_size: int
    time: str  # ISO 8601, UTC
    objects: tuple[StoredObject, ...]
    tensors: dict[str, StoredTensor]
    queue: dict[str, int] | None
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The manifest's key."""
        return manifest_key(self.step)

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(stored.size_bytes for stored in self.objects)


class WrittenObject:
    """What one rank has written into one object: its size, its checksum, and which tensors."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.size_bytes = 0
        self.crc32c = 0
        self.tensors: dict[str, StoredTensor] = {}

    def add(
        self,
        write: Callable[[bytes], None],
        name: str,
        tensor: Tensor,
        shape: tuple[int, ...],
        start: int,
    ) -> None:
        """Append a flat tensor: elements `start` … of the named tensor of that shape."""
        stored = self.tensors.setdefault(name, StoredTensor(dtype_name(tensor), shape))
        for block in torch.split(tensor, PIECE_BYTES // tensor.element_size()):
            data = block.cpu().view(torch.uint8).numpy().tobytes()
            checksum = google_crc32c.value(data)
            stored.pieces.append(Piece(start, len(block), 0, self.size_bytes, len(data), checksum))
            self.append(write, data)
            start += len(block)

    def append(self, write: Callable[[bytes], None], data: bytes) -> None:
        """Append bytes that are no tensor."""
        write(data)
        self.size_bytes += len(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)


def join(
    parts: Iterable[WrittenObject],
) -> tuple[tuple[StoredObject, ...], dict[str, StoredTensor]]:
    """The objects and the whole tensors that several writers have written together."""
    objects: list[StoredObject] = []
    tensors: dict[str, StoredTensor] = {}
    for number, each in enumerate(parts):
        objects.append(StoredObject(each.key, each.size_bytes, each.crc32c))
        for name, part in each.tensors.items():
            whole = tensors.setdefault(name, StoredTensor(part.dtype, part.shape))
            whole.pieces += [piece._replace(object=number) for piece in part.pieces]
    return tuple(objects), tensors


class Wanted(NamedTuple):
    """`length` elements of a named tensor, from `start` on, of this dtype."""

    name: str
    start: int
    length: int
    dtype: str


class Reader:
    """Reads tensors of one checkpoint, checking every piece it touches."""

    def __init__(self, store: Store, checkpoint: Checkpoint) -> None:
        self._store = store
        self._checkpoint = checkpoint

    def read_whole(self, names: Sequence[str]) -> list[Tensor]:
        """Whole tensors, in host memory."""
        stored = [self._checkpoint.tensors[name] for name in names]
        wanted = [
            Wanted(name, 0, math.prod(each.shape), each.dtype)
            for name, each in zip(names, stored, strict=True)
        ]
        return [flat.view(each.shape) for flat, each in zip(self.read(wanted), stored, strict=True)]

    def read(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """The flat tensors that are wanted, in host memory.

        Raises CheckpointError for bytes whose checksum is wrong, and for another dtype.
        """
        flats = [torch.empty(each.length, dtype=getattr(torch, each.dtype)) for each in wanted]
        uses: dict[Piece, _Uses] = {}
        for each, flat in zip(wanted, flats, strict=True):
            for piece in self._pieces(each):
                uses.setdefault(piece, []).append((each, flat))
        with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
            for _ in pool.map(lambda run: self._read_run(run, uses), _runs(uses)):
                pass  # only the exceptions are wanted
        return flats

    def _pieces(self, wanted: Wanted) -> list[Piece]:
        stored = self._checkpoint.tensors[wanted.name]
        if stored.dtype != wanted.dtype:
            raise CheckpointError(f"{wanted.name} is {stored.dtype} there and {wanted.dtype} here")
        overlaps = [(each, each.overlap(wanted.start, wanted.length)) for each in stored.pieces]
        if sum(len(overlap) for _, overlap in overlaps) != wanted.length:
            raise CheckpointError(f"its manifest does not hold {wanted.name} whole")
        return [piece for piece, overlap in overlaps if overlap]

    def _read_run(self, run: Sequence[Piece], uses: Mapping[Piece, "_Uses"]) -> None:
        """Read pieces that lie side by side at once, check them, and copy them to their uses."""
        key, begin = self._checkpoint.objects[run[0].object].key, run[0].offset_bytes
        body = self._store.get_range(key, begin, sum(piece.size_bytes for piece in run))
        for piece in run:
            data = body[piece.offset_bytes - begin :][: piece.size_bytes]
            if google_crc32c.value(data) != piece.crc32c:
                raise CheckpointError(
                    f"{self._store.url_of(key)} is damaged: the checksum of {piece.size_bytes} "
                    f"bytes at {piece.offset_bytes} is wrong"
                )
            _copy(piece, data, uses[piece])


def _runs(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces in groups that one read of at most READ_BYTES fetches: neighbours in one object."""
    runs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda each: (each.object, each.offset_bytes)):
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and (last.object, last.offset_bytes + last.size_bytes)
            == (piece.object, piece.offset_bytes)
            and piece.offset_bytes + piece.size_bytes - runs[-1][0].offset_bytes <= READ_BYTES
        ):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


_Uses = list[tuple[Wanted, Tensor]]  # what is wanted of a piece, and the tensor it goes to


def _copy(piece: Piece, data: bytes, uses: _Uses) -> None:
    """Copy a piece's elements to where they are wanted."""
    for wanted, flat in uses:
        values = torch.frombuffer(bytearray(data), dtype=flat.dtype)
        overlap = piece.overlap(wanted.start, wanted.length)
        source = values[overlap.start - piece.start :][: len(overlap)]
        flat[overlap.start - wanted.start :][: len(overlap)] = source


def saved_steps(store: Store) -> list[int]:
    """The steps with a manifest, oldest first; nothing says yet that they verify."""
    matches = (_MANIFEST_KEY.fullmatch(info.key) for info in store.list("manifests"))
    return sorted(int(match[1]) for match in matches if match)


def read_checkpoint(store: Store, step: int) -> Checkpoint:
    """What the manifest of a step says.

    Raises CheckpointError if there is none or it is of another format, ManifestError if damaged.
    """
    document = read_commit(store, manifest_key(step))
    if document is None:
        raise CheckpointError(
            f"{store.url} has no checkpoint {step}; `python -m trainer.checkpoint ls {store.url}` "
            "lists those it has"
        )
    return _from_document(document, store.url_of(manifest_key(step)))


def damage(store: Store, objects: Iterable[StoredObject]) -> list[str]:
    """One line for each object that is damaged; every byte of the others was read."""
    return [problem for stored in objects if (problem := _damage_of(store, stored))]


def remove(store: Store, step: int) -> None:
    """Delete a checkpoint: its manifest first, so that it is never there in part."""
    objects: Sequence[StoredObject] = ()
    with contextlib.suppress(ManifestError):  # then only the manifest can be removed
        objects = read_checkpoint(store, step).objects
    store.delete(manifest_key(step))
    for stored in objects:
        store.delete(stored.key)


def manifest_key(step: int) -> str:
    """Where the manifest of a step lies."""
    return f"manifests/{step:09d}.json"


def _damage_of(store: Store, stored: StoredObject) -> str | None:
    url = store.url_of(stored.key)
    info = store.head(stored.key)
    if info is None:
        return f"{url} is missing"
    if info.size_bytes != stored.size_bytes:
        return f"{url} has {info.size_bytes} bytes instead of {stored.size_bytes}"
    checksum = 0
    for start in range(0, stored.size_bytes, PIECE_BYTES):
        length = min(PIECE_BYTES, stored.size_bytes - start)
        checksum = google_crc32c.extend(checksum, store.get_range(stored.key, start, length))
    if checksum != stored.crc32c:
        return f"{url} is damaged: its checksum is wrong"
    return None


def to_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest, without what only readers know."""
    document = {"format": FORMAT, **asdict(checkpoint)}
    del document["damaged"]
    document = json.loads(json.dumps(document))  # as it will be read, down to its keys
    return {**document, "sha256": _digest(document)}


def _from_document(document: dict[str, Any], where: str) -> Checkpoint:
    body = {name: value for name, value in document.items() if name != "sha256"}
    if document.get("sha256") != _digest(body):
        raise ManifestError(f"{where} is damaged: it does not have the SHA-256 it names")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{where} is of format {body['format']}, this program knows {FORMAT}: "
            "resume with the version of cropstream that wrote it"
        )
    del body["format"]
    body["objects"] = tuple(StoredObject(**each) for each in body["objects"])
    body["tensors"] = {name: _tensor(each) for name, each in body["tensors"].items()}
    return Checkpoint(**body)


def _tensor(document: dict[str, Any]) -> StoredTensor:
    pieces = [Piece(*each) for each in document["pieces"]]
    return StoredTensor(document["dtype"], tuple(document["shape"]), pieces)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """A dtype's name in a manifest: float32, int64, …"""
    return str(tensor.dtype).removeprefix("torch.")
