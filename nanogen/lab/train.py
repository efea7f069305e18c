"""The training loop, one for all methods: a budget in steps or minutes, and a run that can go on.

    for each step:  set the learning rate by the fraction of the budget that is used
                    loss = model.loss(batch);  backward;  clip;  step;  EMA of the weights

All random numbers of step n come from (seed, n), the mirroring of images from n, and the order of
the data from (seed, epoch). So no generator has to be saved: on a CPU, with a budget in steps, a
run that was killed and resumed ends with exactly the same weights. `torchrun` runs the same code on
several devices: each process takes its part of the same batch.

Different from most loops: the EMA covers a fixed *fraction* of the run instead of a fixed number of
steps (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3). An EMA over 10,000 steps would still contain the random start after ten minutes.
"""

import contextlib
import functools
import json
import math
import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from nanogen import UserError
from nanogen.files import explained, write_atomically, write_text
from nanogen.lab import machine
from nanogen.lab.optimizer import make_optimizers
from nanogen.method import check, choose

BAD_STATE = "{} is damaged or belongs to another network: delete it to start this run again."


@dataclass
class Training:
    """How to train: the same fields for every method; a recipe has the values."""

    minutes: float = 10.0  # budget in minutes of training, compilation included
    steps: int = 0  # budget in steps; 0: minutes decide
    batch_size: int = 128  # examples per step, over all processes
    lr: float = 2e-3  # peak learning rate
    optimizer: str = "muon"  # "muon" (matrices; AdamW for the rest) or "adamw"
    weight_decay: float = 0.02  # decoupled, on matrices only
    warmup: float = 0.02  # fraction of the budget in which the learning rate rises from 0
    decay_start: float = 0.3  # fraction of the budget after which it falls linearly to 0
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.03  # mean age of the averaged weights, as a fraction of the steps so far
    compile: bool = True  # fuse small operations with torch.compile; needs a C++ compiler
    flip: bool = True  # mirror each image with probability 1/2
    seed: int = 0  # of the weights, the order of the data and everything drawn
    save_every: float = 60.0  # seconds between two saved states

    def __post_init__(self):
        choose(self, optimizer=("muon", "adamw"))
        check(self, steps=(self.steps >= 0, "at least 0"), clip=(self.clip > 0, "more than 0"),
              minutes=(self.steps > 0 or self.minutes > 0, "more than 0"),
              batch_size=(self.batch_size > 0, "at least 1"), lr=(self.lr > 0, "more than 0"),
              weight_decay=(self.weight_decay >= 0, "at least 0"),
              warmup=(0 <= self.warmup < 1, "from 0 to below 1"),
              decay_start=(0 <= self.decay_start < 1, "from 0 to below 1"),
              ema=(0 <= self.ema < 1, "from 0 to below 1"))


