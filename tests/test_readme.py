"""The README's commands run, word for word but for the budgets, and its table is the one that `list` prints."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from nanogen.__main__ import main
from nanogen.lab import tour
from nanogen.lab.runs import train_run

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.removeprefix("python -m nanogen ") for line in BLOCKS.splitlines() if line.startswith("python -m nanogen ")]
TINY = ["--width", "32", "--depth", "1", "--heads", "2", "--steps", "2", "--batch-size", "16", "--compile", "false"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a CIFAR-10 of 100 pictures of noise and an FSDD of 40 clips of it, and beneath it the runs that chapters stand on, tiny."""
    folder = tmp_path_factory.mktemp("workplace")
    random = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 100), ("test", 40)):
        parts |= {f"{part}_images": random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
                  f"{part}_labels": (np.arange(count) % 10).astype(np.uint8)}
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    np.savez(folder / "cifar10.npz", **parts, class_names=np.array(names))
    rate, speakers = 8000, ["george", "jackson"]
    np.savez(folder / "fsdd.npz", waveform=random.integers(-3000, 3000, 40 * rate // 2).astype(np.int16), sample_rate=np.array(rate),
             offsets=np.arange(41) * (rate // 2), digits=np.arange(40) % 10, speakers=np.arange(40) // 10 % 2,
             is_test=np.arange(40) >= 30, speaker_names=np.array(speakers))
    quick = dict(steps=2, batch_size=16, compile=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGEN_DATA", str(folder))
        for name in ("judge", "eye"):
            train_run("judge", "cifar10", quick | {"widths": (16, 16, 16)}, folder / f"runs/{name}-cifar10", quiet=True)
        train_run("tokenizer", "cifar10", quick | {"widths": (16, 16), "blocks": 1}, folder / "runs/tokenizer-cifar10", quiet=True)
        train_run("codec", "fsdd", quick | {"widths": (4, 4, 4), "crop": 1024}, folder / "runs/codec-fsdd", quiet=True)
    return folder


def test_there_are_commands():
    assert {command.split()[0] for command in COMMANDS} >= {"list", "train", "sample", "evaluate", "report"}


def test_every_command_runs_in_the_order_of_the_page(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("NANOGEN_DATA", str(workplace))
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if words[0] in ("bench", "compare"):  # many minutes: test_bench.py and test_compare.py have them tiny
            continue
        if words[0] == "train":
            words = [word for word in words if word != "--minutes" and not word.isdigit()] + TINY
        if words[0] == "evaluate":
            words += ["--n", "20", "--steps", "2"]
        assert main(words) == 0, f"{command}: {capsys.readouterr().err}"
    assert all((workplace / name).exists() for name in ("pictures/grid.png", "report.html", "sounds/000.wav", "three.wav"))


def test_the_table_is_the_one_that_list_prints():
    assert tour.markdown() in README
