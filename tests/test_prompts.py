"""Prompts: the image shows what they ask for, and no training asks for what the test asks for."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from nanogen import UserError
from nanogen.data import prompts
from nanogen.data.datasets import load
from nanogen.data.drawing import BACKGROUNDS, COLORS, KINDS, SUBJECT, THINGS
from nanogen.data.scenes import DIRECTIONS, RELATIONS
from nanogen.reader import read_sign

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def parts():
    return prompts.make(400, seed=0), prompts.make(300, seed=1, held_out=True)


def rows(part, *tasks):
    """The examples of these tasks, or all, with the names of what they show."""
    for i, number in enumerate(part["task"]):
        if (task := list(prompts.TASKS)[number]) in (tasks or prompts.TASKS):
            things = [(KINDS[int(row[0])], COLORS[int(row[1])], *row[2:])
                      for row in part["things"][i] if row[0] >= 0]
            columns = {name[:-1]: part[name][i]
                       for name in ("prompts", "thoughts", "images", "sources", "signs")}
            yield SimpleNamespace(
                **columns, task=task, things=things, names=[thing[:2] for thing in things],
                relation=["", *RELATIONS][part["relation"][i] + 1],
                background=BACKGROUNDS[part["background"][i]])


def both(parts, *tasks):
    return itertools.chain(*(rows(part, *tasks) for part in parts))


@pytest.mark.parametrize(("tasks", "asked"), [
    (("plain", "count"), lambda row: (*row.names[0], row.background)),
    (("relation", "move"), lambda row: frozenset(kind for kind, _ in row.names)),
    (("sign", "write"), lambda row: row.prompt.split()[-1]),
    (("sum", "many"), lambda row: re.search(r"\d[+-]\d", row.prompt)[0]),
], ids=["looks", "pairs", "texts", "sums"])
def test_no_training_asks_for_what_the_test_asks_for(tasks, asked, parts):
    train, test = ({asked(row) for row in rows(part, *tasks)} for part in parts)
    assert len(train) > 20 and len(test) > 2
    assert not train & test


def test_clips_show_what_their_prompts_say_and_those_of_the_test_other_things():
    shown = []
    for held_out, count in ((False, 96), (True, 32)):
        clips = prompts.make_clips(count, seed=int(held_out), held_out=held_out)
        columns = zip(*(clips[key] for key in ("labels", "color", "background")), strict=True)
        looks = [(THINGS[i], COLORS[j], BACKGROUNDS[k]) for i, j, k in columns]
        shown.append(set(looks))
        for prompt, (kind, color, where), way in zip(
                clips["prompts"], looks, clips["direction"], strict=True):
            assert prompt.split()[1:3] == [color, kind] and f" {where} moving " in prompt
            assert prompt.endswith(DIRECTIONS[way])
    assert len(shown[0]) > 50 and len(shown[1]) > 10 and not shown[0] & shown[1]


def test_every_thought_counts_step_by_step_to_the_right_result():
    lengths = []
    for first, sign, second in itertools.product(range(10), "+-", range(10)):
        thought = prompts.thought_about(first, sign, second)
        asked, counted, result = thought.split("=")
        truth, step = {"+": (first + second, 1), "-": (first - second, -1)}[sign]
        assert asked == f"{first}{sign}{second}" and int(result) == truth
        assert [*map(int, re.split("[a-i]", counted))] == [*range(first, truth + step, step)]
        assert re.sub("[0-9-]", "", counted) == "abcdefghi"[:second]
        lengths.append(len(prompts.tokenize(thought)))
    assert max(lengths) == prompts.LONGEST_THOUGHT


def test_a_thought_leads_from_the_sum_in_its_prompt_to_what_the_image_shows(parts):
    for row in both(parts):
        told = prompts.completed(row.prompt, row.thought)
        if row.task not in ("sum", "many"):
            assert row.thought == "" and told == row.prompt
            continue
        asked, _, result = row.thought.split("=")
        value = eval(asked)
        assert 0 <= value <= 18 and asked in row.prompt
        if row.task == "sum":
            assert row.prompt.endswith(f" says {asked}=") and row.sign == f"{asked}={value}"
            assert told.endswith(f" says {row.sign}")
        else:
            assert value == NUMBERS[result] == len(row.things) and told == f"{row.prompt}={result}"


def test_the_image_shows_what_the_prompt_says(parts):
    for row in both(parts, *prompts.TASKS.keys() - set(prompts.EDITS)):
        words, (kind, color) = row.prompt.split(), row.names[0]
        assert row.background in words and ("sign" in words) == bool(row.sign)
        assert not row.source.any()
        plural = kind + "s" * (kind != "fish")
        if row.task == "relation":
            (kind2, color2), relation = row.names[1], row.relation
            assert re.match(f"an? {color} {kind} {relation} an? {color2} {kind2} ", row.prompt)
        elif row.task == "many":
            assert words[:4] == ["as", "many", color, plural]
        else:
            assert NUMBERS[words[0]] == len(row.things) and not row.relation
            assert words[1:3] == [color, plural if len(row.things) > 1 else kind]
        assert row.relation or row.names == row.names[:1] * len(row.names)
        assert row.task != "sign" or row.sign == words[-1]


def test_an_edited_image_shows_what_was_told_and_the_rest_as_it_was(parts):
    for row in both(parts, *prompts.EDITS):
        words, kinds = row.prompt.split(), [kind for kind, _ in row.names]
        before = read_sign(row.source)
        assert {
            "color": tuple(words[2:]) in row.names, "kind": kinds == words[-1:] != words[2:3],
            "away": before and not row.sign, "write": not before and row.sign == words[-1],
            "move": row.prompt == f"put the {kinds[0]} {row.relation} the {kinds[-1]}",
        }[row.task], row.prompt
        may_change = np.zeros((32, 32), dtype=bool)
        may_change[22:31, : 4 * len(before or row.sign) + 3] = row.task in ("away", "write")
        half = max(thing[4] for thing in row.things) / 2
        for kind, _, x, y, _ in row.things:
            if kind in words:
                top, left = (max(int(centre - half - 1), 0) for centre in (y, x))
                may_change[top : int(y + half + 2), left : int(x + half + 2)] = True
        changed = (row.image != row.source).any(-1)
        assert changed.sum() > 20 and not (changed & ~may_change).any(), row.prompt


def test_all_that_is_ever_said_is_in_the_vocabulary_and_comes_back(parts):
    rare = prompts.TOKENS[prompts.RARE]
    said = [text for row in both(parts) for text in (
        row.prompt, row.thought, prompts.completed(row.prompt, row.thought))]
    for text in said + prompts.make_clips(32)["prompts"]:
        tokens = prompts.tokenize(text)
        assert prompts.detokenize(tokens) == text.replace(" ", "")
        assert all(prompts.START < token < prompts.VOCABULARY for token in tokens)
        assert rare not in tokens
    assert all(prompts.tokenize(text)[1] == rare for text in prompts.make_subject(5)["prompts"])


def test_a_prompt_may_begin_with_a_capital_and_an_unknown_word_is_named_in_one_sentence():
    assert prompts.tokenize("A red Dog, on grass.") == prompts.tokenize("a red dog on grass")
    assert [prompts.WORDS[token - 2] for token in prompts.tokenize("CAT 12")] == [*"CAT12"]
    with pytest.raises(UserError, match="never saw: horse, moon. It knows .*dog") as caught:
        prompts.tokenize("a red horse on the moon, a horse")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("make", "many"), [
    (prompts.make, 101), (prompts.make_things, 101), (prompts.make_clips, 33)])
def test_a_small_set_is_the_beginning_of_a_larger_one(make, many):
    small, large = make(5, seed=3), make(many, seed=3)
    for key, values in small.items():
        assert len(values) == 5 and len(large[key]) == many
        assert np.array_equal(values, large[key][:5]), key


@pytest.mark.parametrize(("name", "column"), [
    ("prompts", "sources"), ("things", "signs"), ("clips", "direction"), ("subject", "prompts")])
def test_every_data_set_made_from_prompts_is_loaded_by_its_name(name, column):
    data = load(name, count=100)
    frames = (8,) if name == "clips" else ()
    for part, count in ((data.train, 100), (data.test, 10)):
        assert part[data.main].shape == (count, *frames, 32, 32, 3) and len(part[column]) == count
        shown = {data.names["labels"][label] for label in part["labels"]}
        assert SUBJECT not in shown or name in ("subject", "things")
