"""The command line: a mistake is one sentence on stderr and an exit code, 2 for arguments that do
not exist and 1 for all others; a kill in the middle loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

from nanogen import __version__, judge
from nanogen.__main__ import COMMANDS, main
from nanogen.lab.runs import load_run
from nanogen.method import METHODS

TINY = ["--widths", "16,16,16", "--batch-size", "16", "--compile", "false"]


@pytest.fixture
def mistake(capsys):
    """Run a command that must fail with this exit code, and give back what it says."""

    def run(*arguments, code: int = 1) -> str:
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err.strip()
        assert said and "Traceback" not in said
        assert len(said.splitlines()) == 1, f"one sentence was meant:\n{said}"
        return said

    return run


@pytest.fixture
def told(capsys):
    """Run a command, also one that argparse ends, and give back what it prints, in one line."""

    def run(*arguments) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # --help and --version
            code = stop.code
        assert code == 0, capsys.readouterr().err
        return " ".join(capsys.readouterr().out.split())

    return run


@pytest.fixture(scope="module")
def run_folder(own_images, tmp_path_factory):
    """A tiny flow, trained through the command line."""
    folder = tmp_path_factory.mktemp("command line") / "flow-fruit"
    assert main(["train", "flow", "--data", str(own_images), "--out", str(folder),
                 "--widths", "16,32", "--width", "32", "--attention-at", "1", "--steps", "3",
                 "--batch_size", "16", "--no-compile", "--flip"]) == 0
    return folder


# ---- what each command does


def test_train_sample_report(run_folder, tmp_path, told):
    training = load_run(run_folder).record["training"]
    assert training["compile"] is False and training["flip"] is True
    told("sample", run_folder, "--n", 4, "--label", "plum", "--steps", 2, "--guidance", 1.5,
         "--temperature", 0.9, "--seed", 3, "--out", tmp_path / "s")
    with np.load(tmp_path / "s/samples.npz") as file:
        assert file["images"].shape == (4, 32, 32, 3) and file["labels"].tolist() == [1] * 4
    assert (tmp_path / "s/process.gif").exists()
    told("report", run_folder, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.parametrize("order", [
    "--label plum RUN --n 2 --steps 2", "--n 2 --steps=2 RUN --label 1",
    "RUN --n=2 --steps 2 --label Plum"])
def test_the_folder_of_a_run_may_stand_anywhere_and_samples_go_into_it(order, run_folder, told):
    arguments = [run_folder if part == "RUN" else part for part in order.split()]
    assert str(run_folder / "samples") in told("sample", *arguments)
    with np.load(run_folder / "samples/samples.npz") as file:
        assert file["labels"].tolist() == [1, 1]


def test_evaluate_trains_the_judge_it_needs_and_prints_a_table(run_folder, own_images, told):
    judge = run_folder.parent / "judge-fruit"
    told("train", "judge", "--data", own_images, "--out", judge, "--steps", 3, *TINY)
    out = told("evaluate", run_folder, "--n", 6, "--steps", 2)
    assert "fd_nano" in out and "class_accuracy" in out
    assert (run_folder / "metrics.json").exists()


def test_help_says_what_every_field_of_a_method_means(told):
    said = told("train", "var", "--help")
    assert "--depth blocks (4)" in said and "--lr peak learning rate" in said
    assert "--scales" not in said and "--no-compile" in said


def test_help_of_sample_offers_what_the_sampler_of_the_run_takes(finished, told):
    flow, pixel_ar, judge = (told("sample", finished[name].folder, "--help")
                             for name in ("flow", "pixel_ar", "judge"))
    assert "--steps" in flow and "--guidance (2.5)" in flow and "--label" in flow
    assert "--top-p" in pixel_ar and "--no-cached" in pixel_ar and "--steps" not in pixel_ar
    assert "--guidance" not in judge and "--label" not in judge


def test_list_names_every_method_and_data_set(told):
    out = told("list")
    assert all(name in out for name in (*METHODS, "cifar10", "scenes", "fsdd", "voices"))


def test_version(told):
    assert told("--version") == f"nanogen {__version__}"


# ---- mistakes


@pytest.mark.parametrize(("arguments", "words"), [
    ("train opera", "invalid choice: 'opera'"),
    ("train maskgti", "did you mean maskgit?"),
    ("train flow --sparkle 3", "unrecognized arguments: --sparkle"),
    ("train flow --widht 3", "did you mean --width?"),
    ("train flow --lr fast", "--lr"),
    ("train flow --depth 2.5", "--depth"),
    ("train flow --widths 64,wide", "--widths"),
    ("train flow --flip maybe", "true or false, not 'maybe'"),
    ("train flow --lr", "--lr"),
    ("train flow --data", "--data"),
    ("train", "METHOD"),
    ("train --optimizer 3 --sparkle flow", "--sparkle"),
    ("fly", "'fly'"),
    ("sampel x", "did you mean sample?"),
    ("sample --n 3", "Which run?"),
    ("evaluate", "Which run?"),
    ("encode nowhere a.wav", "--out"),
    ("encode nowhere a.wav --out t.npz --kbps many", "--kbps"),
])
def test_arguments_that_do_not_exist_are_a_sentence(arguments, words, mistake, tmp_path,
                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in mistake(*arguments.split(), code=2)
    assert not list(tmp_path.iterdir())  # and leave nothing behind


@pytest.mark.parametrize(("arguments", "words"), [
    ("train flow --data nowhere", "no data set or folder 'nowhere'"),
    ("train flow --recipe secret", "no recipe 'secret'"),
    ("train flow --minutes 2 --steps 3", "either minutes or steps"),
    ("sample nowhere --out x", "nowhere is not a run"),
    ("evaluate nowhere", "nowhere is not a run"),
    ("report nowhere", "nowhere is not a run"),
    ("encode nowhere a.wav --out t.npz", "nowhere is not a run"),
    ("decode nowhere t.npz --out a.wav", "nowhere is not a run"),
])
def test_a_mistake_is_a_sentence(arguments, words, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in mistake(*arguments.split())
    assert not list(tmp_path.iterdir())


def test_mistakes_about_a_run_that_is_there(run_folder, finished, mistake, own_images, tmp_path):
    def sample(*arguments, **code):
        return mistake("sample", run_folder, *arguments, "--out", tmp_path / "s", **code)

    assert "--resume" in mistake("train", "flow", "--data", own_images, "--out", run_folder)
    assert "no label 'pear'" in sample("--label", "pear")
    assert "at least 1" in sample("--n", 0)
    assert "steps" in sample("--steps", -1)
    assert "--speaker" in sample("--speaker", "jackson", code=2)
    assert "did you mean --temperature?" in sample("--temprature", 1, code=2)
    assert "--colour" in mistake("evaluate", run_folder, "--colour", "red", code=2)
    assert "--steps" in mistake("sample", finished["pixel_ar"].folder, "--steps", 3, code=2)
    assert "only tokenizers and codecs encode" in mistake(
        "encode", run_folder, own_images / "apple/0.png", "--out", tmp_path / "t.npz")
    assert "only tokenizers and codecs decode" in mistake(
        "decode", run_folder, tmp_path / "t.npz", "--out", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_only_as_what_it_is(run_folder, mistake, own_images):
    assert "is a flow on fruit, not a judge" in mistake(
        "train", "judge", "--data", own_images, "--out", run_folder, "--resume")
    assert "was trained on other data than apple is now" in mistake(
        "train", "flow", "--data", own_images / "apple", "--out", run_folder, "--resume")


def test_a_file_where_a_folder_is_meant(run_folder, mistake, own_images, tmp_path):
    (tmp_path / "file").write_text("hello")
    assert "file" in mistake(
        "sample", run_folder, "--n", 2, "--steps", 2, "--out", tmp_path / "file")
    assert "file" in mistake(
        "train", "judge", "--data", own_images, "--out", tmp_path / "file", "--steps", 3, *TINY)
    assert "file" in mistake("sample", tmp_path / "file", "--out", tmp_path / "s")


def test_data_that_cannot_be_learned_from(mistake, tmp_path):
    def train(name):
        return mistake("train", "flow", "--data", tmp_path / name, "--out", tmp_path / "run")

    for name in ("empty", "sounds", "damaged"):
        (tmp_path / name).mkdir()
    soundfile.write(tmp_path / "sounds/beep.wav", np.sin(np.arange(800) / 5), 8000)
    (tmp_path / "damaged/a.png").write_bytes(b"no image")
    assert "no images" in train("empty")
    assert "holds sounds, but flow learns from images" in train("sounds")
    assert "damaged" in train("damaged")
    assert not (tmp_path / "run").exists()


# ---- Ctrl-C and kill


def test_ctrl_c_is_no_traceback_and_the_run_goes_on(own_images, tmp_path, monkeypatch, capsys):
    loss, calls = judge.Judge.loss, []

    def press(self, batch):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(judge.Judge, "loss", press)
    command = ["train", "judge", "--data", str(own_images), "--out", str(tmp_path / "run"),
               "--steps", "9", *TINY]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert "--resume goes on" in said and "Traceback" not in said
    assert (tmp_path / "run/state.pt").exists()
    assert not (tmp_path / "run/model.safetensors").exists()
    assert main([*command, "--resume"]) == 0
    assert len(calls) == 10  # 9 steps, and one trial before the first


@pytest.mark.parametrize(("command", "said"), [
    (["report", "run"], "Stopped."), (["list"], "Stopped."),
    ([], "the same command goes on."), (["compare"], "the same command goes on."),
    (["train", "flow"], "with --resume goes on.")])
def test_ctrl_c_promises_only_what_the_command_keeps(command, said, monkeypatch, capsys):
    def press(*_):
        raise KeyboardInterrupt

    pressed = {name: (press, *rest) for name, (_, *rest) in COMMANDS.items()}
    monkeypatch.setattr("nanogen.__main__.COMMANDS", pressed)
    assert main(command) == 130 and capsys.readouterr().err.endswith(f"{said}\n")


def test_a_process_that_is_killed_in_the_middle_is_resumed_bit_for_bit(own_images, tmp_path):
    def command(name):
        return ["train", "judge", "--data", str(own_images), "--out", str(tmp_path / name),
                "--steps", "150", "--save-every", "0", *TINY]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANOGEN_PRECISION": "float32",
                                "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-m", "nanogen", *command("killed")],
                               env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    log, start = tmp_path / "killed/log.jsonl", time.monotonic()
    while not (log.exists() and len(log.read_text().splitlines()) >= 20):
        assert process.poll() is None and time.monotonic() - start < 300
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/model.safetensors").exists()
    assert main([*command("killed"), "--resume"]) == 0
    assert main(command("whole")) == 0
    killed, whole = (load_file(tmp_path / name / "model.safetensors")
                     for name in ("killed", "whole"))
    different = [name for name in whole if not whole[name].equal(killed[name])]
    assert not different, "not the same weights"
    for name in ("killed", "whole"):  # one line a percent, none twice
        assert len((tmp_path / name / "log.jsonl").read_text().splitlines()) == 101
