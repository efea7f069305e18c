"""Runs: a method, a data set and a budget become a folder, and a folder becomes a model again.

    run = train_run("maskgit", "cifar10", {"minutes": 10})  # trains the tokenizer first, if missing
    run = load_run("runs/maskgit-cifar10")                  # later, anywhere
    images = run.sample(16, label="horse", guidance=3.0)    # uint8 (16, 32, 32, 3)

    runs/<method>-<data>/   config.json  model.safetensors (EMA weights)  state.pt (to resume)
                            log.jsonl  metrics.json  samples/  base/ (its tokenizer, if any)

`train_run` checks all that is cheap to check and loads the data, `plan` lists the trainings that
are missing, required ones first, and `train_job` does one of them.
"""

import dataclasses
import functools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nanogen import UserError
from nanogen.data.datasets import Dataset, data_folders, kind_of, load, resolved, whole
from nanogen.files import content_hash, explained, make_folder, write_atomically, write_json
from nanogen.lab import machine
from nanogen.lab.prepare import prepare
from nanogen.lab.recipes import facts, find_recipe, make_config, required_recipe, typed
from nanogen.lab.sample import sample
from nanogen.lab.train import Training, check_batch, draw_batch, join_processes, read_state, train
from nanogen.method import METHODS, Method, Requirement, find

WEIGHTS, RECORD = "model.safetensors", "config.json"
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

    def dataset(self) -> Dataset:
        """The data set of this run. UserError if it is no longer what the run was trained on."""
        data = self.record["data"]
        dataset = remembered(data["origin"], data["count"], tuple(data_folders()))
        check_data(self.folder, self.record, dataset)
        return dataset

    def sample(self, n: int = 16, seed: int = 0, **settings):
        """Draw n images uint8 (n, H, W, 3), videos uint8 (n, T, H, W, 3) or a list of n waveforms.
        settings: conditions by their singular (label="horse", speaker=["theo", "lucas"]), and
        settings of the sampler (steps, guidance, ...). Raises UserError for what does not exist."""
        conditions = {}
        for name in self.model.conditions:
            if (said := settings.pop(name.removesuffix("s"), None)) is not None:
                conditions[name] = said if isinstance(said, list | tuple) else [said]
        drawn = sample(self, n, conditions, seed, **settings)
        if self.model.output == "waveforms":
            pairs = zip(drawn["waveforms"], drawn["lengths"], strict=True)
            return [waveform[:length] for waveform, length in pairs]
        return drawn[self.model.output]


@functools.lru_cache(maxsize=2)
def remembered(origin: str, count: int | None, folders: tuple[Path, ...]) -> Dataset:
    """`load`, remembering the last two. In other `folders`, the same name is other data."""
    return load(origin, count=count)


# ---- training

@dataclass
class Job:
    """One training, completely decided."""

    method: str
    folder: Path
    config: object
    training: Training
    sampling: dict
    begun: bool  # the folder has a state to go on with
    requirement: Requirement | None
    base: Path | None  # the folder of the required run


def train_run(method: str, data: str | Path | Dataset | None = None, overrides: dict | None = None,
              folder: str | Path | None = None, recipe: str = "default", resume: bool = False,
              quiet: bool = False, budget: dict | None = None) -> Run:
    """Train a method on a data set and leave a run folder, runs/<method>-<data> unless told.
    data: a name, a folder or a Dataset; cifar10 or fsdd unless told. overrides: fields of the
    method's Config or of Training. resume: go on with an interrupted run; its network stays as it
    is, and `overrides` may change the other settings of the training. A finished one is loaded,
    unless minutes or steps are given. budget: minutes or steps for this run and those that it
    requires, except judges. UserError for what the caller can mend."""
    if method not in METHODS:
        raise UserError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")
    kind = find(method).Model.data
    overrides = (overrides or {}) | (budget or {})
    if not isinstance(data, Dataset):
        data = resolved(data or ("fsdd" if kind == "sounds" else "cifar10"))
        check_kind(method, data, kind_of(data))
    name = data.name if isinstance(data, Dataset) else Path(data).name
    folder = Path(folder or Path("runs") / run_name(method, name, overrides))
    record = begun(folder, method, name, overrides, resume)
    if record and (folder / WEIGHTS).exists() and not overrides.keys() & {"minutes", "steps"}:
        return load_run(folder)
    if isinstance(data, str) and (kind := kind_of(data) or kind) != "any":
        early = record or find_recipe(method, data, kind, recipe)
        make_config(method, early, overrides, {})  # bad settings fail before the data is loaded
    dataset = data if isinstance(data, Dataset) else load(data)
    check_kind(method, dataset.origin, dataset.kind)
    if record:
        check_data(folder, record, dataset)
    settings = record or find_recipe(method, dataset.origin, dataset.kind, recipe)
    jobs = plan(method, dataset, settings, overrides, folder, record, recipe, budget or {})
    if join_processes()[1] > 1:
        dist.barrier()  # every process has read the folders before the first one writes
    for job in jobs:
        if job.folder != folder and not quiet:
            print(f"{method} requires {job.folder}, which is trained first.", flush=True)
        run = train_job(job, dataset, quiet)
    return run


