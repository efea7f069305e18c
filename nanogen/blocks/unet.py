"""The small U-Net: convolutions that see an image at several sizes at once.

    x --> 1/2 size --> 1/4 size --> 1/8 size        down: wider context, more channels
          |            |            | attention     at coarse sizes, every position sees all others
    y <-- 1/2 size <-- 1/4 size <-- 1/8 size        up: each level also gets the map of its size

Locality need not be learned: on a budget of minutes a U-Net on pixels is far ahead of a plain
Transformer. Stable Diffusion 1, 2 and XL have a U-Net on latents, version 3 has a Transformer.

Sources: Ronneberger et al. 2015 (the shape); Ho et al. 2020 (for diffusion); Dhariwal & Nichol 2021
(scale and shift by the condition). Different here: pixels are first folded into channels
(pixel-unshuffle), so that no layer works at the full size, which is expensive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.transformer import attention, norm, zeroed


class UNet(nn.Module):
    """Images (B, channels, H, W) and a condition (B, condition) -> same shape as the images.
    widths: channels at 1/fold, 1/(2 fold), ... of the size, multiples of 16; blocks: residual
    blocks per level, on each way; attention_at: number of coarsest levels with self-attention (the
    middle always has it); fold: side of the pixel squares that are folded into channels."""

    def __init__(self, channels: int, widths: tuple[int, ...], blocks: int, attention_at: int,
                 condition: int, fold: int = 2):
        super().__init__()
        self.fold, levels = fold, len(widths)
        attends = [level >= levels - attention_at for level in range(levels)]
        self.inp = nn.Conv2d(channels * fold**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]  # channels of each map on the way down
        for level, width in enumerate(widths):
            if level:
                self.down.append(Downsample(skips[-1], width))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(Stage(width, width, condition, attends[level]))
                skips.append(width)
        self.middle = Stage(width, width, condition, True)
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.up.append(Stage(width + skips.pop(), widths[level], condition, attends[level]))
                width = widths[level]
            if level:
                self.up.append(Upsample(width, widths[level - 1]))
                width = widths[level - 1]
        self.out_norm = nn.GroupNorm(width // 16, width)
        self.out = zeroed(nn.Conv2d(width, channels * fold**2, 3, padding=1), adamw=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        condition = F.silu(condition)
        x = F.pixel_unshuffle(x, self.fold).contiguous(memory_format=torch.channels_last)
        skips = [self.inp(x)]
        for stage in self.down:
            skips.append(stage(skips[-1], condition))
        x = self.middle(skips[-1], condition)
        for stage in self.up:
            if not isinstance(stage, Upsample):
                x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, condition)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(x))), self.fold).float()


class Stage(nn.Module):
    """A residual block and, at coarse sizes, self-attention."""

    def __init__(self, inputs: int, outputs: int, condition: int, with_attention: bool):
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, condition)
        self.attention = SelfAttention(outputs) if with_attention else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.attention(self.block(x, condition))


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, beside a shortcut. The condition scales and shifts the
    second norm; without one (condition=0) it is the block of encoders and decoders."""

    def __init__(self, inputs: int, outputs: int, condition: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // 16, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        size = 2 * outputs
        self.modulation = zeroed(nn.Linear(condition, size), adamw=True) if condition else None
        self.norm2 = nn.GroupNorm(outputs // 16, outputs)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))  # starts as its shortcut
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Every position sees every other: (B, C, H, W), same shape. Heads of 32 channels, or of 16."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // (16 if width % 32 else 32)
        self.norm = nn.GroupNorm(width // 16, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, H W, 32 or 16) each
        mixed = attention(norm(q), norm(k), v)
        return x + self.out(mixed.transpose(-1, -2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the size: a 2x2 block of positions becomes one, by a matrix."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the size: each position becomes four, by a matrix (pixel-shuffle)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


def check_fit(size: int, widths: tuple[int, ...]) -> None:
    """ValueError unless images of this size (pixels) can be halved once for each width, and widths
    are multiples of 16, the size of a group in the norms."""
    if not widths or any(width < 1 or width % 16 for width in widths):
        raise ValueError(f"widths must be multiples of 16, got {widths}")
    if size % 2 ** len(widths):
        raise ValueError(f"size must be a multiple of {2 ** len(widths)}, to be halved "
                         f"{len(widths)} times, got {size}")
