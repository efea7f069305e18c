"""Audio LM: a language model over the codec's codes, with the delay pattern of MusicGen.

The codec turns a clip into 62.5 frames a second, and each frame into K tokens, one per codebook. A
pattern says at which step each token is drawn (here 4 frames and 3 codebooks):

    flat         parallel     delay
    0 3 6  9     0 1 2 3      0 1 2 3     flat      one token after the other: F x K steps
    1 4 7 10     0 1 2 3      1 2 3 4     parallel  the tokens of a frame independently: F steps
    2 5 8 11     0 1 2 3      2 3 4 5     delay     codebook k a step after k - 1: F + K - 1 steps

A causal Transformer runs over the steps: from the sum of the embeddings of the tokens of the step
before to logits for each codebook. An extra token, `blank`, is the input where there is none: at
the first step, in the gaps of a pattern, after the end. When codebook 0 draws it, the clip ends.

    python -m nanogen train audio_lm --data fsdd --pattern delay

Sources: Copet et al. 2023, "MusicGen"; Borsos et al. 2023, "AudioLM". Different here: label and
speaker enter through AdaLN; embeddings are functions of the codec's code vectors; dropout.

Ours, at the end of the file: the pattern "latents" chains the codec's vectors before its quantizer,
one a frame. A generation head draws them (Li et al. 2024, "MAR"); a second output ends the clip.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks import sampling, transformer
from nanogen.blocks.heads import make_head
from nanogen.blocks.standardize import Standardizer
from nanogen.method import Method, Requirement, check, check_numbers, choose, unused

PATTERNS = ("flat", "parallel", "delay", "latents")


@dataclass
class Config:
    pattern: str = "delay"  # flat, parallel or delay; latents: a vector for each frame, no tokens
    codebooks: int = 4  # how many of the codec's to use, from the first; 0.5 kbit/s each
    width: int = 192  # features per step
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.2  # on every residual branch: 2,700 short clips are soon memorised
    label_dropout: float = 0.1  # fraction of clips trained without label and speaker, for guidance
    seconds: float = 0.8  # longest clip; longer ones are cut
    classes: int = 10  # number of labels
    speakers: int = 6  # number of speakers
    head: str = "flow"  # generation head of latents: flow, mse or diffusion
    head_width: int = 192  # features inside the head
    head_depth: int = 2  # its layers
    head_repeat: int = 4  # noises for each latent of a training batch

    def __post_init__(self):
        choose(self, pattern=PATTERNS, head=("flow", "mse", "diffusion"))
        check_numbers(self, seconds=(self.seconds > 0, "more than 0"),
                      dropout=(0 <= self.dropout < 1, "from 0 to below 1"))
        check(self, width=(self.width % (2 * self.heads) == 0, f"a multiple of {2 * self.heads}"))
        if self.pattern == "latents":
            unused(self, "codebooks", when="with latents")
        else:
            unused(self, "head", "head_width", "head_depth", "head_repeat", when="with tokens")
        if self.head == "mse":
            unused(self, "head_depth", "head_repeat", when="with the head mse")


def pattern_steps(pattern: str, frames: int, codebooks: int) -> Tensor:
    """The step at which each token is drawn: int64 (frames, codebooks)."""
    frame, codebook = torch.arange(frames)[:, None], torch.arange(codebooks)
    if pattern == "flat":
        return frame * codebooks + codebook
    return frame + (codebook if pattern == "delay" else 0 * codebook)


def to_pattern(tokens: Tensor, pattern: str, blank: int) -> Tensor:
    """Tokens (B, frames, K) -> by step, (B, steps, K), with `blank` in the gaps."""
    batch, frames, codebooks = tokens.shape
    counts = {"flat": frames * codebooks, "parallel": frames, "delay": frames + codebooks - 1}
    grid = tokens.new_full((batch, counts[pattern], codebooks), blank)
    steps = pattern_steps(pattern, frames, codebooks).to(tokens.device)
    grid[:, steps, torch.arange(codebooks, device=tokens.device)] = tokens
    return grid


def from_pattern(grid: Tensor, pattern: str, frames: int) -> Tensor:
    """The inverse: (B, steps, K) -> (B, frames, K)."""
    steps = pattern_steps(pattern, frames, grid.shape[2]).to(grid.device)
    return grid[:, steps, torch.arange(grid.shape[2], device=grid.device)]


class AudioLM(Method):
    """A causal Transformer over the steps of a pattern, on a frozen codec. A clip of up to F frames
    is `units`: tokens (B, F, K), -1 after the end, or latents (B, F, dim), NaN after the end."""

    data, output, encodes, samples_to_judge = "sounds", "waveforms", True, 300
    conditions = {"labels": "class", "speakers": "class"}
    encoding_fields = ("pattern", "codebooks", "seconds")

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.freeze(codec=base)
        self.config, self.continuous = config, config.pattern == "latents"
        self.frames = math.ceil(config.seconds * base.frame_rate)  # F
        self.codebook_size = self.blank = base.codebook_size
        self.empty = math.nan if self.continuous else self.blank  # input where there is no unit
        width, K = config.width, 1 if self.continuous else config.codebooks
        check(config, codebooks=(K <= base.codebooks, f"at most the codec's {base.codebooks}"))
        codes, embedding = base.code_vectors()[:K], transformer.CodeEmbedding
        self.label = transformer.ConditionEmbedding(config.classes, width)
        self.speaker = transformer.ConditionEmbedding(config.speakers, width)
        self.transformer = transformer.Transformer(width, config.depth, config.heads,
                                                   dropout=config.dropout)
        if self.continuous:
            self.build_latents(codes[0].shape[1])
        else:
            self.embeddings = nn.ModuleList(embedding(c, width, extra=1) for c in codes)
            self.outputs = nn.ModuleList(embedding(c, width, extra=1, zero=True) for c in codes)
            impossible = torch.zeros(K, self.blank + 1)  # is added to logits:
            impossible[1:, self.blank] = -1e9  # only codebook 0 may end a clip
            self.register_buffer("impossible", impossible, persistent=False)
        steps = pattern_steps(config.pattern, self.frames, K)
        self.register_buffer("steps", steps, persistent=False)  # (F, K)
        sizes = (self.frames, K) if config.pattern == "flat" else (int(steps.max()) + 1,)
        angles = transformer.grid_angles(*sizes, head=width // config.heads)
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("index", torch.arange(self.frames), persistent=False)  # of frames

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("codec", {})

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clips -> "tokens" int64 or "latents" float32, "frames" (B,), "labels", "speakers"."""
        waveforms, codec = batch["waveforms"], self.codec
        if self.continuous:
            name, units, missing = "latents", codec.latents(waveforms).float(), math.nan
        else:
            name, units, missing = "tokens", codec.encode(waveforms, self.config.codebooks), -1
        units = F.pad(units, (0, 0, 0, self.frames - units.shape[1]))  # a negative padding cuts
        frames = (-(-batch["lengths"] // codec.hop)).clamp(max=self.frames)
        units = units.masked_fill((self.index >= frames[:, None])[..., None], missing)
        return {name: units, "frames": frames} | {key: batch[key] for key in self.conditions}

    def tables(self) -> tuple[Tensor, Tensor]:
        """The vectors of all tokens, for input and output: (K, codebook_size + 1, width) each."""
        return torch.stack([e() for e in self.embeddings]), torch.stack([o() for o in self.outputs])

    def embed(self, units: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """Units of the step before, (B, S, K or dim), blank or NaN if none -> (B, S, width)."""
        if self.continuous:
            x = self.embedding(units.nan_to_num())
            return torch.where(units.isnan()[..., :1], self.start, x)
        return sum(F.embedding(units[..., k], table) for k, table in enumerate(tables[0]))

    def hidden_states(self, units: Tensor, labels: Tensor, speakers: Tensor, tables) -> Tensor:
        """Units by step, (B, S, K or dim) -> hidden state of each step, given those before it."""
        x = self.embed(F.pad(units[:, :-1], (0, 0, 1, 0), value=self.empty), tables)
        condition = self.label(labels) + self.speaker(speakers)
        return self.transformer(x, self.angles, causal=True, condition=condition)

    def logits(self, tokens: Tensor, labels: Tensor, speakers: Tensor) -> Tensor:
        """Logits of each token, given those of earlier steps: (B, F, K, codebook_size + 1)."""
        tables, tokens = self.tables(), torch.where(tokens < 0, self.blank, tokens)
        grid = to_pattern(tokens, self.config.pattern, self.blank)
        h = self.hidden_states(grid, labels, speakers, tables)
        h = h.index_select(1, self.steps.flatten()).unflatten(1, self.steps.shape)  # (B, F, K, w)
        return torch.einsum("bfkw,kvw->bfkv", h, tables[1].to(h.dtype)).float() + self.impossible

    def token_nats(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token in nats and whether it counts, (B, F, K) each. The tokens of
        the clip count, and the `blank` of codebook 0 that ends it (if it is not the longest)."""
        end = (self.index == batch["frames"][:, None])[..., None]  # (B, F, 1)
        end = F.pad(end, (0, self.config.codebooks - 1))  # (B, F, K): of codebook 0 only
        targets = torch.where(end, self.blank, batch["tokens"])
        logits = self.logits(batch["tokens"], batch["labels"], batch["speakers"]).flatten(0, 2)
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
        return nats.view(targets.shape), targets >= 0

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """A prepared batch -> nats per token (chance is log(codebook_size)), or `latent_loss`."""
        config = self.config
        labels = transformer.drop_labels(batch["labels"], config.classes, config.label_dropout)
        speakers = torch.where(labels == config.classes, config.speakers, batch["speakers"])
        batch = batch | {"labels": labels, "speakers": speakers}  # both hidden, or none
        if self.continuous:
            return self.latent_loss(batch)
        nats, counts = self.token_nats(batch)
        by_codebook = ((nats * counts).sum((0, 1)) / counts.sum((0, 1))).detach()
        metrics = {"codebook_0": by_codebook[0], "last_codebook": by_codebook[-1]}
        return (nats * counts).sum() / counts.sum(), metrics

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, guidance: float = 1.0,
               temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               head_steps: int | None = None, cached: bool = True,
               known: Tensor | None = None, seed: int = 0) -> dict:
        """Clips of these "labels" and "speakers", (B,) each: see `to_waveforms`. top_k, top_p: of
        tokens (blocks/sampling.py). head_steps: of the head of latents. cached=False computes the
        past anew at every step, to show what the cache saves. known: units that the clips begin
        with, from `known_part`; they are kept, and decoded."""
        units = self.generate(conditions["labels"], conditions["speakers"], guidance, temperature,
                              seed, top_k, top_p, head_steps, cached, known)
        return self.to_waveforms(*units)

    def known_part(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """See `Method.known_part`: units (B, F, K or dim), -1 or NaN after the known frames. A
        frame that is not complete is drawn."""
        lengths = lengths // self.codec.hop * self.codec.hop
        if lengths.min() < 1:
            raise ValueError(f"at least {self.codec.hop} samples of a sound must be known")
        batch = {"waveforms": waveforms, "lengths": lengths, "labels": None, "speakers": None}
        units = self.prepare(batch)["latents" if self.continuous else "tokens"]
        return self.latents(units) if self.continuous else units

    @torch.no_grad()
    def generate(self, labels: Tensor, speakers: Tensor, guidance: float = 1.0,
                 temperature: float = 1.0, seed: int = 0, top_k: int = 0, top_p: float = 1.0,
                 head_steps: int | None = None, cached: bool = True,
                 known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Units (B, F, K or dim) of clips, and how many frames each has (B,): see `sample`."""
        batch, count, device = len(labels), len(self.angles), labels.device
        generator = torch.Generator(device).manual_seed(seed)
        labels = sampling.with_and_without(labels, self.config.classes, guidance)
        speakers = sampling.with_and_without(speakers, self.config.speakers, guidance)
        modulation = self.transformer.modulate(self.label(labels) + self.speaker(speakers))
        cache = None if not cached else transformer.Cache(
            self.transformer, len(labels), count, modulation[0].dtype)
        tables = None if self.continuous else self.tables()
        size = self.dim if self.continuous else self.config.codebooks
        units = torch.full((batch, count + 1, size), self.empty, device=device)  # column 0: start
        frames = torch.full((batch,), self.frames, device=device)  # less, once a clip has ended
        begun = torch.zeros_like(frames)  # so many frames are known
        if known is not None:
            begun = (~known.isnan() if self.continuous else known >= 0)[..., 0].sum(1)
        for step in range(count):
            past = slice(step if cached else 0, step + 1)
            x = self.embed(units[:, past].repeat(len(labels) // batch, 1, 1), tables)
            h = self.transformer(x, self.angles[past], causal=not cached, modulation=modulation,
                                 cache=cache)[:, -1]
            if self.continuous:
                drawn, ended = self.draw_latent(h, step, frames, guidance, temperature, generator,
                                                head_steps)
                frames = torch.where(begun > step, frames, ended)
                if known is not None:
                    drawn = torch.where(begun[:, None] > step, known[:, step], drawn)
                units[:, step + 1] = drawn
            else:
                for codebook, frame in (self.steps.T == step).nonzero().tolist():
                    logits = (h @ tables[1][codebook].to(h.dtype).mT).float()
                    logits = sampling.apply_guidance(logits, guidance) + self.impossible[codebook]
                    token = sampling.draw(logits, generator, temperature, top_k, top_p)
                    if known is not None:
                        token = torch.where(begun > frame, known[:, frame, codebook], token)
                    frames = torch.where((token == self.blank) & (frames > frame), frame, frames)
                    units[:, step + 1, codebook] = torch.where(frames > frame, token, self.blank)
            longest = int(frames.max())
            if longest == 0 or step >= self.steps[longest - 1, -1]:
                break  # all clips have ended
        units = from_pattern(units[:, 1:], self.config.pattern, self.frames)
        return units if self.continuous else units.masked_fill(units == self.blank, -1), frames

    def to_waveforms(self, units: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """Units of clips -> "waveforms" (B, T) in [-1, 1] and "lengths" (B,) in samples."""
        units, lengths = units[:, : max(int(frames.max()), 1)], frames * self.codec.hop
        if self.continuous:
            waveforms = self.codec.decode_latents(self.latents.inverse(units.nan_to_num()))
        else:
            waveforms = self.codec.decode(units.clamp(min=0))
        after = torch.arange(waveforms.shape[1], device=lengths.device) >= lengths[:, None]
        return {"waveforms": waveforms.masked_fill(after, 0.0), "lengths": lengths}

    # ---- ours: latents instead of tokens

    def build_latents(self, dim: int) -> None:
        config, self.dim, self.latents = self.config, dim, Standardizer(dim)
        self.embedding = nn.Linear(dim, config.width)
        self.start = nn.Parameter(0.2 * torch.randn(config.width))  # input of the first step
        self.head = make_head(config.head, dim, config.width, config.head_width, config.head_depth,
                              config.head_repeat)
        self.end = nn.Linear(config.width, 1)  # log-odds that the clip ended before this frame
        self.end.adamw = True

    def measure(self, data: dict[str, Tensor]) -> None:
        if self.continuous:
            self.latents.measure(data["latents"][~data["latents"].isnan().any(-1)])

    def latent_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Loss of the head, plus nats of the question whether the clip is over."""
        x, frames = self.latents(batch["latents"]), batch["frames"][:, None]
        z = self.hidden_states(x, batch["labels"], batch["speakers"], None)
        over, asked = self.index >= frames, self.index <= frames  # asked until the first yes
        end = F.binary_cross_entropy_with_logits(
            self.end(z)[..., 0].float(), over.float(), asked.float(), reduction="sum") / asked.sum()
        # The head learns from the frames that exist. Compiled code needs a constant number of them,
        # so they fill half of all positions: in random order, and again from the first if few.
        order = (over.flatten() + torch.rand(over.numel(), device=over.device)).argsort()
        half = torch.arange((over.numel() + 1) // 2, device=over.device)
        index = order[half % (~over).sum()]
        head = self.head.loss(x.flatten(0, 1)[index], z.flatten(0, 1)[index])
        return head + end, {"head": head.detach(), "end": end.detach()}

    def draw_latent(self, h: Tensor, step: int, frames: Tensor, guidance: float, temperature: float,
                    generator: torch.Generator, head_steps: int | None) -> tuple[Tensor, Tensor]:
        """The latent of this step (B, dim), NaN after the end; and frames (B,), less at an end."""
        no_yes = F.pad(self.end(h), (1, 0)).float()  # logits of going on, 0, and of the end
        over = sampling.draw(sampling.apply_guidance(no_yes, guidance), generator, temperature) == 1
        frames = torch.where(over & (frames > step), step, frames)
        z, z_uncond = (h, None) if guidance == 1 else h.chunk(2)
        latent = self.head.sample(z, head_steps, temperature, generator, z_uncond, guidance)
        return torch.where((frames > step)[:, None], latent, math.nan), frames


Model = AudioLM
