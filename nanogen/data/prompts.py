"""Prompts: scenes to draw from a text, sums to work out, and instructions to edit an image.

    plain     a red dog on grass                                  one thing
    count     three blue birds in the sky                         one to four things
    relation  a red dog left of a blue car in the city            two things
    sign      a red dog on grass with a sign that says HELLO      the text must be right
    sum       ... with a sign that says 3+4=                      the sign must say 3+4=7
    many      as many blue birds as 2+1 in the sky                three of them
    edits     make the dog blue, turn the dog into a cat, take the sign away,
              add a sign that says HELLO, put the cat left of the car

An example of an edit has a source, the image before. "sum" and "many" have a thought: the way from
the sum to its result, written out. It counts, as that needs only the last number and letter:

    3+4=   ->   3+4=3a4b5c6d7=7         2+1   ->   2+1=2a3=three

Held out: a tenth of the combinations of thing, color and background, of the pairs of things in a
relation, and of the texts; a fifth of the sums. No training image shows any of them, and each test
example has one, of its task.
"""

import re
import zlib
from dataclasses import replace

import numpy as np

from nanogen import UserError
from nanogen.data import scenes
from nanogen.data.drawing import BACKGROUNDS, COLORS, KINDS, LETTERS, SIZE, SUBJECT, THINGS
from nanogen.data.scenes import DIRECTIONS, RELATIONS, WHERE, Scene, random_scene, render_scenes

TASKS = {  # name -> fraction of the examples
    "plain": 0.1, "count": 0.13, "relation": 0.25, "sign": 0.1, "sum": 0.06, "many": 0.08,
    "color": 0.06, "kind": 0.08, "away": 0.02, "write": 0.03, "move": 0.09}
EDITS = ("color", "kind", "away", "write", "move")
NUMBERS = ("one", "two", "three", "four")
RARE = "zib"  # a word for a new subject: no prompt has it (see image/personalize.py)
PLURALS = [kind if kind == "fish" else kind + "s" for kind in THINGS]
CHARACTERS = LETTERS + "0123456789+-=" + LETTERS.lower()[:9]  # one token each
GRAMMAR = "an the of in on as many with sign that says make turn into take away add put moving"
WORDS = list(dict.fromkeys([
    *CHARACTERS, *GRAMMAR.split(), RARE, *NUMBERS, *THINGS, *PLURALS, *COLORS, *BACKGROUNDS,
    *" ".join(RELATIONS).split(), *DIRECTIONS]))
END, START = 0, 1  # END is padding, too; START stands before a text, and before its thought
TOKENS = {word: number for number, word in enumerate(WORDS, start=2)}
VOCABULARY = len(WORDS) + 2
LONGEST_THOUGHT = 35  # tokens: 9+9=9a10b11c12d13e14f15g16h17i18=18


# ---- text -> tokens

def tokenize(text: str) -> list[int]:
    """A known word is one token; capitals, digits and + - = are one each. A capital that begins a
    word is made small. UserError for words that are not known."""
    text = re.sub(r"^A\b|\b[A-Z](?=[a-z])", lambda capital: capital[0].lower(), text)
    parts = re.findall(r"[a-z]+|[A-Z]|[0-9+=-]|[^\s,.]", text)
    if unknown := [part for part in dict.fromkeys(parts) if part not in TOKENS]:
        raise UserError(f"The prompt {text!r} has words that the model never saw: "
                        f"{', '.join(unknown)}. It knows {', '.join(WORDS[len(CHARACTERS):])}, and "
                        "capitals and digits on signs.")
    return [TOKENS[part] for part in parts]


def detokenize(tokens: list[int]) -> str:
    """The words of tokens, without spaces: for thoughts, which have none."""
    return "".join(WORDS[token - 2] for token in tokens if token > START)


def completed(prompt: str, thought: str) -> str:
    """The prompt with the result of a thought: "... a sign that says 3+4=7", or "as many blue birds
    as 2+1 in the sky=three"."""
    answer = thought.rpartition("=")[2]
    known = answer in NUMBERS or answer.isdecimal()  # else there is nothing to work out
    return f"{prompt.rstrip('=')}={answer}" if known else prompt


# ---- what is asked

def thought_about(first: int, sign: str, second: int, words: bool = False) -> str:
    """The thought about a sum: 3, "+", 4 -> "3+4=3a4b5c6d7=7"; words: a result in letters."""
    step = 1 if sign == "+" else -1
    counted = [f"{LETTERS[i].lower()}{first + step * (i + 1)}" for i in range(second)]
    result = first + step * second
    end = NUMBERS[result - 1] if words else result
    return f"{first}{sign}{second}={first}{''.join(counted)}={end}"


