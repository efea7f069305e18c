"""Utterances: digits spoken by one voice in one or two languages, with every phoneme's place.

A recording has two parts with a short pause between, for example "three one" in English and "vier
null" in German. So a model can learn to go on in the voice of the first part, in any language.
`frames` says which phoneme sounds in each frame of 16 ms, the frame of the codec.
"""

from dataclasses import astuple, replace

import numpy as np

from nanogen import UserError
from nanogen.data.phonemes import DIGITS, LANGUAGES, PHONEMES
from nanogen.data.voices import RATE, Speaker, say

HOP = 128  # samples of a frame
SYMBOLS = ["", *PHONEMES]  # number of a phoneme; 0: none sounds
MOST_PHONEMES = 32  # of four digits
WORDS = {"english": "zero one two three four five six seven eight nine",
         "german": "null eins zwei drei vier fünf sechs sieben acht neun",
         "spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve"}
NUMBERS = {word: digit for words in WORDS.values() for digit, word in enumerate(words.split())}
TYPICAL = [0, *(sum(phone.seconds for phone in PHONEMES[symbol]) * RATE / HOP
                for symbol in SYMBOLS[1:])]  # frames of a phoneme at ordinary tempo


def digits_of(text: str) -> str:
    """"3 1 4" or "three one four", in any of the languages -> "314". UserError for other words."""
    digits = "".join(word if word.isdecimal() else str(NUMBERS.get(word, word))
                     for word in text.lower().replace(",", " ").split())
    if not digits.isascii() or not digits.isdecimal():
        unknown = [word for word in text.lower().replace(",", " ").split()
                   if not word.isdecimal() and word not in NUMBERS]
        raise UserError(f"Only digits can be said, such as 314 or three one four, got "
                        f"{', '.join(unknown) or 'nothing'}.")
    return digits


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


def to_counts(spoken: list[tuple], begin: int) -> list[tuple[int, int]]:
    """Phonemes of the part that begins at a frame -> (symbol, number of frames) of each."""
    cuts = [round(start * RATE / HOP) for _, start, _ in spoken] + [
        round(spoken[-1][2] * RATE / HOP)]
    return [(SYMBOLS.index(symbol), after - before) for (symbol, start, _), before, after
            in zip(spoken, cuts[:-1], cuts[1:], strict=True) if start * RATE >= begin * HOP - 1]


def record(digits: list[str], languages: list[str], speaker: Speaker,
           rng: np.random.Generator) -> tuple[np.ndarray, list[tuple], int]:
    """Two parts with a pause -> the waveform (T,), the phonemes, a list of (symbol, start, end) in
    seconds, and the first frame of the second part."""
    pieces, spoken, at = [], [], 0
    for part, language in zip(digits, languages, strict=True):
        if pieces:
            pause = HOP * int(rng.integers(4, 16))  # 64 to 240 ms, in whole frames
            pause += -at % HOP
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


def make(count: int, seed: int = 0, speakers: int = 400, longest: float = 4.0) -> dict:
    """`count` recordings by `speakers` voices in turn, at most `longest` seconds each.

    -> waveforms, a list of float32 (T,); words int64 (N, 8), 10 * language + digit of both parts;
    frames int64 (N, F), phonemes; durations int64 (N, 32, 2), phonemes of the second part and their
    numbers of frames; all with -1 after the last; begin int64 (N,), the first frame of the second
    part; language int64 (N, 2), of the parts; labels int64 (N,), the second part's first digit;
    prompts, a list of its digits; speaker int64 (N,); voice float32 (N, 4)."""
    voices = [Speaker.random(np.random.default_rng([seed, 0, i])) for i in range(speakers)]
    most, waveforms, prompts = int(longest * RATE) // HOP, [], []
    shapes = {"words": (8,), "frames": (most,), "durations": (MOST_PHONEMES, 2), "begin": (),
              "language": (2,), "labels": (), "speaker": ()}
    columns = {name: np.full((count, *shape), -1) for name, shape in shapes.items()}
    for i in range(count):
        rng, who, sound = np.random.default_rng([seed, 1, i]), i % speakers, None
        while sound is None or len(sound) > most * HOP:
            digits = ["".join(map(str, rng.integers(10, size=rng.integers(1, 5)))) for _ in "ab"]
            language = rng.integers(len(LANGUAGES), size=2)
            sound, phones, begin = record(digits, [LANGUAGES[k] for k in language], voices[who],
                                          rng)
        words = [10 * k + int(digit) for k, part in zip(language, digits, strict=True)
                 for digit in part]
        row, counts = to_frames(phones, len(sound)), to_counts(phones, begin)
        for name, values in (("words", words), ("frames", row), ("durations", counts)):
            columns[name][i, : len(values)] = values
        columns["begin"][i], columns["language"][i] = begin, language
        columns["labels"][i], columns["speaker"][i] = int(digits[1][0]), who
        waveforms.append(sound)
        prompts.append(digits[1])
    voice = np.array([astuple(voices[who]) for who in columns["speaker"]], dtype=np.float32)
    return {"waveforms": waveforms, **columns, "voice": voice, "prompts": prompts}
