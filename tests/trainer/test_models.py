"""trainer.models: the reference's shapes and values, its checkpoints, BatchNorm over ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50, resnet101
from torchvision.models.resnet import Bottleneck

from tests.support import golden
from tests.support.processes import run_ranks
from trainer.models import (
    ModelConfig,
    ResNet,
    SwAVModel,
    SyncBatchNorm,
    build_backbone,
    convert_sync_batchnorm,
    from_reference_keys,
    load_reference_checkpoint,
    meta_model,
    projection_head,
    to_reference_keys,
)

RESNETS = golden.document("resnet_keys")["models"]
REGNETS = {
    "regnet_y_400mf": "RegNetY-400mf (debug)",
    "regnet_y_8gf": "RegNetY-8gf",
    "regnet_y_16gf": "RegNetY-16gf",
    "regnet_y_32gf": "RegNetY-32gf",
    "regnet_y_64gf": "RegNetY-64gf",
    "regnet_y_128gf": "RegNetY-128gf",
    "regnet_y_256gf": "RegNetY-256gf",
    "regnet_y_10b": "RegNet-10B",
}
TINY = golden.meta("resnet_tiny")
CHECKPOINT = golden.GOLDEN / "tiny_swav_checkpoint.pth.tar"


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("case", [case for case in RESNETS if "hidden_mlp" in RESNETS[case]])
def test_resnet_has_the_reference_layout(case: str):
    expected = RESNETS[case]
    config = ModelConfig(backbone=case.split("@")[0], hidden_dim=expected["hidden_mlp"])
    model = meta_model(config)
    assert model.backbone.feature_dim == expected["feature_dim"]
    assert _num_params(model) == expected["total_params"]
    assert _num_params(model.backbone) == expected["trunk_params"]
    assert _num_params(model.projection_head) == expected["projection_head_params"]
    assert _num_params(model.prototypes) == expected["prototype_params"]
    assert sum(buffer.numel() for buffer in model.buffers()) == expected["n_buffers_elements"]
    state = to_reference_keys(model.state_dict())
    assert len(state) == expected["n_state_dict_tensors"]
    if "state_dict" in expected:
        seen = [[k, list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in state.items()]
        assert seen == expected["state_dict"]
        names = to_reference_keys(dict(model.named_parameters()))
        assert list(names) == expected["parameter_order"]


def test_a_linear_head_has_the_reference_layout():
    expected = RESNETS["resnet50_linear_head"]
    model = meta_model(ModelConfig(hidden_dim=0))
    assert _num_params(model) == expected["total_params"]
    assert _num_params(model.backbone) == RESNETS["resnet50_eval_trunk"]["total_params"]
    heads = [key for key in to_reference_keys(model.state_dict()) if "projection" in key]
    assert heads == expected["head_keys"]


@pytest.mark.parametrize("name", REGNETS)
def test_regnet_has_the_seer_shapes(name: str):
    rows = {row["name"]: row for row in golden.document("regnet_params")["rows"]}
    expected = rows[REGNETS[name]]
    trunk = build_backbone(name, device="meta")
    assert _num_params(trunk) == expected["trunk_params"]
    assert trunk.feature_dim == expected["feature_dim"]
    assert len(trunk.state_dict()) == expected["n_trunk_tensors"]
    for head in expected["heads"]:
        in_dim, *hidden, out_dim = head["dims"]
        with torch.device("meta"):
            built = projection_head(
                in_dim,
                hidden[0],
                out_dim,
                num_hidden_layers=len(hidden),
                batchnorm=head["use_bn"],
            )
        assert _num_params(built) == head["head_params"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("resnet18", resnet18), ("resnet50", resnet50), ("resnet101", resnet101)],
    ids=["18", "50", "101"],
)
def test_resnet_equals_torchvision(ours: str, theirs: Any):
    trunk, other = build_backbone(ours).eval(), theirs().eval()
    other.fc = nn.Identity()
    trunk.load_state_dict(other.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), other(images), rtol=0, atol=0)


def test_a_small_regnet_learns():
    model = SwAVModel(build_backbone("regnet_y_400mf"), 16, 8, 5, num_hidden_layers=2)
    features, scores = model([torch.randn(2, 3, 64, 64), torch.randn(4, 3, 32, 32)])
    assert features.shape == (6, 8)
    assert scores.shape == (6, 5)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_largest_runs_on_the_meta_device():
    with torch.device("meta"):
        config = ModelConfig(backbone="regnet_y_10b", hidden_dim=8192, num_hidden_layers=2)
        features, _ = meta_model(config)([torch.empty(2, 3, 160, 160), torch.empty(4, 3, 96, 96)])
    assert features.shape == (6, 128)


def test_unknown_backbone():
    with pytest.raises(ValueError, match="no backbone 'resnet51'; there are resnet18, resnet50"):
        build_backbone("resnet51")
    with pytest.raises(ValueError, match="no backbone"):
        ModelConfig(backbone="vit")


# ---------------------------------------------------------------------------------------- values


def _tiny_model(dtype: torch.dtype) -> SwAVModel:
    trunk = ResNet(Bottleneck, (3, 4, 6, 3), stem_width=TINY["stem_width"])
    model = SwAVModel(trunk, TINY["hidden_mlp"], TINY["output_dim"], TINY["nmb_prototypes"])
    arrays = golden.arrays("resnet_tiny")
    weights = {k[3:]: torch.tensor(v) for k, v in arrays.items() if k.startswith("w__")}
    model.load_state_dict(from_reference_keys(weights))
    return model.to(dtype)


def _tiny_crops(dtype: torch.dtype) -> list[Tensor]:
    groups = [golden.tensor("resnet_tiny", f"crops{g}", dtype) for g in (0, 1)]
    return [crop for crops in groups for crop in crops.unbind(1)]


def _close(seen: Tensor, key: str, atol: float) -> None:
    expected = golden.tensor("resnet_tiny", key)
    # Convolutions add up in another order on every kind of CPU: some units in float32's last place.
    rtol = 1e-6 if expected.dtype == torch.float32 else 0
    torch.testing.assert_close(seen.detach(), expected, rtol=rtol, atol=atol)


PRECISIONS = [(torch.float32, "f32", 1e-5, 5e-4), (torch.float64, "f64", 1e-12, 1e-11)]


@pytest.mark.parametrize(("dtype", "suffix", "atol", "_train_atol"), PRECISIONS)
def test_evaluation(dtype: torch.dtype, suffix: str, atol: float, _train_atol: float):
    model, crops = _tiny_model(dtype).eval(), _tiny_crops(dtype)
    large = torch.cat(crops[:2])
    with torch.no_grad():
        features, scores = model(crops)
        _close(features, f"eval__embedding_{suffix}", atol)
        _close(scores, f"eval__scores_{suffix}", atol)
        _close(model.backbone(large), f"eval__backbone_crops0_{suffix}", atol)
        _close(model.backbone.forward_features(large), f"eval__featuremap_crops0_{suffix}", atol)
        _close(model(crops[0])[1], f"eval__single_tensor_scores_{suffix}", atol)


def test_crops_of_one_resolution_may_come_as_one_tensor():
    model, crops = _tiny_model(torch.float64).train(), _tiny_crops(torch.float64)
    other = copy.deepcopy(model)
    apart = model(crops)
    joined = other([torch.cat(crops[:2]), torch.cat(crops[2:])])
    assert all(torch.equal(a, b) for a, b in zip(apart, joined, strict=True))


@pytest.mark.parametrize(("dtype", "suffix", "_atol", "atol"), PRECISIONS)
def test_training_forward(dtype: torch.dtype, suffix: str, _atol: float, atol: float):
    model = _tiny_model(dtype).train()
    features, scores = model(_tiny_crops(dtype))
    _close(features, f"train__embedding_{suffix}", atol)
    _close(scores, f"train__scores_{suffix}", atol)


def test_gradients_and_running_statistics():
    model = _tiny_model(torch.float64).train()
    features, scores = model(_tiny_crops(torch.float64))
    weights = [golden.tensor("resnet_tiny", f"cotangent_{n}") for n in ("embedding", "scores")]
    ((weights[0] * features).sum() + (weights[1] * scores).sum()).backward()
    for name, parameter in to_reference_keys(dict(model.named_parameters())).items():
        if name != "projection_head.0.bias":  # BatchNorm follows: the true gradient is zero
            expected = golden.tensor("resnet_tiny", f"train__grad__{name}").double()
            assert (parameter.grad - expected).norm() <= 1e-6 * expected.norm(), name
    for name, buffer in to_reference_keys(dict(model.named_buffers())).items():
        expected = golden.tensor("resnet_tiny", f"train__buffers_after__{name}")
        torch.testing.assert_close(buffer.to(expected.dtype), expected, rtol=1e-6, atol=1e-9)


def test_features_and_scores_are_float32_under_autocast():
    model = _tiny_model(torch.float32).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        features, scores = model(_tiny_crops(torch.float32)[0])
    assert features.dtype == scores.dtype == torch.float32
    assert torch.equal(scores, nn.functional.linear(features, model.prototypes.weight))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------- official checkpoints


@pytest.mark.parametrize("form", ["file", "training checkpoint", "bare weights"])
def test_official_checkpoint(form: str):
    saved = torch.load(CHECKPOINT, weights_only=True)
    source = {"file": CHECKPOINT, "training checkpoint": saved, "bare weights": saved["state_dict"]}
    model = _tiny_model(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_reference_checkpoint(model, source[form])
    state = to_reference_keys(model.state_dict())
    assert all(
        torch.equal(state[k.removeprefix("module.")], v) for k, v in saved["state_dict"].items()
    )
    assert len(state) == len(saved["state_dict"])


def test_a_checkpoint_of_another_model_is_refused():
    model = SwAVModel(build_backbone("resnet18"), 8, 4, 3)
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        load_reference_checkpoint(model, CHECKPOINT)


# -------------------------------------------------------------------------- BatchNorm over ranks


def _batchnorm_problem(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A BatchNorm (bfloat16 problems have float32 parameters, as under autocast), x and dL/dy."""
    generator = torch.Generator().manual_seed(5)
    shape = {"1d": (10, 6), "2d": (10, 6, 3, 5)}[name]
    x = (torch.randn(shape, generator=generator) * 3 + 2).to(dtype)
    cotangent = torch.randn(shape, generator=generator).to(dtype)
    width = torch.promote_types(dtype, torch.float32)
    norm: nn.Module = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d}[name](6, dtype=width)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(6, generator=generator))
    return norm, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x, cotangent


