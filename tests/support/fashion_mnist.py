"""Fashion-MNIST (Xiao et al. 2017) from its Debian package: arrays, folders of PNGs, packed shards.

60,000 + 10,000 grey product photographs of 28x28 pixels in ten balanced classes. Of the training
images the last 5,000 are held out to choose settings by; the test images are for the last word.
Fetched when needed, never committed.
"""

import gzip
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("usr/share/datasets/fashion-mnist")
HELD_OUT = 5_000


class Pictures(NamedTuple):
    """pixels: uint8 [N, 28, 28]; labels: uint8 [N], 0 … 9."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def train_split(work: Path, count: int | None = None) -> Pictures:
    """The training images but those held out, or the first `count` of them."""
    whole = _read(work, "train")
    end = len(whole.labels) - HELD_OUT if count is None else count
    return Pictures(whole.pixels[:end], whole.labels[:end])


def heldout_split(work: Path) -> Pictures:
    whole = _read(work, "train")
    return Pictures(whole.pixels[-HELD_OUT:], whole.labels[-HELD_OUT:])


def test_split(work: Path) -> Pictures:
    return _read(work, "t10k")


test_split.__test__ = False  # type: ignore[attr-defined]


def pack(pictures: Pictures, work: Path, name: str) -> str:
    """Write the pictures as PNGs in folders by label, pack them; returns the data set's prefix.

    What an earlier call has packed under this name in `work` is taken as it is.
    """
    source, dataset = work / "png" / name, work / "data" / name
    if not (dataset / "snapshots").exists():
        _write_pngs(pictures, source)
        command = [sys.executable, "-m", "shard_tools", "pack", str(source), str(dataset)]
        subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)
    return str(dataset)


def _write_pngs(pictures: Pictures, folder: Path) -> None:
    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(*pictures, strict=True)):
        Image.fromarray(pixels).save(folder / str(label) / f"{number:05d}.png")


@cache
def _read(work: Path, name: str) -> Pictures:
    folder = _fetch(work)
    pixels = _read_idx(folder / f"{name}-images-idx3-ubyte.gz", header_bytes=16)
    labels = _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", header_bytes=8)
    return Pictures(pixels.reshape(-1, 28, 28), labels)


def _read_idx(path: Path, *, header_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes)


def _fetch(work: Path) -> Path:
    """The folder with the package's files. Raises RuntimeError where there is no such package."""
    for root in (Path("/"), work / "package"):
        if (root / INSTALLED).exists():
            return root / INSTALLED
    work.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "-qq", "download", PACKAGE], cwd=work, check=True)
        (package,) = work.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, work / "package"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"Fashion-MNIST comes from the Debian package {PACKAGE}, which could not be fetched: "
            f"{error}; install it, or run this on Debian"
        ) from None
    return work / "package" / INSTALLED
