"""The codec: a sound becomes 62.5 frames a second, each a few words of 8 bits, and back.

    waveform 8,000/s --encoder--> 62.5 vectors/s --residual VQ--> 8 words each --> vectors --decoder--> waveform

    kbit/s = frames a second x books x log2(words) / 1000 = 0.5 a book, 4 for all eight; 8-bit samples need 64

The first book says the rough shape of a frame, each later one what is still missing (blocks/quantize.py). In training every
other sound is sent with a random number of books, so one model serves every rate. All convolutions are causal, so a sound of
any length streams through in bounded memory.

    python -m nanogen train codec --data fsdd

How to tell a decoder that it sounds wrong? Four losses on the waveform it gives, one at the encoder:
    waveform     mean |difference|: gets the phase right where the rate allows it
    spectral     difference of log-mel and plain spectra in windows of 8 to 128 ms: what the ear compares
    adversarial  a discriminator that sees spectra finds it real; begins late, for early on anything tells them apart
    matching     the discriminator's inner features of copy and original agree
    commitment   the encoder's vectors stay near the words
Their gradients differ a thousandfold and drift, so weights in front of them would mean little. The balancer brings each
loss's gradient *on the waveform* to a known size: here weights are shares of what the decoder is told.

One scalar and one optimizer train both players. The discriminator's own loss is an ordinary term of the scalar. Of the four
others only the gradients on the waveform are taken, and g = their balanced sum enters as sum(decoded * g): its gradient on
the waveform is exactly g, and the discriminator, which g only passed through, learns nothing from it.

Sources: Zeghidour et al. 2021 (SoundStream: the network, RVQ, dropout of books); Défossez et al. 2022 (EnCodec: balancer, STFT
discriminator); Kumar et al. 2023 (DAC: spectral loss on many scales); Défossez et al. 2024 (Moshi's Mimi: some sounds pass
unquantized). Different here: no LSTM and no weight norm; every frame's vector is normalised before the quantizer; the
discriminator hears every sound equally loud. Loudness itself is not normalised: the words carry it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.audio.spectral import RATE, spectrogram, stft, to_log_mel
from nanogen.blocks.quantize import ResidualVQ


@dataclass
class Config:
    widths: tuple[int, ...] = (8, 128, 256)  # channels: at the full rate, and after each stride
    strides: tuple[int, ...] = (16, 8)  # how much shorter each level is; their product is the hop in samples
    dilations: tuple[int, ...] = (1, 3)  # one residual unit each, at every level
    dim: int = 32  # numbers per frame, before and after quantization
    books: int = 8  # codebooks
    words: int = 256  # entries per codebook
    dropout: float = 0.5  # share of training sounds that are sent with fewer books
    unquantized: float = 0.1  # share of training sounds that pass as vectors, for models of latents
    commitment: float = 10.0  # weight of the quantizer's loss, beside a gradient of norm 1 on the waveform
    waveform: float = 0.4  # share of the L1 loss in the gradient on the waveform
    spectral: float = 4.0  # share of the spectral loss
    adversarial: float = 0.3  # share of the adversarial loss; 0: no discriminator
    matching: float = 0.6  # share of feature matching
    adversary_after: int = 4000  # steps of training before the discriminator begins
    discriminator_width: int = 16  # channels of its first layer
    crop: int = 4096  # samples of each training row that one step hears
    speed: float = 0.0  # other voices: a step plays its sounds up to this share faster or slower
    colour: float = 0.0  # other microphones: strength of a random equaliser for each sound; 0.5: about 8 dB


WINDOWS = (64, 128, 256, 512, 1024)  # samples: of the spectral loss
DISCRIMINATOR_WINDOWS = (128, 256, 512)
QUIET = 1e-4  # magnitude below which the spectral loss hears nothing: 80 dB below full scale


class Codec(nn.Module):
    """Encoder, residual quantizer, decoder, and for training a discriminator and the balancer."""

    tape = True  # trains on all recordings end to end, in rows of 8,192 samples

    def __init__(self, config: Config):
        super().__init__()
        if len(config.widths) != len(config.strides) + 1:
            raise ValueError(f"widths must be one more than strides, got {config.widths} and {config.strides}")
        self.config = config
        self.hop, self.rate = math.prod(config.strides), RATE
        self.frame_rate = self.rate / self.hop  # per second
        self.books, self.vocabulary = config.books, config.words
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = ResidualVQ(config.dim, config.words, config.books, dropout=config.dropout)
        weights = {name: getattr(config, name) for name in ("waveform", "spectral", "adversarial", "matching")}
        self.balancer = Balancer(weights)
        self.discriminator = Discriminator(config.discriminator_width) if config.adversarial else None
        self.register_buffer("steps", torch.tensor(0))  # of training so far

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "waveforms" float32 (B, T). The scalar's *value* is the reconstruction loss; its gradient is all the rest."""
        waveforms = self.crop(batch["waveforms"])
        z = self.encoder(waveforms[..., None])
        codes, _, commitment = self.quantizer(z)
        if self.training:
            as_it_is = torch.rand(len(z), device=z.device) < self.config.unquantized
            codes = torch.where(as_it_is[:, None, None], z, codes)
        decoded = self.decoder(codes)[..., 0]

        heard = decoded.detach().requires_grad_(self.training)  # where the gradients are collected
        losses = {"waveform": (heard - waveforms).abs().mean(), "spectral": spectral_loss(heard, waveforms)}
        reconstruction, numbers = losses["waveform"] + losses["spectral"], losses | {"commitment": commitment}
        if not self.training:
            return reconstruction, numbers
        scalar = self.config.commitment * commitment
        if self.discriminator and self.steps >= self.config.adversary_after:
            own, losses["adversarial"], losses["matching"] = self.discriminator.losses(heard, waveforms)
            scalar = scalar + own
            numbers |= losses | {"discriminator": own}
        self.steps += 1
        scalar = scalar + (decoded * self.balancer(losses, heard)).sum()
        return reconstruction.detach() + (scalar - scalar.detach()), numbers

    def crop(self, waveforms: Tensor) -> Tensor:
        """The stretch that this step hears, (B, T) -> (B, crop) or shorter: anywhere in training, the first otherwise."""
        size = length = min(self.config.crop, waveforms.shape[1])
        if not self.training:
            return waveforms[:, :size]
        if self.config.speed:
            length = min(int(size * (1 + self.config.speed * (2 * torch.rand(()).item() - 1))), waveforms.shape[1])
        start = int(torch.randint(waveforms.shape[1] - length + 1, ()))
        stretch = waveforms[:, start : start + length]
        return by_strangers(stretch, size, self.config.colour) if self.config.speed or self.config.colour else stretch

    @torch.no_grad()
    def latents(self, waveforms: Tensor, memory: dict | None = None) -> Tensor:
        """(B, T) -> vectors before quantization, float32 (B, ceil(T / hop), dim). The last frame is filled up with silence."""
        if waveforms.dim() != 2 or waveforms.shape[1] == 0:
            raise ValueError(f"waveforms must be (B, T) with at least one sample, got {tuple(waveforms.shape)}")
        return self.encoder(F.pad(waveforms, (0, -waveforms.shape[1] % self.hop))[..., None], memory)

    @torch.no_grad()
    def decode_latents(self, z: Tensor, memory: dict | None = None) -> Tensor:
        """Vectors (B, frames, dim), quantized or not -> waveforms (B, frames * hop) in [-1, 1]; memory: see CausalConv."""
        return self.decoder(z, memory)[..., 0].clamp(-1, 1)

    def encode(self, waveforms: Tensor, books: int | None = None) -> Tensor:
        """(B, T) in [-1, 1] -> int64 (B, ceil(T / hop), books), the first so many books. ValueError for T = 0."""
        return self.quantize(self.latents(waveforms), books)

    def decode(self, indices: Tensor) -> Tensor:
        """int64 (B, frames, d), d from 1 to books -> waveforms (B, frames * hop) in [-1, 1]. ValueError for other indices."""
        return self.decode_latents(self.look_up(indices))

    def stream_encode(self, chunks: Iterable[Tensor], books: int | None = None) -> Iterator[Tensor]:
        """Waveforms in pieces (B, any length) -> indices in pieces (B, frames, books): together, what `encode` gives."""
        memory, rest = {}, None
        for chunk in chunks:
            rest = chunk if rest is None else torch.cat([rest, chunk], dim=1)
            whole = rest.shape[1] // self.hop * self.hop
            if whole:
                yield self.quantize(self.latents(rest[:, :whole], memory), books)
                rest = rest[:, whole:].clone()  # not a view, which would keep all of it in memory
        if rest is not None and rest.shape[1]:
            yield self.quantize(self.latents(rest, memory), books)

    def stream_decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Indices in pieces (B, any number of frames, d) -> waveforms in pieces: together, what `decode` gives."""
        memory = {}
        for indices in chunks:
            if indices.shape[1]:
                yield self.decode_latents(self.look_up(indices), memory)

    @torch.no_grad()
    def quantize(self, z: Tensor, books: int | None) -> Tensor:
        """Vectors (B, frames, dim) -> indices (B, frames, books). ValueError for more books than there are."""
        books = self.books if books is None else books
        if not 1 <= books <= self.books:
            raise ValueError(f"books must be from 1 to {self.books}, got {books}")
        return self.quantizer(z, depth=books).indices

    @torch.no_grad()
    def look_up(self, indices: Tensor) -> Tensor:
        """Indices (B, frames, d) -> the vectors that they name, (B, frames, dim)."""
        if indices.dim() != 3 or not indices.shape[1] or not 1 <= indices.shape[2] <= self.books:
            raise ValueError(f"indices must be (B, 1 or more frames, 1 to {self.books} books), got {tuple(indices.shape)}")
        if not (0 <= indices.min() and indices.max() < self.vocabulary):
            raise ValueError(f"indices must be from 0 to {self.vocabulary - 1}, got {indices.min()} to {indices.max()}")
        return self.quantizer.decode(indices.long())

    def codes(self) -> list[Tensor]:
        """The vectors behind the words of each book: `books` tensors (words, dim)."""
        return [book.vectors for book in self.quantizer.books]

    def kbps(self, books: int | None = None) -> float:
        """Kilobits a second with so many books, all unless told."""
        return self.frame_rate * (self.books if books is None else books) * math.log2(self.vocabulary) / 1000


# ------------------------------------------------------------------------------------ encoder and decoder, on (B, T, channels)


class CausalConv(nn.Module):
    """ELU (unless told), then a convolution of what was and is, never of what comes: (B, T, inputs) -> (B, T', outputs).

    stride: T' = T / stride, and output i has seen the inputs up to its end, (i + 1) * stride. upsample: T' = T * upsample; each
    input gives the outputs of its own time, together with kernel - 1 inputs before: a transposed convolution, written the other
    way round. memory: holds for each layer the end of the input that it had last; a sound may then come piece by piece.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, upsample: int = 1,
                 activate: bool = True):
        super().__init__()
        self.outputs, self.activate, self.past = outputs, activate, (kernel - 1) * dilation + 1 - stride
        # As a picture one pixel high: PyTorch convolves channels-last pictures on a CPU nearly twice as fast as sequences.
        self.conv = nn.Conv2d(inputs, outputs * upsample, (1, kernel), (1, stride), dilation=(1, dilation))
        nn.init.normal_(self.conv.weight, std=(inputs * kernel) ** -0.5)  # keeps the size of what passes
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, memory: dict | None = None) -> Tensor:
        x = F.elu(x) if self.activate else x
        before = None if memory is None else memory.get(self)
        x = F.pad(x, (0, 0, self.past, 0)) if before is None else torch.cat([before, x], dim=1)
        if memory is not None:
            memory[self] = x[:, x.shape[1] - self.past :].clone()
        y = self.conv(x.transpose(1, 2).unsqueeze(2))  # (B, outputs * upsample, 1, T / stride)
        return y.squeeze(2).transpose(1, 2).reshape(len(x), -1, self.outputs)


