"""The lab's side of sound: tensors, the judge's ear, metrics, samples, and files that become tokens and sounds again."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import briefly
from PIL import Image

from nanogen import UserError
from nanogen.__main__ import main
from nanogen.data import voices
from nanogen.data.datasets import Sounds, load
from nanogen.lab import coding, evaluate_sound, judges, prepare, report, runs, sampling, sound_baselines, sound_metrics
from nanogen.lab.evaluate import evaluate
from nanogen.lab.runs import load_run, make_config, train_run
from nanogen.lab.train import draw_batch, train

RANDOM = np.random.default_rng(0)
QUICK = dict(steps=2, batch_size=4, compile=False)
TINY = {
    "judge": dict(widths=(16, 16, 16)), "codec": dict(widths=(4, 8, 16), dim=8, words=16, books=3, crop=1024, adversarial=0.0, matching=0.0),
    "wave_ar": dict(width=16, layers=4, crop=256, seconds=0.4), "audio_lm": dict(width=32, depth=1, heads=2, books=2, seconds=0.4),
    "tokenizer": dict(codes=32, widths=(16, 16), blocks=1, perceptual=0.0),
}


def spoken(count: int = 24, seed: int = 0) -> dict:
    return voices.make(count, seed=seed, speakers=3, languages=("english",) if "english" in voices.LANGUAGES else voices.LANGUAGES[:1])


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """An fsdd of 24 clips to learn from and 12 for the test, by three speakers."""
    folder, clips = tmp_path_factory.mktemp("sound data"), spoken(36)
    np.savez(folder / "fsdd.npz", waveform=np.round(32767 * np.concatenate(clips["waveforms"])).astype(np.int16),
             offsets=np.cumsum([0] + [len(clip) for clip in clips["waveforms"]]), digits=clips["labels"].astype(np.uint8),
             speakers=clips["speaker"].astype(np.uint8), is_test=np.arange(36) >= 24, speaker_names=np.array(["ann", "bob", "cem"]),
             sample_rate=np.array(8000))
    return folder


@pytest.fixture(autouse=True)
def our_data(data_folder, monkeypatch):
    monkeypatch.setenv("NANOGEN_DATA", str(data_folder))


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory):
    """A tiny run of each chapter that knows sounds: {chapter: Run}."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGEN_DATA", str(data_folder))
        patch.setattr(runs, "recipes", lambda chapter: {"fsdd": {"first look": {"training": dict(QUICK), "config": {}}}})
        return {chapter: train_run(chapter, "fsdd", TINY[chapter] | QUICK, folder / f"{chapter}-fsdd", quiet=True)
                for chapter in ("judge", "codec", "wave_ar", "audio_lm")}


def own_run(finished, chapter, tmp_path):
    """All runs again, to be written into; this one of them."""
    shutil.copytree(finished[chapter].folder.parent, tmp_path / "runs")
    return load_run(tmp_path / "runs" / f"{chapter}-fsdd")


# ---- data


def test_clips_are_padded_with_silence_and_cut_where_asked():
    source = load("fsdd")
    tensors = prepare.sound_tensors(source)
    assert tensors["waveforms"].shape == (24, max(map(len, source.train_waveforms))) and tensors["waveforms"].dtype == torch.float32
    for row, length, clip in zip(tensors["waveforms"], tensors["lengths"], source.train_waveforms, strict=True):
        assert torch.equal(row[:length], torch.tensor(clip)) and not row[length:].any()
    short = prepare.sound_tensors(source, "test", seconds=0.2)
    assert short["waveforms"].shape == (12, 1600) and short["lengths"].max() == 1600 and short["speakers"].max() == 2


def test_a_tape_has_every_sample_once_and_in_order():
    clips = [RANDOM.normal(size=size).astype(np.float32) for size in (5000, 1, 9000, 4000)]
    rows = prepare.tape(clips)
    assert rows.shape == (2, 8192) and np.array_equal(rows.flatten(), np.concatenate(clips)[:16384])
    assert prepare.tape(clips[:1]).shape == (1, 8192)  # silence fills up what is all there is


