"""A condition on index columns, written in SQL: `width < 200 OR label = 'x'`.

DuckDB evaluates it over an index in Arrow's memory. The expression comes from a command line, the
columns from the web; neither can reach a file, the network or a setting: external access is off
and the configuration is locked.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UsageError

Flags = npt.NDArray[np.bool_]

_SETTINGS = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",  # no table may mean a variable of this program
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "memory_limit": "1GB",
    "threads": "1",
}


class Predicate:
    """A boolean SQL expression over the columns of an index. Safe to share between threads.

    Attributes:
        columns: the names it uses, in lower case.
    """

    def __init__(self, expression: str) -> None:
        """Raises UsageError if the expression cannot be parsed."""
        import duckdb  # takes a fifth of a second, which no worker of pack needs to spend

        self._expression = expression
        self._connection = duckdb.connect(":memory:", config=_SETTINGS)
        for name, value in (("enable_progress_bar", "false"), ("lock_configuration", "true")):
            self._connection.execute(f"SET {name} = {value}").fetchall()  # cursors inherit them
        self.columns = frozenset(_columns_of(self._parsed()))

    def holds(self, index: pa.Table) -> Flags:
        """Where the expression is true, bool [rows]; where it is NULL it is not.

        A column that the index lacks is NULL. Raises UsageError with DuckDB's reason.
        """
        import duckdb

        present = {name.lower() for name in index.column_names}
        for name in sorted(self.columns - present):
            index = index.append_column(name, pa.nulls(len(index), pa.string()))
        with self._connection.cursor() as cursor:
            cursor.register("rows", index)
            try:
                cursor.execute(f"SELECT ({self._expression}\n) AS holds FROM rows")
                kind = str(cursor.description[0][1])
                values = cursor.fetchnumpy()["holds"]
            except duckdb.Error as error:
                raise self._wrong(str(error), index.column_names) from None
        if kind != "BOOLEAN" or len(values) != len(index):
            seen = f"gives {len(values)} values of type {kind} for {len(index)} rows"
            raise self._wrong(f"it {seen}, not a BOOLEAN each", index.column_names)
        return np.ma.filled(values, False).astype(np.bool_)

    def _parsed(self) -> Any:
        """DuckDB's syntax tree of the expression."""
        query = f"SELECT ({self._expression}\n) FROM rows"
        answer = self._connection.execute("SELECT json_serialize_sql(?)", [query]).fetchall()
        tree = json.loads(answer[0][0])
        if tree["error"] or len(tree["statements"]) != 1:
            raise self._wrong(tree.get("error_message", "it is more than one statement"))
        return tree

    def _wrong(self, reason: str, columns: list[str] | None = None) -> UsageError:
        first = reason.strip().splitlines()[0]
        listed = f"; the columns are {', '.join(columns)}" if columns else ""
        return UsageError(
            f"the condition {self._expression!r} cannot be evaluated: {first}{listed}"
        )


def _columns_of(tree: Any) -> Iterator[str]:
    """The last parts of all column names in a syntax tree."""
    if isinstance(tree, dict):
        if tree.get("class") == "COLUMN_REF":
            yield str(tree["column_names"][-1]).lower()
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _columns_of(branch)
