import logging
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, run_command
from pipeline.store import Store, open_store
from tests.support.processes import run_ranks
from tests.support.trajectory import (
    Case,
    deepspeed_engine,
    one_step,
    plain_engine,
    this_world,
)
from trainer.checkpoint import CheckpointConfig, Checkpoints, main
from trainer.distributed import World
from trainer.engine import Engine, EngineConfig
from trainer.fragments import read_checkpoint, saved_steps
from trainer.queue import FeatureQueue

NAME = "traj_ws1_resnet"  # has buffers
SAVED, END = 9, 11  # the queue starts at 5 and is full at 8; prototypes move from 7 on
ENGINES = ("plain", "zero0", "zero1", "zero2", "zero3")
STAGES = [(one, two) for one in ENGINES[1:] for two in ENGINES[1:]]
PAIRS = [("plain", "plain"), *STAGES]


class Alone(World):
    """A world of one that needs no process group, for tests in pytest's own process."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def share(self, value: Any) -> Any:
        return value


def alone() -> World:
    return Alone(0, 0, 1, torch.device("cpu"))


def case_of(engine: str, world: World) -> Case:
    dtype = torch.float64 if engine == "plain" else torch.float32
    return Case(NAME, dtype, world.rank, world.world_size)


def build(engine: str, world: World) -> Engine:
    case = case_of(engine, world)
    if engine == "plain":
        return plain_engine(case)
    return deepspeed_engine(case, EngineConfig(zero_stage=int(engine[-1])))


def steps(engine: Engine, case: Case, queue: FeatureQueue, first: int, last: int) -> list[float]:
    return [
        one_step(case, engine, queue if step >= 5 else None, step) for step in range(first, last)
    ]


def state_of(engine: Engine, queue: FeatureQueue) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    state |= {f"momentum/{f.name}/{f.start}": f.momentum.clone() for f in engine.fragments()}
    return {**state, "queue": queue.features.clone(), "random": torch.get_rng_state()}


def checkpoints(url: str, world: World, keep: int = 3) -> Checkpoints:
    return Checkpoints(CheckpointConfig(run=url, keep=keep), world)


# --------------------------------------------------------------------------------------------------
# one process, no DeepSpeed


def save_at(url: str, step: int, *, fill: float | None = None, **options: Any) -> dict[str, Tensor]:
    """A checkpoint whose weights are filled with its step, or with `fill`."""
    engine, queue = build("plain", alone()), case_of("plain", alone()).queue()
    for number, fragment in enumerate(engine.fragments()):
        fragment.weight.fill_(step + number / 1000 if fill is None else fill)
        fragment.momentum.fill_(-step)
    state = {"position": step, "text": "é"}
    checkpoints(url, alone(), **options).save(step, engine, queue=queue, state=state, metrics=b"{}")
    return state_of(engine, queue)


def restored(url: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    engine, queue = build("plain", alone()), case_of("plain", alone()).queue()
    every = checkpoints(url, alone())
    checkpoint = every.latest()
    assert checkpoint is not None
    return every.restore(checkpoint, engine, queue=queue), state_of(engine, queue)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return f"file://{tmp_path}/run"


def overwrite(store: Store, key: str, body: bytes) -> None:
    store.delete(key)
    assert store.put_if_absent(key, body)


def flip_byte(store: Store, key: str, position: int) -> None:
    body = bytearray(store.get(key))
    body[position] ^= 1
    overwrite(store, key, bytes(body))


def test_no_checkpoint_at_all(url):
    assert checkpoints(url, alone()).latest() is None


def test_round_trip(url):
    want = save_at(url, 7)
    state, found = restored(url)
    assert state == {"position": 7, "text": "é"}
    assert_equal(found, want)


def test_metrics_come_back(url):
    save_at(url, 7)
    every = checkpoints(url, alone())
    checkpoint = every.latest()
    assert checkpoint is not None
    assert every.metrics(checkpoint) == b"{}"


def test_only_the_newest_are_kept(url):
    for step in (1, 2, 3, 4):
        save_at(url, step, keep=2)
    store = open_store(url)
    assert saved_steps(store) == [3, 4]
    kept = {o.key for step in (3, 4) for o in read_checkpoint(store, step).objects}
    assert {info.key for info in store.list("objects")} == kept


def test_weights_that_are_not_finite_push_no_good_checkpoint_out(url):
    save_at(url, 1)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint 2 .* not finite"):
        save_at(url, 2, fill=float("nan"), keep=1)
    assert saved_steps(open_store(url)) == [1]


def test_a_store_that_takes_nothing_is_noticed_at_the_start():
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        checkpoints("/proc/nowhere", alone()).prove_writable()


def test_saving_the_same_step_again_does_nothing(url):
    engine, every = build("plain", alone()), checkpoints(url, alone())
    every.save(3, engine, queue=None, state={})
    attempt = read_checkpoint(open_store(url), 3).attempt
    every.save(3, engine, queue=None, state={})
    assert read_checkpoint(open_store(url), 3).attempt == attempt


def test_of_two_runs_on_one_prefix_the_second_stops(url):
    want = save_at(url, 7)
    objects = {info.key for info in open_store(url).list("objects")}
    with pytest.raises(CheckpointError, match="another run has committed this step"):
        save_at(url, 7)
    assert {info.key for info in open_store(url).list("objects")} == objects
    assert_equal(restored(url)[1], want)


@pytest.mark.parametrize("harm", ["flip", "shorten", "delete", "manifest", "no json"])
def test_a_damaged_checkpoint_is_passed_over_and_reported(tmp_path, caplog, harm):
    url = str(tmp_path)
    want = save_at(url, 1)
    save_at(url, 2)
    damage_checkpoint(open_store(url), harm)
    with caplog.at_level(logging.WARNING):
        state, found = restored(url)
    assert state["position"] == 1
    assert_equal(found, want)
    assert "passing over checkpoint 2" in caplog.text


def damage_checkpoint(store: Store, harm: str) -> None:
    checkpoint = read_checkpoint(store, 2)
    key = checkpoint.objects[0].key
    if harm == "flip":
        flip_byte(store, key, 1000)
    elif harm == "shorten":
        overwrite(store, key, store.get(key)[:-1])
    elif harm == "delete":
        store.delete(key)
    elif harm == "manifest":
        position = store.get(checkpoint.key).index(b'"position": 2') + 12
        flip_byte(store, checkpoint.key, position)
    else:
        overwrite(store, checkpoint.key, b'{"format": 1')


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(url):
    save_at(url, 1)
    save_at(url, 2)
    flip_byte(open_store(url), read_checkpoint(open_store(url), 2).objects[0].key, 5)
    restored(url)
    want = save_at(url, 2)
    assert_equal(restored(url)[1], want)
    assert len(list(open_store(url).list("damaged"))) == 1


def test_nothing_is_restored_from_damaged_bytes(tmp_path):
    """Damage that comes between `latest` and `restore` leaves the engine as it was."""
    url = str(tmp_path)
    save_at(url, 2)
    every, engine = checkpoints(url, alone()), build("plain", alone())
    checkpoint = every.latest()
    assert checkpoint is not None
    last = checkpoint.tensors["queue/00000"].pieces[-1]
    flip_byte(open_store(url), checkpoint.objects[0].key, last.offset_bytes)
    queue = case_of("plain", alone()).queue()
    before = state_of(engine, queue)
    with pytest.raises(CheckpointError, match="is damaged: the checksum"):
        every.restore(checkpoint, engine, queue=queue)
    assert_equal(state_of(engine, queue), before)


def test_if_nothing_verifies_the_run_does_not_start_over(tmp_path):
    save_at(str(tmp_path), 2)
    open_store(tmp_path).delete(read_checkpoint(open_store(tmp_path), 2).objects[0].key)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints verifies"):
        checkpoints(str(tmp_path), alone()).latest()


def test_a_store_that_cannot_be_read_is_no_damaged_checkpoint(s3_url, monkeypatch):
    save_at(s3_url, 1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CheckpointError, match=r"cannot resume .*AWS_SECRET_ACCESS_KEY"):
        checkpoints(s3_url, alone()).latest()


def test_a_manifest_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.fragments.FORMAT", 99)
    save_at(str(tmp_path), 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="of format 99, this program knows 1"):
        checkpoints(str(tmp_path), alone()).latest()


def test_another_model_is_refused(tmp_path):
    save_at(str(tmp_path), 1)
    every, other = checkpoints(str(tmp_path), alone()), Case("traj_ws1_plain", torch.float64)
    checkpoint = every.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"it is of another model: .* tensors differ"):
        every.restore(checkpoint, plain_engine(other), queue=other.queue())


def test_another_dtype_is_refused(tmp_path):
    save_at(str(tmp_path), 1)
    every, other = checkpoints(str(tmp_path), alone()), Case(NAME, torch.float32)
    checkpoint = every.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="is float64 there and float32 here"):
        every.restore(checkpoint, plain_engine(other), queue=other.queue())


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        (None, "carries a feature queue and this run has none"),
        (FeatureQueue(16, 16, 2, batch_size=8, world_size=1), r"feature queue is \(2, 24, 16\)"),
        (
            FeatureQueue(24, 16, 2, batch_size=4, world_size=1),
            "global batches of 8, this run's of 4",
        ),
    ],
)
def test_another_queue_is_refused(tmp_path, queue, message):
    save_at(str(tmp_path), 1)
    every = checkpoints(str(tmp_path), alone())
    checkpoint = every.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=message):
        every.restore(checkpoint, build("plain", alone()), queue=queue)


def test_large_tensors_are_cut_into_pieces_and_read_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.fragments.PIECE_BYTES", 1024)
    monkeypatch.setattr("trainer.fragments.READ_BYTES", 3000)
    want = save_at(str(tmp_path), 1)
    checkpoint = read_checkpoint(open_store(tmp_path), 1)
    assert max(len(tensor.pieces) for tensor in checkpoint.tensors.values()) > 10
    assert_equal(restored(str(tmp_path))[1], want)


# --------------------------------------------------------------------------------------------------
# a process killed in the middle of a save


@pytest.mark.dist
def test_a_save_that_was_killed_does_not_exist(url):
    want = save_at(url, 1)
    program = f"""
        from tests.trainer.test_checkpoint import *
        from trainer.fragments import WrittenObject
        append, written = WrittenObject.append, []
        def slow(self, write, data):
            append(self, write, data)
            written.append(data)
            if len(written) == 100:
                print("writing", flush=True)
                time.sleep(60)
        WrittenObject.append = slow
        save_at({url!r}, 2)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert saved_steps(open_store(url)) == [1]
    assert_equal(restored(url)[1], want)
    again = save_at(url, 2)
    assert_equal(restored(url)[1], again)


