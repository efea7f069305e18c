"""Utterances: digits spoken by one voice in one or two languages, with every phoneme's place.

A recording has two parts with a short pause between, for example "three one" in English and "vier
null" in German. So a model can learn to go on in the voice of the first part, in any language.
`frames` says which phoneme sounds in each frame of 16 ms, the frame of the codec.
"""

import re
from collections.abc import Sequence
from dataclasses import astuple, replace

import numpy as np

from nanogen import UserError
from nanogen.data.phonemes import DIGITS, LANGUAGES, PHONEMES
from nanogen.data.voices import RATE, Speaker, say

HOP = 128  # samples of a frame
SYMBOLS = ["", *PHONEMES]  # number of a phoneme; 0: none sounds
LONGEST = 4 * RATE  # samples of a recording
SHAPES = {"words": (8,), "frames": (LONGEST // HOP,), "durations": (32, 2), "language": (2,)}
WORDS = {"english": "zero one two three four five six seven eight nine",
         "german": "null eins zwei drei vier fünf sechs sieben acht neun",
         "spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve"}
NUMBERS = {word: digit for words in WORDS.values() for digit, word in enumerate(words.split())}
TYPICAL = [0, *(sum(phone.seconds for phone in PHONEMES[symbol]) * RATE / HOP
                for symbol in SYMBOLS[1:])]  # frames of a phoneme at ordinary tempo


def digits_of(text: str) -> str:
    """"3 1 4" or "three one four", in any of the languages -> "314". UserError for other words."""
    words = text.lower().replace(",", " ").split()
    unknown = [word for word in words if word not in NUMBERS and not re.fullmatch("[0-9]+", word)]
    if unknown or not words:
        raise UserError("Only digits can be said, such as 314 or three one four, got "
                        f"{', '.join(unknown) or 'nothing'}.")
    return "".join(str(NUMBERS.get(word, word)) for word in words)


def spell(digits: str, language: str) -> list[int]:
    """The numbers of the phonemes of digits: "31" -> those of "three one"."""
    return [SYMBOLS.index(symbol) for digit in digits
            for symbol in DIGITS[language][int(digit)].split()]


def to_frames(spoken: list[tuple], total: int) -> np.ndarray:
    """Phonemes (symbol, start, end in seconds) -> the one in the middle of each frame (F,)."""
    frames = np.zeros(-(-total // HOP), dtype=np.int64)
    middle = (np.arange(len(frames)) + 0.5) * HOP / RATE
    for symbol, start, end in spoken:
        frames[(start <= middle) & (middle < end)] = SYMBOLS.index(symbol)
    return frames


def record(digits: list[str], languages: list[str], speaker: Speaker,
           rng: np.random.Generator) -> tuple[np.ndarray, list[tuple], int]:
    """Two parts with a pause -> the waveform (T,), the phonemes, a list of (symbol, start, end) in
    seconds, and the first frame of the second part."""
    pieces, spoken, at = [], [], 0
    for part, language in zip(digits, languages, strict=True):
        if pieces:
            pause = HOP * int(rng.integers(4, 16)) + -at % HOP  # the second part begins on a frame
            pieces.append(np.zeros(pause, dtype=np.float32))
            at += pause
        begin = at // HOP
        tempo = speaker.tempo * float(np.exp(rng.uniform(-0.4, 0.4)))  # by 2/3 to 3/2
        sound, phones = say(part, language, replace(speaker, tempo=tempo),
                            seed=int(rng.integers(2**31)), alignment=True)
        spoken += [(symbol, start + at / RATE, end + at / RATE) for symbol, start, end in phones]
        pieces.append(sound)
        at += len(sound)
    return np.concatenate(pieces), spoken, begin


def describe(sound: np.ndarray, spoken: list[tuple], begin: int, who: int, digits: list[str],
             language: Sequence[int]) -> dict:
    """The row of a recording: its columns as `make` names them."""
    durations = [(SYMBOLS.index(symbol), round(end * RATE / HOP) - round(start * RATE / HOP))
                 for symbol, start, end in spoken if start * RATE >= begin * HOP - 1]
    words = [10 * code + int(digit) for code, part in zip(language, digits, strict=True)
             for digit in part]
    return {"waveforms": sound, "words": words, "frames": to_frames(spoken, len(sound)),
            "durations": durations, "begin": begin, "language": language,
            "labels": int(digits[1][0]), "speaker": who, "prompts": digits[1]}


def to_columns(rows: list[dict], shapes: dict[str, tuple]) -> dict:
    """Rows as columns: int64 (N, *shape) with -1 after the last of each row, else a list."""
    columns = {}
    for name in rows[0]:
        columns[name] = values = [row[name] for row in rows]
        if name in shapes:
            columns[name] = np.full((len(rows), *shapes[name]), -1)
            for i, value in enumerate(values):
                columns[name][i, : len(value)] = value
        elif isinstance(values[0], int):
            columns[name] = np.array(values)
    return columns


def make(count: int, seed: int = 0, speakers: int = 400) -> dict:
    """`count` recordings by `speakers` voices in turn, at most LONGEST samples each.

    -> waveforms, a list of float32 (T,); words int64 (N, 8), 10 * language + digit of both parts;
    frames int64 (N, F), phonemes; durations int64 (N, 32, 2), phonemes of the second part and their
    numbers of frames; all with -1 after the last; begin int64 (N,), the first frame of the second
    part; language int64 (N, 2), of the parts; labels int64 (N,), the second part's first digit;
    prompts, a list of its digits; speaker int64 (N,); voice float32 (N, 4)."""
    voices = [Speaker.random(np.random.default_rng([seed, 0, i])) for i in range(speakers)]
    rows = []
    for i in range(count):
        rng, who, sound = np.random.default_rng([seed, 1, i]), i % speakers, None
        while sound is None or len(sound) > LONGEST:
            digits = ["".join(map(str, rng.integers(10, size=rng.integers(1, 5))))
                      for _ in range(2)]
            language = rng.integers(len(LANGUAGES), size=2)
            sound, phones, begin = record(digits, [LANGUAGES[k] for k in language], voices[who],
                                          rng)
        rows.append(describe(sound, phones, begin, who, digits, language))
    columns = to_columns(rows, SHAPES)
    voice = np.array([astuple(voices[who]) for who in columns["speaker"]], dtype=np.float32)
    return columns | {"voice": voice}


def join(clips: list[np.ndarray], digits: np.ndarray, speakers: np.ndarray, count: int,
         seed: int = 0) -> dict:
    """The same from recorded English digits (T,), joined, each row by one of the speakers, with up
    to 3 frames of silence between two digits. Nobody knows when their phonemes sound: a clip is
    divided as at ordinary tempo."""
    own = {who: np.flatnonzero(speakers == who) for who in np.unique(speakers)}
    rows = []
    for i in range(count):
        rng, sound = np.random.default_rng([seed, i]), None
        who = int(rng.choice(list(own)))
        while sound is None or len(sound) > LONGEST:
            chosen = [rng.choice(own[who], rng.integers(1, 5)) for _ in range(2)]
            pieces, phones, at, begin = [], [], 0, 0  # at, and all lengths: multiples of HOP
            for j, number in enumerate([*chosen[0], *chosen[1]]):
                second = j == len(chosen[0])
                gap = HOP * int(rng.integers(4, 16) if second else rng.integers(4))
                clip, at = trimmed(clips[number]), at + gap
                begin = at // HOP if second else begin
                spelled = DIGITS["english"][int(digits[number])].split()
                ends = np.cumsum([0.0] + [TYPICAL[SYMBOLS.index(symbol)] for symbol in spelled])
                cuts = ((at + ends / ends[-1] * len(clip)) / RATE).tolist()
                phones += zip(spelled, cuts[:-1], cuts[1:], strict=True)
                pieces += [np.zeros(gap, dtype=np.float32), clip]
                at += len(clip)
            sound = np.concatenate(pieces)
        said = ["".join(str(int(digits[number])) for number in part) for part in chosen]
        rows.append(describe(sound, phones, begin, who, said, [0, 0]))
    return to_columns(rows, SHAPES)


def sounding(clip: np.ndarray) -> tuple[int, int]:
    """Where a clip (T,) begins and ends without the frames at its ends that are 35 dB softer than
    its loudest one, in samples."""
    power = np.square(np.pad(clip, (0, -len(clip) % HOP))).reshape(-1, HOP).sum(1)
    loud = np.flatnonzero(power >= power.max() * 10**-3.5)
    return int(loud[0]) * HOP, int(loud[-1] + 1) * HOP


def trimmed(clip: np.ndarray) -> np.ndarray:
    """What `sounding` finds, a whole number of frames."""
    start, end = sounding(clip)
    return np.pad(clip, (0, -len(clip) % HOP))[start:end]
