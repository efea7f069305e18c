"""Runs: a method, a data set and a budget become a folder, and a folder becomes a model again.

    run = train_run("maskgit", "cifar10", {"minutes": 10})  # trains the tokenizer first, if missing
    run = load_run("runs/maskgit-cifar10")                  # later, anywhere
    images = run.sample(16, label="horse", guidance=3.0)    # uint8 (16, 32, 32, 3)

`train_run` checks all that is cheap to check, loads the data, calls itself for the run that is
required, and `train_one` does the training.
"""

import contextlib
import copy
import dataclasses
import importlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nanogen import UserError, files
from nanogen.data.datasets import Dataset, kind_of, load, name_of, remembered, resolved, whole
from nanogen.files import enough_memory, explained, locked, write_json
from nanogen.lab import folders, machine
from nanogen.lab.folders import RECORD, WEIGHTS, begun, check_data, copy_run, place_of, read_record
from nanogen.lab.prepare import check_size, held_out, prepare, remarks
from nanogen.lab.recipes import facts, find_recipe, make_config, recipes, required_recipe, typed
from nanogen.lab.sample import cut, read_known, sample
from nanogen.lab.train import Training, check_batch, draw_batch, read_state, train
from nanogen.method import METHODS, Method, Requirement, find

BAD = ValueError, ArithmeticError, LookupError, RuntimeError  # what bad settings can raise


@dataclass
class Run:
    """A trained model and how it came to be."""

    folder: Path
    method: str
    model: Method
    record: dict  # everything in config.json

    @property
    def names(self) -> dict[str, list[str]]:
        """The classes of each condition: {"labels": [...]}; "" for a voice left out of training."""
        return self.record["names"]

    def dataset(self, place: str | None = None) -> Dataset:
        """The data set of this run; place: where its folder is now, if it was moved. UserError if
        it is not there, or no longer what the run was trained on."""
        data = self.record["data"]
        if not place and kind_of(data["origin"]) is None and not Path(data["origin"]).is_dir():
            raise UserError(f"{self.folder} was trained on {data['origin']}, which is not there: "
                            "evaluate --data FOLDER says where it is now.")
        dataset = remembered(resolved(place or data["origin"]), data["count"])
        check_data(self.folder, self.record, dataset)
        return dataset

    def sample(self, n: int = 16, seed: int = 0, **settings):
        """Draw n images uint8 (n, H, W, 3), videos uint8 (n, T, H, W, 3), a list of n waveforms, or
        n texts.
        settings: conditions by their singular (label="horse", speaker=["theo", "lucas"]), and
        settings of the sampler (steps, guidance, ...). known: an image or a sound of which a part
        stays, with hole, mask or keep, as for `read_known`. UserError for what does not exist."""
        conditions = {}
        for name in self.model.conditions:
            if (said := settings.pop(name.removesuffix("s"), None)) is not None:
                conditions[name] = said if isinstance(said, list | tuple) else [said]
        if (known := settings.pop("known", None)) is not None:
            known = known if isinstance(known, list | tuple) else [known]
            part = {key: settings.pop(key) for key in ("hole", "mask", "keep") if key in settings}
            known = read_known(self, known, **part)
        drawn = sample(self, n, conditions, seed, known=known, **settings)
        if "waveforms" in drawn:
            return cut(drawn)
        return next(drawn[name] for name in ("images", "videos", "thoughts") if name in drawn)


# ---- training

