"""Flow matching against fields known in closed form: losses, solvers, likelihoods."""

import math
from functools import partial

import pytest
import torch
from oracles import gaussian_velocity, oracle_noise_points, oracle_velocity_points

from nanogen.blocks import flow_matching as fm

POINTS = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
METHODS = list(fm.EVALUATIONS)


# --- Path and times


def test_the_true_velocity_has_loss_zero_and_noise_pairs_are_used():
    x1, noise = torch.randn(8, 3, 4), torch.randn(8, 3, 4)
    loss, each, t = fm.flow_loss(lambda x, t: x1 - noise, x1, noise=noise)
    assert loss == 0 and each.shape == t.shape == (8,)
    loss, each, _ = fm.flow_loss(lambda x, t: torch.zeros_like(x), x1, noise=noise)
    assert torch.allclose(each, (x1 - noise).square().mean((1, 2)))
    assert torch.allclose(loss, each.mean())


@pytest.mark.parametrize("loss", [fm.flow_loss, fm.diffusion_loss])
def test_t_0_is_noise_and_t_1_is_data(loss):
    x1, noise, seen = torch.randn(4, 2), torch.randn(4, 2), {}
    for t in (0.0, 1.0):

        def network(x, time, t=t):
            seen[t] = x
            return x

        loss(network, x1, times=lambda n, device, t=t: torch.full((n,), t), noise=noise)
    assert torch.allclose(seen[0.0], noise, atol=0.05) and torch.allclose(seen[1.0], x1, atol=1e-3)


def test_no_field_has_a_smaller_loss_than_the_oracle():
    x1 = POINTS[torch.randint(3, (20_000,))]
    oracle = oracle_velocity_points(POINTS)

    def loss(field):
        torch.manual_seed(1)  # the same noise and times for every field
        return fm.flow_loss(field, x1)[0].item()

    best = loss(oracle)
    for other in (
        lambda x, t: 1.03 * oracle(x, t),
        lambda x, t: oracle(x, t) + 0.05,
        lambda x, t: oracle(x, (t + 0.02).clamp(max=0.999)),
    ):
        assert loss(other) > best + 1e-4


def test_logit_normal_times_have_the_mean_and_std_that_was_asked_for():
    assert abs(fm.logit_normal_times(10_000).median() - 0.5) < 0.02
    logits = torch.logit(fm.logit_normal_times(10_000, mean=1.0, std=0.5))
    assert abs(logits.std() - 0.5) < 0.02 and abs(logits.mean() - 1) < 0.02


def test_u_shaped_times_have_the_density_of_a_cosh_and_its_share_at_the_ends():
    t, a = fm.u_shaped_times(100_000), 4.0  # Lee et al.: e^(a t) + e^(a (1 - t))
    edges = torch.linspace(0, 1, 11)
    cumulative = 0.5 + torch.sinh(a * (edges - 0.5)) / (2 * math.sinh(a / 2))
    assert torch.allclose(torch.histc(t, 10, 0, 1) / len(t), cumulative.diff(), atol=0.005)
    assert abs((t < 0.05).float().mean() - 0.094) < 0.004 and 0 <= t.min() and t.max() <= 1


def test_loss_by_time_puts_each_loss_into_its_bin():
    t = torch.tensor([0.0, 0.05, 0.95, 1.0])
    by_time = fm.loss_by_time(torch.tensor([1.0, 3.0, 5.0, 7.0]), t, bins=10)
    assert by_time[0] == 2 and by_time[9] == 6 and by_time[1:9].isnan().all()


# --- Solvers


@pytest.mark.parametrize("method", METHODS)
def test_the_oracle_field_carries_noise_to_the_datum(method):
    end = fm.solve(oracle_velocity_points(POINTS), torch.randn(500, 2), 50, method)
    distance, which = torch.cdist(end, POINTS).min(1)
    near = 0.1 if method == "heun" else 0.01  # the field is singular at t=1, where heun looks
    assert (distance < near).float().mean() > 0.99
    assert (torch.bincount(which, minlength=3) > 100).all()  # to all of the data, equally often


def test_one_datum_is_one_straight_line_so_one_step_is_exact():
    datum, x0 = torch.randn(1, 3, 4, 4), torch.randn(5, 3, 4, 4)
    field = oracle_velocity_points(datum)
    assert torch.allclose(fm.solve(field, x0, 1), datum.expand_as(x0), atol=1e-5)
    assert curvature(field, x0, 20) < 1e-8


