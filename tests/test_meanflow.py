"""MeanFlow against averages known in closed form, and how its sampler treats guidance."""

import dataclasses

import pytest
import torch
from conftest import awake, briefly, tiny_data
from oracles import gaussian_velocity, toy
from torch import nn

from nanogen.blocks import flow_matching as fm
from nanogen.image import meanflow
from nanogen.lab.train import train

LABELS = torch.tensor([0, 1, 2, 3])  # the last one: the null class


PAPER = meanflow.Config(derivative="jvp", tangent="line", interval_start=0)
OURS = meanflow.Config(interval_start=0)


def tiny(asleep=False, **fields):
    torch.manual_seed(1)
    fields = dict(widths=(16, 32), width=32, size=8, classes=3, interval_start=0) | fields
    model = meanflow.MeanFlow(meanflow.Config(**fields))
    return model if asleep else awake(model)


def draw(model, **settings):
    return model.sample({"labels": LABELS}, **settings)["images"]


def gaussian_average(mean, std):
    """u for data N(mean, std^2): x_t = t mean + s(t) x_0 along a path, so x_t determines x_r."""

    def spread(t):
        return ((1 - t) ** 2 + (t * std) ** 2).sqrt()

    def average(x, t, r, labels=None):
        t, r = fm.expand(t, x), fm.expand(r, x)
        arrival = r * mean + spread(r) / spread(t) * (x - t * mean)
        return (arrival - x) / (r - t)

    return average


def some_times(count):
    t = 0.8 * torch.rand(count)
    return t, t + 0.05 + (0.95 - t) * torch.rand(count)


# ---- the identity


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (2.0, 0.3), (-1.0, 1.5)])
def test_the_true_average_is_its_own_target(mean, std):
    average, velocity = gaussian_average(mean, std), gaussian_velocity(mean, std)
    x, (t, r) = torch.randn(500, 3), some_times(500)
    v = velocity(x, t)
    change = meanflow.jvp(average, x, v, t, r, LABELS)
    assert torch.allclose(v + (r - t)[:, None] * change, average(x, t, r), atol=1e-4)
    wrong = 1.05 * average(x, t, r)  # another field is not
    assert (v + (r - t)[:, None] * 1.05 * change - wrong).square().mean() > 1e-5


def test_one_step_of_the_true_average_is_exact_and_so_are_several():
    x0 = torch.randn(200, 2)
    for steps in (1, 2, 7):
        states = meanflow.follow_average(gaussian_average(2.0, 0.3), x0, torch.zeros(200), steps)
        assert len(states) == steps + 1
        assert torch.allclose(states[-1], 2.0 + 0.3 * x0, atol=1e-4)


def test_with_r_equal_to_t_it_is_flow_matching():
    x1, labels = torch.randn(32, 2), torch.zeros(32)
    seen = []

    def network(x, t, r, labels):
        seen.append((t, r))
        return x * t[:, None]

    def times(count, device):
        return meanflow.draw_times(count, 0)[0]

    torch.manual_seed(3)
    even = dataclasses.replace(PAPER, power=0.0)
    loss, error, length = meanflow.meanflow_loss(network, x1, labels, even, 0)
    assert len(seen) == 1 and torch.equal(*seen[0]) and not length.any()  # no derivative
    torch.manual_seed(3)
    expected, each, _ = fm.flow_loss(lambda x, t: x * t[:, None], x1, times=times)
    assert torch.allclose(loss, expected) and torch.allclose(error, each, rtol=1e-4)


def test_only_a_fraction_of_the_batch_pays_for_the_derivative():
    rows = []

    def network(x, t, r, labels):
        rows.append((len(x), (r > t).all().item()))
        return x

    length = meanflow.meanflow_loss(network, torch.randn(40, 2), torch.zeros(40), PAPER, 10)[2]
    assert rows == [(40, False), (10, True)] and (length > 0).tolist() == [True] * 10 + [False] * 30