def test_facts_about_sounds_reach_every_config():
    source = load("fsdd")
    settings = {"config": {}, "training": {}}
    judge = make_config("judge", settings, {}, source)[0]
    assert judge.sound and judge.classes == 10 and judge.second == 3
    assert make_config("wave_ar", settings, {}, source)[0].speakers == 3
    alone = Sounds("own", [np.zeros(9, np.float32)], np.zeros(1, int), np.zeros(1, int), [], np.zeros(0, int), np.zeros(0, int), ["a"], ["unknown"])
    assert make_config("judge", settings, {}, alone)[0].second == 0  # one voice is no question


def test_a_mirror_is_for_pictures_only():
    source = load("fsdd")
    batch = draw_batch(prepare.sound_tensors(source), 0, briefly(1, flip=True))
    rows = {tuple(row) for row in prepare.sound_tensors(source)["waveforms"].tolist()}
    assert all(tuple(row) in rows for row in batch["waveforms"].tolist())


def test_what_a_codec_has_encoded_is_kept_in_its_folder(finished, monkeypatch):
    base, run, source = finished["codec"], finished["audio_lm"], load("fsdd")
    first = prepare.prepared(run.model, source, run.model.config, True, base)
    assert list(base.folder.glob("encoded-*")) and len(first["tokens"]) == 24
    monkeypatch.setattr(prepare, "prepare", None)  # not asked again
    assert torch.equal(prepare.prepared(run.model, source, run.model.config, False, base)["tokens"], first["tokens"])


@pytest.mark.parametrize(("chapter", "data", "words"), [("flow", "fsdd", "holds sounds, but flow needs pictures"), ("codec", "scenes", "holds pictures, but codec needs sounds")])
def test_pictures_for_ears_and_sounds_for_eyes_are_refused(chapter, data, words, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "recipes", lambda chapter: {name: {"first look": {"training": {}, "config": {}}} for name in ("cifar10", "fsdd")})
    monkeypatch.setattr(runs, "load_data", None)  # which would download it
    with pytest.raises(UserError, match=words):
        train_run(chapter, data, {}, tmp_path / "run", count=10, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_pictures_is_refused_by_ears(tmp_path):
    (tmp_path / "own/cat").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"own/cat/{i}.png")
    with pytest.raises(UserError, match="holds pictures, but codec needs sounds"):
        train_run("codec", str(tmp_path / "own"), {}, tmp_path / "run", quiet=True)


def test_a_folder_of_ones_own_sounds_is_treated_like_fsdd(tmp_path):
    (tmp_path / "own/yes").mkdir(parents=True)
    for i in range(3):
        soundfile.write(tmp_path / f"own/yes/{i}.wav", RANDOM.normal(size=2000) / 10, 16000)
    assert runs.find_recipe("judge", str(tmp_path / "own")) == runs.recipes("judge")["fsdd"]["first look"]
    run = train_run("judge", str(tmp_path / "own"), TINY["judge"] | QUICK, tmp_path / "run", quiet=True)
    assert run.model.config.sound and run.speaker_names == ["unknown"] and run.class_names == ["yes"]
    assert runs.usual_data("codec") == "fsdd" and runs.usual_data("flow") == "cifar10"


# ---- the judge


def test_the_judge_hears_the_first_second_and_takes_silence():
    judge = judges.Judge(judges.Config(widths=(16, 16, 16), sound=True, second=3)).eval()
    waveforms = prepare.sound_tensors(load("fsdd"))["waveforms"]
    assert judge(waveforms).shape == (24, 10) and judge.second_answer(waveforms).shape == (24, 3)
    assert torch.allclose(judge(waveforms), judge(torch.nn.functional.pad(waveforms, (0, 9000)))[:, :10], atol=1e-5)  # beyond `seconds`
    assert judge(torch.zeros(2, 1)).isfinite().all()


