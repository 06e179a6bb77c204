"""Save and resume a run on an object store; `python -m trainer.checkpoint ls|verify|rm`.

A checkpoint holds everything that decides the rest of a run: weights and momentum as this rank's
engine holds them, BatchNorm statistics, the feature queue and the random generators of every rank,
and a JSON state (the loader's position among it). Every rank streams its own part (the format is
`trainer.fragments`); once all parts are complete rank 0 commits the manifest by one conditional PUT
(`pipeline.manifest`). So a save that was killed does not exist, and of two runs that write to the
same prefix one stops. Nothing is put into a model before everything it needs was read and checked.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from typing import Annotated, Any, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from pipeline.errors import CheckpointError, CropstreamError, ManifestError, run_command
from pipeline.manifest import commit, new_attempt, prove_conditional_put
from pipeline.store import Store, open_store
from trainer.distributed import World
from trainer.engine import Engine
from trainer.fragments import (
    Checkpoint,
    Reader,
    Wanted,
    WrittenObject,
    damage,
    dtype_name,
    join,
    manifest_key,
    read_checkpoint,
    remove,
    saved_steps,
    to_document,
)
from trainer.partitions import Fragment, parameter_shape
from trainer.queue import FeatureQueue

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Section `checkpoint`: where, how often, and how many."""

    run: str  # the run's prefix: s3://bucket/runs/name, file:///… or a local path
    every_steps: Annotated[int, Ge(1)] = 1000
    keep: Annotated[int, Ge(1)] = 3  # older checkpoints are removed


