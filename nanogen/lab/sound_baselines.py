"""Speech codecs that learn nothing, at any bit rate: what a neural codec has to beat.

    mu_law               fewer samples a second, of fewer bits each: how the telephone has done it since 1972, taken down
    linear_prediction    a buzz or a hiss through a filter, in frames of 54 bits: as the LPC-10 vocoder of 1984

The first keeps the waveform, and at 2 kbit/s has one bit for each of 2,000 samples. The second forgets the waveform, and
sends only what a throat did: loudness, pitch, and ten numbers for the shape of the tract.

Sources: ITU-T G.711 (mu-law); Tremain 1982, "The Government Standard Linear Predictive Coding Algorithm: LPC-10".
Different here: plain mu-law with rounding to any number of bits; a vocoder with one rate of 54 bits per frame, whose
frames come closer together or further apart for other bit rates, and with an evenly spaced pitch table. Mu-law scales each
clip to its loudest sample, 8 bits a clip for which it is not charged.
"""

import numpy as np

from nanogen.audio.wave_ar import MU
from nanogen.data.folders import SAMPLE_RATE, resample
from nanogen.lab.sound_metrics import si_sdr

ORDER = 10  # coefficients of the filter: two for each of four formants, and two for the slope
BITS = (5, 5, 5, 5, 4, 4, 4, 4, 3, 2)  # for each of them: the first ones matter most
PITCH_BITS, GAIN_BITS = 7, 6  # 41 + 7 + 6 = 54 bits a frame
WINDOW = 256  # samples that a frame looks at: 32 ms, not quite two periods of the lowest voice
LAGS = (20, 147)  # a period in samples: 400 to 55 Hz, and 127 steps of one sample
SOFTEST = 1e-5  # the least gain that is sent
STEP = 40  # samples between two updates of the synthesis filter: 5 ms

# ---- mu-law


def mu_law(waveforms: np.ndarray, kbps: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Waveforms (N, T) there and back at `kbps` -> (N, T), and the (samples a second, bits a sample) behind it: of the
    pairs with that product, the one with the best mean SI-SDR. Of more than 64 kbit/s, 8 bits at 8,000, it makes no use."""
    kbps = min(kbps, 8 * SAMPLE_RATE / 1000)
    best, result, pair = -np.inf, None, None
    for bits in range(1, 9):
        rate = int(1000 * kbps / bits)
        if not 0 < rate <= SAMPLE_RATE:
            continue
        decoded = np.stack([_mu_law_at(clip, rate, bits) for clip in waveforms])
        score = np.mean([si_sdr(*clips) for clips in zip(waveforms, decoded, strict=True)])
        if score > best:
            best, result, pair = score, decoded, (rate, bits)
    return result, pair


def _mu_law_at(clip: np.ndarray, rate: int, bits: int) -> np.ndarray:
    """(T,) -> (T,): resampled to `rate`, each sample sent as one of 2^bits levels, dense near zero."""
    peak = np.abs(clip).max() + 1e-9
    low = (resample(clip, SAMPLE_RATE, rate) / peak).clip(-1, 1)
    squashed = np.sign(low) * np.log1p(MU * np.abs(low)) / np.log1p(MU)  # in [-1, 1]
    levels = 2**bits
    squashed = (np.floor((squashed + 1) / 2 * levels).clip(0, levels - 1) + 0.5) / levels * 2 - 1  # the middle of its cell
    low = np.sign(squashed) * np.expm1(np.abs(squashed) * np.log1p(MU)) / MU
    back = resample(peak * low, rate, SAMPLE_RATE)[: len(clip)]
    return np.pad(back, (0, len(clip) - len(back))).clip(-1, 1).astype(np.float32)


# ---- linear prediction


def linear_prediction(waveforms: np.ndarray, kbps: float, seed: int = 0) -> np.ndarray:
    """Waveforms (N, T) there and back through the vocoder at `kbps` -> (N, T) in [-1, 1]. More than 10.8 it does not use."""
    hop = (sum(BITS) + PITCH_BITS + GAIN_BITS) / kbps / 1000 * SAMPLE_RATE  # samples from frame to frame
    hop = max(hop, STEP)  # within a step the filter stays as it is
    places = np.arange(0, waveforms.shape[1] + hop, hop)
    return synthesize(*analyze(waveforms.astype(np.float64), places), places, waveforms.shape[1], seed)


def analyze(waveforms: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is sent of waveforms (N, T) at P places, already rounded: shapes (N, P, 10), the filter's reflection
    coefficients as angles; periods (N, P) in samples, 0 where there is no voice; gains (N, P)."""
    padded = np.pad(waveforms, ((0, 0), (WINDOW // 2, WINDOW + int(places[-1]) - waveforms.shape[1] + WINDOW)))
    index = places.astype(int)[:, None] + np.arange(WINDOW)
    frames = padded[:, index]  # (N, P, WINDOW)
    windowed = frames * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(windowed, 2 * WINDOW)) ** 2
    correlation = np.fft.irfft(power)[..., : LAGS[1] + 2]  # (N, P, lags)
    reflections, error = _levinson(correlation[..., : ORDER + 1])
    shapes = np.arcsin(reflections)  # near +-1, where the filter rings, small changes matter: angles are dense there
    steps = 2.0 ** np.array(BITS)
    shapes = (np.floor((shapes / np.pi + 0.5) * steps).clip(0, steps - 1) + 0.5) / steps * np.pi - np.pi / 2

    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(WINDOW), 2 * WINDOW)) ** 2)[: LAGS[1] + 2]
    periodic = correlation / window * window[0] / (correlation[..., :1] + 1e-9)  # the window alone would make it fall
    peaks = periodic[..., LAGS[0] : LAGS[1]]
    voiced = peaks.max(-1) > 0.45
    periods = np.where(voiced, LAGS[0] + peaks.argmax(-1), 0)

    gains = np.sqrt(error / (np.hanning(WINDOW) ** 2).sum())  # root mean square of what prediction leaves
    levels = 2**GAIN_BITS - 1
    share = np.round(np.log(gains.clip(SOFTEST, 1) / SOFTEST) / -np.log(SOFTEST) * levels) / levels
    return shapes, periods, np.where(share > 0, SOFTEST ** (1 - share), 0)


