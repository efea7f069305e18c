"""Reflow: pairs that stay together, a student that starts as its teacher, and paths that come out straighter."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import briefly, tiny
from torch import nn

from nanogen.blocks import flow_matching as fm
from nanogen.image import flow
from nanogen.lab.train import draw_batch

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def student_of(teacher, **fields):
    return flow.Flow(replace(teacher.config, objective="reflow", reflow_steps=4, **fields), teacher).eval()


def test_the_student_starts_as_its_teacher_and_leaves_it_alone():
    teacher = tiny("flow")
    student = student_of(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert torch.equal(student.sample(LABELS, steps=3), teacher.sample(LABELS, steps=3))
    batch = student.prepare(torch.zeros(8, 3, 8, 8), LABELS)
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
    pairs = student_of(teacher, reflow_guidance=guidance).prepare(torch.zeros(8, 3, 8, 8), LABELS)
    assert {name: (value.dtype, len(value)) for name, value in pairs.items()} == {
        "noise": (torch.float16, 8), "x1": (torch.float16, 8), "labels": (torch.int64, 8)}
    field = fm.guide(teacher, LABELS, 3, guidance)
    assert torch.allclose(fm.solve(field, pairs["noise"].float(), 4, "midpoint"), pairs["x1"].float(), atol=0.05, rtol=0.01)
    assert abs(pairs["noise"].float().std() - 1) < 0.1


def test_noise_and_picture_stay_together_on_their_way_into_the_loss(monkeypatch):
    student = student_of(tiny("flow"), label_dropout=1.0)
    number = torch.arange(64.0)[:, None, None, None].expand(64, 3, 8, 8)
    data = {"noise": number.half(), "x1": (number + 100).half(), "labels": torch.arange(64) % 3}
    batch, seen = draw_batch(data, 1, briefly(4)), []

    def network(x, t, labels):
        seen.append((x, t, labels))
        return torch.full_like(x, 100.0)  # x1 - noise of every pair that is one

    monkeypatch.setattr(student, "forward", network)
    loss, _ = student.loss(batch)
    x, t, labels = seen[0]
    assert loss == 0 and x.dtype == torch.float32
    assert torch.equal((x - 100 * t[:, None, None, None]).mean((1, 2, 3)).round() % 3, labels.float())  # and so does the label


def test_a_reflow_has_its_teachers_guidance_in_it_and_refuses_another():
    student = student_of(tiny("flow"), reflow_guidance=2.0)
    assert torch.equal(student.sample(LABELS, steps=2), student.sample(LABELS, steps=2, guidance=2.0))
    with pytest.raises(ValueError, match="guidance 2 is trained in and cannot become 3"):
        student.sample(LABELS, guidance=3.0)


def test_a_reflow_stands_on_a_flow_of_pixels():
    chapter, needs = flow.stands_on(flow.Config(objective="reflow", widths=(16, 32)))
    assert chapter == "flow" and needs["objective"] == "flow" and needs["network"] == "unet" and needs["widths"] == (16, 32)
    assert flow.stands_on(flow.Config()) is None
    for fields in (dict(network="dit"), dict()):
        with pytest.raises(ValueError, match="reflow needs network unet and a finished flow"):
            flow.Flow(flow.Config(objective="reflow", **fields))


def test_in_the_plane_reflow_straightens_paths_and_one_step_is_enough():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))
    data = fm.toy("eight gaussians", 10_000)

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
    before, after = (fm.curvature(field(net), fresh).item() for net in (teacher, student))
    assert after < 0.1 * before and before > 0.3

    def error(net):  # of one step, against the same network's 50
        return (fm.solve(field(net), fresh, 1) - fm.solve(field(net), fresh, 50)).norm(dim=1).mean().item()

    assert error(student) < 0.2 < 0.5 < error(teacher)
