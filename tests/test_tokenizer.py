"""The image tokenizer: images become tokens and images again, whatever the bottleneck."""

import pytest
import torch
from conftest import tiny_tokenizer

from nanogen import judge
from nanogen.audio import codec
from nanogen.image import tokenizer

KINDS = ("vq", "fsq", "kl", "none")
IMAGES = torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16).sin()


@pytest.mark.parametrize(("widths", "grid"), [((16,), 8), ((16, 16), 4), ((16, 16, 32), 2)])
@pytest.mark.parametrize("bottleneck", KINDS)
def test_an_image_becomes_a_grid_and_an_image_again(bottleneck, widths, grid):
    model = tiny_tokenizer(bottleneck, widths=widths, size=16)
    tokens = model.encode(IMAGES)
    assert model.grid == grid
    if bottleneck in ("vq", "fsq"):
        assert tokens.shape == (5, grid * grid) and tokens.dtype == torch.int64
        assert model.codebook_size == {"vq": 32, "fsq": 20}[bottleneck]
        assert 0 <= tokens.min() and tokens.max() < model.codebook_size
    else:
        assert tokens.shape == (5, 4, grid, grid) and model.codebook_size == 0
    decoded = model.decode(tokens)
    assert decoded.shape == IMAGES.shape and decoded.min() >= -1 and decoded.max() <= 1
    assert torch.equal(decoded, model.reconstruct(IMAGES))  # and once more gives the same
    assert len(decoded.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("bottleneck", KINDS)
def test_what_is_decoded_is_what_the_loss_saw(bottleneck):
    model = tiny_tokenizer(bottleneck, size=16)
    loss, metrics = model.loss({"images": IMAGES})
    error = model.decoder(model.bottleneck(model.encoder(IMAGES))[0]) - IMAGES
    squared = error.square().mean()
    assert metrics["squared_error"].item() == pytest.approx(squared.item(), rel=1e-4)
    expected = 5 * squared + metrics["bottleneck"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    clamped = (error + IMAGES).clamp(-1, 1)
    assert torch.allclose(model.reconstruct(IMAGES), clamped, atol=1e-5)


def test_kl_draws_in_training_only_and_pulls_towards_the_normal():
    model = tiny_tokenizer("kl", size=16)
    features = model.encoder(IMAGES)
    assert torch.equal(model.bottleneck(features)[0], model.bottleneck(features)[0])
    model.train()
    draws = torch.stack([model.bottleneck(features)[0] for _ in range(400)])
    mean, log_variance = features.chunk(2, dim=1)
    assert torch.allclose(draws.mean(0), mean, atol=0.4)
    assert torch.allclose(draws.std(0).log() * 2, log_variance, atol=0.5)
    normal = torch.zeros_like(features)
    losses = [model.bottleneck(normal + shift)[2] for shift in (0, 1, -1)]
    assert losses[0] == 0 and losses[1] > 0 and losses[2] > 0


def test_encoding_in_training_mode_moves_no_codebook_of_the_codec():
    config = codec.Config(widths=(4, 4, 4), crop=1024, codebook_size=8, dim=8)
    model, sound = codec.Codec(config).train(), torch.randn(2, 2048)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes = model.encode(sound)
    assert torch.equal(codes, model.encode(sound)) and (codes >= 0).all()  # no quantizer dropout
    with pytest.raises(ValueError, match="depth"):
        model.encode(sound, codebooks=9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bottleneck", tokenizer.BOTTLENECKS)
def test_encoding_learns_nothing_and_draws_nothing_in_training_mode_either(bottleneck):
    model = tiny_tokenizer(bottleneck).train()
    x = torch.rand(8, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(model.encode(x), model.encode(x)) and model.training
    assert torch.equal(model.reconstruct(x), model.eval().reconstruct(x)) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def perceptual_network():
    return judge.Judge(judge.Config(widths=(16, 16, 16), size=16)).eval().requires_grad_(False)


def test_the_perceptual_loss_is_zero_for_equal_images_and_has_a_gradient():
    network, other = perceptual_network(), IMAGES + 0.3 * torch.randn_like(IMAGES)
    assert tokenizer.perceptual_loss(network, IMAGES, IMAGES).item() == pytest.approx(0, abs=1e-6)
    loss = tokenizer.perceptual_loss(network, other.requires_grad_(), IMAGES)
    loss.backward()
    assert loss > 0.01 and other.grad.abs().sum() > 0


def test_training_with_a_perceptual_weight_needs_the_network_and_a_finished_model_does_not():
    config = tokenizer.Config(widths=(16,), blocks=1, size=16, codebook_size=32)
    required = tokenizer.Tokenizer.requires(config)
    assert required.method == "judge" and required.training_only
    assert required.config == {} and required.recipe == required.name == "perceptual"
    model = tokenizer.Tokenizer(config)
    with pytest.raises(ValueError, match="needs a perceptual network.* or set perceptual=0"):
        model.loss({"images": IMAGES})
    loss, metrics = model.eval().loss({"images": IMAGES})
    assert loss.isfinite() and "perceptual" not in metrics
    model = tokenizer.Tokenizer(config, perceptual_network())
    assert model.loss({"images": IMAGES})[1]["perceptual"] > 0
    assert not any("perceptual" in name for name in model.state_dict())
    assert tokenizer.Tokenizer.requires(tokenizer.Config(perceptual=0.0)) is None


@pytest.mark.parametrize("bottleneck", ["vq", "fsq"])
def test_tokens_not_there_yet_are_painted_grey(bottleneck):
    model = tiny_tokenizer(bottleneck, grid=4)
    tokens = torch.randint(model.codebook_size, (2, 16))
    partial = tokens.clone()
    partial[0, 5], partial[1, :] = -1, -1
    shown = tokenizer.show_partial(model, partial)
    assert shown.shape == (2, 3, 8, 8) and not shown[1].any()
    assert not shown[0, :, 2:4, 2:4].any()  # cell 5 of 4x4 is in row 1, column 1
    assert (shown[0] == 0).all(0).sum() == 4
    assert torch.equal(tokenizer.show_partial(model, tokens), model.decode(tokens))


@pytest.mark.parametrize("bottleneck", ["vq", "fsq"])
def test_no_code_of_an_unknown_cell_leaks_into_known_ones(bottleneck):
    """The decoder sees the mean of all codes there. Code 0 would shine through, however extreme."""
    model, seen = tiny_tokenizer(bottleneck, grid=4), []
    if bottleneck == "vq":
        model.quantizer.codebook.vectors[0] = 10.0
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    unknown = torch.arange(16) % 2 == 1
    tokens = torch.randint(1, model.codebook_size, (2, 16)).masked_fill(unknown, -1)
    tokenizer.show_partial(model, tokens)
    every = model.quantizer.decode(torch.arange(model.codebook_size))
    decoded = seen[0].flatten(2).mT  # (2, 16, 16)
    assert torch.allclose(decoded[:, unknown], every.mean(0).expand(2, 8, -1), atol=1e-5)
    assert torch.equal(decoded[:, ~unknown], every[tokens[:, ~unknown]])


@pytest.mark.parametrize(("fields", "said"), [
    (dict(bottleneck="gan"), "bottleneck must be one of"), (dict(widths=(8,)), "widths must be"),
    (dict(bottleneck="fsq", levels=(1,)), "levels must be"), (dict(size=30), "size must be"),
    (dict(bottleneck="multiscale", scales=(2, 1)), "scales must be"), (dict(kl=1.0), "kl has no"),
    (dict(bottleneck="fsq", codebook_size=9), "codebook_size has no effect with bottleneck fsq"),
    (dict(bottleneck="none", kl=1.0), "kl has no effect"), (dict(levels=(3, 3)), "levels has no"),
    (dict(bottleneck="kl", code_dim=4), "code_dim has no effect"), (dict(blocks=0), "blocks must"),
    (dict(scales=(1, 2)), "scales has no effect"), (dict(squared=-1.0), "squared must be")])
def test_a_tokenizer_that_cannot_be_is_refused_by_name(fields, said):
    with pytest.raises(ValueError, match=said):
        tokenizer.Config(**fields)
