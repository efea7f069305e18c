"""Metrics of speech: are the right words heard, in the right voice, for the right time?

The listener (nanogen/listener.py) writes down what it hears and compares voices. Recordings go the
same way, to show what the listener itself misses.

    words right        1 - edits / words: a word that is missing, wrong or too many is an edit
    equal error rate   of telling "the voice of the prompt" from "the voice of another prompt"
"""

import time

import numpy as np
import torch
from torch import Tensor

from nanogen.data import utterances
from nanogen.data.datasets import Dataset
from nanogen.data.sources import SAMPLE_RATE
from nanogen.lab import machine
from nanogen.lab.prepare import pad
from nanogen.lab.runs import Run
from nanogen.lab.sample import sample, write_samples
from nanogen.listener import Listener, edits, equal_error_rate

STRETCHES = (0.7, 1.4)  # times the natural length
PROMPTS = (0.5, 1.0, 2.0)  # seconds of the voice prompt


@torch.no_grad()
def listen(listener: Listener, waveforms: Tensor, lengths: Tensor) -> tuple[list, Tensor]:
    """`Listener.listen` of sounds (N, T) in batches."""
    words, voices = [], []
    for clips, ends in zip(waveforms.split(100), lengths.split(100), strict=True):
        heard, voice = listener.listen(clips.to(machine.device()), ends.to(machine.device()))
        words, voices = words + heard, [*voices, voice.cpu()]
    return words, torch.cat(voices)


def score(wanted: list[list[int]], heard: list[list[int]]) -> float:
    """The fraction of words right, over all sounds."""
    wrong = sum(min(edits(said, got), len(said)) for said, got in zip(wanted, heard, strict=True))
    return 1 - wrong / sum(map(len, wanted))


def words_right(listener: Listener, waveforms: Tensor, wanted: dict) -> float:
    """`score` of sounds (N, T) that have "words" (N, L), -1 after the last, and "lengths" (N,)."""
    said = [row[row >= 0].tolist() for row in wanted["words"]]
    return score(said, listen(listener, waveforms, wanted["lengths"])[0])


def voice_error(voices: Tensor, others: Tensor, speakers: np.ndarray) -> float:
    """The equal error rate of voices (N, V) against one other recording of each, in the same order;
    all pairs of two speakers are the different ones."""
    cosines = (voices @ others.T).numpy()
    different = speakers[:, None] != speakers
    return equal_error_rate(np.diag(cosines), cosines[different])


def parts(test: dict, rows: list[int]) -> tuple[list[np.ndarray], list[np.ndarray], list[list]]:
    """Recordings of two parts -> the first ones without the pause, the second ones, their words."""
    first, second, words = [], [], []
    for i in rows:
        clip, begin = test["waveforms"][i], test["begin"][i]
        heard = np.flatnonzero(test["frames"][i, :begin])  # phonemes, not silence
        first.append(clip[: (heard[-1] + 1) * utterances.HOP])
        second.append(clip[begin * utterances.HOP :])
        words.append([10 * test["language"][i, 1] + int(digit) for digit in test["prompts"][i]])
    return first, second, words


def evaluate_listener(listener: Listener, dataset: Dataset) -> dict:
    """The listener itself on all test recordings."""
    waveforms, lengths = pad(dataset.test["waveforms"])
    result = {"words_right": words_right(listener, waveforms, dataset.test | {"lengths": lengths})}
    if "begin" in dataset.test:
        first, second, _ = parts(dataset.test, range(len(waveforms)))
        voices, others = (listen(listener, *pad(clips))[1] for clips in (first, second))
        result["voice_error"] = voice_error(voices, others, dataset.test["speakers"])
    return result


def evaluate_speech(run: Run, dataset: Dataset, listener: Listener, n: int, seed: int,
                    settings: dict) -> dict:
    """Metrics of n test recordings: their first part is the voice prompt, by a voice that training
    did not have; the words of the second part are said. Again at other lengths, with shorter
    prompts, and with each recording's own length."""
    test, total = dataset.test, len(dataset.test["waveforms"])
    rows = np.linspace(0, total - 1, min(n, total)).astype(int).tolist()
    first, second, words = parts(test, rows)
    speakers, language = test["speakers"][rows], test["language"][rows, 1]
    names = np.array(run.names["languages"])
    _, prompt_voices = listen(listener, *pad(first))

    def say(prompts: list, chosen=slice(None), **more) -> tuple[dict, dict]:
        asked = {"prompts": [test["prompts"][i] for i in rows][chosen], "voices": prompts[chosen],
                 "languages": list(names[language[chosen]])}
        drawn = sample(run, len(asked["prompts"]), asked, seed, batch_size=25, **settings | more)
        clips, lengths = (torch.from_numpy(drawn[name]) for name in ("waveforms", "lengths"))
        heard, voices = listen(listener, clips, lengths)
        right = {"words_right": score(words[chosen], heard),
                 "voice_error": voice_error(voices, prompt_voices[chosen], speakers[chosen])}
        return right | {"heard": heard}, drawn

    start = time.perf_counter()
    natural, drawn = say(first)
    seconds = time.perf_counter() - start
    heard, voices = listen(listener, *pad(second))
    lengths = drawn["lengths"] / SAMPLE_RATE
    result = {"samples": len(rows), "seconds_per_sound": seconds / len(rows)} | natural
    for code, name in enumerate(names):
        chosen = np.flatnonzero(language == code)
        if len(chosen):
            result[f"words_right_{name}"] = score([words[i] for i in chosen],
                                                  [natural["heard"][i] for i in chosen])
    result |= {"words_right_real": score(words, heard),
               "voice_error_real": voice_error(voices, prompt_voices, speakers),
               "seconds": lengths.mean().item(),
               "seconds_real": np.mean([len(clip) for clip in second]).item() / SAMPLE_RATE}
    few = slice(0, None, 2)  # every second one: what follows takes six times as long
    for stretch in STRETCHES:
        more, _ = say(first, few, tempo=1 / stretch)
        result[f"at {stretch:g} times the length"] = more
    for seconds in PROMPTS:
        cut = [clip[: int(seconds * SAMPLE_RATE)] for clip in first]
        result[f"prompt of {seconds:g} s"] = say(cut, few)[0]
    write_samples(drawn, run, run.folder / "samples")
    for part in (result, *filter(lambda value: isinstance(value, dict), result.values())):
        part.pop("heard", None)
    return result | run.record["sampling"] | settings
