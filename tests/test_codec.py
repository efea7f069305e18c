"""The codec: nothing hears the future, pieces equal the whole, more codebooks say more, and codec
and discriminator each get their own gradient."""

import copy

import pytest
import torch
from conftest import briefly
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogen.audio import spectral
from nanogen.audio.codec import Balancer, Codec, Config, augment, spectral_loss
from nanogen.lab.train import train


def tiny_codec(**fields) -> Codec:
    """Hop 8 samples, 4 codebooks of 16 codes, random weights."""
    small = dict(widths=(4, 8, 8), strides=(2, 4), dim=8, codebooks=4, codebook_size=16,
                 discriminator_width=2, crop=512)
    torch.manual_seed(0)
    return Codec(Config(**(small | fields))).eval()


def tones(count: int = 4, samples: int = 512) -> torch.Tensor:
    """(count, samples): two sines each."""
    time = torch.arange(samples) / spectral.RATE
    pitches = torch.linspace(200, 1500, 2 * count).view(count, 2, 1)
    return 0.3 * torch.sin(2 * torch.pi * pitches * time).sum(1)


# ---- spectra


@pytest.mark.parametrize("bands, n_fft", [(8, 64), (64, 256), (64, 512), (64, 1024)])
def test_every_mel_filter_peaks_at_its_centre_and_together_they_hear_everything(bands, n_fft):
    filters = spectral.mel_filters(bands, n_fft)
    assert filters.shape == (bands, n_fft // 2 + 1)
    assert torch.allclose(filters.sum(1), torch.ones(bands))
    top = spectral.hertz_to_mel(spectral.RATE / 2)
    centres = spectral.mel_to_hertz(torch.linspace(0, top, bands + 2))[1:-1]
    peaks = filters.argmax(1) * spectral.RATE / n_fft
    assert ((peaks - centres).abs() <= spectral.RATE / n_fft).all()
    first, last = filters.argmax(1)[[0, -1]]
    assert (filters.sum(0)[first : last + 1] > 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        spectral.mel_filters(0, n_fft)


def test_a_sine_lights_up_its_band_with_its_amplitude():
    pitches = torch.tensor([250.0, 1000.0, 3000.0])  # each the middle of a bin of 256 samples
    time = torch.arange(2048) / spectral.RATE
    waveforms = 0.5 * torch.sin(2 * torch.pi * pitches[:, None] * time)
    magnitudes = spectral.spectrogram(waveforms, 256)[:, :, 16]
    assert torch.allclose(magnitudes.amax(1), torch.full((3,), 0.5), atol=1e-3)
    bands = spectral.log_mel(waveforms)
    assert bands.shape == (3, 64, 2048 // 64 + 1) and bands.dtype == torch.float32
    heard = bands[:, :, 16].argmax(1)
    bins = (pitches * 256 / spectral.RATE).long()
    assert (heard == spectral.mel_filters(64, 256)[:, bins].argmax(0)).all()
    silence = spectral.log_mel(torch.zeros(1, 100))
    assert torch.allclose(silence, torch.tensor(spectral.FLOOR).log())


# ---- coding


def test_shapes_rates_and_the_last_frame_filled_up():
    codec = tiny_codec()
    for samples in (1, 7, 8, 9, 100):
        frames = -(-samples // codec.hop)
        codes = codec.encode(torch.rand(2, samples))
        assert codes.shape == (2, frames, 4) and codes.dtype == torch.int64
        assert codec.decode(codes).shape == (2, frames * codec.hop)
        assert codec.latents(torch.rand(2, samples)).shape == (2, frames, 8)
    assert [vectors.shape for vectors in codec.code_vectors()] == [(16, 8)] * 4
    full = Codec(Config())
    assert (full.hop, full.frame_rate, full.codebooks, full.codebook_size) == (128, 62.5, 8, 256)
    assert full.kbps() == 4.0 and full.kbps(1) == 0.5


@pytest.mark.parametrize("waveforms", [
    torch.zeros(1, 50), torch.ones(1, 50), torch.full((1, 1), -1.0)])
def test_silence_clipping_and_a_single_sample_pass(waveforms):
    decoded = tiny_codec().decode(tiny_codec().encode(waveforms))
    assert decoded.isfinite().all() and decoded.abs().max() <= 1
    assert spectral_loss(decoded, torch.zeros_like(decoded)).isfinite()


def test_encoder_and_decoder_never_hear_the_future():
    codec, waveforms, z = tiny_codec(), torch.rand(1, 80), torch.randn(1, 10, 8)
    changed = waveforms.clone()
    changed[:, 40:] = 0  # from frame 5 on
    before, after = codec.latents(waveforms), codec.latents(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-3)
    changed = z.clone()
    changed[:, 5:] = 0
    before, after = codec.decode_latents(z), codec.decode_latents(changed)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert not torch.allclose(before[:, 40:48], after[:, 40:48], atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 37), max_size=8), st.integers(1, 20))
def test_piece_by_piece_equals_all_at_once(samples, frames):
    codec = tiny_codec()
    waveforms = torch.rand(2, sum(samples) + 1)
    pieces = list(codec.stream_encode(waveforms.split([*samples, 1], dim=1), codebooks=3))
    codes = codec.encode(waveforms, codebooks=3)
    assert torch.equal(torch.cat(pieces, dim=1), codes)
    pieces = list(codec.stream_decode([codes[:, :0], *codes.split(frames, dim=1)]))
    assert torch.allclose(torch.cat(pieces, dim=1), codec.decode(codes), atol=1e-4)


def test_a_stream_remembers_no_more_than_the_convolutions_need():
    codec, memory = tiny_codec(), {}
    sizes = []
    for _ in range(4):
        codec.latents(torch.rand(1, 4000), memory)
        sizes.append(sum(past.untyped_storage().nbytes() for past in memory.values()))
    assert sizes == sizes[:1] * 4 and sizes[0] < 4000  # bytes; a piece of sound alone has 16,000


def test_only_the_codebooks_asked_for_are_used():
    codec, waveforms = tiny_codec(), torch.rand(1, 64)
    two = codec.encode(waveforms, codebooks=2)
    assert torch.equal(codec.encode(waveforms)[..., :2], two)
    before = codec.decode(two)
    for codebook in codec.quantizer.codebooks[2:]:
        codebook.vectors.normal_()
    assert torch.equal(before, codec.decode(codec.encode(waveforms, codebooks=2)))


@pytest.mark.parametrize("call, sentence", [
    (lambda c: c.encode(torch.zeros(1, 0)), "must be \\(B, T\\) with T > 0"),
    (lambda c: c.encode(torch.zeros(8)), "must be \\(B, T\\)"),
    (lambda c: c.encode(torch.zeros(1, 8), codebooks=5), "from 1 to 4"),
    (lambda c: c.encode(torch.zeros(1, 8), codebooks=0), "from 1 to 4"),
    (lambda c: c.decode(torch.full((1, 2, 4), 16)), "from 0 to 15"),
    (lambda c: c.decode(torch.full((1, 2, 4), -1)), "from 0 to 15"),
    (lambda c: c.decode(torch.zeros(1, 2, 5).long()), "1 to 4 codebooks"),
    (lambda c: c.decode(torch.zeros(2, 4).long()), "1 to 4 codebooks"),
    (lambda c: c.decode(torch.zeros(1, 0, 4).long()), "1 to 4 codebooks"),
])
def test_what_cannot_be_coded_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tiny_codec())


@pytest.mark.parametrize("fields, sentence", [
    (dict(widths=(4, 8)), "widths must be one more than strides"),
    (dict(strides=(2, 0)), "strides must be at least 1"),
    (dict(crop=100), "crop must be a multiple of the hop, 128"),
    (dict(codebooks=0), "codebooks must be at least 1"), (dict(dim=0), "dim must be at least 1"),
    (dict(dropout=1.5), "dropout must be from 0 to 1"), (dict(speed=1.0), "speed must be"),
    (dict(spectral=-1.0), "spectral must be at least 0"),
    (dict(adversarial=0.0, discriminator_width=4), "discriminator_width has no effect"),
])
def test_a_config_refuses_bad_fields_by_name(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**fields)


def test_bfloat16_gives_the_vectors_and_sounds_of_float32():
    """A convolution of 8 channels and 32 steps is wrong in bfloat16 on CPUs with AMX (torch 2.13):
    a codec that trained with it gave noise in float32."""
    torch.manual_seed(0)
    codec, sounds = Codec(Config(adversarial=0.0)).eval(), tones(2, 2048)
    with torch.no_grad():
        z = codec.encoder(sounds[..., None])
        exact = z, codec.decoder(z)
        with torch.autocast("cpu", torch.bfloat16):
            rough = codec.encoder(sounds[..., None]), codec.decoder(z)
    for a, b in zip(exact, rough, strict=True):
        assert (a - b).norm() < 0.03 * a.norm()


# ---- learning


def test_it_overfits_one_batch_and_every_further_codebook_says_more():
    codec = tiny_codec(widths=(8, 16, 16), discriminator_start=0.5)
    data = {"waveforms": tones()}
    with torch.no_grad():
        start, _ = codec.loss(data)
    log = train(codec, data, briefly(120, batch_size=4, clip=10.0, flip=False), quiet=True)
    with torch.no_grad():
        end, _ = codec.loss(data)
    assert end < 0.6 * start, (start, end)
    names = {"waveform", "spectral", "commitment", "adversarial", "matching", "discriminator"}
    assert names <= log[-1].keys()
    z = codec.latents(data["waveforms"])
    copies = [codec.quantizer.decode(codec.encode(data["waveforms"], k)) for k in range(1, 5)]
    errors = [(z - copy).square().mean() for copy in copies]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("start", [0, 1])
def test_the_value_of_the_loss_is_the_reconstruction_loss_with_and_without_discriminator(start):
    loss, metrics = tiny_codec(discriminator_start=start).train().loss({"waveforms": tones()})
    assert torch.allclose(loss, metrics["waveform"] + metrics["spectral"], atol=1e-4)
    assert ("discriminator" in metrics) == (start == 0)


def test_the_adversarial_gradient_reaches_the_codec_and_the_discriminator_learns_by_its_own_loss():
    only = dict(waveform=0.0, spectral=0.0, matching=0.0, commitment=0.0)
    codec = tiny_codec(discriminator_start=0, unquantized=0.0, dropout=0.0, **only)
    batch = {"waveforms": tones()}
    codec.train().loss(batch)  # the first batch starts the codebooks
    twin = copy.deepcopy(codec)
    codec.loss(batch)[0].backward()
    for network in (codec.encoder, codec.decoder):
        assert network.layers[0].conv.weight.grad.norm() > 0

    quantized = twin.quantizer(twin.encoder(batch["waveforms"][..., None]))[0]
    decoded = twin.decoder(quantized)[..., 0].detach()
    twin.discriminator(decoded, batch["waveforms"])[0].backward()
    pairs = zip(codec.discriminator.parameters(), twin.discriminator.parameters(), strict=True)
    for ours, alone in pairs:
        assert torch.allclose(ours.grad, alone.grad, atol=1e-6)


def test_the_scalar_has_the_balanced_gradient():
    codec = tiny_codec(discriminator_start=0.5, commitment=0.0, unquantized=1.0).train()
    waveforms = tones()
    codec.loss({"waveforms": waveforms})
    twin = copy.deepcopy(codec)
    codec.loss({"waveforms": waveforms})[0].backward()
    decoded = twin.decoder(twin.encoder(waveforms[..., None]))[..., 0]
    leaf = decoded.detach().requires_grad_()
    losses = {"waveform": nn.functional.l1_loss(leaf, waveforms),
              "spectral": spectral_loss(leaf, waveforms)}
    decoded.backward(twin.balancer(losses, leaf))
    for ours, theirs in zip(codec.decoder.parameters(), twin.decoder.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_balancer_gives_each_loss_its_fraction_whatever_its_scale():
    balancer = Balancer({"loud": 1.0, "soft": 3.0, "absent": 9.0})
    x = torch.zeros(2, 10, requires_grad=True)
    for _ in range(5):
        gradient = balancer({"loud": 1e4 * x[0].sum(), "soft": 1e-4 * x[1].sum()}, x)
    assert torch.allclose(gradient.norm(dim=1), torch.tensor([0.25, 0.75]), atol=1e-4)
    smaller = balancer({"loud": 1e3 * x[0].sum(), "soft": 1e-4 * x[1].sum()}, x)
    assert smaller[0].norm() < 0.05  # a loss that became small stays small


def test_without_gradients_the_loss_is_the_reconstruction():
    codec = tiny_codec(discriminator_start=0.0)
    with torch.no_grad():
        loss, metrics = codec.loss({"waveforms": torch.rand(2, 8192)})
    assert loss.isfinite() and "discriminator" not in metrics


# ---- augmentation for unseen speakers


def test_augmented_sounds_are_higher_when_faster_and_each_has_its_own_equalizer():
    time = torch.arange(4096) / spectral.RATE
    tone = torch.sin(2 * torch.pi * 500 * time).expand(2, -1)
    higher = augment(tone, 3072, equalizer=0.0)
    expected = torch.sin(2 * torch.pi * 500 * 4 / 3 * time[:3072])
    assert (higher - expected)[:, 100:-100].abs().max() < 0.05  # the two ends meet
    torch.manual_seed(0)
    levels = augment(tone, 4096, equalizer=0.5).std(dim=1)
    assert levels[0] / levels[1] > 1.2 or levels[1] / levels[0] > 1.2


def test_augmented_training_uses_parts_of_the_usual_length():
    model = tiny_codec(crop=400, speed=0.3, equalizer=0.5).train()
    assert {model.crop(torch.randn(2, 500)).shape for _ in range(10)} == {(2, 400)}
    assert model.eval().crop(torch.arange(500.0)[None]).tolist() == [list(range(400))]
