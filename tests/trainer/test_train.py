"""The loop in one process: stopping on SIGTERM, a loss that explodes, settings that change."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from webdataset import TarWriter

from pipeline.config import load_config
from pipeline.errors import UsageError
from pipeline.loader import MultiCropLoader
from pipeline.store import open_store
from tests.support.dataset import pictures, write_dataset
from tests.support.fault_proxy import FaultProxy, Kind, Rule
from tests.support.launch import (
    LIMIT_S,
    ROOT,
    environment,
    ranks_of,
    read_metrics,
    run_module,
    start_deepspeed,
    wait_for,
)
from tests.support.processes import run_ranks
from tests.support.s3_server import S3Server
from tests.support.trajectory import this_world
from trainer.config import Config
from trainer.distributed import World
from trainer.fragments import saved_steps
from trainer.train import _build_queue, num_core_sharers

SETTINGS = [
    "loader.global_batch=8",
    "crops.global_size_px=32",
    "crops.local_crops=0",
    "model.backbone=resnet18",
    "model.hidden_dim=16",
    "model.feat_dim=8",
    "model.num_prototypes=6",
    "schedule.base_lr=0.1",
    "schedule.warmup_epochs=0",
    "train.log_every_steps=1",
]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    write_dataset(str(tmp_path / "data"), pictures(40))
    places = [f"loader.dataset={tmp_path / 'data'}", f"checkpoint.run={tmp_path / 'run'}"]
    return [*SETTINGS, *places, f"train.log_dir={tmp_path / 'logs'}"]


def test_sigterm_saves_and_leaves_with_3_and_another_order_is_refused(
    settings: list[str], tmp_path: Path
) -> None:
    log, metrics = tmp_path / "log", tmp_path / "logs" / "metrics.jsonl"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *settings, "train.epochs=40"],
            stderr=output,
            stdout=output,
            cwd=ROOT,
            env=environment(),
        )
    wait_for(process, lambda: len(read_metrics(metrics)) >= 3, log=log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3, log.read_text()
    done = read_metrics(metrics)[-1]["step"] + 1
    assert (tmp_path / "run" / "manifests" / f"{done:09d}.json").exists()
    assert done < 200

    assert "changed since" not in log.read_text()
    again = run_module("trainer", *settings, "train.epochs=1", "loader.threads=1")
    assert again.returncode == 0, "it had more steps than that"
    changes = "loader.threads 0 -> 1, train.epochs 40 -> 1"
    assert f"changed since the checkpoint: {changes}\n" in again.stderr
    changed = run_module("trainer", *settings, "train.epochs=40", "loader.global_batch=4")
    assert changed.returncode == 2
    assert "loader.global_batch is 4, but the checkpoint was written with 8" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_plain_tars_are_trained_on_and_the_run_counts_on(tmp_path: Path) -> None:
    for tar in range(2):
        with TarWriter(str(tmp_path / f"{tar}.tar")) as writer:
            for number, image in enumerate(pictures(12, seed=tar)):
                writer.write({"__key__": f"{number:04d}", "jpg": image})
    tars = [f"loader.dataset={tmp_path}/{{0..1}}.tar", "loader.epoch_samples=16"]
    places = [f"checkpoint.run={tmp_path / 'run'}", f"train.log_dir={tmp_path / 'logs'}"]
    settings = [*SETTINGS, *tars, *places, "queue.length=8", "queue.start_step=1"]
    first = run_module("trainer", *settings, "train.epochs=1")
    assert first.returncode == 0, first.stderr
    assert "starting of 2: 2 tars of " in first.stderr
    assert "is streamed as it is, without an index. Lost are" in first.stderr
    again = run_module("trainer", *settings, "train.epochs=2")
    assert again.returncode == 0, again.stderr
    assert "resuming at step 2 of 4: 2 tars of " in again.stderr
    assert "the data continue at another place" in again.stderr
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    steps = [(record["step"], record["epoch"]) for record in records]
    assert steps == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert all(record["data_wait_s"] > 0 for record in records)
    assert records[0]["loader/fetch_bytes"] > 0


@pytest.mark.dist
def test_too_many_bad_samples_end_a_run_at_the_same_step_whatever_the_world_size(
    tmp_path: Path,
) -> None:
    """Seven of 40 where six are allowed: no rank of two meets more than six."""
    images = pictures(40)
    for number in range(2, 40, 6):
        images[number] = b"no image"
    write_dataset(str(tmp_path / "data"), images)
    said, steps = [], []
    for ranks in (1, 2):
        log, logs = tmp_path / f"log{ranks}", tmp_path / f"logs{ranks}"
        settings = [*SETTINGS, f"loader.dataset={tmp_path / 'data'}", "loader.max_bad_samples=6"]
        settings += [f"checkpoint.run={tmp_path}/run{ranks}", f"train.log_dir={logs}"]
        settings += ["loader.lanes=2", "loader.workers=0", "checkpoint.every_steps=1"]
        if ranks == 1:
            result = run_module("trainer", *settings)
            code, text = result.returncode, result.stderr
        else:
            code, text = start_deepspeed(settings, log=log).wait(LIMIT_S), log.read_text()
        assert code == 1, text
        assert "Traceback" not in text
        assert text.count("7 samples of ") == 1
        said.append(re.findall("^  .* of file://.*", text, re.MULTILINE))
        steps.append([record["step"] for record in read_metrics(logs / "metrics.jsonl")])
        assert saved_steps(open_store(f"{tmp_path}/run{ranks}"))[-1] == steps[-1][-1] + 1
    assert steps[0] == steps[1]
    assert said[0] == said[1]
    assert len(said[0]) == 3 + 7, "shards, and samples"


@pytest.mark.dist
@pytest.mark.parametrize("ends_by", ["sigterm", "patience"])
def test_what_was_trained_is_saved_when_the_data_stay_away(
    ends_by: str, s3: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the ranks are told to stop while they wait, or give up by themselves."""
    write_dataset(f"{s3_url}/data", pictures(40))
    log, metrics = tmp_path / "log", tmp_path / "logs" / "metrics.jsonl"
    settings = [*SETTINGS, f"loader.dataset={s3_url}/data", "loader.lanes=2", "loader.workers=0"]
    settings += [f"checkpoint.run={tmp_path / 'run'}", f"train.log_dir={tmp_path / 'logs'}"]
    settings += [f"fetch.patience_s={1 if ends_by == 'patience' else 300}", "train.epochs=9999"]
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        run = start_deepspeed(settings, log=log)
        wait_for(run, lambda: len(read_metrics(metrics)) >= 3, log=log)
        proxy.rules = [Rule(kind=Kind.STALL)]
        if ends_by == "sigterm":
            wait_for(run, lambda: proxy.count(Kind.STALL) >= 2, log=log)
            time.sleep(2)  # by now, what was read ahead is used up
            for rank in ranks_of(run):
                os.kill(rank, signal.SIGTERM)
        assert run.wait(60) != 0, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text
    done = read_metrics(metrics)[-1]["step"] + 1
    assert saved_steps(open_store(f"{tmp_path}/run")) == [done]
    kept = f"the same command goes on from the checkpoint of step {done} in {tmp_path}"
    assert text.count(kept) == 1
    assert ("stopped by SIGTERM at step" in text) == (ends_by == "sigterm")


