"""Batches of multi-crops from plain WebDataset tars: for data that nobody has indexed yet.

Called by the trainer in place of pipeline.loader when `loader.dataset` names tars. Bytes, order and
losses are pipeline.tars' business; guards, crops and colours are those of the loader. What the
loader promises and a stream cannot is said once, when it begins (`LOST`). Threads of the training
process do the work: a stream is the way to a first look, and adopting the shards in place
(`python -m shard_tools adopt`) the way to a run.

An image that cannot be used is left out, entered in the quarantine, and the next one takes its
slot. Crops and colours are a function of (seed, epoch, slot): a slot is numbered over all ranks.

Memory of a rank: `loader.shuffle_samples` encoded images that wait to be shuffled, fewer where they
would take more than `loader.budget_bytes`, and some dozens on their way to the decoders; and
prefetch_batches + 1 batches of uint8 crops.
"""

import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import AugmentConfig, AugmentParams, draw_groups
from pipeline.augment_device import augment
from pipeline.augment_host import augment_pixels, normalize_into
from pipeline.cores import usable_cores
from pipeline.crops import CropsConfig, block_shapes, crop_boxes, decode_crops
from pipeline.decode import ImageHeader, guard_header
from pipeline.errors import SampleError, StoppedWaiting, UsageError
from pipeline.lending import Lender
from pipeline.loader import Batch, LoaderConfig
from pipeline.quarantine import Quarantine
from pipeline.samples import BadSample, RawSample
from pipeline.tars import TarStream, expand_tars
from pipeline.telemetry import Telemetry

P = ParamSpec("P")
T = TypeVar("T")
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

LOST = (
    "%s is streamed as it is, without an index. Lost are: the same batches for every world size, "
    "exact resuming (the data continue at another place), samples seen equally often, checksums, "
    "and the isolation of the decoder in processes of its own. To have them, adopt the tars in "
    "place: python -m shard_tools adopt"
)

_JOBS_PER_THREAD = 4  # of a batch, so that its threads finish together
_READ_AHEAD = 64  # images between the stream and the decoding threads, beside those shuffled
_GLANCE_S = 0.2  # how long a thread waits before it looks whether all is over
_END_S = 2.0  # how long closing waits for a read that a store does not answer
_POSITION = ("epoch", "step")

_log = logging.getLogger(__name__)