def test_the_judge_learns_who_says_what():
    source = load("fsdd")
    torch.manual_seed(0)
    judge = judges.Judge(judges.Config(widths=(16, 16, 16), sound=True, second=3, shift=1))
    tensors = prepare.sound_tensors(source)
    before = judge.loss(tensors)[0].item()
    train(judge, tensors, briefly(25, batch_size=24), quiet=True)
    assert judge.loss(tensors)[0].item() < 0.6 * before


def test_a_shift_moves_in_time_and_in_frequency():
    picture = torch.arange(6.0)[None, None, :, None] * 10 + torch.arange(9.0)
    moved = judges.random_shift(picture.expand(200, 1, 6, 9), 1)
    assert moved.shape == (200, 1, 6, 9) and {int(v) for v in moved[:, 0, 2, 4]} == {10 * r + c for r in (1, 2, 3) for c in (3, 4, 5)}


# ---- metrics


def speech() -> np.ndarray:
    return np.concatenate(spoken(8)["waveforms"]).astype(np.float64)


def noisy(clean: np.ndarray, snr: float) -> np.ndarray:
    noise = RANDOM.normal(size=len(clean))
    return clean + noise * np.linalg.norm(clean) / np.linalg.norm(noise) * 10 ** (-snr / 20)


def test_si_sdr_is_the_signal_to_noise_ratio_whatever_the_loudness():
    clean = RANDOM.normal(size=20000)
    noise = RANDOM.normal(size=20000)
    clean, noise = clean - clean.mean(), noise - noise.mean()
    noise -= clean * (clean @ noise) / (clean @ clean)
    noise *= np.linalg.norm(clean) / np.linalg.norm(noise) / 10  # 20 dB below
    assert sound_metrics.si_sdr(clean, clean + noise) == pytest.approx(20, abs=0.01)
    assert sound_metrics.si_sdr(clean, 0.3 * (clean + noise)) == pytest.approx(20, abs=0.01)
    assert sound_metrics.si_sdr(clean, clean) == 100 and sound_metrics.si_sdr(clean, 0 * clean) < -50


def test_stoi_is_one_for_equal_sounds_and_falls_with_the_noise():
    clean = speech()
    assert sound_metrics.stoi(clean, clean) == pytest.approx(1) == sound_metrics.stoi(clean, 0.1 * clean)
    marks = [sound_metrics.stoi(clean, noisy(clean, snr)) for snr in (20, 10, 0, -10, -20)]
    assert marks == sorted(marks, reverse=True) and marks[0] > 0.85 and marks[-1] < 0.5
    distances = [sound_metrics.mel_distance(clean, noisy(clean, snr)) for snr in (20, 10, 0)]
    assert 0 < distances[0] < distances[1] < distances[2] and sound_metrics.mel_distance(clean, clean) == 0


def test_stoi_does_not_count_the_pauses():
    clean = speech()
    paused = np.concatenate([clean, np.zeros(8000)])
    hissing = paused + 1e-5 * RANDOM.normal(size=len(paused))  # in the pause there is nothing but hiss
    assert sound_metrics.stoi(paused, hissing) > 0.99


def test_what_does_not_compare_is_a_sentence():
    with pytest.raises(UserError, match="join clips first"):
        sound_metrics.stoi(speech()[:2000], speech()[:2000])
    for a, b in ((np.ones(5), np.ones(6)), (np.ones((2, 5)), np.ones((2, 5))), (np.ones(0), np.ones(0)), (np.ones(3), np.full(3, np.nan))):
        with pytest.raises(UserError):
            sound_metrics.si_sdr(a, b)


