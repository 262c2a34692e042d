"""Rows of the engine's ops by themselves: the product beside fp8 and int8 products, the transform beside a copy.

Called by hand, with the operands that a compiled graph hands them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_columns import OURS, achieved, measured, median_of, speedup
from gpu_layers import TWO_TYPES, typed_transform
from gpu_peers import FP8, INT8, Variant
from gpu_timing import Bench, Call, brief, scaled_mm
from torch import Tensor
from torch.nn import functional as F

from freeact_fx import reference
from freeact_fx.codegen import engine_ops
from freeact_fx.codegen.engine_ops import to_engine_order, to_plain_order

FP8_ENGINE = "W4, e4m3 codes"

# What the transform's kernel does before the transform.
NOTHING, RMS_NORM, SILU_MUL = "nothing", "RMSNorm", "SiLU * mul"

_COPY_BYTES = 1 << 30  # read and written
_CHECKED_TOKENS = 256
_BF16_ROUNDING = 1e-2
# Codes that operands rounded to fp16 move over a tie, as a part of all; each by one.
_CODES_THAT_DIFFER = 2e-2
_EPS = 1e-6


@torch.no_grad()
def product_row(
    bench: Bench, num_tokens: int, num_outputs: int, num_features: int, *, cuda_graph: bool
) -> dict[str, Any]:
    """``freeact::engine_linear`` (product, scales, cast to bf16) beside fp8 and int8 products.

    With e4m3 codes it is the fp8 engine, whose speed is that of e4m3 activations, too: one more column.

    Activations are quantised beforehand for all of them. Every copy has weights and activations of its own.
    """
    m, n, k = num_tokens, num_outputs, num_features
    num_bytes = m * k + n * k // 2 + 2 * m * n
    copies = bench.copies(num_bytes)

    def random_codes(rows: int) -> list[Tensor]:
        return [
            torch.randint(-7, 8, (rows, k), device=bench.device, dtype=torch.int8)
            for _ in range(copies)
        ]

    x_codes, w_codes = random_codes(m), random_codes(n)
    x_scale = torch.rand(m, 1, device=bench.device) + 0.5
    w_scale = torch.rand(n, device=bench.device) + 0.5
    # The same integers for all: e4m3 holds them.
    x_fp8, w_fp8 = ([t.to(torch.float8_e4m3fn) for t in ts] for ts in (x_codes, w_codes))
    packed = [reference.pack_int4(w) for w in w_codes]
    in_engine_order = {
        OURS: [to_engine_order(x) for x in x_codes],
        FP8_ENGINE: [to_engine_order(x) for x in x_fp8],
    }
    has_linear = engine_ops.is_hopper(bench.device) or not engine_ops.has_kernels(bench.device)
    ops = torch.ops.freeact

    def ours(i: int, engine: str = OURS) -> Tensor:
        codes, weight = in_engine_order[engine][i], packed[i]
        if has_linear:
            one_slice = (None, None, [k], [0], 0)
            scales = (x_scale, weight, w_scale[None])
            return ops.engine_linear(codes, *scales, *one_slice, torch.bfloat16)
        return (ops.engine_int_mm(codes, weight) * x_scale * w_scale).bfloat16()

    calls: dict[str, Callable[[int], Tensor]] = {
        OURS: ours,
        FP8_ENGINE: lambda i: ours(i, FP8_ENGINE),
        FP8: lambda i: scaled_mm(x_fp8[i], w_fp8[i], x_scale, w_scale[None]),
        INT8: lambda i: torch._int_mm(x_codes[i], w_codes[i].t()),
    }
    rows = slice(0, min(m, _CHECKED_TOKENS))
    exact = x_codes[0][rows].double() @ w_codes[0].double().t()
    scaled = exact * x_scale[rows].double() * w_scale.double()
    variants = {}
    for name, call in calls.items():
        want = exact if name == INT8 else scaled

        def check(call: Callable[[int], Tensor] = call, want: Tensor = want) -> None:
            error = float((call(0)[rows].double() - want).norm() / want.norm())
            if not error < _BF16_ROUNDING:
                raise RuntimeError(f"its output is {error:.3g} from the exact product")

        def run(call: Callable[[int], Tensor] = call) -> list[Tensor]:
            return [call(i) for i in range(copies)]

        variants[name] = _checked(bench, check, run, cuda_graph)
    fields = measured(bench, variants, copies=copies)
    facts = {
        "shape": {"M": m, "N": n, "K": k},
        "called": f"by hand: freeact::{'engine_linear' if has_linear else 'engine_int_mm, scales'}",
        "cuda_graph": cuda_graph,
    }
    return fields | facts | speedup(fields, [FP8]) | achieved(fields, 2.0 * m * n * k, num_bytes)


@torch.no_grad()
def transform_row(bench: Bench, num_tokens: int, num_features: int, before: str) -> dict[str, Any]:
    """The op that transforms and quantises, with two types, means and channel scales, beside a copy.

    before  what is done in the same kernel before: ``NOTHING``, ``RMS_NORM`` or ``SILU_MUL``
    """
    m, d = num_tokens, num_features
    transform = typed_transform(d, TWO_TYPES, bench.device)
    d1, d2 = transform.left.shape[0], transform.right.shape[-1]
    num_inputs = 2 if before == SILU_MUL else 1
    num_bytes = 2 * num_inputs * m * d + m * d + 4 * m + 4 * m  # activations, codes, scales, types
    copies = bench.copies(num_bytes)
    shape = (copies, num_inputs, m, d)
    tokens = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
    norm_weight = torch.rand(d, device=bench.device).bfloat16() + 0.5
    types = torch.randint(0, 2, (m,), device=bench.device, dtype=torch.int32)
    operands = (transform.shift, transform.channel_scale, transform.left, transform.right)
    static = (list(transform.widths), list(transform.slice_of_type), 0, 7)
    rest = (types, *operands, transform.clip)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        ops = torch.ops.freeact
        if before == RMS_NORM:
            norm = ("rms", _EPS, 0.0)
            return ops.engine_norm_transform_quantize(
                x[0], norm_weight, None, *rest, *norm, *static
            )
        if before == SILU_MUL:
            return ops.engine_gated_transform_quantize(x[0], x[1], *rest, "silu", *static)
        return ops.engine_transform_quantize(x[0], *rest, *static)

    def check() -> None:
        import freeact_fx.codegen.prologue_ops  # noqa: F401  (registers the ops)

        rows = slice(0, min(m, _CHECKED_TOKENS))
        x = tokens[0][:, rows].float()
        row = x[0]
        if before == RMS_NORM:
            row = F.rms_norm(row, (d,), norm_weight.float(), _EPS)
        elif before == SILU_MUL:
            row = F.silu(x[0]) * x[1]
        *kinds, qmax = static
        want = reference.transform_quantize(
            row, types[rows], *operands, transform.clip, None, *kinds, 0, qmax
        )[0]
        got = to_plain_order(call(tokens[0])[0][rows])
        differing = (got != want).float().mean().item()
        largest = int((got.int() - want.int()).abs().max())
        if differing > _CODES_THAT_DIFFER or largest > 1:
            raise RuntimeError(
                f"{differing:.2%} of the codes differ from the reference, by up to {largest}"
            )

    copy_bytes = _COPY_BYTES if bench.on_gpu else 1 << 16
    source = torch.randint(0, 255, (copy_bytes // 2,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    variants = {
        OURS: _checked(bench, check, lambda: [call(x) for x in tokens], False),
        "copy": Variant(lambda: [target.copy_(source) for _ in tokens]),
    }
    fields = measured(bench, variants, copies=copies)
    floor_ms = median_of(fields, "copy") * num_bytes / copy_bytes
    facts = {
        "value": floor_ms / median_of(fields, OURS),
        "against": "copy",
        "shape": {"M": m, "d": d, "left": d1, "right": d2},
        "called": "by hand: freeact's transform op of the engine, Tensor.copy_",
        "types": "mixed",
        "copy_bytes": copy_bytes,
    }
    return fields | facts | achieved(fields, 2.0 * m * d * (d1 + d2), num_bytes)


def _checked(bench: Bench, check: Callable[[], None], run: Call, cuda_graph: bool) -> Variant:
    try:
        check()
        return Variant(bench.captured(run) if cuda_graph else run)
    except Exception as error:  # a column that is not there must not stop the others
        return Variant(error=brief(error))
