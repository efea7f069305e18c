"""Runs: a chapter, a data set and a budget become a folder, and a folder becomes a trained model again.

    run = train_run("maskgit", "cifar10", {"minutes": 10})     # trains the tokenizer underneath first, if it is missing
    run = load_run("runs/maskgit-cifar10")                     # later, anywhere
    run.model.sample(labels, guidance=3.0)

    runs/<chapter>-<data>/   config.json  model.safetensors (averaged weights)  state.pt (to resume)
                             log.jsonl  metrics.json  samples/

What works for which data set stands beside each chapter, as <chapter>.json: its *recipes*, with the numbers that they
gave on a named machine.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanogen import UserError
from nanogen.data import datasets
from nanogen.image import flow, mar, maskgit, meanflow, pixel_ar, token_ar, tokenizer, var
from nanogen.lab import judges, machine
from nanogen.lab.train import Training, check_options, draw_batch, join_processes, train

CHAPTERS = {"pixel_ar": pixel_ar, "tokenizer": tokenizer, "token_ar": token_ar, "maskgit": maskgit, "var": var, "mar": mar,
            "flow": flow, "meanflow": meanflow, "judge": judges}


@dataclass
class Run:
    """A trained model and how it came to be."""

    folder: Path
    chapter: str
    data: str
    model: nn.Module
    config: dict  # everything in config.json

    @property
    def class_names(self) -> list[str]:
        return self.config["class_names"]

    def read_json(self, name: str) -> dict:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}


def recipes(chapter: str) -> dict:
    """data set -> recipe name -> {"training", "config", "sampling", "expected"}, from the JSON beside the chapter."""
    path = Path(CHAPTERS[chapter].__file__).with_suffix(".json")
    return json.loads(path.read_text())


def find_recipe(chapter: str, data: str, name: str = "first look") -> dict:
    """The recipe for a data set; a folder of one's own is treated like cifar10."""
    if chapter not in CHAPTERS:
        raise UserError(f"There is no chapter {chapter!r}: choose from {', '.join(CHAPTERS)}.")
    known = recipes(chapter)
    found = known.get(data, known["cifar10"])
    if name not in found:
        raise UserError(f"{chapter} has no recipe {name!r} for {data}: choose from {', '.join(found)}.")
    return found[name]


def train_run(chapter: str, data: str = "cifar10", overrides: dict | None = None, folder: str | Path | None = None,
              recipe: str = "first look", resume: bool = False, count: int | None = None, quiet: bool = False) -> Run:
    """Train a chapter on a data set and leave a run folder, runs/<chapter>-<data> unless told.

    overrides: fields of the chapter's Config or of Training. resume: go on where an interrupted run stopped; a finished
    one is simply loaded. count: use only so many pictures. Raises UserError for what the caller can mend.
    """
    settings = find_recipe(chapter, data, recipe)
    folder = Path(folder or Path("runs") / run_name(chapter, data, overrides or {}))
    overrides = dict(overrides or {})
    rank, world = join_processes()
    exists = (folder / "config.json").exists()
    if world > 1:
        dist.barrier()  # all have looked before the first one writes
    if exists:
        if not resume:
            raise UserError(f"{folder} exists already: --resume goes on with it, --out DIR starts another, or delete it.")
        settings = read_config(folder)
        if (settings["chapter"], settings["data"]) != (chapter, str(data)):
            there = f"{settings['chapter']} on {settings['data']}"
            raise UserError(f"{folder} is a {there}, not a {chapter} on {data}: choose another --out.")
        overrides = {k: v for k, v in overrides.items() if k in ("minutes", "steps")}
        if (folder / "model.safetensors").exists() and not overrides:
            return load_run(folder)
    source = load_data(data, count)
    config, training = make_config(chapter, settings, overrides, source)
    base = base_run(chapter, config, data, folder, count, quiet)
    torch.manual_seed(training.seed)
    model = build(chapter, config, base)
    if chapter == "tokenizer" and config.perceptual:
        model.eye.append(eye(data, folder, count, quiet))
    tensors = prepared(model, source, config, training.flip, base)
    if not exists:
        try_out(model, tensors, chapter, training)
    record = {
        "chapter": chapter, "data": data, "machine": machine.describe(), "config": dataclasses.asdict(config),
        "training": dataclasses.asdict(training), "sampling": settings.get("sampling", {}), "class_names": source.class_names,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if base:
        record["base"] = {"path": os.path.relpath(base.folder, folder), "hash": content_hash(base.folder)}
    if rank == 0:
        make_folder(folder)
        write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(record, indent=1)))
    budget = f"{training.steps} steps" if training.steps else f"{training.minutes:g} min"
    size = f"{record['parameters'] / 1e6:.1f} M parameters, {len(source.train_images):,} pictures"
    say(quiet or rank > 0, f"{chapter} on {data}: {size}, {budget}, {record['machine']} -> {folder}")
    log = train(model, tensors, training, folder, resume, quiet)
    record["minutes"] = log[-1]["minutes"]
    if rank == 0:
        write_atomically(folder / "model.safetensors", lambda path: save_file(contiguous(model.state_dict()), path))
        write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(record, indent=1)))
    if world > 1:
        dist.barrier()
    return Run(folder, chapter, data, model, record)