def _batchnorm_pass(norm: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output = norm(x)
    (output * cotangent).sum().backward()
    return {
        "output": output.detach(),
        "grad": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        **norm.state_dict(prefix="state."),
    }


def _rank_batchnorm(cases: list[tuple[str, torch.dtype]], cut: int) -> list[dict[str, Tensor]]:
    rows = slice(0, cut) if dist.get_rank() == 0 else slice(cut, None)
    results = []
    for name, dtype in cases:
        norm, x, cotangent = _batchnorm_problem(name, dtype)
        synchronized = convert_sync_batchnorm(norm, dist.group.WORLD)
        assert isinstance(synchronized, SyncBatchNorm)
        results.append(_batchnorm_pass(synchronized, x[rows], cotangent[rows]))
    return results


BATCHNORM_TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


@pytest.mark.dist
def test_batchnorm_over_two_ranks_equals_the_full_batch():
    cases = [(name, dtype) for name in ("1d", "2d") for dtype in BATCHNORM_TOLERANCES]
    by_rank = run_ranks(_rank_batchnorm, 2, cases, 4)  # ranks of 4 and 6 rows
    for number, (name, dtype) in enumerate(cases):
        norm, x, cotangent = _batchnorm_problem(name, dtype)
        expected = _batchnorm_pass(norm, x.to(norm.weight.dtype), cotangent.to(norm.weight.dtype))
        results = _join_ranks(*(results[number] for results in by_rank))
        for key, target in expected.items():
            tolerance = BATCHNORM_TOLERANCES[dtype]
            if key.startswith("state"):
                tolerance = min(tolerance, 2e-6)
            assert results[key].dtype == (dtype if key in ("output", "grad") else target.dtype)
            seen = results[key].to(target.dtype)
            torch.testing.assert_close(seen, target, rtol=tolerance, atol=tolerance)


def _join_ranks(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("state"))
    rows = {key: torch.cat([first[key], second[key]]) for key in ("output", "grad")}
    sums = {key: first[key] + second[key] for key in ("weight", "bias")}
    return first | rows | sums


def test_a_cumulative_average_is_refused():
    with pytest.raises(ValueError, match="give BatchNorm a momentum"):
        convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), None)


