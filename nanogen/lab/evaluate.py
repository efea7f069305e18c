"""What a run is worth, on data that it has not seen: one function, the right numbers for each kind of chapter.

    generators   1,000 samples, evenly over the classes: FD-nano with its floor and ceiling, class accuracy by the judge,
                 precision and recall, cost;  pixel_ar also bits per dimension beside PNG and its kin
    tokenizers   reconstructions of the test pictures: PSNR, SSIM, FD-nano, class accuracy, codebook usage and perplexity
    judges       test accuracy
    on sounds    evaluate_sound.py has the numbers, this file the way in

    python -m nanogen evaluate runs/maskgit-cifar10      -> metrics.json and a table
"""

import json
import time

import numpy as np
import torch
from torch import Tensor, nn

from nanogen import UserError
from nanogen.blocks.quantize import usage
from nanogen.data.datasets import Images, Sounds
from nanogen.lab import evaluate_sound, machine
from nanogen.lab.files import write_atomically
from nanogen.lab.judges import accuracy, apply, unit
from nanogen.lab.metrics import (
    bits_per_dim,
    frechet_distance,
    kernel_distance,
    lossless_bits_per_dim,
    precision_recall,
    psnr,
    ssim,
)
from nanogen.lab.pictures import grid, to_uint8
from nanogen.lab.prepare import load_data, to_tensor
from nanogen.lab.runs import Run, check_kind, judge
from nanogen.lab.sampling import sample


def evaluate(run: Run, n: int = 1000, count: int | None = None, seed: int = 1, quiet: bool = False, **settings) -> dict:
    """The metrics of a run, also written to its metrics.json. n: samples or test pictures; settings: for the sampler.

    count: as in `load`, for runs that were trained on a part of the data.
    """
    said = [name for name, value in settings.items() if value is not None]
    if said and not hasattr(run.model, "sample"):
        raise UserError(f"{run.folder} is a {run.chapter}: it has nothing to sample, and no use for {' and '.join(said)}.")
    source = load_data(run.data, count)
    check_kind(run.chapter, run.data, type(source))
    needed = 1 if run.chapter in ("judge", "codec") else 2  # the others' FD-nano is a distance between sets
    if len(source.test_labels) < needed:
        raise UserError(f"{run.data} has {len(source.test_labels)} to test with, not {needed}: add files to its classes.")
    if run.chapter == "judge":
        numbers = (evaluate_sound.evaluate_judge if isinstance(source, Sounds) else evaluate_judge)(run, source)
    else:
        expert = judge(run.data, run.folder.parent, count, quiet)
        if run.chapter == "codec":
            numbers = evaluate_sound.evaluate_codec(run, source, expert, n)
        elif isinstance(source, Sounds):
            numbers = evaluate_sound.evaluate_generator(run, source, expert, n, seed, settings)
        elif run.chapter == "tokenizer":
            numbers = evaluate_tokenizer(run, source, expert, n)
        else:
            numbers = evaluate_generator(run, source, expert, n, seed, settings)
    numbers = rounded(numbers)
    numbers |= {"parameters": run.config["parameters"], "minutes": run.config["minutes"], "machine": machine.describe()}
    write_atomically(run.folder / "metrics.json", lambda path: path.write_text(json.dumps(numbers, indent=1)))
    return numbers


def rounded(numbers: dict) -> dict:
    """Five digits behind the point are enough, also in dicts within. What could not be measured (NaN) is left out."""
    short = {float: lambda value: round(value, 5), dict: rounded}
    return {name: short.get(type(value), lambda value: value)(value) for name, value in numbers.items() if value == value}


def evaluate_judge(run: Run, source: Images) -> dict:
    logits = apply(run.model, to_tensor(source.test_images, run.model.config.size))
    return {"test_accuracy": accuracy(logits, source.test_labels)}


