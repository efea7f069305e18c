"""Songs: lyrics, melody and accompaniment, composed by rules and sung by voices.py, from a seed.

A song has four bars of two beats (2/4), that is, of four eighths. Each bar has one chord and one to
three notes. No note crosses a bar. A song is described by:

    theme   what the words are about: sea, night, road, love or sky
    mood    happy: a major key, sad: a minor key
    tempo   slow, medium or fast: 80, 110 or 140 beats a minute
    chords  of each bar, as degrees of the scale: 1, 4, 5 and 6
    notes   of each bar: a word of one syllable, semitones above the key's root, eighths

The melody keeps to the scale of its key. It begins each bar on a note of the chord, goes on in
small steps, and ends on the root. Plucked strings play the chord on every beat. Code made it all,
so every word, note and time is known, and what a model sings can be scored exactly.
"""

from dataclasses import dataclass

import numpy as np

from nanogen import UserError
from nanogen.data.phonemes import SYLLABLES
from nanogen.data.utterances import HOP, SYMBOLS, to_columns
from nanogen.data.voices import RATE, Speaker, phones_of, pluck, sing
from nanogen.files import explained

THEMES = {name: words.split() for name, words in {
    "sea": "sea ship wind blue far rain free home we go",
    "night": "night moon dream low snow light long my you stay",
    "road": "road go home back far time day we long my",
    "love": "love heart my you we stay fire sing day time",
    "sky": "sun fly high light day free blue wind you go",
}.items()}
MOODS = {"happy": (0, 2, 4, 5, 7, 9, 11), "sad": (0, 2, 3, 5, 7, 8, 10)}  # scales, in semitones
TEMPOS = {"slow": 80, "medium": 110, "fast": 140}  # beats a minute
RHYTHMS = ((2, 2), (4,), (1, 1, 2), (2, 1, 1), (3, 1))  # of a bar, in eighths
CHORDS = ((1, 4, 5, 1), (1, 6, 4, 1), (1, 5, 4, 1), (1, 4, 1, 1), (6, 4, 5, 1))  # degrees
WORDS = list(SYLLABLES)
KEYS = range(50, 58)  # MIDI numbers of the root: D3 to A3
KEY = 53  # F3: the key of what a model sings, unless told
HIGHEST = 9  # step of the scale: a third above the octave
BARS = 4
VOCABULARY = [*THEMES, *MOODS, *TEMPOS, *(f"chord {step}" for step in range(1, 8)),
              *(f"word {word}" for word in WORDS), *(f"tone {tone}" for tone in range(17)),
              *(f"length {length}" for length in range(1, 5))]
LONGEST = 3 + BARS * (1 + 3 * 3)  # symbols


@dataclass(frozen=True)
class Song:
    """bars: the notes of each, tuples (word, semitones above the root, eighths); chords: the degree
    of the scale, 1 to 7, on which each bar's chord stands."""

    theme: str
    mood: str
    tempo: str
    bars: tuple[tuple[tuple[str, int, int], ...], ...]
    chords: tuple[int, ...]

    @property
    def notes(self) -> list[tuple[str, int, int]]:
        return [note for bar in self.bars for note in bar]

    @property
    def prompt(self) -> str:
        return f"a {self.mood} {self.tempo} song about {self.theme}"

    @property
    def eighth(self) -> float:
        """Seconds."""
        return 30 / TEMPOS[self.tempo]


def to_text(song: Song) -> str:
    """A song as one line, "sad slow sea | 1 sun:0:2 moon:3:2 | 4 ...": for each bar its chord, then
    each note as word:semitones above the root:eighths."""
    bars = [" ".join([str(chord), *(":".join(map(str, note)) for note in bar)])
            for chord, bar in zip(song.chords, song.bars, strict=True)]
    return " | ".join([f"{song.mood} {song.tempo} {song.theme}", *bars])


def from_text(text: str) -> Song:
    """The inverse of `to_text`."""
    head, *parts = map(str.split, text.split(" | "))
    mood, tempo, theme = head
    bars = tuple(tuple((word, int(tone), int(length)) for word, tone, length
                       in (note.split(":") for note in notes)) for _, *notes in parts)
    return Song(theme, mood, tempo, bars, tuple(int(chord) for chord, *_ in parts))


def to_symbols(song: Song) -> list[int]:
    """A song as a chain: theme, mood, tempo; then of each bar its chord, and of each of its
    notes the word, the tone and the length. Indices of VOCABULARY."""
    chain = [song.theme, song.mood, song.tempo]
    for chord, bar in zip(song.chords, song.bars, strict=True):
        chain.append(f"chord {chord}")
        for word, tone, length in bar:
            chain += [f"word {word}", f"tone {tone}", f"length {length}"]
    return [VOCABULARY.index(symbol) for symbol in chain]


