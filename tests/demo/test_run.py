"""The parts of the demo that can be looked at alone; the whole of it is `make demo`."""

import os
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import load_config
from tests.demo.children import Child
from tests.demo.run import CONFIG, PICTURES, choose_kill_step
from trainer.config import Config

FOREVER = "import time; time.sleep(600)"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("num_steps", "steps_per_epoch", "every"),
    [(162, 18, 20), (162, 18, 12), (100, 50, 7), (60, 6, 5)],
)
def test_the_kill_comes_in_mid_epoch_and_past_a_checkpoint(
    num_steps: int, steps_per_epoch: int, every: int
) -> None:
    done = choose_kill_step(num_steps, steps_per_epoch, every) + 1
    assert every < done < num_steps
    assert done % every > 0
    assert 0 < done % steps_per_epoch < steps_per_epoch - 1


@pytest.mark.parametrize(
    ("num_steps", "steps_per_epoch", "every"), [(9, 1, 20), (3, 3, 1), (2, 2, 20)]
)
def test_a_run_too_short_for_that_is_killed_before_its_end(
    num_steps: int, steps_per_epoch: int, every: int
) -> None:
    assert 0 <= choose_kill_step(num_steps, steps_per_epoch, every) < num_steps - 1


def test_the_configuration_switches_the_queue_on_before_the_kill() -> None:
    config = load_config(Config, CONFIG, ["loader.dataset=x", "checkpoint.run=y"])
    steps_per_epoch = PICTURES // config.loader.global_batch
    num_steps = config.train.epochs * steps_per_epoch
    kill_step = choose_kill_step(num_steps, steps_per_epoch, config.checkpoint.every_steps)
    full_after = config.queue.length // config.loader.global_batch
    assert num_steps // 3 < config.queue.start_step < kill_step - full_after


def test_a_kill_reaches_what_the_child_has_started(tmp_path: Path) -> None:
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])"
    code += "; print(p.pid, flush=True); p.wait()"
    with Child("parent", _python(code), tmp_path, os.environ) as child:
        while not child.output.strip():
            time.sleep(0.01)
        grandchild = int(child.output)
        assert _is_alive(grandchild)
    assert child.exit_code == -9
    deadline = time.monotonic() + 5
    while _is_alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_alive(grandchild)


def test_stderr_goes_to_the_log_and_on_to_us(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    written = r"[2026-01-31 launcher]\n\r10%\r20%\nend"
    code = f"import sys; print('result'); sys.stderr.write('{written}')"
    with Child("talker", _python(code), tmp_path, os.environ) as child:
        assert child.wait() == 0
    assert child.output == "result\n"
    assert child.log.read_bytes() == b"[2026-01-31 launcher]\n\r10%\r20%\nend"
    assert capfdbinary.readouterr().err == b"\r10%\r20%\nend\n"
