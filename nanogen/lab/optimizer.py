"""Muon for the matrices, AdamW for everything else.

Adam scales every weight by itself. Muon looks at a whole weight matrix: it takes the momentum
M = U S V^T and steps along U V^T, so every direction of the gradient is followed by the same
amount, strong or weak. On budgets of minutes that is worth about twice the steps. U V^T is computed
without an SVD, by five steps of a polynomial in M that pushes all singular values to about 1
(Newton-Schulz).

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (method,
coefficients); Liu et al. 2025, "Muon is Scalable for LLM Training" (the factor
0.2 sqrt(max(rows, columns)), so that one learning rate serves both optimizers).
Different here: convolution kernels count as matrices of (out, in * height * width).
"""

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalize(matrices: Tensor) -> Tensor:
    """(..., rows, columns) -> about U V^T of each matrix: its singular values become 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest slope at 0; does not converge to exactly 1
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x  # the smaller side squared is cheaper
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized. For weights of two or more dimensions inside the network."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 dtype: torch.dtype = torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # bfloat16 is precise enough for U V^T, where it is faster

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape: one product for all of them
            for p in (p for p in group["params"] if p.grad is not None):
                alike[p.shape].append(p)
            for weights in alike.values():
                gradients = [p.grad for p in weights]
                velocities = [self.state[p].setdefault("velocity", torch.zeros_like(p))
                              for p in weights]
                torch._foreach_lerp_(velocities, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, velocities, group["momentum"])  # Nesterov
                steps = orthogonalize(torch.stack([m.flatten(1).to(self.dtype) for m in ahead]))
                scale = 0.2 * max(steps.shape[1:]) ** 0.5  # the root mean square of AdamW's step
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                steps = [s.view_as(p).to(p.dtype) for s, p in zip(steps, weights, strict=True)]
                torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, kind: str, lr: float, weight_decay: float,
                    dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """`kind` "muon" or "adamw" -> optimizers that together own every trainable weight once.
    Embeddings, output layers and all vectors go to AdamW even under "muon": rows of a table are
    looked up, not multiplied, and an output layer should follow the strong directions of its
    gradient (frequent tokens) more than weak ones. A module asks for it with `adamw = True`."""
    plain = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or getattr(module, "adamw", False):
            plain.update(module.parameters(recurse=False))
    matrices, rest = [], []
    for p in (p for p in model.parameters() if p.requires_grad):
        by_muon = kind == "muon" and p.ndim >= 2 and p not in plain
        (matrices if by_muon else rest).append(p)
    decayed, free = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=free, weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=weight_decay, dtype=dtype))
    return optimizers
