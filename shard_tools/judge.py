"""Judges one image: is it kept, and as which bytes?

pack calls `judge` for every input. What is cheap comes first: the size in bytes, what the content
says it is, the caps, then filters on the header alone; only then is anything decoded, once, and
what a Python filter or a resizing needs is taken from the same pixels. Unless the settings ask for
other pixels or another encoding, the bytes stay as they are, EXIF and all.

What becomes of which kind of image stands in pipeline.decode. What is encoded again loses all
metadata (EXIF, so also how to turn it; ICC profile; text), further frames, and alpha, which is put
on white:

    encode="keep"          bytes stay; where pixels had to change, PNG, GIF, BMP and TIFF become
                           PNG, the others JPEG: what was lossless stays so
    "jpeg", "png", "webp"  an image of that format whose pixels need no change keeps its bytes;
                           everything else is encoded in it
"""

import io
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import (
    MAX_BYTES,
    MAX_PIXELS,
    TOO_LARGE,
    UNDECODABLE,
    ImageHeader,
    decode_grey,
    decode_pixels,
    exif_orientation,
    guard_header,
    hash_grey,
    is_animated,
    to_grey,
)
from pipeline.errors import SampleError
from shard_tools.filters import Filter, ask_filter
from shard_tools.resize import RESIZE_MODES, resize_pixels, scaled_size, stored_size

TOO_SMALL = "too small"
ANIMATED = "animated"
FILTERED = "filtered"  # followed by ":" and the filter's name
UNENCODABLE = "unencodable"  # more pixels a side than the format asked for can hold

TIME_LIMIT_S = 60.0  # an image