def train_run(method: str, data: str | Path | Dataset | None = None, overrides: dict | None = None,
              folder: str | Path | None = None, recipe: str = "default", resume: bool = False,
              quiet: bool = False, budget: dict | None = None, needed_by: str = "") -> Run:
    """Train a method on a data set and leave a run folder, runs/<method>-<data> unless told.
    data: a name, a folder or a Dataset; cifar10 or fsdd unless told. overrides: fields of the
    method's Config or of Training. resume: go on with an interrupted run; its network stays as it
    is, and `overrides` may change the other settings of the training. A finished one is loaded.
    budget: minutes or steps, also for runs that it requires, except judges. needed_by: what needs
    it, in words; then a program that trains it already is waited for. UserError for mistakes."""
    if method not in METHODS:
        raise UserError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")
    kind = find(method).Model.data
    overrides = (overrides or {}) | (budget or {})
    if not isinstance(data, Dataset):
        data = resolved(data or ("fsdd" if kind == "sounds" else "cifar10"))
        check_kind(method, data, kind_of(data))
    name = data.name if isinstance(data, Dataset) else name_of(data)
    folder = Path(folder or Path("runs") / folders.run_name(method, name, overrides))
    record = begun(folder, method, name, overrides, resume)
    finished = record and (folder / WEIGHTS).exists()
    if finished and isinstance(data, str) and record["data"]["origin"] == data:
        return load_run(folder)
    if isinstance(data, str) and (kind := kind_of(data) or kind) != "any":
        early = record or find_recipe(method, data, kind, recipe)
        make_config(method, early, overrides, {})  # bad settings fail before the data is loaded
    dataset = data if isinstance(data, Dataset) else load(data)
    check_kind(method, dataset.origin, dataset.kind)
    check_columns(method, dataset)
    if record:
        check_data(folder, record, dataset)
    if finished:
        return load_run(folder)
    rank, world = machine.join_processes()
    wait = bool(needed_by) or find(method).Model.kind == "judge"
    with locked(folder, wait) if rank == 0 else contextlib.nullcontext():
        if world > 1:
            dist.barrier()  # the first process has the lock
        record = begun(folder, method, name, overrides, resume)  # again, as we may have waited
        if record and (folder / WEIGHTS).exists():
            return load_run(folder)
        settings = record or find_recipe(method, dataset.origin, dataset.kind, recipe)
        config, training = make_config(method, settings, overrides, facts(dataset))
        check_batch(training, len(dataset))
        check_size(config, dataset)
        need = find(method).Model.requires(config)
        base = need and required_run(need, method, folder, dataset, recipe, quiet, budget)
        if needed_by and not quiet:
            print(f"{needed_by} {folder}, which is trained first.", flush=True)
        return train_one(method, dataset, config, training, settings["sampling"], base, folder,
                         resume=record is not None, quiet=quiet)


def required_run(need: Requirement, method: str, folder: Path, dataset: Dataset, recipe: str,
                 quiet: bool, budget: dict | None) -> Run:
    """The run that `method` in `folder` requires, loaded or trained now."""
    base = folders.base_folder(folder, dataset, need)
    recipe = required_recipe(need, need.data or dataset.origin, dataset.kind, recipe)
    if need.data:  # a finished run needs no data to be loaded
        finished = (base / WEIGHTS).exists()
        dataset = need.data if finished else remembered(need.data, dataset.count)
    budget = None if find(need.method).Model.kind == "judge" else budget
    train_run(need.method, dataset, need.config, base, recipe, resume=True, quiet=quiet,
              budget=budget, needed_by=f"{method} requires")
    return load_run(base)  # as from now on, not as the training left it


