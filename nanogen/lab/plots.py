"""What a person looks at: grids of images, animations, loss curves, spectrograms.

Models hold images as float (B, 3, H, W) in [-1, 1]; stored or shown, they are uint8 (N, H, W, 3).
Figures are made without pyplot, so importing this file changes no plotting backend.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from nanogen.audio.spectral import log_mel


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (..., 3, H, W) in [-1, 1], clamped -> uint8 (..., H, W, 3), rounded to the nearest."""
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).cpu().numpy()


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in [-1, 1]; `to_uint8` brings them back."""
    return torch.tensor(images).movedim(-1, -3).float() / 127.5 - 1


def grid(images: np.ndarray, columns: int, scale: int = 2, pad: int = 2) -> Image.Image:
    """uint8 (N, H, W, 3) -> one image of rows of `columns`, the last of which may be short.
    Each image is enlarged `scale` times, by repeating pixels, with `pad` white pixels around it."""
    columns = min(columns, len(images))
    images, missing = images.repeat(scale, axis=1).repeat(scale, axis=2), -len(images) % columns
    tiles = np.pad(images, ((0, missing), (pad, 0), (pad, 0), (0, 0)), constant_values=255)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    sheet = np.pad(np.vstack(rows), ((0, pad), (0, pad), (0, 0)), constant_values=255)
    return Image.fromarray(sheet)


def save_gif(frames: list[np.ndarray], path: Path, columns: int, scale: int = 2,
             milliseconds: int = 120) -> Path:
    """An endless animation of grids. frames: a uint8 (N, H, W, 3) for each moment, shown for
    `milliseconds`, the last one for two seconds.
    One palette for all frames, from two late ones, keeps what does not change from flickering.
    There is no dithering, because it would add new noise to every frame."""
    late = np.concatenate([grid(frames[i], columns, scale=1) for i in (-1, len(frames) * 3 // 4)])
    palette = Image.fromarray(late).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    sheets = [grid(frame, columns, scale).quantize(palette=palette, dither=Image.Dither.NONE)
              for frame in frames]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], loop=0, optimize=False,
                   duration=[milliseconds] * (len(sheets) - 1) + [2000])
    return path


def loss_plot(log: list[dict], chance: float | None = None, title: str = "") -> Figure:
    """The loss over the steps of training, and that of held-out data where it is known. log: lines
    of log.jsonl; losses that are not finite are left out. chance: the loss of a model that has
    learned nothing."""
    figure = Figure(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot(facecolor="white")
    for name, label, style in (("loss", "training", dict(color="#2563a8")),
                               ("held_out_loss", "held out", dict(color="#c2571a", ls="--"))):
        shown = [line for line in log if math.isfinite(line.get(name, math.nan))]
        if shown:
            axes.plot([line["step"] for line in shown], [line[name] for line in shown],
                      label=label, **style)
    if chance is not None:
        axes.axhline(chance, color="#777777", linestyle=":", label=f"chance {chance:.4g}")
    if len(axes.lines) > 1:
        axes.legend(frameon=False, loc="center right")
    axes.set(title=title, xlabel="steps of training", ylabel="loss")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def spectrogram(clip: np.ndarray, samples: int) -> np.ndarray:
    """Loudness of a sound (T,) at 8 kHz by mel band (upwards) and time, as an image: uint8 (64,
    samples // 64 + 1, 3). The sound is cut, or padded with silence, to this number of samples."""
    padded = np.pad(clip[:samples], (0, max(samples - len(clip), 0))).astype(np.float32)
    mel = log_mel(torch.from_numpy(padded)[None])[0].numpy()
    return colormaps["magma"]((mel[::-1] + 10) / 8, bytes=True)[..., :3]


def spectrograms(clips: list[np.ndarray], titles: list[str], columns: int) -> Figure:
    """Spectrograms of sounds (T,) at 8 kHz with titles, on one scale for all."""
    columns = min(columns, len(clips))
    rows, longest = -(-len(clips) // columns), max(256, *map(len, clips))
    figure = Figure((1.3 * columns + 0.2, 1.25 * rows + 0.1), dpi=110, layout="constrained")
    for index, (clip, title) in enumerate(zip(clips, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(spectrogram(clip, longest), aspect="auto")
        axes.set_title(title, fontsize=7)
        axes.set_axis_off()
    return figure


def png(image: Figure | Image.Image) -> bytes:
    """A figure or an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    if isinstance(image, Figure):
        image.savefig(buffer, format="png", facecolor="white")
    else:
        image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
