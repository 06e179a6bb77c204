"""Several hundred distinct pictures of many sizes and kinds, without downloading a data set.

They are cut from the photographs that ship inside the wheels of scikit-image and scikit-learn. A
picture's sub-folder names the photograph it comes from, which is its label for kNN. Every cut has
its own size, aspect, exposure and white balance, so that colour alone does not tell the photographs
apart. Among them lie the odd ones that a crawl brings: grey, palette, alpha, turned by EXIF, WebP,
one cut short, one that is no image at all.

The same arguments give the same bytes (for one version of Pillow and libjpeg).
"""

import importlib.metadata
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "astronaut": ("scikit-image", "skimage/data/astronaut.png"),
    "brick": ("scikit-image", "skimage/data/brick.png"),
    "chelsea": ("scikit-image", "skimage/data/chelsea.png"),
    "china": ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    "coffee": ("scikit-image", "skimage/data/coffee.png"),
    "coins": ("scikit-image", "skimage/data/coins.png"),
    "flower": ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    "grass": ("scikit-image", "skimage/data/grass.png"),
    "gravel": ("scikit-image", "skimage/data/gravel.png"),
    "hubble_deep_field": ("scikit-image", "skimage/data/hubble_deep_field.jpg"),
    "ihc": ("scikit-image", "skimage/data/ihc.png"),
    "motorcycle": ("scikit-image", "skimage/data/motorcycle_left.png"),
    "retina": ("scikit-image", "skimage/data/retina.jpg"),
    "rocket": ("scikit-image", "skimage/data/rocket.jpg"),
}

MIN_SIDE_PX, MAX_SIDE_PX = 96, 900
MIN_CONTRAST = 14.0
"""Standard deviation of the grey levels (0-255) below which a cut shows nothing, like clear sky."""
ODD_EVERY = 40
"""Of so many pictures each odd kind gets one."""

_EXIF_ORIENTATION = 0x0112


def write_pictures(folder: Path, count: int = 600, *, seed: int = 0) -> int:
    """Fill `folder` with `count` readable pictures and two broken files, unless it exists.

    The folder appears whole or not at all: it is written beside its place and renamed. Returns the
    number of files in it. Raises ValueError for fewer pictures than photographs.
    """
    if count < len(PHOTOGRAPHS):
        raise ValueError(f"count={count}: {len(PHOTOGRAPHS)} photographs need at least one each")
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _write_all(unfinished, count, seed)
        unfinished.rename(folder)
    return sum(path.is_file() for path in folder.rglob("*"))


def _write_all(folder: Path, count: int, seed: int) -> None:
    photographs = {label: _open(*place) for label, place in PHOTOGRAPHS.items()}
    labels = list(photographs)
    for label in labels:
        (folder / label).mkdir(parents=True)
    for number in range(count):
        label = labels[number % len(labels)]
        random = np.random.default_rng([seed, number])
        picture = _relight(_cut(photographs[label], random), random)
        body, suffix = _encode(picture, number, random)
        (folder / label / f"{number:05d}.{suffix}").write_bytes(body)
    _write_broken(folder, _cut(photographs["coffee"], np.random.default_rng([seed, count])))


def _open(distribution: str, path: str) -> Image.Image:
    """A photograph of an installed wheel, found without importing the package."""
    place = importlib.metadata.distribution(distribution).locate_file(path)
    return Image.open(str(place)).convert("RGB")


def _cut(photograph: Image.Image, random: np.random.Generator) -> Image.Image:
    """A random rectangle that shows something, at a random size."""
    while True:
        left, top, right, bottom = _draw_box(photograph.size, random)
        cut = photograph.crop((left, top, right, bottom))
        if np.asarray(cut.convert("L")).std() >= MIN_CONTRAST:
            size = _draw_size(right - left, bottom - top, random)
            return cut.resize(size, Image.Resampling.BICUBIC)


def _draw_box(size: tuple[int, int], random: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): a tenth to a half of the area, aspect 1/2 to 2."""
    width, height = size
    area = random.uniform(0.1, 0.5) * width * height
    aspect = np.exp(random.uniform(-np.log(2), np.log(2)))
    w = min(width, int((area * aspect) ** 0.5))
    h = min(height, int((area / aspect) ** 0.5))
    left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
    return left, top, left + w, top + h


def _draw_size(width: int, height: int, random: np.random.Generator) -> tuple[int, int]:
    """Mostly 200-400 px on the long side, now and then a thumbnail or something large."""
    ranges = ((200, 400), (MIN_SIDE_PX, 200), (400, MAX_SIDE_PX))
    long_side = random.uniform(*ranges[random.choice(3, p=(0.8, 0.1, 0.1))])
    scale = max(long_side / max(width, height), MIN_SIDE_PX / min(width, height))
    return _clip_side(width * scale), _clip_side(height * scale)


def _clip_side(side: float) -> int:
    return min(MAX_SIDE_PX, max(MIN_SIDE_PX, round(side)))


def _relight(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Another exposure and white balance, and half of the time mirrored."""
    gains = random.uniform(0.75, 1.25, size=(3, 1))
    gamma = np.exp(random.uniform(-0.5, 0.5))
    levels = np.linspace(0, 1, 256) ** gamma
    lit = picture.point(np.clip(255 * gains * levels, 0, 255).round().astype(int).ravel().tolist())
    return lit.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else lit


def _encode(picture: Image.Image, number: int, random: np.random.Generator) -> tuple[bytes, str]:
    """The picture as a file: an odd kind when its turn has come, else a JPEG of quality 60-95."""
    quality = int(random.integers(60, 96))
    return _ODD_KINDS.get(number % ODD_EVERY, _jpeg)(picture, quality)


def _jpeg(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    return _save(picture, "JPEG", quality=quality), "jpg"


def _grey(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    return _save(picture.convert("L"), "JPEG", quality=quality), "jpg"


def _palette(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    return _save(picture.quantize(64), "PNG"), "png"


def _alpha(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    """Fading out towards the right edge."""
    width, height = picture.size
    fade = np.tile(np.linspace(255, 0, width, dtype=np.uint8), (height, 1))
    translucent = picture.copy()
    translucent.putalpha(Image.fromarray(fade))
    return _save(translucent, "PNG"), "png"


def _turned(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    """Stored lying on its side; EXIF says how to set it upright."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    return _save(lying, "JPEG", quality=quality, exif=exif), "jpg"


def _webp(picture: Image.Image, quality: int) -> tuple[bytes, str]:
    return _save(picture, "WEBP", quality=quality), "webp"


_ODD_KINDS: dict[int, Callable[[Image.Image, int], tuple[bytes, str]]] = {
    3: _grey,
    11: _palette,
    19: _alpha,
    27: _turned,
    35: _webp,
}


def _write_broken(folder: Path, picture: Image.Image) -> None:
    body = _save(picture, "JPEG", quality=90)
    (folder / "coffee" / "truncated.jpg").write_bytes(body[: len(body) * 2 // 5])
    page = b"<html><body>404 Not Found</body></html>\n"
    (folder / "astronaut" / "not_an_image.jpg").write_bytes(page)


def _save(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
