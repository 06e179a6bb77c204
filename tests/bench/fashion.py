"""SwAV learns: Fashion-MNIST without labels, then nearest neighbours and a linear probe.

    python -m tests.bench.fashion --minutes 30 [--final]

Pictures from the Debian package are packed into shards, streamed by the loader and trained on by
two ranks under the `deepspeed` launcher, with configs/fashion_mnist.toml and as many epochs as fit
in the minutes here. Measured on the 5,000 training images held out, or with --final on the test
set: 55,000 labelled training images vote, or fit the probe; beside it a random trunk and raw
pixels. `make bench` trains for two minutes and lets the first 10,000 of them vote.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.bench.rows import Row
from tests.support import fashion_mnist
from tests.support.fashion_mnist import Pictures
from tests.support.launch import kill_group, read_metrics, start_deepspeed
from trainer.evaluate.evaluation import Evaluation, Labelled
from trainer.evaluate.knn import knn_accuracy
from trainer.evaluate.linear import linear_accuracy

GROUP = "trainer."
CONFIG = "configs/fashion_mnist.toml"
WORK = Path("build/fashion").resolve()
NUM_RANKS = 2
NUM_IMAGES = 55_000
MINUTES = 2.0
START_S = 20.0
"""From the launch to the first step, kernels compiled."""
NEIGHBOURS, TEMPERATURE = 5, 0.07
FEW = "train10k"


class Scores(NamedTuple):
    """Accuracies: of nearest neighbours (k = 5), and of a linear probe."""

    knn: float
    linear: float

    def __str__(self) -> str:
        return f"{self.knn:.1%} / {self.linear:.1%}"


class Trained(NamedTuple):
    """A finished run. seconds: from its launch to its end."""

    run: str
    seconds: float
    num_steps: int
    loss: float
    images_per_s: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fashion", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument("--epochs", type=int, help="in place of minutes")
    parser.add_argument("--final", action="store_true", help="measure on the test set")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    trained = train(
        arguments.epochs or epochs_within(arguments.minutes * 60), overrides=arguments.overrides
    )
    print(json.dumps(trained._asdict()), flush=True)
    for name, scores in compare(trained.run, "test" if arguments.final else "heldout"):
        print(f"{name:>12}  kNN {scores.knn:.2%}  linear {scores.linear:.2%}", flush=True)
    return 0


def rows() -> Iterator[Row]:
    """Two minutes of training, measured on the held-out images."""
    try:
        packed(FEW)
    except RuntimeError as error:  # no Debian, no network
        for name in Scores._fields:
            yield Row(f"trainer.fashion_{name}", None, "%", note=str(error))
        return
    trained = train(epochs_within(MINUTES * 60))
    torch.set_num_threads(NUM_RANKS)
    scores = dict(compare(trained.run, "heldout", bank=FEW))
    torch.set_num_threads(1)  # as it was for the other rows
    for name in Scores._fields:
        ours, *others = (f"{100 * getattr(scores[trunk], name):.1f}" for trunk in scores)
        note = (
            f"{trained.num_steps} steps in {trained.seconds:.0f} s, {trained.images_per_s:.0f} "
            f"images/s; 10,000 labelled images; random trunk {others[0]}, raw pixels {others[1]}"
        )
        yield Row(f"trainer.fashion_{name}", float(ours), "%", note=note)


def epochs_within(seconds: float) -> int:
    """How many epochs that takes, start included, by the rate of a short run."""
    rate = train(1, dataset=packed(FEW)).images_per_s
    return max(1, math.floor((seconds - START_S) * rate / NUM_IMAGES))


def train(epochs: int, *, dataset: str | None = None, overrides: Sequence[str] = ()) -> Trained:
    """Pretrain from the beginning. Raises RuntimeError with the log's end when that fails."""
    dataset = dataset or packed("train")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=WORK))
    log = folder / "log"
    arguments = [
        *("--config", CONFIG, f"loader.dataset={dataset}", f"checkpoint.run={folder / 'run'}"),
        *(f"train.log_dir={folder / 'metrics'}", f"train.epochs={epochs}", *overrides),
    ]
    begun = time.monotonic()
    launcher = start_deepspeed(arguments, log=log, ranks=NUM_RANKS)
    try:
        code = launcher.wait()
    except BaseException:
        kill_group(launcher)
        raise
    seconds = time.monotonic() - begun
    if code:
        raise RuntimeError(f"training ended with exit code {code}:\n{log.read_text()[-2000:]}")
    records = read_metrics(folder / "metrics" / "metrics.jsonl")
    rates = sorted(record["images_per_s"] for record in records[1:])
    last = records[-1]
    return Trained(
        str(folder / "run"), seconds, last["step"] + 1, last["loss"], rates[len(rates) // 2]
    )


def compare(run: str, name: str, *, bank: str = "train") -> Iterator[tuple[str, Scores]]:
    """What a run's trunk knows, what it knew before training, and what the pixels say."""
    evaluation = Evaluation.of_run(
        run, step=None, size_px=None, batch_size=250, use_cache=False, whole=True
    )
    for trunk in ("trained", "random"):
        features = evaluation.labelled(packed(name), packed(bank), trained=trunk == "trained")
        yield trunk, score(*features)
    yield "raw pixels", score(_pixels(_split(name)), _pixels(_split(bank)))


def score(queries: Labelled, bank: Labelled) -> Scores:
    """Both accuracies of the queries."""
    knn = knn_accuracy(
        *(queries.directions, queries.labels, bank.directions, bank.labels),
        neighbours=[NEIGHBOURS],
        temperature=TEMPERATURE,
    )
    probe = linear_accuracy(queries.features, queries.labels, bank.features, bank.labels)
    return Scores(knn[NEIGHBOURS], probe.accuracy)


def _pixels(pictures: Pictures) -> Labelled:
    pixels = torch.tensor(pictures.pixels.reshape(len(pictures.labels), -1))
    return Labelled(pixels.float(), torch.tensor(pictures.labels).long())


def packed(name: str) -> str:
    """The data set "train", "heldout", "test", or "train10k", the first 10,000 of "train"."""
    return fashion_mnist.pack(_split(name), WORK, name)


def _split(name: str) -> Pictures:
    if name == "test":
        return fashion_mnist.test_split(WORK)
    if name == "heldout":
        return fashion_mnist.heldout_split(WORK)
    return fashion_mnist.train_split(WORK, 10_000 if name == FEW else None)


if __name__ == "__main__":
    sys.exit(main())
