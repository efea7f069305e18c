"""Video: known frames stay, a clip is one whole, and no clip sees another."""

import numpy as np
import pytest
import torch
from conftest import QUICK, awake
from PIL import Image

from nanogen.__main__ import main
from nanogen.blocks.unet import TemporalAttention
from nanogen.data.datasets import load
from nanogen.image import text_image, to_tokens, video
from nanogen.lab import runs
from nanogen.lab.prepare import encode_text

TEXTS = ["a red dog moving left", "a blue ship moving up"]
NARROW = dict(widths=(32,), width=32, text_width=16, text_depth=1, heads=2)


def tiny_video(asleep=False, **fields):
    """Clips of 4 frames of 8x8 pixels."""
    torch.manual_seed(1)
    model = video.Video(video.Config(**NARROW | dict(frames=4, size=8) | fields))
    return model if asleep else awake(model)


def draw(model, sources=None, **settings):
    sources = -torch.ones(2, 3, 8, 8) if sources is None else sources
    settings = dict(steps=2, overlap=2) | settings
    return model.sample({"prompts": encode_text(TEXTS), "sources": sources}, **settings)["videos"]


def random_clips(count=2, frames=4):
    return torch.rand(count, frames, 3, 8, 8) * 2 - 1


# ---- attention over time


def test_every_frame_sees_the_others_of_its_clip_and_no_other_clip():
    attention, x = awake(TemporalAttention(32, frames=4)), torch.randn(8, 32, 2, 2)
    model, clips, t = tiny_video(), random_clips(), torch.full((2,), 0.5)
    tokens, unknown = to_tokens(TEXTS, clips.device), torch.full_like(clips, np.nan)
    for frame in range(4):
        other = x.clone()
        other[frame] += torch.randn(32, 2, 2)
        change = (attention(other) - attention(x)).abs().amax((1, 2, 3))
        assert change[:4].min() > 1e-4 and change[4:].max() < 1e-6
        other = clips.clone()
        other[0, frame] += 1
        after, before = (model.velocity(x, t, tokens, unknown) for x in (other, clips))
        change = (after - before).abs().amax((2, 3, 4))
        assert change[0].min() > 1e-5 and change[1].max() < 1e-6


def test_attention_over_time_stays_in_its_place_and_knows_the_order_of_frames():
    attention, x = awake(TemporalAttention(32, frames=4)), torch.randn(4, 32, 3, 3)
    attention.norm = torch.nn.Identity()  # it mixes the places of a frame
    other = x.clone()
    other[1, :, 0, 2] += 1
    changed = (attention(other) - attention(x)).abs().amax(1) > 1e-6
    assert changed[:, 0, 2].all() and changed.sum() == 4
    assert (attention(x.flip(0)).flip(0) - attention(x)).abs().max() > 1e-3


# ---- learning


def test_before_training_each_frame_is_drawn_as_its_base_draws_an_image():
    fields = NARROW | dict(size=8)
    base = awake(text_image.TextImage(text_image.Config(**fields, think_width=16, think_depth=1)))
    torch.manual_seed(2)
    model = video.Video(video.Config(**fields, frames=4), base)
    clips, t, tokens = random_clips(), torch.tensor([0.2, 0.7]), to_tokens(TEXTS, "cpu")
    drawn = model.velocity(clips, t, tokens, torch.full_like(clips, np.nan))
    for i in range(4):
        frame = clips[:, i]
        assert torch.allclose(drawn[:, i], base.velocity(frame, t, tokens, -torch.ones_like(frame)),
                              atol=1e-5)


def noted_loss(model, clips, monkeypatch, wrong_by):
    """The loss of a network that is wrong by `wrong_by` (known frames, others), and what frames it
    was told, bool (B, T)."""
    told = []

    def velocity(x_t, t, tokens, known):
        is_known = ~known.isnan()
        told.append(is_known.flatten(2).all(2))
        assert torch.equal(known[is_known], clips[is_known])
        exact = (clips - x_t) / (1 - t.view(-1, 1, 1, 1, 1))
        return exact + torch.where(is_known, *wrong_by)

    monkeypatch.setattr(model, "velocity", velocity)
    monkeypatch.setattr(model, "times", lambda count, device: torch.full((count,), 0.4))
    loss, parts = model.loss({"videos": clips, "prompts": encode_text(TEXTS[:1] * len(clips))})
    return loss.item(), told[0], parts


