"""Generation heads: draw a token from what the Transformer computed for its position.

The Transformer computes a hidden state z for each position, and a head draws the token x from
p(x | z). "A running dog" may stand on grass or in a city: several modes. What a head does to them:

    mse          learns the mean E[x | z] of all plausible tokens, often none of them: blur
    categorical  learns a probability for each code of a codebook: all modes, but only its codes
    diffusion    learns the noise in a noisy token, removes it step by step: all modes, any vector
    flow         learns the velocity from noise to the token, on straight lines: fewer steps

Only the head iterates. It has 13% of the weights in MAR's recipe, so its steps are cheap. Time
runs from t=0 (noise) to t=1 (data): uniform in training, evenly spaced from 0 in sampling. Tokens
should have mean 0 and std 1, like the noise.

Sources: Li et al. 2024, "Autoregressive Image Generation without Vector Quantization" (diffusion
head, MLP with AdaLN, several noises for each z); the objectives: blocks/flow_matching.py.
Different from the paper: a flow head beside the diffusion head; no learned variance; the diffusion
head adds the noisy token to its output; DDIM instead of DDPM sampling, for fewer steps; one matrix
modulates all layers, but not the output layer; guidance also for the first two heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks import flow_matching as fm
from nanogen.blocks.quantize import nearest
from nanogen.blocks.sampling import draw, guided
from nanogen.blocks.transformer import CodeEmbedding, TimeEmbedding, norm, zeroed

HEADS = ("mse", "categorical", "diffusion", "flow")


class Head(nn.Module):
    """Base class. Each head has `predict(z, ...)`, the output of its network; `loss(x, z)`, a
    scalar for tokens x (N, token_dim) given z (N, cond_dim); and `draw`, which `sample` calls."""

    default_steps = 1

    @torch.no_grad()
    def sample(self, z: Tensor, steps: int | None = None, temperature: float = 1.0,
               generator: torch.Generator | None = None, z_uncond: Tensor | None = None,
               guidance: float | Tensor = 1.0) -> Tensor:
        """One token for each row of z: (N, cond_dim) -> (N, token_dim). ValueError for steps < 1.
        steps: passes of the MLP for each token, for diffusion and flow only. temperature: below 1
        less variety, 0 none; not for mse. z_uncond: (N, cond_dim), hidden states without the class.
        guidance: a number, or one for each row (N,). With the number 1, z_uncond is not used."""
        steps = self.default_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps of the head must be at least 1, got {steps}")
        if isinstance(guidance, Tensor):
            guidance = guidance[:, None]
        elif guidance == 1:
            z_uncond = None

        def predict(z: Tensor, *inputs: Tensor) -> Tensor:
            if z_uncond is None:
                return self.predict(z, *inputs)
            both = self.predict(torch.cat([z, z_uncond]), *(torch.cat([x, x]) for x in inputs))
            return guided(*both.chunk(2), guidance)

        return self.draw(predict, z, steps, temperature, generator)


class MSEHead(Head):
    """Predict the token directly, by squared error. The best prediction is the mean E[x | z]."""

    def __init__(self, token_dim: int, cond_dim: int, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(cond_dim, width), nn.SiLU(), nn.Linear(width, token_dim))
        self.net[-1].adamw = True

    def predict(self, z: Tensor) -> Tensor:
        return self.net(z).float()

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean squared error; chance is 1, the variance of the tokens."""
        return F.mse_loss(self.predict(z), x)

    def draw(self, predict, z: Tensor, *_) -> Tensor:
        return predict(z)


