"""The data sets: load("cifar10"), load("fsdd"), load("scenes"), load("voices"), load("a/folder").

All of them are small: a few arrays in memory, from which a training draws batches by indexing.
KINDS lists those that have a name: they are downloaded once, or made once from a seed, and kept as
<name>.npz in `data_folders()`; data/README.md has hosts and licences. A folder of one's own has one
sub-folder for each class, or train/ and test/ (or val/) with these sub-folders.

"fsdd-without-jackson" has the speaker jackson in its test part alone: an unseen speaker.
"""

import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from nanogen import UserError
from nanogen.data import scenes, songs, utterances, voices
from nanogen.data.made import MADE, made_once
from nanogen.data.sources import SAMPLE_RATE, SOURCES, TESTS, download, read_folder, visible_files
from nanogen.files import explained, fingerprint, make_folder, read_npz, writable, write_npz

KINDS = {
    "cifar10": "images",  # 60,000 photographs of 10 classes, 32x32 (Krizhevsky 2009)
    "fsdd": "sounds",  # 3,000 spoken digits by 6 speakers, 8 kHz (Free Spoken Digit Dataset)
    "scenes": "images",  # 55,000 drawings with captions and the truth about them: scenes.py
    "prompts": "images",  # 44,000 texts and the drawings that they ask for, edits too: prompts.py
    "things": "images",  # 22,000 drawings of several things, to train the reader on: prompts.py
    "subject": "images",  # five drawings of something that no other data set has: prompts.py
    "clips": "videos",  # 6,600 clips of 8 frames with a moving thing, and captions: scenes.py
    "numbers": "images",  # 22,000 numbers, each as a caption, a drawing and a sound: numbers.py
    "voices": "sounds",  # 8,800 spoken digits in 3 languages by 240 voices: voices.py
    "utterances": "sounds",  # 6,600 rows of digits, two languages in one voice: utterances.py
    "songs": "sounds",  # 2,200 sung lines with strings: songs.py
    "all": "sounds",  # of fsdd, utterances and songs, for a codec that serves all of them
    "recordings": "sounds",  # utterances, and rows of fsdd's digits without one of its speakers
}
LEFT_OUT = "jackson"  # the speaker of fsdd that recordings do not have
ALL = {"fsdd": None, "utterances": 1_000, "songs": 500}  # how many training clips of each
CLIP_ARRAYS = ("waveform", "digits", "speakers", "offsets", "is_test", "speaker_names",
               "sample_rate")  # of a file of sounds; all others are columns
WITHOUT = "-without-"  # fsdd-without-jackson
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(eq=False)
class Dataset:
    """Examples to learn from (`train`) and to measure on (`test`), as columns of one length N.

    images     uint8 (N, H, W, 3)           labels    int64 (N,), a class: an index into its names
    waveforms  N float32 (T,) in [-1, 1]    speakers  int64 (N,), a voice: an index into its names
    videos     uint8 (N, T, H, W, 3)        prompts   N texts (scenes: captions)

    A folder's files: "files", their paths (an image's name is its prompt); "hashes" of their
    content; "sides" of images, in pixels.
    All further columns are the truth about data made by code: "background", "mask", "voice", ..."""

    name: str  # "cifar10", or what `name_of` calls a folder
    origin: str  # what `load` takes to load it again: a name, or the folder's whole path
    kind: str  # "images", "sounds" or "videos"
    train: dict
    test: dict
    names: dict[str, list[str]]  # what the integers of a column mean: {"labels": ["dog", ...], ...}
    count: int | None = None  # loaded with this count; None: all
    sample_rate: int = SAMPLE_RATE  # of sounds, in samples a second

    def __len__(self) -> int:
        """The number of training examples."""
        return len(self.train[self.main])

    @property
    def main(self) -> str:
        """The name of the main column: "images", "waveforms" or "videos"."""
        return "waveforms" if self.kind == "sounds" else self.kind

    @cached_property
    def fingerprint(self) -> str:
        """16 digits that identify the content, labels, speakers and their names. Of files, the
        bytes count, not their decoding. A single class may have the name of a moved folder."""
        names = [self.names.get(column) for column in ("labels", "speakers")]
        parts = [known if known is None or len(known) > 1 else len(known) for known in names]
        content = "hashes" if "hashes" in self.train else self.main
        for part in (self.train, self.test):
            for column in (content, "labels", "speakers"):
                values = part.get(column, ())
                parts += [column, *([values] if isinstance(values, np.ndarray) else values)]
        return fingerprint(*parts)

    def describe(self) -> dict:
        """What a run stores about its data."""
        return {"name": self.name, "origin": self.origin, "kind": self.kind, "count": self.count,
                "fingerprint": self.fingerprint}

    def classes(self, column: str) -> int:
        """How many classes of "labels" or "speakers" there are to learn from. Speakers of the
        test part alone have the last numbers (voices) or one between the others
        (fsdd-without-jackson), so the largest number in the training part decides."""
        numbers = self.train[column]
        return int(numbers.max()) + 1 if column == "speakers" else len(self.names[column])


