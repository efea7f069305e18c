"""What the tests share: a machine that answers the same everywhere, no data but their own, and tiny networks."""

import os

os.environ["NANOGEN_PRECISION"] = "float32"  # before anything measures it
os.environ["NANOGEN_DEVICE"] = "cpu"  # the same sums everywhere; test_accelerator.py looks for a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nanogen.image import flow, mar, maskgit, meanflow, pixel_ar, token_ar, tokenizer, var
from nanogen.lab.train import Training

torch.set_num_threads(1)  # tiny networks run no faster on more, and sums come out the same


def pytest_configure(config):
    config.addinivalue_line("markers", "real_data: leave $NANOGEN_DATA as it is")


@pytest.fixture(autouse=True)
def no_data_but_our_own(request, tmp_path_factory, monkeypatch):
    """An empty data folder, so that no test depends on what the machine happens to hold. And a seed."""
    if "real_data" not in request.keywords:
        monkeypatch.setenv("NANOGEN_DATA", str(tmp_path_factory.getbasetemp() / "no-data"))
    torch.manual_seed(0)


def awake(model: nn.Module, std: float = 0.3) -> nn.Module:
    """The model with random numbers wherever it starts at zero (heads, gates): else its answer would be constant, and
    no test of it could fail."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_tokenizer(bottleneck: str = "vq", grid: int = 4, **fields) -> tokenizer.Tokenizer:
    """Pictures of 2 x grid pixels a side -> grid x grid tokens, one of 32 (fsq: 20) words or of 4 channels each."""
    fields = dict(codes=32, levels=(5, 4), channels=4, widths=(16,), blocks=1, size=2 * grid, perceptual=0.0) | fields
    torch.manual_seed(0)
    return awake(tokenizer.Tokenizer(tokenizer.Config(bottleneck=bottleneck, **fields)))


def tiny(chapter: str, grid: int = 4, asleep: bool = False, **fields) -> nn.Module:
    """A chapter's model with 3 classes, `awake` unless told. Its chain has grid x grid units."""
    small = dict(width=32, depth=2, heads=2, classes=3) | fields
    vq = tiny_tokenizer(grid=grid) if chapter in ("token_ar", "maskgit") else None
    kl = tiny_tokenizer("kl", grid=grid) if chapter in ("dit", "mar") else None
    multiscale = tiny_tokenizer("multiscale", grid=grid, code_dim=4, scales=(1, 2, 3, 4)) if chapter == "var" else None
    torch.manual_seed(1)
    model = {
        "pixel_ar": lambda: pixel_ar.PixelAR(pixel_ar.Config(**small, size=grid)),
        "token_ar": lambda: token_ar.TokenAR(token_ar.Config(**small, size=2 * grid), vq),
        "maskgit": lambda: maskgit.MaskGIT(maskgit.Config(**small, size=2 * grid), vq),
        "var": lambda: var.VAR(var.Config(**(dict(passes=(1, 1, 2, 2)) | small), size=2 * grid), multiscale),
        "mar": lambda: mar.MAR(mar.Config(**(dict(head_width=32, head_repeat=1) | small), size=2 * grid), kl),
        "meanflow": lambda: meanflow.MeanFlow(meanflow.Config(width=32, classes=3, widths=(16, 32), size=2 * grid)),
        "flow": lambda: flow.Flow(flow.Config(**small, widths=(16, 32), attention_at=1, size=2 * grid)),
        "dit": lambda: flow.Flow(flow.Config(**small, network="dit", size=2 * grid), kl),
    }[chapter]()
    return model if asleep else awake(model)


def tiny_data(chapter: str, grid: int = 4, count: int = 16) -> dict[str, torch.Tensor]:
    """Random training data for `tiny(chapter, grid)`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = torch.randint(256, (count, 3, 2 * grid, 2 * grid), generator=generator).byte()
    return {
        "pixel_ar": {"pixels": pixels.flatten(2).transpose(1, 2)[:, : grid**2].contiguous(), "labels": labels},
        "token_ar": {"tokens": torch.randint(32, (count, grid**2), generator=generator), "labels": labels},
        "maskgit": {"tokens": torch.randint(32, (count, grid**2), generator=generator), "labels": labels},
        "var": {"tokens": torch.randint(32, (count, sum(side**2 for side in range(1, grid + 1))), generator=generator),
                "labels": labels},
        "mar": {"latents": torch.randn(count, 4, grid, grid, generator=generator), "labels": labels},
        "meanflow": {"images": pixels, "labels": labels},
        "flow": {"images": pixels, "labels": labels},
        "dit": {"latents": torch.randn(count, 4, grid, grid, generator=generator), "labels": labels},
    }[chapter]


def briefly(steps: int, **fields) -> Training:
    """A training of a few steps."""
    return Training(**(dict(steps=steps, batch_size=16, compile=False, lr=5e-3) | fields))


@pytest.fixture(scope="session")
def own_pictures(tmp_path_factory):
    """A folder of one's own pictures: 30 reddish ones of apples, 30 bluish ones of plums."""
    folder = tmp_path_factory.mktemp("data") / "fruit"
    random = np.random.default_rng(0)
    for name, colour in (("apple", (200, 40, 40)), ("plum", (40, 40, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            noise = random.integers(-40, 40, (32, 32, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder
