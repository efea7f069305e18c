"""What must hold whatever is trained: the invariants of every method, one short test each."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import awake, briefly, tiny, tiny_data, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanogen import judge
from nanogen.blocks.sampling import reveal_schedule
from nanogen.image import pixel_ar, tokenizer
from nanogen.lab.metrics import psnr
from nanogen.lab.runs import train_run
from nanogen.lab.train import train

CHAINS = ("pixel_ar", "token_ar")
METHODS = (*CHAINS, "maskgit", "var", "mar", "flow", "dit")
STEPS = {"maskgit": 16, "mar": 16, "flow": 16, "dit": 16}  # the other samplers have no choice
LABELS = torch.tensor([0, 1, 2, 3])  # the last one: the null class


def sample(method, model, labels=LABELS, **settings):
    steps = {"steps": STEPS[method]} if method in STEPS else {}
    return model.sample({"labels": labels}, **steps, **settings)


def chain_logits(method, model, units):
    """All logits of a chain of units: (B, T, ...)."""
    if method == "token_ar":
        return model.logits(units, LABELS)
    x, condition = model.embed(units[:, :-1]), model.label(LABELS)
    h = model.transformer(x, model.angles, causal=True, condition=condition)
    return torch.stack(model.colour_logits(h, units), dim=2)  # (B, T, 3, 256)


def random_units(method):
    return torch.randint(32, (4, 16) if method == "token_ar" else (4, 16, 3))


# --- Chains


@pytest.mark.parametrize("position", range(16))
@pytest.mark.parametrize("method", CHAINS)
def test_the_future_never_changes_the_past(method, position):
    model, units = tiny(method), random_units(method)
    other = units.clone()
    other[:, position:] = (units[:, position:] + 7) % 32
    before, after = (chain_logits(method, model, x) for x in (units, other))
    assert torch.equal(before[:, :position], after[:, :position])
    if method == "pixel_ar":
        before, after = before[:, :, 0], after[:, :, 0]  # of red, the first colour of a pixel
    assert torch.equal(before[:, position], after[:, position])
    assert position == 15 or (before - after)[:, -1].abs().max() > 1e-3  # the future sees the past


@pytest.mark.parametrize("method", CHAINS)
def test_every_unit_sees_the_whole_past(method):
    model, units = tiny(method), random_units(method)
    before = chain_logits(method, model, units)
    for position in range(15):
        other = units.clone()
        other[:, position] = (units[:, position] + 7) % 32
        change = (chain_logits(method, model, other) - before).flatten(2).abs().amax((0, 2))
        assert (change[position + 1 :] > 0).all(), f"some later unit does not see {position}"


def test_red_does_not_see_green_and_green_does_not_see_blue():
    model, pixels = tiny("pixel_ar"), random_units("pixel_ar")
    before = chain_logits("pixel_ar", model, pixels)
    for colour in range(3):
        other = pixels.clone()
        other[:, -1, colour] += 100  # of the last pixel, so nothing else can change
        changed = (chain_logits("pixel_ar", model, other) != before).any(-1)[:, -1].any(0)
        assert changed.tolist() == [i > colour for i in range(3)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("method", CHAINS)
def test_cached_sampling_equals_uncached(method, guidance):
    model, settings = tiny(method), dict(guidance=guidance, seed=5)
    drawn = [sample(method, model, LABELS[:3], cached=c, **settings) for c in (True, False)]
    assert torch.equal(drawn[0]["images"], drawn[1]["images"])


def test_the_likelihood_is_the_product_of_the_probabilities_of_the_sampler(monkeypatch):
    model, drawn = tiny("pixel_ar"), []

    def draw_and_note(logits, *arguments):
        value = draw(logits, *arguments)
        drawn.append(logits.log_softmax(-1).gather(-1, value[..., None]).flatten())
        return value

    draw = pixel_ar.draw
    monkeypatch.setattr(pixel_ar, "draw", draw_and_note)
    batch = sample("pixel_ar", model, seed=1) | {"labels": LABELS}
    likelihood = model.log_likelihood(model.prepare(batch))
    assert len(drawn) == 3 * 16 and torch.allclose(likelihood, sum(drawn), atol=1e-3)


def test_before_training_a_colour_value_costs_eight_bits():
    model = tiny("pixel_ar", asleep=True)
    loss, metrics = model.loss(tiny_data("pixel_ar"))
    assert loss.item() == pytest.approx(math.log(256), rel=1e-2)
    assert metrics["bits_per_dim"].item() == pytest.approx(8, rel=1e-2)


# --- MaskGIT


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("order", ["confidence", "halton"])
@pytest.mark.parametrize("steps", [1, 5, 16])
def test_known_tokens_never_change_and_each_pass_adds_some(order, guidance, steps):
    history = tiny("maskgit").reveal(LABELS, steps, guidance, 1.0, seed=3, order=order)
    assert len(history) == steps and (history[-1] >= 0).all()
    for before, after in zip(history[:-1], history[1:], strict=True):
        assert torch.equal(after[before >= 0], before[before >= 0])
        assert ((after >= 0).sum(1) > (before >= 0).sum(1)).all()
    assert (history[0] >= 0).any(1).all()


@given(st.integers(1, 1024).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_every_schedule_reveals_something_at_each_step_and_all_at_the_end(count_and_steps):
    count, steps = count_and_steps
    schedule = [0, *reveal_schedule(count, steps)]
    assert len(schedule) == steps + 1 and schedule[-1] == count
    assert all(a < b for a, b in zip(schedule[:-1], schedule[1:], strict=True))


# --- Every sampler


@pytest.mark.parametrize("method", METHODS)
def test_guidance_1_is_conditional_and_costs_one_pass(method):
    model = tiny(method)
    network = model.network if method in ("flow", "dit") else model.transformer
    rows = []
    network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    plain = sample(method, model, LABELS[:3])["images"]
    assert set(rows) == {3}  # the passes see each image once
    other = sample(method, model, LABELS[1:])["images"]
    assert not torch.equal(plain, other)  # the label matters
    rows.clear()
    near, far = (sample(method, model, LABELS[:3], guidance=g)["images"] for g in (1 + 1e-5, 8.0))
    assert set(rows) == {6}  # with its label and with the null class
    assert (plain - near).abs().max() < 1e-2 and (plain - far).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_images_and_another_seed_others(method):
    model = tiny(method)
    first, again, other = (sample(method, model, seed=seed)["images"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.min() >= -1 and first.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_the_last_frame_is_the_image_and_frames_change_nothing(method):
    model = tiny(method)
    drawn = sample(method, model, frames=True)
    images, frames = drawn["images"], drawn["frames"]
    assert torch.equal(images, sample(method, model)["images"])
    assert torch.equal(frames[-1], images) and all(f.shape == images.shape for f in frames)
    assert len(frames) == {"pixel_ar": 4, "var": 6, "flow": 17, "dit": 17}.get(method, 16)


def test_the_last_frame_is_the_image_where_sixteen_frames_do_not_divide_the_chain():
    drawn = sample("token_ar", tiny("token_ar", grid=5), frames=True)  # 25 tokens
    assert torch.equal(drawn["frames"][-1], drawn["images"])


@pytest.mark.parametrize("method", ["pixel_ar", "token_ar", "maskgit", "var", "mar", "dit"])
def test_what_prepare_gives_is_what_loss_takes(method):
    model = tiny(method)
    size = model.config.size
    batch = {"images": torch.rand(4, 3, size, size) * 2 - 1, "labels": LABELS % 3}
    prepared = model.prepare(batch)
    assert model.encodes and "images" not in prepared
    assert torch.equal(prepared["labels"], batch["labels"])
    loss, _ = model.loss(prepared)
    assert loss.isfinite() and loss.shape == ()


# --- Training


@pytest.mark.parametrize(("method", "steps", "chance"), [
    ("pixel_ar", 50, math.log(256)), ("token_ar", 40, math.log(32)), ("maskgit", 80, math.log(32)),
    ("var", 40, math.log(32)), ("mar", 200, 2), ("flow", 100, 1), ("dit", 60, 1)])
def test_every_method_can_overfit_one_batch(method, steps, chance):
    model, data = tiny(method, label_dropout=0.0, asleep=True), tiny_data(method, count=3)
    data["labels"] = torch.arange(3)
    for name in {"images", "latents"} & set(data):  # flat: a small network learns that soon
        data[name] = data[name][:, :, :1, :1].expand_as(data[name])
    if method == "maskgit":
        model.config.smoothing = 0.0
    log = train(model, data, briefly(steps, batch_size=3, lr=1e-2, flip=False), quiet=True)
    assert log[-1]["loss"] < 0.5 * chance < log[0]["loss"]


@pytest.mark.parametrize("bottleneck", tokenizer.BOTTLENECKS)
def test_every_tokenizer_can_overfit_one_batch(bottleneck):
    codes = dict(codebook_size=64) if bottleneck in ("vq", "multiscale") else {}
    model = tiny_tokenizer(bottleneck, **codes)
    images = F.interpolate(torch.rand(8, 3, 2, 2), 8, mode="bilinear") * 2 - 1
    before = psnr(model.reconstruct(images), images)
    data = {"images": ((images + 1) * 127.5).round().byte()}
    train(model, data, briefly(80, batch_size=8, flip=False), quiet=True)
    assert psnr(model.reconstruct(images), images) > max(before + 4, 14)


def make(method):
    """A model and its data, as a function of a seed alone."""
    if method == "tokenizer":
        return tiny_tokenizer(), {"images": tiny_data("flow")["images"]}
    if method == "judge":
        torch.manual_seed(0)
        model = judge.Judge(judge.Config(widths=(16, 16, 16), classes=3, size=8, shift=1))
        return awake(model), tiny_data("flow")
    return tiny(method), tiny_data(method)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("method", [*METHODS, "meanflow", "tokenizer", "judge"])
def test_an_interrupted_and_resumed_training_ends_in_the_same_weights_bit_for_bit(
        method, optimizer, tmp_path, monkeypatch):
    options = briefly(8, batch_size=4, optimizer=optimizer, save_every=0.0)
    whole, data = make(method)
    log = train(whole, data, options, quiet=True)

    broken, _ = make(method)
    loss, calls = broken.loss, []

    def fails_at_step_5(batch):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("a power cut")
        return loss(batch)

    monkeypatch.setattr(broken, "loss", fails_at_step_5)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, data, options, tmp_path, quiet=True)
    resumed, _ = make(method)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()  # nothing but the saved state may count
    resumed_log = train(resumed, data, options, tmp_path, resume=True, quiet=True)
    assert [line["step"] for line in resumed_log] == list(range(1, 9))
    assert [line["loss"] for line in resumed_log] == [line["loss"] for line in log]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def train_as_one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, data = make_deterministic()
    train(model, data, briefly(8), quiet=True)
    torch.save(model.state_dict(), f"{folder}/rank{rank}")
    dist.destroy_process_group()


def make_deterministic():
    return tiny("token_ar", label_dropout=0.0), tiny_data("token_ar", count=64)


def test_two_processes_train_the_model_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    mp.spawn(train_as_one_of_two, (str(tmp_path),), nprocs=2)
    monkeypatch.delenv("WORLD_SIZE")
    ranks = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    (start, data), (alone, _) = make_deterministic(), make_deterministic()
    train(alone, data, briefly(8), quiet=True)
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert torch.allclose(ranks[0][name], value, atol=1e-5), name
    assert (alone.head.free.weight - start.head.free.weight).abs().max() > 1e-3  # it learned


def test_the_seed_decides_the_weights_and_nothing_else_does(own_images, tmp_path):
    tiny_judge = dict(widths=(16, 16, 16), steps=2, batch_size=8)

    def weights(name, seed):
        torch.rand(len(name))  # whatever else was drawn before
        overrides = tiny_judge | {"seed": seed}
        train_run("judge", str(own_images), overrides, tmp_path / name, quiet=True)
        return load_file(tmp_path / name / "model.safetensors")

    first, again = weights("first", 0), weights("again, with a longer name", 0)
    other = weights("other", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


@pytest.mark.parametrize("method", ["token_ar", "maskgit", "var", "mar", "dit"])
def test_the_tokenizer_is_frozen_and_no_part_of_the_model(method):
    model = tiny(method).train()
    assert not any("tokenizer" in name for name in model.state_dict())
    frozen = {id(parameter) for parameter in model.tokenizer.parameters()}
    assert not any(id(parameter) in frozen for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.tokenizer.parameters())
    assert not model.tokenizer.training
    model.double()  # but it moves with the model
    assert next(model.tokenizer.parameters()).dtype == torch.float64
