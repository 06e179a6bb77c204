"""What a training step costs beside its forward and backward pass, and what settings do to it.

    step_overhead          the whole step (codes, loss, queue, LARC, health, log) against the bare
                           passes of the same ResNet-50 on the same crops
    step_arithmetic        everything but the trunk, with a ResNet-50's parameters, against the loop
                           of the paper's authors (reference_step.py)
    accumulation, …        the same step with one setting changed, against the plain one

CPU seconds of one thread, contestants in turn, medians of the rounds' ratios. On a CPU a batch is a
few images, and so is the share of the trunk: what the ratios are on a GPU is measured there.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.bench.reference_step import ReferenceStep, flat_parameters
from tests.bench.rows import Row
from tests.support.processes import run_ranks
from trainer.distributed import start_world
from trainer.engine import DeepSpeedEngine, EngineConfig, PlainEngine
from trainer.health import Health
from trainer.models import ModelConfig, build_model
from trainer.optim import LARC, parameter_groups
from trainer.queue import FeatureQueue
from trainer.step import StepResult, swav_step

GROUP = "trainer."

NUM_CROPS, FEAT_DIM, NUM_PROTOTYPES, QUEUE = 8, 128, 3000, 3840
BATCH, FEW, LOG_EVERY = 8, 4, 10  # FEW: images of the steps whose settings are compared
ROUNDS = 3
SETTINGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "trainer.accumulation_4": ("4 parts, codes of all", {"accumulation_steps": 4}),
    "trainer.contiguous": ("channels_last off", {"channels_last": False}),
    "trainer.bf16": ("bf16 autocast", {"precision": "bf16"}),
}


def rows() -> Iterator[Row]:
    """Ratios, with the milliseconds in their notes."""
    yield from arithmetic()
    yield all_reduces()
    if not dist.is_initialized():
        start_world()
    torch.manual_seed(0)
    yield from overhead()
    for backbone in ("resnet50", "regnet_y_8gf"):
        yield from settings(backbone)
    yield from recomputation()
    yield compiled()


def arithmetic() -> Iterator[Row]:
    """Ours and the reference's, with the parameters of a ResNet-50 and ready gradients."""
    torch.manual_seed(0)
    shapes = [p.shape for p in build_model(ModelConfig()).parameters()][:-1]
    features = nn.functional.normalize(torch.randn(NUM_CROPS * 64, FEAT_DIM), dim=1)
    contestants = {"ours": our_arithmetic(shapes, features), "theirs": theirs(shapes, features)}
    spent = alternate(contestants, rounds=7)
    note = ", ".join(f"{name} {1e3 * statistics.median(s):.0f} ms" for name, s in spent.items())
    note += f"; 64 images, {NUM_CROPS} crops, queue of {QUEUE}, health one step in {LOG_EVERY}"
    ratio = median_ratio(spent["ours"], spent["theirs"])
    yield Row("trainer.arithmetic_vs_reference", ratio, "x", "< 1", note)


def our_arithmetic(shapes: list[torch.Size], features: Tensor) -> Callable[[], None]:
    net = Arithmetic(shapes)
    optimizer = LARC(parameter_groups(net), lr=0.1, momentum=0.9, weight_decay=1e-6)
    step = Stepper(ReadyEngine(net, optimizer), [features], full_queue(64))
    return step.run


def theirs(shapes: list[torch.Size], features: Tensor) -> Callable[[], None]:
    net = Arithmetic(shapes)
    loop = ReferenceStep(net.prototypes, net.parameters(), full_queue(64).features.clone())

    def run() -> None:
        loop.loss(features, NUM_CROPS).backward()
        net.give_gradients()
        loop.update()
        net.prototypes.weight.grad = None

    return run


class Arithmetic(nn.Module):
    """A trunk's parameters without the trunk: features go in, their gradients are ready."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.trunk = nn.ParameterList(flat_parameters(shapes))
        self.prototypes = nn.Linear(FEAT_DIM, NUM_PROTOTYPES, bias=False)
        self._gradients = [0.01 * torch.randn(shape) for shape in shapes]

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        return crops[0], self.prototypes(crops[0])

    def give_gradients(self) -> None:
        for parameter, gradient in zip(self.trunk, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.copy_(gradient)


class ReadyEngine(PlainEngine):
    """Gives the trunk its gradients once the loss has gone back to the prototypes."""

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        assert isinstance(self.module, Arithmetic)
        self.module.give_gradients()


@dataclass
class Stepper:
    """A real step on the same crops again and again; health and figures every LOG_EVERY steps."""

    engine: Any
    crops: list[Tensor]
    queue: FeatureQueue | None

    def __post_init__(self) -> None:
        self._health, self._num_steps = Health(), 0

    def run(self) -> None:
        self._num_steps += 1
        logged = self._num_steps % LOG_EVERY == 0
        result = swav_step(
            self.engine,
            self.crops,
            queue=self.queue,
            num_crops=NUM_CROPS,
            crops_for_assign=(0, 1),
            temperature=0.1,
            epsilon=0.05,
            num_iterations=3,
            lr=0.1,
            freeze_prototypes=False,
            observe=logged,
        )
        if logged:
            self._log(result)

    def _log(self, result: StepResult) -> None:
        assert result.observed is not None
        found = self._health.measure(result.observed, prototypes_KD=self.engine.prototypes())
        found |= self.engine.optimizer.ranges()
        torch.stack([value.double() for value in found.values()]).tolist()


def overhead() -> Iterator[Row]:
    """A ResNet-50's step against its bare passes, without DeepSpeed around them."""
    bare, crops = build_model(ModelConfig()), crops_of(BATCH)

    def passes() -> None:
        _, scores = bare(crops)
        scores.square().mean().backward()
        bare.zero_grad()

    step = Stepper(engine_of(ModelConfig(), EngineConfig()), crops, full_queue(BATCH))
    spent = alternate({"step": step.run, "passes": passes})
    ratio = median_ratio(spent["step"], spent["passes"])
    seconds = {name: statistics.median(times) for name, times in spent.items()}
    note = (
        f"{BATCH} images on a CPU, ZeRO 0: {seconds['step']:.2f} against {seconds['passes']:.2f} s"
        f"; at a GPU's 64 images the rest is a smaller share"
    )
    yield Row("trainer.step_overhead_cpu", ratio, "x", note=note)


