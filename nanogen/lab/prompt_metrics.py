"""Metrics of images and clips that were asked for in words: does a drawing show what was asked?

The reader (nanogen/reader.py) describes an image; the description is compared with the truth about
the prompt, which came with it. Test images go the same way, to show what the reader itself misses.
"""

from collections import Counter

import numpy as np

from nanogen.data.datasets import Dataset
from nanogen.data.drawing import BACKGROUNDS, COLORS, KINDS, SUBJECT
from nanogen.data.prompts import EDITS, RARE, TASKS
from nanogen.data.scenes import WHERE
from nanogen.lab import machine
from nanogen.lab.plots import to_float, to_uint8
from nanogen.lab.prepare import encode_text, every
from nanogen.lab.runs import Run, load_run
from nanogen.lab.sample import ask, sample, timed_sample, write_samples
from nanogen.reader import Reader, read_sign


def evaluate_prompts(run: Run, dataset: Dataset, reader: Reader, n: int, seed: int,
                     settings: dict) -> dict:
    """How well the outputs obey n prompts of the test data; each asks for something held out."""
    chosen = every(n, len(dataset.test[dataset.main]))
    test = {name: np.array([values[i] for i in chosen]) for name, values in dataset.test.items()}
    if "task" not in test and dataset.kind == "images":  # a subject: prompts are made here
        background = np.arange(n) % len(BACKGROUNDS)
        test = {"prompts": [f"a {RARE} {WHERE[BACKGROUNDS[i]]}" for i in background]}
    asked = {name: list(test[name]) for name in run.model.conditions if name in test}
    drawn, result = timed_sample(run, len(test["prompts"]), asked, seed, batch_size=100, **settings)
    if "task" in test:
        result |= judge_prompts(drawn["images"], drawn["thoughts"], test, reader)
    elif dataset.kind == "videos":
        result |= evaluate_clips(run, drawn["videos"], test, reader, seed, settings)
    else:
        if "things" in dataset.test:  # the subject that the reader knows
            result |= judge_subject(drawn["images"], background, reader)
        result |= compare_with_base(run, reader, n, seed, settings)
    write_samples(drawn, run, run.folder / "samples")
    return result


def evaluate_clips(run: Run, videos: np.ndarray, test: dict, reader: Reader, seed: int,
                   settings: dict) -> dict:
    """Metrics of clips from texts, of test clips, and of clips that go on from two test frames."""
    first, goes_on = test["videos"][:, :2], []
    settings = run.record["sampling"] | settings
    for i in range(0, len(first), 100):
        known = to_float(first[i : i + 100]).to(machine.device())
        prompts = encode_text(list(test["prompts"][i : i + 100])).to(known.device)
        drawn = ask(run, run.model.sample, {"prompts": prompts, "sources": known[:, 0]},
                    known=known, seed=seed + i, **settings)
        goes_on.append(to_uint8(drawn["videos"]))
    return judge_clips(videos, test, reader) | {
        "test_clips": judge_clips(test["videos"], test, reader),
        "from_two_frames": judge_clips(np.concatenate(goes_on), test, reader)}


def compare_with_base(run: Run, reader: Reader, n: int, seed: int, settings: dict) -> dict:
    """How well a run and the run that it is built on draw n test prompts with one thing each."""
    base, result = load_run(run.folder / "base"), {}
    test = base.dataset().test
    rows = np.flatnonzero(test["task"] == 0)[:n]
    test = {name: values[rows] for name, values in test.items()}
    settings = run.record["sampling"] | settings
    for name, which in (("others", run), ("others_by_base", base)):
        drawn = sample(which, len(rows), {"prompts": list(test["prompts"])}, seed, batch_size=100,
                       **settings)
        result[name] = obeyed(drawn["images"], test, reader)["things"].mean().item()
    return result


def read(reader: Reader, images: np.ndarray) -> tuple[list, list]:
    """`Reader.read` of images uint8 (N, 32, 32, 3), in batches."""
    things, backgrounds = [], []
    for i in range(0, len(images), 500):
        found = reader.read(to_float(images[i : i + 500]).to(machine.device()))
        things, backgrounds = things + found[0], backgrounds + found[1]
    return things, backgrounds


def obeyed(images: np.ndarray, truth: dict, reader: Reader) -> dict[str, np.ndarray]:
    """What is right in each image, bool (N,): "things", all of them in kind and color, no more and
    no fewer; "count", "kind", "color", "background", "relation" (true where none is asked), "sign"
    (its whole text); "all" of these. truth: columns as `prompts.describe` gives them."""
    found, backgrounds = read(reader, images)
    right = {name: [] for name in ("count", "kind", "color", "things", "relation", "sign")}
    for image, seen, rows, relation, sign in zip(
            images, found, truth["things"], truth["relation"], truth["signs"], strict=True):
        wanted = [tuple(row[:2].astype(int)) for row in rows if row[0] >= 0]
        drawn = [(kind, color) for kind, color, *_ in seen]
        right["count"].append(len(drawn) == len(wanted))
        for name, column in (("kind", 0), ("color", 1)):
            right[name].append(Counter(pair[column] for pair in drawn)
                               == Counter(pair[column] for pair in wanted))
        right["things"].append(Counter(drawn) == Counter(wanted))
        right["relation"].append(relation < 0 or related(seen, wanted, relation))
        right["sign"].append(read_sign(image) == str(sign))
    right = {name: np.array(values) for name, values in right.items()}
    right["background"] = np.array(backgrounds) == truth["background"]
    return right | {"all": np.logical_and.reduce(list(right.values()))}


