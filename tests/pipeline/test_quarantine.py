import logging

import pytest

from pipeline.errors import DataError
from pipeline.quarantine import Quarantine, in_order
from pipeline.samples import BadSample


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
    assert resumed.known() == (bad(1),)
    for epoch in range(3):
        resumed.add(bad(1), epoch=epoch, step=5, substitute=9)
        resumed.add(bad(2), epoch=epoch, step=6, substitute=9)
    with pytest.raises(DataError, match=r"3 samples of s3://b/data(.|\n)*key1 of data/00/one.tar"):
        resumed.add(bad(3), epoch=3, step=0, substitute=9)


def test_what_a_shard_has_lost_is_one_line():
    """Samples of a shard that cannot be read have no key: nobody got to see them."""
    found = Quarantine("s3://b/data", limit=40, entries=())
    for number in range(30):
        lost = BadSample(number, "", "s3://b/data/00/two.tar", "there is no s3://b/data/00/two.tar")
        found.add(lost, epoch=0, step=number, substitute=99)
    for number in range(30, 40):
        found.add(bad(number), epoch=0, step=number, substitute=99)
    with pytest.raises(DataError) as caught:
        found.add(bad(40), epoch=1, step=0, substitute=99)
    first, *listed = str(caught.value).splitlines()
    assert first.startswith("41 samples of s3://b/data could not be used, allowed are")
    assert listed[0].strip() == (
        "30 of s3://b/data/00/two.tar: there is no s3://b/data/00/two.tar (30)"
    )
    assert listed[1].strip() == "11 of data/00/one.tar: checksum differs (11)"
    assert [line.split()[0] for line in listed[2:]] == [f"key{n}" for n in range(30, 41)]


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
