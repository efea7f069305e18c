"""The metrics of a run, on data that it has not seen: one function for all kinds of models.

    generators   samples, evenly over the conditions: FD-nano with floor and ceiling, precision and
                 recall, accuracy by the judge, cost; an exact likelihood beside compressors
    tokenizers   reconstructions of test images: PSNR, SSIM, FD-nano, use of the codebook; of test
                 sounds at each bit rate: SI-SDR, mel distance, STOI, beside those of mu-law
    judges       accuracy on the test data
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogen import UserError, files
from nanogen.audio.wave_ar import entropy_baselines, mu_law_encode
from nanogen.blocks.quantize import usage
from nanogen.data.datasets import Dataset
from nanogen.judge import Judge
from nanogen.lab import machine, metrics, prompt_metrics, runs, sound_metrics, speech_metrics
from nanogen.lab.omni_metrics import evaluate_numbers
from nanogen.lab.plots import grid, to_uint8
from nanogen.lab.prepare import columns, every, pad, test_columns, to_tensor
from nanogen.lab.runs import Run
from nanogen.lab.sample import cut, sample, timed_sample, write_samples, write_sounds
from nanogen.listener import Listener


def evaluate(run: Run, n: int | None = None, dataset: Dataset | None = None, seed: int = 1,
             quiet: bool = False, **settings) -> dict:
    """All metrics of a run, also written to its metrics.json. UserError where nothing can be said.
    n: number of samples, or of test examples for a tokenizer; `samples_to_judge` unless told.
    dataset: that of the run, if loaded already. settings: of the sampler."""
    model, dataset = run.model, dataset or run.dataset()
    n = model.samples_to_judge if n is None else n
    if n < 1:
        raise UserError(f"The number of samples must be at least 1, got {n}.")
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings and model.kind != "generator":
        raise UserError(f"{run.folder} is a {run.method}: it has nothing to sample, and no use for "
                        f"{' and '.join(settings)}.")
    total = len(dataset.test[dataset.main])
    if total < 2 and "prompts" not in model.conditions:
        raise UserError(f"{dataset.name} has {total} test examples, not 2: add files.")
    if dataset.origin == "all":
        raise UserError("The data set all has no judge: evaluate with --data fsdd, recordings or "
                        "songs.")
    beside = Path(os.path.normpath(run.folder / ".."))

    def trained(method: str, data: str) -> Run:
        return runs.expert(method, data, beside, dataset.count, quiet)

    if model.kind == "judge":
        expert, result = run, evaluate_judge(run, dataset)
    elif "clips" in dataset.test:
        expert, listener = trained("reader", "things"), trained("listener", "recordings")
        result = evaluate_numbers(run, dataset, expert.model, listener.model, n, seed, settings)
        result["listener"] = files.content_hash(listener.folder / "model.safetensors")
    elif "prompts" in model.conditions and (dataset.kind == "images" or "velocity" in dataset.test):
        expert = trained("reader", "things")
        result = prompt_metrics.evaluate_prompts(run, dataset, expert.model, n, seed, settings)
    elif "words" in dataset.test and model.kind == "generator":
        expert = trained("listener", dataset.name)
        measure = (speech_metrics.evaluate_songs if "scores" in dataset.test
                   else speech_metrics.evaluate_speech)
        result = measure(run, dataset, expert.model, n, seed, settings)
    elif model.kind == "generator":
        judged = dataset.kind != "videos" and model.output == dataset.main
        expert = runs.judge(dataset, beside, quiet) if judged else None
        result = evaluate_generator(run, dataset, expert and expert.model, n, seed, settings)
    else:
        expert = (trained("listener", dataset.name) if "words" in dataset.test
                  else runs.judge(dataset, beside, quiet))
        measure = evaluate_codec if dataset.kind == "sounds" else evaluate_tokenizer
        result = measure(run, dataset, expert.model, n)
    if model.kind == "generator":
        result |= run.record["sampling"] | settings
    result = rounded(result) | {name: run.record[name] for name in ("parameters", "minutes")}
    result |= {"training_steps": run.record["steps"], "gflops": run.record.get("gflops"),
               "machine": machine.describe(), "seed": seed}
    if dataset.name != run.record["data"]["name"]:
        result["measured_on"] = dataset.name
    if expert:
        result["judge"] = files.content_hash(expert.folder / "model.safetensors")
    files.write_json(run.folder / "metrics.json", result)
    return result


def evaluate_judge(run: Run, dataset: Dataset) -> dict:
    """Judge, reader or listener on all test examples."""
    if run.method == "reader":
        right = prompt_metrics.obeyed(dataset.test["images"], dataset.test, run.model)
        return {f"{name}_accuracy": values.mean().item() for name, values in right.items()}
    if run.method == "listener":
        return speech_metrics.evaluate_listener(run.model, dataset)
    test = test_columns(run.model, dataset)
    result = accuracies(run.model, test[dataset.main], test)
    return {"test_accuracy": result.pop("class_accuracy")} | result


def rounded(result: dict) -> dict:
    """Five decimals, also in the dicts within; without what could not be measured (NaN)."""
    return {name: rounded(value) if isinstance(value, dict) else
            round(value, 5) if isinstance(value, float) else value
            for name, value in result.items() if value == value}


def accuracies(expert: Judge, examples: Tensor, wanted: dict, suffix: str = "") -> dict:
    """How often the judge finds the labels (N,) and second labels (N,) that are in `wanted`.
    Second labels are left out where some are of speakers that the judge does not know."""
    if isinstance(expert, Listener):
        clips = cut({"waveforms": examples.numpy(), "lengths": wanted["lengths"]})
        return {f"words_right{suffix}": speech_metrics.words_right(expert, clips, wanted["words"])}
    result, second = {}, expert.config.second
    if "labels" in wanted:
        logits = apply(expert, examples)
        result[f"class_accuracy{suffix}"] = metrics.accuracy(logits, wanted["labels"])
    if second in wanted and wanted[second].max() < expert.config.second_classes:
        name, logits = second.removesuffix("s"), apply(expert.second_logits, examples)
        result[f"{name}_accuracy{suffix}"] = metrics.accuracy(logits, wanted[second])
    return result


def evaluate_generator(run: Run, dataset: Dataset, expert: Judge | None, n: int, seed: int,
                       settings: dict) -> dict:
    """The cost of n samples, and with a judge their quality; they are written to RUN/samples."""
    model = run.model
    result = held_out_bits(run, dataset, n) if model.exact_likelihood else {}
    drawn, cost = timed_sample(run, n, seed=seed, **settings)
    result |= judge_samples(drawn, dataset, expert) if expert else {}
    result |= cost
    if model.output == "waveforms":
        for name, sounds in (("", cut(drawn)), ("_real", dataset.test["waveforms"])):
            voiced = [sound_metrics.periodicity(clip) > 0.3 for clip in sounds]
            result |= {f"seconds{name}": np.mean([*map(len, sounds)]).item() / dataset.sample_rate,
                       f"voiced_fraction{name}": np.mean(voiced).item()}
        result["seconds_per_second_of_sound"] = (
            cost["seconds_per_sound"] / max(result["seconds"], 1e-9))
    if model.output == "images":
        sample(run, min(n, 30), seed=seed, out=run.folder / "samples", **settings)  # process.gif
    write_samples(drawn, run, run.folder / "samples")
    return result


def judge_samples(drawn: dict[str, np.ndarray], dataset: Dataset, expert: Judge) -> dict:
    """FD-nano of samples against the test data, its floor (as many training examples) and ceiling
    (as much noise); precision, recall, accuracies. drawn: what `sample` returns."""
    train, test = (columns(expert, dataset, part)[dataset.main] for part in ("train", "test"))
    n, random = len(drawn[dataset.main]), np.random.default_rng(0)
    few = random.choice(len(train), min(n, len(train)), replace=False)
    if dataset.kind == "images":
        samples = to_tensor(drawn["images"], expert.config.size)
        noise = torch.from_numpy(random.integers(0, 256, samples.shape, dtype=np.uint8))
    else:
        samples, generator = torch.from_numpy(drawn["waveforms"]), torch.Generator().manual_seed(0)
        noise = test.std() * torch.randn(n, test.shape[1], generator=generator)  # as loud as speech
    features, floor, ceiling, real = (
        apply(expert.features, examples) for examples in (samples, train[few], noise, test))
    precision, recall = metrics.precision_recall(real[first(n, dataset)], features)
    return {"fd_nano": metrics.frechet_distance(features, real),
            "fd_nano_floor": metrics.frechet_distance(floor, real),
            "fd_nano_ceiling": metrics.frechet_distance(ceiling, real),
            "precision": precision, "recall": recall} | accuracies(expert, samples, drawn)


@torch.no_grad()
def held_out_bits(run: Run, dataset: Dataset, n: int) -> dict:
    """Bits per value of n test examples by the model, and by compressors without a network."""
    model, chosen, nats = run.model, first(n, dataset), 0.0
    test = {name: tensor[chosen] for name, tensor in test_columns(run.model, dataset).items()}
    for i in range(0, len(chosen), 50):
        batch = {name: unit(rows[i : i + 50]).to(machine.device()) for name, rows in test.items()}
        with machine.autocast():
            nats -= model.log_likelihood(model.prepare(batch)).sum().item()
    if dataset.kind == "images":
        name, count = "bits_per_dim", test["images"].numel()
        baselines = metrics.lossless_bits_per_dim(test["images"].permute(0, 2, 3, 1).numpy())
    else:
        name, count = "bits_per_sample", test["lengths"].sum().item()
        few = every(500, len(dataset))  # enough to count
        train = {column: rows[few] for column, rows in columns(model, dataset).items()}
        baselines = entropy_baselines(*(
            cut(part | {"waveforms": mu_law_encode(part["waveforms"])}) for part in (train, test)))
    return {name: metrics.bits_per_dim(nats, count)} | {
        f"{name}_{baseline}": value for baseline, value in baselines.items()}


def evaluate_tokenizer(run: Run, dataset: Dataset, expert: Judge, n: int) -> dict:
    """Reconstructions of n test images. The use of the codebook is that of all test images."""
    model, test = run.model, columns(run.model, dataset, "test")["images"]
    wanted = {name: dataset.test[name][:n] for name in expert.columns}
    tokens = apply(model.encode, test if model.codebook_size else test[:n])
    originals, decoded = test[:n], apply(model.decode, tokens[:n])
    small = [F.interpolate(unit(images), expert.config.size, mode="area")  # as the judge sees them
             for images in (originals, decoded)]
    real, features = (apply(expert.features, images) for images in small)
    result = {"psnr": metrics.psnr(decoded, unit(originals)), "images": len(decoded),
              "ssim": metrics.ssim(decoded, unit(originals)),
              "fd_nano": metrics.frechet_distance(features, real)}
    result |= accuracies(expert, small[0], wanted, "_originals")
    if size := model.codebook_size:
        fraction, perplexity = usage(tokens, size)
        result |= {"codebook_usage": fraction, "perplexity": perplexity, "codebook_size": size}
    sides, width = (originals.permute(0, 2, 3, 1).numpy(), to_uint8(decoded)), min(10, len(decoded))
    rows = [side[i : i + width] for i in (0, width)[: len(decoded) // width] for side in sides]
    grid(np.concatenate(rows), width).save(files.make_folder(run.folder / "samples") / "grid.png")
    return result | accuracies(expert, small[1], wanted)


def evaluate_codec(run: Run, dataset: Dataset, expert: Judge, n: int) -> dict:
    """Reconstructions of n test sounds at each bit rate. The highest gives the main metrics."""
    model, chosen = run.model, first(n, dataset)
    waveforms, lengths = pad([dataset.test["waveforms"][i] for i in chosen])
    wanted = {name: dataset.test[name][chosen] for name in expert.columns} | {"lengths": lengths}
    tokens = apply(model.encode, waveforms, 50)  # (N, frames, codebooks)
    result = {"clips": len(waveforms), "kbps": model.kbps()}
    result |= accuracies(expert, waveforms, wanted, "_originals")
    shown, half = {"original": waveforms}, model.codebooks // 2
    for used in range(1, model.codebooks + 1):
        kbps = model.kbps(used)
        decoded = apply(model.decode, tokens[..., :used], 50)[:, : waveforms.shape[1]]
        copies, (rate, bits) = sound_metrics.mu_law(waveforms.numpy(), kbps)
        baseline = torch.from_numpy(copies)
        best = judge_copies(waveforms, decoded, lengths, wanted, expert)
        mu_law = judge_copies(waveforms, baseline, lengths, wanted, expert)
        mu_law |= {"samples_per_second": rate, "bits_per_sample": bits}
        result[f"at {kbps:g} kbit/s"] = best | {"mu_law": mu_law}
        if used in (1, half, model.codebooks):
            shown |= {f"codec {kbps:g} kbps": decoded, f"mu-law {kbps:g} kbps": baseline}
    frames = torch.arange(tokens.shape[1]) < (-(-lengths // model.hop))[:, None]  # without padding
    for k in range(model.codebooks):
        fraction, perplexity = usage(tokens[..., k][frames], model.codebook_size)
        result[f"codebook {k + 1}"] = {"usage": fraction, "perplexity": perplexity}
    sounds = {f"{i:03}_{version.replace(' ', '_')}": rows[i, : lengths[i]].numpy()
              for i in every(6, len(lengths)) for version, rows in shown.items()}
    names, folder = list(sounds), files.make_folder(run.folder / "samples")
    write_sounds(list(sounds.values()), names, names, folder, columns=len(shown))
    # Speed on one recording of up to ten seconds, in float32 as the command `encode` computes.
    clip = torch.cat(cut({"waveforms": waveforms, "lengths": lengths}))
    clip = clip[None, : 10 * dataset.sample_rate].to(machine.device())
    seconds, tokens = clip.shape[1] / dataset.sample_rate, model.encode(clip)
    factor, name = sound_metrics.real_time_factor, "real_time_factor_one_thread"
    return result | best | {f"encode_{name}": factor(lambda: model.encode(clip), seconds),
                            f"decode_{name}": factor(lambda: model.decode(tokens), seconds)}


def judge_copies(originals: Tensor, copies: Tensor, lengths: Tensor, wanted: dict,
                 expert: Judge) -> dict:
    """Metrics of copies (N, T) of sounds; STOI of all of them joined, as one is too short."""
    copies = copies * (torch.arange(copies.shape[1]) < lengths[:, None])  # silence in the padding
    clips = [cut({"waveforms": rows.numpy(), "lengths": lengths}) for rows in (originals, copies)]
    joined = [np.concatenate(part) for part in clips]
    result = {"si_sdr": np.mean(list(map(sound_metrics.si_sdr, *clips))).item(),
              "mel_distance": sound_metrics.mel_distance(*joined)}
    if len(joined[0]) > sound_metrics.SAMPLE_RATE:
        result["stoi"] = sound_metrics.stoi(*joined)
    return result | accuracies(expert, copies, wanted)


@torch.no_grad()
def apply(function, examples: Tensor, batch_size: int = 500) -> Tensor:
    """function(examples) in batches, on the CPU. examples: (N, ...), images also uint8 (`unit`)."""
    with machine.autocast():
        return torch.cat([function(unit(part).to(machine.device())).cpu()
                          for part in examples.split(batch_size)])


def unit(examples: Tensor) -> Tensor:
    """Images as uint8 -> float in [-1, 1]; anything else stays as it is."""
    return examples.float() / 127.5 - 1 if examples.dtype == torch.uint8 else examples


def first(n: int, dataset: Dataset) -> list[int]:
    """n of the test examples, or all: the first images; sounds, which are sorted, evenly spaced."""
    total = len(dataset.test[dataset.main])
    return every(n, total) if dataset.kind == "sounds" else list(range(min(n, total)))


def table(rows: list[dict]) -> str:
    """Dicts with the same kind of keys -> a table in Markdown, its columns aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[show(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells)


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
