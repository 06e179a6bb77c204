"""Filters: found by name, asked, and loud when broken."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import CropstreamError, UsageError
from shard_tools.filters import ask_filter, load_filter

PIXELS = np.zeros((2, 3, 3), np.uint8)
COLUMNS = MappingProxyType({"width": 3, "height": 2, "format": "PNG"})
NOT_A_FUNCTION = 7


def is_wide(pixels: NDArray[np.uint8], columns: Mapping[str, Any]) -> bool:
    return pixels.shape[1] > pixels.shape[0] and columns["width"] > columns["height"]


class Holder:
    is_wide = staticmethod(is_wide)


@pytest.mark.parametrize("name", [f"{__name__}:is_wide", f"{__name__}.is_wide"])
def test_a_filter_is_found_by_either_notation(name: str) -> None:
    assert load_filter(name).__code__ is is_wide.__code__


def test_a_filter_may_lie_inside_a_class() -> None:
    assert load_filter(f"{__name__}:Holder.is_wide")(PIXELS, COLUMNS)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "names no filter"),
        ("is_wide", "names no filter"),
        (":is_wide", "names no filter"),
        ("no_such_module:keep", "No module named 'no_such_module'"),
        (f"{__name__}:no_such_function", "no attribute 'no_such_function'"),
        (f"{__name__}:NOT_A_FUNCTION", "is no function but int"),
        ("..relative:keep", "cannot be imported"),
    ],
)
def test_what_is_no_filter_is_a_usage_error(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        load_filter(name)
    assert repr(name) in str(caught.value)


def test_a_module_that_breaks_while_imported_is_a_usage_error(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        load_filter("breaks_on_import:keep")


@pytest.mark.parametrize("answer", [np.True_, np.False_, 1, 0, None])
def test_any_truth_value_is_an_answer(answer: Any) -> None:
    assert ask_filter(lambda pixels, columns: answer, "f", PIXELS, COLUMNS) is bool(answer)


def test_a_filter_that_fails_is_named_with_the_cause_and_the_image() -> None:
    with pytest.raises(CropstreamError, match="filter 'mine:f' failed") as caught:
        ask_filter(lambda pixels, columns: 1 / 0 > 1, "mine:f", PIXELS, COLUMNS)
    assert "ZeroDivisionError" in str(caught.value)
    assert "'width': 3" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
