"""Batches in order, handed to the device, and the state of a run's data.

A batch is a pure function of (snapshots, seed, epoch, step, rank, world size): who fetches and
decodes what never shows in the result. The pixels are the work of worker processes
(pipeline.workers), each of which fills its rows of every batch in a ring of shared memory: threads
would take turns at the interpreter lock with the training loop. Here batches are taken over in
order, copied to the device beside what it computes, and given their colours there. A run without a
device has the workers do the colours, too, to the same bits.

A sample that cannot be used is replaced by the next good one of its lane and entered in the
quarantine, which the checkpoint carries.

Memory of a rank: every worker some 250 MB of code; all together `loader.budget_bytes` at most of
encoded samples, measured in bytes of shards, to which bodies that have just arrived and are still
being copied out may add a third; the ring, prefetch_batches + 1 batches of uint8 crops; and 128 MiB
at most of shards' indexes for every worker and source. `describe` says what samples and crops come
to. Without a device there are float32 crops, too: two batches between the training loop and here
(pipeline.lending).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count, takewhile
from time import perf_counter
from types import TracebackType
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from pipeline.augment import AugmentConfig, draw_groups
from pipeline.augment_device import augment
from pipeline.augment_host import normalize_into
from pipeline.batches import DataSet, Replaced, Share, mean_sample_bytes, mix_data_sets
from pipeline.cores import usable_cores
from pipeline.crops import CropsConfig, block_shapes
from pipeline.decode import MAX_PIXELS
from pipeline.errors import StoppedWaiting, UsageError
from pipeline.fetch import FetchConfig
from pipeline.lending import Lender
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.messages import Done
from pipeline.mixture import Mixture, Slots
from pipeline.order import OrderSizes, check_world_size, resolve_sizes
from pipeline.quarantine import Quarantine
from pipeline.ring import Ring, RingLayout
from pipeline.state import State, check_form, check_settings
from pipeline.store import open_store
from pipeline.tars import names_tars
from pipeline.telemetry import Telemetry
from pipeline.upload import Upload, Uploader
from pipeline.workers import Workers

Int64 = NDArray[np.int64]

_THREADS_PER_WORKER = 8  # at most, unless set: what one interpreter keeps busy


@dataclass(frozen=True, kw_only=True)
class MixPart:
    """One of several data sets, and its part in the mixture."""

    dataset: str
    weight: Annotated[float, Gt(0)] = 1.0  # in proportion to the others'
    version: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Section `loader`: which data, in which order, with which means."""

    dataset: str = ""  # prefix of a packed data set: s3://bucket/prefix, file:///path or a path;
    # or plain WebDataset tars, which pipeline.streaming reads: s3://bucket/{000000..000999}.tar
    version: Annotated[int, Ge(0)] = 0  # of the snapshot; 0 is the latest at first launch
    mix: tuple[MixPart, ...] = ()  # several data sets, in place of `dataset`
    global_batch: Annotated[int, Gt(0)] = 4096  # images a step over all ranks
    lanes: Annotated[int, Ge(0)] = 0  # 0: chosen at first launch, as are chunk and window
    chunk: Annotated[int, Ge(0)] = 0  # samples of one read
    window: Annotated[int, Ge(0)] = 0  # chunks mixed inside a lane
    workers: Annotated[int, Ge(-1)] = -1  # processes a rank; -1: by its cores; 0: none
    threads: Annotated[int, Ge(0)] = 0  # decoding, a worker; 0: by the cores
    budget_bytes: Annotated[int, Gt(0)] = 2 << 30  # encoded samples in flight or held, a rank
    prefetch_batches: Annotated[int, Gt(0)] = 2
    max_bad_samples: Annotated[int, Ge(0)] = 1000  # distinct ones, before the run fails
    max_image_pixels: Annotated[int, Gt(0)] = MAX_PIXELS  # larger images count as bad
    decode_timeout_s: Annotated[float, Gt(0)] = 20.0  # for one image, before its worker is killed
    epoch_samples: Annotated[int, Ge(0)] = 0  # of tars that are streamed, what counts as an epoch
    shuffle_samples: Annotated[int, Gt(0)] = 2000  # of these, held in memory to be shuffled, a rank

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.mix):
            raise ValueError("set dataset to a packed data set's prefix, or mix to several of them")
        if self.mix and self.version:
            raise ValueError("version is that of dataset; give one to each table of mix instead")

    @property
    def parts(self) -> tuple[MixPart, ...]:
        """The data sets of the run, one or several."""
        return self.mix or (MixPart(dataset=self.dataset, version=self.version),)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    samples: int64 [B], numbers over all data sets, as ordered (before any substitution).
    crops: one float32 tensor a resolution on the device, [count * B, 3, s, s], crop-major,
    channels last, normalised.
    """

    epoch: int
    step: int
    samples: Int64
    crops: list[torch.Tensor]


@dataclass(frozen=True)
class CutBatch:
    """A batch before its colours, on the host.

    blocks: uint8 [count, B, s, s, 3], one a resolution, in the memory that workers fill; asking for
    the next batch gives them back.
    """

    epoch: int
    step: int
    samples: Int64
    blocks: list[NDArray[np.uint8]]


@dataclass(frozen=True)
class _Taken:
    """A batch that the workers have filled; `blocks` are the ring's memory."""

    epoch: int
    step: int
    slots: Slots
    blocks: list[NDArray[np.uint8]]
    replaced: list[Replaced]

    @property
    def samples(self) -> Int64:
        return self.slots.global_numbers

    def batch(self, crops: list[torch.Tensor]) -> Batch:
        return Batch(self.epoch, self.step, self.samples, crops)