def test_intervals_begin_when_they_should_and_the_smallest_batch_has_one():
    model = tiny(interval_start=0.5)
    data = {"images": torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), "labels": LABELS[:2]}
    log = train(model, data, briefly(4, batch_size=2), quiet=True)
    assert [line["error_interval"] > 0 for line in log] == [False, False, True, True]
    batch = {"images": torch.randn(2, 3, 8, 8), "labels": LABELS[:2]}
    assert model.eval().loss(batch)[1]["error_interval"] > 0  # held-out data: always


def test_the_target_has_no_gradient_and_the_weight_evens_out_the_errors():
    scale = nn.Parameter(torch.ones(()))
    x1, outputs = torch.randn(64, 2) * torch.logspace(-1, 1, 64)[:, None], []

    def network(x, t, r, labels):
        outputs.append(scale * x * r[:, None])
        return outputs[-1]

    loss, error, _ = meanflow.meanflow_loss(network, x1, torch.zeros(64), PAPER, 64)
    assert not error.requires_grad
    assert loss.item() == pytest.approx((error / (error + 1e-3)).mean().item())
    into_output, into_scale = torch.autograd.grad(loss, [outputs[0], scale])
    expected = (into_output * outputs[0]).sum() / scale  # through the output and no other way
    assert torch.allclose(into_scale, expected, rtol=1e-4)
    pull = into_output.square().sum(1) * (error + 1e-3) ** 2 / error  # constant: weighted errors
    assert torch.allclose(pull, pull[0], rtol=1e-3)


# ---- a toy


class Plane(nn.Module):
    """u(x, t, r) in the plane, a small MLP."""

    def __init__(self):
        super().__init__()
        sizes = [(4, 96), (96, 96), (96, 96), (96, 2)]
        layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.SiLU())]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x, t, r, labels=None):
        return self.net(torch.cat([x, t[:, None], (r - t)[:, None]], dim=1))


@pytest.mark.parametrize("config", [PAPER, OURS], ids=["paper", "ours"])
def test_one_step_reaches_eight_modes_where_one_euler_step_ends_between_them(config):
    data, labels, x0 = toy("eight gaussians", 10_000), torch.zeros(256), torch.randn(2000, 2)
    angle = torch.arange(8) * torch.pi / 4
    modes = torch.stack([angle.cos(), angle.sin()], dim=1)

    def distances(loss, draw):
        torch.manual_seed(0)
        model = Plane()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(700):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / 700))
            optimizer.zero_grad()
            loss(model, data[torch.randint(len(data), (256,))]).backward()
            optimizer.step()
        distance, mode = torch.cdist(draw(model), modes).min(dim=1)
        return distance.mean(), torch.bincount(mode, minlength=8) / len(mode)

    near, fractions = distances(
        lambda u, x1: meanflow.meanflow_loss(u, x1, labels, config, 192)[0],
        lambda u: meanflow.follow_average(u, x0, labels)[-1])
    far, _ = distances(lambda u, x1: fm.flow_loss(lambda x, t: u(x, t, t), x1)[0],
                       lambda u: fm.solve(lambda x, t: u(x, t, t), x0, 1))
    assert near < 0.3 < 0.7 < far and fractions.min() > 0.05


def test_training_draws_the_intervals_that_a_sampler_of_one_step_asks_for():
    """With mean 0.4 and std 1, one pair in 70,000 has r - t > 0.9."""
    t, r = meanflow.draw_times(100_000, 100_000)
    assert 0.005 < (r - t > 0.9).float().mean() and 0.01 < (t < 0.05).float().mean()
    t, r = meanflow.draw_times(100_000, 100_000, 0.4, 1.0)
    assert (r - t > 0.9).float().mean() < 1e-4


# ---- the network


def test_the_difference_along_the_path_approaches_the_derivative():
    average = gaussian_average(2.0, 0.3)
    x, (t, r) = torch.randn(500, 3), some_times(500)
    v = gaussian_velocity(2.0, 0.3)(x, t)
    exact = meanflow.jvp(average, x, v, t, r, LABELS)
    errors = [(meanflow.difference(average, x, v, t, r, LABELS, average(x, t, r), fraction)
               - exact).norm() / exact.norm() for fraction in (0.1, 0.01)]
    assert errors[1] < 0.02 and errors[1] < errors[0] < 0.3


