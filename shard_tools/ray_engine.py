"""Runs tasks on a Ray cluster, or on a Ray started here: pack's and verify's `--engine ray`.

Ray Core tasks, as in its documentation's "limiting the number of pending tasks" pattern. What runs
next, retries and copies of stragglers are engine.Engine's, so both engines behave alike; Ray only
executes. Ray Data is not used: it keeps every row in its object store and commits by renaming.
Through Ray go tasks and results, some hundred bytes each, never an image.

The environment that workers need to reach a store (AWS_…) travels in the tasks' arguments: Ray
writes the `env_vars` of a runtime environment to its log files and shows them on its dashboard.

A cluster without any CPU may be one that is about to grow: its tasks wait, and the log says so.
"""

import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from pipeline.cores import usable_cores
from pipeline.errors import CropstreamError, UsageError
from shard_tools.engine import (
    Engine,
    Outcome,
    Pool,
    Result,
    Task,
    WorkerDiedError,
    attempt,
    ignore_counts,
    read_outcome,
)

TASKS_PER_PROCESS = 2  # Ray hands the next one over without asking us

_CONNECT_S = 10.0
_NO_CPUS_S = 10.0  # without any, before the log says why nothing happens
_log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 80 * 2**20  # about Ray's minimum: results travel outside of it
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # it would warn
}


class RayEngine(Engine[Task, Result]):
    """Runs tasks as Ray tasks of one CPU each; everything else is as in Engine.

    Args:
        address: the cluster to join: "auto", host:port, or ray://host:port; None starts a Ray on
            this machine and stops it in the end. A connection that this process already has is
            used, and left open. cropstream, the same version, must be installed on every node.
        workers: how many CPUs to use at most; None for all there are, also those added meanwhile.
        progress_of: what a result says of progress; without it `on_tick` is told nothing but zeros.

    Raises UsageError if Ray is not installed.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        *,
        address: str | None,
        workers: int | None,
        on_tick: Callable[[int, int], None] = ignore_counts,
        after_death: Callable[[Task], Task] | None = None,
        progress_of: Callable[[Result], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(
            function,
            workers=workers,
            on_tick=on_tick,
            after_death=after_death,
            progress_of=progress_of,
        )
        self._address = address
        _import_ray()

    def _open(self) -> Pool:
        ray = _import_ray()
        if connects := not ray.is_initialized():
            connect(ray, self._address, self._workers)
        return _RayPool(ray, self._function, self._workers, self._progress_of, owned=connects)


class _RayPool:
    """Ray tasks; an execution is the reference to its result."""

    tasks_per_process = TASKS_PER_PROCESS

    def __init__(
        self,
        ray: Any,
        function: Callable[[Any], Any],
        max_workers: int | None,
        progress_of: Callable[[Any], tuple[int, int]] | None,
        *,
        owned: bool,
    ) -> None:
        self._ray = ray
        self._function = function
        self._max_workers = max_workers
        self._progress_of = progress_of
        self._owned = owned
        self._opened_s = time.monotonic()
        self._told = False  # that there are no CPUs
        self._images = self._rejected = 0
        self._running: set[Any] = set()
        self._attempt = ray.remote(max_retries=0)(attempt_with_environment)
        self._environment = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        errors = ray.exceptions
        self._deaths = (
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
            errors.LocalRayletDiedError,
            errors.ObjectLostError,  # the result's node died before we read it
        )

    def num_processes(self) -> int:
        """The cluster's CPUs, asked again each time for it may grow."""
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if cpus == 0:
            self._tell_of_no_cpus()
        return max(1, min(cpus, self._max_workers or cpus))

    def _tell_of_no_cpus(self) -> None:
        if self._told or time.monotonic() - self._opened_s < _NO_CPUS_S:
            return
        self._told = True
        _log.warning(
            "the Ray cluster has no CPU to run tasks on: waiting until a node with one joins it "
            "(`ray start --address=…`); Ctrl-C ends this, and what is committed stays"
        )

    def start(self, task: Any) -> Any:
        work = pickle.dumps((self._function, task))
        execution = self._attempt.remote(self._environment, work)
        self._running.add(execution)
        return execution

    def wait(self, executions: Collection[Any], timeout_s: float) -> list[tuple[Any, Outcome]]:
        ready, rest = self._ray.wait(list(executions), num_returns=1, timeout=timeout_s)
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [(execution, self._outcome(execution)) for execution in ready]

    def cancel(self, execution: Any) -> None:
        self._running.discard(execution)
        self._ray.cancel(execution, force=True)

    def totals(self) -> tuple[int, int]:
        return self._images, self._rejected

    def close(self) -> None:
        for execution in list(self._running):
            self.cancel(execution)
        if self._owned:
            self._ray.shutdown()

    def _outcome(self, execution: Any) -> Outcome:
        self._running.discard(execution)
        try:
            outcome = read_outcome(self._ray.get(execution))
        except self._deaths as error:
            return Outcome(error=WorkerDiedError(_first_line(error)))
        except self._ray.exceptions.RayError as error:
            return Outcome(error=_not_executed(error))
        if outcome.error is None and self._progress_of is not None:
            images, rejected = self._progress_of(outcome.result)
            self._images += images
            self._rejected += rejected
        return outcome


def attempt_with_environment(environment: dict[str, str], work: bytes) -> bytes:
    """engine.attempt in a Ray worker, with what leads the driver to its stores."""
    os.environ.update(environment)
    return attempt(work)


def _import_ray() -> Any:
    os.environ.update(_RAY_SETTINGS)
    try:
        import ray
    except ImportError:
        raise UsageError("engine=ray needs Ray: pip install 'cropstream[ray]'") from None
    return ray


def connect(ray: Any, address: str | None, workers: int | None) -> None:
    """Join the cluster, or start a Ray here. Raises UsageError if there is none to join."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init(
            "local",  # with None, Ray would join RAY_ADDRESS
            num_cpus=workers or usable_cores(),
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
        return
    threads = {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
    try:
        _check_reachable(address)
        ray.init(address, runtime_env={"env_vars": threads} if threads else None, **quiet)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address!r} ({_first_line(error)}): start one with "
            "`ray start --head`, or leave the address out to start one here for this run; a "
            "cluster that asks for a token hears ray:// only if RAY_AUTH_MODE=token is set"
        ) from None


def _check_reachable(address: str) -> None:
    """Raises OSError at once where Ray would try for minutes and then exit the interpreter."""
    if address in ("auto", "local"):
        return
    where = urlsplit(address if "://" in address else f"ray://{address}")
    socket.create_connection((where.hostname, where.port), timeout=_CONNECT_S).close()


def _not_executed(error: Exception) -> CropstreamError:
    """An error that is neither the task's own nor a death: its worker could not even begin."""
    return CropstreamError(
        "a Ray worker could not run the task: is cropstream, the same version, installed on every "
        f"node of the cluster? What Ray says: {_last_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: Exception) -> str:
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)
