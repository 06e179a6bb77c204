"""Run a function on several real ranks: spawned processes joined in a gloo group."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return what each returned, by rank.

    `function` is a module-level function; inside it `torch.distributed.group.WORLD` is a gloo
    group. Arguments and results are pickled. A rank's exception is raised here, with its traceback.
    Starting the processes takes a few seconds, so let one launch work through many cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank_main,
            args=(world_size, folder, function, args),
            nprocs=world_size,
            start_method="spawn",
        )
        return [
            torch.load(_result_path(folder, rank), weights_only=False) for rank in range(world_size)
        ]


def _rank_main(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    try:
        torch.save(function(*args), _result_path(folder, rank))
        dist.barrier()  # nobody tears down while another still talks to it
    finally:
        dist.destroy_process_group()
    # All is saved. The interpreter's end would now and then meet a thread of gloo that still runs,
    # and abort: "terminate called without an active exception".
    os._exit(0)


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"
