"""Encoded bytes -> RGB pixels, guarded; for the loader, and for pack to judge images.

The format is read from the content, never from a name, and the caps on bytes, pixels and passes
over them are judged from the header, before anything is decoded. JPEG goes through simplejpeg
(libjpeg-turbo: the pixels of Pillow, three quarters of its time); whatever it refuses, and every
other format, goes through Pillow, restricted to the one format that was recognised. Of what
passes the default caps, 64 million pixels in a hundred scans took longest, 7 s and 1.1 GB; no other
file that was tried took more than 1.2 s.

What becomes of pixels that are not 8-bit RGB (the reference says Pillow's
`convert("RGB")` to all):

    grey, 1-bit                  the grey value three times
    palette                      looked up
    alpha, transparent colour    composited on white, as on a page (the reference drops alpha)
    grey and alpha               the same, then the grey value three times
    16-bit grey                  v * 255 / 65535, rounded (the reference clips: nearly all white)
    16-bit colour                the high byte (done by Pillow's readers)
    CMYK, YCbCr, LAB, HSV        Pillow's convert, without colour profiles
    32-bit integer, float        "unsupported": no scale is known
    several frames               the first one; see `is_animated`
    ICC profile, gAMA, cHRM      ignored: the values as stored, as in the reference
    EXIF orientation             not applied, as in the reference; see `exif_orientation`
    TIFF orientation             applied by Pillow, the size in the header is the turned one
    broken EXIF, XMP, text       ignored wherever the pixels decode

A JPEG that is damaged but complete decodes as in Pillow: what is whole, CRC32C decides. A
truncated one never does.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.errors import SampleError

NOT_AN_IMAGE = "not an image"
TRUNCATED = "truncated"
TOO_LARGE = "too large"  # more bytes than the cap
BOMB = "bomb"  # more pixels, or more passes over them, than the cap
UNSUPPORTED = "unsupported"
UNDECODABLE = "undecodable"

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20
# A scan of a progressive JPEG may be 95 bytes and cost a pass over 64 million pixels, 25 to 65 ms,
# so that a file within the caps could take hours. Encoders write ten, at most some dozens.
MAX_SCANS = 100

# Pillow warns of every oddity of a hostile file: noise among billions. Pixels and caps decide.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    NotImplementedError,
    MemoryError,
    RuntimeError,  # its AVIF reader
    # Parsers that trust the file: a missing field, an offset beyond the end, a division by zero.
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # raised where warnings are errors
)

_DECODED = (  # (offset, magic bytes, Pillow's name of the format)
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
)
_REFUSED = (
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "Photoshop"),
)

_PILLOW_BOMB = re.compile(r"(\d+) pixels\) exceeds limit of (\d+)")  # a limit of its own
_SIMPLE_COLORS = ("YCbCr", "RGB", "Gray")
_ORIENTATION = 0x0112  # the EXIF tag
_START_OF_SCAN = 0xDA  # the JPEG marker after which pixels follow
_SEQUENTIAL = frozenset(  # the other JPEG markers before the pixels of a file that has one pass
    [0xC0, 0xC1, 0xC4, 0xDB, 0xDD, _START_OF_SCAN, *range(0xE0, 0xF0), 0xFE]
)
_APP1 = 0xE1  # the JPEG marker of EXIF and XMP
_MANY_FRAMES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
_HASH_ROWS, _HASH_COLUMNS = 8, 9


@dataclass(frozen=True)
class ImageHeader:
    """What an image says of itself: size in pixels as stored, and Pillow's name of its format."""

    width_px: int
    height_px: int
    format: str
    # Whether it is a JPEG that simplejpeg decodes: no CMYK, whose conventions only Pillow knows.
    suits_simplejpeg: bool = field(default=False, compare=False, repr=False)


