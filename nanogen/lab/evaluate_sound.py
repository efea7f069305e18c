"""What a run on sounds is worth, on clips that it has not heard. `evaluate.py` asks here.

    codecs       test clips there and back with 1 to 8 codebooks: SI-SDR, mel distance, STOI, and whether the judge still
                 hears the digit and the voice; beside them, two codecs that learn nothing, at the same bit rates
    generators   300 samples, evenly over digits and voices: FD-nano with its floor and ceiling, digit and speaker accuracy
                 by the judge, durations, cost;  wave_ar also bits per sample beside counting
    judges       test accuracy of the digit and of the speaker

class_accuracy is that of the digit, as it is that of the thing in pictures; speaker_accuracy stands beside it, and is left
out where the test has speakers that nobody has learned (voices). Everything is measured at 8,000 samples a second.
"""

import math
import time

import numpy as np
import torch
from torch import Tensor, nn

from nanogen.blocks.quantize import usage
from nanogen.data.datasets import Sounds
from nanogen.data.folders import SAMPLE_RATE
from nanogen.lab import machine
from nanogen.lab.files import make_folder
from nanogen.lab.judges import accuracy, apply
from nanogen.lab.metrics import frechet_distance, precision_recall
from nanogen.lab.prepare import sound_tensors
from nanogen.lab.runs import CHAPTERS, Run
from nanogen.lab.sampling import sample, write_sounds
from nanogen.lab.sound_baselines import linear_prediction, mu_law
from nanogen.lab.sound_metrics import mel_distance, real_time_factor, si_sdr, stoi

MOST_SAMPLES = 300  # a chain over samples takes minutes for them
SHOWN = 6  # test clips whose reconstructions are kept to be listened to


def evaluate_judge(run: Run, source: Sounds) -> dict:
    test = sound_tensors(source, "test", run.model.config.seconds)
    speakers = hide_strangers(test["speakers"], source, run.model.config.second)
    numbers = opinion(run.model, test["waveforms"], test["labels"], speakers)
    return {name.replace("class", "test"): value for name, value in numbers.items()}


def opinion(expert: nn.Module, waveforms: Tensor, labels: Tensor, speakers: Tensor) -> dict:
    """How often the judge hears in waveforms (N, T) the labels and the speakers (N,) that were meant."""
    numbers = {"class_accuracy": accuracy(apply(expert, waveforms), labels)}
    if int(speakers.max()) < expert.config.second:
        numbers["speaker_accuracy"] = accuracy(apply(expert.second_answer, waveforms), speakers)
    return numbers


# ---- codecs


