"""Data sets made by code: drawn or spoken from a seed, once, and kept as <name>.npz.

The columns of one data set come from its own file (scenes.py, prompts.py, voices.py,
utterances.py, songs.py); here they become the arrays of one file, training and test part.
"""

import ast
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from nanogen import UserError
from nanogen.data import drawing, numbers, phonemes, prompts, scenes, songs, utterances, voices
from nanogen.files import fingerprint, writable, write_npz


def made_once(name: str, folders: list[Path]) -> dict[str, np.ndarray]:
    """All of one of MADE, read from the first folder that has <name>.npz; else made and kept.
    The file carries a fingerprint of the code without comments: if it differs, all is made anew."""
    make, total, modules = MADE[name]
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    code = fingerprint(*[ast.unparse(ast.parse(source)) for source in sources])
    for folder in folders:  # what is absent or damaged is made again, in a minute
        with suppress(Exception), np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            if str(file["fingerprint"]) == code:
                return {key: file[key] for key in file.files if key != "fingerprint"}
    count = max(2, total // 10)
    print(f"Making {name}: {total + count:,} examples; a minute or a few, once.", file=sys.stderr)
    arrays = make(total, count)
    for folder in filter(writable, folders):
        with suppress(UserError):  # on a full disk the data serves without being kept
            stamped = arrays | {"fingerprint": np.array(code)}
            write_npz(folder / f"{name}.npz", stamped, compressed=False)
            break
    return arrays


def drawn(make, names: tuple[str, ...]):
    """A function (train count, test count) -> arrays as `as_images` takes them. make: (count, seed,
    is it the test?) -> columns; names: of the classes."""
    def draw(*counts: int) -> dict[str, np.ndarray]:
        arrays = {"class_names": np.array(names)}
        for seed, (part, count) in enumerate(zip(("train", "test"), counts, strict=True)):
            columns = make(count, seed, part == "test")
            arrays |= {f"{part}_{column}": np.array(columns[column]) for column in columns}
        return arrays

    return draw


def recorded(make, speakers: int):
    """A function (train count, test count) -> arrays as `as_sounds` takes them. make: (count, seed,
    speakers) -> columns. The test has a fifth as many speakers, none of them in training. Labels
    are stored as "digits", as in fsdd.npz."""
    def record(train_count: int, test_count: int, speakers: int = speakers, **settings) -> dict:
        train = make(train_count, 0, speakers, **settings)
        test = make(test_count, 1, speakers // 5, **settings)
        test["speaker"] = test["speaker"] + train["speaker"].max() + 1
        clips = train.pop("waveforms") + test.pop("waveforms")
        arrays = {key: np.concatenate([train[key], test[key]]) for key in train}
        arrays["digits"], arrays["speakers"] = arrays.pop("labels"), arrays.pop("speaker")
        return arrays | {
            "waveform": np.round(32768 * np.concatenate(clips)).astype(np.int16),
            "offsets": np.cumsum([0] + [len(clip) for clip in clips]),
            "is_test": np.repeat([False, True], [len(part["labels"]) for part in (train, test)]),
            "speaker_names": np.array([f"voice {i}" for i in range(arrays["speakers"].max() + 1)]),
            "sample_rate": np.array(voices.RATE),
        }

    return record


DRAWING = (scenes, drawing, prompts)
SPEAKING = (voices, phonemes)
MADE = {  # name -> how it is made, how many to learn from, by which modules
    "scenes": (drawn(lambda count, seed, test: scenes.make(count, seed), scenes.THINGS), 50_000,
               DRAWING[:2]),
    "prompts": (drawn(prompts.make, scenes.THINGS), 40_000, DRAWING),
    "clips": (drawn(prompts.make_clips, scenes.THINGS), 6_000, DRAWING),
    "things": (drawn(prompts.make_things, drawing.KINDS), 20_000, DRAWING),
    "subject": (drawn(prompts.make_subject, drawing.KINDS), 5, DRAWING),
    "numbers": (drawn(numbers.make, tuple("0123456789")), 20_000, (*DRAWING, numbers, *SPEAKING)),
    "voices": (recorded(voices.make, 200), 8_000, SPEAKING),
    "utterances": (recorded(utterances.make, 400), 6_000, (utterances, *SPEAKING)),
    "songs": (recorded(songs.make, 100), 2_000, (songs, utterances, *SPEAKING)),
}
