"""`python -m trainer.evaluate knn|linear …`: what a run has learned, on a labelled data set."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UsageError, run_command

if TYPE_CHECKING:
    from trainer.evaluate.evaluation import Evaluation

_DESCRIPTION = """\
Measure the frozen trunk of a run's checkpoint on a labelled data set (label = the input's
sub-folder).

  python -m trainer.evaluate knn --run s3://bucket/runs/first --dataset s3://bucket/val \\
      --bank s3://bucket/train
  python -m trainer.evaluate linear --run … --dataset … --bank …   a linear probe of the same
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    knn = commands.add_parser("knn", help="k nearest neighbours, weighted by cosine similarity")
    knn.add_argument(
        "--bank",
        metavar="URL",
        help="labelled images that vote; default: the data set itself, each image left out in turn",
    )
    knn.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K")
    knn.add_argument("--temperature", type=float, default=0.07)
    knn.set_defaults(measure=run_knn)
    linear = commands.add_parser("linear", help="logistic regression on the features")
    linear.add_argument(
        "--bank",
        required=True,
        metavar="URL",
        help="labelled images that it is fitted to; a tenth of them chooses its L2 penalty",
    )
    linear.set_defaults(measure=run_linear)
    for command in (knn, linear):
        _add_shared(command)
    arguments = parser.parse_args()
    return run_command(lambda: int(arguments.measure(arguments)))


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", required=True, metavar="URL", help="the run's prefix")
    command.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    command.add_argument("--dataset", required=True, metavar="URL", help="images to classify")
    command.add_argument(
        "--size", type=int, metavar="PX", help="default: the size of the run's global crops"
    )
    command.add_argument(
        "--whole", action="store_true", help="show whole images; default: their central 7/8"
    )
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument(
        "--no-cache",
        action="store_true",
        help="leave the run's fetch.cache_dir alone: not on this machine, or used by training",
    )
    command.add_argument(
        "--random-trunk", action="store_true", help="measure the untrained trunk too, to compare"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_knn(arguments: argparse.Namespace) -> int:
    """Measure and print the accuracy of every k."""
    check_ranges(arguments, {"--k": min(arguments.k), "--temperature": arguments.temperature})
    evaluation, trunks = _read_run(arguments)
    accuracy = {
        trunk: evaluation.knn(
            arguments.dataset,
            arguments.bank,
            trained=trunk == "trained",
            neighbours=arguments.k,
            temperature=arguments.temperature,
        )
        for trunk in trunks
    }
    if arguments.json:
        print(json.dumps({"step": evaluation.checkpoint.step, **accuracy}))
    else:
        print_table(accuracy, trunks, evaluation.checkpoint.step)
    return 0


def run_linear(arguments: argparse.Namespace) -> int:
    """Measure and print the accuracy of a linear probe."""
    check_ranges(arguments, {})
    evaluation, trunks = _read_run(arguments)
    probes = {
        trunk: evaluation.linear(arguments.dataset, arguments.bank, trained=trunk == "trained")
        for trunk in trunks
    }
    if arguments.json:
        found = {trunk: dataclasses.asdict(probe) for trunk, probe in probes.items()}
        print(json.dumps({"step": evaluation.checkpoint.step, **found}))
        return 0
    print(f"linear probe, top-1 accuracy after {evaluation.checkpoint.step} steps")
    for trunk, probe in probes.items():
        print(f"{trunk:>8}  {probe.accuracy:8.1%}  (L2 penalty {probe.strength:g})")
    return 0


def _read_run(arguments: argparse.Namespace) -> tuple["Evaluation", list[str]]:
    """The run, and which of its trunks are asked for."""
    # After --help and mistakes, which need not wait for torch.
    from trainer.evaluate.evaluation import Evaluation

    evaluation = Evaluation.of_run(
        arguments.run,
        step=arguments.step,
        size_px=arguments.size,
        batch_size=arguments.batch_size,
        use_cache=not arguments.no_cache,
        whole=arguments.whole,
    )
    return evaluation, ["trained", "random"] if arguments.random_trunk else ["trained"]


def check_ranges(arguments: argparse.Namespace, special: Mapping[str, float]) -> None:
    """Raises UsageError naming every option, of all commands' or `special`, out of its range."""
    values = {
        **special,
        "--size": 1 if arguments.size is None else arguments.size,
        "--batch-size": arguments.batch_size,
    }
    if wrong := [f"{name} {value}" for name, value in values.items() if not 0 < value < math.inf]:
        raise UsageError(f"{', '.join(wrong)}: must be positive")


def print_table(accuracy: dict[str, dict[int, float]], trunks: Sequence[str], step: int) -> None:
    print(f"kNN top-1 accuracy after {step} steps")
    print("     k  " + "  ".join(f"{trunk:>8}" for trunk in trunks))
    for k in accuracy[trunks[0]]:
        print(f"{k:6}  " + "  ".join(f"{accuracy[trunk][k]:8.1%}" for trunk in trunks))


if __name__ == "__main__":
    sys.exit(main())
