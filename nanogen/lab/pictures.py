"""Between numbers and what a person looks at: grids of pictures, how they come to be, loss curves.

Models hold pictures as float (B, 3, H, W) in [-1, 1]; what is stored or shown is uint8 (N, H, W, 3).
Enlarging repeats pixels: what is seen is what was generated. Figures carry their own canvas and a white
ground, so that importing this file changes no plotting backend and a dark page does not swallow the axes.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from nanogen.audio.spectral import log_mel


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (B, 3, H, W) in [-1, 1], clamped -> uint8 (B, H, W, 3), rounded to the nearest of 256 values."""
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]; `to_uint8` brings back every value exactly."""
    images = (
        torch.tensor(images) if isinstance(images, np.ndarray) else images
    )  # a copy: data may be read-only
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(images: np.ndarray, columns: int, scale: int = 2, pad: int = 2) -> Image.Image:
    """uint8 (N, H, W, 3) -> one picture of rows of `columns`: each enlarged `scale` times, with `pad` white
    pixels between them and around. The last row may be short. ValueError for anything but uint8 pictures."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"a grid needs pictures as uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, got {columns}")
    columns = min(columns, len(images))
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = enlarged.shape[1] + pad, enlarged.shape[2] + pad
    rows = math.ceil(len(images) / columns)
    sheet = np.full((pad + rows * height, pad + columns * width, 3), 255, np.uint8)
    for index, picture in enumerate(enlarged):
        top, left = pad + index // columns * height, pad + index % columns * width
        sheet[top : top + height - pad, left : left + width - pad] = picture
    return Image.fromarray(sheet)


def save_gif(
    frames: list[np.ndarray],
    path: Path,
    columns: int,
    scale: int = 2,
    milliseconds: int = 120,
    hold_last: int = 2000,
) -> Path:
    """An endless animation of grids. frames: a uint8 (N, H, W, 3) per moment; the last stays `hold_last` ms.

    One palette of 256 colours serves all frames, so that what does not change does not flicker. It is taken
    from the last frame and one near the end: noise at the start would spend it on colours no picture has. No
    dithering, which would make new noise in every frame. Noise does not compress (100 pictures of 32x32 in 25
    frames: 7 MB at scale 2, 3 MB at scale 1), so animate few pictures. A frame equal to the one before is
    not stored again: that one is shown longer. ValueError for no frames, or frames of several shapes.
    """
    if not frames or any(frame.shape != frames[-1].shape for frame in frames):
        raise ValueError("an animation needs at least one frame, and all frames of one shape")
    colours = np.concatenate([grid(frames[i], columns, scale=1) for i in (-1, len(frames) * 3 // 4)])
    palette = Image.fromarray(colours).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    sheets = [grid(frame, columns, scale) for frame in frames]
    sheets = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    durations = [milliseconds] * (len(sheets) - 1) + [hold_last]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=durations, loop=0, optimize=False)
    return Path(path)


def loss_plot(log: list[dict], chance: float | None = None, title: str = "") -> Figure:
    """The loss over minutes of training, or over steps where no minutes are logged. log: lines of log.jsonl.

    `chance`: the loss of a model that has learned nothing, as a dashed line. Lines without a finite loss are
    left out. The first twentieth, often far above the rest, may leave the frame at the top.
    """
    known = [line for line in log if isinstance(line.get("loss"), int | float)]
    lines = [line for line in known if math.isfinite(line["loss"])]
    unit = "minutes" if lines and all("minutes" in line for line in lines) else "step"
    places = [line.get(unit, index) for index, line in enumerate(lines)]
    losses = [line["loss"] for line in lines]
    figure = Figure(figsize=(6.4, 3.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="white")
    axes.plot(places, losses, color="#2563a8", linewidth=1.6)
    if chance is not None:
        axes.axhline(chance, color="#777777", linestyle="--", linewidth=1.2)
        place = dict(xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points")
        style = dict(ha="right", va="top", color="#555555", fontsize=9)
        axes.annotate(f"chance {chance:.4g}", (0.995, chance), **place, **style)
    if losses:
        settled = losses[len(losses) // 20 :] + ([chance] if chance is not None else [])
        margin = 0.08 * (max(settled) - min(settled)) or 0.1 * abs(max(settled)) or 1.0
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.set(xlabel="minutes of training" if unit == "minutes" else "steps", ylabel="loss", title=title)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def spectrograms(clips: list[np.ndarray], titles: list[str], columns: int) -> Figure:
    """What sounds (T,) at 8 kHz look like: loudness by mel band (upwards) and time, on the same scales for all."""
    columns = max(1, min(columns, len(clips)))
    rows, longest = math.ceil(len(clips) / columns), max(len(clip) for clip in clips)
    figure = Figure(figsize=(1.3 * columns + 0.2, 1.25 * rows + 0.1), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for index, (clip, title) in enumerate(zip(clips, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        padded = torch.zeros(1, max(longest, 256))
        padded[0, : len(clip)] = torch.tensor(clip, dtype=torch.float32)
        axes.imshow(log_mel(padded)[0], origin="lower", aspect="auto", cmap="magma", vmin=-10, vmax=-2)
        axes.set_title(title, fontsize=7)
        axes.set_axis_off()
    return figure


def png(picture: Figure | Image.Image) -> bytes:
    """A figure or a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", facecolor="white")
    else:
        picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
