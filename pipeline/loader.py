"""Batches in order, handed to the device; the state of a run's data; a sequential mode for
evaluation.

A batch is a pure function of (snapshot, seed, epoch, step, rank, world size): fetching and
decoding are spread over threads, but who does what never shows in the result. A thread decodes an
image once and cuts all its crops into the batch's uint8 blocks; colour, blur and normalisation
follow in batches on the device. Threads suffice because decoding, resizing and reading release the
GIL, and they hand over without copying.

A sample that cannot be used is replaced by the next good one of its lane's window, cropped with
the seed of the slot it fills, and entered in the quarantine, which the checkpoint carries.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
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
from pipeline.decode import decode_rgb
from pipeline.errors import DataError, SampleError, UsageError
from pipeline.fetch import BadSample, Prefetcher, RawSample, SampleReader, pieces_in_order
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.order import SampleOrder, check_world_size, resolve_sizes
from pipeline.store import Store, open_store
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
    max_bad_samples: Annotated[int, Ge(0)] = 1000  # substituted, a rank, before the run fails


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


class MultiCropLoader:
    """Endless batches of multi-crops from the position of its state on.

    Args:
        seed: of order, crops and colour.
        local_world_size: ranks that share this machine's cores.
        device: where the crops of a batch end up.
        epochs: stop after so many; None never stops.

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
        self.quarantine: list[dict[str, Any]] = []
        self._epoch, self._step = 0, 0
        self._lock = threading.Lock()
        self._prefetcher: Prefetcher | None = None
        self._threads: ThreadPoolExecutor | None = None
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
        self._start()
        try:
            while True:
                while free and (position := next(positions, None)) is not None:
                    pending.append(self._submit(*position, free.pop()))
                if not pending:
                    return
                batch = pending.popleft()
                with self.telemetry.timed("data_wait_s"):
                    for job in batch.jobs:
                        job.result()
                self._epoch, self._step = self._behind(batch.epoch, batch.step)
                yield batch
                free.append(batch.blocks)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the threads; nothing is left behind."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

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

    def _start(self) -> None:
        self._reader = SampleReader(self.store, self.snapshot, self.telemetry)
        self._prefetcher = Prefetcher(
            self._reader,
            pieces_in_order(self._windows(self._epoch, self._step), self.order.chunk),
            ahead_bytes=self._ahead_bytes,
            sample_bytes=mean_sample_bytes(self.snapshot),
            threads=_FETCH_THREADS,
        )
        self._threads = ThreadPoolExecutor(self._num_threads(), thread_name_prefix="decode")

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

    def _submit(self, epoch: int, step: int, blocks: list[torch.Tensor]) -> CutBatch:
        assert self._threads is not None
        samples = self.order.batch(epoch, step, self.rank, self.world_size)
        pending = CutBatch(epoch, step, samples, blocks)
        parts = min(len(samples), self._num_threads() * _JOBS_PER_THREAD)
        for slots in np.array_split(np.arange(len(samples)), parts):
            pending.jobs.append(self._threads.submit(self._fill, pending, slots.tolist()))
        return pending

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
            pixels = block.flatten(0, 1).to(self.device, non_blocking=True)
            crops.append(augment(pixels, params, self.augmentation))
            first += count
        if self.device.type == "cuda":  # the blocks will be written again
            torch.cuda.current_stream(self.device).synchronize()
        return crops

    def _fill(self, pending: CutBatch, slots: list[int]) -> None:
        """Decode the images of some slots of a batch and cut their crops into its blocks."""
        numbers = pending.samples[slots]
        images = [
            self._image(pending.epoch, pending.step, slot, int(number))
            for slot, number in zip(slots, numbers, strict=True)
        ]
        with self.telemetry.timed("crop_s"):
            boxes = crop_boxes(
                self.crops,
                seed=self.order.seed,
                epoch=pending.epoch,
                sample=numbers,
                width_px=[image.shape[1] for image in images],
                height_px=[image.shape[0] for image in images],
            )
            for slot, image, box in zip(slots, images, boxes, strict=True):
                cut_crops(image, box, [block[:, slot] for block in pending.blocks])

    def _image(self, epoch: int, step: int, slot: int, number: int) -> NDArray[np.uint8]:
        assert self._prefetcher is not None
        sample = self._prefetcher.take(epoch, number)
        image = self._decode(sample)
        if isinstance(image, BadSample):
            return self._substitute(epoch, step, slot, image)
        return image

    def _decode(self, sample: RawSample | BadSample) -> NDArray[np.uint8] | BadSample:
        if isinstance(sample, BadSample):
            return sample
        try:
            with self.telemetry.timed("decode_s"):
                return decode_rgb(sample.data)
        except SampleError as error:
            return BadSample(sample.number, sample.key, sample.shard, str(error))

    def _substitute(self, epoch: int, step: int, slot: int, bad: BadSample) -> NDArray[np.uint8]:
        """The next good sample of the window, round its end; the bad one is remembered."""
        per_lane = self.order.global_batch // self.order.lanes
        lane = self.order.lanes_of(self.rank, self.world_size).start + slot // per_lane
        window = self.order.window_of(epoch, lane, step * per_lane).tolist()
        place = window.index(bad.number) if bad.number in window else 0
        for number in window[place + 1 :] + window[:place]:
            image = self._decode(self._reader.read(number, number)[0])
            if not isinstance(image, BadSample):
                self._remember(epoch, step, bad, number)
                return image
        raise DataError(
            f"no sample of a whole window can be used; the last was {bad.key or bad.number} of "
            f"{bad.shard}: {bad.reason}; run `python -m shard_tools verify {self.config.dataset}`"
        )

    def _remember(self, epoch: int, step: int, bad: BadSample, substitute: int) -> None:
        self.telemetry.add(substituted_samples=1)
        entry = {"epoch": epoch, "step": step, "substitute": substitute, **asdict(bad)}
        with self._lock:
            self.quarantine.append(entry)
            count = len(self.quarantine)
        if count > self.config.max_bad_samples:
            listed = "\n  ".join(
                f"{e['key'] or e['number']} of {e['shard']}: {e['reason']}"
                for e in self.quarantine[:20]
            )
            raise DataError(
                f"{count} samples of {self.config.dataset} could not be used, allowed are "
                f"loader.max_bad_samples={self.config.max_bad_samples}; run `python -m shard_tools "
                f"verify {self.config.dataset}`. The first of them:\n  {listed}"
            )


