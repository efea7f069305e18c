"""The tokenizer: a picture becomes a small grid of tokens, and back.

    picture 32x32x3 --encoder--> features 8x8 --bottleneck--> tokens 8x8 --decoder--> picture

A chain of 3,072 colour values is too long to be practical; a chain of 64 tokens is not. What the tokenizer loses no
model on top of it can bring back, so its reconstructions are the ceiling of every chapter that stands on it. Five
bottlenecks, one network around them:

    vq     the nearest of K learned vectors: a word of a vocabulary (van den Oord et al. 2017)
    fsq    every channel rounded to a few levels: a vocabulary without learning one (Mentzer et al. 2023)
    multiscale   a thumbnail of 1x1 tokens and what each larger grid adds, up to 8x8 (Tian et al. 2024; var.py)
    kl     a vector blurred by noise whose size is learned, kept near N(0, 1): continuous tokens (Rombach et al. 2022)
    none   the vector as it is: what the network could do if the bottleneck cost nothing

    python -m nanogen train tokenizer --data cifar10 --bottleneck vq

The loss is the squared error plus a perceptual loss (Zhang et al. 2018, LPIPS): the distance in the features of a small
classifier, the *eye*, which the training loop hands in. Squared error alone answers "some texture here" with grey; the
perceptual loss alone finds any colour good enough. `perceptual` is the dial between PSNR and sharpness.
Different from VQGAN: no adversarial loss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.multiscale import MultiScaleVQ
from nanogen.blocks.quantize import FSQ, VectorQuantizer
from nanogen.blocks.unet import Downsample, ResidualBlock, Upsample, check_fit

BOTTLENECKS = ("vq", "fsq", "multiscale", "kl", "none")


@dataclass
class Config:
    bottleneck: str = "vq"  # vq, fsq, multiscale, kl or none
    codes: int = 1024  # vq, multiscale: size of the vocabulary
    code_dim: int = 8  # vq, multiscale: dimension in which codes are compared
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq: values per channel; their product is the vocabulary
    scales: tuple[int, ...] = (1, 2, 4, 8)  # multiscale: sides of the grids of tokens; those above the grid's are left out
    without: str = "nothing"  # multiscale: what to do without, to see what it is good for: revival, phi, whitening, detaching
    channels: int = 8  # kl and none: numbers per token
    kl: float = 1e-4  # kl: weight of the pull towards N(0, 1), per latent number
    widths: tuple[int, ...] = (64, 128)  # channels at 1/2 and 1/4 of the size: the last decides the grid
    blocks: int = 2  # residual blocks per level
    squared: float = 5.0  # weight of the squared error
    perceptual: float = 0.25  # weight of the perceptual loss; 0: none
    size: int = 32  # side of the pictures in pixels
    classes: int = 10  # not used here: the tokenizer never sees a label


class Tokenizer(nn.Module):
    """Encoder, bottleneck, decoder. Grid: size / 2^len(widths) tokens on a side."""

    def __init__(self, config: Config):
        super().__init__()
        if config.bottleneck not in BOTTLENECKS:
            raise ValueError(f"bottleneck must be one of {', '.join(BOTTLENECKS)}, got {config.bottleneck!r}")
        check_fit(config.size, config.widths)
        self.config = config
        self.grid = config.size // 2 ** len(config.widths)
        width = config.widths[-1]
        quantized = config.bottleneck in ("vq", "fsq", "multiscale")
        self.encoder = Encoder(config.widths, config.blocks, width if quantized else config.channels * 2)
        self.decoder = Decoder(config.widths, config.blocks, width if quantized else config.channels)
        self.quantizer = None
        if config.bottleneck == "vq":
            self.quantizer = VectorQuantizer(width, config.codes, config.code_dim)
        elif config.bottleneck == "fsq":
            self.quantizer = FSQ(width, config.levels)
        elif config.bottleneck == "multiscale":
            scales = tuple(scale for scale in config.scales if scale < self.grid) + (self.grid,)
            self.quantizer = MultiScaleVQ(width, config.codes, scales, config.code_dim, without=config.without)
        self.vocabulary = self.quantizer.num_codes if quantized else 0
        self.eye = []  # holds the classifier behind the perceptual loss; in a list: not a sub-module

    def bottleneck(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encoder features (B, C, h, w) -> (tokens as vectors (B, C', h, w), indices (B, tokens) or None, loss)."""
        if self.quantizer is not None:
            codes, indices, loss = self.quantizer(features.permute(0, 2, 3, 1))
            return codes.permute(0, 3, 1, 2), indices.flatten(1), loss
        mean, log_variance = features.float().chunk(2, dim=1)
        if self.config.bottleneck == "none":
            return mean, None, mean.new_zeros(())
        log_variance = log_variance.clamp(-20, 10)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return z, None, self.config.kl * kl

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "images" (B, 3, H, W) in [-1, 1]."""
        images = batch["images"]
        z, indices, bottleneck_loss = self.bottleneck(self.encoder(images))
        decoded = self.decoder(z)
        squared = (decoded - images).square().mean()
        loss = self.config.squared * squared + bottleneck_loss
        numbers = {"squared_error": squared, "bottleneck": bottleneck_loss}
        if self.config.perceptual and self.eye:
            numbers["perceptual"] = perceptual_loss(self.eye[0], decoded, images)
            loss = loss + self.config.perceptual * numbers["perceptual"]
        return loss, numbers

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> indices (B, h w) for vq and fsq, (B, sum of scale^2) for multiscale; for kl and none the vectors
        (B, C, h, w)."""
        z, indices, _ = self.bottleneck(self.encoder(images))
        return z if indices is None else indices

    @torch.no_grad()
    def decode(self, tokens: Tensor, **options) -> Tensor:
        """What `encode` gave -> pictures (B, 3, H, W) in [-1, 1]. options: of the quantizer's `lookup`."""
        if self.quantizer is not None:
            codes = self.quantizer.decode(tokens, **options)  # (B, h w, C)
            tokens = codes.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(tokens).clamp(-1, 1)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """What the words of the vocabulary look like: the vector behind each, (K, code_dim)."""
        if self.config.bottleneck == "multiscale":
            return self.quantizer.book.vectors
        return self.quantizer.lookup(torch.arange(self.vocabulary, device=next(self.parameters()).device))

    def reconstruct(self, images: Tensor) -> Tensor:
        """There and back: (B, 3, H, W), same shape."""
        return self.decode(self.encode(images))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> features (B, outputs, H/f, W/f), f = 2^len(widths)."""

    def __init__(self, widths: tuple[int, ...], blocks: int, outputs: int):
        super().__init__()
        layers = [nn.Conv2d(12, widths[0], 3, padding=1)]  # 2x2 pixels x 3 colours are folded into 12 channels
        for i, width in enumerate(widths):
            layers += [Downsample(widths[i - 1], width)] if i else []
            layers += [ResidualBlock(width, width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(widths[-1] // 16, widths[-1]), nn.Conv2d(widths[-1], outputs, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(F.pixel_unshuffle(images, 2).contiguous(memory_format=torch.channels_last))


class Decoder(nn.Module):
    """Tokens as vectors (B, inputs, h, w) -> pictures (B, 3, H, W). One more block a level than the encoder:
    to invent is harder than to summarise."""

    def __init__(self, widths: tuple[int, ...], blocks: int, inputs: int):
        super().__init__()
        layers = [nn.Conv2d(inputs, widths[-1], 3, padding=1)]
        for i, width in reversed(list(enumerate(widths))):
            layers += [ResidualBlock(width, width) for _ in range(blocks + 1)]
            layers += [Upsample(width, widths[i - 1])] if i else []
        layers += [nn.GroupNorm(widths[0] // 16, widths[0]), nn.SiLU()]
        layers += [nn.Conv2d(widths[0], 4 * 16, 3, padding=1), nn.PixelShuffle(2), nn.SiLU()]  # to the full size
        self.layers = nn.Sequential(*layers, nn.Conv2d(16, 3, 3, padding=1))
        self.layers[-1].adamw = True

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z.contiguous(memory_format=torch.channels_last)).float()


def perceptual_loss(eye: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the eye's maps at 1/2, 1/4 and 1/8 of the size, each place's features brought to length 1
    (LPIPS without its learned weights). a, b: (B, 3, H, W) -> scalar."""
    with torch.no_grad():
        wanted = [F.normalize(m.float(), dim=1) for m in eye.maps(b)[1:]]
    seen = [F.normalize(m.float(), dim=1) for m in eye.maps(a)[1:]]
    return sum((s - w).square().sum(1).mean() for s, w in zip(seen, wanted, strict=True))


def show_partial(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Decode tokens (B, T) of which some are -1, not there yet, and paint their cells grey: (B, 3, H, W)."""
    known = (tokens >= 0).float().view(-1, 1, tokenizer.grid, tokenizer.grid)
    return tokenizer.decode(tokens.clamp(min=0)) * F.interpolate(known, tokenizer.config.size)


Model = Tokenizer
