"""CPU seconds an image from URLs to shards, against img2dataset.

A server on loopback, in a process of its own, has the photographs; both programs are run by their
commands with one worker, on short lists and long ones, and what the longer list costs more is
divided by what it has more: so neither pays for its start. Counted is the CPU time of all of a
program's processes. Each is asked for the same thing, in its fastest way:

    bytes kept, nothing decoded   disable_all_reencoding, where it looks at no pixel and no header
                                  / --no-decode, where the header is checked
    bytes kept, decoded           skip_reencode / the default, with a perceptual hash
    shorter side 256              keep_ratio, INTER_AREA / --resize shortest; JPEG of quality 95

The photographs are the web's; once more, smaller ones are resized, where scaling while decoding
gains nothing.

Both store a SHA-256 of every image; its EXIF, which we do not extract, img2dataset is told to
leave out.
"""

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bench.peers import PeerError, peer_python, peer_version
from tests.bench.photographs import SMALL, WEB, Kind, photographs
from tests.bench.rows import Row
from tests.bench.usage import run_measured
from tests.support.http_server import http_server_process

GROUP = "pack."

FEW, MANY = 500, 3500
ROUNDS = 3
CONNECTIONS = 16

Command = Callable[[str, str], list[str]]  # of a list and a new folder


@dataclass(frozen=True)
class Contest:
    """The same task in both programs' words."""

    name: str
    what: str
    target: str
    theirs: Sequence[str]
    ours: Sequence[str]
    kind: Kind = WEB


RESIZE = (
    ["--resize_mode=keep_ratio", "--image_size=256", "--encode_quality=95"],
    ["--resize", "shortest", "--size", "256", "--quality", "95"],
)
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
    Contest("pack.urls_resize_vs_img2dataset", "1024x683 to shorter side 256", ">= 1.3", *RESIZE),
    Contest(
        "pack.urls_resize_small_vs_img2dataset", "512x400 to shorter side 256", "", *RESIZE, SMALL
    ),
)


def rows() -> Iterator[Row]:
    """Four comparisons, and the milliseconds of both sides of each."""
    try:
        python = peer_python("img2dataset")
    except PeerError as error:
        yield from (Row(each.name, None, "x", each.target, str(error)) for each in CONTESTS)
        return
    pages = {
        _path(kind, number): body
        for kind in (WEB, SMALL)
        for number, body in enumerate(photographs(MANY, kind))
    }
    with http_server_process(pages) as server, tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), server, python)
        for contest in CONTESTS:
            yield from bench.compare(contest)


def _path(kind: Kind, number: int) -> str:
    return f"/{kind.width_px}/{number:06d}.jpg"


class Bench:
    """Runs both programs on lists of URLs of a server."""

    def __init__(self, folder: Path, server: str, python: Path) -> None:
        self._folder = folder
        self._python = str(python)
        self._runs = 0
        for kind in (WEB, SMALL):
            for count in (FEW, MANY):
                urls = [server + _path(kind, number) for number in range(count)]
                pq.write_table(pa.table({"url": urls}), self._list(kind, count))

    def compare(self, contest: Contest) -> Iterator[Row]:
        """Both in turn, some rounds; the median of each."""
        timings = []
        for number in range(ROUNDS):
            print(f"{contest.name}: round {number + 1} of {ROUNDS}", file=sys.stderr)
            timings.append(
                [
                    self._cpu_s(command, contest.kind, count)
                    for command in (self._theirs(contest.theirs), self._ours(contest.ours))
                    for count in (FEW, MANY)
                ]
            )
        medians = [statistics.median(column) for column in zip(*timings, strict=True)]
        theirs, ours = ((many - few) / (MANY - FEW) for few, many in (medians[:2], medians[2:]))
        note = f"{contest.what}; img2dataset {peer_version('img2dataset')}, {CONNECTIONS} threads"
        yield Row(contest.name, theirs / ours, "x", contest.target, note)
        yield Row(f"{contest.name}.img2dataset", theirs * 1e3, "CPU ms/image")
        yield Row(f"{contest.name}.ours", ours * 1e3, "CPU ms/image")

    def _cpu_s(self, command: Command, kind: Kind, count: int) -> float:
        target = self._folder / "target"
        try:
            return run_measured(*command(str(self._list(kind, count)), str(target))).cpu_s
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _theirs(self, options: Sequence[str]) -> Command:
        return lambda urls, target: [
            "env",
            "NO_ALBUMENTATIONS_UPDATE=1",  # else it asks the network at every start
            self._python,
            "-m",
            "img2dataset.main",
            f"--url_list={urls}",
            f"--output_folder={target}",
            "--input_format=parquet",
            "--output_format=webdataset",
            "--extract_exif=False",
            "--processes_count=1",
            f"--thread_count={CONNECTIONS}",
            *options,
        ]

    def _ours(self, options: Sequence[str]) -> Command:
        command = [sys.executable, "-m", "shard_tools", "pack"]
        fixed = ["--allow-private", "--workers", "1", "--per-host", str(CONNECTIONS)]
        return lambda urls, target: [*command, urls, target, *fixed, *options]

    def _list(self, kind: Kind, count: int) -> Path:
        return self._folder / f"{kind.width_px}-{count}.parquet"
