"""Flow's settings, and reflow: pairs that stay together, a student that starts as its teacher, and
paths that come out straighter."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import briefly, tiny
from oracles import toy
from torch import nn

from nanogen.blocks import flow_matching as fm
from nanogen.image import flow
from nanogen.lab.train import draw_batch

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def student_of(teacher, **fields):
    config = replace(teacher.config, objective="reflow", reflow_steps=4, **fields)
    return flow.Flow(config, teacher).eval()


def draw(model, **settings):
    return model.sample({"labels": LABELS}, **settings)["images"]


def test_the_student_starts_as_its_teacher_and_leaves_it_alone():
    teacher = tiny("flow")
    student = student_of(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    drawn = draw(student, steps=3)
    assert torch.equal(drawn, draw(teacher, steps=3, method="euler"))
    finished = flow.Flow(student.config).eval()  # as a run is loaded: it needs no teacher any more
    finished.load_state_dict(student.state_dict())
    assert torch.equal(drawn, draw(finished, steps=3))
    batch = student.prepare({"labels": LABELS})
    assert student.state_dict().keys() == before.keys()  # the teacher is no part of it
    student.loss(batch)[0].backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.sub_(0.1 * parameter.grad if parameter.grad is not None else 0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pairs_are_the_two_ends_of_the_teachers_paths(guidance):
    teacher = tiny("flow")
    student = student_of(teacher, reflow_guidance=guidance, reflow_pairs=50)
    assert student.encodes and student.examples == 50
    pairs = student.prepare({"labels": LABELS})
    assert {name: (value.dtype, len(value)) for name, value in pairs.items()} == {
        "noise": (torch.float16, 8), "x1": (torch.float16, 8), "labels": (torch.int64, 8)}
    noise, x1 = pairs["noise"].float(), pairs["x1"].float()
    ends = fm.solve(fm.guide(teacher, LABELS, 3, guidance), noise, 4, "midpoint")
    assert torch.allclose(ends, x1, atol=0.05, rtol=0.01) and abs(noise.std() - 1) < 0.1


def test_noise_image_and_label_stay_together_on_their_way_into_the_loss(monkeypatch):
    student = student_of(tiny("flow"))
    number = torch.arange(64.0)[:, None, None, None].expand(64, 3, 8, 8)
    data = {"noise": number.half(), "x1": (number + 100).half(), "labels": torch.arange(64) % 3}
    batch, seen = draw_batch(data, 1, briefly(4)), []

    def network(x, t, labels):
        seen.append((x, t, labels))
        return torch.full_like(x, 100.0)  # x1 - noise of every pair that is one

    monkeypatch.setattr(student, "forward", network)
    loss, _ = student.loss(batch)
    x, t, labels = seen[0]
    number = (x - 100 * t[:, None, None, None]).mean((1, 2, 3)).round()
    assert loss == 0 and x.dtype == torch.float32 and torch.equal(number % 3, labels.float())


def test_a_reflow_has_its_teachers_guidance_in_it_and_refuses_another():
    student = student_of(tiny("flow"), reflow_guidance=2.0)
    assert torch.equal(draw(student, steps=2), draw(student, steps=2, guidance=2.0))
    with pytest.raises(ValueError, match="guidance 2 is trained in and cannot become 3"):
        draw(student, guidance=3.0)


def test_a_flow_says_what_it_requires():
    assert flow.Flow.requires(flow.Config()) is None
    needed = flow.Flow.requires(flow.Config(objective="reflow", widths=(16, 32), size=16))
    assert needed.method == "flow" and needed.training_only and needed.config == {
        "objective": "flow", "network": "unet", "widths": (16, 32), "blocks": 1,
        "attention_at": 1, "width": 256, "size": 16}
    needed = flow.Flow.requires(flow.Config(network="dit", size=16))
    assert needed.method == "tokenizer" and needed.config == {"bottleneck": "kl", "size": 16}


@pytest.mark.parametrize(("fields", "message"), [
    (dict(objective="reflow", network="dit"), "network must be unet with objective reflow"),
    (dict(objective="reflow", label_dropout=0.2), "label_dropout has no effect with objective"),
    (dict(objective="reflow", reflow_pairs=0), "reflow_pairs must be at least 1"),
    (dict(objective="ddpm", reflow_steps=2), "reflow_steps has no effect without objective"),
    (dict(depth=12), "depth has no effect with network unet"),
    (dict(network="dit", widths=(16,)), "widths has no effect with network dit"),
    (dict(network="dit", heads=3), "heads must be"), (dict(size=12), "size must be"),
    (dict(times="never"), "times must be one of auto, logit-normal, uniform, u-shaped, got")])
def test_settings_that_are_bad_or_have_no_effect_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        flow.Config(**fields)


def test_in_the_plane_reflow_straightens_paths_and_one_step_is_enough():
    torch.manual_seed(0)
    sizes = [(3, 96), (96, 96), (96, 96), (96, 2)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.SiLU())]
    mlp, data = nn.Sequential(*layers[:-1]), toy("eight gaussians", 10_000)

    def field(net):
        return lambda x, t: net(torch.cat([x, t[:, None]], dim=1))

    def fitted(net, pair):
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for step in range(700):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / 700))
            optimizer.zero_grad()
            x1, noise = pair()
            fm.flow_loss(field(net), x1, noise=noise)[0].backward()
            optimizer.step()
        return net

    teacher = fitted(mlp, lambda: (data[torch.randint(10_000, (256,))], None))
    x0 = torch.randn(4000, 2)
    x1 = fm.solve(field(teacher), x0, 25)

    def pair():
        index = torch.randint(4000, (256,))
        return x1[index], x0[index]

    student = fitted(copy.deepcopy(teacher), pair)
    fresh = torch.randn(1000, 2)  # noise that it was not trained on
    before, after = (fm.frames_curvature(fm.solve(field(net), fresh, 100, frames=True)).item()
                     for net in (teacher, student))
    assert after < 0.1 * before and before > 0.3

    def error(net):  # of one step, against the same network's 50
        one, fifty = (fm.solve(field(net), fresh, steps) for steps in (1, 50))
        return (one - fifty).norm(dim=1).mean().item()

    assert error(student) < 0.2 < 0.5 < error(teacher)
