"""Sealing: what may not become a snapshot."""

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.manifest import latest_version
from pipeline.store import open_store
from shard_tools.commits import seal
from shard_tools.pack import pack_unit
from shard_tools.plan import PackSettings, make_plan
from tests.shard_tools.conftest import write_images
from tests.shard_tools.test_pack import task_of


def test_two_plans_of_one_source_are_not_both_sealed(tmp_path: Path) -> None:
    write_images(tmp_path / "source", 2)
    store = open_store(tmp_path / "set")
    plans = [
        make_plan(str(tmp_path / "source"), store, PackSettings(shard_rows=rows), replace=True)
        for rows in (10, 20)
    ]
    for plan in plans:
        pack_unit(task_of(store, plan, 0))
    assert seal(store, plans[0])[1]
    with pytest.raises(UsageError, match="would store its images twice"):
        seal(store, plans[1])
    assert latest_version(store) == 1
