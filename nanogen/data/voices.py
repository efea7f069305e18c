"""Voices: speech, song and plucked strings, made by code from a seed. Nothing to download.

Speech is a source and a filter. The source: the glottis lets puffs of air through, 80 to 300 a second, and narrow places
make the air hiss. The filter: the vocal tract, a tube whose resonances (formants) move as the tongue does. So

    sound = sum over puffs k of  (the ring of the tract as it stands at time t_k), begun at t_k,  + noise, filtered likewise

and as each puff is placed where it belongs, between two samples if need be, the pitch is exact. The ring is written down as
a spectrum: a product of resonators F^2 / (F^2 - f^2 + i f B), one for each formant F of bandwidth B. What F is, and when,
comes from `phonemes.py`; between two phonemes all of it glides, which is what makes the sounds run together as in speech.

A speaker is four numbers: length of the tract, pitch, breathiness, tempo. They are drawn from a continuum, so there is
always an unseen voice; and as code made the sound, its truth is known (who, what, when, how high): scores are exact.

    python -m nanogen.data.voices     # writes voices.wav: numbers in three languages, three voices, and a song

Sources: Klatt 1980, "Software for a Cascade/Parallel Formant Synthesizer" (the resonators, the nasal zero); Doval et al.
2003, "The Voice Source as a Causal/Anticausal Linear Filter" (the puff); Karplus and Strong 1983, "Digital Synthesis of
Plucked-String and Drum Timbres".
Different from Klatt: each puff rings a tract of its own, so no filter changes while it sounds; noise, in short frames.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import soundfile

from nanogen import UserError
from nanogen.data.phonemes import DIGITS, LANGUAGES, PHONEMES, SYLLABLES, Phone

RATE = 8000  # samples a second
MAN = 17.5  # cm: the tract that the formants of `phonemes.py` belong to
UPPER = ((3500, 220), (4200, 300), (5000, 500))  # the formants that stay where they are: Hz, and their bandwidths
BANDWIDTHS = (75, 110, 170)  # Hz, of the three that move
NOSE, NASAL_ZERO = 270, 180  # Hz: the nose's resonance, and how far above it its zero lies when the nose is open
RING, LEAD = 512, 128  # samples in the ring of one puff, and of these before the glottis shuts
HOP, GRAIN = 32, 256  # samples between two frames of noise, and in one with its ring
SILENCE = Phone(0.05, (500, 1500, 2500), coupling=1.0)


@dataclass(frozen=True)
class Speaker:
    """A voice."""

    tract: float = MAN  # length of the vocal tract, cm: all formants scale with its inverse
    pitch: float = 120.0  # mean pitch, Hz
    breath: float = 0.2  # breathiness: 0 pressed, 1 nearly a whisper
    tempo: float = 1.0  # of speech: 2 is twice as fast

    def __post_init__(self):
        ranges = {"tract": (10, 20), "pitch": (50, 500), "breath": (0, 1), "tempo": (0.3, 3)}
        for (name, (low, high)), value in zip(ranges.items(), astuple(self), strict=True):
            if not low <= value <= high:
                raise UserError(f"a speaker's {name} is {low} to {high}, got {value}")

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Speaker":
        """A grown-up or a child. Short tracts tend to have high voices, the rest is left to chance."""
        tract = rng.uniform(13.5, 18.5)
        pitch = 115 * (MAN / tract) ** 2.4 * np.exp(0.17 * rng.standard_normal())
        return cls(float(tract), float(np.clip(pitch, 75, 300)), float(rng.uniform(0, 0.8)), float(rng.uniform(0.75, 1.3)))


# ------------------------------------------------------------------------------------ what to say


def say(
    digits: str | int | Sequence[int],
    language: str = "english",
    speaker: Speaker | None = None,
    seed: int = 0,
    seconds: float | None = None,
    alignment: bool = False,
):
    """Digits, "407" or [4, 0, 7], spoken in one breath -> float32 (T,) in [-1, 1], 8,000 Hz.

    seconds: how long it lasts, to a sample; without it, as long as the speaker's tempo makes it. seed: the small
    differences between one time and the next. alignment: also give back the phonemes, a list of (symbol, start, end),
    in seconds. UserError for what is not a digit, an unknown language, or too little time (0.1 s a digit).
    """
    numbers, speaker = _digits(digits), speaker or Speaker()
    if language not in LANGUAGES:
        raise UserError(f"unknown language {language!r}: choose one of {', '.join(LANGUAGES)}")
    if seconds is not None and not seconds >= 0.1 * len(numbers):
        raise UserError(f"{len(numbers)} digits need at least {0.1 * len(numbers):.1f} seconds, got {seconds}")
    rng = np.random.default_rng(seed)
    words = [DIGITS[language][number].split() for number in numbers]
    symbols = sum(words, [])
    phones = [phone for symbol in symbols for phone in PHONEMES[symbol]]
    lengths = np.array([phone.seconds for phone in phones]) * np.exp(0.12 * rng.standard_normal(len(phones)))
    lengths /= speaker.tempo * (1 + 0.15 * (len(words) > 1))  # a number said as a whole is said faster
    lengths[-len(PHONEMES[symbols[-1]]) :] *= 1.15  # the last sound is drawn out
    if phones[0].voice == phones[0].breath == phones[0].hiss == 0:
        lengths[0] = 0.015  # no one hears how long the mouth was shut before the first sound
    bounds = _fit(lengths, phones, round(RATE * (seconds or lengths.sum())) / RATE)

    cuts = bounds[np.cumsum([0] + [len(PHONEMES[symbol]) for symbol in symbols])].tolist()
    spoken = list(zip(symbols, cuts[:-1], cuts[1:], strict=True))
    first = np.cumsum([0] + [len(word) for word in words])
    pitch = _intonation([spoken[i][1] for i in first[:-1]] + [float(bounds[-1])], speaker.pitch, rng)
    waveform = _synthesize(phones, bounds, pitch, speaker, rng)
    return (waveform, spoken) if alignment else waveform


def _digits(digits) -> list[int]:
    numbers = [int(c) if c in "0123456789" else -1 for c in str(digits)] if isinstance(digits, (str, int)) else list(digits)
    if not numbers or not all(number in range(10) for number in numbers):
        raise UserError(f"digits are one or more of 0 to 9, got {digits!r}")
    return numbers


def _fit(lengths: np.ndarray, phones: list[Phone], seconds: float, power: float = 1.0) -> np.ndarray:
    """The bounds (P + 1,) of the phones, from 0 to `seconds`: each grows by r ** stretch, and r is found by halving."""
    stretch = np.array([phone.stretch for phone in phones]) ** power
    low, high = 1e-3, 1e3
    for _ in range(50):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if (lengths * middle**stretch).sum() > seconds else (middle, high)
    bounds = np.concatenate([[0], np.cumsum(lengths * middle**stretch)])
    return bounds * (seconds / bounds[-1])


def _intonation(word_bounds: list[float], pitch: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pitch falls over a sentence, rises a little on each word, and drops at the end: (knots in seconds, Hz)."""
    knots, values, count = [], [], len(word_bounds) - 1
    for word in range(count):
        start, length, level = word_bounds[word], word_bounds[word + 1] - word_bounds[word], 1.06 - 0.12 * word / count
        last = word == count - 1
        knots += [start, start + 0.35 * length, start + (0.97 if last else 0.85) * length]
        values += [level, level * 1.05, 0.78 if last else level * 0.94]
    return np.array(knots), pitch * np.array(values) * np.exp(0.02 * rng.standard_normal(len(values)))


