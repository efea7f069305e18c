"""The command line: a mistake is one sentence on stderr and an exit code, and a kill in the middle loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import briefly  # noqa: F401  (conftest sets the precision before nanogen is imported)
from safetensors.torch import load_file

from nanogen.__main__ import COMMANDS, main
from nanogen.lab import judges

TINY = ["--widths", "16,16,16", "--batch-size", "16", "--compile", "false"]


@pytest.fixture
def mistake(capsys):
    """Run a command that must fail, and give back what it says."""

    def run(*arguments) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        said = capsys.readouterr().err.strip()
        assert code not in (0, None) and said and "Traceback" not in said
        assert len(said.splitlines()) == 1, f"one sentence was meant:\n{said}"
        return said

    return run


@pytest.fixture(scope="module")
def run_folder(own_pictures, tmp_path_factory):
    """A tiny flow, trained through the command line."""
    folder = tmp_path_factory.mktemp("command line") / "flow-fruit"
    assert main(["train", "flow", "--data", str(own_pictures), "--out", str(folder), "--widths", "16,32", "--width", "32",
                 "--attention-at", "1", "--steps", "3", "--batch_size", "16", "--compile", "false"]) == 0
    return folder


def test_train_sample_report(run_folder, tmp_path, capsys):
    assert main(["sample", str(run_folder), "--n", "4", "--label", "plum", "--steps", "2", "--guidance", "1.5",
                 "--temperature", "0.9", "--seed", "3", "--out", str(tmp_path / "s")]) == 0
    with np.load(tmp_path / "s/samples.npz") as file:
        assert file["images"].shape == (4, 32, 32, 3) and file["labels"].tolist() == [1] * 4
    assert "process.gif" in capsys.readouterr().out
    assert main(["report", str(run_folder), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_evaluate_trains_the_judge_it_needs_and_prints_a_table(run_folder, own_pictures, capsys):
    assert main(["train", "judge", "--data", str(own_pictures), "--out", str(run_folder.parent / "judge-fruit"), "--steps", "3", *TINY]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run_folder), "--n", "6", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "fd_nano" in out and "class_accuracy" in out and (run_folder / "metrics.json").exists()


def test_help_of_a_chapter_says_what_every_field_means(capsys):
    assert main(["train", "var", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--depth blocks (6)" in said and "--lr peak learning rate" in said and "--scales" not in said


def test_list_names_every_chapter(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("pixel_ar", "tokenizer", "token_ar", "maskgit", "flow", "judge", "cifar10", "scenes"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["train", "opera"], "no chapter 'opera'"),
    (["train", "flow", "--data", "nowhere"], "no data set or folder 'nowhere'"),
    (["train", "flow", "--recipe", "secret"], "no recipe 'secret'"),
    (["train", "flow", "--sparkle", "3"], "sparkle"),
    (["train", "flow", "--lr", "fast"], "lr"),
    (["train", "flow", "--depth", "2.5"], "depth"),
    (["train", "flow", "--widths", "64,wide"], "widths"),
    (["train", "flow", "--flip", "maybe"], "flip"),
    (["train", "flow", "--lr"], "lr"),
    (["train"], "chapter"),
    (["train", "--minutes", "3", "flow"], "The chapter comes first: train flow"),
    (["fly"], "fly"),
    (["sample", "nowhere", "--out", "x"], "nowhere is not a run"),
    (["sample", "nowhere"], "--out"),
    (["evaluate", "nowhere"], "nowhere is not a run"),
    (["evaluate", "nowhere", "--colour", "red"], "--colour"),
    (["report", "nowhere"], "nowhere is not a run"),
    (["encode", "nowhere", "a.wav", "--out", "t.npz"], "nowhere is not a run"),
    (["encode", "nowhere", "a.wav"], "--out"),
    (["encode", "nowhere", "a.wav", "--out", "t.npz", "--kbps", "many"], "--kbps"),
    (["decode", "nowhere", "t.npz", "--out", "a.wav"], "nowhere is not a run"),
])
def test_a_mistake_is_one_sentence(arguments, words, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in mistake(*arguments)
    assert not list(tmp_path.iterdir())  # and leaves nothing behind


def test_mistakes_about_a_run_that_is_there(run_folder, mistake, own_pictures, tmp_path):
    assert "--resume" in mistake("train", "flow", "--data", own_pictures, "--out", run_folder)
    assert "no class 'pear'" in mistake("sample", run_folder, "--label", "pear", "--out", tmp_path / "s")
    assert "at least 1" in mistake("sample", run_folder, "--n", "0", "--out", tmp_path / "s")
    assert "no speakers" in mistake("sample", run_folder, "--speaker", "jackson", "--out", tmp_path / "s")
    assert "only tokenizers and codecs" in mistake("encode", run_folder, own_pictures / "apple/0.png", "--out", tmp_path / "t.npz")
    assert "only tokenizers and codecs" in mistake("decode", run_folder, tmp_path / "t.npz", "--out", tmp_path / "a.png")
    assert "steps" in mistake("sample", run_folder, "--steps", "-1", "--out", tmp_path / "s")


def test_a_run_goes_on_only_as_what_it_is(run_folder, mistake, own_pictures):
    assert "flow" in mistake("train", "judge", "--data", own_pictures, "--out", run_folder, "--resume")
    assert "fruit" in mistake("train", "flow", "--data", own_pictures / "apple", "--out", run_folder, "--resume", "--steps", "5")


def test_a_file_where_a_folder_is_meant(run_folder, mistake, own_pictures, tmp_path):
    (tmp_path / "file").write_text("hello")
    assert "file" in mistake("sample", run_folder, "--n", "2", "--steps", "2", "--out", tmp_path / "file")
    assert "file" in mistake("train", "judge", "--data", own_pictures, "--out", tmp_path / "file", "--steps", "3", *TINY)
    assert "file" in mistake("sample", tmp_path / "file", "--out", tmp_path / "s")


def test_data_that_cannot_be_learned_from(mistake, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no pictures" in mistake("train", "flow", "--data", tmp_path / "empty", "--out", tmp_path / "run")
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds/beep.wav", np.sin(np.arange(800) / 5), 8000)
    assert "sounds" in mistake("train", "flow", "--data", tmp_path / "sounds", "--out", tmp_path / "run")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.png").write_bytes(b"no picture")
    assert "damaged" in mistake("train", "flow", "--data", tmp_path / "damaged", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_no_traceback_and_the_run_goes_on(own_pictures, tmp_path, monkeypatch, capsys):
    loss, calls = judges.Judge.loss, []

    def press(self, batch):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(judges.Judge, "loss", press)
    command = ["train", "judge", "--data", str(own_pictures), "--out", str(tmp_path / "run"), "--steps", "9", *TINY]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert "--resume goes on" in said and "Traceback" not in said
    assert (tmp_path / "run/state.pt").exists() and not (tmp_path / "run/model.safetensors").exists()
    assert main([*command, "--resume"]) == 0 and len(calls) == 10  # 9 steps, and one look before the first


@pytest.mark.parametrize(("command", "said"), [
    (["sample", "run", "--out", "x"], "Stopped."), ([], "the same command goes on."), (["compare"], "the same command goes on."),
    (["train", "flow"], "with --resume goes on.")])
def test_ctrl_c_promises_only_what_the_command_keeps(command, said, monkeypatch, capsys):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanogen.__main__.COMMANDS", dict.fromkeys(COMMANDS, press))
    assert main(command) == 130 and capsys.readouterr().err.endswith(f"{said}\n")


def test_a_process_that_is_killed_in_the_middle_is_resumed_bit_for_bit(own_pictures, tmp_path):
    def command(folder):
        return ["train", "judge", "--data", str(own_pictures), "--out", str(folder), "--steps", "150", "--save-every", "0", *TINY]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANOGEN_PRECISION": "float32", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-m", "nanogen", *command(tmp_path / "killed")], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed/log.jsonl"
    start = time.monotonic()
    while not (log.exists() and len(log.read_text().splitlines()) >= 20):
        assert process.poll() is None and time.monotonic() - start < 300
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/model.safetensors").exists()
    assert main([*command(tmp_path / "killed"), "--resume"]) == 0
    assert main(command(tmp_path / "whole")) == 0
    killed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    different = [name for name in whole if not np.array_equal(killed[name].numpy(), whole[name].numpy())]
    assert not different, "not the same weights"
    lines = [len((tmp_path / name / "log.jsonl").read_text().splitlines()) for name in ("killed", "whole")]
    assert lines[0] == lines[1] == 101  # one line a percent, none twice
