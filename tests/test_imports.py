"""Which package reaches what when it is imported, seen in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "webdataset", "deepspeed")
LOWER_FLOOR = ("shards", "manifest", "worker", "probe")  # these import all the rest of it


def modules_after(statement: str) -> set[str]:
    """The names in sys.modules once a child process has run a statement."""
    program = f"import json, sys\n{statement}\njson.dump(sorted(sys.modules), sys.stdout)"
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(child.stdout))


@pytest.mark.parametrize("module", [f"pipeline.{name}" for name in LOWER_FLOOR])
def test_the_lower_floor_never_loads_torch(module: str) -> None:
    assert modules_after(f"import {module}").isdisjoint(HEAVY)


def test_shard_tools_never_load_torch() -> None:
    modules = sorted(path.stem for path in (ROOT / "shard_tools").glob("*.py"))
    names = ", ".join(f"shard_tools.{name}" for name in modules if name != "__init__")
    assert modules_after(f"import {names}").isdisjoint(HEAVY)


@pytest.mark.parametrize("package", ["pipeline", "shard_tools", "trainer"])
def test_the_packages_are_ours(package: str) -> None:
    """PyPI has a package called trainer, too."""
    child = subprocess.run(
        [sys.executable, "-c", f"import {package}; print({package}.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(child.stdout.strip()).resolve() == ROOT / package / "__init__.py"
