"""The tokenizer: an image becomes a small grid of tokens, and back.

    image 32x32x3 --encoder--> features 8x8 --bottleneck--> tokens 8x8 --decoder--> image

A chain of 3,072 colour values is too long to be practical; a chain of 64 tokens is not. The
reconstructions are the best that any method on this tokenizer can reach. Five bottlenecks:

    vq          the nearest of K learned vectors (van den Oord et al. 2017)
    fsq         every channel rounded to a few levels: nothing to learn (Mentzer et al. 2023)
    multiscale  1x1 tokens, then what each larger grid adds, up to 8x8 (Tian et al. 2024; var.py)
    kl          a vector near N(0, 1), with noise of a learned size added (Rombach et al. 2022)
    none        the vector as it is: what the network could do if the bottleneck cost nothing

The loss is the squared error plus the distance in the features of a small classifier, the
*perceptual network* (LPIPS, Zhang et al. 2018). VQGAN (Esser et al. 2021) has an adversarial loss.

    python -m nanogen train tokenizer --data cifar10      # PSNR 24.6 dB
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.multiscale import MultiScaleVQ
from nanogen.blocks.quantize import FSQ, VectorQuantizer
from nanogen.blocks.unet import Downsample, ResidualBlock, Upsample, check_fit
from nanogen.method import Method, Requirement, check, check_numbers, choose, unused

BOTTLENECKS = {"vq": {"codebook_size", "code_dim"}, "fsq": {"levels"}, "none": {"channels"},
               "kl": {"channels", "kl"}, "multiscale": {"codebook_size", "code_dim", "scales"}}


@dataclass
class Config:
    bottleneck: str = "vq"  # vq, fsq, multiscale, kl or none
    codebook_size: int = 1024  # vq, multiscale: number of codes
    code_dim: int = 8  # vq, multiscale: dimension in which codes are compared
    levels: tuple[int, ...] = (8, 5, 5, 5)  # fsq: values per channel; 8 x 5 x 5 x 5 = 1,000 codes
    scales: tuple[int, ...] = (1, 2, 4, 8)  # multiscale: sides of its grids, smaller than the last
    channels: int = 8  # kl, none: channels per token
    kl: float = 1e-4  # kl: weight of the pull towards N(0, 1), per latent channel
    widths: tuple[int, ...] = (64, 128)  # channels at 1/2, 1/4, ... of the size: one level each
    blocks: int = 2  # residual blocks per level
    squared: float = 5.0  # weight of the squared error
    perceptual: float = 0.25  # weight of the perceptual loss; 0: none
    size: int = 32  # side of the images in pixels

    def __post_init__(self):
        choose(self, bottleneck=tuple(BOTTLENECKS))
        others = set().union(*BOTTLENECKS.values()) - BOTTLENECKS[self.bottleneck]  # their fields
        unused(self, *others, when=f"with bottleneck {self.bottleneck}")
        check_numbers(self, codebook_size=(self.codebook_size >= 2, "at least 2"))
        check_fit(self.size, self.widths)
        rising = self.scales and list(self.scales) == sorted({s for s in self.scales if s > 0})
        check(self, levels=(min(self.levels, default=0) >= 2, "numbers of at least 2"),
              scales=(rising, "rising numbers of at least 1"))


class Tokenizer(Method):
    """Encoder, bottleneck, decoder. The grid has size / 2^len(widths) tokens on a side."""

    kind, conditions = "tokenizer", {}

    def __init__(self, config: Config, base: nn.Module | None = None):
        """base: the perceptual network, a finished judge; only training needs it."""
        super().__init__()
        self.config, self.grid = config, config.size // 2 ** len(config.widths)
        self.freeze(perceptual_network=base)
        width, kind = config.widths[-1], config.bottleneck
        latent = config.channels if kind in ("kl", "none") else 0  # twice: mean and log variance
        self.encoder = encoder(config.widths, config.blocks, 2 * latent or width)
        self.decoder = decoder(config.widths, config.blocks, latent or width)
        self.quantizer = None
        if kind == "vq":
            self.quantizer = VectorQuantizer(width, config.codebook_size, config.code_dim)
        elif kind == "fsq":
            self.quantizer = FSQ(width, config.levels)
        elif kind == "multiscale":
            scales = (*(side for side in config.scales if side < self.grid), self.grid)
            self.quantizer = MultiScaleVQ(width, config.codebook_size, scales, config.code_dim)
        self.codebook_size = self.quantizer.codebook_size if self.quantizer else 0
        self.to(memory_format=torch.channels_last)  # convolutions are 1.5 times as fast on a CPU

    @staticmethod
    def requires(config: Config) -> Requirement | None:
        network = Requirement("judge", {}, "perceptual", "perceptual", training_only=True)
        return network if config.perceptual else None

    def bottleneck(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features (B, C, h, w) -> vectors (B, C', h, w), indices (B, T) or None, its loss."""
        if self.quantizer is not None:
            codes, indices, loss = self.quantizer(features.permute(0, 2, 3, 1))
            return codes.permute(0, 3, 1, 2), indices.flatten(1), loss
        mean, log_variance = features.float().chunk(2, dim=1)
        if self.config.bottleneck == "none":
            return mean, None, mean.new_zeros(())
        log_variance = log_variance.clamp(-20, 10)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        noise = torch.randn_like(mean) if self.training else 0
        return mean + (0.5 * log_variance).exp() * noise, None, self.config.kl * kl

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "images" (B, 3, H, W) in [-1, 1]. A perceptual loss without its network is left
        out in eval mode, and a ValueError in training."""
        images, weight = batch["images"], self.config.perceptual
        if weight and self.training and self.perceptual_network is None:
            raise ValueError("training with perceptual > 0 needs a perceptual network: pass it as "
                             "base, or set perceptual=0")
        z, _, extra = self.bottleneck(self.encoder(images))
        decoded = self.decoder(z).float()
        metrics = {"squared_error": (decoded - images).square().mean(), "bottleneck": extra}
        loss = self.config.squared * metrics["squared_error"] + extra
        if weight and self.perceptual_network is not None:
            metrics["perceptual"] = perceptual_loss(self.perceptual_network, decoded, images)
            loss = loss + weight * metrics["perceptual"]
        return loss, metrics

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> indices (B, T), or for kl and none vectors (B, C, h, w). Nothing is learned."""
        features = self.encoder(images)
        if self.quantizer is None:
            return features.float().chunk(2, dim=1)[0]  # the mean
        return self.quantizer.encode(features.permute(0, 2, 3, 1)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, **options) -> Tensor:
        """What `encode` gave -> images (B, 3, H, W) in [-1, 1]. options: of the quantizer."""
        if self.quantizer is not None:
            codes = self.quantizer.decode(tokens, **options)  # (B, h w, C)
            tokens = codes.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(tokens).float().clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode: (B, 3, H, W), same shape."""
        return self.decode(self.encode(images))

    def code_vectors(self) -> Tensor:
        """The vector of each code: (K, code_dim), or for fsq (K, len(levels))."""
        if self.config.bottleneck != "fsq":
            return self.quantizer.codebook.vectors
        return self.quantizer.lookup(torch.arange(self.codebook_size).to(self.quantizer.levels))


def encoder(widths: tuple[int, ...], blocks: int, outputs: int) -> nn.Sequential:
    """Images (B, 3, H, W) -> features (B, outputs, H/f, W/f), f = 2^len(widths)."""
    layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
    for i, width in enumerate(widths):
        layers += [Downsample(widths[i - 1], width)] if i else []
        layers += [ResidualBlock(width, width) for _ in range(blocks)]
    layers += [nn.GroupNorm(widths[-1] // 16, widths[-1]), nn.Conv2d(widths[-1], outputs, 1)]
    return nn.Sequential(*layers)


def decoder(widths: tuple[int, ...], blocks: int, inputs: int) -> nn.Sequential:
    """Vectors (B, inputs, h, w) -> images (B, 3, H, W). It has one block more in each level."""
    layers = [nn.Conv2d(inputs, widths[-1], 3, padding=1)]
    for i, width in reversed(list(enumerate(widths))):
        layers += [ResidualBlock(width, width) for _ in range(blocks + 1)]
        layers += [Upsample(width, widths[i - 1])] if i else []
    layers += [nn.GroupNorm(widths[0] // 16, widths[0]), nn.SiLU()]
    layers += [nn.Conv2d(widths[0], 4 * 16, 3, padding=1), nn.PixelShuffle(2), nn.SiLU()]
    layers += [nn.Conv2d(16, 3, 3, padding=1)]
    layers[-1].adamw = True
    return nn.Sequential(*layers)


def perceptual_loss(network: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """LPIPS without its learned weights: the squared distance of the network's maps at 1/2, 1/4 and
    1/8 of the size, with features of length 1 at each position. (B, 3, H, W) twice -> scalar."""
    maps = zip(network.maps(images)[1:], network.maps(target)[1:], strict=True)
    pairs = ((F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)) for a, b in maps)
    return sum((a - b).square().sum(1).mean() for a, b in pairs)


def split_known(images: Tensor, seen: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """For the encoder: images (B, 3, H, W) with their mean colour where they are not `seen`, bool
    (H, W), since what is there must not leak into known tokens; and which of the grid^2 cells are
    seen as a whole, (T,)."""
    mean = images[:, :, seen].mean(2)[..., None, None] if seen.any() else 0
    cells = 1 - F.adaptive_max_pool2d((~seen).float()[None], grid)
    return torch.where(seen, images, mean), cells.flatten().bool()


def known_tokens(tokenizer: Tokenizer, images: Tensor, seen: Tensor) -> Tensor:
    """Tokens (B, T) of images (B, 3, H, W), -1 where a cell is not `seen`, bool (H, W)."""
    filled, cells = split_known(images, seen, tokenizer.grid)
    return tokenizer.encode(filled).masked_fill(~cells, -1)


def show_partial(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Decode tokens (B, T), some of them -1, unknown, and paint unknown cells grey: (B, 3, H, W).
    The decoder sees the mean of all codes there, so that no code colours the known cells nearby."""
    known = tokens >= 0
    cells = known.float().view(-1, 1, tokenizer.grid, tokenizer.grid)
    images = tokenizer.decode(tokens.clamp(min=0), known=known)
    return images * F.interpolate(cells, tokenizer.config.size)


Model = Tokenizer
