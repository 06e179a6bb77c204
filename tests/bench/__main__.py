"""python -m tests.bench [--only loader.]: measure, print a table, keep it in build/bench.json.

Every module beside this one that has a `rows()` is a group of measurements, named like the module;
adding a file adds a group. Exit code 1 if a target is missed.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import tests.bench
from tests.bench.rows import Row, merge, table

RESULTS = Path("build/bench.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default="", metavar="PREFIX", help="only rows so named: loader.")
    prefix = parser.parse_args().only
    torch.set_num_threads(1)
    measured = [row for row in measure(prefix) if row.name.startswith(prefix)]
    if not measured:
        parser.error(f"no row starts with {prefix!r}")
    merge(RESULTS, measured, prefix=prefix)
    print(table(measured))
    return int(any(row.ok is False for row in measured))


def measure(prefix: str) -> Iterator[Row]:
    """The rows of every group that may hold a name with this prefix."""
    for module in pkgutil.iter_modules(tests.bench.__path__):
        group = f"{module.name}."
        if module.name.startswith("__") or not _overlap(group, prefix):
            continue
        rows = getattr(importlib.import_module(f"tests.bench.{module.name}"), "rows", None)
        if rows is not None:
            print(f"measuring {group}*", file=sys.stderr)
            yield from rows()


def _overlap(group: str, prefix: str) -> bool:
    return group.startswith(prefix) or prefix.startswith(group)


if __name__ == "__main__":
    sys.exit(main())
