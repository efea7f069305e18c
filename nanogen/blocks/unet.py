"""The small U-Net: convolutions that see a picture at several sizes at once.

    x --> 1/2 size --> 1/4 size --> 1/8 size        down: wider context, more channels
          |            |            | attention     at the coarse sizes, everything sees everything
    y <-- 1/2 size <-- 1/4 size <-- 1/8 size        up: each level gets the matching map handed across

Locality is built in, so that it need not be learned: on a budget of minutes a U-Net on pixels is far ahead of a plain
Transformer. Stable Diffusion 1 and 2 are this network on latents; their successors are Transformers.

Sources: Ronneberger et al. 2015 (the shape); Ho et al. 2020 (for diffusion); Dhariwal & Nichol 2021 (scale and shift
by the condition). Different here: pixels are folded into channels first (pixel-unshuffle), so that the costly full
size holds no layers at all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.transformer import attention, norm


class UNet(nn.Module):
    """Pictures (B, channels, H, W) and a condition (B, condition) -> same shape as the pictures.

    widths: channels at 1/fold, 1/(2 fold), ... of the size, multiples of 16; blocks: residual blocks per level and direction;
    attention_at: number of coarsest levels with self-attention (the middle always has it); fold: side of the pixel block that
    is folded into channels.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], blocks: int, attention_at: int, condition: int, fold: int = 2):
        super().__init__()
        self.fold = fold
        levels = len(widths)
        has_attention = [level >= levels - attention_at for level in range(levels)]
        self.inp = nn.Conv2d(channels * fold**2, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level in range(levels):
            for _ in range(blocks):
                self.down.append(Stage(width, widths[level], condition, has_attention[level]))
                width = widths[level]
                skips.append(width)
            if level < levels - 1:
                self.down.append(Downsample(width, widths[level + 1]))
                width = widths[level + 1]
                skips.append(width)
        self.middle = Stage(width, width, condition, True)
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.up.append(Stage(width + skips.pop(), widths[level], condition, has_attention[level]))
                width = widths[level]
            if level:
                self.up.append(Upsample(width, widths[level - 1]))
                width = widths[level - 1]
        self.out_norm = nn.GroupNorm(width // 16, width)
        self.out = nn.Conv2d(width, channels * fold**2, 3, padding=1)
        self.out.adamw = True
        nn.init.zeros_(self.out.weight)  # the first answer is 0 everywhere
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        condition = F.silu(condition)
        x = F.pixel_unshuffle(x, self.fold).contiguous(memory_format=torch.channels_last)
        x = self.inp(x)
        skips = [x]
        for stage in self.down:
            x = stage(x, condition)
            skips.append(x)
        x = self.middle(x, condition)
        for stage in self.up:
            x = stage(x if isinstance(stage, Upsample) else torch.cat([x, skips.pop()], dim=1), condition)
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
    """Norm, SiLU, 3x3 convolution, twice, around a shortcut; the condition scales and shifts in the middle.

    Without a condition (condition=0) the block of convolutional encoders and decoders.
    """

    def __init__(self, inputs: int, outputs: int, condition: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(inputs // 16, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * outputs) if condition else None
        self.norm2 = nn.GroupNorm(outputs // 16, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # the block starts as its shortcut
        nn.init.zeros_(self.conv2.bias)
        if condition:
            self.modulation.adamw = True
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Every place of the map looks at every other: (B, C, H, W), same shape. 32 channels a head, or 16 where 32 do not fit."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // (16 if width % 32 else 32)
        self.norm = nn.GroupNorm(width // 16, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.heads, width // self.heads, height * breadth)
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
    """Refuse, by name, what networks of this kind cannot take: pictures that do not halve once for each of `widths` (the first
    time by folding), and channels that do not come in groups of 16. Raises ValueError."""
    if not widths or any(width < 1 or width % 16 for width in widths):
        raise ValueError(f"widths must be multiples of 16, got {widths}")
    if size % 2 ** len(widths):
        raise ValueError(f"size must be a multiple of {2 ** len(widths)} pixels with {len(widths)} widths, got {size}")
