"""Samples of a run: draw them, and write what a person opens.

    sample(run, n=64, guidance=3.0, out=Path("samples"))  ->  samples.npz  grid.png  process.gif
"""

from pathlib import Path

import numpy as np
import torch

from nanogen import UserError
from nanogen.lab import machine
from nanogen.lab.pictures import grid, save_gif, to_uint8
from nanogen.lab.runs import Run, make_folder, write_atomically


def sample(run: Run, n: int = 64, labels: list[str] | None = None, out: Path | None = None, seed: int = 0,
           frames: bool = False, batch_size: int = 250, **settings) -> dict[str, np.ndarray]:
    """Draw n pictures -> {"images" uint8 (N, H, W, 3), "labels" int64 (N,)} and, with frames, "frames" (S, N, H, W, 3).

    labels: class names or numbers, shared out evenly in order; all classes unless told. settings: steps, guidance,
    temperature and what else the chapter's `sample` takes; the recipe's values where nothing is said. With `out`,
    writes samples.npz, grid.png (sorted by class) and process.gif there.
    """
    if n < 1:
        raise UserError(f"The number of pictures must be at least 1, got {n}.")
    if not hasattr(run.model, "sample"):
        raise UserError(f"{run.folder} is a {run.chapter}: it has nothing to sample.")
    wanted = torch.tensor([class_number(run, label) for label in labels or range(len(run.class_names))])
    label = wanted[torch.arange(n) * len(wanted) // n].to(machine.device())  # sorted by class, as even as n allows
    settings = run.config["sampling"] | {name: value for name, value in settings.items() if value is not None}
    images, growth = [], []
    with machine.autocast():
        for i, part in enumerate(label.split(batch_size)):
            try:
                result = run.model.sample(part, seed=seed + i, frames=frames or bool(out and i == 0), **settings)
            except (ValueError, TypeError) as error:
                raise UserError(f"{run.chapter}: {error}.") from error
            result, shown = result if isinstance(result, tuple) else (result, [])
            images.append(to_uint8(result))
            growth.append([to_uint8(picture) for picture in shown])
    drawn = {"images": np.concatenate(images), "labels": label.cpu().numpy()}
    if frames:
        drawn["frames"] = np.stack([np.concatenate(moment) for moment in zip(*growth, strict=True)])
    if out:
        write_samples(drawn, growth[0], Path(out))
    return drawn


def write_samples(drawn: dict[str, np.ndarray], growth: list[np.ndarray], out: Path) -> None:
    """samples.npz, grid.png and process.gif: the last shows how up to 30 of the pictures come to be."""
    make_folder(out)
    count = len(drawn["images"])
    columns = 10 if count % 10 == 0 else 8

    def save_npz(path: Path) -> None:
        with open(path, "wb") as file:  # numpy would append .npz to a name
            np.savez_compressed(file, **drawn)

    write_atomically(out / "samples.npz", save_npz)
    grid(drawn["images"][:200], columns).save(out / "grid.png")
    if growth:
        few = np.linspace(0, len(growth[0]) - 1, min(30, len(growth[0]))).astype(int)
        save_gif([moment[few] for moment in growth], out / "process.gif", columns=min(10, len(few)))


def class_number(run: Run, label: str | int) -> int:
    """A class name or number, as the user says it -> its number."""
    names = [name.lower() for name in run.class_names]
    if str(label).lower() in names:
        return names.index(str(label).lower())
    if str(label).isdigit() and int(label) < len(names):
        return int(label)
    raise UserError(f"There is no class {label!r} in {run.data}: choose from {', '.join(run.class_names)}.")
