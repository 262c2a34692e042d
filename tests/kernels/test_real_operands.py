"""Activations of a real model: both engines multiply their codes alike, and two devices round them alike but at ties.

On the CPU the ops run the reference; a GPU has its kernels."""

from __future__ import annotations

import pytest
import torch
from real_operands import NAMES, RealLinear, real_linear
from torch import Tensor
from transform_bound import codes_of
from transformed_on import transformed_on

from freeact_fx import reference
from freeact_fx.codegen import engine_ops
from freeact_fx.codegen.engine_ops import to_engine_order
from freeact_fx.codegen.tiles import fits_hopper, hopper_transform_tile

HAS_GPU = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if HAS_GPU else (0, 0)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")],
    ),
]
E4M3 = torch.float8_e4m3fn


def codes_on_cpu(linear: RealLinear, qmax: int) -> tuple[Tensor, Tensor]:
    t = linear.transform
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank)
    codes, scale, _ = reference.transform_quantize(
        linear.x.float(), linear.types, *operands, t.widths, t.slice_of_type, 0, t.own_rank, qmax
    )
    return codes, scale


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_they_are_for(name: str) -> None:
    """Tokens of several types, heavy tails, and codes that take all values."""
    linear = real_linear(name)
    codes, _ = codes_on_cpu(linear, 7)
    assert len(linear.types.unique()) >= 2
    values = linear.x.float()
    assert float(values.abs().max() / values.std()) > 10
    assert codes.unique().tolist() == list(range(-7, 8))
    assert reference.unpack_int4(linear.weight, codes.shape[-1]).abs().max() == 7


@pytest.mark.parametrize("num_tokens", [1, 24, 300])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_engines_are_bit_equal(device: str, name: str, num_tokens: int) -> None:
    if device == "cuda" and CAPABILITY < (8, 9):
        pytest.skip("no fp8 tensor cores")
    linear = real_linear(name)
    rows = torch.arange(num_tokens) % linear.x.shape[0]
    codes, scale, types = (t[rows].to(device) for t in (*codes_on_cpu(linear, 7), linear.types))
    weight = linear.weight.to(device)
    both = [to_engine_order(codes.to(dtype)) for dtype in (torch.int8, E4M3)]
    exact = reference.int_mm(codes, weight)
    for ordered in both:
        assert torch.equal(engine_ops.engine_int_mm(ordered, weight), exact)
    num_codes, num_outputs = codes.shape[-1], weight.shape[0]
    if device == "cuda" and not (CAPABILITY[0] == 9 and fits_hopper(num_codes, num_outputs, 2)):
        return  # no kernel for the whole Linear
    rest = (scale, weight, linear.weight_scale.to(device), linear.bias_table.to(device), types)
    slices = list(linear.transform.slice_of_type)
    by_int8, by_fp8 = (
        engine_ops.engine_linear(ordered, *rest, [num_codes], slices, 0, torch.bfloat16)
        for ordered in both
    )
    assert torch.equal(by_fp8, by_int8)
    wide = exact.double() * scale * rest[2] + reference.rows_of_type(rest[3], types, 0)
    assert float((by_int8.double() - wide).norm() / wide.norm()) < 2**-8


@pytest.mark.parametrize(("qmax", "most"), [(7, 0.005), (127, 0.05), (448, 0.05)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", DEVICES)
def test_codes_differ_at_ties_alone(device: str, name: str, qmax: int, most: float) -> None:
    """Between the CPU and a device: where the kernel's roundings may take a value past the half-way point, few of them,
    and integers by one code; near zero e4m3 is finer than those roundings. (fp16 in place of fp32 turns 0.1 % of 4-bit
    codes, and 2 % of the others.)"""
    if device == "cuda" and qmax == 448 and CAPABILITY < (8, 9):
        pytest.skip("no fp8 tensor cores")
    linear = real_linear(name)
    t, x, types = linear.transform, linear.x, linear.types
    # The portable kernel, on any chip.
    assert hopper_transform_tile(t.left.shape[0], t.widths, t.right.shape[-1]) is None
    codes, scale = transformed_on(torch.device(device), t, x, types, qmax, default_type=0)
    on_cpu, cpu_scale = codes_on_cpu(linear, qmax)
    bounds = codes_of(t, x, types, 0, qmax)
    bounds.check(codes, scale)
    bounds.check(on_cpu, cpu_scale)
    if qmax == 7:
        assert bounds.share_of_ties < 0.25  # or this would show little
    difference = (codes.double() - on_cpu.double()).abs()
    assert float((difference > 0).double().mean()) < most
    if qmax != 448:
        assert float(difference.max()) <= 1