def test_codecs_that_learn_nothing_get_better_with_every_bit():
    waveforms = prepare.sound_tensors(load("fsdd"), "test")["waveforms"][:6].numpy()
    clean = waveforms.ravel()
    for function in (lambda kbps: sound_baselines.mu_law(waveforms, kbps)[0], lambda kbps: sound_baselines.linear_prediction(waveforms, kbps)):
        copies = [function(kbps) for kbps in (0.5, 2, 8)]
        assert all(copy.shape == waveforms.shape and np.isfinite(copy).all() and np.abs(copy).max() <= 1 for copy in copies)
        marks = [sound_metrics.stoi(clean, copy.ravel()) for copy in copies]
        assert marks == sorted(marks)
    _, (rate, bits) = sound_baselines.mu_law(waveforms, 2)
    assert rate * bits <= 2000
    telephone, pair = sound_baselines.mu_law(waveforms, 64)
    assert sound_metrics.si_sdr(clean, telephone.ravel()) > 25 and pair == (8000, 8)
    more, pair = sound_baselines.mu_law(waveforms, 128)  # has no use for them
    assert np.array_equal(more, telephone) and pair == (8000, 8)


def test_linear_prediction_of_silence_is_silence():
    assert not sound_baselines.linear_prediction(np.zeros((2, 1000), np.float32), 2).any()


def test_a_real_time_factor_is_seconds_of_sound_per_second():
    import time
    threads = torch.get_num_threads()
    assert sound_metrics.real_time_factor(lambda: time.sleep(0.02), 1.0) == pytest.approx(50, rel=0.5)
    assert torch.get_num_threads() == threads


# ---- samples, evaluation, report


@pytest.mark.parametrize("chapter", ["wave_ar", "audio_lm"])
def test_samples_of_sound_are_written_as_promised(chapter, finished, tmp_path):
    drawn = sampling.sample(finished[chapter], 5, ["3", "7"], tmp_path / "s", speakers=["Bob", "2"])
    with np.load(tmp_path / "s/samples.npz") as file:
        assert set(file.files) == {"waveforms", "lengths", "sample_rate", "labels", "speakers"}
        assert file["waveforms"].dtype == np.float32 and file["waveforms"].shape == (5, max(1, file["lengths"].max()))
        assert file["labels"].tolist() == [3, 3, 3, 7, 7] and file["speakers"].tolist() == [1, 2, 1, 2, 1]
        assert file["sample_rate"] == 8000 and file["labels"].dtype == file["lengths"].dtype == np.int64
        assert np.array_equal(file["waveforms"], drawn["waveforms"])
    assert sorted(path.name for path in (tmp_path / "s").glob("*.wav")) == [f"{i:03}.wav" for i in range(5)]
    sound, rate = soundfile.read(tmp_path / "s/001.wav")
    assert rate == 8000 and len(sound) == drawn["lengths"][1]
    with Image.open(tmp_path / "s/spectrograms.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    again = sampling.sample(finished[chapter], 5, ["3", "7"], speakers=["bob", "cem"])
    assert np.array_equal(again["waveforms"], drawn["waveforms"])


def test_samples_replace_those_of_an_earlier_call_and_no_recording_of_ones_own(tmp_path):
    run = SimpleNamespace(class_names=["a"], speaker_names=["ann"])
    own = ["2024 interview.wav", "007_take.wav", "1.wav"]
    for name in [*own, "005.wav"]:
        (tmp_path / name).write_bytes(b"of one's own")

    def write(count):
        zeros = np.zeros(count, np.int64)
        drawn = {"waveforms": np.zeros((count, 800), np.float32), "lengths": zeros + 800, "labels": zeros, "speakers": zeros}
        sampling.write_sound_samples(drawn, run, tmp_path)
        return sorted(path.name for path in tmp_path.glob("*.wav"))

    assert write(3) == sorted([*own, "000.wav", "001.wav", "002.wav", "005.wav"])  # nothing in there was ours
    assert write(2) == sorted([*own, "000.wav", "001.wav"])


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(n=0), "number of sounds"), (dict(labels=["12"]), "no class '12'"), (dict(speakers=["dora"]), "no speaker 'dora'.*ann, bob, cem")])
def test_what_cannot_be_said_is_a_sentence(arguments, words, finished):
    with pytest.raises(UserError, match=words):
        sampling.sample(finished["audio_lm"], **({"n": 2} | arguments))


