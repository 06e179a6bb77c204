import logging

import pytest

from pipeline.errors import DataError
from pipeline.fetch import BadSample
from pipeline.quarantine import Quarantine, in_order


def bad(number: int) -> BadSample:
    return BadSample(number, f"key{number}", "data/00/one.tar", "checksum differs")


def test_a_sample_is_one_entry_at_its_first_place_in_any_order_of_threads():
    found = Quarantine("data", limit=5, entries=())
    found.add(bad(7), epoch=1, step=4, substitute=8)
    found.add(bad(7), epoch=0, step=9, substitute=6)
    found.add(bad(7), epoch=2, step=0, substitute=5)
    found.add(bad(3), epoch=0, step=2, substitute=4)
    entries = found.before(9, 0)
    assert [(e["number"], e["epoch"], e["step"], e["substitute"]) for e in entries] == [
        (3, 0, 2, 4),
        (7, 0, 9, 6),
    ]
    assert [e["number"] for e in found.before(0, 9)] == [3], "batches read ahead come again"


def test_the_limit_counts_distinct_samples_those_of_the_checkpoint_too():
    first = Quarantine("s3://b/data", limit=2, entries=())
    first.add(bad(1), epoch=0, step=0, substitute=9)
    resumed = Quarantine("s3://b/data", limit=2, entries=first.before(1, 0))
    assert 1 in resumed
    for epoch in range(3):
        resumed.add(bad(1), epoch=epoch, step=5, substitute=9)
        resumed.add(bad(2), epoch=epoch, step=6, substitute=9)
    with pytest.raises(DataError, match=r"3 samples of s3://b/data(.|\n)*key1 of data/00/one.tar"):
        resumed.add(bad(3), epoch=3, step=0, substitute=9)


def test_a_failed_substitute_is_known_but_no_entry():
    found = Quarantine("data", limit=0, entries=())
    found.note(4)
    assert 4 in found
    assert found.before(1, 0) == []


def test_it_speaks_at_the_first_and_the_tenth(caplog: pytest.LogCaptureFixture):
    found = Quarantine("data", limit=100, entries=())
    with caplog.at_level(logging.WARNING):
        for number in range(15):
            found.add(bad(number), epoch=0, step=number, substitute=99)
    assert [record.getMessage().split(" ")[1] for record in caplog.records] == ["key0", "key9"]


def test_lists_of_several_ranks_become_one():
    mine = Quarantine("data", limit=9, entries=())
    mine.add(bad(5), epoch=0, step=3, substitute=6)
    theirs = Quarantine("data", limit=9, entries=())
    theirs.add(bad(5), epoch=0, step=1, substitute=7)
    theirs.add(bad(2), epoch=0, step=2, substitute=7)
    joined = in_order([*mine.before(1, 0), *theirs.before(1, 0)])
    assert [(entry["number"], entry["step"]) for entry in joined] == [(5, 1), (2, 2)]
