"""The report: runs as one HTML page that needs nothing else, neither a network nor the files beside it.

    python -m nanogen report runs/maskgit-cifar10 runs/flow-cifar10

At the top a table over all runs, then a card for each: the facts, the loss, the metrics, the samples, how they come
to be, and players for sound. Pictures and sounds travel inside the page. What a run does not have yet, or what is
damaged, is said in words: a run stopped half-way has its page, too.
"""

import base64
import html
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nanogen import UserError, __version__
from nanogen.lab import pictures

CAPTIONS = {"grid": "Samples", "process": "How they come to be, from the first step to the last",
            "spectrograms": "Spectrograms: loudness by frequency (upwards) and time"}
MOST_SOUNDS = 24  # players for one run: each second of speech adds about 20 kB to the page


@dataclass
class Run:
    """What a run's folder holds, and what is wrong with it."""

    folder: Path
    config: dict
    log: list[dict]  # one dict per line of log.jsonl
    metrics: dict  # name -> number, or group -> metrics
    remarks: list[str]  # what is damaged, in words

    @property
    def name(self) -> str:
        chapter, data = self.config.get("chapter"), self.config.get("data")
        return f"{chapter} on {Path(str(data)).name}" if chapter and data else self.folder.name

    def number(self, name: str) -> float | None:
        """What metrics.json, config.json or the log's last line has under this name, if it is a number."""
        for source in (self.metrics, self.config, self.log[-1] if self.log else {}):
            if isinstance(source.get(name), int | float) and math.isfinite(source[name]):
                return source[name]
        return None


class Html(str):
    """Text that is markup already, and is not escaped again."""


def write(runs: list[Path], out: Path, title: str = "nanogen report", intro: str = "",
          tables: dict[str, list[dict]] | None = None) -> Path:
    """Write one page about these run folders to the file `out`, and return its path.

    intro: plain text, with an empty line between paragraphs. tables: heading -> rows, each a dict column -> value, shown
    after the table over all runs. UserError for a folder that is no run, and where `out` cannot be written.
    """
    found = [read_run(Path(folder)) for folder in runs]
    tables = {"All runs": [_summary(run, f"run-{i}") for i, run in enumerate(found)]} | (tables or {})
    body = [f"<p>{_text(part)}</p>" for part in intro.split("\n\n") if part.strip()]
    for heading, rows in tables.items():
        body += [f"<section><h2>{_text(heading)}</h2>{_table(rows)}</section>"] if rows else []
    body += [_card(run, f"run-{i}") for i, run in enumerate(found)]
    page = PAGE.format(title=_text(title), style=STYLE, body="\n".join(body), version=__version__)
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)  # all or nothing
    except OSError as error:
        raise UserError(f"Cannot write the report to {out} ({error}): choose another place.") from error
    return out


# ---- reading


def read_run(folder: Path) -> Run:
    """A run's folder, as far as it is there and whole. UserError if it is no run at all."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run (it has no config.json): give a folder written by `train`.")
    remarks, log = [], []
    config, metrics = (_read_json(folder / name, remarks) for name in ("config.json", "metrics.json"))
    if (folder / "log.jsonl").is_file():
        for line in (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                log.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                remarks.append("log.jsonl has a damaged line, left out here: was the run killed as it wrote?")
    return Run(folder, config, log, metrics, list(dict.fromkeys(remarks)))


def _read_json(path: Path, remarks: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        remarks.append(f"{path.name} is damaged, and left out here.")
        return {}


def flat(values: dict, group: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a / b": 1}."""
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{group}{key} / ") if isinstance(value, dict) else {f"{group}{key}": value}
    return result


def _arrays(run: Run, *names: str) -> list[np.ndarray]:
    """These arrays of samples.npz, or none at all if one is missing."""
    try:
        with np.load(run.folder / "samples" / "samples.npz") as stored:
            return [stored[name] for name in names]
    except Exception:  # a damaged archive fails in many ways, and labels are not worth a page
        return []


# ---- writing


def _summary(run: Run, anchor: str) -> dict:
    """The run's row in the table over all."""
    distance, floor, ceiling = (run.number(f"fd_nano{end}") for end in ("", "_floor", "_ceiling"))
    marks = [f"{name} {_value(x)}" for name, x in (("floor", floor), ("ceiling", ceiling)) if x is not None]
    if distance is not None and marks:
        distance = Html(f"{_value(distance)}<small>{' · '.join(marks)}</small>")
    return {
        "run": Html(f'<a href="#{anchor}">{_text(run.folder.name)}</a>'),
        "minutes": _minutes(run),
        "parameters": run.number("parameters"),
        "FD-nano (less is better)": distance,
        "class accuracy": run.number("class_accuracy"),
        "speaker accuracy": run.number("speaker_accuracy"),
        "seconds per picture": run.number("seconds_per_picture"),
        "seconds per second of sound": run.number("seconds_per_second_of_sound"),
        "kbit/s": run.number("kbps"), "SI-SDR (dB)": run.number("si_sdr"), "STOI": run.number("stoi"),
    }


