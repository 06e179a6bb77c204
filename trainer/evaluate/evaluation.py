"""A run's trunk, trained or as it was before training, and what evaluations ask of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.config import parse_config
from pipeline.errors import CheckpointError, UsageError
from pipeline.sequential import CENTRAL_SHARE, SequentialLoader
from pipeline.store import open_store
from trainer.config import Config
from trainer.evaluate.knn import knn_accuracy
from trainer.evaluate.linear import Probe, linear_accuracy
from trainer.features import Features, extract_features
from trainer.fragments import Checkpoint, Reader, read_checkpoint, saved_steps
from trainer.models import build_model


@dataclass(frozen=True)
class Labelled:
    """features: float32 [N, D], as the trunk gives them; labels: int64 [N]."""

    features: Tensor
    labels: Tensor

    @property
    def directions(self) -> Tensor:
        """The features with length 1, as cosines want them."""
        return nn.functional.normalize(self.features, dim=1)


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint of a run, and how to show images to its trunk."""

    run: str
    checkpoint: Checkpoint
    config: Config
    size_px: int
    batch_size: int
    device: torch.device
    whole: bool = False  # images are seen whole; otherwise an eighth of a side is cut away

    @classmethod
    def of_run(
        cls,
        run: str,
        *,
        step: int | None,
        size_px: int | None,
        batch_size: int,
        use_cache: bool = True,
        whole: bool = False,
    ) -> "Evaluation":
        """Read a run's checkpoint, the newest or that of `step`, with the run's configuration.

        Without `use_cache` the run's fetch.cache_dir is left alone.

        Raises CheckpointError where there is none.
        """
        store = open_store(run)
        steps = saved_steps(store)
        if not steps:
            raise CheckpointError(
                f"{store.url} has no checkpoints; is it the run's checkpoint.run?"
            )
        checkpoint = read_checkpoint(store, steps[-1] if step is None else step)
        where = store.url_of(checkpoint.key)
        config = parse_config(Config, checkpoint.state["config"], where=where)
        if not use_cache:
            config = replace(config, fetch=replace(config.fetch, cache_dir=""))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        size_px = size_px or config.crops.global_size_px
        return cls(run, checkpoint, config, size_px, batch_size, device, whole)

    def trunk(self, *, trained: bool) -> nn.Module:
        """The trunk with the checkpoint's weights, or with the weights the run began from."""
        torch.manual_seed(self.config.train.seed)
        model = build_model(self.config.model)
        if trained:
            names = [name for name in self.checkpoint.tensors if "/backbone." in name]
            names = [name for name in names if name.startswith(("weight/", "buffer/"))]
            tensors = Reader(open_store(self.run), self.checkpoint).read_whole(names)
            keys = [name.partition("/backbone.")[2] for name in names]
            model.backbone.load_state_dict(dict(zip(keys, tensors, strict=True)))
        return model.backbone

    def features(self, dataset: str, *, trained: bool) -> Features:
        """Features of every image of a data set."""
        loader = SequentialLoader(
            replace(self.config.loader, dataset=dataset, version=0, mix=()),
            self.config.augment,
            size_px=self.size_px,
            batch_size=self.batch_size,
            visible=1.0 if self.whole else CENTRAL_SHARE,
            fetch=self.config.fetch,
            quarantine=self.checkpoint.state["quarantine"],
        )
        trunk = self.trunk(trained=trained)
        name = f"{'trained' if trained else 'random'} trunk"
        return extract_features(trunk, loader, device=self.device, name=name)

    def knn(
        self,
        dataset: str,
        bank: str | None,
        *,
        trained: bool,
        neighbours: Sequence[int],
        temperature: float,
    ) -> dict[int, float]:
        """Top-1 accuracy by k. Without a bank every image is classified by all the others.

        Raises UsageError for images without labels, and if every k exceeds the bank.
        """
        queries, voters = self.labelled(dataset, bank, trained=trained)
        accuracy = knn_accuracy(
            queries.directions,
            queries.labels,
            voters.directions,
            voters.labels,
            neighbours=neighbours,
            temperature=temperature,
            leave_one_out=bank is None,
        )
        if not accuracy:
            raise UsageError(
                f"no --k of {', '.join(map(str, neighbours))} is at most the number of other "
                f"images that vote: {bank or dataset} has {len(voters.labels)} that can be used"
            )
        return accuracy

    def linear(self, dataset: str, bank: str, *, trained: bool) -> Probe:
        """Top-1 accuracy of a linear probe that was fitted to the bank.

        Raises UsageError for images without labels.
        """
        queries, fitted = self.labelled(dataset, bank, trained=trained)
        return linear_accuracy(queries.features, queries.labels, fitted.features, fitted.labels)

    def labelled(
        self, dataset: str, bank: str | None, *, trained: bool
    ) -> tuple[Labelled, Labelled]:
        """Features and labels of the data set and of the bank; without one that is the data set.

        Labels are numbered in the order of their names. Raises UsageError for images without one.
        """
        queries = self.features(dataset, trained=trained)
        others = self.features(bank, trained=trained) if bank else queries
        names = sorted(set(_labels(queries, dataset)) | set(_labels(others, bank or dataset)))
        numbers = {name: number for number, name in enumerate(names)}
        return _numbered(queries, numbers), _numbered(others, numbers)


def _numbered(features: Features, numbers: Mapping[str, int]) -> Labelled:
    labels = torch.tensor([numbers[str(label)] for label in features.labels])
    return Labelled(features.features, labels)


def _labels(features: Features, dataset: str) -> list[str]:
    labels = [label for label in features.labels if label]
    if missing := len(features.labels) - len(labels):
        raise UsageError(
            f"{missing} images of {dataset} have no label; pack a folder whose sub-folders are the "
            f"labels"
        )
    return labels
