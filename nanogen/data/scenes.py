"""Scenes: 32x32 colour pictures with captions, made by code from a seed. Nothing to download.

A picture is a background (grass, city, sea, sky) and a thing on it (dog, cat, ... robot) with a colour, a
size, a place and a facing. The background is chosen *independently of the thing*, so "a dog" has several
right answers: a model that averages them is blurred, one that draws one of them is not. And as code made
the picture, all of its truth is known (thing, colour, place, text, every pixel of the thing): scores are
exact.

How it is drawn: a shape is a signed distance d(u, v), negative inside; clip(0.5 - d, 0, 1), d in pixels, is
the share of a pixel that it covers, which is anti-aliasing. A thing is a list of (distance, paint), painted
in turn over its own dark silhouette, which stays around as an outline: a blue fish shows on a blue sea. All
of it works on batches, u and v of shape (N, 32, 32): 50,000 pictures take about 20 seconds on one CPU core.

    python -m nanogen.data.scenes --out scenes.png     # a sheet of examples with their captions

Distance functions: Inigo Quilez, "2D distance functions", iquilezles.org. The rest was made for this course.
"""

import argparse
import textwrap
from dataclasses import dataclass, replace

import numpy as np

from nanogen import UserError

SIZE = 32  # pixels a side
COLOR_RGB = {
    "red": (0.84, 0.14, 0.14),
    "orange": (0.96, 0.53, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.16, 0.65, 0.24),
    "blue": (0.16, 0.33, 0.88),
    "purple": (0.55, 0.22, 0.73),
    "pink": (0.98, 0.59, 0.78),
    "white": (0.96, 0.96, 0.94),
}
COLORS = tuple(COLOR_RGB)
FACINGS = ("left", "right")
RELATIONS = ("left of", "right of", "above", "below")
DIRECTIONS = ("right", "down", "left", "up")  # of motion: quarter turns, y down
WHERE = {"grass": "on grass", "city": "in the city", "sea": "on the sea", "sky": "in the sky"}
BLACK, GREY, GLASS = (0.08, 0.08, 0.1), (0.6, 0.62, 0.65), (0.68, 0.88, 0.97)
CREAM, BROWN, BEAK = (0.97, 0.94, 0.84), (0.45, 0.28, 0.14), (0.95, 0.55, 0.1)
GOLD, ROSE, SNOW = (1.0, 0.87, 0.3), (0.95, 0.6, 0.62), (1.0, 1.0, 1.0)
OUTLINE = 0.9  # pixels that the dark silhouette reaches beyond the thing

# Pixel centres. The picture spans [0, 32] x [0, 32], x to the right and y down.
PIXEL_Y, PIXEL_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5

# Letters of 3x5 pixels, an octal digit for each row: "2" is .#. and "5" is #.#
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ROWS = """
25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 56465 44447 57755 65555 25552 65644 25573 65655
34216 72222 55557 55552 55775 55255 55222 71247 75557 26227 61247 71317 55711 74616 34757 71122 75757 75716
02720 00700 07070"""
FONT = dict(zip(LETTERS + "0123456789+-=", _ROWS.split(), strict=True))
MAX_TEXT, SIGN_HEIGHT = 7, 9  # "12+9=21" just fits; 5 rows of text, 2 of margin, 2 of frame


# ------------------------------------------------------------------------------------ what there is to say


@dataclass(frozen=True)
class Thing:
    """One thing: what it is and where. Lengths in pixels; (x, y) is its centre, size the side of its box."""

    kind: str
    color: str
    size: float = 20.0
    x: float = 16.0
    y: float = 16.0
    facing: str = "right"

    def __post_init__(self):
        _check("thing", self.kind, THINGS)
        _check("colour", self.color, COLORS)
        _check("facing", self.facing, FACINGS)
        if not 4 <= self.size <= SIZE:
            raise UserError(f"a thing's size is 4 to {SIZE} pixels, got {self.size}")


@dataclass(frozen=True)
class Scene:
    """A background, up to four things (of one kind and colour, or two with a relation) and perhaps a sign."""

    background: str
    things: tuple[Thing, ...] = ()
    relation: str = ""  # things[0] is `relation` things[1]; one of RELATIONS
    sign: str = ""  # its text; no text, no sign
    says: str = ""  # what the caption quotes if not the whole text: sign "3+4=7", says "3+4="
    sign_x: int = 16  # the sign's centre, pixels
    sign_y: int = 26

    def __post_init__(self):
        _check("background", self.background, BACKGROUNDS)
        if self.relation:
            _check("relation", self.relation, RELATIONS)
        if len(self.things) > 4 or (self.relation and len(self.things) != 2):
            raise UserError(f"a scene holds up to 4 things, and 2 with a relation; got {len(self.things)}")
        if not self.relation and len({(thing.kind, thing.color) for thing in self.things}) > 1:
            raise UserError("things of several kinds or colours need a relation, such as relation='left of'")
        if len(self.sign) > MAX_TEXT or not set(self.sign) <= set(FONT):
            raise UserError(f"a sign holds up to {MAX_TEXT} of A-Z, 0-9, + - =, got {self.sign!r}")

    @property
    def caption(self) -> str:
        """The scene in words: "three blue birds in the sky"."""
        return self.describe()

    def describe(self, colors: bool = True) -> str:
        """The caption with the colours, or without them, which leaves a model more to choose."""
        names = [(thing.kind, thing.color if colors else "") for thing in self.things]
        words = _name(*names[0], 1 if self.relation else len(names)) if names else "nothing"
        if self.relation:
            words += f" {self.relation} {_name(*names[1])}"
        words += f" {WHERE[self.background]}"
        return words + (f" with a sign that says {self.says or self.sign}" if self.sign else "")


