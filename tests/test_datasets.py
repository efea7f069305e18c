"""The data: downloads that break, caches that are damaged, folders as people have them. Offline."""

import hashlib
import io
import os
import shutil
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from nanogen import UserError, files
from nanogen.data import datasets, sources
from nanogen.data.datasets import Dataset, load
from nanogen.data.sources import Source, read_image, read_sound, resample

RNG = np.random.default_rng(0)
DATA = Path(os.environ.get("NANOGEN_DATA") or datasets.REPOSITORY / "data")


def needs(name: str):
    missing = not (DATA / name).exists()
    return pytest.mark.skipif(missing, reason=f"{name} is not in {DATA}: set NANOGEN_DATA")


# ---- a host on this machine


@pytest.fixture
def host():
    """A web server with `files` {path: content}; `sent` counts its bytes; `stop_after` breaks the
    connection after so many bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            body = content[: server.stop_after]
            server.sent[self.path] = server.sent.get(self.path, 0) + len(body)
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.sent, server.stop_after = {}, {}, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    serve = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serve.daemon = True
    serve.start()
    yield server
    server.shutdown()
    server.server_close()


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def binary_cifar10(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Six files, five of them for training. The real layout: label, 1024 red, green and blue."""
    files = {f"cifar-10-batches-bin/{name}": b"text" for name in ("batches.meta.txt", "a.html")}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, image, label in zip(names, np.split(images, 6), np.split(labels, 6), strict=True):
        rows = image.transpose(0, 3, 1, 2).reshape(len(image), 3072)
        content = np.concatenate([label[:, None], rows], axis=1).tobytes()
        files[f"cifar-10-batches-bin/{name}.bin"] = content
    return tar_gz(files)


@pytest.fixture
def cifar10(host, monkeypatch):
    """A CIFAR-10 of 12 images on a host, in six files as the real one is."""
    host.images = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
    host.labels = (np.arange(12) % 10).astype(np.uint8)
    binary = binary_cifar10(host.images, host.labels)
    host.files["/binary.tar.gz"] = binary
    how = (sources.md5, sources.md5(binary), sources.read_cifar10_binary)
    source = Source(f"{host.url}/binary.tar.gz", "b.tar.gz", *how)
    monkeypatch.setitem(sources.SOURCES, "cifar10", source)
    return host


def check_cifar10(data: Dataset, host) -> None:
    assert np.array_equal(data.train["images"], host.images[:10])
    assert np.array_equal(data.test["images"], host.images[10:])
    assert data.train["labels"].tolist() == list(range(10))
    assert data.test["labels"].tolist() == [0, 1]
    assert data.train["labels"].dtype == np.int64 and data.names["labels"][3] == "cat"


def test_a_full_download_is_converted_and_never_repeated(cifar10, tmp_path):
    folder = tmp_path / "new" / "folder"
    check_cifar10(load("cifar10", folder), cifar10)
    assert os.listdir(folder) == ["cifar10.npz"], "neither the archive nor a temporary file stays"
    cifar10.files.clear()
    check_cifar10(load("cifar10", folder), cifar10)