def test_the_derivative_through_the_network_agrees_with_finite_differences():
    model = tiny()
    model.to(memory_format=torch.channels_last)  # as in training
    x, v = torch.randn(2, 4, 3, 8, 8)
    t, r = some_times(4)
    change = meanflow.jvp(model, x, v, t, r, LABELS)
    with torch.no_grad():
        ahead, behind = (model(x + h * v, t + h, r, LABELS) for h in (1e-2, -1e-2))
    numeric = (ahead - behind) / 2e-2
    assert (change - numeric).norm() < 0.03 * change.norm() and not change.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = meanflow.jvp(model, x, v, t, r, LABELS)
    assert torch.allclose(again, change, atol=1e-4)


def test_the_derivative_goes_through_attention_over_many_positions():
    model = tiny(widths=(32, 32), size=64, attention_at=2)
    x, (t, r) = torch.randn(1, 3, 64, 64), some_times(1)  # 32 x 32: too many for plain attention
    assert meanflow.jvp(model, x, x, t, r, LABELS[:1]).isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_weight_gets_a_gradient(guidance, autocast):
    model = tiny(guidance=guidance)
    batch = {"images": torch.randn(8, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0] * 2)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, errors = model.loss(batch)
    loss.backward()
    assert set(errors) == {"error_flow", "error_interval"}
    assert all(error > 0 for error in errors.values())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, g in gradients.items()
                if g is None or not g.isfinite().all() or not g.any()]


def test_it_can_overfit_one_batch():
    model = tiny(asleep=True, guidance=1.0, label_dropout=0.0)
    images = tiny_data("flow", count=4)["images"]
    images = images[:, :, :1, :1].expand_as(images)  # flat: a small network learns that soon
    data = {"images": images.repeat(4, 1, 1, 1), "labels": LABELS.repeat(4)}  # one label each
    log = train(model, data, briefly(160, flip=False, lr=1e-2), quiet=True)
    for error in ("error_flow", "error_interval"):
        assert sum(record[error] for record in log[-10:]) / 10 < 0.5 < 0.8 < log[0][error]


# ---- sampling


def test_one_step_is_noise_plus_the_average_velocity():
    model = tiny()
    drawn = model.sample({"labels": LABELS}, seed=4, frames=True)
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = noise + model(noise, torch.zeros(4), torch.ones(4), LABELS)
    assert torch.equal(drawn["images"], expected.clamp(-1, 1)) and len(drawn["frames"]) == 2
    assert torch.equal(drawn["images"], draw(model, steps=1, seed=4))
    assert not torch.equal(drawn["images"], draw(model, steps=2, seed=4))
    assert len(model.sample({"labels": LABELS}, steps=3, frames=True)["frames"]) == 4


def test_guidance_is_the_trained_one_or_refused():
    model = tiny(guidance=2.5)
    passes = []
    model.network.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    images = draw(model)
    assert passes == [4]  # one pass, of each image once
    assert all(torch.equal(images, draw(model, guidance=guidance)) for guidance in (1.0, 2.5))
    with pytest.raises(ValueError, match="guidance 2.5 is trained in and cannot become 4"):
        draw(model, guidance=4.0)


def test_the_guided_velocity_exaggerates_the_label_and_leaves_the_null_class_alone():
    model, (x, v), t = tiny(guidance=3.0), torch.randn(2, 4, 3, 8, 8), torch.full((4,), 0.4)
    with torch.no_grad():
        uncond = model(x, t, t, torch.full((4,), 3))
    velocity = model.guided_velocity(x, t, v, LABELS)
    assert torch.allclose(velocity[:3], (uncond + 3 * (v - uncond))[:3], atol=1e-5)
    assert torch.equal(velocity[3], v[3])
    assert tiny(guidance=1.0).guided_velocity(x, t, v, LABELS) is v


@pytest.mark.parametrize("fields", [
    dict(interval_fraction=1.5), dict(time_std=0.0), dict(difference=2.0), dict(power=-1.0),
    dict(guidance=-2.0), dict(width=0), dict(widths=(20,)), dict(size=12)])
def test_bad_settings_are_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        meanflow.Config(**fields)
    with pytest.raises(ValueError, match="steps must be"):
        draw(tiny(), steps=0)
