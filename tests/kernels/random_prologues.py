"""Prologues with nothing special about them."""

from __future__ import annotations

import torch
from torch import Tensor

from freeact_fx.codegen.prologue import NORMS, Prologue


def random_prologue(kind: str, x: Tensor) -> Prologue:
    """A prologue of x [M, K]: ``Prologue.kind``, "... of a sum" with a residual, "... alone" without an operand."""
    kind, _, how = kind.partition(" ")
    num_features = x.shape[-1]
    other = torch.randn_like(x, memory_format=torch.contiguous_format)
    if kind not in NORMS:
        return Prologue(kind, None if how == "alone" else other)
    has_other = how == "of a sum"
    weight, bias = (torch.randn(num_features).to(x) for _ in range(2))
    return Prologue(
        kind,
        other if has_other else None,
        weight,
        bias if kind == "layer" else None,
        torch.empty_like(other) if has_other else None,
        eps=1e-5,
        weight_offset=float(not has_other),
    )
