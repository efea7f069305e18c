"""What the notebooks need beyond the package: its source on the page, runs that are trained once, small pictures.

    show(maskgit.reveal_schedule)                   what is read is what runs: notebooks never define it again
    run = chapter_run("flow", objective="ddpm")     a finished run is loaded, an interrupted one goes on, else it is trained
    loss_curve(run, chance=math.log(1024))          "is my loss normal?"
    picture(images), animate(frames)                grids, figures, and how pictures come to be
    listen(waveforms, titles)                       players; what they show of sounds, for eyes: spectrograms(waveforms, titles)

NANOGEN_RUNS is the folder of the runs, ../runs unless set: on Colab, a folder on a mounted drive survives a disconnect.
NANOGEN_SMOKE=1 shrinks data and trainings to seconds, to test that a notebook runs. What it prints then means nothing.
"""

import html
import inspect
import io
import json
import os
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import soundfile
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure
from PIL.Image import Dither
from PIL.Image import Image as Picture

from nanogen.data.datasets import data_folder
from nanogen.data.folders import SAMPLE_RATE
from nanogen.lab import pictures
from nanogen.lab.pictures import grid, loss_plot, png, save_gif
from nanogen.lab.report import data_uri
from nanogen.lab.runs import AUDIO, CHAPTERS, Run, find_recipe, load_run, run_name, train_run

SMOKE = os.environ.get("NANOGEN_SMOKE") == "1"
RUNS = Path(os.environ.get("NANOGEN_RUNS") or "../runs")
COUNT = 400 if SMOKE else None  # pictures or sounds to load; None: all of them
DATA = "scenes" if SMOKE and not (data_folder() / "cifar10.npz").exists() else "cifar10"  # a test downloads nothing
SOUNDS = "voices" if SMOKE and not (data_folder() / "fsdd.npz").exists() else "fsdd"  # of the chapters in audio/


def show(*things) -> None:
    """Print the source of functions, methods and classes of the package, with the file it stands in."""
    for thing in things:
        place = f"{thing.__module__.replace('.', '/')}.py"
        source = textwrap.dedent(inspect.getsource(thing)).rstrip()
        display(Markdown(f"`{place}`\n\n```python\n{source}\n```"))  # GitHub colours a fence


def chapter_run(chapter: str, data: str | None = None, **overrides) -> Run:
    """The run of a chapter with its recipe: loaded if finished, else trained, or trained on. Says how long and on what.

    overrides: fields of the chapter's Config or of Training. They are part of the run's name, so that two notebooks that
    ask for the same find the same: chapter_run("tokenizer", bottleneck="vq", minutes=3) is tokenizer-vq-3min-cifar10.
    """
    data = data or (SOUNDS if chapter in AUDIO else DATA)
    folder = RUNS / "-".join([chapter, *(_short(name, value) for name, value in overrides.items()), data])
    if (folder / "model.safetensors").exists():
        run = load_run(folder)
    elif SMOKE:
        run = _tiny_run(chapter, data, overrides, folder)
    else:
        run = train_run(chapter, data, overrides, folder, resume=True)
    print(f"{folder.name}: {run.config['parameters'] / 1e6:.1f} M parameters, trained for {run.config['minutes']:.1f} minutes "
          f"on {run.config['machine']}")
    if "base" in run.config:
        base = folder / run.config["base"]["path"]
        minutes = json.loads((base / "config.json").read_text())["minutes"]
        print(f"  It stands on {base.name}, which was trained for {minutes:.1f} minutes.")
    return run


def _short(name: str, value) -> str:
    """A field in a run's name: text as it is, minutes as "3min", widths as "64x128", anything else with the field's name."""
    if isinstance(value, str):
        return value
    if name == "minutes":
        return f"{value:g}min"
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{name}{value}"