def evaluate_codec(run: Run, source: Sounds, expert: nn.Module, n: int) -> dict:
    """Reconstructions of up to n test clips at each bit rate; the numbers at the highest one also stand by themselves."""
    model = run.model
    test = {name: tensor[every(n, len(source.test_labels))] for name, tensor in sound_tensors(source, "test").items()}
    waveforms, lengths = test["waveforms"], test["lengths"]
    originals = cut(waveforms, lengths)
    indices = apply(model.encode, waveforms, 50)  # (N, frames, books)
    heard = opinion(expert, waveforms, test["labels"], test["speakers"])
    numbers = {"clips": len(waveforms)} | {f"{name}_originals": value for name, value in heard.items()}
    shown = {"original": waveforms}
    for books in range(1, model.books + 1):
        kbps = model.kbps(books)
        versions = {"codec": apply(model.decode, indices[..., :books], 50)[:, : waveforms.shape[1]]}
        telephone, (rate, bits) = mu_law(waveforms.numpy(), kbps)
        versions |= {"mu_law": torch.from_numpy(telephone), "lpc": torch.from_numpy(linear_prediction(waveforms.numpy(), kbps))}
        marks = {name: judge_copies(originals, decoded, lengths, test, expert) for name, decoded in versions.items()}
        marks["mu_law"] |= {"samples_per_second": rate, "bits_per_sample": bits}
        numbers[f"at {kbps:g} kbit/s"] = marks.pop("codec") | marks
        if books in (1, 2, model.books // 2, model.books):
            shown[f"codec {kbps:g} kbps"] = versions["codec"]
        if books == model.books // 2:
            shown |= {f"mu-law {kbps:g} kbps": versions["mu_law"], f"LPC {kbps:g} kbps": versions["lpc"]}
    real = torch.arange(indices.shape[1]) < (-(-lengths // model.hop))[:, None]  # frames with some of the clip in them
    for book in range(model.books):
        share, perplexity = usage(indices[..., book][real], model.vocabulary)
        numbers[f"book {book + 1}"] = {"usage": share, "perplexity": perplexity}
    best = numbers[f"at {model.kbps(model.books):g} kbit/s"]
    numbers |= {name: value for name, value in best.items() if isinstance(value, float)}
    keep_versions(run, shown, lengths, test, source)
    return numbers | {"kbps": model.kbps(model.books)} | codec_speed(model, originals)


def judge_copies(originals: list[np.ndarray], decoded: Tensor, lengths: Tensor, test: dict, expert: nn.Module) -> dict:
    """All numbers for one version (N, T) of the clips. STOI is that of all clips joined: single digits are too short."""
    decoded = decoded * (torch.arange(decoded.shape[1]) < lengths[:, None])  # what was padding stays silent
    copies = cut(decoded, lengths)
    pairs = list(zip(originals, copies, strict=True))
    numbers = {"si_sdr": float(np.mean([si_sdr(*pair) for pair in pairs]))}
    joined = np.concatenate(originals), np.concatenate(copies)
    numbers |= {"mel_distance": mel_distance(*joined)}
    if len(joined[0]) > SAMPLE_RATE:
        numbers["stoi"] = stoi(*joined)
    return numbers | opinion(expert, decoded, test["labels"], test["speakers"])


@torch.no_grad()
def codec_speed(model: nn.Module, originals: list[np.ndarray]) -> dict:
    """Seconds of sound per second of computing, there and back, for one recording of up to ten seconds: in float32, as the
    commands encode and decode compute."""
    tape = torch.from_numpy(np.concatenate(originals)[None, : 10 * SAMPLE_RATE]).to(machine.device())
    seconds, indices = tape.shape[1] / SAMPLE_RATE, model.encode(tape)
    return {"encode_real_time_factor_one_thread": real_time_factor(lambda: model.encode(tape), seconds),
            "decode_real_time_factor_one_thread": real_time_factor(lambda: model.decode(indices), seconds)}


def keep_versions(run: Run, shown: dict[str, Tensor], lengths: Tensor, test: dict, source: Sounds) -> None:
    """A few clips in every version: <number> <version>.wav, and a spectrogram of each."""
    chosen = every(SHOWN, len(lengths))
    clips, titles, names = [], [], []
    for i in chosen:
        for version, waveforms in shown.items():
            clips.append(waveforms[i, : lengths[i]].numpy())
            titles.append(f"{source.class_names[test['labels'][i]]}, {version}")
            names.append(f"{i:03}_{version.replace(' ', '_')}")
    make_folder(run.folder / "samples")
    write_sounds(clips, names, titles, run.folder / "samples", columns=len(shown))


# ---- generators


def evaluate_generator(run: Run, source: Sounds, expert: nn.Module, n: int, seed: int, settings: dict) -> dict:
    """FD-nano of n samples against the test clips; its floor is as many training clips, its ceiling as many of noise."""
    n = min(n, MOST_SAMPLES)
    numbers = held_out_bits(run, source) if hasattr(run.model, "log_likelihood") else {}
    start = time.perf_counter()
    drawn = sample(run, n, seed=seed, **settings)
    machine.synchronize()
    took = time.perf_counter() - start
    waveforms, lengths = (torch.from_numpy(drawn[name]) for name in ("waveforms", "lengths"))
    labels, speakers = (torch.from_numpy(drawn[name]) for name in ("labels", "speakers"))
    numbers |= judge_sounds(waveforms, labels, speakers, source, expert)
    numbers |= {
        "seconds": lengths.float().mean().item() / SAMPLE_RATE,
        "seconds_real": float(np.mean([len(clip) for clip in source.test_waveforms])) / SAMPLE_RATE,
        "seconds_per_sound": took / n, "samples": n,
        "seconds_per_second_of_sound": took / max(lengths.sum().item() / SAMPLE_RATE, 1e-9),
    }
    sample(run, min(n, 60), seed=seed, out=run.folder / "samples", **settings)
    return numbers | run.config["sampling"] | {name: value for name, value in settings.items() if value is not None}


def judge_sounds(waveforms: Tensor, labels: Tensor, speakers: Tensor, source: Sounds, expert: nn.Module) -> dict:
    """Waveforms (N, T) with the labels and speakers that were asked for -> all that the judge can say of them."""
    n, seconds = len(waveforms), expert.config.seconds
    train, test = (sound_tensors(source, part, seconds)["waveforms"] for part in ("train", "test"))
    features, real = apply(expert.features, waveforms), apply(expert.features, test)
    few = torch.from_numpy(np.random.default_rng(0).choice(len(train), min(n, len(train)), replace=False))
    noise = test.std() * torch.randn(n, test.shape[1], generator=torch.Generator().manual_seed(0))  # as loud as speech
    precision, recall = precision_recall(real[every(n, len(real))], features)
    return {
        "fd_nano": frechet_distance(features, real), "fd_nano_floor": frechet_distance(apply(expert.features, train[few]), real),
        "fd_nano_ceiling": frechet_distance(apply(expert.features, noise), real), "precision": precision, "recall": recall,
    } | opinion(expert, waveforms, labels, speakers)


@torch.no_grad()
def held_out_bits(run: Run, source: Sounds) -> dict:
    """Bits per sample of the test clips by the model, and by compressors that have only counted."""
    test, train = (sound_tensors(source, part, run.model.config.seconds) for part in ("test", "train"))
    test["speakers"] = hide_strangers(test["speakers"], source, run.model.config.speakers)
    nats, codes = [], {}
    for rows in zip(*(tensor.split(20) for tensor in test.values()), strict=True):
        batch = run.model.prepare(*(row.to(machine.device()) for row in rows))
        with machine.autocast():
            nats.append(-run.model.log_likelihood(*batch.values()))
    train = {name: tensor[every(500, len(tensor))] for name, tensor in train.items()}  # enough to count
    for name, part in (("train", train), ("test", test)):
        encoded = run.model.prepare(*part.values())
        codes[name] = [row[:length] for row, length in zip(encoded["codes"], encoded["lengths"].tolist(), strict=True)]
    bits = torch.cat(nats).sum().item() / math.log(2) / test["lengths"].sum().item()
    counted = CHAPTERS[run.chapter].entropy_baselines(codes["train"], codes["test"])
    return {"bits_per_sample": bits} | {f"bits_per_sample_{name}": value for name, value in counted.items()}


# ---- helpers


def hide_strangers(speakers: Tensor, source: Sounds, nobody: int) -> Tensor:
    """Speakers (N,), with the number `nobody` for those who have no clip to learn from."""
    known = torch.isin(speakers, torch.from_numpy(source.train_speakers))
    return torch.where(known, speakers, nobody).clamp(max=nobody)


def every(n: int, total: int) -> list[int]:
    """n of the numbers below total, or all, evenly spaced: clips lie sorted by digit."""
    return np.linspace(0, total - 1, min(n, total)).astype(int).tolist()


def cut(rows: Tensor, lengths: Tensor) -> list[np.ndarray]:
    """Zero-padded rows (N, T) -> clips of their own lengths."""
    return [row[:length].cpu().numpy() for row, length in zip(rows, lengths.tolist(), strict=True)]
