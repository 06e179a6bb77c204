"""CPU milliseconds an image from stored bytes to multi-crops: ours, the paper's, and the field's.

On photographs of 500x375 and 1080x810, with 2x224 + 6x96 crops. The paper's pipeline and those of
webdataset, mosaicml-streaming and litdata end with collated, normalised float32 crops. Ours is the
real loader with a worker process, reading shards from disk, and ends in two ways:

    multicrop      collated uint8 blocks, as they are copied to a device, whose work colour is
    multicrop_cpu  normalised float32 crops, everything on the CPU

The peers are compared with `multicrop_cpu`, which does the same as they do. Counted is the CPU time
of all processes of a contestant; all run in turn, and a ratio is the median of the rounds'.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.peers import PeerError, peer_version
from tests.bench.photographs import TRAIN, TRAIN_LARGE, Kind, photographs
from tests.bench.pipelines import BATCH, Decode, Ours, Peer, Pillow
from tests.bench.rows import Row
from tests.support.dataset import write_dataset

IMAGES = 512
ROUNDS = 5
SLOW_BATCHES, FAST_BATCHES = 2, 16  # of a round; what is slow needs fewer to be timed well
PEERS = {  # row, environment, package
    "loader.vs_webdataset_pil": ("webdataset", "webdataset"),
    "loader.vs_streaming_pil": ("mosaic", "mosaicml-streaming"),
    "loader.vs_litdata_pil": ("litdata", "litdata"),
}


class Contestant(Protocol):
    """Something that prepares images."""

    def cpu_s(self, num_batches: int) -> float:
        """CPU seconds of so many batches more."""


@dataclass(frozen=True)
class Timings:
    """CPU seconds an image, a round each."""

    rounds: Sequence[float]

    def __truediv__(self, other: "Timings") -> float:
        """The median of the rounds' ratios."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / its for mine, its in pairs)

    def row(self, name: str, note: str = "") -> Row:
        return Row(name, statistics.median(self.rounds) * 1e3, "CPU ms/image", note=note)


def rows() -> Iterator[Row]:
    """Ratios with targets, and the milliseconds of all contestants, at both sizes."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _small(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        yield from _large(Path(folder))


def _small(folder: Path) -> Iterator[Row]:
    files = _write_photographs(folder / "ours", TRAIN)
    with ExitStack() as stack:
        contestants = _contestants(stack, files, folder / "ours", everything=True)
        peers, missing = _start_peers(stack, folder)
        timings = alternate({**contestants, **peers})
    ours, everything, pillow = timings["ours"], timings["everything"], timings["pillow"]
    note = _note(files, TRAIN)
    yield Row("loader.multicrop_vs_pil", pillow / ours, "x", ">= 8", note)
    yield Row("loader.multicrop_vs_decode", ours / timings["decode"], "x", "<= 2.8", note)
    yield Row("loader.multicrop_cpu_vs_pil", pillow / everything, "x", ">= 6", note)
    yield Row("loader.colour_vs_crops", everything / ours - 1, "x", "<= 1", "what colour adds")
    for name, (environment, package) in PEERS.items():
        if environment in missing:
            yield Row(name, None, "x", "> 1", missing[environment])
            continue
        note = f"{package} {peer_version(environment, package)}; everything on the CPU"
        yield Row(name, timings[environment] / everything, "x", "> 1", note)
        yield timings[environment].row(f"{name}.peer")
    yield ours.row("loader.multicrop")
    yield everything.row("loader.multicrop_cpu")
    yield pillow.row("loader.reference_pil")
    yield timings["decode"].row("loader.decode", "libjpeg-turbo, all pixels")


def _large(folder: Path) -> Iterator[Row]:
    files = _write_photographs(folder, TRAIN_LARGE)
    with ExitStack() as stack:
        timings = alternate(_contestants(stack, files, folder, everything=False))
    ours, pillow, decode = timings["ours"], timings["pillow"], timings["decode"]
    note = _note(files, TRAIN_LARGE)
    yield Row("loader.multicrop_vs_pil_1080", pillow / ours, "x", ">= 4.5", note)
    yield Row("loader.multicrop_vs_decode_1080", ours / decode, "x", "", note)
    yield ours.row("loader.multicrop_1080")
    yield pillow.row("loader.reference_pil_1080")
    yield decode.row("loader.decode_1080", "libjpeg-turbo, all pixels")


def alternate(contestants: Mapping[str, Contestant], *, rounds: int = ROUNDS) -> dict[str, Timings]:
    """All in turn, after one round of warming up."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        print(f"loader: round {number} of {rounds}", file=sys.stderr)
        for name, contestant in contestants.items():
            batches = FAST_BATCHES if name in ("ours", "everything", "decode") else SLOW_BATCHES
            measured[name].append(contestant.cpu_s(batches) / (batches * BATCH))
    return {name: Timings(found[1:]) for name, found in measured.items()}


def _contestants(
    stack: ExitStack, files: Sequence[bytes], folder: Path, *, everything: bool
) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {"pillow": Pillow(files), "decode": Decode(files)}
    found["ours"] = stack.enter_context(Ours(str(folder), colour=False))
    if everything:
        found["everything"] = stack.enter_context(Ours(str(folder), colour=True))
    return found


def _start_peers(stack: ExitStack, folder: Path) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that can be installed here, and why the others cannot."""
    started: dict[str, Contestant] = {}
    missing = {}
    for environment, _ in PEERS.values():
        try:
            started[environment] = stack.enter_context(Peer(environment, folder / "ours", folder))
        except PeerError as error:
            missing[environment] = str(error)
    return started, missing


def _write_photographs(folder: Path, kind: Kind) -> list[bytes]:
    files = list(photographs(IMAGES, kind))
    write_dataset(str(folder), files, per_shard=64)
    return files


def _note(files: Sequence[bytes], kind: Kind) -> str:
    size_kb = sum(map(len, files)) / len(files) / 1000
    return f"JPEGs of {kind.width_px}x{kind.height_px}, {size_kb:.0f} kB; {ROUNDS} rounds"
