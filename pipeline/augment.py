"""What happens to the colours of each crop: the section `augment` and its draws.

The reference (SwAV's MultiCropDataset) draws from a generator's state as it goes; here the draws of
a whole batch are pure functions of (seed, epoch, sample, crop). The loader makes them,
augment_device.py or augment_host.py does what they say.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike, NDArray

from pipeline.randomness import uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_OPERATION = -1

_STREAM = 0xA063  # keeps these draws independent of others at the same coordinates
_FLIP, _JITTER, _FACTORS, _GRAY, _BLUR, _RADIUS, _ORDER = (0, 1, 2, 6, 7, 8, 9)  # of the draws
_NUM_DRAWS = _ORDER + 4


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Probabilities and strengths of the augmentations, those of SwAV.

    A strength x of brightness, contrast or saturation draws the factor from [max(0, 1-x), 1+x], of
    hue the shift from [-x, x] turns; strength 0 switches the operation off. `blur_radius` is the
    range of the standard deviation in pixels, whatever the size of the crop. `std` is the official
    code's, 0.228 included.
    """

    flip_p: Annotated[float, Ge(0), Le(1)] = 0.5
    jitter_p: Annotated[float, Ge(0), Le(1)] = 0.8
    brightness: Annotated[float, Ge(0)] = 0.8
    contrast: Annotated[float, Ge(0)] = 0.8
    saturation: Annotated[float, Ge(0)] = 0.8
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.2
    grayscale_p: Annotated[float, Ge(0), Le(1)] = 0.2
    blur_p: Annotated[float, Ge(0), Le(1)] = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.228, 0.224, 0.225)

    def __post_init__(self) -> None:
        low, high = self.blur_radius
        if not 0 < low <= high:
            raise ValueError(f"blur_radius needs 0 < low <= high, not {low} and {high}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth
class AugmentParams:
    """What happens to each of N crops, row for row; on the host."""

    flip: NDArray[np.bool_]  # [N]
    order: NDArray[np.int8]  # [N, 4] the colour operations in turn, or NO_OPERATION
    factors: NDArray[np.float64]  # [N, 4] by operation: three factors, and the hue shift in turns
    gray: NDArray[np.bool_]  # [N]
    blur_radius: NDArray[np.float64]  # [N] standard deviation in pixels; 0 = not blurred

    @classmethod
    def identity(cls, num_crops: int) -> Self:
        """Parameters that change nothing, to be filled in by hand; the arrays may be written to."""
        return cls(
            flip=np.zeros(num_crops, np.bool_),
            order=np.full((num_crops, 4), NO_OPERATION, np.int8),
            factors=np.tile(np.array([1.0, 1.0, 1.0, 0.0]), (num_crops, 1)),
            gray=np.zeros(num_crops, np.bool_),
            blur_radius=np.zeros(num_crops),
        )

    def __len__(self) -> int:
        return len(self.flip)


def draw_augment(
    config: AugmentConfig,
    *,
    seed: int,
    epoch: ArrayLike,
    samples: ArrayLike,
    crop_indices: Sequence[int],
) -> AugmentParams:
    """Draw the parameters of the crops numbered `crop_indices` of `samples`, int64 [B].

    `epoch` is one for all or one a sample, int64 [B]. Rows are crop-major, v * B + b, like the
    crops; each depends on (seed, epoch, sample, crop) alone.
    """
    epochs, sample = np.broadcast_arrays(np.asarray(epoch, np.int64), np.asarray(samples, np.int64))
    crop = np.repeat(np.asarray(crop_indices, dtype=np.int64), sample.size)
    rows = (np.tile(column, len(crop_indices))[:, None] for column in (epochs, sample))
    u = uniform(_STREAM, seed, *rows, crop[:, None], np.arange(_NUM_DRAWS))
    low, high = _factor_ranges(config)
    order = u[:, _ORDER:].argsort(axis=1).astype(np.int8)
    skipped = (u[:, _JITTER, None] >= config.jitter_p) | (low == high)[order]
    shortest, longest = config.blur_radius
    radius = shortest + u[:, _RADIUS] * (longest - shortest)
    return AugmentParams(
        flip=u[:, _FLIP] < config.flip_p,
        order=np.where(skipped, np.int8(NO_OPERATION), order),
        factors=low + u[:, _FACTORS : _FACTORS + 4] * (high - low),
        gray=u[:, _GRAY] < config.grayscale_p,
        blur_radius=np.where(u[:, _BLUR] < config.blur_p, radius, 0.0),
    )


def draw_groups(
    config: AugmentConfig,
    num_crops: Iterable[int],
    *,
    seed: int,
    epoch: ArrayLike,
    samples: ArrayLike,
) -> Iterator[AugmentParams]:
    """`draw_augment` for one group of crops after the other, each as it is asked for.

    A group is the crops of one resolution, so many an image; numbers go on from group to group.
    """
    first = 0
    for count in num_crops:
        crops = range(first, first + count)
        yield draw_augment(config, seed=seed, epoch=epoch, samples=samples, crop_indices=crops)
        first += count


def _factor_ranges(config: AugmentConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    strength = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    floor = np.array([0.0, 0.0, 0.0, -math.inf])
    return np.maximum(centre - strength, floor), centre + strength
