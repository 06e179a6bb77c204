"""python -m pipeline.profile s3://…: what a loader on this data could do, and what bounds it.

Measures every stage alone and the real loader whole (pipeline.stages), divides what a machine has
by what an image costs (pipeline.forecast), and draws the loader's time (pipeline.timeline).
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
set. Of a mix (loader.mix), give one data set at a time; a mix in the configuration is left aside.

Every stage ends when its time is up, but measures at least one image, and the loader one batch; of
images so large that a batch takes too long, the loader is measured in smaller ones.

exit codes: 0 measured, 1 failed, 2 wrong usage or configuration
"""
_DEFAULTS = ("loader.global_batch=256",)  # where there is no --config; of one rank
_SECONDS_HELP = "how long the loader runs; 60 by default. The other stages take half of it more"
_QUICK_S = 6.0
_QUICK_HELP = f"--seconds {_QUICK_S:g}: with starting and the other stages some 12 to 25 s in all"
_BATCHES = 4  # of the loader, that should fit into its time
_GAP = 0.7  # a loader below this share of its slowest stage is held up by something else
_SMALL_REQUEST_BYTES = 1e6  # below it, a request is mostly waiting for its first byte
_WAITS = {
    "wait_fetch_s": "fetch",
    "wait_decode_s": "decode",
    "wait_handover_s": "hand-over",
    "transfer_s": "transfer",
}
_ADVICE = {
    "wait_decode_s": "not all cores decoded all the time: see what else runs on them, raise "
    "loader.workers or loader.threads, or measure for longer (--seconds)",
    "wait_handover_s": "workers wait for slots: raise loader.prefetch_batches",
    "transfer_s": "copying to the device is slow: see what else uses its bus",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.profile",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="prefix of a packed data set: s3://…, file:///… or a path")
    parser.add_argument("--config", metavar="FILE", help="a TOML file; presets are in configs/")
    parser.add_argument("--seconds", type=_positive, default=60.0, help=_SECONDS_HELP)
    parser.add_argument("--quick", action="store_true", help=_QUICK_HELP)
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
    _check_dataset(arguments.dataset)
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
    note: str = ""  # on how the loader was measured

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
        cutting_s = min(seconds / 4, 6.0)
        with _progress(f"one core: decoding some of {len(samples)} images", cutting_s):
            cutting = measure_cutting(samples, config.crops, config.augment, seconds=cutting_s)
        asked = loader.batch_size
    fitting = _fitting_batch(asked, usable_cores(), image_s=cutting.crops_s, seconds=seconds)
    if fitting < asked:
        config = _with_batch(config, loader, fitting * world_size)
    with _open_loader(config, world_size) as loader:
        title = f"the loader: starting workers, then batches of {loader.batch_size} images"
        with _progress(title, seconds) as tick:
            looping = measure_loader(loader, seconds=seconds, tick=tick)
        device_work = None
        if loader.device.type == "cuda":
            with _progress("the device: copying and colour of a batch", 0):
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
        note=f"in batches of {fitting}, not {asked}: such images take long" * (fitting < asked),
    )


def _fitting_batch(asked: int, cores: int, *, image_s: float, seconds: float) -> int:
    """Images of a rank's batch, so few that some batches fit into the time; one a core at least."""
    return min(asked, max(cores, int(seconds * cores / image_s / _BATCHES)))