def _name(kind: str, color: str = "", number: int = 1) -> str:
    words = f"{color} {kind}".strip()
    if number == 1:
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"
    return f"{('two', 'three', 'four')[number - 2]} {words}" + ("" if kind == "fish" else "s")


def _check(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"unknown {what} {name!r}: choose one of {', '.join(names)}")


# ------------------------------------------------------------------------------------ shapes, as distances
# Each takes u, v of shape (N, 32, 32) and gives the signed distance to the shape's edge, negative inside.


def circle(u, v, x, y, radius):
    return np.hypot(u - x, v - y) - radius


def ellipse(u, v, x, y, radius_u, radius_v):
    """Right to first order near the edge, and only there does it matter."""
    u, v = (u - x) / radius_u, (v - y) / radius_v
    scaled = np.hypot(u, v)
    return scaled * (scaled - 1) / (np.hypot(u / radius_u, v / radius_v) + 1e-6)


def box(u, v, x, y, half_width, half_height):
    return np.maximum(np.abs(u - x) - half_width, np.abs(v - y) - half_height)


def capsule(u, v, start, end, radius):
    """A thick line with round ends."""
    (x, y), (end_x, end_y) = start, end
    along_u, along_v, u, v = end_x - x, end_y - y, u - x, v - y
    share = np.clip((u * along_u + v * along_v) / (along_u**2 + along_v**2), 0, 1)
    return np.hypot(u - share * along_u, v - share * along_v) - radius


def polygon(u, v, *corners):
    """A convex polygon, corners clockwise on the screen: inside is behind the line of every edge.
    Outside, the edges count and not their lines, which would draw sharp corners out into spikes."""
    behind, nearest = [], []
    for (x, y), (next_x, next_y) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(next_x - x, next_y - y))
        behind.append((u - x) * ((next_y - y) / length) - (v - y) * ((next_x - x) / length))
        nearest.append(capsule(u, v, (x, y), (next_x, next_y), 0))
    inside = np.maximum.reduce(behind)
    return np.where(inside < 0, inside, np.minimum.reduce(nearest))


# ------------------------------------------------------------------------------------ ten things
# A thing lives in the square [-1, 1] x [-1, 1], u towards where it faces, v down. It gives (distance, paint),
# back to front; a paint is an RGB, or a shade of the thing's colour (1 as it is, 0.7 darker, 1.3 paler).


def dog(u, v):
    return [
        (capsule(u, v, (-0.62, 0.05), (-0.9, -0.42), 0.1), 0.9),  # tail, up
        (capsule(u, v, (-0.38, 0.3), (-0.38, 0.86), 0.1), 0.65),  # far legs
        (capsule(u, v, (0.14, 0.3), (0.14, 0.86), 0.1), 0.65),
        (capsule(u, v, (-0.6, 0.25), (-0.62, 0.86), 0.11), 1),  # near legs
        (capsule(u, v, (0.36, 0.25), (0.36, 0.86), 0.11), 1),
        (capsule(u, v, (-0.48, 0.17), (0.28, 0.15), 0.26), 1),  # body
        (capsule(u, v, (0.28, 0.05), (0.42, -0.35), 0.19), 1),  # neck
        (circle(u, v, 0.44, -0.46, 0.27), 1),  # head
        (capsule(u, v, (0.55, -0.36), (0.8, -0.34), 0.15), 1.25),  # snout
        (circle(u, v, 0.91, -0.43, 0.1), BLACK),  # nose
        (capsule(u, v, (0.24, -0.56), (0.18, -0.22), 0.12), 0.5),  # ear, floppy
        (circle(u, v, 0.52, -0.52, 0.08), BLACK),
    ]


def cat(u, v):
    """Sits, looks at you, tail curled up behind: what a dog does not do."""
    return [
        (capsule(u, v, (-0.3, 0.8), (-0.72, 0.72), 0.1), 0.8),  # tail: along the ground, up, and curled in
        (capsule(u, v, (-0.72, 0.72), (-0.86, 0.3), 0.1), 0.8),
        (capsule(u, v, (-0.86, 0.3), (-0.66, 0.06), 0.1), 0.8),
        (ellipse(u, v, -0.02, 0.48, 0.42, 0.46), 1),  # body
        (capsule(u, v, (-0.36, 0.3), (-0.2, 0.38), 0.05), 0.6),  # stripes
        (capsule(u, v, (-0.4, 0.52), (-0.22, 0.56), 0.05), 0.6),
        (capsule(u, v, (0.28, 0.3), (0.34, 0.84), 0.11), 1.15),  # front legs
        (capsule(u, v, (0.06, 0.4), (0.08, 0.84), 0.11), 1.15),
        (polygon(u, v, (-0.2, -0.4), (-0.16, -0.96), (0.2, -0.6)), 0.85),  # ears, pointed
        (polygon(u, v, (0.34, -0.6), (0.7, -0.96), (0.72, -0.4)), 0.85),
        (ellipse(u, v, 0.26, -0.28, 0.48, 0.38), 1),  # head
        (ellipse(u, v, 0.28, -0.08, 0.2, 0.14), 1.5),  # muzzle
        (circle(u, v, 0.28, -0.15, 0.07), ROSE),
        (circle(u, v, 0.06, -0.34, 0.09), BLACK),  # eyes
        (circle(u, v, 0.48, -0.34, 0.09), BLACK),
    ]


