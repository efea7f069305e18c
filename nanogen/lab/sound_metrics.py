"""Numbers for sounds: how close is what came back to what was said? Functions of arrays, no networks.

    si_sdr           the same waveform, up to its loudness? in dB: 6 more is half the error
    mel_distance     the same spectrum, whatever the phases? what the ear compares, roughly
    stoi             can the words be made out? 0 to 1, and above 0.8 most people follow
    real_time_factor how many seconds of sound a second of computing is worth

SI-SDR punishes a sound that is right but shifted by half a millisecond; the ear does not. The mel distance is the other
way round. STOI was fitted to listeners: of the three it says most about speech, and nothing about a voice's beauty.

Sources: Le Roux et al. 2019, "SDR, half-baked or well done?"; Taal et al. 2011, "An Algorithm for Intelligibility
Prediction of Time-Frequency Weighted Noisy Speech" (STOI, with all of its constants).
Different here: resampling to STOI's 10 kHz goes through the spectrum; of 8 kHz sound its highest band is partly empty.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from nanogen import UserError
from nanogen.audio.spectral import log_mel
from nanogen.data.folders import SAMPLE_RATE, resample
from nanogen.lab import machine

# STOI's constants, all from the paper
STOI_RATE = 10_000  # samples a second
FRAME, FFT = 256, 512  # samples: a frame of 25.6 ms, every 12.8 ms, padded to 512 for the transform
BANDS, LOWEST = 15, 150.0  # third-octave bands, and the centre of the lowest in Hz
SEGMENT = 30  # frames that are compared at a time: 384 ms
SILENCE = 40.0  # dB below the loudest frame: softer ones are left out
CLIP = 15.0  # dB: a noise louder than this in a band counts no worse


def si_sdr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of two waveforms (T,), in dB: the energy of the part of `decoded` that is
    a multiple of the original, over the energy of the rest. Equal sounds count as 100 dB, nothing in common as -100."""
    original, decoded = _pair(original, decoded)
    original, decoded = original - original.mean(), decoded - decoded.mean()
    target = original * (original @ decoded) / max(original @ original, 1e-12)
    error = decoded - target
    ratio = (target @ target) / (error @ error + 1e-12)
    return float(10 * np.log10(np.clip(ratio, 1e-10, 1e10)))


def mel_distance(original: np.ndarray, decoded: np.ndarray) -> float:
    """Mean absolute difference of two waveforms' (T,) log-mel spectrograms, natural logarithm: 0.1 is about 0.9 dB."""
    a, b = (log_mel(torch.tensor(x, dtype=torch.float32)[None]) for x in _pair(original, decoded))
    return (a - b).abs().mean().item()


def stoi(original: np.ndarray, decoded: np.ndarray, rate: int = SAMPLE_RATE) -> float:
    """Short-time objective intelligibility of waveforms (T,) at `rate`: 1 for equal ones, near 0 for noise.

    In each third of an octave, the rise and fall of loudness over 384 ms is compared, and the correlations are averaged.
    UserError where less than that is left without the pauses: join short clips first.
    """
    a, b = (resample(x, rate, STOI_RATE) for x in _pair(original, decoded))
    a, b = _without_silence(a, b)
    window = np.hanning(FRAME + 2)[1:-1]
    centres = LOWEST * 2 ** (np.arange(BANDS) / 3)
    f = np.arange(FFT // 2 + 1) * STOI_RATE / FFT
    edges = [np.abs(f - edge).argmin() for edge in np.append(centres * 2 ** (-1 / 6), centres[-1] * 2 ** (1 / 6))]
    bands = np.array([(np.arange(len(f)) >= low) & (np.arange(len(f)) < high)
                      for low, high in zip(edges[:-1], edges[1:], strict=True)], dtype=float)  # (15, 257)
    x, y = (np.sqrt(np.abs(np.fft.rfft(_frames(part) * window, FFT)) ** 2 @ bands.T).T for part in (a, b))  # (15, frames)
    if x.shape[1] < SEGMENT:
        raise UserError(f"STOI needs at least 0.4 seconds of speech, got {len(a) / STOI_RATE:.2f}: join clips first")
    total, windows = 0.0, np.lib.stride_tricks.sliding_window_view
    starts = x.shape[1] - SEGMENT + 1
    for first in range(0, starts, 1000):  # a thousand segments at a time, for memory
        rows = slice(first, min(first + 1000, starts) + SEGMENT - 1)
        p, q = windows(x[:, rows], SEGMENT, axis=1), windows(y[:, rows], SEGMENT, axis=1)  # (15, segments, 30)
        q = q * np.linalg.norm(p, axis=-1, keepdims=True) / (np.linalg.norm(q, axis=-1, keepdims=True) + 1e-12)
        q = np.minimum(q, p * (1 + 10 ** (CLIP / 20)))  # one loud blow shall not spoil a whole segment
        p, q = (part - part.mean(-1, keepdims=True) for part in (p, q))
        p, q = (part / (np.linalg.norm(part, axis=-1, keepdims=True) + 1e-12) for part in (p, q))
        total += (p * q).sum()
    return float(total / (starts * BANDS))


def real_time_factor(function: Callable, seconds: float, repeats: int = 3) -> float:
    """Seconds of sound per second of computing, on one thread: function() works on `seconds` of sound, and the fastest of
    `repeats` counts. Above 1 is faster than real time, as EnCodec's paper counts (others print the inverse)."""
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            machine.synchronize()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return seconds / best


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"sounds compare as two waveforms (T,) of one length, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("a waveform holds NaN or infinity: look at the samples, the model may have diverged")
    return a, b


def _frames(x: np.ndarray) -> np.ndarray:
    """(T,) -> (frames, FRAME), half overlapping."""
    x = np.pad(x, (0, max(0, FRAME - len(x))))
    return np.lib.stride_tricks.sliding_window_view(x, FRAME)[:: FRAME // 2]


def _without_silence(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the frames where `a` is silent, what is left added up again with overlap."""
    window = np.hanning(FRAME + 2)[1:-1]
    frames_a, frames_b = _frames(a) * window, _frames(b) * window
    level = 20 * np.log10(np.linalg.norm(frames_a, axis=1) + 1e-12)
    kept = level > level.max() - SILENCE

    def joined(frames: np.ndarray) -> np.ndarray:
        half = FRAME // 2
        out = np.zeros((len(frames) + 1) * half)
        out[:-half] += frames[:, :half].ravel()
        out[half:] += frames[:, half:].ravel()
        return out

    return joined(frames_a[kept]), joined(frames_b[kept])
