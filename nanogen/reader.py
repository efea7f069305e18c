"""The reader: a judge that turns the image of a scene back into its description.

    things        where they are, of which kind and color: a small network looks at 8x8 cells
    background    by the same network
    sign          by comparing its cells with the letters of the font; no network

So what a model drew can be compared with what it was asked for: count, kind, color, relation, text.
It is trained on scenes with nothing held out, and with the subject of image/personalize.py.

    python -m nanogen train reader --data things

Source: Zhou et al. 2019, "Objects as Points" (a thing is a peak of a map; its class is read there).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.unet import Downsample, ResidualBlock, check_fit
from nanogen.data.drawing import BACKGROUNDS, COLORS, FONT, KINDS, SIGN_HEIGHT, SIZE, draw_sign
from nanogen.method import Method, check_numbers

CELL = 4  # pixels a side: the network's maps have 8x8 cells


@dataclass
class Config:
    widths: tuple[int, ...] = (64, 128)  # channels at 1/2 and 1/4 of the size
    blocks: int = 3  # residual blocks at 1/4
    noise: float = 0.1  # largest noise added to training images, so that small errors do no harm
    size: int = 32  # side of the images in pixels

    def __post_init__(self):
        check_numbers(self, widths=(len(self.widths) == 2, "two numbers"),
                      size=(self.size == SIZE, f"{SIZE}, the side of all scenes"))
        check_fit(self.size, self.widths)


class Reader(Method):
    """Images (B, 3, 32, 32) in [-1, 1] -> maps of things, and the background."""

    kind, conditions = "judge", {}
    columns = ("things", "background")

    def __init__(self, config: Config, base=None):
        super().__init__()
        self.config, (fine, coarse) = config, config.widths
        self.parts = [1, len(KINDS), len(COLORS), 2]  # presence, kind, color, offset in cells
        self.net = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, fine, 3, padding=1), ResidualBlock(fine, fine),
            Downsample(fine, coarse),
            *[ResidualBlock(coarse, coarse) for _ in range(config.blocks)],
            nn.GroupNorm(coarse // 16, coarse), nn.SiLU())
        self.maps = nn.Conv2d(coarse, sum(self.parts), 1)
        self.background = nn.Linear(coarse, len(BACKGROUNDS))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """-> [presence (B, 1, 8, 8), kinds, colors, offsets (B, n, 8, 8)], backgrounds (B, 4):
        logits, and offsets of the things' centres from those of the cells."""
        features = self.net(images)
        background = self.background(features.mean((2, 3))).float()
        return list(self.maps(features).float().split(self.parts, dim=1)), background

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "images", "things" (B, 4, 5): kind, color, x, y, size; "background" (B,)."""
        images, things = batch["images"], batch["things"]
        level = self.config.noise * torch.rand(len(images), 1, 1, 1, device=images.device)
        (presence, *classes, offset), guess = self(images + level * torch.randn_like(images))
        centres = CELL * (torch.arange(SIZE // CELL, device=images.device) + 0.5)
        across = things[:, :, 2, None, None] - centres  # pixels from each cell: (B, 4, 1, 8)
        down = things[:, :, 3, None, None] - centres[:, None]  # (B, 4, 8, 1)
        gap = torch.stack(torch.broadcast_tensors(across, down), dim=2)  # (B, 4, 2, 8, 8)
        distance = gap.abs().amax(2).masked_fill(things[:, :, 0, None, None] < 0, torch.inf)
        distance, nearest = distance.min(dim=1)  # (B, 8, 8): to the nearest thing, and which it is
        near, here = distance < 1.5 * CELL, (distance <= CELL / 2).float()
        losses = [10 * F.binary_cross_entropy_with_logits(presence[:, 0], here)]  # 1 of 30 cells
        rows = torch.arange(len(things), device=images.device)[:, None, None].expand_as(nearest)
        mine = things[rows, nearest][near]  # (M, 5): the thing near each of M cells
        for column, logits in enumerate(classes):
            logits = logits.permute(0, 2, 3, 1)[near]
            losses.append(F.cross_entropy(logits, mine[:, column].long()))
        wanted = gap.take_along_dim(nearest[:, None, None], 1)[:, 0] / CELL  # (B, 2, 8, 8)
        losses.append((offset - wanted).abs().mean(1)[near].mean())
        losses.append(F.cross_entropy(guess, batch["background"]))
        return sum(losses), dict(zip(("presence", "kind", "color", "offset", "background"), losses,
                                     strict=True))

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[list[list[tuple]], list[int]]:
        """-> for each image its things, (kind, color, x, y) with x and y in pixels, the surest
        first; and its background. Kinds, colors and backgrounds are indices of their names."""
        (presence, *classes, offset), background = self(images)
        p = presence.sigmoid()
        peak = presence == F.max_pool2d(presence, 3, 1, 1)
        peak &= 9 * F.avg_pool2d(p, 3, 1, 1) > 0.5  # the sum over 3x3 cells
        kind, color = (logits.argmax(1) for logits in classes)
        found = [[] for _ in images]
        for i, row, column in peak[:, 0].nonzero().tolist():
            dx, dy = offset[i, :, row, column].tolist()
            found[i].append((p[i, 0, row, column].item(), kind[i, row, column].item(),
                             color[i, row, column].item(), CELL * (column + 0.5 + dx),
                             CELL * (row + 0.5 + dy)))
        things = [[thing[1:] for thing in sorted(some, reverse=True)] for some in found]
        return things, background.argmax(1).tolist()


def read_sign(image: np.ndarray) -> str:
    """The text of a sign at the lower left of an image uint8 (32, 32, 3), "" for none: the nearest
    letter at each place, up to the first place that looks like none."""
    top, text = SIZE - 10, ""
    for column in range(1, SIZE - 5, 4):
        cell = image[top + 1 : top + SIGN_HEIGHT - 1, column : column + 5] / 255
        errors = np.square(cell - LETTER_CELLS).mean(axis=(1, 2, 3))
        if errors.min() > 0.06:
            break
        text += list(FONT)[int(errors.argmin())]
    return text


LETTER_CELLS = np.stack([draw_sign(letter)[1:-1, 1:6] for letter in FONT])  # (39, 7, 5, 3)


Model = Reader
