"""The README's commands run, word for word but for the budgets, and its Python code too; its
tables are the ones that `list` prints."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_fsdd
from PIL import Image

from nanogen.__main__ import main
from nanogen.data import datasets
from nanogen.lab import dubbing, tour
from nanogen.lab.evaluate import evaluate
from nanogen.lab.runs import load_run, train_run
from nanogen.listener import Listener

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = {language: "\n".join(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL))
          for language in ("bash", "python")}
COMMANDS = re.findall(r"^python -m nanogen (.+)$", BLOCKS["bash"], re.MULTILINE)
QUICK = "--steps 2 --batch-size 16 --compile false".split()
TEXT = "--width 32 --text-width 16 --text-depth 1 --heads 2"
TINY = {"text_image": f"{TEXT} --widths 16,32 --think-width 16 --think-depth 1",
        "video": f"{TEXT} --widths 16,32", "personalize": "--priors 2 --least 16"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a CIFAR-10 of 100 images of noise, an FSDD of 40 clips of noise, and tiny runs
    of what the methods require."""
    folder, random = tmp_path_factory.mktemp("workplace"), np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 100), ("test", 40)):
        parts[f"{part}_images"] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        parts[f"{part}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    np.savez(folder / "cifar10.npz", **parts, class_names=np.array(names))
    fake_fsdd(folder)
    Image.fromarray(parts["test_images"][0]).save(folder / "my.png")
    runs = {"perceptual-cifar10": ("judge", dict(widths=(16, 16, 16))),
            "judge-cifar10": ("judge", dict(widths=(16, 16, 16))),
            "tokenizer-cifar10": ("tokenizer", dict(widths=(16, 16), blocks=1)),
            "codec-fsdd": ("codec", dict(widths=(4, 4, 4), crop=1024)),
            "codec-all": ("codec", dict(widths=(4, 4, 4), crop=1024)),
            "listener-recordings": ("listener", dict(width=16, depth=1)),
            "listener-songs": ("listener", dict(width=16, depth=1)),
            "reader-things": ("reader", dict(widths=(16, 16)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGEN_DATA", str(folder))
        few = ("prompts", "clips", "subject", "utterances", "songs", "numbers",
               "things")
        for name in few:  # a few of each, kept as if they were all
            make, _, *rest = datasets.MADE[name]
            patch.setitem(datasets.MADE, name, (make, 20, *rest))
            datasets.load(name)
        for name, (method, fields) in runs.items():
            fields = fields | dict(steps=2, batch_size=16, compile=False)
            train_run(method, name.split("-")[1], fields, folder / "runs" / name, quiet=True)
    return folder


def test_there_are_commands():
    names = {command.split()[0] for command in COMMANDS}
    assert names >= {"list", "train", "sample", "evaluate", "report", "encode", "decode"}


def test_every_command_runs_in_the_order_of_the_page(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("NANOGEN_DATA", str(workplace))
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if words[0] == "compare":  # over an hour: test_compare.py has it tiny
            continue
        if words[0] == "train":
            words = [word for word in words if word != "--minutes" and not word.isdigit()]
            words += TINY.get(words[1], "--width 32 --depth 1 --heads 2").split() + QUICK
        if words[0] == "dub":  # an untrained listener may hear nothing
            monkeypatch.setattr(dubbing, "listen", lambda *_: ([[3, 1]], None))
        if {"--prompt", "--tune", "--ask"} & set(words):
            words += ["--n", "2", "--steps", "2"]
        if words[0] == "evaluate":
            words += ["--n", "20", "--steps", "2"]
        assert main(words) == 0, f"{command}: {capsys.readouterr().err}"
        asked = words[words.index("--ask") + 1] if "--ask" in words else ""
        named = {"sound": "waveforms", "text": "texts", "image": "images"}.get(asked, "")
        assert named in capsys.readouterr().out
    written = ("images/grid.png", "report.html", "sounds/000.wav", "three.wav", "dubbed.wav",
               "said/000.wav", "sung/000.wav", "seven/000.wav", "seen/grid.png")
    assert all((workplace / name).exists() for name in written)
    found: dict = {}
    exec(f"import nanogen\n{BLOCKS['python']}", found)
    assert found["images"].shape == (16, 32, 32, 3) and found["images"].dtype == np.uint8


def test_speech_and_songs_are_measured(workplace, monkeypatch):
    monkeypatch.setenv("NANOGEN_DATA", str(workplace))
    hear = Listener.listen  # an untrained one hears dozens of words
    monkeypatch.setattr(Listener, "listen", lambda *inputs: (
        [[*row, 3][:2] for row in hear(*inputs)[0]], hear(*inputs)[1]))
    small = dict(width=32, depth=1, heads=2, steps=2, batch_size=16, compile=False)
    for method, data in (("speech", "recordings"), ("song", "songs")):
        folder = workplace / "runs" / f"{method}-{data}"
        run = train_run(method, data, small, folder, resume=True, quiet=True)
        found = evaluate(run, n=2, quiet=True, steps=2)
        names = {"speech": ("words_right", "voice_error_real", "at 1.4 times the length"),
                 "song": ("words_right", "cents_real", "in_key", "within_50_cents")}[method]
        assert all(name in found for name in names) and 0 <= found["words_right"] <= 1
        assert found["words_right_real"] >= 0 and "judge" in found
        assert (folder / "samples" / "000.wav").exists()
    own = evaluate(load_run(workplace / "runs" / "listener-recordings"), quiet=True)
    assert 0 <= own["words_right"] <= 1 and 0 <= own["voice_error"] <= 1


def test_all_six_directions_of_omni_are_measured(workplace, monkeypatch):
    monkeypatch.setenv("NANOGEN_DATA", str(workplace))
    small = dict(width=32, depth=1, heads=2, steps=2, batch_size=16, compile=False)
    folder = workplace / "runs" / "omni-numbers"
    run = train_run("omni", "numbers", small, folder, resume=True, quiet=True)
    found = evaluate(run, n=4, quiet=True, steps=2)
    parts = ("text", "image", "sound")
    ways = {f"{a} to {b}" for a in parts for b in parts if a != b} | {"sound to text to image"}
    rates = {name.removesuffix(", spanish"): value for name, value in found.items()
             if " to " in name}  # both test examples here are Spanish
    assert rates.keys() == ways and all(0 <= rate <= 1 for rate in rates.values())
    assert found["image_real"] > 0.4 and "language_right" in found
    assert len({found["judge"], found["listener"]}) == 2
    assert (folder / "samples" / "text-to-sound" / "000.wav").exists()
    assert run.sample(2, ask="image", steps=2).shape == (2, 32, 32, 3)
    assert [len(run.sample(2, ask=part, steps=2)) for part in ("text", "sound")] == [2, 2]


def test_a_clip_without_digits_is_dubbed_by_silence_and_refused_at_the_command_line(
        workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(dubbing, "listen", lambda *_: ([[]], None))
    clip = np.ones(4000, np.float32)
    assert not dubbing.dub(None, None, [clip], "german")[0][0].any()
    sounds = sorted(path for path in workplace.rglob("*.wav"))
    assert main(["dub", "runs/speech-recordings", str(sounds[0]), "--language", "german"]) == 1
    assert f"The listener hears no digit in {sounds[0]}" in capsys.readouterr().err


def test_data_without_what_a_method_learns_from_is_refused_at_once(workplace, monkeypatch, capsys):
    monkeypatch.setenv("NANOGEN_DATA", str(workplace))
    monkeypatch.chdir(workplace)
    assert main(["train", "speech"]) == 1  # on fsdd, which has no phonemes
    said = capsys.readouterr()
    assert "fsdd has no frames" in said.err and "--data recordings" in said.err
    assert "trained first" not in said.out


def test_the_tables_are_the_ones_that_list_prints():
    assert all(table in README for table in [*tour.recipe_tables(), tour.loss_table()])