@pytest.mark.parametrize("chapter", ["judge", "codec", "wave_ar", "audio_lm"])
def test_evaluation_of_sound(chapter, finished, tmp_path):
    run = own_run(finished, chapter, tmp_path)
    numbers = evaluate(run, n=8, quiet=True)
    assert json.loads((run.folder / "metrics.json").read_text()) == numbers
    flat = report.flat(numbers)
    assert all(math.isfinite(value) for value in flat.values() if isinstance(value, float))
    if chapter == "judge":
        assert {"test_accuracy", "speaker_accuracy"} <= set(numbers)
    elif chapter == "codec":
        rates = [name for name in numbers if name.startswith("at ")]
        assert len(rates) == 3 and {"si_sdr", "mel_distance", "stoi", "class_accuracy", "speaker_accuracy", "mu_law", "lpc"} <= set(numbers[rates[0]])
        assert numbers["si_sdr"] == numbers[rates[-1]]["si_sdr"] and numbers["encode_real_time_factor_one_thread"] > 0
        assert 0 < numbers["book 1"]["usage"] <= 1 <= numbers["book 3"]["perplexity"]
        assert 6 * 2 < len(list((run.folder / "samples").glob("*.wav"))) <= 60
    else:
        assert {"fd_nano", "fd_nano_floor", "fd_nano_ceiling", "class_accuracy", "speaker_accuracy", "seconds", "seconds_real"} <= set(numbers)
        assert ("bits_per_sample" in numbers and "bits_per_sample_order_1" in numbers) == (chapter == "wave_ar")
        assert numbers["seconds_per_second_of_sound"] > 0
        page = report.write([run.folder], tmp_path / "page.html").read_text()
        assert page.count("<audio controls") == 8 and "000: 0, ann<" in page and "speaker accuracy" in page and "codec-fsdd" in page or chapter == "wave_ar"


def test_a_speaker_who_was_left_out_is_nobody(finished, tmp_path, monkeypatch):
    for chapter in ("judge", "wave_ar"):
        assert runs.find_recipe(chapter, "fsdd-without-bob") == runs.find_recipe(chapter, "fsdd")
    source = load("fsdd-without-bob")
    run = train_run("wave_ar", "fsdd-without-bob", TINY["wave_ar"] | QUICK, tmp_path / "run", quiet=True)
    assert run.speaker_names == ["ann", "", "cem"] and run.model.config.speakers == 3
    assert sampling.sample(run, 4, steps=2)["speakers"].tolist() == [0, 2, 0, 2]
    for left_out in ("bob", "1"):
        with pytest.raises(UserError, match=f"no speaker '{left_out}'.*choose from ann, cem"):
            sampling.sample(run, 4, speakers=[left_out])
    heard, bits = [], run.model.log_likelihood
    monkeypatch.setattr(run.model, "log_likelihood", lambda *batch: heard.extend(batch[3].tolist()) or bits(*batch))
    evaluate_sound.held_out_bits(run, source)
    assert set(source.test_speakers) == {1} and set(heard) == {3}
    assert "speaker_accuracy" in evaluate_sound.evaluate_judge(finished["judge"], load("fsdd"))
    assert "speaker_accuracy" not in evaluate_sound.evaluate_judge(finished["judge"], source)


# ---- files -> tokens -> files


