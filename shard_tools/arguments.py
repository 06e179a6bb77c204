"""The command line's grammar: which commands there are, and what each of them takes.

An option that is not given is None, so that a setting's default stands in one place only: the
dataclass that owns it.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from pipeline.cores import usable_cores
from pipeline.errors import UsageError
from shard_tools.download import DownloadSettings
from shard_tools.filters import load_filter
from shard_tools.judge import ImageSettings
from shard_tools.pack import PackOptions
from shard_tools.plan import SHARD_ROWS, SHARD_URLS, PackSettings

_DESCRIPTION = """\
Pack images into WebDataset tar shards on a store (s3://bucket/prefix, file:///directory or a path).

  python -m shard_tools pack photos/ s3://bucket/photos        plan, pack and seal in one go
  python -m shard_tools pack urls.parquet s3://bucket/web      download and pack a list of URLs
  python -m shard_tools adopt s3://other/shards s3://bucket/x  index shards where they lie
  python -m shard_tools verify s3://bucket/photos              read everything back
  python -m shard_tools gallery s3://bucket/photos             a page to look at

Killed or interrupted, pack goes on where it stopped when it is run again. Several machines may pack
one data set: `plan` once, `pack DST` on each, `seal` at the end; or one command with
--engine ray. Credentials and endpoint come from the AWS environment or files: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION, ~/.aws.
"""
_EXIT_CODES = "exit codes: 0 done, 1 failed (the message says what to do), 2 bad usage"
_SOURCE = (
    "folder or prefix of images (first sub-folder = label), tars to repack, or lists of URLs "
    "(.parquet .csv .tsv .jsonl .txt, also .gz); any URL that fsspec opens"
)
_DATASET = "the data set: s3://bucket/prefix, file:///directory or a path"
_LIST = "one a line, or a column of a .parquet, .csv or .tsv file; may be repeated"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Settings = TypeVar("Settings")
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_Group: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar; a parsed command's name is in `command`."""
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, dest="command"
    )
    _add_plan(commands)
    _add_pack(commands)
    _add_seal(commands)
    _add_adopt(commands)
    _add_retry(commands)
    _add_dedup(commands)
    _add_mask(commands)
    _add_verify(commands)
    _add_stats(commands)
    _add_gallery(commands)
    _add_gc(commands)
    return parser


def pack_settings(arguments: argparse.Namespace) -> PackSettings:
    """What a shard holds, as the command line says.

    Raises UsageError if it contradicts itself, or names a filter that is none.
    """
    _check_filter(arguments)
    image = _built(ImageSettings, arguments)
    return dataclasses.replace(_built(PackSettings, arguments), image=image)


def pack_options(arguments: argparse.Namespace) -> PackOptions:
    """How to pack, as the command line says.

    Raises UsageError if it contradicts itself, or names a filter that is none.
    """
    _check_filter(arguments)
    download = _built(DownloadSettings, arguments)
    if arguments.address and arguments.engine != "ray":
        raise UsageError(f"--address {arguments.address} is of a Ray cluster: give --engine ray")
    return dataclasses.replace(_built(PackOptions, arguments), download=download)


def given_settings(arguments: argparse.Namespace) -> list[str]:
    """The settings of a plan (not the filter, which must be asked for again) that were given."""
    given = {**_given(PackSettings, arguments), **_given(ImageSettings, arguments)}
    return [name for name in given if name != "filter"]


def _check_filter(arguments: argparse.Namespace) -> None:
    if arguments.filter is not None:
        load_filter(arguments.filter)  # now, not when the plan is made and the workers are started


def _built(settings: type[Settings], arguments: argparse.Namespace) -> Settings:
    try:
        return settings(**_given(settings, arguments))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _given(settings: Any, arguments: argparse.Namespace) -> Mapping[str, Any]:
    names = [field.name for field in dataclasses.fields(settings)]
    return {n: value for n in names if (value := getattr(arguments, n, None)) is not None}


# ----------------------------------------------------------------------------------------
# commands


def _add_plan(commands: _Commands) -> None:
    parser = _add(commands, "plan", "list a source, freeze what goes into which shard")
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_new_plan(parser)
    _add_pack_settings(parser)


