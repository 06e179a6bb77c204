"""Where the feature queue helps and where it hurts: small batches of Fashion-MNIST.

    python -m tests.bench.queue_study [--seeds 3]

10,000 images, batches of 64, 300 prototypes, five epochs of configs/fashion_mnist.toml: without a
queue; with one of 1,024 from step 300 on, while the learning rate is high; with the same from step
600 on, when it is low. Judged by nearest neighbours on the 5,000 held-out images, beside the trunk
before training: losses with and without a queue cannot be compared. Not part of `make bench`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from tests.bench.fashion import CONFIG, NEIGHBOURS, TEMPERATURE, WORK, packed
from tests.support.launch import environment, read_metrics
from trainer.evaluate.evaluation import Evaluation

CASES: Mapping[str, Sequence[str]] = {
    "no queue": (),
    "early, high rate": ("queue.length=1024", "queue.start_step=300"),
    "late, low rate": ("queue.length=1024", "queue.start_step=600"),
}
SETTINGS = (
    "loader.global_batch=64",
    "train.epochs=5",
    "schedule.freeze_prototypes_steps=100",
)
AT_ONCE = 2
RESULTS = WORK / "queue_study.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.queue_study", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = packed("train10k")
    folder = WORK / "queue_study" / time.strftime("%Y%m%d-%H%M%S")
    jobs = [(case, seed) for seed in range(arguments.seeds) for case in CASES]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        measured = pool.map(lambda job: study(*job, dataset, folder, arguments.overrides), jobs)
        results = []
        for result in measured:
            results.append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
    RESULTS.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


def study(
    case: str, seed: int, dataset: str, folder: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """Train once, in one process with one thread, and measure."""
    place = folder / f"{case.replace(', ', '-').replace(' ', '-')}-{seed}"
    place.mkdir(parents=True)
    arguments = [
        *("--config", CONFIG, f"loader.dataset={dataset}", f"checkpoint.run={place / 'run'}"),
        *(f"train.log_dir={place}", f"train.seed={seed}", "loader.threads=1"),
        *(*SETTINGS, *CASES[case], *overrides),
    ]
    with (place / "log").open("w") as log:
        command = [sys.executable, "-m", "trainer", *arguments]
        subprocess.run(command, env=environment(), stdout=log, stderr=log, check=True)
    records = read_metrics(place / "metrics.jsonl")
    scores = {trunk: _knn(place / "run", dataset, trained=trunk == "knn") for trunk in _TRUNKS}
    drifts = [record["health/queue_drift"] for record in records if "health/queue_drift" in record]
    alarms = sorted(
        {alarm.partition(":")[0] for record in records for alarm in record.get("alarms", ())}
    )
    rest = {"loss": mean(record["loss"] for record in records[-5:]), "alarms": alarms}
    return {
        **{"case": case, "seed": seed, **scores, **rest},
        "largest_drift": max(drifts, default=None),
    }


_TRUNKS = ("knn", "random")


def _knn(run: Path, dataset: str, *, trained: bool) -> float:
    evaluation = Evaluation.of_run(
        str(run), step=None, size_px=None, batch_size=250, use_cache=False, whole=True
    )
    accuracy = evaluation.knn(
        *(packed("heldout"), dataset),
        trained=trained,
        neighbours=[NEIGHBOURS],
        temperature=TEMPERATURE,
    )
    return accuracy[NEIGHBOURS]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, per case."""
    lines = [f"{'case':<18} {'kNN':>14} {'random trunk':>14} {'loss':>6}  alarms, of how many runs"]
    for case in CASES:
        runs = [result for result in results if result["case"] == case]
        names = [name for run in runs for name in run["alarms"]]
        rang = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
        cells = (_spread([run[trunk] for run in runs]) for trunk in _TRUNKS)
        loss = mean(run["loss"] for run in runs)
        lines.append(f"{case:<18} {' '.join(f'{cell:>14}' for cell in cells)} {loss:6.3f}  {rang}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.1%} ± {100 * spread:.1f}"


if __name__ == "__main__":
    sys.exit(main())
