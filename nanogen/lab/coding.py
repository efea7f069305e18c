"""Any picture or sound -> a small file of tokens -> back: what a tokenizer or a codec is for.

    python -m nanogen encode runs/codec-fsdd speech.flac --out speech.npz --kbps 2
    python -m nanogen decode runs/codec-fsdd speech.npz --out speech.wav

    speech.npz: "tokens" uint8 (frames, books), "length" in samples, and the hash of the weights that alone can read them.

A sound is read, resampled, encoded and written in blocks of ten seconds, so that an hour needs no more memory than a minute.
A picture is cut to its central square and brought to the size that the run has learned.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from nanogen import UserError
from nanogen.data.folders import SAMPLE_RATE, read_picture, reason, resample
from nanogen.lab import machine
from nanogen.lab.files import content_hash, write_atomically, write_npz
from nanogen.lab.pictures import to_float, to_uint8
from nanogen.lab.runs import Run

BLOCK, MARGIN = 10, 1  # seconds that are read at a time, and those on either side that resampling looks at
FRAMES = 1024  # frames that are decoded at a time
SOUND_KINDS = (".wav", ".flac", ".ogg")


def encode(run: Run, file: Path, out: Path, kbps: float | None = None) -> dict:
    """Write the tokens of a picture or sound to `out`, an npz, and give them back. kbps: of a codec, all its books unless
    told; the most books that fit are taken. UserError for what cannot be read, written or coded, and nothing is left behind."""
    if run.chapter == "codec":
        tokens, length = encode_sound(run, file, books_for(run, kbps))
        facts = {"length": np.array(length), "kbps": np.array(run.model.kbps(tokens.shape[1]))}
    elif run.chapter == "tokenizer":
        if kbps is not None:
            raise UserError(f"{run.folder} is a tokenizer of pictures: --kbps is for codecs.")
        picture = to_float(read_picture(file, run.model.config.size)[None]).to(machine.device())
        tokens, facts = ask(run, run.model.encode, picture)[0].cpu().numpy(), {}
    else:
        raise UserError(f"{run.folder} is a {run.chapter}: only tokenizers and codecs encode and decode.")
    if np.issubdtype(tokens.dtype, np.integer):
        tokens = tokens.astype(np.min_scalar_type(run.model.vocabulary - 1))  # 256 words fit into a byte
    content = {"tokens": tokens, **facts, "chapter": np.array(run.chapter), "hash": np.array(content_hash(run.folder))}
    write_npz(Path(out), content)
    return content


def decode(run: Run, file: Path, out: Path) -> None:
    """The picture (a PNG) or sound (WAV, FLAC or OGG, by the name of `out`) behind the tokens that `encode` wrote."""
    if run.chapter not in ("codec", "tokenizer"):
        raise UserError(f"{run.folder} is a {run.chapter}: only tokenizers and codecs encode and decode.")
    content, out = read_tokens(run, file), Path(out)
    kinds = SOUND_KINDS if run.chapter == "codec" else (".png",)
    if out.suffix.lower() not in kinds:
        raise UserError(f"{out} must end in {' or '.join(kinds)}.")
    tokens = torch.from_numpy(content["tokens"])
    tokens = tokens.to(machine.device(), torch.long if not tokens.is_floating_point() else torch.float32)
    if run.chapter == "tokenizer":
        picture = to_uint8(ask(run, run.model.decode, tokens[None]))[0]
        write_atomically(out, lambda path: Image.fromarray(picture).save(path, format="PNG"))
    else:
        write_sound(run, tokens, int(content["length"]), out)


def read_tokens(run: Run, file: Path) -> dict[str, np.ndarray]:
    """What `encode` wrote, checked: whole, of this very run, and words that it knows."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            content = dict(stored)
        tokens, written_by, kind = content["tokens"], str(content["hash"]), str(content["chapter"])
        length = int(content["length"]) if kind == "codec" else 0
    except Exception as error:  # zip, zlib and numpy each have their own for a damaged file
        raise UserError(f"{file} is no file of tokens that can be read ({reason(error)}): encode again.") from error
    if written_by != content_hash(run.folder):
        raise UserError(f"{file} holds tokens of another {kind} than {run.folder}: decode them with the run that "
                        "encoded them, or encode again.")
    if run.model.vocabulary:
        good = tokens.size > 0 and tokens.dtype.kind in "ui" and 0 <= tokens.min() and tokens.max() < run.model.vocabulary
    else:
        good = tokens.size > 0 and tokens.dtype.kind == "f" and np.isfinite(tokens).all()
    if run.chapter == "codec":
        good = good and tokens.ndim == 2 and tokens.shape[1] <= run.model.books
        good = good and len(tokens) == math.ceil(length / run.model.hop)
    if not good:
        raise UserError(f"{file} is damaged: its tokens are not words that {run.folder} knows, or not as many as they should be.")
    return content


