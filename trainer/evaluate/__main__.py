"""`python -m trainer.evaluate knn …`: what a run has learned, on a labelled data set."""

import argparse
import json
import math
import sys
from collections.abc import Sequence

from pipeline.errors import UsageError, run_command

_DESCRIPTION = """\
Measure the frozen trunk of a run's checkpoint on a labelled data set (label = the input's
sub-folder).

  python -m trainer.evaluate knn --run s3://bucket/runs/first --dataset s3://bucket/val \\
      --bank s3://bucket/train
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    knn = commands.add_parser("knn", help="k nearest neighbours, weighted by cosine similarity")
    knn.add_argument("--run", required=True, metavar="URL", help="the run's prefix")
    knn.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    knn.add_argument("--dataset", required=True, metavar="URL", help="images to classify")
    knn.add_argument(
        "--bank",
        metavar="URL",
        help="labelled images that vote; default: the data set itself, each image left out in turn",
    )
    knn.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K")
    knn.add_argument("--temperature", type=float, default=0.07)
    knn.add_argument(
        "--size", type=int, metavar="PX", help="default: the size of the run's global crops"
    )
    knn.add_argument("--batch-size", type=int, default=64)
    knn.add_argument(
        "--no-cache",
        action="store_true",
        help="leave the run's fetch.cache_dir alone: not on this machine, or used by training",
    )
    knn.add_argument(
        "--random-trunk", action="store_true", help="measure the untrained trunk too, to compare"
    )
    knn.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return run_command(lambda: run_knn(parser.parse_args()))


def run_knn(arguments: argparse.Namespace) -> int:
    check_ranges(arguments)
    # After --help and mistakes, which need not wait for torch.
    from trainer.evaluate.evaluation import Evaluation

    evaluation = Evaluation.of_run(
        arguments.run,
        step=arguments.step,
        size_px=arguments.size,
        batch_size=arguments.batch_size,
        use_cache=not arguments.no_cache,
    )
    trunks = ["trained", "random"] if arguments.random_trunk else ["trained"]
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


def check_ranges(arguments: argparse.Namespace) -> None:
    """Raises UsageError naming every option that is out of its range."""
    values = {
        "--k": min(arguments.k),
        "--temperature": arguments.temperature,
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
