"""The tour: five chapters, tiny, on drawn pictures, in a few minutes; and the list of all that there is.

    python -m nanogen          -> runs/tour/index.html

Nothing is downloaded. The budgets are the recipes named "tour": enough to see each idea work, not to judge it.
"""

import time
from pathlib import Path

from nanogen.lab import machine
from nanogen.lab.evaluate import evaluate, show, table
from nanogen.lab.report import write
from nanogen.lab.runs import CHAPTERS, recipes, train_run

SHOWN = ("minutes", "psnr", "bits_per_dim", "fd_nano", "fd_nano_floor", "fd_nano_ceiling", "class_accuracy",
         "seconds_per_picture")
PICTURES = 20_000  # of the drawn set, which the tour makes for itself
HEADINGS = {"fd_nano": "FD-nano", "class_accuracy": "class accuracy", "psnr": "PSNR", "bits_per_dim": "bits/dim",
            "test_accuracy": "test accuracy", "seconds_per_picture": "s/picture", "speaker_accuracy": "speaker accuracy",
            "bits_per_sample": "bits/sample", "si_sdr": "SI-SDR", "stoi": "STOI", "seconds_per_second_of_sound": "s/s of sound"}
STORY = {
    "pixel_ar": "Everything is a chain: a picture drawn number by number, 8x8 pixels, because each pixel costs a pass.",
    "tokenizer": "Units that mean more: 64 tokens a picture. Rows of originals and of their reconstructions.",
    "token_ar": "The same chain, over tokens: row by row, 64 passes.",
    "maskgit": "Breaking the order: all tokens at once, the surest first, 12 passes.",
    "flow": "No units at all: noise carried to a picture along nearly straight lines, 16 passes.",
}


def tour(folder: Path, count: int = PICTURES) -> Path:
    """Train, sample and judge the chapters of STORY, and write one page. A tour that was stopped goes on where it was."""
    start = time.monotonic()
    print(f"The tour: {len(STORY)} chapters on {count:,} drawn pictures; about 6 minutes on two CPU cores. {machine.describe()}")
    for name, recipe in (("judge", "tour"), ("eye", "tour eye")):
        train_run("judge", "scenes", {}, folder / f"{name}-scenes", recipe, resume=True, count=count)
    runs, rows = [], []
    for chapter, story in STORY.items():
        print(f"\n{chapter}: {story}")
        run = train_run(chapter, "scenes", {}, folder / f"{chapter}-scenes", "tour", resume=True, count=count)
        numbers = evaluate(run, n=300, count=count)
        rows.append({"chapter": chapter} | {name: numbers[name] for name in SHOWN if name in numbers})
        runs.append(run.folder)
    print("\n" + table(rows))
    minutes = (time.monotonic() - start) / 60
    intro = (f"{len(STORY)} chapters, trained from nothing in {minutes:.1f} minutes on {machine.describe()}, on {count:,} "
             "pictures drawn by code. " + " ".join(f"{chapter}: {story}" for chapter, story in STORY.items()))
    page = write(runs, folder / "index.html", title="The nanogen tour", intro=intro)
    print(f"\nThe tour took {minutes:.1f} minutes. Open {page}")
    return page


def list_chapters() -> str:
    """Chapters, data sets, recipes, what each stands on, and the numbers that each recipe gave."""
    lines = [f"{name:10} {module.__doc__.splitlines()[0]}" for name, module in CHAPTERS.items()]
    data = ("Data: cifar10, scenes (drawn by code), fsdd (spoken digits), voices (spoken by code), or a folder with pictures or "
            "sounds, one sub-folder per class.")
    return "\n".join([*lines, "", data, "", table(recipe_rows())])


def recipe_rows() -> list[dict]:
    """One dict per recipe, with what it was measured to give."""
    rows = []
    for chapter, module in CHAPTERS.items():
        for data, by_name in recipes(chapter).items():
            for name, recipe in by_name.items():
                if "tour" in name:
                    continue
                measured = recipe.get("expected", {})
                stands_on = getattr(module, "stands_on", None)
                base = stands_on(module.Config(**recipe["config"])) if stands_on else None
                rows.append({"chapter": chapter, "data": data, "recipe": name, "minutes": recipe["training"]["minutes"],
                             "stands on": " ".join([base[0], *(f"({kind})" for kind in base[1].values())]) if base else "-"}
                            | {heading: show(measured[key]) if key in measured else "-" for key, heading in HEADINGS.items()})
    return rows


def markdown() -> str:
    """The same as a table for README.md."""
    rows = recipe_rows()
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])] + [" | ".join(str(v) for v in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
