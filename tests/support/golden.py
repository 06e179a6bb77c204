"""The golden vectors of tests/golden, which a run of the reference implementation produced."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def manifest() -> dict[str, Any]:
    """The whole manifest: tolerances, and per file its arrays, documentation and arguments."""
    return json.loads((GOLDEN / "manifest.json").read_text())


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """Every array of `name`.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def meta(name: str) -> dict[str, Any]:
    """The arguments the reference ran with, usually by case."""
    return manifest()["files"][f"{name}.npz"]["meta"]


def tensor(name: str, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A fresh copy of one array of `name`.npz as a tensor."""
    return torch.tensor(arrays(name)[key], dtype=dtype)


def document(name: str) -> dict[str, Any]:
    """A golden file that is JSON."""
    return json.loads((GOLDEN / f"{name}.json").read_text())