def guard_header(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> ImageHeader:
    """Read an image's header without decoding it, and refuse what would be dangerous to decode.

    Raises SampleError: NOT_AN_IMAGE, UNSUPPORTED, TRUNCATED (inside the header), UNDECODABLE (a
    header that contradicts itself), TOO_LARGE (more than `max_bytes`), BOMB (more than
    `max_pixels`, or a JPEG of more than MAX_SCANS scans).
    """
    if len(data) > max_bytes:
        raise SampleError(TOO_LARGE, f"{len(data)} bytes, allowed are {max_bytes}")
    image_format = _sniff(data)
    find_header = _jpeg_header if image_format == "JPEG" else _header
    header = find_header(data, image_format, max_pixels)
    width_px, height_px = header.width_px, header.height_px
    if width_px * height_px > max_pixels:
        raise SampleError(BOMB, f"{width_px}x{height_px} pixels, allowed are {max_pixels}")
    if width_px <= 0 or height_px <= 0:
        raise SampleError(UNDECODABLE, f"{width_px}x{height_px} pixels")
    if image_format == "JPEG" and not (header.suits_simplejpeg and _is_sequential(data)):
        _guard_scans(data)
    return header


def decode_rgb(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> NDArray[np.uint8]:
    """Decode an image to uint8 [H, W, 3], by the table at the top, after `guard_header`.

    Raises SampleError as `guard_header` does, and TRUNCATED, UNSUPPORTED or UNDECODABLE for the
    pixels.
    """
    return decode_pixels(data, guard_header(data, max_pixels=max_pixels, max_bytes=max_bytes))


def decode_pixels(
    data: bytes, header: ImageHeader, *, min_width_px: int = 0, min_height_px: int = 0
) -> NDArray[np.uint8]:
    """Decode an image that `guard_header` let pass to uint8 [H, W, 3], by the table at the top.

    With a minimum, a JPEG is decoded at the smallest eighths of its size that reach both, which
    saves time; all of it is read none the less. Every other image comes out whole. Raises
    SampleError: TRUNCATED, UNSUPPORTED or UNDECODABLE.
    """
    if not header.suits_simplejpeg:
        return _decode_with_pillow(data, header)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_width=min_width_px, min_height=min_height_px
        )
    except ValueError as error:
        return _decode_refused_jpeg(data, header, error)
    return np.asarray(pixels)


def decode_rgbx(
    data: bytes, header: ImageHeader, *, min_width_px: int = 0, min_height_px: int = 0
) -> NDArray[np.uint8]:
    """As `decode_pixels`, but to uint8 [H, W, 4], whose fourth byte means nothing.

    A pixel is one word of memory, which the kernel of resize.py reads at once; libjpeg-turbo writes
    it in the same time. The array is contiguous and writable.
    """
    if not header.suits_simplejpeg:
        return _decode_with_pillow(data, header, "RGBX")
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGBX", min_width=min_width_px, min_height=min_height_px
        )
    except ValueError as error:
        return _decode_refused_jpeg(data, header, error, "RGBX")
    return np.asarray(pixels)


