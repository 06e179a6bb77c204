"""CPU seconds an image from URLs to shards, against img2dataset.

A server on loopback, in a process of its own, has the photographs; both programs are run by their
commands with one worker, on short lists and long ones, and what the longer list costs more is
divided by what it has more: so neither pays for its start. Counted is the CPU time of all of a
program's processes. Each is asked for the same thing, in its fastest way:

    bytes kept, nothing decoded   disable_all_reencoding, where it looks at no pixel and no header
                                  / --no-decode, where the header is checked
    bytes kept, decoded           skip_reencode / the default, with a perceptual hash
    shorter side 256              keep_ratio, INTER_AREA / --resize shortest; JPEG of quality 95

Both store a SHA-256 of every image; its EXIF, which we do not extract, img2dataset is told to
leave out.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bench.peers import PeerError, peer_python, peer_version
from tests.bench.photographs import photographs
from tests.bench.rows import Row
from tests.bench.usage import run_measured
from tests.support.http_server import http_server_process

GROUP = "pack."

FEW, MANY = 500, 3500
ROUNDS = 3
CONNECTIONS = 16

Command = Callable[[int, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Contest:
    """The same task in both programs' words."""

    name: str
    what: str
    target: str
    theirs: Sequence[str]
    ours: Sequence[str]


CONTESTS = (
    Contest(
        "pack.urls_vs_img2dataset",
        "bytes kept, nothing decoded",
        ">= 2",
        ["--resize_mode=no", "--disable_all_reencoding=True"],
        ["--no-decode"],
    ),
    Contest(
        "pack.urls_decoded_vs_img2dataset",
        "bytes kept, decoded",
        "",
        ["--resize_mode=no", "--skip_reencode=True"],
        [],
    ),
    Contest(
        "pack.urls_resize_vs_img2dataset",
        "shorter side 256, JPEG of quality 95",
        ">= 1.3",
        ["--resize_mode=keep_ratio", "--image_size=256", "--encode_quality=95"],
        ["--resize", "shortest", "--size", "256", "--quality", "95"],
    ),
)


def rows() -> Iterator[Row]:
    """Three comparisons, and the milliseconds of both sides of each."""
    try:
        python = peer_python("img2dataset")
    except PeerError as error:
        yield from (Row(each.name, None, "x", each.target, str(error)) for each in CONTESTS)
        return
    pages = {f"/{n:06d}.jpg": body for n, body in enumerate(photographs(MANY))}
    with http_server_process(pages) as server, tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), [server + path for path in pages], python)
        for contest in CONTESTS:
            yield from bench.compare(contest)


class Bench:
    """Runs both programs on lists of URLs."""

    def __init__(self, folder: Path, urls: Sequence[str], python: Path) -> None:
        self._folder = folder
        self._python = str(python)
        self._runs = 0
        for count in (FEW, MANY):
            pq.write_table(pa.table({"url": urls[:count]}), folder / f"{count}.parquet")

    def compare(self, contest: Contest) -> Iterator[Row]:
        """Both in turn, some rounds."""
        timings = []
        for number in range(ROUNDS):
            print(f"{contest.name}: round {number + 1} of {ROUNDS}", file=sys.stderr)
            timings.append((self._per_image_s(self._theirs, contest.theirs),
                            self._per_image_s(self._ours, contest.ours)))  # fmt: skip
        ratio = statistics.median(theirs / ours for theirs, ours in timings)
        note = f"{contest.what}; img2dataset {peer_version('img2dataset')}, {CONNECTIONS} threads"
        yield Row(contest.name, ratio, "x", contest.target, note)
        for column, who in enumerate(("img2dataset", "ours")):
            milliseconds = 1e3 * statistics.median(pair[column] for pair in timings)
            yield Row(f"{contest.name}.{who}", milliseconds, "CPU ms/image")

    def _per_image_s(self, command: Command, options: Sequence[str]) -> float:
        """CPU seconds that one more image costs."""
        few, many = (run_measured(*command(count, options)).cpu_s for count in (FEW, MANY))
        return (many - few) / (MANY - FEW)

    def _theirs(self, count: int, options: Sequence[str]) -> list[str]:
        return [
            self._python,
            "-m",
            "img2dataset.main",
            f"--url_list={self._list(count)}",
            f"--output_folder={self._new_folder()}",
            "--input_format=parquet",
            "--output_format=webdataset",
            "--extract_exif=False",
            "--processes_count=1",
            f"--thread_count={CONNECTIONS}",
            *options,
        ]

    def _ours(self, count: int, options: Sequence[str]) -> list[str]:
        command = [sys.executable, "-m", "shard_tools", "pack", str(self._list(count))]
        command += [str(self._new_folder()), "--allow-private", "--workers", "1"]
        return [*command, "--per-host", str(CONNECTIONS), *options]

    def _list(self, count: int) -> Path:
        return self._folder / f"{count}.parquet"

    def _new_folder(self) -> Path:
        self._runs += 1
        return self._folder / f"out{self._runs}"
