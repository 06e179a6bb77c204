"""How much arithmetic a training step is, and what share of a device's peak a run makes of it.

A multiply-add counts as two operations, and the backward pass as twice the forward pass (one
product for the gradient of the input, one for that of the weights; the first convolution's input
needs none, which is below 3 %). Only what matrix units do is counted: convolutions and linear
layers. What activation checkpointing or accumulation computes a second time does not count, as in
Chowdhery et al. 2022 (PaLM), appendix B: model FLOPs utilisation, MFU.

Peaks are those of NVIDIA's data sheets, without sparsity, for half precision with sums in float32,
and for float32 those of TF32 where there is one: convolutions use it. Sources: the data sheets
"V100" (2020), "A100" (2021), "A10" (2021), "H100" (2024), "H200" (2024), "L40S" (2023), "Ada GPU
architecture" (2022, appendix A, for the RTX 4090) and "Blackwell" (2024, HGX B200).
"""

import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.models import ModelConfig, meta_model

if TYPE_CHECKING:  # config.py imports the loop, which imports this
    from pipeline.crops import CropGroup
    from trainer.config import Config


class Peak(NamedTuple):
    """The dense peaks of a device in TFLOP/s."""

    name: str  # for people
    pattern: str  # of torch.cuda.get_device_name()
    fp16: float
    bf16: float | None  # None where no matrix unit takes it
    fp32: float  # TF32 from Ampere on

    def of(self, precision: str) -> float | None:
        """In a precision of section engine: fp32, bf16 or fp16."""
        return {"fp16": self.fp16, "bf16": self.bf16, "fp32": self.fp32}[precision]


# The first pattern that is found counts: special forms before the plain ones.
PEAKS = (
    Peak("V100 PCIe", r"V100-PCIE", 112.0, None, 14.0),
    Peak("V100", r"V100", 125.0, None, 15.7),
    Peak("A100", r"A100", 312.0, 312.0, 156.0),
    Peak("A10", r"A10\b", 125.0, 125.0, 62.5),
    Peak("H100 PCIe", r"H100 PCIe", 756.5, 756.5, 378.0),
    Peak("H100 NVL", r"H100 NVL", 835.5, 835.5, 417.5),
    Peak("H100", r"H100", 989.4, 989.4, 494.7),
    Peak("H200 NVL", r"H200 NVL", 835.5, 835.5, 417.5),
    Peak("H200", r"H200", 989.4, 989.4, 494.7),
    Peak("L40S", r"L40S", 362.0, 362.0, 183.0),
    Peak("RTX 4090", r"RTX 4090(?! D)", 165.2, 165.2, 82.6),
    Peak("B200", r"\bB200", 2250.0, 2250.0, 1125.0),
)


def flops_per_image(config: "Config") -> int:
    """Operations of a training step for one image: all its crops, forward and backward.

    Trunk, head and prototypes. Nothing is computed or allocated: half a second at ten billion
    parameters.
    """
    return 3 * forward_flops(config.model, config.crops.groups)


def forward_flops(model: ModelConfig, crops: "tuple[CropGroup, ...]") -> int:
    """Operations of the forward pass for the crops of one image."""
    with torch.device("meta"), torch.no_grad():
        images = [torch.empty(each.count, 3, each.size_px, each.size_px) for each in crops]
        module = meta_model(model).eval()  # in training BatchNorm refuses a single row
        with FlopCounterMode(display=False) as counter:
            module(images)
    return int(counter.get_total_flops())


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The peak of a device by its CUDA name, in TFLOP/s; None of one that is not in the table.

    `precision` is that of section engine. None, too, for bf16 on a device without units for it.
    """
    for each in PEAKS:
        if re.search(each.pattern, device_name):
            return each.of(precision)
    return None


def peak_of(device: torch.device, precision: str, *, override: float = 0.0) -> float | None:
    """The peak of this process's device in TFLOP/s: `override` if there is one, else by its name.

    `override` is `train.peak_tflops`. None on a CPU and on a device that is not known: no MFU then.
    """
    if override:
        return override
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), precision)


def mfu(
    images_per_s: float, flops_per_image: int, num_devices: int, peak: float | None
) -> float | None:
    """The share of the peak that a run makes use of, 0 to 1; None without a peak.

    `images_per_s` of all devices together, `peak` of each in TFLOP/s.
    """
    if peak is None:
        return None
    return images_per_s * flops_per_image / (num_devices * peak * 1e12)