def train_one(method: str, dataset: Dataset, config, training: Training, sampling: dict,
              base: Run | None, folder: Path, resume: bool, quiet: bool) -> Run:
    """Build the model, prepare its data, train it, and write the run's folder."""
    rank, world = machine.join_processes()
    precision = [str(machine.precision(training.precision)).removeprefix("torch.")]
    if world > 1:  # the first process decides for all
        dist.broadcast_object_list(precision)
    training.precision = precision[0]  # stored, so that a resumed run computes the same
    torch.manual_seed(training.seed)
    model = build(method, config, base)
    encoder = base.folder if base and base.model.kind == "tokenizer" else None
    tensors = prepare(model, dataset, training.flip, encoder, keep=rank == 0)
    half = max(min(training.batch_size, len(dataset)) // 2, 1)
    advice = f"try --batch-size {half}, or a smaller network"
    if resume:
        read_state(folder)  # refuses a damaged state before any file is replaced
    else:  # try one real step before anything is written
        sentence = f"{method} cannot take this data with these settings: {{reason}}."
        with explained(sentence, *BAD), enough_memory(advice):
            try_step(model, tensors, training)
    names = dict(dataset.names)
    if "speakers" in names:
        heard = set(dataset.train["speakers"].tolist())
        names["speakers"] = [names["speakers"][number] if number in heard else ""
                             for number in range(dataset.classes("speakers"))]
    record = {
        "name": folder.name, "method": method, "data": dataset.describe(),
        "config": dataclasses.asdict(config), "training": dataclasses.asdict(training),
        "sampling": sampling, "names": names, "machine": machine.describe(training.precision),
        "examples": {name: list(dataset.test[name][:20])  # for `sample` without a text
                     for name, kind in model.conditions.items() if kind == "text"},
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if base:
        record["required_minutes"] = base.record["minutes"] + base.record.get("required_minutes", 0)
        if not find(method).Model.requires(config).training_only:
            record["requires"] = {"method": base.method, "name": base.record["name"],
                                  "minutes": base.record["minutes"],
                                  "hash": files.content_hash(base.folder / WEIGHTS)}
    if world > 1:
        dist.barrier()  # every process has read the folder before the first one writes
    if rank == 0:
        if "requires" in record:
            copy_run(base.folder, folder / "base")
        (folder / "metrics.json").unlink(missing_ok=True)  # of an earlier state
        write_json(folder / RECORD, record)
        if not quiet:
            budget = f"{training.minutes:g} min" if training.minutes else f"{training.steps} steps"
            print(f"[{time.strftime('%H:%M')}] {record['parameters'] / 1e6:.1f} M parameters, "
                  f"{budget}, {record['machine']} -> {folder}",
                  *remarks(model, dataset, training.flip), sep="\n", flush=True)
    few = max(64, 4 * training.batch_size)  # enough to see a rise; all would cost too much
    with enough_memory(advice):
        log = train(model, tensors, training, folder, resume, quiet, held_out(model, dataset, few))
    speed = round(machine.speed(torch.float32))  # how fast this machine is
    record |= {"minutes": log[-1]["minutes"], "steps": log[-1]["step"], "gflops": speed}
    if rank == 0:
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        write_json(folder / RECORD, record)  # the state has the same weights already
        files.write_atomically(folder / WEIGHTS, lambda path: save_file(state, path))
    if world > 1:
        dist.barrier()
    return Run(folder, method, model, record)


def try_step(model: Method, data: dict[str, torch.Tensor], options: Training) -> None:
    """Loss and gradient of the first batch, with a copy: a step can change more than weights."""
    with explained("torch cannot make its cache ({reason}): set TORCHINDUCTOR_CACHE_DIR to a "
                   "folder that can be written."):
        importlib.import_module("torch._dynamo")  # torch.optim imports it in any case
    model = copy.deepcopy(model).to(machine.device(), memory_format=torch.channels_last).train()
    with machine.autocast(machine.precision(options.precision)):
        loss = model.loss(draw_batch(data, 0, options, *machine.join_processes()))[0]
    loss.backward()


def build(method: str, config, base: Run | None = None) -> Method:
    """An untrained model. A value that the method refuses becomes a sentence for the user."""
    with explained(f"{method} cannot be built like this: {{reason}}.", *BAD):
        return find(method).Model(config, base.model if base else None)


# ---- what is required

def check_kind(method: str, data: str, kind: str | None) -> None:
    """UserError if the method learns from another kind of data. kind None: not known yet."""
    wanted = find(method).Model.data
    if kind is not None and wanted not in ("any", kind):
        raise UserError(f"{data} holds {kind}, but {method} learns from {wanted}.")


def check_columns(method: str, dataset: Dataset) -> None:
    """UserError if the data set lacks a column that the method names. Nothing is trained before."""
    columns = find(method).Model.columns  # a property, where they depend on the Config
    for name in columns if isinstance(columns, tuple) else ():
        if name not in dataset.train:
            raise UserError(f"{dataset.name} has no {name}, from which {method} learns: try --data "
                            f"{' or '.join(recipes(method))}.")


def judge(dataset: Dataset, folder: Path = Path("runs"), quiet: bool = False) -> Run:
    """The judge of a data set, in `folder`: loaded, or trained now. It knows every speaker."""
    if (origin := whole(dataset.origin)) != dataset.origin:
        dataset = remembered(origin, dataset.count)
    place = place_of("judge", dataset, Path(folder), Path(folder).parent)  # also above compare-x
    return train_run("judge", dataset, {}, place, resume=True, quiet=quiet,
                     needed_by="Evaluation needs")


def expert(method: str, data: str, folder: Path = Path("runs"), count: int | None = None,
           quiet: bool = False) -> Run:
    """The "reader" of scenes or the "listener" of a data set in `folder`: loaded, or trained now.
    count: of examples to learn from."""
    place = Path(folder) / f"{method}-{data}"
    if (place / WEIGHTS).exists():
        return load_run(place)
    return train_run(method, remembered(data, count), {}, place, resume=True, quiet=quiet,
                     needed_by="Evaluation needs")


# ---- loading

def load_run(folder: str | Path) -> Run:
    """A run from its folder: finished, or with the EMA weights of its last saved state. UserError
    where it is missing, damaged, or has nothing saved yet."""
    folder = Path(folder)
    record = read_record(folder)
    base = load_run(folder / "base") if "requires" in record else None
    method = record["method"]
    model = build(method, typed(find(method).Config, record["config"], method), base)
    weights = folder / WEIGHTS
    saved = None if weights.exists() else read_state(folder)
    if not weights.exists() and saved is None:
        raise UserError(f"{folder} has no weights yet: train it with --resume first.")
    if saved:  # how long these weights were trained
        record |= {"minutes": round(saved["seconds"] / 60, 3), "steps": saved["step"]}
    sentence = f"{weights} is damaged or of another network ({{reason}}): train the run again."
    with explained(sentence):
        model.load_state_dict(saved["ema"] if saved else load_file(weights))
    model.to(machine.device(), memory_format=torch.channels_last).eval()  # as in training
    return Run(folder, method, model, record)


