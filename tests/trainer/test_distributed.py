import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import UsageError
from tests.support.processes import run_ranks
from tests.support.trajectory import this_world
from trainer.distributed import _device, is_lost_rank, start_world

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_an_incomplete_launch_is_a_usage_error(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="lacks WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        start_world()


def test_distributed_does_not_load_deepspeed():
    program = "import sys, trainer.distributed; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_cpu_can_be_asked_for_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert _device(0) == torch.device("cpu")
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(UsageError, match="no CUDA device"):
        _device(0)


def _sum_then_lose_rank_1() -> tuple[list[int], bool]:
    world = this_world()
    sums = world.sum(world.rank == 1, 0, 2**40 + world.rank)
    group = dist.new_group(timeout=timedelta(seconds=1), backend="gloo")
    lost = False
    if world.is_first:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            lost = is_lost_rank(error)
    else:
        time.sleep(3)
    return sums, lost


@pytest.mark.dist
def test_what_one_rank_says_all_know_and_one_that_is_silent_is_lost():
    first, second = run_ranks(_sum_then_lose_rank_1, 2)
    assert first == ([1, 0, 2**41 + 1], True)
    assert second == ([1, 0, 2**41 + 1], False)


def test_a_bug_is_no_lost_rank():
    assert not is_lost_rank(RuntimeError("shape '[3]' is invalid for input of size 4"))
