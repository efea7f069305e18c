"""The report is one file that needs nothing else, and survives runs with pieces missing; grids and GIFs."""

import base64
import io
import json
import re
import shutil
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from nanogen import UserError
from nanogen.lab import pictures, report

RANDOM = np.random.default_rng(0)
CONFIG = {
    "chapter": "maskgit",
    "data": "cifar10",
    "machine": "two cores <of a laptop>",
    "parameters": 4312345,
    "config": {"width": 192},
    "training": {"lr": 0.002, "seed": 23},
    "class_names": ["lemon", "melon & co"],
}
METRICS = {
    "fd_nano": 106.2213,
    "fd_nano_floor": 1.4142,
    "fd_nano_ceiling": 235.1,
    "class_accuracy": 0.3125,
    "detail": {"recall": 0.4321},
    "seconds_per_picture": 0.0217,
}


def some_pictures(count: int, size: int = 8) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_run(folder, config=CONFIG, metrics=METRICS):
    """A whole run of 2 classes x 3 pictures, with an animation, two sounds and 30 lines of log."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = [{"step": 10 * i, "minutes": i / 10, "loss": 6 - i / 10} for i in range(1, 31)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    images = some_pictures(6)
    pictures.grid(images, columns=3).save(folder / "samples/grid.png")
    pictures.save_gif([some_pictures(6), images], folder / "samples/process.gif", columns=3)
    np.savez(folder / "samples/samples.npz", images=images, labels=np.array([0, 0, 0, 1, 1, 1]))
    for index in range(2):
        with wave.open(str(folder / f"samples/{index:03}.wav"), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(1600))
    return folder


def page_of(*runs, **options) -> str:
    return report.write(list(runs), runs[0].parent / "page.html", **options).read_text(encoding="utf-8")


# ---- the page


def test_groups_of_metrics_that_begin_alike_share_a_table_and_the_rest_stay_out_of_it(tmp_path):
    rate = {"stoi": 0.8642, "mel": 0.61}
    metrics = METRICS | {"at 1": rate | {"lpc": {"stoi": 0.7531}}, "at 2": {"stoi": 0.9753}, "book 1": {"usage": 0.2468}}
    shown = page_of(make_run(tmp_path / "run", metrics=metrics))
    tables = re.findall("<table>.*?</table>", shown, re.S)
    rates, books = (next(t for t in tables if number in t) for number in ("0.8642", "0.2468"))
    assert all(text in rates for text in ("at 1: lpc", "0.7531", "at 2", "0.9753")) and "0.2468" not in rates
    assert "book 1" in books and "0.3125" not in rates + books


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>)\s]+)""", page)
    assert len(links) == 2 + 2 * (3 + 2)  # an anchor each; curve, grid, animation and two sounds each
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?://|<script|<link|@import", page)
    for anchor in (link[1:] for link in links if link.startswith("#")):
        assert page.count(f'id="{anchor}"') == 1


def test_the_page_holds_the_numbers_and_the_pictures_of_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    page = page_of(
        run, title="A <title>", intro="One.\n\nTwo & three.", tables={"More": [{"a": 1, "b": 2.5}]}
    )
    for text in ("106.2", "floor 1.414 · ceiling 235.1", "0.3125", "0.4321", "0.0217", "4,312,345", "300"):
        assert text in page
    for text in (
        "maskgit on cifar10",
        "two cores &lt;of a laptop&gt;",
        "A &lt;title&gt;",
        "<p>Two &amp; three.</p>",
    ):
        assert text in page
    assert "<h2>More</h2>" in page and "<td>2.5</td>" in page
    assert "<span>lemon</span><span>melon &amp; co</span>" in page  # the rows of the grid
    for name in ("samples/grid.png", "samples/process.gif", "samples/001.wav"):
        assert base64.b64encode((run / name).read_bytes()).decode() in page
    assert "<dt>seed</dt><dd>23</dd>" in page and 'class="missing"' not in page and 'class="remark"' not in page


def test_rows_are_named_only_where_each_holds_one_class(tmp_path):
    run = make_run(tmp_path / "run")
    np.savez(run / "samples/samples.npz", images=some_pictures(6), labels=np.array([0, 1, 0, 1, 0, 1]))
    assert "<span>" not in page_of(run)


def test_sounds_are_named_by_their_class(tmp_path):
    run = make_run(tmp_path / "run")
    np.savez(run / "samples/samples.npz", waveforms=np.zeros((2, 800), np.float32), labels=np.array([1, 2]))
    page = page_of(run)
    assert "000: melon &amp; co<" in page and "001: no label<" in page and page.count("<audio controls") == 2


def test_sounds_are_named_by_their_speaker_and_numbers_by_the_place_in_samples(tmp_path):
    run = make_run(tmp_path / "run", CONFIG | {"speaker_names": ["ann", "bob"], "base": {"path": "../codec-fsdd", "hash": "0"}},
                   METRICS | {"speaker_accuracy": 0.8125, "at 2 kbit/s": {"lpc": {"stoi": 0.7654}}})
    (run / "samples/001.wav").rename(run / "samples/003.wav")
    shutil.copy(run / "samples/003.wav", run / "samples/003_codec_2_kbps.wav")
    labels, speakers = np.array([1, 0, 0, 0]), np.array([0, 0, 0, 1])
    np.savez(run / "samples/samples.npz", waveforms=np.zeros((4, 800), np.float32), labels=labels, speakers=speakers)
    page = page_of(run)
    for text in ("000: melon &amp; co, ann<", "003: lemon, bob<", "003 codec 2 kbps<", "0.8125", "at 2 kbit/s: lpc<", "0.7654", "../codec-fsdd"):
        assert text in page


