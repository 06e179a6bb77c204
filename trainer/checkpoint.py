"""Checkpoints on an object store: `python -m trainer.checkpoint ls|verify|rm`, and save and resume.

    <run>/objects/<step>-<attempt>/rank-00000.bin …   tensors, raw and little-endian, back to back
    <run>/objects/<step>-<attempt>/metrics.jsonl      the log of metrics so far
    <run>/manifests/<step>.json                       which bytes of which object are which tensor

A checkpoint is a set of named tensors (`weight/…`, `momentum/…`, `buffer/…`, `queue/<rank>`,
`rng/<rank>`) and a JSON state. A tensor is made of pieces, wherever they lie: every rank streams
what it holds and the manifest joins the pieces, so what ZeRO stage and world size wrote them is of
no concern to who reads them. (DeepSpeed's own checkpoints are tied to both, are loaded by pickle,
and name a checkpoint `latest` before it is complete.)

The manifest is committed by one conditional PUT once every rank's objects are complete
(pipeline.manifest): a save that was killed does not exist, and of two runs that write to the same
prefix one stops. Every piece and every object carries a CRC32C, the manifest a SHA-256 of itself;
nothing is put into a model before everything it needs has been read and checked.
"""

import argparse
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate
from typing import Annotated, Any, NamedTuple, TypeVar

import google_crc32c
import torch
from annotated_types import Ge
from torch import Tensor, nn

from pipeline.errors import (
    CheckpointError,
    CropstreamError,
    ManifestError,
    StoreError,
    run_command,
)
from pipeline.manifest import commit, new_attempt, prove_conditional_put, read_commit
from pipeline.store import Store, open_store
from trainer.distributed import World
from trainer.engine import Engine, Fragment
from trainer.queue import FeatureQueue

FORMAT = 1
PIECE_BYTES = 8 * 2**20  # also what is read to the host at a time when a checkpoint is written
READ_BYTES = 32 * 2**20
READS_IN_FLIGHT = 4

