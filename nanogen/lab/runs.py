"""Runs: a chapter, a data set and a budget become a folder, and a folder becomes a trained model again.

    run = train_run("maskgit", "cifar10", {"minutes": 10})     # trains the tokenizer underneath first, if it is missing
    run = load_run("runs/maskgit-cifar10")                     # later, anywhere
    run.model.sample(labels, guidance=3.0)

    runs/<chapter>-<data>/   config.json  model.safetensors (averaged weights)  state.pt (to resume)
                             log.jsonl  metrics.json  samples/

What works for which data set stands beside each chapter, as <chapter>.json: its *recipes*, with the numbers that they
gave on a named machine.
"""

import dataclasses
import json
import os
import time
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanogen import UserError
from nanogen.audio import audio_lm, codec, wave_ar
from nanogen.data.datasets import Images, Sounds, kind_of, resolved, whole
from nanogen.data.folders import PICTURE_FILES, find_classes
from nanogen.image import flow, mar, maskgit, meanflow, pixel_ar, token_ar, tokenizer, var
from nanogen.lab import judges, machine
from nanogen.lab.files import content_hash, contiguous, make_folder, write_atomically
from nanogen.lab.prepare import load_data, prepare, prepared, to_tensor  # noqa: F401 (notebooks take all of it from here)
from nanogen.lab.train import Training, check_options, draw_batch, join_processes, train

AUDIO = {"wave_ar": wave_ar, "codec": codec, "audio_lm": audio_lm}
CHAPTERS = {"pixel_ar": pixel_ar, "tokenizer": tokenizer, "token_ar": token_ar, "maskgit": maskgit, "var": var, "mar": mar,
            "flow": flow, "meanflow": meanflow, **AUDIO, "judge": judges}


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

    @property
    def speaker_names(self) -> list[str]:
        """Of sounds: the voices that it has learned, by number, "" where nobody was heard. Of pictures: none."""
        return self.config.get("speaker_names", [])

    def read_json(self, name: str) -> dict:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}


def recipes(chapter: str) -> dict:
    """data set -> recipe name -> {"training", "config", "sampling", "expected"}, from the JSON beside the chapter."""
    path = Path(CHAPTERS[chapter].__file__).with_suffix(".json")
    return json.loads(path.read_text())


def find_recipe(chapter: str, data: str, name: str = "first look") -> dict:
    """The recipe for a data set; a folder of one's own is treated like cifar10, or like fsdd if it holds sounds."""
    if chapter not in CHAPTERS:
        raise UserError(f"There is no chapter {chapter!r}: choose from {', '.join(CHAPTERS)}.")
    known = recipes(chapter)
    found = known.get(whole(data)) or known["fsdd" if for_sounds(chapter, data) else "cifar10"]
    if name not in found:
        raise UserError(f"{chapter} has no recipe {name!r} for {data}: choose from {', '.join(found)}.")
    return found[name]


def for_sounds(chapter: str, data: str) -> bool:
    """Does it learn from sounds? Chapters know; a judge learns from whatever is in the folder."""
    own = Path(data).expanduser()
    return chapter in AUDIO or (chapter == "judge" and own.is_dir() and not find_classes(own, PICTURE_FILES))


def usual_data(chapter: str) -> str:
    """The data set to take where none is named."""
    return "fsdd" if chapter in AUDIO else "cifar10"


def check_kind(chapter: str, data: str, kind: type | None) -> None:
    """Refuse to look at sounds, or to listen to pictures. kind: Images or Sounds; None: not known yet."""
    if chapter in AUDIO and kind is Images:
        raise UserError(f"{data} holds pictures, but {chapter} needs sounds: say fsdd, voices or a folder of your own.")
    if chapter not in (*AUDIO, "judge") and kind is Sounds:
        raise UserError(f"{data} holds sounds, but {chapter} needs pictures: say cifar10, scenes or a folder of your own.")