def _check_unchanged(mine: dict[str, Any], state: dict[str, Any]) -> None:
    for name, value in mine.items():
        if value != state[name]:
            section = "train" if name == "seed" else "loader"
            raise UsageError(
                f"{section}.{name} is {value}, but the checkpoint was written with {state[name]}; "
                f"set it back, or start a new run under another checkpoint.run"
            )


@dataclass(frozen=True)
class EvaluationBatch:
    """Consecutive samples: numbers int64 [B], labels, normalised float32 images [B, 3, s, s]."""

    samples: Int64
    labels: list[str | None]
    images: torch.Tensor


class SequentialLoader:
    """Every kept row once, in the order of the shards, the last batch ragged; for evaluation.

    An image is resized so that its shorter side is size_px * 256 / 224 and its centre is cut out
    (Resize 256, CenterCrop 224 of the reference's eval_linear.py). Chunks are dealt to the ranks
    in turn. Samples that cannot be used are left out and counted in `telemetry` as `bad_samples`.
    """

    def __init__(
        self,
        config: LoaderConfig,
        augmentation: AugmentConfig,
        *,
        size_px: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.augmentation = augmentation
        self.size_px = size_px
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.telemetry = Telemetry()
        self.store: Store = open_store(config.dataset)
        self.snapshot = read_snapshot(self.store, config.version or None)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        reader = SampleReader(self.store, self.snapshot, self.telemetry)
        with ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="evaluate") as threads:
            ahead: deque[Future[EvaluationBatch | None]] = deque()
            for first in self._firsts():
                ahead.append(threads.submit(self._load, reader, first))
                if len(ahead) > 2 * _FETCH_THREADS and (batch := ahead.popleft().result()):
                    yield batch
            for future in ahead:
                if batch := future.result():
                    yield batch

    def _firsts(self) -> range:
        stride = self.batch_size * self.world_size
        return range(self.rank * self.batch_size, self.snapshot.num_kept, stride)

    def _load(self, reader: SampleReader, first: int) -> EvaluationBatch | None:
        last = min(first + self.batch_size, self.snapshot.num_kept) - 1
        numbers, labels, images = [], [], []
        for sample in reader.read(first, last):
            if isinstance(sample, RawSample):
                try:
                    image = decode_rgb(sample.data)
                except SampleError:
                    pass
                else:
                    numbers.append(sample.number)
                    labels.append(sample.label)
                    images.append(centre_crop(image, self.size_px))
        self.telemetry.add(bad_samples=last + 1 - first - len(numbers))
        if not images:
            return None
        mean = torch.tensor(self.augmentation.mean).view(3, 1, 1)
        std = torch.tensor(self.augmentation.std).view(3, 1, 1)
        pixels = (torch.stack(images).float() / 255 - mean) / std
        return EvaluationBatch(np.array(numbers, dtype=np.int64), labels, pixels)


def centre_crop(image: NDArray[np.uint8], size_px: int) -> torch.Tensor:
    """Shorter side to size_px * 256 / 224, then the centre: uint8 [3, size_px, size_px]."""
    height, width = image.shape[:2]
    side = min(height, width) * 224 / 256
    top, left = round((height - side) / 2), round((width - side) / 2)
    box = np.array([[top, left, round(side) or 1, round(side) or 1]], dtype=np.int32)
    out = torch.empty((1, size_px, size_px, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    cut_crops(image, box, [out])
    return out[0]


def mean_sample_bytes(snapshot: Snapshot) -> float:
    """Bytes of shard a kept sample: what a read of many costs, each."""
    return float(np.sum(snapshot.tar_bytes)) / max(1, snapshot.num_kept)