def test_the_loss_is_that_of_the_frames_that_are_not_known(monkeypatch):
    model, clips = tiny_video(), random_clips(300)
    assert noted_loss(model, clips, monkeypatch, (100.0, 0.0))[0] < 1e-6
    loss, _, parts = noted_loss(model, clips, monkeypatch, (0.0, 2.0))
    assert loss == pytest.approx(4, rel=1e-4)  # however many frames are known
    assert all(part.item() == pytest.approx(4, rel=1e-4) for part in parts.values())


def test_none_one_or_several_first_frames_are_known_in_a_third_of_the_clips_each(monkeypatch):
    _, told, _ = noted_loss(tiny_video(), random_clips(600), monkeypatch, (0.0, 0.0))
    counts = told.sum(1)
    assert torch.equal(told, torch.arange(4) < counts[:, None])
    fractions = torch.bincount(counts, minlength=4) / 600
    assert (fractions - torch.tensor([1 / 3, 1 / 3, 1 / 6, 1 / 6])).abs().max() < 0.08


# ---- sampling


def test_known_frames_come_back_exactly_and_the_others_depend_on_them():
    model, known = tiny_video(), random_clips(frames=2)
    drawn = draw(model, known=known, guidance=3.0)
    assert drawn.shape == (2, 4, 3, 8, 8) and torch.equal(drawn[:, :2], known)
    other = draw(model, known=known.flip(0), guidance=3.0)
    assert (other[:, 2:] - drawn[:, 2:]).abs().amax((1, 2, 3, 4)).min() > 1e-3
    first = draw(model, sources=known[:, 0])
    assert torch.equal(first[:, 0], known[:, 0]) and not torch.equal(first[:, 1], known[:, 1])
    assert (draw(model)[:, 0] > -1).any()  # a black source is none


def test_a_longer_clip_begins_like_a_short_one_and_goes_on_from_its_last_frames(monkeypatch):
    model, windows = tiny_video(), []
    short = draw(model, seed=3)
    velocity = model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, t, tokens, known: windows.append(known)
                        or velocity(x, t, tokens, known))
    clip = draw(model, seed=3, length=9)
    assert clip.shape[1] == 9 and torch.equal(clip[:, :4], short)
    told = windows[::2]  # two steps a window
    assert [(~known[0, :, 0, 0, 0].isnan()).sum().item() for known in told] == [0, 2, 2, 2]
    for start, known in zip((2, 4, 6), told[1:], strict=True):
        assert torch.equal(known[:, :2], clip[:, start : start + 2])
    assert torch.equal(draw(model, seed=3, length=3), short[:, :3])


@pytest.mark.parametrize("overlap", [-1, 4])
def test_an_overlap_that_leaves_nothing_to_go_on_from_or_to_draw_is_refused(overlap):
    with pytest.raises(ValueError, match="overlap must be from 1 to 3"):
        draw(tiny_video(), length=8, overlap=overlap)


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps on 20 clips of 8 frames."""
    folder = tmp_path_factory.mktemp("runs")
    fields = NARROW | QUICK | dict(batch_size=4)
    runs.train_run("text_image", load("prompts", count=20), fields | dict(think_width=16),
                   folder / "text_image-prompts", quiet=True)
    return runs.train_run("video", load("clips", count=20), fields, folder / "video-clips",
                          quiet=True)


def test_an_image_moves_from_the_command_line(run, tmp_path):
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(
        tmp_path / "first.png")
    assert main(["sample", str(run.folder), "--prompt", *TEXTS, "--n", "2", "--steps", "1",
                 "--source", str(tmp_path / "first.png"), "--length", "9",
                 "--out", str(tmp_path / "s")]) == 0
    with np.load(tmp_path / "s/samples.npz") as file:
        assert file["videos"].shape == (2, 9, 32, 32, 3) and file["prompts"].tolist() == TEXTS
        first = np.array(Image.open(tmp_path / "first.png"))
        assert (file["videos"][:, 0] == first).all()
    assert (tmp_path / "s/videos.gif").exists()


@pytest.mark.parametrize(("said", "words"), [
    (["--overlap", "8"], "overlap must be from 1 to 7, got 8"),
    (["--prompt", "a red horse moving left"], "never saw: horse")])
def test_a_mistake_is_a_sentence(said, words, run, tmp_path, capsys):
    command = ["sample", str(run.folder), "--n", "1", "--steps", "1", "--out", str(tmp_path / "s")]
    assert main([*command, *said]) == 1
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "s").exists()
