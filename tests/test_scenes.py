"""What the scenes say about themselves is true: every score of the later methods needs that."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogen import UserError
from nanogen.data import drawing, scenes
from nanogen.data.prompts import random_text
from nanogen.data.scenes import BACKGROUNDS, COLORS, FACINGS, RELATIONS, THINGS, Scene, Thing


@pytest.fixture(scope="module")
def images():
    return scenes.make(2000, seed=0)


@pytest.fixture(scope="module")
def crowded():
    """Scenes of one to four things, some of them with a relation, some with a sign."""
    rng, chosen = np.random.default_rng(0), []
    for count in rng.integers(1, 5, size=300).tolist():
        relation, sign = (rng.random(2) < 0.3).tolist()
        text = random_text(rng) if sign else ""
        chosen.append(scenes.random_scene(rng, min(count, 2) if sign else count, relation, text))
    return chosen


@pytest.fixture(scope="module")
def clips():
    return scenes.make_clips(64, seed=0, frames=6)


def render(scene, seed=0):
    """One scene -> uint8 (32, 32, 3)."""
    return scenes.render_scenes([scene], np.random.default_rng(seed))[0][0]


def thing_mask(scene):
    """The visible pixels of its things: bool (32, 32)."""
    return scenes.render_scenes([scene], np.random.default_rng(0))[1][0]


def grown(mask):
    """The mask and every pixel that touches it."""
    padded = np.pad(mask, 1)
    shifts = [padded[1 + dy : 33 + dy, 1 + dx : 33 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.any(shifts, axis=0)


def test_a_seed_gives_the_same_images_and_another_seed_others(images):
    again, other = scenes.make(20, seed=0), scenes.make(20, seed=1)
    for key, values in again.items():
        assert np.array_equal(values, images[key][:20]), key  # nor does count matter
    assert not np.array_equal(again["images"], other["images"])
    assert not np.array_equal(again["labels"], other["labels"])


def test_a_few_clips_are_the_beginning_of_many():
    small, large = scenes.make_clips(5, seed=3), scenes.make_clips(40, seed=3)
    for key, values in small.items():
        assert len(values) == 5 and len(large[key]) == 40
        assert np.array_equal(values, large[key][:5]), key


def test_shapes_types_and_ranges(images):
    n = len(images["labels"])
    assert images["images"].shape == (n, 32, 32, 3) and images["images"].dtype == np.uint8
    assert images["mask"].shape == (n, 32, 32) and images["mask"].dtype == bool
    columns = {"labels": THINGS, "background": BACKGROUNDS, "color": COLORS, "facing": FACINGS}
    for key, names in columns.items():
        assert images[key].dtype == np.int64
        assert set(images[key]) == set(range(len(names))), key
    assert images["place"].dtype == images["size"].dtype == np.float32
    assert images["place"].shape == (n, 2)
    reach = images["size"][:, None] / 2
    assert (images["place"] - reach >= 0).all() and (images["place"] + reach <= 32).all()
    covered = images["mask"].mean(axis=(1, 2))
    assert covered.min() > 0.08 and covered.max() < 0.6


def test_the_background_says_nothing_about_the_thing_nor_the_colour(images):
    for one, other in [("labels", "background"), ("labels", "color"), ("background", "color"),
                       ("labels", "facing")]:
        table = np.zeros((images[one].max() + 1, images[other].max() + 1))
        np.add.at(table, (images[one], images[other]), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        chi_square = ((table - expected) ** 2 / expected).sum()
        four_deviations = 4 * np.sqrt(2 * freedom)
        assert chi_square < freedom + four_deviations, (one, other)
        assert expected.min() > 15


@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_mask_is_what_changes_when_the_thing_is_removed(kind, background):
    for color in COLORS:
        scene = Scene(background, (Thing(kind, color, size=18, x=15.3, y=16.6, facing="left"),))
        difference = render(scene, seed=1) != render(replace(scene, things=()), seed=1)
        changed, mask = difference.any(axis=-1), thing_mask(scene)
        assert changed[mask].mean() > 0.99
        assert not (changed & ~grown(mask)).any()


def test_every_thing_stands_out_from_every_background():
    """By colour and outline: on average a tenth of the range away from what it hides."""
    shown = [Scene(background, (Thing(kind, color),))
             for background in BACKGROUNDS for kind in THINGS for color in COLORS]
    image, mask = scenes.render_scenes(shown, np.random.default_rng(0))
    bare = [replace(scene, things=()) for scene in shown]
    empty, _ = scenes.render_scenes(bare, np.random.default_rng(0))
    contrast = np.abs(image.astype(float) - empty).mean(axis=-1)
    for i, scene in enumerate(shown):
        assert contrast[i][mask[i]].mean() > 25, scene.caption


@pytest.mark.parametrize("kind", range(len(THINGS)), ids=THINGS)
def test_facing_left_is_the_mirror_image_of_facing_right(kind):
    canvas, both = np.zeros((2, 32, 32, 3), dtype=np.float32), np.ones(2, dtype=int)
    looks = (number * both for number in (kind, 0, 20, 16, 16))
    drawing.draw_things(canvas, *looks, np.array([0, 1]))
    left, right = canvas
    assert np.allclose(left, right[:, ::-1], atol=1e-4)
    assert np.abs(left - right).max() > 0.15  # and anybody can tell which is which


def test_the_text_changes_only_the_sign():
    scene = Scene("city", (Thing("cat", "red", size=16, y=11),), sign="CAT")
    first, second = render(scene), render(replace(scene, sign="DOG"))
    bare = render(replace(scene, sign=""))
    area = np.zeros((32, 32), dtype=bool)
    area[scenes.sign_area(scene)] = True
    assert (first != second).any()
    assert not (first != second).any(axis=-1)[~area].any()
    assert np.array_equal(first[~area], bare[~area])
    assert (first != bare).any(axis=-1)[area].mean() > 0.99
    assert area.sum() == 9 * 15


@settings(max_examples=30, deadline=None)
@given(text=st.text(alphabet=sorted(scenes.FONT), min_size=1, max_size=scenes.MAX_TEXT))
def test_the_sign_can_be_read_back_pixel_by_pixel(text):
    scene = Scene("sea", sign=text)
    board = render(scene)[scenes.sign_area(scene)]
    dark = board[2:7, 2:-1].max(axis=-1) < 64
    glyphs = {tuple(int(row) for row in rows): letter for letter, rows in scenes.FONT.items()}
    assert len(glyphs) == len(scenes.FONT)  # no two letters look alike
    read = [tuple(dark[:, 4 * i : 4 * i + 3] @ [4, 2, 1]) for i in range(len(text))]
    assert "".join(glyphs[rows] for rows in read) == text


def test_clips_move_by_their_velocity_over_a_still_background(clips):
    rows, columns = np.mgrid[0:32, 0:32] + 0.5
    frames = clips["videos"].shape[1]
    for i in range(len(clips["videos"])):
        masks = clips["mask"][i]
        centroids = np.array([[columns[mask].mean(), rows[mask].mean()] for mask in masks])
        moved = (centroids[-1] - centroids[0]) / (frames - 1)
        assert np.abs(moved - clips["velocity"][i]).max() < 0.12
        assert np.allclose(np.diff(clips["place"][i], axis=0), clips["velocity"][i], atol=1e-4)
        free = ~np.any([grown(mask) for mask in masks], axis=0)
        assert (clips["videos"][i][:, free] == clips["videos"][i][0, free]).all()


def test_clips_stay_in_the_image_and_say_where_they_go(clips):
    reach = clips["size"][:, None, None] / 2
    assert (clips["place"] - reach >= 0).all() and (clips["place"] + reach <= 32).all()
    columns = (clips[key] for key in ("velocity", "facing", "prompts"))
    for velocity, facing, prompt in zip(*columns, strict=True):
        axis = np.abs(velocity).argmax()
        ways = (("left", "right"), ("up", "down"))[axis]
        assert prompt.endswith("moving " + ways[int(velocity[axis] > 0)])
        assert FACINGS[facing] == ("right" if velocity[0] > 0 else "left")
    slow = scenes.make_clips(8, frames=20)  # a long clip slows down rather than leave
    assert (slow["place"] >= 0).all() and (slow["place"] <= 32).all()


def test_captions_read_as_english():
    def thing(kind, color):
        return Thing(kind, color)

    dog, bird = thing("dog", "red"), thing("bird", "blue")
    assert Scene("grass", (dog,)).caption == "a red dog on grass"
    assert Scene("sky", (bird,) * 3).caption == "three blue birds in the sky"
    assert Scene("sea", (thing("fish", "orange"),)).caption == "an orange fish on the sea"
    assert Scene("sea", (thing("fish", "orange"),) * 2).caption == "two orange fish on the sea"
    pair = Scene("city", (thing("cat", "white"), thing("car", "pink")), relation="left of")
    assert pair.caption == "a white cat left of a pink car in the city"
    house = Scene("grass", (thing("house", "white"),), sign="CAT")
    assert house.caption == "a white house on grass with a sign that says CAT"
    assert replace(house, sign="3+4=7").caption.endswith("that says 3+4=")


def test_captions_name_the_truth(crowded):
    seen = set()
    for scene in crowded:
        words, first = scene.caption.split(), scene.things[0]
        assert first.color in words and scene.background in words
        if len(scene.things) > 1 and not scene.relation:
            assert words[0] == {2: "two", 3: "three", 4: "four"}[len(scene.things)]
        if scene.relation:
            one, other = scene.things
            assert f"{one.kind} {scene.relation} a" in scene.caption
            assert other.kind in words
            left, right = one.x < other.x - 8, one.x > other.x + 8
            above, below = one.y < other.y - 8, one.y > other.y + 8
            assert (left, right, above, below)[RELATIONS.index(scene.relation)]
        assert ("sign" in words) == bool(scene.sign) and (not scene.sign or words[-1] == scene.sign)
        seen.add((len(scene.things), scene.relation, bool(scene.sign)))
    assert len(seen) >= 10


def test_things_of_one_scene_do_not_overlap_nor_hide_behind_the_sign(crowded):
    for scene in crowded[:60]:
        alone = [thing_mask(Scene(scene.background, (thing,))) for thing in scene.things]
        covered = np.sum(alone, axis=0)
        covered[scenes.sign_area(scene)] += 1 if scene.sign else 0
        assert covered.max() == 1, scene.caption


def test_an_edit_of_the_thing_leaves_the_rest_as_it_was(crowded):
    before = crowded[:40]
    after = [replace(scene, things=(replace(scene.things[0], color="blue"),), relation="")
             for scene in before]
    first, mask = scenes.render_scenes(before, np.random.default_rng(7))
    second, _ = scenes.render_scenes(after, np.random.default_rng(7))
    for i in range(len(before)):
        assert not ((first[i] != second[i]).any(axis=-1) & ~grown(mask[i])).any()


def test_an_image_made_alone_equals_the_same_image_in_a_batch():
    sets = [Scene(back, (Thing(kind, "red"),)) for kind in THINGS for back in BACKGROUNDS]
    masks = scenes.render_scenes(sets, np.random.default_rng(0))[1]
    for scene, mask in zip(sets, masks, strict=True):
        assert np.array_equal(mask, thing_mask(scene))


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: Thing("horse", "red"), "unknown thing 'horse'"),
        (lambda: Thing("dog", "mauve"), "unknown colour 'mauve'"),
        (lambda: Thing("dog", "red", facing="up"), "unknown facing 'up'"),
        (lambda: Scene("moon"), "unknown background 'moon'"),
        (lambda: Scene("sky", sign="hello"), "A-Z"),
        (lambda: Scene("sky", sign="TOOLONGWORD"), "up to 7"),
        (lambda: Scene("sky", relation="beside"), "unknown relation 'beside'"),
    ],
)
def test_a_mistake_is_named(mistake, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        mistake()


def test_a_scene_of_nothing_but_a_sign_can_be_drawn():
    image, mask = scenes.render_scenes([Scene("sky", sign="HELLO")], np.random.default_rng(0))
    assert image.shape == (1, 32, 32, 3) and not mask.any()


def test_fifty_thousand_images_take_less_than_a_minute():
    start = time.perf_counter()
    scenes.make(500, seed=9)
    assert time.perf_counter() - start < 3  # typically 0.2 s; a minute for 50,000 is 0.6 s
