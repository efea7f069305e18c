"""The comparison: every way to make a picture, on the same data, for the same minutes, before the same judge.

    python -m nanogen compare --data cifar10 --minutes 5      -> runs/compare-cifar10/index.html, table.md

Each method trains for the same time, all else by its recipe. Tokenizers get as many minutes again, are trained once and shared.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from nanogen import UserError
from nanogen.data.datasets import Images, resolved
from nanogen.lab import machine, report, runs
from nanogen.lab.evaluate import judge_samples, rounded, table
from nanogen.lab.files import write_atomically
from nanogen.lab.pictures import grid, png
from nanogen.lab.runs import Run, read_config, run_name
from nanogen.lab.sampling import sample
from nanogen.lab.train import Training, draw_batch

METHODS = {  # name -> chapter, fields of its Config
    "pixel_ar": ("pixel_ar", {}), "token_ar": ("token_ar", {}), "maskgit": ("maskgit", {}), "var": ("var", {}),
    "mar, MSE": ("mar", {"head": "mse"}), "mar, diffusion": ("mar", {"head": "diffusion"}), "mar, flow": ("mar", {}),
    "flow": ("flow", {}), "meanflow": ("meanflow", {}),
}
NOTE = """A few minutes each, as laptops have them: after a month, orders have turned round. Tokenizer minutes contain those of
the eye behind the perceptual loss; training TFLOPs (1e12 operations), estimated from the products in one step, those of the
tokenizer. Evaluations: of the network for a picture, two a step under guidance; of mar's head, for a token. pixel_ar draws
fewer pixels."""


def compare(data: str, minutes: float, out: Path, n: int = 500, seeds: int = 1, count: int | None = None) -> list[dict]:
    """Train, sample and judge every method; print the table, write it and a page to `out`, and return its rows.

    n: samples for each of `seeds` sampling seeds; count: use only so many pictures. What is trained is not trained again,
    what was interrupted goes on. UserError if `out` holds runs of other minutes.
    """
    if n < 10 or seeds < 1:
        raise UserError(f"A comparison needs at least 10 samples and 1 seed, got {n} and {seeds}.")
    data = resolved(data)
    source, beneath, rows, strips, folders = runs.load_data(data, count), {}, [], [], []
    for chapter, fields in METHODS.values():
        module = runs.CHAPTERS[chapter]
        if hasattr(module, "stands_on") and (needs := module.stands_on(module.Config(**fields))):
            beneath[run_name(needs[0], data, needs[1])] = needs
    print(f"{len(METHODS)} methods and {len(beneath)} tokenizers, {minutes:g} minutes each, on {machine.describe()} -> {out}")
    for name, (chapter, fields) in beneath.items():
        trained(chapter, data, fields, minutes, out / name, count)
    known = (out.parent / run_name("judge", data, {}) / "model.safetensors").exists()  # a judge that is there is taken
    expert = runs.judge(data, out.parent if known else out, count)
    for name, (chapter, fields) in METHODS.items():
        print(f"\n{name}")
        run = trained(chapter, data, fields, minutes, out / run_name(chapter, data, fields), count)
        numbers, drawn = judged(run, source, expert, n, seeds)
        rows.append({"method": name} | costs(run, source) | numbers)
        strips.append(drawn[np.unique(np.arange(n) * len(source.class_names) // n, return_index=True)[1]])  # one of each class
        folders.append(run.folder)
    print("\n" + table(rows))
    write_page(rows, strips, folders, out, f"{len(METHODS)} methods on {Path(data).name}, {minutes:g} minutes each")
    return rows


def trained(chapter: str, data: str, fields: dict, minutes: float, folder: Path, count: int | None) -> Run:
    """The run in this folder: trained now, gone on with, or loaded."""
    known = (folder / "config.json").exists()
    if known and (there := read_config(folder)["training"]["minutes"]) != minutes:
        raise UserError(f"{folder} is a training of {there:g} minutes, not {minutes:g}: choose another --out.")
    return runs.train_run(chapter, data, {} if known else fields | {"minutes": minutes}, folder, resume=True, count=count)


def costs(run: Run, source: Images) -> dict:
    """What training took, and how many passes of the network, and of mar's head, the sampler really makes."""
    base = runs.load_run(run.folder / run.config["base"]["path"]) if "base" in run.config else None
    row = {name: run.config[name] for name in ("parameters", "minutes")}
    flops, passes, model = training_flops(run, source, base), Counter(), run.model
    if base:
        row["tokenizer minutes"] = base.config["minutes"]
        if base.config["config"]["perceptual"]:
            eye = runs.load_run(run.folder.parent / run_name("eye", run.data, {}))
            base.model.eye.append(eye.model.requires_grad_(False))
            row["tokenizer minutes"] += eye.config["minutes"]
        flops += training_flops(base, source)
    parts = {"evaluations": (model.network if hasattr(model, "network") else model.transformer, 1)}  # module, rows a pass
    parts |= {"of the head": (next(model.head.children()), model.grid**2)} if run.chapter == "mar" else {}
    hooks = [part.register_forward_pre_hook(lambda _, inputs, name=name: passes.update({name: len(inputs[0])}))
             for name, (part, _) in parts.items()]
    sample(run, 2)
    for hook in hooks:
        hook.remove()
    return row | {"training TFLOPs": flops / 1e12} | {name: passes[name] / 2 / rows for name, (_, rows) in parts.items()}


