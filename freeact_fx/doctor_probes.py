"""What ``freeact doctor`` does on a machine: compile, multiply, compare and time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import compat
from .doctor import FAILED, OK, Check, has_bf16, has_gpu_kernels, instructions
from .reference import pack_int4
from .timing import time_interleaved

_PRODUCT_SHAPE = (256, 2048, 2048)  # M, N, K, as in README.md


class _Probe(nn.Module):
    """An MLP of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.nn.functional.silu(self.up(x)))
        return result


def _devices() -> list[str]:
    return ["cpu", "cuda"] if has_gpu_kernels() else ["cpu"]


def executed() -> Iterator[Check]:
    for device in _devices():
        yield _product_check(device)
        yield _compile_check(device)


def _on(name: str, device: str) -> str:
    return name if device == "cpu" else f"{name} on the gpu"


def _product_check(device: str) -> Check:
    """Codes times packed codes, held against 64-bit integers."""
    name = _on("integer product", device)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (64, 512), generator=generator)
    weight = torch.randint(-7, 8, (96, 512), generator=generator)
    try:
        packed = pack_int4(weight.to(torch.int8)).to(device)
        got = torch.ops.freeact.int_mm(codes.to(device, torch.int8), packed)
    except Exception as error:  # whatever it is, it is the answer
        return _failure(name, error)
    wrong = int((got.cpu().long() != codes @ weight.t()).sum())
    return Check(
        "checks",
        name,
        FAILED if wrong else OK,
        f"[64, 512] x [512, 96]: {wrong} of {got.numel()} values differ from 64-bit integers",
        "Please report this." if wrong else None,
    )


def _compile_check(device: str) -> Check:
    """A tiny model through torch.compile, held against the same passes run eagerly on the CPU, and against float."""
    name = _on("compilation", device)
    generator = torch.Generator().manual_seed(0)
    probe = _Probe().eval().requires_grad_(False)
    x = torch.randn(4, 32, 128, generator=generator)

    def eager(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from .backend import freeact

        return freeact(gm, inputs, options={"compiler": "eager"})

    try:
        with torch.no_grad():
            exact = probe(x)
            with compat.traced_apart(probe, eager) as compiled:
                want = compiled(x)
            probe.to(device)
            start = time.perf_counter()
            with compat.traced_apart(probe, "freeact") as compiled:
                got = compiled(x.to(device)).cpu()
            seconds = time.perf_counter() - start
    except Exception as error:  # a compiler that is missing or broken, for one
        return _failure(name, error)
    difference = float((got - want).norm() / want.norm())
    rounding = float((want - exact).norm() / exact.norm())
    is_right = difference < 1e-2 and 0 < rounding < 0.5
    return Check(
        "checks",
        name,
        OK if is_right else FAILED,
        f"a model of two Linears compiled in {seconds:.1f} s; it differs from the reference by {difference:.1e}, "
        f"from float by {rounding:.1e} (4-bit rounding)",
        None if is_right else "Please report this.",
    )


def _failure(name: str, error: Exception) -> Check:
    reason = next((line for line in str(error).strip().split("\n") if line), "no message")
    return Check(
        "checks",
        name,
        FAILED,
        f"{type(error).__name__}: {reason}",
        "Look at the compiler's checks above; TORCH_LOGS=+inductor shows more.",
    )


def speed() -> Iterator[Check]:
    """The product alone in each arithmetic, and what that means."""
    for device in _devices():
        yield from _product_speed(device)
    if has_bf16(instructions()):
        yield Check(
            "speed",
            "do not expect",
            OK,
            "on this CPU more speed than compiled bf16: it has bf16 instructions, and a bf16 Linear is about as fast "
            "at K=2048 and faster at K=576 (README.md). What stays is the memory",
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        yield Check(
            "speed",
            "do not expect on hopper",
            OK,
            "more arithmetic from 4-bit activations than from 8-bit ones: both run on the int8 engine, and W4A4 is no "
            "faster than W4A8. 4 bits save the weights' memory and bandwidth",
        )


def _product_speed(device: str) -> Iterator[Check]:
    num_tokens, num_outputs, num_features = _PRODUCT_SHAPE
    x = torch.randn(num_tokens, num_features, device=device)
    weight = torch.randn(num_outputs, num_features, device=device)
    x_half, weight_half = x.bfloat16(), weight.bfloat16()
    codes = torch.randint(-7, 8, x.shape, dtype=torch.int8, device=device)
    packed = pack_int4(torch.randint(-7, 8, weight.shape, dtype=torch.int8, device=device))
    timings = time_interleaved(
        {
            "fp32": lambda: nn.functional.linear(x, weight),
            "bf16": lambda: nn.functional.linear(x_half, weight_half),
            "int8": lambda: torch.ops.freeact.int_mm(codes, packed),
        },
        runs=9,
    )
    shape = f"M={num_tokens}, N={num_outputs}, K={num_features}"
    listed = "; ".join(f"{name} {timing}" for name, timing in timings.items())
    scatter = any(t.upper_ms > 1.5 * t.lower_ms for t in timings.values())
    busy = "; they scatter: the machine is busy, and this says little" if scatter else ""
    yield Check("speed", _on("product", device), OK, f"{shape}: {listed}{busy}")
    over = {n: timings[n].median_ms / timings["int8"].median_ms for n in ("fp32", "bf16")}
    copy = ", and an int8 copy besides at run time" if device == "cpu" else ""
    yield Check(
        "speed",
        _on("expect", device),
        OK,
        f"the bare int8 product is {over['fp32']:.1f} times as fast as fp32 and {over['bf16']:.1f} times as fast as "
        f"bf16; transform and rounding take a part of that, the larger the narrower the layer. Packed weights take "
        f"about a quarter of bf16{copy}",
    )
