"""The codec: sound at 8 kHz as 62.5 frames a second of 8 codes of 8 bits each, and back to sound.

    waveform --encoder--> vectors (B, T / 128, 32) --residual VQ--> codes (B, T / 128, 8)
    waveform <--decoder-- vectors <------------------------------------ codes

Each codebook codes what those before it left over (blocks/quantize.py). Half of the training sounds
use a random number of codebooks, so one model serves all rates from 0.5 to 4 kbit/s. Convolutions
are causal, so a long sound can be coded piece by piece.

Five losses train it (see Config): commitment, and four on the decoded waveform, whose gradients
differ a thousandfold in size. The balancer first brings each to the same size, so that the weights
alone decide how much each loss counts. One scalar and one optimizer train codec and discriminator.
First, autograd gives the gradient of each of the four losses on the decoded waveform (a detached
copy); g is their balanced sum. The scalar is sum(decoded * g), with g constant, so its gradient on
the decoded waveform is g; plus the commitment loss; plus the discriminator's own loss, which stops
at the copy. Nor do the codec's losses reach the discriminator: only g leaves the balancer.

    python -m nanogen train codec --data fsdd      # spoken digits

Sources: Zeghidour et al. 2021, "SoundStream" (network, quantizer dropout); Défossez et al. 2022,
"EnCodec" (balancer, discriminator); Kumar et al. 2023, "DAC" (spectral loss on many scales);
Défossez et al. 2024, "Moshi" (some sounds are trained unquantized). Different here: no LSTM, no
weight norm; each frame's vector is normalised; the discriminator hears all sounds at one loudness.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.audio.spectral import RATE, spectrogram, stft, to_log_mel
from nanogen.blocks.quantize import ResidualVQ
from nanogen.method import Method, check, check_numbers, unused

SPECTRAL_WINDOWS = (64, 128, 256, 512, 1024)  # samples; short windows have fewer mel bands
DILATIONS = (1, 3)  # of the residual units of each level
DISCRIMINATOR_WINDOWS = (128, 256, 512)  # samples: 16, 32 and 64 ms
QUIET = 1e-4  # the spectral loss ignores magnitudes below this: 80 dB below full scale
BALANCED = ("waveform", "spectral", "adversarial", "matching")  # losses of the decoded waveform


@dataclass
class Config:
    widths: tuple[int, ...] = (8, 128, 256)  # channels at the full rate, and after each stride
    strides: tuple[int, ...] = (16, 8)  # downsampling factors; their product is the hop, in samples
    dim: int = 32  # channels of a frame's vector, before and after quantization
    codebooks: int = 8  # number of codebooks
    codebook_size: int = 256  # codes in each
    dropout: float = 0.5  # of the quantizer: fraction of training sounds that use fewer codebooks
    unquantized: float = 0.1  # fraction of training sounds that skip the quantizer
    waveform: float = 0.4  # weight of the L1 distance of the samples: aligns the phase
    spectral: float = 4.0  # of the distance of log-mel and plain spectra: close to hearing
    adversarial: float = 0.3  # of the adversarial (hinge) loss; 0: no discriminator
    matching: float = 0.6  # of the L1 distance of the discriminator's features
    commitment: float = 10.0  # factor of its loss; the balanced gradient's norm is at most about 1
    discriminator_start: float = 0.75  # fraction of the training without the discriminator
    discriminator_width: int = 16  # channels of its first layer
    crop: int = 4096  # samples of each training row that one step uses
    speed: float = 0.0  # augmentation: up to this fraction faster or slower
    equalizer: float = 0.0  # augmentation: strength of a random equalizer; 0.5: about 8 dB

    def __post_init__(self):
        hop, fits = max(math.prod(self.strides), 1), len(self.widths) == len(self.strides) + 1
        check_numbers(self, speed=(0 <= self.speed < 1, "from 0 to below 1"),
                      unquantized=(0 <= self.unquantized <= 1, "from 0 to 1"),
                      codebook_size=(self.codebook_size >= 2, "at least 2"),
                      discriminator_start=(0 <= self.discriminator_start <= 1, "from 0 to 1"))
        check(self, strides=(min(self.strides, default=1) >= 1, "at least 1 each"),
              widths=(fits and min(self.widths) > 1, "one more than strides, at least 2 each"),
              crop=(self.crop % hop == 0, f"a multiple of the hop, {hop}"))
        if not self.adversarial:
            unused(self, "matching", "discriminator_start", "discriminator_width",
                   when="without a discriminator (adversarial = 0)")


class StridedConv(nn.Conv2d):
    """A convolution with a stride, computed as one without: the `stride` steps of each move become
    the channels of one step. Weights and results are those of nn.Conv2d, which is wrong in
    bfloat16 for few channels and long kernels on CPUs with matrix units (AMX, torch 2.13)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, 1, T) -> (B, outputs, 1, T'), T and the kernel's length multiples of the
        stride."""
        if self.stride[1] == 1:
            return super().forward(x)
        x, weight = (tensor.unflatten(3, (-1, self.stride[1])).movedim(4, 1).flatten(1, 2)
                     for tensor in (x, self.weight))  # (., stride * inputs, 1, steps)
        return F.conv2d(x, weight, self.bias)


class CausalConv(nn.Module):
    """ELU, then a convolution over present and past: (B, T, inputs) -> (B, T / stride, outputs), or
    T * upsample: each step gives that many in a row. memory: layers' last inputs, for pieces."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1,
                 upsample: int = 1, activate: bool = True):
        super().__init__()
        self.outputs, self.activate = outputs, activate
        self.past = (kernel - 1) * dilation + 1 - stride  # output j sees inputs < (j + 1) * stride
        # 2-D with height 1: PyTorch convolves channels-last images on a CPU nearly twice as fast.
        size, stride, dilation = (1, kernel), (1, stride), (1, dilation)
        self.conv = StridedConv(inputs, outputs * upsample, size, stride, dilation=dilation)
        nn.init.normal_(self.conv.weight, std=(inputs * kernel) ** -0.5)  # keeps the variance
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
        self.dilated = CausalConv(width, width // 2, 3, dilation=dilation)
        self.mix = CausalConv(width // 2, width, 1)

    def forward(self, x: Tensor, memory: dict | None = None) -> Tensor:
        return x + self.mix(self.dilated(x, memory), memory)


class Encoder(nn.Module):
    """Samples (B, T, 1) -> vectors (B, T / hop, dim), float32, of mean 0 and norm sqrt(dim)."""

    def __init__(self, config: Config):
        super().__init__()
        widths, layers = config.widths, [CausalConv(1, config.widths[0], 7, activate=False)]
        for i, stride in enumerate(config.strides):
            layers += [ResidualUnit(widths[i], dilation) for dilation in DILATIONS]
            layers += [CausalConv(widths[i], widths[i + 1], 2 * stride, stride)]
        self.layers = nn.ModuleList([*layers, CausalConv(widths[-1], config.dim, 7)])

    def forward(self, x: Tensor, memory: dict | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return F.layer_norm(x.float(), x.shape[-1:])


class Decoder(nn.Module):
    """Vectors (B, frames, dim) -> samples (B, frames * hop, 1), float32: the encoder, mirrored."""

    def __init__(self, config: Config):
        super().__init__()
        layers = [CausalConv(config.dim, config.widths[-1], 7, activate=False)]
        for i, stride in reversed(list(enumerate(config.strides))):
            layers += [CausalConv(config.widths[i + 1], config.widths[i], 2, upsample=stride)]
            layers += [ResidualUnit(config.widths[i], dilation) for dilation in DILATIONS]
        self.layers = nn.ModuleList([*layers, CausalConv(config.widths[0], 1, 7)])
        self.layers[-1].conv.adamw = True  # trained by AdamW, not Muon
        self.layers[-1].conv.weight.data.mul_(0.1)  # to start about as loud as speech

    def forward(self, z: Tensor, memory: dict | None = None) -> Tensor:
        *body, last = self.layers
        for layer in body:
            z = layer(z, memory)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 rounding is heard as noise
            return last(z.float(), memory)


def spectral_loss(decoded: Tensor, waveforms: Tensor) -> Tensor:
    """Sounds (B, T) -> a scalar: the mean |log-mel difference|, which weighs quiet and loud parts
    alike, plus the sum of |magnitude difference| over that of magnitudes: loud parts weigh more."""
    loss = 0
    for n_fft in SPECTRAL_WINDOWS:
        fake, real = spectrogram(decoded, n_fft), spectrogram(waveforms, n_fft)
        log_fake, log_real = (to_log_mel(x, min(n_fft // 8, 64), QUIET) for x in (fake, real))
        relative = (fake - real).abs().sum() / (real.sum() + QUIET)
        loss = loss + (log_fake - log_real).abs().mean() + relative
    return loss / len(SPECTRAL_WINDOWS)


class Balancer(nn.Module):
    """Losses -> weighted mean of their gradients, each divided by the running mean of its norm."""

    def __init__(self, weights: dict[str, float], decay: float = 0.99):
        super().__init__()
        self.weights, self.decay = weights, decay
        self.register_buffer("norms", torch.zeros(len(weights)))  # decayed sum of the norms
        self.register_buffer("counts", torch.zeros(len(weights)))  # of ones; norms / counts: mean

    def forward(self, losses: dict[str, Tensor], waveforms: Tensor) -> Tensor:
        """Losses, some or all, of `waveforms` (B, T), a leaf -> their balanced gradient on it."""
        total, weight_sum = torch.zeros_like(waveforms), sum(self.weights[name] for name in losses)
        for i, (name, weight) in enumerate(self.weights.items()):
            if name in losses and weight > 0:
                gradient = torch.autograd.grad(losses[name], waveforms, retain_graph=True)[0]
                self.norms[i] = self.decay * self.norms[i] + gradient.norm()
                self.counts[i] = self.decay * self.counts[i] + 1
                total += weight / weight_sum * gradient / (self.norms[i] / self.counts[i] + 1e-12)
        return total


class Discriminator(nn.Module):
    """A small network on the complex spectrum for each of three window lengths (EnCodec)."""

    def __init__(self, width: int):
        super().__init__()
        self.networks = nn.ModuleList(nn.ModuleList([  # over (time, frequency)
            nn.Conv2d(2, width, (3, 9), (1, 4), (1, 4)),
            nn.Conv2d(width, 2 * width, (3, 5), (1, 2), (1, 2)),
            nn.Conv2d(2 * width, 2 * width, (3, 5), (1, 2), (2, 2), dilation=(2, 1)),
            nn.Conv2d(2 * width, 1, (3, 3), padding=(1, 1)),
        ]) for _ in DISCRIMINATOR_WINDOWS)
        for layer in self.networks.modules():
            layer.adamw = True  # Muon's steps have full size even where the gradient is about 0

    def forward(self, decoded: Tensor, waveforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sounds (B, T) -> its own hinge loss, the codec's adversarial loss, feature matching."""
        loudness = waveforms.square().mean(1, keepdim=True).sqrt() + 1e-3
        hinge = adversarial = matching = 0
        for n_fft, (*layers, last) in zip(DISCRIMINATOR_WINDOWS, self.networks, strict=True):
            spectra = [stft(sound / loudness, n_fft) for sound in (waveforms, decoded)]
            # real and imaginary part as channels: (B, 2, frames, frequencies); n_fft**0.5 for std 1
            real_fake = [torch.view_as_real(x).permute(0, 3, 2, 1) * n_fft**0.5 for x in spectra]
            for layer in layers:
                real_fake = [F.leaky_relu(layer(x), 0.2) for x in real_fake]
                real, fake = real_fake[0].detach().float(), real_fake[1].float()
                distance = (fake - real).abs().mean() / (real.abs().mean() + 1e-3)  # relative L1
                matching = matching + distance / len(layers)
            real, fake = (last(x).float() for x in real_fake)  # scores
            hinge = hinge + F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            adversarial = adversarial - fake.mean()
        return tuple(loss / len(self.networks) for loss in (hinge, adversarial, matching))


class Codec(Method):
    """Encoder, residual quantizer and decoder; balancer and discriminator for training."""

    kind, data, output = "tokenizer", "sounds", "waveforms"
    conditions, concatenated = {}, True

    def __init__(self, config: Config, base: None = None):
        super().__init__()
        self.config, self.hop = config, math.prod(config.strides)
        self.frame_rate = RATE / self.hop  # frames a second
        self.codebooks, self.codebook_size = config.codebooks, config.codebook_size
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = ResidualVQ(config.dim, config.codebook_size, config.codebooks,
                                    dropout=config.dropout)
        self.balancer = Balancer({name: getattr(config, name) for name in BALANCED})
        network = Discriminator(config.discriminator_width) if config.adversarial else None
        self.discriminator = network

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """"waveforms" (B, T) -> a scalar with the value of waveform + spectral loss, but the
        gradient of all losses of the codec and of the discriminator's."""
        waveforms = self.crop(batch["waveforms"])
        z = self.encoder(waveforms[..., None])
        quantized, _, commitment = self.quantizer(z)
        if self.training:
            skip = torch.rand(len(z), 1, 1, device=z.device) < self.config.unquantized
            quantized = torch.where(skip, z, quantized)
        decoded = self.decoder(quantized)[..., 0]
        copy = decoded.detach().requires_grad_(self.training)
        l1, spectral = (copy - waveforms).abs().mean(), spectral_loss(copy, waveforms)
        losses = {"waveform": l1, "spectral": spectral}
        metrics = losses | {"commitment": commitment}
        if not self.training:
            return l1 + spectral, metrics
        scalar = self.config.commitment * commitment
        if self.discriminator and self.progress >= self.config.discriminator_start:
            hinge, losses["adversarial"], losses["matching"] = self.discriminator(copy, waveforms)
            metrics |= losses | {"discriminator": hinge}
            scalar = scalar + hinge
        scalar = scalar + (decoded * self.balancer(losses, copy)).sum()
        return (l1 + spectral).detach() + (scalar - scalar.detach()), metrics  # value + gradient

    def crop(self, waveforms: Tensor) -> Tensor:
        """(B, T) -> (B, min(crop, T)): in training a random part, augmented; else the beginning."""
        speed, equalizer, total = self.config.speed, self.config.equalizer, waveforms.shape[1]
        size = length = min(self.config.crop, total)
        if not self.training:
            return waveforms[:, :size]
        if speed:
            length = min(int(size * (1 + speed * (2 * torch.rand(()).item() - 1))), total)
        part = waveforms.narrow(1, int(torch.randint(total - length + 1, ())), length)
        return augment(part, size, equalizer) if speed or equalizer else part

    @torch.no_grad()
    def latents(self, waveforms: Tensor, memory: dict | None = None) -> Tensor:
        """(B, T) in [-1, 1] -> vectors before quantization, float32 (B, ceil(T / hop), dim)."""
        if waveforms.dim() != 2 or waveforms.shape[1] == 0:
            raise ValueError(f"waveforms must be (B, T) with T > 0, got {tuple(waveforms.shape)}")
        missing = -waveforms.shape[1] % self.hop  # zeros that fill up the last frame
        return self.encoder(F.pad(waveforms, (0, missing))[..., None], memory)

    @torch.no_grad()
    def decode_latents(self, z: Tensor, memory: dict | None = None) -> Tensor:
        """Vectors (B, frames, dim), quantized or not -> waveforms (B, frames * hop) in [-1, 1]."""
        return self.decoder(z, memory)[..., 0].clamp(-1, 1)

    def encode(self, waveforms: Tensor, codebooks: int | None = None, memory=None) -> Tensor:
        """(B, T) -> codes int64 (B, ceil(T / hop), codebooks): of the first ones, or of all."""
        return self.quantizer.encode(self.latents(waveforms, memory), depth=codebooks)

    def decode(self, codes: Tensor, memory=None) -> Tensor:
        """Codes int64 (B, frames, 1 to codebooks) -> waveforms (B, frames * hop) in [-1, 1]."""
        fits = codes.dim() == 3 and codes.shape[1] and 1 <= codes.shape[2] <= self.codebooks
        if not fits or codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(f"codes must be (B, frames, 1 to {self.codebooks} codebooks) "
                             f"and from 0 to {self.codebook_size - 1}, got {tuple(codes.shape)}")
        return self.decode_latents(self.quantizer.decode(codes), memory)

    def stream_encode(self, pieces: Iterable[Tensor], codebooks=None) -> Iterator[Tensor]:
        """Waveforms in pieces (B, any length) -> codes in pieces; joined, they equal `encode`."""
        memory, rest = {}, None
        for piece in pieces:
            rest = piece if rest is None else torch.cat([rest, piece], dim=1)
            complete = rest.shape[1] // self.hop * self.hop
            if complete:
                yield self.encode(rest[:, :complete], codebooks, memory)
                rest = rest[:, complete:].clone()  # a view would keep all of it in memory
        if rest is not None and rest.shape[1]:
            yield self.encode(rest, codebooks, memory)

    def stream_decode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes in pieces (B, any number of frames, d) -> waveforms in pieces, as of `decode`."""
        memory = {}
        yield from (self.decode(codes, memory) for codes in pieces if codes.shape[1])

    def code_vectors(self) -> list[Tensor]:
        """The vectors of the codes: for each codebook (codebook_size, dim)."""
        return [codebook.vectors for codebook in self.quantizer.codebooks]

    def kbps(self, codebooks: int | None = None) -> float:
        """Bit rate in kbit/s with this number of codebooks, or with all."""
        return self.frame_rate * math.log2(self.codebook_size) * (codebooks or self.codebooks) / 1e3


# ---- ours: augmentation for unseen speakers
def augment(waveforms: Tensor, size: int, equalizer: float) -> Tensor:
    """(B, T) -> (B, size): faster or slower, which changes the voice (irfft of another length
    resamples; it divides by n), then a random smooth equalizer for each row: another microphone."""
    spectrum = torch.fft.rfft(waveforms)
    ramp = torch.linspace(0, 1, spectrum.shape[1])  # from 0 Hz to the highest frequency
    cosines = torch.cos(math.pi * torch.arange(5)[:, None] * ramp)  # (5, frequencies)
    gain = (equalizer * torch.randn(len(waveforms), 5) @ cosines).exp().to(waveforms.device)
    return torch.fft.irfft(spectrum * gain, n=size) * (size / waveforms.shape[1])


Model = Codec
