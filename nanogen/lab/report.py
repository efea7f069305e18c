"""The report: runs as one HTML page that needs no network and no other file.

    python -m nanogen report runs/maskgit-cifar10 runs/flow-cifar10

First comes what each run drew, then a table over all runs, then a card for each, with all that lies
in its samples/. What is missing is said in a sentence. report.html is the template.
"""

import base64
import json
from pathlib import Path

import numpy as np
import soundfile
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from PIL import Image

from nanogen import UserError, __version__, files
from nanogen.lab import plots
from nanogen.lab.prepare import every
from nanogen.method import METHODS, find


def write(runs: list[Path], out: Path, title: str = "nanogen report", intro: str = "",
          tables: dict[str, list[dict]] | None = None,
          stories: dict[str, str] | None = None) -> Path:
    """Write one page about these run folders to the file `out`, and return its path.
    intro: plain text below what was drawn, with an empty line between paragraphs. tables: heading
    -> rows (dicts column -> value), shown after the table over all runs. stories: name of a run's
    folder -> a sentence beside what it drew. UserError for what cannot be read or written."""
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                        undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"value": value_text, "flat": flat, "groups": groups}
    found = [read_run(folder) for folder in runs]
    for run in found:
        run["story"] = (stories or {}).get(run["folder"].name, run["story"])
    page = jinja.get_template("report.html").render(
        runs=found, title=title, intro=intro, tables=tables or {}, version=__version__)
    files.write_text(out, page)
    return out


