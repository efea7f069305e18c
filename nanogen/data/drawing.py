"""How scenes are drawn: shapes as distances, ten things, four backgrounds, letters of 3x5 pixels.

A shape is a signed distance d(u, v), negative inside; clip(0.5 - d, 0, 1), d in pixels, is the share of a pixel that it
covers, which is anti-aliasing. A thing is a list of (distance, paint), painted in turn over its own dark silhouette, which
stays around as an outline: a blue fish shows on a blue sea. All of it works on batches, u and v of shape (N, 32, 32).

Distance functions: Inigo Quilez, "2D distance functions", iquilezles.org. The rest was made for this course.
"""

import numpy as np

SIZE = 32  # pixels a side
COLOR_RGB = {
    "red": (0.84, 0.14, 0.14), "orange": (0.96, 0.53, 0.08), "yellow": (0.98, 0.86, 0.16), "green": (0.16, 0.65, 0.24),
    "blue": (0.16, 0.33, 0.88), "purple": (0.55, 0.22, 0.73), "pink": (0.98, 0.59, 0.78), "white": (0.96, 0.96, 0.94),
}
COLORS = tuple(COLOR_RGB)
FACINGS = ("left", "right")
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
SIGN_HEIGHT = 9  # 5 rows of text, 2 of margin, 2 of frame


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


def draw_sign(text: str) -> np.ndarray:
    """Dark letters on a cream board, not anti-aliased: 3x5 pixels need every one of them. -> (9, 4 len(text) + 3, 3)."""
    board = np.full((SIGN_HEIGHT, 4 * len(text) + 3, 3), (0.3, 0.2, 0.12))
    board[1:-1, 1:-1] = CREAM
    for place, letter in enumerate(text):
        dots = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in FONT[letter]], dtype=bool)
        board[2:7, 4 * place + 2 : 4 * place + 5][dots] = BLACK
    return board
