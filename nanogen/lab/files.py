"""Files of a run: written whole or not at all, and known by their content."""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from nanogen import UserError


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the folder {folder}: {error.strerror}.") from error


def write_atomically(path: Path, write) -> None:
    """write(temporary path), then rename: a crash leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk has no room for it
        raise UserError(f"Cannot write {path} ({error}): is the disk full? What was there is kept.") from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Compressed, and all or nothing."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # numpy would append .npz to a name
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def content_hash(folder: Path) -> str:
    """sha256 of a run's weights, 16 digits of it."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}
