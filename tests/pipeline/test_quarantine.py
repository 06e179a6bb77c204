import logging

import pytest

from pipeline.errors import DataError
from pipeline.quarantine import Quarantine, in_order
from pipeline.samples import BadSample


def bad(number: int) -> BadSample:
    return BadSample(number, f"key{number}", "data/00/one.tar", "checksum differs")


def add(
    found: Quarantine, sample: BadSample, *, epoch: int = 0, step: int, substitute: int = 99
) -> None:
    found.add_batch([(sample, substitute)], epoch=epoch, step=step)


def test_a_sample_is_one_entry_at_its_first_place_in_any_order_of_threads():
    found = Quarantine("data", limit=5, entries=())
    add(found, bad(7), epoch=1, step=4, substitute=8)
    add(found, bad(7), epoch=0, step=9, substitute=6)
    add(found, bad(7), epoch=2, step=0, substitute=5)
    add(found, bad(3), epoch=0, step=2, substitute=4)
    entries = found.before(9, 0)
    assert [(e["number"], e["epoch"], e["step"], e["substitute"]) for e in entries] == [
        (3, 0, 2, 4),
        (7, 0, 9, 6),
    ]
    assert [e["number"] for e in found.before(0, 9)] == [3], "batches read ahead come again"


def test_the_limit_counts_distinct_samples_those_of_the_checkpoint_too():
    first = Quarantine("s3://b/data", limit=2, entries=())
    add(first, bad(1), step=0)
    resumed = Quarantine("s3://b/data", limit=2, entries=first.before(1, 0))
    for epoch in range(3):
        add(resumed, bad(1), epoch=epoch, step=5)
        add(resumed, bad(2), epoch=epoch, step=6)
    assert resumed.num_found == 1
    with pytest.raises(DataError, match=r"3 samples of s3://b/data(.|\n)*key1 of data/00/one.tar"):
        add(resumed, bad(3), epoch=3, step=0)


def test_what_a_shard_has_lost_is_one_line():
    """Samples of a shard that cannot be read have no key: nobody got to see them."""
    found = Quarantine("s3://b/data", limit=40, entries=())
    for number in range(30):
        reason = f"there is no s3://b/data/00/two.tar at {number}"
        add(found, BadSample(number, "", "s3://b/data/00/two.tar", reason), step=number)
    for number in range(30, 40):
        add(found, bad(number), step=number)
    with pytest.raises(DataError) as caught:
        add(found, bad(40), epoch=1, step=0)
    first, *listed = str(caught.value).splitlines()
    assert first.startswith("41 samples of s3://b/data could not be used, allowed are")
    assert listed[0].strip() == "30 of s3://b/data/00/two.tar: there is no … at N (30)"
    assert listed[1].strip() == "11 of data/00/one.tar: checksum differs (11)"
    assert [line.split()[0] for line in listed[2:]] == [f"key{n}" for n in range(30, 41)]


def test_it_speaks_at_the_first_and_the_tenth(caplog: pytest.LogCaptureFixture):
    found = Quarantine("data", limit=100, entries=())
    with caplog.at_level(logging.WARNING):
        for number in range(15):
            add(found, bad(number), step=number)
    assert [record.getMessage().split(" ")[1] for record in caplog.records] == ["key0", "key9"]


def test_every_shard_that_loses_something_is_named_once(caplog: pytest.LogCaptureFixture):
    found = Quarantine("data", limit=100, entries=())
    with caplog.at_level(logging.WARNING):
        for number in range(6):
            add(found, BadSample(number, "", f"data/{number % 2}.tar", "gone"), step=number)
    assert [record.args[1] for record in caplog.records] == ["data/0.tar", "data/1.tar"]


def test_lists_of_several_ranks_become_one():
    mine = Quarantine("data", limit=9, entries=())
    add(mine, bad(5), step=3)
    theirs = Quarantine("data", limit=9, entries=())
    add(theirs, bad(5), step=1)
    add(theirs, bad(2), step=2)
    joined = in_order([*mine.before(1, 0), *theirs.before(1, 0)])
    assert [(entry["number"], entry["step"]) for entry in joined] == [(5, 1), (2, 2)]


def test_the_batch_that_is_too_much_is_told_whole():
    found = Quarantine("data", limit=2, entries=())
    with pytest.raises(DataError, match=r"(?s)5 samples of data .*key0 .*key4 "):
        found.add_batch([(bad(number), 99) for number in range(5)], epoch=0, step=0)


def test_one_rank_of_several_leaves_it_to_all_of_them_and_fails_a_batch_late():
    ranks = [Quarantine("data", limit=6, entries=(), world_size=2) for _ in range(2)]
    add(ranks[0], bad(0), step=0)
    add(ranks[1], bad(0), step=1)
    for number in range(1, 7):
        add(ranks[number % 2], bad(number), step=2)
    num_found = sum(rank.num_found for rank in ranks)
    assert num_found == 8
    assert not ranks[0].may_be_over(6)
    assert ranks[0].may_be_over(num_found)
    union = in_order(entry for rank in ranks for entry in rank.before(1, 0))
    messages = []
    for rank in ranks:
        rank.check()
        with pytest.raises(DataError) as caught:
            rank.check(union)
        messages.append(str(caught.value))
    assert messages[0].startswith("7 samples of data")
    assert messages[0] == messages[1]

    alone = Quarantine("data", limit=2, entries=(), world_size=2)
    alone.add_batch([(bad(number), 99) for number in range(3)], epoch=0, step=0)
    with pytest.raises(DataError, match="3 samples"):
        alone.add_batch([], epoch=0, step=1)


def test_what_earlier_runs_have_found_does_not_end_a_run_under_a_lower_limit():
    earlier = Quarantine("data", limit=5, entries=())
    earlier.add_batch([(bad(number), 99) for number in range(4)], epoch=0, step=0)
    resumed = Quarantine("data", limit=2, entries=earlier.before(1, 0))
    add(resumed, bad(3), epoch=1, step=0)
    assert not resumed.may_be_over(0)
    with pytest.raises(DataError, match="5 samples"):
        add(resumed, bad(4), epoch=1, step=1)


def test_only_what_killed_or_hung_its_decoder_is_never_tried_again():
    found = Quarantine("data", limit=9, entries=())
    reasons = ("decoder died: signal 11", "decoder hung: no end within 20 s", "checksum differs")
    deadly = [BadSample(number, "key", "shard", reason) for number, reason in enumerate(reasons)]
    found.add_batch([(each, 99) for each in deadly], epoch=0, step=0)
    assert found.deadly() == tuple(deadly[:2])
    assert Quarantine("data", limit=9, entries=found.before(1, 0)).deadly() == tuple(deadly[:2])
