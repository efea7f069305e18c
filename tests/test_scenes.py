"""The scenes say the truth about themselves: every score of the later chapters stands on that."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogen import UserError
from nanogen.data import scenes
from nanogen.data.scenes import BACKGROUNDS, COLORS, FACINGS, RELATIONS, THINGS, Scene, Thing


@pytest.fixture(scope="module")
def pictures():
    return scenes.make(2000, seed=0)


@pytest.fixture(scope="module")
def captioned():
    return scenes.make_captioned(300, seed=0)


@pytest.fixture(scope="module")
def clips():
    return scenes.make_clips(64, seed=0, frames=6)


def grown(mask):
    """The mask and every pixel that touches it."""
    padded = np.pad(mask, 1)
    shifts = [padded[1 + dy : 33 + dy, 1 + dx : 33 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.any(shifts, axis=0)


def test_a_seed_gives_the_same_pictures_and_another_seed_others(pictures):
    again, other = scenes.make(20, seed=0), scenes.make(20, seed=1)
    for key, values in again.items():
        assert np.array_equal(values, pictures[key][:20]), key  # nor does count matter
    assert not np.array_equal(again["images"], other["images"])
    assert not np.array_equal(again["labels"], other["labels"])


@pytest.mark.parametrize("make, many", [(scenes.make_captioned, 110), (scenes.make_clips, 40)])
def test_a_small_set_is_the_beginning_of_a_larger_one(make, many):
    small, large = make(5, seed=3), make(many, seed=3)
    for key, values in small.items():
        assert len(values) == 5 and len(large[key]) == many
        assert np.array_equal(values, large[key][:5]), key


def test_shapes_types_and_ranges(pictures):
    n = len(pictures["labels"])
    assert pictures["images"].shape == (n, 32, 32, 3) and pictures["images"].dtype == np.uint8
    assert pictures["mask"].shape == (n, 32, 32) and pictures["mask"].dtype == bool
    for key, names in [
        ("labels", THINGS),
        ("background", BACKGROUNDS),
        ("color", COLORS),
        ("facing", FACINGS),
    ]:
        assert pictures[key].dtype == np.int64
        assert set(pictures[key]) == set(range(len(names))), key
    assert pictures["place"].dtype == pictures["size"].dtype == np.float32
    assert pictures["place"].shape == (n, 2)
    reach = pictures["size"][:, None] / 2
    assert (pictures["place"] - reach >= 0).all() and (pictures["place"] + reach <= 32).all()
    share = pictures["mask"].mean(axis=(1, 2))
    assert share.min() > 0.08 and share.max() < 0.6


def test_the_background_says_nothing_about_the_thing_nor_the_colour(pictures):
    for one, other in [
        ("labels", "background"),
        ("labels", "color"),
        ("background", "color"),
        ("labels", "facing"),
    ]:
        table = np.zeros((pictures[one].max() + 1, pictures[other].max() + 1))
        np.add.at(table, (pictures[one], pictures[other]), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        chi_square = ((table - expected) ** 2 / expected).sum()
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom), (one, other)  # 4 standard deviations
        assert expected.min() > 15


@pytest.mark.parametrize("kind", THINGS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_mask_is_what_changes_when_the_thing_is_removed(kind, background):
    for color in COLORS:
        scene = Scene(background, (Thing(kind, color, size=18, x=15.3, y=16.6, facing="left"),))
        difference = scenes.render(scene, seed=1) != scenes.render(replace(scene, things=()), seed=1)
        changed, mask = difference.any(axis=-1), scenes.thing_mask(scene)
        assert changed[mask].mean() > 0.99
        assert not (changed & ~grown(mask)).any()


def test_every_thing_stands_out_from_every_background():
    """In its own colours and by its outline: on average a tenth of the range away from what it hides."""
    shown = [Scene(b, (Thing(kind, color),)) for b in BACKGROUNDS for kind in THINGS for color in COLORS]
    picture, mask = scenes.render_scenes(shown, np.random.default_rng(0))
    empty, _ = scenes.render_scenes([replace(scene, things=()) for scene in shown], np.random.default_rng(0))
    contrast = np.abs(picture.astype(float) - empty).mean(axis=-1)
    for i, scene in enumerate(shown):
        assert contrast[i][mask[i]].mean() > 25, scene.caption


@pytest.mark.parametrize("kind", range(len(THINGS)), ids=THINGS)
def test_facing_left_is_the_mirror_image_of_facing_right(kind):
    canvas, both = np.zeros((2, 32, 32, 3), dtype=np.float32), np.ones(2, dtype=int)
    scenes.draw_things(canvas, kind * both, 0 * both, 20 * both, 16 * both, 16 * both, np.array([0, 1]))
    left, right = canvas
    assert np.allclose(left, right[:, ::-1], atol=1e-4)
    assert np.abs(left - right).max() > 0.15  # and anybody can tell which is which


def test_the_text_changes_only_the_sign():
    scene = Scene("city", (Thing("cat", "red", size=16, y=11),), sign="CAT")
    first, second = scenes.render(scene), scenes.render(replace(scene, sign="DOG"))
    bare = scenes.render(replace(scene, sign=""))
    area = np.zeros((32, 32), dtype=bool)
    area[scenes.sign_area(scene)] = True
    assert (first != second).any()
    assert not (first != second).any(axis=-1)[~area].any()
    assert np.array_equal(first[~area], bare[~area]) and (first != bare).any(axis=-1)[area].mean() > 0.99
    assert area.sum() == 9 * 15


@settings(max_examples=30, deadline=None)
@given(text=st.text(alphabet=sorted(scenes.FONT), min_size=1, max_size=scenes.MAX_TEXT))
def test_the_sign_can_be_read_back_pixel_by_pixel(text):
    scene = Scene("sea", sign=text)
    board = scenes.render(scene)[scenes.sign_area(scene)]
    dark = board[2:7, 2:-1].max(axis=-1) < 64
    glyphs = {tuple(int(row) for row in rows): letter for letter, rows in scenes.FONT.items()}
    assert len(glyphs) == len(scenes.FONT)  # no two letters look alike
    read = [tuple(dark[:, 4 * i : 4 * i + 3] @ [4, 2, 1]) for i in range(len(text))]
    assert "".join(glyphs[rows] for rows in read) == text


def test_clips_move_by_their_velocity_over_a_still_background(clips):
    rows, columns = np.mgrid[0:32, 0:32] + 0.5
    frames = clips["videos"].shape[1]
    for i in range(len(clips["videos"])):
        centroids = np.array([[columns[mask].mean(), rows[mask].mean()] for mask in clips["mask"][i]])
        moved = (centroids[-1] - centroids[0]) / (frames - 1)
        assert np.abs(moved - clips["velocity"][i]).max() < 0.12
        assert np.allclose(np.diff(clips["place"][i], axis=0), clips["velocity"][i], atol=1e-4)
        free = ~np.any([grown(mask) for mask in clips["mask"][i]], axis=0)
        assert (clips["videos"][i][:, free] == clips["videos"][i][0, free]).all()


def test_clips_stay_in_the_picture_and_say_where_they_go(clips):
    reach = clips["size"][:, None, None] / 2
    assert (clips["place"] - reach >= 0).all() and (clips["place"] + reach <= 32).all()
    for velocity, facing, caption in zip(clips["velocity"], clips["facing"], clips["captions"], strict=True):
        axis = np.abs(velocity).argmax()
        assert caption.endswith(
            "moving " + (("left", "right"), ("up", "down"))[axis][int(velocity[axis] > 0)]
        )
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
    assert replace(house, sign="3+4=7", says="3+4=").caption.endswith("that says 3+4=")


def test_captions_name_the_truth(captioned):
    seen = set()
    for i, scene in enumerate(captioned["scenes"]):
        words, first = captioned["captions"][i].split(), scene.things[0]
        assert first.color in words and scene.background in words
        assert (THINGS[captioned["labels"][i]], COLORS[captioned["color"][i]]) == (first.kind, first.color)
        assert BACKGROUNDS[captioned["background"][i]] == scene.background
        assert captioned["count"][i] == len(scene.things)
        if len(scene.things) > 1 and not scene.relation:
            assert words[0] == {2: "two", 3: "three", 4: "four"}[len(scene.things)]
        if scene.relation:
            one, other = scene.things
            assert f"{one.kind} {scene.relation} a" in captioned["captions"][i] and other.kind in words
            holds = (one.x < other.x - 8, one.x > other.x + 8, one.y < other.y - 8, one.y > other.y + 8)
            assert holds[RELATIONS.index(scene.relation)]
        assert ("sign" in words) == bool(scene.sign) and (not scene.sign or words[-1] == scene.sign)
        seen.add((len(scene.things), scene.relation, bool(scene.sign)))
    assert len(seen) >= 10


def test_things_of_one_scene_do_not_overlap_nor_hide_behind_the_sign(captioned):
    for scene in captioned["scenes"][:60]:
        alone = [scenes.thing_mask(Scene(scene.background, (thing,))) for thing in scene.things]
        covered = np.sum(alone, axis=0)
        covered[scenes.sign_area(scene)] += 1 if scene.sign else 0
        assert covered.max() == 1, scene.caption


def test_an_edit_of_the_thing_leaves_the_rest_as_it_was(captioned):
    before = captioned["scenes"][:40]
    after = [
        replace(scene, things=(replace(scene.things[0], color="blue"),), relation="") for scene in before
    ]
    first, mask = scenes.render_scenes(before, np.random.default_rng(7))
    second, _ = scenes.render_scenes(after, np.random.default_rng(7))
    for i in range(len(before)):
        assert not ((first[i] != second[i]).any(axis=-1) & ~grown(mask[i])).any()


def test_a_picture_made_alone_equals_the_same_picture_in_a_batch():
    sets = [Scene(back, (Thing(kind, "red"),)) for kind in THINGS for back in BACKGROUNDS]
    masks = scenes.render_scenes(sets, np.random.default_rng(0))[1]
    for scene, mask in zip(sets, masks, strict=True):
        assert np.array_equal(mask, scenes.thing_mask(scene))


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: Thing("horse", "red"), "unknown thing 'horse'"),
        (lambda: Thing("dog", "mauve"), "unknown colour 'mauve'"),
        (lambda: Thing("dog", "red", facing="up"), "unknown facing 'up'"),
        (lambda: Thing("dog", "red", size=200), "size"),
        (lambda: Scene("moon"), "unknown background 'moon'"),
        (lambda: Scene("sky", sign="hello"), "A-Z"),
        (lambda: Scene("sky", sign="TOOLONGWORD"), "up to 7"),
        (lambda: Scene("sky", (Thing("dog", "red"),), relation="above"), "2 with a relation"),
        (lambda: Scene("sky", (Thing("dog", "red"), Thing("cat", "red"))), "need a relation"),
        (lambda: Scene("sky", (Thing("dog", "red"),) * 5), "up to 4"),
        (lambda: scenes.make(0), "at least 1"),
        (lambda: scenes.make_clips(2, frames=1), "at least 2 frames"),
        (lambda: scenes.random_scene(np.random.default_rng(0), count=5), "1 to 4"),
        (lambda: scenes.random_scene(np.random.default_rng(0), count=3, sign=True), "at most 2"),
        (lambda: scenes.random_scene(np.random.default_rng(0), relation="inside"), "unknown relation"),
    ],
)
def test_a_mistake_is_named(mistake, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        mistake()


def test_a_scene_of_nothing_but_a_sign_can_be_drawn():
    picture, mask = scenes.render_scenes([Scene("sky", sign="HELLO")], np.random.default_rng(0))
    assert picture.shape == (1, 32, 32, 3) and not mask.any()


def test_fifty_thousand_pictures_take_less_than_a_minute():
    start = time.perf_counter()
    scenes.make(500, seed=9)
    assert time.perf_counter() - start < 3  # 0.2 s where it was written; a minute for 50,000 is 0.6 s
