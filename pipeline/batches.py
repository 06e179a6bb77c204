"""A worker's share of every batch: samples of its lanes in, rows of crops out.

Called by pipeline.worker, in a process of its own or in a thread of the training process: one way
through, whatever `loader.workers` says. A batch is lane-major, so the lanes of a worker are
consecutive rows of it. An image is decoded once and all its crops are cut straight into the
batch's memory; on a run without a device they get their colours here, too.

A sample that cannot be used is replaced by the next good one of its lane (the rest of its window
first), cropped and coloured with the seed of the slot it fills: a pure function of the data, as
everything here. Nothing here imports torch.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from time import perf_counter
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline import augment_host, resize
from pipeline.augment import AugmentConfig, draw_groups
from pipeline.augment_host import augment_pixels
from pipeline.crops import CropsConfig, crop_boxes, decode_crops
from pipeline.decode import ImageHeader, guard_header
from pipeline.errors import DataError, SampleError
from pipeline.fetch import FetchConfig, Prefetcher, pieces_in_order
from pipeline.manifest import Snapshot, read_snapshot
from pipeline.mixture import Mixture, Slots, Source, Window, mix_sources
from pipeline.ranges import RangeReader
from pipeline.ring import Pulse, UInt8
from pipeline.samples import BadSample, RawSample, SampleReader, resolve_url
from pipeline.store import Store, open_store
from pipeline.telemetry import Telemetry

_ROWS_PER_JOB = 16  # at most: boxes of so many are drawn at once, and so many samples wait in hand


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A source of the run as it was resolved: version of the snapshot, sizes of its order."""

    url: str
    version: int
    chunk: int
    window: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Share:
    """All that the rows of one worker depend on, and with which means it makes them.

    lanes: the worker's own, the first of them filling row `first_row` of the rank's batch. epochs:
    after how many the run ends, if it does. augmentation: of the colours to be given here, None to
    leave them out. known: samples that killed or hung their decoder, by global number; they are
    not read. All others are, whatever was wrong with them before.
    """

    data_sets: tuple[DataSet, ...]
    global_batch: int
    all_lanes: int
    seed: int
    epochs: int | None
    lanes: range
    first_row: int
    crops: CropsConfig
    augmentation: AugmentConfig | None
    fetch: FetchConfig
    ahead_bytes: int
    threads: int
    max_image_pixels: int
    record_spans: bool = False
    known: tuple[BadSample, ...] = ()


class Replaced(NamedTuple):
    """A sample that could not be used, and what stands in for it; global numbers."""

    bad: BadSample
    substitute: int


class Filled(NamedTuple):
    """What became of some rows. Times of time.perf_counter, one clock for a machine."""

    replaced: list[Replaced]
    arrived_s: float  # of the last sample that had to be waited for; -inf if none had
    done_s: float


class _Image(NamedTuple):
    """A sample whose header is harmless."""

    sample: RawSample
    header: ImageHeader


def open_data_sets(data_sets: Sequence[DataSet]) -> list[tuple[Store, Snapshot]]:
    """Their stores and snapshots. Raises StoreError or ManifestError."""
    stores = [open_store(each.url) for each in data_sets]
    return [
        (store, read_snapshot(store, each.version))
        for store, each in zip(stores, data_sets, strict=True)
    ]


def mix_data_sets(
    data_sets: Sequence[DataSet],
    snapshots: Sequence[Snapshot],
    *,
    global_batch: int,
    lanes: int,
    seed: int,
) -> Mixture:
    """The order of a run over its data sets. Raises UsageError for sizes that do not fit."""
    sources = [
        Source(each.url, snapshot.num_kept, each.chunk, each.window, each.weight)
        for each, snapshot in zip(data_sets, snapshots, strict=True)
    ]
    return mix_sources(sources, global_batch=global_batch, lanes=lanes, seed=seed)