# --------------------------------------------------------------------------------------------------
# command line


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(lambda: main(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ls(url, capsys):
    save_at(url, 3)
    save_at(url, 20)
    open_store(url).delete(read_checkpoint(open_store(url), 20).objects[1].key)
    code, out, _ = run_main(capsys, "ls", url)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["step", "time", "size", "world", "status"]
    assert lines[1].split()[0] == "3"
    assert lines[1].endswith("1  complete")
    assert "damaged: objects/000000020-" in lines[2]


def test_verify_names_what_is_damaged(url, capsys):
    save_at(url, 3)
    save_at(url, 20)
    assert run_main(capsys, "verify", url)[:2] == (
        0,
        "checkpoint 3: verified\ncheckpoint 20: verified\n",
    )
    key = read_checkpoint(open_store(url), 20).objects[0].key
    flip_byte(open_store(url), key, 77)
    code, out, err = run_main(capsys, "verify", url)
    assert (code, out) == (1, "checkpoint 3: verified\ncheckpoint 20: damaged\n")
    assert f"checkpoint 20: {open_store(url).url_of(key)} is damaged" in err
    assert run_main(capsys, "verify", url, "--step", "3")[0] == 0


def test_rm(url, capsys):
    save_at(url, 3)
    save_at(url, 20)
    assert run_main(capsys, "rm", url, "--step", "20")[:2] == (0, "removed checkpoint 20\n")
    assert saved_steps(open_store(url)) == [3]
    assert all("000000003" in info.key for info in open_store(url).list("objects"))
    code, _, err = run_main(capsys, "rm", url, "--step", "20")
    assert code == 1
    assert "has no checkpoint 20" in err


def test_a_prefix_without_checkpoints(tmp_path, capsys):
    code, _, err = run_main(capsys, "ls", str(tmp_path))
    assert code == 1
    assert "has no checkpoints: check the URL" in err


# --------------------------------------------------------------------------------------------------
# every stage and world size, under DeepSpeed


def run_and_save(root: str) -> dict[str, Any]:
    """On one of several ranks: run, save at 12 and go on; then resume under every engine."""
    world = this_world()
    found: dict[str, Any] = {}
    for name in ENGINES:
        engine, case = build(name, world), case_of(name, world)
        queue = case.queue()
        steps(engine, case, queue, 0, SAVED)
        checkpoints(f"{root}/{name}", world).save(SAVED, engine, queue=queue, state={"at": SAVED})
        found[name] = steps(engine, case, queue, SAVED, END), state_of(engine, queue)
    found["failure"] = failing_rank(f"{root}/failing", world)
    found["bug"] = rank_with_a_bug(f"{root}/failing", world)
    return found | resume(root)


def resume(root: str) -> dict[str, Any]:
    """On every rank: what a run resumed from each engine's checkpoint does, by (from, to)."""
    world = this_world()
    return {pair: resume_one(f"{root}/{pair[0]}", pair[1], world) for pair in PAIRS}


def resume_one(url: str, name: str, world: World) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(world.rank + 100)
    engine, case = build(name, world), case_of(name, world)
    queue, every = case.queue(), checkpoints(url, world)
    checkpoint = every.latest()
    assert checkpoint is not None
    assert every.restore(checkpoint, engine, queue=queue) == {"at": SAVED}
    return steps(engine, case, queue, SAVED, END), state_of(engine, queue)


def failing_rank(url: str, world: World) -> str:
    """Rank 1 cannot write; both must say so."""
    engine = build("plain", world)
    config = CheckpointConfig(run=url if world.is_first else "/dev/null/nowhere")
    try:
        Checkpoints(config, world).save(1, engine, queue=None, state={})
    except CheckpointError as error:
        return str(error)
    return "no error"


def rank_with_a_bug(url: str, world: World) -> str:
    """Rank 1 meets what is no error of ours, where all take part and, rank 0, where one does."""
    every, told = checkpoints(url, world), []
    for rank, method in ((1, every._together), (0, every._on_first)):
        try:
            method("work", lambda rank=rank: 1 // (world.rank - rank))
        except (CheckpointError, ZeroDivisionError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return "; ".join(told)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two ranks found, and what one rank found that resumed from their checkpoints."""
    root = str(tmp_path_factory.mktemp("runs"))
    return run_ranks(run_and_save, 2, root), run_ranks(resume, 1, root)[0]


@pytest.mark.dist
@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_is_exact(runs, engine):
    for rank in runs[0]:
        losses, state = rank[engine]
        resumed_losses, resumed_state = rank[engine, engine]
        assert resumed_losses == losses
        assert_equal(resumed_state, state)


@pytest.mark.dist
@pytest.mark.parametrize("pair", STAGES)
def test_resuming_under_another_stage(runs, pair):
    for rank in runs[0]:
        assert rank[pair][0] == pytest.approx(rank[pair[0]][0], abs=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("pair", PAIRS)
def test_resuming_with_fewer_ranks(runs, pair):
    ranks, alone = runs
    tolerance = 1e-11 if "plain" in pair else 1e-5
    losses, _ = ranks[0][pair[0]]
    assert alone[pair][0] == pytest.approx(losses, abs=tolerance)


@pytest.mark.dist
@pytest.mark.parametrize("pair", PAIRS)
def test_with_fewer_ranks_the_queue_has_the_same_rows_in_the_order_of_their_age(runs, pair):
    ranks, alone = runs
    parts = [rank[pair[0]][1]["queue"] for rank in ranks]  # batches of 4, newest first
    batches = torch.cat([part.unflatten(1, (-1, 4)) for part in parts], dim=2)
    torch.testing.assert_close(alone[pair][1]["queue"], batches.flatten(1, 2), rtol=0, atol=1e-5)


@pytest.mark.dist
def test_a_rank_that_cannot_write_fails_all(runs):
    for rank in runs[0]:
        assert re.search(r"cannot write checkpoint 1 to .* \(rank 1\): ", rank["failure"])


@pytest.mark.dist
def test_a_bug_on_one_rank_leaves_no_other_waiting(runs):
    division = "ZeroDivisionError: integer division or modulo by zero"
    first, second = (rank["bug"] for rank in runs[0])
    assert first == f"CheckpointError: work (rank 1): {division}; {division}"
    assert second == f"{division}; CheckpointError: work: {division}"
