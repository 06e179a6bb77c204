import subprocess
import sys

import pytest

from pipeline.errors import UsageError
from trainer.distributed import start_world

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_an_incomplete_launch_is_a_usage_error(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="lacks WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        start_world()


def test_distributed_does_not_load_deepspeed():
    program = "import sys, trainer.distributed; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"
