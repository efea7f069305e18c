"""Text to image: what the network reads, what it thinks, and who judges what it drew."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, awake, briefly
from PIL import Image

from nanogen.__main__ import main
from nanogen.blocks.text import TextEncoder
from nanogen.blocks.unet import UNet
from nanogen.data import prompts
from nanogen.data.datasets import load
from nanogen.data.scenes import Scene, render_scenes
from nanogen.image import text_image, to_tokens
from nanogen.lab import prompt_metrics, runs
from nanogen.lab.prepare import encode_text
from nanogen.lab.train import train
from nanogen.method import Requirement
from nanogen.reader import Config, Reader, read_sign

CPU = torch.device("cpu")
TINY = dict(widths=(16, 32), width=32, text_width=16, text_depth=1, think_width=32, think_depth=1,
            heads=2, size=8)
TEXTS = ["as many red dogs as 2+1 on grass", "a blue cat", "a sign that says 3-1="]
THOUGHTS = ["2+1=2a3=three", "", "3-1=3a2=2"]


def tiny_model(asleep=False, **fields):
    torch.manual_seed(1)
    model = text_image.TextImage(text_image.Config(**TINY | fields))
    return model if asleep else awake(model)


def draw(model, texts=TEXTS[:2], sources=None, **settings):
    sources = -torch.ones(len(texts), 3, 8, 8) if sources is None else sources
    settings = dict(steps=2, think=False) | settings
    return model.sample({"prompts": encode_text(texts), "sources": sources}, **settings)


# ---- what the network reads


def test_padding_changes_nothing_about_a_text():
    encoder, tokens = awake(TextEncoder(prompts.VOCABULARY, 16, 2, 2)), to_tokens(TEXTS[1:2], CPU)
    (features, seen, mean), wide = encoder(tokens), encoder(F.pad(tokens, (0, 5)))
    assert torch.allclose(features, wide[0][:, : seen.shape[1]], atol=1e-5)
    assert torch.allclose(mean, wide[2], atol=1e-5)
    assert wide[1].tolist() == [[True] * seen.shape[1] + [False] * 5]


@pytest.mark.parametrize("attention_at", [0, 2])
def test_the_unet_sees_the_tokens_of_a_text_but_not_their_padding(attention_at):
    network = awake(UNet(3, (16, 32), 1, attention_at, 8, text=16))
    x, condition, text = torch.randn(2, 3, 8, 8), torch.randn(2, 8), torch.randn(2, 6, 16)
    seen = torch.arange(6) < torch.tensor([[4], [6]])
    before = network(x, condition, text, seen)
    for token in range(6):
        other = text.clone()
        other[0, token] += 1
        change = (network(x, condition, other, seen) - before).abs().amax((1, 2, 3))
        assert (change[0] > 1e-4) == (token < 4) and change[1] == 0


# ---- sampling


def test_the_source_of_an_image_changes_this_image_and_no_other():
    model, sources = tiny_model(), -torch.ones(2, 3, 8, 8)
    sources[0] = 0.5
    change = (draw(model, sources=sources)["images"] - draw(model)["images"]).abs()
    assert change[0].max() > 1e-2 and change[1].max() < 1e-5


def test_the_last_frame_is_the_image_and_frames_change_nothing():
    drawn = draw(tiny_model(), steps=3, frames=True)
    assert torch.equal(drawn["images"], draw(tiny_model(), steps=3)["images"])
    assert torch.equal(drawn["frames"][-1], drawn["images"]) and len(drawn["frames"]) == 4


def test_a_thought_is_drawn_by_its_result_and_without_one_the_prompt_counts_alone(monkeypatch):
    model = tiny_model()
    alone = draw(model, TEXTS[:1])
    monkeypatch.setattr(model.chain, "think", lambda texts, device: THOUGHTS[:1])
    assert torch.equal(draw(model, TEXTS[:1])["images"], alone["images"])
    drawn = draw(model, TEXTS[:1], think=True)
    assert drawn["thoughts"] == THOUGHTS[:1] and alone["thoughts"] == [""]
    assert torch.equal(drawn["images"], draw(model, [TEXTS[0] + "=three"])["images"])
    assert not torch.equal(drawn["images"], alone["images"])


def test_whatever_the_chain_writes_an_image_is_drawn(monkeypatch):
    model = tiny_model()
    for thought in ("reddog", "2+1=2a3=threefour", "=zib=+-A", "a==", "=" * 36):
        monkeypatch.setattr(model.chain, "think", lambda texts, device, said=thought: [said])
        assert draw(model, TEXTS[:1], think=True)["images"].isfinite().all()


# ---- the thinking chain


def test_the_chain_learns_thoughts_and_their_ends_but_no_prompts():
    chain, costs = tiny_model().chain, []
    for text, thought in zip(TEXTS, THOUGHTS, strict=True):
        start, learned = prompts.START, [*prompts.tokenize(thought), 0]
        row = torch.tensor([start, *prompts.tokenize(text), start, *learned])
        logits = chain(row[None, :-1])[0, -len(learned) :].log_softmax(-1)
        costs += (-logits[range(len(learned)), learned]).tolist()
    assert chain.loss(TEXTS, THOUGHTS, CPU).item() == pytest.approx(np.mean(costs), rel=1e-4)


def test_the_chain_never_sees_the_future_and_sees_the_whole_past():
    chain, tokens = tiny_model().chain, torch.randint(2, prompts.VOCABULARY, (2, 9))
    before = chain(tokens)
    for position in range(9):
        other = tokens.clone()
        other[:, position] = (tokens[:, position] + 5) % prompts.VOCABULARY
        changed = (chain(other) - before).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [i >= position for i in range(9)]


def test_one_batch_can_be_learned_and_a_thought_is_the_same_alone_and_beside_others():
    model = tiny_model(asleep=True, thought_dropout=0.0, text_dropout=0.0)
    flat = torch.tensor([20, 130, 240], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    data = {"images": flat, "sources": torch.zeros_like(flat),
            "prompts": encode_text(TEXTS), "thoughts": encode_text(THOUGHTS)}
    log = train(model, data, briefly(80, batch_size=3, lr=1e-2, flip=False), quiet=True)
    assert log[-1]["draw"] < 0.5 * log[0]["draw"] and log[-1]["think"] < 0.1 < log[0]["think"]
    chain = model.eval().chain
    assert chain.think(TEXTS, CPU) == THOUGHTS
    assert [chain.think([text], CPU)[0] for text in TEXTS] == THOUGHTS


# ---- who judges


@pytest.fixture(scope="module")
def truth():
    return prompts.make(200, seed=5)


def test_every_sign_is_read_and_none_where_there_is_none(truth):
    assert [read_sign(image) for image in truth["images"]] == truth["signs"]
    letters, rng = [*prompts.LETTERS, *"0123456789+-="], np.random.default_rng(0)
    texts = ["".join(rng.choice(letters, 1 + i % 7)) for i in range(60)] + letters
    signs = [Scene(prompts.BACKGROUNDS[i % 4], sign=text, sign_x=0)
             for i, text in enumerate(texts)]
    assert [read_sign(image) for image in render_scenes(signs, rng)[0]] == texts


def perfect(things, background):
    """What `Reader.forward` returns if it knows the truth: logits of 50 for what is right."""
    presence = torch.full((len(things), 1, 8, 8), -50.0)
    kinds, colors, offsets = (torch.zeros(len(things), n, 8, 8) for n in (11, 8, 2))
    for i, row, column in itertools.product(range(len(things)), range(8), range(8)):
        x, y = 4 * column + 2, 4 * row + 2
        kind, color, across, down, _ = min(
            (thing for thing in things[i].tolist() if thing[0] >= 0),
            key=lambda thing: max(abs(thing[2] - x), abs(thing[3] - y)))
        kinds[i, int(kind), row, column] = colors[i, int(color), row, column] = 50
        offsets[i, :, row, column] = torch.tensor([(across - x) / 4, (down - y) / 4])
        if max(abs(across - x), abs(down - y)) <= 2:
            presence[i, 0, row, column] = 50
    return [presence, kinds, colors, offsets], 50 * F.one_hot(background, 4).float()


def test_what_the_reader_learns_is_what_it_reads(truth, monkeypatch):
    reader = Reader(Config(widths=(16, 16), blocks=1))
    things, background = (torch.tensor(truth[name][:60]) for name in ("things", "background"))
    batch = {"images": torch.zeros(60, 3, 32, 32), "things": things, "background": background}
    monkeypatch.setattr(reader, "forward", lambda images: perfect(things, background))
    assert reader.loss(batch)[0] < 1e-4
    found, backgrounds = reader.read(batch["images"])
    assert backgrounds == background.tolist()
    for seen, rows in zip(found, things.tolist(), strict=True):
        wanted = sorted(row[:4] for row in rows if row[0] >= 0)
        assert np.allclose(sorted(map(list, seen)), wanted, atol=1e-3)


def reading(truth):
    """What `prompt_metrics.read` returns if the reader knows the truth."""
    found = [[(int(kind), int(color), x, y) for kind, color, x, y, _ in rows if kind >= 0]
             for rows in truth["things"]]
    return found, truth["background"].tolist()


@pytest.mark.parametrize(("task", "change", "wrong"), [
    ("plain", list, ""), ("sign", list, "sign"), ("plain", list, "background"),
    ("plain", lambda seen: [(seen[0][0], 9, *seen[0][2:])], "color things"),
    ("plain", lambda seen: [(99, *seen[0][1:])], "kind things"),
    ("plain", lambda seen: [], "count kind color things"),
    ("relation", lambda seen: [(*a[:2], *b[2:]) for a, b in zip(seen, seen[::-1], strict=True)],
     "relation"),
])
def test_each_metric_notices_its_own_mistake_and_no_other(task, change, wrong, truth, monkeypatch):
    of_task = truth["task"] == list(prompts.TASKS).index(task)
    two_colors = truth["things"][:, 0, 1] != truth["things"][:, 1, 1]  # or one thing
    i = np.flatnonzero(of_task & two_colors)[0]
    (found, backgrounds), images = reading(truth), truth["images"].copy()
    found[i] = change(found[i])
    images[i, 22:31, :7] = 128 if wrong == "sign" else images[i, 22:31, :7]
    backgrounds[i] = (backgrounds[i] + (wrong == "background")) % 4
    monkeypatch.setattr(prompt_metrics, "read", lambda reader, images: (found, backgrounds))
    right = prompt_metrics.obeyed(images, truth, reader=None)
    assert {name for name, values in right.items() if not values[i]} == {
        *wrong.split(), *["all"] * bool(wrong)}
    assert all(np.delete(values, i).all() for values in right.values())


def test_of_an_edit_only_what_should_stay_is_compared(truth, monkeypatch):
    monkeypatch.setattr(prompt_metrics, "read", lambda reader, images: reading(truth))
    changed = (truth["sources"] != truth["images"]).any(-1, keepdims=True)
    for where, stayed in ((changed, True), (~changed, False)):
        images = np.where(where, 255 - truth["images"], truth["images"])
        result = prompt_metrics.judge_prompts(images, truth["thoughts"], truth, reader=None)
        assert (result["edits"]["psnr_of_the_rest"] > 90) == stayed
    assert result["thoughts_right"] == 1


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps on 40 prompts."""
    folder = tmp_path_factory.mktemp("runs") / "text_image-prompts"
    return runs.train_run("text_image", load("prompts", count=40), TINY | QUICK, folder, quiet=True)