_CHOICES = {
    "animated": ("first", "reject"),
    "orientation": ("keep", "apply"),
    "resize": RESIZE_MODES,
    "encode": ("keep", "jpeg", "png", "webp"),
}
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}  # elsewhere the format's name in lower case
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")
_PNG_EFFORT = 3  # a third of level 6's time for 5 % more bytes
_WEBP_EFFORT = 2  # half of the time of Pillow's 4 for 1 % more bytes
_TURNS = {  # the EXIF orientation, and what turns such an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Which images are kept, and how they are stored; part of a plan, so plain values only.

    Raises ValueError if the settings contradict each other.
    """

    max_bytes: int = MAX_BYTES  # "too large" beyond
    max_pixels: int = MAX_PIXELS  # "bomb" beyond
    min_size_px: int = 0  # of the shorter side; "too small" below
    max_aspect: float = 0.0  # longer over shorter side; 0: any; "filtered:aspect" beyond
    min_entropy: float = 0.0  # bits of the grey histogram, 0..8; "filtered:entropy" below
    animated: str = "first"  # or "reject"
    orientation: str = "keep"  # or "apply": turned upright where EXIF says it is not
    resize: str = "keep"  # or "longest", "shortest", "crop", to size_px
    size_px: int = 0
    encode: str = "keep"  # or "jpeg", "png", "webp"
    quality: int = 92  # of a JPEG or WebP that is encoded here
    decode: bool = True  # False: only headers are read, damaged pixels pass, there is no phash
    filter: str | None = None  # the name of a Python filter; see filters.py

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        if (self.resize != "keep") != (self.size_px > 0):
            raise ValueError(
                f"resize={self.resize!r} and size_px={self.size_px}: set both or neither"
            )
        if not self.decode and (needs := self._needs_pixels()):
            raise ValueError(f"decode=False leaves no pixels for {', '.join(needs)}")

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}")

    def _check_numbers(self) -> None:
        for name, lowest, highest in (
            ("max_bytes", 1, math.inf),
            ("max_pixels", 1, math.inf),
            ("min_size_px", 0, math.inf),
            ("size_px", 0, math.inf),
            ("quality", 1, 100),
            ("min_entropy", 0, 8),
        ):
            if not lowest <= (value := getattr(self, name)) <= highest:  # NaN is refused too
                raise ValueError(f"{name}={value}: allowed is {lowest} to {highest}")
        if self.max_aspect != 0 and not 1 <= self.max_aspect < math.inf:
            raise ValueError(f"max_aspect={self.max_aspect}: 0 for any, or at least 1")

    def _needs_pixels(self) -> list[str]:
        plain = ImageSettings()
        names = ("min_entropy", "orientation", "resize", "encode", "filter")
        return [name for name in names if getattr(self, name) != getattr(plain, name)]


@dataclass
class Accepted:
    """An image that is kept: the bytes to store, and its columns of the index.

    `columns` has width, height and format of what is stored, its phash (that of perceptual_hash)
    if it was decoded, and, if it was encoded here, original_width and original_height as strings.
    """

    data: bytes
    extension: str
    columns: dict[str, Any]


class RejectedError(SampleError):
    """An image that is not kept: why, and in `columns` what was known of it by then."""

    def __init__(self, reason: str, message: str, columns: dict[str, Any]) -> None:
        super().__init__(reason)
        self.args = (message,)
        self.columns = columns


def judge(data: bytes, settings: ImageSettings, *, keep: Filter | None = None) -> Accepted:
    """Accept an image, or say why not; `keep` is the filter that `settings.filter` names.

    Raises RejectedError; CropstreamError if the filter itself fails.
    """
    assert (keep is None) == (settings.filter is None)
    columns: dict[str, Any] = {}
    try:
        return _judge(data, settings, keep, columns)
    except SampleError as error:
        raise RejectedError(error.reason, str(error), columns) from None
    except MemoryError as error:
        raise RejectedError(UNDECODABLE, f"{UNDECODABLE}: {error!r}", columns) from None


def _judge(
    data: bytes, settings: ImageSettings, keep: Filter | None, columns: dict[str, Any]
) -> Accepted:
    header = guard_header(data, max_pixels=settings.max_pixels, max_bytes=settings.max_bytes)
    columns |= {"width": header.width_px, "height": header.height_px, "format": header.format}
    _filter_header(data, header, settings)
    if not settings.decode:
        return Accepted(data, extension_of(header.format), columns)
    orientation = exif_orientation(data) if settings.orientation == "apply" else 1
    image_format = _stored_format(header, orientation, settings)
    if image_format is None and keep is None:
        grey = decode_grey(data, header)
        _filter_entropy(grey, settings)
        columns["phash"] = hash_grey(grey)
        return Accepted(data, extension_of(header.format), columns)
    pixels = _pixels(data, header, settings)
    _filter_entropy(pixels, settings)
    if keep is not None:
        _filter_pixels(keep, pixels, orientation, columns, settings)
    if image_format is None:
        columns["phash"] = _hash(data, header, pixels, same=header.format != "JPEG")
        return Accepted(data, extension_of(header.format), columns)
    return _encode(
        _transform(pixels, header, orientation, settings), image_format, columns, settings
    )


@contextmanager
def watched(time_limit_s: float = TIME_LIMIT_S) -> Iterator[Callable[..., Any]]:
    """Lend a function `watch(judge, *arguments)` that does not survive a decoder that hangs.

    The kernel kills this process where one call takes longer than `time_limit_s`, so that the
    engine sees a dead worker and runs its task again in a sandbox. It costs a microsecond a call.
    The signal has its default action: a handler in Python would wait for the decoder. Only in a
    process's main thread, and for one user of its timer at a time.
    """
    action_before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    timer_before = signal.setitimer(signal.ITIMER_REAL, 0)

    def watch(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
        try:
            return function(*arguments, **options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    try:
        yield watch
    finally:
        signal.signal(signal.SIGALRM, action_before)
        signal.setitimer(signal.ITIMER_REAL, *timer_before)


def extension_of(image_format: str) -> str:
    """The file name extension of one of Pillow's formats."""
    return _EXTENSIONS.get(image_format, image_format.lower())


def _filter_header(data: bytes, header: ImageHeader, settings: ImageSettings) -> None:
    shorter, longer = sorted((header.width_px, header.height_px))
    if shorter < settings.min_size_px:
        raise SampleError(TOO_SMALL, f"{_size(header)}, the least is {settings.min_size_px}")
    if settings.max_aspect and longer > settings.max_aspect * shorter:
        message = f"{_size(header)}, the most is {settings.max_aspect}"
        raise SampleError(f"{FILTERED}:aspect", message)
    if settings.animated == "reject" and is_animated(data, header):
        raise SampleError(ANIMATED)


def _size(header: ImageHeader) -> str:
    return f"{header.width_px}x{header.height_px} pixels"


def _filter_entropy(pixels: NDArray[np.uint8], settings: ImageSettings) -> None:
    """Refuse flat pictures, given grey [H, W] or colour [H, W, 3], perhaps of a reduced JPEG."""
    if not settings.min_entropy:
        return
    bits = entropy_of(pixels if pixels.ndim == 2 else to_grey(pixels))
    if bits < settings.min_entropy:
        raise SampleError(f"{FILTERED}:entropy", f"{bits:.2f} bits, {settings.min_entropy} asked")


def entropy_of(grey: NDArray[np.uint8]) -> float:
    """The entropy of a grey picture's histogram in bits, 0 (one colour) to 8."""
    counts = np.bincount(grey.ravel(), minlength=256)
    shares = counts[counts > 0] / grey.size
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


def _filter_pixels(
    keep: Filter,
    pixels: NDArray[np.uint8],
    orientation: int,
    columns: Mapping[str, Any],
    settings: ImageSettings,
) -> None:
    assert settings.filter is not None
    seen = _turn(pixels, orientation).view()
    seen.flags.writeable = False  # the same pixels may be stored
    if not ask_filter(keep, settings.filter, seen, MappingProxyType(columns)):
        raise SampleError(f"{FILTERED}:{settings.filter}")


def _stored_format(header: ImageHeader, orientation: int, settings: ImageSettings) -> str | None:
    """The format to encode the image in, None if its bytes stay."""
    size = stored_size(
        header.width_px, header.height_px, mode=settings.resize, size_px=settings.size_px
    )
    unchanged = orientation == 1 and size == (header.width_px, header.height_px)
    if settings.encode == "keep":
        lossless = header.format in _LOSSLESS
        return None if unchanged else "PNG" if lossless else "JPEG"
    wanted = settings.encode.upper()
    return None if unchanged and wanted == header.format else wanted


def _pixels(data: bytes, header: ImageHeader, settings: ImageSettings) -> NDArray[np.uint8]:
    """The pixels: all of them if a filter is to see them, else as many as the resizing needs."""
    if settings.filter is not None:
        return decode_pixels(data, header)
    width_px, height_px = scaled_size(
        header.width_px, header.height_px, mode=settings.resize, size_px=settings.size_px
    )
    return decode_pixels(data, header, min_width_px=width_px, min_height_px=height_px)


def _transform(
    pixels: NDArray[np.uint8], header: ImageHeader, orientation: int, settings: ImageSettings
) -> NDArray[np.uint8]:
    resized = resize_pixels(
        pixels,
        width_px=header.width_px,
        height_px=header.height_px,
        mode=settings.resize,
        size_px=settings.size_px,
    )
    return _turn(resized, orientation)


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_TURNS[orientation]))


