"""The codec: nothing hears the future, pieces equal the whole, more books say more, and each player gets its own gradient."""

import copy

import pytest
import torch
from conftest import briefly
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogen.audio import spectral
from nanogen.audio.codec import Balancer, Codec, Config, by_strangers, spectral_loss
from nanogen.lab.train import train


def tiny_codec(**fields) -> Codec:
    """Hop 8 samples, 4 books of 16 words. Its weights are random, its books as large as what they are for."""
    small = dict(widths=(4, 8, 8), strides=(2, 4), dim=8, books=4, words=16, discriminator_width=2, crop=512)
    torch.manual_seed(0)
    return Codec(Config(**(small | fields))).eval()


def tones(count: int = 4, samples: int = 512) -> torch.Tensor:
    """(count, samples): two sines each."""
    time = torch.arange(samples) / spectral.RATE
    pitches = torch.linspace(200, 1500, 2 * count).view(count, 2, 1)
    return 0.3 * torch.sin(2 * torch.pi * pitches * time).sum(1)


# --- Spectra


@pytest.mark.parametrize("bands, n_fft", [(8, 64), (64, 256), (64, 512), (64, 1024)])
def test_every_mel_filter_peaks_at_its_centre_and_together_they_hear_everything(bands, n_fft):
    filters = spectral.mel_filters(bands, n_fft)
    assert filters.shape == (bands, n_fft // 2 + 1)
    assert torch.allclose(filters.sum(1), torch.ones(bands))
    top = spectral.hertz_to_mel(spectral.RATE / 2)
    centres = spectral.mel_to_hertz(torch.linspace(0, top, bands + 2))[1:-1]
    assert ((filters.argmax(1) * spectral.RATE / n_fft - centres).abs() <= spectral.RATE / n_fft).all()
    first, last = filters.argmax(1)[[0, -1]]
    assert (filters.sum(0)[first : last + 1] > 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        spectral.mel_filters(0, n_fft)


def test_a_sine_lights_up_its_band_with_its_amplitude():
    pitches = torch.tensor([250.0, 1000.0, 3000.0])  # each the middle of a bin of 256 samples
    waveforms = 0.5 * torch.sin(2 * torch.pi * pitches[:, None] * torch.arange(2048) / spectral.RATE)
    magnitudes = spectral.spectrogram(waveforms, 256)[:, :, 16]
    assert torch.allclose(magnitudes.amax(1), torch.full((3,), 0.5), atol=1e-3)
    bands = spectral.log_mel(waveforms)
    assert bands.shape == (3, 64, 2048 // 64 + 1) and bands.dtype == torch.float32
    heard = bands[:, :, 16].argmax(1)
    bins = (pitches * 256 / spectral.RATE).long()
    assert (heard == spectral.mel_filters(64, 256)[:, bins].argmax(0)).all()
    assert torch.allclose(spectral.log_mel(torch.zeros(1, 100)), torch.tensor(spectral.FLOOR).log())


# --- Coding


def test_shapes_rates_and_the_last_frame_filled_up():
    codec = tiny_codec()
    for samples in (1, 7, 8, 9, 100):
        frames = -(-samples // codec.hop)
        indices = codec.encode(torch.rand(2, samples))
        assert indices.shape == (2, frames, 4) and indices.dtype == torch.int64
        assert codec.decode(indices).shape == (2, frames * codec.hop)
        assert codec.latents(torch.rand(2, samples)).shape == (2, frames, 8)
    assert [codes.shape for codes in codec.codes()] == [(16, 8)] * 4
    full = Codec(Config())
    assert (full.hop, full.frame_rate, full.books, full.vocabulary) == (128, 62.5, 8, 256)
    assert full.kbps() == 4.0 and full.kbps(1) == 0.5


@pytest.mark.parametrize("waveforms", [torch.zeros(1, 50), torch.ones(1, 50), torch.full((1, 1), -1.0)])
def test_silence_clipping_and_a_single_sample_pass(waveforms):
    decoded = tiny_codec().decode(tiny_codec().encode(waveforms))
    assert decoded.isfinite().all() and decoded.abs().max() <= 1
    assert spectral_loss(decoded, torch.zeros_like(decoded)).isfinite()


def test_the_encoder_never_hears_the_future():
    codec, waveforms = tiny_codec(), torch.rand(1, 80)
    changed = waveforms.clone()
    changed[:, 40:] = 0  # from frame 5 on
    before, after = codec.latents(waveforms), codec.latents(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-3)


def test_the_decoder_never_hears_the_future():
    codec, z = tiny_codec(), torch.randn(1, 10, 8)
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
    pieces = list(codec.stream_encode(waveforms.split([*samples, 1], dim=1), books=3))
    indices = codec.encode(waveforms, books=3)
    assert torch.equal(torch.cat(pieces, dim=1), indices)
    pieces = list(codec.stream_decode([indices[:, :0], *indices.split(frames, dim=1)]))
    assert torch.allclose(torch.cat(pieces, dim=1), codec.decode(indices), atol=1e-4)


def test_a_stream_remembers_no_more_than_the_convolutions_need():
    codec, memory = tiny_codec(), {}
    sizes = []
    for _ in range(4):
        codec.latents(torch.rand(1, 4000), memory)
        sizes.append(sum(past.untyped_storage().nbytes() for past in memory.values()))
    assert sizes == sizes[:1] * 4 and sizes[0] < 4000  # bytes; a piece of sound alone has 16,000


def test_only_the_books_asked_for_are_used():
    codec, waveforms = tiny_codec(), torch.rand(1, 64)
    indices = codec.encode(waveforms)
    two = codec.encode(waveforms, books=2)
    assert torch.equal(indices[..., :2], two)
    before = codec.decode(two)
    for book in codec.quantizer.books[2:]:
        book.vectors.normal_()
    assert torch.equal(before, codec.decode(codec.encode(waveforms, books=2)))


@pytest.mark.parametrize("call, sentence", [
    (lambda c: c.encode(torch.zeros(1, 0)), "at least one sample"),
    (lambda c: c.encode(torch.zeros(8)), "must be \\(B, T\\)"),
    (lambda c: c.encode(torch.zeros(1, 8), books=5), "from 1 to 4"),
    (lambda c: c.encode(torch.zeros(1, 8), books=0), "from 1 to 4"),
    (lambda c: c.decode(torch.full((1, 2, 4), 16)), "from 0 to 15"),
    (lambda c: c.decode(torch.full((1, 2, 4), -1)), "from 0 to 15"),
    (lambda c: c.decode(torch.zeros(1, 2, 5).long()), "1 to 4 books"),
    (lambda c: c.decode(torch.zeros(2, 4).long()), "1 to 4 books"),
    (lambda c: c.decode(torch.zeros(1, 0, 4).long()), "1 or more frames"),
    (lambda c: Codec(Config(widths=(4, 8))), "one more than strides"),
])
def test_what_cannot_be_coded_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tiny_codec())


# --- Learning


def test_it_overfits_one_batch_and_every_further_book_says_more():
    codec = tiny_codec(widths=(8, 16, 16), adversary_after=60)
    waveforms = tones()
    with torch.no_grad():
        start, _ = codec.loss({"waveforms": waveforms})
    log = train(codec, {"waveforms": waveforms}, briefly(120, batch_size=4, clip=10.0, flip=False), quiet=True)
    with torch.no_grad():
        end, _ = codec.loss({"waveforms": waveforms})
    assert end < 0.6 * start, (start, end)
    assert {"waveform", "spectral", "commitment", "adversarial", "matching", "discriminator"} <= log[-1].keys()
    assert int(codec.steps) == 120
    z = codec.latents(waveforms)
    errors = [(z - codec.look_up(codec.encode(waveforms, k))).square().mean() for k in range(1, 5)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


def test_the_value_of_the_loss_is_the_reconstruction_loss_with_and_without_the_adversary():
    for after in (0, 1):
        loss, numbers = tiny_codec(adversary_after=after).train().loss({"waveforms": tones()})
        assert torch.allclose(loss, numbers["waveform"] + numbers["spectral"], atol=1e-4)
        assert ("discriminator" in numbers) == (after == 0)


def test_the_adversarial_gradient_reaches_the_generator_and_the_discriminator_learns_from_its_own_loss_alone():
    codec = tiny_codec(adversary_after=0, waveform=0.0, spectral=0.0, matching=0.0, commitment=0.0, unquantized=0.0, dropout=0.0)
    batch = {"waveforms": tones()}
    codec.train().loss(batch)  # the first batch starts the codebooks
    twin = copy.deepcopy(codec)
    codec.loss(batch)[0].backward()
    assert codec.encoder.layers[0].conv.weight.grad.norm() > 0 and codec.decoder.layers[0].conv.weight.grad.norm() > 0

    codes = twin.quantizer(twin.encoder(batch["waveforms"][..., None])).codes
    decoded = twin.decoder(codes)[..., 0].detach()
    own, _, _ = twin.discriminator.losses(decoded, batch["waveforms"])
    own.backward()
    for ours, alone in zip(codec.discriminator.parameters(), twin.discriminator.parameters(), strict=True):
        assert torch.allclose(ours.grad, alone.grad, atol=1e-6)


def test_the_scalar_has_the_balanced_gradient():
    codec = tiny_codec(adversary_after=9, commitment=0.0, unquantized=1.0).train()
    batch = {"waveforms": tones()}
    codec.loss(batch)
    twin = copy.deepcopy(codec)
    codec.loss(batch)[0].backward()
    decoded = twin.decoder(twin.encoder(batch["waveforms"][..., None]))[..., 0]
    heard = decoded.detach().requires_grad_()
    losses = {"waveform": nn.functional.l1_loss(heard, batch["waveforms"]), "spectral": spectral_loss(heard, batch["waveforms"])}
    decoded.backward(twin.balancer(losses, heard))
    for ours, theirs in zip(codec.decoder.parameters(), twin.decoder.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_balancer_gives_each_loss_its_share_whatever_its_scale():
    balancer = Balancer({"loud": 1.0, "soft": 3.0, "absent": 9.0})
    waveforms = torch.zeros(2, 10, requires_grad=True)
    for _ in range(5):
        gradient = balancer({"loud": 1e4 * waveforms[0].sum(), "soft": 1e-4 * waveforms[1].sum()}, waveforms)
    assert torch.allclose(gradient.norm(dim=1), torch.tensor([0.25, 0.75]), atol=1e-4)
    smaller = balancer({"loud": 1e3 * waveforms[0].sum(), "soft": 1e-4 * waveforms[1].sum()}, waveforms)
    assert smaller[0].norm() < 0.05  # a loss that became small stays small


def test_without_gradients_the_loss_is_the_reconstruction():
    codec = tiny_codec()
    with torch.no_grad():
        loss, numbers = codec.loss({"waveforms": torch.rand(2, 8192)})
    assert loss.isfinite() and int(codec.steps) == 0 and "discriminator" not in numbers


def test_what_strangers_say_is_higher_when_faster_and_only_as_coloured_as_asked():
    tone = torch.sin(2 * torch.pi * 500 * torch.arange(4096) / 8000).expand(2, -1)
    higher = by_strangers(tone, 3072, colour=0.0)
    expected = torch.sin(2 * torch.pi * 500 * 4 / 3 * torch.arange(3072) / 8000)
    assert (higher - expected)[:, 100:-100].abs().max() < 0.05  # the ends of the stretch meet
    torch.manual_seed(0)
    levels = by_strangers(tone, 4096, colour=0.5).std(dim=1)
    assert levels[0] / levels[1] > 1.2 or levels[1] / levels[0] > 1.2  # each through its own equaliser


def test_training_with_strangers_hears_stretches_of_the_usual_length():
    model = tiny_codec(crop=400, speed=0.3, colour=0.5).train()
    assert {model.crop(torch.randn(2, 500)).shape for _ in range(10)} == {(2, 400)}
    assert model.eval().crop(torch.arange(500.0)[None]).tolist() == [list(range(400))]
