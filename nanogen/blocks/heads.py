"""Generation heads: turn what the Transformer says into one token.

The Transformer walks the chain and hands over a vector z for the next position: the broad direction. A head draws the
token x itself. "A running dog" may stand on grass or in a city, so p(x | z) has several modes, and the choice of head
decides what happens to them:

    mse          learns E[x | z], the average of every plausible token. It is often none of them: blur.
    categorical  a probability for each word of a fixed list: any number of modes, but only vectors on the list.
    diffusion    learns which noise hides in a noisy token, and takes it out step by step: one mode per draw, any vector.
    flow         learns the velocity that carries noise to the token on straight lines: the same, in fewer steps.

Only the head iterates. It is a few percent of the model, so many refinement steps stay cheap. Time runs from t=0 (noise)
to t=1 (data). Tokens are to have mean 0 and standard deviation 1, as the noise has.

    python -m nanogen.blocks.heads           # the MSE trap on a target with two modes, a quarter of a minute on a CPU

Sources: Li et al. 2024, "Autoregressive Image Generation without Vector Quantization" (a diffusion head; its MLP with
AdaLN; several noises for each z); Lipman et al. 2023 and Ho et al. 2020 (the objectives: blocks/flow_matching.py).
Different from the paper: a flow head beside the diffusion head; no learned variance; the noisy token is added to the
diffusion head's answer; DDIM instead of DDPM sampling, for fewer steps; one matrix makes the modulations of all layers; no
modulation before the last layer; guidance also for heads without steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.flow_matching import Network, alpha_bar, diffusion_loss, flow_loss, guided, solve, solve_diffusion
from nanogen.blocks.quantize import nearest
from nanogen.blocks.sampling import draw
from nanogen.blocks.transformer import TimeEmbedding, WordVectors, norm

HEADS = ("mse", "categorical", "diffusion", "flow")


def make_head(kind: str, token_dim: int, cond_dim: int, width: int = 192, depth: int = 2, repeat: int = 4,
              codes: Tensor | None = None) -> nn.Module:
    """A head of one of the HEADS for tokens of token_dim numbers, given vectors of cond_dim.

    width: of the MLP; a categorical head has none. depth: its blocks, repeat: see `IteratedHead`, both flow and diffusion only.
    codes: (K, token_dim), categorical only.
    Raises ValueError for an unknown kind, and for a categorical head without codes.
    """
    if kind not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {kind!r}")
    if kind == "mse":
        return MSEHead(token_dim, cond_dim, width)
    if kind == "categorical":
        if codes is None:
            raise ValueError("a categorical head needs a list of codes to choose from")
        return CategoricalHead(codes, cond_dim)
    return (FlowHead if kind == "flow" else DiffusionHead)(token_dim, cond_dim, width, depth, repeat)


class Head(nn.Module):
    """What the heads have in common: how they are asked.

    loss(x, z)     x: (N, token_dim) tokens, z: (N, cond_dim) -> scalar
    sample(z, ...) z: (N, cond_dim) -> tokens (N, token_dim)
        steps: passes of the MLP for each token, at least 1, `default_steps` unless told; temperature: below 1 less variety,
        0 none. Heads that have no use for one of them ignore it. generator: where chance comes from.
        z_uncond: (N, cond_dim), what the Transformer says without the class; guidance: a number, or one for each row (N,).
        Each head guides what it predicts: uncond + guidance (cond - uncond). With the number 1 z_uncond is not looked at.
    """

    default_steps = 1

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, z: Tensor, steps: int | None = None, temperature: float = 1.0, generator: torch.Generator | None = None,
               z_uncond: Tensor | None = None, guidance: float | Tensor = 1.0) -> Tensor:
        steps = self.default_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps of the head must be at least 1, got {steps}")
        if isinstance(guidance, Tensor):
            guidance = guidance[:, None]
        elif guidance == 1:
            z_uncond = None
        if z_uncond is None:
            return self.draw(self.predict, z, steps, temperature, generator)

        def predict(z: Tensor, *inputs: Tensor) -> Tensor:  # one pass of twice the rows
            both = self.predict(torch.cat([z, z_uncond]), *(torch.cat([x, x]) for x in inputs))
            return guided(*both.chunk(2), guidance)

        return self.draw(predict, z, steps, temperature, generator)


class MSEHead(Head):
    """Predict the token directly: the least-squares answer to a question with two right answers."""

    def __init__(self, token_dim: int, cond_dim: int, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(cond_dim, width), nn.SiLU(), nn.Linear(width, token_dim))
        self.net[-1].adamw = True

    def predict(self, z: Tensor) -> Tensor:
        return self.net(z).float()

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean squared error. 1 is chance: the variance of the tokens."""
        return F.mse_loss(self.predict(z), x)

    def draw(self, predict, z: Tensor, steps: int, temperature: float, generator) -> Tensor:
        return predict(z)  # nothing is drawn


