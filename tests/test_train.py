"""Optimizer, batches, EMA, loop, machine. What is interrupted goes on; what is broken says so."""

import errno
import itertools
import json
import math
import os
import signal
import time

import pytest
import torch
from conftest import awake, briefly, tiny, tiny_data, tiny_tokenizer
from torch import nn

from nanogen import UserError
from nanogen.lab import machine
from nanogen.lab.optimizer import Muon, make_optimizers, orthogonalize
from nanogen.lab.train import Training, check_batch, draw_batch, train, update_ema
from nanogen.method import Method

# ---- the optimizer


@pytest.mark.parametrize("shape", [(8, 8), (40, 16), (16, 40), (1, 12), (64, 3)])
def test_muon_follows_every_direction_of_a_matrix_by_about_the_same_amount(shape):
    matrix = torch.randn(shape) * torch.logspace(0, -1, shape[1])
    direction = orthogonalize(matrix)
    values = torch.linalg.svdvals(direction)
    assert direction.shape == shape and values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((direction * (u @ v)).sum() / (direction.norm() * (u @ v).norm())) > 0.95
    # The size of the gradient says nothing.
    assert torch.allclose(orthogonalize(1000 * matrix), direction, atol=1e-4)


def test_muon_treats_matrices_of_one_shape_together_as_it_treats_each_alone():
    weights = [nn.Parameter(torch.randn(size)) for size in ((8, 4), (8, 4), (4, 4, 2, 1), (8, 4))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
    for one, weight in zip(alone, weights, strict=True):
        one.grad = weight.grad.clone()
    together, each = Muon(weights, lr=0.1), [Muon([one], lr=0.1) for one in alone]
    for _ in range(3):
        for optimizer in (together, *each):
            optimizer.step()
    for one, weight in zip(alone, weights, strict=True):
        torch.testing.assert_close(one, weight)


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    weight = nn.Parameter(torch.zeros(64, 32, 1, 1))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.1).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.3)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("method", ["pixel_ar", "token_ar", "maskgit", "var", "mar", "flow", "dit",
                                    "meanflow", "tokenizer"])
def test_every_weight_is_in_exactly_one_optimizer(method, kind):
    model = tiny_tokenizer() if method == "tokenizer" else tiny(method)
    optimizers = make_optimizers(model, kind, 1e-3, 0.1, torch.float32)
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    owned = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    by_muon = {id(p) for optimizer, group in groups for p in group["params"]
               if isinstance(optimizer, Muon)}
    assert bool(by_muon) == (kind == "muon")
    for module in model.modules():
        if isinstance(module, nn.Embedding) or getattr(module, "adamw", False):
            assert not by_muon & {id(p) for p in module.parameters(recurse=False)}
    vectors = {id(p) for p in model.parameters() if p.ndim < 2}
    assert not by_muon & vectors
    assert vectors == {id(p) for _, group in groups for p in group["params"]
                       if group["weight_decay"] == 0}


# ---- the batches


def counted(count, batch_size, **options):
    return {"number": torch.arange(count)}, Training(batch_size=batch_size, **options)


def test_every_example_comes_once_an_epoch_in_another_order_each_time():
    def epoch(number, options):
        return torch.cat([draw_batch(data, 5 * number + i, options)["number"] for i in range(5)])

    data, options = counted(20, 4)
    epochs = [epoch(number, options) for number in range(3)]
    assert all(sorted(each.tolist()) == list(range(20)) for each in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert not torch.equal(epochs[0], epoch(0, Training(batch_size=4, seed=1)))


def test_processes_divide_the_same_batch():
    data, options = counted(20, 8)
    whole = draw_batch(data, 3, options)["number"]
    parts = [draw_batch(data, 3, options, rank, world=4)["number"] for rank in range(4)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(), whole)


def test_fewer_examples_than_a_batch_are_one_batch():
    data, options = counted(3, 8)
    assert sorted(draw_batch(data, 5, options)["number"].tolist()) == [0, 1, 2]


def test_half_of_the_images_are_mirrored_and_all_are_floats():
    data = {"images": torch.arange(256).view(1, 1, 1, 256).expand(400, 3, 1, 256).byte()}
    options = Training(batch_size=400)
    batch = draw_batch(data, 0, options)["images"]
    mirrored = batch[:, 0, 0, 0] == 1
    assert 150 < mirrored.sum() < 250 and batch.dtype == torch.float32
    assert batch.min() == -1 and batch.max() == 1
    assert torch.equal(batch[mirrored][0].flip(-1), batch[~mirrored][0])
    plain = draw_batch(data, 0, Training(batch_size=400, flip=False))["images"]
    assert (plain[:, 0, 0, 0] == -1).all()
    parts = [draw_batch(data, 0, options, rank, 2)["images"] for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), batch)


