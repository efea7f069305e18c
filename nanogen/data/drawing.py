"""How scenes are drawn: shapes as distances, ten things, four backgrounds, letters of 3x5 pixels.

A shape is a signed distance d(u, v), negative inside. With d in pixels, clip(0.5 - d, 0, 1) is the
fraction of a pixel that the shape covers, which is anti-aliasing. A thing is a list of shapes,
painted over its own dark silhouette, which stays as an outline: a blue fish shows on a blue sea.

Distance functions: Inigo Quilez, "2D distance functions", iquilezles.org. The rest was made here.
"""

import numpy as np

SIZE = 32  # pixels a side
COLOR_RGB = {
    "red": (0.84, 0.14, 0.14), "orange": (0.96, 0.53, 0.08), "yellow": (0.98, 0.86, 0.16),
    "green": (0.16, 0.65, 0.24), "blue": (0.16, 0.33, 0.88), "purple": (0.55, 0.22, 0.73),
    "pink": (0.98, 0.59, 0.78), "white": (0.96, 0.96, 0.94),
}
COLORS = tuple(COLOR_RGB)
FACINGS = ("left", "right")
PAINTS = {
    "black": (0.08, 0.08, 0.1), "grey": (0.6, 0.62, 0.65), "glass": (0.68, 0.88, 0.97),
    "cream": (0.97, 0.94, 0.84), "brown": (0.45, 0.28, 0.14), "beak": (0.95, 0.55, 0.1),
    "gold": (1.0, 0.87, 0.3), "rose": (0.95, 0.6, 0.62), "snow": (1.0, 1.0, 1.0),
    "red": (0.9, 0.2, 0.2), "green": (0.2, 0.75, 0.3), "blue": (0.3, 0.5, 0.7),
}
OUTLINE = 0.9  # pixels that the dark silhouette reaches beyond the thing

# Pixel centres. The image spans [0, 32] x [0, 32], x to the right and y down.
PIXEL_Y, PIXEL_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


# ---- shapes: u, v of shape (N, 32, 32) -> the signed distance to the edge, negative inside

def circle(u, v, x, y, radius):
    return np.hypot(u - x, v - y) - radius


def ellipse(u, v, x, y, radius_u, radius_v):
    """Exact to first order near the edge, where it matters."""
    u, v = (u - x) / radius_u, (v - y) / radius_v
    scaled = np.hypot(u, v)
    return scaled * (scaled - 1) / (np.hypot(u / radius_u, v / radius_v) + 1e-6)


def box(u, v, x, y, half_width, half_height):
    return np.maximum(np.abs(u - x) - half_width, np.abs(v - y) - half_height)


def capsule(u, v, x, y, end_x, end_y, radius):
    """A thick line with round ends."""
    along_u, along_v, u, v = end_x - x, end_y - y, u - x, v - y
    fraction = np.clip((u * along_u + v * along_v) / (along_u**2 + along_v**2), 0, 1)
    return np.hypot(u - fraction * along_u, v - fraction * along_v) - radius


def polygon(u, v, *corners):
    """A convex polygon, corners x, y, x, y, ... clockwise: inside is behind the line of every edge.
    Outside, the distance is to the edges: that to their lines would make spikes of corners."""
    behind, nearest = [], []
    corners = list(zip(corners[::2], corners[1::2], strict=True))
    for (x, y), (next_x, next_y) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(next_x - x, next_y - y))
        behind.append((u - x) * ((next_y - y) / length) - (v - y) * ((next_x - x) / length))
        nearest.append(capsule(u, v, x, y, next_x, next_y, 0))
    inside = np.maximum.reduce(behind)
    return np.where(inside < 0, inside, np.minimum.reduce(nearest))