def begun(folder: Path, method: str, data: str, overrides: dict, resume: bool) -> dict | None:
    """The record of the run in this folder, if it may go on like this; None: the folder is free."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out.")
    if not (folder / RECORD).exists():
        return None
    if not resume:
        raise UserError(f"{folder} exists already: --resume goes on with it, --out DIR starts "
                        "another run, or delete it.")
    record = read_record(folder)
    if (there := (record["method"], record["data"]["name"])) != (method, data):
        raise UserError(f"{folder} is a {' on '.join(there)}, not a {method} on {data}: choose "
                        "another --out.")
    fixed = record["config"] | {name: record["training"][name] for name in ("optimizer", "seed")}
    for name, value in overrides.items():
        if name in fixed and fixed[name] != json.loads(json.dumps(value)):  # JSON has no tuples
            raise UserError(f"{folder} was begun with {name} {fixed[name]!r}, not {value!r}: "
                            "--out DIR starts another run.")
    if (folder / WEIGHTS).exists() and not (folder / "state.pt").exists() \
            and overrides.keys() & {"minutes", "steps"}:
        raise UserError(f"{folder} is finished, and without its state.pt it cannot go on: "
                        "choose another --out.")
    return record


def plan(method: str, dataset: Dataset, settings: dict, overrides: dict, folder: Path,
         record: dict | None, recipe: str, budget: dict) -> list[Job]:
    """The trainings that are missing for this run, the required ones first."""
    jobs: list[Job] = []
    while True:  # from a run to the run that it requires
        config, training = make_config(method, settings, overrides, facts(dataset))
        check_batch(training, len(dataset))
        need = find(method).Model.requires(config)
        base = base_folder(folder, dataset, need) if need else None
        jobs.insert(0, Job(method, folder, config, training, settings["sampling"],
                           record is not None, need, base))
        if need is None:
            return jobs
        record = read_record(base) if (base / RECORD).exists() else None
        if record:
            check_base(base, record, need, dataset)
        if (base / WEIGHTS).exists():
            return jobs
        method, folder, overrides = need.method, base, {} if record else need.config
        if not record and find(method).Model.kind != "judge":
            overrides = overrides | budget
        settings = record or required_recipe(need, dataset.origin, dataset.kind, recipe)


def train_job(job: Job, dataset: Dataset, quiet: bool) -> Run:
    """Build the model, prepare its data, train it, and write the run's folder."""
    rank, world = join_processes()
    base = load_run(job.base) if job.base else None
    torch.manual_seed(job.training.seed)
    model = build(job.method, job.config, base)
    encoder = base.folder if base and base.model.kind == "tokenizer" else None
    tensors = prepare(model, dataset, job.training.flip, encoder, keep=rank == 0)
    if job.begun:
        read_state(job.folder)  # refuses a damaged state before any file is replaced
    else:  # try one real batch before the folder is made
        sentence = f"{job.method} cannot take this data with these settings: {{reason}}."
        with explained(sentence, *BAD), torch.no_grad():
            model.eval().to(machine.device()).loss(draw_batch(tensors, 0, job.training))
    names = dict(dataset.names)
    if "speakers" in names:
        heard = set(dataset.train["speakers"].tolist())
        names["speakers"] = [names["speakers"][number] if number in heard else ""
                             for number in range(dataset.classes("speakers"))]
    record = {
        "name": job.folder.name, "method": job.method, "data": dataset.describe(),
        "config": dataclasses.asdict(job.config), "training": dataclasses.asdict(job.training),
        "sampling": job.sampling, "names": names, "machine": machine.describe(),
        "examples": {name: list(dataset.test[name][:20])  # for `sample` without a text
                     for name, kind in model.conditions.items() if kind == "text"},
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if base:
        record["required_minutes"] = base.record["minutes"] + base.record.get("required_minutes", 0)
    if base and not job.requirement.training_only:
        record["requires"] = {"method": base.method, "name": base.record["name"],
                              "minutes": base.record["minutes"],
                              "hash": content_hash(base.folder / WEIGHTS)}
    if rank == 0:
        make_folder(job.folder)
        if "requires" in record:
            copy_run(base.folder, job.folder / "base")
        for name in (WEIGHTS, "metrics.json"):  # of a finished run that goes on
            (job.folder / name).unlink(missing_ok=True)
        write_json(job.folder / RECORD, record)
        if not quiet:
            steps, minutes = job.training.steps, job.training.minutes
            budget = f"{steps} steps" if steps else f"{minutes:g} min"
            print(f"[{time.strftime('%H:%M')}] {record['parameters'] / 1e6:.1f} M parameters, "
                  f"{budget}, {record['machine']} -> {job.folder}", flush=True)
    log = train(model, tensors, job.training, job.folder, job.begun, quiet)
    record |= {"minutes": log[-1]["minutes"], "steps": log[-1]["step"]}
    if rank == 0:
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        write_atomically(job.folder / WEIGHTS, lambda path: save_file(state, path))
        write_json(job.folder / RECORD, record)
    if world > 1:
        dist.barrier()
    return Run(job.folder, job.method, model, record)


def build(method: str, config, base: Run | None = None) -> Method:
    """An untrained model. A value that the method refuses becomes a sentence for the user."""
    with explained(f"{method} cannot be built like this: {{reason}}.", *BAD):
        return find(method).Model(config, base.model if base else None)


# ---- what is required

def run_name(method: str, data: str, overrides: dict) -> str:
    """tokenizer-kl-cifar10: a text option that differs from its default is part of the name."""
    usual = dataclasses.asdict(find(method).Config()) if overrides else {}
    variant = [value for name, value in overrides.items()
               if isinstance(value, str) and name in usual and value != usual[name]]
    return "-".join([method, *variant, data])


def base_folder(folder: Path, dataset: Dataset, need: Requirement) -> Path:
    """The folder of the required run: RUN/base once the run has begun, else one beside RUN."""
    if (folder / "base" / RECORD).exists():
        return folder / "base"
    if need.name:
        return folder.parent / f"{need.name}-{dataset.name}"
    return folder.parent / run_name(need.method, dataset.name, need.config)


def check_base(base: Path, record: dict, need: Requirement, dataset: Dataset) -> None:
    """UserError if the run in `base` is not what is needed."""
    for name, wanted in need.config.items():
        found, wanted = record["config"].get(name), json.loads(json.dumps(wanted))
        if record["method"] != need.method or found != wanted:
            raise UserError(f"{base} has {name} {found!r}, but {wanted!r} is needed: "
                            f"train another {need.method}.")
    check_data(base, record, dataset)


def check_data(folder: Path, record: dict, dataset: Dataset) -> None:
    """UserError if the data set is not the one that the run was trained on, to the last byte."""
    if record["data"]["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{folder} was trained on other data than {dataset.name} is now: "
                        "choose another --out, or delete it to train it again.")


def check_kind(method: str, data: str, kind: str | None) -> None:
    """UserError if the method learns from another kind of data. kind None: not known yet."""
    wanted = find(method).Model.data
    if kind is not None and wanted not in ("any", kind):
        raise UserError(f"{data} holds {kind}, but {method} learns from {wanted}.")


def copy_run(source: Path, target: Path) -> None:
    """What loading a run needs, so that the folder of a run that is built on it can be moved."""
    if source.resolve() == target.resolve():
        return
    if (source / "base").exists():
        copy_run(source / "base", target / "base")
    with explained(f"Cannot copy {source} to {make_folder(target)} ({{reason}}).", OSError):
        for name in (WEIGHTS, RECORD):  # the record last: where it stands, the copy is complete
            shutil.copyfile(source / name, target / name)


def judge(dataset: Dataset, folder: Path = Path("runs"), quiet: bool = False) -> Run:
    """The judge of a data set, in `folder`: loaded, or trained now. It knows every speaker."""
    if (origin := whole(dataset.origin)) != dataset.origin:
        dataset = remembered(origin, dataset.count, tuple(data_folders()))
    place = Path(folder) / run_name("judge", dataset.name, {})
    beside = place.parent.parent / place.name  # runs/judge-x serves runs/compare-x, too
    if not (place / RECORD).exists() and (beside / WEIGHTS).exists() \
            and read_record(beside)["data"]["fingerprint"] == dataset.fingerprint:
        place = beside
    if not (place / WEIGHTS).exists() and not quiet:
        print(f"Evaluation needs the judge {place}, which is trained first.", flush=True)
    run = train_run("judge", dataset, {}, place, resume=True, quiet=quiet)
    check_data(place, run.record, dataset)
    return run


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
    sentence = f"{weights} is damaged or of another network ({{reason}}): train the run again."
    with explained(sentence):
        model.load_state_dict(saved["ema"] if saved else load_file(weights))
    model.to(machine.device(), memory_format=torch.channels_last).eval()  # as in training
    return Run(folder, method, model, record)


def read_record(folder: Path) -> dict:
    """config.json of a run. UserError if there is none, or one that cannot be read."""
    with explained(f"{folder} is not a run: there is no {RECORD} in it.", OSError):
        content = (folder / RECORD).read_bytes()
    with explained(f"{folder / RECORD} is damaged or of an older version of nanogen: "
                   "delete the folder and train again."):
        record = json.loads(content)
        find(record["method"])
        record["name"], record["data"]["fingerprint"], record["config"], record["training"]
        return record
