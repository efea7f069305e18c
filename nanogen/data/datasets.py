"""The data, behind one function: load("cifar10"), load("fsdd"), load("scenes"), load("voices"), load("a/folder").

All of it is small: a data set is a few arrays in memory, not a stream. A chapter puts them on its device once and draws
batches by indexing. Pictures are uint8 (N, H, W, 3), sounds a list of float32 (T,) in [-1, 1].

    cifar10    60,000 photographs of 10 classes, 32x32; downloaded once (Krizhevsky 2009)
    fsdd       3,000 spoken digits by 6 speakers, 8 kHz; downloaded once (Free Spoken Digit Dataset)
    scenes     55,000 drawings with the truth about each; made here, by `scenes.py`, from a seed
    voices     8,800 spoken digits, 3 languages, 240 voices, with their truth; made here, by `voices.py`, from a seed
    a folder   pictures or sounds of one's own, one sub-folder per class

"fsdd-without-jackson" has one speaker in its test only: does what was learned from five serve a sixth? The named ones are
kept as <name>.npz in $NANOGEN_DATA, else in `data/`, whose README has hosts and licences.
"""

import dataclasses
import hashlib
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanogen import UserError
from nanogen.data import drawing, phonemes, scenes, voices
from nanogen.data.download import SOURCES, download, write_npz
from nanogen.data.folders import SAMPLE_RATE, read_folder, reason

WITHOUT = "-without-"  # fsdd-without-jackson
REPOSITORY_DATA = Path(__file__).resolve().parents[2] / "data"


@dataclass
class Images:
    """Labelled pictures, in a training and a test part."""

    name: str
    train_images: np.ndarray  # uint8 (N, H, W, 3)
    train_labels: np.ndarray  # int64 (N,), an index into class_names
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    truth: dict[str, np.ndarray] = field(default_factory=dict)  # scenes: "train_background", "test_mask", ...


@dataclass
class Sounds:
    """Labelled recordings, in a training and a test part."""

    name: str
    train_waveforms: list[np.ndarray]  # N clips, each float32 (T,) in [-1, 1]
    train_labels: np.ndarray  # int64 (N,), an index into class_names; for fsdd the digit
    train_speakers: np.ndarray  # int64 (N,), an index into speaker_names
    test_waveforms: list[np.ndarray]
    test_labels: np.ndarray
    test_speakers: np.ndarray
    class_names: list[str]
    speaker_names: list[str]
    sample_rate: int = SAMPLE_RATE
    truth: dict[str, np.ndarray] = field(default_factory=dict)  # voices: "train_language", "test_voice", ...


def whole(name: str) -> str:
    """The data set with all its speakers: fsdd-without-jackson -> fsdd; any other name as it is."""
    first = str(name).partition(WITHOUT)[0]
    return first if first in SOURCES else str(name)


def kind_of(name: str) -> type | None:
    """Images or Sounds, if the name alone says so: a folder of one's own must be read first."""
    return {"cifar10": Images, "scenes": Images, "fsdd": Sounds, "voices": Sounds}.get(whole(name))


def resolved(name: str | Path) -> str:
    """One spelling of the same data: pets/, ./pets and ~/pets become the folder's whole path; the names above stay."""
    own = Path(name).expanduser()
    return str(own.resolve()) if kind_of(str(name)) is None and own.is_dir() else str(name)


def data_folder() -> Path:
    """Where data is kept: $NANOGEN_DATA, else `data/` of the repository."""
    return Path(os.environ.get("NANOGEN_DATA") or REPOSITORY_DATA).expanduser()


def load(name: str | Path, folder: Path | None = None, count: int | None = None) -> Images | Sounds:
    """A data set by its name, or a folder of one's own by its path.

    `folder`: where the named ones are kept, if not in `data_folder()`. `count`: only so many to learn from
    and a tenth as many for the test, spread evenly over the whole (scenes, voices: made on the spot, not cached).
    UserError, one sentence, for an unknown name, a file that cannot be read, a download that failed.
    """
    if count is not None and count < 1:
        raise UserError(f"count must be at least 1, got {count}.")
    if name in ("scenes", "voices"):
        folders = [Path(folder)] if folder else [data_folder(), REPOSITORY_DATA]
        return load_scenes(folders, count) if name == "scenes" else load_voices(folders, count)
    if whole(name) in SOURCES:
        data = load_downloaded(whole(name), Path(folder) if folder else data_folder())
        data = without(data, str(name).partition(WITHOUT)[2]) if name != whole(name) else data
    elif name and (own := Path(name).expanduser()).is_dir():
        fields = read_folder(own)
        data = (Images if "train_images" in fields else Sounds)(own.name, **fields)
    else:
        choices = f"say {', '.join(SOURCES)}, scenes, voices or an existing folder"
        raise UserError(f"There is no data set or folder {str(name)!r}: {choices}.")
    return data if count is None else thin(data, count)


