"""The small U-Net: convolutions that see an image at several sizes at once.

    x --> 1/2 size --> 1/4 size --> 1/8 size        down: wider context, more channels
          |            |            | attention     at coarse sizes, every position sees all others
    y <-- 1/2 size <-- 1/4 size <-- 1/8 size        up: each level also gets the map of its size

Locality need not be learned: on a budget of minutes a U-Net on pixels is far ahead of a plain
Transformer. Stable Diffusion 1, 2 and XL have a U-Net on latents, version 3 has a Transformer.

Sources: Ronneberger et al. 2015 (the shape); Ho et al. 2020 (for diffusion); Dhariwal & Nichol 2021
(scale and shift by the condition). Different here: pixels are first folded into channels
(pixel-unshuffle), so that no layer works at the full size, which is expensive.
For texts: Rombach et al. 2022 (attention to their tokens). For clips: Ho et al. 2022, "Video
Diffusion Models" (attention over space and over time in turn).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.transformer import attention, grid_angles, norm, rotate, zeroed


class UNet(nn.Module):
    """Images (B, channels, H, W) and a condition (B, condition) -> same shape as the images.
    widths: channels at 1/2, 1/4, ... of the size, multiples of 16; blocks: residual blocks per
    level, on each way; attention_at: number of coarsest levels with self-attention (the middle
    always has it); text: features of the tokens of a text that all levels attend to; given: input
    channels beside the image, such as those of another image; frames: so many images in a row are a
    clip, and every level also attends over time."""

    def __init__(self, channels: int, widths: tuple[int, ...], blocks: int, attention_at: int,
                 condition: int, text: int = 0, given: int = 0, frames: int = 0):
        super().__init__()
        levels = len(widths)
        attends = [(level >= levels - attention_at, text, frames) for level in range(levels)]
        self.inp = nn.Conv2d(4 * (channels + given), widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]  # channels of each map on the way down
        for level, width in enumerate(widths):
            if level:
                self.down.append(Downsample(skips[-1], width))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(Stage(width, width, condition, *attends[level]))
                skips.append(width)
        self.middle = Stage(width, width, condition, True, text, frames)
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                inputs = width + skips.pop()
                self.up.append(Stage(inputs, widths[level], condition, *attends[level]))
                width = widths[level]
            if level:
                self.up.append(Upsample(width, widths[level - 1]))
                width = widths[level - 1]
        self.out_norm = nn.GroupNorm(width // 16, width)
        self.out = zeroed(nn.Conv2d(width, 4 * channels, 3, padding=1), adamw=True)

    def forward(self, x: Tensor, condition: Tensor, *text: Tensor) -> Tensor:
        """x: (B, channels + given, H, W) or (B frames, ...) -> the same without the given channels.
        text: features (B, L, text), and bool (B, L), which of them are not padding."""
        condition = F.silu(condition)
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        skips = [self.inp(x)]
        for stage in self.down:
            skips.append(stage(skips[-1], condition, *text))
        x = self.middle(skips[-1], condition, *text)
        for stage in self.up:
            if not isinstance(stage, Upsample):
                x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, condition, *text)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(x))), 2).float()


class Stage(nn.Module):
    """A residual block; self-attention at coarse sizes, attention to a text and over time."""

    def __init__(self, inputs: int, outputs: int, condition: int, itself: bool, text: int = 0,
                 frames: int = 0):
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, condition)
        self.attention = Attention(outputs, itself, text) if itself or text else None
        self.over_time = TemporalAttention(outputs, frames) if frames else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor, *text: Tensor) -> Tensor:
        x = self.block(x, condition)
        x = x if self.attention is None else self.attention(x, *text)
        return self.over_time(x)


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


class Attention(nn.Module):
    """Self-attention over positions, if `itself`, and cross-attention to tokens of `text` features,
    if any, in one softmax: (B, C, H, W), same shape. Heads of 32 channels, or of 16."""

    def __init__(self, width: int, itself: bool = True, text: int = 0):
        super().__init__()
        self.heads, self.itself = width // (16 if width % 32 else 32), itself
        self.norm = nn.GroupNorm(width // 16, width)
        self.qkv = nn.Conv2d(width, 3 * width if itself else width, 1)
        self.text = nn.Linear(text, 2 * width) if text else None
        self.out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, text: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        parts = self.split(self.qkv(self.norm(x)).flatten(2).transpose(1, 2))
        q, keys, values, mask = parts[0], parts[1:2], parts[2:], None
        if self.text is not None:
            k, v = self.split(self.text(text))  # (B, heads, L, 32 or 16)
            keys, values = [*keys, k], [*values, v]  # first those of the image, if any
            others = q.shape[2] if self.itself else 0
            mask = F.pad(seen, (others, 0), value=True)[:, None, None]  # (B, 1, 1, keys)
        mixed = attention(norm(q), norm(torch.cat(keys, 2)), torch.cat(values, 2), mask)
        return x + self.out(mixed.transpose(-1, -2).reshape(x.shape))

    def split(self, features: Tensor) -> list[Tensor]:
        """(B, T, n C) -> n of (B, heads, T, C / heads)."""
        parts = features.unflatten(2, (-1, self.heads, self.out.in_channels // self.heads))
        return list(parts.permute(2, 0, 3, 1, 4))


class TemporalAttention(nn.Module):
    """Every image of a clip sees the same position in the clip's others: (B frames, C, H, W), same
    shape. Attention over space and over time in turn is cheaper than over both at once."""

    def __init__(self, width: int, frames: int):
        super().__init__()
        self.head, self.frames = 16 if width % 32 else 32, frames  # channels of a head
        self.norm = nn.GroupNorm(width // 16, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zeroed(nn.Conv2d(width, width, 1))
        angles = grid_angles(frames, head=self.head)  # (frames, head / 2): which image it is
        cos, sin = angles.cos(), angles.sin()
        rotation = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, self.frames, 3, x.shape[1] // self.head, self.head, x.shape[2] * x.shape[3])
        qkv = self.qkv(self.norm(x)).reshape(shape)  # (B, frames, 3, heads, head, H W)
        q, k, v = qkv.permute(2, 0, 5, 3, 1, 4).flatten(1, 2)  # (B H W, heads, frames, head) each
        q, k = (rotate(norm(part), self.rotation) for part in (q, k))
        mixed = (q @ k.transpose(-1, -2) * self.head**-0.5).softmax(-1).to(v.dtype) @ v
        mixed = mixed.unflatten(0, (-1, shape[-1])).permute(0, 3, 2, 4, 1)
        return x + self.out(mixed.reshape(x.shape))


class Downsample(nn.Module):
    """Half the size: a 2x2 block of positions becomes one, by a matrix."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the size: each position becomes four, by a matrix (pixel-shuffle)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4 * outputs, 1)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


def check_fit(size: int, widths: tuple[int, ...]) -> None:
    """ValueError unless images of this size (pixels) can be halved once for each width, and widths
    are multiples of 16, the size of a group in the norms."""
    if not widths or any(width < 1 or width % 16 for width in widths):
        raise ValueError(f"widths must be multiples of 16, got {widths}")
    if size % 2 ** len(widths):
        raise ValueError(f"size must be a multiple of {2 ** len(widths)}, to be halved "
                         f"{len(widths)} times, got {size}")
