"""One measured number, what it should reach, and how numbers are kept and shown."""

import json
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Row:
    """A result, named `group.what`; `target` is like ">= 7", or empty if nothing is demanded.

    A value of None could not be measured here; the note says why.
    """

    name: str
    value: float | None
    unit: str
    target: str = ""
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without one, or without a value."""
        if not self.target or self.value is None:
            return None
        comparison, bound = self.target.split()
        return bool(_COMPARISONS[comparison](self.value, float(bound)))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows to a JSON list, in place of those of the same name; others stay."""
    fresh = {row.name: row.as_json() for row in rows}
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in kept if row["name"] not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = [*kept, *fresh.values()]
    path.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n")


def table(rows: Iterable[Row]) -> str:
    """The rows as aligned text."""
    lines = [("name", "value", "unit", "target", "", "note"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    verdict = {True: "ok", False: "MISSED", None: ""}[row.ok]
    value = "not measured" if row.value is None else f"{row.value:.4g}"
    return (row.name, value, row.unit, row.target, verdict, row.note)
