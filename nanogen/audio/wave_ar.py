"""Wave AR: predict each sample of a waveform from those before it, 8,000 times a second.

    p(clip) = p(s1) p(s2 | s1) p(s3 | s1, s2) ... p(END | all of it)

We hear loudness as a ratio, so a sample is coded in 8 bits on a logarithmic scale (mu-law), and
every factor is a choice among 256 codes. The likelihood is exact: in bits per sample, it is what a
perfect compressor with this model needs. `entropy_baselines` gives it for simple counting.

A pitch of 100 Hz repeats after 80 samples and a vowel lasts 1,000, so the network must look far
back, 8,000 times for each second of sound. Two parts share the work:

    frames     16 samples each. Every layer mixes two frames, d apart: with d = 1, 2, 4, ... 64,
               seven layers see 128 frames, or 256 ms. This part runs once for 16 samples.
    samples    a small network draws each sample from the features of the frames before its own,
               and from the 16 samples before it.

In sampling, a ring buffer in each layer keeps its last d inputs, so that nothing is computed twice.
END is rare (once in 3,400 samples): top_p, top_k and a low temperature hardly ever draw it.

    python -m nanogen train wave_ar --data fsdd

Sources: van den Oord et al. 2016, "WaveNet" (dilated causal convolutions, gates, 256-way mu-law);
Mehri et al. 2017, "SampleRNN" (frames above samples); Paine et al. 2016, "Fast WaveNet" (the ring
buffers); ITU-T G.711 (mu-law). Different here: dilated convolutions over frames, not recurrent
networks; an END symbol, so clips differ in length; guidance; the mu-law scale is symmetric about an
exact 0, which leaves one of 256 codes unused.
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
FRAME = 16  # samples in a frame, and samples that the sample's network sees
COSINES = 24  # features that describe a code
BOUNDARY = 256  # one symbol more than the codes: START as an input, END as an output


@dataclass
class Config:
    width: int = 192  # features per frame
    layers: int = 7  # layer i mixes frames 2^i apart: 2^layers frames are seen
    sample_width: int = 128  # features per sample
    crop: int = 4096  # samples of a clip per training step
    seconds: float = 1.0  # longest clip; longer ones are cut
    label_dropout: float = 0.1  # fraction of clips with label and speaker hidden, for guidance
    classes: int = 10  # number of labels
    speakers: int = 6  # number of voices

    def __post_init__(self):
        seen = receptive_field(self.layers) + FRAME  # windows start at multiples of FRAME
        check_numbers(self, seconds=(self.seconds * RATE >= 1, "at least one sample"),
                      crop=(self.crop >= seen, f"at least {seen}, for 2^layers frames"))


class WaveAR(Method):
    """A causal network over samples, conditioned on the label and the speaker."""

    data, output, samples_to_judge = "sounds", "waveforms", 300
    conditions = {"labels": "class", "speakers": "class"}
    encodes = exact_likelihood = True

    def __init__(self, config: Config, base: nn.Module | None = None):
        super().__init__()
        self.config, self.receptive_field = config, receptive_field(config.layers)
        width, inner = config.width, config.sample_width
        # A code is described by cosines over the scale, from slow to fast: near codes are alike.
        waves = torch.arange(1, COSINES + 1) * math.pi / 256
        codes = torch.cos((torch.arange(256)[:, None] + 0.5) * waves)
        symbols = F.pad(codes / codes.std(), (0, 0, 0, 1))  # the boundary: 0
        self.register_buffer("symbols", symbols, persistent=False)  # (257, COSINES)
        self.label = ConditionEmbedding(config.classes, width)
        self.speaker = ConditionEmbedding(config.speakers, width)
        self.modulation = nn.Linear(width, config.layers * 2 * width)
        self.modulation.adamw = True  # its rows are many small vectors, not one map
        self.frame = nn.Linear(FRAME * COSINES, width)
        self.layers = nn.ModuleList(Layer(width, 2**i) for i in range(config.layers))
        self.up = nn.Linear(width, FRAME * inner)  # to each sample of the next frame
        self.near = nn.Linear(FRAME * COSINES, inner)
        self.mix = nn.Linear(inner, inner)
        self.head = CodeEmbedding(codes, inner, extra=1, zero=True)  # uniform at first

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """"waveforms" (B, T) in [-1, 1] -> "codes" uint8 (B, T); the rest stays."""
        rest = {name: batch[name] for name in ("lengths", "labels", "speakers")}
        return {"codes": mu_law_encode(batch["waveforms"])} | rest

    def biases(self, labels: Tensor, speakers: Tensor) -> tuple[Tensor, ...]:
        """Labels and speakers (B,) -> what they add in each layer, (B, 2 width) each."""
        biases = self.modulation(self.label(labels) + self.speaker(speakers))
        return biases.chunk(self.config.layers, dim=-1)

    def logits(self, previous: Tensor, labels: Tensor, speakers: Tensor) -> Tensor:
        """previous: (B, T), the symbol before each position -> logits (B, T, 257) of the symbol at
        each. The first position is a multiple of FRAME; what lies before it looks like START."""
        count = previous.shape[1]
        previous = F.pad(previous, (FRAME - 1, -count % FRAME), value=BOUNDARY)
        x = self.symbols[previous].flatten(1)
        x = x.unfold(1, FRAME * COSINES, COSINES)  # (B, T, FRAME COSINES): the 16 symbols before
        h = self.frame(x[:, ::FRAME])  # (B, frames, width), from the 16 symbols before each frame
        for layer, bias in zip(self.layers, self.biases(labels, speakers), strict=True):
            past = F.pad(h, (0, 0, layer.dilation, 0))[:, : h.shape[1]]  # 0 before the clip
            h = layer(h, past, bias[:, None])
        above = self.above(h).flatten(1, 2)  # (B, T, sample_width)
        return self.to_logits(x, above, self.head())[:, :count]

    def above(self, h: Tensor) -> Tensor:
        """What frames (..., width) tell the samples of the next one: (..., FRAME, sample_width)."""
        return self.up(norm(h)).unflatten(-1, (FRAME, -1))

    def to_logits(self, x: Tensor, above: Tensor, table: Tensor) -> Tensor:
        """The 16 symbols before each sample (..., FRAME COSINES), what earlier frames tell it (...,
        sample_width) and the head's table -> logits (..., 257)."""
        x = F.relu(self.near(x) + above)
        return (F.relu(self.mix(x)) @ table.mT).float()

    def window(self, codes: Tensor, lengths: Tensor, start: Tensor, count: int) -> tuple:
        """For `count` positions from `start` (B,) on: the symbol before each, the symbol at each,
        and whether to score it, (B, count) each. Not scored: what follows the END; the END of a
        clip that fills its row, which may have been cut; positions that may see what lies before a
        window, unless it starts at 0."""
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
        """Nats per sample in a random window of each clip of a prepared batch. A uniform guess has
        log 257 = 5.55."""
        config, lengths = self.config, batch["lengths"]
        labels = drop_labels(batch["labels"], config.classes, config.label_dropout)
        speakers = torch.where(labels == config.classes, config.speakers, batch["speakers"])
        # Starts before the clip count as 0, and those after the last window, which has the END at
        # position `length`, as that window: else both ends would hardly ever be drawn.
        last = (lengths + 1 - config.crop).clamp(min=0)
        room = last + 2 * self.receptive_field
        start = (torch.rand(len(room), device=room.device) * room).long() - self.receptive_field
        start = torch.minimum(start.clamp(min=0), last)
        start = -(-start // FRAME) * FRAME  # rounded up: frames lie as in sampling
        nats, scored = self.nats(batch, labels, speakers, start, config.crop)
        mean = nats.sum() / scored.sum()
        return mean, {"bits_per_sample": mean.detach() / math.log(2)}

    def log_likelihood(self, batch: dict[str, Tensor]) -> Tensor:
        """Exact log p(clip | label, speaker) in nats, (B,), of whole clips from `prepare`, with the
        END of those that are shorter than T."""
        start, count = torch.zeros_like(batch["lengths"]), batch["codes"].shape[1]
        return -self.nats(batch, batch["labels"], batch["speakers"], start, count)[0].sum(1)

    def step(self, recent: Tensor, position: int, rings: list[Tensor], above: Tensor, biases,
             table) -> Tensor:
        """The symbols (B, FRAME) before `position` -> logits (B, 257) of the next. Writes into
        rings, and at the start of a frame into above (B, FRAME, sample_width)."""
        x = self.symbols[recent].flatten(1)  # (B, FRAME COSINES)
        if position % FRAME == 0:
            frame, h = position // FRAME, self.frame(x)
            for layer, ring, bias in zip(self.layers, rings, biases, strict=True):
                slot = ring[frame % layer.dilation]  # written `dilation` frames ago
                new = layer(h, slot, bias)
                slot.copy_(h)  # the past of frame + dilation
                h = new
            above.copy_(self.above(h))
        return self.to_logits(x, above[:, position % FRAME], table)

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
        biases, table = self.biases(labels, speakers), self.head()
        rings = [torch.zeros(layer.dilation, len(labels), self.config.width, device=labels.device)
                 for layer in self.layers]  # the last `dilation` inputs: 0 before the clip
        above = torch.zeros(len(labels), FRAME, self.config.sample_width, device=labels.device)
        # START comes first, and there is nothing before it: as in training, that looks like START
        codes = torch.full((batch, FRAME + count), BOUNDARY, device=labels.device)
        alive, lengths = torch.ones_like(labels[:batch]).bool(), torch.zeros_like(labels[:batch])
        for i in range(count):
            if cached:
                recent = codes[:, i : i + FRAME].repeat(passes, 1)
                logits = self.step(recent, i, rings, above, biases, table)
            else:
                first = max(i + 1 - self.receptive_field, 0) // FRAME * FRAME
                seen = codes[:, FRAME - 1 + first : FRAME + i].repeat(passes, 1)
                logits = self.logits(seen, labels, speakers)[:, -1]
            code = draw(apply_guidance(logits, guidance), generator, temperature, top_k, top_p)
            alive = alive & (code != BOUNDARY)
            lengths += alive
            codes[:, FRAME + i] = code
            if i % 64 == 0 and not alive.any():  # seldom, because a GPU must wait for the answer
                break
        codes = codes[:, FRAME : FRAME + max(int(lengths.max()), 1)]
        inside = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
        return {"waveforms": mu_law_decode(torch.where(inside, codes, SILENCE)), "lengths": lengths}


class Layer(nn.Module):
    """Mixes two frames, `dilation` apart: a causal convolution with a kernel of size 2, written as
    a matrix, so that it computes a whole clip as well as a single frame."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.inp = nn.Linear(2 * width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Tensor, bias: Tensor) -> Tensor:
        """x, past: (..., width), now and `dilation` frames ago; bias: (..., 2 width) -> like x."""
        value, gate = (self.inp(torch.cat([past, x], dim=-1)) + bias).chunk(2, dim=-1)
        return x + self.out(value.tanh() * gate.sigmoid())


def receptive_field(layers: int) -> int:
    """The most samples that a prediction can see: 2^layers frames of 16, and up to 15 samples that
    are known already in its own frame."""
    return FRAME * (2**layers + 1) - 1


def mu_law_encode(waveforms: Tensor) -> Tensor:
    """Samples (...), clipped to [-1, 1] -> uint8 codes (...), 1 to 255; SILENCE for 0. The rounding
    changes a sample by at most 2.21% of itself plus 0.9e-4."""
    x = waveforms.float().clamp(-1, 1)
    y = x.sign() * torch.log1p(MU * x.abs()) / math.log1p(MU)
    return (y * 127).round().add(SILENCE).byte()


def mu_law_decode(codes: Tensor) -> Tensor:
    """Codes (...) from 0 to 255 -> samples (...) in [-1, 1]. Code 0, which `mu_law_encode` never
    gives, is -1, as code 1 is."""
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