def _minutes(run: Run) -> float | None:
    minutes = run.log[-1].get("minutes") if run.log else None
    return float(f"{minutes:.3g}") if isinstance(minutes, int | float) else run.number("minutes")


def _card(run: Run, anchor: str) -> str:
    """Everything about one run."""
    base = run.config.get("base")
    facts = {name: run.config.get(name) for name in ("chapter", "data", "machine")}
    facts |= {
        "seed": flat(run.config).get("training / seed"),
        "stands on": base.get("path") if isinstance(base, dict) else base, "minutes": _minutes(run),
        "steps": run.number("step"), "examples per second": run.number("examples_per_second"),
        "parameters": run.number("parameters"),
    }
    items = [f"<div><dt>{_text(k)}</dt><dd>{_value(v)}</dd></div>" for k, v in facts.items() if v is not None]
    rows = [{"metric": key, "value": value} for key, value in run.metrics.items() if not isinstance(value, dict)]
    parts = [
        f'<article id="{anchor}"><h2>{_text(run.name)}</h2><p class="path">{_text(run.folder)}</p>',
        f"<dl>{''.join(items)}</dl>",
        *(f'<p class="remark">{_text(remark)}</p>' for remark in run.remarks),
        f'<div class="pair">{_loss(run)}',
        f"<div>{_table(rows) if rows else _missing('No metrics yet: `evaluate` measures them.')}</div></div>",
        f'<div class="pair">{_samples(run)}</div>',
    ]
    for rows in _groups(run.metrics):
        parts.append(f"<details><summary>{_text(rows[0]['of'])} and the like</summary>{_table(rows)}</details>")
    settings = flat({key: run.config.get(key) for key in ("config", "training")})
    rows = [{"setting": key, "value": value} for key, value in settings.items() if value is not None]
    if rows:
        parts.append(f"<details><summary>Settings</summary>{_table(rows)}</details>")
    return "\n".join(parts) + "</article>"


def _groups(metrics: dict, prefix: str = "") -> list[list[dict]]:
    """The groups inside the metrics, a row each; those that begin with the same metric share a table."""
    tables = {}
    for group, values in metrics.items():
        if isinstance(values, dict):
            numbers = {name: value for name, value in values.items() if not isinstance(value, dict)}
            row = {"of": prefix + group} | numbers
            for rows in [[row] if numbers else [], *_groups(values, f"{prefix}{group}: ")]:
                if rows:
                    tables.setdefault(list(rows[0])[1], []).extend(rows)
    return list(tables.values())


def _loss(run: Run) -> str:
    if not any(isinstance(line.get("loss"), int | float) for line in run.log):
        return _missing("No loss curve: the log is empty.")
    curve = pictures.png(pictures.loss_plot(run.log))
    return _figure(curve, "image/png", f"Loss, at the end {_value(run.number('loss'))}.")


def _samples(run: Run) -> str:
    """Grid and process first, then the other pictures and the sounds that lie in samples/."""
    folder = run.folder / "samples"
    images = sorted(path for ending in ("png", "gif") for path in folder.glob(f"*.{ending}"))
    images.sort(key=lambda path: list(CAPTIONS).index(path.stem) if path.stem in CAPTIONS else len(CAPTIONS))
    parts = []
    for path in images:
        try:
            content = path.read_bytes()
            size = Image.open(io.BytesIO(content)).size
        except OSError:
            parts.append(_missing(f"{path.name} is damaged, and left out here."))
            continue
        caption = CAPTIONS.get(path.stem, path.stem.replace("_", " "))
        kind = "image/gif" if path.suffix == ".gif" else "image/png"
        rows = _row_names(run, size) if path.stem in CAPTIONS else []
        parts.append(_figure(content, kind, caption, size, rows))
    sounds = sorted(folder.glob("*.wav"))
    labels, speakers = ((_arrays(run, name) or [[]])[0] for name in ("labels", "speakers"))
    for path in sounds[:MOST_SOUNDS]:
        said, index = path.stem.replace("_", " "), int(path.stem) if path.stem.isdigit() else len(labels)
        said += f": {_class_name(run, labels[index])}" if index < len(labels) else ""
        said += f", {_name(run, 'speaker_names', speakers[index])}" if index < len(speakers) else ""
        source = data_uri("audio/wav", path.read_bytes())
        parts.append(f'<figure class="sound"><figcaption>{_text(said)}</figcaption>')
        parts.append(f'<audio controls preload="none" src="{source}"></audio></figure>')
    if len(sounds) > MOST_SOUNDS:
        parts.append(_missing(f"{len(sounds) - MOST_SOUNDS} more sounds lie in {folder}."))
    return "".join(parts) or _missing("No samples yet: `sample` draws them.")


