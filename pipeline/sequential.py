"""Every image of a data set once, in the order of the shards: what evaluation and features read."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import AugmentConfig
from pipeline.crops import cut_crops
from pipeline.decode import decode_rgb
from pipeline.errors import SampleError
from pipeline.fetch import RawSample, SampleReader
from pipeline.loader import LoaderConfig
from pipeline.manifest import read_snapshot
from pipeline.store import Store, open_store
from pipeline.telemetry import Telemetry

_THREADS = 4


@dataclass(frozen=True)
class EvaluationBatch:
    """Consecutive samples: numbers int64 [B], labels, normalised float32 images [B, 3, s, s]."""

    samples: NDArray[np.int64]
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
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="evaluate") as threads:
            ahead: deque[Future[EvaluationBatch | None]] = deque()
            for first in self._firsts():
                ahead.append(threads.submit(self._load, reader, first))
                if len(ahead) > 2 * _THREADS and (batch := ahead.popleft().result()):
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
                    image = decode_rgb(
                        sample.data,
                        max_pixels=self.config.max_image_pixels,
                        max_bytes=len(sample.data),
                    )
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
