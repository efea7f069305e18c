"""Metrics of a model of texts, images and sounds: does the same number arrive, all six ways?

The reader looks at an image: the number on its sign, or how many things it shows. The listener
writes down the digit of a sound. A caption is read word by word. Test examples go the same way, to
show what reader and listener miss themselves.
"""

import itertools

import numpy as np

from nanogen.data import numbers
from nanogen.data.datasets import Dataset
from nanogen.lab.dubbing import listen
from nanogen.lab.prepare import every
from nanogen.lab.prompt_metrics import read
from nanogen.lab.runs import Run
from nanogen.lab.sample import cut, sample, write_samples
from nanogen.listener import Listener
from nanogen.reader import Reader, read_sign

GIVEN = {"text": "prompts", "image": "sources", "sound": "voices"}  # part -> condition


def seen(reader: Reader, images: np.ndarray) -> list[int]:
    """The number that each image (N, 32, 32, 3) shows; -1: none."""
    signs = [read_sign(image) for image in images]
    counts = [len(things) for things in read(reader, images)[0]]
    return [int(sign) if sign.isdecimal() else count if not sign and count > 1 else -1
            for sign, count in zip(signs, counts, strict=True)]


def heard(listener: Listener, clips: list[np.ndarray]) -> list[int]:
    """The one digit of each clip (T,), plus 10 times the number of its language; -1: none."""
    return [words[0] if len(words) == 1 else -1 for words in listen(listener, clips)[0]]


def evaluate_numbers(run: Run, dataset: Dataset, reader: Reader, listener: Listener, n: int,
                     seed: int, settings: dict) -> dict:
    """The fraction of numbers that arrive, for each pair of parts, on n held-out combinations.
    The language that training kept apart from images has rows of its own, and so has the way from
    sound to image by a text."""
    rows = every(n, len(dataset.test["images"]))
    test = {name: [values[i] for i in rows] for name, values in dataset.test.items()}
    clips = [np.trim_zeros(clip, "b").astype(np.float32) / 32768 for clip in test["clips"]]
    wanted, language = np.array(test["number"]), np.array(test["language"])
    separate, learned = run.model.config.separate, run.model.config.parts.split()
    apart = language == numbers.NAMES.index(separate) if separate else language < 0
    truth = {"text": test["prompts"], "image": test["images"], "sound": clips}
    result = {"samples": len(rows),
              "image_real": np.mean(seen(reader, np.stack(test["images"])) == wanted),
              "sound_real": np.mean(heard(listener, clips) == 10 * language + wanted)}

    def draw(source: str, given: list, target: str) -> tuple[dict, np.ndarray]:
        drawn = sample(run, len(rows), {GIVEN[source]: given}, seed, batch_size=50,
                       **settings | {"ask": target})
        if target == "image":
            return drawn, np.array(seen(reader, drawn["images"]))
        if target == "text":
            return drawn, np.array([numbers.number_in(text) for text in drawn["thoughts"]])
        return drawn, np.array(heard(listener, cut(drawn)))

    def note(name: str, right: np.ndarray) -> None:
        sounds = "sound" in name and "image" in name
        result[name] = right[~apart].mean().item() if sounds else right.mean().item()
        if sounds and apart.any():
            result[f"{name}, {separate}"] = right[apart].mean().item()

    for source, target in itertools.permutations(learned, 2):
        drawn, found = draw(source, truth[source], target)
        if target == "sound":
            if source == "text":
                result["language_right"] = np.mean(found // 10 == language).item()
            found = np.where(found < 0, -1, found % 10)
        note(f"{source} to {target}", found == wanted)
        write_samples(drawn, run, run.folder / "samples" / f"{source}-to-{target}")
        if (source, target) == ("sound", "text") and "image" in learned:
            _, found = draw("text", list(drawn["thoughts"]), "image")
            note("sound to text to image", found == wanted)
    return result