class CategoricalHead(Head):
    """Choose one of the codes (K, token_dim): logits are products of z with a vector for each."""

    def __init__(self, codes: Tensor, cond_dim: int):
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.embedding = CodeEmbedding(codes, cond_dim, zero=True)  # first guess: uniform

    def predict(self, z: Tensor) -> Tensor:
        """Logits of every code: (N, K)."""
        return (z @ self.embedding().mT).float()

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy with the code nearest to each token, in nats; chance is log(K)."""
        return F.cross_entropy(self.predict(z), nearest(x, self.codes))

    def draw(self, predict, z: Tensor, steps: int, temperature: float, generator) -> Tensor:
        return self.codes[draw(predict(z), generator, temperature)]


class FlowHead(Head):
    """A small MLP that predicts the velocity on the straight line from noise to the token.
    repeat: noises and times for each token of a training batch. z is expensive (a pass of the
    Transformer) and the MLP is cheap, so each z is used several times (Li et al.: 4)."""

    default_steps, objective = 8, staticmethod(fm.flow_loss)

    def __init__(self, token_dim: int, cond_dim: int, width: int, depth: int, repeat: int = 4):
        super().__init__()
        self.token_dim, self.repeat = token_dim, repeat
        self.mlp = AdaLNMLP(token_dim, cond_dim, width, depth)

    def predict(self, z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mlp(x_t, t, z)

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean squared error, over `repeat` noises for each token. For a velocity of 0 it is 2: the
        variance of the tokens plus that of the noise."""
        x, z = x.repeat(self.repeat, 1), z.repeat(self.repeat, 1)
        return self.objective(lambda x_t, t: self.predict(z, x_t, t), x)[0]

    def draw(self, predict, z: Tensor, steps: int, temperature: float, generator) -> Tensor:
        x = temperature * torch.randn(len(z), self.token_dim, generator=generator, device=z.device)
        return self.solve(lambda x_t, t: predict(z, x_t, t), x, steps)

    def solve(self, velocity: fm.Network, x: Tensor, passes: int) -> Tensor:
        """The midpoint method, two passes per step; of an odd number, one pass is not used. On
        CIFAR-10, 4 passes of it are as good as 16 of Euler's method."""
        return fm.solve(velocity, x, max(passes // 2, 1), "midpoint" if passes > 1 else "euler")


class DiffusionHead(FlowHead):
    """Predicts the noise e in x_t = sqrt(a) x + sqrt(1-a) e, as sqrt(1-a) x_t + sqrt(a) MLP(x_t).
    Near t=0 the noise is x_t itself, and the error of e enters the estimated token times 100. An
    MLP cannot copy x_t that exactly. So x_t is added, and the MLP predicts the rest (Salimans & Ho
    2022, "v"); without this, tokens had a std of 2 instead of 1 after a short training. If the MLP
    gives 0, the loss is 1/2: the mean of a."""

    default_steps, objective = 16, staticmethod(fm.diffusion_loss)

    def predict(self, z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        a = fm.alpha_bar(t)[:, None]
        return (1 - a).sqrt() * x_t + a.sqrt() * self.mlp(x_t, t, z)

    def solve(self, noise: fm.Network, x: Tensor, passes: int) -> Tensor:
        return fm.solve_diffusion(noise, x, passes)


class AdaLNMLP(nn.Module):
    """A residual MLP whose layers are shifted, scaled and gated by time and z (AdaLN-zero). With
    0.5 million weights, a width of 192 and 2 layers learn better than 160 and 3, or 256 and 1."""

    def __init__(self, token_dim: int, cond_dim: int, width: int, depth: int):
        super().__init__()
        self.inp = nn.Linear(token_dim, width)
        self.cond = nn.Linear(cond_dim, width)
        self.time = TimeEmbedding(width)
        self.modulation = zeroed(nn.Linear(width, 3 * depth * width), adamw=True)  # gates 0
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth))
        self.out = zeroed(nn.Linear(width, token_dim), adamw=True)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t: (N, token_dim); t: (N,) in [0, 1]; z: (N, cond_dim) -> (N, token_dim)."""
        h, condition = self.inp(x_t), F.silu(self.time(t) + self.cond(z))
        modulation = self.modulation(condition).chunk(3 * len(self.layers), dim=-1)
        for i, layer in enumerate(self.layers):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]  # (N, width) each
            h = h + gate * layer(norm(h) * (1 + scale) + shift)
        return self.out(norm(h)).float()


def make_head(kind: str, token_dim: int, cond_dim: int, width: int = 192, depth: int = 2,
              repeat: int = 4, codes: Tensor | None = None) -> Head:
    """A head of one of the HEADS, for tokens of size token_dim given z of size cond_dim. KeyError
    for another kind. width: features inside the MLP (not for categorical). depth, its layers, and
    repeat, see `FlowHead`: flow and diffusion only. codes: (K, token_dim), categorical only."""
    if kind == "mse":
        return MSEHead(token_dim, cond_dim, width)
    if kind == "categorical":
        return CategoricalHead(codes, cond_dim)
    head = {"flow": FlowHead, "diffusion": DiffusionHead}[kind]
    return head(token_dim, cond_dim, width, depth, repeat)