# ---- ten things
# The parts of each thing, back to front, and the shapes of each part: paint, shape, arguments. A
# thing fills the square [-100, 100] x [-100, 100], u towards where it faces, v down. A paint is one
# of PAINTS or a shade of the thing's colour: 1 is the colour itself, 0.7 is darker, 1.3 is paler.
PARTS = {
    "dog": """
        tail: 0.9 capsule -62 5 -90 -42 10
        far legs: 0.65 capsule -38 30 -38 86 10, 0.65 capsule 14 30 14 86 10
        near legs: 1 capsule -60 25 -62 86 11, 1 capsule 36 25 36 86 11
        body, neck, head: 1 capsule -48 17 28 15 26, 1 capsule 28 5 42 -35 19, 1 circle 44 -46 27
        snout, nose: 1.25 capsule 55 -36 80 -34 15, black circle 91 -43 10
        ear, eye: 0.5 capsule 24 -56 18 -22 12, black circle 52 -52 8""",
    "cat": """
        tail: 0.8 capsule -30 80 -72 72 10, 0.8 capsule -72 72 -86 30 10
        tip of the tail: 0.8 capsule -86 30 -66 6 10
        body: 1 ellipse -2 48 42 46
        stripes: 0.6 capsule -36 30 -20 38 5, 0.6 capsule -40 52 -22 56 5
        front legs: 1.15 capsule 28 30 34 84 11, 1.15 capsule 6 40 8 84 11
        ears: 0.85 polygon -20 -40 -16 -96 20 -60, 0.85 polygon 34 -60 70 -96 72 -40
        head, muzzle, nose: 1 ellipse 26 -28 48 38, 1.5 ellipse 28 -8 20 14, rose circle 28 -15 7
        eyes: black circle 6 -34 9, black circle 48 -34 9""",
    "bird": """
        tail: 0.7 polygon -35 0 -35 35 -95 42 -98 10
        beak: beak polygon 62 -28 100 -10 62 6
        legs: beak capsule -5 50 -15 82 5, beak capsule 14 50 4 82 5
        far wing: 0.6 polygon 0 0 0 -80 24 -72 42 0
        body, belly, head: 1 ellipse 2 22 54 34, 1.5 ellipse 14 36 30 16, 1 circle 48 -12 26
        wing, eye: 0.8 polygon -35 25 -70 -80 -40 -72 22 15 -5 30, black circle 55 -17 9""",
    "fish": """
        tail: 0.75 polygon -98 -50 -40 0 -82 0, 0.75 polygon -40 0 -98 50 -82 0
        fins: 0.7 polygon -30 -30 -25 -72 35 -35, 0.7 polygon 10 35 -25 70 -20 30
        body, belly: 1 ellipse 18 0 76 46, 1.4 ellipse 20 22 50 16
        gills: 0.55 capsule 22 -22 26 22 5, 0.55 capsule -16 -26 -12 26 5
        eye, mouth: snow circle 58 -12 16, black circle 61 -12 9, 0.4 capsule 74 14 92 10 4""",
    "ship": """
        mast, flag: brown capsule 2 -90 2 40 5, 1 polygon 0 -98 0 -70 -34 -84
        sails: cream polygon -6 -66 -6 28 -78 28, cream polygon 12 -50 60 28 12 28
        hull: 1 polygon -84 38 98 34 54 86 -74 86, 0.6 polygon -78 68 69 68 54 86 -74 86
        portholes: glass circle -40 55 8, glass circle 0 55 8, glass circle 40 55 8""",
    "car": """
        cabin: 1 polygon -42 -46 20 -46 56 8 -66 8
        body: 1 capsule -74 24 76 26 22, 0.65 box 0 38 88 8
        windows: glass polygon -36 -34 -14 -34 -14 4 -50 4, glass polygon 0 -34 14 -34 38 4 0 4
        tyres: black circle -50 46 25, black circle 50 46 25
        hubs, headlight: grey circle -50 46 10, grey circle 50 46 10, gold circle 88 20 9""",
    "plane": """
        tail fin: 0.8 polygon -98 -60 -68 -60 -36 -5 -80 -2
        far wing: 0.65 polygon -30 -62 -8 -62 30 -10 -5 -10
        body, belly: 1 capsule -76 2 72 6 20, 1.4 polygon -80 10 80 14 70 26 -70 22
        near wing: 0.75 polygon 2 12 38 12 -30 76 -56 76
        tail wing: 0.75 polygon -78 0 -52 0 -80 30 -100 30
        cockpit, window: glass polygon 62 -14 78 -12 90 2 62 2, black circle -44 -2 6
        windows: black circle -20 -2 6, black circle 4 -2 6, black circle 28 -2 6""",
    "tree": """
        trunk, branch: brown polygon -12 10 12 10 20 94 -20 94, brown capsule 5 65 60 42 8
        leaves: 0.9 circle 66 32 24, 0.75 circle -46 0 36, 0.85 circle 32 -30 40, 1 circle -8 -52 44
        light: 0.95 circle -12 -8 36, 1.3 circle -20 -60 17""",
    "house": """
        chimney, walls, roof: 0.7 box 46 -55 13 34, 1 box 0 42 72 50, 0.6 polygon 0 -88 96 2 -96 2
        door: brown box 34 58 19 34, gold circle 24 60 6
        window: snow box -32 42 25 22, blue box -32 42 17 14""",
    "robot": """
        antenna: grey capsule 0 -60 0 -84 5, gold circle 0 -88 11
        arms: 0.75 capsule -50 10 -72 50 10, 0.75 capsule 50 12 78 -30 10
        hands: grey circle -74 54 13, grey circle 80 -36 13
        legs: 0.7 box -22 76 13 20, 0.7 box 22 76 13 20
        body: 1 box 0 30 46 30, grey box 0 30 28 14, red circle -12 30 7, green circle 12 30 7
        head, visor: 1.1 box 0 -36 44 27, black box 6 -40 34 13
        eyes: glass circle -10 -40 9, glass circle 24 -40 9""",
}
THINGS = tuple(PARTS)
SUBJECT = "snail"  # an eleventh thing that no data set but "things" and "subject" has
SUBJECT_PARTS = """
    foot, neck: cream capsule -88 78 62 78 14, cream capsule 58 70 72 18 13
    horns: cream capsule 66 10 56 -34 5, cream capsule 76 10 90 -32 5
    tips, eye: black circle 56 -38 8, black circle 91 -36 8, black circle 78 16 6
    shell: 1 circle -14 14 54, 1.5 circle -14 14 38, 0.7 circle -14 14 24, gold circle -14 14 11"""
