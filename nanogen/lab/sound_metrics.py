"""Metrics for sounds, by hand: functions of arrays, without networks; and a codec without learning.

    si_sdr             is it the same waveform, up to its loudness? in dB: 6 more is half the error
    mel_distance       is it the same spectrum, whatever the phases? roughly what the ear compares
    stoi               can the speech be understood? 0 to 1, and above 0.8 most people follow
    periodicity        is there a voice with a pitch, or noise? 0 to 1, recordings above 0.3
    pitch              how high is a note? in Hz, by autocorrelation
    real_time_factor   how many seconds of sound are processed in a second of computing
    mu_law             the baseline for codecs: fewer samples a second, of fewer bits each

SI-SDR punishes a sound that is right but shifted by half a millisecond, which nobody hears; the mel
distance ignores such a shift. STOI was fitted to listeners, and measures only intelligibility.

Sources: Le Roux et al. 2019, "SDR, half-baked or well done?"; Taal et al. 2011, "An Algorithm for
Intelligibility Prediction of Time-Frequency Weighted Noisy Speech" (STOI); ITU-T G.711 (mu-law).
Different here: 8 kHz sound is resampled to STOI's 10 kHz through its spectrum, which leaves the
highest band partly empty; mu-law takes any number of bits.
"""

import timeit
from collections.abc import Callable

import numpy as np
import torch

from nanogen import UserError
from nanogen.audio.spectral import log_mel
from nanogen.audio.wave_ar import MU
from nanogen.data.sources import SAMPLE_RATE, resample
from nanogen.lab import machine

# STOI's constants, all from the paper
STOI_RATE = 10_000  # samples a second
FRAME, FFT = 256, 512  # samples: frames of 25.6 ms, every 12.8 ms, padded to 512
BANDS, LOWEST = 15, 150.0  # third-octave bands, and the centre of the lowest in Hz
SEGMENT = 30  # frames that are compared at a time: 384 ms
SILENCE = 40.0  # dB below the loudest frame: quieter frames are left out
CLIP = 15.0  # dB: louder noise in a band counts no worse
WINDOW = np.hanning(FRAME + 2)[1:-1]


def si_sdr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of two waveforms (T,), in dB.
    The energy of that part of `decoded` which is a multiple of the original, over the energy of the
    rest. Equal sounds count as 100 dB, sounds with nothing in common as -100."""
    original, decoded = _pair(original, decoded)
    original, decoded = original - original.mean(), decoded - decoded.mean()
    target = original * (original @ decoded) / max(original @ original, 1e-12)
    error = decoded - target
    ratio = (target @ target) / (error @ error + 1e-12)
    return float(10 * np.log10(np.clip(ratio, 1e-10, 1e10)))


def mel_distance(original: np.ndarray, decoded: np.ndarray) -> float:
    """Mean absolute difference of two log-mel spectrograms, natural logarithm: 0.1 is 0.9 dB."""
    a, b = (log_mel(torch.tensor(x, dtype=torch.float32)[None]) for x in _pair(original, decoded))
    return (a - b).abs().mean().item()


def stoi(original: np.ndarray, decoded: np.ndarray) -> float:
    """Short-time objective intelligibility of waveforms (T,): 1 for equal ones, near 0 for noise.
    The mean correlation of the two loudness curves, over segments of 384 ms and third-octave bands.
    UserError where less than 384 ms is left without the pauses: join short clips first."""
    pair = (resample(x, SAMPLE_RATE, STOI_RATE) for x in _pair(original, decoded))
    a, b = _without_silence(*pair)
    edges = np.rint(LOWEST * 2 ** (np.arange(-0.5, BANDS) / 3) * FFT / STOI_RATE).astype(int)
    powers = (np.abs(np.fft.rfft(_frames(part) * WINDOW, FFT)).T ** 2 for part in (a, b))
    x, y = (np.sqrt(np.add.reduceat(power, edges)[:-1]) for power in powers)  # (15, frames)
    if x.shape[1] < SEGMENT:
        seconds = len(a) / STOI_RATE
        raise UserError(f"STOI needs at least 0.4 s of speech, got {seconds:.2f}: join clips first")
    correlations = []
    for bands in zip(x, y, strict=True):  # one band at a time, for memory
        p, q = (np.lib.stride_tricks.sliding_window_view(band, SEGMENT) for band in bands)
        q = q * _norm(p) / (_norm(q) + 1e-12)  # (segments, 30)
        q = np.minimum(q, p * (1 + 10 ** (CLIP / 20)))  # one loud moment must not spoil a segment
        p, q = (part - part.mean(-1, keepdims=True) for part in (p, q))
        p, q = (part / (_norm(part) + 1e-12) for part in (p, q))
        correlations.append((p * q).sum(-1).mean())
    return float(np.mean(correlations))


def periodicity(waveform: np.ndarray) -> float:
    """How much a sound (T,) at 8,000 Hz repeats itself at the pitch of a voice, 80 to 400 Hz: at
    most 0.2 for noise, 0.34 to 0.83 for nine in ten recordings of FSDD, about 0.9 for a tone.
    The highest peak of the autocorrelation at lags of 2.5 to 12.5 ms, relative to that at lag 0, in
    frames of 64 ms. The median of those frames that are at most 10 dB softer than the loudest."""
    frames = _frames(np.asarray(waveform, dtype=np.float64), 512, 128)
    frames = frames - frames.mean(1, keepdims=True)
    energy = np.square(frames).sum(1)
    spectra = np.fft.rfft(frames[energy >= energy.max() / 10], 1024)  # padded: no lag wraps around
    correlation = np.fft.irfft(np.abs(spectra) ** 2)
    return float(np.median(correlation[:, 20:101].max(1) / (correlation[:, 0] + 1e-12)))


def pitch(waveform: np.ndarray, low: float = 90, high: float = 620) -> float:
    """The pitch of a note (T,) at 8,000 Hz in Hz, between `low` and `high`: the median over frames
    of 64 ms. A frame's period is the shortest lag at which the autocorrelation has a peak of at
    least nine tenths of its maximum. NaN where there is none. A soft accompaniment does no harm."""
    window = np.hanning(512)
    least, most = int(SAMPLE_RATE / high), int(SAMPLE_RATE / low) + 2
    own = np.fft.irfft(np.abs(np.fft.rfft(window, 2048)) ** 2)[:most]
    found = []
    for frame in _frames(waveform, 512, 64):
        spectrum = np.abs(np.fft.rfft((frame - frame.mean()) * window, 2048)) ** 2
        x = np.fft.irfft(spectrum)[:most] / own  # the window makes long lags smaller
        inside = np.arange(least, most - 1)
        peaks = inside[(x[inside] >= x[inside - 1]) & (x[inside] >= x[inside + 1])]
        peaks = peaks[x[peaks] > 0.9 * x[least:].max()]
        if len(peaks):
            before, there, after = x[peaks[0] - 1 : peaks[0] + 2]  # a parabola through three points
            curve = before - 2 * there + after
            found.append(SAMPLE_RATE / (peaks[0] + 0.5 * (before - after) / (curve - 1e-12)))
    return float(np.median(found)) if found else float("nan")


def real_time_factor(function: Callable, seconds: float) -> float:
    """Seconds of sound per second of computing, on one thread; the fastest of three calls counts.
    function() processes `seconds` of sound. Above 1 is faster than real time, as EnCodec counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = timeit.repeat(lambda: (function(), machine.synchronize()), repeat=3, number=1)
        return seconds / min(times)
    finally:
        torch.set_num_threads(threads)


