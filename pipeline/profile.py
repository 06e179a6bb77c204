"""python -m pipeline.profile s3://…: what a loader on this data could do, and what bounds it.

Measures every stage alone and the real loader whole (pipeline.stages), divides what a machine has
by what an image costs (pipeline.forecast), and draws the loader's time (pipeline.timeline).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.batches import mean_sample_bytes
from pipeline.config import load_config
from pipeline.cores import usable_cores
from pipeline.errors import UsageError, run_command
from pipeline.forecast import (
    ASSUMED_IMAGES_PER_S,
    Costs,
    Rate,
    cores_needed,
    forecast_table,
    slowest,
)
from pipeline.store import open_store

if TYPE_CHECKING:  # --help does not wait for torch
    from pipeline.loader import MultiCropLoader
    from pipeline.samples import RawSample
    from pipeline.stages import Cutting, DeviceWork, Looping, Reading, Settings

_DESCRIPTION = """\
Measure what a loader on a packed data set can do on this machine, as one rank: reading alone,
decoding, cropping and colour on one core, and the real loader from end to end. Prints a table,
what bounds the loader, and what machines with more cores or a faster network would do.

  python -m pipeline.profile s3://bucket/data
  python -m pipeline.profile s3://bucket/data --quick loader.workers=2 loader.threads=4
  python -m pipeline.profile s3://bucket/data --config configs/swav_rn50_bs256.toml \\
      --images-per-s 2500 --out timeline.html

Of a configuration it takes the sections loader, fetch, crops and augment. Where there is no CUDA
device, colour is left out of the loader, as it is the device's work. Nothing is written to the data
set.

exit codes: 0 measured, 1 failed, 2 wrong usage or configuration
"""
_DEFAULTS = ("loader.global_batch=256",)  # where there is no --config; of one rank
_QUICK_S = 6.0
_WAITS = {
    "wait_fetch_s": "fetch",
    "wait_decode_s": "decode",
    "wait_handover_s": "hand-over",
    "transfer_s": "transfer",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.profile",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="prefix of a packed data set: s3://…, file:///… or a path")
    parser.add_argument("--config", metavar="FILE", help="a TOML file; presets are in configs/")
    parser.add_argument(
        "--seconds", type=_positive, default=60.0, help="how long the loader runs; 60 by default"
    )
    parser.add_argument("--quick", action="store_true", help=f"--seconds {_QUICK_S:g}")
    parser.add_argument(
        "--images-per-s", type=_positive, metavar="N", help="what the devices of a rank take"
    )
    parser.add_argument(
        "--world-size",
        type=_ranks,
        default=1,
        metavar="N",
        help="ranks of the run; one is measured",
    )
    parser.add_argument("--out", metavar="FILE", help="draw the loader's time as an HTML page")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings over those of the file"
    )
    arguments = parser.parse_intermixed_args()  # overrides may follow options
    return run_command(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, draw."""
    seconds = _QUICK_S if arguments.quick else arguments.seconds
    if arguments.out:
        _check_writable(Path(arguments.out))
    profile = measure(
        arguments.dataset,
        arguments.config,
        arguments.overrides,
        world_size=arguments.world_size,
        seconds=seconds,
        given_images_per_s=arguments.images_per_s,
    )
    sys.stdout.write("\n".join([*report(profile), ""]))
    if arguments.out:
        Path(arguments.out).write_text(draw(profile), encoding="utf-8")
        sys.stdout.write(f"the loader's time: {arguments.out}\n")
    return 0


@dataclass(frozen=True)
class Profile:
    """Everything that was measured, and what it was measured on."""

    title: str
    num_images: int
    sample_bytes: float
    num_cores: int
    reading: "Reading"
    cutting: "Cutting"
    looping: "Looping"
    device_work: "DeviceWork | None"
    given_images_per_s: float | None

    @property
    def costs(self) -> Costs:
        """Of an image; the bytes are those of its shard, headers and padding included."""
        return Costs(self.looping.cpu_s_per_image, self.sample_bytes)

    @property
    def network(self) -> float:
        """Images a second that reading alone would bring."""
        return self.reading.bytes_per_s / self.sample_bytes

    @property
    def decode(self) -> float:
        """Images a second for which there are cores."""
        return self.num_cores / self.looping.cpu_s_per_image

    @property
    def device(self) -> float:
        """Images a second that the devices take, as far as that is known."""
        if self.given_images_per_s is not None:
            return self.given_images_per_s
        return self.device_work.images_per_s if self.device_work else math.inf

    @property
    def bound(self) -> Rate:
        return slowest(network=self.network, decode=self.decode, device=self.device)


