"""Wave AR: sound as the plainest of chains. A recording is a list of numbers; predict the next one, 8,000 times a second.

    p(clip) = p(s1) p(s2 | s1) p(s3 | s1, s2) ... p(END | all of it)

Loudness is heard as a ratio, so a sample is coded in 8 bits on a logarithmic scale (mu-law), and every factor is a choice among
256. The likelihood is exact: in bits per sample it says how far a perfect compressor built on this model would get, and can be
compared with counting (`entropy_baselines`). The network looks back through a stack of layers that mix two moments each, d
samples apart, with d = 1, 2, 4, ... 512: ten cheap layers see 1,024 samples, 128 ms. To sample, each layer keeps its
last d inputs in a ring, so that a new sample costs one column of the network, not 1,024.

Beautiful and slow: 4,000 steps for half a second, and 128 ms is less than a vowel: sounds like speech, says little. That
is why the next chapters invent the codec and chain its tokens, 62.5 frames a second.

    python -m nanogen train wave_ar --data fsdd --minutes 3

Sources: van den Oord et al. 2016, "WaveNet" (dilated causal convolutions, gates, 256-way mu-law); Paine et al. 2016, "Fast
WaveNet" (the rings); ITU-T G.711 (mu-law). Different here: one stack of ten layers, not three; the residual sum feeds the head
directly, in place of separate skip connections; an END word, so that clips have a length of their own; the mu-law scale is
symmetric about an exact 0, which leaves one of the 256 words unused; guidance.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import ConditionEmbedding, WordVectors, drop_labels, norm
from nanogen.data.folders import SAMPLE_RATE as RATE

MU = 255  # of mu-law: how strongly quiet samples are favoured
SILENCE = 128  # the code of 0
BOUNDARY = 256  # a word beside the 256 samples: going in "nothing before", coming out "the clip has ended"


@dataclass
class Config:
    width: int = 80  # features per sample
    layers: int = 10  # layer i mixes samples 2^i apart: 2^layers samples are seen
    crop: int = 4096  # samples of a clip per training step
    seconds: float = 1.0  # longest clip; longer ones are cut
    label_dropout: float = 0.1  # share of training clips whose label and speaker are hidden, for guidance
    classes: int = 10  # number of labels
    speakers: int = 6  # number of voices


class WaveAR(nn.Module):
    """A causal network over samples, conditioned on what is said and by whom."""

    def __init__(self, config: Config):
        super().__init__()
        if config.layers < 1:
            raise ValueError(f"layers must be at least 1, got {config.layers}")
        if config.crop < 2**config.layers:
            raise ValueError(f"crop must be at least the 2^layers = {2**config.layers} samples that are seen, got {config.crop}")
        self.config, self.receptive_field = config, 2**config.layers
        codes = code_features()
        self.embedding = WordVectors(codes, config.width, extra=1)
        self.label = ConditionEmbedding(config.classes, config.width)
        self.speaker = ConditionEmbedding(config.speakers, config.width)
        self.modulation = nn.Linear(config.width, config.layers * 2 * config.width)
        self.modulation.adamw = True  # its rows are many small vectors, not one map
        self.layers = nn.ModuleList(Layer(config.width, 2**i) for i in range(config.layers))
        self.mix = nn.Linear(config.width, config.width)
        self.head = WordVectors(codes, config.width, extra=1, zero=True)  # the first guess is uniform: loss = log(257)

    def prepare(self, waveforms: Tensor, lengths: Tensor, labels: Tensor, speakers: Tensor) -> dict[str, Tensor]:
        """Clips (B, T) in [-1, 1], their lengths in samples, labels and speakers (B,) -> what `loss` wants."""
        return {"codes": mu_law_encode(waveforms), "lengths": lengths, "labels": labels, "speakers": speakers}

    # --- The network

    def biases(self, labels: Tensor, speakers: Tensor) -> tuple[Tensor, ...]:
        """What label and speaker, (B,) each, tell each layer: (B, 2 width) for each."""
        return self.modulation(self.label(labels) + self.speaker(speakers)).chunk(self.config.layers, dim=-1)

    def logits(self, previous: Tensor, labels: Tensor, speakers: Tensor) -> Tensor:
        """previous: (B, T), the word before each place -> logits of the word at each place: (B, T, 257)."""
        x = F.embedding(previous, self.embedding())  # (B, T, width)
        for layer, bias in zip(self.layers, self.biases(labels, speakers), strict=True):
            past = F.pad(x, (0, 0, layer.dilation, 0))[:, : x.shape[1]]  # before the clip there is nothing: 0
            x = layer(x, past, bias[:, None])
        return self.answer(x, self.head())

    def answer(self, x: Tensor, table: Tensor) -> Tensor:
        """Features (..., width) and the head's table -> logits (..., 257)."""
        return (F.gelu(self.mix(norm(x))) @ table.mT).float()

    def window(self, codes: Tensor, lengths: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The words of `count` places of each clip from `start` (B,) on: (those before them, themselves, which to score).

        The word at place `length` is BOUNDARY. It is scored only inside the tensor: a clip that fills its row may have been
        cut. Nor are places whose past is cut off by the window.
        """
        offsets = torch.arange(count, device=codes.device)
        place = start[:, None] + offsets  # (B, count)
        words = codes.long().gather(1, place.clamp(max=codes.shape[1] - 1))
        before = codes.long().gather(1, (place - 1).clamp(0, codes.shape[1] - 1))
        words = torch.where(place == lengths[:, None], BOUNDARY, words)
        before = torch.where(place == 0, BOUNDARY, before)
        whole = (offsets >= self.receptive_field - 1) | (start[:, None] == 0)
        return before, words, whole & (place <= lengths[:, None]) & (place < codes.shape[1])

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: as from `prepare`. Nats per sample of a random window of each clip; chance is log 257 = 8 bits."""
        config, lengths = self.config, batch["lengths"]
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        speakers = torch.where(labels == config.classes, config.speakers, batch["speakers"])  # both or none
        # Windows may begin before the clip, and are then moved to its beginning: else that would hardly ever be scored.
        # The last one ends with the END, the word at place `length`.
        room = (lengths + 2 - config.crop + self.receptive_field).clamp(min=1)
        start = ((torch.rand(len(lengths), device=lengths.device) * room).long() - self.receptive_field).clamp(min=0)
        before, words, scored = self.window(batch["codes"], lengths, start, config.crop)
        nats = F.cross_entropy(self.logits(before, labels, speakers).flatten(0, 1), words.flatten(), reduction="none")
        nats = (nats * scored.flatten()).sum() / scored.sum()
        return nats, {"bits_per_sample": nats.detach() / math.log(2)}

    def log_likelihood(self, codes: Tensor, lengths: Tensor, labels: Tensor, speakers: Tensor) -> Tensor:
        """Exact log p(clip | label, speaker) in nats, (B,), of whole clips: codes uint8 (B, T), the others (B,).

        It includes the END where there is room for it (length < T): about 13 bits a clip, 0.004 per sample.
        """
        before, words, scored = self.window(codes, lengths, torch.zeros_like(lengths), codes.shape[1])
        nats = F.cross_entropy(self.logits(before, labels, speakers).flatten(0, 1), words.flatten(), reduction="none")
        return -(nats.view(words.shape) * scored).sum(1)

    # --- Sampling

    def rings(self, batch: int) -> list[Tensor]:
        """The last `dilation` inputs of each layer, (dilation, B, width): at first 0, as before a clip."""
        return [self.mix.weight.new_zeros(layer.dilation, batch, self.config.width) for layer in self.layers]

    def step(self, previous: Tensor, place: int, rings: list[Tensor], biases, tables: tuple[Tensor, Tensor]) -> Tensor:
        """previous: (B,), the word before `place` -> logits of the word there, (B, 257). Writes into the rings."""
        x = F.embedding(previous, tables[0])
        for layer, ring, bias in zip(self.layers, rings, biases, strict=True):
            slot = ring[place % layer.dilation]  # written `dilation` samples ago
            after = layer(x, slot, bias)
            slot.copy_(x)
            x = after
        return self.answer(x, tables[1])

    @torch.no_grad()
    def sample(self, labels: Tensor, speakers: Tensor, steps: int | None = None, guidance: float = 1.0, temperature: float = 1.0,
               seed: int = 0, seconds: float | None = None, top_k: int = 0, top_p: float = 1.0,
               cached: bool = True) -> tuple[Tensor, Tensor]:
        """Clips of these labels by these speakers, (B,) each: (waveforms (B, T) in [-1, 1], lengths (B,) in samples).

        A clip ends with its END, at the latest after `seconds`, those of the Config unless told; what follows is 0. One step
        per sample: `steps` is another way to give the longest length. cached=False computes the receptive field anew for
        every sample. The others: `blocks/sampling.py`. Raises ValueError where no sample is asked for.
        """
        count, batch = steps or round((self.config.seconds if seconds is None else seconds) * RATE), len(labels)
        if count < 1:
            raise ValueError(f"steps must be at least 1 sample, got {count}")
        generator = torch.Generator(labels.device).manual_seed(seed)
        labels = with_and_without(labels, self.config.classes, guidance)
        speakers = with_and_without(speakers, self.config.speakers, guidance)
        biases, rings = self.biases(labels, speakers), self.rings(len(labels))
        tables = self.embedding(), self.head()
        words = torch.full((batch, count + 1), BOUNDARY, device=labels.device)  # the first one stands before the clip
        alive, lengths = torch.ones_like(words[:, 0], dtype=torch.bool), torch.zeros_like(words[:, 0])
        for place in range(count):
            if cached:
                logits = self.step(words[:, place].repeat(len(labels) // batch), place, rings, biases, tables)
            else:
                seen = words[:, max(place + 1 - self.receptive_field, 0) : place + 1]
                logits = self.logits(seen.repeat(len(labels) // batch, 1), labels, speakers)[:, -1]
            word = draw(apply_guidance(logits, guidance), generator, temperature, top_k, top_p)
            alive = alive & (word != BOUNDARY)
            lengths += alive
            words[:, place + 1] = word
            if place % 64 == 0 and not alive.any():  # to ask costs a GPU a halt
                break
        words = words[:, 1 : max(int(lengths.max()), 1) + 1]
        words = torch.where(torch.arange(words.shape[1], device=words.device) < lengths[:, None], words, SILENCE)
        return mu_law_decode(words), lengths


class Layer(nn.Module):
    """Mixes two moments, `dilation` samples apart: a causal convolution with a kernel of 2, written as a matrix so that a
    whole clip and a single sample are computed by the same line."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.inp = nn.Linear(2 * width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Tensor, bias: Tensor) -> Tensor:
        """x, past: (..., width), now and `dilation` samples ago; bias: (..., 2 width), the condition -> (..., width)."""
        value, gate = (self.inp(torch.cat([past, x], dim=-1)) + bias).chunk(2, dim=-1)
        return x + self.out(value.tanh() * gate.sigmoid())


# --- Samples as words


def mu_law_encode(waveforms: Tensor) -> Tensor:
    """Samples (...) in [-1, 1] -> uint8 codes (...): 1 to 255, SILENCE for 0. Louder ones are clipped.

    ln(1 + 255 |x|) / ln 256 in steps of 1/127: the error is at most 2.3% of the sample, or 1e-4 for the quietest.
    """
    x = waveforms.float().clamp(-1, 1)
    return (x.sign() * torch.log1p(MU * x.abs()) / math.log1p(MU) * 127).round().add(SILENCE).byte()


def mu_law_decode(codes: Tensor) -> Tensor:
    """Codes 0 to 255 (...) -> samples (...) in [-1, 1]; 0, which `mu_law_encode` never gives, is as 1."""
    y = ((codes.float() - SILENCE) / 127).clamp(min=-1)
    return y.sign() * torch.expm1(y.abs() * math.log1p(MU)) / MU


def code_features(waves: int = 24) -> Tensor:
    """What a code looks like, (256, waves): cosines over the scale, coarse to fine, so that neighbours look alike."""
    return torch.cos((torch.arange(256)[:, None] + 0.5) * torch.arange(1, waves + 1) * (math.pi / 256))


# --- What counting achieves


def entropy_baselines(train: list[Tensor], test: list[Tensor], order: int = 16) -> dict[str, float]:
    """Bits per sample that compressors without a network need for the clips in `test`, having counted those in `train`.

    Lists of uint8 codes, each (T,). Each compressor counts how often each code follows a context, and codes with the counts:
        order_0            no context: how common the code is
        order_1            the code before
        linear_prediction  the code of sum a_i x_(t-i), i = 1 ... `order`, the a_i by least squares on `train`
    """

    def past(clip: Tensor) -> Tensor:  # (T,) -> the samples before each place, (T, order)
        return F.pad(mu_law_decode(clip), (order, 0)).unfold(0, order, 1)[:-1]

    products = sum(past(clip).T @ torch.cat([past(clip), mu_law_decode(clip)[:, None]], dim=1) for clip in train)
    weights = torch.linalg.lstsq(products[:, :-1].double(), products[:, -1:].double()).solution.float()
    contexts = {
        "order_0": lambda clip: torch.zeros_like(clip),
        "order_1": lambda clip: F.pad(clip[:-1], (1, 0), value=SILENCE),
        "linear_prediction": lambda clip: mu_law_encode((past(clip) @ weights)[:, 0]),
    }
    return {name: counted_bits([(torch.cat([context(clip) for clip in clips]).long(), torch.cat(clips).long())
                                for clips in (train, test)]) for name, context in contexts.items()}


def counted_bits(parts: list[tuple[Tensor, Tensor]]) -> float:
    """Bits per code of the second part, by the counts of the first: [(contexts (N,), codes (N,)), the same for the test].

    What was never seen must not cost infinitely much, so each context counts 256 codes more, distributed as all codes are,
    and among those each code once.
    """
    (context, code), (test_context, test_code) = parts
    counts = torch.bincount(256 * context + code, minlength=256 * 256).view(256, 256).double()
    common = (counts.sum(0) + 1) / (len(code) + 256)
    shares = (counts + 256 * common) / (counts.sum(1, keepdim=True) + 256)
    return -shares[test_context, test_code].log2().mean().item()


Model = WaveAR