@pytest.mark.parametrize("fault", ["wrong checksum", "truncated archive", "404"])
def test_when_the_host_fails_one_sentence_says_why(cifar10, tmp_path, fault):
    whole = cifar10.files.pop("/binary.tar.gz")
    if fault != "404":
        wrong = whole[:-1] + b"?" if fault == "wrong checksum" else whole[:500]
        cifar10.files["/binary.tar.gz"] = wrong
    why = "HTTP.*404" if fault == "404" else "checksum is wrong"
    with pytest.raises(UserError, match=f"127.0.0.1: .*{why}.*by hand") as caught:
        load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_no_network_and_a_broken_connection_are_sentences_too(cifar10, tmp_path):
    cifar10.stop_after = 1000
    with pytest.raises(UserError, match="broke off after 1,000 of"):
        load("cifar10", tmp_path)
    cifar10.shutdown()
    cifar10.server_close()
    with pytest.raises(UserError, match="could not be downloaded .*refused"):
        load("cifar10", tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_processes_that_download_at_once_leave_one_whole_file(cifar10, tmp_path, monkeypatch):
    together, savez = threading.Barrier(2, timeout=60), np.savez

    def write(path, **arrays):  # both have written before one of them renames its file
        savez(path, **arrays)
        together.wait()

    monkeypatch.setattr(np, "savez", write)
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # threads that pass for processes
    with ThreadPoolExecutor(2) as pool:
        for data in pool.map(lambda _: load("cifar10", tmp_path), range(2)):
            check_cifar10(data, cifar10)
    assert os.listdir(tmp_path) == ["cifar10.npz"]
    check_cifar10(load("cifar10", tmp_path), cifar10)


def test_an_archive_put_there_by_hand_is_taken_and_kept(cifar10, tmp_path):
    (tmp_path / "b.tar.gz").write_bytes(cifar10.files["/binary.tar.gz"])
    check_cifar10(load("cifar10", tmp_path), cifar10)
    assert cifar10.sent == {} and (tmp_path / "b.tar.gz").exists()


def test_an_archive_put_there_by_hand_is_checked_too(cifar10, tmp_path):
    (tmp_path / "b.tar.gz").write_bytes(b"not it")
    with pytest.raises(UserError, match="b.tar.gz: the checksum is wrong"):
        load("cifar10", tmp_path)
    assert cifar10.sent == {} and os.listdir(tmp_path) == ["b.tar.gz"]


def test_a_folder_that_cannot_be_written_is_a_sentence(cifar10, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: set NANOGEN_DATA"):
        load("cifar10", tmp_path / "file" / "data")
    (tmp_path / "read only").mkdir(0o555)
    with pytest.raises(UserError, match="cannot be written"):
        load("cifar10", tmp_path / "read only")
    assert cifar10.sent == {}, "that is known before anything is fetched"


def test_a_full_disk_leaves_no_half_written_cache(cifar10, tmp_path, monkeypatch):
    def fails(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(UserError, match="No space left"):
        load("cifar10", tmp_path)
    assert os.listdir(tmp_path) == []


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


@pytest.fixture
def fsdd(host, monkeypatch):
    """An FSDD of two digits by two speakers; /older is an older, smaller version."""
    names = [(f"{digit}_{who}_{i}.wav", i)
             for digit in (0, 7) for who in "ab" for i in (0, 4, 5, 12)]
    host.clips = {name: RNG.integers(-9999, 9999, 50 + i, np.int16) for name, i in names}
    files = {name: wav(clip) for name, clip in host.clips.items()}
    content = b"".join(name.encode() + files[name] for name in sorted(files))
    recordings = {f"fsdd-26eb/recordings/{name}": files[name] for name in reversed(files)}
    host.files["/fsdd"] = tar_gz(recordings | {"fsdd-26eb/README.md": b""})
    host.files["/older"] = tar_gz({f"recordings/{name}": files[name] for name in list(files)[:3]})
    how = (sources.wav_sha256, hashlib.sha256(content).hexdigest(), sources.read_fsdd)
    source = Source(f"{host.url}/fsdd", "fsdd.tar.gz", *how)
    monkeypatch.setitem(sources.SOURCES, "fsdd", source)
    return host


def test_fsdd_is_checked_by_content_and_split_by_its_own_rule(fsdd, tmp_path):
    data = load("fsdd", tmp_path)
    assert data.sample_rate == 8000 and data.kind == "sounds" and data.main == "waveforms"
    assert data.names["speakers"] == ["a", "b"] and data.names["labels"][7] == "7"
    assert data.test["labels"].tolist() == [0] * 4 + [7] * 4
    assert data.test["speakers"].tolist() == [0, 0, 1, 1] * 2
    assert sorted(map(len, data.train["waveforms"])) == [55] * 4 + [62] * 4
    assert np.array_equal(data.test["waveforms"][0] * 32768, fsdd.clips["0_a_0.wav"])
    assert data.test["waveforms"][0].dtype == np.float32
    (tmp_path / "fsdd.npz").unlink()
    for wrong in (fsdd.files["/fsdd"][:200], fsdd.files["/older"]):
        fsdd.files["/fsdd"] = wrong
        with pytest.raises(UserError, match="fsdd could not be downloaded"):
            load("fsdd", tmp_path)
        assert os.listdir(tmp_path) == []


def test_fsdd_without_one_speaker_has_that_one_in_the_test_alone(fsdd, tmp_path):
    data, without = load("fsdd", tmp_path), load("fsdd-without-a", tmp_path)
    assert without.name == without.origin == "fsdd-without-a" and without.names == data.names
    assert set(without.train["speakers"]) == {1} and set(without.test["speakers"]) == {0}
    assert [len(clip) for clip in without.train["waveforms"]] == [62, 55] * 2
    assert without.train["labels"].tolist() == without.test["labels"].tolist() == [0, 0, 7, 7]
    assert np.array_equal(without.test["waveforms"][0], data.test["waveforms"][0])
    assert without.classes("speakers") == 2 and without.classes("labels") == 10
    assert load("fsdd-without-b", tmp_path).classes("speakers") == 1, "b is never learned"
    for nobody in ("fsdd-without-c", "fsdd-without-"):
        with pytest.raises(UserError, match="its speakers are a, b"):
            load(nobody, tmp_path)


# ---- the cache


def test_a_damaged_cache_is_a_sentence_and_stays(cifar10, tmp_path):
    load("cifar10", tmp_path)
    path = tmp_path / "cifar10.npz"
    whole = path.read_bytes()
    holed = whole[:3000] + bytes(9000) + whole[12000:]
    for damaged in (whole[:5000], b"", b"no zip at all", holed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cifar10.npz cannot be read .* delete it"):
            load("cifar10", tmp_path)
        assert path.read_bytes() == damaged
    np.savez(path, train_images=np.zeros((3, 8, 8, 3), np.uint8), train_labels=np.zeros(3))
    with pytest.raises(UserError, match="does not hold cifar10"):
        load("cifar10", tmp_path)
    np.savez(path, train_images=np.array([print]))  # a pickle within
    with pytest.raises(UserError, match="cannot be read"):
        load("cifar10", tmp_path)


def test_data_is_kept_in_nanogen_data_or_in_the_checkout(cifar10, tmp_path, monkeypatch):
    load("cifar10", tmp_path)
    cifar10.files.clear()
    monkeypatch.setenv("NANOGEN_DATA", str(tmp_path))
    check_cifar10(load("cifar10"), cifar10)

    def kept_in() -> Path:  # where new data goes
        return next(filter(files.writable, datasets.data_folders()))

    assert kept_in() == tmp_path
    monkeypatch.setenv("NANOGEN_DATA", "")
    monkeypatch.setattr(datasets, "REPOSITORY", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / ".cache" / "nanogen"
    assert kept_in() == cache, "an installed package has no pyproject.toml beside it"
    (tmp_path / "pyproject.toml").write_text("")
    assert kept_in() == tmp_path / "data"
    (tmp_path / "data").mkdir(0o555)
    assert kept_in() == cache, "data/ is read-only"
    shutil.copy(tmp_path / "cifar10.npz", tmp_path / "data" / "cifar10.npz")
    check_cifar10(load("cifar10"), cifar10)


def test_count_gives_a_small_set_spread_over_the_whole(cifar10, tmp_path):
    data = load("cifar10", tmp_path, count=5)
    assert data.train["labels"].tolist() == [0, 2, 4, 6, 9] and len(data.test["images"]) == 1
    assert np.array_equal(data.train["images"][1], cifar10.images[2])
    assert len(data) == data.count == 5 and load("cifar10", tmp_path).count is None
    assert len(load("cifar10", tmp_path, count=999)) == 10
    with pytest.raises(UserError, match="at least 1"):
        load("cifar10", tmp_path, count=0)


def test_the_fingerprint_tells_content_labels_and_names_apart(cifar10, fsdd, tmp_path):
    data = load("cifar10", tmp_path)
    described = data.describe()
    assert described == load("cifar10", tmp_path).describe()
    assert described | {"fingerprint": ""} == dict(
        name="cifar10", origin="cifar10", kind="images", count=None, fingerprint="")
    seen = {data.fingerprint, load("cifar10", tmp_path, count=5).fingerprint}
    for part, column in (("train", "images"), ("test", "images"), ("train", "labels")):
        changed = load("cifar10", tmp_path)
        getattr(changed, part)[column].flat[-1] += 1
        seen.add(changed.fingerprint)
    renamed = load("cifar10", tmp_path)
    renamed.names["labels"][0] = "aeroplane"
    seen.add(renamed.fingerprint)
    sounds = load("fsdd", tmp_path)
    seen.add(sounds.fingerprint)
    changed = load("fsdd", tmp_path)
    changed.train["speakers"][0] = 1 - changed.train["speakers"][0]
    seen.add(changed.fingerprint)
    changed = load("fsdd", tmp_path)
    changed.train["waveforms"][1] = changed.train["waveforms"][1] / 2
    seen.add(changed.fingerprint)
    assert len(seen) == 9 and all(len(digits) == 16 for digits in seen)


def test_names_say_their_kind_and_folders_are_resolved(tmp_path, monkeypatch):
    kinds = {"cifar10": "images", "scenes": "images", "fsdd": "sounds", "voices": "sounds"}
    for name, kind in (kinds | {"fsdd-without-a": "sounds", "pets": None}).items():
        assert datasets.kind_of(name) == kind
    assert datasets.whole("fsdd-without-a") == "fsdd"
    assert datasets.whole("own-without-a") == "own-without-a"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    for spelling in ("pets", "pets/", "./pets", tmp_path / "pets"):
        assert datasets.resolved(spelling) == str((tmp_path / "pets").resolve())
    assert datasets.resolved("scenes") == "scenes" and datasets.resolved("nowhere") == "nowhere"


@needs("cifar10.npz")
def test_the_real_cifar10():
    data = load("cifar10", DATA)
    assert data.train["images"].shape == (50_000, 32, 32, 3)
    assert data.test["images"].shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train["labels"]).tolist() == [5000] * 10
    assert np.bincount(data.test["labels"]).tolist() == [1000] * 10


@needs("fsdd.npz")
def test_the_real_fsdd_and_its_real_checksum(host, tmp_path, monkeypatch):
    """Its wavs have the plain 44-byte header, so the archive can be made again from the cache."""
    data = load("fsdd", DATA)
    assert len(data) == 2700 and len(data.test["waveforms"]) == 300
    assert len(data.names["speakers"]) == 6
    assert np.bincount(data.test["labels"]).tolist() == [30] * 10
    with np.load(DATA / "fsdd.npz") as file:
        arrays = dict(file)
    order = sorted(range(50), key=str)
    clips = np.split(arrays["waveform"], arrays["offsets"][1:-1])
    names = [f"{d}_{s}_{i}.wav" for d in range(10) for s in arrays["speaker_names"] for i in order]
    files = {f"recordings/{name}": wav(clip) for name, clip in zip(names, clips, strict=True)}
    host.files["/fsdd"] = tar_gz(files)
    source = sources.SOURCES["fsdd"]._replace(url=f"{host.url}/fsdd", archive="fsdd.tar.gz")
    monkeypatch.setitem(sources.SOURCES, "fsdd", source)
    load("fsdd", tmp_path)
    with np.load(tmp_path / "fsdd.npz") as file:
        assert all(np.array_equal(file[key], arrays[key]) for key in arrays)


# ---- scenes


def test_scenes_come_with_their_truth_and_are_drawn_again_when_their_code_changes(
        tmp_path, monkeypatch):
    drawn, make = [], datasets.scenes.make

    def make_few(count, seed):
        drawn.append((count, seed))
        return make(count // 1000, seed=seed)

    monkeypatch.setattr(datasets.scenes, "make", make_few)
    read_only, writable = tmp_path / "read only", tmp_path / "writable"
    read_only.mkdir(0o555)
    monkeypatch.setattr(datasets, "data_folders", lambda: [read_only, writable])
    first = load("scenes")
    assert drawn == [(50_000, 0), (5000, 1)]
    assert os.listdir(read_only) == [], "even root leaves it alone"
    again = load("scenes")
    assert len(drawn) == 2, "the second time from the cache"
    expected = make(50, seed=0)
    for data in (first, again):
        assert len(data) == 50 and data.test["images"].shape == (5, 32, 32, 3)
        assert set(data.train) == set(data.test) == set(expected) | {"prompts"}
        assert all(np.array_equal(data.train[column], expected[column]) for column in expected)
        assert data.train["labels"].dtype == np.int64 and data.train["mask"].dtype == bool
        for column, value in (("labels", "dog"), ("background", "sea"), ("color", "red")):
            assert value in data.names[column]
        assert data.names["facing"] == ["left", "right"]
    changed = tmp_path / "scenes.py"
    changed.write_text(Path(datasets.scenes.__file__).read_text() + "\n# a comment\n")
    monkeypatch.setattr(datasets.scenes, "__file__", str(changed))
    load("scenes")
    assert len(drawn) == 2, "a comment changes nothing"
    changed.write_text("another = 'version'")
    load("scenes")
    assert len(drawn) == 4, "code that changed is not served stale images"
    (writable / "scenes.npz").write_bytes(b"damaged")
    load("scenes")
    load("scenes")
    assert len(drawn) == 6, "a damaged cache is drawn again, and kept"


def test_a_small_set_of_scenes_is_drawn_on_the_spot_and_says_what_it_shows(tmp_path):
    data = load("scenes", tmp_path, count=40)
    assert len(data) == data.count == 40 and len(data.test["prompts"]) == 4
    assert os.listdir(tmp_path) == [] and len(data.train["background"]) == 40
    things, colors, where = (data.names[key] for key in ("labels", "color", "background"))
    columns = (data.train[key] for key in ("labels", "color", "background", "prompts"))
    for label, color, background, prompt in zip(*columns, strict=True):
        thing = datasets.scenes.Thing(things[label], colors[color])
        assert prompt == datasets.scenes.Scene(where[background], (thing,)).caption


# ---- a folder of one's own


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def grey_image(path: Path, level: int = 0, shape: tuple = (32, 32, 3), **options) -> None:
    save(path, np.full(shape, level, np.uint8), **options)


def test_images_of_every_kind_become_32_by_32_rgb(tmp_path):
    red, grey = np.full((40, 60, 3), (200, 30, 30), np.uint8), np.full((50, 50), 128, np.uint8)
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "deep.png", np.full((50, 50), 128 * 256, np.uint16))
    save(tmp_path / "bits.png", grey, "1")
    save(tmp_path / "palette.gif", red, "P")
    save(tmp_path / "web.webp", red, lossless=True)
    save(tmp_path / "print.jpg", red, "CMYK")
    save(tmp_path / "one.png", red[:1, :1])
    clear = np.dstack([red, np.zeros((40, 60), np.uint8)])
    save(tmp_path / "clear.png", clear)
    expected = {"grey.png": 128, "deep.png": 128, "clear.png": 255}
    expected |= dict.fromkeys(("palette.gif", "web.webp", "print.jpg", "one.png"), (200, 30, 30))
    for name, color in expected.items():
        image = read_image(tmp_path / name)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8, name
        assert np.abs(image.mean(axis=(0, 1)) - color).max() < 4, name
    assert read_image(tmp_path / "bits.png").shape == (32, 32, 3)


def test_the_centre_is_kept_and_resized_without_aliasing(tmp_path):
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 96:160] = 255  # the central square is white
    save(tmp_path / "wide.png", wide)
    assert read_image(tmp_path / "wide.png").min() == 255
    checkers = np.indices((320, 320)).sum(axis=0) % 2 * np.uint8(255)
    save(tmp_path / "checkers.png", checkers.astype(np.uint8))
    small = read_image(tmp_path / "checkers.png").astype(int)
    assert np.abs(small - 127).max() < 8, "an even grey, no moire"
    rows = np.repeat([[0], [255]], 32, axis=0).repeat(64, axis=1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turned by 180 degrees, as telephones save images
    save(tmp_path / "turned.jpg", rows, exif=exif)
    assert read_image(tmp_path / "turned.jpg")[0].mean() > 200


def test_a_folder_of_images(tmp_path, capsys):
    folder = tmp_path / "pets"
    for i in range(20):
        grey_image(folder / "cat" / f"{i}.png", i, (33, 40, 3))
    for i in range(2):
        grey_image(folder / "dog" / "puppies" / f"{i}.PNG", 100 + i, (40, 33, 3))
    grey_image(folder / "emu" / "only.jpg", 77, (3000, 4000, 3))  # huge
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "cat" / "cut.png").write_bytes((folder / "emu" / "only.jpg").read_bytes()[:1000])
    (folder / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "empty").mkdir()
    data, said = load(folder), capsys.readouterr().out
    assert "23 images of 3 classes (cat 20, dog 2, emu 1), 3 for the test. " in said
    assert "squares have 33 to 3,000 pixels a side" in said and "Ignored: 1 .txt. Skipped 2" in said
    assert "broken.jpg" in said and "cut.png" in said and "._0" not in said
    assert data.name == "pets" and data.origin == str(folder.resolve()) and data.kind == "images"
    assert data.names == {"labels": ["cat", "dog", "emu"]}
    learned = np.bincount(data.train["labels"]).tolist()
    assert learned == [18, 1, 1], "a class of one keeps it to learn from"
    assert np.bincount(data.test["labels"]).tolist() == [2, 1]
    assert data.train["images"].shape == (20, 32, 32, 3) and data.test["images"].dtype == np.uint8
    cats = [part["images"][part["labels"] == 0][:, 0, 0, 0] for part in (data.train, data.test)]
    assert sorted(np.concatenate(cats).tolist()) == list(range(20)), "each image in one part"
    again = load(folder.rename(tmp_path / "animals"))
    assert np.array_equal(again.test["images"], data.test["images"]), "the same split every time"
    assert again.fingerprint == data.fingerprint, "a folder that was moved has the same content"


def test_the_first_few_of_a_folder_are_of_all_classes(tmp_path):
    for label, name in enumerate("abcd"):
        for i in range(100):
            grey_image(tmp_path / name / f"{i}.png", label, (4, 4, 3))
    data = load(tmp_path)
    labels = data.test["labels"]
    assert np.bincount(labels).tolist() == [10] * 4
    assert (np.bincount(labels[:20], minlength=4) >= 2).all()
    assert (np.bincount(data.train["labels"][:80], minlength=4) >= 10).all()
    assert np.array_equal(data.test["images"][:, 0, 0, 0], labels), "each with its own label"


def test_one_class_is_enough(tmp_path):
    for i in range(5):
        grey_image(tmp_path / "mine" / f"{i}.png", i)
    for folder in (tmp_path, tmp_path / "mine"):  # with a sub-folder, and without
        data = load(str(folder))
        assert data.names["labels"] == ["mine"] and len(data) == 4 and len(data.test["images"]) == 1
    for i in range(1, 5):
        (tmp_path / "mine" / f"{i}.png").unlink()
    data = load(tmp_path)
    assert len(data) == 1 and data.test["images"].shape == (0, 32, 32, 3)
    assert len(load(tmp_path, count=3)) == 1


def test_further_formats_and_no_hidden_files(tmp_path):
    for i, name in enumerate(("a.bmp", "b.tif", "c.TIFF", "d.jfif", ".hidden/e.png", ".f.png")):
        options = {"format": "JPEG"} if name == "d.jfif" else {}
        grey_image(tmp_path / "pets" / "cat" / name, i, **options)
    data = load(tmp_path / "pets")
    pixels = np.concatenate([data.train["images"], data.test["images"]])[:, 0, 0, 0]
    assert sorted(pixels.tolist()) == [0, 1, 2, 3]
    (tmp_path / "songs" / "a").mkdir(parents=True)
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    for name in ("one", "two"):
        soundfile.write(tmp_path / "songs" / "a" / f"{name}.mp3", tone, 16_000)
    clip = load(tmp_path / "songs").train["waveforms"][0]
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert np.abs(clip[:8000] - expected)[800:-800].max() < 0.05


def tree(folder: Path, *names: str) -> Path:
    """Small images with different pixels."""
    for level, name in enumerate(names):
        grey_image(folder / name, level, (4, 4, 3))
    return folder


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Testing"), ("train", "valid")])
def test_train_and_val_folders_are_parts_and_no_classes(names, tmp_path, capsys):
    first, second = names
    data = load(tree(tmp_path, f"{first}/cat/a.png", f"{first}/dog/b.png", f"{first}/emu/c.png",
                     f"{second}/dog/d.png", f"{second}/hen/e.png"))
    assert data.names["labels"] == ["cat", "dog", "emu"] and data.test["labels"].tolist() == [1]
    assert sorted(data.train["images"][:, 0, 0, 0]) == [0, 1, 2]
    said = capsys.readouterr().out
    assert f"1 for the test, those in {second}/." in said
    assert f"Ignored: 1 .png in {second}/hen/." in said, "train/ has no hen to learn from"


def test_of_val_and_test_folders_test_is_the_test_and_val_is_said_to_be_ignored(tmp_path, capsys):
    data = load(tree(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png",
                     "test/b/5.png", "x.png"))
    assert data.test["images"][:, 0, 0, 0].tolist() == [4] and len(data) == 2
    said = capsys.readouterr().out
    assert "Ignored: 1 .png in val/a/, 1 .png in val/b/, 1 .png beside the folders." in said


def test_a_class_that_is_called_train_stays_a_class(tmp_path):
    classes = ("plane/1.png", "plane/2.png", "train/3.png", "train/4.png", "val/5.png")
    assert load(tree(tmp_path / "a", *classes)).names["labels"] == ["plane", "train", "val"]
    steam = ("plane/1.png", "train/steam/2.png", "train/diesel/3.png")
    assert load(tree(tmp_path / "b", *steam)).names["labels"] == ["plane", "train"]
    unlabelled = ("train/a/1.png", "train/a/2.png", "train/b/3.png", "test/4.png")
    data = load(tree(tmp_path / "c", *unlabelled))
    assert data.names["labels"] == ["a", "b"] and len(data.test["labels"]) == 1


def test_of_many_classes_the_smallest_and_the_largest_are_named(tmp_path, capsys):
    names = [f"{name}/{i}.png" for name in "abcdefghijkl" for i in range(2)]
    load(tree(tmp_path, *names, "c/2.png"))
    assert "12 classes (smallest: a 2, largest: c 3), 12" in capsys.readouterr().out


def test_a_class_without_a_readable_file_leaves_no_gap_in_the_labels(tmp_path):
    tree(tmp_path, "a/1.png", "b/2.png", "c/3.png", "c/4.png")
    (tmp_path / "b/2.png").write_bytes(b"broken")
    data = load(tmp_path)
    assert data.names["labels"] == ["a", "c"] and set(data.train["labels"]) == {0, 1}


def test_the_fingerprint_of_a_folder_is_that_of_its_files_wherever_it_stands(tmp_path):
    folder = tree(tmp_path / "pets", *(f"{name}/{i}.png" for name in "ab" for i in range(3)))
    seen = {load(folder).fingerprint}
    assert {load(shutil.copytree(folder, tmp_path / "pets-2")).fingerprint} == seen
    flat = load(shutil.copytree(folder / "a", tmp_path / "flat")).fingerprint
    assert load((tmp_path / "flat").rename(tmp_path / "renamed")).fingerprint == flat
    with open(folder / "a/1.png", "ab") as file:
        file.write(b" ")  # the same pixels
    seen.add(load(folder).fingerprint)
    seen.add(load((folder / "a").rename(folder / "c").parent).fingerprint)
    seen.add(load(tree(folder, "z/1.png")).fingerprint)
    assert len(seen) == 4


def test_a_folder_that_changed_is_read_again(tmp_path):
    folder = tree(tmp_path / "pets", "a/1.png", "a/2.png", "b/3.png")
    first = datasets.remembered(str(folder))
    assert datasets.remembered(str(folder)) is first
    (folder / "a/1.png").rename(folder / "b/1.png")
    assert datasets.remembered(str(folder)).fingerprint != first.fingerprint


def test_a_folder_called_train_is_named_with_the_folder_above(tmp_path):
    folder = tree(tmp_path / "pets", "train/a/1.png", "test/a/2.png") / "train"
    assert load(folder).name == datasets.name_of(folder) == "pets-train"
    assert datasets.name_of(f"{folder.parent}/") == "pets"
    assert datasets.name_of("fsdd-without-a") == "fsdd-without-a"


def test_a_photo_of_108_megapixels_is_read_without_a_warning(tmp_path):
    Image.new("L", (12_000, 9_000), 120).save(tmp_path / "photo.jpg", quality=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(read_image(tmp_path / "photo.jpg").astype(int) - 120).max() < 3


def test_a_decompression_bomb_is_a_sentence(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", np.zeros((300, 300), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # Pillow refuses above twice as many
    with pytest.raises(UserError, match="bomb.png .*90000 pixels"):
        load(tmp_path)


def test_a_folder_of_sounds_is_mixed_to_mono_at_8_khz(tmp_path, capsys):
    seconds = np.arange(44_100) / 44_100
    tone, too_high = np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 6000 * seconds)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stereo = 0.4 * np.stack([tone + too_high, tone - 0.5 * too_high], axis=1)
    soundfile.write(tmp_path / "a" / "stereo.wav", stereo, 44_100)
    soundfile.write(tmp_path / "b" / "mono.flac", 0.4 * tone[:8000], 8000)
    soundfile.write(tmp_path / "b" / "lossy.ogg", 0.4 * tone, 44_100)
    whole = (tmp_path / "a" / "stereo.wav").read_bytes()
    (tmp_path / "a" / "cut.wav").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "b" / "broken.wav").write_bytes(b"RIFF....")
    soundfile.write(tmp_path / "b" / "empty.wav", np.zeros(0), 8000)
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "cover.png")  # sounds are more
    data, said = load(tmp_path), capsys.readouterr().out
    assert all(name in said for name in ("broken.wav", "empty.wav", "cut.wav is no sound"))
    assert "cut off: " in said and "Ignored: 1 .png." in said
    assert "They last 3.0 s in total, the longest 1.0 s." in said
    assert data.names == {"labels": ["a", "b"], "speakers": ["unknown"]}
    assert data.sample_rate == 8000
    assert data.train["speakers"].tolist() == [0, 0] and data.classes("speakers") == 1
    assert sorted(data.train["labels"].tolist()) == [0, 1] and data.test["labels"].tolist() == [1]
    stereo = data.train["waveforms"][data.train["labels"].tolist().index(0)]
    assert stereo.shape == (8000,) and stereo.dtype == np.float32 and np.abs(stereo).max() <= 1
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert np.abs(stereo - expected)[200:-200].max() < 2e-3, "6 kHz is gone, not folded down"


def test_a_wav_of_unknown_length_is_read(tmp_path):
    """Programs that write to a pipe do not know the length when they write the header."""
    content = bytearray(wav(np.full(100, 1000, np.int16)))
    for size in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        content[4:8] = content[40:44] = size
        (tmp_path / "pipe.wav").write_bytes(content)
        assert len(read_sound(tmp_path / "pipe.wav")) == 100


def test_sounds_without_sub_folders_are_one_class(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", np.full(100 + i, 0.5), 8000)
    data = load(folder)
    assert data.names["labels"] == ["birds"] and len(data) == 2 and len(data.test["waveforms"]) == 1
    assert len(load(folder, count=1)) == 1


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 44_100, 48_000, 4000])
def test_resampling_keeps_pitch_and_length(rate):
    tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate).astype(np.float32)
    result = resample(tone, rate, 8000)
    assert result.shape == (8000,) and result.dtype == np.float32
    expected = np.sin(2 * np.pi * 500 * np.arange(8000) / 8000)
    assert np.abs(result - expected)[400:-400].max() < 5e-3


def test_what_is_no_data_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no images or sounds"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="no images or sounds"):
        load(tmp_path)
    (tmp_path / "class" / "a.png").write_text("no image")
    with pytest.raises(UserError, match="No file in .* can be read.*a.png"):
        load(tmp_path)
    for name in ("cifar100", str(tmp_path / "missing"), ""):
        with pytest.raises(UserError, match="cifar10, fsdd, scenes, .* or an existing folder"):
            load(name)
    with pytest.raises(UserError, match="no sound that can be read"):
        read_sound(tmp_path / "missing.wav")
