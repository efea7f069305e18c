"""Audio LM: a language model whose words are stretches of sound, sixteen thousandths of a second long.

The codec turns a clip into frames, 62.5 a second, and each frame into K words, one from each of its books. So there are two
axes to chain, and the patterns differ in which word waits for which (here 4 frames f of 3 books k; the number is the step):

    flat         parallel      delay
    0 3 6  9     0 1 2 3       0 1 2 3          flat      nothing is assumed: F x K steps
    1 4 7 10     0 1 2 3       1 2 3 4          parallel  the books of a frame are taken as independent: F steps
    2 5 8 11     0 1 2 3       2 3 4 5          delay     book k one step after book k - 1: F + K - 1 steps

One network serves all three: a causal Transformer over steps that hears the words of the step before and answers with a choice
for each book. As on the image track there is a continuous rival: the codec's latents, before its quantizer, one vector a frame.
A flow head draws the vector in many cheap rounds ("flow"); squared error answers with the average of all that is plausible
("mse"): hear the trap. A clip ends where the model says so: with the word "nothing" in book 0, or a yes-or-no beside the vector.

    python -m nanogen train audio_lm --data fsdd --minutes 4 --pattern delay

Sources: Borsos et al. 2023, "AudioLM" (codec tokens as a language); Copet et al. 2023, "MusicGen" (the patterns); Li et al. 2024,
"MAR" (a generation head for vectors). Different here: digit and speaker enter through AdaLN in every layer; END is part of
book 0's vocabulary; word vectors are functions of the codec's codes; dropout, because FSDD is 20 minutes of sound.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.heads import make_head
from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import (
    Cache,
    ConditionEmbedding,
    Transformer,
    WordVectors,
    drop_labels,
    grid_positions,
    rotary_angles,
)

PATTERNS = ("flat", "parallel", "delay", "latents")


@dataclass
class Config:
    pattern: str = "delay"  # order of the chain: flat, parallel or delay (of words), or latents (one vector a frame)
    books: int = 4  # of the codec's books, the first so many; 0.5 kbit/s each
    head: str = "flow"  # latents: generation head, flow or mse (or diffusion)
    head_width: int = 192  # features inside the generation head
    head_depth: int = 2  # its layers
    head_repeat: int = 4  # noises for each vector of a training batch
    width: int = 192  # features per step
    depth: int = 6  # blocks
    heads: int = 3  # attention heads
    dropout: float = 0.2  # on every residual branch: 2,700 short clips are soon known by heart
    label_dropout: float = 0.1  # share of training clips whose label and speaker are hidden, for guidance
    seconds: float = 0.8  # longest clip; longer ones are cut
    classes: int = 10  # number of labels
    speakers: int = 6  # number of voices


def stands_on(config: Config) -> tuple[str, dict]:
    """The chapter underneath, and what it must be: fields of its Config."""
    return "codec", {}


# --- The patterns


def pattern_steps(pattern: str, frames: int, books: int) -> Tensor:
    """The step at which each word is drawn: int64 (frames, books)."""
    frame, book = torch.arange(frames)[:, None], torch.arange(books)
    if pattern == "flat":
        return frame * books + book
    return frame + (book if pattern == "delay" else 0 * book)


def count_steps(pattern: str, frames: int, books: int) -> int:  # the last of them, plus one; known without a tensor
    return {"flat": frames * books, "parallel": frames, "delay": frames + books - 1}[pattern]


def to_pattern(tokens: Tensor, pattern: str, nothing: int) -> Tensor:
    """Words (B, frames, K) -> by step, (B, steps, K), `nothing` where a step has no word for a book."""
    batch, frames, books = tokens.shape
    steps = pattern_steps(pattern, frames, books).to(tokens.device)
    grid = tokens.new_full((batch, count_steps(pattern, frames, books), books), nothing)
    grid[:, steps, torch.arange(books, device=tokens.device)] = tokens
    return grid


def from_pattern(grid: Tensor, pattern: str, frames: int) -> Tensor:
    """The way back: (B, steps, K) -> (B, frames, K)."""
    books = grid.shape[2]
    return grid[:, pattern_steps(pattern, frames, books).to(grid.device), torch.arange(books, device=grid.device)]


class AudioLM(nn.Module):
    """A causal Transformer over the steps of a pattern. `codec` is frozen, and no part of the saved weights."""

    def __init__(self, config: Config, codec: nn.Module):
        super().__init__()
        check(config, codec)
        self.config, self.continuous = config, config.pattern == "latents"
        self.codec = [codec]  # in a list: not a sub-module
        self.frames = math.ceil(config.seconds * codec.frame_rate)  # of the longest clip
        self.vocabulary = self.nothing = codec.vocabulary  # the extra word: none before the start, in a gap or after the end
        width = config.width
        self.label = ConditionEmbedding(config.classes, width)
        self.speaker = ConditionEmbedding(config.speakers, width)
        self.transformer = Transformer(width, config.depth, config.heads, dropout=config.dropout)
        if self.continuous:
            steps = torch.arange(self.frames)[:, None]
            dim = codec.latents(torch.zeros(1, codec.hop, device=codec.codes()[0].device)).shape[-1]
            self.register_buffer("latent_mean", torch.zeros(dim))  # until `measure`
            self.register_buffer("latent_std", torch.ones(dim))
            self.embedding = nn.Linear(dim, width)
            self.start = nn.Parameter(0.2 * torch.randn(width))  # stands before the first vector
            self.head = make_head(config.head, dim, width, config.head_width, config.head_depth, config.head_repeat)
            self.end = nn.Linear(width, 1)  # log-odds that the clip is over before this frame
            self.end.adamw = True
        else:
            steps = pattern_steps(config.pattern, self.frames, config.books)
            codes = codec.codes()[: config.books]
            self.embeddings = nn.ModuleList(WordVectors(code, width, extra=1) for code in codes)
            self.outputs = nn.ModuleList(WordVectors(code, width, extra=1, zero=True) for code in codes)
            impossible = torch.zeros(config.books, self.vocabulary + 1)
            impossible[1:, self.nothing] = -1e9  # only book 0 may end a clip
            self.register_buffer("impossible", impossible, persistent=False)
        self.register_buffer("steps", steps, persistent=False)  # (F, K), or (F, 1)
        sizes = (self.frames, config.books) if config.pattern == "flat" else (int(steps.max()) + 1,)
        self.register_buffer("angles", rotary_angles(grid_positions(*sizes), width // config.heads), persistent=False)

    def prepare(self, waveforms: Tensor, lengths: Tensor, labels: Tensor, speakers: Tensor) -> dict[str, Tensor]:
        """Encode clips (B, T), whose lengths in samples are (B,), once: "tokens" int16 (B, F, K), -1 after the end, or
        "latents" float32 (B, F, dim), not a number there; "frames" (B,). F is that of the longest clip allowed."""
        codec, missing = self.codec[0], math.nan if self.continuous else -1
        units = codec.latents(waveforms).float() if self.continuous else codec.encode(waveforms, self.config.books).short()
        units = F.pad(units, (0, 0, 0, self.frames - units.shape[1]), value=missing)  # a negative padding cuts
        frames = (-(-lengths // codec.hop)).clamp(max=self.frames)
        units = units.masked_fill(self.after(frames, 0)[..., None], missing)
        return {"latents" if self.continuous else "tokens": units, "frames": frames, "labels": labels, "speakers": speakers}

    def measure(self, latents: Tensor) -> None:
        """Remember mean and std of each channel of latents (N, F, dim): network and head see them as N(0, 1)."""
        known = latents[~latents.isnan().any(-1)]
        self.latent_mean.copy_(known.mean(0))
        self.latent_std.copy_(known.std(0))

    def after(self, frames: Tensor, margin: int) -> Tensor:
        """Which places lie `margin` or more frames after the end of clips of so many frames (B,): bool (B, F)."""
        return torch.arange(self.frames, device=frames.device) >= frames[:, None] + margin

    # --- The network

    def words(self) -> tuple[Tensor, Tensor] | None:
        """The tables of the words' vectors, in and out, (K, vocabulary + 1, width) each: a sampler needs them only once."""
        if self.continuous:
            return None
        return torch.stack([table() for table in self.embeddings]), torch.stack([table() for table in self.outputs])

    def embed(self, units: Tensor, words: tuple[Tensor, Tensor] | None) -> Tensor:
        """What stood at the step before, (B, S, width): words (B, S, K) or normalised vectors (B, S, dim), NaN for none."""
        if self.continuous:
            return torch.where(units.isnan()[..., :1], self.start, self.embedding(units.nan_to_num()))
        return sum(F.embedding(units[..., k], table) for k, table in enumerate(words[0]))

    def directions(self, units: Tensor, labels: Tensor, speakers: Tensor, words: tuple[Tensor, Tensor] | None) -> Tensor:
        """All steps at once: units by step, as for `embed` -> what the Transformer says for each step, (B, S, width)."""
        inputs = F.pad(units[:, :-1], (0, 0, 1, 0), value=math.nan if self.continuous else self.nothing)
        condition = self.label(labels) + self.speaker(speakers)
        return self.transformer(self.embed(inputs, words), self.angles, causal=True, condition=condition)

    def logits(self, tokens: Tensor, labels: Tensor, speakers: Tensor) -> Tensor:
        """Words (B, F, K), -1 after the end -> logits of each, given those of earlier steps: (B, F, K, vocabulary + 1)."""
        words = self.words()
        grid = to_pattern(torch.where(tokens < 0, self.nothing, tokens), self.config.pattern, self.nothing)
        h = self.directions(grid, labels, speakers, words)
        h = h.index_select(1, self.steps.flatten()).unflatten(1, self.steps.shape)  # (B, F, K, width)
        return torch.einsum("bfkw,kvw->bfkv", h, words[1].to(h.dtype)).float() + self.impossible

    def token_nats(self, tokens: Tensor, frames: Tensor, labels: Tensor, speakers: Tensor) -> tuple[Tensor, Tensor]:
        """The cost of each word in nats (B, F, K), and which of them count: those of the clip and the end, in book 0.

        The end has a place unless the clip fills all frames: then it may have been cut.
        """
        tokens = tokens.long()
        ends = F.pad((self.after(frames, 0) & ~self.after(frames, 1))[..., None], (0, self.config.books - 1))  # (B, F, K)
        targets = torch.where(ends, self.nothing, tokens)
        logits = self.logits(tokens, labels, speakers)
        nats = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-1, reduction="none")
        return nats.view(targets.shape), targets >= 0

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: as from `prepare`. Words: nats per word, chance is log(vocabulary). Latents: the loss of the head, and nats of
        the question whether the clip is over."""
        config, frames = self.config, batch["frames"]
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        speakers = torch.where(labels == config.classes, config.speakers, batch["speakers"])  # both or none
        if self.continuous:
            return self.latent_loss(batch["latents"], frames, labels, speakers)
        nats, scored = self.token_nats(batch["tokens"], frames, labels, speakers)
        by_book = (nats * scored).sum((0, 1)) / scored.sum((0, 1))
        return (nats * scored).sum() / scored.sum(), {"book_0": by_book[0].detach(), "last_book": by_book[-1].detach()}

    def latent_loss(self, latents: Tensor, frames: Tensor, labels: Tensor, speakers: Tensor) -> tuple[Tensor, dict]:
        x = (latents - self.latent_mean) / self.latent_std
        z = self.directions(x, labels, speakers, None)
        over = self.after(frames, 0)
        asked = (~self.after(frames, 1)).float()  # the question ends with the first yes
        nats = F.binary_cross_entropy_with_logits(self.end(z)[..., 0].float(), over.float(), reduction="none")
        end = (nats * asked).sum() / asked.sum()
        # The head learns from frames that exist. Compiled code likes a number that never changes: half of all places. The frames
        # fill them in random order, and if there are too few, once more from the beginning.
        order = (over.flatten() + torch.rand(over.numel(), device=over.device)).argsort()
        index = order[torch.arange((over.numel() + 1) // 2, device=over.device) % (~over).sum()]
        head = self.head.loss(x.flatten(0, 1)[index], z.flatten(0, 1)[index])
        return head + end, {"head": head.detach(), "end": end.detach()}

    # --- Sampling

    @torch.no_grad()
    def generate(self, labels: Tensor, speakers: Tensor, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0,
                 top_k: int = 0, top_p: float = 1.0, head_steps: int | None = None, cached: bool = True) -> tuple[Tensor, Tensor]:
        """(words (B, F, K), -1 after the end, or normalised vectors (B, F, dim), not a number there; frames (B,)).
        Arguments: see `sample`."""
        config, batch, device = self.config, len(labels), labels.device
        generator = torch.Generator(device).manual_seed(seed)
        labels = with_and_without(labels, config.classes, guidance)
        speakers = with_and_without(speakers, config.speakers, guidance)
        words, modulation = self.words(), self.transformer.modulate(self.label(labels) + self.speaker(speakers))
        count = len(self.angles)
        cache = Cache(self.transformer, len(labels), count, modulation.dtype) if cached else None
        blank = torch.full((len(self.latent_mean),), math.nan) if self.continuous else torch.full((config.books,), self.nothing)
        units = blank.to(device).repeat(batch, count + 1, 1)  # the first column stands before the first step
        frames = torch.full((batch,), self.frames, device=device)  # until a clip has ended
        due = [[] for _ in range(count)]  # (book, frame) of the words of each step
        for book, row in enumerate(self.steps.T.tolist()):
            for frame, step in enumerate(row):
                due[step].append((book, frame))
        whole = self.steps[:, -1].tolist()  # the step at which each frame has its last word
        for step in range(count):
            past = slice(step if cached else 0, step + 1)
            x = self.embed(units[:, past].repeat(len(labels) // batch, 1, 1), words)
            h = self.transformer(x, self.angles[past], causal=not cached, modulation=modulation, cache=cache)[:, -1]
            if self.continuous:
                odds = apply_guidance(F.pad(self.end(h), (1, 0)).float(), guidance)  # of going on, 0, and of the end
                frames = torch.where(draw(odds, generator, temperature).bool() & (frames > step), step, frames)
                z, z_uncond = (h, None) if guidance == 1 else h.chunk(2)
                vector = self.head.sample(z, head_steps, temperature, generator, z_uncond, guidance)
                units[:, step + 1] = torch.where((frames > step)[:, None], vector, math.nan)
            else:
                for book, frame in due[step]:
                    logits = apply_guidance((h @ words[1][book].to(h.dtype).mT).float(), guidance) + self.impossible[book]
                    word = draw(logits, generator, temperature, top_k, top_p)
                    frames = torch.where((word == self.nothing) & (frames > frame), frame, frames)
                    units[:, step + 1, book] = torch.where(frames > frame, word, self.nothing)
            longest = int(frames.max())
            if longest == 0 or step >= whole[longest - 1]:
                break
        units = units[:, 1:]
        if self.continuous:
            return units, frames
        tokens = from_pattern(units, config.pattern, self.frames)
        return tokens.masked_fill(tokens == self.nothing, -1), frames

    def to_waveforms(self, units: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What `generate` gave -> (waveforms (B, T), 0 after the end, lengths (B,) in samples)."""
        codec, lengths = self.codec[0], frames * self.codec[0].hop
        units = units[:, : max(int(frames.max()), 1)]
        if self.continuous:
            waveforms = codec.decode_latents(units.nan_to_num() * self.latent_std + self.latent_mean)
        else:
            waveforms = codec.decode(units.clamp(min=0).long())
        there = torch.arange(waveforms.shape[1], device=lengths.device) < lengths[:, None]
        return waveforms.masked_fill(~there, 0.0), lengths

    @torch.no_grad()
    def sample(self, labels: Tensor, speakers: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0,
               seed: int = 0, top_k: int = 0, top_p: float = 1.0, head_steps: int | None = None,
               cached: bool = True) -> tuple[Tensor, Tensor]:
        """Clips of these labels by these speakers, (B,) each: (waveforms (B, T) in [-1, 1], lengths (B,) in samples).

        The pattern says how many steps there are; `steps` may only say the same. A clip stops at its own END, at the latest
        after `seconds` of the Config. top_k, top_p: of words; head_steps: of the head, for latents.
        cached=False recomputes the past at every step, to show what the cache saves.
        """
        if steps not in (None, 0, len(self.angles)):
            raise ValueError(f"the pattern {self.config.pattern} has {len(self.angles)} steps; steps cannot be {steps}")
        units, frames = self.generate(labels, speakers, guidance, temperature, seed, top_k, top_p, head_steps, cached)
        return self.to_waveforms(units, frames)


def check(config: Config, codec: nn.Module) -> None:
    """Refuse, by name, what does not exist or does not go together."""
    if config.pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {config.pattern!r}")
    if not 1 <= config.books <= codec.books:
        raise ValueError(f"books must be from 1 to the codec's {codec.books}, got {config.books}")
    if config.seconds <= 0:
        raise ValueError(f"seconds must be more than 0, got {config.seconds}")


Model = AudioLM
