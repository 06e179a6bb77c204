"""Planning a million URLs, and sealing a hundred thousand units.

Both in a process of their own, against a data set in a local directory. The lists have three
columns besides the URL. The commits that `seal` reads are simulated: one JSON file a unit, as pack
would have left it, of shards that do not exist.
"""

import csv
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest import commit, new_attempt
from pipeline.store import open_store
from shard_tools.commits import UnitCommit
from shard_tools.plan import PackSettings, Plan
from tests.bench.rows import Row
from tests.bench.usage import Usage, run_measured

GROUP = "pack."

NUM_URLS = 1_000_000
NUM_UNITS = 100_000

_COLUMNS = ("url", "caption", "width", "height")


def rows() -> Iterator[Row]:
    """CPU seconds and peak memory of `plan`, of a Parquet list and of CSV; then of `seal`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parquet, zipped = _write_lists(folder)
        planned = _shard_tools("plan", str(parquet), str(folder / "parquet"))
        yield _seconds("pack.plan_million_urls_s", planned, "<= 30", "Parquet, 4 columns")
        yield _megabytes("pack.plan_million_urls_rss", planned)
        planned = _shard_tools("plan", str(zipped), str(folder / "csv"))
        yield _seconds("pack.plan_million_urls_csv_s", planned, "<= 30", "gzipped CSV, 4 columns")
        yield _megabytes("pack.plan_million_urls_csv_rss", planned)
        dataset = folder / "sealed"
        plan = _plan_with_commits(dataset)
        sealed = _shard_tools("seal", str(dataset), "--plan", plan)
        yield _seconds("pack.seal_100k_units_s", sealed, "<= 60", "local directory")
        yield _megabytes("pack.seal_100k_units_rss", sealed)


def _shard_tools(*arguments: str) -> Usage:
    print(f"shard_tools {' '.join(arguments[:2])}", file=sys.stderr)
    return run_measured(sys.executable, "-m", "shard_tools", *arguments)


def _seconds(name: str, usage: Usage, target: str, note: str) -> Row:
    return Row(name, usage.cpu_s, "CPU s", target, f"{note}; {usage.wall_s:.1f} s by the clock")


def _megabytes(name: str, usage: Usage) -> Row:
    return Row(name, usage.peak_bytes / 1e6, "MB", "<= 500", "peak")


def _write_lists(folder: Path) -> tuple[Path, Path]:
    """The same list as Parquet and as gzipped CSV."""
    records = [
        (f"https://images{n % 977}.example.org/{n % 4096:03x}/{n:09d}.jpg?width=1024",
         f"a photograph of something, number {n} of a million", str(n % 2000), str(n % 1500))
        for n in range(NUM_URLS)
    ]  # fmt: skip
    parquet, zipped = folder / "list.parquet", folder / "list.csv.gz"
    columns = dict(zip(_COLUMNS, map(list, zip(*records, strict=True)), strict=True))
    pq.write_table(pa.table(columns), parquet)
    with gzip.open(zipped, "wt", compresslevel=1, newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *records])
    return parquet, zipped


def _plan_with_commits(dataset: Path) -> str:
    """The name of a plan all of whose units have been packed; seal looks at no unit itself."""
    plan = Plan("5ea1" * 4, "urls", "file:///list.parquet", PackSettings(), NUM_UNITS, NUM_UNITS, 0)
    key = f"plans/{plan.name}/plan.json"
    commit(open_store(str(dataset)), key, asdict(plan), attempt=new_attempt())
    print(f"writing {NUM_UNITS} commits", file=sys.stderr)
    _write_commits(dataset / "commits" / plan.name, plan)
    return plan.name


def _write_commits(folder: Path, plan: Plan) -> None:
    folder.mkdir(parents=True)
    for unit in range(plan.num_units):
        attempt = f"{unit:024x}"
        name = f"data/{attempt[-2:]}/{plan.name[:8]}-{unit:08d}-{attempt}"
        done = UnitCommit(
            tar=f"{name}.tar",
            index=f"{name}.parquet",
            tar_bytes=256_000_000,
            index_bytes=250_000,
            tar_tag=None,
            index_tag=None,
            tar_hash=f"{unit:064x}",
            index_sha256=f"{unit:064x}",
            rows=5000,
            kept=2400,
            sample_bytes=255_000_000,
            rejected={"http 404": 2000, "timeout": 600},
            attempt=attempt,
        )
        (folder / f"{unit:08d}.json").write_text(json.dumps(asdict(done), sort_keys=True, indent=1))
