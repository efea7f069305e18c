"""The training loop, one for every chapter: a budget in minutes or steps, and a run folder that survives anything.

    for each step:  the learning rate follows the share of the budget that is used
                    loss = model.loss(batch);  backward;  clip;  optimizer;  moving average of the weights

Everything random in step n is drawn from a seed made of (seed, n), which pictures are mirrored from n alone, and the
order of the data from (seed, epoch). So nothing about chance needs saving, and a run that is killed and resumed ends,
on a CPU with a budget in steps, in the same weights bit for bit. `torchrun` runs the same code on many devices: each
takes its share of the same batch.

Different from most loops: the moving average (EMA) covers a fixed *share* of the run, not a fixed number of steps
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3): an average over
10,000 steps, right for a week of training, has not forgotten the random start after ten minutes.
"""

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
from nanogen.lab import machine
from nanogen.lab.optimizer import make_optimizers


@dataclass
class Training:
    """How to train: the same fields for every chapter, the values from its recipe."""

    minutes: float = 10.0  # budget in minutes of training time, compilation included
    steps: int = 0  # budget in steps; 0: minutes decide
    batch_size: int = 128  # examples per step, over all processes
    lr: float = 2e-3  # peak learning rate
    optimizer: str = "muon"  # "muon" (matrices; AdamW for the rest) or "adamw"
    weight_decay: float = 0.02  # decoupled, on matrices only
    warmup: float = 0.02  # share of the budget in which the learning rate rises from 0
    hold: float = 0.3  # share of the budget at which it starts its straight way down to 0
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.03  # mean age of the averaged weights, as a share of the steps so far
    compile: bool = True  # let torch.compile fuse the small operations; without a compiler the run goes on without
    flip: bool = True  # mirror every other picture
    seed: int = 0  # of the weights, the order of the data and everything drawn
    save_every: float = 60.0  # seconds between two saved states


def train(model: nn.Module, data: dict[str, Tensor], options: Training, folder: Path | None = None,
          resume: bool = False, quiet: bool = False) -> list[dict]:
    """Train `model` in place and leave the averaged weights in it.

    data: name -> tensor, all of the same length; uint8 "images" (N, 3, H, W) reach the model as float in [-1, 1].
    Returns the log, one dict per percent of the budget. With a folder, also writes `log.jsonl` and `state.pt` there
    about once a minute and at the end or on Ctrl-C; with `resume`, goes on from them.
    Raises UserError when the loss stops being a number.
    """
    count = len(next(iter(data.values())))
    check_options(options, count)
    rank, world = join_processes()
    device, dtype = machine.device(), machine.precision()
    data = {name: tensor.to(device) for name, tensor in data.items()}
    torch.manual_seed(options.seed)
    model.to(device, memory_format=torch.channels_last).train()  # the layout in which convolutions run fastest
    optimizers = make_optimizers(model, options.optimizer, options.lr, options.weight_decay, dtype)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    step, seconds, log = load_state(folder, model, average, optimizers) if resume else (0, 0.0, [])
    loss_fn = compiled(model.loss) if options.compile else model.loss
    budget = options.steps or options.minutes * 60
    bar = tqdm(total=100, disable=quiet or rank > 0, mininterval=2, bar_format="{percentage:3.0f}%|{bar:30}| {postfix}")
    sums, summed, since = defaultdict(float), 0, time.monotonic()
    start, saved = time.monotonic() - seconds, time.monotonic()
    logged = int(100 * (step if options.steps else seconds) / budget) if log else -1  # percent of the budget

    with Interrupt() as interrupt:
        while (used := share_used(step if options.steps else time.monotonic() - start, budget, world)) < 1:
            lr = options.lr * min(used / options.warmup if used < options.warmup else 1, (1 - used) / (1 - options.hold))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr
            batch = draw_batch(data, step, options, rank, world)
            torch.manual_seed(1_000_003 * options.seed + 1009 * step + rank)  # all chance in this step comes from here
            with machine.autocast(dtype):
                loss, numbers = loss_fn(batch)
            loss.backward()
            average_gradients(model, world)
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            update_average(average, model, step, options.ema)

            summed += 1
            for name, value in {"loss": loss, "gradient_norm": norm, **numbers}.items():
                sums[name] = sums[name] + value.detach() if isinstance(value, Tensor) else sums[name] + value
            now = time.monotonic()
            percent = int(100 * (step if options.steps else now - start) / budget)
            if percent > logged or interrupt.asked:
                logged = percent
                record = {"step": step, "percent": percent, "minutes": round((now - start) / 60, 3), "lr": lr,
                          "examples_per_second": round(summed * min(options.batch_size, count) / (now - since), 1)}
                log.append(record | {name: round(float(value) / summed, 5) for name, value in sums.items()})
                check_finite(loss, norm, step, options, folder)
                sums, summed, since = defaultdict(float), 0, now
                left = (now - start) * (1 / max(used, 1e-6) - 1)
                bar.n = percent
                bar.set_postfix_str(f"loss {log[-1]['loss']:.4g}, {record['examples_per_second']:.0f}/s, "
                                    f"{left // 60:.0f} min {left % 60:.0f} s left")
            if folder and rank == 0 and (now - saved > options.save_every or interrupt.asked):
                check_finite(loss, norm, step, options, folder)  # never save broken weights over good ones
                save_state(folder, model, average, optimizers, step, now - start, log)
                saved = time.monotonic()
            if interrupt.asked:
                raise KeyboardInterrupt
    bar.close()
    if folder and rank == 0:
        save_state(folder, model, average, optimizers, step, time.monotonic() - start, log)
    model.load_state_dict(average)
    model.eval()
    return log


