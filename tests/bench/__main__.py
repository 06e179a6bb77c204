"""python -m tests.bench [--only loader.]: measure, print a table, keep it in build/bench.json.

Every module beside this one that has a `rows()` is measured; its rows are named after its `GROUP`
(by default the module's own name), so adding a file adds measurements. Each module's rows are kept
as soon as it is through. Exit code 1 if a target is missed.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tests.bench
from tests.bench.rows import merge, table

RESULTS = Path("build/bench.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default="", metavar="PREFIX", help="only rows so named: loader.")
    prefix = parser.parse_args().only
    torch.set_num_threads(1)
    measured = []
    for group in groups(prefix):
        print(f"measuring {group.__name__}", file=sys.stderr)
        rows = [row for row in group.rows() if row.name.startswith(prefix)]
        merge(RESULTS, rows)
        measured += rows
    if not measured:
        parser.error(f"no row starts with {prefix!r}")
    print(table(measured))
    return int(any(row.ok is False for row in measured))


def groups(prefix: str) -> Iterator[Any]:
    """The modules that may hold a row whose name has this prefix."""
    for found in pkgutil.iter_modules(tests.bench.__path__):
        if found.name.startswith("__"):
            continue
        module = importlib.import_module(f"tests.bench.{found.name}")
        name = getattr(module, "GROUP", f"{found.name}.")
        if hasattr(module, "rows") and _overlap(name, prefix):
            yield module


def _overlap(group: str, prefix: str) -> bool:
    return group.startswith(prefix) or prefix.startswith(group)


if __name__ == "__main__":
    sys.exit(main())
