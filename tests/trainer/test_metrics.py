import json
from pathlib import Path

from trainer.metrics import MetricsLog


def record(step: int) -> dict[str, float]:
    return {"step": step, "epoch": 0, "loss": 1.5, "lr": 0.1, "images_per_s": 10.0}


def test_lines_go_to_the_file_and_with_the_history_to_the_checkpoint(
    tmp_path: Path, capsys: object
) -> None:
    history = (json.dumps(record(0)) + "\n").encode()
    with MetricsLog(str(tmp_path / "logs"), history=history, first_step=1, total_steps=3) as log:
        log.write(record(1))
        log.write(record(2))
        lines = log.all_lines().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    written = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2]
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))
