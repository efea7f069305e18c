"""Judges: small classifiers, trained here, that say what a generated picture shows and how far it is from real ones.

Two networks of one kind are trained on each data set. The *judge* measures: the class accuracy of conditional
samples, and FD-nano on its 256 features. The *eye* (another seed, a shorter budget) is what tokenizers may train
against as a perceptual loss. They are two, so that nobody is marked by an examiner that he has studied.

    python -m nanogen train judge --data cifar10 --minutes 12

The network is the small VGG of Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", without its whitened
first layer and its test-time tricks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    widths: tuple[int, ...] = (64, 128, 256)  # channels of the three groups, at 1/2, 1/4 and 1/8 of the picture's size
    smoothing: float = 0.1  # label smoothing
    shift: int = 3  # training pictures are moved by up to this many pixels
    classes: int = 10  # number of labels
    second: int = 0  # a second question: scenes' background; 0: none
    size: int = 32  # side of the pictures in pixels


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> 256 features, log-odds of the labels (and of a second question)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        stem = config.widths[0] // 2
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.GELU())
        inputs = (stem, *config.widths[:-1])
        self.groups = nn.ModuleList(Group(a, b) for a, b in zip(inputs, config.widths, strict=True))
        self.answer = nn.Linear(config.widths[-1], config.classes)
        self.second = nn.Linear(config.widths[-1], config.second) if config.second else None
        self.answer.adamw = True

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the network sees at each depth: a list of (B, C, H', W'), fine to coarse."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps = [x]
        for group in self.groups:
            maps.append(group(maps[-1]))
        return maps

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 256): the last map, the largest response in each channel."""
        return self.maps(images)[-1].amax(dim=(2, 3)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Log-odds of the labels, (B, classes)."""
        return self.answer(self.features(images))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "images" (B, 3, H, W), "labels" (B,) and, for a second question, "second" (B,)."""
        features = self.features(random_shift(batch["images"], self.config.shift))
        logits = self.answer(features)
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.config.smoothing)
        if self.second is not None:
            loss = loss + F.cross_entropy(self.second(features), batch["second"], label_smoothing=self.config.smoothing)
        return loss, {"accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}


class Group(nn.Module):
    """Convolution, halve, convolution, with a way around the second one."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.first(x), 2)))
        return x + F.gelu(self.norm2(self.second(x)))


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Move each picture by its own random offset of up to `pixels`, mirrored at the border: (B, 3, H, W), same shape."""
    size, batch = images.shape[-1], len(images)
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * pixels + 1, (2, batch, 1), device=images.device)
    rows, columns = offsets + torch.arange(size, device=images.device)  # (B, size) each
    picture = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

Model = Judge
