"""Where data comes from: folders of one's own, and downloads.

Images in folders, of any kind and size, become RGB squares; sounds of any rate, mono at 8 kHz. One
line says what was found, what was ignored, and what cannot be read. What comes from the network is
not trusted before its checksum is right, and is never unpacked to the disk.
"""

import hashlib
import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import soundfile
from PIL import Image, ImageOps
from tqdm import tqdm

from nanogen import UserError
from nanogen.files import content_hash, explained

SAMPLE_RATE = 8000  # samples a second, of every sound in nanogen
SIZE = 32  # pixels a side of images; larger ones are read on demand (`read_images`)
KINDS = {  # the files that count
    "images": {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"},
    "sounds": {".wav", ".flac", ".ogg", ".mp3"}}
TESTS = ("test", "val", "valid", "validation")  # folders beside train/; the first one is the test
Image.MAX_IMAGE_PIXELS = 150_000_000  # Pillow warns above this, and refuses twice as many


# ---- a folder of one's own

def read_folder(folder: Path) -> tuple[str, dict, dict, dict[str, list[str]]]:
    """Images or sounds, whichever are more -> kind, train, test and names of a `Dataset`.
    Class folders in train/ and in test/ (or val/) are the two parts. Otherwise, a tenth of each
    class is the test: at least one file, none if there is only one. The parts and their order are
    the same on every machine: a hash of the file names decides. Without sub-folders, all files are
    of one class. UserError if there is nothing that can be read."""
    every = visible_files(folder)
    found = {kind: [file for file in every if file.suffix.lower() in KINDS[kind]] for kind in KINDS}
    kind = max(found, key=lambda kind: len(found[kind]))
    if not found[kind]:
        kinds = f"({' '.join(sorted(set.union(*KINDS.values())))})"
        raise UserError(f"{folder} has no images or sounds {kinds}: add one folder for each class.")
    classes, tests, part = divide(found[kind], folder.resolve().name)
    wanted = [file for name in classes for file in (*classes[name], *tests.get(name, ()))]
    read, skipped = {}, []  # {file: {column: value}}, and sentences about what cannot be read
    for file in tqdm(wanted, f"reading {folder.name}", delay=1):
        try:
            read[file] = read_example(folder / file, kind)
        except UserError as error:
            skipped.append(str(error))

    train, test, names = [], [], []
    for name in classes:
        learned, tested = ([read[file] | {"labels": len(names)} for file in files if file in read]
                           for files in (classes[name], tests.get(name, ())))
        if not part:
            count = max(1, len(learned) // 10) if len(learned) > 1 else 0
            tested, learned = learned[:count], learned[count:]
        if learned:
            train += learned
            test += tested
            names.append(name)
    if not train:
        raise UserError(f"No file in {folder} can be read; the first: {skipped[0]}")

    parts = []
    for examples in (train, test):
        mixed = np.random.default_rng(0).permutation(len(examples))  # mix the classes
        columns = {key: [examples[i][key] for i in mixed] for key in train[0]}
        columns |= {key: np.array(columns[key], np.int64) for key, value in train[0].items()
                    if isinstance(value, int)}
        if kind == "images":
            columns["images"] = np.array(columns["images"], np.uint8).reshape(-1, SIZE, SIZE, 3)
        parts.append(columns)
    unused = sorted({*every} - {*wanted})
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one says it
        print(census(folder, kind, names, *parts, part, unused, skipped), flush=True)
    return kind, *parts, {"labels": names} | ({"speakers": ["unknown"]} if kind == "sounds" else {})


def read_example(path: Path, kind: str) -> dict:
    """The columns of one file. sides: of an image's central square, in pixels."""
    if kind == "sounds":
        columns = {"waveforms": read_sound(path), "speakers": 0}
    else:
        columns = {"images": read_image(path), "prompts": path.stem.replace("_", " ")}
        with Image.open(path) as image:
            columns["sides"] = min(image.size)
    return columns | {"files": str(path), "hashes": content_hash(path)}


def visible_files(folder: Path) -> list[Path]:
    """All files, as paths within the folder, but none that is hidden or within a hidden folder."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        files += [Path(place, name).relative_to(folder) for name in names if name[0] != "."]
    return files


def divide(files: list[Path], name: str) -> tuple[dict, dict, str]:
    """{class: files} to learn from, {class: files} for the test, and the test's folder ("": none).
    name: of the only class where there are no sub-folders."""
    tops = by_folder(files, 0)
    parts = {name.lower().removesuffix("ing"): name for name in tops}  # training/, Val/
    learned = by_folder(tops[parts["train"]], 1) if "train" in parts else {}
    if not learned or (len(tops) > 1 and not parts.keys() & set(TESTS)):
        return tops or {name: sorted(files, key=order)}, {}, ""
    tests = {parts[name]: by_folder(tops[parts[name]], 1) for name in TESTS if name in parts}
    part = next(filter(tests.get, tests), "")
    return learned, tests.get(part, {}), part


def by_folder(files: list[Path], level: int) -> dict[str, list[Path]]:
    """{name of the folder at this level of the path: its files, in the order of their hash}."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: order(file, level + 1)):
        if len(file.parts) > level + 1:
            groups.setdefault(file.parts[level], []).append(file)
    return {name: groups[name] for name in sorted(groups)}


def order(file: Path, level: int = 0) -> bytes:
    """A hash of the path without the folders above this level."""
    return hashlib.sha256(os.fsencode("/".join(file.parts[level:]))).digest()


def census(folder: Path, kind: str, names: list[str], train: dict, test: dict, part: str,
           unused: list[Path], skipped: list[str]) -> str:
    """What a folder holds, in one line of sentences."""
    counts = np.bincount(np.concatenate([train["labels"], test["labels"]])).tolist()
    sizes = [f"{name} {count:,}" for name, count in zip(names, counts, strict=True)]
    if len(sizes) > 10:
        sizes = [f"smallest: {sizes[np.argmin(counts)]}", f"largest: {sizes[np.argmax(counts)]}"]
    classes = f"{len(names):,} class{'es' if len(names) > 1 else ''} ({', '.join(sizes)})"
    said = [f"{folder}: {sum(counts):,} {kind} of {classes}, {len(test['labels']):,} for the test"
            + (f", those in {part}/." if part else ".")]
    if kind == "images":
        sides = sorted({*train["sides"], *test["sides"]})
        if sides != [SIZE]:
            said.append(f"Their central squares have {sides[0]:,} to {sides[-1]:,} pixels a side; "
                        f"a method sees {SIZE}, or its --size.")
    else:
        seconds = [len(clip) / SAMPLE_RATE for clip in train["waveforms"] + test["waveforms"]]
        said.append(f"They last {sum(seconds):,.1f} s in total, the longest {max(seconds):,.1f} s.")
    if unused:
        kinds = Counter(unused_kind(file, KINDS[kind]) for file in unused).most_common()
        few = [f"{count:,} {name}" for name, count in kinds[:8]] + ["..."] * (len(kinds) > 8)
        said.append(f"Ignored: {', '.join(few)}.")
    if skipped:
        said += [f"Skipped {len(skipped):,} that cannot be read:", *skipped[:5]]
    return " ".join(said)


def unused_kind(file: Path, suffixes: set[str]) -> str:
    """.txt, or where a file lies that could be read: ".png in val/a/"."""
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        return suffix or "without a suffix"
    return f"{suffix} in {file.parent}/" if len(file.parts) > 1 else f"{suffix} beside the folders"


def read_images(paths: list[str], size: int) -> np.ndarray:
    """`read_image` for many -> uint8 (N, size, size, 3)."""
    bar = tqdm(paths, f"reading at {size}x{size}", delay=1)
    return np.array([read_image(path, size) for path in bar], np.uint8).reshape(-1, size, size, 3)


def read_image(path: str | Path, size: int = SIZE) -> np.ndarray:
    """Any image -> uint8 (size, size, 3): the central square, resized with antialiasing, on white.
    Grey, palette and 16-bit become RGB; of an animation, the first frame. UserError if it cannot be
    read, or has so many pixels that it may be a small file made to fill the memory."""
    with explained(f"{path} is no image that can be read ({{reason}})."):
        with Image.open(path) as image:
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at an eighth or so
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip at 255 instead of scaling
            upright = Image.fromarray((np.asarray(upright) / 256).clip(0, 255).astype(np.uint8))
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.crop((left, top, left + side, top + side)).convert("RGBA")
        small = square.resize((size, size), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", small.size, "white")
        return np.array(Image.alpha_composite(white, small).convert("RGB"))


def read_sound(path: str | Path) -> np.ndarray:
    """A WAV, FLAC, OGG or MP3 file -> float32 (T,) in [-1, 1], mono. UserError for a bad file."""
    with explained(f"{path} is no sound that can be read ({{reason}})."):
        check_complete(path)
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (T, channels)
        if not len(channels) or not np.isfinite(channels).all():
            raise ValueError("it is empty, or has values that are not finite")
        return resample(channels.mean(axis=1), rate, SAMPLE_RATE).clip(-1, 1)


def check_complete(path: str | Path) -> None:
    """ValueError for a WAV file that was cut off: libsndfile reads the rest without a word."""
    with open(path, "rb") as file:
        head, there = file.read(8), os.stat(path).st_size
    wanted = 8 + int.from_bytes(head[4:], "little")
    # Programs that write to a pipe leave a very large number there. A last byte may be padding.
    if head[:4] == b"RIFF" and there + 1 < wanted < 0x7FFF0000:
        raise ValueError(f"it is cut off: {there:,} of {wanted:,} bytes are there")


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(T,) at `rate` -> float32 (T * new_rate / rate, rounded up,) at `new_rate`, in Hz.
    Transform to the spectrum, keep the frequencies that the new rate can represent, transform back.
    The transform treats the sound as periodic: silence parts its end from its beginning."""
    if rate == new_rate:
        return waveform.astype(np.float32)
    up, down = new_rate // gcd(rate, new_rate), rate // gcd(rate, new_rate)
    blocks = -(-(len(waveform) + rate // 10) // down)  # of `down` samples, which become `up`
    spectrum = np.fft.rfft(waveform, blocks * down)[: blocks * up // 2 + 1]
    resampled = np.fft.irfft(spectrum, blocks * up) * (up / down)
    return resampled[: -(-len(waveform) * up // down)].astype(np.float32)


# ---- downloads
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
TIMEOUT = 30  # seconds without an answer, or without a further byte, until a download has failed


class Source(NamedTuple):
    """Where to have a data set from."""

    url: str
    archive: str  # its file name; a file of this name in the data folder is taken instead
    digest: Callable[[bytes], str]  # how the checksum is computed
    checksum: str
    read: Callable[[bytes], dict[str, np.ndarray]]  # the archive -> the arrays of the cache


def download(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of `name`, from the archive that was put into the folder by hand, or downloaded.
    UserError if that fails or the checksum is wrong."""
    source = SOURCES[name]
    by_hand = folder / source.archive
    where = source.archive if by_hand.exists() else urlsplit(source.url).hostname
    with explained(f"{name} could not be downloaded ({where}: {{reason}}): run again, or put the "
                   f"file into {folder} by hand as data/README.md says."):
        archive = by_hand.read_bytes() if by_hand.exists() else fetch(source)
        if source.digest(archive) != source.checksum:
            raise ValueError("the checksum is wrong")
        return source.read(archive)


def fetch(source: Source) -> bytes:
    """The content of the archive. OSError if the host fails or ends too early."""
    request = Request(source.url, headers={"User-Agent": "nanogen"})
    with urlopen(request, timeout=TIMEOUT) as response:
        total = int(response.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(response, "read", total or None, desc=source.archive) as file:
            content = b"".join(iter(lambda: file.read(1 << 18), b""))
    if len(content) < total:
        raise OSError(f"the connection broke off after {len(content):,} of {total:,} bytes")
    return content


def members(archive: bytes, wanted: str) -> dict[str, bytes]:
    """Files with `wanted` in their name: {name without folders: content}, sorted by name."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        found = {member.name.rpartition("/")[2]: tar.extractfile(member).read()
                 for member in tar if member.isfile() and wanted in member.name.rpartition("/")[2]}
    return dict(sorted(found.items()))


def md5(archive: bytes) -> str:
    return hashlib.md5(archive).hexdigest()


def wav_sha256(archive: bytes) -> str:
    """Checksum of name and bytes of every wav: hosts re-pack such archives, the content stays."""
    files = members(archive, ".wav")
    return hashlib.sha256(b"".join(name.encode() + files[name] for name in files)).hexdigest()


def read_cifar10_binary(archive: bytes) -> dict[str, np.ndarray]:
    """The "binary version": records of a label byte and 3072 bytes, red, green, then blue."""
    arrays, batches = {"class_names": np.array(CIFAR10.split())}, members(archive, "_batch")
    for part, prefix in (("train", "data_batch"), ("test", "test_batch")):
        content = b"".join(batches[name] for name in batches if name.startswith(prefix))
        rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        planes = rows[:, 1:].reshape(-1, 3, 32, 32)
        arrays[f"{part}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{part}_labels"] = rows[:, 0]
    return arrays


def read_fsdd(archive: bytes) -> dict[str, np.ndarray]:
    """Files {digit}_{speaker}_{index}.wav. By the data set's own rule, index 0-4 is the test."""
    files = members(archive, ".wav")
    clips = [soundfile.read(io.BytesIO(content), dtype="int16")[0] for content in files.values()]
    digits, speakers, indices = np.array([name[: -len(".wav")].split("_") for name in files]).T
    speaker_names, speakers = np.unique(speakers, return_inverse=True)
    return {"waveform": np.concatenate(clips),
            "offsets": np.cumsum([0] + [len(clip) for clip in clips]),
            "digits": digits.astype(np.uint8), "speakers": speakers.astype(np.uint8),
            "is_test": indices.astype(int) < 5,
            "speaker_names": speaker_names, "sample_rate": np.array(8000)}


COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"  # of v1.0.10: earlier tags lack recordings
SOURCES = {
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz",
        md5, "c32a1d4ab5d03f1284b67883e8d87530", read_cifar10_binary),
    "fsdd": Source(
        f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{COMMIT}.tar.gz",
        f"free-spoken-digit-dataset-{COMMIT}.tar.gz", wav_sha256,
        "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e", read_fsdd),
}
