"""The configuration of a run; each section is owned by the file it is named after."""

from dataclasses import dataclass, field

from pipeline.augment import AugmentConfig
from pipeline.crops import CropsConfig
from pipeline.fetch import FetchConfig
from pipeline.loader import LoaderConfig
from trainer.checkpoint import CheckpointConfig
from trainer.engine import EngineConfig
from trainer.health import HealthConfig
from trainer.loss import LossConfig
from trainer.models import ModelConfig
from trainer.optim import OptimConfig
from trainer.queue import QueueConfig
from trainer.schedule import ScheduleConfig
from trainer.sinkhorn import SinkhornConfig
from trainer.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections. Defaults are SwAV's; only the data set and `checkpoint.run` have none."""

    loader: LoaderConfig
    checkpoint: CheckpointConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sinkhorn: SinkhornConfig = field(default_factory=SinkhornConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if max(self.loss.crops_for_assign) >= self.crops.num_crops:
            raise ValueError(
                f"loss.crops_for_assign={list(self.loss.crops_for_assign)} names a crop that the "
                f"{self.crops.num_crops} crops of section crops do not have"
            )
        if self.crops.num_crops < 2:
            raise ValueError(
                "section crops makes one crop an image; a swapped prediction needs two"
            )
