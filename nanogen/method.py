"""The contract of a method (a file in image/ or audio/, omni.py, a judge): all that the lab asks.

    Config         a dataclass of settings, each with a comment; it refuses bad values by name
    Model          Model(config, base), a subclass of Method: it learns (loss) and draws (sample)
    <method>.json  the recipes beside the file: settings for each data set, with measured results

A new method is one file and one word in PATHS. The lab trains, samples, judges and reports it by
the declarations below. From the data set it fills these fields of a Config, where there are any:
`size` (of the images), `classes`, `speakers`; for the judge also `sound` (are they sounds?),
`second` and `second_classes` (another label). `seconds` cuts longer sounds.

Names of tensors, in batches and in conditions:

    images     float (B, 3, H, W) in [-1, 1]
    videos     float (B, T, 3, H, W) in [-1, 1]
    waveforms  float (B, T) in [-1, 1] at 8,000 Hz, and their lengths int64 (B,) in samples
    labels     int64 (B,), a class; speakers   int64 (B,), a voice
    prompts    int64 (B, L), texts as Unicode code points, padded with 0
    sources    an image that is given, like images; black everywhere where there is none
"""

import dataclasses
import importlib
import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

PATHS = """image.pixel_ar image.tokenizer image.token_ar image.maskgit image.var image.mar
    image.flow image.meanflow image.text_image image.video image.personalize audio.wave_ar
    audio.codec audio.audio_lm judge reader listener audio.speech audio.song omni"""
METHODS = {  # name -> module; modules are imported when they are used
    path.rpartition(".")[2]: f"nanogen.{path}" for path in PATHS.split()}


def find(name: str) -> ModuleType:
    """The module of a method, with its `Config` and its `Model`. KeyError for an unknown name."""
    return importlib.import_module(METHODS[name])


class Requirement(NamedTuple):
    """Another run that a model is built on: it is trained first, and passed to Model as `base`."""

    method: str  # such as "tokenizer"
    config: dict  # fields that its Config must have, such as {"bottleneck": "kl", "size": 32}
    recipe: str = "default"  # the recipe to train it by, if it is missing
    name: str = ""  # prefix of its folder; "": the method and its texts, as in tokenizer-kl
    data: str = ""  # its data set; "": that of the run that requires it
    training_only: bool = False  # a finished model works without it (the perceptual network)


class Method(nn.Module):
    """Base class of all models. The class attributes are the declarations that the lab reads."""

    kind = "generator"  # "generator" (has `sample`), "tokenizer" (`encode`, `decode`), or "judge"
    data = "images"  # what it learns from: "images", "sounds" or "videos"; "any": as it comes
    concatenated = False  # learn from all sounds joined end to end and cut into equal rows
    # Inputs of `sample`: name -> class, text, image or sound (a file); "optional text", for one
    # that may be left out.
    conditions: dict[str, str] = {"labels": "class"}
    output = "images"  # what `sample` returns: "images", "videos" or "waveforms"
    exact_likelihood = False  # there is a `log_likelihood(prepared batch)` -> nats (B,)
    samples_to_judge = 1000  # how many samples `evaluate` draws; fewer where each one is slow

    # What `prepare` does, known once the model is built:
    encodes = False  # `prepare` changes the batch: it is called once, before training
    encoding_fields: tuple[str, ...] = ()  # Config fields that change its result, which is kept
    examples: int | None = None  # how many examples it makes (pairs of reflow); None: one for each

    def __init__(self):
        super().__init__()
        # The fraction of the training that has passed. The loop sets it, for a loss that changes.
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    @staticmethod
    def requires(config) -> Requirement | None:
        """The run that a model with this Config is built on, or None."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data set that a batch needs beside the images or sounds."""
        return tuple(self.conditions)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A raw batch -> what `loss` takes. If `encodes`, it is called once for all the data (and
        its mirror images), before training and without gradients."""
        return batch

    def measure(self, data: dict[str, Tensor]) -> None:
        """Look at all the prepared data once, before training: to store a mean and a std, say."""

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """A batch -> (the scalar to minimise, named scalars to log)."""
        raise NotImplementedError

    def known_part(self, images: Tensor, seen: Tensor) -> Tensor:
        """What `sample` takes as `known=` so that these images (B, 3, H, W) stay where bool (H, W)
        `seen` says so; or these sounds (B, T), of which the first (B,) samples stay. Only methods
        that can keep a part of their output have it."""
        raise ValueError("this method cannot keep a part of an image or a sound")

    def sample(self, conditions: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
        """Draw one output for each row of the conditions: {"images": (B, 3, H, W)}, for example.
        Further keyword arguments are the settings of the sampler, such as `steps`; the command line
        offers all of them. A sampler that can show how its outputs come to be takes frames=True and
        then adds "frames", a list of tensors like the output. ValueError for bad settings."""
        raise NotImplementedError

    def freeze(self, **modules: nn.Module | None) -> None:
        """Keep finished models as attributes: self.freeze(tokenizer=tokenizer).
        They are not registered as sub-modules, so they are neither trained nor saved with this
        model, but they move with it to another device."""
        for name, module in modules.items():
            self.__dict__[name] = module  # setattr would register it
            if module is not None:
                self.__dict__.setdefault("frozen", []).append(module.eval().requires_grad_(False))

    def _apply(self, function, recurse: bool = True):  # behind .to(), .cuda(), .half()
        for module in self.__dict__.get("frozen", []):
            module._apply(function, recurse)
        return super()._apply(function, recurse)


# ---- what a Config uses to check itself

def check(config, **rules: tuple[bool, str]) -> None:
    """ValueError for the first broken rule: check(self, width=(self.width > 0, "at least 1")). A
    number that is not finite breaks any rule."""
    for name, (good, wanted) in rules.items():
        value = getattr(config, name, None)
        if isinstance(value, float) and not math.isfinite(value):
            good, wanted = False, "a finite number"
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_numbers(config, **rules: tuple[bool, str]) -> None:
    """`check` for all numbers. Without a rule of its own, an int must be at least 1, a float at
    least 0, and a dropout at most 1."""
    for field in dataclasses.fields(config):
        least, value = {int: 1, float: 0}.get(field.type), getattr(config, field.name)
        if field.name.endswith("dropout"):
            rules.setdefault(field.name, (0 <= value <= 1, "from 0 to 1"))
        elif least is not None:
            rules.setdefault(field.name, (value >= least, f"at least {least}"))
    check(config, **rules)


def check_settings(settings: dict, kinds: dict[str, type]) -> None:
    """`check_numbers` for settings of a sampler, {"steps": 8}, of these types, {"steps": int}."""
    fields = [(name, kinds.get(name)) for name in settings]
    check_numbers(dataclasses.make_dataclass("Settings", fields)(**settings),
                  top_k=(settings.get("top_k", 0) >= 0, "at least 0"),
                  top_p=(0 < settings.get("top_p", 1) <= 1, "above 0 and at most 1"))


def choose(config, **choices: tuple[str, ...]) -> None:
    """ValueError for a text that is none of its choices: choose(self, head=("mse", "flow"))."""
    check(config, **{name: (getattr(config, name) in allowed, f"one of {', '.join(allowed)}")
                     for name, allowed in choices.items()})


class Unused(ValueError):
    """A field was set without effect. `make_config` drops it, if only the recipe has set it."""

    def __init__(self, field: str, when: str):
        super().__init__(f"{field} has no effect {when}: leave it out")
        self.field = field


def unused(config, *names: str, when: str) -> None:
    """`Unused`, a ValueError, for a field with another value than its default."""
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise Unused(field.name, when)
