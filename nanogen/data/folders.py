"""A folder of one's own: pictures or sounds, one sub-folder per class, as people really have them.

Pictures of any kind and size become 32x32 RGB, sounds of any rate become mono at 8 kHz. What cannot be read is skipped,
with a warning that names it.
"""

import hashlib
import os
import warnings
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageOps
from tqdm import tqdm

from nanogen import UserError

SAMPLE_RATE = 8000  # samples a second, of every sound in nanogen
PICTURE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
SOUND_FILES = {".wav", ".flac", ".ogg"}


def read_folder(folder: Path) -> dict:
    """Pictures, or else sounds -> the fields of `Images` or of `Sounds`. Without sub-folders, all are of one class.

    A tenth of each class is the test: at least one file, none if there is only one. A hash of the names says which, so it
    is the same everywhere, and so is the order, in which classes are mixed. UserError if there is nothing, or nothing that
    can be read.
    """
    read, classes = read_picture, find_classes(folder, PICTURE_FILES)
    if not classes:
        read, classes = read_sound, find_classes(folder, SOUND_FILES)
    if not classes:
        kinds = " ".join(sorted(PICTURE_FILES | SOUND_FILES))
        raise UserError(f"{folder} has no pictures or sounds ({kinds}): put some in, one folder per class.")

    examples = {"train": [], "test": []}  # of (content, label)
    skipped = []
    with tqdm(total=sum(map(len, classes.values())), desc=f"reading {folder.name}", delay=1) as bar:
        for label, files in enumerate(classes.values()):
            contents = []
            for file in files:
                bar.update()
                try:
                    contents.append((read(file), label))
                except UserError as error:
                    skipped.append(str(error))
            tests = max(1, len(contents) // 10) if len(contents) > 1 else 0
            examples["test"] += contents[:tests]
            examples["train"] += contents[tests:]
    if not examples["train"]:
        raise UserError(f"No file in {folder} can be read; the first: {skipped[0]}")
    if skipped:
        more = [f"And {len(skipped) - 10} more."] if len(skipped) > 10 else []
        warnings.warn(" ".join(["Skipped:", *skipped[:10], *more]), stacklevel=3)

    data = {"class_names": list(classes)} | ({} if read is read_picture else {"speaker_names": ["unknown"]})
    for part, pairs in examples.items():
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]  # the first n are of all classes
        contents = [content for content, _ in pairs]
        data[f"{part}_labels"] = np.array([label for _, label in pairs], np.int64)
        if read is read_picture:
            data[f"{part}_images"] = np.array(contents, np.uint8).reshape(-1, 32, 32, 3)
        else:
            data[f"{part}_waveforms"] = contents
            data[f"{part}_speakers"] = np.zeros(len(pairs), np.int64)
    return data


def find_classes(folder: Path, kinds: set[str]) -> dict[str, list[Path]]:
    """{class: its files of these kinds}, ordered by a hash of the file names: a shuffle that stays."""

    def files_in(place: Path, pattern: str) -> list[Path]:
        files = [path for path in place.glob(pattern) if path.suffix.lower() in kinds]
        files = [path for path in files if path.is_file() and path.name[0] != "."]
        names = {path: os.fsencode(path.relative_to(place).as_posix()) for path in files}
        return sorted(files, key=lambda path: hashlib.sha256(names[path]).digest())

    folders = sorted(place for place in folder.iterdir() if place.is_dir() and place.name[0] != ".")
    classes = {place.name: files_in(place, "**/*") for place in folders}
    classes = classes if any(classes.values()) else {folder.resolve().name: files_in(folder, "*")}
    return {name: files for name, files in classes.items() if files}


def read_picture(path: str | Path, size: int = 32) -> np.ndarray:
    """Any picture -> uint8 (size, size, 3): the central square, resized with antialiasing, on white.

    Grey, palette and 16-bit become RGB; of an animation, the first frame. UserError if it cannot be read, or
    is so large that it may be a decompression bomb: a small file made to fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
        with picture:
            picture.draft(None, (2 * size, 2 * size))  # lets a large JPEG be decoded small: many times faster
            upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255 instead of scaling
            upright = Image.fromarray((np.asarray(upright) / 256).clip(0, 255).astype(np.uint8))
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.crop((left, top, left + side, top + side)).convert("RGBA")
        small = square.resize((size, size), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", small.size, "white")
        return np.array(Image.alpha_composite(white, small).convert("RGB"))
    except Exception as error:  # decoders meet broken files with almost any exception
        raise UserError(f"{path} is no picture that can be read ({reason(error)}).") from error


def read_sound(path: str | Path, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A WAV, FLAC or OGG file -> float32 (T,) in [-1, 1], mono, at `sample_rate`. UserError if unreadable."""
    try:
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (T, channels)
        if not len(channels) or not np.isfinite(channels).all():
            raise ValueError("empty, or not numbers")
        return resample(channels.mean(axis=1), rate, sample_rate).clip(-1, 1)
    except Exception as error:
        raise UserError(f"{path} is no sound that can be read ({reason(error)}).") from error


def reason(error: Exception) -> str:
    """An exception in a few words; some have none, so their type stands in."""
    return str(error).strip().rstrip(".") or type(error).__name__


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(T,) at `rate` -> float32 (T * new_rate / rate, rounded up,) at `new_rate`, both in samples a second.

    A sound is a sum of waves, and a lower rate has no room for the fast ones: go to the spectrum, keep what
    fits, and come back. The transform sees the sound as a circle; the silence appended keeps its end from
    ringing into its beginning.
    """
    if rate == new_rate:
        return waveform.astype(np.float32)
    up, down = new_rate // gcd(rate, new_rate), rate // gcd(rate, new_rate)
    blocks = -(-(len(waveform) + rate // 10) // down)  # of `down` samples, which become exactly `up`
    spectrum = np.fft.rfft(waveform, blocks * down)[: blocks * up // 2 + 1]
    resampled = np.fft.irfft(spectrum, blocks * up) * (up / down)
    return resampled[: -(-len(waveform) * up // down)].astype(np.float32)