def read_run(folder: Path) -> dict:
    """What a run's folder holds, as far as it is there. UserError if the folder is not a run."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run: give a folder that `train` has written.")
    [config], metrics, log = (read_json(folder / name)
                              for name in ("config.json", "metrics.json", "log.jsonl"))
    curve = any("loss" in line for line in log) and plots.png(plots.loss_plot(log))
    path = folder / "samples" / "samples.npz"
    drawn = files.read_npz(path) if path.exists() else {}
    shown = samples(folder / "samples", conditions(drawn, config.get("names", {})))
    module = find(config["method"]) if config.get("method") in METHODS else None
    return {"folder": folder, "config": config, "metrics": dict(*metrics), "log": log,
            "curve": curve and data_uri("image/png", curve), "samples": shown,
            "story": module.__doc__.splitlines()[0] if module else "",
            "first": first_look(folder / "samples", config, drawn, shown)}


def first_look(folder: Path, config: dict, drawn: dict, shown: list[dict]) -> dict:
    """What stands for a run at the top of the page: rows of "images" and the labels in "columns",
    or "sounds" with their spectrograms; {} if there is nothing. folder: samples/ of the run. drawn:
    what its samples.npz holds. shown: what `samples` finds."""
    found, size = {item["name"]: item for item in shown}, config.get("config", {}).get("size")
    if "prompts" in drawn and {"images", "videos"} & drawn.keys():
        few = every(5, len(drawn["prompts"]))
        row = drawn["images"][few] if "images" in drawn else [
            np.concatenate(clip[::3], axis=1) for clip in drawn["videos"][few]]  # frames in turn
        return {"columns": drawn["prompts"][few].tolist(), "images": [list(map(image_uri, row))]}
    if "images" in drawn:
        columns, row = zip(*one_each(drawn, "images", config.get("names", {})), strict=True)
        return {"columns": columns, "images": [list(map(image_uri, row))]}
    if config.get("method") == "tokenizer" and size and "grid" in found:
        grid, cell = np.asarray(Image.open(folder / "grid.png").convert("RGB")), 2 * size + 2
        return {"images": [[image_uri(grid[i : i + 2 * size : 2, j : j + 2 * size : 2])
                            for j in range(2, grid.shape[1], cell)] for i in (2, cell + 2)]}
    sounds = [name for name in found if name.isdigit() or name.endswith("_original")]
    chosen = [sounds[i] for i in every(3, len(sounds))]
    if config.get("method") == "codec":  # beside each original the copy of the highest bit rate
        copies = [sorted((name for name in found if name.startswith(f"{original[:3]}_codec_")),
                         key=lambda name: float(name.split("_")[2]))[-1:] for original in chosen]
        chosen = [name for pair in zip(chosen, copies, strict=True) for name in (pair[0], *pair[1])]
    clips = [soundfile.read(folder / f"{name}.wav", dtype="float32")[0] for name in chosen]
    images = [image_uri(plots.spectrogram(clip, max(map(len, clips)))) for clip in clips]
    sounds = [found[name] | {"image": image} for name, image in zip(chosen, images, strict=True)]
    return {"sounds": sounds} if sounds else {}


def one_each(examples: dict, main: str, names: dict) -> list[tuple]:
    """What a row of ten examples shows, the same for all rows: (a class's name, its first example
    or None), in the order of the classes, or more of each if there are few. examples:
    columns of one length, `main` and mostly "labels". names: {"labels": names of the classes}."""
    known = names.get("labels") or [""]
    labels = examples.get("labels", np.zeros(len(examples[main]), int))
    chosen = every(10, len(known))
    numbers = {label: iter(np.flatnonzero(labels == label)) for label in chosen}
    found = [(label, next(numbers[label], None))
             for label in chosen for _ in range(10 // len(chosen))]
    return [(known[label], None if at is None else examples[main][at]) for label, at in found]


def image_uri(image: np.ndarray | None) -> str | None:
    """An image uint8 (H, W, 3) as an address that contains it."""
    return None if image is None else data_uri("image/png", plots.png(Image.fromarray(image)))


def read_json(path: Path) -> list[dict]:
    """The dict in a JSON file, or the dicts in the lines of a .jsonl; [] for no file."""
    if not path.exists():
        return []
    with files.explained(f"{path} is damaged ({{reason}}): delete it."):
        text = path.read_text(encoding="utf-8")
        return [json.loads(part) for part in (
            text.splitlines() if path.suffix == ".jsonl" else [text])]


def samples(folder: Path, asked: list[str]) -> list[dict]:
    """Dicts with "name", "uri", "asked": what it shows, in words; and the "width" of images.
    asked: what each sample was asked to show."""
    images, sounds = sorted([*folder.glob("*.png"), *folder.glob("*.gif")]), folder.glob("*.wav")
    shown = []
    for path in [*images, *sorted(sounds)]:
        mine = asked[int(path.stem) :][:1] if path.stem.isdigit() else list(dict.fromkeys(asked))
        media = f"{'audio' if path.suffix == '.wav' else 'image'}/{path.suffix[1:]}"
        item = {"name": path.stem, "asked": mine, "uri": data_uri(media, path.read_bytes())}
        if path.suffix != ".wav":
            with files.explained(f"{path} is damaged ({{reason}}): delete it."):
                item["width"] = Image.open(path).width
        shown.append(item)
    return shown


def conditions(drawn: dict, names: dict) -> list[str]:
    """What each sample in samples.npz was asked to show, such as "three, jackson"."""
    columns = []
    for key in [key for key in ("labels", "speakers", "prompts") if key in drawn]:
        known = dict(enumerate([*names[key], "null class"])) if key in names else {}
        columns.append([known.get(value, str(value)) for value in drawn[key].tolist()])
    return [", ".join(row) for row in zip(*columns, strict=True)]


def groups(metrics: dict, prefix: str = "") -> list[list[dict]]:
    """The dicts inside the metrics as rows; those that begin with the same metric share a table."""
    tables = {}
    for group, values in metrics.items():
        if isinstance(values, dict):
            row = {name: value for name, value in values.items() if not isinstance(value, dict)}
            inner = groups(values, f"{prefix}{group}: ")
            for rows in [[{"of": prefix + group} | row]] * bool(row) + inner:
                tables.setdefault(list(rows[0])[1], []).extend(rows)
    return list(tables.values())


def flat(values: dict, group: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a / b": 1}."""
    out = {}
    for key, value in values.items():
        out |= flat(value, f"{group}{key} / ") if isinstance(value, dict) else {group + key: value}
    return out


def data_uri(media: str, content: bytes) -> str:
    """A file as an address that contains it. media: its type, such as image/png."""
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def value_text(value) -> str:
    """A number with four digits and thousands apart; anything else as it is."""
    short = isinstance(value, float) and not value.is_integer() and abs(value) < 1000
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if short else f"{value:,.0f}" if number else str(value)
