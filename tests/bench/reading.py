"""CPU microseconds a sample from an S3 server to its bytes in memory, against other loaders.

The same photographs of 500x375 lie on one server: in our shards, which are webdataset's too, and in
litdata's and mosaic's own formats, all in files of about 64 MB. A reading is a process of its own
that first reads a small data set, so that nobody's imports, connections and buffers count, then the
large one. The readers take turns. Nothing is decoded.

All read as they do for training, shuffled, each in its usual way: ours by the lanes and windows of
its order, a chunk of 4 MB at a time, in a worker's environment; the peers as peers/reading.py says,
their caches on the local disk. Only ours checks what it has read, every sample's CRC32C.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import process_time

from botocore.session import Session

from pipeline.fetch import Prefetcher, pieces_in_order
from pipeline.manifest import read_snapshot
from pipeline.mixture import Source, mix_sources
from pipeline.ranges import READER_ENVIRONMENT
from pipeline.samples import RawSample, SampleReader
from pipeline.store import open_store
from pipeline.telemetry import Telemetry
from tests.bench.peers import PeerError, peer_python, peer_version
from tests.bench.photographs import TRAIN, photographs
from tests.bench.rows import Row
from tests.support.dataset import write_dataset
from tests.support.launch import ROOT, environment
from tests.support.s3_server import S3Server

GROUP = "loader."

SIZES = {"small": 2048, "large": 4096}  # samples; the small one fills what is read ahead
PER_SHARD = 1400  # 64 MB
CHUNK, WINDOW, LANES, BATCH = 96, 4, 4, 256
AHEAD_BYTES = 64 << 20
ROUNDS = 3
LIMIT_S = 120
BUCKET = "reading"

PEERS = {"webdataset": "webdataset", "litdata": "litdata", "mosaic": "mosaicml-streaming"}
_SCRIPTS = Path(__file__).with_name("peers")

Url = str
Command = list[str]


def rows() -> Iterator[Row]:
    """Ours against each peer, and the microseconds of all."""
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder, "s3")) as server:
        bench = Bench(Path(folder), server)
        bench.prepare()
        yield from bench.rows()


class Bench:
    """The readers that could be had, and what each reads."""

    def __init__(self, folder: Path, server: S3Server) -> None:
        self._folder = folder
        self._server = server
        self._environment = environment() | server.environment
        self._environment["S3_ENDPOINT_URL"] = server.url  # mosaic's name for it
        self._environment["PYTHONPATH"] = str(ROOT)  # multicrop.py imports its neighbour
        self._commands: dict[str, Command] = {}
        self._absent: dict[str, str] = {}

    def prepare(self) -> None:
        """Write the data sets in every format; note what could not be installed or written."""
        os.environ.update(self._server.environment)
        url = self._server.make_bucket(BUCKET)
        images = list(photographs(SIZES["large"], TRAIN))
        for size, count in SIZES.items():
            write_dataset(f"{url}/ours/{size}", images[:count], per_shard=PER_SHARD)
            write_dataset(str(self._folder / size), images[:count], per_shard=PER_SHARD)
        places = [f"{url}/ours/{size}" for size in SIZES]
        self._commands["ours"] = [sys.executable, "-m", "tests.bench.reading", *places]
        for name in PEERS:
            try:
                self._commands[name] = self._prepare_peer(name, url)
            except (PeerError, subprocess.SubprocessError) as error:
                self._absent[name] = str(error)

    def rows(self) -> Iterator[Row]:
        """Read in turns, some rounds; the median of each reader."""
        spent: dict[str, list[float]] = {name: [] for name in self._commands}
        for number in range(ROUNDS):
            print(f"loader.reading: round {number + 1} of {ROUNDS}", file=sys.stderr)
            for name, command in self._commands.items():
                spent[name].append(self._cpu_s(name, command) / SIZES["large"] * 1e6)
        medians = {name: statistics.median(times) for name, times in spent.items()}
        for name in PEERS:
            yield self._comparison(name, medians)
        for name, microseconds in medians.items():
            yield Row(f"loader.reading.{name}", microseconds, "CPU us/sample")

    def _comparison(self, name: str, medians: Mapping[str, float]) -> Row:
        row, target = f"loader.reading_vs_{name}", "<= 0.5" if name == "webdataset" else "<= 1"
        if name in self._absent:
            return Row(row, None, "x", target, self._absent[name])
        version = peer_version(name, PEERS[name])
        note = f"{PEERS[name]} {version}; {SIZES['large']} photographs of 500x375, 45 kB each"
        return Row(row, medians["ours"] / medians[name], "x", target, note)

    def _prepare_peer(self, name: str, url: Url) -> Command:
        python = str(peer_python(name))
        if name == "webdataset":
            places = [self._presigned(f"ours/{size}/data/") for size in SIZES]
        else:
            places = [self._convert(python, name, size, url) for size in SIZES]
        return [python, str(_SCRIPTS / "reading.py"), name, *places]

    def _presigned(self, prefix: str) -> str:
        """Web addresses of the tars, with spaces between them."""
        client = Session().create_client("s3")
        keys = [f"{prefix}{info.key}" for info in open_store(f"s3://{BUCKET}/{prefix}").list()]
        tars = [{"Bucket": BUCKET, "Key": key} for key in sorted(keys) if key.endswith(".tar")]
        return " ".join(client.generate_presigned_url("get_object", tar) for tar in tars)

    def _convert(self, python: str, name: str, size: str, url: Url) -> Url:
        """Rewrite our shards in a peer's format and bring it to the server."""
        target = self._folder / f"{name}-{size}"
        shards = str(self._folder / size)
        self._run([python, str(_SCRIPTS / "multicrop.py"), "write", name, shards, str(target)])
        store = open_store(f"{url}/{name}/{size}")
        for file in target.iterdir():
            with store.writer(file.name) as writer:
                writer.write(file.read_bytes())
        return store.url

    def _cpu_s(self, name: str, command: Command) -> float:
        own = READER_ENVIRONMENT if name == "ours" else {}
        with tempfile.TemporaryDirectory(dir=self._folder) as cache:
            done = self._run([*command, cache], own)
        found = json.loads(done.splitlines()[-1])
        assert found["num_samples"] >= SIZES["large"] - BATCH, (name, found)
        return float(found["cpu_s"])

    def _run(self, command: Sequence[str], own: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self._environment, **(own or {})},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if done.returncode:
            sys.stderr.write(done.stderr[-2000:])
        done.check_returncode()
        return done.stdout


