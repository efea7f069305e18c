"""Several methods side by side: the tour, the comparison, and the list of all there is.

    python -m nanogen                                        -> runs/tour/index.html
    python -m nanogen compare --data cifar10 --minutes 5     -> runs/compare-cifar10/index.html
    python -m nanogen list

The tour trains fourteen methods for half a minute to two minutes each, by the recipes named "tour":
small networks on small images, clips and voices, all made by code. It shows each idea at work.
The comparison gives every way to make an image (or a sound) of a class the same data and the same
minutes. Both go on where they were stopped.
"""

import itertools
import time
from pathlib import Path

from nanogen import UserError, files
from nanogen.data.datasets import KINDS, Dataset, kind_of, load
from nanogen.lab import machine, report
from nanogen.lab.evaluate import evaluate, show, table
from nanogen.lab.folders import run_name
from nanogen.lab.recipes import find_recipe, make_config, minutes_here, recipes
from nanogen.lab.runs import Run, train_run
from nanogen.method import METHODS, find

SIZES = {"scenes": 12_000, "voices": 2_000, "things": 3_000, "prompts": 4_000, "clips": 600,
         "subject": 5, "utterances": 600, "songs": 600}  # of the data sets of the tour
STORY = {  # what the tour trains, in this order, and what it says of each
    "pixel_ar": "An image as a chain of color values. Each pixel costs a pass, so it has only 8x8.",
    "tokenizer": "An image as 16 tokens, each the index of one of 1,024 codes.",
    "token_ar": "The same chain over tokens, row by row: 16 passes.",
    "maskgit": "Tokens in any order: several at once, the surest first, in 8 passes.",
    "var": "A thumbnail first, then scale by scale: 5 passes.",
    "mar": "Continuous tokens: patches of pixels, each drawn by a small flow head, in 8 passes.",
    "flow": "No tokens: noise is carried to an image along nearly straight lines, in 16 passes.",
    "text_image": "Images from texts, and edited by them. It works out sums before it draws.",
    "video": "Clips of eight frames, all drawn at once.",
    "personalize": "Five images teach the model of texts a new word, by small additions to it.",
    "codec": "A sound as 62.5 frames a second of a few tokens each. Digits, before and after.",
    "audio_lm": "A chain of those tokens: the model speaks a digit in a given voice.",
    "speech": "Digits in three languages, in the voice of a clip: what follows it is filled in.",
    "song": "Words and a melody are composed as symbols, then sung to strings.",
}
VARIANTS = {"mar": [{"head": head} for head in ("mse", "diffusion", "flow")],  # all are compared
            "audio_lm": [{"pattern": name} for name in ("delay", "flat", "parallel", "latents")]}
COLUMNS = {  # of the tables of the tour and the comparison: metric -> heading
    "parameters": "parameters", "minutes": "minutes", "required_minutes": "base's minutes",
    "seconds_per_image": "s/image", "seconds_per_second_of_sound": "s/s of sound",
    "psnr": "PSNR", "stoi": "STOI", "fd_nano": "FD-nano", "fd_nano_floor": "floor",
    "class_accuracy": "class accuracy", "speaker_accuracy": "speakers right",
    "precision": "precision", "recall": "recall",
    "looks / background": "background right", "looks / color": "color right",
    "background": "background right", "subject": "subject recognised",
    "words_right": "words right", "cents": "cents off",
}
NOTE = """After longer trainings, the order of the methods may be another one. Tokenizers are
trained for the same minutes once more and shared; a base's minutes include the network of the
perceptual loss. pixel_ar draws fewer pixels. The base of audio_lm is a codec."""