def _row_names(run: Run, size: tuple[int, int]) -> list[str]:
    """The class of each row of the grid, if every row holds one: from the labels and the grid's shape."""
    stored = _arrays(run, "images", "labels")
    if not stored or stored[0].ndim != 4 or stored[1].shape != stored[0].shape[:1]:
        return []
    images, labels = stored
    columns = round(math.sqrt(len(images) * size[0] / size[1] * images.shape[1] / images.shape[2]))
    if columns < 1 or len(images) % columns:
        return []
    rows = labels.reshape(-1, columns)
    return [_class_name(run, row[0]) for row in rows] if (rows == rows[:, :1]).all() else []


def _class_name(run: Run, label: int) -> str:
    names = run.config.get("class_names") or []
    return "no label" if names and label == len(names) else _name(run, "class_names", label)


def _name(run: Run, kind: str, number: int) -> str:
    names = run.config.get(kind) or []
    return str(names[number]) if 0 <= number < len(names) else str(number)


def _figure(content: bytes, kind: str, caption: str, size: tuple[int, int] | None = None, rows=()) -> str:
    """size: (width, height) of a picture that may be enlarged by whole factors; rows: names beside it."""
    enlarged = f' class="pixels" style="width:{max(1, 480 // size[0]) * size[0]}px"' if size else ""
    image = f'<img alt="{_text(caption)}" src="{data_uri(kind, content)}"{enlarged}>'
    names = "".join(f"<span>{_text(name)}</span>" for name in rows)
    names = f'<div class="names">{names}</div>' if rows else ""
    text = f"<figcaption>{_text(caption)}</figcaption>"
    return f'<figure><div class="frame">{names}{image}</div>{text}</figure>'


def data_uri(kind: str, content: bytes) -> str:
    """A file as an address, to stand in the page itself. kind: its media type, such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(rows: list[dict]) -> str:
    """Dicts column -> value as a table; a column without any value is left out."""
    names = dict.fromkeys(name for row in rows for name in row)  # in order of appearance, each once
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    lines = ["".join(f"<th>{_text(name)}</th>" for name in names)]
    lines += ["".join(f"<td>{_value(row.get(name))}</td>" for name in names) for row in rows]
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _value(value) -> str:
    """A number as short as it stays honest: four digits, thousands apart; anything else as text."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return f"{int(value):,}"
    return value if isinstance(value, Html) else _text(value)


def _text(value) -> str:
    return html.escape(str(value))


def _missing(sentence: str) -> str:
    return f'<p class="missing">{_text(sentence)}</p>'


STYLE = """
:root { color-scheme: light dark; --ground: #f6f6f3; --card: #fff; --ink: #1d2126; --soft: #666d76;
        --line: #e1e2de; --accent: #2563a8; --warn: #9a5b00 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --card: #1e2125; --ink: #e7e8ea; --soft: #9aa2ac; --line: #33383e;
          --accent: #7fb2ea; --warn: #e5b25d } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
header, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 2.5rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .6rem }
p { max-width: 44rem; margin: .5rem 0 }
a { color: var(--accent) }
small, figcaption, footer, .path, .about, .missing { color: var(--soft); font-size: .85rem }
section, article { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
                   padding: 1.25rem; margin: 1.5rem 0 }
.path { margin: -.5rem 0 1rem; overflow-wrap: anywhere }
.remark { color: var(--warn) }
.missing { border: 1px dashed var(--line); border-radius: 6px; padding: .6rem .8rem }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0 0 1.25rem }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.pair { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
        align-items: start; margin-top: 1.25rem }
.pair > * { min-width: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { color: var(--soft); font-size: .8rem; font-weight: 500; vertical-align: bottom }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line) }
th:not(:first-child), td:not(:first-child) { text-align: right; padding: .35rem 0 .35rem .9rem }
td small { display: block; white-space: nowrap }
figure { margin: 0 }
figcaption { margin-top: .4rem }
.frame { display: flex; background: #fff; border-radius: 6px; padding: 6px }
.frame img { max-width: 100%; min-width: 0; height: auto; display: block; align-self: start }
.pixels { image-rendering: pixelated }
.names { display: flex; flex-direction: column; padding-right: 8px; color: #444; font-size: .75rem }
.names span { flex: 1 0 0; min-height: 0; line-height: 1; display: flex; align-items: center;
              justify-content: end }
.sound audio { width: 100%; display: block }
details { margin-top: 1.25rem }
summary { cursor: pointer; color: var(--soft); font-size: .85rem }
footer { padding-bottom: 3rem }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1>
<p class="about">nanogen teaches how machines generate images and sound: break the data into units, and chain
them. Every method here is trained from scratch, on one backbone and with one training loop.</p>
</header>
<main>
{body}
</main>
<footer>Written by nanogen {version}. The page holds all it shows: keep it, mail it, read it offline.</footer>
</body></html>
"""