def without(data: Images | Sounds, speaker: str) -> Sounds:
    """All the other speakers to learn from, and this one's test clips. Names and numbers of the speakers stay."""
    names = getattr(data, "speaker_names", [])
    if speaker not in names:
        raise UserError(f"{data.name} has no speaker {speaker!r} to leave out: its speakers are {', '.join(names) or 'none'}.")
    parts = {}
    for part in ("train", "test"):
        chosen = np.flatnonzero((getattr(data, f"{part}_speakers") == names.index(speaker)) == (part == "test"))
        parts[f"{part}_waveforms"] = [getattr(data, f"{part}_waveforms")[i] for i in chosen]
        parts |= {key: getattr(data, key)[chosen] for key in (f"{part}_labels", f"{part}_speakers")}
    return dataclasses.replace(data, name=data.name + WITHOUT + speaker, **parts)


def thin(data: Images | Sounds, count: int) -> Images | Sounds:
    """`data` with `count` training and `count / 10` test examples, evenly spaced: fsdd is sorted by digit."""
    for part, wanted in (("train", count), ("test", max(1, count // 10))):
        total = len(getattr(data, f"{part}_labels"))
        chosen = np.linspace(0, total - 1, min(wanted, total)).astype(int)
        for key in [key for key in vars(data) if key.startswith(part)]:
            old = getattr(data, key)
            setattr(data, key, [old[i] for i in chosen] if isinstance(old, list) else old[chosen])
    return data


# ------------------------------------------------------------------------------------ the cache: <name>.npz


def load_downloaded(name: str, folder: Path) -> Images | Sounds:
    """`cifar10` or `fsdd` from folder/<name>.npz, which is downloaded first if it is not there."""
    path = folder / f"{name}.npz"
    arrays = read_npz(path) if path.exists() else download(name, folder)
    try:
        return as_images(name, arrays) if name == "cifar10" else as_sounds(name, arrays)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} does not hold {name} ({error}): delete it and run again.") from error


def as_images(name: str, arrays: dict[str, np.ndarray]) -> Images:
    """What the cache holds -> Images. ValueError if it does not fit together."""
    parts = {}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
            raise ValueError(f"{part}_images is {images.dtype} {images.shape} beside {len(labels)} labels")
        parts |= {f"{part}_images": images, f"{part}_labels": labels}
    return Images(name, **parts, class_names=arrays["class_names"].tolist())


def as_sounds(name: str, arrays: dict[str, np.ndarray]) -> Sounds:
    """What the cache holds (all clips end to end, and where each begins) -> Sounds. ValueError as above."""
    offsets, digits, is_test = arrays["offsets"], arrays["digits"], arrays["is_test"]
    if offsets[-1] != len(arrays["waveform"]) or not len(digits) == len(is_test) == len(offsets) - 1:
        raise ValueError("its arrays differ in length")
    clips = np.split(arrays["waveform"].astype(np.float32) / 32768, offsets[1:-1])
    parts = {}
    for part, chosen in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
        parts[f"{part}_waveforms"] = [clips[i] for i in chosen]
        parts[f"{part}_labels"] = digits[chosen].astype(np.int64)
        parts[f"{part}_speakers"] = arrays["speakers"][chosen].astype(np.int64)
    names = {"class_names": list("0123456789"), "speaker_names": arrays["speaker_names"].tolist()}
    return Sounds(name, **parts, **names, sample_rate=int(arrays["sample_rate"]))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file. UserError if it is damaged or not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # zip, zlib and numpy each have their own for a damaged file
        advice = "if it is damaged, delete it and run again"
        raise UserError(f"{path} cannot be read ({reason(error)}): {advice}.") from error


# ------------------------------------------------------------------------------------ made here: scenes, voices


def load_scenes(folders: list[Path], count: int | None = None) -> Images:
    """50,000 scenes of seed 0 to learn from, 5,000 of seed 1 for the test."""
    if count is not None:
        return unpack_scenes(draw_scenes(count, max(1, count // 10)))
    announce = "Drawing 55,000 scenes: up to a minute, once."
    return unpack_scenes(made_once("scenes", (scenes, drawing), lambda: draw_scenes(50_000, 5_000), folders, announce))


def load_voices(folders: list[Path], count: int | None = None) -> Sounds:
    """8,000 spoken digits by 200 voices to learn from, 800 by 40 others for the test."""
    if count is not None:
        return unpack_voices(record_voices(count, max(1, count // 10)))
    announce = "Speaking 8,800 digits: about half a minute, once."
    return unpack_voices(made_once("voices", (voices, phonemes), lambda: record_voices(8_000, 800), folders, announce))


def made_once(name: str, modules: tuple, make: Callable, folders: list[Path], announce: str) -> dict[str, np.ndarray]:
    """What make() gives, from <name>.npz of the first folder that has it; else made, and kept in the first writable one.

    The cache carries a fingerprint of the code of its modules: change the code, and all is made anew.
    """
    code = b"".join(Path(module.__file__).read_bytes() for module in modules)
    fingerprint = hashlib.sha256(code).hexdigest()
    for path in [folder / f"{name}.npz" for folder in folders]:
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["fingerprint"]) == fingerprint:
                    return {key: file[key] for key in file.files if key != "fingerprint"}
        except Exception:  # absent or damaged: making it again takes a minute, so no question is asked
            continue
    print(announce, file=sys.stderr)
    arrays = make()
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.stat().st_mode & stat.S_IWUSR:  # what is marked read-only stays as it is, even for root
                write_npz(folder / f"{name}.npz", arrays | {"fingerprint": np.array(fingerprint)})
                break
        except OSError:
            continue  # not kept, then
    return arrays


def draw_scenes(train_count: int, test_count: int) -> dict[str, np.ndarray]:
    """Both parts, as "train_<what>" and "test_<what>"; the masks packed, eight pixels to a byte."""
    arrays = {}
    for part, count, seed in (("train", train_count, 0), ("test", test_count, 1)):
        arrays |= {f"{part}_{what}": values for what, values in scenes.make(count, seed=seed).items()}
        arrays[f"{part}_mask"] = np.packbits(arrays[f"{part}_mask"], axis=-1)
    return arrays


def unpack_scenes(arrays: dict[str, np.ndarray]) -> Images:
    """What `draw_scenes` made -> Images; all but pictures and labels is the truth about them."""
    images = as_images("scenes", arrays | {"class_names": np.array(scenes.THINGS)})
    known = [key for key in arrays if not key.endswith(("_images", "_labels"))]
    images.truth = {key: arrays[key] for key in known}
    for key in ("train_mask", "test_mask"):
        images.truth[key] = np.unpackbits(arrays[key], axis=-1).astype(bool)
    return images


def record_voices(train_count: int, test_count: int) -> dict[str, np.ndarray]:
    """Both parts end to end, laid out as fsdd's cache is, with language and voice; no voice is in both."""
    parts = [voices.make(train_count, seed=0, speakers=200), voices.make(test_count, seed=1, speakers=40)]
    train, test = parts
    test["speaker"] += train["speaker"].max() + 1
    clips = train["waveforms"] + test["waveforms"]
    speakers = np.concatenate([part["speaker"] for part in parts])
    return {
        "waveform": np.round(32768 * np.concatenate(clips)).astype(np.int16),
        "offsets": np.cumsum([0] + [len(clip) for clip in clips]),
        "digits": np.concatenate([part["labels"] for part in parts]),
        "speakers": speakers,
        "is_test": np.repeat([False, True], [len(part["labels"]) for part in parts]),
        "speaker_names": np.array([f"voice {i}" for i in range(speakers.max() + 1)]),
        "sample_rate": np.array(voices.RATE),
        "language": np.concatenate([part["language"] for part in parts]),
        "voice": np.concatenate([part["voice"] for part in parts]),
    }


def unpack_voices(arrays: dict[str, np.ndarray]) -> Sounds:
    """What `record_voices` made -> Sounds; truth: language, an index into voices.LANGUAGES, and the voice's numbers."""
    sounds, is_test = as_sounds("voices", arrays), arrays["is_test"]
    for key in ("language", "voice"):
        sounds.truth |= {f"train_{key}": arrays[key][~is_test], f"test_{key}": arrays[key][is_test]}
    return sounds
