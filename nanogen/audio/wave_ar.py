"""Wave AR: predict each sample of a waveform from those before it, 8,000 times a second.

    p(clip) = p(s1) p(s2 | s1) p(s3 | s1, s2) ... p(END | all of it)

We hear loudness as a ratio, so a sample is coded in 8 bits on a logarithmic scale (mu-law), and
every factor is a choice among 256 codes. The likelihood is exact: in bits per sample, it is what a
perfect compressor with this model needs. `entropy_baselines` gives it for simple counting.

Each layer of the network mixes two moments, d samples apart. With d = 1, 2, 4, ... 512 ten layers
see 1,024 samples, or 128 ms: less than a vowel, so the result sounds like speech but says little.
In sampling, a ring buffer in each layer keeps its last d inputs, so that nothing is computed twice.

    python -m nanogen train wave_ar --data fsdd

Sources: van den Oord et al. 2016, "WaveNet" (dilated causal convolutions, gates, 256-way mu-law);
Paine et al. 2016, "Fast WaveNet" (the ring buffers); ITU-T G.711 (mu-law). Different here: one
stack of ten layers, not three; no skip connections; an END symbol, so clips differ in length;
guidance; the mu-law scale is symmetric about an exact 0, which leaves one of 256 codes unused.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.sampling import apply_guidance, draw, with_and_without
from nanogen.blocks.transformer import CodeEmbedding, ConditionEmbedding, drop_labels, norm
from nanogen.data.sources import SAMPLE_RATE as RATE
from nanogen.method import Method, check_numbers

MU = 255  # of mu-law: how strongly quiet samples are favoured
SILENCE = 128  # the code of 0
BOUNDARY = 256  # one symbol more than the codes: START as an input, END as an output


@dataclass
class Config:
    width: int = 80  # features per sample
    layers: int = 10  # layer i mixes samples 2^i apart: 2^layers samples are seen
    crop: int = 4096  # samples of a clip per training step
    seconds: float = 1.0  # longest clip; longer ones are cut
    label_dropout: float = 0.1  # fraction of clips with label and speaker hidden, for guidance
    classes: int = 10  # number of labels
    speakers: int = 6  # number of voices

    def __post_init__(self):
        seen = 2**self.layers
        check_numbers(self, seconds=(self.seconds * RATE >= 1, "at least one sample"),
                      crop=(self.crop >= seen, f"at least 2^layers = {seen} samples"))


class WaveAR(Method):
    """A causal network over samples, conditioned on the label and the speaker."""

    data, output, samples_to_judge = "sounds", "waveforms", 300
    conditions = {"labels": "class", "speakers": "class"}
    encodes = exact_likelihood = True

    def __init__(self, config: Config, base: nn.Module | None = None):
        super().__init__()
        self.config, self.receptive_field = config, 2**config.layers
        # A code is described by 24 cosines over the scale, from slow to fast: near codes are alike.
        codes = torch.cos((torch.arange(256)[:, None] + 0.5) * torch.arange(1, 25) * math.pi / 256)
        self.embedding = CodeEmbedding(codes, config.width, extra=1)
        self.label = ConditionEmbedding(config.classes, config.width)
        self.speaker = ConditionEmbedding(config.speakers, config.width)
        self.modulation = nn.Linear(config.width, config.layers * 2 * config.width)
        self.modulation.adamw = True  # its rows are many small vectors, not one map
        self.layers = nn.ModuleList(Layer(config.width, 2**i) for i in range(config.layers))
        self.mix = nn.Linear(config.width, config.width)
        self.head = CodeEmbedding(codes, config.width, extra=1, zero=True)  # uniform at first

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """"waveforms" (B, T) in [-1, 1] -> "codes" uint8 (B, T); the rest stays."""
        rest = {name: batch[name] for name in ("lengths", "labels", "speakers")}
        return {"codes": mu_law_encode(batch["waveforms"])} | rest

    def biases(self, labels: Tensor, speakers: Tensor) -> tuple[Tensor, ...]:
        """Labels and speakers (B,) -> what they add in each layer, (B, 2 width) each."""
        biases = self.modulation(self.label(labels) + self.speaker(speakers))
        return biases.chunk(self.config.layers, dim=-1)

    def logits(self, previous: Tensor, labels: Tensor, speakers: Tensor) -> Tensor:
        """previous: (B, T), the symbol before each position -> logits (B, T, 257) of the next."""
        x = F.embedding(previous, self.embedding())  # (B, T, width)
        for layer, bias in zip(self.layers, self.biases(labels, speakers), strict=True):
            past = F.pad(x, (0, 0, layer.dilation, 0))[:, : x.shape[1]]  # 0 before the clip
            x = layer(x, past, bias[:, None])
        return self.to_logits(x, self.head())

    def to_logits(self, x: Tensor, table: Tensor) -> Tensor:
        """Features (..., width) and the head's table -> logits (..., 257)."""
        return (F.gelu(self.mix(norm(x))) @ table.mT).float()

    def window(self, codes: Tensor, lengths: Tensor, start: Tensor, count: int) -> tuple:
        """The symbols before `count` positions from `start` (B,) on, those at them, and which of
        these to score: (B, count) each. Not scored: what follows the END; the END of a clip that
        fills its row, which may have been cut; positions whose past the window cuts off."""
        chain = F.pad(codes.long(), (1, 1), value=BOUNDARY)  # the START, and room for an END
        chain = chain.scatter(1, lengths[:, None] + 1, BOUNDARY)
        offsets = torch.arange(count + 1, device=codes.device)
        position = (start[:, None] + offsets).clamp(max=codes.shape[1] + 1)  # in the chain
        symbols = chain.gather(1, position)  # (B, count + 1)
        whole = (offsets >= self.receptive_field) | (start[:, None] == 0)
        inside = (position <= lengths[:, None] + 1) & (position <= codes.shape[1])
        return symbols[:, :-1], symbols[:, 1:], (whole & inside)[:, 1:]

    def nats(self, batch: dict, labels, speakers, start, count: int) -> tuple[Tensor, Tensor]:
        """-log p of the symbols in a window, 0 where not scored; and which are: (B, count) each."""
        previous, symbols, scored = self.window(batch["codes"], batch["lengths"], start, count)
        logits = self.logits(previous, labels, speakers)
        nats = F.cross_entropy(logits.flatten(0, 1), symbols.flatten(), reduction="none")
        return nats.view(symbols.shape) * scored, scored

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Nats per sample in a random window of each clip of a prepared batch; chance: log 257."""
        config, lengths = self.config, batch["lengths"]
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        speakers = torch.where(labels == config.classes, config.speakers, batch["speakers"])
        # Starts before the clip count as 0, or 0 would hardly ever be drawn. The last window ends
        # with the END, at position `length`.
        room = (lengths + 2 - config.crop + self.receptive_field).clamp(min=1)
        start = (torch.rand(len(room), device=room.device) * room).long() - self.receptive_field
        nats, scored = self.nats(batch, labels, speakers, start.clamp(min=0), config.crop)
        mean = nats.sum() / scored.sum()
        return mean, {"bits_per_sample": mean.detach() / math.log(2)}

    def log_likelihood(self, batch: dict[str, Tensor]) -> Tensor:
        """Exact log p(clip | label, speaker) in nats, (B,), of whole clips from `prepare`, with the
        END if length < T: about 13 bits per clip, 0.004 per sample."""
        start, count = torch.zeros_like(batch["lengths"]), batch["codes"].shape[1]
        return -self.nats(batch, batch["labels"], batch["speakers"], start, count)[0].sum(1)

    def step(self, previous: Tensor, position: int, rings: list[Tensor], biases, tables) -> Tensor:
        """The symbol (B,) before `position` -> logits (B, 257) of the next. Writes into rings."""
        x = F.embedding(previous, tables[0])
        for layer, ring, bias in zip(self.layers, rings, biases, strict=True):
            slot = ring[position % layer.dilation]  # written `dilation` samples ago
            x, past = layer(x, slot, bias), x
            slot.copy_(past)
        return self.to_logits(x, tables[1])

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, seconds: float | None = None,
               guidance: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               cached: bool = True, seed: int = 0) -> dict[str, Tensor]:
        """"labels" and "speakers" (B,) -> "waveforms" (B, T) in [-1, 1] and "lengths" (B,). A clip
        ends with its END, or after `seconds` (default: those of the Config); zeros follow.
        cached=False computes the receptive field anew each time. Others: blocks/sampling.py."""
        count = round((self.config.seconds if seconds is None else seconds) * RATE)
        if count < 1:
            raise ValueError(f"seconds must be at least one sample, got {seconds}")
        labels = with_and_without(conditions["labels"], self.config.classes, guidance)
        speakers = with_and_without(conditions["speakers"], self.config.speakers, guidance)
        batch, passes = len(conditions["labels"]), 1 if guidance == 1 else 2
        generator = torch.Generator(labels.device).manual_seed(seed)
        biases, tables = self.biases(labels, speakers), (self.embedding(), self.head())
        rings = [torch.zeros(layer.dilation, len(labels), self.config.width, device=labels.device)
                 for layer in self.layers]  # the last `dilation` inputs: 0 before the clip
        codes = torch.full((batch, count + 1), BOUNDARY, device=labels.device)  # START comes first
        alive, lengths = torch.ones_like(labels[:batch]).bool(), torch.zeros_like(labels[:batch])
        for i in range(count):
            if cached:
                logits = self.step(codes[:, i].repeat(passes), i, rings, biases, tables)
            else:
                seen = codes[:, max(i + 1 - self.receptive_field, 0) : i + 1].repeat(passes, 1)
                logits = self.logits(seen, labels, speakers)[:, -1]
            code = draw(apply_guidance(logits, guidance), generator, temperature, top_k, top_p)
            alive = alive & (code != BOUNDARY)
            lengths += alive
            codes[:, i + 1] = code
            if i % 64 == 0 and not alive.any():  # seldom, because a GPU must wait for the answer
                break
        codes = codes[:, 1 : max(int(lengths.max()), 1) + 1]
        inside = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        return {"waveforms": mu_law_decode(torch.where(inside, codes, SILENCE)), "lengths": lengths}


class Layer(nn.Module):
    """Mixes two moments, `dilation` samples apart: a causal convolution with a kernel of size 2,
    written as a matrix, so that it computes a whole clip as well as a single sample."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.inp = nn.Linear(2 * width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Tensor, bias: Tensor) -> Tensor:
        """x, past: (..., width), now and `dilation` samples ago; bias: (..., 2 width) -> like x."""
        value, gate = (self.inp(torch.cat([past, x], dim=-1)) + bias).chunk(2, dim=-1)
        return x + self.out(value.tanh() * gate.sigmoid())


