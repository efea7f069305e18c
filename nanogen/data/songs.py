"""Songs: lyrics, melody and accompaniment, composed by rules and sung by voices.py, from a seed.

A song has four half bars of two beats. Each half bar has a chord and one to three notes:

    theme   what the words are about: sea, night, road, love or sky
    mood    happy: a major key, sad: a minor key
    tempo   slow, medium or fast: 80, 110 or 140 beats a minute
    notes   a word of one syllable, semitones above the key's root, a length in half beats

The melody keeps to the scale of its key. It goes in small steps, begins each half bar on a note of
the chord, and ends on the root. A plucked string plays the chord on every beat. Code made it all,
so every word, note and time is known, and what a model sings can be scored exactly.
"""

from dataclasses import dataclass

import numpy as np

from nanogen import UserError
from nanogen.data.phonemes import SYLLABLES
from nanogen.data.utterances import HOP, SYMBOLS
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
RHYTHMS = ((2, 2), (4,), (1, 1, 2), (2, 1, 1), (3, 1))  # of half a bar, in half beats
CHORDS = ((1, 4, 5, 1), (1, 6, 4, 1), (1, 5, 4, 1), (1, 4, 1, 1), (6, 4, 5, 1))  # scale's steps
WORDS = list(SYLLABLES)
KEYS = range(50, 58)  # MIDI numbers of the root: D3 to A3
KEY = 53  # F3: the key of what a model sings, unless told
HIGHEST = 9  # step of the scale: a third above the octave
HALF_BARS = 4
VOCABULARY = [*THEMES, *MOODS, *TEMPOS, *(f"chord {step}" for step in range(1, 8)),
              *(f"word {word}" for word in WORDS), *(f"tone {tone}" for tone in range(17)),
              *(f"length {length}" for length in range(1, 5))]
LONGEST = 3 + HALF_BARS * (1 + 3 * 3)  # symbols


@dataclass(frozen=True)
class Song:
    """notes: for each half bar, tuples (word, semitones above the root, half beats); chords: the
    step of the scale, 1 to 7, on which each half bar's chord stands."""

    theme: str
    mood: str
    tempo: str
    notes: tuple[tuple[tuple[str, int, int], ...], ...]
    chords: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"a {self.mood} {self.tempo} song about {self.theme}"

    @property
    def half_beat(self) -> float:
        """Seconds."""
        return 30 / TEMPOS[self.tempo]


def to_text(song: Song) -> str:
    """How a song is typed: "sad slow sea | 1 sun:0:2 moon:3:2 | 4 ...": of each half bar its chord,
    and each note's word, semitones above the root and half beats."""
    halves = [" ".join([str(chord), *(":".join(map(str, note)) for note in half)])
              for chord, half in zip(song.chords, song.notes, strict=True)]
    return " | ".join([f"{song.mood} {song.tempo} {song.theme}", *halves])


def from_text(text: str) -> Song:
    """The song of which `to_text` gives this text."""
    head, *halves = text.split(" | ")
    mood, tempo, theme = head.split()
    parts = [half.split() for half in halves]
    notes = tuple(tuple((word, int(tone), int(length)) for word, tone, length
                        in (note.split(":") for note in part[1:])) for part in parts)
    return Song(theme, mood, tempo, notes, tuple(int(part[0]) for part in parts))


def to_symbols(song: Song) -> list[int]:
    """A song as a chain: theme, mood, tempo; then of each half bar its chord, and of each of its
    notes the word, the tone and the length. Indices of VOCABULARY."""
    chain = [song.theme, song.mood, song.tempo]
    for chord, half in zip(song.chords, song.notes, strict=True):
        chain.append(f"chord {chord}")
        for word, tone, length in half:
            chain += [f"word {word}", f"tone {tone}", f"length {length}"]
    return [VOCABULARY.index(symbol) for symbol in chain]


def from_symbols(chain: list[int]) -> Song:
    """The inverse of `to_symbols`."""
    theme, mood, tempo, *rest = (VOCABULARY[symbol] for symbol in chain)
    chords, halves, note = [], [], []
    for kind, value in map(str.split, rest):
        if kind == "chord":
            chords.append(int(value))
            halves.append([])
        else:
            note.append(value if kind == "word" else int(value))
        if kind == "length":
            halves[-1].append(tuple(note))
            note = []
    return Song(theme, mood, tempo, tuple(map(tuple, halves)), tuple(chords))