def _rank_tiny_model(precision: str) -> dict[str, Any]:
    """This rank's half of the images through the golden's model; bfloat16 by autocast."""
    dtype = torch.float64 if precision == "f64" else torch.float32
    half = slice(0, 2) if dist.get_rank() == 0 else slice(2, 4)
    model = convert_sync_batchnorm(_tiny_model(dtype), dist.group.WORLD).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        _, scores = model([crop[half] for crop in _tiny_crops(dtype)])
    scores.square().sum().backward()
    buffers = dict(model.named_buffers())
    finite = all(p.grad.isfinite().all() for p in model.parameters())
    return {
        "scores": scores.detach(),
        "buffers": buffers,
        "finite": finite,
        "keys": [*model.state_dict()],
    }


def _rank_tiny_models() -> dict[str, Any]:
    return {precision: _rank_tiny_model(precision) for precision in ("f64", "bf16")}


@pytest.mark.dist
def test_whole_model_over_two_ranks_equals_the_reference_on_one():
    by_rank = run_ranks(_rank_tiny_models, 2)
    halves = [results["f64"]["scores"].unflatten(0, (5, 2)) for results in by_rank]
    _close(torch.cat(halves, dim=1).flatten(0, 1), "train__scores_f64", 1e-11)
    for name, buffer in to_reference_keys(by_rank[0]["f64"]["buffers"]).items():
        expected = golden.tensor("resnet_tiny", f"train__buffers_after__{name}")
        torch.testing.assert_close(buffer.to(expected.dtype), expected, rtol=1e-6, atol=1e-9)
    assert by_rank[0]["f64"]["keys"] == [*_tiny_model(torch.float32).state_dict()]
    for name, buffer in by_rank[0]["bf16"]["buffers"].items():
        assert buffer.dtype in (torch.float32, torch.int64), name
    assert all(results["bf16"]["finite"] for results in by_rank)


def test_batchnorm_of_one_process_is_plain():
    norm, x, cotangent = _batchnorm_problem("2d", torch.float32)
    plain = _batchnorm_pass(copy.deepcopy(norm), x, cotangent)
    alone = SyncBatchNorm(6)
    alone.load_state_dict(norm.state_dict())
    seen = _batchnorm_pass(alone, x, cotangent)
    assert all(torch.equal(seen[key], plain[key]) for key in plain)
