"""Numbers to read, to see and to hear: a caption, a drawing and a spoken digit that agree.

    caption   a red dog on grass with a sign that says 7, german
    image     the drawing of it: the number is on a large sign (0 to 9), or so many things (2 to 4)
    sound     "sieben" in a random voice, at most 0.8 seconds

Captions name 2, 3 and 4 in two ways ("two", "2"), so these have twice as many examples in training;
in the test all ten numbers are equally frequent. Everything but the number is independent: thing,
color, background, place, language and voice. 51 of the 400 combinations of number, thing and
background are held out for the test. A fifth of the training captions does not name the language.
"""

from dataclasses import replace

import numpy as np

from nanogen import UserError
from nanogen.data import prompts, scenes
from nanogen.data.drawing import COLORS, THINGS, draw_sign
from nanogen.data.scenes import WHERE, Scene
from nanogen.data.voices import LANGUAGES, RATE, Speaker, say

SECONDS = 0.8
TRAINED = [*range(10), 2, 3, 4]  # training examples draw their number from these
COUNTED = 0.6  # of the images of 2, 3 and 4, the fraction with so many things and no sign
UNNAMED = 0.2  # fraction of the training captions without a language
DIGITS = [str(digit) for digit in range(10)]
WORDS = list(dict.fromkeys([
    *DIGITS, *"a an with sign that says".split(), *" ".join(WHERE.values()).split(), *THINGS,
    *prompts.PLURALS, *COLORS, *prompts.NUMBERS[1:], *LANGUAGES]))  # of the captions
END, HIDDEN = 0, 1  # tokens; words begin at 2
TOKENS = {word: number for number, word in enumerate(WORDS, start=2)}
LONGEST = 14  # words of a caption


def large_sign(digit: int) -> np.ndarray:
    """A digit of twice the usual size on a board without a frame: uint8 (14, 10, 3)."""
    board = draw_sign(str(digit))[1:-1, 1:-1]
    return np.round(255 * np.kron(board, np.ones((2, 2, 1)))).astype(np.uint8)


def to_tokens(caption: str) -> list[int]:
    """The words of a caption as tokens. UserError for words that are not known, and too many."""
    words = caption.lower().replace(",", " ").split()
    if unknown := [word for word in dict.fromkeys(words) if word not in TOKENS]:
        raise UserError(f"The caption {caption!r} has words that the model never saw: "
                        f"{', '.join(unknown)}. It knows {', '.join(WORDS)}.")
    if len(words) > LONGEST:
        raise UserError(f"A caption has at most {LONGEST} words, got {len(words)}.")
    return [TOKENS[word] for word in words]


def to_caption(tokens: list[int]) -> str:
    """The words up to the first END: "a red dog on grass, german"."""
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    words = [WORDS[token - 2] for token in tokens]
    return " ".join(words[:-1]) + f", {words[-1]}" if words and words[-1] in LANGUAGES \
        else " ".join(words)


def number_in(caption: str) -> int:
    """The number that a caption names, -1 for none or several: the digit on its sign, or how many
    things."""
    words = caption.replace(",", " ").split()
    found = [int(word) for word in words if word in DIGITS]
    found += [prompts.NUMBERS.index(word) + 1 for word in words if word in prompts.NUMBERS]
    return found[0] if len(found) == 1 else -1


def draw(rng: np.random.Generator, held_out: bool) -> tuple[int, Scene]:
    """A number and a scene that shows it."""
    number = int(rng.integers(10) if held_out else rng.choice(TRAINED))
    counted = 2 <= number <= 4 and rng.random() < COUNTED
    while True:
        scene = scenes.random_scene(rng, number if counted else 1, False,
                                    "" if counted else str(number))
        if not counted and scene.sign_y != 26:
            continue  # until the sign is below the things
        scene = scene if counted else replace(scene, sign_x=0)  # at the lower left
        look = number, scene.things[0].kind, scene.background
        if prompts.is_held_out(*look) == held_out:
            return number, scene


def make(count: int, seed: int = 0, held_out: bool = False) -> dict[str, np.ndarray]:
    """`count` examples; held_out: those of the test.

    -> images uint8 (N, 32, 32, 3); prompts (N,) captions; tokens int64 (N, LONGEST), END after the
    last; clips int16 (N, 0.8 s), zeros after the end; labels int64 (N,), the number; language int64
    (N,); and the truth about the images: `prompts.describe`."""
    shown, captions, numbers, languages = [], [], [], []
    clips = np.zeros((count, round(SECONDS * RATE)), np.int16)
    for i, clip in enumerate(clips):
        rng = np.random.default_rng([seed, i])
        number, scene = draw(rng, held_out)
        language = int(rng.integers(len(LANGUAGES)))
        sound = say(str(number), LANGUAGES[language], Speaker.random(rng), int(rng.integers(2**31)))
        clip[: len(sound)] = np.round(32767 * sound[: len(clip)])
        named = held_out or rng.random() >= UNNAMED
        captions.append(f"{scene.caption}, {LANGUAGES[language]}" if named else scene.caption)
        shown.append(scene)
        numbers.append(number)
        languages.append(language)
    tokens = np.full((count, LONGEST), END)
    for row, caption in zip(tokens, captions, strict=True):
        words = to_tokens(caption)
        row[: len(words)] = words
    images, _ = scenes.render_scenes(shown, np.random.default_rng([seed, count]))
    for image, scene in zip(images, shown, strict=True):
        if scene.sign:  # a large one, over the small one
            board = large_sign(int(scene.sign))
            image[-board.shape[0] :, : board.shape[1]] = board
    return prompts.describe(shown) | {
        "images": images, "prompts": captions, "tokens": tokens, "clips": clips,
        "labels": np.array(numbers), "language": np.array(languages)}
