"""Bring vectors to mean 0 and standard deviation 1, as measured on the training data."""

import torch
from torch import Tensor, nn


class Standardizer(nn.Module):
    """Mean and std of each channel, saved with the model; 0 and 1 until `measure`. trailing: how
    many axes follow the channels, such as 2 for (B, C, H, W)."""

    def __init__(self, channels: int, trailing: int = 0):
        super().__init__()
        shape = (channels, *(1,) * trailing)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Store mean and std of the channels of x: (N, C, ...) or (N, ..., C). A constant channel
        gets a std of 1e-5, not 0."""
        rows = x.movedim(-self.mean.dim(), -1).flatten(0, -2)  # (everything else, C)
        self.mean.copy_(rows.mean(0).view_as(self.mean))
        self.std.copy_(rows.std(0).clamp(min=1e-5).view_as(self.std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def inverse(self, z: Tensor) -> Tensor:
        return z * self.std + self.mean