def read_samples(url: Url) -> Iterator[bytes]:
    """One epoch as the loader's workers read it; every sample must be good."""
    store = open_store(url)
    snapshot = read_snapshot(store)
    source = Source(url, snapshot.num_kept, min(CHUNK, snapshot.num_kept // LANES), WINDOW)
    mixture = mix_sources([source], global_batch=BATCH, lanes=LANES, seed=0)
    windows = mixture.windows(0, 0, range(LANES), epochs=1)
    size = float(snapshot.tar_bytes.sum()) / snapshot.num_kept
    prefetcher = Prefetcher(
        [SampleReader(store, snapshot, Telemetry())],
        pieces_in_order(windows, [source.chunk]),
        ahead_bytes=AHEAD_BYTES,
        sample_bytes=[size],
    )
    for step in range(mixture.num_steps):
        for number in mixture.slots(0, step, range(LANES)).number.tolist():
            sample = prefetcher.take(0, 0, number)
            assert isinstance(sample, RawSample), sample
            yield sample.data
    prefetcher.close()


def main(small: Url, large: Url, _cache: str) -> None:
    """Read both, print what the second cost, like peers/reading.py."""
    assert all(read_samples(small))
    began = process_time()
    sizes = [len(data) for data in read_samples(large)]
    spent = process_time() - began
    print(json.dumps({"cpu_s": spent, "num_samples": len(sizes), "size_bytes": sum(sizes)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