class ResidualUnit(nn.Module):
    """x + a dilated convolution into half the channels and back (SoundStream, EnCodec)."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.dilated, self.mix = CausalConv(width, width // 2, 3, dilation=dilation), CausalConv(width // 2, width, 1)

    def forward(self, x: Tensor, memory: dict | None = None) -> Tensor:
        return x + self.mix(self.dilated(x, memory), memory)


class Encoder(nn.Module):
    """Samples (B, T, 1) -> vectors (B, T / hop, dim), float32, each of mean 0 and size sqrt(dim): an encoder cannot flee
    from its codebook by growing."""

    def __init__(self, config: Config):
        super().__init__()
        widths, self.dim = config.widths, config.dim
        layers = [CausalConv(1, widths[0], 7, activate=False)]
        for i, stride in enumerate(config.strides):
            layers += [ResidualUnit(widths[i], dilation) for dilation in config.dilations]
            layers += [CausalConv(widths[i], widths[i + 1], 2 * stride, stride)]
        self.layers = nn.ModuleList([*layers, CausalConv(widths[-1], config.dim, 7)])

    def forward(self, x: Tensor, memory: dict | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return F.layer_norm(x.float(), (self.dim,))


class Decoder(nn.Module):
    """Vectors (B, frames, dim) -> samples (B, frames * hop, 1), float32: the encoder, mirrored."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.widths
        layers = [CausalConv(config.dim, widths[-1], 7, activate=False)]
        for i, stride in reversed(list(enumerate(config.strides))):
            layers += [CausalConv(widths[i + 1], widths[i], 2, upsample=stride)]
            layers += [ResidualUnit(widths[i], dilation) for dilation in config.dilations]
        self.layers = nn.ModuleList([*layers, CausalConv(widths[0], 1, 7)])
        self.layers[-1].conv.adamw = True
        self.layers[-1].conv.weight.data.mul_(0.1)  # speech is about so loud; ten times louder is a long way back

    def forward(self, z: Tensor, memory: dict | None = None) -> Tensor:
        *body, last = self.layers
        for layer in body:
            z = layer(z, memory)
        with torch.autocast(z.device.type, enabled=False):  # a sample of 8 bits hisses
            return last(z.float(), memory)