class StreamingLoader:
    """Endless batches of multi-crops from tars; the public side of `MultiCropLoader`.

    Its arguments are of the same meaning, but of `config` the order's settings do not apply, nor do
    workers, and `epoch_samples` is what counts as an epoch: nobody knows how many images there are.

    `telemetry` gets `data_wait_s`, how long the training loop waited: `wait_fetch_s` until the last
    image that the stream kept waiting had come, then `wait_decode_s`.

    Raises UsageError for a data set or sizes that do not fit; while iterating, StoreError when a
    store stays out of reach, DataError when more than `max_bad_samples` images were bad (of several
    ranks, the trainer counts those of all; left to itself, one fails a batch late), or all.
    """

    def __init__(
        self,
        config: LoaderConfig,
        crops: CropsConfig,
        augmentation: AugmentConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        device: torch.device | str = "cpu",
        epochs: int | None = None,
        state: Mapping[str, Any] | None = None,
        quarantine: Iterable[Mapping[str, Any]] = (),
        is_stopped: Callable[[], bool] = lambda: False,
        record_spans: bool = False,
    ) -> None:
        _check_sizes(config.global_batch, config.epoch_samples, world_size)
        self.config = config
        self.crops = crops
        self.augmentation = augmentation
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.epochs = epochs
        self.num_samples = config.epoch_samples
        self.telemetry = Telemetry(record_spans=record_spans)
        self._is_stopped = is_stopped
        known = list(quarantine)
        self.quarantine = Quarantine(
            config.dataset, limit=config.max_bad_samples, entries=known, world_size=world_size
        )
        self._known = {entry["number"] for entry in known}  # not to be met again
        self._stream = TarStream(
            expand_tars(config.dataset),
            seed=seed,
            shuffle_samples=config.shuffle_samples,
            budget_bytes=config.budget_bytes,
            telemetry=self.telemetry,
            rank=rank,
            world_size=world_size,
        )
        self._num_threads = config.threads or max(1, usable_cores() // local_world_size)
        self._lender = Lender()
        self._epoch, self._step = 0, 0
        self._work: _Work | None = None
        if rank == 0:
            _log.warning(LOST, config.dataset)
        if state is not None:
            self.load_state_dict(state)

    @property
    def batch_size(self) -> int:
        """Images a step of this rank."""
        return self.config.global_batch // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.config.global_batch

    def describe(self) -> str:
        """What is read, in a line for the log."""
        return (
            f"{len(self._stream.urls)} tars of {self.config.dataset}, streamed; an epoch counts "
            f"{self.num_samples} images, {self.world_size} rank(s) of {self.batch_size} images, "
            f"{self._num_threads} threads"
        )

    def state_dict(self) -> dict[str, Any]:
        """How far the run is behind the last yielded batch; not which images it has seen."""
        return {
            "streamed": self.config.dataset,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "epoch": self._epoch,
            "step": self._step,
            "global_batch": self.config.global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from a saved position. Raises UsageError if the state is of another run."""
        if "streamed" not in state:
            raise UsageError(
                f"the checkpoint was written with a packed data set, which {self.config.dataset} "
                "is not; set loader.dataset back, or start a new run under another checkpoint.run"
            )
        for name, mine in self.state_dict().items():
            if name not in state or (name not in _POSITION and state[name] != mine):
                raise UsageError(
                    f"the checkpoint was written with {name}={state.get(name)!r} of the loader, "
                    f"now it is {mine!r}; set it back, or start a new run under another "
                    "checkpoint.run"
                )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
        if self.rank == 0:
            _log.warning(
                "resuming at epoch %d, step %d: the data continue at another place of %s, so that "
                "some images come again early and others late",
                self._epoch,
                self._step,
                self.config.dataset,
            )

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        samples = self._stream.samples(self._epoch, self._step, is_known=self._known.__contains__)
        work = self._work = _Work(samples, self._num_threads, self._stream.close)
        positions = self._positions(self._epoch, self._step)
        free = [self._new_blocks() for _ in range(self.config.prefetch_batches + 1)]
        pending: deque[_Filling] = deque()
        try:
            while True:
                while free and (position := next(positions, None)) is not None:
                    pending.append(self._submit(work, *position, free.pop()))
                if not pending:
                    return
                filling = pending.popleft()
                try:
                    batch = self._finish(filling)
                except StoppedWaiting:
                    return
                free.append(filling.blocks)
                self._epoch, self._step = self._behind(batch.epoch, batch.step)
                yield batch
        finally:
            work.stop()

    def close(self) -> None:
        """Stop the threads; nothing is left behind, but for a few seconds a read under way."""
        if self._work is not None:
            self._work.stop()
            self._work = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _positions(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        while self.epochs is None or epoch < self.epochs:
            yield epoch, step
            epoch, step = self._behind(epoch, step)

    def _behind(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _new_blocks(self) -> list[UInt8]:
        return [np.empty(shape, np.uint8) for shape in block_shapes(self.crops, self.batch_size)]

    def _submit(self, work: "_Work", epoch: int, step: int, blocks: list[UInt8]) -> "_Filling":
        first = step * self.config.global_batch + self.rank * self.batch_size
        slots = np.arange(first, first + self.batch_size, dtype=np.int64)
        filling = _Filling(epoch, step, slots, blocks)
        parts = min(len(slots), self._num_threads * _JOBS_PER_THREAD)
        for rows in np.array_split(np.arange(len(slots)), parts):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            filling.jobs.append(work.submit(self._fill, work, filling, part))
        return filling

    def _fill(self, work: "_Work", filling: "_Filling", rows: slice) -> list[BadSample]:
        """Fill some rows of a batch with the next images that can be used; returns the others.

        Leaves off once those are more than the run allows, by themselves: it ends with this batch.
        """
        blocks = [block[:, rows] for block in filling.blocks]
        bad: dict[int, BadSample] = {}
        for row, slot in enumerate(filling.slots[rows].tolist()):
            out = [block[:, row] for block in blocks]
            while (found := self._cut(filling.take(work), filling.epoch, slot, out)) is not None:
                self._known.add(found.number)
                bad[found.number] = found
                if len(bad) > self.config.max_bad_samples:
                    return list(bad.values())
        if self.device.type == "cpu":
            self._colour(filling.epoch, filling.slots[rows], blocks)
        return list(bad.values())

    def _cut(
        self, sample: RawSample, epoch: int, slot: int, out: Sequence[UInt8]
    ) -> BadSample | None:
        """Cut an image's crops into a slot; what is wrong with it if it cannot be used."""
        try:
            header = guard_header(sample.data, max_pixels=self.config.max_image_pixels)
            boxes = self._boxes(header, epoch, slot)
            with self.telemetry.timed("decode_s"):
                reduced = self.crops.reduced_decode
                decode_crops(sample.data, header, boxes, out, reduced=reduced)
        except SampleError as error:
            return BadSample(sample.number, sample.key, sample.shard, str(error))
        return None

    def _boxes(self, header: ImageHeader, epoch: int, slot: int) -> NDArray[np.int32]:
        return crop_boxes(
            self.crops,
            seed=self.seed,
            epoch=epoch,
            sample=slot,
            width_px=header.width_px,
            height_px=header.height_px,
        )

    def _colour(self, epoch: int, slots: Int64, blocks: Sequence[UInt8]) -> None:
        with self.telemetry.timed("colour_s"):
            for block, params in zip(blocks, self._draw(epoch, slots, blocks), strict=True):
                augment_pixels(block, params)

    def _draw(self, epoch: int, slots: Int64, blocks: Sequence[UInt8]) -> Iterator[AugmentParams]:
        """What happens to the colours of each block."""
        return draw_groups(
            self.augmentation, map(len, blocks), seed=self.seed, epoch=epoch, samples=slots
        )

    def _finish(self, filling: "_Filling") -> Batch:
        """Wait for a batch and bring it to the device."""
        start = perf_counter()
        bad = [each for job in filling.jobs for each in self._result(job)]
        end = perf_counter()
        arrived = min(max(start, filling.arrived_s), end)
        self.telemetry.record("data_wait_s", start, end)
        self.telemetry.add(wait_fetch_s=arrived - start, wait_decode_s=end - arrived)
        self.telemetry.add(substituted_samples=len(bad))
        replaced = [(each, -1) for each in bad]
        self.quarantine.add_batch(replaced, epoch=filling.epoch, step=filling.step)
        with self.telemetry.timed("augment_s"):
            crops = self._to_device(filling)
        return Batch(filling.epoch, filling.step, filling.slots, crops)

    def _result(self, job: "Future[list[BadSample]]") -> list[BadSample]:
        while not job.done():
            if self._is_stopped():
                raise StoppedWaiting
            wait([job], _GLANCE_S)
        try:
            return job.result()
        except CancelledError:
            raise _StoppedError from None

    def _to_device(self, filling: "_Filling") -> list[torch.Tensor]:
        if self.device.type == "cpu":
            return [self._normalize(block) for block in filling.blocks]
        params = self._draw(filling.epoch, filling.slots, filling.blocks)
        return [
            augment(_as_crops(block).to(self.device), each, self.augmentation)
            for block, each in zip(filling.blocks, params, strict=True)
        ]

    def _normalize(self, block: UInt8) -> torch.Tensor:
        normalized = self._lender.lend(block.shape)
        normalize_into(block, normalized, self.augmentation)
        return _as_crops(normalized)


@dataclass
class _Filling:
    """A batch that threads fill. slots: int64 [B]; blocks: uint8 [count, B, s, s, 3].

    arrived_s: of time.perf_counter, when the last image that had to be waited for came.
    """

    epoch: int
    step: int
    slots: Int64
    blocks: list[UInt8]
    jobs: list[Future[list[BadSample]]] = field(default_factory=list)
    arrived_s: float = -math.inf

    def take(self, work: "_Work") -> RawSample:
        """The next image of the stream."""
        is_here = work.is_ahead()
        sample = work.take()
        if not is_here:
            self.arrived_s = perf_counter()
        return sample


class _StoppedError(UsageError):
    """The loader was closed while somebody waited."""

    def __init__(self) -> None:
        super().__init__("this iteration has ended: the loader was closed or begun again")


class _Work:
    """The threads of one iteration: one follows the stream, others decode.

    Args:
        end_stream: lets a follower that reads end soon; called while this is the stream's reader.
    """

    def __init__(
        self,
        samples: Generator[RawSample, None, None],
        num_threads: int,
        end_stream: Callable[[], None],
    ) -> None:
        self._samples = samples
        self._end_stream = end_stream
        self._ahead: queue.Queue[RawSample | BaseException] = queue.Queue(_READ_AHEAD)
        self._stopped = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="stream", daemon=True)
        self._follower.start()
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread do something."""
        try:
            return self._decoders.submit(function, *args, **kwargs)
        except RuntimeError:
            if self._stopped.is_set():  # just now, by another thread
                raise _StoppedError from None
            raise

    def is_ahead(self) -> bool:
        """Whether an image waits to be taken."""
        return not self._ahead.empty()

    def take(self) -> RawSample:
        """The next image. Raises what ended the stream."""
        while not self._stopped.is_set():
            try:
                found = self._ahead.get(timeout=_GLANCE_S)
            except queue.Empty:
                continue
            if isinstance(found, RawSample):
                return found
            self._ahead.put(found)  # every thread is to learn of it
            raise found
        raise _StoppedError

    def stop(self) -> None:
        """End the threads now; more than once is no error, and does nothing.

        A follower that waits for a store which does not answer ends by itself, later.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._end_stream()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._follower.join(_END_S)

    def _follow(self) -> None:
        try:
            for sample in self._samples:
                self._put(sample)
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where the batch is awaited
            self._put_last(error)
        finally:
            self._samples.close()

    def _put(self, item: RawSample | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ahead.put(item, timeout=_GLANCE_S)
            except queue.Full:
                continue
        raise _StoppedError

    def _put_last(self, error: BaseException) -> None:
        try:
            self._put(error)
        except _StoppedError:
            return


def _as_crops(block: NDArray[Any]) -> torch.Tensor:
    """A block [count, B, s, s, 3] as crops [count * B, 3, s, s], channels last."""
    return torch.from_numpy(block).flatten(0, 1).permute(0, 3, 1, 2)


def _check_sizes(global_batch: int, epoch_samples: int, world_size: int) -> None:
    if global_batch % world_size:
        raise UsageError(
            f"the global batch of {global_batch} does not divide over {world_size} ranks; "
            f"set loader.global_batch to a multiple of {world_size}"
        )
    if epoch_samples < global_batch:
        raise UsageError(
            f"loader.epoch_samples is {epoch_samples}, less than the global batch of "
            f"{global_batch}; tars without an index do not say how many images they hold, so set "
            "it to about that number: it is what an epoch counts"
        )
