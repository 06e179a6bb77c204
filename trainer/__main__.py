"""Start or resume a run: `python -m trainer` in one process, `deepspeed --module trainer` in many."""

import argparse
import os
import sys

from pipeline.config import dump_config, load_config
from pipeline.errors import CropstreamError, TrainingError, run_command

_DESCRIPTION = """\
Pretrain a ConvNet with SwAV on a packed data set. Start it again and it goes on from its newest
checkpoint.

  deepspeed --module trainer --config configs/demo.toml \\
      loader.dataset=s3://bucket/data checkpoint.run=s3://bucket/runs/first
  python -m trainer --config …   the same in one process

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
    arguments = parser.parse_args()
    return run_command(lambda: run(arguments.config, arguments.overrides, arguments.print_config))


def run(path: str | None, overrides: list[str], print_config: bool) -> int:
    """Load the configuration, join the world, train."""
    from trainer.config import Config  # after --help, which should not wait for torch

    try:
        config = load_config(Config, path, overrides)
    except CropstreamError:
        if os.environ.get("RANK", "0") != "0":  # every rank sees the same mistakes: one tells them
            sys.exit(CropstreamError.exit_code + 1)
        raise
    if print_config:
        print(dump_config(config))
        return 0

    from trainer.distributed import start_world, stop_world
    from trainer.train import train

    world = start_world()
    try:
        code = train(config, world)
    except RuntimeError as error:
        if world.world_size > 1 and "onnection" in str(error):
            raise TrainingError(f"rank {world.rank} lost another rank: {error}") from None
        raise
    stop_world()
    return code


if __name__ == "__main__":
    sys.exit(main())
