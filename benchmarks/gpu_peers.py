"""What W4A4 is held against, each a change to a dense bf16 module: fp8, int8, torchao.

A peer that cannot be had (not installed, not for this shape or chip) is a column with its error.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Bench, Call, brief, scaled_mm
from measure import relative_error
from torch import Tensor, nn

EAGER = "bf16 cuBLAS eager"
INDUCTOR = "bf16 Inductor"
MAX_AUTOTUNE = "bf16 max-autotune"
FP8 = "fp8 row-wise"
INT8 = "int8 _int_mm"
TORCHAO_INT8 = "torchao int8 dynamic"
TORCHAO_INT4 = "torchao int4 weight-only"
BF16 = (EAGER, INDUCTOR, MAX_AUTOTUNE)

_INT8_LEAST_TOKENS = 32  # torch._int_mm takes more than 16 rows on a GPU
_E4M3_MAX = 448.0
# 8-bit arithmetic on random data; beyond that it is another function.
_TOLERANCE = 0.1
_INT4_TOLERANCE = 0.4


@dataclass
class Variant:
    """One column: what is timed, or why it is not.

    error_to_bf16  Frobenius norm of the difference to the dense module's output, over that of the output
    compile_s      of the first call
    """

    call: Call | None = None
    error: str | None = None
    compile_s: float | None = None
    error_to_bf16: float | None = None


def sharing_tensors(module: nn.Module) -> nn.Module:
    """A copy of the modules with the same parameters and buffers, so that Linears can be replaced in it."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, memo={id(t): t for t in tensors})


def with_linears(
    module: nn.Module, make: Callable[[nn.Linear], nn.Module], keep: Sequence[str] = ("head",)
) -> nn.Module:
    """A copy in which each Linear is what ``make`` makes of it, but those called ``keep``; the rest is shared."""
    changed = sharing_tensors(module)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name not in keep:
                setattr(parent, name, make(child))
    return changed


class Fp8Linear(nn.Module):
    """e4m3 weights with a scale for each row; activations are quantised to e4m3 token by token in the call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        largest = linear.weight.detach().float().abs().amax(1, keepdim=True).clamp_min(1e-12)
        scale = largest / _E4M3_MAX
        self.register_buffer("weight", (linear.weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())  # [1, N]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).float()
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / _E4M3_MAX
        codes = (flat / scale).to(torch.float8_e4m3fn)
        y = scaled_mm(codes, self.weight, scale, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])


class Int8Linear(nn.Module):
    """int8 weights with a scale for each row through ``torch._int_mm``; activations token by token in the call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.t().contiguous())  # [1, N]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).float()
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (flat / scale).round().to(torch.int8)
        num_tokens = codes.shape[0]
        if num_tokens < _INT8_LEAST_TOKENS:
            codes = F.pad(codes, (0, 0, 0, _INT8_LEAST_TOKENS - num_tokens))
        y = torch._int_mm(codes, self.weight.t())[:num_tokens].float() * scale * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def _torchao(module: nn.Module, config_name: str) -> nn.Module:
    from torchao import quantization

    quantized = sharing_tensors(module)

    def is_layer(child: nn.Module, name: str) -> bool:
        return isinstance(child, nn.Linear) and name.rpartition(".")[2] != "head"

    quantization.quantize_(quantized, getattr(quantization, config_name)(), is_layer)
    return quantized


_CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    EAGER: lambda module: module,
    INDUCTOR: lambda module: module,
    MAX_AUTOTUNE: lambda module: module,
    FP8: lambda module: with_linears(module, Fp8Linear),
    INT8: lambda module: with_linears(module, Int8Linear),
    TORCHAO_INT8: lambda module: _torchao(module, "Int8DynamicActivationInt8WeightConfig"),
    TORCHAO_INT4: lambda module: _torchao(module, "Int4WeightOnlyConfig"),
}


@torch.no_grad()
def peers(
    bench: Bench,
    dense: nn.Module,
    inputs: Sequence[Tensor],
    *,
    against: Sequence[str],
    cuda_graph: bool,
    expected: Any,
) -> dict[str, Variant]:
    """The columns, compiled and called once; with ``bench.peers == "ratio"`` only those that are ``against``.

    expected  what the dense module puts out
    """
    names = [n for n in _CHANGES if bench.peers == "all" or n in against]

    def variant(name: str) -> Variant:
        def build() -> Call:
            module = _CHANGES[name](dense)
            if name == EAGER:
                call: Call = lambda: module(*inputs)  # noqa: E731
                return bench.captured(call) if cuda_graph else call
            # The product of these is torch's own; what max-autotune would choose is the rest.
            compiled = bench.inductor(
                module, cuda_graph=cuda_graph, max_autotune=name not in (INDUCTOR, FP8, INT8)
            )
            return lambda: compiled(*inputs)

        tolerance = _INT4_TOLERANCE if name == TORCHAO_INT4 else _TOLERANCE
        return attempt(build, expected, tolerance)

    return {name: variant(name) for name in names}


def attempt(build: Callable[[], Call], expected: Any, tolerance: float) -> Variant:
    """A column whose first call has been made and whose answer is right, or the error."""
    start = time.perf_counter()
    try:
        call = build()
        found = difference(call(), expected)
        if not found < tolerance:
            raise RuntimeError(f"its output is {found:.3g} from bf16's, allowed is {tolerance}")
    except Exception as error:  # a column that is not there must not stop the others
        # Named at once: what failed within a CUDA graph may make the others fail, too.
        print(f"a column failed: {brief(error)}", file=sys.stderr, flush=True)
        return Variant(error=brief(error))
    return Variant(call, None, round(time.perf_counter() - start, 1), float(f"{found:.3g}"))


def difference(got: Any, want: Any) -> float:
    """The largest relative error of the outputs of two calls."""
    got, want = (v if isinstance(v, (tuple, list)) else (v,) for v in (got, want))
    return max(relative_error(g.float(), w.float()) for g, w in zip(got, want, strict=True))
