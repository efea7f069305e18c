"""The report is one file that needs no other, also for runs with missing parts; grids, GIFs and
figures."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from nanogen import UserError
from nanogen.lab import plots, report
from nanogen.lab.runs import load_run

sys.path.append(str(Path(__file__).parents[1] / "docs"))
import figures  # noqa: E402

RANDOM = np.random.default_rng(0)
CONFIG = {
    "method": "maskgit",
    "data": {"name": "cifar10", "origin": "cifar10", "kind": "images"},
    "machine": "two cores <of a laptop>",
    "parameters": 4312345,
    "config": {"width": 192},
    "training": {"lr": 0.002, "seed": 23},
    "names": {"labels": ["lemon", "melon & co"], "speakers": ["ann", "bob"]},
}
METRICS = {
    "fd_nano": 106.2213,
    "fd_nano_floor": 1.4142,
    "fd_nano_ceiling": 235.1,
    "class_accuracy": 0.3125,
    "detail": {"recall": 0.4321},
    "seconds_per_image": 0.0217,
}


def some_images(count: int, size: int = 8) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def make_run(folder, config=CONFIG, metrics=METRICS):
    """A whole run of 2 classes x 3 images, with an animation, two sounds and 30 lines of log."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = [{"step": 10 * i, "minutes": i / 10, "loss": 6 - i / 10} for i in range(1, 31)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    images = some_images(6)
    plots.grid(images, columns=3).save(folder / "samples/grid.png")
    plots.save_gif([some_images(6), images], folder / "samples/process.gif", columns=3)
    save_conditions(folder, images=images, labels=[0, 0, 0, 1, 1, 1])
    for index in range(2):
        soundfile.write(folder / f"samples/{index:03}.wav", np.zeros(800), 8000)
    return folder


def save_conditions(folder, **arrays) -> None:
    arrays = {name: np.array(values) for name, values in arrays.items()}
    np.savez(folder / "samples/samples.npz", **arrays)


def page_of(*runs, **options) -> str:
    page = report.write(list(runs), runs[0].parent / "page.html", **options)
    return page.read_text(encoding="utf-8")


# ---- the page


def opening(page: str) -> str:
    """The part of a page above its tables."""
    return page.split("<h2>What they drew</h2>")[1].split("<h2>All runs</h2>")[0]


