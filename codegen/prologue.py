"""What precedes a group's transform and is computed in its kernel: a norm, or an activation function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True, eq=False)
class Prologue:
    """The row x that is transformed, made of what a kernel reads.

    kind           of ``NORMS``: (x - mean) / sqrt(variance + eps) * (weight_offset + weight) + bias, where the mean of
                   "rms" counts as 0; of ``ACTIVATIONS``: kind(x) * other; or "none"
    other          [M, K] floating, or None: what is added to x in front of a norm (their sum rounded as ``total`` is),
                   or what an activation is multiplied by
    weight, bias   [K] floating, or None
    total          [M, K] like x, or None: where the kernel writes x + other
    """

    kind: str = "none"
    other: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    total: Tensor | None = None
    eps: float = 0.0
    weight_offset: float = 0.0

    def __post_init__(self) -> None:
        assert self.kind in ("none", *NORMS, *ACTIVATIONS)
        assert (self.total is not None) == (self.kind in NORMS and self.other is not None)


NO_PROLOGUE = Prologue()


def before_transform(x: Tensor, prologue: Prologue) -> Tensor:
    """The rows [M, K] that a prologue makes of x, in fp32, in plain PyTorch; fills ``total``."""
    p = prologue
    if p.kind == "none":
        return x
    if p.kind in ACTIVATIONS:
        row = _CURVES[p.kind](x.float())
        return row if p.other is None else row * p.other.float()
    if p.total is not None:
        assert p.other is not None
        x = p.total.copy_(x + p.other)
    row = x.float()
    if p.kind == "layer":
        row = row - row.mean(-1, keepdim=True)
    row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + p.eps)
    if p.weight is not None:
        row = row * (p.weight_offset + p.weight.float())
    return row if p.bias is None else row + p.bias.float()


_CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
