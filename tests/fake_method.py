"""The smallest method: a text in, a video out. It shows what the contract in method.py asks for."""

from dataclasses import dataclass

import torch
from torch import nn

from nanogen.method import Method, check


@dataclass
class Config:
    width: int = 8  # features of a character
    frames: int = 4  # images of a video
    size: int = 8  # side of the images in pixels

    def __post_init__(self):
        check(self, width=(self.width > 0, "at least 1"))


class Model(Method):
    data, conditions, output = "videos", {"prompts": "text"}, "videos"

    def __init__(self, config, base=None):
        super().__init__()
        self.config, self.shape = config, (config.frames, 3, config.size, config.size)
        self.embedding = nn.Embedding(128, config.width)
        self.out = nn.Linear(config.width, torch.Size(self.shape).numel())

    def forward(self, prompts):
        return self.out(self.embedding(prompts).mean(1)).unflatten(1, self.shape).float()

    def loss(self, batch):
        return (self(batch["prompts"]) - batch["videos"]).square().mean(), {}

    @torch.no_grad()
    def sample(self, conditions, brightness: float = 1.0, seed: int = 0):
        return {"videos": brightness * self(conditions["prompts"])}
