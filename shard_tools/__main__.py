"""`python -m shard_tools`: pack images into shards on a store, and look after what lies there."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

from pipeline.cores import usable_cores
from pipeline.errors import UsageError, run_command
from pipeline.manifest import Snapshot, latest_version, read_snapshot
from pipeline.store import Store, open_store
from shard_tools import commits, dedup, gallery, gc, mask, retry, show, stats, verify
from shard_tools.arguments import build_parser, given_settings, pack_options, pack_settings
from shard_tools.pack import PackOptions, PackReport, add_reports, pack
from shard_tools.plan import Plan, list_plans, make_plan, read_plan
from shard_tools.progress import Progress
from shard_tools.selection import Selection


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command. Raises CropstreamError if it fails."""
    arguments = build_parser().parse_args(argv)
    _COMMANDS[arguments.command](arguments)
    return 0


# ----------------------------------------------------------------------------------------
# what makes shards


def _plan(arguments: argparse.Namespace) -> None:
    plan = _new_plan(arguments, open_store(arguments.dataset))
    known = f"{show.size(plan.total_bytes)}, " if plan.total_bytes else ""
    print(
        f"plan {plan.name}: {show.plural(plan.num_inputs, _noun(plan))}, "
        f"{known}{show.plural(plan.num_units, 'shard')}"
    )
    filtered = f" --filter {arguments.filter}" if arguments.filter else ""
    print(f"next: python -m shard_tools pack {arguments.dataset} --plan {plan.name}{filtered}")


