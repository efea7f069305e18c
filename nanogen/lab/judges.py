"""Judges: small classifiers, trained here, that say what a generated picture shows and how far it is from real ones.

Two networks of one kind are trained on each data set. The *judge* measures: the class accuracy of conditional
samples, and FD-nano on its last features. The *eye* (another seed, a shorter budget) is what tokenizers may train
against as a perceptual loss. They are two, so that nobody is marked by an examiner that he has studied.

    python -m nanogen train judge --data cifar10 --minutes 12

The network is the small VGG of Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", without its whitened
first layer and its test-time tricks. It listens, too: to a sound's log-mel spectrogram, a picture of one channel whose
rows are bands of frequency and whose columns are moments. There its second question is who speaks.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.audio.spectral import RATE, log_mel
from nanogen.lab import machine


@dataclass
class Config:
    widths: tuple[int, ...] = (64, 128, 256)  # channels of the three groups, at 1/2, 1/4 and 1/8 of the picture's size
    smoothing: float = 0.1  # label smoothing
    shift: int = 3  # training pictures are moved by up to this many pixels; of a spectrogram, one is 1 band or 16 ms
    classes: int = 10  # number of labels
    second: int = 0  # a second question: scenes' background, sounds' speaker; 0: none
    size: int = 32  # side of the pictures in pixels
    sound: bool = False  # do we listen instead of looking?
    seconds: float = 1.0  # of each sound: shorter ones are padded with silence, longer ones cut


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], or waveforms (B, T) -> features, logits of the labels (and of a second question)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        stem, channels = config.widths[0] // 2, 1 if config.sound else 3
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.GELU())
        inputs = (stem, *config.widths[:-1])
        self.groups = nn.ModuleList(Group(a, b) for a, b in zip(inputs, config.widths, strict=True))
        self.answer = nn.Linear(config.widths[-1], config.classes)
        self.second = nn.Linear(config.widths[-1], config.second) if config.second else None
        self.answer.adamw = True
        if config.sound:
            self.standardise = nn.BatchNorm2d(1, affine=False)  # measures mean and spread of the spectrograms, and keeps them

    def pictures(self, waveforms: Tensor) -> Tensor:
        """Waveforms (B, T) -> their log-mel spectrograms, cut or padded to `seconds`: (B, 1, 64 bands, 63 frames)."""
        samples = int(RATE * self.config.seconds)
        waveforms = F.pad(waveforms.float(), (0, max(0, samples - waveforms.shape[1])))[:, :samples]
        return self.standardise(log_mel(waveforms, hop=128)[:, None])

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the network sees at each depth: a list of (B, C, H', W'), fine to coarse."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps = [x]
        for group in self.groups:
            maps.append(group(maps[-1]))
        return maps

    def features(self, examples: Tensor) -> Tensor:
        """Pictures or waveforms -> (B, widths[-1]): the last map, the largest response in each channel."""
        images = self.pictures(examples) if self.config.sound else examples
        return self.maps(images)[-1].amax(dim=(2, 3)).float()

    def forward(self, examples: Tensor) -> Tensor:
        """Logits of the labels, (B, classes)."""
        return self.answer(self.features(examples))

    def second_answer(self, examples: Tensor) -> Tensor:
        """Logits of the answers to the second question, (B, second)."""
        return self.second(self.features(examples))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "images" (B, 3, H, W) and "labels" (B,), for a second question also "second" (B,); or of sounds
        "waveforms" (B, T), "labels", "speakers"."""
        if self.config.sound:
            images, second = self.pictures(as_if_recorded(batch["waveforms"])), batch["speakers"]
        else:
            images, second = batch["images"], batch.get("second")
        features = self.maps(random_shift(images, self.config.shift))[-1].amax(dim=(2, 3)).float()
        logits = self.answer(features)
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.config.smoothing)
        if self.second is not None:
            loss = loss + F.cross_entropy(self.second(features), second, label_smoothing=self.config.smoothing)
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
    """Move each picture by its own random offset of up to `pixels`, mirrored at the border: (B, C, H, W), same shape."""
    (height, width), batch = images.shape[-2:], len(images)
    padded = F.pad(images, (pixels,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * pixels + 1, (2, batch, 1), device=images.device)
    rows, columns = (o + torch.arange(side, device=images.device) for o, side in zip(offsets, (height, width), strict=True))
    picture = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def as_if_recorded(waveforms: Tensor) -> Tensor:
    """The same sounds, nearer or further from a microphone that hisses: gain up to 6 dB either way, noise from 80 to 40 dB
    below full scale. Without it, the judge would take a codec's faint noise for a speaker."""
    gain, noise = (torch.rand(2, len(waveforms), 1, device=waveforms.device) - 0.5).unbind()
    return 10 ** (12 * gain / 20) * waveforms + 10 ** ((40 * noise - 60) / 20) * torch.randn_like(waveforms)


Model = Judge

# ---- asking a judge


@torch.no_grad()
def apply(function, examples: Tensor, batch_size: int = 500) -> Tensor:
    """function(examples) over uint8 or float pictures (N, 3, H, W), or waveforms (N, T), in batches, back on the CPU."""
    with machine.autocast():
        return torch.cat([function(unit(part).to(machine.device())).cpu() for part in examples.split(batch_size)])


def unit(examples: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]; float stays."""
    return examples.float() / 127.5 - 1 if examples.dtype == torch.uint8 else examples


def accuracy(logits: Tensor, labels: np.ndarray | Tensor) -> float:
    return (logits.argmax(1) == torch.as_tensor(labels)).float().mean().item()