def test_the_gaussian_field_gives_the_mean_and_std_of_the_data():
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    x0 = torch.randn(20_000, 2)
    end = fm.solve(gaussian_velocity(mean, std), x0, 100, "heun")
    assert torch.allclose(end, mean + std * x0, atol=2e-3)
    assert torch.allclose(end.mean(0), mean, atol=0.05)
    assert torch.allclose(end.std(0), std, rtol=0.03)


def test_the_gaussian_field_is_the_oracle_of_many_gaussian_points():
    points = 1.0 + 0.5 * torch.randn(20_000, 1)
    x, t = torch.linspace(-1, 2, 7)[:, None], torch.full((7,), 0.4)
    many, closed = oracle_velocity_points(points)(x, t), gaussian_velocity(1.0, 0.5)(x, t)
    assert torch.allclose(many, closed, atol=0.05)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_euler_is_order_1_heun_and_midpoint_order_2(method, order):
    """On dx/dt = -x^2 (1+t), with solution 1/x_1 = 1/x_0 + 3/2. Linear fields would be too easy."""
    x0 = 0.5 + torch.rand(200, 1, dtype=torch.float64)
    exact = 1 / (1 / x0 + 1.5)

    def error(steps):
        field = lambda x, t: -x.square() * (1 + t[:, None])  # noqa: E731
        return (fm.solve(field, x0, steps, method) - exact).abs().mean()

    assert abs(math.log2(error(64) / error(128)) - order) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_counted_and_times_run_from_0_to_1(method):
    times = []

    def field(x, t):
        assert t.shape == (3,)
        times.append(t[0].item())
        return torch.zeros_like(x)

    frames = fm.solve(field, torch.randn(3, 2), 5, method, frames=True)
    assert len(times) == 5 * fm.EVALUATIONS[method] and times[0] == 0 and max(times) <= 1
    assert frames.shape == (6, 3, 2)
    times.clear()
    fm.solve(field, torch.randn(3, 2), 4)
    assert times == [0, 0.25, 0.5, 0.75]
    times.clear()
    fm.solve(field, torch.randn(3, 2), 2, shift=3)
    assert times == [0, 0.25]


def test_a_shift_by_the_root_of_n_gives_the_mean_of_n_frames_the_signal_of_one():
    t, frames = torch.linspace(0, 0.9, 10), 8
    early = fm.shifted(t, frames**0.5)
    assert torch.allclose(early / ((1 - early) / frames**0.5), t / (1 - t), atol=1e-5)
    assert fm.shifted(torch.ones(1), 5.0) == 1


@pytest.mark.parametrize("method", METHODS)
def test_forward_then_backward_returns_to_the_start(method):
    x0, field = torch.randn(50, 2), gaussian_velocity(torch.tensor([1.0, -1.0]), 0.7)
    there = fm.solve(field, x0, 400, method)
    back = fm.solve(field, there, 400, method, t0=1.0, t1=0.0)
    assert torch.allclose(back, x0, atol=5e-2 if method == "euler" else 1e-4)


def test_the_last_frame_is_the_sample():
    x0, field = torch.randn(4, 2), gaussian_velocity(1.0, 0.7)
    frames = fm.solve(field, x0, 6, frames=True)
    assert torch.equal(frames[0], x0) and torch.equal(frames[-1], fm.solve(field, x0, 6))
    frames = fm.solve_diffusion(lambda x, t: x, x0, 6, frames=True)
    assert frames.shape == (7, 4, 2)
    assert torch.equal(frames[-1], fm.solve_diffusion(lambda x, t: x, x0, 6))


@pytest.mark.parametrize("solver", [fm.solve, fm.solve_diffusion])
def test_wrong_solver_options_are_refused(solver):
    with pytest.raises(ValueError, match="method must be"):
        solver(lambda x, t: x, torch.randn(2, 2), 4, method="rk45")
    with pytest.raises(ValueError, match="steps must be"):
        solver(lambda x, t: x, torch.randn(2, 2), 0)


# --- Guidance


def test_guidance_1_is_conditional_and_calls_the_network_once():
    batches = []

    def model(x, t, label):
        assert len(x) == len(t) == len(label)
        batches.append(len(x))
        return x + t[:, None] + 10.0 * label[:, None]

    x, t, labels = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 0])
    cond, uncond = model(x, t, labels), model(x, t, torch.full_like(labels, 3))
    batches.clear()
    assert torch.equal(fm.guide(model, labels, 3, 1.0)(x, t), cond) and batches == [4]
    assert torch.allclose(fm.guide(model, labels, 3, 0.0)(x, t), uncond)
    batches.clear()
    assert torch.allclose(fm.guide(model, labels, 3, 2.5)(x, t), uncond + 2.5 * (cond - uncond))
    assert batches == [8]