def mu_law_encode(waveforms: Tensor) -> Tensor:
    """Samples (...), clipped to [-1, 1] -> uint8 codes (...), 1 to 255; SILENCE for 0. The rounding
    changes a sample by at most 2.2% of itself plus 0.9e-4."""
    x = waveforms.float().clamp(-1, 1)
    y = x.sign() * torch.log1p(MU * x.abs()) / math.log1p(MU)
    return (y * 127).round().add(SILENCE).byte()


def mu_law_decode(codes: Tensor) -> Tensor:
    """Codes (...) from 0 to 255 -> samples (...) in [-1, 1]. 0, which is never used, equals 1."""
    y = ((codes.float() - SILENCE) / 127).clamp(min=-1)
    return y.sign() * torch.expm1(y.abs() * math.log1p(MU)) / MU


def entropy_baselines(train: list[Tensor], test: list[Tensor], order: int = 16) -> dict[str, float]:
    """Bits per sample of compressors without a network, on the clips in `test`: uint8 codes (T,).
    Each counts in `train` how often a code follows a context. The context is nothing (order_0), the
    code before (order_1) or the code of a linear prediction, sum a_i x_(t-i), i = 1 ... `order`."""

    def past(clip: Tensor) -> Tensor:  # (T,) -> the samples before each position, (T, order)
        return F.pad(mu_law_decode(clip), (order, 0)).unfold(0, order, 1)[:-1]

    products = sum(past(clip).T @ torch.cat([past(clip), mu_law_decode(clip)[:, None]], dim=1)
                   for clip in train)
    a = torch.linalg.lstsq(products[:, :-1].double(), products[:, -1:].double()).solution.float()
    contexts = {"order_0": torch.zeros_like,
                "order_1": lambda clip: F.pad(clip[:-1], (1, 0), value=SILENCE),
                "linear_prediction": lambda clip: mu_law_encode((past(clip) @ a)[:, 0])}
    bits = {}
    for name, context_of in contexts.items():
        seen, new = (256 * torch.cat([context_of(clip) for clip in clips]).long() + torch.cat(clips)
                     for clips in (train, test))  # 256 context + code
        counts = torch.bincount(seen, minlength=256 * 256).view(256, 256).double()
        common = (counts.sum(0) + 1) / (len(seen) + 256)  # never 0; weighs as 256 counts
        probabilities = (counts + 256 * common) / (counts.sum(1, keepdim=True) + 256)
        bits[name] = -probabilities.flatten()[new].log2().mean().item()
    return bits


Model = WaveAR
