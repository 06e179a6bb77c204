"""Features of every image of a data set, from a frozen trunk; called by the evaluations."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.errors import DataError
from pipeline.sequential import SequentialLoader


@dataclass(frozen=True)
class Features:
    """features: float32 [N, D], of their own length, on the CPU; samples and labels of the rows."""

    features: Tensor
    samples: list[int]
    labels: list[str | None]


@torch.no_grad()
def extract_features(
    backbone: nn.Module, loader: SequentialLoader, *, device: torch.device | str, name: str
) -> Features:
    """Run the trunk in eval mode over every kept row. `name` stands before the progress bar.

    Raises DataError when not one image could be used.
    """
    backbone.eval().to(device)
    rows: list[Tensor] = []
    samples: list[int] = []
    labels: list[str | None] = []
    with tqdm(
        total=loader.snapshot.num_kept, unit="image", desc=name, disable=None, file=sys.stderr
    ) as bar:
        for batch in loader:
            rows.append(backbone(batch.images.to(device)).float().cpu())
            samples += batch.samples.tolist()
            labels += batch.labels
            bar.update(len(batch.labels))
    if bad := int(loader.telemetry.total("bad_samples")):
        print(  # noqa: T201 - what the figures that follow are not about
            f"{bad} of {loader.snapshot.num_kept} images of {loader.config.dataset} could not be "
            f"used and are left out",
            file=sys.stderr,
        )
    if not rows:
        raise DataError(
            f"no image of {loader.config.dataset} could be used; run `python -m shard_tools verify "
            f"{loader.config.dataset}`"
        )
    return Features(torch.cat(rows), samples, labels)
