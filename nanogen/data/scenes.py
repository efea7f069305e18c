"""Scenes: 32x32 colour images with captions, made by code from a seed. Nothing to download.

An image is a background and a thing on it, with colour, size, place and facing. The background is
chosen *independently of the thing*, so "a dog" has several correct images. A model that averages
them is blurred, a model that draws one of them is not. Because code made the image, the whole truth
about it is known, down to every pixel of the thing, so scores are exact. drawing.py has the shapes.
"""

from dataclasses import dataclass

import numpy as np

from nanogen import UserError
from nanogen.data import drawing
from nanogen.data.drawing import BACKGROUNDS, COLORS, FACINGS, FONT, KINDS, SIZE, THINGS

RELATIONS = ("left of", "right of", "above", "below")
DIRECTIONS = ("right", "down", "left", "up")  # of motion: quarter turns, y down
WHERE = {"grass": "on grass", "city": "in the city", "sea": "on the sea", "sky": "in the sky"}
MAX_TEXT = 7  # letters on a sign: "12+9=21" just fits


@dataclass(frozen=True)
class Thing:
    """One thing. Lengths in pixels; (x, y) is its centre, size the side of its box."""

    kind: str
    color: str
    size: float = 20.0
    x: float = 16.0
    y: float = 16.0
    facing: str = "right"

    def __post_init__(self):
        _check("thing", self.kind, KINDS)
        _check("colour", self.color, COLORS)
        _check("facing", self.facing, FACINGS)


@dataclass(frozen=True)
class Scene:
    """A background, up to four things (all alike, or two with a relation) and perhaps a sign."""

    background: str
    things: tuple[Thing, ...] = ()
    relation: str = ""  # things[0] is `relation` things[1]; one of RELATIONS
    sign: str = ""  # its text; no text, no sign. The caption quotes no result: of "3+4=7", "3+4="
    sign_x: int = 16  # the sign's centre, pixels
    sign_y: int = 26

    def __post_init__(self):
        _check("background", self.background, BACKGROUNDS)
        _check("relation", self.relation, ("", *RELATIONS))
        if len(self.sign) > MAX_TEXT or not set(self.sign) <= set(FONT):
            raise UserError(f"a sign holds up to {MAX_TEXT} of A-Z 0-9 + - =, got {self.sign!r}")

    @property
    def caption(self) -> str:
        """Such as "three blue birds in the sky"."""
        names = [(thing.kind, thing.color) for thing in self.things]
        text = _name(*names[0], 1 if self.relation else len(names)) if names else "nothing"
        if self.relation:
            text += f" {self.relation} {_name(*names[1])}"
        text += f" {WHERE[self.background]}"
        quoted = self.sign[: self.sign.find("=") + 1] or self.sign
        return text + (f" with a sign that says {quoted}" if self.sign else "")


def captions(labels: np.ndarray, color: np.ndarray, background: np.ndarray) -> list[str]:
    """`Scene.caption` of N scenes with one thing each, from their indices, (N,) each."""
    return [f"{_name(THINGS[k], COLORS[c])} {WHERE[BACKGROUNDS[b]]}"
            for k, c, b in zip(labels, color, background, strict=True)]


def _name(kind: str, color: str, number: int = 1) -> str:
    name = f"{color} {kind}"
    if number == 1:
        return f"an {name}" if name[0] in "aeiou" else f"a {name}"
    return f"{('two', 'three', 'four')[number - 2]} {name}" + ("" if kind == "fish" else "s")


def _check(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"unknown {what} {name!r}: choose one of {', '.join(filter(None, names))}")


# ---- scene -> image