def evaluate_tokenizer(run: Run, source: Images, expert: nn.Module, n: int) -> dict:
    """PSNR and SSIM over n test pictures; usage and perplexity over all of them, since few tokens cannot use many codes."""
    test = to_tensor(source.test_images, run.model.config.size)
    decoded = apply(run.model.reconstruct, test[:n])
    features, real = apply(expert.features, decoded), apply(expert.features, test[:n])
    numbers = {
        "psnr": psnr(decoded, unit(test[:n])), "ssim": ssim(decoded, unit(test[:n])),
        "fd_nano": frechet_distance(features, real), "class_accuracy": accuracy(apply(expert, decoded), source.test_labels[:n]),
        "class_accuracy_originals": accuracy(apply(expert, test[:n]), source.test_labels[:n]), "pictures": len(decoded),
    }
    if run.model.vocabulary:
        indices, quantizer = apply(run.model.encode, test), run.model.quantizer
        share, perplexity = usage(indices, run.model.vocabulary)
        numbers |= {"codebook_usage": share, "perplexity": perplexity, "vocabulary": run.model.vocabulary}
        for side, part in zip(quantizer.scales, quantizer.split(indices), strict=True) if hasattr(quantizer, "scales") else ():
            numbers[f"usage_{side}x{side}"] = usage(part, run.model.vocabulary)[0]
    sides, columns = (test[:n].permute(0, 2, 3, 1).numpy(), to_uint8(decoded)), min(10, len(decoded))
    whole_rows = range(0, len(decoded) - columns + 1, columns)
    pairs = np.concatenate([side[i : i + columns] for i in whole_rows[:2] for side in sides])
    (run.folder / "samples").mkdir(exist_ok=True)
    grid(pairs, columns).save(run.folder / "samples" / "grid.png")  # a row of originals, a row of reconstructions, twice
    return numbers


def evaluate_generator(run: Run, source: Images, expert: nn.Module, n: int, seed: int, settings: dict) -> dict:
    """FD-nano of n samples against the test pictures; its floor is n training pictures, its ceiling n pictures of noise."""
    size = run.model.config.size
    numbers = {}
    if hasattr(run.model, "log_likelihood"):
        numbers |= held_out_bits(run, source, n)
        n = min(n, 200)  # one pass per pixel is slow: that is the chapter's point
    start = time.perf_counter()
    drawn = sample(run, n, seed=seed, **settings)
    machine.synchronize()
    seconds = (time.perf_counter() - start) / n
    images = torch.from_numpy(drawn["images"]).permute(0, 3, 1, 2)
    if size != expert.config.size:  # the judge has learned on pictures of the full size
        images = to_tensor(drawn["images"], expert.config.size)
    numbers |= judge_samples(images, drawn["labels"], source, expert) | {"seconds_per_picture": seconds, "samples": n}
    sample(run, min(n, 100), seed=seed, out=run.folder / "samples", **settings)
    return numbers | run.config["sampling"] | {name: value for name, value in settings.items() if value is not None}


def judge_samples(images: Tensor, labels: np.ndarray, source: Images, expert: nn.Module) -> dict:
    """uint8 pictures (N, 3, H, W) with the labels that were asked for -> all that the judge can say of them."""
    n = len(images)
    features, logits = apply(expert.features, images), apply(expert, images)
    real = apply(expert.features, to_tensor(source.test_images, expert.config.size))
    random = np.random.default_rng(0)
    few = random.choice(len(source.train_images), min(n, len(source.train_images)), replace=False)
    train = to_tensor(source.train_images[few], expert.config.size)
    noise = torch.from_numpy(random.integers(0, 256, images.shape, dtype=np.uint8))
    precision, recall = precision_recall(real[:n], features)
    return {
        "fd_nano": frechet_distance(features, real), "fd_nano_floor": frechet_distance(apply(expert.features, train), real),
        "fd_nano_ceiling": frechet_distance(apply(expert.features, noise), real), "class_accuracy": accuracy(logits, labels),
        "kernel_distance": kernel_distance(features, real), "precision": precision, "recall": recall,
    }


@torch.no_grad()
def held_out_bits(run: Run, source: Images, n: int) -> dict:
    """Bits per dimension of n test pictures by the model, and by compressors that learn nothing."""
    test = to_tensor(source.test_images[:n], run.model.config.size)
    labels = torch.from_numpy(source.test_labels[:n])
    nats = []
    for images, label in zip(test.split(50), labels.split(50), strict=True):
        batch = run.model.prepare(unit(images).to(machine.device()), label.to(machine.device()))
        with machine.autocast():
            nats.append(-run.model.log_likelihood(batch["pixels"], batch["labels"]))
    bits = bits_per_dim(torch.cat(nats).mean().item(), test[0].numel())
    trivial = lossless_bits_per_dim(test.permute(0, 2, 3, 1).numpy())
    return {"bits_per_dim": bits} | {f"bits_per_dim_{name}": value for name, value in trivial.items()}


def table(rows: list[dict]) -> str:
    """Dicts with the same kind of keys -> aligned text, one line each."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[show(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

