"""A loader of the field with the paper's Pillow multi-crop; runs in the peer's environment.

    python multicrop.py write NAME SHARDS TARGET   our shards, rewritten in the peer's own format
    python multicrop.py serve NAME TARGET BATCH    for every line on stdin, so many batches: answers
                                                   with the CPU seconds they took

Each peer reads in this process, in its usual shuffled way, hands every image to the same transforms
and collates. No worker processes: handing over costs nothing then, which is in the peer's favour.
"""

import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

for operator in ("nms", "qnms"):  # see NAME.txt
    torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")

from tests.bench.reference import Reference  # noqa: E402 - torchvision, which needs them

Crops = list[list[torch.Tensor]]


def shards_of(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).rglob("*.tar")))


def images_of(shards: str) -> Iterator[bytes]:
    for path in shards_of(shards):
        with tarfile.open(path) as tar:
            yield from (tar.extractfile(member).read() for member in tar if member.isfile())


def write_webdataset(shards: str, target: str) -> None:
    """Our shards are webdataset's."""
    Path(target).symlink_to(shards)


def write_mosaic(shards: str, target: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=target, columns={"jpg": "bytes"}, size_limit=64 << 20) as writer:
        for image in images_of(shards):
            writer.write({"jpg": image})


def write_litdata(shards: str, target: str) -> None:
    import litdata

    images = Path(f"{target}-images")
    images.mkdir()
    for number, image in enumerate(images_of(shards)):
        (images / f"{number:06d}.jpg").write_bytes(image)
    files = sorted(map(str, images.iterdir()))
    litdata.optimize(read_bytes, files, target, chunk_bytes="64MB", num_workers=1, mode="overwrite")


def read_bytes(path: str) -> dict[str, bytes]:
    return {"jpg": Path(path).read_bytes()}


def read_webdataset(folder: str) -> Iterator[Crops]:
    import webdataset

    crops = Reference().crops
    data = webdataset.WebDataset(shards_of(folder), shardshuffle=100, seed=0)
    while True:
        yield from data.shuffle(1000).map(lambda sample: crops(sample["jpg"]))


def read_mosaic(folder: str) -> Iterator[Crops]:
    from streaming import StreamingDataset

    crops = Reference().crops
    data = StreamingDataset(local=folder, batch_size=1, shuffle=True)
    while True:
        yield from (crops(sample["jpg"]) for sample in data)


def read_litdata(folder: str) -> Iterator[Crops]:
    from litdata import StreamingDataset

    crops = Reference().crops
    data = StreamingDataset(folder, shuffle=True, drop_last=False)
    while True:
        yield from (crops(sample["jpg"]) for sample in data)


WRITERS = {"webdataset": write_webdataset, "mosaic": write_mosaic, "litdata": write_litdata}
READERS = {"webdataset": read_webdataset, "mosaic": read_mosaic, "litdata": read_litdata}


def serve(name: str, folder: str, batch_size: int) -> None:
    images, collate = READERS[name](folder), Reference().collate
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            collate([next(images) for _ in range(batch_size)])
        print(time.process_time() - start, file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, name, *arguments = sys.argv[1:]
    if command == "write":
        WRITERS[name](*arguments)
    else:
        serve(name, arguments[0], int(arguments[1]))