KINDS = (*THINGS, SUBJECT)


def _read(parts: str) -> list[tuple]:
    """A text of PARTS -> (paint, shape, arguments in units of the square's half side), ..."""
    shapes = [text.split() for line in parts.strip().splitlines()
              for text in line.partition(": ")[2].split(", ")]
    return [(PAINTS.get(paint) or float(paint), globals()[shape], [int(n) / 100 for n in numbers])
            for paint, shape, *numbers in shapes]


SHAPES = [_read(parts) for parts in (*PARTS.values(), SUBJECT_PARTS)]


def draw_things(canvas, kind, color, size, x, y, facing):
    """Paint one thing on each image of canvas, float32 (N, 32, 32, 3) in [0, 1], in place.
    The rest is (N,): kind, color and facing index KINDS, COLORS and FACINGS; size, x and y are
    pixels. -> the fraction of each pixel that thing and outline cover, float32 (N, 32, 32)."""
    coverage = np.zeros(canvas.shape[:3], dtype=np.float32)
    palette = np.array(list(COLOR_RGB.values()), dtype=np.float32)
    for index in np.unique(kind):
        rows = np.flatnonzero(kind == index)
        scale, left, top = (a[rows, None, None].astype(np.float32) for a in (size / 2, x, y))
        mirror = np.where(facing[rows] == FACINGS.index("left"), -1, 1).astype(np.float32)
        u, v = (PIXEL_X - left) / scale * mirror[:, None, None], (PIXEL_Y - top) / scale
        own = palette[color[rows], None, None]  # (n, 1, 1, 3)
        ink = np.broadcast_to(0.3 * own, (len(rows), SIZE, SIZE, 3)).copy()  # dark: the silhouette
        silhouette = np.float32(SIZE)
        for paint, shape, arguments in SHAPES[index]:
            distance = scale * shape(u, v, *arguments)  # in pixels
            silhouette = np.minimum(silhouette, distance)
            if not isinstance(paint, tuple):
                paint = own * paint if paint <= 1 else own + (paint - 1) * (1 - own)
            paint = np.asarray(paint, dtype=np.float32)
            ink += np.clip(0.5 - distance, 0, 1)[..., None] * (paint - ink)
        ink *= (1 - 0.13 * np.clip(v, -1, 1))[..., None]  # light falls from above
        coverage[rows] = np.clip(0.5 + OUTLINE - silhouette, 0, 1)
        canvas[rows] += coverage[rows, ..., None] * (ink - canvas[rows])
    return coverage