def whole(name: str) -> str:
    """The data set with all its speakers: fsdd-without-jackson -> fsdd; any other name as it is."""
    first = str(name).partition(WITHOUT)[0]
    return first if first in SOURCES else str(name)


def kind_of(name: str) -> str | None:
    """The kind of a named data set. None for a folder: it must be read first."""
    return KINDS.get(whole(name))


def resolved(name: str | Path) -> str:
    """One spelling of the same data: pets/, ./pets and ~/pets become the folder's whole path."""
    own = Path(name).expanduser()
    return str(own.resolve()) if kind_of(str(name)) is None and own.is_dir() else str(name)


def name_of(data: str | Path) -> str:
    """What runs are named after: cifar10, or a folder: pets; pets/train is pets-train."""
    path = Path(resolved(data))
    common = path.name.lower() in ("train", "data", "images", *TESTS) and path.parent.name
    return f"{path.parent.name}-{path.name}" if common else path.name


def load(name_or_path: str | Path, folder: Path | None = None, count: int | None = None) -> Dataset:
    """A data set by its name, or a folder of one's own by its path.
    folder: where <name>.npz is kept, if not where `data_folders` says. count: load only so many
    training examples and a tenth as many for the test, evenly spaced (data made by code: made on
    the spot, not cached). UserError for an unknown name, a bad file or a failed download."""
    name = str(name_or_path)
    if count is not None and count < 1:
        raise UserError(f"count must be at least 1, got {count}.")
    folders = [Path(folder)] if folder else data_folders()
    if name in MADE:
        return load_made(name, folders, count)
    if name == "all":
        return load_all(folder, count)
    if name == "recordings":
        return load_recordings(folder, count)
    if whole(name) in SOURCES:
        data = load_downloaded(whole(name), folders)
        data = data if name == whole(name) else without(data, name.partition(WITHOUT)[2])
    elif name and Path(name).expanduser().is_dir():
        own = Path(resolved(name))
        data = Dataset(name_of(own), str(own), *read_folder(own))
    else:
        raise UserError(f"There is no data set or folder {name!r}: say {', '.join(KINDS)} or an "
                        "existing folder.")
    return data if count is None else thin(data, count)


def remembered(origin: str, count: int | None = None) -> Dataset:
    """`load`, remembering the last two while the files of a folder stay what they are."""
    files = sorted(visible_files(Path(origin))) if kind_of(origin) is None else ()
    times = [(file, (Path(origin) / file).lstat().st_mtime_ns) for file in files]
    return _load(origin, count, *data_folders(), *times)


@lru_cache(maxsize=2)
def _load(origin: str, count: int | None, *state) -> Dataset:
    return load(origin, count=count)


def without(data: Dataset, speaker: str) -> Dataset:
    """The training clips of all other speakers, and the test clips of this one."""
    names = data.names["speakers"]
    if speaker not in names:
        raise UserError(f"{data.name} has no speaker {speaker!r} to leave out: its speakers are "
                        f"{', '.join(names)}.")
    number, name = names.index(speaker), data.name + WITHOUT + speaker
    train = choose(data.train, np.flatnonzero(data.train["speakers"] != number))
    test = choose(data.test, np.flatnonzero(data.test["speakers"] == number))
    return replace(data, name=name, origin=name, train=train, test=test)


