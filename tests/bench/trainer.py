"""Peak memory of one training rank on the demo's configuration."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.rows import Row
from tests.support.dataset import pictures, write_dataset
from tests.support.launch import read_metrics, run_module


def rows() -> Iterator[Row]:
    """One rank with the local batch of the demo's two, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(f"{folder}/data", pictures(200, size_px=(200, 400)))
        result = run_module(
            *("trainer", "--config", "configs/demo.toml", "train.epochs=1"),
            *(f"loader.dataset={folder}/data", f"checkpoint.run={folder}/run"),
            *("loader.global_batch=16", f"train.log_dir={folder}/log", "schedule.warmup_steps=0"),
            "queue.start_step=4",
        )
        assert result.returncode == 0, result.stderr
        peak_bytes = max(
            r["peak_rss_bytes"] for r in read_metrics(Path(folder, "log/metrics.jsonl"))
        )
    note = "configs/demo.toml, 16 images a rank, checkpoints included"
    yield Row("trainer.rank_peak_rss", peak_bytes / 1e9, "GB", target="<= 2.5", note=note)