def _add_pack(commands: _Commands) -> None:
    parser = _add(commands, "pack", "pack a source, or what is left of a plan, into shards")
    parser.description = (
        "With SRC: plan, pack and seal. Without: pack what is left of the plan that DST holds, and "
        "leave it to `seal` to make the shards visible. Both may be run again at any time; what is "
        "packed is not packed again."
    )
    parser.add_argument("source", metavar="SRC", nargs="?", help=_SOURCE)
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_plan_name(parser)
    _add_new_plan(parser)
    parser.add_argument(
        "--seal",
        action=argparse.BooleanOptionalAction,
        help="make the shards visible at the end (default: only with SRC)",
    )
    _add_json(parser)
    _add_engine(parser)
    _add_pack_settings(parser)
    _add_download(parser)


def _add_seal(commands: _Commands) -> None:
    parser = _add(commands, "seal", "make a completely packed plan visible as a new snapshot")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_plan_name(parser)


def _add_adopt(commands: _Commands) -> None:
    parser = _add(commands, "adopt", "index existing tar shards where they lie, rewriting nothing")
    parser.add_argument("source", metavar="SRC", help="a tar, or a folder or prefix of tars")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_new_plan(parser)
    _add_json(parser)
    _add_engine(parser)
    _add_filters(parser)


def _add_retry(commands: _Commands) -> None:
    parser = _add(commands, "retry", "pack rejected inputs again, into a new snapshot")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    parser.add_argument(
        "--reason",
        nargs="+",
        action="extend",
        required=True,
        metavar="REASON",
        help="which rejects: timeout, unreachable, 'http 503', … as `stats` names them",
    )
    _add_json(parser)
    _add_engine(parser)
    _add_filter(parser)
    _add_download(parser)


def _add_dedup(commands: _Commands) -> None:
    parser = _add(commands, "dedup", "drop exact and near duplicates: a new snapshot with masks")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    parser.add_argument("--exact", action="store_true", help="only images of identical bytes")
    parser.add_argument(
        "--distance",
        type=_bits,
        default=3,
        metavar="BITS",
        help="perceptual hashes that differ in so many of 64 bits at most are near "
        "duplicates, 0 to 8 (default: %(default)s)",
    )
    parser.add_argument(
        "--prefer",
        choices=("largest", "first"),
        default="largest",
        help="which one of a cluster stays (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        type=_bytes,
        default=_half_of_memory(),
        metavar="SIZE",
        help="that it may take; 120 bytes an image are needed (default: half of this machine's)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    _add_json(parser)


def _add_mask(commands: _Commands) -> None:
    parser = _add(commands, "mask", "drop or keep images: a new snapshot, rewriting nothing")
    parser.description = (
        "A new snapshot without the images that match any of the conditions (or, with --keep, "
        "without all others). No shard is rewritten; older snapshots stay as they are, and "
        "--restore makes one the newest again."
    )
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    for name, what in (("keys", "keys"), ("hashes", "SHA-256 hashes"), ("urls", "source URLs")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"images with these {what}: {_LIST}",
        )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        dest="patterns",
        metavar="PATTERN",
        help="images whose source matches, such as 'https://example.org/*'",
    )
    parser.add_argument(
        "--where",
        metavar="SQL",
        help="images for which this holds, over the index's columns: \"width < 200 OR label='x'\"",
    )
    parser.add_argument("--keep", action="store_true", help="keep what matches, drop the rest")
    parser.add_argument("--restore", type=_positive, metavar="V", help="undo: version V again")
    parser.add_argument(
        "--force", action="store_true", help="restore although shards sealed since would go"
    )
    _add_json(parser)


def _add_verify(commands: _Commands) -> None:
    parser = _add(commands, "verify", "read a data set back and check every byte of its images")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    parser.add_argument("--quick", action="store_true", help="only manifests, sizes and tags")
    _add_version(parser)
    _add_workers(parser)
    _add_json(parser)


def _add_stats(commands: _Commands) -> None:
    parser = _add(commands, "stats", "count images, formats, sizes, sources, labels and rejects")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    _add_version(parser)
    _add_json(parser)


def _add_gallery(commands: _Commands) -> None:
    parser = _add(commands, "gallery", "one HTML page to look at: samples, figures, rejects")
    parser.add_argument("dataset", metavar="DST", help=_DATASET)
    parser.add_argument(
        "--output", metavar="FILE", help="a local file (default: galleries/… in the data set)"
    )
    parser.add_argument(
        "--samples", type=_positive, default=200, metavar="N", help="thumbnails (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice")
    _add_version(parser)
    _add_json(parser)


def _add_gc(commands: _Commands) -> None:
    parser = _add(commands, "gc", "find what no snapshot, commit or checkpoint names")
    parser.add_argument(
        "dataset", metavar="DST", help="the data set, or a training run: s3://… or a path"
    )
    parser.add_argument("--delete", action="store_true", help="and remove it")
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=86400,
        metavar="TIME",
        help="leave alone what is younger, such as 36h or 7d (default: 24h)",
    )
    _add_json(parser)