def thin(data: Dataset, count: int) -> Dataset:
    """`count` training and `count / 10` test examples, evenly spaced: fsdd is sorted by digit."""
    parts = {}
    for part, wanted in (("train", count), ("test", max(1, count // 10))):
        columns = getattr(data, part)
        total = len(columns[data.main])
        parts[part] = choose(columns, np.linspace(0, total - 1, min(wanted, total)).astype(int))
    return replace(data, **parts, count=count)


def choose(columns: dict, rows: np.ndarray) -> dict:
    """These rows of all columns, arrays and lists."""
    return {name: [values[i] for i in rows] if isinstance(values, list) else values[rows]
            for name, values in columns.items()}


# ---- where files are kept

def data_folders() -> list[Path]:
    """Where data is looked for: $NANOGEN_DATA, data/ of a checkout, ~/.cache/nanogen.
    New data is kept in the first that can be written. An installed package has no data/."""
    own = os.environ.get("NANOGEN_DATA")
    checkout = REPOSITORY / "data" if (REPOSITORY / "pyproject.toml").exists() else None
    return [Path(path).expanduser() for path in (own, checkout, "~/.cache/nanogen") if path]


# ---- downloaded: cifar10, fsdd

def load_downloaded(name: str, folders: list[Path]) -> Dataset:
    """<name>.npz from the first folder that has it; else it is downloaded and kept."""
    there = [folder / f"{name}.npz" for folder in folders if (folder / f"{name}.npz").exists()]
    if there:
        path, arrays = there[0], read_npz(there[0], "if it is damaged, delete it and run again")
    else:
        folder = next(filter(writable, folders), None)
        if folder is None:
            raise UserError(f"{folders[0]} cannot be written: set NANOGEN_DATA to another folder.")
        path, arrays = folder / f"{name}.npz", download(name, make_folder(folder))
        write_npz(path, arrays, compressed=False)
    sentence = f"{path} does not hold {name} ({{reason}}): delete it and run again."
    with explained(sentence, KeyError, ValueError, IndexError):
        return (as_images if name == "cifar10" else as_sounds)(name, arrays)


def load_all(folder: Path | None, count: int | None) -> Dataset:
    """ALL as one data set; labels and speakers say which one a sound is from. With a count, only
    the sounds that code makes: a small set for a first look needs no download."""
    sides = [{"waveforms": [], "labels": []}, {"waveforms": [], "labels": []}]
    for number, (name, most) in enumerate(ALL.items()):
        if count and name in SOURCES:
            continue
        part = load(name, folder, count and count // 2 + 1)  # half from each of the two
        for side, columns, fraction in zip(sides, (part.train, part.test), (1, 10), strict=True):
            clips = columns["waveforms"][: most and most // fraction]
            side["waveforms"] += clips
            side["labels"] += [number] * len(clips)
    for side in sides:
        side["labels"] = side["speakers"] = np.array(side["labels"])
    names = {"labels": list(ALL), "speakers": list(ALL)}
    return Dataset("all", "all", "sounds", *sides, names, count)


def load_recordings(folder: Path | None, count: int | None) -> Dataset:
    """The utterances, and rows of FSDD's digits by all speakers but LEFT_OUT, to learn from."""
    made, real = load("utterances", folder, count), load("fsdd", folder)
    clips = without(real, LEFT_OUT).train
    # Five made recordings to two of people, whose phonemes are known less exactly.
    rows = utterances.join(clips["waveforms"], clips["labels"], clips["speakers"],
                           len(made) * 2 // 5)
    rows["speakers"] = rows.pop("speaker") + made.classes("speakers")
    test = made.test | {"speakers": made.test["speakers"] + len(real.names["speakers"])}
    train = {name: values + rows[name] if isinstance(values, list) else
             np.concatenate([values, rows[name]])
             for name, values in made.train.items() if name in rows}
    speakers, heard = made.names["speakers"], made.classes("speakers")
    speakers = speakers[:heard] + real.names["speakers"] + speakers[heard:]
    return replace(made, name="recordings", origin="recordings", train=train, test=test,
                   names=made.names | {"speakers": speakers})


def as_images(name: str, arrays: dict[str, np.ndarray]) -> Dataset:
    """Arrays "train_images" (or "train_videos"), "test_labels"... as a data set."""
    parts = {"train": {}, "test": {}}
    names = {"labels": arrays["class_names"].tolist()}
    for key, values in arrays.items():
        part, _, column = key.partition("_")
        if part in parts:
            parts[part][column] = values.astype(np.int64) if column == "labels" else values
    return Dataset(name, name, KINDS[name], **parts, names=names)


def as_sounds(name: str, arrays: dict[str, np.ndarray]) -> Dataset:
    """All clips end to end, and where each begins, as a data set."""
    clips = np.split(arrays["waveform"].astype(np.float32) / 32768, arrays["offsets"][1:-1])
    columns = {"waveforms": clips, "labels": arrays["digits"].astype(np.int64),
               "speakers": arrays["speakers"].astype(np.int64),
               **{key: values for key, values in arrays.items() if key not in CLIP_ARRAYS}}
    is_test = arrays["is_test"]
    train, test = (choose(columns, np.flatnonzero(rows)) for rows in (~is_test, is_test))
    classes = list(songs.MOODS) if name == "songs" else list("0123456789")
    names = {"labels": classes, "speakers": arrays["speaker_names"].tolist()}
    return Dataset(name, name, "sounds", train, test, names)


# ---- made by code

def load_made(name: str, folders: list[Path], count: int | None) -> Dataset:
    """One of MADE. With a count it is made on the spot; without, it is made once and kept."""
    small = {"speakers": 20, "languages": ["english"]} if name == "voices" else {}  # easier
    arrays = MADE[name][0](count, max(2, count // 10), **small) if count \
        else made_once(name, folders)
    if KINDS[name] == "sounds":
        data = as_sounds(name, arrays)
        return replace(data, names=data.names | {"languages": list(voices.LANGUAGES)}, count=count)
    data = as_images(name, arrays)
    if name == "scenes":
        for columns in (data.train, data.test):
            looks = (columns[key] for key in ("labels", "color", "background"))
            columns["prompts"] = scenes.captions(*looks)
    names = {"background": scenes.BACKGROUNDS, "color": scenes.COLORS, "facing": scenes.FACINGS}
    return replace(data, names=data.names | {key: list(names[key]) for key in names}, count=count)
