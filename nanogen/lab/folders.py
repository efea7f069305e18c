"""The folders of runs: their names, what stands in them, and whether it fits.

    runs/<method>-<data>/   config.json  model.safetensors (EMA weights)  state.pt (to resume)
                            log.jsonl  metrics.json  samples/  base/ (its tokenizer, if any)
                            lock (while it is trained)

A run that is built on another one keeps a copy of it in base/, so that its folder can be moved.
"""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

from nanogen import UserError
from nanogen.data.datasets import Dataset, kind_of
from nanogen.files import explained, make_folder
from nanogen.method import Requirement, find

WEIGHTS, RECORD = "model.safetensors", "config.json"


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


# ---- may a training go on

def begun(folder: Path, method: str, data: str, overrides: dict, resume: bool) -> dict | None:
    """The record of the run in this folder, if it may go on like this; None: the folder is free.
    A finished run stays what it is: its learning rate has fallen to 0."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out.")
    if not (folder / RECORD).exists():
        return None
    if not resume:
        raise UserError(f"{folder} exists already: --resume goes on with it, --out DIR starts "
                        "another run, or delete it.")
    record = read_record(folder)
    there = record["data"]  # a folder of files may have a new name: `check_data` follows
    if record["method"] != method or (kind_of(there["origin"]) and there["name"] != data):
        raise UserError(f"{folder} is a {record['method']} on {there['name']}, not a {method} on "
                        f"{data}: choose another --out.")
    if (folder / WEIGHTS).exists():
        state, kept = "is finished", record["training"].keys() - {"compile", "save_every"}
    else:
        state, kept = "was begun", ("optimizer", "seed", "precision")
    fixed = record["config"] | {name: record["training"].get(name, "") for name in kept}
    for name, value in overrides.items():
        if name in fixed and fixed[name] != json.loads(json.dumps(value)):  # JSON has no tuples
            raise UserError(f"{folder} {state} with {name} {fixed[name]!r}, not {value!r}: "
                            "--out new/RUN starts another run.")
    return record


# ---- the folder of a run, and of the run that it requires

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
        return place_of(need.name, dataset, folder.parent)
    return folder.parent / run_name(need.method, need.data or dataset.name, need.config)


def place_of(prefix: str, dataset: Dataset, *parents: Path) -> Path:
    """The run PREFIX-DATA of exactly this data in one of these folders; the data may have had
    another name. Else the place for it in the first folder."""
    for parent in parents:
        for path in sorted(parent.glob(f"{prefix}-*/{RECORD}")):
            with contextlib.suppress(UserError):  # damaged
                record = read_record(path.parent)
                usual = record["name"].startswith(f"{prefix}-{record['data']['name']}")
                if usual and record["data"]["fingerprint"] == dataset.fingerprint:  # no variant
                    return path.parent
    return parents[0] / f"{prefix}-{dataset.name}"


def check_data(folder: Path, record: dict, dataset: Dataset) -> None:
    """UserError if the data set is not the one that the run was trained on, to the last byte."""
    if record["data"]["fingerprint"] != dataset.fingerprint:
        raise UserError(f"{folder} was trained on other data than {dataset.name} is now: "
                        "put that data back, or train anew with --out new/RUN.")


def copy_run(source: Path, target: Path) -> None:
    """What loading a run needs, so that the folder of a run that is built on it can be moved."""
    if source.resolve() == target.resolve():
        return
    if (source / "base").exists():
        copy_run(source / "base", target / "base")
    with explained(f"Cannot copy {source} to {make_folder(target)} ({{reason}}).", OSError):
        for name in (WEIGHTS, RECORD):  # the record last: where it stands, the copy is complete
            shutil.copyfile(source / name, target / name)
