"""The stages of a loader measured one by one, and the loader as a whole; called by profile.

    reading    chunks of the data set at random places, as far ahead as the loader, not decoded
    cutting    decoding and crops of some images on one core; colour on the CPU
    loader     the real one from end to end, with its worker processes
    device     copying a batch and its colour, where there is a CUDA device

CPU seconds are those of this process and its workers together (pipeline.processes); the time to
start is left out everywhere. Every stage ends at its deadline, even in the middle of a round over
the samples, but measures one image at least, and the loader one batch.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import AugmentConfig, draw_groups
from pipeline.augment_device import augment
from pipeline.augment_host import augment_pixels
from pipeline.batches import mean_sample_bytes
from pipeline.crops import CropsConfig, block_shapes, crop_boxes, decode_crops
from pipeline.decode import decode_rgbx, guard_header
from pipeline.errors import DataError, SampleError
from pipeline.fetch import FetchConfig, Piece, Prefetcher
from pipeline.loader import Batch, CutBatch, LoaderConfig, MultiCropLoader
from pipeline.manifest import Snapshot
from pipeline.processes import cpu_seconds, resident_bytes
from pipeline.samples import BadSample, RawSample, SampleReader
from pipeline.store import Store
from pipeline.telemetry import Span, Telemetry
from pipeline.timeline import HandedOver

Uint8 = NDArray[np.uint8]
Work = Callable[[], Iterator[int]]  # a round over the images, told how many are done since
T = TypeVar("T")
Tick = Callable[[float], object]  # told the seconds that have passed since the last one

_SAMPLES = 256  # kept in memory to be cut again and again
_SETTLING_BATCHES = 4  # handed over before the clock starts, if they come in time
_SETTLING_SHARE = 0.25  # of the time to measure
_COLOUR_IMAGES = 16  # coloured at once
_MOST_SPANS = 1_000_000  # some 200 MB; a minute of a node has more, of a rank hardly


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sections of a configuration that a loader depends on."""

    loader: LoaderConfig
    fetch: FetchConfig = field(default_factory=FetchConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class Reading:
    """What came while nothing but reading was done."""

    wall_s: float
    cpu_s: float
    read_bytes: float
    requests: float
    retries: float

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes / self.wall_s

    @property
    def request_bytes(self) -> float:
        """Mean size of a read."""
        return self.read_bytes / self.requests

    @property
    def cpu_s_per_gigabyte(self) -> float:
        return self.cpu_s / self.read_bytes * 1e9


@dataclass(frozen=True)
class Cutting:
    """CPU seconds an image, on one core."""

    decode_s: float  # all pixels
    crops_s: float  # decoding, as far as the crops need it, cutting and resizing
    colour_s: float


@dataclass(frozen=True)
class Looping:
    """What the loader did between the first batch that counted and the last.

    sums: what its telemetry counted. start_s: from asking for the first batch to having it.
    """

    start_s: float
    wall_s: float
    cpu_s: float
    num_images: int
    resident_bytes: int
    sums: dict[str, float]
    spans: list[Span]
    batches: list[HandedOver]

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.wall_s

    @property
    def cpu_s_per_image(self) -> float:
        return self.cpu_s / self.num_images

    @property
    def request_bytes(self) -> float:
        """Mean size of a read; 0 if nothing was read."""
        requests = self.sums.get("fetch_requests", 0.0)
        return self.sums.get("fetch_bytes", 0.0) / requests if requests else 0.0

    def share(self, name: str) -> float:
        """Of the wall time; 0 for what was never counted."""
        return self.sums.get(name, 0.0) / self.wall_s


@dataclass(frozen=True)
class DeviceWork:
    """Seconds a batch on the CUDA device."""

    copy_s: float
    colour_s: float
    batch_size: int

    @property
    def images_per_s(self) -> float:
        """As if the device had nothing else to do."""
        return self.batch_size / (self.copy_s + self.colour_s)


def measure_reading(
    dataset: Store,
    snapshot: Snapshot,
    fetch: FetchConfig,
    *,
    chunk: int,
    ahead_bytes: int,
    seconds: float,
    tick: Tick,
) -> tuple[Reading, list[RawSample]]:
    """Read chunks for some seconds; also some of the samples. Raises as `SampleReader.read` does.

    Raises DataError if no sample that was read is whole.
    """
    telemetry = Telemetry()
    reader = SampleReader(dataset, snapshot, telemetry, fetch=fetch)
    sample_bytes = mean_sample_bytes(snapshot)
    asked, taken = itertools.tee(_random_pieces(snapshot.num_kept, chunk))
    prefetcher = Prefetcher([reader], asked, ahead_bytes=ahead_bytes, sample_bytes=[sample_bytes])
    kept: list[RawSample] = []
    samples = (
        prefetcher.take(0, piece.epoch, number)
        for piece in taken
        for number in range(piece.first, piece.last + 1)
    )
    try:
        begun_cpu_s, begun = cpu_seconds(), time.perf_counter()
        _keep(next(samples), kept)
        settling = telemetry.take()
        cpu_s, start = cpu_seconds(), time.perf_counter()
        settling_s, settling_cpu_s = start - begun, cpu_s - begun_cpu_s
        for sample in _until(start + seconds, samples, tick):
            _keep(sample, kept)
        wall_s, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu_s
        sums = telemetry.take()
    finally:
        prefetcher.close()
    if not kept:
        raise DataError(
            f"none of the samples read of {dataset.url} is whole; run `python -m shard_tools "
            f"verify {dataset.url}`"
        )
    if not sums.get("fetch_requests"):  # all had come with the first: so little, or so short
        sums, wall_s, cpu_s = settling, wall_s + settling_s, cpu_s + settling_cpu_s
    counts = [sums.get(name, 0.0) for name in ("fetch_bytes", "fetch_requests", "fetch_retries")]
    return Reading(wall_s, cpu_s, *counts), kept


def measure_cutting(
    samples: Sequence[RawSample], crops: CropsConfig, augmentation: AugmentConfig, *, seconds: float
) -> Cutting:
    """Decode, cut and colour samples on one core, for some seconds in all.

    Raises DataError if none of those that were tried is an image.
    """
    images, blocks = _find_images(samples, crops, time.perf_counter() + seconds / 4)
    rounds: list[Work] = [
        lambda: _decode(images),
        lambda: _cut(images, crops, blocks),
        lambda: _colour(images, blocks, augmentation),
    ]
    next(rounds[-1]())  # may compile, as finding the images did for the others
    return Cutting(*(_cpu_s(work, seconds / 4) for work in rounds))


def measure_loader(loader: MultiCropLoader, *, seconds: float, tick: Tick) -> Looping:
    """Take batches for some seconds, as fast as they come."""
    telemetry, device = loader.telemetry, loader.device
    spans: list[Span] = []
    asked = time.perf_counter()
    batches: Iterator[Batch | CutBatch] = (
        iter(loader) if device.type == "cuda" else iter(loader.cut_batches())
    )
    next(batches)
    start_s = time.perf_counter() - asked
    settled = time.perf_counter() + _SETTLING_SHARE * seconds
    for _ in _until(settled, itertools.islice(batches, _SETTLING_BATCHES - 1), lambda _: None):
        pass
    telemetry.take()
    telemetry.take_spans()
    cpu_s, start = cpu_seconds(), time.perf_counter()
    handed = [HandedOver(start, loader.batch_size)]
    for batch in _until(start + seconds, batches, tick):
        handed.append(HandedOver(time.perf_counter(), len(batch.samples)))
        found = telemetry.take_spans()
        spans += found[: _MOST_SPANS - len(spans)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Looping(
        start_s,
        time.perf_counter() - start,
        cpu_seconds() - cpu_s,
        sum(batch.num_images for batch in handed[1:]),
        resident_bytes(),
        telemetry.take(),
        spans,
        handed,
    )


def measure_device(
    batch_size: int, crops: CropsConfig, augmentation: AugmentConfig, device: torch.device
) -> DeviceWork:
    """Copy a batch to a CUDA device and colour it there, with nothing else going on."""
    blocks = [torch.from_numpy(each).pin_memory() for each in _empty_blocks(crops, batch_size)]
    on_device = [block.to(device) for block in blocks]
    copy_s = _device_s(lambda: [block.to(device, non_blocking=True) for block in blocks])
    colour_s = _device_s(lambda: _colour_on_device(on_device, batch_size, augmentation))
    return DeviceWork(copy_s, colour_s, batch_size)


def _until(deadline_s: float, items: Iterator[T], tick: Tick) -> Iterator[T]:
    """Items until a time of perf_counter; at least one."""
    last = time.perf_counter()
    for item in items:
        yield item
        now = time.perf_counter()
        tick(now - last)
        last = now
        if now >= deadline_s:
            return


def _random_pieces(num_samples: int, chunk: int) -> Iterator[Piece]:
    """Chunks at random places, for ever; their numbers stand for epochs, to tell them apart."""
    places = np.random.default_rng(0)
    for number in itertools.count():
        first = int(places.integers(-(-num_samples // chunk))) * chunk
        last = min(first + chunk, num_samples) - 1
        yield Piece(0, number, first, last, frozenset(range(first, last + 1)))


def _keep(sample: RawSample | BadSample, kept: list[RawSample]) -> None:
    if isinstance(sample, RawSample) and len(kept) < _SAMPLES:
        kept.append(sample)


def _find_images(
    samples: Sequence[RawSample], crops: CropsConfig, deadline_s: float
) -> tuple[list[RawSample], list[Uint8]]:
    """Those that can be decoded, as many as are tried by the deadline, and their crops."""
    images: list[RawSample] = []
    blocks = _empty_blocks(crops, len(samples))
    for sample in samples:
        try:
            next(_cut([sample], crops, [block[:, len(images) :] for block in blocks]))
            images.append(sample)
        except SampleError:
            pass
        if images and time.perf_counter() >= deadline_s:
            break
    if not images:
        raise DataError(
            f"none of {len(samples)} samples can be decoded, the first of them "
            f"{samples[0].key} of {samples[0].shard}; run `python -m shard_tools verify`"
        )
    return images, [block[:, : len(images)] for block in blocks]


def _empty_blocks(crops: CropsConfig, batch_size: int) -> list[Uint8]:
    return [np.zeros(shape, np.uint8) for shape in block_shapes(crops, batch_size)]


def _decode(images: Sequence[RawSample]) -> Iterator[int]:
    for image in images:
        decode_rgbx(image.data, guard_header(image.data))
        yield 1


def _cut(images: Sequence[RawSample], crops: CropsConfig, blocks: Sequence[Uint8]) -> Iterator[int]:
    headers = [guard_header(image.data) for image in images]
    boxes = crop_boxes(
        crops,
        seed=0,
        epoch=0,
        sample=[image.number for image in images],
        width_px=[header.width_px for header in headers],
        height_px=[header.height_px for header in headers],
    )
    for slot, (image, header) in enumerate(zip(images, headers, strict=True)):
        out = [block[:, slot] for block in blocks]
        decode_crops(image.data, header, boxes[slot], out, reduced=crops.reduced_decode)
        yield 1


def _colour(
    images: Sequence[RawSample], blocks: Sequence[Uint8], augmentation: AugmentConfig
) -> Iterator[int]:
    for first in range(0, len(images), _COLOUR_IMAGES):
        stop = min(first + _COLOUR_IMAGES, len(images))
        numbers = [sample.number for sample in images[first:stop]]
        drawn = draw_groups(augmentation, map(len, blocks), seed=0, epoch=0, samples=numbers)
        for block, params in zip(blocks, drawn, strict=True):
            augment_pixels(block[:, first:stop], params)
        yield stop - first


def _cpu_s(work: Work, seconds: float) -> float:
    """CPU seconds of an image, by the mean of as many as fit; at least one."""
    start, deadline_s = time.thread_time(), time.perf_counter() + seconds
    rounds = itertools.chain.from_iterable(work() for _ in itertools.count())
    num_images = sum(_until(deadline_s, rounds, lambda _: None))
    return (time.thread_time() - start) / num_images


def _colour_on_device(
    blocks: Sequence[torch.Tensor], batch_size: int, augmentation: AugmentConfig
) -> None:
    numbers = range(batch_size)
    drawn = draw_groups(augmentation, map(len, blocks), seed=0, epoch=0, samples=numbers)
    for block, params in zip(blocks, drawn, strict=True):
        augment(block.flatten(0, 1).permute(0, 3, 1, 2), params, augmentation)


def _device_s(work: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of one call, host work included; the first calls warm up."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
