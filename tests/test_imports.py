"""Which package reaches what when it is imported, seen in a fresh process."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "webdataset", "deepspeed")
TRAINING_PROCESS = {  # of pipeline; all the rest of it also runs where there is no torch
    "augment_device",
    "loader",
    "profile",
    "sequential",
    "stages",
    "streaming",
    "tars",
    "upload",
}


def modules_after(statement: str) -> set[str]:
    """The names in sys.modules once a child process has run a statement."""
    program = f"import json, sys\n{statement}\njson.dump(sorted(sys.modules), sys.stdout)"
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(child.stdout))


def test_only_the_training_process_loads_torch() -> None:
    found = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__"}
    assert found >= TRAINING_PROCESS
    names = ", ".join(f"pipeline.{name}" for name in sorted(found - TRAINING_PROCESS))
    assert modules_after(f"import {names}").isdisjoint(HEAVY)


def test_the_import_rules_name_every_module() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    named = {rule["name"]: set(rule.get("source_modules", ())) for rule in rules["contracts"]}
    found = {f"pipeline.{path.stem}" for path in (ROOT / "pipeline").glob("*.py")}
    found.discard("pipeline.__init__")
    training = {f"pipeline.{name}" for name in TRAINING_PROCESS}
    lower = named["the lower floor of pipeline and shard_tools never reach torch"]
    assert lower == found - training | {"shard_tools"}
    others = named["only store.py knows S3"]
    assert others == found - {"pipeline.store"} | {"shard_tools", "trainer"}


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