@pytest.mark.parametrize(("rate", "channels", "kind"), [(8000, 1, "wav"), (44100, 2, "wav"), (16000, 1, "flac"), (22050, 2, "ogg")])
def test_a_sound_of_any_kind_comes_back_as_long_as_it_was(rate, channels, kind, finished, tmp_path):
    sound = np.repeat(RANDOM.normal(size=(int(rate * 1.3) + 7, 1)).clip(-9, 9) / 10, channels, axis=1)
    soundfile.write(tmp_path / f"in.{kind}", sound, rate, subtype="PCM_24" if kind == "wav" else None)
    assert main(["encode", str(finished["codec"].folder), str(tmp_path / f"in.{kind}"), "--out", str(tmp_path / "t.npz")]) == 0
    assert main(["decode", str(finished["codec"].folder), str(tmp_path / "t.npz"), "--out", str(tmp_path / f"out.{kind}")]) == 0
    back, new_rate = soundfile.read(tmp_path / f"out.{kind}")
    assert new_rate == 8000 and len(back) == math.ceil(len(sound) * 8000 / rate) and back.ndim == 1
    with np.load(tmp_path / "t.npz") as file:
        assert file["tokens"].dtype == np.uint8 and file["tokens"].shape == (math.ceil(len(back) / 128), 3)


@pytest.mark.parametrize("samples", [np.zeros(1), np.zeros(3000), np.tile([1.0, -1.0], 900)], ids=["one sample", "silence", "clipped"])
def test_the_shortest_the_softest_and_the_loudest_sound(samples, finished, tmp_path):
    soundfile.write(tmp_path / "in.wav", samples, 8000)
    coding.encode(finished["codec"], tmp_path / "in.wav", tmp_path / "t.npz", kbps=finished["codec"].model.kbps(1))
    coding.decode(finished["codec"], tmp_path / "t.npz", tmp_path / "out.wav")
    assert len(soundfile.read(tmp_path / "out.wav")[0]) == len(samples)


def test_blocks_are_resampled_without_a_seam(tmp_path, monkeypatch):
    sound = np.sin(2 * np.pi * 440 * np.arange(5 * 44100 + 1234) / 44100) / 2
    soundfile.write(tmp_path / "in.wav", sound, 44100, subtype="FLOAT")
    monkeypatch.setattr(coding, "BLOCK", 2)
    blocks = list(coding.read_blocks(tmp_path / "in.wav"))
    whole = np.concatenate(blocks)
    assert [len(block) for block in blocks[:2]] == [16000, 16000] and len(whole) == math.ceil(len(sound) * 8000 / 44100)
    wanted = np.sin(2 * np.pi * 440 * np.arange(len(whole)) / 8000) / 2
    assert np.abs(whole - wanted)[50:-50].max() < 1e-3


def test_in_blocks_or_at_once_the_words_are_the_same(finished, tmp_path, monkeypatch):
    sound = np.concatenate(spoken(6)["waveforms"])
    soundfile.write(tmp_path / "in.wav", sound, 8000, subtype="FLOAT")
    whole = coding.encode(finished["codec"], tmp_path / "in.wav", tmp_path / "a.npz")["tokens"]
    monkeypatch.setattr(coding, "BLOCK", 1)
    parts = coding.encode(finished["codec"], tmp_path / "in.wav", tmp_path / "b.npz")["tokens"]
    assert (whole != parts).mean() < 0.01 and np.array_equal(whole.shape, parts.shape)  # a tie may fall otherwise


def test_fewer_kilobits_are_fewer_books(finished, tmp_path):
    soundfile.write(tmp_path / "in.wav", np.zeros(1000), 8000)
    model = finished["codec"].model
    for kbps, books in ((model.kbps(2), 2), (model.kbps(2) + 0.01, 2), (None, 3)):
        assert coding.encode(finished["codec"], tmp_path / "in.wav", tmp_path / "t.npz", kbps)["tokens"].shape[1] == books
    for kbps in (0, -1, 99, math.nan):
        with pytest.raises(UserError, match="--kbps must be from"):
            coding.encode(finished["codec"], tmp_path / "in.wav", tmp_path / "t.npz", kbps)