def test_a_batch_that_processes_cannot_divide_evenly_is_a_sentence(monkeypatch):
    """Their gradients are averaged with equal weights, whoever has more examples."""
    monkeypatch.setattr("nanogen.lab.machine.join_processes", lambda: (0, 3))
    for count, batch_size in ((64, 16), (64, 2), (2, 3), (16, 24)):
        words = f"batch_size must be a multiple of 3, .* {count}, .*got {batch_size}"
        with pytest.raises(UserError, match=words):
            check_batch(Training(batch_size=batch_size), count)
    for count, batch_size in ((64, 15), (15, 24)):
        check_batch(Training(batch_size=batch_size), count)


# ---- the EMA


@pytest.mark.parametrize("fraction", [0.03, 0.1, 0.3])
def test_the_mean_age_of_the_ema_is_the_given_fraction_of_the_run(fraction):
    """The weight at step i is i, so the EMA is a mean step; its age is how far that lies back."""
    model = nn.Linear(1, 1, bias=False)
    ema = {"weight": torch.zeros(1, 1)}
    for step in range(1, 1001):
        nn.init.constant_(model.weight, step)
        update_ema(ema, model, step, fraction)
        if step in (200, 1000):
            age = (step - ema["weight"].item()) / step
            assert age == pytest.approx(fraction, rel=0.05, abs=2 / step)


def test_constant_weights_stay_and_buffers_are_copied():
    model = nn.BatchNorm1d(3)
    ema = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for step in range(1, 6):
        update_ema(ema, model, step, 0.03)
        assert all(torch.allclose(ema[name].float(), value.float())
                   for name, value in model.state_dict().items())
    model.weight.data += 1
    update_ema(ema, model, 6, 0.0)  # fraction 0: no averaging
    assert torch.equal(ema["weight"], model.weight)


# ---- the loop


class Counter(Method):
    """One weight, whose loss is a function of the step; its gradient is always 1."""

    def __init__(self, loss=lambda step: 1.0):
        super().__init__()
        self.weight, self.step, self.value = nn.Parameter(torch.zeros(2)), 0, loss

    def loss(self, batch):
        self.step += 1
        return self.weight.sum() - self.weight.sum().detach() + self.value(self.step), {}


DATA = {"labels": torch.zeros(64, dtype=torch.long)}


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    log = train(Counter(), DATA, briefly(100, lr=1.0, warmup=10, decay_start=0.5), quiet=True)
    rates = [line["lr"] for line in log]
    assert len(rates) == 100 and rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5)
    assert max(rates) == 1 and rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5) and rates[-1] == pytest.approx(0.02)


def test_a_budget_in_minutes_ends_in_time_and_the_model_has_the_ema():
    model, options = Counter(), briefly(1, minutes=0.005, batch_size=8, lr=2e-3, save_every=9e9)
    log = train(model, DATA, options, quiet=True)
    assert 0.004 < log[-1]["minutes"] < 0.2 and log[-1]["step"] == model.step > 1
    assert not model.training and model.weight.mean() < 0  # downhill
    assert [line["percent"] for line in log] == sorted({line["percent"] for line in log})


@pytest.mark.parametrize("tick", [0.05, 0.07, 0.09])
def test_a_budget_in_minutes_has_a_last_line_whenever_the_time_is_over(tick, monkeypatch):
    monkeypatch.setattr(time, "monotonic", (tick * call for call in itertools.count()).__next__)
    log = train(model := Counter(), DATA, briefly(1, minutes=1.0), quiet=True)
    assert log[-1]["step"] == model.step > 100 and log[-1]["percent"] == 100


