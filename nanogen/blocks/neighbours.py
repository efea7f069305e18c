"""What lies next to a position of an image that is drawn row by row.

    above left    above    above right
    previous      (now)

A causal Transformer could find these four by attention. When the budget is ten minutes, seeing them
directly is worth more than another layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def raster_neighbours(units: Tensor, grid: int, outside: int, last: bool = False) -> Tensor:
    """The neighbours of positions 0..P in an image of `grid` columns, given units 0..P-1.
    units: int64 (B, P) or (B, P, C) -> (B, P + 1, 4) or (B, P + 1, 4, C): the previous unit, and
    those above, above right and above left; `outside` where there is none. The previous unit of
    the left column is the end of the row above. last: only for position P, so (B, 1, 4)."""
    past = units.shape[1]
    position = torch.arange(past if last else 0, past + 1, device=units.device)
    padded = F.pad(units, (0, 0) * (units.ndim - 2) + (1, 0), value=outside)  # unit i is at i + 1
    index = []
    # How many positions back each neighbour is, and the column that lacks it (-1: none).
    for back, edge in ((1, -1), (grid, -1), (grid - 1, grid - 1), (grid + 1, 0)):
        missing = (position < back) | (position % grid == edge)
        index.append((position - back + 1).masked_fill(missing, 0))
    return padded[:, torch.stack(index, dim=1)]
