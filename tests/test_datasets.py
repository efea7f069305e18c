"""The data: downloads that break, caches that are damaged, folders as people really have them. Offline."""

import hashlib
import io
import os
import pickle
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from nanogen import UserError
from nanogen.data import datasets, download
from nanogen.data.datasets import load
from nanogen.data.download import Source
from nanogen.data.folders import read_picture, read_sound, resample

RNG = np.random.default_rng(0)
DATA = Path(os.environ.get("NANOGEN_DATA") or datasets.REPOSITORY_DATA)


def needs(name: str):
    missing = not (DATA / name).exists()
    return pytest.mark.skipif(missing, reason=f"{name} is not in {DATA}: set NANOGEN_DATA")


# ------------------------------------------------------------------------------------ a host on this machine


@pytest.fixture
def host():
    """A web server with `files` {path: content}; `sent` counts its bytes, without `ranges` it ignores Range;
    `stop_after` breaks the connection after so many bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            asked = self.headers.get("Range") if server.ranges else None
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            if asked and start >= len(content):
                return self.send_error(416)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:][: server.stop_after]
            server.sent[self.path] = server.sent.get(self.path, 0) + len(body)
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.sent, server.ranges, server.stop_after = {}, {}, True, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
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
    """The real layout: label, 1024 red, 1024 green, 1024 blue; five training files and one for the test."""
    files = {f"cifar-10-batches-bin/{name}": b"text" for name in ("batches.meta.txt", "readme.html")}
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, image, label in zip(names, np.split(images, 6), np.split(labels, 6), strict=True):
        planes = image.transpose(0, 3, 1, 2).reshape(len(image), 3072)
        files[f"cifar-10-batches-bin/{name}"] = np.concatenate([label[:, None], planes], axis=1).tobytes()
    return tar_gz(files)


def pickled_cifar10(images: np.ndarray, labels: np.ndarray) -> bytes:
    files = {"cifar-10-batches-py/batches.meta": pickle.dumps({b"label_names": []})}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, image, label in zip(names, np.split(images, 6), np.split(labels, 6), strict=True):
        planes = image.transpose(0, 3, 1, 2).reshape(len(image), 3072)
        batch = {b"batch_label": b"", b"labels": label.tolist(), b"data": planes, b"filenames": [b"a.png"]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=3)
    return tar_gz(files)


@pytest.fixture
def cifar10(host, monkeypatch):
    """A CIFAR-10 of 12 pictures on two hosts, binary and pickled, as the real one is."""
    host.images = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
    host.labels = (np.arange(12) % 10).astype(np.uint8)
    binary, pickled = binary_cifar10(host.images, host.labels), pickled_cifar10(host.images, host.labels)
    host.files |= {"/binary.tar.gz": binary, "/pickled.tar.gz": pickled}
    md5 = [hashlib.md5(content).hexdigest() for content in (binary, pickled)]
    first = (download.file_md5, md5[0], download.read_cifar10_binary)
    second = (download.file_md5, md5[1], download.read_cifar10_pickled)
    sources = [
        Source(f"{host.url}/binary.tar.gz", "b.tar.gz", *first),
        Source(f"{host.url}/pickled.tar.gz", "p.tar.gz", *second),
    ]
    monkeypatch.setitem(download.SOURCES, "cifar10", sources)
    return host


def check_cifar10(data: datasets.Images, host) -> None:
    assert np.array_equal(data.train_images, host.images[:10])
    assert np.array_equal(data.test_images, host.images[10:])
    assert data.train_labels.tolist() == list(range(10)) and data.test_labels.tolist() == [0, 1]
    assert data.train_labels.dtype == np.int64 and data.class_names[3] == "cat"


def test_a_full_download_is_converted_and_never_repeated(cifar10, tmp_path):
    folder = tmp_path / "new" / "folder"
    check_cifar10(load("cifar10", folder), cifar10)
    assert os.listdir(folder) == ["cifar10.npz"], "neither the archive nor a temporary file stays"
    cifar10.files.clear()
    check_cifar10(load("cifar10", folder), cifar10)


def test_a_partial_download_goes_on_where_it_stopped(cifar10, tmp_path):
    cifar10.stop_after = 1000
    with pytest.raises(UserError, match="broke off after 1,000 of"):
        load("cifar10", tmp_path)
    assert (tmp_path / "b.tar.gz.part").stat().st_size == 1000
    cifar10.stop_after, cifar10.sent = None, {}
    check_cifar10(load("cifar10", tmp_path), cifar10)
    rest = len(cifar10.files["/binary.tar.gz"]) - 1000
    assert cifar10.sent == {"/binary.tar.gz": rest}, "only the rest was sent"


def test_a_host_without_ranges_starts_over(cifar10, tmp_path):
    (tmp_path / "b.tar.gz.part").write_bytes(b"x" * 1000)
    cifar10.ranges = False
    check_cifar10(load("cifar10", tmp_path), cifar10)
    assert cifar10.sent == {"/binary.tar.gz": len(cifar10.files["/binary.tar.gz"])}


def test_a_complete_partial_file_needs_no_further_byte(cifar10, tmp_path):
    (tmp_path / "b.tar.gz.part").write_bytes(cifar10.files["/binary.tar.gz"])
    check_cifar10(load("cifar10", tmp_path), cifar10)
    assert cifar10.sent == {}


@pytest.mark.parametrize("fault", ["wrong checksum", "truncated archive", "404"])
def test_when_one_host_fails_the_mirror_serves(cifar10, tmp_path, fault):
    whole = cifar10.files.pop("/binary.tar.gz")
    if fault != "404":
        cifar10.files["/binary.tar.gz"] = whole[:-1] + b"?" if fault == "wrong checksum" else whole[:500]
    check_cifar10(load("cifar10", tmp_path), cifar10)
    assert cifar10.sent["/pickled.tar.gz"] == len(cifar10.files["/pickled.tar.gz"])
    assert not (tmp_path / "b.tar.gz.part").exists() or fault == "404"


def test_when_every_host_fails_one_sentence_says_why(cifar10, tmp_path):
    cifar10.files = {"/binary.tar.gz": b"not it"}
    with pytest.raises(UserError, match="checksum is wrong.*HTTP 404.*by hand") as caught:
        load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cifar10.npz").exists() and not (tmp_path / "b.tar.gz.part").exists()


def test_no_network_is_a_sentence_too(cifar10, tmp_path):
    cifar10.shutdown()
    cifar10.server_close()
    with pytest.raises(UserError, match="could not be downloaded .*refused"):
        load("cifar10", tmp_path)


def test_an_archive_put_there_by_hand_is_taken_and_kept(cifar10, tmp_path):
    (tmp_path / "p.tar.gz").write_bytes(cifar10.files["/pickled.tar.gz"])
    check_cifar10(load("cifar10", tmp_path), cifar10)
    assert cifar10.sent == {} and (tmp_path / "p.tar.gz").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(cifar10, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        load("cifar10", tmp_path / "file" / "data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_a_sentence(cifar10, tmp_path):
    (tmp_path / "b.tar.gz.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "cifar10.npz").exists()


def test_a_full_disk_leaves_no_half_written_cache(cifar10, tmp_path, monkeypatch):
    def fails(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fails)
        with pytest.raises(UserError, match="No space left"):
            load("cifar10", tmp_path)
    assert os.listdir(tmp_path) == ["b.tar.gz.part"], "what was downloaded is kept, nothing half-written is"
    cifar10.sent = {}
    check_cifar10(load("cifar10", tmp_path), cifar10)
    assert cifar10.sent == {}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_malicious_pickle_is_refused_before_it_runs(cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive = tar_gz({"cifar-10-batches-py/data_batch_1": pickle.dumps({b"data": Malicious()})})
    (tmp_path / "p.tar.gz").write_bytes(archive)
    source = download.SOURCES["cifar10"][1]
    md5 = hashlib.md5(archive).hexdigest()
    trusted = Source(source.url, source.archive, source.digest, md5, source.read)
    monkeypatch.setitem(download.SOURCES, "cifar10", [trusted])
    with pytest.raises(UserError, match="asks for (posix|nt).mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "hacked").exists()


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_fsdd_is_checked_by_content_and_split_by_its_own_rule(host, tmp_path, monkeypatch):
    names = [(f"{digit}_{who}_{i}.wav", i) for digit in (0, 7) for who in "ab" for i in (0, 4, 5, 12)]
    clips = {name: RNG.integers(-9999, 9999, 50 + i, np.int16) for name, i in names}
    files = {name: wav(clip) for name, clip in clips.items()}
    checksum = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
    recordings = {f"fsdd-26eb/recordings/{name}": files[name] for name in reversed(files)}
    host.files["/fsdd"] = tar_gz(recordings | {"fsdd-26eb/README.md": b""})
    host.files["/older"] = tar_gz({f"recordings/{name}": files[name] for name in list(files)[:3]})
    readers = (download.wav_sha256, checksum, download.read_fsdd)
    sources = [Source(f"{host.url}/{path}", "fsdd.tar.gz", *readers) for path in ("older", "fsdd")]
    monkeypatch.setitem(download.SOURCES, "fsdd", sources)
    data = load("fsdd", tmp_path)
    assert data.sample_rate == 8000 and data.speaker_names == ["a", "b"] and data.class_names[7] == "7"
    assert data.test_labels.tolist() == [0] * 4 + [7] * 4
    assert data.test_speakers.tolist() == [0, 0, 1, 1] * 2
    assert sorted(map(len, data.train_waveforms)) == [55] * 4 + [62] * 4
    assert np.array_equal(data.test_waveforms[0] * 32768, clips["0_a_0.wav"])
    assert data.test_waveforms[0].dtype == np.float32
    without = load("fsdd-without-a", tmp_path)
    assert set(without.train_speakers) == {1} and set(without.test_speakers) == {0} and without.speaker_names == ["a", "b"]
    assert [len(clip) for clip in without.train_waveforms] == [62, 55] * 2 and without.train_labels.tolist() == [0, 0, 7, 7]
    assert np.array_equal(without.test_waveforms[0], data.test_waveforms[0]) and without.test_labels.tolist() == [0, 0, 7, 7]
    for nobody in ("fsdd-without-c", "fsdd-without-"):
        with pytest.raises(UserError, match="its speakers are a, b"):
            load(nobody, tmp_path)
    truncated = host.files["/fsdd"][:200]
    (tmp_path / "fsdd.npz").unlink()
    host.files = {"/fsdd": truncated, "/older": truncated}
    with pytest.raises(UserError, match="fsdd could not be downloaded"):
        load("fsdd", tmp_path)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ the cache


def test_a_damaged_cache_is_a_sentence_and_stays(cifar10, tmp_path):
    load("cifar10", tmp_path)
    path = tmp_path / "cifar10.npz"
    whole = path.read_bytes()
    for damaged in (whole[:5000], b"", b"no zip at all", whole[:3000] + bytes(9000) + whole[12000:]):
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


def test_nanogen_data_is_respected(cifar10, tmp_path, monkeypatch):
    load("cifar10", tmp_path)
    cifar10.files.clear()
    monkeypatch.setenv("NANOGEN_DATA", str(tmp_path))
    check_cifar10(load("cifar10"), cifar10)
    monkeypatch.setenv("NANOGEN_DATA", "")
    assert datasets.data_folder() == datasets.REPOSITORY_DATA


def test_count_gives_a_small_set_spread_over_the_whole(cifar10, tmp_path):
    data = load("cifar10", tmp_path, count=5)
    assert data.train_labels.tolist() == [0, 2, 4, 6, 9] and len(data.test_images) == 1
    assert np.array_equal(data.train_images[1], cifar10.images[2])
    assert len(load("cifar10", tmp_path, count=999).train_images) == 10
    with pytest.raises(UserError, match="at least 1"):
        load("cifar10", tmp_path, count=0)


@needs("cifar10.npz")
def test_the_real_cifar10():
    data = load("cifar10", DATA)
    assert data.train_images.shape == (50_000, 32, 32, 3) and data.test_images.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.test_labels).tolist() == [1000] * 10


@needs("fsdd.npz")
def test_the_real_fsdd_and_its_real_checksum(host, tmp_path, monkeypatch):
    """Its wavs have the plain 44-byte header, so the archive can be made again from the cache and served."""
    data = load("fsdd", DATA)
    assert len(data.train_waveforms) == 2700 and len(data.test_waveforms) == 300
    assert len(data.speaker_names) == 6
    assert np.bincount(data.test_labels).tolist() == [30] * 10
    with np.load(DATA / "fsdd.npz") as file:
        arrays = dict(file)
    order = sorted(range(50), key=str)
    clips = np.split(arrays["waveform"], arrays["offsets"][1:-1])
    names = [f"{d}_{s}_{i}.wav" for d in range(10) for s in arrays["speaker_names"] for i in order]
    files = {f"recordings/{name}": wav(clip) for name, clip in zip(names, clips, strict=True)}
    host.files["/fsdd"] = tar_gz(files)
    real = download.SOURCES["fsdd"][0]
    source = Source(f"{host.url}/fsdd", "fsdd.tar.gz", real.digest, real.checksum, real.read)
    monkeypatch.setitem(download.SOURCES, "fsdd", [source])
    load("fsdd", tmp_path)
    with np.load(tmp_path / "fsdd.npz") as file:
        assert all(np.array_equal(file[key], arrays[key]) for key in arrays)


# ------------------------------------------------------------------------------------ scenes


def test_scenes_come_with_their_truth_and_are_drawn_again_when_their_code_changes(tmp_path, monkeypatch):
    drawn = []
    make = datasets.scenes.make

    def make_few(count, seed):
        drawn.append((count, seed))
        return make(count // 1000, seed=seed)

    monkeypatch.setattr(datasets.scenes, "make", make_few)
    read_only, writable = tmp_path / "read only", tmp_path / "writable"
    read_only.mkdir()
    read_only.chmod(0o555)
    first = datasets.load_scenes([read_only, writable])
    assert drawn == [(50_000, 0), (5000, 1)] and os.listdir(read_only) == [], "even root leaves it alone"
    again = datasets.load_scenes([read_only, writable])
    assert len(drawn) == 2, "the second time from the cache"
    expected = make(50, seed=0)
    for data in (first, again):
        assert data.train_images.shape == (50, 32, 32, 3) and data.test_images.shape == (5, 32, 32, 3)
        assert np.array_equal(data.train_images, expected["images"]) and data.class_names[0] == "dog"
        assert np.array_equal(data.train_labels, expected["labels"]) and data.train_labels.dtype == np.int64
        kinds = {key.removeprefix("train_") for key in data.truth if key.startswith("train_")}
        assert kinds == set(expected) - {"images", "labels"} and "test_mask" in data.truth
        assert all(np.array_equal(data.truth[f"train_{kind}"], expected[kind]) for kind in kinds)
        assert data.truth["train_mask"].dtype == bool
    changed = tmp_path / "scenes.py"
    changed.write_text("# another version")
    monkeypatch.setattr(datasets.scenes, "__file__", str(changed))
    datasets.load_scenes([writable])
    assert len(drawn) == 4, "code that changed is not served stale pictures"
    (writable / "scenes.npz").write_bytes(b"damaged")
    datasets.load_scenes([writable])
    datasets.load_scenes([writable])
    assert len(drawn) == 6, "a damaged cache is drawn again, and kept"


def test_a_small_set_of_scenes_is_drawn_on_the_spot(tmp_path):
    data = load("scenes", tmp_path, count=40)
    assert len(data.train_images) == 40 and len(data.test_images) == 4 and os.listdir(tmp_path) == []
    assert len(data.truth["train_background"]) == 40


# ------------------------------------------------------------------------------------ a folder of one's own


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)


def test_pictures_of_every_kind_become_32_by_32_rgb(tmp_path):
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
        picture = read_picture(tmp_path / name)
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8, name
        assert np.abs(picture.mean(axis=(0, 1)) - color).max() < 4, name
    assert read_picture(tmp_path / "bits.png").shape == (32, 32, 3)


def test_the_centre_is_kept_and_resized_without_aliasing(tmp_path):
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 96:160] = 255  # the central square is white
    save(tmp_path / "wide.png", wide)
    assert read_picture(tmp_path / "wide.png").min() == 255
    checkers = np.indices((320, 320)).sum(axis=0) % 2 * np.uint8(255)
    save(tmp_path / "checkers.png", checkers.astype(np.uint8))
    small = read_picture(tmp_path / "checkers.png").astype(int)
    assert np.abs(small - 127).max() < 8, "an even grey, no moire"
    upside_down = Image.fromarray(np.repeat([[0], [255]], 32, axis=0).repeat(64, axis=1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turned by 180 degrees, as telephones save pictures
    upside_down.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg")[0].mean() > 200


def test_a_folder_of_pictures(tmp_path):
    folder = tmp_path / "pets"
    for i in range(20):
        save(folder / "cat" / f"{i}.png", np.full((33, 40, 3), i, np.uint8))
    for i in range(2):
        save(folder / "dog" / "puppies" / f"{i}.PNG", np.full((40, 33, 3), 100 + i, np.uint8))
    save(folder / "emu" / "only.jpg", np.full((3000, 4000, 3), 77, np.uint8))  # huge
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "cat" / "cut.png").write_bytes((folder / "emu" / "only.jpg").read_bytes()[:1000])
    (folder / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "empty").mkdir()
    with pytest.warns(UserWarning, match="Skipped") as caught:
        data = load(folder)
    assert "broken.jpg" in str(caught[0].message) and "cut.png" in str(caught[0].message)
    assert "._0" not in str(caught[0].message)
    assert data.name == "pets" and data.class_names == ["cat", "dog", "emu"]
    assert np.bincount(data.train_labels).tolist() == [18, 1, 1], "a class of one keeps it to learn from"
    assert np.bincount(data.test_labels).tolist() == [2, 1]
    assert data.train_images.shape == (20, 32, 32, 3) and data.test_images.dtype == np.uint8
    both = np.concatenate([data.train_images[data.train_labels == 0], data.test_images[data.test_labels == 0]])[:, 0, 0, 0]
    assert sorted(both.tolist()) == list(range(20)), "each picture in one part, with its own label"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(load(folder).test_images, data.test_images), "the same split every time"


def test_the_first_few_of_a_folder_are_of_all_classes(tmp_path):
    for name in "abcd":
        for i in range(100):
            save(tmp_path / name / f"{i}.png", np.full((4, 4, 3), "abcd".index(name), np.uint8))
    data = load(tmp_path)
    assert np.bincount(data.test_labels).tolist() == [10] * 4 and (np.bincount(data.test_labels[:20], minlength=4) >= 2).all()
    assert (np.bincount(data.train_labels[:80], minlength=4) >= 10).all()
    assert np.array_equal(data.test_images[:, 0, 0, 0], data.test_labels), "each with its own label"


def test_one_class_is_enough(tmp_path):
    for i in range(5):
        save(tmp_path / "mine" / f"{i}.png", np.full((32, 32, 3), i, np.uint8))
    for folder in (tmp_path, tmp_path / "mine"):  # with a sub-folder, and without
        data = load(str(folder))
        assert data.class_names == ["mine"] and len(data.train_images) == 4 and len(data.test_images) == 1
    for i in range(1, 5):
        (tmp_path / "mine" / f"{i}.png").unlink()
    data = load(tmp_path)
    assert len(data.train_images) == 1 and data.test_images.shape == (0, 32, 32, 3)
    assert len(load(tmp_path, count=3).train_images) == 1


def test_a_decompression_bomb_is_a_sentence(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", np.zeros((300, 300), np.uint8))
    for limit in (60_000, 30_000):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="bomb.png .*90000 pixels"):
            load(tmp_path)


def test_a_folder_of_sounds_is_mixed_to_mono_at_8_khz(tmp_path):
    seconds = np.arange(44_100) / 44_100
    tone, too_high = np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 6000 * seconds)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stereo = 0.4 * np.stack([tone + too_high, tone - 0.5 * too_high], axis=1)
    soundfile.write(tmp_path / "a" / "stereo.wav", stereo, 44_100)
    soundfile.write(tmp_path / "b" / "mono.flac", 0.4 * tone[:8000], 8000)
    soundfile.write(tmp_path / "b" / "lossy.ogg", 0.4 * tone, 44_100)
    (tmp_path / "b" / "broken.wav").write_bytes(b"RIFF....")
    soundfile.write(tmp_path / "b" / "empty.wav", np.zeros(0), 8000)
    with pytest.warns(UserWarning, match="broken.wav.*empty.wav|empty.wav.*broken.wav"):
        data = load(tmp_path)
    assert data.class_names == ["a", "b"] and data.sample_rate == 8000 and data.speaker_names == ["unknown"]
    assert sorted(data.train_labels.tolist()) == [0, 1] and data.test_labels.tolist() == [1]
    stereo = data.train_waveforms[data.train_labels.tolist().index(0)]
    assert stereo.shape == (8000,) and stereo.dtype == np.float32 and np.abs(stereo).max() <= 1
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert np.abs(stereo - expected)[200:-200].max() < 2e-3, "440 Hz as it was, 6 kHz gone, not folded down"


def test_sounds_without_sub_folders_are_one_class(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", np.full(100 + i, 0.5), 8000)
    data = load(folder)
    assert data.class_names == ["birds"] and len(data.train_waveforms) == 2 and len(data.test_waveforms) == 1
    assert len(load(folder, count=1).train_waveforms) == 1


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 44_100, 48_000, 4000])
def test_resampling_keeps_pitch_and_length(rate):
    tone = np.sin(2 * np.pi * 500 * np.arange(rate) / rate).astype(np.float32)
    result = resample(tone, rate, 8000)
    assert result.shape == (8000,) and result.dtype == np.float32
    assert np.abs(result - np.sin(2 * np.pi * 500 * np.arange(8000) / 8000))[400:-400].max() < 5e-3


def test_what_is_no_data_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no pictures or sounds"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="no pictures or sounds"):
        load(tmp_path)
    (tmp_path / "class" / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="No file in .* can be read.*a.png"):
        load(tmp_path)
    for name in ("cifar100", str(tmp_path / "missing"), ""):
        with pytest.raises(UserError, match="cifar10, fsdd, scenes, voices or an existing folder"):
            load(name)
    with pytest.raises(UserError, match="no sound that can be read"):
        read_sound(tmp_path / "missing.wav")