# ------------------------------------------------------------------------------------ the synthesizer


def _synthesize(phones: list[Phone], bounds: np.ndarray, pitch: tuple, speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """Phones between their bounds (P + 1,), pitch as (knots in seconds, Hz) -> float32 (T,), its peak at 0.8."""
    total = round(RATE * bounds[-1])
    seconds = np.arange(total) / RATE
    hertz = np.interp(seconds, *pitch) * (1 + 0.01 * _wander(total, rng))
    phase = np.cumsum(hertz) / RATE + rng.random()  # in periods: a puff whenever it passes a whole number
    tracks = _Tracks(phones, bounds, speaker, rng)
    waveform = _voice(phase, hertz, tracks, rng) + _noise(phase, tracks, rng)
    fade = np.minimum(1, np.minimum(seconds / 0.012, (bounds[-1] - seconds) / 0.05))  # breath sets in, and runs out
    waveform *= np.sin(np.pi / 2 * fade) ** 2
    return (0.8 / (np.abs(waveform).max() + 1e-9) * waveform).astype(np.float32)


def _wander(count: int, rng: np.random.Generator) -> np.ndarray:
    """A slow random walk around 0, about 1 in size: no one holds a pitch like a machine. (count,)"""
    knots = np.arange(0, count + 800, 400)
    return np.interp(np.arange(count), knots, rng.standard_normal(len(knots)))


class _Tracks:
    """Where formants and sources stand at any time: still within a phone, gliding around its bounds."""

    def __init__(self, phones: list[Phone], bounds: np.ndarray, speaker: Speaker, rng: np.random.Generator):
        self.speaker, length = speaker, np.diff(bounds)
        begin, end = _postures(phones)
        vary = (1 + 0.04 * rng.standard_normal(begin.shape)) * MAN / speaker.tract
        self.formants = np.stack([begin * vary, end * vary], axis=1).reshape(-1, 3)  # (2 P, 3), Hz
        slow, fast = np.minimum(0.45 * length, 0.035), np.minimum(0.25 * length, 0.006)  # the tongue, the breath
        self.tongue_knots = np.stack([bounds[:-1] + slow, bounds[1:] - slow], axis=1).ravel()
        self.breath_knots = np.stack([bounds[:-1] + fast, bounds[1:] - fast], axis=1).ravel()
        sources = [(phone.voice, phone.breath, phone.hiss, *phone.band) for phone in phones]
        force = np.exp(rng.standard_normal((len(phones), 5)) * (0.15, 0.4, 0.4, 0.04, 0.15))  # no sound is made twice alike
        self.sources = (force * np.array(sources)).repeat(2, axis=0)  # (2 P, 5)
        self.nasal = np.array([phone.nasal for phone in phones]).repeat(2)

    def source(self, seconds: np.ndarray) -> np.ndarray:
        """(N,) -> (5, N): voice, breath, hiss, centre and half width of the hiss's band."""
        return np.stack([np.interp(seconds, self.breath_knots, column) for column in self.sources.T])

    def tract(self, seconds: np.ndarray, size: int, damping: float = 0.0) -> np.ndarray:
        """What the tract does to each frequency at each time: (N,) -> complex (N, size / 2 + 1). damping: Hz, of F1."""
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
        # A closed nose's zero lies upon its resonance and cancels it; open, they part.
        return response * _resonator(f, NOSE, 100) / _resonator(f, NOSE + NASAL_ZERO * nasal, 100)


def _postures(phones: list[Phone]) -> tuple[np.ndarray, np.ndarray]:
    """The formants at the beginning and the end of each phone, (P, 3) each, in Hz. A consonant's second and third lean
    towards those of the vowels beside it: the tongue is on its way already."""
    begin = np.array([phone.formants for phone in phones], dtype=float)
    end = np.array([phone.end or phone.formants for phone in phones], dtype=float)
    firm = [i for i, phone in enumerate(phones) if phone.coupling == 0] or list(range(len(phones)))
    for i, phone in enumerate(phones):
        before = max([j for j in firm if j < i], default=min(firm))
        after = min([j for j in firm if j > i], default=max(firm))
        if phone.coupling:
            begin[i, 1:] += phone.coupling * ((end[before] if before < i else begin[after]) - begin[i])[1:]
            end[i, 1:] += phone.coupling * ((begin[after] if after > i else end[before]) - end[i])[1:]
    return begin, end


def _resonator(f: np.ndarray, formant, bandwidth) -> np.ndarray:
    """1 at f = 0, formant / bandwidth in height at the formant, falling by 12 dB an octave above it."""
    return formant**2 / (formant**2 - f**2 + 1j * f * bandwidth)


def _voice(phase: np.ndarray, hertz: np.ndarray, tracks: _Tracks, rng: np.random.Generator) -> np.ndarray:
    """The puffs and their rings: (T,)."""
    number = np.arange(np.ceil(phase[0]), phase[-1])
    place = np.interp(number, phase, np.arange(len(phase)))  # in samples, with a fraction
    place += 0.003 * np.interp(place, np.arange(len(phase)), RATE / hertz) * rng.standard_normal(len(place))
    level = tracks.source(place / RATE)[0] * (1 + 0.04 * rng.standard_normal(len(place)))
    place, level = place[level > 1e-3], level[level > 1e-3]
    whole = np.floor(place).astype(int)

    f, breath = np.fft.rfftfreq(RING, 1 / RATE), tracks.speaker.breath
    rate = np.interp(place, np.arange(len(phase)), hertz)[:, None]  # (N, 1)
    # The flow swells with a time constant that goes with the period, shuts at once, and is heard as its derivative.
    puff = 1j * f / rate / (1 - 1j * f / rate) ** 2 * RATE / rate
    puff = puff / (1 + 1j * f / (2000 - 1200 * breath))  # a breathy glottis shuts softly: fewer overtones
    shift = np.exp(-2j * np.pi / RATE * f * (LEAD + place - whole)[:, None])
    rings = np.fft.irfft(level[:, None] * puff * shift * tracks.tract(place / RATE, RING), RING)
    return _overlap(rings, whole, len(phase), LEAD)


def _noise(phase: np.ndarray, tracks: _Tracks, rng: np.random.Generator) -> np.ndarray:
    """Breath through the tract and hiss in its band, frame by frame: (T,). Where there is voice, it pulses with it."""
    total = len(phase)
    start = np.arange(-HOP, total, HOP)
    middle = (start + HOP) / RATE  # seconds
    voice, breath, hiss, centre, width = tracks.source(middle)[:, :, None]  # each (N, 1)
    breath = breath + 0.25 * tracks.speaker.breath**2 * voice  # a breathy voice leaks
    f = np.fft.rfftfreq(GRAIN, 1 / RATE)
    shape = breath * f / 1000 * tracks.tract(middle, GRAIN, damping=300) + hiss * np.exp(-0.5 * ((f - centre) / width) ** 2)
    noise = np.pad(rng.standard_normal(total), (HOP, 2 * HOP))
    pulse = np.pad(np.cos(2 * np.pi * phase), (HOP, 2 * HOP))
    windows = np.lib.stride_tricks.sliding_window_view
    steady, pulsing = (windows(x, 2 * HOP)[::HOP][: len(start)] for x in (noise, noise * (1 + 0.5 * pulse)))
    frames = np.where(voice > 0.05, pulsing, steady)
    window = np.sin(np.pi * (np.arange(2 * HOP) + 0.5) / (2 * HOP))  # squares of two neighbours add up to 1
    return _overlap(np.fft.irfft(np.fft.rfft(frames * window, GRAIN) * shape, GRAIN), start, total, 0)


def _overlap(pieces: np.ndarray, start: np.ndarray, total: int, lead: int) -> np.ndarray:
    """Add up pieces (N, L), each from sample start - lead on: (total,)."""
    size = pieces.shape[1]
    out = np.zeros(total + 2 * size)
    for piece, begin in zip(pieces, start - lead + size, strict=True):
        out[begin : begin + size] += piece
    return out[size : size + total]


# ------------------------------------------------------------------------------------ song


def sing(
    syllables: Sequence[str],
    notes: Sequence[float | None],
    durations: Sequence[float],
    speaker: Speaker | None = None,
    seed: int = 0,
    alignment: bool = False,
):
    """Each syllable on its note for its time -> float32 (T,) in [-1, 1], 8,000 Hz.

    syllables: of SYLLABLES, or phonemes with blanks between, "s ʌ n"; notes: MIDI numbers (69 is 440 Hz), None for a
    rest, whatever its syllable; durations: seconds, at least 0.1 each. alignment: also give back (symbol, start, end).
    """
    if not len(syllables) == len(notes) == len(durations) > 0:
        raise UserError(f"{len(syllables)} syllables, {len(notes)} notes and {len(durations)} durations: they must be as many")
    if not min(durations) >= 0.1:
        raise UserError(f"a note lasts at least 0.1 seconds, got {min(durations)}")
    rng, speaker = np.random.default_rng(seed), speaker or Speaker()
    onset = np.cumsum([0, *durations])
    phones, bounds, spoken = [], [np.zeros(1)], []
    for syllable, note, start, end in zip(syllables, notes, onset[:-1], onset[1:], strict=True):
        symbols = [] if note is None else SYLLABLES.get(syllable, syllable).split()
        if unknown := [symbol for symbol in symbols if symbol not in PHONEMES]:
            raise UserError(f"unknown syllable or phoneme {unknown[0]!r}: see SYLLABLES and PHONEMES in nanogen/data")
        parts = [PHONEMES[symbol] for symbol in symbols] or [(SILENCE,)]
        new = [phone for part in parts for phone in part]
        times = start + _fit(np.array([phone.seconds for phone in new]), new, end - start, power=6)  # the vowel takes it all
        cuts = times[np.cumsum([0] + [len(part) for part in parts])]
        spoken += [(symbol, float(a), float(b)) for symbol, a, b in zip(symbols, cuts[:-1], cuts[1:], strict=False)]
        phones += new
        bounds.append(times[1:])
    waveform = _synthesize(phones, np.concatenate(bounds), _melody(notes, onset), speaker, rng)
    return (waveform, spoken) if alignment else waveform


def _melody(notes: Sequence[float | None], onset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pitch as (knots in seconds, Hz), every 5 ms: steps, smoothed over 30 ms, with vibrato on what is held."""
    seconds = np.arange(0, onset[-1], 0.005)
    sung = [note for note in notes if note is not None] or [60]
    filled = [note if note is not None else sung[0] for note in notes]
    index = np.clip(np.searchsorted(onset, seconds, side="right") - 1, 0, len(notes) - 1)
    semitones = np.convolve(np.pad(np.array(filled, dtype=float)[index], 3, mode="edge"), np.ones(7) / 7, mode="valid")
    held = np.clip((seconds - onset[index] - 0.15) / 0.2, 0, 1)
    return seconds, midi_to_hertz(semitones + 0.25 * held * np.sin(2 * np.pi * 5.5 * seconds))


def midi_to_hertz(note):
    """69 -> 440; an octave is 12."""
    return 440 * 2 ** ((np.asarray(note, dtype=float) - 69) / 12)


def pluck(notes: Sequence, durations: Sequence[float], seed: int = 0) -> np.ndarray:
    """Plucked strings -> float32 (T,) in [-1, 1], 8,000 Hz. notes: MIDI numbers up to 84, a tuple of them for a chord,
    None for a rest; durations: seconds."""
    if len(notes) != len(durations) or not all(duration > 0 for duration in durations) or not len(notes):
        raise UserError(f"{len(notes)} notes and {len(durations)} durations: they must be as many, and all of them positive")
    rng, onset = np.random.default_rng(seed), np.round(RATE * np.cumsum([0, *durations])).astype(int)
    out = np.zeros(onset[-1])
    for chord, start, end in zip(notes, onset[:-1], onset[1:], strict=True):
        for note in () if chord is None else np.atleast_1d(chord):
            out[start:end] += _string(float(midi_to_hertz(note)), end - start, rng)
    return (0.8 / (np.abs(out).max() + 1e-9) * out).astype(np.float32)


def _string(hertz: float, total: int, rng: np.random.Generator) -> np.ndarray:
    """Karplus and Strong's string, (total,): a period of noise goes round and round, and each time neighbours are averaged,
    so high overtones die first. A period is no whole number of samples: Lagrange's polynomial fills the gaps."""
    if not 30 <= hertz <= RATE / 7:
        raise UserError(f"a string sounds from 30 to {RATE // 7} Hz, got {hertz:.0f}")
    turn, kept = 2 * np.pi * hertz / RATE, 10 ** (-3 / (hertz * 2.5))  # the fundamental loses 60 dB in 2.5 seconds
    share = 0.5 - np.sqrt(max(0, 0.25 - (1 - kept**2) / (2 - 2 * np.cos(turn))))  # of the neighbour: half, or enough for that
    average = 1 - share + share * np.exp(-1j * turn)
    period = RATE / hertz + np.angle(average) / turn  # averaging delays, too
    whole, d = int(period) - 1, 1 + period % 1
    lagrange = [np.prod([(d - j) / (k - j) for j in range(4) if j != k]) for k in range(4)]
    taps = np.convolve(lagrange, [1 - share, share]) * kept / abs(average)
    sound = np.zeros(5 + total + 2 * whole)
    noise = rng.uniform(-1, 1, whole + 2)
    soft = np.convolve(noise, [0.25, 0.5, 0.25], mode="valid")  # a finger, not a needle
    sound[5 : 5 + whole] = soft - soft.mean()
    for n in range(5 + whole, 5 + total, whole):
        sound[n : n + whole] = np.convolve(sound[n - whole - 4 : n], taps, mode="valid")
    fade = np.clip((total - np.arange(total)) / (0.02 * RATE), 0, 1)  # the hand damps it
    return sound[5 : 5 + total] * fade


# ------------------------------------------------------------------------------------ a data set


def make(count: int, seed: int = 0, speakers: int = 200, languages: Sequence[str] = LANGUAGES) -> dict:
    """Single digits by `speakers` voices in turn, none of which another seed has.

    -> waveforms, a list of float32 (T,); labels (the digit), language (into LANGUAGES) and speaker int64 (N,); voice
    float32 (N, 4): tract (cm), pitch (Hz), breath, tempo. Clip i depends on the seed and on i, not on count.
    """
    if count < 1 or speakers < 1:
        raise UserError(f"count and speakers must be at least 1, got {count} and {speakers}")
    voices = [Speaker.random(np.random.default_rng([seed, 0, i])) for i in range(min(count, speakers))]
    clips = {"waveforms": [], "labels": [], "language": [], "speaker": [], "voice": []}
    for i in range(count):
        rng, who = np.random.default_rng([seed, 1, i]), i % speakers
        digit, language, take = int(rng.integers(10)), str(rng.choice(languages)), int(rng.integers(2**31))
        tempo = float(np.clip(voices[who].tempo * np.exp(0.05 * rng.standard_normal()), 0.3, 3))
        waveform = say([digit], language, replace(voices[who], tempo=tempo), seed=take)
        row = (waveform, digit, LANGUAGES.index(language), who, astuple(voices[who]))
        for values, value in zip(clips.values(), row, strict=True):
            values.append(value)
    whole = {key: np.array(clips[key], dtype=np.int64) for key in ("labels", "language", "speaker")}
    return {"waveforms": clips["waveforms"], **whole, "voice": np.array(clips["voice"], dtype=np.float32)}


if __name__ == "__main__":
    people = (Speaker(), Speaker(14.5, 205, 0.3, 1.1), Speaker(18.3, 88, 0.1, 0.8))
    gap = np.zeros(RATE // 4, dtype=np.float32)
    parts = [say("407", language, who) for language in LANGUAGES for who in people]
    tune, beat = [60, 60, 67, 67, 69, 69, 67], [0.4] * 6 + [0.8]
    song = sing(["do", "do", "sol", "sol", "la", "la", "sol"], tune, beat, people[1])
    parts.append(0.7 * song + 0.3 * pluck([(48, 55, 64), (48, 55, 64), (53, 57, 60), (48, 55, 64)], [0.8] * 4))
    soundfile.write("voices.wav", np.concatenate([piece for part in parts for piece in (part, gap)]), RATE)