def possible(chain: list[int]) -> np.ndarray:
    """Which symbols may follow the begun chain, bool (len(VOCABULARY),): the kind that is next, and
    lengths that fit into the half bar. None: the song is complete."""
    said = [VOCABULARY[symbol].split() for symbol in chain[3:]]
    last = said[-1][0] if said else ""
    lengths = 0
    for kind, *value in said:
        lengths = 0 if kind == "chord" else lengths + (int(value[0]) if kind == "length" else 0)
    done = last in ("", "length") and (not said or lengths == 4)
    if done and sum(kind == "chord" for kind, _ in said) == HALF_BARS:
        return np.zeros(len(VOCABULARY), dtype=bool)
    follows = {"chord": "word", "word": "tone", "tone": "length", "length": "word", "": "chord"}
    kind = "chord" if done else follows[last]
    most = 4 - lengths if kind == "length" else 999
    return np.array([name.startswith(kind + " ") and (kind != "length" or int(name[-1]) <= most)
                     for name in VOCABULARY])


# ---- what a person types

def read_prompt(text: str, rng: np.random.Generator) -> list[int]:
    """Symbols of theme, mood and tempo from a text such as "a sad slow song about the sea"; what it
    does not say is drawn. UserError for words that are not known."""
    words = text.lower().split()
    known = [*THEMES, *MOODS, *TEMPOS, "a", "an", "the", "song", "about", "and"]
    if unknown := [word for word in words if word not in known]:
        raise UserError(f"Songs know no {unknown[0]!r}: choose from {', '.join(known[:-6])}.")
    chosen = ([word for word in words if word in kind] or [str(rng.choice(list(kind)))]
              for kind in (THEMES, MOODS, TEMPOS))
    return [VOCABULARY.index(names[0]) for names in chosen]


def read_lyrics(text: str) -> list[str]:
    """Words of one syllable that a singer knows. UserError for others."""
    words = text.lower().split()
    if unknown := [word for word in words if word not in WORDS]:
        raise UserError(f"Nobody can sing {unknown[0]!r}: choose from {', '.join(WORDS)}.")
    return words


def read_melody(text: str) -> list[tuple[int, int]]:
    """"0:2 4:2 ...": semitones above the root and half beats of each note. UserError for one that
    does not fill four half bars of four half beats."""
    with explained(f"A melody is semitones:halfbeats, such as 0:2 4:2, got {text!r}.", ValueError):
        notes = [(int(tone), int(length)) for tone, length
                 in (note.split(":") for note in text.split())]
    ends = np.cumsum([length for _, length in notes])
    fits = not notes or set(4 * np.arange(1, HALF_BARS + 1)) <= set(ends) and (
        ends[-1] == 4 * HALF_BARS and len(notes) <= 12)
    if not fits or any(not 0 <= tone <= 16 or not 1 <= length <= 4 for tone, length in notes):
        raise UserError(f"A melody has {HALF_BARS} half bars of 4 half beats, which no note "
                        f"crosses, and tones from 0 to 16, got {text!r}.")
    return notes


# ---- what sounds

