"""The transform as a device computes it, for tests that compare codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from freeact_fx.codegen import engine_ops
from freeact_fx.codegen.engine_ops import to_plain_order
from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.transform import GroupTransform


def transformed_on(
    device: torch.device,
    t: GroupTransform,
    x: Tensor,
    types: Tensor | None,
    qmax: int,
    prologue: Prologue = NO_PROLOGUE,
    *,
    default_type: int = 1,
) -> tuple[Tensor, Tensor]:
    """Codes in plain order, and scale, both on the CPU, of what is there; fills ``total``."""
    moved = t.to(device)
    operands = (moved.shift, moved.channel_scale, moved.left, moved.right, moved.clip)
    static = (list(t.widths), list(t.slice_of_type), default_type, qmax)
    names = ("other", "weight", "bias", "total")
    there = {n: v.to(device) for n in names if (v := getattr(prologue, n)) is not None}
    codes, scale = engine_ops.run_transform(
        x.to(device),
        replace(prologue, **there),
        None if types is None else types.to(device),
        *operands,
        *static,
    )
    if prologue.total is not None:
        prologue.total.copy_(there["total"])
    return to_plain_order(codes).cpu(), scale.cpu()