def bird(u, v):
    return [
        (polygon(u, v, (-0.35, 0.0), (-0.35, 0.35), (-0.95, 0.42), (-0.98, 0.1)), 0.7),  # tail
        (polygon(u, v, (0.62, -0.28), (1.0, -0.1), (0.62, 0.06)), BEAK),
        (capsule(u, v, (-0.05, 0.5), (-0.15, 0.82), 0.05), BEAK),  # legs
        (capsule(u, v, (0.14, 0.5), (0.04, 0.82), 0.05), BEAK),
        (polygon(u, v, (0.0, 0.0), (0.0, -0.8), (0.24, -0.72), (0.42, 0.0)), 0.6),  # far wing
        (ellipse(u, v, 0.02, 0.22, 0.54, 0.34), 1),  # body
        (ellipse(u, v, 0.14, 0.36, 0.3, 0.16), 1.5),  # belly
        (circle(u, v, 0.48, -0.12, 0.26), 1),  # head
        (polygon(u, v, (-0.35, 0.25), (-0.7, -0.8), (-0.4, -0.72), (0.22, 0.15), (-0.05, 0.3)), 0.8),  # wing
        (circle(u, v, 0.55, -0.17, 0.09), BLACK),
    ]


def fish(u, v):
    return [
        (polygon(u, v, (-0.98, -0.5), (-0.4, 0.0), (-0.82, 0.0)), 0.75),  # tail
        (polygon(u, v, (-0.4, 0.0), (-0.98, 0.5), (-0.82, 0.0)), 0.75),
        (polygon(u, v, (-0.3, -0.3), (-0.25, -0.72), (0.35, -0.35)), 0.7),  # fins
        (polygon(u, v, (0.1, 0.35), (-0.25, 0.7), (-0.2, 0.3)), 0.7),
        (ellipse(u, v, 0.18, 0.0, 0.76, 0.46), 1),  # body
        (ellipse(u, v, 0.2, 0.22, 0.5, 0.16), 1.4),  # belly
        (capsule(u, v, (0.22, -0.22), (0.26, 0.22), 0.05), 0.55),  # gill
        (capsule(u, v, (-0.16, -0.26), (-0.12, 0.26), 0.05), 0.55),
        (circle(u, v, 0.58, -0.12, 0.16), SNOW),
        (circle(u, v, 0.61, -0.12, 0.09), BLACK),
        (capsule(u, v, (0.74, 0.14), (0.92, 0.1), 0.04), 0.4),  # mouth
    ]


def ship(u, v):
    return [
        (capsule(u, v, (0.02, -0.9), (0.02, 0.4), 0.05), BROWN),  # mast
        (polygon(u, v, (0.0, -0.98), (0.0, -0.7), (-0.34, -0.84)), 1),  # flag
        (polygon(u, v, (-0.06, -0.66), (-0.06, 0.28), (-0.78, 0.28)), CREAM),  # sails
        (polygon(u, v, (0.12, -0.5), (0.6, 0.28), (0.12, 0.28)), CREAM),
        (polygon(u, v, (-0.84, 0.38), (0.98, 0.34), (0.54, 0.86), (-0.74, 0.86)), 1),  # hull
        (polygon(u, v, (-0.78, 0.68), (0.69, 0.68), (0.54, 0.86), (-0.74, 0.86)), 0.6),
        (circle(u, v, -0.4, 0.55, 0.08), GLASS),  # portholes
        (circle(u, v, 0.0, 0.55, 0.08), GLASS),
        (circle(u, v, 0.4, 0.55, 0.08), GLASS),
    ]


def car(u, v):
    return [
        (polygon(u, v, (-0.42, -0.46), (0.2, -0.46), (0.56, 0.08), (-0.66, 0.08)), 1),  # cabin
        (capsule(u, v, (-0.74, 0.24), (0.76, 0.26), 0.22), 1),  # body
        (box(u, v, 0.0, 0.38, 0.88, 0.08), 0.65),
        (polygon(u, v, (-0.36, -0.34), (-0.14, -0.34), (-0.14, 0.04), (-0.5, 0.04)), GLASS),
        (polygon(u, v, (0.0, -0.34), (0.14, -0.34), (0.38, 0.04), (0.0, 0.04)), GLASS),
        (circle(u, v, -0.5, 0.46, 0.25), BLACK),  # wheels
        (circle(u, v, 0.5, 0.46, 0.25), BLACK),
        (circle(u, v, -0.5, 0.46, 0.1), GREY),
        (circle(u, v, 0.5, 0.46, 0.1), GREY),
        (circle(u, v, 0.88, 0.2, 0.09), GOLD),  # headlight
    ]


