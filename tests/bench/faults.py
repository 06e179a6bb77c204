"""Images a second of two ranks whose store misbehaves, against the same two when it does not.

Two processes with a loader each, workers as by default, read one data set of photographs of 500x375
from an S3 server, through a proxy in a process of its own. Of the requests for data it then leaves
1 % hanging (half of them before the answer, half within), refuses 2 % with 503 SlowDown, and cuts
1 % in mid-body. Clean and faulty runs take turns, both through the proxy.

A rank's device is simulated: it is busy for a while with every batch, as long as one of PACE images
a second would be. Taken as fast as they come, batches would show how many cores the machine has to
spare for decoding, not what the network does; that is also why the crops are small, and not
coloured. Chunks of 1 MB, a quarter of what would be chosen, let a short run meet many faults. The
clock runs from a rank's first batch to its last.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.loader import LoaderConfig, MultiCropLoader
from pipeline.shards import crc32c
from tests.bench.photographs import TRAIN, photographs
from tests.bench.rows import Row
from tests.support.dataset import write_dataset
from tests.support.fault_proxy import FaultProxyProcess, Kind, Rule, fault_proxy_process
from tests.support.launch import ROOT, environment
from tests.support.s3_server import S3Server

GROUP = "loader."

IMAGES, EPOCHS, PER_SHARD = 4096, 2, 512
RANKS, BATCH, CHUNK = 2, 128, 24
CROPS = CropsConfig(global_size_px=64, local_size_px=32)
PACE = 400  # images a second and rank
ROUNDS = 3
LIMIT_S = 180
BUCKET = "misbehaving"

_DATA = "/data/"
RULES = (
    Rule(kind=Kind.STALL, target=_DATA, share=0.005),
    Rule(kind=Kind.STALL, target=_DATA, share=0.005, after_bytes=200_000),
    Rule(kind=Kind.REFUSE, target=_DATA, share=0.02, status=503),
    Rule(kind=Kind.CUT, target=_DATA, share=0.01, after_bytes=500_000),
)


def rows() -> list[Row]:
    """One comparison."""
    with tempfile.TemporaryDirectory() as folder, S3Server(folder) as server:
        os.environ.update(server.environment)
        url = server.make_bucket(BUCKET)
        write_dataset(url, list(photographs(IMAGES, TRAIN)), per_shard=PER_SHARD)
        runs = [_run_in_turn(server, url, number) for number in range(ROUNDS)]
    expected = runs[0][0].batches
    assert all(run.batches == expected for pair in runs for run in pair), "batches differ"
    ratio = statistics.median(faulty.rate / clean.rate for clean, faulty in runs)
    clean_rate = statistics.median(clean.rate for clean, _ in runs)
    return [
        Row("loader.faulty_store_rate", ratio, "x", ">= 0.9", _note(runs)),
        Row(
            "loader.faulty_store_rate.clean", clean_rate, "images/s", "", f"{RANKS} ranks of {PACE}"
        ),
    ]


class Run:
    """What the ranks of one run had to tell."""

    def __init__(self, found: Sequence[dict[str, Any]], struck: Counter[Kind | None]) -> None:
        self.batches: list[list[int]] = [each["batches"] for each in found]
        self.rate: float = sum(each["rate"] for each in found)
        self.struck = struck


def _run_in_turn(server: S3Server, url: str, number: int) -> tuple[Run, Run]:
    print(f"loader.faulty_store_rate: round {number + 1} of {ROUNDS}", file=sys.stderr)
    with fault_proxy_process(server.url) as proxy:
        clean = _run(proxy, url)
    with fault_proxy_process(server.url, RULES, seed=number) as proxy:
        faulty = _run(proxy, url)
    assert all(faulty.struck[rule.kind] for rule in RULES), faulty.struck
    return clean, faulty


def _run(proxy: FaultProxyProcess, url: str) -> Run:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.faults", url, str(rank)],
            cwd=ROOT,
            env=environment() | {"AWS_ENDPOINT_URL": proxy.url},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        answers = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = [json.loads(answer) for answer in answers]
    return Run(found, Counter(each.kind for each in proxy.exchanges()))


def _note(runs: Sequence[tuple[Run, Run]]) -> str:
    struck = sum((faulty.struck for _, faulty in runs), Counter())
    faults = ", ".join(f"{struck[kind]} {kind}" for kind in (Kind.STALL, Kind.REFUSE, Kind.CUT))
    return f"same batches; of {struck.total()} requests {faults}; median of {ROUNDS} rounds"


def main(url: str, rank: str) -> None:
    """One rank: its rate after the first batch, and a checksum of every batch."""
    config = LoaderConfig(dataset=url, global_batch=BATCH, chunk=CHUNK)
    place = {"rank": int(rank), "world_size": RANKS, "local_world_size": RANKS}
    batches, first_s = [], 0.0
    with MultiCropLoader(config, CROPS, AugmentConfig(), seed=0, epochs=EPOCHS, **place) as loader:
        for batch in loader.cut_batches():
            first_s = first_s or time.monotonic()
            parts = [batch.samples, *batch.blocks]
            batches.append([crc32c(part.tobytes()) for part in parts])
            time.sleep(loader.batch_size / PACE)
        seconds = time.monotonic() - first_s
    rate = len(batches) * loader.batch_size / seconds
    assert not loader.quarantine.before(EPOCHS, 0)
    print(json.dumps({"rate": rate, "batches": batches, **loader.telemetry.take()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