def test_guidance_takes_conditions_that_are_tensors():
    text, null = torch.randn(4, 5, 2), torch.zeros(5, 2)
    model = lambda x, t, c: x + c.sum(1)  # noqa: E731
    x = torch.randn(4, 2)
    guided = fm.guide(model, text, null, 3.0)(x, torch.rand(4))
    assert torch.allclose(guided, x + 3 * text.sum(1), atol=1e-5)


# --- Likelihood, straightness


def gaussian_log_density(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


def test_exact_likelihood_of_a_gaussian_is_the_closed_form():
    mean, std = torch.tensor([1.0, -0.5, 0.0]), torch.tensor([0.5, 1.5, 1.0])
    x1 = mean + std * torch.randn(64, 3)
    nats = fm.log_likelihood(gaussian_velocity(mean, std), x1, steps=100)
    assert torch.allclose(nats, gaussian_log_density(x1, mean, std), atol=2e-3)


def rotating(x, t):
    """A field whose Jacobian is not diagonal, so that Hutchinson's estimate has variance."""
    return x @ torch.tensor([[0.2, 1.0], [0.5, -0.6]])


def test_hutchinson_agrees_with_exact_on_average_over_seeds():
    x1 = torch.randn(16, 2)
    exact = fm.log_likelihood(rotating, x1, 20)
    guesses = torch.stack(
        [fm.log_likelihood(rotating, x1, 20, exact=False, seed=s) for s in range(200)])
    assert guesses.std(0).min() > 0.5  # single probes do differ
    assert torch.allclose(guesses.mean(0), exact, atol=0.4)
    assert abs(guesses.mean() - exact.mean()) < 0.1
    again = fm.log_likelihood(rotating, x1, 20, exact=False, seed=7)
    assert torch.equal(guesses[7], again)  # the same seed, the same number


def test_likelihood_takes_images_and_networks_with_parameters():
    network = torch.nn.Conv2d(1, 1, 3, padding=1)
    x1 = torch.randn(3, 1, 4, 4)
    nats = fm.log_likelihood(lambda x, t: network(x), x1, 5)
    assert nats.shape == (3,) and not nats.requires_grad and network.weight.grad is None
    # This field is linear, dx/dt = A x + b, so log p follows from the matrix exponential of A.
    units = torch.eye(16).view(16, 1, 4, 4)
    matrix = (network(units) - network.bias).flatten(1).T.detach().double()
    offset = network.bias.detach().double().expand(16)
    steps, x = 500, x1.flatten(1).double()
    for _ in range(steps):  # backwards, by the midpoint rule written out
        x = x - ((x - (x @ matrix.T + offset) / (2 * steps)) @ matrix.T + offset) / steps
    closed = gaussian_log_density(x, 0.0, 1.0) - matrix.trace()
    nats = fm.log_likelihood(lambda x, t: network(x), x1, 100).double()
    assert torch.allclose(nats, closed, atol=1e-3)


def curvature(field, x0, steps=100):
    return fm.frames_curvature(fm.solve(field, x0, steps, frames=True))


def test_curvature_is_the_fraction_of_motion_that_does_not_lead_to_the_end():
    x0 = torch.randn(100, 2)
    straight = torch.stack([torch.lerp(x0, x0 + 3, s / 10) for s in range(11)])
    assert fm.frames_curvature(straight) < 1e-10
    angle = torch.linspace(0, math.pi / 2, 1001)  # a quarter circle: by hand 1 - 8 / pi^2
    quarter = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]
    assert abs(fm.frames_curvature(quarter) - (1 - 8 / math.pi**2)) < 1e-3
    there_and_back = torch.cat([straight, straight.flip(0)[1:]])
    assert abs(fm.frames_curvature(there_and_back) - 1) < 1e-5


def test_reflow_straightens():
    """Lines from each noise to its sample hardly cross, so little of their loss is unavoidable."""
    x0, field = torch.randn(2000, 2), oracle_velocity_points(POINTS)
    x1 = fm.solve(field, x0, 100)

    def crossing(noise):  # the unavoidable loss, from the 10 nearest neighbours at t=0.5
        middle, velocity = (noise + x1) / 2, x1 - noise
        near = torch.cdist(middle, middle).topk(10, largest=False).indices
        return velocity[near].var(1).mean()

    assert crossing(x0) < 0.3 * crossing(x0[torch.randperm(len(x0))])