class MultiCropLoader:
    """Endless batches of multi-crops from the position of its state on.

    Args:
        fetch: how workers read from the store.
        seed: of order, crops and colour.
        local_world_size: ranks that share this rank's cores, itself included.
        device: where the crops of a batch end up.
        epochs: stop after so many; None never stops.
        state, quarantine: where to go on, and the bad samples known by then, of a checkpoint. Of
            these, what killed or hung its decoder is never decoded; the others are tried again,
            as they are in a run that was not interrupted.
        is_stopped: asked while a batch is waited for; when it is true the iteration ends there.
        record_spans: keep every timed block for `telemetry.take_spans`.

    Use it as a context manager, or call `close`: it owns processes. They start when iteration
    begins. After a batch was yielded, `state_dict` is the position behind that batch.

    `telemetry` gets, beside what workers count: `data_wait_s`, how long the training loop waited,
    which is `wait_fetch_s` until the last sample that workers waited for had come, `wait_decode_s`
    until all crops were cut, and `wait_handover_s`; `transfer_s`, `augment_s`, `worker_restarts`.

    Raises UsageError for sizes that do not fit, ManifestError without a sealed data set, DataError
    when more than `max_bad_samples` had to be replaced or a worker dies again and again. Of several
    ranks, the trainer counts what all have replaced; left to itself, one fails a batch late.
    """

    def __init__(
        self,
        config: LoaderConfig,
        crops: CropsConfig,
        augmentation: AugmentConfig,
        *,
        fetch: FetchConfig = FetchConfig(),  # noqa: B008 - frozen
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        device: torch.device | str = "cpu",
        epochs: int | None = None,
        state: State | None = None,
        quarantine: Iterable[Mapping[str, Any]] = (),
        is_stopped: Callable[[], bool] = lambda: False,
        record_spans: bool = False,
    ) -> None:
        self.config = config
        self.crops = crops
        self.augmentation = augmentation
        self.fetch = fetch
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size
        self.device = torch.device(device)
        self.epochs = epochs
        self.telemetry = Telemetry(record_spans=record_spans)
        self._is_stopped = is_stopped
        _refuse_tars(config)
        if state is not None:
            _check_asked(config, seed, state)
        self.snapshots = _read_snapshots(config, state)
        self.data_sets, self.mixture = self._resolve_order(seed, state)
        self.lanes = self.mixture.lanes_of(rank, world_size)
        self._ahead_bytes = self._in_flight_bytes()
        self.quarantine = Quarantine(
            ", ".join(each.url for each in self.data_sets),
            limit=config.max_bad_samples,
            entries=quarantine,
            world_size=world_size,
        )
        self._lender = Lender()
        self._step = 0  # the next, counted from the beginning of the run
        self._means = ExitStack()  # what the present iteration has open
        if state is not None:
            self.load_state_dict(state)

    @property
    def batch_size(self) -> int:
        """Images a step of this rank."""
        return self.mixture.global_batch // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.mixture.num_steps

    @property
    def num_samples(self) -> int:
        """Of all data sets."""
        return self.mixture.num_samples

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last yielded batch, and all that the order depends on."""
        epoch, step = divmod(self._step, self.steps_per_epoch)
        return {
            "seed": self.mixture.seed,
            "epoch": epoch,
            "step": step,
            "global_batch": self.mixture.global_batch,
            "lanes": self.mixture.lanes,
            "sources": [
                {
                    "dataset": each.url,
                    "attempt": snapshot.attempt,
                    "version": each.version,
                    "num_samples": snapshot.num_kept,
                    "chunk": each.chunk,
                    "window": each.window,
                    "weight": each.weight,
                }
                for each, snapshot in zip(self.data_sets, self.snapshots, strict=True)
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Go to a saved position. Raises UsageError if the configuration contradicts the state."""
        check_form(state, len(self.data_sets))
        check_settings(self.state_dict(), state)
        self._step = int(state["epoch"]) * self.steps_per_epoch + int(state["step"])

    def describe(self) -> str:
        """What is loaded, and with which means, in a line for the log."""
        sources = ", ".join(
            f"{snapshot.num_kept} images of {each.url} (version {each.version}, chunk "
            f"{each.chunk}, window {each.window}"
            f"{f', weight {each.weight:g}' if self.config.mix else ''})"
            for each, snapshot in zip(self.data_sets, self.snapshots, strict=True)
        )
        workers, threads = self._num_workers()
        means = f"{workers} worker(s)" if workers else "no worker processes,"
        return (
            f"{sources}; lanes {self.mixture.lanes}, {self.world_size} rank(s) of "
            f"{self.batch_size} images, each with {means} of {threads} thread(s), at most "
            f"{self._ahead_bytes / 2**20:.0f} MiB of samples in flight and "
            f"{self._layout().size_bytes / 2**20:.0f} MiB of crops"
        )

    def __iter__(self) -> Iterator[Batch]:
        on_cuda = self.device.type == "cuda"
        with suppress(StoppedWaiting):
            yield from self._iterate_cuda() if on_cuda else self._iterate_host()

    def cut_batches(self) -> Iterator[CutBatch]:
        """The batches before colour, on the host; asking for the next gives one's blocks back."""
        with suppress(StoppedWaiting), self._working(colour=False) as (workers, ring):
            for step in self._steps():
                taken = self._take_over(workers, ring, step)
                self._hand_out(taken)
                yield CutBatch(taken.epoch, taken.step, taken.samples, taken.blocks)
                self._allow(workers, step + 1 + ring.layout.num_slots)

    def close(self) -> None:
        """End the workers; nothing is left behind."""
        self._means.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _iterate_host(self) -> Iterator[Batch]:
        """Workers give the colours, too; what is left is normalising."""
        with self._working(colour=True) as (workers, ring):
            for step in self._steps():
                taken = self._take_over(workers, ring, step)
                with self.telemetry.timed("augment_s"):
                    crops = [self._normalize(block) for block in taken.blocks]
                self._hand_out(taken)
                self._allow(workers, step + 1 + ring.layout.num_slots)
                yield taken.batch(crops)

    def _iterate_cuda(self) -> Iterator[Batch]:
        """The next batch's copy begins before a batch is handed out, if it is there by then."""
        with self._working(colour=False) as (workers, ring):
            uploader = Uploader(self.device, ring.slots, self.telemetry)
            self._means.enter_context(closing(uploader))
            ahead: deque[tuple[_Taken, Upload]] = deque()
            for step in self._steps():
                if not ahead:
                    ahead.append(self._bring(workers, ring, uploader, step))
                taken, upload = ahead.popleft()
                if workers.is_done(step + 1):
                    ahead.append(self._bring(workers, ring, uploader, step + 1))
                with self.telemetry.timed("augment_s"):
                    crops = self._augment(taken.slots, upload.use())
                self._hand_out(taken)
                yield taken.batch(crops)

    def _bring(
        self, workers: Workers, ring: Ring, uploader: Uploader, step: int
    ) -> "tuple[_Taken, Upload]":
        """Take a batch over and begin to copy it; slots are free once no copy reads them."""
        num_slots = ring.layout.num_slots
        self._allow(workers, step - uploader.num_busy(at_most=num_slots - 1) + num_slots)
        taken = self._take_over(workers, ring, step)
        return taken, uploader.upload(taken.blocks)

    def _allow(self, workers: Workers, limit: int) -> None:
        """Let the steps before `limit` be filled, those of the run."""
        workers.allow(limit if self._end is None else min(limit, self._end))

    @property
    def _end(self) -> int | None:
        """The step after the last of the run; None without one."""
        return None if self.epochs is None else self.epochs * self.steps_per_epoch

    def _steps(self) -> Iterator[int]:
        """From the position on, counted from the beginning of the run."""
        return takewhile(lambda step: self._end is None or step < self._end, count(self._step))

    @contextmanager
    def _working(self, *, colour: bool) -> Iterator[tuple[Workers, Ring]]:
        """Workers that fill the batches from our position on, in slots that are all free."""
        self.close()
        with ExitStack() as self._means:
            ring = self._means.enter_context(closing(Ring.create(self._layout())))
            workers = Workers(
                self._shares(colour=colour),
                ring,
                step=self._step,
                in_process=self._num_workers()[0] == 0,
                decode_timeout_s=self.config.decode_timeout_s,
                telemetry=self.telemetry,
                rank=self.rank,
                num_steps=self.steps_per_epoch,
            )
            self._means.enter_context(closing(workers))
            self._allow(workers, self._step + ring.layout.num_slots)
            yield workers, ring

    def _take_over(self, workers: Workers, ring: Ring, step: int) -> "_Taken":
        """Wait until a batch is filled."""
        start = perf_counter()
        done = workers.wait(step, self._is_stopped)
        self._account(start, perf_counter(), done)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        slots = self.mixture.slots(epoch, step_of_epoch, self.lanes)
        blocks = ring.blocks(step % ring.layout.num_slots)
        replaced = [each for worker in done for each in worker.replaced]
        return _Taken(epoch, step_of_epoch, slots, blocks, replaced)

    def _account(self, start: float, end: float, done: Sequence[Done]) -> None:
        """Split the time we waited at the moments when bytes and crops were complete."""
        arrived = min(max(start, *(each.arrived_s for each in done)), end)
        cut = min(max(arrived, *(each.done_s for each in done)), end)
        self.telemetry.record("data_wait_s", start, end)
        self.telemetry.add(
            wait_fetch_s=arrived - start, wait_decode_s=cut - arrived, wait_handover_s=end - cut
        )

    def _hand_out(self, taken: "_Taken") -> None:
        """A batch goes to the training loop now, and with it what was wrong with its samples."""
        self.quarantine.add_batch(taken.replaced, epoch=taken.epoch, step=taken.step)
        self._step = taken.epoch * self.steps_per_epoch + taken.step + 1

    def _normalize(self, block: NDArray[np.uint8]) -> torch.Tensor:
        pixels = self._lender.lend(block.shape)
        normalize_into(block, pixels, self.augmentation)
        return torch.from_numpy(pixels).flatten(0, 1).permute(0, 3, 1, 2)

    def _augment(self, slots: Slots, groups: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        params = draw_groups(
            self.augmentation,
            [len(pixels) // self.batch_size for pixels in groups],
            seed=self.mixture.seed,
            epoch=slots.epoch,
            samples=slots.global_numbers,
        )
        return [
            augment(pixels, each, self.augmentation)
            for pixels, each in zip(groups, params, strict=True)
        ]

    def _resolve_order(self, seed: int, state: State | None) -> tuple[tuple[DataSet, ...], Mixture]:
        """The constants of the configuration; where it leaves a choice, those of the state."""
        lanes = self.config.lanes or (state["lanes"] if state else 0)
        data_sets = []
        for number, (part, snapshot) in enumerate(
            zip(self.config.parts, self.snapshots, strict=True)
        ):
            sizes = self._resolve_sizes(snapshot, lanes, state["sources"][number] if state else {})
            lanes = sizes.lanes
            data_sets.append(
                DataSet(
                    url=part.dataset,
                    version=snapshot.version,
                    chunk=sizes.chunk,
                    window=sizes.window,
                    weight=part.weight,
                )
            )
        check_world_size(lanes, self.world_size)
        mixture = mix_data_sets(
            data_sets,
            self.snapshots,
            global_batch=self.config.global_batch,
            lanes=lanes,
            seed=seed,
        )
        return tuple(data_sets), mixture

    def _resolve_sizes(self, snapshot: Snapshot, lanes: int, chosen: State) -> OrderSizes:
        config = self.config
        return resolve_sizes(
            global_batch=config.global_batch,
            world_size=self.world_size,
            mean_sample_bytes=mean_sample_bytes(snapshot),
            num_samples=snapshot.num_kept,
            lanes=lanes,
            chunk=config.chunk or chosen.get("chunk", 0),
            window=config.window or chosen.get("window", 0),
            budget_bytes=config.budget_bytes // len(config.parts),
        )

    def _in_flight_bytes(self) -> int:
        """What this rank reads ahead: one chunk more than a window, of each source and lane."""
        chunk_bytes = [
            (each.window + 1) * each.chunk * mean_sample_bytes(snapshot)
            for each, snapshot in zip(self.data_sets, self.snapshots, strict=True)
        ]
        needed = round(len(self.lanes) * sum(chunk_bytes))
        if needed > self.config.budget_bytes:
            raise UsageError(
                f"the order keeps {needed >> 20} MiB of samples in flight on every rank, more than "
                f"the {self.config.budget_bytes >> 20} MiB of loader.budget_bytes; raise it, or "
                f"lower loader.window or loader.chunk, or start more ranks"
            )
        return needed

    def _num_workers(self) -> tuple[int, int]:
        """Processes, and threads of each: all the cores that this rank has to itself."""
        cores = max(1, usable_cores() // self.local_world_size)
        workers = self.config.workers
        if workers < 0:
            workers = -(-cores // _THREADS_PER_WORKER)
        workers = min(workers, len(self.lanes))
        return workers, self.config.threads or max(1, cores // max(1, workers))

    def _layout(self) -> RingLayout:
        workers, threads = self._num_workers()
        return RingLayout(
            shapes=tuple(block_shapes(self.crops, self.batch_size)),
            num_slots=self.config.prefetch_batches + 1,
            num_workers=max(1, workers),
            threads=threads,
        )

    def _shares(self, *, colour: bool) -> list[Share]:
        """Every worker's part: consecutive lanes, and its part of what a rank may use."""
        workers, threads = self._num_workers()
        bounds = np.linspace(self.lanes.start, self.lanes.stop, max(1, workers) + 1).astype(int)
        per_lane = self.mixture.global_batch // self.mixture.lanes
        everything = Share(
            data_sets=self.data_sets,
            global_batch=self.mixture.global_batch,
            all_lanes=self.mixture.lanes,
            seed=self.mixture.seed,
            epochs=self.epochs,
            lanes=self.lanes,
            first_row=0,
            crops=self.crops,
            augmentation=self.augmentation if colour else None,
            fetch=self.fetch,
            ahead_bytes=self._ahead_bytes,
            threads=threads,
            max_image_pixels=self.config.max_image_pixels,
            record_spans=self.telemetry.record_spans,
            known=self.quarantine.deadly(),
        )
        return [
            replace(
                everything,
                lanes=range(start, stop),
                first_row=(start - self.lanes.start) * per_lane,
                ahead_bytes=self._ahead_bytes * (stop - start) // len(self.lanes),
                fetch=replace(self.fetch, requests=max(1, self.fetch.requests // max(1, workers))),
            )
            for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]


def _refuse_tars(config: LoaderConfig) -> None:
    for part in config.parts:
        if names_tars(part.dataset):
            raise UsageError(
                f"{part.dataset} names tars without an index, which can only be trained on as "
                "loader.dataset, with what that loses; index them in place for all else: "
                "python -m shard_tools adopt"
            )


def _read_snapshots(config: LoaderConfig, state: State | None) -> list[Snapshot]:
    """Those of the state; of a new run the configured or the latest."""
    versions = [part.version or None for part in config.parts]
    if state is not None:
        versions = [source["version"] for source in state["sources"]]
    stores = [open_store(part.dataset) for part in config.parts]
    return [read_snapshot(store, version) for store, version in zip(stores, versions, strict=True)]


def _check_asked(config: LoaderConfig, seed: int, state: State) -> None:
    """Whatever the configuration does not leave open must be what the state says."""
    check_form(state, len(config.parts))
    mine = {name: getattr(config, name) for name in ("global_batch", "lanes")}
    sources: list[dict[str, float]] = [
        {"version": part.version, "chunk": config.chunk, "window": config.window}
        for part in config.parts
    ]
    if config.mix:
        for part, source in zip(config.parts, sources, strict=True):
            source["weight"] = part.weight
    check_settings({"seed": seed, **mine, "sources": sources}, state)