def train_run(chapter: str, data: str | None = None, overrides: dict | None = None, folder: str | Path | None = None,
              recipe: str = "first look", resume: bool = False, count: int | None = None, quiet: bool = False) -> Run:
    """Train a chapter on a data set and leave a run folder, runs/<chapter>-<data> unless told.

    data: cifar10 for pictures and fsdd for sounds unless told. overrides: fields of the chapter's Config or of Training.
    resume: go on where an interrupted run stopped, the network as it is, with what overrides change of the training; a
    finished one is simply loaded, unless there are more minutes or steps. count: use only so many pictures or sounds. Raises
    UserError for what the caller can mend.
    """
    data = resolved(data or usual_data(chapter))
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
        if (settings["chapter"], resolved(settings["data"])) != (chapter, data):
            there = f"{settings['chapter']} on {settings['data']}"
            raise UserError(f"{folder} is a {there}, not a {chapter} on {data}: choose another --out.")
        fixed = settings["config"] | {name: settings["training"].get(name) for name in ("optimizer", "seed")}
        for name, value in overrides.items():
            if name in fixed and fixed[name] != json.loads(json.dumps(value)):  # JSON has lists for tuples
                raise UserError(f"{folder} was begun with {name} {fixed[name]!r}, not {value!r}: --out DIR starts another.")
        if (folder / "model.safetensors").exists():
            if not overrides.keys() & {"minutes", "steps"}:
                return load_run(folder)
            if not (folder / "state.pt").exists():  # training would begin anew, and overwrite what is finished
                raise UserError(f"{folder} is finished, and without its state.pt it cannot go on: choose another --out.")
    check_kind(chapter, data, kind_of(data))  # before anything is downloaded
    source = load_data(data, count)
    check_kind(chapter, data, type(source))
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
    if isinstance(source, Sounds):
        learned = set(source.train_speakers.tolist())
        names = source.speaker_names[: voices(source)]
        record["speaker_names"] = [name if number in learned else "" for number, name in enumerate(names)]
    if base:
        record["base"] = {"path": os.path.relpath(base.folder, folder), "hash": content_hash(base.folder)}
    if rank == 0:
        make_folder(folder)
        write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(record, indent=1)))
    budget = f"{training.steps} steps" if training.steps else f"{training.minutes:g} min"
    kind = "sounds" if isinstance(source, Sounds) else "pictures"
    size = f"{record['parameters'] / 1e6:.1f} M parameters, {len(source.train_labels):,} {kind}"
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
    needs = foundation(chapter, config)
    if needs is None:
        return None
    if (folder / "config.json").exists() and "base" in (saved := read_config(folder)):
        return fitting(load_run(folder / saved["base"]["path"], saved["base"]["hash"]), needs[1])
    place = folder.parent / run_name(needs[0], data, needs[1])
    if not (place / "model.safetensors").exists():
        say(quiet, f"{chapter} stands on a {needs[0]}; {place} is not there or not finished, so it is trained first.")
    wanted = {} if (place / "config.json").exists() else needs[1]  # what was begun is taken as it is, if it fits
    return fitting(train_run(needs[0], data, wanted, place, resume=True, count=count, quiet=quiet), needs[1])


def foundation(chapter: str, config) -> tuple[str, dict] | None:
    """The chapter that this one stands on, and what that one must be, with pictures also of their size; None: on nothing."""
    stands_on = getattr(CHAPTERS[chapter], "stands_on", None)
    try:
        needs = stands_on(config) if stands_on else None
    except ValueError as error:
        raise UserError(f"{chapter} cannot be built like this: {error}.") from error
    return needs and (needs[0], needs[1] | ({"size": config.size} if hasattr(config, "size") else {}))


def fitting(base: Run, needs: dict) -> Run:
    """The run underneath, if it is what the chapter needs."""
    for name, wanted in needs.items():
        found = base.config["config"][name]
        if found != json.loads(json.dumps(wanted)):  # JSON has lists for tuples
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
    """The judge of a data set, kept in `folder`: loaded, or trained now and said so. It has heard every speaker."""
    data = whole(data)
    place = Path(folder) / run_name("judge", data, {})
    if not (place / "model.safetensors").exists():
        say(quiet, f"Evaluation needs a judge; {place} is not there, so it is trained first.")
    return train_run("judge", data, {}, place, resume=True, count=count, quiet=quiet).model


def make_config(chapter: str, settings: dict, overrides: dict, source: Images | Sounds) -> tuple[object, Training]:
    """(the chapter's Config, Training) from a recipe, what the user says and what the data says."""
    config_class = CHAPTERS[chapter].Config
    fields = {field.name for field in dataclasses.fields(config_class)}
    facts = {"classes": len(source.class_names)}
    if isinstance(source, Sounds):
        facts |= {"sound": True, "speakers": voices(source), "second": voices(source) if voices(source) > 1 else 0}
    else:
        facts["size"] = source.train_images.shape[1]
        if "train_background" in source.truth:
            facts["second"] = int(source.truth["train_background"].max()) + 1
    values = {k: v for k, v in facts.items() if k in fields} | settings["config"]
    training = dict(settings["training"])
    known = fields | {field.name for field in dataclasses.fields(Training)}
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"{chapter} has no setting {name!r}: choose from {', '.join(sorted(known))}.")
        (values if name in fields else training)[name] = value
    if overrides.get("minutes") and overrides.get("steps"):
        raise UserError("A budget is either minutes or steps: say one of them.")
    if overrides.get("minutes"):
        training["steps"] = 0
    return typed(config_class, values, chapter), typed(Training, training, "training")


def voices(source: Sounds) -> int:
    """How many numbers of speakers there are to learn from. Those of the test part alone come later (in `voices`), or stay
    between them as numbers that nobody has (in fsdd-without-jackson)."""
    return int(source.train_speakers.max()) + 1


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
    """One loss, before anything is written: a network that cannot take this data becomes a sentence."""
    check_options(training, len(next(iter(tensors.values()))))
    try:
        model.eval().to(machine.device()).loss(draw_batch(tensors, 0, dataclasses.replace(training, batch_size=2)))
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{chapter} cannot take this data with these settings: {reason}.") from error


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


def say(quiet: bool, text: str) -> None:
    if not quiet:
        print(f"[{time.strftime('%H:%M')}] {text}", flush=True)
