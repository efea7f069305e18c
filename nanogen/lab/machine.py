"""The machine: which device computes, in which precision, beside which other processes, and what to
call it in a result.

The only file that asks what hardware is there. Everything else takes the device of its inputs.
"""

import functools
import math
import os
import platform
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from nanogen import UserError
from nanogen.files import reason

# Numbers below 1e-38 count as 0. A CPU computes with them a hundred times slower, and the gradient
# of silence is full of them: without this, the codec trains at a fourth of the speed. Set before
# torch starts its threads, which inherit it.
torch.set_flush_denormal(True)


@functools.cache
def device() -> torch.device:
    """CUDA if there is a GPU, then Apple's MPS, else the CPU. NANOGEN_DEVICE=cpu (or cuda, mps, as
    --device sets it) overrides the choice."""
    if wanted := os.environ.get("NANOGEN_DEVICE"):
        if wanted == "cuda":  # each process of torchrun has its own GPU
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise UserError(f"NANOGEN_DEVICE={wanted} is no device that torch can use here "
                            f"({reason(error)}).") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def precision(wanted: str = "") -> torch.dtype:
    """bfloat16 where matrix products run at least 1.2 times faster in it here, else float32.
    wanted: "float32" or "bfloat16" decide, as NANOGEN_PRECISION does for all that asks for ""."""
    wanted = wanted or os.environ.get("NANOGEN_PRECISION", "")
    if wanted not in ("", "float32", "bfloat16"):
        raise UserError(f"NANOGEN_PRECISION must be float32 or bfloat16, got {wanted}.")
    if wanted or device().type == "mps":
        return getattr(torch, wanted or "float32")
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device()) >= (8, 0) \
            else torch.float32
    return torch.bfloat16 if speed(torch.bfloat16) > 1.2 * speed(torch.float32) else torch.float32


@functools.cache
def speed(dtype: torch.dtype) -> float:
    """Thousands of millions of operations a second (GFLOP/s) in matrix products, by a measurement
    of at most half a second: without instructions for bfloat16, a CPU is 100 times slower in it."""
    side = 512 if device().type == "cpu" else 4096  # small products would measure the call
    a, best, start = torch.ones(side, side, device=device(), dtype=dtype), math.inf, None
    for _ in range(20):  # the fastest counts: other programs can only add time
        before = time.perf_counter()
        a @ a
        synchronize()
        best, start = min(best, time.perf_counter() - before), start or before
        if time.perf_counter() - start > 0.2:
            break
    return 2e-9 * side**3 / best


def seed_of(*parts: int) -> int:
    """One seed made of several numbers, such as (seed, step). Their sum would not do: batch 1 of
    seed 0 would draw the numbers of batch 0 of seed 1."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def autocast(dtype: torch.dtype | None = None) -> torch.autocast:
    """Matrix products and convolutions in the chosen precision; weights and sums stay float32."""
    dtype = dtype or precision()
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def synchronize() -> None:
    """Wait until the device has done its work, so that a clock read afterwards is honest."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())
    elif device().type == "mps":
        torch.mps.synchronize()


def join_processes() -> tuple[int, int]:
    """(rank, number of processes); joins the others when started by torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
        if device().type == "cuda":
            torch.cuda.set_device(device())
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


def describe(precision_of_run: str = "") -> str:
    """The hardware beside every result: "x86_64 CPU, 2 threads, bfloat16, torch 2.13.0"."""
    name = f"{platform.machine()} {device().type.upper()}"
    if device().type == "cuda":
        name = torch.cuda.get_device_name(device())
    elif device().type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    dtype = str(precision(precision_of_run)).removeprefix("torch.")
    return f"{name}, {dtype}, torch {torch.__version__}"
