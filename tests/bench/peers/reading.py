"""Samples of a loader of the field, their bytes and nothing else; runs in the peer's environment.

    python reading.py NAME SMALL LARGE CACHE    reads two data sets, prints the CPU seconds and the
                                                number and bytes of the samples of the second

The first one warms up: clients are made, modules are imported. Each peer reads in this process, so
that handing over costs nothing, shuffled in its usual way, its files fetched as it does by default:

    webdataset   tar by tar, by its own opener of web addresses: a curl behind a pipe, which is the
                 cheapest it has for S3 (presigned addresses); a buffer of 1000 samples shuffles
    litdata      chunks of 64 MB, each fetched whole by obstore, kept in a local cache
    mosaic       shards of 64 MB, each fetched whole by boto3, kept in a local cache

Counted is the process with the children it has waited for.
"""

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

for operator in ("nms", "qnms"):  # see NAME.txt
    torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")


def webdataset(urls: str, cache: Path) -> Iterator[bytes]:
    """Spaces between the addresses of the shards."""
    import webdataset as wds

    for sample in wds.WebDataset(urls.split(), shardshuffle=100, seed=0).shuffle(1000):
        yield sample["jpg"]


def litdata(url: str, cache: Path) -> Iterator[bytes]:
    """A folder on S3."""
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # nothing else lets it
    options = {"storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}}
    for sample in litdata.StreamingDataset(url, cache_dir=str(cache), shuffle=True, **options):
        yield sample["jpg"]


def mosaic(url: str, cache: Path) -> Iterator[bytes]:
    """A folder on S3."""
    from streaming import StreamingDataset

    for sample in StreamingDataset(remote=url, local=str(cache), shuffle=True, batch_size=1):
        yield sample["jpg"]


READERS = {reader.__name__: reader for reader in (webdataset, litdata, mosaic)}


def cpu_s() -> float:
    """Of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(name: str, small: str, large: str, cache: str) -> None:
    reader = READERS[name]
    assert all(reader(small, Path(cache, "small")))
    began = cpu_s()
    sizes = [len(data) for data in reader(large, Path(cache, "large"))]
    spent = cpu_s() - began
    print(json.dumps({"cpu_s": spent, "num_samples": len(sizes), "size_bytes": sum(sizes)}))
    sys.stdout.flush()
    os._exit(0)  # some leave threads behind that keep the interpreter from ending


if __name__ == "__main__":
    main(*sys.argv[1:])