def test_the_speed_counts_examples_that_a_step_has_seen_not_those_that_fit_into_a_batch():
    model = Counter(lambda step: time.sleep(0.02) or 1.0)
    log = train(model, {"labels": torch.zeros(4)}, briefly(3, batch_size=10_000), quiet=True)
    assert all(0 < line["examples_per_second"] <= 4 / 0.02 for line in log)


def test_a_loss_that_is_not_finite_stops_the_run_with_what_to_try(tmp_path):
    model = Counter(lambda step: math.nan if step == 30 else 1.0)
    with pytest.raises(UserError) as error:
        train(model, DATA, briefly(50, lr=0.3), tmp_path, quiet=True)
    assert all(words in str(error.value) for words in ("nan", "--lr 0.1", "--warmup"))
    assert "keeps" not in str(error.value)  # nothing was saved yet
    with pytest.raises(UserError, match="--lr 0.1"):
        train(Counter(lambda step: math.inf), DATA, briefly(50, lr=0.3), quiet=True)


def test_a_loss_that_is_not_finite_in_the_last_step_is_not_a_finished_run(tmp_path):
    model = Counter(lambda step: math.nan if step == 3 else 1.0)
    with pytest.raises(UserError, match="nan"):
        train(model, DATA, briefly(3), tmp_path, quiet=True)
    assert not (tmp_path / "state.pt").exists()


def test_the_loss_of_examples_not_trained_on_is_logged_and_changes_nothing(tmp_path):
    held_out, seen = {"labels": torch.ones(48)}, []

    class Watches(Counter):
        def loss(self, batch):
            seen.append((self.training, batch["labels"].max().item()))
            return super().loss(batch)

    with_it, without = Watches(), Counter()
    log = train(with_it, DATA, briefly(200), quiet=True, held_out=held_out)
    train(without, DATA, briefly(200), quiet=True)
    lines = [line["percent"] for line in log if "held_out_loss" in line]
    assert lines == [0, *range(5, 101, 5)] and torch.equal(with_it.weight, without.weight)
    assert seen.count((False, 1)) == 21 * 3 and seen.count((True, 0)) == 200


def test_what_is_saved_before_a_loss_is_not_finite_is_good(tmp_path):
    """The loss is looked at once a percent, of 20 steps here: the state that is saved meanwhile
    must not be the broken one."""
    class Breaks(Counter):
        def loss(self, batch):  # the weights break, too
            value, metrics = super().loss(batch)
            return value * (math.nan if self.step >= 45 else 1.0), metrics

    with pytest.raises(UserError, match="keeps the last good state"):
        train(Breaks(), DATA, briefly(2000, save_every=0.0), tmp_path, quiet=True)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["model"]["weight"].isfinite().all() and 0 < state["step"] < 45


def presses(times: int):
    """A loss during whose sixth step Ctrl-C is pressed so often."""
    def loss(step):
        for _ in range(times if step == 6 else 0):
            signal.raise_signal(signal.SIGINT)
        return 1.0

    return loss