# --- Diffusion


def test_alpha_bar_is_monotone_from_0_to_1():
    signal = fm.alpha_bar(torch.linspace(0, 1, 1001))
    assert (signal.diff() > 0).all() and 0 < signal[0] < 1e-3 and signal[-1] == signal.max() == 1
    assert fm.alpha_bar(torch.tensor(1.0, dtype=torch.float64)) == 1
    tau = torch.tensor(0.3)  # Nichol and Dhariwal's formula, their time 1-t
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0.3, 0.0)]
    assert torch.allclose(fm.alpha_bar(1 - tau), torch.tensor(f[0] / f[1]), atol=1e-3)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_diffusion_with_the_oracle_arrives_at_the_one_datum(method, steps):
    datum = torch.tensor([[0.7, -0.3]])
    end = fm.solve_diffusion(oracle_noise_points(datum), torch.randn(20, 2), steps, method)
    assert torch.allclose(end, datum.expand(20, 2), atol=1e-3)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_diffusion_samples_a_gaussian_with_its_std(method):
    """For data N(0, s^2) the best guess of the noise is x sqrt(1-a) / (a s^2 + 1 - a)."""

    def network(x, t):
        a = fm.expand(fm.alpha_bar(t), x)
        return x * (1 - a).sqrt() / (a * 0.5**2 + 1 - a)

    end = fm.solve_diffusion(network, torch.randn(20_000, 1), 200, method)
    assert abs(end.std() - 0.5) < 0.02 and abs(end.mean()) < 0.02


def test_no_prediction_has_a_smaller_diffusion_loss_than_the_oracle():
    x1, oracle = POINTS[torch.randint(3, (20_000,))], oracle_noise_points(POINTS)

    def loss(network):
        torch.manual_seed(1)
        times = partial(fm.logit_normal_times, std=0.5)
        return fm.diffusion_loss(network, x1, times)[0].item()

    best = loss(oracle)
    assert loss(lambda x, t: 0.95 * oracle(x, t)) > best + 1e-4
    assert loss(lambda x, t: oracle(x, t) + 0.05) > best + 1e-4


def test_ddim_draws_nothing_and_ddpm_draws_from_its_generator():
    network, x0 = oracle_noise_points(POINTS), torch.randn(50, 2)
    assert torch.equal(fm.solve_diffusion(network, x0, 5), fm.solve_diffusion(network, x0, 5))
    frames = [
        fm.solve_diffusion(network, x0, 5, "ddpm", frames=True,
                           generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])


def test_clipping_keeps_a_bad_network_in_range():
    x0 = torch.randn(50, 2)
    bad = lambda x, t: 0.9 * x  # noqa: E731  (10% short at t=0, where the guess divides by 0.01)
    assert fm.solve_diffusion(bad, x0, 10).abs().max() > 3
    frames = fm.solve_diffusion(bad, x0, 10, clip=1.0, frames=True)
    assert frames[-1].abs().max() <= 1
    a, b = fm.alpha_bar(torch.tensor([0.0, 0.1]))  # one step by hand
    guess = ((x0 - (1 - a).sqrt() * 0.9 * x0) / a.sqrt()).clamp(-1, 1)
    noise = (x0 - a.sqrt() * guess) / (1 - a).sqrt()
    assert torch.allclose(frames[1], b.sqrt() * guess + (1 - b).sqrt() * noise, atol=1e-5)


def test_flow_is_straighter_to_a_point_and_diffusion_where_data_vary_like_noise():
    x0 = torch.randn(500, 2)

    def diffusion(network):
        return fm.frames_curvature(fm.solve_diffusion(network, x0, 200, frames=True))

    def gaussian_noise(x, t, std=0.9):
        a = fm.expand(fm.alpha_bar(t), x)
        return x * (1 - a).sqrt() / (a * std**2 + 1 - a)

    datum = torch.zeros(1, 2)
    assert curvature(oracle_velocity_points(datum), x0) < 1e-6
    quarter_wave = 1 - 8 / math.pi**2
    assert abs(diffusion(oracle_noise_points(datum)) - quarter_wave) < 0.02
    assert curvature(gaussian_velocity(0.0, 0.9), x0) > 0.8 > 0.5 > diffusion(gaussian_noise)