def from_symbols(chain: list[int]) -> Song:
    """The inverse of `to_symbols`."""
    theme, mood, tempo, *rest = (VOCABULARY[symbol] for symbol in chain)
    before = {"chord": " | ", "word": " ", "tone": ":", "length": ":"}
    values = (before[kind] + value for kind, value in map(str.split, rest))
    return from_text(f"{mood} {tempo} {theme}{''.join(values)}")


def possible(chain: list[int]) -> np.ndarray:
    """Which symbols may follow, bool (len(VOCABULARY),): those of the next kind, and only lengths
    that fit into the bar. All False: the song is complete."""
    said = [VOCABULARY[symbol].split() for symbol in chain[3:]]
    filled = sum(int(value) for kind, value in said if kind == "length")  # eighths so far
    last = said[-1][0] if said else "length"
    kind = {"chord": "word", "word": "tone", "tone": "length", "length": "word"}[last]
    if last == "length" and filled % 4 == 0:  # the bar is full
        kind = "chord" if filled < 4 * BARS else "nothing"
    return np.array([name.startswith(kind + " ") and (
        kind != "length" or int(name.split()[1]) <= 4 - filled % 4) for name in VOCABULARY])


def fitting(tone: int, mood: str) -> np.ndarray:
    """Which symbols are chords that contain this tone, bool (len(VOCABULARY),). All, if no chord
    does: the tone is outside the scale."""
    degrees = [degree for degree in range(1, 8)
               if tone % 12 in {note % 12 for note in chord_notes(degree, mood, 0)}]
    names = [f"chord {degree}" for degree in degrees or range(1, 8)]
    return np.array([name in names for name in VOCABULARY])


# ---- what a person types

def read_prompt(text: str, rng: np.random.Generator) -> list[int]:
    """Symbols of theme, mood and tempo from a text such as "a sad slow song about the sea"; what it
    does not say is drawn. UserError for words that are not known, and for two of a kind."""
    words, chosen = text.lower().split(), []
    names, others = [*THEMES, *MOODS, *TEMPOS], ("a", "an", "the", "song", "about", "and")
    if unknown := [word for word in words if word not in (*names, *others)]:
        raise UserError(f"Songs know no {unknown[0]!r}: choose from {', '.join(names)}.")
    for kind in (THEMES, MOODS, TEMPOS):
        said = [word for word in words if word in kind] or [str(rng.choice(list(kind)))]
        if len(said) > 1:
            raise UserError(f"A song is either {' or '.join(said)}: choose one.")
        chosen += said
    return [VOCABULARY.index(name) for name in chosen]


def read_lyrics(text: str) -> list[str]:
    """Words of one syllable that a singer knows. UserError for others."""
    words = text.lower().split()
    if unknown := [word for word in words if word not in WORDS]:
        raise UserError(f"Nobody can sing {unknown[0]!r}: choose from {', '.join(WORDS)}.")
    return words


def read_tune(text: str) -> list[tuple[int, int]]:
    """"0:2 4:2 ...": semitones above the root and eighths of each note. UserError for one that does
    not fill four bars of four eighths."""
    with explained(f"A tune is semitones:eighths, such as 0:2 4:2, got {text!r}.", ValueError):
        notes = [(int(tone), int(length)) for tone, length
                 in (note.split(":") for note in text.split())]
    ends = [0, *np.cumsum([length for _, length in notes]).tolist()]
    fits = ends[-1] == 4 * BARS and set(range(0, ends[-1], 4)) <= set(ends)
    if notes and not (fits and all(0 <= tone <= 16 and length >= 1 for tone, length in notes)):
        raise UserError(f"A tune has {BARS} bars of 4 eighths, which no note crosses, and tones "
                        f"from 0 to 16, got {text!r}.")
    return notes


# ---- what sounds