def _pack(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    options = pack_options(arguments)
    plan = _plan_to_pack(arguments, dataset)
    wants_seal = arguments.seal if arguments.seal is not None else arguments.source is not None
    _pack_plan(arguments, dataset, plan, options, seal=wants_seal)


def _adopt(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    options = pack_options(arguments)
    plan = make_plan(
        arguments.source,
        dataset,
        pack_settings(arguments),
        kind="adopt",
        replace=arguments.new_plan,
    )
    _pack_plan(arguments, dataset, plan, options, seal=True)


def _retry(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    options = pack_options(arguments)
    plans = retry.plan_retry(dataset, read_snapshot(dataset), arguments.reason)
    done = [_packed(dataset, plan, options) for plan in plans]
    for plan in plans:
        snapshot = commits.seal(dataset, plan)[0]
    _show(arguments, add_reports(done), snapshot)


def _pack_plan(
    arguments: argparse.Namespace, dataset: Store, plan: Plan, options: PackOptions, *, seal: bool
) -> None:
    report = _packed(dataset, plan, options)
    snapshot = commits.seal(dataset, plan)[0] if seal else None
    _show(arguments, report, snapshot)
    if snapshot is not None and not snapshot.num_kept:
        raise UsageError(
            f"{dataset.url} has no image: all inputs are rejected ({show.listed(report.rejected)})."
            f" If the cause can be mended: `python -m shard_tools retry {dataset.url} --reason …`; "
            "if the source or the settings were wrong, choose a new data set"
        )


def _packed(dataset: Store, plan: Plan, options: PackOptions) -> PackReport:
    # Ray prints what it thinks of dead workers, but standard output is for results.
    with redirect_stdout(sys.stderr), Progress("packing", plan.num_images) as progress:
        return pack(dataset, plan, options, on_tick=progress.show, on_resume=progress.resume)


def _show(arguments: argparse.Namespace, report: PackReport, snapshot: Snapshot | None) -> None:
    if arguments.json:
        print(json.dumps(_report_json(report, snapshot)))
    else:
        _print_report(report, snapshot, arguments.dataset)


def _plan_to_pack(arguments: argparse.Namespace, dataset: Store) -> Plan:
    if arguments.source is None:
        if given := given_settings(arguments):
            raise UsageError(
                "what a shard holds is part of the plan, which exists: give SRC, or leave out "
                f"{', '.join(given)}"
            )
        return _waiting_plan(dataset, arguments.plan)
    if arguments.plan is not None:
        raise UsageError("--plan names a plan that exists: leave out SRC")
    return _new_plan(arguments, dataset)


def _new_plan(arguments: argparse.Namespace, dataset: Store) -> Plan:
    return make_plan(
        arguments.source,
        dataset,
        pack_settings(arguments),
        kind=arguments.kind,
        replace=arguments.new_plan,
    )


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


def _noun(plan: Plan) -> str:
    return {"files": "file", "urls": "URL", "tars": "piece", "adopt": "tar"}[plan.kind]


def _report_json(report: PackReport, snapshot: Snapshot | None) -> dict[str, object]:
    return {
        **dataclasses.asdict(report),
        "images_per_s": report.images_per_s,
        "snapshot": snapshot.version if snapshot else None,
        "snapshot_images": snapshot.num_kept if snapshot else None,
    }


def _print_report(report: PackReport, snapshot: Snapshot | None, dataset: str) -> None:
    rate = f"{report.images_per_s:.0f} images/s"
    images = show.plural(report.packed, "image")
    print(f"packed      {images}, {show.size(report.packed_bytes)} ({rate})")
    reasons = f": {show.listed(report.rejected)}" if report.rejected else ""
    print(f"rejected    {sum(report.rejected.values())}{reasons}")
    if report.units_before or report.units_elsewhere:
        print(
            f"skipped     {report.units_before} of {show.plural(report.units, 'shard')} packed "
            f"before, {report.units_elsewhere} by others meanwhile"
        )
    if snapshot is not None:
        _print_snapshot(snapshot)
    else:
        print(f"next        python -m shard_tools seal {dataset} --plan {report.plan}")


def _print_snapshot(snapshot: Snapshot) -> None:
    print(
        f"snapshot    version {snapshot.version}: {show.plural(snapshot.num_kept, 'image')} "
        f"in {show.plural(len(snapshot), 'shard')}"
    )


# ----------------------------------------------------------------------------------------
# what looks after them


def _dedup(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    images = read_snapshot(dataset).num_kept
    with Progress("reading indexes", images) as progress:
        report = dedup.dedup(
            dataset,
            near=not arguments.exact,
            distance=arguments.distance,
            prefer=arguments.prefer,
            dry_run=arguments.dry_run,
            memory_bytes=arguments.memory,
            threads=usable_cores(),
            on_tick=progress.show,
        )
    if arguments.json:
        numbers = {
            name: getattr(report, name)
            for name in ("images", "exact", "near", "clusters", "clusters_url", "without_hash",
                         "flat", "seconds", "is_new")
        }  # fmt: skip
        print(json.dumps({**numbers, "snapshot": report.snapshot.version}))
        return
    verb = "would go" if arguments.dry_run else "dropped"
    print(f"{verb:<11} {report.exact} exact and {report.near} near duplicates of {report.images}")
    print(
        f"clusters    {report.clusters}{f', {report.clusters_url}' if report.clusters_url else ''}"
    )
    if report.without_hash or report.flat:
        print(
            f"exact only  {report.without_hash} images never decoded, {report.flat} flat ones, "
            "whose hash tells nothing"
        )
    _print_snapshot(report.snapshot)


def _mask(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    if arguments.restore is not None:
        snapshot = mask.restore(dataset, arguments.restore, force=arguments.force)
        if arguments.json:
            print(json.dumps({"snapshot": snapshot.version, "snapshot_images": snapshot.num_kept}))
        else:
            _print_snapshot(snapshot)
        return
    selection = Selection(
        keys=tuple(arguments.keys),
        hashes=tuple(arguments.hashes),
        urls=tuple(arguments.urls),
        patterns=tuple(arguments.patterns),
        where=arguments.where,
        mode="keep" if arguments.keep else "drop",
    )
    snapshot = read_snapshot(dataset)
    with Progress("reading indexes", int(snapshot.rows.sum())) as progress:
        report = mask.mask(dataset, selection, on_tick=progress.show)
    _print_mask(arguments, report)


def _print_mask(arguments: argparse.Namespace, report: mask.MaskReport) -> None:
    if arguments.json:
        numbers = {
            name: getattr(report, name)
            for name in ("dropped", "kept_before", "kept_after", "shards_changed", "listed",
                         "found")
        }  # fmt: skip
        print(json.dumps({**numbers, "snapshot": report.snapshot.version, "new": report.is_new}))
        return
    print(f"dropped     {report.dropped} of {show.plural(report.kept_before, 'image')}")
    if report.listed:
        print(f"found       {report.found} of {report.listed} on the lists")
    if not report.is_new:
        print("nothing would change, so no version was made")
    _print_snapshot(report.snapshot)


def _verify(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    snapshot = read_snapshot(dataset, arguments.version)
    with Progress("verifying", int(snapshot.kept.sum())) as progress:
        report = verify.verify(
            dataset,
            snapshot,
            quick=arguments.quick,
            workers=arguments.workers or usable_cores(),
            on_tick=progress.show,
        )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    depth = "sizes only" if report.quick else f"{show.size(report.read_bytes)} read back"
    shards = show.plural(report.shards, "shard")
    print(f"sound       {show.plural(report.samples, 'image')} in {shards}, {depth}")
    if not report.quick:
        print(f"decoded     {report.decoded} of them, some of every shard")
    if report.read_by_webdataset:
        print(f"webdataset  reads {report.read_by_webdataset} samples of its share the same")
    _print_snapshot(snapshot)


def _stats(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    snapshot = read_snapshot(dataset, arguments.version)
    with Progress("reading indexes", int(snapshot.rows.sum())) as progress:
        found = stats.collect(dataset, snapshot, on_tick=progress.show)
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else stats.table(found))


def _gallery(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    snapshot = read_snapshot(dataset, arguments.version)
    with Progress("reading indexes", int(snapshot.rows.sum())) as progress:
        url = gallery.write_gallery(
            dataset,
            snapshot,
            output=arguments.output,
            samples=arguments.samples,
            seed=arguments.seed,
            on_tick=progress.show,
        )
    print(json.dumps({"url": url}) if arguments.json else url)


def _gc(arguments: argparse.Namespace) -> None:
    dataset = open_store(arguments.dataset)
    report = gc.collect_garbage(dataset, grace_s=arguments.grace, delete=arguments.delete)
    if arguments.json:
        found = [dataclasses.asdict(orphan) for orphan in report.orphans]
        print(json.dumps({"deleted": report.deleted, "orphans": found}, default=str))
        return
    for orphan in report.orphans:
        print(
            f"{show.size(orphan.size_bytes or 0):>10}  {orphan.age_s / 3600:8.0f} h  {orphan.key}"
        )
    verb = "removed" if report.deleted else "to remove"
    print(
        f"{verb}: {show.plural(report.num_objects, 'object')}, {show.size(report.size_bytes)}, and "
        f"{show.plural(report.num_unfinished, 'unfinished upload')}"
    )
    if report.orphans and not report.deleted:
        print("nothing was removed: run it again with --delete")


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "plan": _plan,
    "pack": _pack,
    "seal": _seal,
    "adopt": _adopt,
    "retry": _retry,
    "dedup": _dedup,
    "mask": _mask,
    "verify": _verify,
    "stats": _stats,
    "gallery": _gallery,
    "gc": _gc,
}

if __name__ == "__main__":
    sys.exit(run_command(main))