def decode_grey(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    """Decode an image that `guard_header` let pass to uint8 [H, W] grey, for `hash_grey`.

    A JPEG comes out much reduced, but all of it is read: what has a grey picture decodes. Raises
    SampleError as `decode_pixels` does.
    """
    if header.suits_simplejpeg:
        try:  # eight cells of the grid each way: enough for the hash, and less to compute
            grey = simplejpeg.decode_jpeg(
                data, "GRAY", min_height=8 * _HASH_ROWS, min_width=8 * _HASH_COLUMNS
            )
            return np.asarray(grey[:, :, 0])
        except ValueError as error:
            _refuse_truncated_jpeg(error)
    return to_grey(_decode_with_pillow(data, header))


def to_grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The luma (ITU-R 601) of uint8 [H, W, 3] as uint8 [H, W]."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def hash_grey(grey: NDArray[np.uint8]) -> int:
    """The dHash of a grey picture uint8 [H, W]: see `perceptual_hash`."""
    grid = Image.fromarray(grey).resize((_HASH_COLUMNS, _HASH_ROWS), Image.Resampling.BOX)
    cells = np.asarray(grid, dtype=np.int16)
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def perceptual_hash(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> int:
    """Hash what an image looks like (dHash): is each cell of an 8x9 grid brighter than its left?

    64 bits; nearly equal images differ in few. An image that has a hash decodes. Raises
    SampleError as `decode_rgb` does.
    """
    header = guard_header(data, max_pixels=max_pixels, max_bytes=max_bytes)
    return hash_grey(decode_grey(data, header))


def is_animated(data: bytes, header: ImageHeader) -> bool:
    """Whether there are several frames or pages, of which `decode_pixels` takes the first.

    Raises SampleError if what says so is broken.
    """
    if header.format not in _MANY_FRAMES:
        return False
    with _open(data, header.format) as image:
        return bool(getattr(image, "is_animated", False))


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation 1..8 that `decode_rgb` left unapplied; 1 (upright) if none is readable.

    A broken EXIF block is no error: the pixels may be fine. Pillow turns TIFF while decoding, so
    that is 1. Raises SampleError if the bytes are no image of a known format.
    """
    image_format = _sniff(data)
    if image_format == "TIFF" or (image_format == "JPEG" and not _has_app1(data)):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except _PILLOW_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _sniff(data: bytes) -> str:
    head = bytes(data[:16])
    for offset, magic, name in _DECODED:
        if head.startswith(magic, offset):
            return name
    for offset, magic, name in _REFUSED:
        if head.startswith(magic, offset):
            raise SampleError(UNSUPPORTED, name)
    raise SampleError(NOT_AN_IMAGE, f"starts with {head!r}")


def _jpeg_header(data: bytes, image_format: str, max_pixels: int) -> ImageHeader:
    try:
        height_px, width_px, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # also for samplings that only Pillow takes
        if _ends_in_jpeg_header(data):
            raise SampleError(TRUNCATED, f"{len(data)} bytes end inside the JPEG header") from None
        return _header(data, image_format, max_pixels)
    return ImageHeader(width_px, height_px, image_format, colors in _SIMPLE_COLORS)


def _header(data: bytes, image_format: str, max_pixels: int) -> ImageHeader:
    try:
        with _open(data, image_format) as image:
            return ImageHeader(image.width, image.height, image_format)
    except SampleError as error:
        found = _PILLOW_BOMB.search(str(error)) if error.reason == BOMB else None
        if found is None:
            raise
        pixels, limit = map(int, found.groups())
        raise SampleError(BOMB, f"{pixels} pixels, allowed are {min(limit, max_pixels)}") from None


def _jpeg_markers(data: bytes) -> Iterator[int | None]:
    """The markers of a JPEG before its first scan; None in place of what is no marker."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1] if data[position] == 0xFF else None
        yield marker
        if marker is None or marker == _START_OF_SCAN:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _ends_in_jpeg_header(data: bytes) -> bool:
    """Whether the bytes end before the first scan."""
    return not any(marker in (None, _START_OF_SCAN) for marker in _jpeg_markers(data))


def _has_app1(data: bytes) -> bool:
    """Whether a JPEG may have EXIF or XMP; told without Pillow, which takes ten times as long."""
    return any(marker in (None, _APP1) for marker in _jpeg_markers(data))


def _is_sequential(data: bytes) -> bool:
    """Whether a JPEG is plainly not progressive; its cost is then bounded by its bytes."""
    return all(marker in _SEQUENTIAL for marker in _jpeg_markers(data))


def _guard_scans(data: bytes) -> None:
    # No compressed pixels contain the marker; an embedded preview may, and counts too.
    num_scans = data.count(bytes([0xFF, _START_OF_SCAN]))
    if num_scans > MAX_SCANS:
        raise SampleError(BOMB, f"{num_scans} scans, allowed are {MAX_SCANS}")


def _decode_refused_jpeg(
    data: bytes, header: ImageHeader, error: ValueError, mode: str = "RGB"
) -> NDArray[np.uint8]:
    """Let Pillow judge what simplejpeg refused: libjpeg survives most of what it complains of."""
    _refuse_truncated_jpeg(error)
    _guard_scans(data)
    return _decode_with_pillow(data, header, mode)


def _refuse_truncated_jpeg(error: ValueError) -> None:
    if "Premature end of JPEG" in str(error):
        raise SampleError(TRUNCATED, str(error)) from None


def _decode_with_pillow(data: bytes, header: ImageHeader, mode: str = "RGB") -> NDArray[np.uint8]:
    with _open(data, header.format) as image:
        pixels = np.array(_to_rgb(image).convert(mode))
    if pixels.shape != (header.height_px, header.width_px, len(mode)):
        raise SampleError(UNDECODABLE, f"decodes to {pixels.shape}, the header says {header}")
    return pixels


@contextmanager
def _open(data: bytes, image_format: str) -> Iterator[Image.Image]:
    """Open with Pillow as this format; what it raises inside the block becomes a SampleError."""
    try:
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            yield image
    except _PILLOW_ERRORS as error:
        raise SampleError(_reason(error, data, image_format), _describe(error)) from None


def _reason(error: BaseException, data: bytes, image_format: str) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BOMB
    if "truncated" in str(error).lower() or _is_cut_webp(data, image_format):
        return TRUNCATED
    return UNSUPPORTED if isinstance(error, NotImplementedError) else UNDECODABLE


def _is_cut_webp(data: bytes, image_format: str) -> bool:
    return image_format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def _describe(error: BaseException) -> str:
    # Pillow's UnidentifiedImageError only says the address of a BytesIO object.
    text = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
    return f"{type(error).__name__}{text}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise SampleError(UNSUPPORTED, f"pixels of mode {image.mode}")
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values: NDArray[Any] = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    page = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(page, image).convert("RGB")