def _count_sharers() -> tuple[int, int]:
    """With the cores as they are, then with cores of one's own."""
    world = this_world()
    shared = num_core_sharers(world)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[world.rank]})
    return shared, num_core_sharers(world)


@pytest.mark.dist
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores to share")
def test_cores_are_divided_among_the_ranks_that_share_them() -> None:
    assert run_ranks(_count_sharers, 2) == [(2, 1), (2, 1)]


def test_a_loss_that_is_not_finite_stops_the_run(settings: list[str], tmp_path: Path) -> None:
    more = ["train.epochs=4", "optim.trust_coefficient=1e30", "schedule.freeze_prototypes_steps=0"]
    more += ["train.log_every_steps=1000", "checkpoint.every_steps=1"]
    result = run_module("trainer", *settings, *more)
    assert result.returncode == 1
    assert "error: the loss is not finite" in result.stderr
    assert "on rank 0, samples [" in result.stderr
    assert f"`python -m trainer.checkpoint rm {tmp_path / 'run'} --step N`" in result.stderr
    assert "Traceback" not in result.stderr
    assert saved_steps(open_store(str(tmp_path / "run"))) == [1], "while the loss was finite"


def test_a_run_tells_its_health_its_rate_and_what_it_is_alarmed_at(
    settings: list[str], tmp_path: Path
) -> None:
    """Divided weights, a batch in two parts, a queue, hard codes, bfloat16: all in one run."""
    result = run_module(
        *("trainer", *settings, "train.epochs=3", "crops.local_crops=2", "crops.local_size_px=16"),
        *("engine.zero_stage=3", "engine.accumulation_steps=2", "engine.precision=bf16"),
        *("queue.length=16", "queue.start_step=2", "sinkhorn.hard_codes=true"),
        *("schedule.freeze_prototypes_steps=-1", "optim.exclude_bias_and_norm=true"),
        *("model.batchnorm_ranks=1", "model.activation_checkpoints=[[1,2],[],[2],[]]"),
        *("train.peak_tflops=0.5", "train.profile_step=4", "train.profile_num_steps=2"),
        *("health.min_feature_std=1.0", "health.patience_steps=10"),
    )
    assert result.returncode == 0, result.stderr
    records = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    assert len(records) == 15
    for record in records:
        assert record["mfu"] == pytest.approx(record["tflops_per_device"] / 0.5)
        assert 0 < record["health/feature_std"] < 1
        assert 0 <= record["health/prototypes_used"] <= 1
        assert record["health/loss_below_chance"] == pytest.approx(
            math.log(6) - record["loss"], abs=1e-4
        )
        assert record["health/grad_norm_max"] > 0
        assert record["health/code_entropy"] == 0  # hard codes
    assert any(record["queue_used"] for record in records)
    assert any("health/queue_drift" in record for record in records)
    alarms = [alarm for record in records for alarm in record.get("alarms", ())]
    assert any(alarm.startswith("collapsed_features: ") for alarm in alarms)
    assert "ALARM at step" in result.stderr
    trace = json.loads(gzip.decompress((tmp_path / "logs/trace-rank00000.json.gz").read_bytes()))
    assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("code", "setting", "words"),
    [
        (2, "train.log_dir=/proc/nowhere", "cannot write logs to train.log_dir=/proc/nowhere"),
        (1, "checkpoint.run=/proc/nowhere", "cannot write checkpoints to file:///proc/nowhere"),
    ],
)
def test_what_cannot_work_is_told_before_training(
    settings: list[str], code: int, setting: str, words: str
) -> None:
    result = run_module("trainer", *settings, "train.epochs=2", setting)
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "step 1/" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["queue.length=4"], "queue.length=4 holds no whole global batch of 8"),
        (["queue.length=8", "queue.start_epoch=2"], "would start at step 10, after the last of"),
    ],
)
def test_a_queue_that_would_never_take_part_is_refused(
    settings: list[str], changes: list[str], words: str
) -> None:
    config = load_config(Config, None, [*settings, "train.epochs=2", *changes])
    loader = MultiCropLoader(config.loader, config.crops, config.augment, seed=0)
    with pytest.raises(UsageError, match=words):
        _build_queue(config, World(0, 0, 1, torch.device("cpu")), loader)


