"""Flip, colour jitter, grey, blur and normalisation of batches of crops, on the device.

The reference (SwAV's MultiCropDataset) does this crop by crop with Pillow and torchvision. Here,
called by the loader, the draws are pure functions of (seed, epoch, sample, crop), and every
operation runs once for all the crops that drew it. The arithmetic is Pillow's own, every rounding
and clamp included, on uint8 between the operations: colours leave the gamut at each step, so
folding the steps into one matrix moves pixels by many levels.

Sources: Pillow's Blend.c, Convert.c, BoxBlur.c; torchvision's adjust_* for PIL images.

What to do is decided on the host from the parameters, which stay in numpy: nothing ever waits for
the device.

Shapes: N crops, n <= N of them that drew an operation, s the size in pixels.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.randomness import uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_OPERATION = -1

_STREAM = 0xA063  # keeps these draws independent of others at the same coordinates
_FLIP, _JITTER, _FACTORS, _GRAY, _BLUR, _RADIUS, _ORDER = (
    0,
    1,
    2,
    6,
    7,
    8,
    9,
)  # numbers of the draws
_NUM_DRAWS = _ORDER + 4

_BLUR_PASSES = 3
_FIXED_ONE = 1 << 24  # Pillow's box blur works in 8.24 fixed point


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
    config: AugmentConfig, *, seed: int, epoch: int, samples: ArrayLike, crop_indices: Sequence[int]
) -> AugmentParams:
    """Draw the parameters of the crops numbered `crop_indices` of `samples`, int64 [B].

    Rows are crop-major, v * B + b, like the crops; each depends on (seed, epoch, sample, crop)
    alone.
    """
    sample = np.tile(np.asarray(samples, dtype=np.int64), len(crop_indices))
    crop = np.repeat(np.asarray(crop_indices, dtype=np.int64), np.size(samples))
    u = uniform(_STREAM, seed, epoch, sample[:, None], crop[:, None], np.arange(_NUM_DRAWS))
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


def augment(crops: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Apply `params` to uint8 crops [N, 3, s, s]; float32 [N, 3, s, s], normalised, same device.

    The input is left as it is; the output has its memory format (channels_last from `crop_blocks`).
    Of `config`, only mean and std are read. Raises ValueError if there are not N parameters.
    """
    if len(params) != len(crops):
        raise ValueError(f"parameters of {len(params)} crops for {len(crops)} crops")
    pixels = crops.clone(memory_format=torch.contiguous_format)
    steps = [step for step in _steps(params) if len(step.rows)]
    rows = _upload([step.rows for step in steps], crops.device)
    values = _upload([step.values for step in steps], crops.device)
    for step, where, value in zip(steps, rows, values, strict=True):
        changed = step.operation(pixels.index_select(0, where), value)
        _words(pixels).index_copy_(0, where, _words(changed))
    channels_last = crops.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return _normalize(pixels.to(torch.float32, memory_format=layout), config)


class _Step(NamedTuple):
    """One operation on the crops that drew it."""

    operation: Callable[[Tensor, Tensor], Tensor]  # uint8 [n, 3, s, s], float32 [n, k] -> uint8
    rows: NDArray[np.int64]  # [n]
    values: NDArray[np.float32]  # [n, k]


def _steps(params: AugmentParams) -> Iterator[_Step]:
    """All there is to do, in the reference's order."""
    yield _step(_flip, params.flip)
    operations = (_brightness, _contrast, _saturation, _hue)
    factors = params.factors.copy()
    # torchvision truncates the shift towards zero and lets uint8 wrap around.
    factors[:, HUE] = np.trunc(factors[:, HUE] * 255)
    for turn in params.order.T:
        for number, operation in enumerate(operations):
            yield _step(operation, turn == number, factors[:, number])
    yield _step(_gray, params.gray)
    yield from _blur_steps(params.blur_radius)


def _step(
    operation: Callable[[Tensor, Tensor], Tensor], chosen: NDArray[np.bool_], *values: NDArray[Any]
) -> _Step:
    rows = np.flatnonzero(chosen)
    shape = (len(values), len(rows))  # numpy cannot know it when there are no values
    columns = np.array([value[rows] for value in values], np.float32).reshape(shape)
    return _Step(operation, rows, columns.T)