def is_held_out(*what, one_in: int = 10) -> bool:
    """Whether a combination is for the test only: (kind, color, background), a pair of kinds, a
    text, or a sum (first, sign, second)."""
    return zlib.crc32(repr((*what, "held out")).encode()) % one_in == 0


def held_out_parts(scene: Scene) -> dict[str, bool]:
    """What in a scene is held out: "look" (of any of its things), "pair", "text"."""
    looks = {(thing.kind, thing.color, scene.background) for thing in scene.things}
    pair = sorted({thing.kind for thing in scene.things})
    return {"look": any(is_held_out(*look) for look in looks),
            "pair": len(pair) == 2 and is_held_out(*pair),
            "text": scene.sign != "" and "=" not in scene.sign and is_held_out(scene.sign)}


TESTED = {"relation": "pair", "move": "pair", "sign": "text", "write": "text"}  # else: "look"


def random_text(rng: np.random.Generator) -> str:
    """A sign's text: in half of the cases one to seven random letters, else a word or a number."""
    letters = "".join(rng.choice(list(LETTERS), size=rng.integers(1, 8)))
    return (letters, letters, str(rng.choice([*THINGS, *COLORS])).upper(),
            str(rng.integers(10_000)))[rng.integers(4)]


def random_sum(rng: np.random.Generator, held_out: bool, largest: int = 18) -> tuple:
    """(first, sign, second) with a result from 0 to 18, or from 1 to a `largest` below that."""
    smallest = 0 if largest == 18 else 1
    while True:
        first, second = rng.integers(10, size=2).tolist()
        sign = "+-"[rng.integers(2)]
        result = first + second if sign == "+" else first - second
        if smallest <= result <= largest and is_held_out(first, sign, second, one_in=5) == held_out:
            return first, sign, second


def example(task: str, rng: np.random.Generator, held_out: bool) -> tuple:
    """-> the prompt, the thought, the scene before (or None) and the scene to draw."""
    while True:
        count, thought, text, asked = 1, "", "", ""
        if task == "count":
            count = int(rng.integers(1, 5))
        elif task in ("sign", "sum", "away", "write"):
            count, text = int(rng.integers(1, 3)), random_text(rng)
        if task in ("sum", "many"):
            numbers = random_sum(rng, held_out, 4 if task == "many" else 18)
            asked = "{}{}{}".format(*numbers)
            thought = thought_about(*numbers, words=task == "many")
            result = thought.rpartition("=")[2]
            if task == "sum":
                text = f"{asked}={result}"
            else:
                count = NUMBERS.index(result) + 1
        pair = task in ("relation", "move") or (task == "color" and rng.random() < 0.5)
        scene = random_scene(rng, count, pair, text)
        if scene.sign_y != 26:
            continue  # until the sign is below the things
        scene = replace(scene, sign_x=0)  # at the lower left
        prompt, before, after = spoken(task, rng, scene, asked)
        parts = held_out_parts(after)
        if held_out and (task in ("sum", "many") or parts[TESTED.get(task, "look")]):
            return prompt, thought, before, after
        if not held_out and not any(parts.values()) \
                and not (before and any(held_out_parts(before).values())):
            return prompt, thought, before, after


def spoken(task: str, rng: np.random.Generator, scene: Scene, asked: str) -> tuple:
    """-> the prompt, the scene before an edit (else None), and the scene to draw; one of the two is
    `scene`. asked: the sum in place of a number of things, for "many"."""
    thing = scene.things[0]
    if task == "many":
        name = PLURALS[THINGS.index(thing.kind)]
        return f"as many {thing.color} {name} as {asked} {WHERE[scene.background]}", None, scene
    if task == "away":
        return "take the sign away", scene, replace(scene, sign="")
    if task == "write":
        return f"add a sign that says {scene.sign}", replace(scene, sign=""), scene
    if task == "move":  # the two change places
        things = tuple(replace(old, x=new.x, y=new.y)
                       for old, new in zip(scene.things, scene.things[::-1], strict=True))
        way = RELATIONS[RELATIONS.index(scene.relation) ^ 1]  # the opposite
        return (f"put the {thing.kind} {way} the {things[1].kind}", scene,
                replace(scene, things=things, relation=way))
    if task == "color":
        things, index = list(scene.things), int(rng.integers(len(scene.things)))
        color = str(rng.choice([color for color in COLORS if color != things[index].color]))
        things[index] = replace(things[index], color=color)
        prompt = f"make the {things[index].kind} {color}"
        return prompt, scene, replace(scene, things=tuple(things))
    if task == "kind":
        kind = str(rng.choice([kind for kind in THINGS if kind != thing.kind]))
        return (f"turn the {thing.kind} into a {kind}", scene,
                replace(scene, things=(replace(thing, kind=kind),)))
    return scene.caption, None, scene