class Checkpoints:
    """The checkpoints of one run, written and read by all ranks of `world` together.

    Every method is called by every rank at the same point; an error on one rank is raised on all,
    as a CheckpointError. What is no error of ours keeps its type and traceback on its own rank.
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
        or restored last does nothing. Raises CheckpointError on every rank if any could not write
        or holds a weight that is not finite, or if another run has committed this step.
        """
        if step == self._committed_step:
            return
        self.prove_writable()
        attempt = self._world.share(new_attempt())
        folder = f"objects/{step:09d}-{attempt}"
        what = f"cannot write checkpoint {step} to {self._store.url}"
        written = self._together(what, lambda: self._write(folder, engine, queue, metrics))
        objects, tensors = join(each for part in self._world.gather(written) for each in part)
        checkpoint = Checkpoint(
            step=step,
            attempt=attempt,
            world_size=self._world.world_size,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            objects=objects,
            tensors=tensors,
            queue=_queue_sizes(queue),
            state=dict(state),
        )
        self._on_first(what, lambda: self._commit(checkpoint))
        self._committed_step = step
        self._on_first(f"checkpoint {step}", self._remove_old)

    def prove_writable(self) -> None:
        """Check, once, that the store takes commits. Raises CheckpointError."""
        if not self._proven:
            what = f"cannot write checkpoints to {self._store.url}"
            self._on_first(what, lambda: prove_conditional_put(self._store))
            self._proven = True

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
            damaged.append(manifest_key(step))
            if self._world.is_first:
                _log.warning("passing over checkpoint %d: %s", step, "; ".join(problems))
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
        reader = Reader(self._store, checkpoint)
        targets = self._together(what, lambda: _targets(checkpoint, engine, self._world))
        flats = self._together(what, lambda: reader.read([wanted for wanted, _ in targets]))
        queued = self._together(what, lambda: _queue_state(checkpoint, reader, queue, self._world))
        with torch.no_grad():
            for (_, put), flat in zip(targets, flats, strict=True):
                put(flat)
        engine.publish()
        if queue is not None and queued is not None:
            queue.load_state_dict(queued)
        self._on_first(what, lambda: self._set_aside(checkpoint.damaged))
        self._committed_step = checkpoint.step
        return checkpoint.state

    def metrics(self, checkpoint: Checkpoint) -> bytes:
        """The metrics that were saved with a checkpoint, on rank 0; nothing elsewhere."""
        keys = [stored.key for stored in checkpoint.objects if stored.key.endswith("metrics.jsonl")]
        return self._together(
            f"cannot read the metrics of checkpoint {checkpoint.step} of {self._store.url}",
            lambda: self._store.get(keys[0]) if self._world.is_first else b"",
        )

    def _write(
        self, folder: str, engine: Engine, queue: FeatureQueue | None, metrics: bytes
    ) -> list[WrittenObject]:
        world = self._world
        _check_finite(engine)
        written = [WrittenObject(f"{folder}/rank-{world.rank:05d}.bin")]
        with self._store.writer(written[0].key) as writer:
            for name, tensor, shape, start in _owned(engine, queue, world):
                written[0].add(writer.write, name, tensor, shape, start)
        if world.is_first:
            written.append(WrittenObject(f"{folder}/metrics.jsonl"))
            with self._store.writer(written[1].key) as writer:
                written[1].append(writer.write, metrics)
        return written

    def _commit(self, checkpoint: Checkpoint) -> None:
        document = to_document(checkpoint)
        winner = commit(self._store, checkpoint.key, document, attempt=checkpoint.attempt)
        if winner["attempt"] != checkpoint.attempt:
            for stored in checkpoint.objects:
                self._store.delete(stored.key)
            raise CheckpointError(
                f"another run has committed this step (attempt {winner['attempt']}); two runs must "
                "not share a prefix: stop one, or give this one another checkpoint.run"
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
        value, error = _attempt(work)
        failures = self._world.gather(_told(error))
        failed = [rank for rank, each in enumerate(failures) if each is not None]
        if failed:
            _raise_foreign(error)
            ranks = f"rank {failed[0]}" + (f" and {len(failed) - 1} more" if failed[1:] else "")
            raise CheckpointError(f"{what} ({ranks}): {failures[failed[0]]}")
        return value  # type: ignore[return-value]

    def _on_first(self, what: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and return its result on every rank; fail on all if it fails."""
        value, error = _attempt(work) if self._world.is_first else (None, None)
        value, failure = self._world.share((value, _told(error)))
        if failure is not None:
            _raise_foreign(error)
            raise CheckpointError(f"{what}: {failure}")
        return value  # type: ignore[no-any-return]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for us
        return None, error


def _told(error: Exception | None) -> str | None:
    """What the other ranks hear of an error; a bug's type says more than its message."""
    if error is None:
        return None
    return str(error) if isinstance(error, CropstreamError) else f"{type(error).__name__}: {error}"


def _raise_foreign(error: Exception | None) -> None:
    if error is not None and not isinstance(error, CropstreamError):
        raise error


# --------------------------------------------------------------------------------------------------
# writing


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


def _check_finite(engine: Engine) -> None:
    """A checkpoint that cannot be trained on must not push a good one out of the newest `keep`."""
    bad = [each.name for each in engine.fragments() if not each.weight.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"the weights are not finite ({bad[0]} and {len(bad) - 1} more): the run has diverged; "
            f"resume from an older checkpoint with a lower schedule.base_lr"
        )


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


def _queue_sizes(queue: FeatureQueue | None) -> dict[str, int] | None:
    if queue is None:
        return None
    return {"num_pushes": queue.num_pushes, "batch_size": queue.batch_size}


# --------------------------------------------------------------------------------------------------
# reading


_Target = tuple[Wanted, Callable[[Tensor], object]]


def _targets(checkpoint: Checkpoint, engine: Engine, world: World) -> list[_Target]:
    """Everything this rank takes from a checkpoint but the queue, and who receives it."""
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
    return Wanted(name, start, len(flat), dtype_name(flat)), flat.copy_


def _generator_targets(checkpoint: Checkpoint, world: World) -> Iterator[_Target]:
    setters: dict[str, Callable[[Tensor], object]] = {"": torch.set_rng_state}
    if world.device.type == "cuda":
        setters["-cuda"] = torch.cuda.set_rng_state
    for suffix, put in setters.items():
        name = f"rng/{world.rank:05d}{suffix}"
        if name in checkpoint.tensors:  # not if the run moves to another kind of device
            yield Wanted(name, 0, checkpoint.tensors[name].shape[0], "uint8"), put


def _check_model(checkpoint: Checkpoint, module: nn.Module) -> None:
    ours = {f"weight/{name}": parameter_shape(p) for name, p in module.named_parameters()}
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


def _queue_state(
    checkpoint: Checkpoint, reader: Reader, queue: FeatureQueue | None, world: World
) -> dict[str, Any] | None:
    """This rank's state of the saved queue, None if none was saved."""
    if checkpoint.queue is None:
        return None
    if queue is None:
        raise CheckpointError("it carries a feature queue and this run has none: see section queue")
    sizes = checkpoint.queue["batch_size"], checkpoint.world_size
    if sizes == (queue.batch_size, world.world_size):
        [rows_ALD] = reader.read_whole([f"queue/{world.rank:05d}"])
    else:
        parts = reader.read_whole([f"queue/{rank:05d}" for rank in range(checkpoint.world_size)])
        rows_ALD = _deal_queue(parts, sizes[0], queue.batch_size, world)
    if rows_ALD.shape != queue.features.shape:
        raise CheckpointError(
            f"its feature queue is {tuple(rows_ALD.shape)} a rank, this run's "
            f"{tuple(queue.features.shape)}; resume with the queue section it was trained with"
        )
    return {"features": rows_ALD, "num_pushes": checkpoint.queue["num_pushes"]}


def _deal_queue(parts: Sequence[Tensor], saved_batch: int, batch: int, world: World) -> Tensor:
    """The rows this rank would hold, had this world pushed the same global batches.

    A rank's rows are its shares of the past global batches, newest first: put the shares of each
    together again, then cut each batch for this world.
    """
    if saved_batch * len(parts) != batch * world.world_size:
        raise CheckpointError(
            f"its feature queue is of global batches of {saved_batch * len(parts)}, this run's of "
            f"{batch * world.world_size}; resume with the batch size it was trained with"
        )
    num_crops, num_rows, feat_dim = parts[0].shape
    shape = (num_crops, num_rows // saved_batch, saved_batch, feat_dim)
    batches_APGD = torch.cat([part.view(shape) for part in parts], dim=2)
    mine_APBD = batches_APGD[:, :, world.rank * batch :][:, :, :batch]
    return mine_APBD.flatten(1, 2)


def _read_or_damage(store: Store, step: int) -> tuple[Checkpoint | None, str]:
    try:
        return read_checkpoint(store, step), ""
    except ManifestError as error:
        return None, str(error)


# --------------------------------------------------------------------------------------------------
# command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ls`, `verify` or `rm`; the result goes to stdout."""
    options = _parser().parse_args(arguments)
    store = open_store(options.run)
    steps = [options.step] if options.step is not None else saved_steps(store)
    if not steps:
        raise CheckpointError(f"{store.url} has no checkpoints: check the URL of the run")
    command: Callable[[Store, Sequence[int]], None] = options.command
    command(store, steps)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint", description="Look after the checkpoints of a run."
    )
    commands = parser.add_subparsers(required=True, metavar="ls|verify|rm")
    for name, command, text in (
        ("ls", _ls, "list the checkpoints; sizes are compared, contents are not read"),
        ("verify", _verify, "read every byte back and compare the checksums"),
        ("rm", _rm, "remove one checkpoint"),
    ):
        each = commands.add_parser(name, help=text, description=text)
        each.add_argument(
            "run", help="the run's prefix: s3://bucket/runs/name, file:///… or a path"
        )
        each.add_argument("--step", type=int, required=name == "rm", help="only this checkpoint")
        each.set_defaults(command=command)
    return parser


def _ls(store: Store, steps: Sequence[int]) -> None:
    _say(f"{'step':>9}  {'time':25}  {'size':>10}  {'world':>5}  status")
    for step in steps:
        checkpoint, problem = _read_or_damage(store, step)
        if checkpoint is None:
            _say(f"{step:>9}  {'':25}  {'':>10}  {'':>5}  {problem}")
            continue
        size, world_size = f"{checkpoint.size_bytes / 1e6:.1f} MB", checkpoint.world_size
        status = _incomplete(store, checkpoint) or "complete"
        _say(f"{step:>9}  {checkpoint.time:25}  {size:>10}  {world_size:>5}  {status}")


def _incomplete(store: Store, checkpoint: Checkpoint) -> str | None:
    for stored in checkpoint.objects:
        info = store.head(stored.key)
        if info is None or info.size_bytes != stored.size_bytes:
            return f"damaged: {stored.key}"
    return None


def _verify(store: Store, steps: Sequence[int]) -> None:
    problems = []
    for step in steps:
        checkpoint, problem = _read_or_damage(store, step)
        found = damage(store, checkpoint.objects) if checkpoint else [problem]
        problems += [f"checkpoint {step}: {each}" for each in found]
        _say(f"checkpoint {step}: {'damaged' if found else 'verified'}")
    if problems:
        raise CheckpointError("\n  ".join([f"{len(problems)} damaged:", *problems]))


def _rm(store: Store, steps: Sequence[int]) -> None:
    for step in steps:
        remove(store, step)
        _say(f"removed checkpoint {step}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
