"""Every image of a data set once, in the order of the shards: what evaluation and features read.

Images are decoded here, in threads of the process that asks, not in workers that may die: one that
kills or hangs its decoder ends the evaluation. Those that the run's quarantine says did so in
training are left out.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import AugmentConfig
from pipeline.augment_device import normalize
from pipeline.crops import decode_crops
from pipeline.decode import guard_header
from pipeline.errors import SampleError
from pipeline.fetch import FetchConfig
from pipeline.loader import LoaderConfig
from pipeline.manifest import read_snapshot
from pipeline.probe import DIED, HUNG
from pipeline.samples import BadSample, RawSample, SampleReader, resolve_url
from pipeline.store import Store, open_store
from pipeline.telemetry import Telemetry

_THREADS = 4
CENTRAL_SHARE = 224 / 256


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

    Args:
        visible: side of what is cut out, as a share of the image's shorter side; 1 for the whole.
        quarantine: what a run has found; of this, what killed or hung its decoder counts as bad.
    """

    def __init__(
        self,
        config: LoaderConfig,
        augmentation: AugmentConfig,
        *,
        size_px: int,
        batch_size: int,
        visible: float = CENTRAL_SHARE,
        fetch: FetchConfig = FetchConfig(),  # noqa: B008 - frozen
        quarantine: Iterable[Mapping[str, Any]] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config = config
        self.augmentation = augmentation
        self.size_px = size_px
        self.batch_size = batch_size
        self.visible = visible
        self.fetch = fetch
        self.rank = rank
        self.world_size = world_size
        self.telemetry = Telemetry()
        self.store: Store = open_store(config.dataset)
        self.snapshot = read_snapshot(self.store, config.version or None)
        self._deadly = {
            (entry["shard"], entry["key"])
            for entry in quarantine
            if entry["reason"].startswith((DIED, HUNG))
        }

    def __iter__(self) -> Iterator[EvaluationBatch]:
        reader = SampleReader(self.store, self.snapshot, self.telemetry, fetch=self.fetch)
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="evaluate")
        ahead: deque[Future[EvaluationBatch | None]] = deque()
        try:
            for first in self._firsts():
                ahead.append(threads.submit(self._load, reader, first))
                if len(ahead) > 2 * _THREADS and (batch := ahead.popleft().result()):
                    yield batch
            for future in ahead:
                if batch := future.result():
                    yield batch
        finally:
            reader.close()
            threads.shutdown(cancel_futures=True)

    def _firsts(self) -> range:
        stride = self.batch_size * self.world_size
        return range(self.rank * self.batch_size, self.snapshot.num_kept, stride)

    def _load(self, reader: SampleReader, first: int) -> EvaluationBatch | None:
        last = min(first + self.batch_size, self.snapshot.num_kept) - 1
        found = [(sample, self._cut(sample)) for sample in reader.read(first, last)]
        good = [(sample, image) for sample, image in found if image is not None]
        self.telemetry.add(bad_samples=len(found) - len(good))
        if not good:
            return None
        pixels = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2)
        numbers = np.array([sample.number for sample, _ in good], dtype=np.int64)
        labels = [sample.label if isinstance(sample, RawSample) else None for sample, _ in good]
        return EvaluationBatch(numbers, labels, normalize(pixels, self.augmentation))

    def _cut(self, sample: RawSample | BadSample) -> NDArray[np.uint8] | None:
        """uint8 [size_px, size_px, 3], None of a sample that cannot be used."""
        if isinstance(sample, BadSample) or self._is_deadly(sample):
            return None
        limits = {"max_pixels": self.config.max_image_pixels, "max_bytes": len(sample.data)}
        out = np.empty((1, self.size_px, self.size_px, 3), dtype=np.uint8)
        try:
            header = guard_header(sample.data, **limits)
            box = central_box(header.width_px, header.height_px, self.visible)
            decode_crops(sample.data, header, box, [out], reduced=False)
        except SampleError:
            return None
        return np.asarray(out[0])

    def _is_deadly(self, sample: RawSample) -> bool:
        return (resolve_url(self.store, sample.shard), sample.key) in self._deadly


def central_box(width_px: int, height_px: int, visible: float = CENTRAL_SHARE) -> NDArray[np.int32]:
    """The central square of `visible` of the shorter side, as of `crop_boxes`."""
    side = min(height_px, width_px) * visible
    top, left = round((height_px - side) / 2), round((width_px - side) / 2)
    return np.array([[top, left, round(side) or 1, round(side) or 1]], dtype=np.int32)