def semitones(step: int, mood: str) -> int:
    """A step of the scale, 0: the root, 7: the octave -> semitones above the root."""
    return 12 * (step // 7) + MOODS[mood][step % 7]


def compose(rng: np.random.Generator) -> Song:
    """A song by the rules above."""
    theme, mood, tempo = (str(rng.choice(list(kind))) for kind in (THEMES, MOODS, TEMPOS))
    chords = CHORDS[rng.integers(len(CHORDS))]
    step, word, bars = int(rng.choice([0, 2, 4])), "", []
    for i, degree in enumerate(chords):
        last, bar = i == BARS - 1, []
        rhythm = (4,) if last else RHYTHMS[rng.integers(len(RHYTHMS))]
        for j, length in enumerate(rhythm):
            step = int(np.clip(step + rng.choice([-2, -1, 0, 1, 2], p=[0.15, 0.3, 0.1, 0.3, 0.15]),
                               0, HIGHEST))
            if j == 0:  # the nearest note of the chord; degree 1 is step 0
                step = min((s for s in range(HIGHEST + 1) if (s - degree + 1) % 7 in (0, 2, 4)),
                           key=lambda s: (abs(s - step), s))
            if last:
                step = 0 if step < 4 else 7
            word = str(rng.choice([other for other in THEMES[theme] if other != word]))
            bar.append((word, semitones(step, mood), length))
        bars.append(tuple(bar))
    return Song(theme, mood, tempo, tuple(bars), tuple(chords))


def chord_notes(degree: int, mood: str, root: int) -> tuple[int, ...]:
    """MIDI numbers of the chord on a degree of the scale, its root first: three notes in the octave
    below the melody's."""
    return tuple(root - 12 + semitones(degree - 1 + third, mood) % 12 for third in (0, 2, 4))


def perform(song: Song, root: int, speaker: Speaker, seed: int = 0) -> np.ndarray:
    """Singing and strings -> float32 (T,) in [-1, 1] at 8,000 Hz. root: MIDI number of the key's
    root."""
    words, tones, lengths = zip(*song.notes, strict=True)
    sung = sing(words, [root + tone for tone in tones],
                [song.eighth * length for length in lengths], speaker, seed)
    chords = [chord_notes(degree, song.mood, root) for degree in song.chords for _ in range(2)]
    strings = pluck(chords, [2 * song.eighth] * len(chords), seed)
    total = min(len(sung), len(strings))
    mixed = sung[:total] + 0.35 * strings[:total]
    return (0.8 / np.abs(mixed).max() * mixed).astype(np.float32)


def to_frames(song: Song, root: int) -> np.ndarray:
    """What sounds in each frame of 16 ms, int64 (F, 6): the phoneme, the MIDI numbers of the note
    and of the three strings, and the number of frames since they were plucked. Nothing is random
    in `phones_of`, so these are the times at which `sing` sings."""
    words, tones, lengths = zip(*song.notes, strict=True)
    ends = np.cumsum([song.eighth * length for length in lengths])
    middle = (np.arange(round(ends[-1] * RATE / HOP)) + 0.5) * HOP / RATE
    *_, spoken = phones_of(words, tones, np.diff(ends, prepend=0))
    starts = np.array([start for _, start, _ in spoken])
    symbols = np.array([SYMBOLS.index(symbol) for symbol, *_ in spoken])
    bar = (middle / (4 * song.eighth)).astype(int).clip(max=BARS - 1)
    strings = np.array([chord_notes(degree, song.mood, root) for degree in song.chords])
    since = (middle % (2 * song.eighth) * RATE / HOP).astype(int)
    note = np.searchsorted(ends, middle).clip(max=len(tones) - 1)
    return np.column_stack([symbols[np.searchsorted(starts, middle, side="right") - 1],
                            root + np.array(tones)[note], strings[bar], since])


def make(count: int, seed: int = 0, singers: int = 100) -> dict:
    """Songs by `singers` voices in turn.

    -> waveforms, a list of float32 (T,); prompts and scores (see `to_text`), lists; words int64
    (N, 12), into WORDS; symbols int64 (N, 43), see `to_symbols`; frames int64 (N, F, 4), see
    `to_frames`; all with -1 after the last; root int64 (N,); labels int64 (N,), into MOODS; speaker
    int64 (N,)."""
    voices = [Speaker.random(np.random.default_rng([seed, 0, i])) for i in range(singers)]
    most = round(2 * BARS * 60 / min(TEMPOS.values()) * RATE / HOP)  # frames
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, 1, i])
        song, root, who = compose(rng), int(rng.choice(KEYS)), i % singers
        rows.append({"waveforms": perform(song, root, voices[who], int(rng.integers(2**31))),
                     "words": [WORDS.index(word) for word, *_ in song.notes],
                     "symbols": to_symbols(song), "frames": to_frames(song, root), "root": root,
                     "labels": list(MOODS).index(song.mood), "speaker": who,
                     "prompts": song.prompt, "scores": to_text(song)})
    return to_columns(rows, {"words": (12,), "symbols": (LONGEST,), "frames": (most, 6)})
