"""The contestants of the loader bench: each prepares some images and tells the CPU seconds it took.

All of them are kept ready and run in turn, so that a busy machine slows all alike. Starting up is
in nobody's time.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import simplejpeg

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.loader import LoaderConfig, MultiCropLoader
from pipeline.processes import cpu_seconds
from tests.bench.peers import peer_python
from tests.bench.reference import Reference
from tests.support.launch import ROOT, environment

BATCH = 64
CROPS = CropsConfig()
# Reads of 32 images, about a megabyte. By default those of a data set as small as a benchmark's are
# of single images, so that its few chunks mix; of a real one they are 6 MB.
READS = {"lanes": 2, "chunk": 32, "window": 2}

_SETTLING_BATCHES = 8  # more than are ever ready ahead
_END_LIMIT_S = 20.0
_SCRIPT = Path(__file__).with_name("peers") / "multicrop.py"


class Pillow:
    """The paper's pipeline, from encoded bytes in memory to collated float32 crops."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._batches = _repeated(files)
        self._reference = Reference()

    def cpu_s(self, num_batches: int) -> float:
        start = time.process_time()
        for files in islice(self._batches, num_batches):
            self._reference(files)
        return time.process_time() - start


class Decode:
    """Nothing but libjpeg-turbo: the pixels of every image, thrown away."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._batches = _repeated(files)

    def cpu_s(self, num_batches: int) -> float:
        start = time.process_time()
        for files in islice(self._batches, num_batches):
            for file in files:
                simplejpeg.decode_jpeg(file, "RGB")
        return time.process_time() - start


class Ours:
    """The loader with a worker process, from the bytes of a packed data set to collated crops.

    Args:
        colour: whether colour, blur and normalisation are done too, on the CPU; otherwise the
            uint8 blocks are the result, as they would be copied to a device.
    """

    def __init__(self, url: str, *, colour: bool, batch_size: int = BATCH) -> None:
        config = LoaderConfig(dataset=url, global_batch=batch_size, workers=1, threads=1, **READS)
        self.loader = MultiCropLoader(config, CROPS, AugmentConfig(), seed=0)
        self.batches: Iterator[Any] = (
            iter(self.loader) if colour else iter(self.loader.cut_batches())
        )

    def cpu_s(self, num_batches: int) -> float:
        """Of this process and the worker, which is given nothing for what it had ready before."""
        self._take(_SETTLING_BATCHES)
        start = cpu_seconds()
        self._take(num_batches)
        return cpu_seconds() - start

    def _take(self, num_batches: int) -> None:
        for _ in islice(self.batches, num_batches):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.loader.close()


class Peer:
    """A loader of the field with the paper's pipeline, in its own environment (peers/multicrop.py).

    Args:
        shards: folder of our data set. folder: where the peer's own copy is put.

    Raises PeerError if it cannot be installed.
    """

    def __init__(self, name: str, shards: Path, folder: Path) -> None:
        python = peer_python(name)
        self._command = [str(python), str(_SCRIPT)]
        self._environment = environment() | {
            "PYTHONPATH": str(ROOT),
            "DATA_OPTIMIZER_CACHE_FOLDER": str(folder / "litdata-chunks"),
            "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(folder / "litdata-data"),
        }
        target = str(folder / name)
        self._run("write", name, str(shards / "data"), target)
        self._process = subprocess.Popen(
            [*self._command, "serve", name, target, str(BATCH)],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def cpu_s(self, num_batches: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{num_batches}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def _run(self, *arguments: str) -> None:
        command = [*self._command, *arguments]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.stderr.write(done.stderr[-2000:])
        done.check_returncode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # and it ends: what it has in shared memory goes only then
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _repeated(files: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Batches for ever; the files are a whole number of them."""
    while True:
        for first in range(0, len(files), BATCH):
            yield list(files[first : first + BATCH])
