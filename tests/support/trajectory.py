"""The golden trajectories (tests/golden/README.md): 25 steps of the reference, run through ours."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from tests.support import golden
from trainer.distributed import World
from trainer.engine import DeepSpeedEngine, Engine, EngineConfig, PlainEngine
from trainer.models import SwAVModel
from trainer.models.batchnorm import convert_sync_batchnorm
from trainer.models.resnet import ResNet
from trainer.optim import LARC, parameter_groups
from trainer.queue import FeatureQueue
from trainer.schedule import warmup_cosine
from trainer.step import swav_step


class PlainNet(nn.Module):
    """The golden "plain" model: two convolutions with GroupNorm, so that no batch is special."""

    def __init__(self, *, c1: int, c2: int, hidden: int, feat_dim: int, num_prototypes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, c1, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(2, c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, c2)
        self.projection_head = nn.Sequential(
            nn.Linear(c2, hidden), nn.ReLU(), nn.Linear(hidden, feat_dim)
        )
        self.prototypes = nn.Linear(feat_dim, num_prototypes, bias=False)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pooled = torch.cat([self._trunk(images) for images in crops])
        projected = self.projection_head(pooled)
        with torch.autocast(projected.device.type, enabled=False):
            dtype = torch.promote_types(projected.dtype, torch.float32)
            features = nn.functional.normalize(projected.to(dtype), dim=1)
            return features, self.prototypes(features)

    def _trunk(self, images: Tensor) -> Tensor:
        x = self.norm1(self.conv1(images)).relu()
        return self.norm2(self.conv2(x)).relu().mean((2, 3))


@dataclass(frozen=True)
class Case:
    """One golden file seen by one rank. A file of world size 1 is split over two ranks."""

    name: str
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1

    @property
    def meta(self) -> dict[str, Any]:
        return golden.meta(self.name)

    @property
    def is_split(self) -> bool:
        return self.world_size != self.meta["world_size"]

    @property
    def batch_size(self) -> int:
        return self.meta["B"] // (self.world_size if self.is_split else 1)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    def model(self) -> nn.Module:
        """The initial model, in this case's dtype."""
        meta = self.meta
        if meta["model"] == "plain":
            sizes = {name: meta[name] for name in ("c1", "c2", "hidden", "feat_dim")}
            net: nn.Module = PlainNet(**sizes, num_prototypes=meta["K"])
        else:
            trunk = ResNet(Bottleneck, meta["layers"], stem_width=4)
            net = SwAVModel(trunk, meta["hidden"], meta["feat_dim"], meta["K"])
        net.load_state_dict(self.state("init"))
        if self.group is not None:
            net = convert_sync_batchnorm(net, self.group)
        return net.to(self.dtype)

    def state(self, kind: str) -> dict[str, Tensor]:
        """The golden state dict `kind` ("init", "final64", "snap7__before", …) by our keys."""
        prefix = f"{kind}__"
        return {
            self.key(key.removeprefix(prefix)): torch.tensor(value)
            for key, value in golden.arrays(self.name).items()
            if key.startswith(prefix)
        }

    def key(self, golden_key: str) -> str:
        """Our name of a golden parameter."""
        in_trunk = not golden_key.startswith(("projection_head", "prototypes"))
        return (
            f"backbone.{golden_key}" if in_trunk and self.meta["model"] != "plain" else golden_key
        )

    def optimizer(self, model: nn.Module) -> LARC:
        meta = self.meta
        return LARC(
            parameter_groups(model),
            lr=0.0,
            momentum=meta["momentum"],
            weight_decay=meta["wd"],
            trust_coefficient=meta["trust_coefficient"],
            clip=meta["larc_clip"],
        )

    def queue(self) -> FeatureQueue:
        meta = self.meta
        return FeatureQueue(
            meta["queue_length"],
            meta["feat_dim"],
            len(meta["crops_for_assign"]),
            batch_size=self.batch_size,
            world_size=self.world_size,
            dtype=self.dtype,
        )

    def queued(self, step: int) -> Tensor:
        """This rank's rows of the queue before the snapshot of a step."""
        rows = golden.tensor(self.name, f"snap{step}__queue_before")
        if not self.is_split:
            return rows[self.rank]
        batches = rows[0].unflatten(1, (-1, self.world_size, self.batch_size))
        return batches[:, :, self.rank].flatten(1, 2)

    def crops(self, step: int) -> list[Tensor]:
        """This rank's batch of a step: a tensor [V_g*B, 3, s, s] a resolution, crop-major."""
        batch = step % self.meta["iters_per_epoch"]
        return [self._crops_of(group, batch) for group in range(len(self.meta["nmb_crops"]))]

    def _crops_of(self, group: int, batch: int) -> Tensor:
        every = golden.arrays(self.name)[f"crops{group}"]
        mine = every[0 if self.is_split else self.rank, batch]
        if self.is_split:
            mine = mine[self.rank * self.batch_size :][: self.batch_size]
        images = torch.tensor(mine).transpose(0, 1).flatten(0, 1)
        return images.to(self.dtype)

    def lr(self, step: int) -> float:
        meta = self.meta
        return warmup_cosine(
            step,
            base_lr=meta["base_lr"],
            final_lr=meta["final_lr"],
            start_lr=meta["start_warmup"],
            warmup_steps=meta["warmup_epochs"] * meta["iters_per_epoch"],
            total_steps=meta["steps"],
        )

    def loss(self) -> Tensor:
        """What `run` should find on this rank: float64 [T]."""
        kind = "f64" if self.dtype == torch.float64 else "f32"
        losses = golden.tensor(self.name, f"loss_{kind}")
        return losses[0 if self.is_split else self.rank]


