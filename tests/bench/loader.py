"""Images per CPU second from stored bytes to crops, against the paper's Pillow pipeline.

Both sides run in this process, alternating, on photographs of 500x375 that ship
inside scikit-image and scikit-learn, with 2x224 + 6x96 crops. The reference ends with normalised
float crops, as its workers do; ours is the loader reading shards,
with uint8 crops in the batch's memory, because colour and blur are the device's work.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage import data as skimage_photographs
from sklearn.datasets import load_sample_image
from torchvision import transforms

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.loader import LoaderConfig, MultiCropLoader
from tests.bench.rows import Row
from tests.support.dataset import write_dataset

WIDTH_PX, HEIGHT_PX = 500, 375
ROUNDS = 5
IMAGES, BATCH = 256, 64
CROPS = CropsConfig()


def rows() -> Iterator[Row]:
    """One comparison: the ratio, and the milliseconds of both sides."""
    photos = photographs()
    files = [photos[number % len(photos)] for number in range(IMAGES)]
    reference = Reference()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(files, folder)
        timings = alternate(lambda: reference(files), ours, rounds=ROUNDS)
    ratio = statistics.median(slow / fast for slow, fast in timings)
    size_kb = sum(map(len, photos)) / len(photos) / 1000
    note = f"{IMAGES} JPEGs of 500x375, {size_kb:.0f} kB each; median of {ROUNDS} rounds"
    yield Row("loader.multicrop_vs_pil", ratio, "x", target=">= 7", note=note)
    for name, column in (("loader.reference_pil", 0), ("loader.multicrop", 1)):
        per_image_s = statistics.median(pair[column] for pair in timings) / IMAGES
        yield Row(name, per_image_s * 1e3, "CPU ms/image")


def photographs() -> list[bytes]:
    """JPEG files of quality 88, cut at several places of each photograph."""
    sources = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    sources += [getattr(skimage_photographs, name)() for name in ("astronaut", "coffee", "rocket")]
    cuts = [cut for image in sources for cut in _cuts(image)]
    return [_encode(cut) for cut in cuts]


def alternate(
    first: Callable[[], object], second: Callable[[], object], *, rounds: int
) -> list[tuple[float, float]]:
    """CPU seconds of both, run in turn after one round of warming up."""
    timings = [(_cpu_s(first), _cpu_s(second)) for _ in range(rounds + 1)]
    return timings[1:]


class Reference:
    """SwAV's MultiCropDataset, transform by transform (src/multicropdataset.py, Pillow's blur)."""

    def __init__(self) -> None:
        self.transforms = [
            _reference_transform(group.size_px, group.scale)
            for group in CROPS.groups
            for _ in range(group.count)
        ]

    def __call__(self, files: list[bytes]) -> list[list[torch.Tensor]]:
        return [self.crops(file) for file in files]

    def crops(self, file: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        return [transform(image) for transform in self.transforms]


class Ours:
    """The loader itself: from the bytes of a packed data set to collated uint8 blocks."""

    def __init__(self, files: list[bytes], folder: str, *, batch_size: int = BATCH) -> None:
        write_dataset(folder, files, per_shard=64)
        self.config = LoaderConfig(dataset=folder, global_batch=batch_size, threads=1)

    def __call__(self) -> None:
        assert sum(len(samples) for samples, _ in self.batches()) == IMAGES

    def batches(self) -> Iterator[tuple[list[int], list[tuple[tuple[int, ...], torch.dtype]]]]:
        """One epoch: the sample numbers of each batch, and what its blocks are."""
        with MultiCropLoader(self.config, CROPS, AugmentConfig(), seed=0, epochs=1) as loader:
            for batch in loader.cut_batches():
                blocks = [(tuple(block.shape), block.dtype) for block in batch.blocks]
                yield batch.samples.tolist(), blocks


class PillowBlur:
    """The reference's blur: probability 0.5, Pillow's Gaussian, radius uniform in [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if np.random.rand() >= 0.5:
            return image
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def _reference_transform(size_px: int, scale: tuple[float, float]) -> transforms.Compose:
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size_px, scale=scale),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            PillowBlur(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.228, 0.224, 0.225]),
        ]
    )


def _cuts(image: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    height, width = image.shape[:2]
    for top, left in ((0, 0), (height - HEIGHT_PX, width - WIDTH_PX)):
        yield np.ascontiguousarray(image[top : top + HEIGHT_PX, left : left + WIDTH_PX])


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def _cpu_s(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
