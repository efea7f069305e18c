"""Song: from a few words to lyrics, a melody, and a voice that sings it to plucked strings.

    prompt           "a sad slow song about night"
    chain            chord, then word, tone, length of each note, ...           composes
    frames           which phoneme, note and strings belong to each 16 ms
    flow matching    from noise (t=0) to the codec's latents (t=1), all at once  sings

A Transformer chains what can be written down, words and notes, symbol by symbol: about 30 steps. A
second one draws the sound for them. Words and tune may be typed instead; the chain then
composes what is missing. The grammar of a score is not learned: symbols that cannot come next are
never drawn, so a bar always has four eighths. That notes are in the key is learned.

    python -m nanogen train song --data songs
    python -m nanogen sample runs/song-songs --prompt "a happy fast song about the sea"
    python -m nanogen sample runs/song-songs --prompt "a slow song" --lyric "sun moon day night"
    python -m nanogen sample runs/song-songs --tune "0:2 2:2 4:4 7:1 5:1 4:2 0:4" --key 53

Measured (2,200 steps of 16 songs, 58 minutes in bfloat16 on one thread beside other programs; 100
prompts, three sampling seeds): the median note is 7 cents off (recordings: 8), 97 to 98% of the
notes are within 50 cents (97%); 90 to 93% of the words are heard right (93%; once the codec has
copied them, 90%); 99.6 to 100% of the composed notes are in the key. The strings are soft, so the
times lean towards t=1: 0.73 of their energy is on the chord (copies of the codec 0.88, noise 0.25).
All songs have about one voice. The chain stops learning after 0.4 of the training, before it learns
scores by heart: 3 to 4% of the melodies are copies, as of other songs by the same rules (3%). By
then it has not learned that no word stands twice in a row.

Sources: Liu et al. 2021, "DiffSinger" (a network that sings a given score); Le et al. 2023,
"Voicebox" (flow matching with a phoneme for each frame); Yuan et al. 2025, "YuE" (songs from
lyrics). Different here: the score is composed first, as symbols that can be read.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nanogen.blocks import flow_matching as fm
from nanogen.blocks import transformer
from nanogen.blocks.frames import FrameField
from nanogen.blocks.standardize import Standardizer
from nanogen.blocks.text import to_texts
from nanogen.data import songs, utterances
from nanogen.method import Method, Requirement, check, check_numbers

PHONEMES, NOTES, SINCE = len(utterances.SYMBOLS), 128, 64  # SINCE: frames after a pluck
HIDDEN = PHONEMES, NOTES, NOTES, NOTES, NOTES, SINCE  # in these columns: it is not told


@dataclass
class Config:
    width: int = 192  # features of a frame
    depth: int = 6  # blocks
    heads: int = 4  # attention heads of both Transformers
    window: int = 384  # frames of 16 ms that one training step sees of a song: all of them
    score_dropout: float = 0.1  # fraction of songs trained without a score, for guidance
    chain_width: int = 128  # features of a symbol of the score
    chain_depth: int = 3  # blocks of the chain
    chain_dropout: float = 0.2  # on every branch: 2,000 short scores are soon memorised
    chain_end: float = 0.4  # fraction of the training after which the chain stays as it is

    def __post_init__(self):
        check_numbers(self, window=(self.window >= 16, "at least 16"),
                      chain_end=(0 < self.chain_end <= 1, "above 0, at most 1"))
        for name in ("width", "chain_width"):
            even = getattr(self, name) % (2 * self.heads) == 0
            check(self, **{name: (even, "a multiple of 2 * heads")})


class Chain(nn.Module):
    """A causal Transformer over the symbols of a score."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float):
        super().__init__()
        self.embedding, self.head_dim = nn.Embedding(len(songs.VOCABULARY), width), width // heads
        self.always = nn.Parameter(torch.zeros(width))  # no condition: only biases learn
        self.transformer = transformer.Transformer(width, depth, heads, dropout=dropout)
        self.out = transformer.zeroed(nn.Linear(width, len(songs.VOCABULARY)), adamw=True)

    def forward(self, symbols: Tensor) -> Tensor:
        """symbols: int64 (B, S) -> logits of the symbol after each, (B, S, vocabulary)."""
        positions = torch.arange(symbols.shape[1], device=symbols.device)[:, None]
        h = self.transformer(self.embedding(symbols.clamp(min=0)), causal=True,
                             angles=transformer.rotary_angles(positions, self.head_dim),
                             condition=self.always[None].expand(len(symbols), -1))
        return self.out(h).float()

    def loss(self, symbols: Tensor) -> Tensor:
        """Cross-entropy of symbols (B, S), -1 after the last, given theme, mood and tempo."""
        logits = self(symbols[:, :-1])[:, 2:]
        return F.cross_entropy(logits.flatten(0, 1), symbols[:, 3:].flatten(), ignore_index=-1)

    @torch.no_grad()
    def compose(self, begun: list[int], words: list[str], notes: list[tuple[int, int]],
                temperature: float, rng: torch.Generator) -> songs.Song:
        """A song that begins with these symbols: theme, mood, tempo. words: sung in turn, repeated
        if too few; notes: tone and length of each. An empty list: the chain draws them. A bar's
        chord comes before its notes; if they are typed, it is drawn from those that fit."""
        chain, words, left = list(begun), itertools.cycle(words), list(notes)
        while (allowed := songs.possible(chain)).any():
            kind = songs.VOCABULARY[int(allowed.argmax())].split()[0]
            if kind == "word" and (word := next(words, None)):
                chain.append(songs.VOCABULARY.index(f"word {word}"))
            elif kind == "tone" and left:
                tone, length = left.pop(0)
                chain += [songs.VOCABULARY.index(f"tone {tone}"),
                          songs.VOCABULARY.index(f"length {length}")]
            else:
                if kind == "chord" and left:
                    allowed &= songs.fitting(left[0][0], songs.VOCABULARY[begun[1]])
                logits = self(torch.tensor([chain], device=self.always.device))[0, -1].cpu()
                logits[~torch.from_numpy(allowed)] = -torch.inf
                p = (logits / max(temperature, 1e-3)).softmax(0)
                chain.append(int(torch.multinomial(p, 1, generator=rng)))
        return songs.from_symbols(chain)