# ---- four backgrounds: each draws all its choices (horizon, blades, clouds) from rng

def _between(rng, count, low, high):
    """A uniform number for each image: (count, 1, 1)."""
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _mix(image, fraction, color):
    """Blend a colour into the images in place; fraction: (n, 32, 32) or (32, 32)."""
    image += np.clip(fraction, 0, 1)[..., None] * (np.asarray(color, dtype=np.float32) - image)


def _blank(count, top, bottom):
    """A vertical gradient from one colour to another: (count, 32, 32, 3)."""
    fraction = (PIXEL_Y / SIZE)[..., None]
    image = (1 - fraction) * np.asarray(top, np.float32) + fraction * np.asarray(bottom, np.float32)
    return np.repeat(image[None], count, axis=0).astype(np.float32)


def grass(rng, count):
    image = _blank(count, (0.72, 0.87, 0.98), (0.8, 0.92, 1.0))
    meadow = PIXEL_Y - _between(rng, count, 4, 9) + np.sin(PIXEL_X / 5 + _between(rng, count, 0, 6))
    _mix(image, meadow, (0.42, 0.68, 0.3))
    blade = rng.random((count, SIZE, SIZE), dtype=np.float32)
    blade = np.maximum(blade, np.roll(blade, 1, axis=1))  # two pixels tall
    _mix(image, np.where(meadow > 0.5, (blade > 0.86) * 0.6, 0), (0.26, 0.5, 0.18))
    _mix(image, np.where(meadow > 1.5, (blade < 0.16) * 0.5, 0), (0.64, 0.84, 0.42))
    flower = rng.random((count, SIZE, SIZE), dtype=np.float32) > 0.993
    _mix(image, np.where(meadow > 2, flower, 0), (0.98, 0.95, 0.7))
    return image