def test_the_page_opens_with_one_sample_of_each_label_and_a_sentence(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    image = some_images(1)
    save_conditions(runs[1], images=image, labels=[1])  # nothing was drawn for the first label
    shown = opening(page_of(*runs, stories={"a": "A & b."}, intro="Trained on a laptop."))
    assert re.findall("<span.*?>(.*?)<", shown) == ["lemon"] * 5 + ["melon &amp; co"] * 5  # once
    assert "<p>A &amp; b.</p>" in shown and "<p>MaskGIT: all tokens at once, the surest" in shown
    assert re.findall('grid-column: (.*?)"', shown) == [*"123678", "6"]
    assert f'grid-column: 6" class="pixels" src="{report.image_uri(image[0])}"' in shown
    assert shown.rindex("Trained on a laptop.") > shown.rindex("<img")


def test_a_tokenizer_opens_with_originals_above_reconstructions(tmp_path):
    run = make_run(tmp_path / "run", CONFIG | {"method": "tokenizer", "config": {"size": 8}})
    (run / "samples/samples.npz").unlink()
    images = some_images(12)
    plots.grid(images, columns=3).save(run / "samples/grid.png")
    shown = opening(page_of(run))
    assert [shown.count(f'alt="{text}"') for text in ("original", "reconstruction")] == [3, 3]
    assert all((report.image_uri(image) in shown) == (i < 6) for i, image in enumerate(images))


def test_a_codec_opens_with_each_original_beside_its_copy_of_the_highest_bit_rate(tmp_path):
    run = make_run(tmp_path / "run", CONFIG | {"method": "codec"})
    for path in [*run.glob("samples/0*.wav"), run / "samples/samples.npz"]:
        path.unlink()
    for number in range(5):
        for name in ("original", "codec_0.5_kbps", "codec_4_kbps", "mu-law_4_kbps"):
            clip = 0.1 * RANDOM.standard_normal(900)
            soundfile.write(run / f"samples/{number:03}_{name}.wav", clip, 8000)
    shown = page_of(run).split("<h2>What they said</h2>")[1].split("<h2>All runs</h2>")[0]
    captions = re.findall("<figcaption>(.*?)</figcaption>", shown)
    assert captions == ["original", "codec 4 kbps"] * 3
    played = [base64.b64encode(path.read_bytes()).decode() in shown
              for path in sorted(run.glob("samples/*_original.wav"))]
    assert played == [True, False, True, False, True]


def test_groups_of_metrics_that_begin_alike_share_a_table_and_the_rest_stay_out_of_it(tmp_path):
    rate = {"stoi": 0.8642, "mel": 0.61}
    metrics = METRICS | {"at 1": rate | {"lpc": {"stoi": 0.7531}}, "at 2": {"stoi": 0.9753},
                         "codebook 1": {"usage": 0.2468}}
    shown = page_of(make_run(tmp_path / "run", metrics=metrics))
    tables = re.findall("<table>.*?</table>", shown, re.S)
    rates, codebooks = (next(t for t in tables if number in t) for number in ("0.8642", "0.2468"))
    assert all(text in rates for text in ("at 1: lpc", "0.7531", "at 2", "0.9753"))
    assert "0.2468" not in rates
    assert "codebook 1" in codebooks and "0.3125" not in rates + codebooks


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>)\s]+)""", page)
    assert len(links) == 2 * (2 + 6 + 3 + 2)  # anchors, strip; curve, grid, animation, two sounds
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?://|<script|<link|@import", page)
    for anchor in (link[1:] for link in links if link.startswith("#")):
        assert page.count(f'id="{anchor}"') == 1


def test_the_page_holds_the_metrics_and_the_images_of_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"a": 1, "b": 2.5}, {"a": "<b>"}]
    page = page_of(run, title="A <title>", intro="One.\n\nTwo & three.", tables={"More": rows})
    for text in ("106.2", "floor 1.414 · ceiling 235.1", "0.3125", "0.4321", "0.0217", "4,312,345",
                 "300", "maskgit on cifar10", "two cores &lt;of a laptop&gt;",
                 "A &lt;title&gt;", ">Two &amp; three.</p>"):
        assert text in page
    assert "<h2>More</h2>" in page and "<td>2.5</td>" in page
    assert "<td>&lt;b&gt;</td><td>–</td>" in page
    assert "Samples, in this order: lemon, melon &amp; co.<" in page
    for name in ("samples/grid.png", "samples/process.gif", "samples/001.wav"):
        assert base64.b64encode((run / name).read_bytes()).decode() in page
    assert "<dt>seed</dt><dd>23</dd>" in page
    assert 'class="missing"' not in page


def test_sounds_are_named_by_what_was_asked_and_numbered_as_in_samples_npz(tmp_path):
    config = CONFIG | {"requires": {"name": "codec-fsdd", "hash": "0"}}
    metrics = METRICS | {"speaker_accuracy": 0.8125, "at 2 kbit/s": {"lpc": {"stoi": 0.7654}}}
    run = make_run(tmp_path / "run", config, metrics)
    (run / "samples/001.wav").rename(run / "samples/003.wav")
    shutil.copy(run / "samples/003.wav", run / "samples/003_codec_2_kbps.wav")
    save_conditions(run, waveforms=np.zeros((4, 800)), labels=[1, 0, 0, 2], speakers=[0, 0, 0, 1])
    page = page_of(run)
    for text in ("000: melon &amp; co, ann<", "003: null class, bob<", "003 codec 2 kbps<",
                 "0.8125", "at 2 kbit/s: lpc<", "0.7654", "<dd>codec-fsdd<"):
        assert text in page
    save_conditions(run, prompts=["a red dog", "four <birds>"])
    assert "000: a red dog<" in page_of(run) and "four &lt;birds&gt;." in page_of(run)


def test_of_many_sounds_some_can_be_played_and_the_page_says_where_the_rest_lies(tmp_path):
    run = make_run(tmp_path / "run")
    for index in range(1, 30):
        shutil.copy(run / "samples/000.wav", run / f"samples/{index:03}.wav")
    page = page_of(run)
    assert page.count("<audio controls") == 24 and "6 more sounds lie in" in page


def test_a_run_with_nothing_but_its_config_has_a_page_that_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    config = {"method": "var", "data": CONFIG["data"]}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    (tmp_path / "run/log.jsonl").write_text("")
    page = page_of(tmp_path / "run")
    for sentence in ("log is empty", "No metrics yet", "No samples yet", "var on cifar10"):
        assert sentence in page


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "metrics.json", "samples/grid.png",
                                  "samples/samples.npz"])
def test_a_damaged_file_is_named(name, tmp_path):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(b'{"step": 310, "minu')
    with pytest.raises(UserError, match=name):
        page_of(run)


def test_a_folder_without_a_run_and_a_place_that_cannot_be_written_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run"):
            report.write([folder], tmp_path / "page.html")
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="Cannot make the folder"):
        report.write([run], run / "config.json" / "page.html")
    assert not (tmp_path / "page.html").exists()


# ---- images


def test_every_value_of_a_byte_survives_the_way_to_floats_and_back():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = plots.to_float(images)
    assert floats.shape == (1, 3, 16, 16) and floats.min() == -1 and floats.max() == 1
    assert (plots.to_uint8(floats) == images).all()
    outside = torch.tensor([-9.0, 9.0]).expand(1, 3, 1, 2)
    assert (plots.to_uint8(outside)[0, 0, :, 0] == [0, 255]).all()


def test_each_image_of_a_grid_is_whole_and_stands_on_white():
    images = some_images(5)
    sheet = np.asarray(plots.grid(images, columns=3, scale=2, pad=1))
    assert sheet.shape == (1 + 2 * (16 + 1), 1 + 3 * (16 + 1), 3)
    for index, image in enumerate(images):
        top, left = 1 + 17 * (index // 3), 1 + 17 * (index % 3)
        assert (sheet[top : top + 16, left : left + 16] == image.repeat(2, 0).repeat(2, 1)).all()
    assert (sheet[0] == 255).all() and (sheet[:, 17] == 255).all()
    assert (sheet[18:, 35:] == 255).all()  # where a sixth would be


def test_an_animation_has_as_many_frames_as_given_and_ends_on_the_finished_images(tmp_path):
    frames = [some_images(4) for _ in range(5)]
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:250:8j, 0:250:8j], 128), axis=-1)
    frames.append(np.stack([smooth.astype(np.uint8)] * 4))
    path = plots.save_gif(frames, tmp_path / "a.gif", columns=2, milliseconds=50)
    with Image.open(path) as animation:
        assert animation.n_frames == 6 and animation.size == (2 + 2 * 18, 2 + 2 * 18)
        durations = []
        for index in range(6):
            animation.seek(index)
            durations.append(animation.info["duration"])
        last = np.asarray(animation.convert("RGB")).astype(int)
    assert durations == [50] * 5 + [2000] and animation.info["loop"] == 0
    difference = np.abs(last - np.asarray(plots.grid(frames[-1], 2)))
    assert difference.mean() < 6  # of 255, with a palette of 256 colours


def test_the_background_of_an_animation_stays_white(tmp_path):
    frames = [some_images(8) // 2 for _ in range(3)]  # dark, and more colours than a palette has
    with Image.open(plots.save_gif(frames, tmp_path / "a.gif", columns=4, scale=1)) as animation:
        for index in range(3):
            animation.seek(index)
            assert animation.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_loss_plot_is_on_white_and_shows_held_out_data_and_chance_by_step():
    losses = [3.0, 2.0, float("nan"), 1.0]
    log = [{"step": 5 * i, "minutes": i / 2, "loss": loss} for i, loss in enumerate(losses)]
    log[3]["held_out_loss"] = 1.5
    figure = plots.loss_plot(log + [{"step": 20, "minutes": 2.0}], chance=3.5)
    curve, held_out, chance = figure.axes[0].lines
    assert list(curve.get_xdata()) == [0, 5, 15] and list(curve.get_ydata()) == [3, 2, 1]
    assert list(held_out.get_xdata()) == [15] and list(held_out.get_ydata()) == [1.5]
    assert set(chance.get_ydata()) == {3.5} and figure.axes[0].get_ylim()[1] > 3.5
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["training", "held out", "chance 3.5"]
    with Image.open(io.BytesIO(plots.png(figure))) as image:
        assert image.format == "PNG" and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


# ---- figures


def test_figures_show_the_runs_below_real_examples_each_pixel_enlarged(copied, tmp_path):
    flow, tokenizer = copied("flow"), copied("tokenizer")
    with pytest.raises(UserError, match="has no samples"):
        figures.write([flow, tokenizer], tmp_path / "pictures")
    run = load_run(flow)
    drawn = run.sample(2, label="plum", out=flow / "samples")[0]
    figures.write([flow, tokenizer], tmp_path / "pictures")
    with Image.open(tmp_path / "pictures/map.png") as image:
        assert image.width == 1100
    with Image.open(tmp_path / "pictures/methods.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    assert sheet.shape == (34 + 4 + 3 * 100, 190 + 4 + 10 * 100, 3)
    tiles = [[sheet[38 + 100 * row :, 194 + 100 * column :][:96:3, :96:3] for column in range(10)]
             for row in range(3)]
    test = run.dataset().test
    assert (tiles[0][5] == test["images"][test["labels"] == 1][0]).all()
    assert tiles[1][0].std() > 0  # a reconstruction
    assert (tiles[2][5] == drawn).all() and (tiles[2][0] == 255).all()  # no apple was drawn
    assert (tmp_path / "pictures/map.png").stat().st_size < 300_000


def test_a_picture_for_the_readme_stays_small_whatever_it_shows():
    figure = figures.named_grid(list(some_images(100, 32)), ["row"] * 10, ["column"] * 10)
    assert len(plots.png(figure)) > 300_000 > len(figures.small_png(figure))


def test_figures_refuse_runs_on_several_data_sets(copied, tmp_path):
    flow, other = copied("flow"), tmp_path / "other"
    shutil.copytree(flow, other)
    record = json.loads((other / "config.json").read_text())
    record["data"] |= {"name": "pears", "fingerprint": "0"}
    (other / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="other was trained on pears, .*flow-fruit on fruit: give"):
        figures.write([flow, other], tmp_path)


def test_importing_plots_leaves_the_plotting_backend_to_the_notebook():
    code = (
        "import matplotlib; matplotlib.use('svg'); import nanogen.lab.report as r; "
        "r.plots.png(r.plots.loss_plot([{'step': 1, 'loss': 1.0}])); "
        "print(matplotlib.get_backend())"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.strip().lower() == "svg"