def test_a_prompt_with_an_unknown_word_is_a_sentence(run, tmp_path, capsys):
    assert main(["sample", str(run.folder), "--out", str(tmp_path / "s"), "--prompt",
                 "a red horse"]) == 1
    said = capsys.readouterr().err.strip()
    assert "never saw: horse" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_an_image_is_edited_from_the_command_line_and_without_one_the_source_is_black(
        run, tmp_path):
    awake(run.model)
    for name in ("white", "black"):
        Image.new("RGB", (40, 40), name).save(tmp_path / f"{name}.png")
    drawn = []
    for given in ([], ["--source", tmp_path / "black.png"], ["--source", tmp_path / "white.png"]):
        command = ["sample", run.folder, "--prompt", "make the dog blue", "--n", 2, "--steps", 1,
                   "--no-think", "--out", tmp_path / "s", *given]
        assert main(list(map(str, command))) == 0
        with np.load(tmp_path / "s/samples.npz") as file:
            assert file["prompts"].tolist() == ["make the dog blue"] * 2
            assert len(file["thoughts"]) == 2
            drawn.append(file["images"])
    none, black, white = drawn
    assert none.shape == (2, 8, 8, 3)
    assert np.array_equal(none, black) and not np.array_equal(none, white)


def test_a_required_run_learns_from_the_data_set_that_its_requirement_names(
        tmp_path, monkeypatch):
    need, trained = Requirement("reader", {}, data="things"), []
    monkeypatch.setattr(text_image.TextImage, "requires", staticmethod(lambda config: need))
    monkeypatch.setattr(runs, "load_run", lambda folder: None)
    monkeypatch.setattr(runs, "train_one", lambda *given, **_: trained.append(
        (given[-1].name, given[1].name, len(given[1]))))
    data = load("prompts", count=40)
    runs.train_run("text_image", data, TINY | QUICK, tmp_path / "own", quiet=True)
    assert trained == [("reader-things", "things", 40), ("own", "prompts", 40)]
