"""Samples of a run: draw them, and write what a person opens.

    sample(run, n=64, guidance=3.0, out=Path("samples"))  ->  samples.npz  grid.png  process.gif
    of sounds                                             ->  samples.npz  000.wav ...  spectrograms.png
"""

from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from nanogen import UserError
from nanogen.data.folders import SAMPLE_RATE
from nanogen.lab import machine
from nanogen.lab.files import make_folder, write_atomically, write_npz
from nanogen.lab.pictures import grid, png, save_gif, spectrograms, to_uint8
from nanogen.lab.prepare import pad
from nanogen.lab.runs import AUDIO, Run

MOST_SOUNDS = 60  # .wav files in one folder; samples.npz has them all


def sample(run: Run, n: int = 64, labels: list[str] | None = None, out: Path | None = None, seed: int = 0,
           frames: bool = False, batch_size: int = 250, speakers: list[str] | None = None, **settings) -> dict[str, np.ndarray]:
    """Draw n pictures -> {"images" uint8 (N, H, W, 3), "labels" int64 (N,)} and, with frames, "frames" (S, N, H, W, 3);
    or n sounds -> {"waveforms" float32 (N, T), "lengths", "sample_rate", "labels", "speakers" int64 (N,)}.

    labels: class names or numbers, shared out evenly in order; all classes unless told. speakers: the same for the voices,
    in turn. settings: steps, guidance, temperature and what else the chapter's `sample` takes; the recipe's values where
    nothing is said. With `out`, writes the files above there, sorted by class; process.gif shows how pictures come to be.
    """
    sounds = run.chapter in AUDIO
    if n < 1:
        raise UserError(f"The number of {'sounds' if sounds else 'pictures'} must be at least 1, got {n}.")
    if not hasattr(run.model, "sample"):
        raise UserError(f"{run.folder} is a {run.chapter}: it has nothing to sample.")
    wanted = torch.tensor([number_of(label, run.class_names, "class", run) for label in labels or range(len(run.class_names))])
    label = wanted[torch.arange(n) * len(wanted) // n].to(machine.device())  # sorted by class, as even as n allows
    settings = run.config["sampling"] | {name: value for name, value in settings.items() if value is not None}
    if sounds:
        drawn = sample_sounds(run, label, speakers, seed, batch_size, settings)
        if out:
            write_sound_samples(drawn, run, Path(out))
        return drawn
    if speakers:
        raise UserError(f"{run.folder} draws pictures: there are no speakers to choose from.")
    images, growth = [], []
    for i, part in enumerate(label.split(batch_size)):
        result = ask(run, part, seed=seed + i, frames=frames or bool(out and i == 0), **settings)
        result, shown = result if isinstance(result, tuple) else (result, [])
        images.append(to_uint8(result))
        growth.append([to_uint8(picture) for picture in shown])
    drawn = {"images": np.concatenate(images), "labels": label.cpu().numpy()}
    if frames:
        drawn["frames"] = np.stack([np.concatenate(moment) for moment in zip(*growth, strict=True)])
    if out:
        write_samples(drawn, growth[0], Path(out))
    return drawn


def ask(run: Run, *conditions: Tensor, **settings):
    """The model's `sample`; what it refuses becomes a sentence."""
    try:
        with machine.autocast():
            return run.model.sample(*conditions, **settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{run.chapter}: {error}.") from error


def write_samples(drawn: dict[str, np.ndarray], growth: list[np.ndarray], out: Path) -> None:
    """samples.npz, grid.png and process.gif: the last shows how up to 30 of the pictures come to be."""
    make_folder(out)
    count = len(drawn["images"])
    columns = 10 if count % 10 == 0 else 8
    write_npz(out / "samples.npz", drawn)
    grid(drawn["images"][:200], columns).save(out / "grid.png")
    if growth:
        few = np.linspace(0, len(growth[0]) - 1, min(30, len(growth[0]))).astype(int)
        save_gif([moment[few] for moment in growth], out / "process.gif", columns=min(10, len(few)))


def number_of(said: str | int, names: list[str], kind: str, run: Run) -> int:
    """A class or speaker by name or number, as the user says it -> its number."""
    lower = [name.lower() for name in names]
    if str(said).lower() in lower:
        return lower.index(str(said).lower())
    if str(said).isdigit() and int(said) < len(names) and names[int(said)]:
        return int(said)
    names = [name for name in names if name]  # without speakers whom nobody has heard
    some = ", ".join(names) if len(names) <= 30 else f"{names[0]} to {names[-1]}"
    raise UserError(f"There is no {kind} {said!r} in {run.data}: choose from {some}.")


# ---- sounds


def sample_sounds(run: Run, label: Tensor, speakers: list[str] | None, seed: int, batch_size: int, settings: dict) -> dict:
    """Sounds of these labels (N,), the speakers taking turns -> the arrays of samples.npz."""
    names = run.speaker_names
    wanted = torch.tensor([number_of(name, names, "speaker", run) for name in speakers or filter(None, names)])
    speaker = wanted[torch.arange(len(label)) % len(wanted)].to(label.device)
    clips = []
    for i, parts in enumerate(zip(label.split(batch_size), speaker.split(batch_size), strict=True)):
        waveforms, lengths = ask(run, *parts, seed=seed + i, **settings)
        clips += [row[:length].float().cpu().numpy() for row, length in zip(waveforms, lengths.tolist(), strict=True)]
    waveforms, lengths = pad(clips)
    return {"waveforms": waveforms.clamp(-1, 1).numpy(), "lengths": lengths.numpy(), "sample_rate": np.array(SAMPLE_RATE),
            "labels": label.cpu().numpy(), "speakers": speaker.cpu().numpy()}


def write_sound_samples(drawn: dict[str, np.ndarray], run: Run, out: Path) -> None:
    """samples.npz, and of up to 60 sounds, evenly spaced, <number>.wav and a spectrogram each."""
    make_folder(out)
    names = out.glob("[0-9][0-9][0-9]*.wav") if (out / "samples.npz").exists() else ()  # else nothing in there is ours
    earlier = [path for path in names if path.stem.isdigit()]
    write_npz(out / "samples.npz", drawn)
    for path in earlier:  # of samples that are no longer those in samples.npz
        path.unlink()
    total = len(drawn["labels"])
    chosen = np.linspace(0, total - 1, min(total, MOST_SOUNDS)).astype(int)
    clips = [drawn["waveforms"][i, : drawn["lengths"][i]] for i in chosen]
    titles = [f"{run.class_names[drawn['labels'][i]]}, {run.speaker_names[drawn['speakers'][i]]}" for i in chosen]
    write_sounds(clips, [f"{i:03}" for i in chosen], titles, out, columns=10 if total >= 10 else total)


def write_sounds(clips: list[np.ndarray], names: list[str], titles: list[str], out: Path, columns: int) -> None:
    """<name>.wav of each clip (T,), 16 bits, and spectrograms.png with their titles, `columns` in a row."""
    try:
        for clip, name in zip(clips, names, strict=True):
            soundfile.write(out / f"{name}.wav", clip.clip(-1, 1), SAMPLE_RATE, "PCM_16")
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"Cannot write sounds into {out} ({error}): is the disk full?") from error
    content = png(spectrograms(clips, titles, columns))
    write_atomically(out / "spectrograms.png", lambda path: path.write_bytes(content))