class Song(Method):
    """A chain that composes, and a velocity field for latents (B, F, dim) on a frozen codec."""

    data, output, encodes, samples_to_judge = "sounds", "waveforms", True, 60
    conditions = {"prompts": "text", "lyrics": "optional text", "tunes": "optional text"}
    columns = ("symbols", "frames")
    times = staticmethod(partial(fm.logit_normal_times, mean=0.5, std=1.3))  # strings are soft

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.freeze(codec=base)
        self.config, dim = config, base.config.dim
        self.latents = Standardizer(dim)
        self.chain = Chain(config.chain_width, config.chain_depth, config.heads,
                           config.chain_dropout)
        self.phonemes, self.notes, self.strings, self.since = (
            nn.Embedding(size + 1, config.width) for size in (PHONEMES, NOTES, NOTES, SINCE))
        self.field = FrameField(dim, dim, config.width, config.depth, config.heads)

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("codec", {}, data="all")

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Songs -> "latents" float32 (N, F, dim), "frames" int64 (N, F, 6), -1 after the end, and
        "symbols" int64 (N, S)."""
        latents = self.codec.latents(batch["waveforms"]).float()
        latents = F.pad(latents, (0, 0, 0, batch["frames"].shape[1] - latents.shape[1]))
        return {"latents": latents, "frames": batch["frames"], "symbols": batch["symbols"]}

    def measure(self, data: dict[str, Tensor]) -> None:
        self.latents.measure(data["latents"][data["frames"][..., 0] >= 0])

    def velocity(self, x_t: Tensor, t: Tensor, frames: Tensor) -> Tensor:
        """x_t: (B, F, dim), t: (B,), frames: int64 (B, F, 6), see `songs.to_frames`, -1 where there
        is no frame, HIDDEN where its score is -> (B, F, dim)."""
        there, frames = frames[..., 0] >= 0, frames.clamp(min=0)
        meaning = self.phonemes(frames[..., 0]) + self.notes(frames[..., 1])
        meaning = meaning + self.strings(frames[..., 2:5]).sum(-2) + self.since(frames[..., 5])
        return self.field(x_t, t, meaning, there)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Flow matching of a part of each song, given its score; and the cross-entropy of the
        score's symbols."""
        frames, config = batch["frames"], self.config
        count, device = len(frames), frames.device
        room = ((frames[..., 0] >= 0).sum(1, keepdim=True) - config.window).clamp(min=0)
        start = (torch.rand(count, 1, device=device) * (room + 1)).long()
        index = start + torch.arange(min(config.window, frames.shape[1]), device=device)
        x1 = self.latents(batch["latents"]).take_along_dim(index[..., None], dim=1)
        frames = frames.take_along_dim(index[..., None], dim=1)
        there = frames[..., 0] >= 0
        hidden = torch.rand(count, 1, 1, device=device) < config.score_dropout
        seen = torch.where(hidden, hide(frames), frames)
        noise, t = torch.randn_like(x1), self.times(count, device)
        x_t = torch.lerp(noise, x1, fm.expand(t, x1))
        error = (self.velocity(x_t, t, seen) - (x1 - noise)).square().mean(-1)
        sing = (error * there).sum() / there.sum()
        compose = self.chain.loss(batch["symbols"])
        if self.progress >= config.chain_end:  # with more steps, scores are learned by heart
            compose = compose.detach()
        return sing + compose, {"sing": sing.detach(), "compose": compose.detach()}

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, steps: int = 16, method: str = "euler",
               guidance: float = 2.0, temperature: float = 1.0, key: int = songs.KEY,
               seed: int = 0) -> dict:
        """Takes "prompts" (B, L), texts; a theme, mood or tempo that they do not name is drawn;
        "lyrics" (B, L), words of one syllable, repeated or cut to the number of notes; "tunes"
        (B, L), such as "0:2 4:2", semitones above the key's root and eighths -> "waveforms" (B, T),
        "lengths", and "thoughts", the scores as text. temperature: of the chain; key: MIDI number
        of the root; steps, method: of the solver."""
        device = conditions["prompts"].device
        if key not in songs.KEYS:
            raise ValueError(f"key must be from {songs.KEYS[0]} to {songs.KEYS[-1]}, got {key}")
        rng, numpy_rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        texts = zip(*(to_texts(conditions[name]) for name in self.conditions), strict=True)
        scores = [self.chain.compose(
            songs.read_prompt(prompt, numpy_rng), songs.read_lyrics(lyrics), songs.read_tune(tune),
            temperature, rng) for prompt, lyrics, tune in texts]
        frames = [torch.from_numpy(songs.to_frames(score, key)) for score in scores]
        lengths = torch.tensor(list(map(len, frames))) * self.codec.hop
        frames = pad_sequence(frames, batch_first=True, padding_value=-1).to(device)
        x0 = torch.randn(*frames.shape[:2], self.codec.config.dim, generator=rng).to(device)
        z = fm.solve(fm.guide(self.velocity, frames, hide(frames), guidance), x0, steps, method)
        waveforms = self.codec.decode_latents(self.latents.inverse(z))
        return {"waveforms": waveforms, "lengths": lengths,
                "thoughts": [songs.to_text(score) for score in scores]}


def hide(frames: Tensor) -> Tensor:
    """The same, with "hidden" in every column of each frame that is there."""
    return torch.where(frames >= 0, torch.tensor(HIDDEN, device=frames.device), frames)


Model = Song
