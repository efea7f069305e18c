"""Speech: digits in any of three languages, in the voice of a clip, and as long as asked.

    voice prompt     "three one" by somebody      -> codec latents, known
    text, language   "4 0 7", german              -> phonemes  f iː r n ʊ l z iː b ən
    durations        one small network            -> so many frames for each phoneme
    flow matching    from noise, over the frames of the text; the prompt's frames are known

    frames     | prompt prompt prompt | f f f iː iː iː iː r r  n n ʊ ʊ ʊ l l  z z iː iː b ən ən |
    latents    | known, from the clip |           drawn, all at once                            |

Each frame of the codec is a vector. A Transformer sees all frames: the noisy latents, the known
ones, and the phoneme of each frame. The phonemes of the prompt are hidden from it, so a prompt
needs no transcript. Explicit durations make the length of the result a condition: dubbing asks for
the length of the original. Two guidances: against no text, and against no voice.

    python -m nanogen train speech --data recordings
    python -m nanogen sample runs/speech-recordings --prompt "three one four" --language german \\
        --voice my.wav --seconds 1.8

Sources: Le et al. 2023, "Voicebox" (infilling by flow matching, with durations); Chen et al. 2024,
"F5-TTS" (prompt and text in one sequence); Zhou et al. 2025, "IndexTTS2" (a given duration);
Ren et al. 2019, "FastSpeech" (a network for durations). Different here: latents of a codec instead
of mel spectrograms and a vocoder; the prompt's text is never needed.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nanogen.blocks import flow_matching as fm
from nanogen.blocks import transformer
from nanogen.blocks.frames import FrameField
from nanogen.blocks.standardize import Standardizer
from nanogen.blocks.text import to_texts
from nanogen.data import utterances
from nanogen.method import Method, Requirement, check, check_numbers

SYMBOLS = len(utterances.SYMBOLS)  # 0: silence
PAUSE = 8  # frames of silence between the prompt and what is said, as in the training recordings
HIDDEN, NULL = SYMBOLS, SYMBOLS + 1  # a frame of the prompt; a frame without a text, for guidance


@dataclass
class Config:
    width: int = 256  # features of a frame
    depth: int = 6  # blocks
    heads: int = 4  # attention heads
    window: int = 192  # frames of 16 ms that one training step sees of a recording: its last ones
    duration_width: int = 96  # features of a phoneme in the network of durations
    duration_depth: int = 2  # its blocks
    text_dropout: float = 0.1  # fraction of recordings trained without text, for guidance
    voice_dropout: float = 0.15  # fraction trained without a voice prompt

    def __post_init__(self):
        check_numbers(self, window=(self.window >= 16, "at least 16"))
        for name in ("width", "duration_width"):
            even = getattr(self, name) % (2 * self.heads) == 0
            check(self, **{name: (even, "a multiple of 2 * heads")})


class Speech(Method):
    """A velocity field for latents (B, F, dim), given phonemes and a voice, on a frozen codec."""

    data, output, encodes = "sounds", "waveforms", True
    conditions = {"prompts": "text", "languages": "class", "voices": "optional sound"}
    columns = ("frames", "durations", "begin", "language")
    times = staticmethod(partial(fm.logit_normal_times, mean=-0.5, std=1.2))

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.freeze(codec=base)
        self.config, width, dim = config, config.width, base.config.dim
        self.latents = Standardizer(dim)
        self.phonemes = nn.Embedding(SYMBOLS + 2, width)
        self.field = FrameField(2 * dim + 1, dim, width, config.depth, config.heads)
        self.durations = Durations(config.duration_width, config.duration_depth, config.heads)

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("codec", {}, data="all")

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Recordings -> "latents" float32 (N, F, dim), "frames" int64 (N, F), the phonemes, -1
        after the end, "durations" (N, P, 2), "begin", the first frame to draw, "language" (N,)."""
        latents = self.codec.latents(batch["waveforms"]).float()
        latents = F.pad(latents, (0, 0, 0, batch["frames"].shape[1] - latents.shape[1]))
        return {"latents": latents, "frames": batch["frames"], "durations": batch["durations"],
                "begin": batch["begin"], "language": batch["language"][:, 1]}

    def measure(self, data: dict[str, Tensor]) -> None:
        self.latents.measure(data["latents"][data["frames"] >= 0])
        symbols, frames = data["durations"].unbind(-1)
        self.durations.pace.copy_(pace_of(symbols, frames.clamp(min=0).sum(1)).mean())

    def velocity(self, x_t: Tensor, t: Tensor, phonemes: Tensor, known: Tensor) -> Tensor:
        """x_t: (B, F, dim), t: (B,), phonemes: int64 (B, F), -1 where there is no frame, known:
        like x_t, NaN where to draw -> (B, F, dim)."""
        is_known = ~known[..., :1].isnan()  # these frames have no noise
        x = torch.cat([x_t * ~is_known, known.nan_to_num(), is_known.to(x_t)], dim=-1)
        return self.field(x, t, self.phonemes(phonemes.clamp(min=0)), phonemes >= 0)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Flow matching of the second part of each recording; the first is the voice prompt. And
        the squared error of the durations' logarithms."""
        config, there = self.config, batch["frames"] >= 0
        count, device = len(there), there.device
        index = there.sum(1, keepdim=True) - config.window  # the last frames of each recording
        index = index + torch.arange(config.window, device=device)  # (B, window)
        x1 = self.latents(batch["latents"]).take_along_dim(index.clamp(min=0)[..., None], dim=1)
        phonemes = batch["frames"].take_along_dim(index.clamp(min=0), dim=1)
        begin = batch["begin"][:, None]
        # The prompt begins anywhere before the second part; in some recordings there is none.
        start = (torch.rand(count, 1, device=device) * begin).long()
        none = torch.rand(count, 1, device=device) < config.voice_dropout
        start = torch.where(none, begin, start)
        prompt, drawn = (index >= start.clamp(min=0)) & (index < begin), index >= begin.clamp(min=0)
        no_text = torch.rand(count, 1, device=device) < config.text_dropout
        seen = torch.where(no_text, NULL, phonemes)
        seen = torch.where(prompt, HIDDEN, torch.where(drawn, seen, -1))
        known = x1.masked_fill(~prompt[..., None], torch.nan)
        noise, t = torch.randn_like(x1), self.times(count, device)
        x_t = torch.lerp(noise, x1, fm.expand(t, x1))
        error = (self.velocity(x_t, t, seen, known) - (x1 - noise)).square().mean(-1)
        draw = (error * drawn).sum() / drawn.sum()
        length = self.durations.loss(batch["durations"], batch["language"])
        return draw + length, {"draw": draw.detach(), "length": length.detach()}

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, steps: int = 16, method: str = "euler",
               guidance: float = 2.0, voice_guidance: float = 1.5, seconds: float = 0.0,
               tempo: float = 1.0, seed: int = 0) -> dict:
        """Takes "prompts" (B, L), digits or their words; "languages" (B,); "voices" (B, T), clips,
        of which silence means any voice -> "waveforms" (B, T) and "lengths". guidance: on the text;
        voice_guidance: on the voice. seconds: how long each is, 0: as is natural for its text,
        divided by tempo. steps and method are those of the solver."""
        voices, languages = conditions["voices"], conditions["languages"]
        texts = [utterances.digits_of(text) for text in to_texts(conditions["prompts"])]
        spelled = [torch.tensor(utterances.spell(text, utterances.LANGUAGES[language]))
                   for text, language in zip(texts, languages.tolist(), strict=True)]
        symbols = pad_sequence(spelled, True, padding_value=-1).to(voices.device)
        counts = self.durations.frames(symbols, languages, seconds * self.codec.frame_rate, tempo)

        prompts = [self.encode_voice(voice, self.config.window - int(row.sum()))
                   for voice, row in zip(voices, counts, strict=True)]
        total = [len(prompt) + int(row.sum()) for prompt, row in zip(prompts, counts, strict=True)]
        known = voices.new_full((len(voices), max(total), self.codec.config.dim), torch.nan)
        seen = torch.full(known.shape[:2], -1, device=voices.device)
        for i, (prompt, row, end) in enumerate(zip(prompts, counts, total, strict=True)):
            known[i, : len(prompt)], seen[i, : len(prompt)] = prompt, HIDDEN
            seen[i, len(prompt) : end] = symbols[i].clamp(min=0).repeat_interleave(row)
        is_known, drawn = ~known.isnan(), seen >= 0
        drawn = drawn & ~is_known[..., 0]
        no_text = torch.where(drawn, NULL, seen)
        no_voice = torch.where(drawn, NULL, -1)
        nothing = torch.full_like(known, torch.nan)

        def field(x: Tensor, t: Tensor) -> Tensor:
            v = self.velocity(torch.cat([x] * 3), torch.cat([t] * 3),
                              torch.cat([seen, no_text, no_voice]),
                              torch.cat([known, known, nothing]))
            both, voice, neither = v.chunk(3)
            return neither + voice_guidance * (voice - neither) + guidance * (both - voice)

        rng = torch.Generator(voices.device).manual_seed(seed)
        x0 = torch.randn(known.shape, generator=rng, device=rng.device)
        z = fm.solve(field, x0, steps, method)
        z = self.latents.inverse(torch.where(is_known, known, z))
        waveforms = self.codec.decode_latents(z)
        begin = torch.tensor([len(prompt) * self.codec.hop for prompt in prompts])
        lengths = torch.tensor(total) * self.codec.hop - begin
        parts = [row[start : start + length] for row, start, length
                 in zip(waveforms, begin.tolist(), lengths.tolist(), strict=True)]
        return {"waveforms": pad_sequence(parts, batch_first=True), "lengths": lengths}

    def encode_voice(self, voice: Tensor, most: int) -> Tensor:
        """A clip (T,), padded with zeros -> latents (F, dim) of its end and a pause; at most `most`
        frames, as training had no longer recordings, but no less than half a second."""
        hop, end = self.codec.hop, int(voice.nonzero().max()) + 1 if voice.any() else 0
        if not end:
            return voice.new_zeros(0, self.codec.config.dim)
        clip = voice[max(0, end - max(32, most - PAUSE) * hop) : end]
        clip = torch.cat([clip, clip.new_zeros(PAUSE * hop)])
        return self.latents(self.codec.latents(clip[None]).float())[0]