def semitones(step: int, mood: str) -> int:
    """A step of the scale, 0: the root, 7: the octave -> semitones above the root."""
    return 12 * (step // 7) + MOODS[mood][step % 7]


def compose(rng: np.random.Generator, theme: str = "", mood: str = "", tempo: str = "") -> Song:
    """A song; what is "" is drawn."""
    theme = theme or str(rng.choice(list(THEMES)))
    mood, tempo = mood or str(rng.choice(list(MOODS))), tempo or str(rng.choice(list(TEMPOS)))
    chords = CHORDS[rng.integers(len(CHORDS))]
    step, word, halves = int(rng.choice([0, 2, 4])), "", []
    for i, chord in enumerate(chords):
        last, half = i == HALF_BARS - 1, []
        rhythm = RHYTHMS[1] if last else RHYTHMS[rng.integers(len(RHYTHMS))]
        for j, length in enumerate(rhythm):
            step = int(np.clip(step + rng.choice([-2, -1, 0, 1, 2], p=[0.15, 0.3, 0.1, 0.3, 0.15]),
                               0, HIGHEST))
            if j == 0:  # the nearest note of the chord
                step = min((s for s in range(HIGHEST + 1) if (s - chord + 1) % 7 in (0, 2, 4)),
                           key=lambda s: (abs(s - step), s))
            if last:
                step = 0 if step < 4 else 7
            word = str(rng.choice([other for other in THEMES[theme] if other != word]))
            half.append((word, semitones(step, mood), length))
        halves.append(tuple(half))
    return Song(theme, mood, tempo, tuple(halves), tuple(chords))


def chord_notes(chord: int, mood: str, root: int) -> tuple[int, ...]:
    """MIDI numbers of the chord on a step of the scale: three notes, an octave below the melody."""
    return tuple(root - 12 + semitones(chord - 1 + third, mood) % 12 for third in (0, 2, 4))


def perform(song: Song, root: int, speaker: Speaker, seed: int = 0) -> np.ndarray:
    """Singing and strings -> float32 (T,) in [-1, 1] at 8,000 Hz. root: MIDI number of the key's
    root."""
    notes = [note for half in song.notes for note in half]
    sung = sing([word for word, *_ in notes], [root + tone for _, tone, _ in notes],
                [song.half_beat * length for *_, length in notes], speaker, seed)
    chords = [chord_notes(chord, song.mood, root) for chord in song.chords for _ in range(2)]
    strings = pluck(chords, [2 * song.half_beat] * len(chords), seed)
    total = min(len(sung), len(strings))
    mixed = sung[:total] + 0.35 * strings[:total]
    return (0.8 / np.abs(mixed).max() * mixed).astype(np.float32)


def to_frames(song: Song, root: int) -> np.ndarray:
    """What sounds in each frame of 16 ms, int64 (F, 3): the phoneme, the MIDI number of the note,
    and of the chord's lowest note. The singer gives a note's phonemes the same times always."""
    notes = [note for half in song.notes for note in half]
    ends = np.cumsum([song.half_beat * length for *_, length in notes])
    middle = (np.arange(round(ends[-1] * RATE / HOP)) + 0.5) * HOP / RATE
    which = np.searchsorted(ends, middle).clip(max=len(notes) - 1)
    tones = root + np.array([tone for _, tone, _ in notes])
    half = (middle / (4 * song.half_beat)).astype(int).clip(max=HALF_BARS - 1)
    lowest = [chord_notes(chord, song.mood, root)[0] for chord in song.chords]
    *_, spoken = phones_of([word for word, *_ in notes], tones, np.diff(ends, prepend=0))
    starts = np.array([start for _, start, _ in spoken])
    phone = np.array([SYMBOLS.index(symbol) for symbol, *_ in spoken])
    phone = phone[np.searchsorted(starts, middle, side="right") - 1]
    return np.stack([phone, tones[which], np.array(lowest)[half]], axis=1)


def make(count: int, seed: int = 0, singers: int = 100) -> dict:
    """Songs by `singers` voices in turn.

    -> waveforms, a list of float32 (T,); prompts and scores (see `to_text`), lists; words int64
    (N, 12), into WORDS; symbols int64 (N, 43), see `to_symbols`; frames int64 (N, F, 3), see
    `to_frames`; all with -1 after the last; root int64 (N,); labels int64 (N,), into MOODS; speaker
    int64 (N,)."""
    voices = [Speaker.random(np.random.default_rng([seed, 0, i])) for i in range(singers)]
    most = round(8 * 60 / min(TEMPOS.values()) * RATE / HOP)
    shapes = {"words": (12,), "symbols": (LONGEST,), "frames": (most, 3), "root": (), "labels": (),
              "speaker": ()}
    columns = {name: np.full((count, *shape), -1) for name, shape in shapes.items()}
    waveforms, prompts, scores = [], [], []
    for i in range(count):
        rng = np.random.default_rng([seed, 1, i])
        song, root, who = compose(rng), int(rng.choice(KEYS)), i % singers
        waveforms.append(perform(song, root, voices[who], int(rng.integers(2**31))))
        prompts.append(song.prompt)
        scores.append(to_text(song))
        words = [WORDS.index(word) for half in song.notes for word, *_ in half]
        rows = {"words": words, "symbols": to_symbols(song), "frames": to_frames(song, root)}
        for name, row in rows.items():
            columns[name][i, : len(row)] = row
        columns["root"][i], columns["speaker"][i] = root, who
        columns["labels"][i] = list(MOODS).index(song.mood)
    return {"waveforms": waveforms, **columns, "prompts": prompts, "scores": scores}