def plane(u, v):
    return [
        (polygon(u, v, (-0.98, -0.6), (-0.68, -0.6), (-0.36, -0.05), (-0.8, -0.02)), 0.8),  # tail fin
        (polygon(u, v, (-0.3, -0.62), (-0.08, -0.62), (0.3, -0.1), (-0.05, -0.1)), 0.65),  # far wing
        (capsule(u, v, (-0.76, 0.02), (0.72, 0.06), 0.2), 1),  # body
        (polygon(u, v, (-0.8, 0.1), (0.8, 0.14), (0.7, 0.26), (-0.7, 0.22)), 1.4),  # belly
        (polygon(u, v, (0.02, 0.12), (0.38, 0.12), (-0.3, 0.76), (-0.56, 0.76)), 0.75),  # near wing
        (polygon(u, v, (-0.78, 0.0), (-0.52, 0.0), (-0.8, 0.3), (-1.0, 0.3)), 0.75),
        (polygon(u, v, (0.62, -0.14), (0.78, -0.12), (0.9, 0.02), (0.62, 0.02)), GLASS),  # cockpit
        *[(circle(u, v, x, -0.02, 0.06), BLACK) for x in (-0.44, -0.2, 0.04, 0.28)],  # windows
    ]


def tree(u, v):
    return [
        (polygon(u, v, (-0.12, 0.1), (0.12, 0.1), (0.2, 0.94), (-0.2, 0.94)), BROWN),
        (capsule(u, v, (0.05, 0.65), (0.6, 0.42), 0.08), BROWN),  # a branch, where it faces
        (circle(u, v, 0.66, 0.32, 0.24), 0.9),
        (circle(u, v, -0.46, 0.0, 0.36), 0.75),  # crown
        (circle(u, v, 0.32, -0.3, 0.4), 0.85),
        (circle(u, v, -0.08, -0.52, 0.44), 1),
        (circle(u, v, -0.12, -0.08, 0.36), 0.95),
        (circle(u, v, -0.2, -0.6, 0.17), 1.3),
    ]


def house(u, v):
    return [
        (box(u, v, 0.46, -0.55, 0.13, 0.34), 0.7),  # chimney
        (box(u, v, 0.0, 0.42, 0.72, 0.5), 1),  # walls
        (polygon(u, v, (0.0, -0.88), (0.96, 0.02), (-0.96, 0.02)), 0.6),  # roof
        (box(u, v, 0.34, 0.58, 0.19, 0.34), BROWN),  # door
        (circle(u, v, 0.24, 0.6, 0.06), GOLD),
        (box(u, v, -0.32, 0.42, 0.25, 0.22), SNOW),  # window
        (box(u, v, -0.32, 0.42, 0.17, 0.14), (0.3, 0.5, 0.7)),
    ]


def robot(u, v):
    """Waves with the arm on the side that it faces."""
    return [
        (capsule(u, v, (0.0, -0.6), (0.0, -0.84), 0.05), GREY),  # antenna
        (circle(u, v, 0.0, -0.88, 0.11), GOLD),
        (capsule(u, v, (-0.5, 0.1), (-0.72, 0.5), 0.1), 0.75),  # arms
        (capsule(u, v, (0.5, 0.12), (0.78, -0.3), 0.1), 0.75),
        (circle(u, v, -0.74, 0.54, 0.13), GREY),
        (circle(u, v, 0.8, -0.36, 0.13), GREY),
        (box(u, v, -0.22, 0.76, 0.13, 0.2), 0.7),  # legs
        (box(u, v, 0.22, 0.76, 0.13, 0.2), 0.7),
        (box(u, v, 0.0, 0.3, 0.46, 0.3), 1),  # body
        (box(u, v, 0.0, 0.3, 0.28, 0.14), GREY),
        (circle(u, v, -0.12, 0.3, 0.07), (0.9, 0.2, 0.2)),
        (circle(u, v, 0.12, 0.3, 0.07), (0.2, 0.75, 0.3)),
        (box(u, v, 0.0, -0.36, 0.44, 0.27), 1.1),  # head
        (box(u, v, 0.06, -0.4, 0.34, 0.13), BLACK),  # visor
        (circle(u, v, -0.1, -0.4, 0.09), GLASS),
        (circle(u, v, 0.24, -0.4, 0.09), GLASS),
    ]


DRAW = (dog, cat, bird, fish, ship, car, plane, tree, house, robot)
THINGS = tuple(function.__name__ for function in DRAW)


