"""Transforms with nothing special about them: every operand is there and differs from type to type."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from freeact_fx.reference import branch_codes
from freeact_fx.transform import GroupTransform, kronecker_shape

EXACT_PLANS = ("single", "shift", "duplicate", "branch", "own branch")


def invertible(n: int, generator: torch.Generator) -> Tensor:
    """A random square matrix whose singular values lie in 0.5 .. 2: far from orthogonal, far from singular."""

    def orthogonal() -> Tensor:
        square = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square)[0]

    values = 2 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)
    return ((orthogonal() * values) @ orthogonal()).float()


def random_transform(plan: str, num_features: int, num_types: int, *, seed: int) -> GroupTransform:
    """A transform of one of ``EXACT_PLANS`` or of ``paper``; row ``num_types`` of its tables is the untyped one."""
    generator = torch.Generator().manual_seed(seed)
    shape = kronecker_shape(num_features)
    assert shape is not None
    d1, d2 = shape
    rows = num_types + 1
    num_slices = num_types if plan in ("duplicate", "paper") else 1
    widths = (d1,) * num_slices
    left = torch.cat([invertible(d1, generator) for _ in widths], 1)
    if plan == "paper":
        assert num_types <= d1, "each type needs a column"
        widths = tuple(d1 // num_types + (i < d1 % num_types) for i in range(num_types))
        left = invertible(d1, generator)
    shift = torch.randn(rows, num_features, generator=generator)
    shift[-1] = 0
    transform = GroupTransform(
        plan=plan.removeprefix("own "),
        left=left,
        right=torch.stack([invertible(d2, generator) for _ in widths]),
        clip=0.5 + 0.5 * torch.rand(rows, generator=generator),
        shift=None if plan == "single" else shift,
        channel_scale=2 ** torch.randn(num_features, generator=generator).clamp(-2, 2),
        widths=widths,
        slice_of_type=(*range(num_types), 0) if num_slices > 1 else (0,) * rows,
    )
    if plan.endswith("branch"):
        own_rank = 2 if plan == "own branch" else 0
        rank = own_rank * num_types or 4
        columns = torch.randn(num_features, rank, generator=generator, dtype=torch.float64)
        lowrank = branch_codes(torch.linalg.qr(columns)[0])
        transform = replace(transform, lowrank=lowrank, own_rank=own_rank)
    assert transform.problem() is None
    return transform


def transform_arguments(transform: GroupTransform) -> tuple[Tensor | None, ...]:
    """The operands in the order in which ``reference.transform`` takes them; clip is not one of them."""
    t = transform
    return (t.shift, t.channel_scale, t.left, t.right, t.lowrank)