@pytest.mark.parametrize("fault", ["absent", "text", "empty file", "no samples", "cut wav", "cut flac", "picture", "not numbers", "folder"])
def test_what_is_no_sound_is_one_sentence_and_leaves_nothing(fault, finished, tmp_path, capsys):
    path = tmp_path / ("in.flac" if fault == "cut flac" else "in.wav")
    noise = RANDOM.normal(size=20000) / 10
    if fault in ("cut wav", "cut flac"):
        soundfile.write(path, noise, 8000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "no samples":
        soundfile.write(path, np.zeros(0), 8000)
    elif fault == "not numbers":
        soundfile.write(path, np.full(100, np.nan), 8000, subtype="FLOAT")
    elif fault == "picture":
        Image.new("RGB", (8, 8)).save(path, format="PNG")
    elif fault == "folder":
        path.mkdir()
    elif fault != "absent":
        path.write_bytes(b"hello" if fault == "text" else b"")
    assert main(["encode", str(finished["codec"].folder), str(path), "--out", str(tmp_path / "t.npz")]) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "in." in said and not list(tmp_path.glob("t.npz*"))


def test_tokens_of_another_run_or_damaged_are_one_sentence(finished, tmp_path):
    run = own_run(finished, "codec", tmp_path)
    soundfile.write(tmp_path / "in.wav", np.zeros(1000), 8000)
    content = coding.encode(run, tmp_path / "in.wav", tmp_path / "t.npz")
    good = (tmp_path / "t.npz").read_bytes()
    for name, changed in (("another codec", {"hash": np.array("0" * 16)}), ("damaged", {"tokens": content["tokens"][:-1]}),
                          ("damaged", {"tokens": content["tokens"] + np.uint8(200)}), ("damaged", {"tokens": content["tokens"][:0]}),
                          ("damaged", {"tokens": content["tokens"] / 2})):
        np.savez(tmp_path / "t.npz", **(content | changed))
        with pytest.raises(UserError, match=name):
            coding.decode(run, tmp_path / "t.npz", tmp_path / "out.wav")
    for broken in (good[: len(good) // 2], b"", b"hello"):
        (tmp_path / "t.npz").write_bytes(broken)
        with pytest.raises(UserError, match="no file of tokens"):
            coding.decode(run, tmp_path / "t.npz", tmp_path / "out.wav")
    (tmp_path / "t.npz").write_bytes(good)
    for out, words in ((tmp_path / "out.mp5", "must end in"), (tmp_path / "no/out.wav", "Cannot write")):
        with pytest.raises(UserError, match=words):
            coding.decode(run, tmp_path / "t.npz", out)
    with pytest.raises(UserError, match="Cannot write"):
        coding.encode(run, tmp_path / "in.wav", tmp_path / "no/t.npz")
    with pytest.raises(UserError, match="only tokenizers and codecs"):
        coding.encode(finished["judge"], tmp_path / "in.wav", tmp_path / "t.npz")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_a_picture_becomes_tokens_and_a_picture_again(bottleneck, own_pictures, tmp_path):
    run = train_run("tokenizer", str(own_pictures), TINY["tokenizer"] | QUICK | {"bottleneck": bottleneck}, tmp_path / "run", quiet=True)
    Image.fromarray(RANDOM.integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(tmp_path / "in.jpg")
    assert main(["encode", str(run.folder), str(tmp_path / "in.jpg"), "--out", str(tmp_path / "t.npz")]) == 0
    assert main(["decode", str(run.folder), str(tmp_path / "t.npz"), "--out", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (32, 32)
    with pytest.raises(UserError, match="--kbps is for codecs"):
        coding.encode(run, tmp_path / "in.jpg", tmp_path / "t.npz", 2.0)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture"):
        coding.encode(run, tmp_path / "broken.jpg", tmp_path / "t.npz")
