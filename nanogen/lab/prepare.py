"""From a data set to the tensors that a chapter trains on: pixels, waveforms, or tokens and latents encoded once.

    pictures   "images" uint8 (N, 3, size, size), "labels" (N,)
    sounds     "waveforms" float32 (N, T) in [-1, 1], zero-padded, "lengths" (N,) in samples, "labels", "speakers" (N,)
    a tape     "waveforms" float32 (N, 8192): all clips end to end, for a codec, which never sees where one ends

A model with `prepare` turns batches of them into what its loss wants. If a tokenizer or codec did that, the result is kept
in its folder, so that the next chapter that stands on it starts at once.
"""

import contextlib
import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanogen import UserError
from nanogen.data import datasets
from nanogen.data.datasets import Images, Sounds
from nanogen.lab import machine
from nanogen.lab.files import content_hash, contiguous, write_atomically
from nanogen.lab.train import join_processes

ROW = 8192  # samples in a row of a tape: about a second


def load_data(data: str, count: int | None = None) -> Images | Sounds:
    """datasets.load, remembering the last two: a command asks for the same data several times."""
    return remembered(str(data), datasets.data_folder(), count)


@functools.lru_cache(maxsize=2)
def remembered(data: str, folder: Path, count: int | None) -> Images | Sounds:
    return datasets.load(data, count=count)  # `folder` only tells what is remembered apart


def prepared(model: nn.Module, source: Images | Sounds, config, flip: bool, base=None) -> dict[str, Tensor]:
    """What `prepare` gives. If a tokenizer or codec made it, it is kept in that run's folder. base: the Run underneath."""
    if base is None or base.chapter not in ("tokenizer", "codec"):
        return prepare(model, source, config, flip, base)
    path = base.folder / f"encoded-{fingerprint(source, config, flip, content_hash(base.folder))}.safetensors"
    try:
        tensors = load_file(path)
    except Exception:  # absent or damaged: encoding takes a minute, so no question is asked
        tensors = prepare(model, source, config, flip, base)
        if join_processes()[0] == 0:
            with contextlib.suppress(UserError):  # not kept, then
                write_atomically(path, lambda path: save_file(contiguous(tensors), path))
    if "latents" in tensors:
        model.measure(tensors["latents"])
    return tensors


def fingerprint(source: Images | Sounds, config, flip: bool, base: str) -> str:
    """16 digits that change with whatever changes the encoded tensors: the data, and the run `base` that encodes it."""
    key = hashlib.sha256(base.encode())
    if isinstance(source, Sounds):  # chains over sound differ in what they ask of the codec
        key.update(repr([getattr(config, name, None) for name in ("pattern", "books", "seconds")]).encode())
        arrays = (*source.train_waveforms, source.train_labels, source.train_speakers)
    else:
        key.update(bytes([flip]))
        arrays = (source.train_images, source.train_labels)
    for array in arrays:
        key.update(np.ascontiguousarray(array))
    return key.hexdigest()[:16]


@torch.no_grad()
def prepare(model: nn.Module, source: Images | Sounds, config, flip: bool = True, base=None) -> dict[str, Tensor]:
    """The training data as the model wants it, on the CPU; with `flip`, what is encoded is encoded mirrored, too."""
    if isinstance(source, Sounds):
        return prepare_sounds(model, source, config)
    images = to_tensor(source.train_images, config.size)
    labels = torch.from_numpy(source.train_labels)
    if getattr(config, "second", 0):
        return {"images": images, "labels": labels, "second": torch.from_numpy(source.truth["train_background"])}
    if not hasattr(model, "prepare") or getattr(model, "tokenizer", []) == [None]:  # the chapter stands on nothing this time
        return {"images": images, "labels": labels}
    if base and base.chapter == "flow":  # pairs are drawn, not encoded: as many as asked, of labels as in the data, none mirrored
        some = torch.randint(len(labels), (config.reflow_pairs,))
        images, labels, flip = images[some], labels[some], False
    model.to(machine.device())
    parts: dict[str, list[Tensor]] = {}
    for mirrored in (False, True) if flip else (False,):
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            x = (x.flip(-1) if mirrored else x).to(machine.device()).float() / 127.5 - 1
            with machine.autocast():
                for name, tensor in model.prepare(x, y.to(machine.device())).items():
                    parts.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def to_tensor(images, size: int) -> Tensor:
    """uint8 (N, H, W, 3) -> uint8 (N, 3, size, size), by area average where the size differs."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if tensor.shape[-1] == size:
        return tensor
    return torch.cat([F.interpolate(part.float(), size, mode="area").round().byte() for part in tensor.split(2000)])


# ---- sounds


def prepare_sounds(model: nn.Module, source: Sounds, config) -> dict[str, Tensor]:
    """Clips or a tape as they are, or what the model's `prepare` makes of the clips."""
    if getattr(model, "tape", False):
        return {"waveforms": tape(source.train_waveforms)}
    clips = sound_tensors(source, "train", getattr(config, "seconds", None))
    if not hasattr(model, "prepare"):
        return clips
    model.to(machine.device())
    parts: dict[str, list[Tensor]] = {}
    for rows in zip(*(tensor.split(100) for tensor in clips.values()), strict=True):
        with machine.autocast():
            for name, tensor in model.prepare(*(row.to(machine.device()) for row in rows)).items():
                parts.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def sound_tensors(source: Sounds, part: str = "train", seconds: float | None = None) -> dict[str, Tensor]:
    """The clips of one part, "train" or "test", as the four tensors above. seconds: longer clips are cut there."""
    clips = getattr(source, f"{part}_waveforms")
    limit = int(seconds * source.sample_rate) if seconds else max(map(len, clips))
    waveforms, lengths = pad([clip[:limit] for clip in clips])
    labels, speakers = (torch.from_numpy(getattr(source, f"{part}_{what}")) for what in ("labels", "speakers"))
    return {"waveforms": waveforms, "lengths": lengths, "labels": labels, "speakers": speakers}


def pad(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Clips, each (T,) -> float32 (N, longest), zero-padded, and their lengths int64 (N,) in samples."""
    lengths = torch.tensor([len(clip) for clip in clips])
    waveforms = torch.zeros(len(clips), int(lengths.max()))
    for row, clip in zip(waveforms, clips, strict=True):
        row[: len(clip)] = torch.tensor(clip)
    return waveforms, lengths


def tape(clips: list[np.ndarray]) -> Tensor:
    """All clips end to end, in rows: float32 (N, ROW). What is left at the end is dropped, unless it is all there is."""
    whole = np.concatenate(clips)
    if len(whole) < ROW:
        whole = np.pad(whole, (0, ROW - len(whole)))
    return torch.tensor(whole[: len(whole) // ROW * ROW]).view(-1, ROW)
