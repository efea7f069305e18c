"""Phonemes: what the mouth does for the digits of three languages, and for syllables to sing.

A phoneme is one or more *phones*: stretches of time in which the mouth holds a posture or glides to
another. A posture is three *formants* (the lowest resonances of the vocal tract, in Hz, of a man's
tract of 17.5 cm) and three sources: the voice, breath (noise from the glottis, which excites the
whole tract) and hiss (noise at a narrow passage, in one band). voices.py makes sound of it.

    vowels       constant formants, or gliding ones (diphthongs)
    nasals       voice through the nose: low first formant, wide and weak higher ones, a zero
    fricatives   hiss; with voice as well for v and z
    plosives     a closure (silence), a burst of hiss, then perhaps breath ("aspiration")

Sources, rounded. English vowels: Peterson and Barney 1952, "Control Methods Used in a Study of the
Vowels" (men); Spanish: Bradlow 1995, "A Comparative Acoustic Study of English and Spanish Vowels";
German: near Pätzold and Simpson 1997, "Acoustic Analysis of German Vowels in the Kiel Corpus"; the
rest: Klatt 1980 (see voices.py). Coupling: Sussman et al. 1991. Levels and durations: set here.
"""

from dataclasses import dataclass

import numpy as np

LANGUAGES = ("english", "german", "spanish")


@dataclass(frozen=True)
class Phone:
    """A stretch of one posture, or of a glide between two."""

    seconds: float  # at ordinary tempo
    formants: tuple[int, int, int]  # Hz, at its beginning
    end: tuple[int, int, int] = ()  # Hz, at its end, if it glides
    voice: float = 0.0  # amplitudes of the three sources
    breath: float = 0.0
    hiss: float = 0.0
    band: tuple[int, int] = (3000, 2000)  # of the hiss: centre and half width, Hz
    nasal: float = 0.0  # 1 with the nose open
    coupling: float = 0.0  # how far the formants follow the neighbouring vowel's, 0 to 1
    stretch: float = 1.0  # how much it grows in slow speech: vowels do, bursts do not


def _vowel(ms: int, *formants: int) -> tuple[Phone]:
    return (Phone(ms / 1000, formants[:3], formants[3:], voice=1.0),)


def _sonorant(ms: int, *formants: int, voice=0.5, nasal=0.0, coupling=0.2) -> tuple[Phone]:
    return (Phone(ms / 1000, formants, (), voice, nasal=nasal, coupling=coupling, stretch=0.6),)


def _fricative(ms: int, formants: tuple, hiss: float, band: tuple, voice=0.0) -> tuple[Phone]:
    return (Phone(ms / 1000, formants, (), voice, 0, hiss, band, coupling=0.4, stretch=0.6),)


def _plosive(closure_ms: int, formants: tuple, hiss: float, band: tuple, breath_ms=0, voice=0.0):
    """voice: the murmur behind closed lips, of which only a first formant of 200 Hz is heard."""
    closed = (200, *formants[1:])
    closure = Phone(closure_ms / 1000, closed, (), voice, coupling=0.4, stretch=0.6)
    burst = Phone(0.012, formants, (), 0, 0.3 * hiss, hiss, band, coupling=0.4, stretch=0.1)
    breath = Phone(breath_ms / 1000, formants, (), 0, 0.6, 0.15 * hiss, band, 0, 0.6, 0.3)
    return (closure, burst, breath) if breath_ms else (closure, burst)


