"""What the tests share: one device and precision, no data but their own, and tiny networks."""

import os
import shutil
from pathlib import Path

os.environ["NANOGEN_PRECISION"] = "float32"  # before anything measures it
os.environ["NANOGEN_DEVICE"] = "cpu"  # test_accelerator.py looks for a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nanogen.image import flow, mar, maskgit, meanflow, pixel_ar, token_ar, tokenizer, var
from nanogen.lab.runs import Run, train_run
from nanogen.lab.train import Training

torch.set_num_threads(1)  # tiny networks run no faster on more, and sums come out the same


def pytest_configure(config):
    config.addinivalue_line("markers", "real_data: leave $NANOGEN_DATA as it is")


@pytest.fixture(autouse=True)
def no_data_but_our_own(request, tmp_path_factory, monkeypatch):
    """An empty data folder, so that no test depends on the data of this machine; and a seed."""
    if "real_data" not in request.keywords:
        monkeypatch.setenv("NANOGEN_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))
    torch.manual_seed(0)


def awake(model: nn.Module, std: float = 0.3) -> nn.Module:
    """The model with random numbers wherever it starts at zero (heads, gates): else its answer
    would be constant, and no test of it could fail."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=std)
    return model.eval()


def learn(model: nn.Module, batch: dict, lr: float, steps: int = 60) -> list[dict]:
    """The metrics of each step of a training on one batch, with the same random numbers in all."""
    optimizer, found = torch.optim.Adam(model.parameters(), lr), []
    for _ in range(steps):
        torch.manual_seed(0)
        loss, metrics = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append({"loss": loss.item()} | metrics)
    return found


def tiny_tokenizer(bottleneck: str = "vq", grid: int = 4, **fields) -> tokenizer.Tokenizer:
    """Images of 2 x grid pixels a side -> grid^2 tokens of 32 codes (fsq: 20) or 4 channels."""
    own = {"fsq": dict(levels=(5, 4)), "kl": dict(channels=4), "none": dict(channels=4)}
    own = own.get(bottleneck, dict(codebook_size=32))
    small = dict(widths=(16,), blocks=1, size=2 * grid, perceptual=0.0) | own | fields
    torch.manual_seed(0)
    return awake(tokenizer.Tokenizer(tokenizer.Config(bottleneck=bottleneck, **small)))


def tiny(method: str, grid: int = 4, asleep: bool = False, **fields) -> nn.Module:
    """A method's model with 3 classes, `awake` unless told. Its chain has grid x grid units."""
    small, size = dict(width=32, depth=2, heads=2, classes=3) | fields, 2 * grid
    vq = tiny_tokenizer(grid=grid) if method in ("token_ar", "maskgit") else None
    kl = tiny_tokenizer("kl", grid=grid) if method in ("dit", "mar") else None
    if method == "var":
        scaled = tiny_tokenizer("multiscale", grid=grid, code_dim=4, scales=(1, 2, 3, 4))
    torch.manual_seed(1)
    unet = dict(width=32, classes=3, widths=(16, 32), size=size)
    model = {
        "pixel_ar": lambda: pixel_ar.PixelAR(pixel_ar.Config(**small, size=grid)),
        "token_ar": lambda: token_ar.TokenAR(token_ar.Config(**small, size=size), vq),
        "maskgit": lambda: maskgit.MaskGIT(maskgit.Config(**small, size=size), vq),
        "var": lambda: var.VAR(
            var.Config(**(dict(passes=(1, 1, 2, 2)) | small), size=size), scaled),
        "mar": lambda: mar.MAR(
            mar.Config(**(dict(head_width=32, head_repeat=1) | small), size=size), kl),
        "meanflow": lambda: meanflow.MeanFlow(meanflow.Config(**unet | fields)),
        "flow": lambda: flow.Flow(flow.Config(**unet | fields)),
        "dit": lambda: flow.Flow(flow.Config(**small, network="dit", size=size), kl),
    }[method]()
    return model if asleep else awake(model)


def tiny_data(method: str, grid: int = 4, count: int = 16) -> dict[str, torch.Tensor]:
    """Random training data for `tiny(method, grid)`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = torch.randint(256, (count, 3, 2 * grid, 2 * grid), generator=generator).byte()
    latents = torch.randn(count, 4, grid, grid, generator=generator)
    tokens = sum(side**2 for side in range(1, grid + 1)) if method == "var" else grid**2
    chain = pixels.flatten(2).transpose(1, 2)[:, : grid**2].contiguous()
    units = {"pixel_ar": {"pixels": chain}, "mar": {"latents": latents},
             "dit": {"latents": latents}, "flow": {"images": pixels},
             "meanflow": {"images": pixels}}
    codes = {"tokens": torch.randint(32, (count, tokens), generator=generator)}
    return units.get(method, codes) | {"labels": labels}


def fake_fsdd(folder: Path, rate: int = 8000) -> None:
    """An FSDD of 40 clips of noise."""
    waveform = np.random.default_rng(0).integers(-3000, 3000, 40 * rate // 2).astype(np.int16)
    np.savez(folder / "fsdd.npz", waveform=waveform, sample_rate=np.array(rate),
             offsets=np.arange(41) * (rate // 2), digits=np.arange(40) % 10,
             speakers=np.arange(40) // 10 % 2, is_test=np.arange(40) >= 30,
             speaker_names=np.array(["george", "jackson"]))


def briefly(steps: int, **fields) -> Training:
    """A training of a few steps."""
    return Training(**(dict(steps=steps, batch_size=16, warmup=2, lr=5e-3) | fields))


@pytest.fixture(scope="session")
def own_images(tmp_path_factory):
    """A folder of one's own images: 30 reddish ones of apples, 30 bluish ones of plums."""
    folder = tmp_path_factory.mktemp("data") / "fruit"
    random = np.random.default_rng(0)
    for name, colour in (("apple", (200, 40, 40)), ("plum", (40, 40, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            noise = random.integers(-40, 40, (32, 32, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


TINY = {  # fields of the Configs of tiny runs
    "judge": dict(widths=(16, 16, 16)),
    "tokenizer": dict(codebook_size=32, widths=(16, 16), blocks=1),
    "tokenizer-kl": dict(bottleneck="kl", channels=4, widths=(16, 16), blocks=1),
    "token_ar": dict(width=32, depth=1, heads=2),
    "maskgit": dict(width=32, depth=1, heads=2),
    "pixel_ar": dict(width=32, depth=1, heads=2, size=4),
    "flow": dict(widths=(16, 32), width=32),
    "dit": dict(network="dit", width=32, depth=1, heads=2),
}
QUICK = dict(steps=3, batch_size=16, compile=False)


def tiny_run(name: str, data, folder: Path, **fields) -> Run:
    """A run of three steps. name: one in TINY."""
    method = "flow" if name == "dit" else name.removesuffix("-kl")
    return train_run(method, data, TINY[name] | QUICK | fields, folder, quiet=True)


@pytest.fixture(scope="session")
def finished(own_images, tmp_path_factory) -> dict[str, Run]:
    """Tiny runs on `own_images`, side by side in one folder. Tests that change files copy them."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {"perceptual": tiny_run("judge", own_images, folder / "perceptual-fruit")}
    return runs | {name: tiny_run(name, own_images, folder / f"{name}-fruit") for name in TINY}


@pytest.fixture
def copied(finished, tmp_path):
    """copied("flow"): the folder of that run, in a copy of all runs."""
    source = next(iter(finished.values())).folder.parent
    return lambda name: shutil.copytree(
        source, tmp_path / "runs", dirs_exist_ok=True) / finished[name].folder.name
