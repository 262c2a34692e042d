"""The transform's ops with a norm or an activation in front; without a GPU they compute it in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from prologue_bound import exact_row
from random_prologues import random_prologue
from random_transforms import random_transform
from torch import Tensor
from transform_bound import codes_of

from freeact_fx.codegen import prologue_ops  # noqa: F401  (registers the ops)
from freeact_fx.codegen.engine_ops import to_plain_order
from freeact_fx.codegen.prologue import NORMS, Prologue

NUM_TYPES = 2


def call(
    kind: str, lead: tuple[int, ...], qmax: int = 7
) -> tuple[object, tuple[object, ...], Tensor, Prologue]:
    """The op of a prologue and its arguments; x and the prologue as rows."""
    x = torch.randn(*lead, 48)
    rows = x.reshape(-1, 48)
    p = random_prologue(kind, rows)
    t = random_transform("shift", 48, NUM_TYPES, seed=1)
    types = torch.zeros(lead, dtype=torch.int64)
    operands = (types, t.shift, t.channel_scale, t.left, t.right, t.clip)
    static = (list(t.widths), list(t.slice_of_type), 0, qmax)
    other = () if p.other is None else (p.other.view_as(x),)
    if p.kind not in NORMS:
        op = torch.ops.freeact.engine_gated_transform_quantize.default
        return op, (x, *(other or (None,)), *operands, p.kind, *static), rows, p
    norm = (p.weight, p.bias, *operands, p.kind, p.eps, p.weight_offset)
    name = "engine_add_norm" if other else "engine_norm"
    op = getattr(torch.ops.freeact, f"{name}_transform_quantize").default
    return op, (x, *other, *norm, *static), rows, p


KINDS = ("rms", "rms of a sum", "layer", "silu", "gelu_tanh alone")


@pytest.mark.parametrize("lead", [(1,), (3, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, lead: tuple[int, ...]) -> None:
    op, args, _, _ = call(kind, lead)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_e4m3(kind: str) -> None:
    op, args, _, _ = call(kind, (3, 5), 448)
    # Not test_schema, which compares; torch compares no fp8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize("qmax", [7, 448])
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_bounds_of_the_kernel(kind: str, qmax: int) -> None:
    op, args, rows, prologue = call(kind, (2, 3), qmax)
    codes, scale, *total = op(*args)  # type: ignore[operator]
    row, error = exact_row(rows, prologue)
    t = random_transform("shift", 48, NUM_TYPES, seed=1)
    types = torch.zeros(6, dtype=torch.int64)
    bounds = codes_of(t, row, types, 0, qmax, error)
    bounds.check(to_plain_order(codes).view(6, -1), scale.view(6, 1))
    if total:
        assert torch.equal(total[0].view(6, -1), rows + prologue.other)
