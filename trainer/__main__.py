"""Start or resume a run: `python -m trainer` alone, `deepspeed --module trainer` on many GPUs."""

import argparse
import sys
from typing import TYPE_CHECKING

from pipeline.config import dump_config, load_config
from pipeline.errors import CheckpointError, ConfigError, TrainingError, run_command

if TYPE_CHECKING:
    from trainer.config import Config

_DESCRIPTION = """\
Pretrain a ConvNet with SwAV on a packed data set. Start it again and it goes on from its newest
checkpoint.

  deepspeed --module trainer --config configs/demo.toml \\
      loader.dataset=s3://bucket/data checkpoint.run=s3://bucket/runs/first
  python -m trainer --config …   the same in one process
  python -m trainer --plan --config configs/seer_regnety_10b.toml world_size=496
                                 what that would take, without starting it

exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 stopped after a checkpoint (start
me again)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file; presets are in configs/")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings over those of the file"
    )
    _add_plan(parser)
    arguments = parser.parse_args()
    if arguments.plan:
        return run_command(lambda: tell_plan(arguments))
    return run_command(lambda: run(arguments.config, arguments.overrides, arguments.print_config))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("planning")
    options.add_argument(
        "--plan",
        action="store_true",
        help="print the memory, time and checkpoints of a run of world_size=N ranks and stop; "
        "nothing is allocated or read",
    )
    options.add_argument("--json", action="store_true", help="the plan as JSON")
    options.add_argument(
        "--images", type=int, default=0, metavar="N", help="images of the data set, for its length"
    )
    options.add_argument(
        "--utilisation",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="assumed share of a device's peak that a step reaches (0.2)",
    )
    options.add_argument(
        "--store-mb-per-s",
        type=float,
        default=85.0,
        metavar="MB",
        help="assumed rate at which a rank writes its part of a checkpoint (85)",
    )


def tell_plan(arguments: argparse.Namespace) -> int:
    """Print what a run would take. Its stdout is the result."""
    from trainer.plan import Assumptions, load_plan_config, plan, to_json, to_text

    config, world_size = load_plan_config(arguments.config, arguments.overrides)
    assumptions = Assumptions(
        utilisation=arguments.utilisation,
        store_mb_per_s=arguments.store_mb_per_s,
        num_images=arguments.images,
    )
    found = plan(config, world_size, assumptions)
    print(to_json(found) if arguments.json else to_text(found))
    return 0


def run(path: str | None, overrides: list[str], print_config: bool) -> int:
    """Load the configuration, join the world, train."""
    from trainer.config import Config  # after --help, which should not wait for torch
    from trainer.distributed import is_lost_rank, launched_local_rank, launched_rank

    try:
        config = load_config(Config, path, overrides)
    except ConfigError as error:
        if launched_local_rank() != 0:  # every rank of a machine reads the same: one tells
            return error.exit_code
        raise
    if print_config:
        print(dump_config(config))
        return 0
    try:
        return _train(config)
    except RuntimeError as error:
        if is_lost_rank(error):
            raise TrainingError(f"rank {launched_rank()} lost another rank: {error}") from None
        raise


def _train(config: "Config") -> int:
    """Join the world and train. What all ranks fail of alike the first one tells, the rest each."""
    from trainer.distributed import abandon_world, start_world, stop_world
    from trainer.train import train

    world = start_world()
    try:
        code = train(config, world)
        stop_world()
        return code
    except (CheckpointError, TrainingError) as error:  # agreed on by all ranks
        if not world.is_first:
            return error.exit_code
        raise
    finally:
        abandon_world(world)


if __name__ == "__main__":
    sys.exit(main())
