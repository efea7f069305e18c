"""Dubbing: what a clip says, said again in another language, by the same voice, in the same time.

    clip --listener--> words --> digits --speech, with the clip as the voice--> another clip

    nanogen dub runs/speech-recordings my.wav --language german --out dubbed.wav
"""

import numpy as np
import torch
from torch import Tensor

from nanogen.data.sources import SAMPLE_RATE
from nanogen.data.utterances import LANGUAGES, sounding
from nanogen.lab import machine
from nanogen.lab.prepare import pad
from nanogen.lab.runs import Run
from nanogen.lab.sample import cut, sample
from nanogen.listener import Listener


def listen(listener: Listener, clips: list[np.ndarray]) -> tuple[list[list[int]], Tensor]:
    """`Listener.listen` of clips (T,) in batches: the words of each, and the voices (N, V)."""
    words, vectors = [], []
    for i in range(0, len(clips), 100):
        batch = (tensor.to(machine.device()) for tensor in pad(clips[i : i + 100]))
        heard, voices = listener.listen(*batch)
        words, vectors = words + heard, [*vectors, voices.cpu()]
    return words, torch.cat(vectors)


def dub(run: Run, listener: Listener, clips: list[np.ndarray], language: str, seed: int = 0,
        **settings) -> list[tuple[np.ndarray, str, str]]:
    """Clips (T,) -> for each the dubbed one (T,), with the same silence at its ends; its digits;
    and the language that was heard, that of most words. Where no digit is heard: silence, "" and
    "". settings: of the sampler."""
    dubbed = []
    for clip, words in zip(clips, listen(listener, clips)[0], strict=True):
        if not words:
            dubbed.append((np.zeros_like(clip), "", ""))
            continue
        digits = "".join(str(word % 10) for word in words)
        heard = LANGUAGES[np.bincount([word // 10 for word in words]).argmax()]
        start, end = sounding(clip)
        asked = {"prompts": [digits], "languages": [language], "voices": [clip[start:end]]}
        said = cut(sample(run, 1, asked, seed, seconds=(end - start) / SAMPLE_RATE, **settings))[0]
        whole = np.pad(said, (start, max(0, len(clip) - start - len(said))))[: len(clip)]
        dubbed.append((whole, digits, heard))
    return dubbed