def _encode(
    pixels: NDArray[np.uint8], image_format: str, columns: dict[str, Any], settings: ImageSettings
) -> Accepted:
    try:
        data = encode_pixels(pixels, image_format, quality=settings.quality)
    except (ValueError, OSError) as error:
        raise SampleError(UNENCODABLE, f"as {image_format}: {error}") from None
    if len(data) > settings.max_bytes:
        raise SampleError(TOO_LARGE, f"{len(data)} bytes as {image_format}")
    header = ImageHeader(pixels.shape[1], pixels.shape[0], image_format, image_format == "JPEG")
    stored = {
        "width": header.width_px,
        "height": header.height_px,
        "format": image_format,
        "phash": _hash(data, header, pixels, same=image_format == "PNG"),
        "original_width": str(columns["width"]),
        "original_height": str(columns["height"]),
    }
    return Accepted(data, extension_of(image_format), columns | stored)


def _hash(data: bytes, header: ImageHeader, pixels: NDArray[np.uint8], *, same: bool) -> int:
    """What `perceptual_hash` says of the stored bytes; `same` if it would see these pixels."""
    return hash_grey(to_grey(pixels) if same else decode_grey(data, header))


def encode_pixels(pixels: NDArray[np.uint8], image_format: str, *, quality: int) -> bytes:
    """Encode uint8 [H, W, 3] as "JPEG", "PNG" or "WEBP".

    Raises ValueError or OSError if the format cannot hold that many pixels a side.
    """
    if image_format == "JPEG":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420"))
    options = (
        {"compress_level": _PNG_EFFORT}
        if image_format == "PNG"
        else {"quality": quality, "method": _WEBP_EFFORT}
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()