def run_name(chapter: str, data: str, overrides: dict) -> str:
    """maskgit-cifar10, tokenizer-kl-cifar10: what is chosen by a word, and not as usual, is part of the name."""
    usual = dataclasses.asdict(CHAPTERS[chapter].Config()) if overrides else {}
    variant = [value for name, value in overrides.items() if name in usual and isinstance(value, str) and value != usual[name]]
    return "-".join([chapter, *variant, Path(data).name])


def base_run(chapter: str, config, data: str, folder: Path, count: int | None, quiet: bool) -> Run | None:
    """The run that this chapter stands on (a tokenizer, for reflow a flow), beside it: loaded, or trained now and said so."""
    stands_on = getattr(CHAPTERS[chapter], "stands_on", None)
    needs = stands_on(config) if stands_on else None
    if needs is None:
        return None
    if (folder / "config.json").exists() and "base" in (saved := read_config(folder)):
        return fitting(load_run(folder / saved["base"]["path"], saved["base"]["hash"]), needs[1], config)
    place = folder.parent / run_name(needs[0], data, needs[1])
    if not (place / "model.safetensors").exists():
        say(quiet, f"{chapter} stands on a {needs[0]}; {place} is not there or not finished, so it is trained first.")
    return fitting(train_run(needs[0], data, needs[1], place, resume=True, count=count, quiet=quiet), needs[1], config)


def fitting(base: Run, needs: dict, config) -> Run:
    """The run underneath, if it is of the kind and for the picture size that the chapter needs."""
    for name, wanted in (needs | {"size": config.size}).items():
        if base.config["config"][name] != wanted:
            found = base.config["config"][name]
            raise UserError(f"{base.folder} has {name} {found!r}, but {wanted!r} is needed: train another {base.chapter}.")
    return base


def eye(data: str, folder: Path, count: int | None, quiet: bool) -> nn.Module:
    """The small classifier behind the perceptual loss, frozen: another seed and a shorter budget than the judge."""
    place = folder.parent / run_name("eye", data, {})
    if not (place / "model.safetensors").exists():
        say(quiet, f"The perceptual loss needs an eye; {place} is not there, so it is trained first.")
    model = train_run("judge", data, {}, place, "eye", resume=True, count=count, quiet=quiet).model
    return model.requires_grad_(False)


def judge(data: str, folder: Path = Path("runs"), count: int | None = None, quiet: bool = False) -> nn.Module:
    """The judge of a data set, kept in `folder`: loaded, or trained now and said so."""
    place = Path(folder) / run_name("judge", data, {})
    if not (place / "model.safetensors").exists():
        say(quiet, f"Evaluation needs a judge; {place} is not there, so it is trained first.")
    return train_run("judge", data, {}, place, resume=True, count=count, quiet=quiet).model


def load_data(data: str, count: int | None = None) -> datasets.Images:
    """datasets.load, remembering the last two: a command asks for the same pictures several times."""
    return remembered(str(data), datasets.data_folder(), count)


@functools.lru_cache(maxsize=2)
def remembered(data: str, folder: Path, count: int | None) -> datasets.Images:
    source = datasets.load(data, count=count)  # `folder` only tells what is remembered apart
    if not isinstance(source, datasets.Images):
        raise UserError(f"{data} holds sounds; the image chapters need pictures.")
    return source


def make_config(chapter: str, settings: dict, overrides: dict, source: datasets.Images) -> tuple[object, Training]:
    """(the chapter's Config, Training) from a recipe, what the user says and what the data says."""
    config_class = CHAPTERS[chapter].Config
    fields = {field.name for field in dataclasses.fields(config_class)}
    facts = {"size": source.train_images.shape[1], "classes": len(source.class_names)}
    if "second" in fields and "train_background" in source.truth:
        facts["second"] = int(source.truth["train_background"].max()) + 1
    values = {k: v for k, v in facts.items() if k in fields} | settings["config"]
    training = dict(settings["training"])
    known = fields | {field.name for field in dataclasses.fields(Training)}
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"{chapter} has no setting {name!r}: choose from {', '.join(sorted(known))}.")
        (values if name in fields else training)[name] = value
    if overrides.get("minutes"):
        training["steps"] = 0
    return typed(config_class, values, chapter), typed(Training, training, "training")


