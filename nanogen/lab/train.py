"""The training loop, one for all methods: a budget in steps, and a run that can go on.

    for each step:  set the learning rate by the fraction of the budget that is used
                    loss = model.loss(batch);  backward;  clip;  step;  EMA of the weights

All random numbers of step n come from (seed, n), and the order of the data from (seed, epoch). So
no generator has to be saved: on a CPU, a run that was killed and resumed ends with the same weights
to the bit. `torchrun` runs the same code on several devices: each takes its part of the batch. A
budget in minutes, for a shorter run, is a whole run too: the learning rate follows time.

Different from most loops: the EMA covers a fixed *fraction* of the run instead of a fixed number of
steps (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3). An EMA over 10,000 steps would still contain the random start after ten minutes.
"""

import contextlib
import dataclasses
import functools
import json
import math
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
from nanogen.method import Method, check_numbers, choose

BAD_STATE = "{} is damaged or belongs to another network: delete it to start this run again."


@dataclass
class Training:
    """How to train: the same fields for every method; a recipe has the values."""

    steps: int = 1000  # budget in steps, the same on every machine
    minutes: float = 0.0  # budget in minutes instead, compilation included; 0: steps decide
    batch_size: int = 128  # examples per step, over all processes
    lr: float = 2e-3  # peak learning rate
    optimizer: str = "muon"  # "muon" (matrices; AdamW for the rest) or "adamw"
    weight_decay: float = 0.02  # decoupled, on matrices only
    warmup: int = 30  # steps in which the learning rate rises from 0
    decay_start: float = 0.3  # fraction of the budget after which it falls linearly to 0
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.03  # mean age of the averaged weights, as a fraction of the steps so far
    compile: bool = False  # fuse small operations with torch.compile, which takes about a minute
    precision: str = ""  # float32 or bfloat16, of matrix products; "": the faster one here
    flip: bool = True  # mirror each image with probability 1/2
    seed: int = 0  # of the weights, the order of the data and everything drawn
    save_every: float = 60.0  # seconds between two saved states

    def __post_init__(self):
        choose(self, optimizer=("muon", "adamw"), precision=("", "float32", "bfloat16"))
        check_numbers(self, lr=(self.lr > 0, "more than 0"), clip=(self.clip > 0, "more than 0"),
                      seed=(0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
                      warmup=(self.warmup >= 0, "at least 0"),
                      decay_start=(0 <= self.decay_start < 1, "from 0 to below 1"),
                      ema=(0 <= self.ema < 1, "from 0 to below 1"))


def train(model: Method, data: dict[str, Tensor], options: Training, folder: Path | None = None,
          resume: bool = False, quiet: bool = False,
          held_out: dict[str, Tensor] | None = None) -> list[dict]:
    """Train `model` in place and leave the EMA weights in it.
    data: name -> tensor, all of one length; uint8 "images" (N, 3, H, W) reach the model as float in
    [-1, 1]. held_out: the same of examples that are not trained on; their loss is in the first line
    of the log and then at every 5%.
    Returns the log, one dict per percent of the budget. With a folder, also writes `log.jsonl` and
    `state.pt` there, about once a minute and at the end or on Ctrl-C; with `resume`, goes on from
    them. Raises UserError when the loss is not finite."""
    count = len(next(iter(data.values())))
    rank, world = machine.join_processes()
    device, dtype = machine.device(), machine.precision(options.precision)
    data = {name: tensor.to(device) for name, tensor in data.items()}
    model.to(device, memory_format=torch.channels_last).train()  # fastest order for convolutions
    optimizers = make_optimizers(model, options.optimizer, options.lr, options.weight_decay, dtype)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    step, seconds, log = load_state(folder, model, ema, optimizers) if resume else (0, 0.0, [])
    loss_fn = compiled(model.loss) if options.compile else model.loss
    start, saved = time.monotonic() - seconds, time.monotonic()
    progress = Progress(options, log, quiet or rank > 0, step, start)

    def used() -> float:  # the fraction of the budget, by the clock of the first process
        done = progress.fraction(step)
        if world > 1:
            dist.broadcast(shared := torch.tensor(done, device=device), 0)
            done = shared.item()
        return min(done, 1.0)

    fraction = used()
    with ctrl_c() as interrupted:
        while fraction < 1 or not log:  # at least one step, however slow the machine
            rise = (step + 1) / max(options.warmup, 1)
            fall = (1 - fraction) / (1 - options.decay_start)  # above 1 before the decay
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = options.lr * min(rise, fall, 1.0)
            model.progress.fill_(fraction)
            batch = draw_batch(data, step, options, rank, world)
            torch.manual_seed(machine.seed_of(options.seed, step, rank))  # of all that is random
            with machine.autocast(dtype):
                loss, metrics = loss_fn(batch)
            loss.backward()
            machine.average_gradients(model, world)
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            update_ema(ema, model, step, options.ema)
            progress.add({"loss": loss, "gradient_norm": norm, **metrics})
            due = folder and rank == 0 and time.monotonic() - saved > options.save_every
            fraction = used()  # read once: the last step ends the loop and gets its line
            percent = int(100 * fraction + 1e-9)  # 100 x 29 / 100 is 28.99...
            if percent > progress.percent or due or interrupted:
                check_finite(loss, norm, step, options, folder)  # keep the last good state
            if percent > progress.percent or interrupted:
                extra = {}
                if held_out and percent // 5 > progress.percent // 5:
                    extra = {"held_out_loss": held_out_loss(model, held_out, options, dtype)}
                progress.write(step, percent, optimizers[0].param_groups[0]["lr"], count, extra)
            if due or (interrupted and folder and rank == 0):
                save_state(folder, model, ema, optimizers, step, time.monotonic() - start, log)
                saved = time.monotonic()
            if interrupted:
                raise KeyboardInterrupt
    progress.bar.close()
    if folder and rank == 0:
        save_state(folder, model, ema, optimizers, step, time.monotonic() - start, log)
    model.load_state_dict(ema)
    model.eval()
    return log


class Progress:
    """The log, one line for each percent of the budget, and the bar that says how long it takes."""

    def __init__(self, options: Training, log: list[dict], quiet: bool, step: int, start: float):
        self.options, self.log, self.start, self.step = options, log, start, step
        self.percent = int(100 * self.fraction(step) + 1e-9) if log else -1  # of this budget
        self.sums, self.since = defaultdict(float), time.monotonic()
        self.bar = tqdm(total=100, disable=quiet, mininterval=2, initial=max(self.percent, 0),
                        bar_format="{percentage:3.0f}%|{bar:30}|{postfix}, {remaining} left")

    def fraction(self, step: int) -> float:
        """How much of the budget is used after this step."""
        if self.options.minutes:
            return (time.monotonic() - self.start) / (60 * self.options.minutes)
        return step / self.options.steps

    def add(self, metrics: dict) -> None:
        """Sum up what the steps since the last line gave."""
        for name, value in metrics.items():
            self.sums[name] += value.detach() if isinstance(value, Tensor) else value

    def write(self, step: int, percent: int, lr: float, count: int, extra: dict) -> None:
        """A line of the log with the means since the last line, and the bar."""
        now, steps = time.monotonic(), step - self.step
        speed = steps * min(self.options.batch_size, count) / (now - self.since)
        means = {name: round(float(value) / steps, 5) for name, value in self.sums.items()}
        self.log.append({"step": step, "percent": percent, "lr": lr,
                         "minutes": round((now - self.start) / 60, 3),
                         "examples_per_second": round(speed, 1)} | means | extra)
        self.bar.set_postfix_str(f"loss {means['loss']:.4g}, {speed:.0f}/s", refresh=False)
        self.bar.update(percent - max(self.percent, 0))
        self.sums, self.since = defaultdict(float), time.monotonic()
        self.step, self.percent = step, percent


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: dict[str, Tensor], options: Training,
                  dtype: torch.dtype) -> float:
    """The mean loss of examples that are not trained on, by the weights of now (not their EMA),
    with the same random numbers each time."""
    model.eval()
    count, losses = len(next(iter(held_out.values()))), []
    size = min(options.batch_size, count)
    for step in range(count // size):  # an incomplete batch is left out
        batch = draw_batch(held_out, step, dataclasses.replace(options, flip=False, seed=0))
        torch.manual_seed(step)
        with machine.autocast(dtype):
            losses.append(model.loss(batch)[0].item())
    model.train()
    return round(sum(losses) / len(losses), 5)


def draw_batch(data: dict[str, Tensor], step: int, options: Training, rank: int = 0,
               world: int = 1) -> dict[str, Tensor]:
    """The examples of one step, on the device, in an order that depends on (seed, epoch) alone.
    No example comes twice in an epoch. An incomplete last batch is dropped, with other examples in
    each epoch. Images arrive as float in [-1, 1]. Each process takes its part of the batch."""
    count = len(next(iter(data.values())))
    size = min(options.batch_size, count)
    epoch, position = divmod(step, count // size)
    order = shuffled(count, machine.seed_of(options.seed, epoch))
    index = order[position * size : (position + 1) * size][rank::world]
    index = index.to(next(iter(data.values())).device)
    batch = {name: tensor[index].to(machine.device()) for name, tensor in data.items()}
    for name in {"images", "videos", "sources"} & batch.keys():
        batch[name] = batch[name].float() / 127.5 - 1
    if options.flip and "images" in batch:
        seed, images = machine.seed_of(options.seed, step), batch["images"]
        coin = torch.rand(size, generator=torch.Generator().manual_seed(seed))[rank::world]
        mirrored = (coin < 0.5).to(images.device)[:, None, None, None]
        batch["images"] = torch.where(mirrored, images.flip(-1), images)
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
        names, weights = zip(*model.named_parameters(remove_duplicate=False), strict=True)
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


def check_finite(loss: Tensor, norm: Tensor, step: int, options: Training, folder: Path | None):
    """UserError with what to try, if the loss or the gradient is NaN or infinite."""
    loss, norm = float(loss.detach()), float(norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        kept = folder and (folder / "state.pt").exists()
        raise UserError(
            f"The loss became {loss} (gradient {norm:.3g}) at step {step} or shortly before: try "
            f"--lr {options.lr / 3:.1g}, a third, or --warmup {max(100, 3 * options.warmup)}"
            + (f"; {folder} keeps the last good state." if kept else "."))


def check_batch(options: Training, count: int) -> None:
    """Processes average their gradients with equal weights, so their parts must be of one size."""
    if min(options.batch_size, count) % (world := machine.join_processes()[1]):
        raise UserError(f"batch_size must be a multiple of {world}, the number of processes, and "
                        f"at most {count}, the number of examples, got {options.batch_size}.")


def save_state(folder: Path, model, ema, optimizers, step: int, seconds: float,
               log: list[dict]) -> None:
    """Write what a resumed run needs. A crash in the middle leaves the previous state untouched."""
    state = dict(step=step, seconds=seconds, model=model.state_dict(), ema=ema,
                 optimizers=[optimizer.state_dict() for optimizer in optimizers])

    def write(path: Path) -> None:
        torch.save(state, path)
        # `path` is renamed after this: a crash leaves lines too many, which are cut, never too few.
        write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))

    write_atomically(folder / "state.pt", write)


def read_state(folder: Path) -> dict | None:
    """What `save_state` wrote, or None where there is nothing."""
    path = folder / "state.pt"
    with explained(BAD_STATE.format(path)):
        return torch.load(path, map_location=machine.device(), weights_only=True) \
            if path.exists() else None


def load_state(folder: Path, model, ema, optimizers) -> tuple[int, float, list[dict]]:
    """Put a saved state, if any, into model, EMA and optimizers -> (step, seconds, log)."""
    if (state := read_state(folder)) is None:
        return 0, 0.0, []
    with explained(BAD_STATE.format(folder / "state.pt")):
        model.load_state_dict(state["model"])
        ema.update(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            settings = optimizer.state_dict()["param_groups"]  # keep: weight_decay may be new
            optimizer.load_state_dict(saved | {"param_groups": settings})
        lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
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
