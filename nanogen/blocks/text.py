"""A text as vectors: a small Transformer over its tokens, each of which sees all others.

Sources: Saharia et al. 2022, "Imagen" (a text encoder whose tokens the U-Net attends to).
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nanogen.blocks.transformer import Transformer, rotary_angles


class TextEncoder(nn.Module):
    """Tokens int64 (B, L), 0: padding -> their features (B, L, width), bool (B, L): which tokens
    are no padding, and the mean of the features (B, width)."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embedding, self.head_dim = nn.Embedding(vocabulary, width), width // heads
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.always = nn.Parameter(torch.zeros(width))  # no condition: only biases learn
        self.transformer = Transformer(width, depth, heads)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = tokens > 0  # (B, L)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        features = self.transformer(
            self.embedding(tokens), rotary_angles(positions, self.head_dim), seen[:, None, None],
            condition=self.always[None].expand(len(tokens), -1))
        mean = (features * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return features, seen, mean


def encode_text(texts: list[str]) -> Tensor:
    """Texts -> their Unicode code points, int64 (N, longest), padded with 0."""
    rows = [torch.tensor(list(map(ord, text))) for text in texts]
    return pad_sequence(rows, batch_first=True).long()


def to_texts(codes: Tensor) -> list[str]:
    """Unicode code points (B, L), padded with 0 -> texts."""
    return ["".join(map(chr, filter(None, row))) for row in codes.tolist()]
