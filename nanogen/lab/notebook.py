"""What the notebooks need beyond the package: its source on the page, runs, images and sounds.

    show(maskgit.reveal_schedule)                 the source that runs, on the page
    run = method_run("flow", objective="ddpm")    loaded if finished, else trained, or trained on
    loss_curve(run, chance=math.log(1024))        "is my loss normal?"
    show_images(images)  gallery(images, titles, columns)  animate(frames)
    listen(clips, titles)  spectrograms(clips, titles)
    play(run)                                     sliders for the settings of its sampler

NANOGEN_RUNS is the folder of the runs, ../runs unless set: on Colab, a folder on a mounted drive
survives a disconnect. NANOGEN_SMOKE=1 is for tests/test_notebooks.py: few data, few samples.
"""

import base64
import html
import inspect
import io
import os
import tempfile
import textwrap
from pathlib import Path

import ipywidgets
import numpy as np
import PIL.Image
import soundfile
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from nanogen.data.datasets import load
from nanogen.lab import plots, recipes, report, runs
from nanogen.lab.sample import sampler_settings
from nanogen.method import find

SMOKE = os.environ.get("NANOGEN_SMOKE") == "1"
RUNS = Path(os.environ.get("NANOGEN_RUNS") or "../runs")
COUNT = 400 if SMOKE else None  # images or sounds to load; None: all of them
DATA, SOUNDS = ("scenes", "voices") if SMOKE else ("cifar10", "fsdd")  # tests download nothing
PLAYER = """<div style="display:inline-block; margin:4px 12px 4px 0; font-size:85%">{title}<br>
<audio controls style="width:210px; height:34px" src="{uri}"></audio></div>"""


def show(*things) -> None:
    """Print the source of functions, methods and classes of the package, with their files."""
    for thing in things:
        place = f"{thing.__module__.replace('.', '/')}.py"
        source = textwrap.dedent(inspect.getsource(thing)).rstrip()
        display(Markdown(f"`{place}`\n\n```python\n{source}\n```"))  # GitHub colors a fence


def method_run(method: str, data: str | None = None, **overrides) -> runs.Run:
    """The run of a method by its recipe. Fields of its Config or of Training in `overrides` are
    part of the run's name: method_run("tokenizer", bottleneck="vq", minutes=3) is
    tokenizer-vq-3min-cifar10, in all notebooks."""
    data = data or (SOUNDS if find(method).Model.data == "sounds" else DATA)
    parts = [method]
    for name, value in overrides.items():
        text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        named = f"{text}min" if name == "minutes" else name + text
        parts.append(text if isinstance(value, str) else named)
    folder = RUNS / "-".join([*parts, data])
    if (folder / runs.WEIGHTS).exists():
        run = runs.load_run(folder)
    else:
        run = runs.train_run(method, load(data, count=COUNT), overrides, folder, resume=True)
    print(f"{folder.name}: {run.record['parameters'] / 1e6:.1f} M parameters, trained for "
          f"{run.record['minutes']:.1f} minutes on {run.record['machine']}")
    if base := run.record.get("requires"):
        print(f"  It requires {base['name']}, which was trained for {base['minutes']:.1f} minutes.")
    return run


def show_images(images, columns: int = 10, scale: int = 2, colors: int = 256) -> None:
    """Show images uint8 (N, H, W, 3) as a grid, each pixel enlarged `scale` times; or a figure.
    A palette of few colors makes them small enough for GitHub to show the notebook."""
    images = plots.grid(images, columns, scale) if isinstance(images, np.ndarray) else images
    display(Image(small_png(images, colors)))


def small_png(image, colors: int) -> bytes:
    """An image or a figure as PNG, with a palette of few colors."""
    if isinstance(image, Figure):
        image = PIL.Image.open(io.BytesIO(plots.png(image))).convert("RGB")
    return plots.png(image.quantize(colors, kmeans=1, dither=0))


def labelled(images, columns, rows, scale: int = 3) -> None:
    """Show images uint8 (N, H, W, 3), row by row, with the names of all columns and rows."""
    columns, rows = list(map(str, columns)), list(map(str, rows))
    sheet, side = plots.grid(images, len(columns), scale), scale * images.shape[1] + 2
    lines = [line for name in rows for line in name.split("\n")]
    left = 8 * max(map(len, lines)) + 10  # pixels for the names
    top = 18 * max(name.count("\n") + 1 for name in columns) + 8
    width, height = left + sheet.width, top + sheet.height
    figure = Figure((width / 80, height / 80), dpi=80)
    axes = figure.add_axes((left / width, 0, sheet.width / width, sheet.height / height))
    axes.imshow(np.asarray(sheet), interpolation="nearest")
    axes.set_xticks(side * (np.arange(len(columns)) + 0.5), columns)
    axes.set_yticks(side * (np.arange(len(rows)) + 0.5), rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=11)
    axes.spines[:].set_visible(False)
    show_images(figure)


