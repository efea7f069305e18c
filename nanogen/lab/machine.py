"""The machine: which device computes, in which precision, and what to call it in a result.

The only file that asks what hardware is there. Everything else takes the device of its inputs.
"""

import functools
import os
import platform
import time

import torch

from nanogen import UserError
from nanogen.files import reason


@functools.cache
def device() -> torch.device:
    """CUDA if there is a GPU, then Apple's MPS, else the CPU. NANOGEN_DEVICE=cpu (or cuda, mps, as
    --device sets it) overrides the choice."""
    if wanted := os.environ.get("NANOGEN_DEVICE"):
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise UserError(f"NANOGEN_DEVICE={wanted} is no device that torch can use here "
                            f"({reason(error)}).") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def precision() -> torch.dtype:
    """bfloat16 where matrix products run at least 1.2 times faster in it here, else float32.
    Measured, not looked up: on a CPU the answer depends on AVX512-BF16 and AMX.
    NANOGEN_PRECISION=float32 or bfloat16 overrides the measurement."""
    if wanted := os.environ.get("NANOGEN_PRECISION"):
        if wanted not in ("float32", "bfloat16"):
            raise UserError(f"NANOGEN_PRECISION must be float32 or bfloat16, got {wanted}.")
        return getattr(torch, wanted)
    if device().type == "mps":
        return torch.float32
    side = 1024 if device().type == "cpu" else 4096  # small products would measure the call
    operands = {dtype: torch.ones(side, side, device=device(), dtype=dtype)
                for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(operands, float("inf"))
    for _ in range(20):  # the fastest of each counts: other programs can only add time
        for dtype, a in operands.items():
            start = time.perf_counter()
            a @ a
            synchronize()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    faster = best[torch.float32] > 1.2 * best[torch.bfloat16]
    return torch.bfloat16 if faster else torch.float32


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


def describe() -> str:
    """The hardware beside every result: "x86_64 CPU, 2 threads, bfloat16, torch 2.13.0"."""
    if device().type == "cuda":
        name = torch.cuda.get_device_name(device())
    elif device().type == "cpu":
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    else:
        name = f"{platform.machine()} {device().type.upper()}"
    return f"{name}, {str(precision()).removeprefix('torch.')}, torch {torch.__version__}"
