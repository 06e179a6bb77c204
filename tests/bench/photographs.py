"""Photographs for the packing benches: as many different JPEGs as are asked for, 110 kB each.

They are cut at random places out of those that ship inside scikit-image and scikit-learn.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from skimage import data as skimage_photographs
from sklearn.datasets import load_sample_image

WIDTH_PX, HEIGHT_PX = 512, 400
QUALITY, SAMPLING = 95, "444"


def photographs(count: int, *, seed: int = 0) -> Iterator[bytes]:
    """JPEGs of 512x400, the same ones for the same seed."""
    sources = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    sources += [getattr(skimage_photographs, name)() for name in ("astronaut", "coffee", "rocket")]
    rng = np.random.default_rng(seed)
    for number in range(count):
        cut = _cut(sources[number % len(sources)], rng)
        yield bytes(simplejpeg.encode_jpeg(cut, QUALITY, "RGB", SAMPLING))


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Files 000000.jpg, … in a new folder."""
    folder.mkdir()
    files = []
    for number, photograph in enumerate(photographs(count)):
        files.append(folder / f"{number:06d}.jpg")
        files[-1].write_bytes(photograph)
    return files


def _cut(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A window at a random place, in half of the cases mirrored."""
    top = rng.integers(image.shape[0] - HEIGHT_PX + 1)
    left = rng.integers(image.shape[1] - WIDTH_PX + 1)
    window = image[top : top + HEIGHT_PX, left : left + WIDTH_PX]
    return np.ascontiguousarray(window[:, :: rng.choice((1, -1))])