def tour(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    """Train, sample and judge the methods of STORY, and write one page about them. sizes: how many
    examples of each data set to learn from."""
    start = time.monotonic()
    print(f"The tour: {len(STORY)} methods on {sizes['scenes']:,} drawn images of 16x16 pixels and "
          f"other small data. It takes about 15 minutes on two CPU cores with AVX512, up to three "
          f"times as long on older ones. {machine.describe()}")
    data = {method: next(name for name, known in recipes(method).items() if "tour" in known)
            for method in STORY}
    sets = {name: load(name, count=sizes[name]) for name in dict.fromkeys(data.values())}
    if "prompts" in sets:
        sets["things"] = load("things", count=sizes["things"])  # for the reader
    for judge in ("judge", "listener", "reader"):
        for name in recipes(judge).keys() & sets.keys():
            train_run(judge, sets[name], {}, folder / f"{judge}-{name}", "tour", resume=True)
    rows, runs, stories = [], [], {}
    for method, story in STORY.items():
        print(f"\n{method}: {story}")
        dataset = sets[data[method]]
        place = folder / f"{method}-{dataset.name}"
        run = train_run(method, dataset, {}, place, "tour", resume=True)
        slow = method == "codec" or "prompts" in run.model.conditions  # codec: at eight bit rates
        rows.append(row_of(method, run, evaluate(run, 20 if slow else 300, dataset)))
        runs.append(run.folder)
        stories[run.folder.name] = story
    minutes = (time.monotonic() - start) / 60
    print(f"\n{table(rows)}\n\nThe tour took {minutes:.1f} minutes.")
    intro = (f"{len(STORY)} methods, trained from nothing in {minutes:.0f} minutes on "
             f"{machine.describe()}, on drawings and voices that are made by code. So short a "
             "training shows how a method works, not how well: README.md has longer ones.")
    page = report.write(runs, folder / "index.html", "The nanogen tour", intro, stories=stories)
    print(f"Open {page}")
    return page


def compare(data: str | Path | Dataset, minutes: float, out: Path, n: int = 500) -> list[dict]:
    """Train every method that draws images (or sounds) of a class for `minutes`, judge n samples of
    each, write index.html and table.md to `out`, and return the rows of the table.
    What is trained already is not trained again. UserError if `out` has runs of other minutes."""
    if n < 10 or not 0 < minutes < float("inf"):
        raise UserError(f"compare needs at least 10 samples and some minutes, got {n} and "
                        f"{minutes:g}.")
    dataset = data if isinstance(data, Dataset) else load(data)
    if dataset.kind == "videos" or "words" in dataset.train or dataset.origin == "all":
        raise UserError(f"compare needs images, or sounds of one class each: {dataset.name} holds "
                        f"other {dataset.kind}.")
    names = compared(dataset.main)
    title = f"{len(names)} methods on {dataset.name}, {minutes:g} minutes each"
    print(f"{title}, on {machine.describe()} -> {out}")
    rows, runs = [], []
    for name, (method, fields) in names.items():
        print(f"\n{name}")
        run = train_run(method, dataset, fields, out / run_name(method, dataset.name, fields),
                        resume=True, budget={"minutes": minutes})
        rows.append(row_of(name, run, evaluate(run, n, dataset)))
        runs.append(run.folder)
    print("\n" + table(rows))
    text = f"{title}, on {machine.describe()}.\n\n```\n{table(rows)}\n```\n\n{NOTE}\n"
    files.write_text(out / "table.md", text)
    print(report.write(runs, out / "index.html", title, NOTE, {"Like for like": rows}))
    return rows


def row_of(name: str, run: Run, metrics: dict) -> dict:
    """A method's row in the table."""
    metrics = run.record | report.flat(metrics)
    return {"method": name} | {heading: metrics[metric] for metric, heading in COLUMNS.items()
                               if metric in metrics}


def compared(output: str) -> dict[str, tuple[str, dict]]:
    """Every method that draws "images", or "waveforms", for labels, and for speakers if it knows
    them: name -> (method, fields of its Config)."""
    models = {method: find(method).Model for method in METHODS}
    return {", ".join([method, *fields.values()]): (method, fields)
            for method, model in models.items() for fields in VARIANTS.get(method, [{}])
            if model.kind == "generator" and model.output == output
            and "labels" in model.conditions and model.conditions.keys() <= {"labels", "speakers"}}


IMAGE_METRICS = {"fd_nano": "FD-nano", "class_accuracy": "class accuracy", "psnr": "PSNR",
                 "bits_per_dim": "bits/dim", "test_accuracy": "test accuracy",
                 "seconds_per_image": "s/image"}
SOUND_METRICS = {"fd_nano": "FD-nano", "class_accuracy": "digits right",
                 "speaker_accuracy": "speakers right", "stoi": "STOI", "si_sdr": "SI-SDR",
                 "bits_per_sample": "bits/sample", "test_accuracy": "test accuracy",
                 "seconds_per_second_of_sound": "s/s of sound"}
PROMPT_METRICS = {"looks / things": "kind and color", "relation / relation": "relation",
                  "sign / sign": "sign", "sum / sign": "sum", "many / count": "number",
                  "edits / all": "edit", "thing": "thing in clip", "direction": "direction",
                  "subject": "subject", "others": "other things", "count_accuracy": "count"}
SPEECH_METRICS = {"words_right": "words right", "words_right_codec": "of codec copies",
                  "words_right_real": "of recordings", "voice_error": "voice error",
                  "voice_error_codec": "voices of codec copies",
                  "voice_error_real": "voices of recordings",
                  "at 0.7 times the length / words_right": "0.7 times as long",
                  "at 1.4 times the length / words_right": "1.4 times as long",
                  "cents": "cents off", "within_50_cents": "notes right"}
OMNI_METRICS = {f"{given} to {asked}": f"{given} to {asked}"
                for given, asked in itertools.permutations(("text", "image", "sound"), 2)}
OMNI_METRICS |= {"sound to text to image": "sound to text to image"}
TABLES = {"images": IMAGE_METRICS, "sounds": SOUND_METRICS, "prompts": PROMPT_METRICS,
          "speech": SPEECH_METRICS, "omni": OMNI_METRICS}


def list_methods() -> str:
    """Methods, data sets, recipes, what each requires, and the metrics and losses that it gave."""
    lines = [f"{name:10} {find(name).__doc__.splitlines()[0]}" for name in METHODS]
    data = (f"Data: {', '.join(KINDS)}, or a folder with images or sounds, one sub-folder for each "
            "class.")
    return "\n\n".join(["\n".join(lines), data, *recipe_tables(here=True), loss_table()])


def recipe_tables(here: bool = False) -> list[str]:
    """The measured recipes, as in README.md; here: all recipes, with the minutes that they take on
    this machine, by its speed in matrix products."""
    return [table(recipe_rows(kind, here)) for kind in TABLES]


def recipe_rows(kind: str, here: bool = False) -> list[dict]:
    """A row for each recipe of a table, one of TABLES, with the metrics that it gave."""
    every = [(method, data, name) for method in METHODS for data, known in recipes(method).items()
             if table_of(method, data) == kind for name in known if "tour" not in name]
    rows = []
    for method, data, name in every:
        recipe = find_recipe(method, data, kind, name)
        expected = report.flat(recipe.get("expected", {}))
        config, training = make_config(method, recipe, {}, {})
        required, need = "-", find(method).Model.requires(config)
        if need:
            texts = [f"({text})" for text in need.config.values() if isinstance(text, str)]
            required = " ".join([need.name or need.method, *texts])
        row = {"method": method, "data": data, "recipe": name, "steps": training.steps,
               "minutes": short(expected.get("minutes")), "requires": required}
        if here:
            row["minutes here"] = short(minutes_here(recipe))
        found = {heading: show(expected.get(metric, "-"))
                 for metric, heading in TABLES[kind].items()}
        if here or set(found.values()) != {"-"}:
            rows.append(row | found | {"judge": expected.get("judge", "-")[:4]})
    return rows


def loss_table() -> str:
    """The loss to expect after so many percent of a default recipe, and that of a network that has
    learned nothing ("chance")."""
    rows = []
    for method, (data, known) in ((m, pair) for m in METHODS for pair in recipes(m).items()):
        expected = known.get("default", {}).get("expected", {})
        if curve := dict(expected.get("curve", [])):
            losses = {f"{percent}%": f"{curve[percent]:.3g}" for percent in (1, 10, 50, 100)}
            rows.append({"method": method, "data": data,
                         "chance": show(expected.get("chance", "-"))} | losses)
    return table(rows)


def table_of(method: str, data: str) -> str:
    """Which of TABLES has the recipes of this method on this data."""
    if method == "omni":
        return method
    prompted = method in ("reader", "listener") or "prompts" in find(method).Model.conditions
    return ("speech" if kind_of(data) == "sounds" else "prompts") if prompted else kind_of(data)


def short(minutes: float | None) -> str:
    """Minutes to two digits, never with an exponent; "-" where they are not measured."""
    return f"{float(f'{minutes:.2g}'):g}" if minutes else "-"