_MANIFEST_KEY = re.compile(r"manifests/(\d{9})\.json")
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Section `checkpoint`: where, how often, and how many."""

    run: str  # the run's prefix: s3://bucket/runs/name, file:///… or a local path
    every_steps: Annotated[int, Ge(1)] = 1000
    keep: Annotated[int, Ge(1)] = 3  # older checkpoints are removed


class Piece(NamedTuple):
    """`length` elements of a flattened tensor, from `start` on, and where they are stored."""

    start: int
    length: int
    object: int  # number in Checkpoint.objects
    offset_bytes: int
    crc32c: int


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
        return _manifest_key(self.step)

    @property
    def size_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(stored.size_bytes for stored in self.objects)


class Checkpoints:
    """The checkpoints of one run, written and read by all ranks of `world` together.

    Every method is called by every rank at the same point; an error on one rank is raised on all.
    """

    def __init__(self, config: CheckpointConfig, world: World) -> None:
        self._store = open_store(config.run)
        self._keep = config.keep
        self._world = world
        self._proven = False
        self._committed_step: int | None = None  # by us, or the one we resumed from

    def save(
        self,
        step: int,
        engine: Engine,
        *,
        queue: FeatureQueue | None,
        state: Mapping[str, Any],
        metrics: bytes = b"",
    ) -> None:
        """Commit the state after `step` steps; then remove all but the newest `keep` checkpoints.

        `state` is JSON and, like `metrics`, taken from rank 0. Saving the step that was committed
        or restored last does nothing. Raises CheckpointError on every rank if any could not write,
        or if another run has committed this step.
        """
        if step == self._committed_step:
            return
        attempt = self._world.share(new_attempt())
        folder = f"objects/{step:09d}-{attempt}"
        what = f"cannot write checkpoint {step} to {self._store.url}"
        written = self._together(what, lambda: self._write(folder, engine, queue, metrics))
        parts = self._world.gather(written)
        self._on_first(
            what, lambda: self._commit(_joined(parts, step, attempt, self._world, queue, state))
        )
        self._committed_step = step
        self._on_first(f"checkpoint {step}", self._remove_old)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, every byte of it read; None if there is none at all.

        A damaged one is reported in the log and the one before it is taken. Raises CheckpointError
        if there are checkpoints and none verifies, or if the store cannot be read.
        """
        what = f"cannot resume from {self._store.url}"
        steps = self._on_first(what, lambda: saved_steps(self._store))
        damaged: list[str] = []
        for step in reversed(steps):
            checkpoint, problems = self._verified(step, what)
            if checkpoint is not None and not problems:
                return replace(checkpoint, damaged=tuple(damaged))
            damaged.append(_manifest_key(step))
            _log.warning("checkpoint %d is damaged and passed over: %s", step, "; ".join(problems))
        if damaged:
            raise CheckpointError(
                f"{what}: none of its {len(damaged)} checkpoints verifies; see `python -m "
                f"trainer.checkpoint verify {self._store.url}`, or start a run under another prefix"
            )
        return None

    def restore(
        self, checkpoint: Checkpoint, engine: Engine, *, queue: FeatureQueue | None
    ) -> dict[str, Any]:
        """Put a checkpoint into an engine and a queue and return its JSON state.

        Weights, momentum and buffers come back under any ZeRO stage and world size, the queue under
        any world size with the same global batch, the generators' states under the same world size.
        With the same world size the run continues bit for bit. Until every rank has read and
        checked all it needs, in host memory, nothing is changed. Raises CheckpointError for a
        damaged checkpoint, another model, or a queue that does not fit.
        """
        what = f"cannot resume from checkpoint {checkpoint.step} of {self._store.url}"
        reader = _Reader(self._store, checkpoint)
        targets = self._together(what, lambda: _targets(checkpoint, engine, self._world))
        values = self._together(what, lambda: reader.read(targets))
        rows = self._together(what, lambda: _queue_rows(reader, queue, self._world))
        _apply(targets, values)
        engine.publish()
        if queue is not None and checkpoint.queue is not None:
            pushes = checkpoint.queue["num_pushes"]
            queue.load_state_dict({"features": rows, "num_pushes": pushes})
        self._on_first(what, lambda: self._set_aside(checkpoint.damaged))
        self._committed_step = checkpoint.step
        return checkpoint.state

    def metrics(self, checkpoint: Checkpoint) -> bytes:
        """The metrics that were saved with a checkpoint. May be called by one rank alone."""
        keys = [stored.key for stored in checkpoint.objects if stored.key.endswith("metrics.jsonl")]
        return self._store.get(keys[0])

    def _write(
        self, folder: str, engine: Engine, queue: FeatureQueue | None, metrics: bytes
    ) -> list["_WrittenObject"]:
        world = self._world
        written = [_WrittenObject(f"{folder}/rank-{world.rank:05d}.bin")]
        with self._store.writer(written[0].key) as writer:
            for name, tensor, shape, start in _owned(engine, queue, world):
                written[0].add(writer.write, name, tensor, shape, start)
        if world.is_first:
            written.append(_WrittenObject(f"{folder}/metrics.jsonl"))
            with self._store.writer(written[1].key) as writer:
                written[1].append(writer.write, metrics)
        return written

    def _commit(self, checkpoint: Checkpoint) -> None:
        if not self._proven:
            prove_conditional_put(self._store)
            self._proven = True
        document = _to_document(checkpoint)
        winner = commit(self._store, checkpoint.key, document, attempt=checkpoint.attempt)
        if winner["attempt"] != checkpoint.attempt:
            for stored in checkpoint.objects:
                self._store.delete(stored.key)
            raise CheckpointError(
                f"another run has committed this step there (attempt {winner['attempt']}); two runs "
                "must not share a prefix: stop one, or give this one another checkpoint.run"
            )

    def _remove_old(self) -> None:
        for step in saved_steps(self._store)[: -self._keep]:
            try:
                remove(self._store, step)
            except CropstreamError as error:  # the checkpoint itself is safe
                _log.warning("cannot remove the old checkpoint %d: %s", step, error)

    def _verified(self, step: int, what: str) -> tuple[Checkpoint | None, list[str]]:
        """A checkpoint, and what is wrong with it. The ranks divide its objects among them."""
        checkpoint, problem = self._on_first(what, lambda: _read_or_damage(self._store, step))
        if checkpoint is None:
            return None, [problem]
        mine = checkpoint.objects[self._world.rank :: self._world.world_size]
        problems = self._together(what, lambda: damage(self._store, mine))
        return checkpoint, [each for part in self._world.gather(problems) for each in part]

    def _set_aside(self, manifests: Iterable[str]) -> None:
        """Move damaged manifests out of the way of the checkpoints that will be saved next."""
        for key in manifests:
            aside = f"damaged/{key.removeprefix('manifests/')}-{new_attempt()}"
            self._store.put_if_absent(aside, self._store.get(key))
            self._store.delete(key)
            _log.warning("moved the damaged %s to %s", key, aside)

    def _together(self, what: str, work: Callable[[], T]) -> T:
        """Do `work` on every rank and return this rank's result; fail on all if one fails."""
        value, failure = _attempt(work)
        failures = [
            f"rank {rank}: {each}" for rank, each in enumerate(self._world.gather(failure)) if each
        ]
        if failures:
            raise CheckpointError(f"{what}: {'; '.join(failures)}")
        return value  # type: ignore[return-value]

    def _on_first(self, what: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and return its result on every rank; fail on all if it fails."""
        outcome = _attempt(work) if self._world.is_first else None
        value, failure = self._world.share(outcome)
        if failure:
            raise CheckpointError(f"{what}: {failure}")
        return value  # type: ignore[no-any-return]


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except CropstreamError as error:
        return None, str(error)


# --------------------------------------------------------------------------------------------------
# writing


class _WrittenObject:
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
        stored = self.tensors.setdefault(name, StoredTensor(_dtype_name(tensor), shape))
        for block in tensor.split(PIECE_BYTES // tensor.element_size()):
            data = block.cpu().view(torch.uint8).numpy().tobytes()
            place = Piece(start, len(block), 0, self.size_bytes, google_crc32c.value(data))
            stored.pieces.append(place)
            self.append(write, data)
            start += len(block)

    def append(self, write: Callable[[bytes], None], data: bytes) -> None:
        """Append bytes that are no tensor."""
        write(data)
        self.size_bytes += len(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)


_Owned = tuple[str, Tensor, tuple[int, ...], int]


def _owned(engine: Engine, queue: FeatureQueue | None, world: World) -> Iterator[_Owned]:
    """What this rank writes: name, flat tensor, shape and start of each."""
    fragments: Iterable[Fragment] = engine.fragments()
    if engine.replicated:
        fragments = _share(list(fragments), world)
    for fragment in fragments:
        yield f"weight/{fragment.name}", fragment.weight, fragment.shape, fragment.start
        yield f"momentum/{fragment.name}", fragment.momentum, fragment.shape, fragment.start
    whole = {f"rng/{name}": state for name, state in _generators(world).items()}
    if queue is not None:
        whole[f"queue/{world.rank:05d}"] = queue.features
    if world.is_first:
        whole |= {f"buffer/{name}": buffer for name, buffer in engine.module.named_buffers()}
    for name, tensor in whole.items():
        yield name, tensor.detach().reshape(-1), tuple(tensor.shape), 0


def _share(fragments: Sequence[Fragment], world: World) -> Iterator[Fragment]:
    """This rank's even share of fragments that every rank holds: all ranks write at once."""
    ends = list(accumulate(len(fragment.weight) for fragment in fragments))
    low, high = (ends[-1] * rank // world.world_size for rank in (world.rank, world.rank + 1))
    for fragment, end in zip(fragments, ends, strict=True):
        begin = end - len(fragment.weight)
        first, last = max(low, begin), min(high, end)
        if first < last:
            cut = slice(first - begin, last - begin)
            yield replace(
                fragment,
                start=fragment.start + cut.start,
                weight=fragment.weight[cut],
                momentum=fragment.momentum[cut],
            )


def _generators(world: World) -> dict[str, Tensor]:
    states = {f"{world.rank:05d}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"{world.rank:05d}-cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _joined(
    parts: Sequence[Sequence[_WrittenObject]],
    step: int,
    attempt: str,
    world: World,
    queue: FeatureQueue | None,
    state: Mapping[str, Any],
) -> Checkpoint:
    """One checkpoint from what all ranks have written."""
    written = [each for part in parts for each in part]
    tensors: dict[str, StoredTensor] = {}
    for number, each in enumerate(written):
        for name, part in each.tensors.items():
            whole = tensors.setdefault(name, StoredTensor(part.dtype, part.shape))
            whole.pieces += [piece._replace(object=number) for piece in part.pieces]
    return Checkpoint(
        step=step,
        attempt=attempt,
        world_size=world.world_size,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        objects=tuple(StoredObject(each.key, each.size_bytes, each.crc32c) for each in written),
        tensors=tensors,
        queue=queue and {"num_pushes": queue.num_pushes, "batch_size": queue.batch_size},
        state=dict(state),
    )


# --------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True)
class _Target:
    """A stretch of a named tensor to read, and where its elements go."""

    name: str
    start: int
    length: int
    put: Callable[[Tensor], object]
    dtype: str


def _targets(checkpoint: Checkpoint, engine: Engine, world: World) -> list[_Target]:
    """Everything this rank takes from a checkpoint but the queue."""
    _check_model(checkpoint, engine.module)
    targets = []
    for each in engine.fragments():
        targets.append(_target(f"weight/{each.name}", each.weight, each.start))
        targets.append(_target(f"momentum/{each.name}", each.momentum, each.start))
    for name, buffer in engine.module.named_buffers():
        targets.append(_target(f"buffer/{name}", buffer.view(-1), 0))
    if checkpoint.world_size == world.world_size:
        targets += _generator_targets(checkpoint, world)
    return targets


def _target(name: str, flat: Tensor, start: int) -> _Target:
    return _Target(name, start, len(flat), flat.copy_, _dtype_name(flat))


def _generator_targets(checkpoint: Checkpoint, world: World) -> Iterator[_Target]:
    setters = {"": torch.set_rng_state}
    if world.device.type == "cuda":
        setters["-cuda"] = torch.cuda.set_rng_state
    for suffix, put in setters.items():
        name = f"rng/{world.rank:05d}{suffix}"
        if name in checkpoint.tensors:  # a run may move to another kind of device
            yield _Target(name, 0, checkpoint.tensors[name].shape[0], put, "uint8")


def _apply(targets: Sequence[_Target], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.put(value)


def _check_model(checkpoint: Checkpoint, module: nn.Module) -> None:
    ours = {f"weight/{name}": tuple(p.shape) for name, p in module.named_parameters()}
    ours |= {f"buffer/{name}": tuple(b.shape) for name, b in module.named_buffers()}
    saved = {
        name: tensor.shape
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(("weight/", "buffer/"))
    }
    if differing := sorted(n for n in ours.keys() | saved.keys() if ours.get(n) != saved.get(n)):
        name = differing[0]
        raise CheckpointError(
            f"it is of another model: {len(differing)} tensors differ, {name} is {saved.get(name)} "
            f"there and {ours.get(name)} here; resume with the model section it was trained with"
        )


def _queue_rows(reader: "_Reader", queue: FeatureQueue | None, world: World) -> Tensor | None:
    """This rank's rows of the saved queue, [A, L / world_size, D]; None if none was saved.

    Every rank's rows are its shares of past global batches, newest first. Put together by age they
    are dealt out again, batch by batch, as if this number of ranks had pushed them.
    """
    checkpoint = reader.checkpoint
    if checkpoint.queue is None:
        return None
    if queue is None:
        raise CheckpointError("it carries a feature queue and this run has none: see section queue")
    size, world_size = checkpoint.queue["batch_size"], checkpoint.world_size
    same = (size, world_size) == (queue.batch_size, world.world_size)
    ranks = [world.rank] if same else range(world_size)
    parts_ALD = [reader.read_whole(f"queue/{rank:05d}") for rank in ranks]
    if same:
        rows_ALD = parts_ALD[0]
    else:
        by_age = torch.stack([part.unflatten(1, (-1, size)) for part in parts_ALD], dim=2)
        rows_ALD = by_age.flatten(1, 3)  # [A, pushes, world, B, D] -> [A, L, D]
        if size * world_size != queue.batch_size * world.world_size:
            raise CheckpointError("its feature queue is of another global batch size")
        dealt = rows_ALD.unflatten(1, (-1, world.world_size, queue.batch_size))
        rows_ALD = dealt[:, :, world.rank].flatten(1, 2)
    if rows_ALD.shape != queue.features.shape:
        raise CheckpointError(
            f"its feature queue is {tuple(rows_ALD.shape)} a rank, this run's "
            f"{tuple(queue.features.shape)}; resume with the queue section it was trained with"
        )
    return rows_ALD


class _Reader:
    """Reads tensors of one checkpoint, checking every piece it touches."""

    def __init__(self, store: Store, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._store = store

    def read_whole(self, name: str) -> Tensor:
        """A tensor, on the host."""
        stored = self.checkpoint.tensors[name]
        target = _Target(name, 0, _numel(stored.shape), print, stored.dtype)
        return self.read([target])[0].view(stored.shape)

    def read(self, targets: Sequence[_Target]) -> list[Tensor]:
        """The flat tensors the targets ask for, on the host.

        Raises CheckpointError for bytes whose checksum is wrong, and for dtypes that differ.
        """
        values = [torch.empty(each.length, dtype=getattr(torch, each.dtype)) for each in targets]
        uses: dict[Piece, list[tuple[_Target, Tensor]]] = {}
        for target, value in zip(targets, values, strict=True):
            for piece in self._pieces(target):
                uses.setdefault(piece, []).append((target, value))
        with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
            for _ in pool.map(lambda run: self._read_run(run, uses), _runs(uses, self._end)):
                pass
        return values

    def _pieces(self, target: _Target) -> list[Piece]:
        stored = self.checkpoint.tensors[target.name]
        if stored.dtype != target.dtype:
            raise CheckpointError(f"{target.name} is {stored.dtype} there, {target.dtype} here")
        found = [piece for piece in stored.pieces if _overlap(piece, target)]
        if sum(len(_overlap(piece, target)) for piece in found) != target.length:
            raise CheckpointError(f"its manifest does not hold {target.name} whole")
        return found

    def _read_run(
        self, run: Sequence[Piece], uses: Mapping[Piece, list[tuple[_Target, Tensor]]]
    ) -> None:
        key, begin = self.checkpoint.objects[run[0].object].key, run[0].offset_bytes
        end = max(self._end(piece, uses[piece][0][1].element_size()) for piece in run)
        body = memoryview(self._store.get_range(key, begin, end - begin))
        for piece in run:
            size = piece.length * uses[piece][0][1].element_size()
            data = bytes(body[piece.offset_bytes - begin :][:size])
            if google_crc32c.value(data) != piece.crc32c:
                where = f"{self._store.url_of(key)}, {size} bytes at {piece.offset_bytes}"
                raise CheckpointError(f"{where}: damaged, its checksum is wrong")
            for target, value in uses[piece]:
                _copy_overlap(piece, data, target, value)