# Measuring


def measure(
    dataset: str,
    config_path: str | None,
    overrides: Sequence[str],
    *,
    world_size: int,
    seconds: float,
    given_images_per_s: float | None,
) -> Profile:
    """Every stage for a part of the time, then the loader for all of it."""
    from pipeline.stages import Settings, measure_cutting, measure_device, measure_loader

    defaults = () if config_path else _DEFAULTS
    named = f"loader.dataset={json.dumps(dataset)}", "loader.mix=[]"
    config = load_config(
        Settings, config_path, [*defaults, *overrides, *named], other_sections=True
    )
    with _open_loader(config, world_size) as loader:
        reading, samples = _read_alone(loader, seconds / 4)
        with _progress("one core", 0):
            cutting = measure_cutting(
                samples, config.crops, config.augment, seconds=min(seconds / 4, 6.0)
            )
        with _progress("the loader", seconds) as tick:
            looping = measure_loader(loader, seconds=seconds, tick=tick)
        device_work = None
        if loader.device.type == "cuda":
            device_work = measure_device(
                loader.batch_size, config.crops, config.augment, loader.device
            )
    (snapshot,) = loader.snapshots
    return Profile(
        title=f"{dataset}, version {snapshot.version}",
        num_images=snapshot.num_kept,
        sample_bytes=mean_sample_bytes(snapshot),
        num_cores=usable_cores(),
        reading=reading,
        cutting=cutting,
        looping=looping,
        device_work=device_work,
        given_images_per_s=given_images_per_s,
    )


def _open_loader(config: "Settings", world_size: int) -> "MultiCropLoader":
    """The first rank's loader, with all cores to itself."""
    import torch

    from pipeline.loader import MultiCropLoader

    return MultiCropLoader(
        config.loader,
        config.crops,
        config.augment,
        fetch=config.fetch,
        seed=0,
        world_size=world_size,
        local_world_size=1,
        device="cuda" if torch.cuda.is_available() else "cpu",
        record_spans=True,
    )


def _read_alone(loader: "MultiCropLoader", seconds: float) -> "tuple[Reading, Sequence[RawSample]]":
    """As the loader reads, without anybody who decodes."""
    from pipeline.stages import measure_reading

    (snapshot,), (source,) = loader.snapshots, loader.data_sets
    ahead = len(loader.lanes) * (source.window + 1) * source.chunk
    with _progress("reading alone", seconds) as tick:
        return measure_reading(
            open_store(source.url),
            snapshot,
            loader.fetch,
            chunk=source.chunk,
            ahead_bytes=round(ahead * mean_sample_bytes(snapshot)),
            seconds=seconds,
            tick=tick,
        )


@contextmanager
def _progress(stage: str, seconds: float) -> Iterator[Callable[[float], object]]:
    """A bar where a terminal is; what it yields is told the seconds that have passed."""
    from tqdm import tqdm

    form = "{desc}: {bar} {n:.0f} of {total:.0f} s" if seconds else "{desc} …"
    with tqdm(total=seconds, desc=stage, bar_format=form, leave=False, disable=None) as bar:
        yield lambda passed: bar.update(min(passed, seconds - bar.n))


# What is said


