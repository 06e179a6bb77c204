"""Python filters: a function of the user's that says whether an image is kept.

A filter is called with the decoded pixels and what is known of the image so far:

    def keep(pixels: NDArray[np.uint8], columns: Mapping[str, Any]) -> bool: ...

`pixels` is uint8 [H, W, 3], read-only, before any resizing; `columns` has width, height and format.
A plan stores the filter's name only. Code is imported because the present command line names it,
never because a stored plan does.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CropstreamError, UsageError

Filter = Callable[[NDArray[np.uint8], Mapping[str, Any]], bool]


def load_filter(name: str) -> Filter:
    """Import a filter by its name, `package.module:function` or `package.module.function`.

    Raises UsageError if there is none of that name, or if it cannot be called.
    """
    module_name, _, path = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not path:
        raise UsageError(f"{name!r} names no filter: write package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UsageError(
            f"filter {name!r} cannot be imported: {_describe(error)}; "
            "its module must be installed or lie under PYTHONPATH"
        ) from error
    if not callable(found):
        raise UsageError(f"filter {name!r} is no function but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def ask_filter(
    keep: Filter, name: str, pixels: NDArray[np.uint8], columns: Mapping[str, Any]
) -> bool:
    """Whether the filter keeps this image.

    Raises CropstreamError if the filter itself fails: with a broken filter no job should go on.
    """
    try:
        return bool(keep(pixels, columns))
    except Exception as error:
        raise CropstreamError(
            f"filter {name!r} failed on an image of {dict(columns)}: {_describe(error)}; "
            "mend it, or have it return False for what it cannot judge"
        ) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
