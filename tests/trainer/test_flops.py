import pytest
import torch

from pipeline.config import load_config
from pipeline.crops import CropGroup
from trainer.config import Config
from trainer.flops import flops_per_image, forward_flops, mfu, peak_of, peak_tflops
from trainer.models import ModelConfig

PLACES = ["loader.dataset=s3://bucket/data", "checkpoint.run=s3://bucket/run"]
WHOLE = (CropGroup(1, 224, (1.0, 1.0)),)


def test_a_sample_of_the_paper_is_76_gflop():
    """ResNet-50 at 2x224 + 6x96 as the literature counts it; ours has the head, too."""
    config = load_config(Config, None, PLACES)
    assert flops_per_image(config) == pytest.approx(76.2e9, rel=2e-3)


def test_every_layer_counts_and_the_backward_pass_twice():
    """Against the sum by hand over a ResNet-50's convolutions and linear layers."""
    head = 2048 * 2048 + 2048 * 128 + 128 * 3000
    # He et al. 2016: the stem, then (in, width, blocks, side of the map) of every stage, the
    # stride lying on the 3x3 convolution.
    trunk = 3 * 49 * 64 * 112**2
    for width_in, width, blocks, side in (
        (64, 64, 3, 56),
        (256, 128, 4, 28),
        (512, 256, 6, 14),
        (1024, 512, 3, 7),
    ):
        wide = 4 * width
        reduce_side = side if width == 64 else 2 * side
        trunk += width_in * width * reduce_side**2 + width_in * wide * side**2
        trunk += (blocks - 1) * wide * width * side**2
        trunk += blocks * (9 * width * width + width * wide) * side**2
    assert forward_flops(ModelConfig(), WHOLE) == 2 * (trunk + head)
    config = load_config(Config, None, [*PLACES, "crops.local_crops=0"])
    assert flops_per_image(config) == 3 * 2 * 2 * (trunk + head)


@pytest.mark.parametrize("billions", [8, 16, 32, 64, 128, 256])
def test_a_regnet_is_called_by_its_multiply_adds(billions: int):
    linear = ModelConfig(backbone=f"regnet_y_{billions}gf", hidden_dim=0, num_prototypes=1)
    assert forward_flops(linear, WHOLE) / 2e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla V100-PCIE-16GB", "fp32", 14.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA B200", "bf16", 2250.0),
        ("Some other device", "fp16", None),
    ],
)
def test_peaks_are_found_by_the_device_name(name: str, precision: str, expected: float | None):
    assert peak_tflops(name, precision) == expected


def test_a_cpu_has_no_peak_unless_one_is_set():
    cpu = torch.device("cpu")
    assert peak_of(cpu, "fp32") is None
    assert peak_of(cpu, "fp32", override=0.2) == 0.2
    assert mfu(40.0, 10**9, 2, None) is None


def test_mfu_is_what_was_done_over_what_the_devices_could_do():
    assert mfu(2000.0, 76_200_000_000, 1, 989.4) == pytest.approx(0.154, abs=1e-3)
    assert mfu(2000.0, 76_200_000_000, 2, 989.4) == pytest.approx(0.077, abs=1e-3)