def _with_batch(config: "Settings", loader: "MultiCropLoader", global_batch: int) -> "Settings":
    """The same reads for smaller batches."""
    (source,) = loader.data_sets
    smaller = replace(
        config.loader,
        global_batch=global_batch,
        lanes=0,
        chunk=source.chunk,
        window=source.window,
    )
    return replace(config, loader=smaller)


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
    with _progress(f"reading alone: chunks of {source.chunk} images", seconds) as tick:
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
    """A bar in a terminal, elsewhere a line; what it yields is told the seconds that passed."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        sys.stderr.write(f"{stage}{f', for {seconds:.2g} s' if seconds else ''} …\n")
        sys.stderr.flush()
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
            f"{_rate(profile.network)} images/s",
            f"{reading.cpu_s_per_gigabyte:.2f} CPU s/GB",
            f"{reading.requests:,.0f} requests of {reading.request_bytes / 1e3:,.0f} kB, "
            f"{reading.retries:,.0f} retries",
        ),
        _line(
            "one core",
            f"{1e3 * cutting.crops_s:.2f} ms/image",
            f"{_rate(1 / cutting.crops_s)} images/s",
            f"decode {1e3 * cutting.decode_s:.2f} ms of it",
            f"colour {1e3 * cutting.colour_s:.2f} ms more, if no device does it",
        ),
        _line(
            "the loader",
            f"{1e3 * looping.cpu_s_per_image:.2f} CPU ms/image",
            f"{_rate(looping.images_per_s)} images/s",
            f"{looping.resident_bytes / 1e6:,.0f} MB with us",
            f"first batch after {looping.start_s:.1f} s",
        ),
        *([_line("", profile.note)] if profile.note else []),
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
    reached, bound = profile.looping.images_per_s, profile.bound
    if reached < _GAP * bound.images_per_s:
        return f"{_held_up(profile)}; {_needs(profile)}"
    parts = _parts(profile)
    others = [text for part, text in parts.items() if part != bound.bound]
    return (
        f"bound by {bound.bound}: {', '.join([parts[bound.bound], *others])}, and the loader "
        f"reached {_rate(reached)}; {_needs(profile)}"
    )


def _parts(profile: Profile) -> dict[str, str]:
    """What every part can do, as far as it is known."""
    parts = {
        "network": f"the network brings {_rate(profile.network)} images/s",
        "decode": f"{profile.num_cores} cores prepare {_rate(profile.decode)} images/s",
    }
    if math.isfinite(profile.device):
        parts["device"] = f"the devices take {_rate(profile.device)} images/s"
    return parts


def _held_up(profile: Profile) -> str:
    """What keeps the loader from what its slowest stage can do alone: where it waited most."""
    looping, bound = profile.looping, profile.bound
    longest = max(_WAITS, key=looping.share)
    waits = ", ".join(
        f"{what} {100 * looping.share(name):.0f} %"
        for name, what in sorted(_WAITS.items(), key=lambda wait: -looping.share(wait[0]))
        if looping.share(name) >= 0.01
    )
    return (
        f"held up by {_WAITS[longest]}: the loader reached {_rate(looping.images_per_s)} of the "
        f"{_rate(bound.images_per_s)} images/s that its slowest stage allows "
        f"({', '.join(_parts(profile).values())}); it waited for {waits or 'nothing'}: "
        f"{_advice(profile, longest)}"
    )


def _advice(profile: Profile, wait: str) -> str:
    """Why the loader waits for what is fast enough alone, and what to change."""
    if wait != "wait_fetch_s":
        return _ADVICE[wait]
    request_bytes = profile.looping.request_bytes or profile.reading.request_bytes
    size = f"requests of {request_bytes / 1e3:,.0f} kB"
    if request_bytes < _SMALL_REQUEST_BYTES:
        return (
            f"{size}: requests this small measure latency: more images a chunk (loader.chunk) or "
            f"more requests in flight (fetch.requests, loader.window)"
        )
    return (
        f"{size} come more slowly while cores decode: leave a core to reading (loader.threads), "
        f"or read further ahead (loader.window, fetch.requests)"
    )


def _needs(profile: Profile) -> str:
    """What a GPU would take."""
    wanted = profile.given_images_per_s or ASSUMED_IMAGES_PER_S
    basis = "" if profile.given_images_per_s else " (assumed: SwAV, ResNet-50 on an H200)"
    cores = math.ceil(cores_needed(profile.costs, wanted))
    gigabytes_per_s = wanted * profile.costs.read_bytes / 1e9
    return (
        f"a GPU of {wanted:,.0f} images/s{basis} needs {cores} such cores and "
        f"{gigabytes_per_s:.2g} GB/s"
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
    timeline = Timeline(
        title=profile.title,
        verdict=verdict(profile),
        figures=figures,
        limits=limits,
        spans=looping.spans,
        batches=looping.batches,
        request_bytes=looping.request_bytes,
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
            f"{_rate(work.images_per_s)} images/s",
            f"colour {1e3 * work.colour_s:.2f} ms/batch of {work.batch_size}",
        )
    ]


def _rate(images_per_s: float) -> str:
    """Large images come one or two a second."""
    return f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.3g}"


def _line(name: str, *cells: str) -> str:
    return f"{name:<15}" + "".join(f"{cell:<22} " for cell in cells[:-1]) + cells[-1]


# Arguments


def _check_dataset(dataset: str) -> None:
    """Raise UsageError for a setting that stands where the data set should."""
    if re.match(r"[a-z_]+\.[a-z_]+=", dataset):
        raise UsageError(
            f"{dataset} is a setting, and no data set comes before it; give the data set first: "
            f"python -m pipeline.profile s3://bucket/data section.key=value. Of loader.mix, "
            f"profile one data set at a time"
        )


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