def report(profile: Profile) -> list[str]:
    """The table, the verdict, and what other machines would do."""
    reading, cutting, looping = profile.reading, profile.cutting, profile.looping
    lines = [
        f"{profile.title}: {profile.num_images:,} images of {profile.sample_bytes / 1e3:,.0f} kB; "
        f"{profile.num_cores} cores",
        "",
        _line(
            "reading alone",
            f"{reading.bytes_per_s / 1e6:,.0f} MB/s",
            f"{profile.network:,.0f} images/s",
            f"{reading.cpu_s_per_gigabyte:.2f} CPU s/GB",
            f"{reading.requests:,.0f} requests of {reading.request_bytes / 1e3:,.0f} kB, "
            f"{reading.retries:,.0f} retries",
        ),
        _line(
            "one core",
            f"{1e3 * cutting.crops_s:.2f} ms/image",
            f"{1 / cutting.crops_s:,.0f} images/s",
            f"decode {1e3 * cutting.decode_s:.2f} ms of it",
            f"colour {1e3 * cutting.colour_s:.2f} ms more, if no device does it",
        ),
        _line(
            "the loader",
            f"{1e3 * looping.cpu_s_per_image:.2f} CPU ms/image",
            f"{looping.images_per_s:,.0f} images/s",
            f"{looping.resident_bytes / 1e6:,.0f} MB with us",
            f"first batch after {looping.start_s:.1f} s",
        ),
        _line("its waits", *_waits(looping)),
        *_device_lines(profile),
        "",
        verdict(profile),
        "",
        "images/s of other machines",
        *forecast_table(profile.costs, device=profile.device),
    ]
    return lines


def verdict(profile: Profile) -> str:
    """What bounds the loader, in one line."""
    bound = profile.bound
    parts = {
        "network": f"the network brings {profile.network:,.0f} images/s",
        "decode": f"{profile.num_cores} cores prepare {profile.decode:,.0f} images/s",
        "device": f"the devices take {profile.device:,.0f} images/s",
    }
    others = [text for part, text in parts.items() if part != bound.bound]
    if not math.isfinite(profile.device):
        others = [text for text in others if text != parts["device"]]
    wanted = profile.given_images_per_s or ASSUMED_IMAGES_PER_S
    basis = "" if profile.given_images_per_s else " (assumed: SwAV, ResNet-50 on an H200)"
    cores = math.ceil(cores_needed(profile.costs, wanted))
    gigabytes_per_s = wanted * profile.costs.read_bytes / 1e9
    return (
        f"bound by {bound.bound}: {parts[bound.bound]}, {', '.join(others)}, and the loader "
        f"reached {profile.looping.images_per_s:,.0f}; a GPU of "
        f"{wanted:,.0f} images/s{basis} needs {cores} such cores and {gigabytes_per_s:.2g} GB/s"
    )


def draw(profile: Profile) -> str:
    """The page of pipeline.timeline."""
    from pipeline.timeline import Limit, Timeline, render_timeline

    looping = profile.looping
    limits = [
        Limit("this loader", looping.images_per_s),
        Limit("network", profile.network),
        Limit(f"decode, {profile.num_cores} cores", profile.decode),
    ]
    if math.isfinite(profile.device):
        limits.append(Limit("device", profile.device))
    figures = [
        ("Images per second", f"{looping.images_per_s:,.0f}"),
        ("Read", f"{looping.images_per_s * profile.sample_bytes / 1e6:,.0f} MB/s"),
        ("CPU per image", f"{1e3 * looping.cpu_s_per_image:.2f} ms"),
        *((f"Waiting for {what}", f"{100 * looping.share(w):.0f} %") for w, what in _WAITS.items()),
        ("Memory", f"{looping.resident_bytes / 1e6:,.0f} MB"),
    ]
    requests = looping.sums.get("fetch_requests", 0.0)
    timeline = Timeline(
        title=profile.title,
        verdict=verdict(profile),
        figures=figures,
        limits=limits,
        spans=looping.spans,
        batches=looping.batches,
        request_bytes=looping.sums.get("fetch_bytes", 0.0) / requests if requests else 0.0,
    )
    return render_timeline(timeline)


def _waits(looping: "Looping") -> list[str]:
    return [f"{what} {100 * looping.share(name):.0f} %" for name, what in _WAITS.items()]


def _device_lines(profile: Profile) -> list[str]:
    work = profile.device_work
    if work is None:
        return []
    return [
        _line(
            "the device",
            f"copy {1e3 * work.copy_s:.2f} ms/batch",
            f"{work.images_per_s:,.0f} images/s",
            f"colour {1e3 * work.colour_s:.2f} ms/batch of {work.batch_size}",
        )
    ]


def _line(name: str, *cells: str) -> str:
    return f"{name:<15}" + "".join(f"{cell:<22} " for cell in cells[:-1]) + cells[-1]


# Arguments


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def _ranks(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def _check_writable(path: Path) -> None:
    """Before anything is measured."""
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"cannot write --out {path}: give the name of a file in a folder there is")


if __name__ == "__main__":
    sys.exit(main())