def settings(backbone: str) -> Iterator[Row]:
    """One setting changed against the plain step, for a model."""
    model, crops = ModelConfig(backbone=backbone), crops_of(FEW)
    plain = Stepper(engine_of(model, EngineConfig()), crops, None).run
    for name, (what, changed) in SETTINGS.items():
        config = replace(EngineConfig(), **changed)
        images = crops if config.channels_last else [each.contiguous() for each in crops]
        other = Stepper(engine_of(model, config), images, None).run
        spent = alternate({"other": other, "plain": plain}, rounds=2)
        ratio = median_ratio(spent["other"], spent["plain"])
        note = f"{what}: a step's CPU time, {FEW} images, against fp32, channels_last, one part"
        yield Row(f"{name}.{backbone}", ratio, "x", note=note)


def recomputation() -> Iterator[Row]:
    """What SEER's way of checkpointing costs a ResNet-50, and how much less it keeps."""
    segments = ((3,), (4,), (3, 6), (3,))
    crops, found = crops_of(FEW), {}
    for name, ends in (("all", ()), ("segments", segments)):
        model = ModelConfig(activation_checkpoints=ends)
        engine = engine_of(model, EngineConfig())
        found[name] = (Stepper(engine, crops, None).run, kept_bytes(engine, crops))
    spent = alternate({name: run for name, (run, _) in found.items()}, rounds=2)
    ratio = median_ratio(spent["segments"], spent["all"])
    kept = {name: size / 1e9 for name, (_, size) in found.items()}
    note = f"kept for the backward pass {kept['segments']:.2f} in place of {kept['all']:.2f} GB"
    yield Row("trainer.recompute.resnet50", ratio, "x", note=note)


def kept_bytes(engine: Any, crops: list[Tensor]) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = engine.forward(crops)
    del outputs
    return sum(kept.values())


def compiled() -> Row:
    """A small trunk through torch.compile, one-off compilation told apart."""
    model, crops = ModelConfig(backbone="resnet18"), crops_of(BATCH)
    plain = Stepper(engine_of(model, EngineConfig()), crops, None).run
    other = Stepper(engine_of(model, EngineConfig(compile=True)), crops, None).run
    begun = time.perf_counter()
    other()
    compiling_s = time.perf_counter() - begun
    spent = alternate({"other": other, "plain": plain})
    ratio = median_ratio(spent["other"], spent["plain"])
    note = f"a step's CPU time against eager; compiled in {compiling_s:.0f} s"
    return Row("trainer.compile.resnet18", ratio, "x", note=note)


def all_reduces() -> Row:
    """Collectives of a LARC step over flat partitions, a parameter group, on two ranks."""
    [found, _] = run_ranks(count_all_reduces, 2)
    return Row("trainer.larc_all_reduces", found, "a group", "<= 2", "ZeRO 1, two ranks")


def count_all_reduces() -> float:
    """On a rank: all_reduce calls inside the optimiser's step, a parameter group."""
    from tests.support.trajectory import Case, deepspeed_engine, run, this_world

    case = Case("traj_ws2_plain", torch.float32, this_world().rank, 2)
    engine = deepspeed_engine(case, EngineConfig(zero_stage=1))
    calls, inside, real = [0], [False], dist.all_reduce
    step = engine.optimizer.step

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += inside[0]
        return real(*arguments, **options)

    def observed(*arguments: Any) -> Any:
        inside[0] = True
        try:
            return step(*arguments)
        finally:
            inside[0] = False

    dist.all_reduce, engine.optimizer.step = counted, observed  # type: ignore[method-assign]
    try:
        run(case, engine, steps=10)
    finally:
        dist.all_reduce = real
    frozen_steps = case.meta["freeze"]
    return calls[0] / (10 + 10 - frozen_steps)


def engine_of(model: ModelConfig, config: EngineConfig, *, device: str = "cpu") -> DeepSpeedEngine:
    net = build_model(model, device=device)
    optimizer = LARC(parameter_groups(net), lr=0.1, momentum=0.9, weight_decay=1e-6)
    return DeepSpeedEngine(net, optimizer, config)


def crops_of(batch: int) -> list[Tensor]:
    sizes = ((2, 224), (6, 96))
    return [
        torch.randn(n * batch, 3, px, px).contiguous(memory_format=torch.channels_last)
        for n, px in sizes
    ]


def full_queue(batch: int, *, device: str = "cpu", feat_dim: int = FEAT_DIM) -> FeatureQueue:
    queue = FeatureQueue(QUEUE, feat_dim, 2, batch_size=batch, world_size=1, device=device)
    features = nn.functional.normalize(torch.randn(queue.features.shape), dim=2)
    queue.load_state_dict({"features": features, "num_pushes": QUEUE})
    return queue


def alternate(
    contestants: Mapping[str, Callable[[], None]], *, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """CPU seconds of all, in turn, after one round of warming up."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            begun = time.process_time()
            run()
            spent[name].append(time.process_time() - begun)
    return {name: times[1:] for name, times in spent.items()}


def median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(mine / its for mine, its in zip(one, other, strict=True))
