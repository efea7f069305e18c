"""Draw samples from a run and write what a person opens; encode and decode files.

    sample(run, n=64, guidance=3.0, out=Path("samples"))   images     grid.png  process.gif
                                                           videos     videos.gif  grid.png
                                                           waveforms  000.wav ...  spectrograms.png
    and always samples.npz: the outputs and the conditions that they were drawn for

    encode(run, "speech.flac", "speech.npz", kbps=2)   "tokens" uint8 (frames, codebooks), "length"
    decode(run, "speech.npz", "speech.wav")            in samples, and the hash of the weights
"""

import functools
import inspect
import time
import typing
import unicodedata
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from nanogen import UserError, files
from nanogen.data.sources import SAMPLE_RATE, read_image, read_sound
from nanogen.lab import machine
from nanogen.lab.plots import grid, save_gif, spectrograms, to_float, to_uint8
from nanogen.lab.prepare import encode_text, every, pad
from nanogen.method import Method, check_settings

if typing.TYPE_CHECKING:
    from nanogen.lab.runs import Run

MOST_SOUNDS = 60  # .wav files in one folder; samples.npz has them all


def sampler_settings(model: Method) -> dict[str, type]:
    """The settings of a model's sampler and their types: {"steps": int, "guidance": float, ...}."""
    hints = typing.get_type_hints(model.sample)
    names = [name for name in inspect.signature(model.sample).parameters
             if name not in ("conditions", "seed", "frames", "known")]
    return {name: (typing.get_args(hints[name]) or [hints[name]])[0] for name in names}