def city(rng, count):
    image = _blank(count, (0.66, 0.72, 0.82), (0.88, 0.86, 0.84))
    column = (PIXEL_X[0] + rng.integers(0, 7, (count, 1))).astype(int)  # (count, 32)
    number, inside = column // 7, column % 7  # buildings are 7 pixels wide
    roof = np.take_along_axis(rng.integers(3, 17, (count, 6)), number, axis=1)[:, None]
    tone = np.take_along_axis(rng.uniform(0.4, 0.66, (count, 6)), number, axis=1)[:, None, :, None]
    wall = tone.astype(np.float32) * np.array([1.0, 0.96, 1.02], np.float32)
    building = PIXEL_Y > roof
    image = np.where(building[..., None], wall, image)
    _mix(image, building & (inside == 0)[:, None], (0.36, 0.36, 0.42))
    row = PIXEL_Y.astype(int) - roof
    window = building & (row % 4 >= 2) & np.isin(inside, (2, 3, 5))[:, None]
    lit = rng.random((count, SIZE // 4, SIZE // 4)).repeat(4, axis=1).repeat(4, axis=2) > 0.5
    _mix(image, window & lit, (0.94, 0.86, 0.58))
    _mix(image, window & ~lit, (0.3, 0.34, 0.44))
    _mix(image, PIXEL_Y - 25 > 0, (0.44, 0.44, 0.46))  # the street
    dash = (np.abs(PIXEL_Y - 29) < 0.6) & ((PIXEL_X + _between(rng, count, 0, 8)) % 8 < 4)
    _mix(image, dash, (0.9, 0.88, 0.8))
    _mix(image, np.abs(PIXEL_Y - 25.5) < 0.6, (0.7, 0.69, 0.66))
    return image


def sea(rng, count):
    image = _blank(count, (0.78, 0.9, 0.98), (0.9, 0.95, 0.98))
    water = PIXEL_Y - _between(rng, count, 4, 9).round()
    depth = np.clip(water / SIZE, 0, 1)
    _mix(image, water, (0.14, 0.56, 0.68))
    _mix(image, depth * 0.9, (0.04, 0.26, 0.48))
    swell = np.sin(PIXEL_X * _between(rng, count, 0.5, 0.8) + _between(rng, count, 0, 6))
    rows = PIXEL_Y * _between(rng, count, 1.2, 1.5)
    wave = np.sin(rows + 1.2 * swell + _between(rng, count, 0, 6))
    crest = np.sin(PIXEL_X * 0.37 + PIXEL_Y * 1.9 + _between(rng, count, 0, 6)) > -0.2
    foam = np.where((water > 1) & crest, 1.6 * np.clip(wave - 0.55, 0, 1), 0)
    _mix(image, np.where(water > 1, 0.35 * np.clip(-wave, 0, 1), 0), (0.03, 0.3, 0.5))
    _mix(image, foam, (0.75, 0.92, 0.95))
    return image


def sky(rng, count):
    image = _blank(count, (0.3, 0.56, 0.9), (0.68, 0.85, 0.98))
    for _ in range(3):  # clouds: three puffs, flat below
        x, y = _between(rng, count, 0, 32), _between(rng, count, 3, 29)
        width = _between(rng, count, 3, 6)
        for offset, height in ((-0.8, 0.45), (0.0, 0.75), (0.8, 0.5)):
            u, v = (PIXEL_X - x) / width, (PIXEL_Y - y) / (width * height)
            distance, flat = circle(u, v, offset, 0, 0.9), 0.5 + y + 0.25 * width - PIXEL_Y
            _mix(image, 0.9 * np.minimum(-0.6 * width * height * distance, flat), (0.97, 0.98, 1.0))
    return image


PAINT = {"grass": grass, "city": city, "sea": sea, "sky": sky}
BACKGROUNDS = tuple(PAINT)


def draw_backgrounds(background, rng):
    """background: (N,) into BACKGROUNDS -> float32 (N, 32, 32, 3) in [0, 1] with noise."""
    canvas = np.empty((len(background), SIZE, SIZE, 3), dtype=np.float32)
    for index, name in enumerate(BACKGROUNDS):
        rows = np.flatnonzero(background == index)
        canvas[rows] = PAINT[name](rng, len(rows))
    canvas *= _between(rng, len(canvas), 0.92, 1.0)[..., None]
    canvas += 0.05 * (rng.random(canvas.shape[:3], dtype=np.float32)[..., None] - 0.5)
    return np.clip(canvas, 0, 1, out=canvas)


# ---- letters of 3x5 pixels, an octal digit for each row: "2" is .#. and "5" is #.#
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ROWS = """
25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 56465 44447 57755 65555 25552 65644
25573 65655 34216 72222 55557 55552 55775 55255 55222 71247 75557 26227 61247 71317 55711 74616
34757 71122 75757 75716 02720 00700 07070"""
FONT = dict(zip(LETTERS + "0123456789+-=", _ROWS.split(), strict=True))
SIGN_HEIGHT = 9  # 5 rows of text, 2 of margin, 2 of frame


def draw_sign(text: str) -> np.ndarray:
    """Dark letters on a cream board, float (9, 4 len(text) + 3, 3). Too small for anti-aliasing."""
    board = np.full((SIGN_HEIGHT, 4 * len(text) + 3, 3), (0.3, 0.2, 0.12))
    board[1:-1, 1:-1] = PAINTS["cream"]
    for column, letter in enumerate(text):
        dots = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in FONT[letter]])
        board[2:7, 4 * column + 2 : 4 * column + 5][dots > 0] = PAINTS["black"]
    return board
