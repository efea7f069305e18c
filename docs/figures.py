"""The pictures of README: several runs side by side, and a map of the methods.

    python docs/figures.py runs/tour/*-scenes runs/tour/*-voices

    methods.png, sounds.png   a row for each run on images or sounds, a column for each label
    map.png                   the methods by unit, order and loss: it needs no run
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from nanogen import UserError, files
from nanogen.lab.evaluate import apply
from nanogen.lab.plots import grid, png, spectrogram, to_uint8
from nanogen.lab.prepare import pad, to_tensor
from nanogen.lab.report import one_each
from nanogen.lab.runs import Run, load_run
from nanogen.method import METHODS

PIXELS, WAVE = np.arange(256).reshape(16, 16), np.tile(np.arange(48), (16, 1))
NOISE, DISC = np.random.default_rng(0).random((16, 16)), np.hypot(*np.mgrid[-6:10, -8:8]) < 5
MAP = [  # a chapter and its idea; a method, its unit, order, loss, passes, likelihood, drawing
    ("A  Everything can be a chain", "Predict the next unit. Tokens make the chain short."),
    ("pixel_ar", "pixel", "row by row", "cross-entropy", "1,024", "yes", [PIXELS]),
    ("wave_ar", "sample of sound", "in time", "cross-entropy", "8,000 a second", "yes", [WAVE]),
    ("token_ar", "discrete token", "row by row", "cross-entropy", "64", "of the tokens",
     [PIXELS[:8, :8]]),
    ("audio_lm", "discrete token", "frame by frame,\n4 codes (delayed)", "cross-entropy",
     "66 a second", "of the tokens", [np.add.outer(np.arange(4), np.arange(12))]),
    ("B  Break the order", "Sample many tokens in one pass: fewer passes."),
    ("maskgit", "discrete token", "any order", "cross-entropy", "12", "no", [NOISE[:8, :8]]),
    ("var", "discrete token", "from coarse to\nfine scales", "cross-entropy", "6 (1+1+1+3)",
     "of the tokens", [np.full((side, side), step) for step, side in enumerate((1, 2, 4, 8))]),
    ("C  Continuous tokens", "No codebook, no rounding; but squared error gives blurred averages."),
    ("mar (mse)", "continuous token", "any order", "squared error", "12", "no", [NOISE[8:, :8]]),
    ("D  A head that samples them", "The Transformer describes a token; a small flow samples it."),
    ("mar", "continuous token", "any order", "flow matching", "12 + head", "no", [NOISE[8:, :8]]),
    ("E  Flow", "Noise becomes the whole image: no tokens, no order."),
    ("flow", "whole image", "all at once", "flow matching", "16", "by an ODE",
     [(1 - t) * NOISE + t * DISC for t in (0, 0.6, 1)]),
    ("meanflow", "whole image", "all at once", "average velocity", "1", "no", [NOISE, DISC]),
    ("F  Follow a prompt", "The same flow reads a text; a clip has one more axis, time."),
    ("text_image", "whole image", "all at once", "flow matching", "40", "no", [NOISE, DISC]),
    ("video", "whole clip", "all at once", "flow matching", "20", "no",
     [NOISE, *(np.roll(DISC, shift, axis=1) for shift in (-3, 3))]),
]
COLOURS = {"p": "Greys", "s": "Greys", "d": "Blues", "c": "Oranges", "w": "Greens"}  # by unit
HEADINGS = {20: "method", 150: "first: light,\nlast: dark", 318: "unit",
            480: "order", 655: "loss",
            812: "passes for\na 32x32 image", 970: "exact\nlikelihood"}


def write(folders: list[Path], out: Path) -> list[Path]:
    """Write the pictures of these runs to the folder `out`, and return their paths. UserError for
    a run without samples, and for runs of several data sets of one kind."""
    runs = sorted(map(load_run, folders), key=lambda run: list(METHODS).index(run.method))
    figures = {Path(out) / "map.png": draw_map()}
    for kind, name in (("images", "methods.png"), ("sounds", "sounds.png")):
        if some := [run for run in runs if run.model.data == kind]:  # not a judge
            figures[Path(out) / name] = draw_runs(some)
    for path, figure in figures.items():
        files.write_atomically(path, lambda path, f=figure: path.write_bytes(small_png(f)))
    return list(figures)


def draw_runs(runs: list[Run]) -> Figure:
    """Real examples; below them each run's samples for their labels, or reconstructions of them."""
    first, orders = runs[0].record["data"], {row[0]: row[2] for row in MAP if len(row) > 2}
    for run in runs:
        if (data := run.record["data"])["fingerprint"] != first["fingerprint"]:
            raise UserError(f"{run.folder} was trained on {data['name']}, {runs[0].folder} on "
                            f"{first['name']}: give runs on one data set.")
    dataset = runs[0].dataset()
    main, names, sound = dataset.main, dataset.names, dataset.kind == "sounds"
    columns, test = zip(*one_each(dataset.test, main, names), strict=True)
    real = [train if example is None else example  # a small class may have none for the test
            for example, (_, train) in zip(test, one_each(dataset.train, main, names), strict=True)]
    rows, suffix = {"real": real}, f"-{dataset.name}"
    for run in runs:
        name = f"{run.folder.name.removesuffix(suffix)}\n{orders.get(run.method, 'reconstructed')}"
        if run.model.kind == "tokenizer":
            batch = pad(real)[0] if sound else to_tensor(np.stack(real), run.model.config.size)
            copies = apply(run.model.decode, apply(run.model.encode, batch)).float()
            rows[name] = copies.numpy() if sound else to_uint8(copies)
        elif (path := run.folder / "samples" / "samples.npz").exists():
            rows[name] = [example for _, example in one_each(files.read_npz(path), main, names)]
        else:
            raise UserError(f"{run.folder} has no samples: nanogen sample {run.folder} draws them.")
    tiles = [example for row in rows.values() for example in row]
    if sound:
        samples = min(dataset.sample_rate, max(map(len, real)))
        tiles = [None if clip is None else spectrogram(clip, samples) for clip in tiles]
    return named_grid(tiles, list(rows), columns)


