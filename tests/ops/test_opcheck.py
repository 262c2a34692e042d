"""``torch.library.opcheck`` on every op: schema, fakes, dispatch, and tracing with dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_arguments import linear_arguments
from random_transforms import random_transform
from torch import Tensor

import freeact_fx  # noqa: F401  (registers the ops)
from freeact_fx.config import QuantConfig
from freeact_fx.reference import pack_int4
from freeact_fx.transform import GroupTransform, pack_linear

ops = torch.ops.freeact
NUM_TYPES = 2
# Every lead shape once: one token without a batch, none at all, one, odd numbers, and four dimensions.
LEADS = [(), (0,), (1,), (7,), (2, 0), (1, 1), (3, 5), (2, 3, 5)]
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
PLANS = ["single", "shift", "duplicate", "paper", "branch", "own branch"]


def activation(
    lead: tuple[int, ...], *, dtype: torch.dtype = torch.float32, contiguous: bool = True
) -> tuple[Tensor, Tensor]:
    """[..., 48] and its types, the untyped row among them."""
    x = torch.randn(*lead, 48).to(dtype)
    types = torch.randint(0, NUM_TYPES + 1, lead, dtype=torch.int32)
    if not contiguous:
        # Every other element of a buffer with its dimensions in reverse order.
        wide = torch.empty(*(2 * size for size in reversed(x.shape)), dtype=dtype)
        wide[tuple(slice(None, None, 2) for _ in x.shape)] = x.permute(*reversed(range(x.dim())))
        x = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
        types = types.t().contiguous().t()
    return x, types


def transform_args(
    t: GroupTransform, x: Tensor, types: Tensor | None, qmax: int
) -> tuple[Any, ...]:
    operands = (x, types, t.shift, t.channel_scale, t.left, t.right, t.clip)
    if t.lowrank is None:
        return (*operands, list(t.widths), list(t.slice_of_type), 0, qmax)
    return (*operands, t.lowrank, list(t.widths), list(t.slice_of_type), 0, t.own_rank, qmax)


def check_transform(plan: str, x: Tensor, types: Tensor | None, qmax: int) -> None:
    t = random_transform(plan, 48, NUM_TYPES, seed=0)
    op = ops.transform_quantize if t.lowrank is None else ops.transform_quantize_branch
    torch.library.opcheck(op.default, transform_args(t, x, types, qmax))


def linear_args(plan: str, x: Tensor, types: Tensor | None, config: QuantConfig) -> tuple[Any, ...]:
    t = random_transform(plan, 48, NUM_TYPES, seed=0)
    packed = pack_linear(t, torch.randn(11, 48), torch.randn(11), config)
    return linear_arguments(x, types, t, packed, config)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("plan", ["duplicate", "own branch"])
def test_transform_quantize_over_shapes(plan: str, lead: tuple[int, ...]) -> None:
    check_transform(plan, *activation(lead), 7)


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("plan", PLANS)
def test_transform_quantize_over_plans(plan: str, typed: bool) -> None:
    x, types = activation((3, 5))
    check_transform(plan, x, types if typed else None, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("qmax", [0, 7, 127, 448])
def test_transform_quantize_over_dtypes_and_formats(dtype: torch.dtype, qmax: int) -> None:
    for plan in ("shift", "branch"):
        check_transform(plan, *activation((2, 3), dtype=dtype), qmax)


@pytest.mark.parametrize("plan", PLANS)
def test_transform_quantize_on_strided_activations(plan: str) -> None:
    x, types = activation((3, 5), contiguous=False)
    assert not x.is_contiguous()
    check_transform(plan, x, types, 7)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_transform_quantize_takes_types_of_either_width(index_dtype: torch.dtype) -> None:
    x, types = activation((3, 5))
    check_transform("duplicate", x, types.to(index_dtype), 7)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("codes_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_int_mm_over_shapes(codes_dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    codes = torch.randint(-7, 8, (*lead, 34)).to(codes_dtype)
    weight = pack_int4(torch.randint(-7, 8, (5, 34)).to(torch.int8))
    # Why without test_schema: it compares the inputs before and after, and torch compares no fp8.
    tests = [t for t in CHECKS if codes_dtype == torch.int8 or t != "test_schema"]
    for op in (ops.int_mm.default, ops.int_mm_reference.default):
        torch.library.opcheck(op, (codes, weight), test_utils=tests)


def test_int_mm_on_strided_codes() -> None:
    codes = torch.randint(-7, 8, (34, 6, 3)).to(torch.int8).permute(2, 1, 0)[:, ::2]
    assert not codes.is_contiguous()
    weight = pack_int4(torch.randint(-7, 8, (5, 34)).to(torch.int8))
    torch.library.opcheck(ops.int_mm.default, (codes, weight))


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_branch_product_over_shapes(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    weight = torch.randint(-127, 128, (4, 11)).to(dtype)
    args = (torch.randn(*lead, 4), weight, torch.rand(4))
    torch.library.opcheck(ops.branch_product.default, args)


def test_branch_product_on_strided_operands() -> None:
    coefficients = torch.randn(8, 6, 3).permute(2, 1, 0)[..., ::2]
    weight = torch.randint(-127, 128, (11, 4)).to(torch.int8).t()
    torch.library.opcheck(ops.branch_product.default, (coefficients, weight, torch.rand(4)))


@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_linear_over_shapes(lead: tuple[int, ...]) -> None:
    x, types = activation(lead)
    torch.library.opcheck(ops.linear.default, linear_args("duplicate", x, types, QuantConfig()))


@pytest.mark.parametrize("plan", PLANS)
def test_linear_over_plans_and_strides(plan: str) -> None:
    for contiguous in (True, False):
        x, types = activation((3, 5), contiguous=contiguous)
        torch.library.opcheck(ops.linear.default, linear_args(plan, x, types, QuantConfig()))
    torch.library.opcheck(ops.linear.default, linear_args(plan, x, None, QuantConfig()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8, "e4m3"])
def test_linear_over_dtypes_and_formats(dtype: torch.dtype, bits: Any) -> None:
    x, types = activation((2, 3), dtype=dtype)
    args = linear_args("branch", x, types, QuantConfig(activation_bits=bits))
    assert ops.linear.default(*args).dtype == dtype
    torch.library.opcheck(ops.linear.default, args)
