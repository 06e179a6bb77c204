"""Who am I among how many: the one place that reads RANK, LOCAL_RANK and WORLD_SIZE.

`trainer.__main__` starts the world before anything is built; the rest receives a `World`.
The `deepspeed` launcher, torchrun and a cluster's own starter all describe a process by the same
variables; with none of them set the process is a world of one, in which every collective still
works, so no caller asks "am I distributed?".

A rank that dies must not leave the others waiting for ever: every collective ends after
`TIMEOUT_S`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import CropstreamError, UsageError

T = TypeVar("T")

TIMEOUT_S = 600.0

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """One process among `world_size`; `local_rank` counts within its machine.

    `host_group` carries values that lie in host memory, so that no device is waited for; None is
    the whole world's own group, which does so on CPUs.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0: the one that logs, and that commits."""
        return self.rank == 0

    def group_of(self, num_ranks: int) -> dist.ProcessGroup | None:
        """The group of this rank when neighbours are put together in groups of `num_ranks`.

        0 is all ranks. None for a group of one rank. Collective. `num_ranks` divides the world.
        """
        if num_ranks in (0, self.world_size):
            return dist.group.WORLD
        if num_ranks == 1:
            return None
        group, _ = dist.new_subgroups(num_ranks)
        return group

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order of rank, on every rank. The values are pickled."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def sum(self, *values: int) -> list[int]:
        """The sum over ranks of each value. The ranks wait for each other, no device is asked."""
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def mean(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Means over ranks of a few numbers: float64 [len(values)] on this rank's device."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(total)
        return total / self.world_size


def start_world(*, timeout_s: float = TIMEOUT_S) -> World:
    """Join the processes the launcher started, or become a world of one.

    NCCL on CUDA devices, gloo on CPUs, which DS_ACCELERATOR=cpu asks for. Call it before anything
    imports deepspeed, whose choice of device it settles. Raises UsageError when the launcher's
    variables are incomplete or name no device.
    """
    rank, local_rank, world_size = _identity()
    device = _device(local_rank)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else deepspeed probes for devices, slowly
    os.environ["LOCAL_RANK"] = str(local_rank)  # deepspeed insists on it, also without a launcher
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        # One process needs no server, hence no port that somebody else may take first.
        store=dist.HashStore() if _is_alone() else None,  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    host_group: Any = None
    if device.type == "cuda":
        host_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, local_rank, world_size, device, host_group)


def together(world: World, build: Callable[[], T]) -> T:
    """Do on every rank what may fail by a user's mistake; if one fails all end, told once."""
    result, failure = None, None
    try:
        result = build()
    except CropstreamError as error:
        failure = error
    failures = [each for each in world.gather(failure) if each is not None]
    if failures:
        if world.is_first:
            raise failures[0]
        sys.exit(failures[0].exit_code)
    return result  # type: ignore[return-value]


def launched_rank() -> int:
    """The rank the launcher gave this process, 0 without one; known before any world is started."""
    return int(os.environ.get("RANK", "0"))


def launched_local_rank() -> int:
    """The same, counted within this machine."""
    return int(os.environ.get("LOCAL_RANK", launched_rank()))


def stop_world() -> None:
    """Leave the world after a run that went well; a failing rank just exits.

    The ranks leave together: one that closes its sockets while another is still in a collective
    aborts it.
    """
    dist.barrier()
    dist.destroy_process_group()


def abandon_world(world: World) -> None:
    """Leave the world after a failure, without waiting for anybody; nothing if it was left.

    Only what runs on gloo is destroyed: without that its threads abort the process as it exits, and
    the exit code is lost. NCCL ends with the process: destroying it may wait for a collective that
    other ranks never join.
    """
    if dist.is_initialized():
        dist.destroy_process_group(world.host_group)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    # NCCL and the store have a type for it; gloo has only words.
    words = ("onnection", "Timed out")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _identity() -> tuple[int, int, int]:
    if _is_alone():
        return 0, 0, 1
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(
            f"the environment describes one process of several but lacks {', '.join(missing)}; "
            "start with `deepspeed --module trainer …`, or unset RANK and WORLD_SIZE"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, int(os.environ.get("LOCAL_RANK", rank)), world_size


def _is_alone() -> bool:
    return "RANK" not in os.environ and "WORLD_SIZE" not in os.environ


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise UsageError(
            f"local rank {local_rank} has no CUDA device, this machine has {num_devices}; "
            "start at most as many processes as there are devices"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