def sample(run: "Run", n: int = 64, conditions: dict[str, list] | None = None, seed: int = 0,
           frames: bool = False, batch_size: int = 250, out: Path | None = None,
           known: tuple | None = None, **settings) -> dict[str, np.ndarray]:
    """Draw n outputs -> {"images" uint8 (N, H, W, 3)}, {"videos" uint8 (N, T, H, W, 3)} or
    {"waveforms" float32 (N, T), "lengths", "sample_rate"}, and the conditions: "labels" int64 (N,).
    conditions: name -> values (class names or numbers, texts, files; all classes unless told). The
    first condition is spread evenly over the samples, in order, the others take turns. settings: of
    the sampler. frames: also "frames" uint8 (S, N, H, W, 3), how images come to be. out: a folder.
    known: what `read_known` returns, of which a part stays; the files take turns, too.
    """
    model, conditions = run.model, conditions or {}
    if n < 1 or not 0 <= seed < 2**63:
        raise UserError("The number of samples must be at least 1 and the seed from 0 to 2^63 - 1, "
                        f"got {n} and {seed}.")
    if model.kind != "generator":
        raise UserError(f"{run.folder} is a {run.method}: it has nothing to sample.")
    settings = {name: value for name, value in settings.items() if value is not None}
    for kind, said, there in (("condition", conditions, model.conditions),
                              ("sampler setting", settings, sampler_settings(model))):
        for name in said.keys() - there.keys():
            raise UserError(f"{run.method} has no {kind} {name!r}: choose from {', '.join(there)}.")
    settings = run.record["sampling"] | settings
    with files.explained(f"{run.method}: {{reason}}.", ValueError, TypeError):
        check_settings(settings, sampler_settings(model))
    chosen = {}  # condition -> n values: class numbers, texts or tensors
    for order, (name, kind) in enumerate(model.conditions.items()):
        values = read_condition(run, name, kind, conditions.get(name))
        turns = [i % len(values) if order else i * len(values) // n for i in range(n)]
        chosen[name] = [values[turn] for turn in turns]
    shows = "frames" in inspect.signature(model.sample).parameters
    outputs, growth, turn = [], [], torch.arange(n) % (len(known[0]) if known else 1)
    if known:  # encoded once, however many samples begin with it
        part = ask(run, model.known_part, *(tensor.to(machine.device()) for tensor in known))
    for i, first in enumerate(range(0, n, batch_size)):
        batch = {name: to_batch(values[first : first + batch_size], model.conditions[name])
                 for name, values in chosen.items()}
        grow = {"frames": True} if shows and (frames or (out and i == 0)) else {}
        if known:
            grow["known"] = part[turn[first : first + batch_size]]
        drawn = ask(run, model.sample, batch, seed=machine.seed_of(seed, i), **grow, **settings)
        growth.append([to_uint8(moment) for moment in drawn.pop("frames", [])])
        outputs.append(drawn)
    arrays = gather(outputs)
    for name, kind in model.conditions.items():
        if kind in ("class", "text", "optional text"):
            arrays[name] = np.array(chosen[name], dtype=np.int64 if kind == "class" else str)
    if known and model.data == "sounds":
        arrays |= {"known": known[0][turn].numpy(), "known_lengths": known[1][turn].numpy()}
    elif known:
        arrays |= {"known": to_uint8(known[0][turn]), "seen": known[1].numpy()}
    if out:
        write_samples(arrays, run, Path(out), growth[0])
    if frames:
        arrays["frames"] = np.array([np.concatenate(part) for part in zip(*growth, strict=True)])
    return arrays


def timed_sample(run: "Run", n: int, *arguments, **settings) -> tuple[dict, dict]:
    """What `sample` draws, and what it cost, as metrics."""
    start = time.perf_counter()
    drawn = sample(run, n, *arguments, **settings)
    machine.synchronize()
    seconds = time.perf_counter() - start
    name = "sound" if run.model.output == "waveforms" else run.model.output.removesuffix("s")
    return drawn, {"samples": n, f"seconds_per_{name}": seconds / n}


def read_condition(run: "Run", name: str, kind: str, said: list | None) -> list:
    """What the user says of a condition -> class numbers, texts, or tensors read from files."""
    if kind == "class":
        heard = [number for number, name in enumerate(run.names[name]) if name]  # "": never
        return [number_of(value, name, run) for value in said] if said else heard
    if kind == "text":
        return [str(text) for text in said or run.record["examples"][name]]
    if kind == "optional text":
        return list(map(str, said or [""]))
    if not said and kind == "optional image":
        return [-torch.ones(3, run.model.config.size, run.model.config.size)]  # black: none
    if not said and kind == "optional sound":
        return [torch.zeros(1)]  # silence: none
    if not said:
        raise UserError(f"{run.folder} needs --{name.removesuffix('s')} FILE.")
    if kind.endswith("image"):
        size = run.model.config.size
        images = [file if isinstance(file, np.ndarray) else read_image(file, size) for file in said]
        return list(to_float(np.stack(images)))
    return [torch.from_numpy(file if isinstance(file, np.ndarray) else read_sound(file))
            for file in said]


def read_known(run: "Run", known: list, hole: tuple | None = None, mask: str | Path | None = None,
               keep: float | None = None) -> tuple[Tensor, Tensor]:
    """Images (files, or arrays uint8 (H, W, 3)) of which a part stays: float (K, 3, size, size), at
    the size of the model; and bool (size, size), where they stay. hole: (x, y, width, height) of
    the rectangle to draw, in pixels at that size, from the upper left. mask: an image instead, its
    central square, white where to draw. Or sounds (files, or arrays (T,)) of which the first `keep`
    seconds stay, all unless told: (K, T), and the lengths (K,). UserError for a part outside."""
    if run.model.data == "sounds":
        clips = [clip if isinstance(clip, np.ndarray) else read_sound(clip) for clip in known]
        if keep is not None and not 0 < keep <= min(map(len, clips)) / SAMPLE_RATE:
            raise UserError(f"--keep must be more than 0 and at most the length of the sound, "
                            f"{min(map(len, clips)) / SAMPLE_RATE:.2f} seconds, got {keep:g}.")
        return pad([clip[: round(keep * SAMPLE_RATE)] if keep else clip for clip in clips])
    size = run.model.config.size
    if (hole is None) == (mask is None):
        raise UserError(f"Which part is to be drawn? --hole x,y,width,height in {size}x{size} "
                        "pixels, or --mask FILE, white there.")
    arrays = [image if isinstance(image, np.ndarray) else read_image(image, size)
              for image in known]
    if any(array.shape != (size, size, 3) for array in arrays):
        raise UserError(f"{run.folder} keeps images of {size}x{size} pixels.")
    seen = torch.ones(size, size, dtype=torch.bool)
    if hole is not None:
        x, y, width, height = hole if len(hole) == 4 else (0, 0, 0, 0)
        if not (0 <= x < x + width <= size and 0 <= y < y + height <= size):
            raise UserError(f"--hole must be x,y,width,height inside {size}x{size} pixels, got "
                            f"{','.join(map(str, hole))}.")
        seen[y : y + height, x : x + width] = False
    else:
        seen = to_float(read_image(mask, size)[None])[0].mean(0) < 0
    return to_float(np.stack(arrays)), seen


def to_batch(values: list, kind: str) -> Tensor:
    """Values of one condition -> a tensor on the device."""
    make = {"class": torch.tensor, "text": encode_text}.get(kind.removeprefix("optional "))
    make = make or functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return make(values).to(machine.device())


def number_of(said: str | int, condition: str, run: "Run") -> int:
    """A class or speaker by its name; else by a name that differs in case only, if one does; else
    by its number, unless names are numbers themselves. "" is the name of what was never heard."""

    def plain(name: str) -> str:  # some systems store an accent as a character of its own
        return unicodedata.normalize("NFC", name).casefold()

    names, said = run.names[condition], str(said)
    alike = [number for number, name in enumerate(names) if name and plain(name) == plain(said)]
    if said and said in names:
        return names.index(said)
    if len(alike) == 1:
        return alike[0]
    by_number = said.isdecimal() and not any(map(str.isdecimal, names))
    if by_number and int(said) < len(names) and names[int(said)]:
        return int(said)
    names = [name for name in names if name]
    some = ", ".join(names) if len(names) <= 30 else f"{names[0]} to {names[-1]}"
    raise UserError(f"There is no {condition.removesuffix('s')} {said!r}: choose from {some}.")


@torch.inference_mode()
def ask(run: "Run", function, *inputs, **settings):
    """A call of the model, in the machine's precision; what it refuses becomes a sentence."""
    with files.explained(f"{run.method}: {{reason}}.", ValueError, TypeError, IndexError):
        with machine.autocast():
            return function(*inputs, **settings)


def gather(outputs: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """The outputs of all batches as arrays: images, videos, waveforms, thoughts, what there is."""
    thoughts = sum((drawn.get("thoughts", []) for drawn in outputs), [])
    said = {"thoughts": np.array(thoughts)} if thoughts else {}
    if "waveforms" not in outputs[0]:
        return said | {kind: np.concatenate([to_uint8(drawn[kind]) for drawn in outputs])
                       for kind in ("images", "videos") if kind in outputs[0]}
    clips = [clip.float().cpu().numpy() for drawn in outputs for clip in cut(drawn)]
    waveforms, lengths = pad(clips)
    return {"waveforms": waveforms.clamp(-1, 1).numpy(), "lengths": lengths.numpy(),
            "sample_rate": np.array(SAMPLE_RATE)} | said


def cut(drawn: dict) -> list:
    """The waveforms that `sample` returned, or those of a batch, each at its length."""
    return [clip[:length] for clip, length
            in zip(drawn["waveforms"], drawn["lengths"], strict=True)]


def write_samples(drawn: dict[str, np.ndarray], run: "Run", out: Path, growth: list = ()) -> None:
    """samples.npz, and images, animations or sounds to open. growth: uint8 (N, H, W, 3) of some
    moments, for process.gif, which shows how up to 30 of the images come to be."""
    files.make_folder(out)
    if (out / "samples.npz").exists():  # else no file in there is ours
        for path in out.glob("[0-9][0-9][0-9]*.wav"):
            if path.stem.isdigit():
                path.unlink()
    files.write_npz(out / "samples.npz", drawn)
    if "waveforms" in drawn:
        total = len(drawn["lengths"])
        chosen = every(MOST_SOUNDS, total)
        clips = cut({name: drawn[name][chosen] for name in ("waveforms", "lengths")})
        titles = [", ".join(run.names[name][drawn[name][i]] if name in run.names
                            else str(drawn[name][i]) for name in run.model.conditions
                            if name in drawn and drawn[name][i] != "") for i in chosen]
        numbers = [f"{i:03}" for i in chosen]
        return write_sounds(clips, numbers, titles, out, 10 if total >= 10 else total)
    if not {"images", "videos"} & drawn.keys():
        return files.write_text(out / "texts.txt", "\n".join(drawn["thoughts"]) + "\n")
    images = drawn["images"] if "images" in drawn else drawn["videos"][:, 0]
    images = images[every(200, len(images))]
    columns = 10 if len(images) % 10 == 0 else 8
    files.write_atomically(out / "grid.png", grid(images, columns).save)
    moments, name = growth, "process.gif"
    if "videos" in drawn:
        moments, name = list(drawn["videos"].swapaxes(0, 1)), "videos.gif"
    if len(moments):
        few = every(30, len(moments[0]))
        moments, columns = [moment[few] for moment in moments], min(10, len(few))
        files.write_atomically(out / name, lambda path: save_gif(moments, path, columns=columns))


def write_sounds(clips: list[np.ndarray], names: list[str], titles: list[str], out: Path,
                 columns: int) -> None:
    """<name>.wav of each clip (T,), 16 bits, and spectrograms.png with titles, some in a row."""
    with files.explained(f"Cannot write sounds into {out} ({{reason}}): is the disk full?"):
        for clip, name in zip(clips, names, strict=True):
            soundfile.write(out / f"{name}.wav", clip.clip(-1, 1), SAMPLE_RATE, "PCM_16")
    files.write_atomically(out / "spectrograms.png", spectrograms(clips, titles, columns).savefig)


def encode(run: "Run", file: Path, out: Path, kbps: float | None = None) -> dict:
    """Write the tokens of an image or sound to `out`, an npz, and return them.
    kbps: of a codec; the most codebooks that fit are used, all unless told. An image is cut to its
    central square and resized. UserError for what cannot be read, written or encoded."""
    model = run.model
    if model.kind != "tokenizer":
        raise UserError(f"{run.folder} is a {run.method}: only tokenizers and codecs encode.")
    if model.data == "sounds":
        waveform = torch.from_numpy(read_sound(file))[None].to(machine.device())
        used = model.codebooks
        if kbps is not None:
            least, most = model.kbps(1), model.kbps(used)
            if not least <= kbps <= most:  # also refuses NaN
                raise UserError(f"--kbps must be from {least:g} to {most:g} with {run.folder}, "
                                f"got {kbps:g}.")
            used = max(k for k in range(1, used + 1) if model.kbps(k) <= kbps + 1e-6)
        # In float32: bfloat16 would choose some other codes, and the same file should give the
        # same tokens on every machine. Ten seconds at a time, so that an hour fits into memory.
        chunks = model.stream_encode(waveform.split(10 * SAMPLE_RATE, dim=1), used)
        tokens = torch.cat([chunk.cpu() for chunk in chunks], dim=1)[0].numpy()
        facts = {"length": np.array(waveform.shape[1]), "kbps": np.array(model.kbps(used))}
    else:
        if kbps is not None:
            raise UserError(f"{run.folder} encodes images: --kbps is for codecs.")
        image = to_float(read_image(file, model.config.size)[None]).to(machine.device())
        tokens, facts = ask(run, model.encode, image)[0].cpu().numpy(), {}
    if np.issubdtype(tokens.dtype, np.integer):
        tokens = tokens.astype(np.min_scalar_type(model.codebook_size - 1))
    content = {"tokens": tokens, **facts, "hash": np.array(weights_hash(run))}
    files.write_npz(Path(out), content)
    return content


def decode(run: "Run", file: Path, out: Path) -> None:
    """Tokens that `encode` wrote -> an image (PNG) or a sound (WAV, FLAC or OGG, by `out`)."""
    model, out = run.model, Path(out)
    if model.kind != "tokenizer":
        raise UserError(f"{run.folder} is a {run.method}: only tokenizers and codecs decode.")
    kinds = (".wav", ".flac", ".ogg") if model.data == "sounds" else (".png",)
    if out.suffix.lower() not in kinds:
        raise UserError(f"{out} must end in {' or '.join(kinds)}.")
    content = files.read_npz(file, "encode again")
    with files.explained(f"{file} holds no tokens of {run.folder} ({{reason}}): encode again."):
        if str(content["hash"]) != weights_hash(run):
            raise ValueError("another run wrote it")
        tokens = torch.from_numpy(content["tokens"])
        dtype = torch.float32 if tokens.is_floating_point() else torch.long
        tokens = tokens.to(machine.device(), dtype)[None]
        if model.data == "images":
            write = Image.fromarray(to_uint8(ask(run, model.decode, tokens))[0]).save
        else:
            with torch.no_grad():
                parts = [part.cpu() for part in model.stream_decode(tokens.split(1024, dim=1))]
            waveform = torch.cat(parts, dim=1)[0, : int(content["length"])].float().numpy()
            write = functools.partial(soundfile.write, data=waveform, samplerate=SAMPLE_RATE)
    files.write_atomically(out, write)


def weights_hash(run: "Run") -> str:
    """Which weights wrote the tokens. UserError for an unfinished run: its weights still change."""
    with files.explained(f"{run.folder} is not finished: train it with --resume first.", OSError):
        return files.content_hash(run.folder / "model.safetensors")