# ---- the data set

def make(count: int, seed: int = 0, held_out: bool = False) -> dict[str, np.ndarray]:
    """`count` examples; held_out: those of the test.

    -> images uint8 (N, 32, 32, 3); sources, the same before an edit, else black; prompts, thoughts
    (N,) texts; task int64 (N,), into TASKS; and the truth about the images: `describe`."""

    def draw(rng, chunk):
        names = rng.choice(list(TASKS), size=chunk, p=list(TASKS.values()))
        prompts, thoughts, before, after = zip(
            *(example(name, rng, held_out) for name in names), strict=True)
        seed = rng.integers(2**31)  # an equal seed gives equal backgrounds before and after
        images, _ = render_scenes(after, np.random.default_rng(seed))
        sources, _ = render_scenes([old or new for old, new in zip(before, after, strict=True)],
                                   np.random.default_rng(seed))
        sources[[old is None for old in before]] = 0
        return {"images": images, "sources": sources, "prompts": list(prompts),
                "thoughts": list(thoughts), **describe(after),
                "task": np.array([list(TASKS).index(name) for name in names])}

    return scenes.collect(draw, count, seed, chunk=100)


def make_things(count: int, seed: int = 0, held_out: bool = False) -> dict[str, np.ndarray]:
    """Scenes of all kinds of things for the reader; nothing is held out. Columns: images, and
    what `describe` gives."""

    def draw(rng, chunk):
        drawn = []
        while len(drawn) < chunk:
            sign = random_text(rng) if rng.random() < 0.3 else ""
            number = int(rng.integers(1, 3 if sign else 5))
            scene = random_scene(rng, number, bool(rng.random() < 0.4), sign, KINDS)
            if scene.sign_y == 26:  # signs are at the lower left
                drawn.append(replace(scene, sign_x=0))
        images, _ = render_scenes(drawn, rng)
        return {"images": images, **describe(drawn)}

    return scenes.collect(draw, count, seed, chunk=100)


def make_clips(count: int, seed: int = 0, held_out: bool = False, frames: int = 8) -> dict:
    """`scenes.make_clips` of the combinations of thing, color and background for one part, with
    "prompts" such as "a red dog on grass moving left"."""
    looks = [(k, c, b) for k, kind in enumerate(THINGS) for c, color in enumerate(COLORS)
             for b, where in enumerate(BACKGROUNDS) if is_held_out(kind, color, where) == held_out]
    clips = scenes.make_clips(count, seed, frames, np.array(looks))
    del clips["mask"]
    return clips


def make_subject(count: int, seed: int = 0, held_out: bool = False) -> dict[str, np.ndarray]:
    """Drawings of one subject, a purple snail, in several places; "prompts" call it by the word
    RARE. Columns as in `make_things`."""
    rng = np.random.default_rng([seed, 1])
    drawn = []
    for i in range(count):
        size, background = rng.uniform(17, 23), BACKGROUNDS[(i + seed) % len(BACKGROUNDS)]
        x, y = rng.uniform(size / 2 + 1, SIZE - size / 2 - 1, 2)
        thing = scenes.Thing(SUBJECT, "purple", size, x, y, ("left", "right")[i % 2])
        drawn.append(Scene(background, (thing,)))
    texts = [f"a {RARE} {WHERE[scene.background]}" for scene in drawn]
    return {"images": render_scenes(drawn, rng)[0], "prompts": texts, **describe(drawn)}


def describe(drawn: list[Scene]) -> dict[str, np.ndarray]:
    """The truth about N scenes: things float32 (N, 4, 5): kind, color, x, y (pixels) and size of
    each, -1 where there is none; background, relation (-1: none) and labels (the kind of the first
    thing) int64 (N,); signs, their texts."""
    things = np.full((len(drawn), 4, 5), -1, dtype=np.float32)
    for row, scene in enumerate(drawn):
        for i, thing in enumerate(scene.things):
            things[row, i] = (KINDS.index(thing.kind), COLORS.index(thing.color), thing.x, thing.y,
                              thing.size)
    relations = [RELATIONS.index(scene.relation) if scene.relation else -1 for scene in drawn]
    return {"things": things, "labels": things[:, 0, 0].astype(np.int64),
            "background": np.array([BACKGROUNDS.index(scene.background) for scene in drawn]),
            "relation": np.array(relations), "signs": [scene.sign for scene in drawn]}
