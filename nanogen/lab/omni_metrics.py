"""Metrics of a model of texts, images and sounds: does the same number arrive, all six ways?

The reader looks at an image: the number on its sign, or how many things it shows. The listener
writes down the digit of a sound. A caption is read word by word. Test examples go the same way, to
show what reader and listener miss themselves; sounds also as the codec copies them. By chance, a
number is right in 0.1.
"""

import itertools

import numpy as np

from nanogen.data import numbers
from nanogen.data.datasets import Dataset
from nanogen.data.phonemes import LANGUAGES
from nanogen.lab.dubbing import listen
from nanogen.lab.prepare import every
from nanogen.lab.prompt_metrics import read
from nanogen.lab.runs import Run
from nanogen.lab.sample import cut, sample, write_samples
from nanogen.lab.speech_metrics import codec_copies
from nanogen.listener import Listener
from nanogen.reader import Reader

SIGNS = np.stack([numbers.large_sign(digit) for digit in range(10)]) / 255  # (10, 14, 10, 3)
GIVEN = {"text": "prompts", "image": "sources", "sound": "voices"}  # part -> condition


def read_sign(image: np.ndarray) -> int:
    """The digit whose sign differs least from the lower left corner of an image (32, 32, 3); -1
    where all differ much."""
    height, width = SIGNS.shape[1:3]
    errors = np.square(image[-height:, :width] / 255 - SIGNS).mean(axis=(1, 2, 3))
    return int(errors.argmin()) if errors.min() < 0.06 else -1


def seen(reader: Reader, images: np.ndarray) -> list[int]:
    """The number that each image (N, 32, 32, 3) shows, on a sign or as 2 to 4 things; -1: none."""
    counts = [len(things) for things in read(reader, images)[0]]
    counts = [count if 2 <= count <= 4 else -1 for count in counts]
    return [count if sign < 0 else sign
            for sign, count in zip(map(read_sign, images), counts, strict=True)]


def heard(listener: Listener, clips: list[np.ndarray]) -> list[int]:
    """The one digit of each clip (T,), plus 10 times the number of its language; -1: none."""
    return [words[0] if len(words) == 1 else -1 for words in listen(listener, clips)[0]]


def digit(words: list[int]) -> np.ndarray:
    """Of words as `heard` gives them, the digit; -1: none."""
    return np.where(np.array(words) < 0, -1, np.array(words) % 10)


def evaluate_numbers(run: Run, dataset: Dataset, reader: Reader, listener: Listener, n: int,
                     seed: int, settings: dict) -> dict:
    """The fraction of numbers that arrive, for each pair of parts, on n held-out combinations.
    The language that training kept apart from images has rows of its own, and so has the way from
    sound to image by a text."""
    rows = every(n, len(dataset.test["images"]))
    test = {name: [values[i] for i in rows] for name, values in dataset.test.items()}
    clips = [np.trim_zeros(clip, "b").astype(np.float32) / 32768 for clip in test["clips"]]
    wanted, language = np.array(test["labels"]), np.array(test["language"])
    separate, learned = run.model.config.separate, run.model.config.parts.split("+")
    apart = np.array(LANGUAGES)[language] == separate
    truth = {"text": test["prompts"], "image": test["images"], "sound": clips}
    result = {"samples": len(rows),
              "image_real": np.mean(seen(reader, np.stack(test["images"])) == wanted)}
    for name, sounds in (("real", clips), ("codec", codec_copies(run.model.codec, clips))):
        result[f"sound_{name}"] = np.mean(digit(heard(listener, sounds)) == wanted)

    def draw(source: str, given: list, target: str) -> tuple[dict, np.ndarray]:
        drawn = sample(run, len(rows), {GIVEN[source]: given}, seed, batch_size=50,
                       **settings | {"ask": target})
        if target == "image":
            return drawn, np.array(seen(reader, drawn["images"]))
        if target == "text":
            return drawn, np.array([numbers.number_in(text) for text in drawn["thoughts"]])
        return drawn, np.array(heard(listener, cut(drawn)))

    def note(name: str, right: np.ndarray, crossed: bool) -> None:
        crossed = apart & crossed  # a sound of this language to an image
        for title, chosen in ((name, ~crossed), (f"{name}, {separate}", crossed)):
            if chosen.any():
                result[title] = right[chosen].mean().item()

    for source, target in itertools.permutations(learned, 2):
        drawn, found = draw(source, truth[source], target)
        if target == "sound":
            if source == "text":
                result["language_right"] = np.mean(found // 10 == language).item()
            found = digit(found)
        note(f"{source} to {target}", found == wanted, (source, target) == ("sound", "image"))
        write_samples(drawn, run, run.folder / "samples" / f"{source}-to-{target}")
        if (source, target) == ("sound", "text") and "image" in learned:
            _, found = draw("text", list(drawn["thoughts"]), "image")
            note("sound to text to image", found == wanted, True)
    return result
