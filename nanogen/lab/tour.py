"""The tour: the chapters, tiny, on pictures and voices made by code, in minutes; and the list of all that there is.

    python -m nanogen          -> runs/tour/index.html

Nothing is downloaded. The budgets are the recipes named "tour": enough to see each idea work, not to judge it.
"""

import time
from pathlib import Path

from nanogen.image import var
from nanogen.lab import machine
from nanogen.lab.evaluate import evaluate, show, table
from nanogen.lab.report import write
from nanogen.lab.runs import AUDIO, CHAPTERS, recipes, train_run

PICTURES, CLIPS = 20_000, 2_000  # of the sets made by code, which the tour makes for itself
SHOWN = ("minutes", "psnr", "bits_per_dim", "stoi", "fd_nano", "fd_nano_floor", "fd_nano_ceiling", "class_accuracy",
         "seconds_per_picture", "seconds_per_second_of_sound")
BENEATH = (("judge", "judge", "scenes", "tour", {}), ("judge", "eye", "scenes", "tour eye", {}),  # what the chapters need:
           ("tokenizer", "tokenizer-multiscale", "scenes", "tour", var.stands_on(var.Config())[1]),
           ("judge", "judge", "voices", "tour", {}))  # chapter, name of the run, data, recipe, fields
STORY = {
    "pixel_ar": "Everything is a chain: a picture drawn number by number, 8x8 pixels, because each pixel costs a pass.",
    "tokenizer": "Units that mean more: 64 tokens a picture. Rows of originals and of their reconstructions.",
    "token_ar": "The same chain, over tokens: row by row, 64 passes.",
    "maskgit": "Breaking the order: all tokens at once, the surest first, 12 passes.",
    "var": "Breaking it again: a thumbnail first, then scale by scale, 6 passes.",
    "mar": "Tokens without a vocabulary: patches of pixels, each drawn by a tiny flow on top of the Transformer, 12 passes.",
    "flow": "No units at all: noise carried to a picture along nearly straight lines, 16 passes.",
    "meanflow": "The same in one pass: the average velocity, learned.",
    "codec": "Units of sound: 62.5 frames a second, a few words each. Digits of a synthetic voice, there and back.",
    "audio_lm": "A chain of those words: the model speaks a digit in a voice.",
}


def tour(folder: Path, pictures: int = PICTURES, clips: int = CLIPS) -> Path:
    """Train, sample and judge the chapters of STORY, and write one page. A tour that was stopped goes on where it was."""
    start = time.monotonic()
    count = {"scenes": pictures, "voices": clips}
    print(f"The tour: {len(STORY)} chapters on {pictures:,} drawn pictures and {clips:,} spoken digits; about 10 minutes on two "
          f"CPU cores. {machine.describe()}")
    for chapter, name, data, recipe, fields in BENEATH:
        train_run(chapter, data, fields, folder / f"{name}-{data}", recipe, resume=True, count=count[data])
    runs, rows = [], []
    for chapter, story in STORY.items():
        print(f"\n{chapter}: {story}")
        data = "voices" if chapter in AUDIO else "scenes"
        run = train_run(chapter, data, {}, folder / f"{chapter}-{data}", "tour", resume=True, count=count[data])
        n = 60 if chapter == "codec" else 300  # each clip goes through three codecs at eight rates
        numbers = evaluate(run, n=n, count=count[data])
        rows.append({"chapter": chapter} | {name: numbers[name] for name in SHOWN if name in numbers})
        runs.append(run.folder)
    print("\n" + table(rows))
    minutes = (time.monotonic() - start) / 60
    intro = (f"{len(STORY)} chapters, trained from nothing in {minutes:.1f} minutes on {machine.describe()}, on {pictures:,} "
             f"pictures and {clips:,} spoken digits, all made by code.\n\n"
             + "\n\n".join(f"{chapter}: {story}" for chapter, story in STORY.items()))
    page = write(runs, folder / "index.html", title="The nanogen tour", intro=intro)
    print(f"\nThe tour took {minutes:.1f} minutes. Open {page}")
    return page


# What the table of recipes shows, and under which heading: for chapters of pictures, and for those of sound
PICTURE_NUMBERS = {"fd_nano": "FD-nano", "class_accuracy": "class accuracy", "psnr": "PSNR", "bits_per_dim": "bits/dim",
                   "test_accuracy": "test accuracy", "seconds_per_picture": "s/picture"}
SOUND_NUMBERS = {"fd_nano": "FD-nano", "class_accuracy": "digits right", "speaker_accuracy": "speakers right", "stoi": "STOI",
                 "si_sdr": "SI-SDR", "bits_per_sample": "bits/sample", "test_accuracy": "test accuracy",
                 "seconds_per_second_of_sound": "s/s of sound"}


def list_chapters() -> str:
    """Chapters, data sets, recipes, what each stands on, and the numbers that each recipe gave."""
    lines = [f"{name:10} {module.__doc__.splitlines()[0]}" for name, module in CHAPTERS.items()]
    data = ("Data: cifar10, scenes (drawn by code), fsdd (spoken digits), voices (spoken by code), or a folder with pictures or "
            "sounds, one sub-folder per class.")
    return "\n".join([*lines, "", data, "", table(recipe_rows(sound=False)), "", table(recipe_rows(sound=True))])


def recipe_rows(sound: bool) -> list[dict]:
    """One dict per recipe, for pictures or for sound, with what it was measured to give."""
    rows = []
    for chapter, module in CHAPTERS.items():
        for data, by_name in recipes(chapter).items():
            for name, recipe in by_name.items():
                if "tour" in name or sound != (data in ("fsdd", "voices")):
                    continue
                measured, training = recipe.get("expected", {}), recipe["training"]
                stands_on = getattr(module, "stands_on", None)
                base = stands_on(module.Config(**recipe["config"])) if stands_on else None
                budget = f"{training['steps']} steps" if "steps" in training else f"{training['minutes']:g} min"
                rows.append({"chapter": chapter, "data": data, "recipe": name, "budget": budget,
                             "stands on": " ".join([base[0], *(f"({kind})" for kind in base[1].values())]) if base else "-"}
                            | {heading: show(measured[key]) if key in measured else "-"
                               for key, heading in (SOUND_NUMBERS if sound else PICTURE_NUMBERS).items()})
    return rows


def markdown() -> str:
    """The same as two tables for README.md."""
    tables = []
    for rows in (recipe_rows(sound=False), recipe_rows(sound=True)):
        lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
        lines += [" | ".join(str(v) for v in row.values()) for row in rows]
        tables.append("\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(tables)