def pace_of(symbols: Tensor, frames: Tensor) -> Tensor:
    """How slowly phonemes (B, P), -1: none, are said that take so many frames (B,): the logarithm
    of these, relative to those at ordinary tempo. (B,)."""
    typical = torch.tensor(utterances.TYPICAL, device=symbols.device)[symbols.clamp(min=0)]
    return (frames / (typical * (symbols >= 0)).sum(1)).log()


class Durations(nn.Module):
    """Phonemes, their language and the pace -> the logarithm of each one's number of frames. Slow
    speech stretches vowels more than plosives."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.phonemes, self.head_dim = nn.Embedding(SYMBOLS, width), width // heads
        self.language = nn.Embedding(len(utterances.LANGUAGES), width)
        self.slow = nn.Linear(1, width)
        self.transformer = transformer.Transformer(width, depth, heads)
        self.out = transformer.zeroed(nn.Linear(width, 1), adamw=True)
        self.register_buffer("pace", torch.zeros(()))  # the mean pace of the training recordings

    def forward(self, symbols: Tensor, language: Tensor, pace: Tensor) -> Tensor:
        """symbols: int64 (B, P), -1: none, language, pace: (B,) -> (B, P)."""
        there = symbols >= 0
        positions = torch.arange(symbols.shape[1], device=symbols.device)[:, None]
        h = self.transformer(self.phonemes(symbols.clamp(min=0)),
                             transformer.rotary_angles(positions, self.head_dim),
                             there[:, None, None],
                             condition=self.language(language) + self.slow(pace[:, None]))
        return self.out(h)[..., 0].float() + 2.0  # about 7 frames before training

    def loss(self, durations: Tensor, language: Tensor) -> Tensor:
        """Mean squared error of the logarithms, of durations (B, P, 2): symbol and frames."""
        symbols, frames = durations.unbind(-1)
        there, frames = symbols >= 0, frames.clamp(min=1)
        guess = self(symbols, language, pace_of(symbols, (frames * there).sum(1)))
        return ((guess - frames.log()).square() * there).sum() / there.sum()

    def frames(self, symbols: Tensor, language: Tensor, total: float, tempo: float) -> Tensor:
        """Numbers of frames (B, P), which add up to `total` each. 0: as is natural for the text."""
        there = symbols >= 0
        typical = torch.ones(len(symbols), device=symbols.device)
        wanted = total * typical if total else (self.pace - pace_of(symbols, typical)).exp() / tempo
        least = there.sum(1)
        if (wanted.round() < least).any():
            raise ValueError(f"{int(least.max())} phonemes need at least {int(least.max())} frames "
                             "of 16 ms: give more seconds, or a lower tempo")
        guess = self(symbols, language, pace_of(symbols, wanted)).exp() * there
        ends = (guess.cumsum(1) * (wanted.round() / guess.sum(1))[:, None]).round().long()
        ends[:, 0] = ends[:, 0].clamp(min=1)
        for i in range(1, ends.shape[1]):  # at least a frame for each
            ends[:, i] = torch.maximum(ends[:, i], ends[:, i - 1] + there[:, i])
        ends[:, -1] = wanted.round()
        for i in reversed(range(ends.shape[1] - 1)):
            ends[:, i] = torch.minimum(ends[:, i], ends[:, i + 1] - there[:, i + 1].long())
        return torch.diff(ends, dim=1, prepend=torch.zeros_like(ends[:, :1]))


Model = Speech