# ------------------------------------------------------------------------------------ losses


def by_strangers(waveforms: Tensor, size: int, colour: float) -> Tensor:
    """The same words from other mouths into other microphones: waveforms (B, T), played so fast that they take `size` samples,
    which moves pitch and formants, each through its own equaliser. Both are done on the spectrum of the whole stretch."""
    spectrum = torch.fft.rfft(waveforms)
    waves = torch.cos(math.pi * torch.arange(5)[:, None] * torch.linspace(0, 1, spectrum.shape[1]))  # 0 to 2 bumps over the band
    gain = (colour * torch.randn(len(waveforms), 5) @ waves).exp().to(waveforms.device)
    return torch.fft.irfft(spectrum * gain, n=size) * (size / waveforms.shape[1])  # more bins than before are 0, fewer are cut


def spectral_loss(decoded: Tensor, waveforms: Tensor) -> Tensor:
    """Difference of two sounds (B, T) in spectra of five window lengths, mean over them: |log-mel difference|, the same for loud
    and soft, and |magnitude difference| as a share of all magnitude, which the loud parts decide. A scalar."""
    loss = 0
    for n_fft in WINDOWS:
        copy, original = spectrogram(decoded, n_fft), spectrogram(waveforms, n_fft)
        log_copy, log_original = (to_log_mel(x, min(n_fft // 8, 64), QUIET) for x in (copy, original))
        loss = loss + (log_copy - log_original).abs().mean() + (copy - original).abs().sum() / (original.sum() + QUIET)
    return loss / len(WINDOWS)


class Balancer(nn.Module):
    """Losses of a waveform -> one gradient on it, in which loss i has the share weights[i] / sum, whatever the loss's scale.

    Each gradient is divided by the running mean of its norm, so that a loss which is small *for now* stays small.
    """

    def __init__(self, weights: dict[str, float], decay: float = 0.99):
        super().__init__()
        self.weights, self.decay = weights, decay
        self.register_buffer("norms", torch.zeros(len(weights)))  # decayed sums of the norms, and of 1 for each step:
        self.register_buffer("counts", torch.zeros(len(weights)))  # their ratio is a mean that knows no start from 0

    def forward(self, losses: dict[str, Tensor], waveforms: Tensor) -> Tensor:
        """losses: name -> scalar, some or all of those with a weight; waveforms (B, T), a leaf that they came from.
        Returns the gradient (B, T), of norm about 1."""
        total, whole = torch.zeros_like(waveforms), sum(self.weights[name] for name in losses)
        for i, (name, weight) in enumerate(self.weights.items()):
            if name in losses and weight > 0:
                gradient = torch.autograd.grad(losses[name], waveforms, retain_graph=True)[0]
                self.norms[i] = self.decay * self.norms[i] + gradient.norm()
                self.counts[i] = self.decay * self.counts[i] + 1
                total += weight / whole * gradient / (self.norms[i] / self.counts[i] + 1e-12)
        return total


class Discriminator(nn.Module):
    """Three small networks that look at the complex spectrum in windows of 16, 32 and 64 ms: where is this not a recording?"""

    def __init__(self, width: int):
        super().__init__()
        self.networks = nn.ModuleList(self.network(width) for _ in DISCRIMINATOR_WINDOWS)

    @staticmethod
    def network(width: int) -> nn.ModuleList:
        """Convolutions over (time, frequency) that leave a 16th of the frequencies; the last gives a score for each place."""
        layers = nn.ModuleList([
            nn.Conv2d(2, width, (3, 9), (1, 4), (1, 4)),
            nn.Conv2d(width, 2 * width, (3, 5), (1, 2), (1, 2)),
            nn.Conv2d(2 * width, 2 * width, (3, 5), (1, 2), (2, 2), dilation=(2, 1)),
            nn.Conv2d(2 * width, 1, (3, 3), padding=(1, 1)),
        ])
        for layer in layers:
            layer.adamw = True  # where the hinge loss has next to no gradient left, Muon would still take whole steps
        return layers

    def forward(self, waveforms: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, T) -> scores, one map for each window, and all features on the way there."""
        scores, features = [], []
        for n_fft, layers in zip(DISCRIMINATOR_WINDOWS, self.networks, strict=True):
            x = torch.view_as_real(stft(waveforms, n_fft).transpose(1, 2))  # (B, frames, n_fft/2 + 1, 2)
            x = x.permute(0, 3, 1, 2) * n_fft**0.5  # real and imaginary part as channels; noise of size 1 stays about that
            for layer in layers[:-1]:
                x = F.leaky_relu(layer(x), 0.2)
                features.append(x)
            scores.append(layers[-1](x).float())
        return scores, features

    def losses(self, copy: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(its own hinge loss, the adversarial loss of whoever made the copy, feature matching), on (B, T) each: scalars."""
        loudness = original.square().mean(1, keepdim=True).sqrt() + 1e-3
        real_scores, real_features = self(original / loudness)
        fake_scores, fake_features = self(copy / loudness)
        count = len(real_scores)
        own = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real_scores, fake_scores, strict=True)) / count
        adversarial = -sum(f.mean() for f in fake_scores) / count
        pairs = [(r.detach().float(), f.float()) for r, f in zip(real_features, fake_features, strict=True)]
        matching = sum((f - r).abs().mean() / (r.abs().mean() + 1e-3) for r, f in pairs) / len(pairs)
        return own, adversarial, matching


Model = Codec