def train(model: nn.Module, data: dict[str, Tensor], options: Training, folder: Path | None = None,
          resume: bool = False, quiet: bool = False) -> list[dict]:
    """Train `model` in place and leave the EMA weights in it.
    data: name -> tensor, all of one length; uint8 "images" (N, 3, H, W) reach the model as float in
    [-1, 1]. Returns the log, one dict per percent of the budget. With a folder, also writes
    `log.jsonl` and `state.pt` there, about once a minute and at the end or on Ctrl-C; with
    `resume`, goes on from them. Raises UserError when the loss is not finite."""
    count = len(next(iter(data.values())))
    check_batch(options, count)
    rank, world = join_processes()
    device, dtype = machine.device(), machine.precision()
    data = {name: tensor.to(device) for name, tensor in data.items()}
    torch.manual_seed(options.seed)
    model.to(device, memory_format=torch.channels_last).train()  # fastest order for convolutions
    optimizers = make_optimizers(model, options.optimizer, options.lr, options.weight_decay, dtype)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state = load_state(folder, model, ema, optimizers) if resume else None
    step, seconds, log = state or (0, 0.0, [])
    loss_fn = compiled(model.loss) if options.compile else model.loss
    budget = options.steps or options.minutes * 60
    bar = tqdm(total=100, disable=quiet or rank > 0, mininterval=2,
               bar_format="{percentage:3.0f}%|{bar:30}| {postfix}")
    sums, summed, since = defaultdict(float), 0, time.monotonic()
    start, saved = time.monotonic() - seconds, time.monotonic()
    logged = int(100 * (step if options.steps else seconds) / budget) if log else -1  # percent

    def used() -> float:  # the fraction of the budget, by the clock of the first process
        done = torch.tensor(float(step if options.steps else time.monotonic() - start))
        if world > 1:
            dist.broadcast(done := done.to(device), 0)
        return done.item() / budget

    with ctrl_c() as interrupted:
        while (fraction := used()) < 1:
            rise = fraction / options.warmup if fraction < options.warmup else 1.0
            fall = (1 - fraction) / (1 - options.decay_start)  # above 1 before the decay
            lr = options.lr * min(rise, fall)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            batch = draw_batch(data, step, options, rank, world)
            # Everything random in this step comes from this seed.
            torch.manual_seed(1_000_003 * options.seed + 1009 * step + rank)
            with machine.autocast(dtype):
                loss, metrics = loss_fn(batch)
            loss.backward()
            average_gradients(model, world)
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, summed = step + 1, summed + 1
            update_ema(ema, model, step, options.ema)
            for name, value in {"loss": loss, "gradient_norm": norm, **metrics}.items():
                sums[name] += value.detach() if isinstance(value, Tensor) else value
            now = time.monotonic()
            percent = int(100 * (step if options.steps else now - start) / budget)
            if percent > logged or interrupted:
                logged = percent
                check_finite(loss, norm, step, options, folder)
                speed = summed * min(options.batch_size, count) / (now - since)
                log.append({"step": step, "percent": percent, "lr": lr,
                            "minutes": round((now - start) / 60, 3),
                            "examples_per_second": round(speed, 1)}
                           | {name: round(float(v) / summed, 5) for name, v in sums.items()})
                sums, summed, since = defaultdict(float), 0, now
                left = (now - start) * (1 / max(fraction, 1e-6) - 1)
                bar.n = percent
                bar.set_postfix_str(f"loss {log[-1]['loss']:.4g}, {speed:.0f}/s, "
                                    f"{left // 60:.0f} min {left % 60:.0f} s left")
            if folder and rank == 0 and (now - saved > options.save_every or interrupted):
                check_finite(loss, norm, step, options, folder)  # keep the last good state
                save_state(folder, model, ema, optimizers, step, now - start, log)
                saved = time.monotonic()
            if interrupted:
                raise KeyboardInterrupt
    bar.close()
    if folder and rank == 0:
        save_state(folder, model, ema, optimizers, step, time.monotonic() - start, log)
    model.load_state_dict(ema)
    model.eval()
    return log


def draw_batch(data: dict[str, Tensor], step: int, options: Training, rank: int = 0,
               world: int = 1) -> dict[str, Tensor]:
    """The examples of one step, on the device, in an order that depends on (seed, epoch) alone.
    None comes twice in an epoch. An incomplete last batch is dropped, with other examples in each
    epoch. Images arrive as float in [-1, 1]. Each process takes its part of the batch."""
    count = len(next(iter(data.values())))
    size = min(options.batch_size, count)
    epoch, position = divmod(step, count // size)
    order = shuffled(count, options.seed + 7919 * epoch)
    index = order[position * size : (position + 1) * size][rank::world]
    index = index.to(next(iter(data.values())).device)
    batch = {name: tensor[index].to(machine.device()) for name, tensor in data.items()}
    if "images" in batch:
        images = batch["images"].float() / 127.5 - 1
        if options.flip:
            coin = torch.rand(size, generator=torch.Generator().manual_seed(step))[rank::world]
            mirrored = (coin < 0.5).to(images.device)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        batch["images"] = images
    if "videos" in batch:
        batch["videos"] = batch["videos"].float() / 127.5 - 1
    return batch


@functools.lru_cache(maxsize=1)
def shuffled(count: int, seed: int) -> Tensor:
    """The order of an epoch, kept from step to step: drawing it is slow beside a small network."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def update_ema(ema: dict[str, Tensor], model: nn.Module, step: int, fraction: float) -> None:
    """Move the EMA towards the weights, so that its mean age stays `fraction` of the steps so far.
    Karras et al. 2024: with decay (1 - 1/n)^(1/fraction - 1) at step n, step i has the weight
    (i / n)^(1/fraction - 2), up to a factor."""
    decay = (1 - 1 / step) ** (1 / fraction - 1) if fraction > 0 else 0.0
    with torch.no_grad():
        names, weights = zip(*model.named_parameters(), strict=True)
        torch._foreach_lerp_([ema[name] for name in names], list(weights), 1 - decay)
        for name, buffer in model.named_buffers():
            if name in ema:  # running means, and codebooks, which have an EMA of their own
                ema[name].copy_(buffer)


def compiled(loss_fn):
    """The loss by torch.compile, 1.7 times as fast on two CPU cores. It needs a C++ compiler there
    and Triton on a GPU; where it fails, say so once and go on without."""
    import torch._inductor.config as inductor

    inductor.fallback_random = True  # draw the same random numbers as without compilation
    fast = torch.compile(loss_fn, dynamic=False)

    def loss(batch):
        nonlocal fast
        try:
            return fast(batch)
        except Exception as error:
            if fast is loss_fn:
                raise
            fast = loss_fn
            print(f"torch.compile does not work here ({type(error).__name__}); "
                  "training goes on without it.")
            return loss_fn(batch)

    return loss


def join_processes() -> tuple[int, int]:
    """(rank, number of processes); joins the others when started by torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if machine.device().type == "cuda" else "gloo")
        if machine.device().type == "cuda":
            torch.cuda.set_device(machine.device())
    return dist.get_rank(), dist.get_world_size()