def mu_law(waveforms: np.ndarray, kbps: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Encode and decode waveforms (N, T) at `kbps` -> (N, T), (samples a second, bits a sample).
    Of the pairs with that product, the one with the best mean SI-SDR. Above 64 kbit/s, which is 8
    bits at 8,000 Hz, nothing improves. The peak of each clip is sent, too, but not counted."""
    rates = {bits: int(1000 * min(kbps, 8 * SAMPLE_RATE / 1000) / bits) for bits in range(1, 9)}
    copies = {(rate, bits): np.stack([_mu_law_at(clip, rate, bits) for clip in waveforms])
              for bits, rate in rates.items() if 0 < rate <= SAMPLE_RATE}

    def score(pair: tuple[int, int]) -> float:
        return np.mean([si_sdr(*clips) for clips in zip(waveforms, copies[pair], strict=True)])

    best = max(copies, key=score)
    return copies[best], best


def _mu_law_at(clip: np.ndarray, rate: int, bits: int) -> np.ndarray:
    """(T,) -> (T,): resampled to `rate`, each sample rounded to one of 2^bits levels."""
    peak, levels = np.abs(clip).max() + 1e-9, 2**bits
    low = (resample(clip, SAMPLE_RATE, rate) / peak).clip(-1, 1)
    y = np.sign(low) * np.log1p(MU * np.abs(low)) / np.log1p(MU)  # in [-1, 1]
    cell = np.floor((y + 1) / 2 * levels).clip(0, levels - 1)
    y = (cell + 0.5) / levels * 2 - 1  # the middle of the cell
    low = np.sign(y) * np.expm1(np.abs(y) * np.log1p(MU)) / MU
    back = resample(peak * low, rate, SAMPLE_RATE)[: len(clip)]
    return np.pad(back, (0, len(clip) - len(back))).clip(-1, 1).astype(np.float32)


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"sounds compare as waveforms (T,) of one length, got {a.shape}, {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("a waveform contains NaN or infinity: has the model diverged?")
    return a, b


def _norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def _frames(x: np.ndarray, size: int = FRAME, step: int = FRAME // 2) -> np.ndarray:
    """(T,) -> (frames, size), one each `step` samples. A sound below one frame is padded."""
    x = np.pad(x, (0, max(0, size - len(x))))
    return np.lib.stride_tricks.sliding_window_view(x, size)[::step]


def _without_silence(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Both without the frames where `a` is silent; the others are joined again by overlap-add."""
    frames, half, joined = [_frames(x) * WINDOW for x in (a, b)], FRAME // 2, []
    level = 20 * np.log10(_norm(frames[0])[:, 0] + 1e-12)
    for kept in (x[level > level.max() - SILENCE] for x in frames):
        first, second = kept[:, :half].ravel(), kept[:, half:].ravel()
        joined.append(np.pad(first, (0, half)) + np.pad(second, (half, 0)))
    return joined
