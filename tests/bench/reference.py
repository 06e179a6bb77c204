"""The paper's multi-crop with Pillow and torchvision: what ours is measured against.

SwAV's MultiCropDataset, transform by transform (src/multicropdataset.py, with Pillow's blur). It
runs here and in the peers' environments, which have none of our packages: it imports none.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms

RESOLUTIONS = ((2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14)))
"""Crops of each resolution, their side in pixels, and the range of areas they are cut from."""


class Reference:
    """Bytes of an image to its normalised float32 crops, collated by resolution."""

    def __init__(self) -> None:
        self._groups = [(count, _transform(size, scale)) for count, size, scale in RESOLUTIONS]

    def __call__(self, files: list[bytes]) -> list[torch.Tensor]:
        """A batch: per resolution float32 [count, B, 3, s, s]."""
        return self.collate([self.crops(file) for file in files])

    def crops(self, file: bytes) -> list[list[torch.Tensor]]:
        """The crops of one image, by resolution."""
        image = Image.open(io.BytesIO(file)).convert("RGB")
        return [[transform(image) for _ in range(count)] for count, transform in self._groups]

    def collate(self, samples: list[list[list[torch.Tensor]]]) -> list[torch.Tensor]:
        """Stack what `crops` made of several images."""
        return [
            torch.stack([torch.stack(crops) for crops in group], dim=1)  # crop-major
            for group in zip(*samples, strict=True)
        ]


class PillowBlur:
    """The reference's blur: probability 0.5, Pillow's Gaussian, radius uniform in [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if np.random.rand() >= 0.5:
            return image
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def _transform(size_px: int, scale: tuple[float, float]) -> transforms.Compose:
    jitter = transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size_px, scale=scale),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            PillowBlur(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.228, 0.224, 0.225]),
        ]
    )
