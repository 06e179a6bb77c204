"""Batches in order, handed to the device, and the state of a run's data.

A batch is a pure function of (snapshot, seed, epoch, step, rank, world size): fetching and
decoding are spread over threads, but who does what never shows in the result. A thread decodes an
image once and cuts all its crops into the batch's uint8 blocks; colour, blur and normalisation
follow in batches on the device. Threads suffice because decoding, resizing and reading release the
GIL, and they hand over without copying.

A sample that cannot be used is replaced by the next good one of its lane (the rest of its window
first), cropped with the seed of the slot it fills, and entered in the quarantine, which the
checkpoint carries.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from pipeline.augment import AugmentConfig, augment, draw_augment
from pipeline.crops import CropsConfig, crop_blocks, crop_boxes, cut_crops
from pipeline.decode import MAX_PIXELS, decode_rgb
from pipeline.errors import DataError, SampleError, UsageError
from pipeline.fetch import BadSample, Prefetcher, RawSample, SampleReader, pieces_in_order
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.order import SampleOrder, check_world_size, resolve_sizes
from pipeline.quarantine import Quarantine
from pipeline.store import open_store
from pipeline.telemetry import Telemetry

Int64 = NDArray[np.int64]

_FETCH_THREADS = 4
_POSITION = ("epoch", "step")  # what a state says beside what never changes in a run
_CHOSEN = ("version", "global_batch", "lanes", "chunk", "window")  # 0: whatever the state says
_JOBS_PER_THREAD = 4  # of a batch, so that its threads finish together


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Section `loader`: which data, in which order, with which means."""

    dataset: str  # prefix of a packed data set: s3://bucket/prefix, file:///path or a path
    version: Annotated[int, Ge(0)] = 0  # of the snapshot; 0 is the latest at first launch
    global_batch: Annotated[int, Gt(0)] = 4096  # images a step over all ranks
    lanes: Annotated[int, Ge(0)] = 0  # 0: chosen at first launch, as are chunk and window
    chunk: Annotated[int, Ge(0)] = 0  # samples of one read
    window: Annotated[int, Ge(0)] = 0  # chunks mixed inside a lane
    threads: Annotated[int, Ge(0)] = 0  # decoding, a rank; 0: the cores a rank has to itself
    budget_bytes: Annotated[int, Gt(0)] = 2 << 30  # encoded samples in flight or held, a rank
    prefetch_batches: Annotated[int, Gt(0)] = 2
    max_bad_samples: Annotated[int, Ge(0)] = 1000  # distinct ones, before the run fails
    max_image_pixels: Annotated[int, Gt(0)] = MAX_PIXELS  # larger images count as bad


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    samples: int64 [B], sample numbers of the snapshot, as ordered (before any substitution).
    crops: one float32 tensor a resolution on the device, [count * B, 3, s, s], crop-major,
    normalised.
    """

    epoch: int
    step: int
    samples: Int64
    crops: list[torch.Tensor]


@dataclass
class CutBatch:
    """A batch before its colours, which threads fill.

    blocks: one uint8 tensor a resolution, [count, B, 3, s, s], on the host.
    """

    epoch: int
    step: int
    samples: Int64
    blocks: list[torch.Tensor]
    jobs: list[Future[None]] = field(default_factory=list)
    copied: torch.cuda.Event | None = None  # when the device has its own copy


class MultiCropLoader:
    """Endless batches of multi-crops from the position of its state on.

    Args:
        seed: of order, crops and colour.
        local_world_size: ranks that share this machine's cores.
        device: where the crops of a batch end up.
        epochs: stop after so many; None never stops.
        state, quarantine: where to go on, and the bad samples known by then, of a checkpoint.

    Use it as a context manager, or call `close`: it owns threads. After a batch was yielded,
    `state_dict` is the position behind that batch.

    Raises UsageError for sizes that do not fit, ManifestError without a sealed data set, DataError
    when more than `max_bad_samples` had to be replaced.
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
        state: dict[str, Any] | None = None,
        quarantine: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.config = config
        self.crops = crops
        self.augmentation = augmentation
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size
        self.device = torch.device(device)
        self.epochs = epochs
        self.telemetry = Telemetry()
        if state is not None:
            asked = {name: getattr(config, name) for name in _CHOSEN}
            _check_unchanged({name: value for name, value in asked.items() if value}, state)
        self.store = open_store(config.dataset)
        wanted = state["version"] if state else config.version or None
        self.snapshot = read_snapshot(self.store, wanted)
        self.order = self._resolve_order(seed, state)
        self._ahead_bytes = self._in_flight_bytes()
        self.quarantine = Quarantine(
            config.dataset, limit=config.max_bad_samples, entries=quarantine
        )
        self._epoch, self._step = 0, 0
        self._workers: _Workers | None = None
        self._copies = _copy_stream(self.device)
        if state is not None:
            self.load_state_dict(state)

    @property
    def batch_size(self) -> int:
        """Images a step of this rank."""
        return self.order.global_batch // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.order.num_steps

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last yielded batch, and all that the order depends on."""
        return {
            "version": self.snapshot.version,
            "num_samples": self.order.num_samples,
            "seed": self.order.seed,
            "epoch": self._epoch,
            "step": self._step,
            "global_batch": self.order.global_batch,
            "lanes": self.order.lanes,
            "chunk": self.order.chunk,
            "window": self.order.window,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UsageError if the configuration contradicts the state."""
        mine = self.state_dict()
        _check_unchanged({name: mine[name] for name in mine if name not in _POSITION}, state)
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        for cut in self.cut_batches():
            with self.telemetry.timed("augment_s"):
                crops = self._to_device(cut)
            yield Batch(cut.epoch, cut.step, cut.samples, crops)

    def cut_batches(self) -> Iterator[CutBatch]:
        """The batches before colour, on the host; asking for the next reuses one's blocks."""
        self.close()
        positions = self._positions(self._epoch, self._step)
        pending: deque[CutBatch] = deque()
        free = [self._new_blocks() for _ in range(self.config.prefetch_batches + 1)]
        workers = self._workers = self._start()
        try:
            while True:
                while free and (position := next(positions, None)) is not None:
                    pending.append(self._submit(workers, *position, free.pop()))
                if not pending:
                    return
                batch = pending.popleft()
                with self.telemetry.timed("data_wait_s"):
                    for job in batch.jobs:
                        job.result()
                self._epoch, self._step = self._behind(batch.epoch, batch.step)
                yield batch
                if batch.copied is not None:
                    batch.copied.synchronize()
                free.append(batch.blocks)
        finally:
            workers.stop()

    def close(self) -> None:
        """Stop the threads; nothing is left behind."""
        if self._workers is not None:
            self._workers.stop()
            self._workers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _resolve_order(self, seed: int, state: dict[str, Any] | None) -> SampleOrder:
        """The constants of the configuration; where it leaves a choice, those of the state."""
        config, snapshot = self.config, self.snapshot
        chosen = state or {}
        sizes = resolve_sizes(
            global_batch=config.global_batch,
            world_size=self.world_size,
            mean_sample_bytes=mean_sample_bytes(snapshot),
            num_samples=snapshot.num_kept,
            lanes=config.lanes or chosen.get("lanes", 0),
            chunk=config.chunk or chosen.get("chunk", 0),
            window=config.window or chosen.get("window", 0),
            budget_bytes=config.budget_bytes,
        )
        order = SampleOrder(
            snapshot.num_kept, global_batch=config.global_batch, seed=seed, **asdict(sizes)
        )
        check_world_size(order.lanes, self.world_size)
        return order

    def _in_flight_bytes(self) -> int:
        """What this rank reads ahead: one chunk more than a window, for each of its lanes."""
        order = self.order
        chunk_bytes = order.chunk * mean_sample_bytes(self.snapshot)
        needed = round(order.lanes / self.world_size * (order.window + 1) * chunk_bytes)
        if needed > self.config.budget_bytes:
            raise UsageError(
                f"the order keeps {needed >> 20} MiB of samples in flight on every rank, more than "
                f"the {self.config.budget_bytes >> 20} MiB of loader.budget_bytes; raise it, or "
                f"lower loader.window or loader.chunk, or start more ranks"
            )
        return needed

    def _positions(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        while self.epochs is None or epoch < self.epochs:
            yield epoch, step
            epoch, step = self._behind(epoch, step)

    def _behind(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < self.order.num_steps else (epoch + 1, 0)

    def _start(self) -> "_Workers":
        reader = SampleReader(self.store, self.snapshot, self.telemetry)
        prefetcher = Prefetcher(
            reader,
            pieces_in_order(self._windows(self._epoch, self._step), self.order.chunk),
            ahead_bytes=self._ahead_bytes,
            sample_bytes=mean_sample_bytes(self.snapshot),
            threads=_FETCH_THREADS,
        )
        threads = ThreadPoolExecutor(self._num_threads(), thread_name_prefix="decode")
        return _Workers(reader, prefetcher, threads)

    def _num_threads(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return self.config.threads or max(1, cores // self.local_world_size)

    def _windows(self, epoch: int, step: int) -> Iterator[tuple[int, list[int]]]:
        """All windows of this rank from a step on, without what was already served."""
        order = self.order
        size = order.window * order.chunk
        lanes = order.lanes_of(self.rank, self.world_size)
        place = step * (order.global_batch // order.lanes)
        while self.epochs is None or epoch < self.epochs:
            while place < order.samples_per_lane:
                for lane in lanes:
                    window = order.window_of(epoch, lane, place)
                    yield epoch, window[place % size :].tolist()
                place = (place // size + 1) * size
            epoch, place = epoch + 1, 0

    def _new_blocks(self) -> list[torch.Tensor]:
        return crop_blocks(self.crops, self.batch_size, pin_memory=self.device.type == "cuda")

    def _submit(
        self, workers: "_Workers", epoch: int, step: int, blocks: list[torch.Tensor]
    ) -> CutBatch:
        samples = self.order.batch(epoch, step, self.rank, self.world_size)
        batch = CutBatch(epoch, step, samples, blocks)
        parts = min(len(samples), self._num_threads() * _JOBS_PER_THREAD)
        for slots in np.array_split(np.arange(len(samples)), parts):
            batch.jobs.append(workers.threads.submit(self._fill, workers, batch, slots.tolist()))
        return batch

    def _to_device(self, batch: CutBatch) -> list[torch.Tensor]:
        crops, first = [], 0
        for block in batch.blocks:
            count = block.shape[0]
            params = draw_augment(
                self.augmentation,
                seed=self.order.seed,
                epoch=batch.epoch,
                samples=batch.samples,
                crop_indices=range(first, first + count),
            )
            pixels = self._upload(batch, block.flatten(0, 1))
            crops.append(augment(pixels, params, self.augmentation))
            first += count
        return crops

    def _upload(self, batch: CutBatch, pixels: torch.Tensor) -> torch.Tensor:
        """Copy to the device beside what it computes; the host waits before it reuses the block."""
        if self._copies is None:
            return pixels
        with torch.cuda.stream(self._copies):
            uploaded = pixels.to(self.device, non_blocking=True)
            batch.copied = self._copies.record_event()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        uploaded.record_stream(computing)
        return uploaded

    def _fill(self, workers: "_Workers", batch: CutBatch, slots: list[int]) -> None:
        """Decode the images of some slots of a batch and cut their crops into its blocks."""
        numbers = batch.samples[slots]
        images = [self._image(workers, batch, slot) for slot in slots]
        with self.telemetry.timed("crop_s"):
            boxes = crop_boxes(
                self.crops,
                seed=self.order.seed,
                epoch=batch.epoch,
                sample=numbers,
                width_px=[image.shape[1] for image in images],
                height_px=[image.shape[0] for image in images],
            )
            for slot, image, box in zip(slots, images, boxes, strict=True):
                cut_crops(image, box, [block[:, slot] for block in batch.blocks])

    def _image(self, workers: "_Workers", batch: CutBatch, slot: int) -> NDArray[np.uint8]:
        image = self._decode(workers.prefetcher.take(batch.epoch, int(batch.samples[slot])))
        if isinstance(image, BadSample):
            return self._substitute(workers, batch, slot, image)
        return image

    def _decode(self, sample: RawSample | BadSample) -> NDArray[np.uint8] | BadSample:
        if isinstance(sample, BadSample):
            return sample
        limits = {"max_pixels": self.config.max_image_pixels, "max_bytes": len(sample.data)}
        try:
            with self.telemetry.timed("decode_s"):
                return decode_rgb(sample.data, **limits)
        except SampleError as error:
            return BadSample(sample.number, sample.key, sample.shard, str(error))

    def _substitute(
        self, workers: "_Workers", batch: CutBatch, slot: int, bad: BadSample
    ) -> NDArray[np.uint8]:
        """The first good sample of the order's replacements; the bad one is remembered."""
        per_lane = self.order.global_batch // self.order.lanes
        lane_of_rank, place_of_step = divmod(slot, per_lane)
        lane = self.order.lanes_of(self.rank, self.world_size)[lane_of_rank]
        place = batch.step * per_lane + place_of_step
        for number in self.order.replacements(batch.epoch, lane, place):
            if number in self.quarantine:
                continue
            image = self._decode(workers.reader.read(number, number)[0])
            if not isinstance(image, BadSample):
                self.telemetry.add(substituted_samples=1)
                self.quarantine.add(bad, epoch=batch.epoch, step=batch.step, substitute=number)
                return image
            self.quarantine.note(number)
        raise DataError(
            f"no sample of lane {lane} can be used; the last was {bad.key or bad.number} of "
            f"{bad.shard}: {bad.reason}; run `python -m shard_tools verify {self.config.dataset}`"
        )


@dataclass(frozen=True)
class _Workers:
    """The threads of one iteration."""

    reader: SampleReader
    prefetcher: Prefetcher
    threads: ThreadPoolExecutor

    def stop(self) -> None:
        """End them now; more than once is no error."""
        self.reader.close()
        self.threads.shutdown(wait=True, cancel_futures=True)
        self.prefetcher.close()


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _check_unchanged(mine: dict[str, Any], state: dict[str, Any]) -> None:
    for name, value in mine.items():
        if value != state[name]:
            section = "train" if name == "seed" else "loader"
            raise UsageError(
                f"{section}.{name} is {value}, but the checkpoint was written with {state[name]}; "
                f"set it back, or start a new run under another checkpoint.run"
            )


def mean_sample_bytes(snapshot: Snapshot) -> float:
    """Bytes of shard a kept sample: what a read of many costs, each."""
    return float(np.sum(snapshot.tar_bytes)) / max(1, snapshot.num_kept)