PHONEMES: dict[str, tuple[Phone, ...]] = {
    # vowels of English
    "i": _vowel(190, 270, 2290, 3010), "ɪ": _vowel(120, 390, 1990, 2550),
    "ɛ": _vowel(140, 530, 1840, 2480), "æ": _vowel(170, 660, 1720, 2410),
    "ʌ": _vowel(150, 640, 1190, 2390), "ɔ": _vowel(180, 570, 840, 2410),
    "ɑ": _vowel(180, 730, 1090, 2440), "u": _vowel(190, 310, 1350, 2250, 300, 950, 2240),
    "ə": _vowel(70, 500, 1400, 2400), "aɪ": _vowel(220, 720, 1180, 2500, 440, 1850, 2500),
    "eɪ": _vowel(190, 480, 1800, 2520, 320, 2150, 2700),
    "oʊ": _vowel(210, 540, 1080, 2300, 400, 850, 2300),
    # vowels of German, where they differ
    "aː": _vowel(140, 720, 1300, 2500), "ʊ": _vowel(130, 390, 950, 2300),
    "ʏ": _vowel(130, 390, 1480, 2250), "ɐ": _vowel(110, 580, 1350, 2450),
    "ɔʏ": _vowel(220, 560, 900, 2350, 380, 1750, 2300),
    # vowels of Spanish
    "a": _vowel(130, 640, 1350, 2500), "e": _vowel(130, 460, 1810, 2550),
    "o": _vowel(130, 460, 1020, 2350), "ei": _vowel(180, 460, 1810, 2550, 300, 2150, 2800),
    # glides and liquids
    "w": _sonorant(85, 290, 610, 2150, voice=0.6, coupling=0.1),
    "j": _sonorant(60, 260, 2070, 3020, voice=0.6, coupling=0.1),
    "r": _sonorant(70, 350, 1200, 1650, voice=0.7, coupling=0.1),
    "l": _sonorant(70, 310, 1050, 2880, voice=0.5),
    "ɾ": _sonorant(28, 320, 1500, 2500, voice=0.25, coupling=0.4),
    "ʁ": (Phone(0.06, (420, 1100, 2400), voice=0.4, breath=0.25, coupling=0.3, stretch=0.6),),
    # nasals
    "m": _sonorant(80, 480, 1270, 2130, nasal=1.0, coupling=0.4),
    "n": _sonorant(80, 480, 1550, 2550, nasal=1.0, coupling=0.4),
    "ŋ": _sonorant(70, 480, 1900, 2600, nasal=1.0, coupling=0.5),
    # fricatives
    "f": _fricative(95, (340, 1100, 2080), 0.18, (3200, 2500)),
    "v": _fricative(60, (220, 1100, 2080), 0.08, (3200, 2500), voice=0.4),
    "β": _fricative(55, (260, 1100, 2100), 0.03, (2500, 2000), voice=0.5),
    "θ": _fricative(80, (320, 1400, 2540), 0.07, (3600, 1800)),
    "s": _fricative(120, (320, 1390, 2530), 0.4, (4200, 1000)),
    "z": _fricative(90, (240, 1390, 2530), 0.2, (4200, 1000), voice=0.35),
    "ʃ": _fricative(120, (300, 1840, 2750), 0.45, (2700, 600)),
    "x": (Phone(0.09, (500, 1200, 2400), (), 0, 0.8, 0.15, (1300, 500), 0, 0.4, stretch=0.6),),
    "h": (Phone(0.06, (500, 1500, 2500), breath=0.7, coupling=1.0, stretch=0.6),),
    # plosives; with a raised h: aspirated
    "b": _plosive(60, (200, 900, 2100), 0.2, (800, 800), voice=0.3),
    "d": _plosive(55, (200, 1700, 2600), 0.4, (3300, 1200), voice=0.3),
    "g": _plosive(55, (200, 1900, 2500), 0.4, (2000, 600), voice=0.3),
    "p": _plosive(70, (400, 900, 2100), 0.25, (800, 900)),
    "t": _plosive(65, (400, 1700, 2600), 0.4, (3600, 1000)),
    "k": _plosive(65, (350, 1800, 2500), 0.35, (1800, 500)),
    "pʰ": _plosive(70, (400, 900, 2100), 0.25, (800, 900), breath_ms=40),
    "tʰ": _plosive(60, (400, 1700, 2600), 0.5, (3600, 1000), breath_ms=50),
    "kʰ": _plosive(60, (350, 1800, 2500), 0.4, (1800, 500), breath_ms=50),
    # affricates: a plosive that is released slowly
    "ts": _plosive(55, (300, 1500, 2550), 0.5, (4200, 1000))
        + _fricative(80, (320, 1390, 2530), 0.4, (4200, 1000)),
    "tʃ": _plosive(55, (300, 1800, 2700), 0.4, (3000, 800))
        + _fricative(75, (300, 1840, 2750), 0.45, (2700, 600)),
}  # fmt: skip