def training_flops(run: Run, source: Images, base: Run | None = None) -> float:
    """Those of a step on 8 pictures, there and back, scaled to all the pictures that the run has seen."""
    training = run.config["training"]
    few = replace(source, train_images=source.train_images[:8], train_labels=source.train_labels[:8])
    tensors = runs.prepare(run.model, few, run.model.config, flip=False, base=base)
    batch = draw_batch(tensors, 0, Training(batch_size=8, flip=False))
    with FlopCounterMode(display=False) as counter, machine.autocast():
        run.model.loss(batch)[0].backward()
    steps = json.loads((run.folder / "log.jsonl").read_text().splitlines()[-1])["step"]
    return counter.get_total_flops() / len(batch["labels"]) * steps * min(training["batch_size"], len(source.train_labels))


def judged(run: Run, source: Images, expert, n: int, seeds: int) -> tuple[dict, np.ndarray]:
    """(means over the seeds, and the standard deviation of FD-nano; the first seed's pictures, of the judge's size)."""
    sample(run, min(n, 100), seed=1000, out=run.folder / "samples")
    start, size = perf_counter(), expert.config.size
    drawn = [sample(run, n, seed=1000 * seed) for seed in range(1, seeds + 1)]  # `sample` counts on from there, batch by batch
    seconds = (perf_counter() - start) / (n * seeds)
    marks = [judge_samples(runs.to_tensor(part["images"], size), part["labels"], source, expert) for part in drawn]
    means = {name: float(np.mean([mark[name] for mark in marks])) for name in marks[0]}
    text = json.dumps(rounded(means | {"seconds_per_picture": seconds, "samples": n, "seeds": seeds}), indent=1)
    write_atomically(run.folder / "metrics.json", lambda path: path.write_text(text))
    spread = {"+-": float(np.std([mark["fd_nano"] for mark in marks], ddof=1))} if seeds > 1 else {}
    row = {"s/picture": seconds, "FD-nano": means["fd_nano"]} | spread | {"floor": means["fd_nano_floor"]}
    row |= {name.replace("_", " "): means[name] for name in ("class_accuracy", "precision", "recall")}
    return row, runs.to_tensor(drawn[0]["images"], size).permute(0, 2, 3, 1).numpy()


def write_page(rows: list[dict], strips: list[np.ndarray], folders: list[Path], out: Path, title: str) -> None:
    """table.md, and index.html with the table, one picture of each label from each method, and a card for each run."""
    text = f"{title}, on {machine.describe()}.\n\n```\n{table(rows)}\n```\n\n{NOTE}\n"
    write_atomically(out / "table.md", lambda path: path.write_text(text))
    strips = [report.data_uri("image/png", png(grid(strip, len(strip)))) for strip in strips]
    shown = [{"method": row["method"], "one of each class": report.Html(f'<img alt="" src="{strip}">')}
             for row, strip in zip(rows, strips, strict=True)]
    print(report.write(folders, out / "index.html", title, NOTE, {"Like for like": rows, "The same labels": shown}))