def related(seen: list[tuple], wanted: list[tuple], relation: int) -> bool:
    """Whether the first wanted (kind, color) is where the relation says, seen from the second."""
    places = {(kind, color): (x, y) for kind, color, x, y in seen}
    if len(seen) != 2 or not set(wanted) <= places.keys():
        return False
    first, second = (np.array(places[name]) for name in wanted)
    gap = (second - first)[relation // 2]  # the first two of RELATIONS are along x
    return (-gap if relation % 2 else gap) > 4  # pixels


def judge_prompts(images: np.ndarray, thoughts: np.ndarray, test: dict, reader: Reader) -> dict:
    """Fractions right of images uint8 (N, 32, 32, 3) drawn for N test examples, by task, and those
    of the test images; of signs also by length, and of edits the PSNR of what should stay. A sum is
    right if its "sign" is, "many" if the "count" is. Where there is nothing to work out, only an
    empty thought is right."""
    sides = {"": obeyed(images, test, reader), "_real": obeyed(test["images"], test, reader)}
    names, lengths = np.array(list(TASKS))[test["task"]], np.char.str_len(test["signs"])
    groups = {name: names == name for name in TASKS}
    groups |= {"looks": np.isin(names, ("plain", "count")), "edits": np.isin(names, EDITS),
               "short sign": groups["sign"] & (lengths <= 3),  # one to three letters, or more
               "long sign": groups["sign"] & (lengths > 3)}
    result = {f"{name}{suffix}": {"n": int(rows.sum())} | {
        key: values[rows].mean().item() for key, values in right.items()}
        for suffix, right in sides.items() for name, rows in groups.items() if rows.any()}
    if (edited := groups["edits"]).any():
        stays = (test["sources"] == test["images"]).all(-1)[edited]  # (edits, 32, 32)
        error = np.square((images[edited].astype(float) - test["images"][edited]) / 255).mean(-1)
        error = (error * stays).sum((1, 2)) / stays.sum((1, 2)).clip(1)
        result["edits"]["psnr_of_the_rest"] = (-10 * np.log10(error.clip(1e-10))).mean().item()
    return result | {"thoughts_right": (np.array(thoughts) == test["thoughts"]).mean().item()}


def judge_subject(images: np.ndarray, background: np.ndarray, reader: Reader) -> dict:
    """Fractions of images (N, 32, 32, 3) whose only thing is the subject of the data set "subject";
    which also has its color; whose background is the one asked for (N,)."""
    things, backgrounds = read(reader, images)
    there = np.array([[kind for kind, *_ in seen] == [KINDS.index(SUBJECT)] for seen in things])
    color = np.array([[color for _, color, *_ in seen] == [COLORS.index("purple")]
                      for seen in things])
    return {"subject": there.mean().item(), "subject_in_its_color": (there & color).mean().item(),
            "background": (np.array(backgrounds) == background).mean().item()} | {
        f"subject_{WHERE[name]}": there[background == i].mean().item()
        for i, name in enumerate(BACKGROUNDS) if (background == i).any()}


def judge_clips(videos: np.ndarray, test: dict, reader: Reader) -> dict:
    """Fractions right of clips uint8 (N, T, 32, 32, 3) for N test examples: of all frames ("thing",
    alone, in kind and color; "background"), of whole clips ("thing_in_all_frames"), and of their
    motion: within 45 degrees of the direction asked for; less than half a pixel off a straight line
    at constant speed (root mean square); and the speed, compared with the test clip's."""
    count, frames = videos.shape[:2]
    found, backgrounds = read(reader, videos.reshape(-1, *videos.shape[2:]))
    wanted = np.stack([test["labels"], test["color"]], axis=1).repeat(frames, axis=0).tolist()
    right = np.array([[list(place[:2]) for place in seen] == [want]
                      for seen, want in zip(found, wanted, strict=True)]).reshape(count, frames)
    places = np.array([seen[0][2:] if seen else (np.nan,) * 2 for seen in found])
    places, frame = places.reshape(count, frames, 2), np.arange(frames)
    errors = []  # from a straight line, of the direction, of the speed
    for path, angle, velocity in zip(places, test["direction"] * np.pi / 2, test["velocity"],
                                     strict=True):
        seen = ~np.isnan(path[:, 0])
        if seen.sum() < 3:
            errors.append((99, np.pi, 1))
            continue
        slope, start = np.polyfit(frame[seen], path[seen], 1)
        off = path[seen] - (start + slope * frame[seen][:, None])
        turned = np.arctan2(slope[1], slope[0]) - angle
        errors.append((np.sqrt(np.square(off).sum(1).mean()),
                       abs((turned + np.pi) % (2 * np.pi) - np.pi),
                       abs(np.linalg.norm(slope) / np.linalg.norm(velocity) - 1)))
    line, angle, speed = np.array(errors).T
    background = np.array(backgrounds).reshape(count, frames) == test["background"][:, None]
    return {"thing": right.mean().item(), "thing_in_all_frames": right.all(1).mean().item(),
            "background": background.mean().item(),
            "direction": (angle < np.pi / 4).mean().item(),
            "straight": (line < 0.5).mean().item(),
            "pixels_off_a_line": float(np.median(line)),
            "speed_within_10%": (speed < 0.1).mean().item()}
