"""Drawing from logits, guidance, and the order in which masked tokens are revealed: what samplers of tokens do at each step."""

import math

import torch
from torch import Tensor

from nanogen.blocks.flow_matching import guided


def draw(logits: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One index for each row of logits (..., K) -> (...).

    temperature divides the logits: below 1, safer and less varied; 0 takes the most likely index. top_k: only among
    the k most likely. top_p: only among the fewest that together have probability p (Holtzman et al. 2020).
    """
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature and top_k must not be negative, got {temperature} and {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the most likely one always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    # One random number a row, and a search for it. (torch.multinomial draws one for each of the K words: 1 ms for 64 rows.)
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    u = total * torch.rand(total.shape, generator=generator, device=total.device)
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # below the total also when it was rounded up
    return torch.searchsorted(cumulative, u, right=True).squeeze(-1)  # the first whose sum exceeds u: never one of share 0


def with_and_without(labels: Tensor, null: int, guidance: float) -> Tensor:
    """The labels a guided pass needs: (B,) -> (2 B,), labels and then "no label"; (B,) as it is when guidance is 1."""
    return labels if guidance == 1 else torch.cat([labels, torch.full_like(labels, null)])


def apply_guidance(logits: Tensor, guidance: float) -> Tensor:
    """Logits of such a pass -> uncond + guidance (cond - uncond): (2 B, ...) -> (B, ...)."""
    if guidance == 1:
        return logits
    return guided(*logits.chunk(2), guidance)


def reveal_schedule(count: int, steps: int) -> list[int]:
    """How many of `count` tokens are known after each step: few at first, and at least one more each time.

    The masked share falls as cos(pi/2 r): 12 steps for 64 tokens reveal 1, 2, 2, 4, ... and 8 at the end.
    """
    known, schedule = 0, []
    for step in range(1, steps + 1):
        wanted = count - math.floor(count * math.cos(math.pi / 2 * step / steps))
        known = min(max(wanted, known + 1), count - (steps - step))  # leave one for each step to come
        schedule.append(known)
    return schedule


def halton_ranks(grid: int) -> Tensor:
    """The step of each cell in Halton order: (grid^2,) ranks. Points (i in base 2, i in base 3), mirrored at the decimal
    point, fill the square evenly at every moment; a cell's rank is when its first point falls."""

    def mirrored(i: int, base: int) -> float:
        value, scale = 0.0, 1.0
        while i:
            scale /= base
            i, digit = divmod(i, base)
            value += digit * scale
        return value

    order, i = {}, 1  # a dict keeps the order in which cells are met
    while len(order) < grid**2:
        order.setdefault(int(mirrored(i, 2) * grid) * grid + int(mirrored(i, 3) * grid))
        i += 1
    ranks = torch.empty(grid**2, dtype=torch.long)
    ranks[torch.tensor(list(order))] = torch.arange(grid**2)
    return ranks
