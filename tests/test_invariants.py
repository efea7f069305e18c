"""What must hold whatever is trained: the promises of every chapter, one short test each."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import awake, briefly, tiny, tiny_data, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanogen.image import maskgit, pixel_ar, tokenizer
from nanogen.lab import judges
from nanogen.lab.metrics import psnr
from nanogen.lab.runs import train_run
from nanogen.lab.train import train

CHAINS = ("pixel_ar", "token_ar")
CHAPTERS = (*CHAINS, "maskgit", "var", "mar", "flow", "dit")
PASSES = {"var": 6}  # of a sampler that allows one number only; 16 where nothing is said
LABELS = torch.tensor([0, 1, 2, 3])  # the last one: no label


def chain_logits(chapter, model, units):
    """All logits of a chain of units: (B, T, ...)."""
    if chapter == "token_ar":
        return model.logits(units, LABELS)
    h = model.transformer(model.embed(units[:, :-1]), model.angles, causal=True, condition=model.label(LABELS))
    return torch.stack(model.colour_logits(h, units), dim=2)  # (B, T, 3, 256)


def random_units(chapter):
    return torch.randint(32, (4, 16) if chapter == "token_ar" else (4, 16, 3))


# --- Chains


@pytest.mark.parametrize("place", range(16))
@pytest.mark.parametrize("chapter", CHAINS)
def test_the_future_never_changes_the_past(chapter, place):
    model, units = tiny(chapter), random_units(chapter)
    other = units.clone()
    other[:, place:] = (units[:, place:] + 7) % 32
    before, after = chain_logits(chapter, model, units), chain_logits(chapter, model, other)
    assert torch.equal(before[:, :place], after[:, :place])
    if chapter == "pixel_ar":
        before, after = before[:, :, 0], after[:, :, 0]  # of red, which no other colour of its pixel may change
    assert torch.equal(before[:, place], after[:, place])
    assert place == 15 or (before - after)[:, -1].abs().max() > 1e-3  # but the future knows the past


@pytest.mark.parametrize("chapter", CHAINS)
def test_every_unit_knows_the_whole_past(chapter):
    model, units = tiny(chapter), random_units(chapter)
    before, blind = chain_logits(chapter, model, units), []
    for place in range(15):
        other = units.clone()
        other[:, place] = (units[:, place] + 7) % 32
        difference = (chain_logits(chapter, model, other) - before).flatten(2).abs().amax((0, 2))
        blind += [f"{later} of {place}" for later in range(place + 1, 16) if difference[later] == 0]
    assert not blind, f"units that know nothing of an earlier one: {', '.join(blind)}"


def test_red_does_not_see_green_and_green_does_not_see_blue():
    model, pixels = tiny("pixel_ar"), random_units("pixel_ar")
    before = chain_logits("pixel_ar", model, pixels)
    for colour in range(3):
        other = pixels.clone()
        other[:, -1, colour] += 100  # of the last pixel, so nothing else can change
        changed = (chain_logits("pixel_ar", model, other) != before).any(-1)[:, -1].any(0)
        assert changed.tolist() == [i > colour for i in range(3)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("chapter", CHAINS)
def test_cached_sampling_equals_uncached(chapter, guidance):
    model = tiny(chapter)
    pictures = [model.sample(LABELS[:3], guidance=guidance, seed=5, cached=cached) for cached in (True, False)]
    assert torch.equal(*pictures)


def test_the_likelihood_is_the_product_of_the_probabilities_that_the_sampler_draws_with(monkeypatch):
    model, drawn = tiny("pixel_ar"), []

    def draw_and_note(logits, *arguments):
        value = draw(logits, *arguments)
        drawn.append(logits.log_softmax(-1).gather(-1, value[..., None]).flatten())
        return value

    draw = pixel_ar.draw
    monkeypatch.setattr(pixel_ar, "draw", draw_and_note)
    pictures = model.sample(LABELS, seed=1)
    likelihood = model.log_likelihood(model.prepare(pictures, LABELS)["pixels"], LABELS)
    assert len(drawn) == 3 * 16 and torch.allclose(likelihood, sum(drawn), atol=1e-3)


def test_before_training_a_pixel_costs_eight_bits():
    model = pixel_ar.PixelAR(pixel_ar.Config(width=32, depth=2, heads=2, size=4, classes=3))
    loss, numbers = model.loss(tiny_data("pixel_ar"))
    assert loss.item() == pytest.approx(math.log(256), rel=1e-2) and numbers["bits_per_dim"].item() == pytest.approx(8, rel=1e-2)


# --- MaskGIT


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("order", ["confidence", "halton"])
@pytest.mark.parametrize("steps", [1, 5, 16])
def test_committed_tokens_never_change_and_each_step_commits_more(order, guidance, steps):
    history = tiny("maskgit").reveal(LABELS, steps, guidance, 1.0, seed=3, order=order)
    assert len(history) == steps and (history[-1] >= 0).all()
    for before, after in zip(history[:-1], history[1:], strict=True):
        assert torch.equal(after[before >= 0], before[before >= 0])
        assert ((after >= 0).sum(1) > (before >= 0).sum(1)).all()
    assert (history[0] >= 0).any(1).all()


@given(st.integers(1, 1024).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_every_schedule_reveals_something_at_each_step_and_all_at_the_end(count_and_steps):
    count, steps = count_and_steps
    schedule = [0, *maskgit.reveal_schedule(count, steps)]
    assert len(schedule) == steps + 1 and schedule[-1] == count
    assert all(a < b for a, b in zip(schedule[:-1], schedule[1:], strict=True))


# --- Every sampler


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_guidance_1_is_conditional_and_costs_one_pass(chapter, monkeypatch):
    model = tiny(chapter)
    network = model.network if chapter in ("flow", "dit") else model.transformer
    rows = []
    network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    plain = model.sample(LABELS[:3], steps=PASSES.get(chapter, 16))
    assert set(rows) == {3}  # the passes see each picture once
    assert not torch.equal(plain, model.sample(LABELS[1:], steps=PASSES.get(chapter, 16)))  # the label matters
    rows.clear()
    guided = model.sample(LABELS[:3], steps=PASSES.get(chapter, 16), guidance=1 + 1e-5)
    assert set(rows) == {6}  # with its label and without
    assert (plain - guided).abs().max() < 1e-2
    assert (plain - model.sample(LABELS[:3], steps=PASSES.get(chapter, 16), guidance=8.0)).abs().max() > 1e-2


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_seed_gives_the_same_pictures_and_another_seed_others(chapter):
    model = tiny(chapter)
    first, again, other = (model.sample(LABELS, steps=PASSES.get(chapter, 16), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.min() >= -1 and first.max() <= 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_last_frame_is_the_picture_and_watching_changes_nothing(chapter):
    model = tiny(chapter)
    pictures, frames = model.sample(LABELS, steps=PASSES.get(chapter, 16), frames=True)
    assert torch.equal(pictures, model.sample(LABELS, steps=PASSES.get(chapter, 16)))
    assert torch.equal(frames[-1], pictures) and all(frame.shape == pictures.shape for frame in frames)
    assert len(frames) == {"pixel_ar": 4, "var": 6, "flow": 17, "dit": 17}.get(chapter, 16)


def test_the_last_frame_is_the_picture_where_sixteen_frames_do_not_divide_the_chain():
    pictures, frames = (model := tiny("token_ar", grid=5)).sample(LABELS, frames=True)  # 25 tokens
    assert torch.equal(frames[-1], pictures) and model.grid == 5


# --- Training


@pytest.mark.parametrize(("chapter", "steps", "chance"), [
    ("pixel_ar", 50, math.log(256)), ("token_ar", 40, math.log(32)), ("maskgit", 80, math.log(32)),
    ("var", 40, math.log(32)), ("mar", 200, 2), ("flow", 100, 1), ("dit", 60, 1)])
def test_every_chapter_can_learn_one_batch_by_heart(chapter, steps, chance):
    model, data = tiny(chapter, label_dropout=0.0, asleep=True), tiny_data(chapter, count=3)
    data["labels"] = torch.arange(3)
    for name in {"images", "latents"} & set(data):
        data[name] = data[name][:, :, :1, :1].expand_as(data[name])  # flat: a small network learns that soon
    if chapter == "maskgit":
        model.config.smoothing = 0.0
    log = train(model, data, briefly(steps, batch_size=3, lr=1e-2, flip=False), quiet=True)
    assert log[-1]["loss"] < 0.5 * chance < log[0]["loss"]


@pytest.mark.parametrize("bottleneck", tokenizer.BOTTLENECKS)
def test_every_tokenizer_learns_to_bring_back_one_batch(bottleneck):
    model = tiny_tokenizer(bottleneck, codes=64)
    images = torch.nn.functional.interpolate(torch.rand(8, 3, 2, 2), 8, mode="bilinear") * 2 - 1
    before = psnr(model.reconstruct(images), images)
    train(model, {"images": ((images + 1) * 127.5).round().byte()}, briefly(80, batch_size=8, flip=False), quiet=True)
    assert psnr(model.reconstruct(images), images) > max(before + 4, 14)


def make(chapter):
    """A model and its data, as a function of a seed alone."""
    if chapter == "tokenizer":
        return tiny_tokenizer(), {"images": tiny_data("flow")["images"]}
    if chapter == "judge":
        torch.manual_seed(0)
        model = judges.Judge(judges.Config(widths=(16, 16, 16), classes=3, size=8, shift=1))
        return awake(model), tiny_data("flow")
    return tiny(chapter), tiny_data(chapter)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("chapter", [*CHAPTERS, "meanflow", "tokenizer", "judge"])
def test_a_training_that_is_interrupted_and_resumed_ends_in_the_same_weights_bit_for_bit(chapter, optimizer, tmp_path, monkeypatch):
    options = briefly(8, batch_size=4, optimizer=optimizer, save_every=0.0)
    whole, data = make(chapter)
    log = train(whole, data, options, quiet=True)

    broken, _ = make(chapter)
    loss, calls = broken.loss, []

    def fails_at_step_5(batch):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("a power cut")
        return loss(batch)

    monkeypatch.setattr(broken, "loss", fails_at_step_5)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, data, options, tmp_path, quiet=True)
    resumed, _ = make(chapter)
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
    assert (alone.head.free.weight - start.head.free.weight).abs().max() > 1e-3  # there was something to learn


def test_the_seed_decides_the_weights_and_nothing_else_does(own_pictures, tmp_path):
    tiny_judge = dict(widths=(16, 16, 16), steps=2, batch_size=8)

    def weights(name, seed):
        torch.rand(len(name))  # whatever else was drawn before
        train_run("judge", str(own_pictures), tiny_judge | {"seed": seed}, tmp_path / name, quiet=True)
        return load_file(tmp_path / name / "model.safetensors")

    first, again, other = weights("first", 0), weights("again, with a longer name", 0), weights("other", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


@pytest.mark.parametrize("chapter", ["token_ar", "maskgit", "var", "mar", "dit"])
def test_the_tokenizer_is_no_part_of_the_model_that_stands_on_it(chapter):
    model = tiny(chapter)
    assert not any("tokenizer" in name for name in model.state_dict())
    frozen = {id(parameter) for parameter in model.tokenizer[0].parameters()}
    assert not any(id(parameter) in frozen for parameter in model.parameters())
