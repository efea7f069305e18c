"""Recipes: the settings of each method for each data set, and how they become its Config.

    <method>.json   {"cifar10": {"default": {"training", "config", "sampling", "expected"}, ...}}

The files stand beside the methods. "expected" is what the recipe gave on a named machine.
"""

import dataclasses
import json
import typing
from pathlib import Path

import torch

from nanogen import UserError
from nanogen.data.datasets import Dataset, whole
from nanogen.files import explained
from nanogen.lab import machine
from nanogen.lab.train import Training
from nanogen.method import Requirement, find


def recipes(method: str) -> dict:
    """data set -> recipe name -> {"training", "config", "sampling", "expected"}."""
    path = Path(find(method).__file__).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def find_recipe(method: str, data: str, kind: str, name: str = "default") -> dict:
    """The recipe for a data set. One without its own, or with one for the tour alone, gets
    cifar10's, or fsdd's if it is sounds, or the method's first one."""
    known = recipes(method)
    usual = known.get("fsdd" if kind == "sounds" else "cifar10")
    found = known.get(whole(data), {})
    if not found or (name == "default" and name not in found):  # none, or only that of the tour
        found = usual or next(iter(known.values()), {"default": {}})
    if name not in found:
        raise UserError(f"{method} has no recipe {name!r} for {data}: "
                        f"choose from {', '.join(found)}.")
    return {"config": {}, "training": {}, "sampling": {}} | found[name]


def minutes_here(recipe: dict) -> float | None:
    """About how long a recipe trains on this machine: what it took where it was measured, times the
    ratio of the speeds of the two machines in matrix products of float32. (In bfloat16, two CPUs
    can differ by a factor of 20, but the minutes of a recipe by far less.) None: not measured."""
    expected = recipe.get("expected", {})
    if not expected.get("gflops"):
        return None
    share = recipe["training"]["steps"] / expected["training_steps"]
    return expected["minutes"] * share * expected["gflops"] / machine.speed(torch.float32)


def required_recipe(need: Requirement, data: str, kind: str, recipe: str) -> str:
    """The name of the recipe of a required run. By the recipe "tour", a tokenizer takes "tour", and
    a perceptual network "tour perceptual"; where that does not exist, the requirement's own."""
    name = f"{recipe} {need.recipe}".removesuffix(" default")
    try:
        find_recipe(need.method, data, kind, name)
        return name
    except UserError:
        return need.recipe


def make_config(method: str, settings: dict, overrides: dict, facts: dict) -> tuple:
    """(the method's Config, Training) from what the data says, a recipe, and what the user says.
    UserError for a setting that does not exist, or whose value the Config refuses."""
    kind = find(method).Config
    fields = {field.name for field in dataclasses.fields(kind)}
    values = {k: v for k, v in facts.items() if k in fields} | settings["config"]
    training = dict(settings["training"])
    known = fields | {field.name for field in dataclasses.fields(Training)}
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"{method} has no setting {name!r}: "
                            f"choose from {', '.join(sorted(known))}.")
        (values if name in fields else training)[name] = value
    if overrides.get("minutes") and overrides.get("steps"):
        raise UserError("A budget is either minutes or steps: give one of them.")
    if overrides.get("steps"):
        training["minutes"] = 0.0
    while True:
        try:
            return typed(kind, values, method), typed(Training, training, "training")
        except UserError as error:
            name = getattr(error.__cause__, "field", "")  # of an `Unused`
            if name in overrides or name not in values:
                raise
            del values[name]  # only the recipe has set what has no effect with the overrides


def typed(kind: type, values: dict, owner: str):
    """An instance of a dataclass; a value of the wrong type is refused by name."""
    hints, values = typing.get_type_hints(kind), dict(values)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{owner} has no setting {name!r}.")
        wanted = hints[name]
        if typing.get_origin(wanted) is tuple:
            good = isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
            values[name] = tuple(value) if good else value
        else:
            number = isinstance(value, int) and not isinstance(value, bool)
            good = isinstance(value, wanted) or (wanted is float and number)
        if not good:
            raise UserError(f"{owner}: {name} must be {wanted.__name__}, got {value!r}.")
    with explained(f"{owner} cannot be built like this: {{reason}}.", ValueError):
        return kind(**values)


def facts(dataset: Dataset) -> dict:
    """What a data set says about the fields of a Config: see `nanogen.method`."""
    known = {"sound": dataset.kind == "sounds"}
    if "labels" in dataset.names:
        known["classes"] = dataset.classes("labels")
    if dataset.kind == "sounds":
        known["speakers"] = dataset.classes("speakers")
    else:
        known["size"] = dataset.train[dataset.main].shape[-2]
    second = "speakers" if dataset.kind == "sounds" else "background"  # a judge asks for it, too
    if second in dataset.names and dataset.classes(second) > 1:
        known |= {"second": second, "second_classes": dataset.classes(second)}
    return known
