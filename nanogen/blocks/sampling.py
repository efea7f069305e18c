"""What samplers do at each step: draw from logits, guide, and choose which tokens to reveal."""

import math

import torch
from torch import Tensor


def draw(logits: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0,
         top_p: float = 1.0) -> Tensor:
    """One index for each row of logits (..., K) -> (...). ValueError for a setting out of range.
    temperature divides the logits: below 1, safer and less varied; 0 takes the most likely index.
    top_k: only among the k most likely; 0: all. top_p: only among the fewest that together have
    probability p (nucleus sampling, Holtzman et al. 2020)."""
    if not (temperature >= 0 and top_k >= 0):  # so written, it refuses nan, too
        raise ValueError(f"temperature {temperature} and top_k {top_k} must not be negative")
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
        beyond = torch.zeros_like(beyond).scatter(-1, order, beyond)  # in the order of the logits
        logits = logits.masked_fill(beyond, float("-inf"))
    # Inverse transform sampling: u is uniform in [0, 1), and the first index whose cumulative
    # probability exceeds u is drawn. That is one random number a row; torch.multinomial draws K.
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]  # 1, up to rounding
    u = total * torch.rand(total.shape, generator=generator, device=total.device)
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # if rounded up to total
    return torch.searchsorted(cumulative, u, right=True).squeeze(-1)


# ---- classifier-free guidance (Ho & Salimans 2022)

def guided(cond: Tensor, uncond: Tensor, guidance: float | Tensor) -> Tensor:
    """uncond + guidance (cond - uncond), of logits or velocities: 1 is plain conditional sampling,
    more strengthens the effect of the condition: clearer samples, less variety."""
    return uncond + guidance * (cond - uncond)


def with_and_without(condition: Tensor, null: int | Tensor, guidance: float) -> Tensor:
    """Conditions of a guided pass: (B, ...) -> (2 B, ...), the given ones and then `null` (a class,
    or a tensor that expands to theirs). With guidance 1 only the given ones: half the cost."""
    if guidance == 1:
        return condition
    null = torch.as_tensor(null, dtype=condition.dtype, device=condition.device)
    return torch.cat([condition, null.expand_as(condition)])


def apply_guidance(outputs: Tensor, guidance: float) -> Tensor:
    """What the network predicts in such a pass (2 B, ...) -> the guided prediction (B, ...)."""
    return outputs if guidance == 1 else guided(*outputs.chunk(2), guidance)


def reveal_schedule(count: int, steps: int) -> list[int]:
    """How many of `count` tokens are known after each step, at least one more each time. The masked
    fraction falls as cos(pi/2 r) (Chang et al. 2022, "MaskGIT"): few tokens at first."""
    known, schedule = 0, []
    for step in range(1, steps + 1):
        wanted = count - math.floor(count * math.cos(math.pi / 2 * step / steps))
        known = min(max(wanted, known + 1), count - (steps - step))  # leave one for each later step
        schedule.append(known)
    return schedule


def halton_ranks(grid: int) -> Tensor:
    """The rank of each cell of a grid x grid image, by the first Halton point in it: (grid^2,).
    The first n Halton points fill the square evenly, for any n (Besnier et al. 2025)."""

    def radical_inverse(i: int, base: int) -> float:  # the digits of i, mirrored at the point
        value, scale = 0.0, 1.0
        while i:
            scale /= base
            i, digit = divmod(i, base)
            value += digit * scale
        return value

    order, i = {}, 1  # a dict keeps the order in which cells are met
    while len(order) < grid**2:
        row, column = int(radical_inverse(i, 2) * grid), int(radical_inverse(i, 3) * grid)
        order.setdefault(row * grid + column)
        i += 1
    ranks = torch.empty(grid**2, dtype=torch.long)
    ranks[torch.tensor(list(order))] = torch.arange(grid**2)
    return ranks
