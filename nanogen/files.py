"""Files: written whole or not at all, known by their content, and errors as sentences.

The only place that writes atomically or hashes, and the one boundary at which an error of a
library becomes a sentence for the user (`explained`).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from nanogen import UserError


@contextlib.contextmanager
def explained(sentence: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds (all, unless told) inside the block become a UserError.
    sentence: what to say, with {reason} where the error's own words belong. A UserError passes."""
    kinds = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(sentence.replace("{reason}", reason(error))) from error


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """A lack of memory, of the computer or its GPU, inside the block becomes a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacks = "out of memory|(allocate|not enough) memory|bad_alloc|ALLOC_FAILED"
        if isinstance(error, MemoryError) or re.search(lacks, str(error)):
            raise UserError(f"There is not enough memory: {advice}.") from error
        raise


def reason(error: Exception) -> str:
    """An error in one line: its first line, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def make_folder(folder: Path) -> Path:
    """Make the folder and those above it, if they are missing."""
    with explained(f"Cannot make the folder {folder} ({{reason}}).", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def writable(folder: Path) -> bool:
    """Whether it can be written, or made. One that is marked read-only is spared, even by root."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK) and bool(there.stat().st_mode & 0o200)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary path), then rename: a crash leaves the old file or the new one."""
    partial = make_folder(path.parent) / f".{path.stem}.{os.getpid()}.partial{path.suffix}"
    try:
        with explained(f"Cannot write {path} ({{reason}}): is the disk full? An old one is kept."):
            write(partial)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8, whatever the locale."""
    write_atomically(path, lambda partial: partial.write_text(
        text, encoding="utf-8", errors="surrogateescape"))  # names of files may be any bytes


def write_json(path: Path, content) -> None:
    """A dict or list as indented JSON."""
    write_text(path, json.dumps(content, indent=1))


def write_npz(path: Path, arrays: dict[str, np.ndarray], compressed: bool = True) -> None:
    """Arrays by name. Without compression, reading is three times as fast."""
    save = np.savez_compressed if compressed else np.savez

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # numpy would append .npz to a name
            save(file, **arrays)

    write_atomically(path, write)


def read_npz(path: Path, advice: str = "delete it and run again") -> dict[str, np.ndarray]:
    """All arrays of an npz file. UserError, with this advice, if it is damaged or not one."""
    with explained(f"{path} cannot be read ({{reason}}): {advice}."):
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """One process at a time works in the folder; the file `lock` there names it, and the system
    frees it when its process ends. wait: for another one to finish; else UserError."""
    while True:
        path = make_folder(folder) / "lock"
        with explained(f"Cannot write {path} ({{reason}}).", OSError):
            file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            if not wait:
                file.close()
                raise UserError(f"Process {owner} works in {folder}: wait for it, or choose "
                                "another --out.") from None
            print(f"Waiting for {folder}, which process {owner} trains.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # the other one has removed the file
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # if nothing else was written


def content_hash(path: Path) -> str:
    """sha256 of a file's content, 16 digits of it."""
    return fingerprint(Path(path).read_bytes())


def fingerprint(*parts) -> str:
    """16 digits of the sha256 of bytes, arrays and anything else by its repr."""
    key = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            key.update(f"{part.dtype}{part.shape}".encode())
            key.update(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
        else:
            key.update(part if isinstance(part, bytes) else repr(part).encode())
    return key.hexdigest()[:16]
