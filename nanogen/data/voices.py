"""Voices: speech, song and plucked strings, made by code from a seed. Nothing to download.

Speech is a source and a filter. The source: the glottis lets puffs of air through, 80 to 300 a
second, and narrow passages make the air hiss. The filter: the vocal tract, whose resonances
(formants) move with the tongue. The sound is the sum over all puffs of the tract's impulse response
at that time, and of noise, filtered likewise. A puff may lie between two samples, so the pitch is
exact. The response is a product of resonators F^2 / (F^2 - f^2 + i f B), one for each formant F of
bandwidth B. phonemes.py has the formants; between two phonemes everything glides.

A speaker is four numbers: length of the tract, pitch, breathiness, tempo. They are continuous, so
there is always an unseen voice. The truth is known (who, what, which pitch), so scores are exact.

Sources: Klatt 1980, "Software for a Cascade/Parallel Formant Synthesizer" (resonators, nasal zero);
Doval et al. 2003, "The Voice Source as a Causal/Anticausal Linear Filter" (the puff); Karplus and
Strong 1983, "Digital Synthesis of Plucked-String and Drum Timbres". Different from Klatt: each puff
has a tract of its own, so no filter changes while it sounds, and noise is filtered in short frames.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from nanogen.data import phonemes
from nanogen.data.phonemes import DIGITS, LANGUAGES, PHONEMES, SYLLABLES, Phone

RATE = 8000  # samples a second
MAN = 17.5  # cm: the length of the tract that the formants of phonemes.py belong to
BANDWIDTHS = (75, 110, 170)  # Hz, of the three formants that move
UPPER = ((3500, 220), (4200, 300), (5000, 500))  # Hz: fixed formants, and their bandwidths
NOSE, NASAL_ZERO = 270, 180  # Hz: the nose's resonance; how far above it its zero lies when open
RING, LEAD = 512, 128  # samples in the response to a puff; of these, before the glottis shuts
HOP, GRAIN = 32, 256  # samples between two frames of noise, and in one with its response


@dataclass(frozen=True)
class Speaker:
    """A voice."""

    tract: float = MAN  # length, cm: all formants scale with its inverse
    pitch: float = 120.0  # mean pitch, Hz
    breath: float = 0.2  # breathiness: 0 pressed, 1 nearly a whisper
    tempo: float = 1.0  # of speech: 2 is twice as fast

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Speaker":
        """An adult or a child: short tracts tend to have high voices, the rest is independent."""
        tract = float(rng.uniform(13.5, 18.5))
        pitch = 115 * (MAN / tract) ** 2.4 * np.exp(0.17 * rng.standard_normal())
        breath, tempo = float(rng.uniform(0, 0.8)), float(rng.uniform(0.75, 1.3))
        return cls(tract, float(np.clip(pitch, 75, 300)), breath, tempo)


def say(digits: str | Sequence[int], language: str = "english", speaker: Speaker | None = None,
        seed: int = 0, seconds: float | None = None, alignment: bool = False):
    """Digits, "407" or [4, 0, 7], spoken in one breath -> float32 (T,) in [-1, 1], 8,000 Hz.
    seconds: the exact duration, at least 0.1 a digit; None: as the speaker's tempo makes it. seed:
    the small differences between one time and the next. alignment: also return the phonemes, a list
    of (symbol, start, end) in seconds."""
    rng, speaker = np.random.default_rng(seed), speaker or Speaker()
    spelled = [DIGITS[language][int(digit)].split() for digit in digits]
    words = [[phone for symbol in word for phone in PHONEMES[symbol]] for word in spelled]
    phones = sum(words, [])
    lengths = np.array([phone.seconds for phone in phones])
    lengths *= np.exp(0.12 * rng.standard_normal(len(phones)))
    lengths /= speaker.tempo * (1 + 0.15 * (len(words) > 1))  # several digits are said faster
    lengths[-len(PHONEMES[spelled[-1][-1]]) :] *= 1.15  # the last phoneme is longer
    if phones[0].voice == phones[0].breath == phones[0].hiss == 0:
        lengths[0] = 0.015  # nobody hears how long the mouth was shut before the first sound
    bounds = phonemes.fit(lengths, phones, round(RATE * (seconds or lengths.sum())) / RATE)
    pitch = _intonation(bounds[np.cumsum([0, *map(len, words)])], speaker.pitch, rng)
    waveform = _synthesize(phones, bounds, pitch, speaker, rng)
    if not alignment:
        return waveform
    symbols = sum(spelled, [])
    cuts = bounds[np.cumsum([0] + [len(PHONEMES[symbol]) for symbol in symbols])].tolist()
    return waveform, list(zip(symbols, cuts[:-1], cuts[1:], strict=True))


def _intonation(bounds: np.ndarray, pitch: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of W words (W + 1,) -> pitch as (knots in seconds, Hz): falling, with accents."""
    knots, values, count = [], [], len(bounds) - 1
    for word, (start, length) in enumerate(zip(bounds[:-1], np.diff(bounds), strict=True)):
        level, last = 1.06 - 0.12 * word / count, word == count - 1
        knots += [start, start + 0.35 * length, start + (0.97 if last else 0.85) * length]
        values += [level, level * 1.05, 0.78 if last else level * 0.94]
    return np.array(knots), pitch * np.array(values) * np.exp(0.02 * rng.standard_normal(3 * count))


