"""Photographs for the benches: as many different JPEGs as are asked for.

All kinds are of the same photographs that ship inside scikit-image and scikit-learn; where the
originals are smaller they are enlarged. For packing, those of the web are 1024x683, of quality 88
and with halved colour, those like ImageNet's 512x400, of quality 95 and full colour: 110 kB each.
For the loader, 500x375 (45 kB) and 1080x810 (135 kB), of quality 88 and with halved colour.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from skimage import data as skimage_photographs
from sklearn.datasets import load_sample_image


@dataclass(frozen=True)
class Kind:
    """Size, and how it is encoded."""

    width_px: int
    height_px: int
    quality: int
    sampling: str
    enlarged: float = 1.0


WEB = Kind(1024, 683, 88, "420", enlarged=2.0)
SMALL = Kind(512, 400, 95, "444")
TRAIN = Kind(500, 375, 88, "420")
TRAIN_LARGE = Kind(1080, 810, 88, "420", enlarged=2.2)


def photographs(count: int, kind: Kind = WEB, *, seed: int = 0) -> Iterator[bytes]:
    """Windows at random places, half of them mirrored; the same ones for the same seed."""
    originals = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    originals += [
        getattr(skimage_photographs, name)() for name in ("astronaut", "coffee", "rocket")
    ]
    sources = [_enlarge(image, kind.enlarged) for image in originals]
    rng = np.random.default_rng(seed)
    for number in range(count):
        window = _window(sources[number % len(sources)], kind, rng)
        yield bytes(simplejpeg.encode_jpeg(window, kind.quality, "RGB", kind.sampling))


def write_photographs(folder: Path, count: int, kind: Kind = WEB) -> list[Path]:
    """Files 000000.jpg, … in a new folder."""
    folder.mkdir()
    files = []
    for number, photograph in enumerate(photographs(count, kind)):
        files.append(folder / f"{number:06d}.jpg")
        files[-1].write_bytes(photograph)
    return files


def _enlarge(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    size = (int(image.shape[1] * factor), int(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _window(image: NDArray[np.uint8], kind: Kind, rng: np.random.Generator) -> NDArray[np.uint8]:
    top = rng.integers(image.shape[0] - kind.height_px + 1)
    left = rng.integers(image.shape[1] - kind.width_px + 1)
    window = image[top : top + kind.height_px, left : left + kind.width_px]
    return np.ascontiguousarray(window[:, :: rng.choice((1, -1))])
