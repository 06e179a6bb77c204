"""Every documented way to start two ranks trains the same run: one launcher, two hosts, Slurm."""

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.dataset import pictures
from tests.support.launch import BIN, LIMIT_S, ROOT, environment, read_metrics, run_module

pytestmark = pytest.mark.dist

SETTINGS = [
    *("loader.global_batch=8", "loader.lanes=4", "loader.workers=1", "train.epochs=1"),
    *("crops.global_size_px=32", "crops.local_size_px=16", "crops.local_crops=2"),
    *("model.backbone=resnet18", "model.hidden_dim=32", "model.feat_dim=16"),
    *("model.num_prototypes=12", "schedule.base_lr=0.6", "schedule.warmup_epochs=0"),
    *("engine.zero_stage=1", "train.log_every_steps=1"),
]
IMAGES, STEPS = 40, 5

# Stands in for Slurm: two tasks on one node, with the variables that srun gives a task; like srun
# it returns the highest exit code. `options` are what the script passed.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >> "$FAKE_SLURM/options"; shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    tasks="$tasks $!"
done
highest=0
for task in $tasks; do
    wait "$task"; code=$?
    if (( code > highest )); then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$FAKE_SLURM/scontrol"
if [[ "$1 $2" == "show hostnames" ]]; then printf '127.0.0.1\\nnode2\\n'; fi
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few packed pictures on the local disk."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "pictures").mkdir()
    for number, body in enumerate(pictures(IMAGES)):
        (folder / "pictures" / f"{number:03d}.jpg").write_bytes(body)
    packed = run_module("shard_tools", "pack", str(folder / "pictures"), str(folder / "data"))
    assert packed.returncode == 0, packed.stderr
    return folder / "data"


def arguments(dataset: Path, folder: Path, *more: str) -> list[str]:
    places = [f"loader.dataset={dataset}", f"checkpoint.run={folder / 'run'}"]
    return [*SETTINGS, *places, f"train.log_dir={folder / 'logs'}", *more]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_job() -> int:
    """The number of a job whose port, as configs/slurm.sh chooses it, nobody uses."""
    for number in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + number))
            return number
    raise AssertionError("ten thousand ports in use")


def start(command: Sequence[str], log: Path, **env: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "logs" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS))
    assert {record["world_size"] for record in records} == {2}
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def one_launcher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks under one deepspeed launcher."""
    folder = tmp_path_factory.mktemp("one")
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(free_port()), "--module", "trainer"]
    run = start([*launcher, *arguments(dataset, folder)], folder / "log")
    assert run.wait(LIMIT_S) == 0, (folder / "log").read_text()[-4000:]
    return losses(folder)


def test_two_hosts_without_ssh_are_one_world(
    dataset: Path, one_launcher: list[float], tmp_path: Path
) -> None:
    """A launcher on each "host"; two names of loopback stand for two machines."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# name and devices of every host\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    training = ["--module", "trainer", *arguments(dataset, tmp_path)]
    log = tmp_path / "log"
    hosts = [start([*launcher, "--node_rank", number, *training], log) for number in ("0", "1")]
    assert [host.wait(LIMIT_S) for host in hosts] == [0, 0], log.read_text()[-4000:]
    assert losses(tmp_path) == pytest.approx(one_launcher, abs=1e-6)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What sbatch gives a job's script, and commands that stand in for Slurm's."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}",
        "FAKE_SLURM": str(tmp_path),
        "PYTHON": str(BIN / "python"),
        "SLURM_JOB_ID": str(free_job()),
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def submit(command: Sequence[str], log: Path, slurm: dict[str, str]) -> subprocess.Popen[bytes]:
    return start(["bash", str(ROOT / "configs" / "slurm.sh"), *command], log, **slurm)


def test_the_slurm_script_starts_the_same_world(
    dataset: Path, one_launcher: list[float], slurm: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    job = submit(arguments(dataset, tmp_path), log, slurm)
    assert job.wait(LIMIT_S) == 0, log.read_text()[-4000:]
    assert losses(tmp_path) == pytest.approx(one_launcher, abs=1e-6)
    assert "requeue" not in (tmp_path / "scontrol").read_text()
    assert (tmp_path / "options").read_text().split() == ["--kill-on-bad-exit=0", "--wait=60"]


@pytest.mark.parametrize(("code", "requeued"), [(3, True), (1, False), (0, False)])
def test_a_slurm_job_that_saved_and_stopped_is_put_back(
    code: int, requeued: bool, slurm: dict[str, str], tmp_path: Path
) -> None:
    """The highest exit code of the ranks is the job's; a script ends here in their place."""
    ranks = tmp_path / "bin" / "ranks"
    ranks.write_text(f"#!/bin/bash\nexit $(( RANK == 1 ? {code} : 0 ))\n")
    ranks.chmod(0o755)
    job = submit([], tmp_path / "log", slurm | {"PYTHON": str(ranks)})
    assert job.wait(LIMIT_S) == code
    assert (f"requeue {slurm['SLURM_JOB_ID']}" in (tmp_path / "scontrol").read_text()) == requeued


def test_the_slurm_script_is_well_formed() -> None:
    script = ROOT / "configs" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert "#SBATCH --signal=TERM@300" in options
    assert "#SBATCH --requeue" in options
    assert not any("gpus-per-task" in line for line in options), "a rank takes its local one"