@dataclass
class Trajectory:
    """What a run left behind."""

    losses: list[float] = field(default_factory=list)
    queue_used: list[bool] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    queue: Tensor | None = None


def run(case: Case, engine: Engine, *, steps: int | None = None) -> Trajectory:
    """Run the case's steps and average the losses of a split batch over its ranks."""
    meta, result, queue = case.meta, Trajectory(), None
    for step in range(steps or meta["steps"]):
        if step == meta["epoch_queue_starts"] * meta["iters_per_epoch"]:
            queue = case.queue()
        result.queue_used.append(queue is not None and queue.is_full)
        result.losses.append(one_step(case, engine, queue, step))
    result.state = {key: value.clone() for key, value in engine.module.state_dict().items()}
    result.state |= masters(engine)
    result.queue = queue.features if queue is not None else None
    return result


def one_step(case: Case, engine: Engine, queue: FeatureQueue | None, step: int) -> float:
    meta = case.meta
    loss = swav_step(
        engine,
        case.crops(step),
        queue=queue,
        num_crops=sum(meta["nmb_crops"]),
        crops_for_assign=meta["crops_for_assign"],
        temperature=meta["temperature"],
        epsilon=meta["epsilon"],
        num_iterations=meta["iters"],
        lr=case.lr(step),
        freeze_prototypes=step < meta["freeze"],
        group=case.group,
    ).loss.double()
    if case.is_split:
        dist.all_reduce(loss)
        loss /= case.world_size
    return loss.item()


def masters(engine: Engine, kind: str = "weight") -> dict[str, Tensor]:
    """The optimiser's weights, or momenta, of all ranks put together, by parameter."""
    parts = [(f.name, f.shape, f.start, getattr(f, kind)) for f in engine.fragments()]
    everybody: list[Any] = [parts]
    if not engine.replicated:
        everybody *= dist.get_world_size()
        dist.all_gather_object(everybody, parts)
    whole: dict[str, Tensor] = {}
    for name, shape, start, flat in (part for each in everybody for part in each):
        tensor = whole.setdefault(name, torch.full(shape, torch.nan, dtype=flat.dtype))
        tensor.view(-1)[start : start + len(flat)] = flat
    return whole


def plain_engine(case: Case) -> PlainEngine:
    """The case's model without DeepSpeed."""
    model = case.model()
    return PlainEngine(model, case.optimizer(model), case.group)


def deepspeed_engine(case: Case, config: EngineConfig) -> DeepSpeedEngine:
    """The case's model under DeepSpeed; in a process of `run_ranks`."""
    model = case.model()
    return DeepSpeedEngine(model, case.optimizer(model), config)


def this_world() -> World:
    """The world of a process of `run_ranks`, whose environment DeepSpeed will find in order."""
    rank = dist.get_rank()
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    return World(rank, rank, dist.get_world_size(), torch.device("cpu"))