def draw_things(canvas, kind, color, size, x, y, facing):
    """Paint one thing on each picture of canvas, float32 (N, 32, 32, 3) in [0, 1], in place.

    The rest is (N,): kind, color and facing index THINGS, COLORS and FACINGS; size, x and y are pixels.
    -> the share of each pixel that the thing covers, outline included: float32 (N, 32, 32) in [0, 1].
    """
    coverage = np.zeros(canvas.shape[:3], dtype=np.float32)
    palette = np.array(list(COLOR_RGB.values()), dtype=np.float32)
    for index in np.unique(kind):
        rows = np.flatnonzero(kind == index)
        scale, left, top = (a[rows, None, None].astype(np.float32) for a in (size / 2, x, y))
        mirror = np.where(facing[rows] == FACINGS.index("left"), -1, 1)[:, None, None].astype(np.float32)
        u, v = (PIXEL_X - left) / scale * mirror, (PIXEL_Y - top) / scale
        own = palette[color[rows], None, None]  # (n, 1, 1, 3)
        ink = np.broadcast_to(0.3 * own, (len(rows), SIZE, SIZE, 3)).copy()  # dark: the silhouette
        silhouette = np.float32(SIZE)
        for distance, paint in DRAW[index](u, v):
            distance = scale * distance  # in pixels
            silhouette = np.minimum(silhouette, distance)
            if not isinstance(paint, tuple):
                paint = own * paint if paint <= 1 else own + (paint - 1) * (1 - own)
            ink += np.clip(0.5 - distance, 0, 1)[..., None] * (np.asarray(paint, dtype=np.float32) - ink)
        ink *= (1 - 0.13 * np.clip(v, -1, 1))[..., None]  # light falls from above
        coverage[rows] = np.clip(0.5 + OUTLINE - silhouette, 0, 1)
        canvas[rows] += coverage[rows, ..., None] * (ink - canvas[rows])
    return coverage


# ------------------------------------------------------------------------------------ four backgrounds
# Each gives float32 (count, 32, 32, 3), all of its choices (horizon, blades, clouds) drawn from rng.


def _between(rng, count, low, high):
    """Uniform numbers of shape (count, 1, 1), one a picture."""
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _mix(picture, share, color):
    """Blend a colour into the pictures in place; share: (n, 32, 32) or (32, 32), clipped to [0, 1]."""
    picture += np.clip(share, 0, 1)[..., None] * (np.asarray(color, dtype=np.float32) - picture)


def _blank(count, top, bottom):
    """A vertical gradient from one colour to another: (count, 32, 32, 3)."""
    share = (PIXEL_Y / SIZE)[..., None]
    picture = (1 - share) * np.asarray(top, np.float32) + share * np.asarray(bottom, np.float32)
    return np.repeat(picture[None], count, axis=0).astype(np.float32)


def grass(rng, count):
    picture = _blank(count, (0.72, 0.87, 0.98), (0.8, 0.92, 1.0))
    meadow = PIXEL_Y - _between(rng, count, 4, 9) + np.sin(PIXEL_X / 5 + _between(rng, count, 0, 6))
    _mix(picture, meadow, (0.42, 0.68, 0.3))
    blade = rng.random((count, SIZE, SIZE), dtype=np.float32)
    blade = np.maximum(blade, np.roll(blade, 1, axis=1))  # two pixels tall
    _mix(picture, np.where(meadow > 0.5, (blade > 0.86) * 0.6, 0), (0.26, 0.5, 0.18))
    _mix(picture, np.where(meadow > 1.5, (blade < 0.16) * 0.5, 0), (0.64, 0.84, 0.42))
    flower = rng.random((count, SIZE, SIZE), dtype=np.float32) > 0.993
    _mix(picture, np.where(meadow > 2, flower, 0), (0.98, 0.95, 0.7))
    return picture