def named_grid(images: list[np.ndarray | None], rows: list[str], columns: list[str],
               side: int = 96) -> Figure:
    """Images uint8 (H, W, 3), row by row, of any size, with the names of rows and columns. Each is
    shown with `side` x `side` pixels, enlarged without smoothing; None stays white."""
    blank = np.full((1, 1, 3), 255, np.uint8)
    tiles = [Image.fromarray(blank if image is None else image).resize(
        (side, side), Image.Resampling.NEAREST) for image in images]
    sheet = np.asarray(grid(np.stack(tiles), len(columns), scale=1, pad=4))
    height, width, left, top = *sheet.shape[:2], 190, 34
    figure = Figure(((left + width) / 100, (top + height) / 100), dpi=100)
    axes = figure.add_axes((left / (left + width), 0, width / (left + width),
                            height / (top + height)))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    for ticks, names in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        ticks((side + 4) * np.arange(len(names)) + side / 2 + 4, names)
    axes.tick_params(length=0, labelsize=12, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def draw_map() -> Figure:
    """The table MAP as a picture: a band for each chapter, a line for each method."""
    figure = Figure((11, 10), dpi=100)
    axes, y = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[]), 62
    for x, heading in HEADINGS.items():
        axes.text(x, 34, heading, color="#666666", va="center", size=10.5)
    for name, *texts in MAP:
        if len(texts) == 1:
            axes.fill_between([0, 1100], y + 5, y + 37, color="#eef0f2")
            axes.text(20, y + 21, name, weight="bold", va="center", size=12)
            axes.text(318, y + 21, texts[0], va="center", size=11.5)
            y += 43
            continue
        colour, drawings, left = COLOURS[texts[0][0]], texts.pop(), 150
        cell, latest = 44 / max(map(len, drawings)), max(map(np.max, drawings))
        for drawing in drawings:
            height, width = cell * np.array(drawing.shape)
            axes.imshow(drawing, colour, vmin=-0.12 * latest, vmax=latest, interpolation="nearest",
                        extent=(left, left + width, y + 26 + height / 2, y + 26 - height / 2))
            left += width + 6
        for x, text in zip(HEADINGS, [name, "", *texts], strict=True):
            axes.text(x, y + 26, text, va="center", size=11.5, weight=700 if x == 20 else 400,
                      color=colormaps[colour](0.85) if x == 318 else "black")
        y += 53
    axes.text(20, y + 24, "tokenizer and codec make the tokens. "
              "Guidance doubles the passes. A flow's likelihood needs an ODE solver.")
    axes.set(xlim=(0, 1100), ylim=(1000, 0), aspect="auto")
    return figure


def small_png(figure: Figure, most: int = 300_000) -> bytes:
    """A figure as PNG, with 256 colours if it would be larger than `most` bytes."""
    content = png(figure)
    if len(content) > most:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        content = png(image.quantize(256, kmeans=1, dither=Image.Dither.NONE))
    return content


if __name__ == "__main__":
    print(*write([Path(run) for run in sys.argv[1:]], Path(__file__).parent), sep="\n")