def draw_batch(data: dict[str, Tensor], step: int, options: Training, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The examples of one step, on the device: none twice an epoch, in an order that depends on (seed, epoch) alone.

    An epoch leaves out, each time others, what is too few for one more batch. Pictures arrive as float in [-1, 1], half of
    them mirrored. Each process takes its share of the same batch.
    """
    count = len(next(iter(data.values())))
    size = min(options.batch_size, count)
    epoch, position = divmod(step, count // size)
    order = shuffled(count, options.seed + 7919 * epoch)
    index = order[position * size : (position + 1) * size][rank::world].to(next(iter(data.values())).device)
    batch = {name: tensor[index].to(machine.device()) for name, tensor in data.items()}
    if "images" in batch:
        images = batch["images"].float() / 127.5 - 1
        if options.flip:
            mirrored = torch.rand(size, generator=torch.Generator().manual_seed(step))[rank::world] < 0.5
            images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
        batch["images"] = images
    return batch


@functools.lru_cache(maxsize=1)
def shuffled(count: int, seed: int) -> Tensor:
    """The order of an epoch. Kept from step to step: drawing it takes as long as a small network's pass on a GPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def update_average(average: dict[str, Tensor], model: nn.Module, step: int, share: float) -> None:
    """Move the averaged weights towards the model's, so that their mean age stays `share` of the steps so far.

    Karras et al. 2024: with decay (1 - 1/n)^(1/share - 1) at step n, the weight of step i grows as a power of i / n.
    """
    decay = (1 - 1 / step) ** (1 / share - 1) if share > 0 else 0.0
    with torch.no_grad():
        names, weights = zip(*model.named_parameters(), strict=True)
        torch._foreach_lerp_([average[name] for name in names], list(weights), 1 - decay)
        for name, buffer in model.named_buffers():
            if name in average:  # codebooks and running means are averages already
                average[name].copy_(buffer)


def share_used(used: float, budget: float, world: int) -> float:
    """The share of the budget used so far. With several processes, the first one's clock counts for all."""
    if world > 1:
        shared = torch.tensor(float(used), device=machine.device())
        dist.broadcast(shared, 0)
        used = shared.item()
    return used / budget


def compiled(loss_fn):
    """torch.compile fuses small operations (1.7 times the speed on two CPU cores). It needs a C++ compiler on a CPU
    and Triton on a GPU; where that fails, say so once and go on without."""
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
            print(f"torch.compile does not work here ({type(error).__name__}); training goes on without it.")
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
    """What DistributedDataParallel does, in four lines, for any loss function: all gradients, averaged in one go."""
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def check_finite(loss: Tensor, norm: Tensor, step: int, options: Training, folder: Path | None) -> None:
    loss, norm = float(loss.detach()), float(norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"The loss became {loss} (gradient {norm:.3g}) at step {step} or shortly before: try a third of the "
            f"learning rate (--lr {options.lr / 3:.1g}) or a longer warm-up (--warmup 0.1)"
            + (f"; {folder} keeps the last good state." if folder and (folder / "state.pt").exists() else ".")
        )


def check_options(options: Training, count: int) -> None:
    """Refuse settings with which no training of `count` examples can end well, by name."""
    size, world = min(options.batch_size, count), join_processes()[1]  # shares of a batch count alike: they must be alike
    share = f"a multiple of {world}, the number of processes, and at most {count}, that of examples"
    rules = {
        "steps": (options.steps >= 0, "at least 0"), "minutes": (options.steps > 0 or options.minutes > 0, "more than 0"),
        "batch_size": (options.batch_size > 0 and size % world == 0, share if world > 1 else "at least 1"),
        "lr": (options.lr > 0, "more than 0"),
        "optimizer": (options.optimizer in ("muon", "adamw"), "muon or adamw"),
        "warmup": (0 <= options.warmup < 1, "from 0 to below 1"), "hold": (0 <= options.hold < 1, "from 0 to below 1"),
        "ema": (0 <= options.ema <= 1, "from 0 to 1"), "clip": (options.clip > 0, "more than 0"),
    }
    for name, (good, wanted) in rules.items():
        if not good:
            raise UserError(f"{name} must be {wanted}, got {getattr(options, name)!r}.")


def save_state(folder: Path, model, average, optimizers, step: int, seconds: float, log: list[dict]) -> None:
    """Write what a resumed run needs. A crash in the middle leaves the previous state untouched."""
    state = dict(step=step, seconds=seconds, model=model.state_dict(), average=average,
                 optimizers=[optimizer.state_dict() for optimizer in optimizers])
    lines = "".join(json.dumps(record) + "\n" for record in log)
    try:
        torch.save(state, folder / "state.pt.partial")
        (folder / "log.jsonl.partial").write_text(lines)
        for name in ("log.jsonl", "state.pt"):  # in this order: a log may run ahead of its state, not lag behind
            os.replace(folder / f"{name}.partial", folder / name)  # all or nothing
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"Cannot save to {folder} ({error}): is the disk full? The last good state is kept.") from error


def load_state(folder: Path, model, average, optimizers) -> tuple[int, float, list[dict]]:
    """Put a saved state into model, average and optimizers; returns (step, seconds of training, log)."""
    path = folder / "state.pt"
    if not path.exists():
        return 0, 0.0, []
    try:
        state = torch.load(path, map_location=machine.device(), weights_only=True)
        model.load_state_dict(state["model"])
        average.update(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except Exception as error:
        raise UserError(f"{path} is damaged or belongs to another network ({type(error).__name__}); "
                        "delete it to start this run again.") from error
    return state["step"], state["seconds"], [record for record in log if record["step"] <= state["step"]]


class Interrupt:
    """Turns the first Ctrl-C into a request, so that the loop can save before it stops."""

    asked = False

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()  # only there may signals be handled
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.previous)