def sign_area(scene: Scene) -> tuple[slice, slice]:
    """The rows and columns of the image that the sign covers: empty slices without a sign."""
    height, width = (drawing.SIGN_HEIGHT, 4 * len(scene.sign) + 3) if scene.sign else (0, 0)
    top = min(max(scene.sign_y - height // 2, 0), SIZE - height)
    left = min(max(scene.sign_x - width // 2, 0), SIZE - width)
    return slice(top, top + height), slice(left, left + width)


def render_scenes(scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """-> images uint8 (N, 32, 32, 3), and the visible pixels of their things, bool (N, 32, 32).
    rng draws only the texture of the backgrounds. So an equal seed and equal backgrounds give equal
    pixels: two lists that differ in the things alone are images before and after an edit."""
    background = np.array([BACKGROUNDS.index(scene.background) for scene in scenes])
    canvas = drawing.draw_backgrounds(background, rng)
    mask = np.zeros(canvas.shape[:3], dtype=bool)
    for layer in range(4):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > layer]
        things = [scenes[row].things[layer] for row in rows]
        kind = np.array([KINDS.index(thing.kind) for thing in things])
        color = np.array([COLORS.index(thing.color) for thing in things])
        facing = np.array([FACINGS.index(thing.facing) for thing in things])
        size, x, y = np.array([(thing.size, thing.x, thing.y) for thing in things]).reshape(-1, 3).T
        image = canvas[rows]
        mask[rows] |= drawing.draw_things(image, kind, color, size, x, y, facing) > 0.5
        canvas[rows] = image
    for row, scene in enumerate(scenes):
        if scene.sign:
            canvas[row][sign_area(scene)] = drawing.draw_sign(scene.sign)
            mask[row][sign_area(scene)] = False
    return _to_bytes(canvas), mask


def _to_bytes(canvas):
    return np.round(255 * np.clip(canvas, 0, 1)).astype(np.uint8)


def random_scene(rng: np.random.Generator, count: int = 1, related: bool = False, sign: str = "",
                 kinds: tuple[str, ...] = THINGS) -> Scene:
    """A scene with `count` things of one of the kinds and a color, or with two in a relation. sign:
    its text. Things have cells of their own, so none hides another: beside a sign, two in a row."""
    relation = str(rng.choice(RELATIONS[:2] if sign else RELATIONS)) if related else ""
    count = 2 if related else count
    room_top, room_height, sign_y = 0, SIZE, 26
    if sign:
        room_height = SIZE - drawing.SIGN_HEIGHT - 1
        room_top, sign_y = ((0, 26), (SIZE - room_height, 5))[rng.integers(2)]
    stacked = relation in ("above", "below") if relation or sign else rng.random() < 0.5
    columns, rows = ((1, 1), (1, 2) if stacked else (2, 1), (2, 2), (2, 2))[count - 1]
    width, height = SIZE / columns, room_height / rows
    backwards = relation in ("right of", "below")
    cells = sorted(rng.permutation(columns * rows)[:count], reverse=backwards)

    varied = 2 if relation else 1  # two kinds and colours, or one for all
    chosen = rng.permutation(len(kinds))[:varied]
    colors = rng.integers(len(COLORS), size=varied)
    things = []
    for number, cell in enumerate(cells):
        size = rng.uniform(0.85, 1.0) * min(24, width - 3, height - 3)
        margin = size / 2 + 1  # of its centre from an edge: its half, and its outline
        x = rng.uniform(margin, width - margin) + cell % columns * width
        y = rng.uniform(margin, height - margin) + cell // columns * height + room_top
        kind, color = kinds[chosen[number % varied]], COLORS[colors[number % varied]]
        facing = FACINGS[rng.integers(2)]
        things.append(Thing(kind, color, float(size), float(x), float(y), facing))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    sign_x = int(rng.integers(8, 25))
    return Scene(background, tuple(things), relation, sign, sign_x=sign_x, sign_y=sign_y)


def _random_things(rng, count: int, smallest: float, largest: float) -> dict[str, np.ndarray]:
    """Attributes of `count` things, drawn independently of each other."""
    return {"labels": rng.integers(len(THINGS), size=count),
            "background": rng.integers(len(BACKGROUNDS), size=count),
            "color": rng.integers(len(COLORS), size=count),
            "size": rng.uniform(smallest, largest, count).astype(np.float32),
            "facing": rng.integers(len(FACINGS), size=count)}


# ---- data sets: example i depends on the seed and on i, not on the count

def make(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The plain data set: one thing an image, no sign.

    -> images uint8 (N, 32, 32, 3); labels, background, color, facing int64 (N,), into THINGS,
    BACKGROUNDS, COLORS, FACINGS; place float32 (N, 2), the centre (x, y), and size float32 (N,), in
    pixels; mask bool (N, 32, 32): the thing and its outline."""

    def draw(rng, chunk):
        truth = _random_things(rng, chunk, 16, 24)
        margin = truth["size"][:, None] / 2 + 1
        place = (margin + rng.random((chunk, 2)) * (SIZE - 2 * margin)).astype(np.float32)
        canvas = drawing.draw_backgrounds(truth["background"], rng)
        looks = (truth[key] for key in ("labels", "color", "size"))
        coverage = drawing.draw_things(canvas, *looks, *place.T, truth["facing"])
        return {"images": _to_bytes(canvas), **truth, "place": place, "mask": coverage > 0.5}

    return collect(draw, count, seed, chunk=250)


def make_clips(count: int, seed: int = 0, frames: int = 8, looks: np.ndarray | None = None) -> dict:
    """Clips of one thing that moves straight over a still background, facing where it goes. looks
    (M, 3): the combinations of thing, color and background to draw from; None: all of them.

    -> videos uint8 (N, T, 32, 32, 3); prompts, a list; velocity float32 (N, 2), pixels a frame;
    place float32 (N, T, 2), always in sight; mask bool (N, T, 32, 32); direction int64 (N,), into
    DIRECTIONS; the rest as in `make`."""

    def draw(rng, chunk):
        truth = _random_things(rng, chunk, 13, 17)
        if looks is not None:
            chosen = looks[rng.integers(len(looks), size=chunk)].T
            truth |= dict(zip(("labels", "color", "background"), chosen, strict=True))
        direction = rng.integers(len(DIRECTIONS), size=chunk)
        angle = direction * (np.pi / 2) + rng.uniform(-0.3, 0.3, chunk)  # its name is clear
        margin = truth["size"][:, None] / 2 + 1
        room = SIZE - 2 * margin
        speed = np.minimum(rng.uniform(0.6, 1.8, chunk)[:, None], room / (frames - 1))
        velocity = speed * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        travel = (frames - 1) * velocity
        start = margin - np.minimum(travel, 0) + rng.random((chunk, 2)) * (room - np.abs(travel))
        place = start[:, None] + np.arange(frames)[:, None] * velocity[:, None]  # (chunk, T, 2)
        truth["facing"] = (velocity[:, 0] > 0).astype(np.int64)

        canvas = drawing.draw_backgrounds(truth["background"], rng).repeat(frames, axis=0)
        drawn = (truth[key].repeat(frames) for key in ("labels", "color", "size"))
        facing = truth["facing"].repeat(frames)
        coverage = drawing.draw_things(canvas, *drawn, *place.reshape(-1, 2).T, facing)
        texts = captions(truth["labels"], truth["color"], truth["background"])
        return {"videos": _to_bytes(canvas).reshape(chunk, frames, SIZE, SIZE, 3),
                "prompts": [f"{text} moving {DIRECTIONS[way]}"
                            for text, way in zip(texts, direction, strict=True)],
                "velocity": velocity.astype(np.float32), "place": place.astype(np.float32),
                "mask": (coverage > 0.5).reshape(chunk, frames, SIZE, SIZE),
                "direction": direction, **truth}

    return collect(draw, count, seed, chunk=32)


def collect(draw, count: int, seed: int, chunk: int) -> dict:
    """Join draw(rng, chunk) for as many chunks as needed, each with its own rng; cut to count."""
    parts = [draw(np.random.default_rng([seed, i]), chunk) for i in range(-(-count // chunk))]
    joined = {}
    for key in list(parts[0]):
        values = [part.pop(key) for part in parts]
        joined[key] = sum(values, []) if isinstance(values[0], list) else np.concatenate(values)
        joined[key] = joined[key][:count]
    return joined
