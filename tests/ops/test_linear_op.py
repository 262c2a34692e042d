"""``freeact::linear`` and the ops it is taken apart into agree, and agree with the dense Linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_arguments import linear_arguments
from random_transforms import EXACT_PLANS, random_transform

from freeact_fx import reference
from freeact_fx.config import QuantConfig
from freeact_fx.transform import orthogonal_transform, pack_linear

ops = torch.ops.freeact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8, "e4m3"])
@pytest.mark.parametrize("plan", [*EXACT_PLANS, "paper"])
def test_linear_is_its_parts(plan: str, bits: Any, dtype: torch.dtype) -> None:
    config = QuantConfig(activation_bits=bits)
    t = random_transform(plan, 96, 3, seed=1)
    packed = pack_linear(t, torch.randn(20, 96), torch.randn(20), config)
    x = torch.randn(2, 7, 96).to(dtype)
    types = torch.randint(0, 4, (2, 7), dtype=torch.int32)
    statics = (list(t.widths), list(t.slice_of_type), 0)
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip)
    whole = ops.linear(*linear_arguments(x, types, t, packed, config))
    coefficients = None
    if t.lowrank is None:
        codes, scale = ops.transform_quantize(x, types, *operands, *statics, config.qmax)
    else:
        codes, scale, coefficients = ops.transform_quantize_branch(
            x, types, *operands, t.lowrank, *statics, t.own_rank, config.qmax
        )
    parts = reference.epilogue(
        *(ops.int_mm(codes, packed.weight), scale, packed.weight_scale, packed.bias_table),
        *(
            coefficients,
            packed.branch_weight,
            packed.branch_scale,
            types,
            t.slice_of_type,
            0,
            dtype,
        ),
    )
    assert whole.dtype == dtype
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(("bits", "largest"), [(4, 0.19), (8, 0.13), ("e4m3", 0.13)])
def test_more_bits_are_nearer_to_the_dense_linear(bits: Any, largest: float) -> None:
    """Weights stay at 4 bits, so 8-bit activations leave their error only."""
    config = QuantConfig(activation_bits=bits)
    t = orthogonal_transform(256, config)
    weight, bias, x = torch.randn(64, 256), torch.randn(64), torch.randn(50, 256)
    packed = pack_linear(t, weight, bias, config)
    got = ops.linear(*linear_arguments(x, None, t, packed, config))
    want = torch.nn.functional.linear(x, weight, bias)
    error = float((got - want).norm() / want.norm())
    assert 0.05 < error < largest