def _tiny_run(chapter: str, data: str, overrides: dict, folder: Path) -> Run:
    """Three steps of a narrow network on a few pictures; before it, what it would train for minutes to stand on."""
    tiny = {"steps": 3, "batch_size": 16, "compile": False}
    widths = {"flow": (32, 32, 32), "codec": (8, 8, 8)}.get(chapter)
    narrow = {"width": 96, "depth": 2, "crop": 1024} | ({"widths": widths} if widths else {})
    eye = RUNS / f"eye-{data}"
    if chapter == "tokenizer" and not (eye / "model.safetensors").exists():
        train_run("judge", data, tiny, eye, "eye", resume=True, count=COUNT, quiet=True)
    module = CHAPTERS[chapter]
    fields = {name: value for name, value in overrides.items() if hasattr(module.Config, name)}
    if hasattr(module, "stands_on") and (needs := module.stands_on(module.Config(**fields))):
        place = RUNS / run_name(needs[0], data, needs[1])
        if not (place / "model.safetensors").exists():
            _tiny_run(needs[0], data, needs[1], place)
    tiny |= {name: value for name, value in narrow.items() if hasattr(module.Config, name)}
    overrides = {name: value for name, value in overrides.items() if name != "minutes"}
    return train_run(chapter, data, tiny | overrides, folder, resume=True, count=COUNT, quiet=True)


def picture(what: np.ndarray | Picture | Figure, columns: int = 10, scale: int = 2) -> None:
    """Show pictures uint8 (N, H, W, 3) as a grid, each pixel enlarged `scale` times; or one picture, or a figure.

    Grids in 256 colours, chosen for each: a third of the bytes, so that a notebook stays light enough for GitHub to show.
    """
    if isinstance(what, np.ndarray):
        what = grid(what, columns, scale).quantize(256, kmeans=1, dither=Dither.NONE)
    display(Image(png(what)))


def animate(frames: list[np.ndarray] | np.ndarray, columns: int = 10, scale: int = 2, milliseconds: int = 150) -> None:
    """Show grids one after the other, again and again: a list or array of moments, each uint8 (N, H, W, 3).

    An animated PNG, not a GIF: every browser plays both, but GitHub and nbconvert show a notebook's GIF as a line of text.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = save_gif(list(frames), Path(folder) / "process.png", columns, scale, milliseconds)
        display(Image(path.read_bytes()))


def listen(waveforms, titles: list[str], rate: int = SAMPLE_RATE) -> None:
    """Players side by side, each with its title: waveforms (T,) in [-1, 1], kept in the notebook as WAV of 16 bits.

    What is louder than 1 is cut off, as a loudspeaker does. Jupyter plays them; GitHub shows no players, which is why
    spectrograms stand beside them.
    """
    players = []
    for waveform, title in zip(waveforms, titles, strict=True):
        file = io.BytesIO()
        soundfile.write(file, np.asarray(waveform, dtype=np.float32).clip(-1, 1), rate, "PCM_16", format="WAV")
        players.append('<div style="display:inline-block; margin:4px 12px 4px 0"><div style="font-size:85%">' + html.escape(title)
                       + '</div><audio controls style="width:210px; height:34px" src="'
                       + data_uri("audio/wav", file.getvalue()) + '"></audio></div>')
    display({"text/html": "".join(players), "text/plain": "to listen to: " + "; ".join(titles)}, raw=True)


def spectrograms(waveforms, titles: list[str], columns: int = 10) -> None:
    """Log-mel spectrograms of waveforms (T,) at 8 kHz, `columns` in a row, on the same scales; pitch upwards."""
    figure = png(pictures.spectrograms([np.asarray(waveform) for waveform in waveforms], titles, columns))
    colours = PIL.Image.open(io.BytesIO(figure)).convert("RGB")  # a third of the bytes of its true colours
    picture(colours.quantize(64, kmeans=1, dither=Dither.NONE))


def loss_curve(run: Run, chance: float) -> None:
    """The run's loss beside `chance`, the loss of a model that has learned nothing, and beside the curve to expect: the
    recipe's "expected" / "curve", a list of [percent of the budget, loss], where there is one."""
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    figure = loss_plot(log, chance, f"{run.folder.name}: the loss ends at {log[-1]['loss']:.3f}")
    expected = find_recipe(run.chapter, run.data).get("expected", {}).get("curve", [])
    if expected and run.folder.name == f"{run.chapter}-{run.data}":  # a variant of the recipe has another curve
        percent, loss = np.array(expected).T
        axes = figure.axes[0]
        axes.plot(percent / 100 * log[-1]["minutes"], loss, color="#d07020", linewidth=4, alpha=0.35, label="to expect")
        axes.legend(frameon=False, loc="center right")
    picture(figure)
