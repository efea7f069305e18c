"""The judge: our classifier for metrics, a small network that is trained here on each data set.

The *perceptual network* in the loss of tokenizers is another network of this class, from another
seed and a shorter training (recipe "perceptual"). No tokenizer is measured by what trained it.

    python -m nanogen train judge --data cifar10

The network is the small VGG of Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU".
Different here: no whitening layer, no test-time augmentation. A sound enters as its log-mel
spectrogram, an image of one channel: rows are frequency bands, columns are frames.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.audio.spectral import RATE, log_mel
from nanogen.method import Method, check_numbers


@dataclass
class Config:
    widths: tuple[int, ...] = (64, 128, 256)  # channels at 1/2, 1/4 and 1/8 of the image's size
    smoothing: float = 0.1  # label smoothing
    shift: int = 3  # training inputs move by up to so many pixels (bands, frames of 16 ms)
    classes: int = 10  # number of labels
    second: str = ""  # column with a second label: "background" or "speakers"; "": none
    second_classes: int = 0  # number of second labels
    size: int = 32  # side of the images in pixels
    sound: bool = False  # classify sounds, not images
    seconds: float = 1.0  # of each sound: shorter ones are padded with silence, longer ones cut

    def __post_init__(self):
        both = self.second_classes > 0 if self.second else self.second_classes == 0
        wide, small = self.size >= 2 ** len(self.widths), 0 <= self.shift < self.size
        check_numbers(self, widths=(min(self.widths, default=0) > 1, "numbers above 1"),
                      shift=(small, "at least 0 and less than the size"),
                      second_classes=(both, "more than 0 if there is a second label, else 0"),
                      size=(wide, "at least 2 to the number of widths"),
                      smoothing=(0 <= self.smoothing < 1, "from 0 to below 1"),
                      seconds=(self.seconds > 0, "more than 0"))


class Judge(Method):
    """Images (B, 3, H, W) in [-1, 1] or waveforms (B, T) -> features, logits of 1 or 2 labels."""

    kind, data, conditions = "judge", "any", {}

    def __init__(self, config: Config, base=None):
        super().__init__()
        self.config = config
        stem, channels = config.widths[0] // 2, 1 if config.sound else 3
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(stem), nn.GELU())
        self.groups = nn.ModuleList(map(Group, (stem, *config.widths[:-1]), config.widths))
        self.head = nn.Linear(config.widths[-1], config.classes)
        self.head.adamw = True
        if config.second:
            self.second_head = nn.Linear(config.widths[-1], config.second_classes)
        if config.sound:  # measures mean and std of the spectrograms
            self.standardize = nn.BatchNorm2d(1, affine=False)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("labels", self.config.second) if self.config.second else ("labels",)

    def spectrogram(self, waveforms: Tensor) -> Tensor:
        """Waveforms (B, T), cut or padded to `seconds` -> standardized log-mel (B, 1, 64, T')."""
        missing = int(RATE * self.config.seconds) - waveforms.shape[1]
        waveforms = F.pad(waveforms.float(), (0, missing))  # cuts what is too long
        return self.standardize(log_mel(waveforms, hop=128)[:, None])

    def maps(self, images: Tensor) -> list[Tensor]:
        """The features at each depth, fine to coarse: a list of (B, C, H', W')."""
        maps = [self.stem(images.contiguous(memory_format=torch.channels_last))]
        for group in self.groups:
            maps.append(group(maps[-1]))
        return maps

    def features(self, examples: Tensor, augment: bool = False) -> Tensor:
        """Images or waveforms -> (B, widths[-1]): the maximum of the last map in each channel."""
        if self.config.sound:
            examples = self.spectrogram(vary_recording(examples) if augment else examples)
        images = random_shift(examples, self.config.shift) if augment else examples
        return self.maps(images)[-1].amax(dim=(2, 3)).float()

    def forward(self, examples: Tensor) -> Tensor:
        """Logits of the labels, (B, classes)."""
        return self.head(self.features(examples))

    def second_logits(self, examples: Tensor) -> Tensor:
        """Logits of the second labels, (B, second_classes)."""
        return self.second_head(self.features(examples))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "images" (B, 3, H, W) or "waveforms" (B, T), "labels" and second labels (B,)."""
        examples = batch["waveforms" if self.config.sound else "images"]
        features = self.features(examples, augment=True)
        heads = [self.head, self.second_head] if self.config.second else [self.head]
        logits = {name: head(features) for name, head in zip(self.columns, heads, strict=True)}
        loss = sum(F.cross_entropy(guess, batch[name], label_smoothing=self.config.smoothing)
                   for name, guess in logits.items())
        return loss, {"accuracy": (logits["labels"].argmax(1) == batch["labels"]).float().mean()}


class Group(nn.Module):
    """A convolution, max pooling by 2, and a second convolution with a residual connection."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.first(x), 2)))
        return x + F.gelu(self.norm2(self.second(x)))


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Move each of (B, C, H, W) by its own random offset up to `pixels`, with mirrored borders."""
    padded = F.pad(images, (pixels,) * 4, mode="reflect").permute(0, 2, 3, 1)
    offsets = torch.randint(0, 2 * pixels + 1, (2, len(images), 1), device=images.device)
    rows, columns = (offset + torch.arange(side, device=images.device)
                     for offset, side in zip(offsets, images.shape[-2:], strict=True))
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def vary_recording(waveforms: Tensor) -> Tensor:
    """Other microphones for waveforms (B, T): gain of -6 to 6 dB, noise of -80 to -40 dB.
    Without it, the judge would take a codec's faint noise for another speaker."""
    gain, noise = torch.rand(2, len(waveforms), 1, device=waveforms.device) - 0.5
    level = 10 ** ((40 * noise - 60) / 20)
    return 10 ** (12 * gain / 20) * waveforms + level * torch.randn_like(waveforms)


Model = Judge
