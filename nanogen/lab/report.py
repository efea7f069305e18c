"""The report: runs as one HTML page that needs no network and no other file.

    python -m nanogen report runs/maskgit-cifar10 runs/flow-cifar10

A table over all runs comes first, then a card for each, with all that lies in its samples/. What is
missing or damaged is said in a sentence. report.html is the template.
"""

import base64
import json
from pathlib import Path

import soundfile
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from PIL import Image

from nanogen import UserError, __version__, files
from nanogen.lab import plots


def write(runs: list[Path], out: Path, title: str = "nanogen report", intro: str = "",
          tables: dict[str, list[dict]] | None = None) -> Path:
    """Write one page about these run folders to the file `out`, and return its path.
    intro: plain text, with an empty line between paragraphs. tables: heading -> rows (dicts column
    -> value), shown after the table over all runs; a value that is a data_uri is shown as an image.
    UserError for a folder that is not a run, and where `out` cannot be written."""
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                        undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"value": value_text, "flat": flat, "groups": groups}
    page = jinja.get_template("report.html").render(
        runs=[read_run(Path(folder)) for folder in runs], title=title, intro=intro,
        tables=tables or {}, version=__version__)
    files.write_text(Path(out), page)
    return Path(out)


def read_run(folder: Path) -> dict:
    """What a run's folder holds, as far as it is there. UserError if the folder is not a run."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run: give a folder that `train` has written.")
    remarks = []
    config, metrics, log = (read_json(folder / name, remarks)
                            for name in ("config.json", "metrics.json", "log.jsonl"))
    curve = any("loss" in line for line in log) and plots.png(plots.loss_plot(log))
    shown = samples(folder / "samples", dict(*config).get("names", {}), remarks)
    return {"folder": folder, "config": dict(*config), "metrics": dict(*metrics), "log": log,
            "curve": curve and data_uri("image/png", curve), "samples": shown, "remarks": remarks}


def read_json(path: Path, remarks: list[str]) -> list[dict]:
    """The dict in a JSON file, or the dicts in the lines of a .jsonl; [] for no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    found = []
    for part in text.splitlines() if text and path.suffix == ".jsonl" else [text or "{}"]:
        try:
            found.append(dict(json.loads(part)))
        except (ValueError, TypeError):
            remarks.append(f"{path.name} is damaged: what cannot be read is left out here.")
    return found


def samples(folder: Path, names: dict, remarks: list[str]) -> list[dict]:
    """Dicts with "name", "uri", "asked": what it shows, in words; and the "width" of images."""
    images, sounds = sorted([*folder.glob("*.png"), *folder.glob("*.gif")]), folder.glob("*.wav")
    asked, shown = conditions(folder / "samples.npz", names, remarks), []
    for path in [*images, *sorted(sounds)]:
        mine = asked[int(path.stem) :][:1] if path.stem.isdigit() else list(dict.fromkeys(asked))
        item = {"name": path.stem, "asked": mine}
        try:
            if path.suffix == ".wav":
                soundfile.info(path)
            else:
                item["width"] = Image.open(path).width
            media = f"{'image' if 'width' in item else 'audio'}/{path.suffix[1:]}"
            shown.append(item | {"uri": data_uri(media, path.read_bytes())})
        except (OSError, RuntimeError):  # UnidentifiedImageError, SoundFileError
            remarks.append(f"{path.name} is damaged, and left out here.")
    return shown


def conditions(path: Path, names: dict, remarks: list[str]) -> list[str]:
    """What each sample in samples.npz was asked to show, such as "three, jackson"."""
    stored, columns = {}, []
    try:
        stored = files.read_npz(path) if path.exists() else {}
    except UserError as error:
        remarks.append(str(error))
    for key in [key for key in ("labels", "speakers", "prompts") if key in stored]:
        known = dict(enumerate([*names[key], "null class"])) if key in names else {}
        columns.append([known.get(value, str(value)) for value in stored[key].tolist()])
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
    short = isinstance(value, float) and not value.is_integer() and not abs(value) >= 1000
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if short else f"{value:,.0f}" if number else str(value)
