"""Transform and quantise in Triton's interpreter, against bounds derived around the fp64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from random_transforms import random_transform
from torch import Tensor
from transform_bound import codes_of
from triton.runtime import interpreter

from freeact_fx.codegen.engine_ops import to_plain_order
from freeact_fx.codegen.kernels.transform_quantize import is_supported, transform_quantize
from freeact_fx.transform import GroupTransform

NUM_TYPES = 2


def run(
    t: GroupTransform, x: Tensor, types: Tensor | None, qmax: int, default_type: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes in plain order, and scale."""
    assert is_supported(t.left, t.right, t.widths, qmax)
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip)
    codes, scale = transform_quantize(
        x, types, *operands, t.widths, t.slice_of_type, default_type, qmax
    )
    return to_plain_order(codes), scale


def tokens(num_features: int, num_tokens: int = 5) -> tuple[Tensor, Tensor]:
    """Activations with an outlier channel, and types; the untyped row is the last, by either of its numbers."""
    x = torch.randn(num_tokens, num_features)
    x[:, 3] *= 50
    types = torch.arange(num_tokens, dtype=torch.int32) % (NUM_TYPES + 2) - 1
    return x, types


@pytest.fixture(autouse=True)
def rounding_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To e4m3: to the nearest, ties to even. The interpreter's own loses a carry."""
    convert = interpreter._convert_float

    def nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(data, source, target, mode)
        return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.mark.parametrize("qmax", [7, 127, 448])
@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "paper"])
@pytest.mark.parametrize("num_features", [48, 192])
def test_plans(plan: str, num_features: int, qmax: int) -> None:
    t = random_transform(plan, num_features, NUM_TYPES, seed=1)
    x, types = tokens(num_features)
    for of_tokens, default_type in ((types, 0), (None, 1)):
        bounds = codes_of(t, x, of_tokens, default_type, qmax)
        bounds.check(*run(t, x, of_tokens, qmax, default_type))
        assert bounds.share_of_ties < 0.1 or qmax != 7


@pytest.mark.parametrize(
    ("num_features", "qmax"), [(32, 7), (1536, 7), (3584, 448), (11008, 7), (18944, 7)]
)
def test_real_widths(num_features: int, qmax: int) -> None:
    t = random_transform("shift", num_features, NUM_TYPES, seed=2)
    x, types = tokens(num_features, 3)
    codes_of(t, x, types, 0, qmax).check(*run(t, x, types, qmax))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    t = random_transform("shift", 48, NUM_TYPES, seed=3)
    assert t.shift is not None
    t = replace(t, shift=t.shift.bfloat16())
    x, types = tokens(96)
    x = x.to(dtype)[:, ::2]
    codes_of(t, x, types, 0, 7).check(*run(t, x, types.long(), 7))


def test_units_do_not_matter() -> None:
    """Tokens and factors far outside of fp16 give the codes of those inside."""
    t = random_transform("duplicate", 48, NUM_TYPES, seed=4)
    x, types = tokens(48)
    t = replace(t, shift=None)
    codes, scale = run(t, x, types, 127)
    far = replace(t, left=t.left * 2.0**30, right=t.right * 2.0**-50)
    far_codes, far_scale = run(far, x * 2.0**40, types, 127)
    assert torch.equal(far_codes, codes)
    assert torch.equal(far_scale, scale * 2.0**20)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_poisons_its_own_token(bad: float) -> None:
    t = random_transform("shift", 48, NUM_TYPES, seed=5)
    x, types = tokens(48)
    codes, scale = run(t, x, types, 7)
    x[1, 7] = bad
    bad_codes, bad_scale = run(t, x, types, 7)
    assert not bool(bad_scale[1].isfinite())
    others = [0, 2, 3, 4]
    assert torch.equal(bad_codes[others], codes[others])
    assert torch.equal(bad_scale[others], scale[others])


def test_a_token_of_zeros() -> None:
    t = random_transform("single", 48, NUM_TYPES, seed=6)
    codes, scale = run(t, torch.zeros(2, 48), None, 7)
    assert not bool(codes.any())
    assert bool((scale > 0).all() and (scale < 1e-20).all())


def test_no_tokens() -> None:
    t = random_transform("single", 48, NUM_TYPES, seed=7)
    for qmax, dtype in ((7, torch.int8), (448, torch.float8_e4m3fn)):
        codes, scale = run(t, torch.empty(0, 48), None, qmax)
        assert (codes.shape, codes.dtype, scale.shape) == ((0, 48), dtype, (0, 1))


def test_formats_and_shapes_without_a_kernel() -> None:
    for qmax, d2 in ((0, 8), (7, 9), (448, 9)):
        assert not is_supported(torch.empty(6, 6), torch.empty(1, d2, d2), (6,), qmax)