def gallery(images, titles, columns: int, wrap: int = 20, colors=None, size: float = 1.25) -> None:
    """Show images uint8 (N, H, W, 3) in rows, each of `size` inches under its title, which is
    broken after about `wrap` characters; colors: of the titles."""
    titles = [textwrap.wrap(title, wrap) for title in titles]
    rows, ratio = -(-len(images) // columns), images[0].shape[0] / images[0].shape[1]
    height = size * ratio + 0.14 * max(map(len, titles)) + 0.1
    figure = Figure((size * columns, rows * height), dpi=80, layout="constrained")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image, interpolation="nearest")
        axes.set_anchor("S")  # the room that is left is above, for the title
        axes.set_title("\n".join(title), fontsize=7, color=colors[i] if colors else "black")
        axes.set_axis_off()
    show_images(figure)


def animate(frames, columns: int = 10, scale: int = 2, milliseconds: int = 150) -> None:
    """Show grids in turn, endlessly; frames: moments, each uint8 (N, H, W, 3).
    An animated PNG, as GitHub and nbconvert show a GIF of a notebook as a line of text."""
    with tempfile.TemporaryDirectory() as folder:
        path = plots.save_gif(list(frames), Path(folder) / "a.png", columns, scale, milliseconds)
        display(Image(path.read_bytes()))


def listen(waveforms, titles: list[str]) -> None:
    """Players side by side, each with its title: waveforms (T,) at 8 kHz in [-1, 1], clipped.
    GitHub shows no players, so show spectrograms beside them."""
    display(players_of(waveforms, titles), raw=True)


def players_of(waveforms, titles: list[str]) -> dict[str, str]:
    """What `listen` displays, by media type."""
    players = []
    for waveform, title in zip(waveforms, titles, strict=True):
        file, clip = io.BytesIO(), np.asarray(waveform, dtype=np.float32).clip(-1, 1)
        soundfile.write(file, clip, 8000, "PCM_16", format="WAV")
        uri = report.data_uri("audio/wav", file.getvalue())
        players.append(PLAYER.format(title=html.escape(title), uri=uri))
    return {"text/html": "".join(players), "text/plain": "to listen to: " + "; ".join(titles)}


def play(run: runs.Run, n: int = 4, **conditions) -> None:
    """Draw n images, clips or sounds. In a kernel, sliders for the numbers among the settings of
    the sampler stand below: each move draws again. Elsewhere, what was drawn first stays.
    conditions: as for `run.sample`, such as label="horse"."""
    kinds, look = sampler_settings(run.model), {"style": {"description_width": "initial"}}
    sliders = {"seed": ipywidgets.IntSlider(0, 0, 20, **look)}
    for name, value in run.record["sampling"].items():
        if value and kinds.get(name) is int:
            sliders[name] = ipywidgets.IntSlider(value, 1, 4 * value, **look)
        elif value and kinds.get(name) is float:
            sliders[name] = ipywidgets.FloatSlider(
                value, min=0, max=3 * value, step=value / 10, **look)

    def drawn() -> list[dict]:
        chosen = {name: slider.value for name, slider in sliders.items()}
        outputs, more = run.sample(n, **conditions | chosen), []
        if run.model.output == "waveforms":
            titles = [str(number + 1) for number in range(n)]
            image, more = plots.spectrograms(outputs, titles, n), [players_of(outputs, titles)]
        else:  # the frames of a clip in a row
            columns = n if outputs.ndim == 4 else outputs.shape[1]
            frames = outputs.reshape(-1, *outputs.shape[-3:])
            image = plots.grid(frames, columns, max(1, 96 // frames.shape[1]))
        return [{"image/png": base64.b64encode(small_png(image, 64)).decode()}, *more]

    shown = [display(part, raw=True, display_id=True) for part in drawn()]

    def moved(_) -> None:
        for place, part in zip(shown, drawn(), strict=True):
            place.update(part, raw=True)

    for name, slider in sliders.items():
        slider.description, slider.continuous_update = name.replace("_", " "), False
        slider.observe(moved, "value")
    box = ipywidgets.VBox(list(sliders.values()))._repr_mimebundle_()
    text = f"Sliders for {', '.join(sliders)}: run this cell in a kernel."
    display(box | {"text/plain": text}, raw=True)


def spectrograms(waveforms, titles: list[str], columns: int = 10) -> None:
    """Log-mel spectrograms of waveforms (T,) at 8 kHz, `columns` in a row, on one scale for all."""
    figure = plots.spectrograms([np.asarray(clip) for clip in waveforms], titles, columns)
    show_images(figure, colors=64)


def loss_curve(run: runs.Run, chance: float) -> None:
    """The loss of a run, beside the loss of a model that has learned nothing (`chance`), and beside
    the curve to expect from the recipe, [[percent of the budget, loss], ...], if it has one."""
    log = report.read_json(run.folder / "log.jsonl")
    title = f"{run.folder.name}: the loss ends at {log[-1]['loss']:.3f}"
    figure, data = plots.loss_plot(log, chance, title), run.record["data"]
    expected = recipes.find_recipe(run.method, data["origin"], data["kind"]).get("expected", {})
    if "curve" in expected and run.folder.name == f"{run.method}-{data['name']}":  # no variant
        percent, loss = np.array(expected["curve"]).T
        figure.axes[0].plot(percent / 100 * log[-1]["step"], loss, color="#d07020", linewidth=4,
                            alpha=0.35, label="to expect")
        figure.axes[0].legend(frameon=False, loc="center right")
    show_images(figure)