def _add(commands: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EXIT_CODES
    )


# ----------------------------------------------------------------------------------------
# options


def _add_pack_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a shard holds (part of the plan)")
    group.add_argument(
        "--kind",
        choices=("files", "urls", "tars"),
        help="what SRC holds (default: by the names of its files)",
    )
    group.add_argument("--url-column", metavar="NAME", help="of the lists (default: url)")
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
        help=f"inputs of a shard at most (default: {SHARD_ROWS}, of URLs {SHARD_URLS})",
    )
    group.add_argument(
        "--unique",
        action="store_true",
        default=None,
        help="reject bytes that the shard has already (over all shards: dedup)",
    )
    _add_filters(parser)
    _add_pixels(parser)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which images (part of the plan)")
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
    group.add_argument(
        "--min-size",
        type=_positive,
        dest="min_size_px",
        metavar="PX",
        help="reject images whose shorter side is less",
    )
    group.add_argument(
        "--max-aspect", type=float, metavar="RATIO", help="reject longer ones: long side / short"
    )
    group.add_argument(
        "--min-entropy",
        type=float,
        metavar="BITS",
        help="reject flat images: entropy of the grey values, 0 to 8 (try 1.5)",
    )
    group.add_argument(
        "--animated",
        choices=("first", "reject"),
        help="of several frames the first counts, or reject (default: first)",
    )
    group.add_argument(
        "--no-decode",
        action="store_false",
        dest="decode",
        default=None,
        help="trust headers: much faster, no perceptual hash, damage is found while training",
    )
    _add_filter(group)


def _add_filter(group: _Group) -> None:
    group.add_argument(
        "--filter",
        metavar="MODULE.FUNCTION",
        help="a Python function (pixels uint8 HWC, columns) -> keep it?",
    )


def _add_pixels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("their pixels (part of the plan; kept as they are if absent)")
    group.add_argument(
        "--resize",
        choices=("keep", "longest", "shortest", "crop"),
        help="shrink this side to --size; crop: shortest side, then the centre square",
    )
    group.add_argument("--size", type=_positive, dest="size_px", metavar="PX", help="of --resize")
    group.add_argument(
        "--encode", choices=("keep", "jpeg", "png", "webp"), help="encode all images so"
    )
    group.add_argument("--quality", type=_positive, metavar="1…100", help="of JPEG and WebP")
    group.add_argument(
        "--orientation", choices=("keep", "apply"), help="turn as EXIF says (default: keep)"
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who works")
    _add_workers(group)
    group.add_argument(
        "--engine", choices=("local", "ray"), help="processes here, or Ray (default: local)"
    )
    group.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster (default: start a Ray here)"
    )


def _add_download(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("downloading")
    group.add_argument("--user-agent", metavar="TEXT", help="say who you are, and how to reach you")
    group.add_argument(
        "--timeout", type=float, dest="timeout_s", metavar="S", help="of one try (default: 30)"
    )
    group.add_argument("--retries", type=int, metavar="N", help="further tries (default: 2)")
    group.add_argument(
        "--concurrency",
        type=_positive,
        metavar="N",
        help="downloads at once, a worker (default: 128)",
    )
    group.add_argument(
        "--per-host",
        type=_positive,
        metavar="N",
        help="connections to a host, of all workers (default: 8)",
    )
    group.add_argument(
        "--delay", type=float, dest="delay_s", metavar="S", help="between requests to a host"
    )
    group.add_argument(
        "--allow-private",
        action="store_true",
        default=None,
        help="also addresses that are not public: a server of your own",
    )


def _add_workers(parser: _Group) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help=f"processes (default: one a core, here {usable_cores()})",
    )


def _add_plan_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", metavar="PLAN", help="which plan, if several wait")


def _add_new_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--new-plan",
        action="store_true",
        help="begin anew although DST has an unfinished plan of SRC with other files or settings",
    )


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", type=_positive, metavar="V", help="of the snapshot (default: the newest)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


# ----------------------------------------------------------------------------------------
# values


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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


def _bits(text: str) -> int:
    if not text.isdecimal() or int(text) > 8:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 8")
    return int(text)


def _seconds(text: str) -> int:
    """A duration: 90s, 15m, 36h, 7d."""
    match = re.fullmatch(r"(\d+)([smhd])", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 36h or 7d")
    return int(match[1]) * _DURATIONS[match[2]]