def _levinson(correlation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levinson's and Durbin's recursion: autocorrelation (..., 11) -> reflection coefficients (..., 10) and what prediction
    leaves of the energy (...)."""
    error = correlation[..., 0] * (1 + 1e-4) + 1e-9  # a little white noise keeps it from dividing by nothing
    a, reflections = np.zeros((*error.shape, ORDER)), []
    for i in range(ORDER):
        k = (correlation[..., i + 1] - (a[..., :i] * correlation[..., i:0:-1]).sum(-1)) / error
        a[..., :i] -= k[..., None] * a[..., :i][..., ::-1]
        a[..., i] = k
        error = error * (1 - k**2)
        reflections.append(k)
    return np.stack(reflections, axis=-1).clip(-1, 1), error


def synthesize(shapes: np.ndarray, periods: np.ndarray, gains: np.ndarray, places: np.ndarray, total: int, seed: int):
    """What `analyze` sent -> waveforms (N, total): shapes and gains glide from frame to frame, pitch and voice jump."""
    random, count = np.random.default_rng(seed), len(shapes)
    out, phase = np.zeros((count, total + ORDER)), np.zeros(count)
    for first in range(0, total, STEP):
        size = min(STEP, total - first)
        at = (first + size / 2) / (places[1] - places[0])
        before, after, share = int(at), min(int(at) + 1, len(places) - 1), at % 1
        nearest = before if share < 0.5 else after
        k = np.sin((1 - share) * shapes[:, before] + share * shapes[:, after])  # below 1: the filter cannot run away
        a = np.zeros((count, 0))
        for i in range(ORDER):
            a = np.concatenate([a - k[:, i : i + 1] * a[:, ::-1], k[:, i : i + 1]], axis=1)
        gain = (1 - share) * gains[:, before] + share * gains[:, after]
        period = periods[:, nearest]
        turns = phase[:, None] + np.arange(1, size + 1) / np.where(period > 0, period, 1)[:, None]
        pulses = np.diff(np.floor(turns), axis=1, prepend=np.floor(phase)[:, None]) * np.sqrt(period)[:, None]
        phase = np.where(period > 0, turns[:, -1] % 1, 0)
        source = np.where(period[:, None] > 0, pulses, random.standard_normal((count, size))) * gain[:, None]
        for t in range(size):  # y[t] = a . (y[t-1], ..., y[t-10]) + source
            n = first + t
            out[:, n + ORDER] = (a * out[:, n : n + ORDER][:, ::-1]).sum(1) + source[:, t]
    return out[:, ORDER:].clip(-1, 1).astype(np.float32)