def test_ctrl_c_saves_and_the_next_run_goes_on(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Counter(presses(1)), DATA, briefly(20, save_every=9e9), tmp_path, quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 6
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    resumed, whole = Counter(), Counter()
    log = train(resumed, DATA, briefly(20), tmp_path, resume=True, quiet=True)
    train(whole, DATA, briefly(20), quiet=True)
    assert resumed.step == 14 and len(log) == 20 and torch.equal(resumed.weight, whole.weight)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    before, model = signal.getsignal(signal.SIGINT), Counter(presses(2))
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, briefly(20, save_every=9e9), tmp_path, quiet=True)
    assert model.step == 6 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_crash_between_the_two_files_of_a_state_loses_nothing(tmp_path, monkeypatch):
    replace, moved = os.replace, []

    def dies_after_the_first(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train(Counter(), DATA, briefly(10, save_every=0.0), tmp_path, quiet=True)
    monkeypatch.undo()
    resumed, whole = Counter(), Counter()
    train(resumed, DATA, briefly(10), tmp_path, resume=True, quiet=True)
    train(whole, DATA, briefly(10), quiet=True)
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(("module", "function"), [(torch, "save"), (os, "replace")])
def test_a_full_disk_is_a_sentence_and_the_old_state_stays(module, function, tmp_path, monkeypatch):
    train(Counter(), DATA, briefly(10), tmp_path, quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"state.pt", "log.jsonl"}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, function, full)
    with pytest.raises(UserError, match="is the disk full"):
        train(Counter(), DATA, briefly(20), tmp_path, resume=True, quiet=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("damage", ["cut", "other network", "not torch"])
def test_a_damaged_state_is_a_sentence(damage, tmp_path):
    train(Counter(), DATA, briefly(10), tmp_path, quiet=True)
    path, model = tmp_path / "state.pt", Counter()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "not torch":
        path.write_text("hello")
    else:
        model.weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="damaged or belongs to another network.*delete it"):
        train(model, DATA, briefly(20), tmp_path, resume=True, quiet=True)


def test_torch_compile_that_does_not_work_is_said_once_and_training_goes_on(monkeypatch, capsys):
    def no_compiler(function, **_):
        def broken(batch):
            raise RuntimeError("no C++ compiler")
        return broken

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = Counter()
    train(model, DATA, briefly(5, compile=True), quiet=True)
    assert model.step == 5 and capsys.readouterr().out.count("goes on without") == 1


@pytest.mark.parametrize("budget", [dict(steps=-1), dict(steps=0), dict(minutes=-1.0)])
def test_a_budget_below_zero_is_refused_and_not_an_endless_run(budget):
    with pytest.raises(ValueError, match=f"{next(iter(budget))} must be"):
        Training(**budget)


# ---- the machine


def test_numbers_that_a_cpu_is_slow_with_count_as_0_in_all_threads():
    assert (torch.full((10**6,), 1e-30) * 1e-9 == 0).all()  # enough for every thread to help



def test_precision_can_be_said_and_everything_is_described(monkeypatch):
    a = torch.ones(4, 4)
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv("NANOGEN_PRECISION", name)
        machine.precision.cache_clear()
        assert machine.precision() is getattr(torch, name) and name in machine.describe()
        with machine.autocast():
            on_cpu = machine.device().type == "cpu"
            assert (a @ a).dtype is (machine.precision() if on_cpu else torch.float32)
    monkeypatch.setenv("NANOGEN_PRECISION", "float8")
    machine.precision.cache_clear()
    with pytest.raises(UserError, match="float32 or bfloat16, got float8"):
        machine.precision()
    monkeypatch.setenv("NANOGEN_PRECISION", "float32")
    machine.precision.cache_clear()


def test_the_device_that_computes_is_the_one_that_is_named_and_waited_for(monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: torch.device("mps"))
    assert "MPS" in machine.describe() and "CPU" not in machine.describe()
    second, asked = torch.device("cuda:1"), []
    monkeypatch.setattr(machine, "device", lambda: second)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append(device))
    monkeypatch.setattr(torch.cuda, "get_device_name",
                        lambda device=None: asked.append(device) or "GPU")
    machine.synchronize()
    assert machine.describe().startswith("GPU") and asked == [second, second]


@pytest.mark.parametrize("method", ["pixel_ar", "token_ar", "maskgit", "flow", "dit"])
def test_every_method_trains_and_draws_in_bfloat16(method, monkeypatch):
    monkeypatch.setattr(machine, "precision", lambda wanted="": torch.bfloat16)
    model = awake(tiny(method))
    log = train(model, tiny_data(method), briefly(1), quiet=True)
    settings = {} if method in ("pixel_ar", "token_ar") else {"steps": 2}
    labels = {"labels": torch.tensor([0, 1])}
    with machine.autocast():
        images = [model.sample(labels, seed=1, **settings)["images"] for _ in range(2)]
    assert math.isfinite(log[-1]["loss"]) and torch.equal(*images) and images[0].isfinite().all()
    assert all(p.dtype == torch.float32 for p in model.parameters())