DIGITS = {
    "english": "z ɪ r oʊ,w ʌ n,tʰ u,θ r i,f ɔ r,f aɪ v,s ɪ k s,s ɛ v ə n,eɪ t,n aɪ n",
    "german": "n ʊ l,aɪ n s,ts v aɪ,d ʁ aɪ,f i ɐ,f ʏ n f,z ɛ k s,z i b ə n,aː x t,n ɔʏ n",
    "spanish":
        "s e ɾ o,u n o,d o s,t ɾ e s,k w a t ɾ o,s i ŋ k o,s ei s,s j e t e,o tʃ o,n w e β e",
}
DIGITS = {language: digits.split(",") for language, digits in DIGITS.items()}  # of 0 to 9

SYLLABLES = dict(entry.strip().split(": ") for entry in """
    do: d o, re: r e, mi: m i, fa: f a, sol: s o l, la: l a, ti: t i, sun: s ʌ n, moon: m u n,
    sea: s i, rain: r eɪ n, love: l ʌ v, day: d eɪ, night: n aɪ t, blue: b l u, home: h oʊ m,
    free: f r i, far: f ɑ r, long: l ɔ ŋ, road: r oʊ d, wind: w ɪ n d, low: l oʊ, high: h aɪ,
    sing: s ɪ ŋ, dream: d r i m, light: l aɪ t, snow: s n oʊ, my: m aɪ, you: j u, we: w i, go: g oʊ,
    stay: s t eɪ, fly: f l aɪ, heart: h ɑ r t, fire: f aɪ r, back: b æ k, ship: ʃ ɪ p,
    time: tʰ aɪ m""".split(","))  # to sing: names of notes, and words of one syllable


def fit(lengths, phones: list[Phone], seconds: float, power: float = 1) -> np.ndarray:
    """Bounds (P + 1,), 0 to `seconds`: lengths times r ** (stretch ** power), r by bisection."""
    stretch = np.array([phone.stretch for phone in phones]) ** power
    low, high = 1e-3, 1e3
    for _ in range(50):
        r = np.sqrt(low * high)
        low, high = (low, r) if (lengths * r**stretch).sum() > seconds else (r, high)
    bounds = np.concatenate([[0], np.cumsum(lengths * r**stretch)])
    return bounds * (seconds / bounds[-1])


def postures(phones: list[Phone]) -> tuple[np.ndarray, np.ndarray]:
    """The formants at the beginning and the end of each phone, (P, 3) each, in Hz. F2 and F3 of a
    consonant lean towards those of the vowels beside it: the tongue is on its way."""
    begin = np.array([phone.formants for phone in phones], dtype=float)
    end = np.array([phone.end or phone.formants for phone in phones], dtype=float)
    firm = [i for i, phone in enumerate(phones) if not phone.coupling] or list(range(len(phones)))
    for i, phone in enumerate(phones):
        before = max([j for j in firm if j < i], default=min(firm))
        after = min([j for j in firm if j > i], default=max(firm))
        left = end[before] if before < i else begin[after]
        right = begin[after] if after > i else end[before]
        begin[i, 1:] += phone.coupling * (left - begin[i])[1:]
        end[i, 1:] += phone.coupling * (right - end[i])[1:]
    return begin, end