def average_gradients(model: nn.Module, world: int) -> None:
    """What DistributedDataParallel does, for any loss function: one all-reduce of all gradients."""
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    means = (flat / world).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def check_finite(loss: Tensor, norm: Tensor, step: int, options: Training, folder: Path | None):
    """UserError with what to try, if the loss or the gradient is NaN or infinite."""
    loss, norm = float(loss.detach()), float(norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        kept = folder and (folder / "state.pt").exists()
        raise UserError(
            f"The loss became {loss} (gradient {norm:.3g}) at step {step} or shortly before: try "
            f"--lr {options.lr / 3:.1g}, a third, or --warmup 0.1"
            + (f"; {folder} keeps the last good state." if kept else "."))


def check_batch(options: Training, count: int) -> None:
    """Processes average their gradients with equal weights, so their parts must be of one size."""
    if min(options.batch_size, count) % (world := join_processes()[1]):
        raise UserError(f"batch_size must be a multiple of {world}, the number of processes, and "
                        f"at most {count}, the number of examples, got {options.batch_size}.")


def save_state(folder: Path, model, ema, optimizers, step: int, seconds: float,
               log: list[dict]) -> None:
    """Write what a resumed run needs. A crash in the middle leaves the previous state untouched."""
    state = dict(step=step, seconds=seconds, model=model.state_dict(), ema=ema,
                 optimizers=[optimizer.state_dict() for optimizer in optimizers])

    def write(path: Path) -> None:
        torch.save(state, path)  # the log before the renaming: it may run ahead, not lag behind
        write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))

    write_atomically(folder / "state.pt", write)


def read_state(folder: Path) -> dict | None:
    """What `save_state` wrote, or None where there is nothing."""
    path = folder / "state.pt"
    with explained(BAD_STATE.format(path)):
        return torch.load(path, map_location=machine.device(), weights_only=True) \
            if path.exists() else None


def load_state(folder: Path, model, ema, optimizers) -> tuple[int, float, list[dict]] | None:
    """Put a saved state, if any, into model, EMA and optimizers -> (step, seconds, log)."""
    if (state := read_state(folder)) is None:
        return None
    with explained(BAD_STATE.format(folder / "state.pt")):
        model.load_state_dict(state["model"])
        ema.update(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        lines = (folder / "log.jsonl").read_text().splitlines()
        log = [line for line in map(json.loads, lines) if line["step"] <= state["step"]]
    return state["step"], state["seconds"], log


@contextlib.contextmanager
def ctrl_c():
    """A list that is empty until the first Ctrl-C, so that the loop can save; the second stops."""
    asked = []

    def ask(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    main = threading.current_thread() is threading.main_thread()  # signals need it
    previous = signal.signal(signal.SIGINT, ask) if main else None
    try:
        yield asked
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)