class CategoricalHead(Head):
    """Choose from a list of `codes` (K, token_dim): their logits are products of z with a vector for each word."""

    def __init__(self, codes: Tensor, cond_dim: int):
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.words = WordVectors(codes, cond_dim, zero=True)  # the first guess is uniform: loss = log(K)

    def predict(self, z: Tensor) -> Tensor:
        """Logits of every code: (N, K)."""
        return (z @ self.words().mT).float()

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy with the code nearest to each token, in nats per token; chance is log(K)."""
        return F.cross_entropy(self.predict(z), nearest(x, self.codes))

    def draw(self, predict, z: Tensor, steps: int, temperature: float, generator) -> Tensor:
        return self.codes[draw(predict(z), generator, temperature)]


class IteratedHead(Head):
    """A small MLP that refines noise into the token. What it predicts and how it steps, the two kinds below say.

    repeat: noises and times for each token of a training batch. z is dear (a pass of the Transformer) and the MLP cheap,
    so each z serves several times (Li et al.: 4).
    """

    def __init__(self, token_dim: int, cond_dim: int, width: int, depth: int, repeat: int = 4):
        super().__init__()
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        self.token_dim, self.repeat = token_dim, repeat
        self.mlp = AdaLNMLP(token_dim, cond_dim, width, depth)

    def predict(self, z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.mlp(x_t, t, z)

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean squared error of what is predicted, over `repeat` noises for each token."""
        x, z = x.repeat(self.repeat, 1), z.repeat(self.repeat, 1)
        return self.objective(lambda x_t, t: self.predict(z, x_t, t), x)[0]

    def draw(self, predict, z: Tensor, steps: int, temperature: float, generator) -> Tensor:
        noise = temperature * torch.randn(len(z), self.token_dim, generator=generator, device=z.device)
        return self.refine(lambda x_t, t: predict(z, x_t, t), noise, steps)


class FlowHead(IteratedHead):
    """Predicts the velocity. To answer 0 costs 2: the variance of the token and that of the noise."""

    objective = staticmethod(flow_loss)
    default_steps = 8

    def refine(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        """Midpoint, two passes a step; an odd one is left out. On CIFAR-10 its 4 passes drew as well as 16 of Euler."""
        return solve(network, noise, steps // 2, "midpoint") if steps > 1 else solve(network, noise, 1)


class DiffusionHead(IteratedHead):
    """Predicts the noise e in x_t = sqrt(a) x + sqrt(1-a) e, as sqrt(1-a) x_t + sqrt(a) MLP(x_t).

    Near t=0 the noise is x_t itself, and the token that is guessed from it is wrong by the error of e times 100. An MLP
    cannot copy x_t that well, so it is added here and the MLP says what is missing (Salimans & Ho 2022, "v"). Without
    that, after a short training and at an equal loss, tokens came out with a standard deviation of 2 instead of 1. For the
    MLP to answer 0 costs 1/2: the mean of a.
    """

    objective = staticmethod(diffusion_loss)
    default_steps = 16

    def predict(self, z: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        a = alpha_bar(t)[:, None]
        return (1 - a).sqrt() * x_t + a.sqrt() * self.mlp(x_t, t, z)

    def refine(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        return solve_diffusion(network, noise, steps)


class AdaLNMLP(nn.Module):
    """A residual MLP whose every layer is shifted, scaled and gated by time and z (AdaLN-zero, as the Transformer's).

    The modulations are the dear part: a layer has 2 width^2 weights, and 3 width^2 more to steer it. So width before depth:
    on CIFAR-10's 4x4 patches given their neighbours, 192 wide and 2 deep (0.49 M weights) had a loss of 0.381 after 250
    steps; 160 and 3 (0.48 M) 0.388; 256 and 1 (0.50 M) 0.385; 160 and 2 (0.35 M) 0.397; 192 and 1 (0.30 M) 0.417.
    """

    def __init__(self, token_dim: int, cond_dim: int, width: int, depth: int):
        super().__init__()
        self.inp = nn.Linear(token_dim, width)
        self.cond = nn.Linear(cond_dim, width)
        self.time = TimeEmbedding(width)
        self.modulation = nn.Linear(width, 3 * depth * width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth))
        self.out = nn.Linear(width, token_dim)
        for layer in (self.modulation, self.out):  # gates 0: every layer starts as the identity; answer 0
            layer.adamw = True
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t: (N, token_dim); t: (N,) in [0, 1]; z: (N, cond_dim) -> (N, token_dim)."""
        h, condition = self.inp(x_t), F.silu(self.time(t) + self.cond(z))
        modulation = self.modulation(condition).chunk(3 * len(self.layers), dim=-1)  # (N, width) each
        for i, layer in enumerate(self.layers):
            shift, scale, gate = modulation[3 * i : 3 * i + 3]
            h = h + gate * layer(norm(h) * (1 + scale) + shift)
        return self.out(norm(h)).float()


def learn_toy(head: Head, points: Tensor, steps: int = 800, lr: float = 2e-3) -> Tensor:
    """Train a head on points (N, token_dim) that all have the same z, then draw 1,000: (1000, token_dim)."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        x = points[torch.randint(len(points), (256,))]
        loss = head.loss(x, x.new_ones(len(x), 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.sample(torch.ones(1000, 1), steps=16)


if __name__ == "__main__":
    from nanogen.blocks.flow_matching import toy

    torch.manual_seed(0)
    points, modes = toy("two modes", 10_000), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # on grass, in a city
    for kind in HEADS:
        head = make_head(kind, 2, 1, width=64, codes=points[:32])
        distance, mode = torch.cdist(learn_toy(head, points), modes).min(dim=1)
        left = (mode == 0).float().mean()
        print(f"{kind:12} distance to the nearest mode {distance.mean():.2f}, share drawn at the left one {left:.2f}")