def test_a_mistake_of_one_rank_is_told_by_that_rank(settings: list[str]) -> None:
    """Every other rank may wait for it, or have none."""
    result = run_module("trainer", *settings, env={"RANK": "1", "LOCAL_RANK": "1"})
    assert result.returncode == 2
    assert "error: the environment describes one process of several" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--k", "0", "5", "--batch-size", "0"], "--k 0, --batch-size 0: must be positive"),
        (["--temperature", "nan", "--size", "-1"], "--temperature nan, --size -1: must be"),
    ],
)
def test_evaluation_checks_its_options_before_it_reads(options: list[str], words: str) -> None:
    places = ["--run", "/nowhere", "--dataset", "/nowhere"]
    result = run_module("trainer.evaluate", "knn", *places, *options)
    assert result.returncode == 2
    assert words in result.stderr


def test_print_config_can_be_read_back(settings: list[str], tmp_path: Path) -> None:
    first = run_module("trainer", *settings, "--print-config")
    assert first.returncode == 0, first.stderr
    (tmp_path / "printed.toml").write_text(first.stdout)
    again = run_module("trainer", "--config", str(tmp_path / "printed.toml"), "--print-config")
    assert again.stdout == first.stdout


def test_help_comes_without_torch() -> None:
    code = "import sys; from trainer.__main__ import main\n"
    code += "sys.argv = ['trainer', '--help']\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip().endswith("False"), run.stderr