def _blur_steps(radius: NDArray[np.float64]) -> Iterator[_Step]:
    """One step for each whole box radius: 0 for radii up to sqrt(2), 1 up to 2.4, and so on."""
    box = _box_radius(radius)
    whole = np.floor(box).astype(np.int64)
    # Pillow's integer weights of the inner taps and of the two at the ends.
    inner = (np.float32(_FIXED_ONE) / (box * 2 + 1)).astype(np.int64)
    outer = (_FIXED_ONE - (whole * 2 + 1) * inner) // 2
    missing = _FIXED_ONE - (whole * 2 + 1) * inner - 2 * outer
    rounding = _FIXED_ONE // 2 - 128 * missing  # of values less 128, see _blur
    for reach in np.unique(whole[radius > 0]):
        chosen = (radius > 0) & (whole == reach)
        operation = functools.partial(_blur, box_radius=int(reach))
        yield _step(operation, chosen, inner, outer, rounding)


def _box_radius(radius: NDArray[np.float64]) -> NDArray[np.float32]:
    """The fractional radius of the box whose three passes have the variance radius².

    Equations 7, 11 and 14 of Gwosdek et al., SSVM 2011. In float32 step by step, as in C: the last
    bit of a weight decides ties in flat regions.
    """
    variance = radius.astype(np.float32) ** 2 / np.float32(_BLUR_PASSES)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    whole = np.floor((length - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return np.asarray(whole + fraction / (6 * (variance - (whole + 1) * (whole + 1))))


def _upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> Sequence[Tensor]:
    """Bring arrays of one dtype to the device in one transfer, which the host does not wait for."""
    if not arrays:
        return []
    sizes = [array.size for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = torch.split_with_sizes(flat.to(device, non_blocking=True), sizes)
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _words(pixels: Tensor) -> Tensor:
    """The crops as rows of 8-byte words where they divide: index_copy_ moves one word at a time."""
    rows = pixels.reshape(len(pixels), -1)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


def _flip(pixels: Tensor, _: Tensor) -> Tensor:
    return pixels.flip(-1)


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _quantize(pixels * factor[:, :, None, None])


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    luma = _luma(pixels)
    size = luma[0].numel()
    total = luma.sum(dim=(1, 2, 3), dtype=torch.int64)
    mean = (total * 2 + size) // (size * 2)  # rounded, as in Pillow
    return _blend(pixels, mean.to(torch.float32)[:, None, None, None], factor)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, _luma(pixels), factor)


def _gray(pixels: Tensor, _: Tensor) -> Tensor:
    return _luma(pixels).to(torch.uint8).expand_as(pixels)


def _luma(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma [n, 1, s, s], whole float32; sums stay below 2**24, so float32 is exact."""
    red, green, blue = pixels.to(torch.float32).unbind(1)
    weighted = red * 19595 + green * 38470 + blue * 7471 + 32768
    return (weighted / 65536).floor_().unsqueeze(1)


def _blend(pixels: Tensor, degenerate: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor * (pixels - degenerate); not lerp, which rounds otherwise."""
    return _quantize((pixels - degenerate).mul_(factor[:, :, None, None]).add_(degenerate))


def _quantize(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)  # the cast cuts the fraction off, as Pillow's does


def _hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """To HSV and back in Pillow's 8 bits, the hue turned by a whole number of its 255 steps.

    A channel of the result is value * (1 - saturation * w), w in [0, 1] depending on the hue alone.
    """
    tables = _hue_tables(pixels.device)
    red, green, blue = pixels.to(torch.int32).unbind(1)
    value = pixels.amax(1).to(torch.int32)
    chroma = value - pixels.amin(1)
    # The largest channel says the sector and which difference of the others places the hue in it.
    place = _select(green == value, blue - red + 767, red - green + 1279)
    place = _select(red == value, green - blue + 255, place)
    hue = _look_up(tables.hue, place.mul_(256).add_(chroma)).to(torch.int32)
    hue = hue.add_(shift.to(torch.int32)[:, :, None]).bitwise_and_(255)
    saturation = _look_up(tables.saturation, chroma.mul_(256).add_(value))
    weight = torch.stack([_look_up(channel, hue) for channel in tables.weight], 1)
    scale = weight.mul_(saturation.unsqueeze(1)).neg_().add_(1)
    return scale.mul_(value.unsqueeze(1)).add_(0.5).to(torch.uint8)


def _select(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return (
        (yes - no).mul_(condition.to(no.dtype)).add_(no)
    )  # on CPU six times faster than torch.where


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.view(-1)).view(
        index.shape
    )  # seven times faster than table[index]


class _HueTables(NamedTuple):
    hue: Tensor  # uint8 [3 * 512 * 256], at (512 * sector + 255 + difference) * 256 + chroma
    saturation: Tensor  # float32 [256 * 256] in [0, 1], at chroma * 256 + value
    weight: Tensor  # float32 [3, 256], of red, green, blue by hue


@functools.cache
def _hue_tables(device: torch.device) -> _HueTables:
    """Pillow's rgb2hsv and hsv2rgb: its mix of float and double decides where each step begins."""
    arrays = (_hue_table(), _saturation_table(), _weight_table())
    return _HueTables(*(torch.from_numpy(array).to(device) for array in arrays))


def _hue_table() -> NDArray[np.uint8]:
    chroma = np.arange(256, dtype=np.float32)
    difference = np.arange(-255, 257, dtype=np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        # One of the two distances to the largest channel is the chroma, hence exactly 1 here.
        first = np.minimum(chroma + difference, chroma) / chroma
        second = np.minimum(chroma - difference, chroma) / chroma
        angle = np.stack([first - second, _angle(2, first, second), _angle(4, first, second)])
        turns = np.fmod(angle.astype(np.float64) / 6 + 1, 1).astype(np.float32)
    steps = np.nan_to_num(turns.astype(np.float64) * 255, posinf=0, neginf=0)
    steps[..., 0] = 0  # no chroma, no hue
    return steps.clip(0, 255).astype(np.uint8).ravel()


def _angle(
    sector: int, first: NDArray[np.float32], second: NDArray[np.float32]
) -> NDArray[np.float32]:
    return (sector + first.astype(np.float64) - second).astype(np.float32)


def _saturation_table() -> NDArray[np.float32]:
    chroma, value = np.arange(256, dtype=np.float32)[:, None], np.arange(256, dtype=np.float32)
    share = np.minimum(chroma, value) / np.maximum(value, 1)
    steps = np.floor(share.astype(np.float64) * 255)
    return (steps.astype(np.float32) / np.float32(255)).ravel()


def _weight_table() -> NDArray[np.float32]:
    angle = (np.arange(256) * 6.0 / 255).astype(np.float32)
    sector = np.floor(angle).astype(np.int64) % 6
    fraction = angle - np.floor(angle)
    none, full = np.zeros_like(fraction), np.ones_like(fraction)
    falling, rising = fraction, 1 - fraction
    red = (none, falling, full, full, rising, none)
    green = (rising, none, none, falling, full, full)
    blue = (full, full, rising, none, none, falling)
    return np.stack([np.choose(sector, channel) for channel in (red, green, blue)])


def _blur(pixels: Tensor, weights: Tensor, *, box_radius: int) -> Tensor:
    """Three box blurs along the rows, then three along the columns, each rounded to 8 bits.

    Weighted sums are integers below 2**32. On values less 128 they fit int32, whose speed is that
    of float32; float32 itself cannot do it: ties are common and the last bit decides them.
    """
    fixed = weights.to(torch.int32)[:, :, None, None, None].unbind(1)
    values = pixels.to(torch.int32).sub_(128)
    for dim in (-1, -2):
        for _ in range(_BLUR_PASSES):
            values = _box_pass(values, *fixed, reach=box_radius + 1, dim=dim)
    return values.add_(128).to(torch.uint8)


def _box_pass(
    values: Tensor, inner: Tensor, outer: Tensor, rounding: Tensor, *, reach: int, dim: int
) -> Tensor:
    size = values.shape[dim]
    before = [values.narrow(dim, 0, 1)] * reach
    after = [values.narrow(dim, size - 1, 1)] * reach
    padded = torch.cat([*before, values, *after], dim)
    taps = [padded.narrow(dim, offset, size) for offset in range(2 * reach + 1)]
    total = functools.reduce(torch.add, taps[1:-1]) * inner
    return total.add_((taps[0] + taps[-1]).mul_(outer)).add_(rounding).bitwise_right_shift_(24)


def _normalize(pixels: Tensor, config: AugmentConfig) -> Tensor:
    """ToTensor and Normalize; in place."""
    mean, std = _upload(
        [np.array(config.mean, np.float32), np.array(config.std, np.float32)], pixels.device
    )
    return pixels.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def _factor_ranges(config: AugmentConfig) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    strength = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    floor = np.array([0.0, 0.0, 0.0, -math.inf])
    return np.maximum(centre - strength, floor), centre + strength
