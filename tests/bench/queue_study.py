"""Where the feature queue helps and where it hurts: small batches of Fashion-MNIST.

    python -m tests.bench.queue_study [--seeds 3]

10,000 images, batches of 64, 300 prototypes, 780 steps of configs/fashion_mnist.toml at a quarter
of its rate: without a queue; with one of 1,024 from step 300 on, when the rate is three quarters of
the highest; with the same from step 640 on, when it is a tenth. Judged by nearest neighbours on the
5,000 held-out images, beside the trunk before training: losses with and without a queue cannot be
compared. Not part of `make bench`: it takes some 20 minutes of two cores.
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

from tests.bench.fashion import CONFIG, FEW, NEIGHBOURS, TEMPERATURE, WORK, packed
from tests.support.launch import environment, read_metrics
from trainer.evaluate.evaluation import Evaluation

CASES: Mapping[str, Sequence[str]] = {
    "no queue": (),
    "early, high rate": ("queue.length=1024", "queue.start_step=300"),
    "late, low rate": ("queue.length=1024", "queue.start_step=640"),
}
SETTINGS = (
    "loader.global_batch=64",
    "train.epochs=5",
    "schedule.base_lr=0.075",
    "schedule.final_lr=0.000075",
    "schedule.freeze_prototypes_steps=100",
)
RANDOM_OF = "no queue"  # whose first weights are measured too: all of a seed begin alike
AT_ONCE = 2
RESULTS = WORK / "queue_study.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.queue_study", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = packed(FEW)
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
    drifts = [record.get("health/queue_drift", 0.0) for record in records if record["queue_used"]]
    alarms = {alarm.partition(":")[0] for record in records for alarm in record.get("alarms", ())}
    return {
        "case": case,
        "seed": seed,
        "knn": _knn(place / "run", dataset, trained=True),
        "random": _knn(place / "run", dataset, trained=False) if case == RANDOM_OF else None,
        "loss": mean(record["loss"] for record in records[-5:]),
        "largest_drift": max(drifts, default=None),
        "alarms": sorted(alarms),
    }


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
    lines = [f"{'':<18} {'kNN':>12} {'loss':>6} {'drift':>6}  alarms, in how many runs"]
    for case in CASES:
        runs = [result for result in results if result["case"] == case]
        names = [name for run in runs for name in run["alarms"]]
        rang = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
        loss = mean(run["loss"] for run in runs)
        drifts = [run["largest_drift"] for run in runs if run["largest_drift"] is not None]
        drift = f"{max(drifts):.2f}" if drifts else ""
        accuracy = _spread([run["knn"] for run in runs])
        lines.append(f"{case:<18} {accuracy:>12} {loss:6.3f} {drift:>6}  {rang}")
    untrained = [run["random"] for run in results if run["random"] is not None]
    return "\n".join([*lines, f"{'random trunk':<18} {_spread(untrained):>12}"])


def _spread(values: Sequence[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.1%} ± {100 * spread:.1f}"


if __name__ == "__main__":
    sys.exit(main())