def typed(kind: type, values: dict, owner: str):
    """An instance of a dataclass; a value of the wrong type is refused by name."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{owner} has no setting {name!r}.")
        wanted = hints[name]
        if typing.get_origin(wanted) is tuple:
            good = isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
            values[name] = tuple(value) if good else value
        else:
            good = isinstance(value, wanted) or (wanted is float and isinstance(value, int) and not isinstance(value, bool))
        if not good:
            raise UserError(f"{owner}: {name} must be {getattr(wanted, '__name__', wanted)}, got {value!r}.")
    return kind(**values)


def build(chapter: str, config, base: Run | None = None) -> nn.Module:
    """An untrained model. A value that the chapter refuses becomes a sentence for the user."""
    module = CHAPTERS[chapter]
    try:
        return module.Model(config, base.model) if base else module.Model(config)
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise UserError(f"{chapter} cannot be built like this: {error}.") from error


@torch.no_grad()
def try_out(model: nn.Module, tensors: dict[str, Tensor], chapter: str, training: Training) -> None:
    """One loss, before anything is written: a network that cannot take these pictures becomes a sentence."""
    check_options(training)
    try:
        model.eval().to(machine.device()).loss(draw_batch(tensors, 0, dataclasses.replace(training, batch_size=2)))
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{chapter} cannot take these pictures with these settings: {reason}.") from error


def prepared(model: nn.Module, source: datasets.Images, config, flip: bool, base: Run | None) -> dict[str, Tensor]:
    """What `prepare` gives. If a tokenizer made it, it is kept in the tokenizer's folder: the next chapter starts at once."""
    if base is None or base.chapter != "tokenizer":
        return prepare(model, source, config, flip, base)
    key = hashlib.sha256(content_hash(base.folder).encode() + bytes([flip]))
    for array in (source.train_images, source.train_labels):
        key.update(np.ascontiguousarray(array))
    path = base.folder / f"encoded-{key.hexdigest()[:16]}.safetensors"
    try:
        tensors = load_file(path)
    except Exception:  # absent or damaged: encoding takes a minute, so no question is asked
        tensors = prepare(model, source, config, flip, base)
        if join_processes()[0] == 0:
            with contextlib.suppress(UserError):  # not kept, then
                write_atomically(path, lambda path: save_file(contiguous(tensors), path))
    if "latents" in tensors:
        model.measure(tensors["latents"])
    return tensors


@torch.no_grad()
def prepare(model: nn.Module, source: datasets.Images, config, flip: bool = True, base: Run | None = None) -> dict[str, Tensor]:
    """The training pictures as the model wants them: pixels, or tokens and latents encoded once, with `flip` mirrored too."""
    images = to_tensor(source.train_images, config.size)
    labels = torch.from_numpy(source.train_labels)
    if getattr(config, "second", 0):
        return {"images": images, "labels": labels, "second": torch.from_numpy(source.truth["train_background"])}
    if not hasattr(model, "prepare") or getattr(model, "tokenizer", []) == [None]:  # the chapter stands on nothing this time
        return {"images": images, "labels": labels}
    if base and base.chapter == "flow":  # pairs are drawn, not encoded: as many as asked, and none mirrored
        images, labels, flip = images[: config.reflow_pairs], labels[: config.reflow_pairs], False
    model.to(machine.device())
    parts: dict[str, list[Tensor]] = {}
    for mirrored in (False, True) if flip else (False,):
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = (x.flip(-1) if mirrored else x).to(machine.device()).float() / 127.5 - 1
            with machine.autocast():
                for name, tensor in model.prepare(x, y).items():
                    parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def to_tensor(images, size: int) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, size, size), by area average where the size differs."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if tensor.shape[-1] == size:
        return tensor
    return torch.cat([F.interpolate(part.float(), size, mode="area").round().byte() for part in tensor.split(2000)])


def load_run(folder: str | Path, expected_hash: str | None = None) -> Run:
    """A finished run from its folder. Raises UserError where it is missing, unfinished, damaged or changed."""
    folder = Path(folder)
    record = read_config(folder)
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} is not finished: train it with --resume first.")
    if expected_hash and content_hash(folder) != expected_hash:
        raise UserError(f"{folder} has changed since the run that stands on it was trained: train that run again.")
    base = None
    if "base" in record:
        base = load_run(folder / record["base"]["path"], record["base"]["hash"])
    config = typed(CHAPTERS[record["chapter"]].Config, record["config"], record["chapter"])
    model = build(record["chapter"], config, base)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:
        raise UserError(f"{folder / 'model.safetensors'} is damaged or of another network ({type(error).__name__}); "
                        "train the run again.") from error
    model.to(machine.device(), memory_format=torch.channels_last).eval()  # as in training, to the last bit
    return Run(folder, record["chapter"], record["data"], model, record)


def read_config(folder: Path) -> dict:
    try:
        record = json.loads((folder / "config.json").read_text())
        CHAPTERS[record["chapter"]], record["data"], record["config"], record["training"], record["class_names"]  # noqa: B018
        return record
    except OSError as error:
        raise UserError(f"{folder} is not a run: there is no config.json in it.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged: delete the folder and train again.") from error


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {error.strerror}.") from error


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: a crash leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"Cannot write {path} ({error}): is the disk full? What was there is kept.") from error


def content_hash(folder: Path) -> str:
    """sha256 of a run's weights, 16 digits of it."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(f"[{time.strftime('%H:%M')}] {text}", flush=True)
