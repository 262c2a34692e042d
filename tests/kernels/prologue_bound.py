"""What a prologue makes of a token in fp64, and how far from it a kernel may be that computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transform_bound import FP32_ROUNDING

from freeact_fx.codegen.prologue import ACTIVATIONS, Prologue

# Of fp32 functions on the GPU: the inverse root, exp, a division, the error function; in fp32 roundings.
FUNCTION = 8


def exact_row(x: Tensor, prologue: Prologue) -> tuple[Tensor, Tensor]:
    """Rows [M, K] in fp64 and how far a kernel's may be from each value."""
    p = prologue
    if p.kind == "none":
        return x.double(), torch.zeros_like(x, dtype=torch.float64)
    if p.kind in ACTIVATIONS:
        return _activated(x.double(), p)
    if p.total is not None:
        assert p.other is not None
        x = x + p.other  # rounded, in its dtype
    row, u = x.double(), FP32_ROUNDING
    # A sum is over each of two dimensions, in any order: fewer than 512 roundings one after the other.
    sum_error = 512 * u
    error = torch.zeros_like(row)
    if p.kind == "layer":
        mean = row.mean(-1, keepdim=True)
        error = sum_error * row.abs().mean(-1, keepdim=True) + u * (row - mean).abs()
        row = row - mean
    deviation = (row.square().mean(-1, keepdim=True) + p.eps).sqrt()
    # By the triangle inequality errors of the values move their root mean square by no more than theirs.
    relative = error.square().mean(-1, keepdim=True).sqrt() / deviation + sum_error + FUNCTION * u
    row, error = row / deviation, error / deviation + (row.abs() + error) / deviation * relative
    if p.weight is not None:
        weight = p.weight_offset + p.weight.double()
        row, error = row * weight, error * weight.abs() + 2 * u * (row * weight).abs()
    if p.bias is not None:
        row = row + p.bias.double()
        error = error + u * row.abs()
    return row, error * (1 + 2**-8)


def _activated(gate: Tensor, p: Prologue) -> tuple[Tensor, Tensor]:
    up = torch.ones_like(gate) if p.other is None else p.other.double()
    if p.kind == "gelu":
        # 1 + erf is off by roundings of numbers up to 2, however small it is.
        row, error = F.gelu(gate), FUNCTION * FP32_ROUNDING * gate.abs()
    else:
        inner = gate if p.kind == "silu" else 1.6 * (gate.abs() + 0.045 * gate.abs() ** 3)
        row = F.silu(gate) if p.kind == "silu" else F.gelu(gate, approximate="tanh")
        # exp turns errors of its operand, a few roundings of it, into relative ones.
        error = row.abs() * (FUNCTION + 4 * inner.abs()) * FP32_ROUNDING
    return row * up, (error * (1 + 2**-8) + 2 * FP32_ROUNDING * row.abs()) * up.abs() + 2.0**-120