class BatchFiller:
    """Fills a worker's rows of one batch after the other, with threads of its own.

    `start` says from where on. Steps are counted from the beginning of the run. A context manager:
    it owns threads and connections.

    Args:
        pulse: where to show which samples are being decoded.
    """

    def __init__(self, share: Share, pulse: Pulse, telemetry: Telemetry) -> None:
        self.share = share
        self._pulse = pulse
        self._telemetry = telemetry
        self._opened = open_data_sets(share.data_sets)
        self.mixture = mix_data_sets(
            share.data_sets,
            [snapshot for _, snapshot in self._opened],
            global_batch=share.global_batch,
            lanes=share.all_lanes,
            seed=share.seed,
        )
        ranges = RangeReader(share.fetch, telemetry)
        self._readers = [
            SampleReader(store, snapshot, telemetry, ranges=ranges)
            for store, snapshot in self._opened
        ]
        self._known = {bad.number: bad for bad in share.known}
        self._failed: set[tuple[int, int]] = set()  # as substitutes: epoch, number; not again in it
        self._prefetcher: Prefetcher | None = None
        self._threads = threading.local()
        numbers = count()
        self._pool = ThreadPoolExecutor(
            share.threads,
            thread_name_prefix="decode",
            initializer=lambda: setattr(self._threads, "number", next(numbers)),
        )

    def condemn(self, bad: BadSample) -> None:
        """Never decode a sample, told by its global number; to be called before `start`."""
        self._known[bad.number] = bad

    def start(self, step: int) -> None:
        """Begin to read what the batches from this step on need."""
        resize.warm_up()  # not while a sample is in hand, which looks as if it hung
        if self.share.augmentation is not None:
            augment_host.warm_up()
        self._prefetcher = Prefetcher(
            self._readers,
            pieces_in_order(self._needed(step), [each.chunk for each in self.share.data_sets]),
            ahead_bytes=self.share.ahead_bytes,
            sample_bytes=[mean_sample_bytes(snapshot) for _, snapshot in self._opened],
        )

    def submit(self, step: int, blocks: Sequence[UInt8]) -> list[Future[Filled]]:
        """Begin to fill this worker's rows of a batch, whose blocks are uint8 [count, B, s, s, 3].

        Jobs raise DataError when nothing of a lane can be used, StoreError when the store stays
        out of reach.
        """
        slots = self._slots(step)
        rows = len(slots.number)
        mine = [block[:, self.share.first_row : self.share.first_row + rows] for block in blocks]
        size = max(1, min(_ROWS_PER_JOB, rows // self.share.threads))
        return [
            self._pool.submit(
                self._fill,
                _part(slots, first, first + size),
                [block[:, first : first + size] for block in mine],
            )
            for first in range(0, rows, size)
        ]

    def epoch_of(self, number: int, steps: range) -> int:
        """The epoch of its source in which a sample, by its global number, has a slot in steps.

        One that has none, as it is a substitute, counts to the epoch of the first slot.
        """
        slots = [self._slots(step) for step in steps]
        epochs = np.concatenate([each.epoch for each in slots])
        found = np.concatenate([each.global_numbers for each in slots]) == number
        return int(epochs[found.argmax()])

    def read(self, number: int) -> RawSample | BadSample:
        """One sample by its global number, outside of the order."""
        source = int(np.searchsorted(self.mixture.first_number, number, side="right")) - 1
        return self._read(source, number - int(self.mixture.first_number[source]))

    def close(self) -> None:
        """End the threads now; what they had begun is lost."""
        for reader in self._readers:
            reader.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slots(self, step: int) -> Slots:
        """Of this worker's rows."""
        return self.mixture.slots(*divmod(step, self.mixture.num_steps), self.share.lanes)

    def _needed(self, step: int) -> Iterator[Window]:
        """What is to be read from a step on: all but what must not be decoded."""
        position = divmod(step, self.mixture.num_steps)
        windows = self.mixture.windows(*position, self.share.lanes, epochs=self.share.epochs)
        for window in windows:
            first = int(self.mixture.first_number[window.source])
            useful = [number for number in window.numbers if number + first not in self._known]
            yield replace(window, numbers=useful)

    def _fill(self, slots: Slots, blocks: Sequence[UInt8]) -> Filled:
        """Decode the samples of some slots and cut their crops into as many columns of blocks."""
        samples, arrived_s = self._gather(slots)
        images = [self._look(sample) for sample in samples]
        boxes = self._draw_boxes(slots, images)
        replaced = []
        for row, image in enumerate(images):
            out = [block[:, row] for block in blocks]
            bad = image if isinstance(image, BadSample) else self._cut(image, boxes[row], out)
            if bad is not None:
                replaced.append(Replaced(bad, self._substitute(slots, row, bad, out)))
        self._colour(slots, blocks)
        return Filled(replaced, arrived_s, perf_counter())

    def _gather(self, slots: Slots) -> tuple[list[RawSample | BadSample], float]:
        """The samples of some slots, by their global numbers, and when the last waited for came."""
        assert self._prefetcher is not None, "not started"
        samples: list[RawSample | BadSample] = []
        arrived_s = -math.inf
        names = zip(slots.source.tolist(), slots.epoch.tolist(), slots.number.tolist(), strict=True)
        for name, global_number in zip(names, slots.global_numbers.tolist(), strict=True):
            if global_number in self._known:
                samples.append(self._known[global_number])
                continue
            is_here = self._prefetcher.is_here(*name)
            samples.append(self._globally(name[0], self._prefetcher.take(*name)))
            if not is_here:
                arrived_s = perf_counter()
        return samples, arrived_s

    def _read(self, source: int, number: int) -> RawSample | BadSample:
        return self._globally(source, self._readers[source].read(number, number)[0])

    def _globally(self, source: int, sample: RawSample | BadSample) -> RawSample | BadSample:
        """The sample under its global number, its shard by its whole URL."""
        store, shard = self._opened[source][0], sample.shard
        number = sample.number + int(self.mixture.first_number[source])
        return replace(sample, number=number, shard=resolve_url(store, shard))

    def _look(self, sample: RawSample | BadSample) -> _Image | BadSample:
        if isinstance(sample, BadSample):
            return sample
        try:
            with self._pulse.holding(self._threads.number, sample.number):
                header = guard_header(sample.data, max_pixels=self.share.max_image_pixels)
        except SampleError as error:
            return BadSample(sample.number, sample.key, sample.shard, str(error))
        return _Image(sample, header)

    def _draw_boxes(self, slots: Slots, images: Sequence[_Image | BadSample]) -> NDArray[np.int32]:
        """Of all at once, which costs a thirtieth of one by one; bad ones get boxes, too."""
        sizes = [
            (1, 1)
            if isinstance(image, BadSample)
            else (image.header.width_px, image.header.height_px)
            for image in images
        ]
        width_px, height_px = np.array(sizes, dtype=np.int64).T
        return crop_boxes(
            self.share.crops,
            seed=self.share.seed,
            epoch=slots.epoch,
            sample=slots.global_numbers,
            width_px=width_px,
            height_px=height_px,
        )

    def _cut(
        self, image: _Image, boxes: NDArray[np.int32], out: Sequence[UInt8]
    ) -> BadSample | None:
        sample = image.sample
        held = self._pulse.holding(self._threads.number, sample.number)
        reduced = self.share.crops.reduced_decode
        try:
            with held, self._telemetry.timed("decode_s"):
                decode_crops(sample.data, image.header, boxes, out, reduced=reduced)
        except SampleError as error:
            return BadSample(sample.number, sample.key, sample.shard, str(error))
        return None

    def _substitute(self, slots: Slots, row: int, bad: BadSample, out: Sequence[UInt8]) -> int:
        """Fill a slot with the first good one of the order's replacements; its global number."""
        slot = _part(slots, row, row + 1)
        source = int(slot.source[0])
        first = int(self.mixture.first_number[source])
        places = int(slot.epoch[0]), int(slot.lane[0]), int(slot.place[0])
        for number in self.mixture.replacements(source, *places):
            name = places[0], number + first
            if name in self._failed or number + first in self._known:
                continue
            image = self._look(self._read(source, number))
            if (
                isinstance(image, _Image)
                and self._cut(image, self._draw_boxes(slot, [image])[0], out) is None
            ):
                self._telemetry.add(substituted_samples=1)
                return number + first
            self._failed.add(name)
        raise DataError(
            f"no sample of lane {places[1]} of {self.share.data_sets[source].url} can be used; "
            f"the last was {bad.key or bad.number} of {bad.shard}: {bad.reason}; run `python -m "
            f"shard_tools verify {self.share.data_sets[source].url}`"
        )

    def _colour(self, slots: Slots, blocks: Sequence[UInt8]) -> None:
        if self.share.augmentation is None:
            return
        groups = draw_groups(
            self.share.augmentation,
            map(len, blocks),
            seed=self.share.seed,
            epoch=slots.epoch,
            samples=slots.global_numbers,
        )
        with self._telemetry.timed("colour_s"):
            for block, params in zip(blocks, groups, strict=True):
                augment_pixels(block, params)


def mean_sample_bytes(snapshot: Snapshot) -> float:
    """Bytes of shard a kept sample: what a read of many costs, each."""
    return float(np.sum(snapshot.tar_bytes)) / max(1, snapshot.num_kept)


def _part(slots: Slots, first: int, stop: int) -> Slots:
    names = ("source", "epoch", "number", "lane", "place", "global_numbers")
    return Slots(*(getattr(slots, name)[first:stop] for name in names))
