"""`python -m shard_tools`: pack images into shards on a store, and look after what lies there."""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pipeline.errors import UsageError, run_command
from pipeline.manifest import Snapshot, latest_version, read_snapshot
from pipeline.store import Store, open_store
from shard_tools import commits, stats, verify
from shard_tools.pack import PackReport, pack
from shard_tools.plan import PackSettings, Plan, list_plans, make_plan, read_plan
from shard_tools.progress import Progress

_DESCRIPTION = """\
Pack images into WebDataset tar shards on a store (s3://bucket/prefix, file:///directory or a path).

  python -m shard_tools pack photos/ s3://bucket/photos     plan, pack and seal in one go
  python -m shard_tools verify s3://bucket/photos           read everything back
  python -m shard_tools stats s3://bucket/photos            what is in it

Killed or interrupted, pack goes on where it stopped when it is run again. Several machines may pack
one data set: `plan` once, `pack DST` on each, `seal` at the end. Credentials and endpoint come from
the AWS environment or files: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE,
AWS_ENDPOINT_URL, AWS_REGION, ~/.aws.
"""
_EXIT_CODES = "exit codes: 0 done, 1 failed (the message says what to do), 2 bad usage"
_SOURCE = "folder or prefix of images, any URL that fsspec opens; first sub-folder = label"
_DATASET = "the data set: s3://bucket/prefix, file:///directory or a path"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_NAMED_LABELS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command. Raises CropstreamError if it fails."""
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_pack(commands)
    _add_seal(commands)
    _add_verify(commands)
    _add_stats(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_plan(commands: _Commands) -> None:
    parser = _add(commands, "plan", "list a source, freeze what goes into which shard", _plan)
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_settings(parser)


def _add_pack(commands: _Commands) -> None:
    parser = _add(commands, "pack", "pack a source, or what is left of a plan, into shards", _pack)
    parser.description = (
        "With SRC: plan, pack and seal. Without: pack what is left of the plan that DST holds, and "
        "leave it to `seal` to make the shards visible. Both may be run again at any time; what is "
        "packed is not packed again."
    )
    parser.add_argument("source", metavar="SRC", nargs="?", help=_SOURCE)
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_plan_name(parser)
    _add_workers(parser)
    parser.add_argument(
        "--seal",
        action=argparse.BooleanOptionalAction,
        help="make the shards visible at the end (default: only with SRC)",
    )
    _add_settings(parser)
    _add_json(parser)


def _add_seal(commands: _Commands) -> None:
    parser = _add(
        commands, "seal", "make a completely packed plan visible as a new snapshot", _seal
    )
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_plan_name(parser)


def _add_verify(commands: _Commands) -> None:
    parser = _add(commands, "verify", "read a data set back and check every byte", _verify)
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    parser.add_argument("--quick", action="store_true", help="only manifests, sizes and tags")
    _add_version(parser)
    _add_workers(parser)
    _add_json(parser)


def _add_stats(commands: _Commands) -> None:
    parser = _add(commands, "stats", "count images, formats, sizes, labels and rejects", _stats)
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_version(parser)
    _add_json(parser)


def _add(
    commands: _Commands, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EXIT_CODES
    )
    parser.set_defaults(run=run)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a shard holds (part of the plan)")
    group.add_argument(
        "--shard-bytes",
        type=_bytes,
        metavar="SIZE",
        help="input bytes of a shard, such as 64MB or 1GiB (default: 256MB)",
    )
    group.add_argument(
        "--shard-rows",
        type=_positive,
        metavar="N",
        help=f"files of a shard at most (default: {PackSettings.shard_rows})",
    )
    group.add_argument(
        "--max-image-bytes",
        type=_bytes,
        dest="max_bytes",
        metavar="SIZE",
        help="reject larger files unread (default: 64MiB)",
    )
    group.add_argument(
        "--max-image-pixels",
        type=_bytes,
        dest="max_pixels",
        metavar="N",
        help="reject images of more pixels undecoded (default: 64Mi)",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one a CPU, here %(default)s)",
    )


def _add_plan_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", metavar="PLAN", help="which plan, if several wait")


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", type=_positive, metavar="V", help="of the snapshot (default: the newest)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _plan(arguments: argparse.Namespace) -> None:
    plan = make_plan(arguments.source, open_store(arguments.dataset), _settings(arguments))
    print(
        f"plan {plan.name}: {plan.num_files} files, {_size(plan.total_bytes)}, "
        f"{_shards(plan.num_units)}"
    )
    print(f"next: python -m shard_tools pack {arguments.dataset} --plan {plan.name}")


def _pack(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    plan = _plan_to_pack(arguments, dataset)
    with Progress("packing", plan.num_files) as progress:
        report = pack(
            dataset,
            plan,
            workers=arguments.workers,
            on_tick=progress.show,
            on_resume=progress.resume,
        )
    wants_seal = arguments.seal if arguments.seal is not None else arguments.source is not None
    snapshot = commits.seal(dataset, plan)[0] if wants_seal else None
    if arguments.json:
        print(json.dumps(_report_json(report, snapshot)))
    else:
        _print_report(report, snapshot, arguments.dataset)


def _plan_to_pack(arguments: argparse.Namespace, dataset: Store) -> Plan:
    if arguments.source is None:
        if _given_settings(arguments):
            raise UsageError(
                "what a shard holds is part of the plan, which exists: give SRC, or leave out "
                "--shard-bytes, --shard-rows, --max-image-bytes and --max-image-pixels"
            )
        return _waiting_plan(dataset, arguments.plan)
    if arguments.plan is not None:
        raise UsageError("--plan names a plan that exists: leave out SRC")
    return make_plan(arguments.source, dataset, _settings(arguments))


def _waiting_plan(dataset: Store, name: str | None) -> Plan:
    """The plan of that name, or the only one that is not sealed yet."""
    if name is not None:
        return read_plan(dataset, name)
    sealed = read_snapshot(dataset).plans if latest_version(dataset) else ()
    plans = list_plans(dataset)
    waiting = [plan for plan in plans if plan not in sealed]
    if len(waiting) > 1:
        raise UsageError(
            f"{dataset.url} has several open plans, choose: --plan {'|'.join(waiting)}"
        )
    if not plans:
        raise UsageError(
            f"{dataset.url} has no plan: run `python -m shard_tools pack SRC {dataset.url}`"
        )
    return read_plan(dataset, waiting[0] if waiting else sealed[-1])


def _seal(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    plan = _waiting_plan(dataset, arguments.plan)
    snapshot, is_new = commits.seal(dataset, plan)
    if not is_new:
        print(f"plan {plan.name} is sealed already, nothing was done")
    _print_snapshot(snapshot)


def _verify(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    snapshot = read_snapshot(dataset, arguments.version)
    with Progress("verifying", int(snapshot.kept.sum())) as progress:
        report = verify.verify(
            dataset,
            snapshot,
            quick=arguments.quick,
            workers=arguments.workers,
            on_tick=progress.show,
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    depth = "sizes only" if report.quick else f"{_size(report.read_bytes)} read back"
    print(f"sound       {report.samples} images in {_shards(report.shards)}, {depth}")
    if report.read_by_webdataset is not None:
        print(f"webdataset  reads {report.read_by_webdataset} samples of its share the same")
    _print_snapshot(snapshot)


def _stats(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    found = stats.collect(dataset, read_snapshot(dataset, arguments.version))
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(found), "quantile_levels": stats.QUANTILES}))
    else:
        _print_stats(found)


def _settings(arguments: argparse.Namespace) -> PackSettings:
    return PackSettings(**_given_settings(arguments))


def _given_settings(arguments: argparse.Namespace) -> dict[str, int]:
    names = [field.name for field in dataclasses.fields(PackSettings)]
    return {n: value for n in names if (value := getattr(arguments, n)) is not None}


def _report_json(report: PackReport, snapshot: Snapshot | None) -> dict[str, object]:
    return {
        **dataclasses.asdict(report),
        "images_per_s": report.images_per_s,
        "snapshot": snapshot.version if snapshot else None,
        "snapshot_images": snapshot.num_kept if snapshot else None,
    }


def _print_report(report: PackReport, snapshot: Snapshot | None, dataset: str) -> None:
    rate = f"{report.images_per_s:.0f} images/s"
    print(f"packed      {report.packed} images, {_size(report.packed_bytes)} ({rate})")
    print(f"rejected    {sum(report.rejected.values())}{_listed(report.rejected)}")
    if report.units_before or report.units_elsewhere:
        print(
            f"skipped     {report.units_before} of {_shards(report.units)} packed before, "
            f"{report.units_elsewhere} by others meanwhile"
        )
    if snapshot is not None:
        _print_snapshot(snapshot)
    else:
        print(f"next        python -m shard_tools seal {dataset} --plan {report.plan}")


def _print_snapshot(snapshot: Snapshot) -> None:
    print(
        f"snapshot    version {snapshot.version}: {snapshot.num_kept} images "
        f"in {_shards(len(snapshot))}"
    )


def _print_stats(found: stats.Stats) -> None:
    print(f"snapshot    version {found.version}: {_shards(found.shards)}")
    print(f"images      {found.images}, {_size(found.image_bytes)}")
    if found.kept != found.images:
        print(f"masked      {found.images - found.kept}")
    print(f"rejected    {found.rows - found.images}{_listed(found.rejected)}")
    print(f"formats     {_listed(found.formats).removeprefix(': ')}")
    labels = dict(Counter(found.labels).most_common(_NAMED_LABELS))
    more = ", …" if len(found.labels) > len(labels) else ""
    print(f"labels      {len(found.labels)}{_listed(labels)}{more}")
    if not found.quantiles:
        return
    heads = ["min", *(f"{round(100 * q)} %" for q in stats.QUANTILES[1:-1]), "max"]
    print("".join(["            ", *(f"{head:>10}" for head in heads)]))
    for name, values in found.quantiles.items():
        unit = "bytes" if name == "length" else f"{name} px"
        print("".join([f"{unit:<12}", *(f"{value:>10}" for value in values)]))


def _listed(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ": " + ", ".join(f"{name} {number}" for name, number in ordered) if ordered else ""


def _shards(number: int) -> str:
    return "1 shard" if number == 1 else f"{number} shards"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def _bytes(text: str) -> int:
    """A number with an optional unit: 4096, 64MB, 1GiB, 64Mi."""
    match = re.fullmatch(r"(\d+) ?([kmg]i?)?b?", text.lower())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 64MB or 1GiB")
    return int(match[1]) * _UNITS[match[2] or ""]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
