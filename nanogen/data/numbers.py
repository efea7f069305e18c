"""Numbers to read, to see and to hear: a caption, a drawing and a spoken digit that agree.

    caption   a red dog on grass with a sign that says 7, german
    image     the drawing of it: the number is on a sign (0 to 9), or so many things (2 to 4)
    sound     "sieben" in a random voice, at most 0.8 seconds

Everything but the number is independent: thing, color, background, place, language and voice. A
tenth of the combinations of number, thing and background is held out for the test.
"""

from dataclasses import replace

import numpy as np

from nanogen.data import prompts, scenes
from nanogen.data.scenes import Scene
from nanogen.data.voices import LANGUAGES, RATE, Speaker, say

SECONDS = 0.8
COUNTED = 0.3  # fraction of the images that show the number as so many things
NAMES = list(LANGUAGES)
WORDS = [*prompts.WORDS, *NAMES]  # of the captions; token 0 is the end, 1 stands for "hidden"
TOKENS = {word: number for number, word in enumerate(WORDS, start=2)}
LONGEST = 14  # words of a caption


def to_tokens(caption: str) -> list[int]:
    """The words of a caption as tokens. UserError for words that are not known."""
    return prompts.tokenize(caption, TOKENS)


def to_caption(tokens: list[int]) -> str:
    """The inverse: "a red dog on grass, german"."""
    words = [WORDS[token - 2] for token in tokens if token >= 2]
    spoken = [word for word in words if word in NAMES]
    text = " ".join(word for word in words if word not in NAMES)
    return ", ".join([text, *spoken])


def number_in(caption: str) -> int:
    """The number that a caption names, -1 for none: the digit on its sign, or how many things."""
    words = caption.split(",")[0].split()
    digits = [int(word) for word in words if word.isdecimal()]
    counts = [prompts.NUMBERS.index(word) + 1 for word in words if word in prompts.NUMBERS]
    return (digits or counts or [-1])[0]


def draw(rng: np.random.Generator, held_out: bool) -> tuple[int, Scene]:
    """A number and a scene that shows it."""
    while True:
        counted = rng.random() < COUNTED
        number = int(rng.integers(2, 5) if counted else rng.integers(10))
        scene = scenes.random_scene(rng, number if counted else 1, False,
                                    "" if counted else str(number))
        if scene.sign_y != 26:
            continue  # until the sign is below the things
        scene = replace(scene, sign_x=0)  # at the lower left
        look = number, scene.things[0].kind, scene.background
        if prompts.is_held_out(*look) == held_out:
            return number, scene


def make(count: int, seed: int = 0, held_out: bool = False) -> dict[str, np.ndarray]:
    """`count` examples; held_out: those of the test.

    -> images uint8 (N, 32, 32, 3); prompts (N,) captions; tokens int64 (N, LONGEST), 0 after the
    last; clips int16 (N, 0.8 s), zeros after the end; number, language int64 (N,); labels, the
    number again; and the truth about the images: `prompts.describe`."""
    tokens = np.zeros((count, LONGEST), np.int64)
    clips = np.zeros((count, round(SECONDS * RATE)), np.int16)
    shown, captions, numbers, languages = [], [], [], []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        number, scene = draw(rng, held_out)
        language = int(rng.integers(len(NAMES)))
        sound = say(str(number), NAMES[language], Speaker.random(rng), int(rng.integers(2**31)))
        sound = sound[: clips.shape[1]]
        clips[i, : len(sound)] = np.round(32767 * sound)
        caption = f"{scene.caption}, {NAMES[language]}"
        words = to_tokens(caption)
        tokens[i, : len(words)] = words
        shown.append(scene)
        captions.append(caption)
        numbers.append(number)
        languages.append(language)
    images, _ = scenes.render_scenes(shown, np.random.default_rng([seed, count]))
    return {"images": images, "prompts": captions, "tokens": tokens, "clips": clips,
            "number": np.array(numbers), "language": np.array(languages),
            **prompts.describe(shown), "labels": np.array(numbers)}
