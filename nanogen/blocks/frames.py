"""A velocity field for the frames of a sound: a Transformer that is told what each frame should be.
Time runs from t=0 (noise) to t=1 (data).

Source: Le et al. 2023, "Voicebox": flow matching over frames, with a phoneme for each, and a
convolution before the Transformer. Different here: rotary positions, no skip connections.
"""

import torch
from torch import Tensor, nn

from nanogen.blocks.transformer import TimeEmbedding, Transformer, rotary_angles, zeroed


class FrameField(nn.Module):
    """inputs: features of a frame's input; outputs: of its velocity; width, depth and heads of the
    Transformer."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, heads: int):
        super().__init__()
        self.inp = nn.Linear(inputs, width)
        self.near = nn.Conv1d(width, width, 7, padding=3)
        self.time = TimeEmbedding(width)
        self.transformer = Transformer(width, depth, heads)
        self.out = zeroed(nn.Linear(width, outputs), adamw=True)

    def forward(self, x: Tensor, t: Tensor, meaning: Tensor, there: Tensor,
                whole: Tensor | float = 0.0) -> Tensor:
        """x: (B, F, inputs); t: (B,); meaning: (B, F, width), an embedding of what each frame
        should be; there: bool (B, F), False for padding, which changes no other frame; whole:
        (B, width), a condition of the whole sound -> (B, F, outputs)."""
        h = (self.inp(x) + meaning) * there[..., None]
        h = h + self.near(h.transpose(1, 2)).transpose(1, 2)
        positions = torch.arange(x.shape[1], device=x.device)[:, None]
        angles = rotary_angles(positions, h.shape[2] // self.transformer.heads)
        h = self.transformer(h, angles, there[:, None, None], condition=self.time(t) + whole)
        return self.out(h).float()
