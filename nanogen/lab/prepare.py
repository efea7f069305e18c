"""From a data set to the tensors that a model trains on: images, sounds, or what `prepare` makes.

    images     uint8 (N, 3, size, size)       labels, speakers   int64 (N,)
    videos     uint8 (N, T, 3, size, size)    prompts            int64 (N, L), characters
    waveforms  float32 (N, T) in [-1, 1], padded with zeros, and lengths (N,) in samples;
               or (N, 8192), all recordings joined end to end, for a `concatenated` model

What a tokenizer or codec encoded is kept in its folder, so that the next training starts at once.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanogen import UserError
from nanogen.blocks.text import encode_text
from nanogen.data.datasets import Dataset
from nanogen.data.sources import read_images
from nanogen.files import content_hash, fingerprint, write_atomically
from nanogen.lab import machine
from nanogen.method import Method

ROW = 8192  # samples in a row of joined recordings: about a second


def prepare(model: Method, dataset: Dataset, flip: bool, base: Path | None = None,
            keep: bool = True) -> dict[str, Tensor]:
    """The training data as the model's `loss` wants it, on the CPU.
    flip: what is encoded is encoded mirrored, too (the loop mirrors plain images by itself).
    base: the folder of the tokenizer or codec that encodes; the result is kept there if `keep`."""
    tensors = columns(model, dataset)
    if model.encodes:
        path = None
        if base and not model.examples:
            fields = [getattr(model.config, name) for name in model.encoding_fields]
            raw = [part for name, tensor in tensors.items() for part in (name, tensor.numpy())]
            key = fingerprint(*raw, fields, flip, content_hash(base / "model.safetensors"))
            path = base / f"encoded-{key}.safetensors"
        try:
            tensors = load_file(path)
        except Exception:  # missing or damaged: encode again
            tensors = encode(model, tensors, flip)
            if path and keep:
                with contextlib.suppress(UserError):  # the folder may be read-only
                    write_atomically(path, lambda path: save_file(tensors, path))
    model.measure(tensors)
    return tensors


def test_columns(model: Method, dataset: Dataset) -> dict[str, Tensor]:
    """`columns` of the test data; speakers without a training example become the null class."""
    test = columns(model, dataset, "test")
    if "speakers" in test:
        known = torch.isin(test["speakers"], torch.from_numpy(dataset.train["speakers"]))
        test["speakers"] = test["speakers"].where(known, dataset.classes("speakers"))
    return test


def held_out(model: Method, dataset: Dataset, count: int) -> dict[str, Tensor] | None:
    """`count` test examples, evenly spaced, as the loss of a generator wants them; else None."""
    total = len(dataset.test[dataset.main])
    if model.kind != "generator" or model.examples or not total:
        return None
    rows = every(count, total)
    test = {name: tensor[rows] for name, tensor in test_columns(model, dataset).items()}
    return encode(model, test, flip=False) if model.encodes else test


@torch.no_grad()
def encode(model: Method, raw: dict[str, Tensor], flip: bool) -> dict[str, Tensor]:
    """Batch by batch, the result of the model's `prepare`, on the CPU."""
    count = len(next(iter(raw.values())))
    if model.examples:  # made from examples drawn at random, not one for each
        chosen = torch.randint(count, (model.examples,))
        raw, flip = {name: tensor[chosen] for name, tensor in raw.items()}, False
    model.to(machine.device())
    size = 100 if "waveforms" in raw else 500
    parts: dict[str, list[Tensor]] = {}
    for mirrored in (False, True) if flip and "images" in raw else (False,):
        for rows in zip(*(tensor.split(size) for tensor in raw.values()), strict=True):
            batch = dict(zip(raw, (row.to(machine.device()) for row in rows), strict=True))
            if "images" in batch:
                images = batch["images"].flip(-1) if mirrored else batch["images"]
                batch["images"] = images.float() / 127.5 - 1
            with machine.autocast():
                for name, tensor in model.prepare(batch).items():
                    parts.setdefault(name, []).append(tensor.cpu().contiguous())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def columns(model: Method, dataset: Dataset, part: str = "train") -> dict[str, Tensor]:
    """The main column of one part, "train" or "test", and the others that the model asks for."""
    values = getattr(dataset, part)
    if model.concatenated:
        return {"waveforms": concatenate(values["waveforms"])}
    if dataset.kind == "sounds":
        seconds = getattr(model.config, "seconds", None)  # longer clips are cut there
        limit = int(seconds * dataset.sample_rate) if seconds else None
        waveforms, lengths = pad([clip[:limit] for clip in values["waveforms"]])
        tensors = {"waveforms": waveforms, "lengths": lengths}
    elif dataset.kind == "images":
        images, size = values["images"], model.config.size
        if "files" in values and size > images.shape[1]:
            images = read_images(values["files"], size)
        tensors = {"images": to_tensor(images, size)}
    else:
        tensors = {"videos": torch.from_numpy(values["videos"]).permute(0, 1, 4, 2, 3)}
    for name in model.columns:
        column = values[name]
        if len(column) > 0 and isinstance(column[0], str):
            tensors[name] = encode_text(column)
        elif name == "sources":
            tensors[name] = to_tensor(column, model.config.size)
        else:
            tensors[name] = torch.from_numpy(column)
    return tensors


def check_size(config, dataset: Dataset) -> None:
    """UserError where images would be enlarged. The files of a folder are read at any size."""
    size, images = getattr(config, "size", 0), dataset.train.get("images")
    if images is not None and "files" not in dataset.train and size > (side := images.shape[1]):
        raise UserError(f"{dataset.name} has images of {side}x{side} pixels: size must be at most "
                        f"{side}, got {size}.")


def remarks(model: Method, dataset: Dataset, flip: bool) -> list[str]:
    """What a training changes of the data, in sentences."""
    said, total = [], len(dataset)
    seconds = getattr(model.config, "seconds", None)
    if dataset.kind == "sounds" and seconds:
        limit = int(seconds * dataset.sample_rate)
        if longer := sum(len(clip) > limit for clip in dataset.train["waveforms"]):
            said.append(f"{longer:,} of {total:,} clips are longer than {seconds:g} s and are cut "
                        "there: --seconds S.")
    if "sides" in dataset.train:  # images of a folder
        size = model.config.size
        if small := int((dataset.train["sides"] < size).sum()):
            said.append(f"{small:,} of {total:,} images are smaller than {size}x{size} and are "
                        "enlarged: --size S.")
        if flip:
            said.append("Images are mirrored at random: --no-flip if left and right matter.")
    return said


def to_tensor(images: np.ndarray, size: int) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, size, size), by area average where the size differs."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if tensor.shape[-1] == size:
        return tensor
    parts = (F.interpolate(part.float(), size, mode="area") for part in tensor.split(2000))
    return torch.cat([part.round().byte() for part in parts])


def every(n: int, total: int) -> list[int]:
    """n of the numbers below total, or all of them, evenly spaced."""
    return np.linspace(0, total - 1, min(n, total)).astype(int).tolist()


def pad(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Clips, each (T,) -> float32 (N, longest), padded with zeros, and their lengths int64 (N,)."""
    rows = [torch.tensor(clip, dtype=torch.float32) for clip in clips]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def concatenate(clips: list[np.ndarray]) -> Tensor:
    """All clips end to end, in rows: float32 (N, ROW). The rest is dropped, if it is not all."""
    whole = torch.tensor(np.concatenate(clips))
    return F.pad(whole, (0, max(ROW - len(whole), 0))).unfold(0, ROW, ROW)