@torch.no_grad()
def ask(run: Run, function, *inputs):
    """A call of the model; what it cannot take becomes a sentence."""
    try:
        with machine.autocast():
            return function(*inputs)
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{run.folder} cannot do this: {str(error).splitlines()[0]}.") from error


# ---- sounds, block by block


def books_for(run: Run, kbps: float | None) -> int:
    """How many of a codec's books fit into `kbps`."""
    model = run.model
    if kbps is None:
        return model.books
    least, most = model.kbps(1), model.kbps(model.books)
    if not least - 1e-6 <= kbps <= most + 1e-6:  # refuses what is not a number, too
        raise UserError(f"--kbps must be from {least:g} to {most:g} with {run.folder}, got {kbps:g}.")
    return max(books for books in range(1, model.books + 1) if model.kbps(books) <= kbps + 1e-6)


def encode_sound(run: Run, file: Path, books: int) -> tuple[np.ndarray, int]:
    """A sound file -> (words int (frames, books), its length in samples at 8,000 Hz)."""
    samples = 0

    def counted() -> Iterator[Tensor]:
        nonlocal samples
        for block in read_blocks(file):
            samples += len(block)
            yield torch.from_numpy(block)[None].to(machine.device())

    # Not in the machine's precision, as all else, but in float32: bfloat16 would choose some other words, and which of the two
    # a machine takes is measured anew each time. The same sound shall give the same file.
    parts = [words[0].cpu().numpy().astype(np.int32) for words in run.model.stream_encode(counted(), books)]
    return np.concatenate(parts), samples


def read_blocks(file: Path) -> Iterator[np.ndarray]:
    """A WAV, FLAC or OGG file of any rate -> mono at 8,000 Hz, float32 (T,) in [-1, 1], ten seconds at a time.

    Resampling goes through the spectrum of a block; a second more on both sides keeps its ends from being heard, and whole
    seconds fall on whole samples in any rate. UserError where the file ends too early or is none.
    """
    if not Path(file).is_file():
        raise UserError(f"There is no file {file}.")
    try:
        with soundfile.SoundFile(file) as sound:
            check_complete(file, sound)
            rate, total, read = sound.samplerate, 0, 0
            past = np.zeros(0, np.float32)  # what was read already, up to a second of it, before the present block
            present = read_mono(sound, BLOCK)
            while len(present):
                future = read_mono(sound, BLOCK)
                around = np.concatenate([past, present, future[: MARGIN * rate]])
                first = len(past) // rate * SAMPLE_RATE
                block = resample(around, rate, SAMPLE_RATE)[first : first + -(-len(present) * SAMPLE_RATE // rate)]
                total, read = total + len(block), read + len(present)
                yield block.clip(-1, 1)
                past, present = present[-MARGIN * rate :], future
            if read == 0:
                raise ValueError("it is empty")
            if 0 <= sound.frames < 2**62 and read < sound.frames:
                raise ValueError(f"it ends after {read / rate:.1f} of {sound.frames / rate:.1f} seconds")
    except UserError:
        raise
    except Exception as error:  # decoders meet broken files with almost any exception
        raise UserError(f"{file} is no sound that can be read ({reason(error)}).") from error


def read_mono(sound: soundfile.SoundFile, seconds: int) -> np.ndarray:
    """The next `seconds` of a file: float32 (T,), the mean over its channels."""
    block = sound.read(seconds * sound.samplerate, dtype="float32", always_2d=True)
    if not np.isfinite(block).all():
        raise ValueError("it holds values that are not numbers")
    return block.mean(axis=1)


def check_complete(file: Path, sound: soundfile.SoundFile) -> None:
    """A WAV file that was cut off still says in its head how long it was to be; the decoder only notes that it is not."""
    for line in sound.extra_info.splitlines():
        if line.strip().startswith("data") and "should be" in line:
            wanted, there = (int(word) for word in line.replace("(", " ").replace(")", " ").split() if word.isdigit())
            if there < wanted < 2**32 - 2**16:  # programs that write to a pipe leave the largest number there
                raise ValueError(f"it is cut off: {there:,} of {wanted:,} bytes are there")


def write_sound(run: Run, tokens: Tensor, length: int, out: Path) -> None:
    """Words (frames, books) -> a sound file of `length` samples, decoded FRAMES at a time."""
    partial = out.with_name(out.name + ".partial")
    kind = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG"}[out.suffix[1:].lower()]
    chunks: Iterable[Tensor] = (part[None] for part in tokens.split(FRAMES))
    try:
        with soundfile.SoundFile(partial, "w", SAMPLE_RATE, 1, format=kind) as sound:
            for waveforms in run.model.stream_decode(chunks):
                block = waveforms[0, :length].float().cpu().numpy()
                length -= len(block)
                sound.write(block)
        os.replace(partial, out)
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"Cannot write {out} ({reason(error)}): choose another place.") from error
    finally:
        partial.unlink(missing_ok=True)