def city(rng, count):
    picture = _blank(count, (0.66, 0.72, 0.82), (0.88, 0.86, 0.84))
    column = (PIXEL_X[0] + rng.integers(0, 7, (count, 1))).astype(int)  # (count, 32): buildings 7 pixels wide
    house_number, inside = column // 7, column % 7
    roof = np.take_along_axis(rng.integers(3, 17, (count, 6)), house_number, axis=1)[:, None]
    tone = np.take_along_axis(rng.uniform(0.4, 0.66, (count, 6)).astype(np.float32), house_number, axis=1)
    building = PIXEL_Y > roof
    wall = tone[:, None, :, None] * np.array([1.0, 0.96, 1.02], np.float32)
    picture = np.where(building[..., None], wall, picture)
    _mix(picture, building & (inside == 0)[:, None], (0.36, 0.36, 0.42))
    row = PIXEL_Y.astype(int) - roof
    window = building & (row % 4 >= 2) & np.isin(inside, (2, 3, 5))[:, None]
    lit = rng.random((count, SIZE // 4, SIZE // 4)).repeat(4, axis=1).repeat(4, axis=2) > 0.5
    _mix(picture, window & lit, (0.94, 0.86, 0.58))
    _mix(picture, window & ~lit, (0.3, 0.34, 0.44))
    _mix(picture, PIXEL_Y - 25 > 0, (0.44, 0.44, 0.46))  # the street
    dash = (np.abs(PIXEL_Y - 29) < 0.6) & ((PIXEL_X + _between(rng, count, 0, 8)) % 8 < 4)
    _mix(picture, dash, (0.9, 0.88, 0.8))
    _mix(picture, np.abs(PIXEL_Y - 25.5) < 0.6, (0.7, 0.69, 0.66))
    return picture


def sea(rng, count):
    picture = _blank(count, (0.78, 0.9, 0.98), (0.9, 0.95, 0.98))
    water = PIXEL_Y - _between(rng, count, 4, 9).round()
    depth = np.clip(water / SIZE, 0, 1)
    _mix(picture, water, (0.14, 0.56, 0.68))
    _mix(picture, depth * 0.9, (0.04, 0.26, 0.48))
    swell = np.sin(PIXEL_X * _between(rng, count, 0.5, 0.8) + _between(rng, count, 0, 6))
    wave = np.sin(PIXEL_Y * _between(rng, count, 1.2, 1.5) + 1.2 * swell + _between(rng, count, 0, 6))
    broken = np.sin(PIXEL_X * 0.37 + PIXEL_Y * 1.9 + _between(rng, count, 0, 6)) > -0.2  # crests come and go
    _mix(picture, np.where(water > 1, 0.35 * np.clip(-wave, 0, 1), 0), (0.03, 0.3, 0.5))
    _mix(picture, np.where((water > 1) & broken, 1.6 * np.clip(wave - 0.55, 0, 1), 0), (0.75, 0.92, 0.95))
    return picture


def sky(rng, count):
    picture = _blank(count, (0.3, 0.56, 0.9), (0.68, 0.85, 0.98))
    for _ in range(3):  # clouds: three puffs, flat below
        x, y, width = _between(rng, count, 0, 32), _between(rng, count, 3, 29), _between(rng, count, 3, 6)
        for offset, height in ((-0.8, 0.45), (0.0, 0.75), (0.8, 0.5)):
            distance = circle((PIXEL_X - x) / width, (PIXEL_Y - y) / (width * height), offset, 0, 0.9)
            flat = 0.5 + y + 0.25 * width - PIXEL_Y
            _mix(picture, 0.9 * np.minimum(-0.6 * width * height * distance, flat), (0.97, 0.98, 1.0))
    return picture


PAINT = {"grass": grass, "city": city, "sea": sea, "sky": sky}
BACKGROUNDS = tuple(PAINT)


def draw_backgrounds(background, rng):
    """background: (N,) into BACKGROUNDS -> float32 (N, 32, 32, 3) in [0, 1], varied light and noise."""
    canvas = np.empty((len(background), SIZE, SIZE, 3), dtype=np.float32)
    for index, name in enumerate(BACKGROUNDS):
        rows = np.flatnonzero(background == index)
        canvas[rows] = PAINT[name](rng, len(rows))
    canvas *= _between(rng, len(canvas), 0.92, 1.0)[..., None]
    canvas += 0.05 * (rng.random(canvas.shape[:3], dtype=np.float32)[..., None] - 0.5)
    return np.clip(canvas, 0, 1, out=canvas)


# ------------------------------------------------------------------------------------ whole scenes


def sign_area(scene: Scene) -> tuple[slice, slice]:
    """The rows and columns of the picture that the scene's sign covers: empty slices without a sign."""
    height, width = (SIGN_HEIGHT, 4 * len(scene.sign) + 3) if scene.sign else (0, 0)
    top = min(max(scene.sign_y - height // 2, 0), SIZE - height)
    left = min(max(scene.sign_x - width // 2, 0), SIZE - width)
    return slice(top, top + height), slice(left, left + width)


def _draw_sign(picture, scene: Scene) -> None:
    """Dark letters on a cream board, not anti-aliased: 3x5 pixels need every one of them."""
    board = np.full((SIGN_HEIGHT, 4 * len(scene.sign) + 3, 3), (0.3, 0.2, 0.12))
    board[1:-1, 1:-1] = CREAM
    for place, letter in enumerate(scene.sign):
        dots = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in FONT[letter]], dtype=bool)
        board[2:7, 4 * place + 2 : 4 * place + 5][dots] = BLACK
    picture[sign_area(scene)] = board


def render_scenes(scenes: list[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """-> pictures uint8 (N, 32, 32, 3), and the pixels of their things not behind a sign, bool (N, 32, 32).

    rng draws only the texture of the backgrounds. So an equal seed and list of backgrounds give equal ones:
    two lists that differ in the things alone are pictures before and after an edit.
    """
    canvas = draw_backgrounds(np.array([BACKGROUNDS.index(scene.background) for scene in scenes]), rng)
    mask = np.zeros(canvas.shape[:3], dtype=bool)
    for layer in range(4):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > layer]
        things = [scenes[row].things[layer] for row in rows]
        kind = np.array([THINGS.index(thing.kind) for thing in things])
        color = np.array([COLORS.index(thing.color) for thing in things])
        facing = np.array([FACINGS.index(thing.facing) for thing in things])
        size, x, y = np.array([(thing.size, thing.x, thing.y) for thing in things]).reshape(-1, 3).T
        picture = canvas[rows]
        mask[rows] |= draw_things(picture, kind, color, size, x, y, facing) > 0.5
        canvas[rows] = picture
    for row, scene in enumerate(scenes):
        if scene.sign:
            _draw_sign(canvas[row], scene)
            mask[row][sign_area(scene)] = False
    return _to_bytes(canvas), mask


def render(scene: Scene, seed: int = 0) -> np.ndarray:
    """One scene -> uint8 (32, 32, 3). The seed is for the background's texture: all else is in the scene."""
    return render_scenes([scene], np.random.default_rng(seed))[0][0]


def thing_mask(scene: Scene) -> np.ndarray:
    """The pixels of the scene's things, outlines included, that no sign hides: bool (32, 32)."""
    return render_scenes([scene], np.random.default_rng(0))[1][0]


def _to_bytes(canvas):
    return np.round(255 * np.clip(canvas, 0, 1)).astype(np.uint8)


def random_text(rng: np.random.Generator) -> str:
    """What stands on a sign: a word, a number, some letters, or a sum, which is right."""
    first, second = rng.integers(10, size=2)
    letters = "".join(rng.choice(list(LETTERS), size=rng.integers(1, 6)))
    word, number = rng.choice(THINGS + COLORS).upper(), str(rng.integers(1000))
    return (word, number, letters, f"{first}+{second}={first + second}")[rng.integers(4)]


def random_scene(
    rng: np.random.Generator, count: int = 1, relation: bool | str = False, sign: bool | str = False
) -> Scene:
    """A scene with `count` things of one kind and colour, or with two in a relation; with a sign or without.

    relation: True for any of RELATIONS, or one of them. sign: True for a random text, or the text. Each thing
    has a cell of its own, so none hides another. A sign leaves room for two things, side by side.
    """
    if not 1 <= count <= (2 if sign else 4):
        raise UserError(f"a scene has 1 to 4 things, and at most 2 beside a sign, got {count}")
    possible = RELATIONS[:2] if sign else RELATIONS
    relation = str(rng.choice(possible)) if relation is True else relation or ""
    if relation:
        _check("relation beside a sign" if sign else "relation", relation, possible)
        count = 2
    room_top, room_height, sign_y = 0, SIZE, 26
    if sign:
        room_height = SIZE - SIGN_HEIGHT - 1
        room_top, sign_y = ((0, 26), (SIZE - room_height, 5))[rng.integers(2)]
    stacked = relation in ("above", "below") if relation or sign else rng.random() < 0.5
    columns, rows = ((1, 1), (1, 2) if stacked else (2, 1), (2, 2), (2, 2))[count - 1]
    width, height = SIZE / columns, room_height / rows
    cells = sorted(rng.permutation(columns * rows)[:count], reverse=relation in ("right of", "below"))

    varied = 2 if relation else 1  # two kinds and colours, or one for all
    kinds, colors = rng.permutation(len(THINGS))[:varied], rng.integers(len(COLORS), size=varied)
    things = []
    for number, cell in enumerate(cells):
        size = rng.uniform(0.85, 1.0) * min(24, width - 3, height - 3)
        x = rng.uniform(_margin(size), width - _margin(size)) + cell % columns * width
        y = rng.uniform(_margin(size), height - _margin(size)) + cell // columns * height + room_top
        kind, color = THINGS[kinds[number % varied]], COLORS[colors[number % varied]]
        things.append(Thing(kind, color, float(size), float(x), float(y), FACINGS[rng.integers(2)]))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    text = random_text(rng) if sign is True else sign or ""
    return Scene(background, tuple(things), relation, text, sign_x=int(rng.integers(8, 25)), sign_y=sign_y)


def _margin(size):
    """How near to the edge of its room a thing's centre may come: half its size, and its outline."""
    return size / 2 + 1


# ------------------------------------------------------------------------------------ data sets


def make(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The plain data set: one thing a picture, no sign.

    -> images uint8 (N, 32, 32, 3); labels, background, color, facing int64 (N,), into THINGS, BACKGROUNDS,
    COLORS, FACINGS; place float32 (N, 2), the centre (x, y), and size float32 (N,), in pixels; mask bool
    (N, 32, 32): the thing and its outline.
    Picture i depends on the seed and on i, not on count: a small data set is the beginning of a large one.
    """

    def draw(rng, chunk):
        truth = _random_things(rng, chunk, 16, 24)
        margin = _margin(truth["size"])[:, None]
        truth["place"] = (margin + rng.random((chunk, 2)) * (SIZE - 2 * margin)).astype(np.float32)
        canvas = draw_backgrounds(truth["background"], rng)
        looks = (truth[key] for key in ("labels", "color", "size"))
        coverage = draw_things(canvas, *looks, *truth["place"].T, truth["facing"])
        return {"images": _to_bytes(canvas), **truth, "mask": coverage > 0.5}

    return _collect(draw, count, seed, chunk=250)


def make_captioned(
    count: int, seed: int = 0, counts=(1, 2, 3, 4), relations: float = 0.3, signs: float = 0.3
) -> dict:
    """Pictures with captions, for models that read. As in `make`, picture i does not depend on count.

    counts: how many things there may be; relations, signs: the share of scenes with a relation, with a sign.
    -> images uint8 (N, 32, 32, 3); captions, a list; scenes, a list of Scene, the whole truth; mask bool
    (N, 32, 32); labels, color (of the first thing), background and count int64 (N,).
    """

    def draw(rng, chunk):
        scenes = []
        for number in rng.choice(counts, size=chunk).tolist():
            relation, sign = (rng.random(2) < (relations, signs)).tolist()
            scenes.append(random_scene(rng, min(number, 2) if sign else number, relation, sign))
        images, mask = render_scenes(scenes, rng)
        return {
            "images": images,
            "captions": [scene.caption for scene in scenes],
            "scenes": scenes,
            "mask": mask,
            "labels": np.array([THINGS.index(scene.things[0].kind) for scene in scenes]),
            "color": np.array([COLORS.index(scene.things[0].color) for scene in scenes]),
            "background": np.array([BACKGROUNDS.index(scene.background) for scene in scenes]),
            "count": np.array([len(scene.things) for scene in scenes]),
        }

    return _collect(draw, count, seed, chunk=100)


def make_clips(count: int, seed: int = 0, frames: int = 8) -> dict:
    """Clips of one thing that moves straight over a still background, facing where it goes, always in sight.

    -> videos uint8 (N, T, 32, 32, 3); captions, a list; velocity float32 (N, 2), pixels a frame; place
    float32 (N, T, 2); mask bool (N, T, 32, 32); direction int64 (N,), into DIRECTIONS; the rest as in `make`.
    """
    if frames < 2:
        raise UserError(f"a clip needs at least 2 frames, got {frames}")

    def draw(rng, chunk):
        truth = _random_things(rng, chunk, 13, 17)
        direction = rng.integers(len(DIRECTIONS), size=chunk)
        angle = direction * (np.pi / 2) + rng.uniform(-0.3, 0.3, chunk)  # so that its name is never in doubt
        room = SIZE - 2 * _margin(truth["size"])
        speed = np.minimum(rng.uniform(0.6, 1.8, chunk), room / (frames - 1))
        velocity = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        travel = (frames - 1) * velocity
        start = _margin(truth["size"])[:, None] - np.minimum(travel, 0)
        start = start + rng.random((chunk, 2)) * (room[:, None] - np.abs(travel))
        place = start[:, None] + np.arange(frames)[:, None] * velocity[:, None]  # (chunk, T, 2)
        truth["facing"] = (velocity[:, 0] > 0).astype(np.int64)

        canvas = draw_backgrounds(truth["background"], rng).repeat(frames, axis=0)  # (chunk * T, 32, 32, 3)
        looks = (truth[key].repeat(frames) for key in ("labels", "color", "size"))
        coverage = draw_things(canvas, *looks, *place.reshape(-1, 2).T, truth["facing"].repeat(frames))
        words = zip(truth["labels"], truth["color"], truth["background"], direction, strict=True)
        captions = [
            f"{_name(THINGS[kind], COLORS[color])} {WHERE[BACKGROUNDS[back]]} moving {DIRECTIONS[way]}"
            for kind, color, back, way in words
        ]
        return {
            "videos": _to_bytes(canvas).reshape(chunk, frames, SIZE, SIZE, 3),
            "captions": captions,
            "velocity": velocity.astype(np.float32),
            "place": place.astype(np.float32),
            "mask": (coverage > 0.5).reshape(chunk, frames, SIZE, SIZE),
            "direction": direction,
            **truth,
        }

    return _collect(draw, count, seed, chunk=32)


def _random_things(rng, count: int, smallest: float, largest: float) -> dict[str, np.ndarray]:
    """Every attribute drawn for itself, so that none tells anything of another."""
    return {
        "labels": rng.integers(len(THINGS), size=count),
        "background": rng.integers(len(BACKGROUNDS), size=count),
        "color": rng.integers(len(COLORS), size=count),
        "size": rng.uniform(smallest, largest, count).astype(np.float32),
        "facing": rng.integers(len(FACINGS), size=count),
    }


def _collect(draw, count: int, seed: int, chunk: int) -> dict:
    """Join draw(rng, chunk) for as many chunks as it takes, each with its own rng, and cut to count."""
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    parts = [draw(np.random.default_rng([seed, i]), chunk) for i in range(-(-count // chunk))]
    joined = {}
    for key, first in list(parts[0].items()):
        values = [part.pop(key) for part in parts]
        joined[key] = (sum(values, []) if isinstance(first, list) else np.concatenate(values))[:count]
    return joined


def contact_sheet(images: np.ndarray, captions: list[str], columns: int = 8, zoom: int = 5):
    """A Pillow image of all pictures, uint8 (N, 32, 32, 3), enlarged, each above its caption."""
    from PIL import Image, ImageDraw

    side, text_height, rows = SIZE * zoom, 34, -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        corner = i % columns * (side + 8), i // columns * (side + text_height)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), corner)
        lines = "\n".join(textwrap.wrap(caption, side // 6))
        pen.text((corner[0], corner[1] + side), lines, fill="black", font_size=10, spacing=0)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a sheet of example scenes with their captions.")
    parser.add_argument("--out", default="scenes.png", help="the PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    pairs = [(kind, background) for kind in THINGS for background in BACKGROUNDS]
    scenes = [Scene(back, (replace(random_scene(rng).things[0], kind=kind),)) for kind, back in pairs]
    scenes += [random_scene(rng, count) for count in (2, 3, 4, 3)]
    scenes += [random_scene(rng, relation=relation) for relation in RELATIONS]
    scenes += [random_scene(rng, sign=True) for _ in range(6)]
    scenes += [random_scene(rng, count=2, sign="12+9=21"), random_scene(rng, relation=True, sign=True)]
    clips = make_clips(2, arguments.seed, frames=8)
    images = np.concatenate([render_scenes(scenes, rng)[0], *clips["videos"]])
    captions = [scene.caption for scene in scenes] + [c for c in clips["captions"] for _ in range(8)]
    contact_sheet(images, captions).save(arguments.out)
    print(f"wrote {arguments.out}: {len(images)} pictures")