# ---- the synthesizer

def _synthesize(phones: list[Phone], bounds: np.ndarray, pitch: tuple[np.ndarray, np.ndarray],
                speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """Phones between their bounds (P + 1,), pitch as (knots in seconds, Hz) -> float32 (T,)."""
    total = round(RATE * bounds[-1])
    seconds = np.arange(total) / RATE
    knots = np.arange(0, total + 800, 400)  # a pitch wanders slowly, by 1%
    wander = np.interp(np.arange(total), knots, rng.standard_normal(len(knots)))
    hertz = np.interp(seconds, *pitch) * (1 + 0.01 * wander)
    phase = np.cumsum(hertz) / RATE + rng.random()  # in periods: a puff at every whole number
    tracks = _Tracks(phones, bounds, speaker, rng)
    waveform = _voice(phase, hertz, tracks, rng) + _noise(phase, tracks, rng)
    fade = np.minimum(1, np.minimum(seconds / 0.012, (bounds[-1] - seconds) / 0.05))
    return _normalize(waveform * np.sin(np.pi / 2 * fade) ** 2)


def _normalize(waveform: np.ndarray) -> np.ndarray:
    """Its peak at 0.8, as float32."""
    return (0.8 / (np.abs(waveform).max() + 1e-9) * waveform).astype(np.float32)


class _Tracks:
    """Formants and sources at any time: constant within a phone, gliding around its bounds."""

    def __init__(self, phones: list[Phone], bounds: np.ndarray, speaker: Speaker, rng):
        self.speaker, length = speaker, np.diff(bounds)
        begin, end = phonemes.postures(phones)
        vary = (1 + 0.04 * rng.standard_normal(begin.shape)) * MAN / speaker.tract
        self.formants = np.stack([begin * vary, end * vary], axis=1).reshape(-1, 3)  # (2 P, 3), Hz
        self.tongue_knots, self.breath_knots = (  # the tongue is slow, the breath is fast
            np.stack([bounds[:-1] + glide, bounds[1:] - glide], axis=1).ravel()
            for glide in (np.minimum(0.45 * length, 0.035), np.minimum(0.25 * length, 0.006)))
        sources = [(phone.voice, phone.breath, phone.hiss, *phone.band) for phone in phones]
        spread = (0.15, 0.4, 0.4, 0.04, 0.15)  # no sound is made twice in the same way
        force = np.exp(rng.standard_normal((len(phones), 5)) * spread)
        self.sources = (force * np.array(sources)).repeat(2, axis=0)  # (2 P, 5)
        self.nasal = np.array([phone.nasal for phone in phones]).repeat(2)

    def source(self, seconds: np.ndarray) -> np.ndarray:
        """(N,) -> (5, N): voice, breath, hiss, centre and half width of the hiss's band."""
        return np.stack([np.interp(seconds, self.breath_knots, row) for row in self.sources.T])

    def tract(self, seconds: np.ndarray, size: int, damping: float = 0.0) -> np.ndarray:
        """Its frequency response at each time: (N,) -> complex (N, size / 2 + 1)."""
        f = np.fft.rfftfreq(size, 1 / RATE)
        nasal = np.interp(seconds, self.tongue_knots, self.nasal)[:, None]  # (N, 1)
        response = 1.0
        for column, bandwidth in zip(self.formants.T, BANDWIDTHS, strict=True):
            formant = np.interp(seconds, self.tongue_knots, column)[:, None]
            wide = bandwidth * (1 + 1.5 * nasal) + damping + 60 * self.speaker.breath
            response = response * _resonator(f, formant, wide)
            damping = 0.0
        for formant, bandwidth in UPPER:
            response = response * _resonator(f, formant * MAN / self.speaker.tract, bandwidth)
        # The zero of a closed nose lies upon its resonance and cancels it.
        return response * _resonator(f, NOSE, 100) / _resonator(f, NOSE + NASAL_ZERO * nasal, 100)


def _resonator(f: np.ndarray, formant, bandwidth) -> np.ndarray:
    """1 at f = 0, formant / bandwidth high at the formant, falling by 12 dB an octave above it."""
    return formant**2 / (formant**2 - f**2 + 1j * f * bandwidth)


def _voice(phase: np.ndarray, hertz: np.ndarray, tracks: _Tracks, rng) -> np.ndarray:
    """The puffs and the responses to them: (T,)."""
    number = np.arange(np.ceil(phase[0]), phase[-1])
    sample = np.arange(len(phase))
    at = np.interp(number, phase, sample)  # in samples, with a fraction
    at += 0.003 * np.interp(at, sample, RATE / hertz) * rng.standard_normal(len(at))
    level = tracks.source(at / RATE)[0] * (1 + 0.04 * rng.standard_normal(len(at)))
    at, level = at[level > 1e-3], level[level > 1e-3]
    whole = np.floor(at).astype(int)

    f, breath = np.fft.rfftfreq(RING, 1 / RATE), tracks.speaker.breath
    rate = np.interp(at, sample, hertz)[:, None]  # (N, 1)
    # The flow grows exponentially over the period, then stops at once. Its derivative is heard.
    puff = 1j * f / rate / (1 - 1j * f / rate) ** 2 * RATE / rate
    puff = puff / (1 + 1j * f / (2000 - 1200 * breath))  # a breathy glottis shuts softly
    shift = np.exp(-2j * np.pi / RATE * f * (LEAD + at - whole)[:, None])
    rings = np.fft.irfft(level[:, None] * puff * shift * tracks.tract(at / RATE, RING), RING)
    return _overlap(rings, whole - LEAD, len(phase))


def _noise(phase: np.ndarray, tracks: _Tracks, rng) -> np.ndarray:
    """Breath through the tract and hiss in its band, frame by frame: (T,). Voice makes it pulse."""
    total = len(phase)
    start = np.arange(-HOP, total, HOP)
    middle = (start + HOP) / RATE  # seconds
    voice, breath, hiss, centre, width = tracks.source(middle)[:, :, None]  # each (N, 1)
    breath = breath + 0.25 * tracks.speaker.breath**2 * voice  # a breathy voice leaks
    f = np.fft.rfftfreq(GRAIN, 1 / RATE)
    shape = breath * f / 1000 * tracks.tract(middle, GRAIN, damping=300)
    shape = shape + hiss * np.exp(-0.5 * ((f - centre) / width) ** 2)
    noise = np.pad(rng.standard_normal(total), (HOP, 2 * HOP))
    pulse = np.pad(np.cos(2 * np.pi * phase), (HOP, 2 * HOP))
    windows = np.lib.stride_tricks.sliding_window_view
    pulsing, steady = (windows(x, 2 * HOP)[::HOP] for x in (noise * (1 + 0.5 * pulse), noise))
    frames = np.where(voice > 0.05, pulsing[: len(start)], steady[: len(start)])
    window = np.sin(np.pi * (np.arange(2 * HOP) + 0.5) / (2 * HOP))  # two squares add up to 1
    frames = np.fft.irfft(np.fft.rfft(frames * window, GRAIN) * shape, GRAIN)
    return _overlap(frames, start, total)


def _overlap(pieces: np.ndarray, start: np.ndarray, total: int) -> np.ndarray:
    """Add up pieces (N, L), each from its start on: (total,)."""
    size = pieces.shape[1]
    out = np.zeros(total + 2 * size)
    for piece, begin in zip(pieces, start + size, strict=True):
        out[begin : begin + size] += piece
    return out[size : size + total]


# ---- song

def sing(syllables: Sequence[str], notes: Sequence[float], durations: Sequence[float],
         speaker: Speaker | None = None, seed: int = 0) -> np.ndarray:
    """Each syllable on its note for its time -> float32 (T,) in [-1, 1], 8,000 Hz.

    syllables: of SYLLABLES, or phonemes with blanks between, "s ʌ n". notes: MIDI numbers (69 is
    440 Hz). durations: seconds, at least 0.1 each."""
    phones, bounds, pitch, _ = phones_of(syllables, notes, durations)
    return _synthesize(phones, bounds, pitch, speaker or Speaker(), np.random.default_rng(seed))


def phones_of(syllables: Sequence[str], notes: Sequence, durations: Sequence[float]) -> tuple:
    """What `sing` sings: the phones (P), their bounds (P + 1,) in seconds, the pitch, and the
    phonemes, a list of (symbol, start, end). Nothing is random in it."""
    onset = np.cumsum([0, *durations])
    phones, bounds, spoken = [], [np.zeros(1)], []
    for syllable, start, end in zip(syllables, onset[:-1], onset[1:], strict=True):
        symbols = SYLLABLES.get(syllable, syllable).split()
        parts = [PHONEMES[symbol] for symbol in symbols]
        new = [phone for part in parts for phone in part]
        lengths = np.array([phone.seconds for phone in new])
        # The power gives the vowel all the time that the consonants do not need.
        times = start + phonemes.fit(lengths, new, end - start, power=6)
        cuts = times[np.cumsum([0] + [len(part) for part in parts])].tolist()
        spoken += zip(symbols, cuts[:-1], cuts[1:], strict=True)
        phones += new
        bounds.append(times[1:])
    return phones, np.concatenate(bounds), _melody(notes, onset), spoken


def _melody(notes: Sequence[float], onset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pitch as (knots in seconds, Hz), every 5 ms: steps, smoothed over 30 ms, then vibrato."""
    seconds = np.arange(0, onset[-1], 0.005)
    index = np.clip(np.searchsorted(onset, seconds, side="right") - 1, 0, len(notes) - 1)
    steps = np.pad(np.array(notes, dtype=float)[index], 3, mode="edge")
    semitones = np.convolve(steps, np.ones(7) / 7, mode="valid")
    depth = 0.25 * np.clip((seconds - onset[index] - 0.15) / 0.2, 0, 1)  # on long notes only
    return seconds, midi_to_hertz(semitones + depth * np.sin(2 * np.pi * 5.5 * seconds))


def midi_to_hertz(note):
    """69 -> 440; an octave is 12."""
    return 440 * 2 ** ((np.asarray(note, dtype=float) - 69) / 12)


def pluck(notes: Sequence, durations: Sequence[float], seed: int = 0) -> np.ndarray:
    """Plucked strings -> float32 (T,) in [-1, 1], 8,000 Hz.
    notes: MIDI numbers up to 84, a tuple for a chord; durations: seconds."""
    rng = np.random.default_rng(seed)
    onset = np.round(RATE * np.cumsum([0, *durations])).astype(int)
    out = np.zeros(onset[-1])
    for chord, start, end in zip(notes, onset[:-1], onset[1:], strict=True):
        for note in np.atleast_1d(chord):
            out[start:end] += _string(float(midi_to_hertz(note)), end - start, rng)
    return _normalize(out)


def _string(hertz: float, total: int, rng: np.random.Generator) -> np.ndarray:
    """Karplus and Strong's string, (total,): a period of noise repeats, averaged with its neighbour
    each time, so high overtones die first. Lagrange's polynomial gives fractions of a sample."""
    turn = 2 * np.pi * hertz / RATE
    kept = 10 ** (-3 / (hertz * 2.5))  # the fundamental loses 60 dB in 2.5 seconds
    # The neighbour's weight: half, or less if that would lose more.
    weight = 0.5 - np.sqrt(max(0, 0.25 - (1 - kept**2) / (2 - 2 * np.cos(turn))))
    average = 1 - weight + weight * np.exp(-1j * turn)
    period = RATE / hertz + np.angle(average) / turn  # averaging delays, too
    whole, d = int(period) - 1, 1 + period % 1
    lagrange = [np.prod([(d - j) / (k - j) for j in range(4) if j != k]) for k in range(4)]
    taps = np.convolve(lagrange, [1 - weight, weight]) * kept / abs(average)
    sound = np.zeros(5 + total + 2 * whole)
    noise = rng.uniform(-1, 1, whole + 2)
    soft = np.convolve(noise, [0.25, 0.5, 0.25], mode="valid")  # a finger, not a needle
    sound[5 : 5 + whole] = soft - soft.mean()
    for n in range(5 + whole, 5 + total, whole):
        sound[n : n + whole] = np.convolve(sound[n - whole - 4 : n], taps, mode="valid")
    fade = np.clip((total - np.arange(total)) / (0.02 * RATE), 0, 1)  # the hand damps it
    return sound[5 : 5 + total] * fade


def make(count: int, seed: int = 0, speakers: int = 200, languages=LANGUAGES) -> dict:
    """Single digits by `speakers` voices in turn. Another seed has other voices.
    -> waveforms, a list of float32 (T,); labels (the digit), language (into LANGUAGES) and speaker,
    int64 (N,); voice float32 (N, 4), the fields of Speaker. Clip i does not depend on count."""
    voices = [Speaker.random(np.random.default_rng([seed, 0, i])) for i in range(speakers)]
    waveforms, rows = [], []
    for i in range(count):
        rng, who = np.random.default_rng([seed, 1, i]), i % speakers
        digit, language, take = rng.integers(10), str(rng.choice(languages)), rng.integers(2**31)
        tempo = voices[who].tempo * float(np.exp(0.05 * rng.standard_normal()))
        waveforms.append(say([digit], language, replace(voices[who], tempo=tempo), take))
        rows.append((digit, LANGUAGES.index(language), who))
    labels, language, speaker = np.array(rows, dtype=np.int64).T.copy()
    voice = np.array([astuple(voices[who]) for who in speaker], dtype=np.float32)
    return {"waveforms": waveforms, "labels": labels, "language": language, "speaker": speaker,
            "voice": voice}
