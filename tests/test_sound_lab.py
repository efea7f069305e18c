"""The lab's side of sound: tensors, the judge, samples, evaluation, and files as tokens."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import briefly
from PIL import Image

from nanogen import UserError
from nanogen.__main__ import main
from nanogen.data import voices
from nanogen.data.datasets import Dataset, load
from nanogen.judge import Config, Judge, random_shift
from nanogen.lab import prepare, recipes, report, runs
from nanogen.lab.evaluate import evaluate, held_out_bits
from nanogen.lab.runs import load_run, train_run
from nanogen.lab.sample import decode, encode, sample, write_samples
from nanogen.lab.train import draw_batch, train

RANDOM = np.random.default_rng(0)
QUICK = dict(steps=2, batch_size=4, compile=False)
TINY = {
    "judge": dict(widths=(16, 16, 16)),
    "codec": dict(widths=(4, 8, 16), dim=8, codebook_size=16, codebooks=3, crop=1024,
                  adversarial=0.0),
    "wave_ar": dict(width=16, layers=3, crop=256, seconds=0.4),
    "audio_lm": dict(width=32, depth=1, heads=2, codebooks=2, seconds=0.4),
    "tokenizer": dict(codebook_size=32, widths=(16, 16), blocks=1, perceptual=0.0),
}


def spoken(count: int = 24) -> dict:
    return voices.make(count, seed=0, speakers=3, languages=("english",))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """An fsdd of 24 training clips and 12 test clips by three speakers."""
    folder, clips = tmp_path_factory.mktemp("sound data"), spoken(36)
    waveform = np.round(32767 * np.concatenate(clips["waveforms"])).astype(np.int16)
    np.savez(folder / "fsdd.npz", waveform=waveform, digits=clips["labels"].astype(np.uint8),
             offsets=np.cumsum([0] + [len(clip) for clip in clips["waveforms"]]),
             speakers=clips["speaker"].astype(np.uint8), is_test=np.arange(36) >= 24,
             speaker_names=np.array(["ann", "bob", "cem"]), sample_rate=np.array(8000))
    return folder


@pytest.fixture(autouse=True)
def our_data(data_folder, monkeypatch):
    monkeypatch.setenv("NANOGEN_DATA", str(data_folder))


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory):
    """A tiny run of each method for sounds: {method: Run}."""
    folder, recipe = tmp_path_factory.mktemp("runs"), {"training": dict(QUICK), "config": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGEN_DATA", str(data_folder))
        patch.setattr(recipes, "recipes", lambda method: {"fsdd": {"default": recipe}})
        return {name: train_run(name, "fsdd", TINY[name] | QUICK, folder / f"{name}-fsdd",
                                quiet=True)
                for name in ("judge", "codec", "wave_ar", "audio_lm")}


def own_run(finished, method, tmp_path):
    """This one of a copy of all runs, to be written into."""
    shutil.copytree(finished[method].folder.parent, tmp_path / "runs")
    return load_run(tmp_path / "runs" / f"{method}-fsdd")


def a_judge(**fields) -> Judge:
    small = dict(widths=(16, 16, 16), sound=True, second="speakers", second_classes=3)
    return Judge(Config(**(small | fields)))


# ---- data


def test_clips_are_padded_with_zeros_and_cut_where_asked():
    dataset = load("fsdd")
    clips, tensors = dataset.train["waveforms"], prepare.columns(a_judge(), dataset)
    assert tensors["waveforms"].shape == (24, max(map(len, clips)))
    assert tensors["waveforms"].dtype == torch.float32
    rows = zip(tensors["waveforms"], tensors["lengths"], clips, strict=True)
    for row, length, clip in rows:
        assert torch.equal(row[:length], torch.tensor(clip)) and not row[length:].any()
    short = prepare.columns(a_judge(seconds=0.2), dataset, "test")
    assert short["waveforms"].shape == (12, 1600) and short["lengths"].max() == 1600
    assert short["speakers"].max() == 2


def test_concatenated_recordings_have_every_sample_once_and_in_order():
    clips = [RANDOM.normal(size=size).astype(np.float32) for size in (5000, 1, 9000, 4000)]
    rows = prepare.concatenate(clips)
    assert rows.shape == (2, 8192)
    assert np.array_equal(rows.flatten(), np.concatenate(clips)[:16384])
    assert prepare.concatenate(clips[:1]).shape == (1, 8192)  # one short clip is padded


def test_what_a_data_set_says_of_itself_reaches_every_config():
    dataset, settings = load("fsdd"), {"config": {}, "training": {}}
    config = recipes.make_config("judge", settings, {}, recipes.facts(dataset))[0]
    assert config.sound and config.classes == 10
    assert (config.second, config.second_classes) == ("speakers", 3)
    assert recipes.make_config("wave_ar", settings, {}, recipes.facts(dataset))[0].speakers == 3
    part = {"waveforms": [np.zeros(9, np.float32)], "labels": np.zeros(1, np.int64),
            "speakers": np.zeros(1, np.int64)}
    alone = Dataset("own", "own", "sounds", part, part, {"labels": ["a"], "speakers": ["me"]})
    config = recipes.make_config("judge", settings, {}, recipes.facts(alone))[0]
    assert config.second == "" and config.second_classes == 0  # one voice is no question


def test_only_images_are_mirrored():
    waveforms = prepare.columns(a_judge(), load("fsdd"))
    batch = draw_batch(waveforms, 0, briefly(1, flip=True))
    rows = {tuple(row) for row in waveforms["waveforms"].tolist()}
    assert all(tuple(row) in rows for row in batch["waveforms"].tolist())


def test_what_a_codec_has_encoded_is_kept_in_its_folder(finished, monkeypatch):
    base, model, dataset = finished["codec"].folder, finished["audio_lm"].model, load("fsdd")
    first = prepare.prepare(model, dataset, True, base)
    assert list(base.glob("encoded-*")) and len(first["tokens"]) == 24
    monkeypatch.setattr(prepare, "encode", None)  # it is not called again
    again = prepare.prepare(model, dataset, True, base)
    assert torch.equal(again["tokens"], first["tokens"])


@pytest.mark.parametrize(("method", "data", "words"), [
    ("flow", "fsdd", "holds sounds, but flow learns from images"),
    ("codec", "scenes", "holds images, but codec learns from sounds")])
def test_data_of_the_wrong_kind_is_refused_before_it_is_loaded(method, data, words, tmp_path,
                                                               monkeypatch):
    monkeypatch.setattr(runs, "load", None)
    with pytest.raises(UserError, match=words):
        train_run(method, data, {}, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_is_refused_by_a_codec(tmp_path):
    (tmp_path / "own/cat").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"own/cat/{i}.png")
    with pytest.raises(UserError, match="holds images, but codec learns from sounds"):
        train_run("codec", str(tmp_path / "own"), {}, tmp_path / "run", quiet=True)


def test_a_folder_of_ones_own_sounds_is_treated_like_fsdd(tmp_path):
    (tmp_path / "own/yes").mkdir(parents=True)
    for i in range(3):
        soundfile.write(tmp_path / f"own/yes/{i}.wav", RANDOM.normal(size=2000) / 10, 16000)
    recipe = recipes.find_recipe("judge", str(tmp_path / "own"), "sounds")
    assert recipe["training"] == recipes.recipes("judge")["fsdd"]["default"]["training"]
    run = train_run("judge", str(tmp_path / "own"), TINY["judge"] | QUICK, tmp_path / "run",
                    quiet=True)
    assert run.model.config.sound and run.names == {"labels": ["yes"], "speakers": ["unknown"]}


# ---- the judge


def test_the_judge_takes_the_first_second_and_silence():
    judge = a_judge().eval()
    waveforms = prepare.columns(judge, load("fsdd"))["waveforms"]
    assert judge(waveforms).shape == (24, 10) and judge.second_logits(waveforms).shape == (24, 3)
    longer = F.pad(waveforms, (0, 9000))  # beyond `seconds`
    assert torch.allclose(judge(waveforms), judge(longer), atol=1e-5)
    assert judge(torch.zeros(2, 1)).isfinite().all()


def test_the_judge_learns_who_says_what():
    torch.manual_seed(0)
    judge = a_judge(shift=1)
    tensors = prepare.columns(judge, load("fsdd"))
    before = judge.loss(tensors)[0].item()
    train(judge, tensors, briefly(25, batch_size=24), quiet=True)
    assert judge.loss(tensors)[0].item() < 0.6 * before


def test_a_shift_moves_in_time_and_in_frequency():
    image = torch.arange(6.0)[None, None, :, None] * 10 + torch.arange(9.0)
    moved = random_shift(image.expand(200, 1, 6, 9), 1)
    around = {10 * row + column for row in (1, 2, 3) for column in (3, 4, 5)}
    assert moved.shape == (200, 1, 6, 9) and {int(v) for v in moved[:, 0, 2, 4]} == around


@pytest.mark.parametrize(("fields", "words"), [
    (dict(second="speakers"), "second_classes must be more than 0"),
    (dict(second_classes=3), "second_classes must be .* else 0, got 3"),
    (dict(widths=()), "widths must be numbers above 1"),
    (dict(size=4), "size must be at least"), (dict(shift=32), "shift must be at least 0 and less")])
def test_a_judge_that_cannot_be_built_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        Config(**fields)


# ---- samples, evaluation, report


@pytest.mark.parametrize("method", ["wave_ar", "audio_lm"])
def test_samples_of_sound_are_written_as_promised(method, finished, tmp_path):
    asked, out = {"labels": ["3", "7"], "speakers": ["Bob", "2"]}, tmp_path / "s"
    drawn = sample(finished[method], 5, asked, out=out)
    with np.load(out / "samples.npz") as file:
        content = dict(file)
    assert set(content) == {"waveforms", "lengths", "sample_rate", "labels", "speakers"}
    assert content["waveforms"].shape == (5, max(1, content["lengths"].max()))
    assert content["waveforms"].dtype == np.float32 and content["sample_rate"] == 8000
    assert content["labels"].tolist() == [3, 3, 3, 7, 7]
    assert content["speakers"].tolist() == [1, 2, 1, 2, 1]
    assert content["labels"].dtype == content["lengths"].dtype == np.int64
    assert np.array_equal(content["waveforms"], drawn["waveforms"])
    assert sorted(path.name for path in out.glob("*.wav")) == [f"{i:03}.wav" for i in range(5)]
    sound, rate = soundfile.read(out / "001.wav")
    assert rate == 8000 and len(sound) == drawn["lengths"][1]
    with Image.open(out / "spectrograms.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    again = sample(finished[method], 5, {"labels": ["3", "7"], "speakers": ["bob", "cem"]})
    assert np.array_equal(again["waveforms"], drawn["waveforms"])


def test_a_sound_is_continued_from_the_command_line(finished, tmp_path, capsys):
    run, clip = finished["audio_lm"], np.sin(np.arange(2000) / 9).astype(np.float32) / 2
    soundfile.write(tmp_path / "my.wav", clip, 8000, "FLOAT")
    command = ["sample", str(run.folder), "--n", "2", "--known", str(tmp_path / "my.wav"),
               "--out", str(tmp_path / "s")]
    assert main([*command, "--keep", "0.2"]) == 0
    with np.load(tmp_path / "s/samples.npz") as file:
        assert file["known_lengths"].tolist() == [1600] * 2
        assert np.allclose(file["known"][:, :1600], clip[:1600], atol=1e-4)
        assert (file["lengths"] >= 1600 // 128 * 128).all()
        first = file["waveforms"][:, : 12 * 128]  # decoded from the same tokens
        assert np.array_equal(first[0], first[1]) and np.abs(first).max() > 0
    for said, words in ((["--keep", "0.3"], "at most the length of the sound, 0.25 seconds"),
                        (["--keep", "0.01"], "at least 128 samples")):
        assert main([*command, *said]) == 1 and words in capsys.readouterr().err
    assert main(["sample", str(run.folder), "--keep", "0.2"]) == 2


def test_samples_replace_those_of_an_earlier_call_and_no_recording_of_ones_own(finished, tmp_path):
    model = SimpleNamespace(output="waveforms", conditions={"labels": "class"})
    run = SimpleNamespace(model=model, names={"labels": ["a"]})
    own = ["2024 interview.wav", "007_take.wav", "1.wav"]
    for name in [*own, "005.wav"]:
        (tmp_path / name).write_bytes(b"of one's own")

    def write(count):
        drawn = {"waveforms": np.zeros((count, 800), np.float32), "labels": np.zeros(count, int),
                 "lengths": np.full(count, 800)}
        write_samples(drawn, run, tmp_path)
        return sorted(path.name for path in tmp_path.glob("*.wav"))

    assert write(3) == sorted([*own, "000.wav", "001.wav", "002.wav", "005.wav"])  # none was ours
    assert write(2) == sorted([*own, "000.wav", "001.wav"])


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(n=0), "number of samples"), (dict(conditions={"labels": ["12"]}), "no label '12'"),
    (dict(conditions={"speakers": ["dora"]}), "no speaker 'dora'.*ann, bob, cem")])
def test_what_cannot_be_drawn_is_a_sentence(arguments, words, finished):
    with pytest.raises(UserError, match=words):
        sample(finished["audio_lm"], **({"n": 2} | arguments))


@pytest.mark.parametrize("method", ["judge", "codec", "wave_ar", "audio_lm"])
def test_evaluation_of_sound(method, finished, tmp_path):
    run = own_run(finished, method, tmp_path)
    metrics = evaluate(run, n=8, quiet=True)
    assert json.loads((run.folder / "metrics.json").read_text()) == metrics
    numbers = [value for value in report.flat(metrics).values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)) and len(metrics["judge"]) == 16
    assert {"seed", "machine", "parameters", "minutes"} <= set(metrics)
    if method == "judge":
        assert {"test_accuracy", "speaker_accuracy"} <= set(metrics)
    elif method == "codec":
        rates = [name for name in metrics if name.startswith("at ")]
        assert len(rates) == 3 and metrics["si_sdr"] == metrics[rates[-1]]["si_sdr"]
        wanted = {"si_sdr", "mel_distance", "stoi", "class_accuracy", "speaker_accuracy"}
        assert wanted <= set(metrics[rates[0]]) and wanted <= set(metrics[rates[0]]["mu_law"])
        assert metrics["encode_real_time_factor_one_thread"] > 0
        assert 0 < metrics["codebook 1"]["usage"] <= 1 <= metrics["codebook 3"]["perplexity"]
        assert 6 * 2 < len(list((run.folder / "samples").glob("*.wav"))) <= 60
    else:
        assert {"fd_nano", "fd_nano_floor", "fd_nano_ceiling", "class_accuracy", "seconds",
                "speaker_accuracy", "seconds_real", "seconds_per_sound",
                "voiced_fraction", "voiced_fraction_real"} <= set(metrics)
        assert ("bits_per_sample" in metrics) == (method == "wave_ar")
        assert ("bits_per_sample_order_1" in metrics) == (method == "wave_ar")
        assert metrics["seconds_per_second_of_sound"] > 0 and metrics["samples"] == 8
        page = report.write([run.folder], tmp_path / "page.html").read_text()
        assert page.count("<audio controls") == 3 + 8 and "speaker accuracy" in page


def test_a_speaker_who_was_left_out_is_the_null_class(finished, tmp_path, monkeypatch):
    for method in ("judge", "wave_ar"):
        recipe = recipes.find_recipe(method, "fsdd-without-bob", "sounds")
        assert recipe == recipes.find_recipe(method, "fsdd", "sounds")
    dataset = load("fsdd-without-bob")
    run = train_run("wave_ar", "fsdd-without-bob", TINY["wave_ar"] | QUICK, tmp_path / "run",
                    quiet=True)
    assert run.names["speakers"] == ["ann", "", "cem"] and run.model.config.speakers == 3
    assert sample(run, 4, seconds=0.01)["speakers"].tolist() == [0, 2, 0, 2]
    for left_out in ("bob", "1"):
        with pytest.raises(UserError, match=f"no speaker '{left_out}'.*choose from ann, cem"):
            sample(run, 4, {"speakers": [left_out]})
    seen, bits = [], run.model.log_likelihood
    monkeypatch.setattr(run.model, "log_likelihood",
                        lambda batch: seen.extend(batch["speakers"].tolist()) or bits(batch))
    held_out_bits(run, dataset, 12)
    assert set(dataset.test["speakers"]) == {1} and set(seen) == {3}
    judge = own_run(finished, "judge", tmp_path)
    assert "speaker_accuracy" in evaluate(judge)
    assert "speaker_accuracy" not in evaluate(judge, dataset=dataset)


# ---- files -> tokens -> files


@pytest.mark.parametrize(("rate", "channels", "kind"), [
    (8000, 1, "wav"), (44100, 2, "wav"), (16000, 1, "flac"), (22050, 2, "ogg")])
def test_a_sound_of_any_kind_comes_back_as_long_as_it_was(rate, channels, kind, finished, tmp_path):
    sound = RANDOM.normal(size=(int(rate * 1.3) + 7, 1)).clip(-9, 9) / 10
    first, tokens, last = (tmp_path / name for name in (f"in.{kind}", "t.npz", f"out.{kind}"))
    soundfile.write(first, sound.repeat(channels, axis=1), rate,
                    subtype="PCM_24" if kind == "wav" else None)
    codec = str(finished["codec"].folder)
    assert main(["encode", codec, str(first), "--out", str(tokens)]) == 0
    assert main(["decode", codec, str(tokens), "--out", str(last)]) == 0
    back, new_rate = soundfile.read(last)
    assert new_rate == 8000 and len(back) == math.ceil(len(sound) * 8000 / rate) and back.ndim == 1
    with np.load(tokens) as file:
        assert file["tokens"].dtype == np.uint8
        assert file["tokens"].shape == (math.ceil(len(back) / 128), 3)


@pytest.mark.parametrize("samples", [np.zeros(1), np.zeros(3000), np.tile([1.0, -1.0], 900)],
                         ids=["one sample", "silence", "clipped"])
def test_the_shortest_the_softest_and_the_loudest_sound(samples, finished, tmp_path):
    run = finished["codec"]
    soundfile.write(tmp_path / "in.wav", samples, 8000)
    encode(run, tmp_path / "in.wav", tmp_path / "t.npz", kbps=run.model.kbps(1))
    decode(run, tmp_path / "t.npz", tmp_path / "out.wav")
    assert len(soundfile.read(tmp_path / "out.wav")[0]) == len(samples)


def test_in_chunks_or_at_once_the_tokens_are_the_same(finished, tmp_path):
    sound = np.tile(np.concatenate(spoken(6)["waveforms"]), 6)  # longer than a chunk of 10 seconds
    soundfile.write(tmp_path / "in.wav", sound, 8000, subtype="FLOAT")
    chunks = encode(finished["codec"], tmp_path / "in.wav", tmp_path / "t.npz")["tokens"]
    waveform = torch.tensor(sound, dtype=torch.float32)[None]
    whole = finished["codec"].model.encode(waveform)[0].numpy()
    assert len(sound) > 80_000 and chunks.shape == whole.shape
    assert (whole != chunks).mean() < 0.01  # rounding may decide between two codes


def test_fewer_kilobits_are_fewer_codebooks(finished, tmp_path):
    soundfile.write(tmp_path / "in.wav", np.zeros(1000), 8000)
    run, files = finished["codec"], (tmp_path / "in.wav", tmp_path / "t.npz")
    two = run.model.kbps(2)
    for kbps, codebooks in ((two, 2), (two + 0.01, 2), (None, 3)):
        assert encode(run, *files, kbps)["tokens"].shape[1] == codebooks
    for kbps in (0, -1, 99, math.nan):
        with pytest.raises(UserError, match="--kbps must be from"):
            encode(run, *files, kbps)


@pytest.mark.parametrize("fault", ["absent", "text", "empty file", "no samples", "cut wav",
                                   "cut flac", "image", "not finite", "folder"])
def test_what_is_no_sound_is_one_sentence_and_leaves_nothing(fault, finished, tmp_path, capsys):
    path = tmp_path / ("in.flac" if fault == "cut flac" else "in.wav")
    if fault in ("cut wav", "cut flac"):
        soundfile.write(path, RANDOM.normal(size=20000) / 10, 8000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "no samples":
        soundfile.write(path, np.zeros(0), 8000)
    elif fault == "not finite":
        soundfile.write(path, np.full(100, np.nan), 8000, subtype="FLOAT")
    elif fault == "image":
        Image.new("RGB", (8, 8)).save(path, format="PNG")
    elif fault == "folder":
        path.mkdir()
    elif fault != "absent":
        path.write_bytes(b"hello" if fault == "text" else b"")
    codec, tokens = str(finished["codec"].folder), tmp_path / "t.npz"
    assert main(["encode", codec, str(path), "--out", str(tokens)]) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "in." in said and not list(tmp_path.glob("*t*.npz*"))


def test_tokens_of_another_run_or_damaged_are_one_sentence(finished, tmp_path):
    run, sound, file, out = own_run(finished, "codec", tmp_path), *(
        tmp_path / name for name in ("in.wav", "t.npz", "out.wav"))
    soundfile.write(sound, np.zeros(1000), 8000)
    content = encode(run, sound, file)
    good, tokens = file.read_bytes(), content["tokens"]
    for words, changed in (("another run", {"hash": np.array("0" * 16)}),
                           ("holds no tokens", {"tokens": tokens + np.uint8(200)}),
                           ("holds no tokens", {"tokens": tokens / 2})):
        np.savez(file, **(content | changed))
        with pytest.raises(UserError, match=words):
            decode(run, file, out)
    for broken in (good[: len(good) // 2], b"", b"hello"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="encode again"):
            decode(run, file, out)
    file.write_bytes(good)
    (tmp_path / "file").write_bytes(b"")
    for wrong, words in ((tmp_path / "out.mp5", "must end in"),
                         (tmp_path / "file/out.wav", "Cannot")):
        with pytest.raises(UserError, match=words):
            decode(run, file, wrong)
    with pytest.raises(UserError, match="Cannot"):
        encode(run, sound, tmp_path / "file/t.npz")
    with pytest.raises(UserError, match="only tokenizers and codecs"):
        encode(finished["judge"], sound, file)
    assert not list(tmp_path.glob("*.partial*")) and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_an_image_becomes_tokens_and_an_image_again(bottleneck, own_images, tmp_path):
    fields = {key: value for key, value in TINY["tokenizer"].items()
              if key != "codebook_size" or bottleneck == "vq"}
    run = train_run("tokenizer", str(own_images), fields | QUICK | {"bottleneck": bottleneck},
                    tmp_path / "run", quiet=True)
    image, tokens, out = (tmp_path / name for name in ("in.jpg", "t.npz", "out.png"))
    Image.fromarray(RANDOM.integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(image)
    assert main(["encode", str(run.folder), str(image), "--out", str(tokens)]) == 0
    assert main(["decode", str(run.folder), str(tokens), "--out", str(out)]) == 0
    with Image.open(out) as decoded:
        assert decoded.size == (32, 32)
    with pytest.raises(UserError, match="--kbps is for codecs"):
        encode(run, image, tokens, 2.0)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image"):
        encode(run, tmp_path / "broken.jpg", tokens)