def test_a_run_with_nothing_but_its_config_has_a_page_that_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"chapter": "var", "data": "scenes"}')
    (tmp_path / "run/log.jsonl").write_text("")
    page = page_of(tmp_path / "run")
    for sentence in ("log is empty", "No metrics yet", "No samples yet", "var on scenes"):
        assert sentence in page


def test_damaged_pieces_are_said_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 310, "minu')  # killed as it wrote
    (run / "metrics.json").write_text('{"fd_nano": 1')
    (run / "samples/grid.png").write_bytes(b"not a picture")
    (run / "samples/samples.npz").write_bytes(b"not an archive")
    page = page_of(run)
    for sentence in ("log.jsonl has a damaged line", "metrics.json is damaged", "grid.png is damaged"):
        assert sentence in page
    assert "Loss, at the end 3." in page and "data:image/gif" in page


def test_a_folder_that_is_no_run_and_a_place_that_cannot_be_written_are_refused_in_words(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        report.write([tmp_path], tmp_path / "page.html")
    with pytest.raises(UserError, match="not a run"):
        report.write([tmp_path / "nowhere"], tmp_path / "page.html")
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="Cannot write"):
        report.write([run], run / "config.json" / "page.html")
    assert not (tmp_path / "page.html").exists()


# ---- pictures


def test_every_value_of_a_byte_survives_the_way_to_floats_and_back():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = pictures.to_float(images)
    assert floats.shape == (1, 3, 16, 16) and floats.min() == -1 and floats.max() == 1
    assert (pictures.to_uint8(floats) == images).all()
    assert (pictures.to_uint8(torch.tensor([-9.0, 9.0]).expand(1, 3, 1, 2))[0, 0, :, 0] == [0, 255]).all()


def test_each_picture_of_a_grid_stands_whole_in_its_place_on_white():
    images = some_pictures(5)
    sheet = np.asarray(pictures.grid(images, columns=3, scale=2, pad=1))
    assert sheet.shape == (1 + 2 * (16 + 1), 1 + 3 * (16 + 1), 3)
    for index, image in enumerate(images):
        top, left = 1 + 17 * (index // 3), 1 + 17 * (index % 3)
        assert (sheet[top : top + 16, left : left + 16] == image.repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[0] == 255).all() and (sheet[:, 17] == 255).all()
    assert (sheet[18:, 35:] == 255).all()  # the place of the missing sixth


@pytest.mark.parametrize("images", [some_pictures(2) / 255, some_pictures(2)[0], some_pictures(2)[:0]])
def test_a_grid_of_anything_but_bytes_is_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        pictures.grid(images, columns=2)


def test_an_animation_has_as_many_frames_as_given_and_ends_on_the_finished_pictures(tmp_path):
    frames = [some_pictures(4) for _ in range(5)]
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:250:8j, 0:250:8j], 128), axis=-1)
    frames.append(np.stack([smooth.astype(np.uint8)] * 4))
    path = pictures.save_gif(frames, tmp_path / "a.gif", columns=2, milliseconds=50, hold_last=900)
    with Image.open(path) as animation:
        assert animation.n_frames == 6 and animation.size == (2 + 2 * 18, 2 + 2 * 18)
        durations = []
        for index in range(6):
            animation.seek(index)
            durations.append(animation.info["duration"])
        last = np.asarray(animation.convert("RGB")).astype(int)
    assert durations == [50] * 5 + [900] and animation.info["loop"] == 0
    assert np.abs(last - np.asarray(pictures.grid(frames[-1], 2))).mean() < 6  # of 255: 256 colours must do


def test_the_ground_of_an_animation_stays_white(tmp_path):
    frames = [some_pictures(8) // 2 for _ in range(3)]  # dark, and more colours than a palette has
    with Image.open(pictures.save_gif(frames, tmp_path / "a.gif", columns=4, scale=1)) as animation:
        for index in range(3):
            animation.seek(index)
            assert animation.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_of_nothing_or_of_several_shapes_is_refused(tmp_path):
    for frames in ([], [some_pictures(2), some_pictures(3)]):
        with pytest.raises(ValueError, match="frame"):
            pictures.save_gif(frames, tmp_path / "a.gif", columns=2)


def test_the_loss_plot_is_on_white_and_shows_chance_and_the_finite_losses():
    log = [
        {"step": i, "minutes": i / 2, "loss": loss} for i, loss in enumerate([3.0, 2.0, float("nan"), 1.0])
    ]
    figure = pictures.loss_plot(log + [{"step": 4, "minutes": 2.0}], chance=3.5)
    curve, dashed = figure.axes[0].lines
    assert list(curve.get_xdata()) == [0, 0.5, 1.5] and list(curve.get_ydata()) == [3, 2, 1]
    assert set(dashed.get_ydata()) == {3.5} and figure.axes[0].get_ylim()[1] > 3.5
    with Image.open(io.BytesIO(pictures.png(figure))) as image:
        assert image.format == "PNG" and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert len(pictures.loss_plot([]).axes[0].lines[0].get_xdata()) == 0


def test_importing_the_pictures_leaves_the_plotting_backend_to_the_notebook():
    import subprocess
    import sys

    code = (
        "import matplotlib; matplotlib.use('svg'); import nanogen.lab.report as r; "
        "r.pictures.png(r.pictures.loss_plot([{'step': 1, 'loss': 1.0}])); print(matplotlib.get_backend())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().lower() == "svg"
