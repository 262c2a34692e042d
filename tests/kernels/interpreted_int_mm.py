"""The product in Triton's interpreter: exactly the reference's integers, for any shape and split, in both formats."""

from __future__ import annotations

import pytest
import torch
from random_codes import random_codes

from freeact_fx.codegen.engine_ops import to_engine_order
from freeact_fx.codegen.kernels import int_mm as kernels
from freeact_fx.codegen.kernels.int_mm import int_mm
from freeact_fx.codegen.tiles import TileConfig
from freeact_fx.reference import pack_int4

SMALL = TileConfig(16, 64, 32)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(7, torch.int8), (127, torch.int8), (7, torch.float8_e4m3fn)], ids=str
)
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_codes", "tile"),
    [
        (16, 64, 64, SMALL),  # one whole tile
        (1, 5, 34, SMALL),  # less than one
        (17, 70, 192, SMALL),  # a second tile each way, with whole steps
        (33, 65, 130, TileConfig(32, 128, 32, group_m=2)),
        (35, 130, 34, TileConfig(16, 64, 32, group_m=2)),  # several groups
        (3, 66, 258, TileConfig(16, 64, 32, split_k=2)),
        (2, 9, 65, TileConfig(16, 64, 32, split_k=4)),  # odd, and splits without work
    ],
    ids=str,
)
def test_exact(
    num_tokens: int,
    num_outputs: int,
    num_codes: int,
    tile: TileConfig,
    largest: int,
    dtype: torch.dtype,
) -> None:
    codes = random_codes(num_tokens, num_codes, largest=largest)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    product = int_mm(to_engine_order(codes.to(dtype)), pack_int4(weight_i4), tile)
    assert torch.equal(product.long(), codes.long() @ weight_i4.long().t())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_one_hot_codes_read_the_weight_out(dtype: torch.dtype) -> None:
    weight_i4 = random_codes(23, 74, largest=7)
    eye = torch.eye(74).to(dtype)
    product = int_mm(to_engine_order(eye), pack_int4(weight_i4), SMALL)
    assert torch.equal(product.t(), weight_i4.float())


@pytest.mark.parametrize("apart", [True, False])
def test_any_e4m3_codes(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 254 numbers; the sum is in fp32, which a chip adds up or the kernel."""
    monkeypatch.setattr(kernels, "adds_apart", lambda dtype, capability: apart)
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()].repeat(2, 1)
    weight_i4 = random_codes(40, numbers.shape[1], largest=7)
    product = int_mm(to_engine_order(numbers), pack_int4(weight_i4), SMALL)
    exact = numbers.double() @ weight_i4.double().t()
    bound = numbers.double().abs() @ weight_i4.double().abs().t() * len(numbers[0]) * 2**-24
    assert bool(((product - exact).abs() <= bound).all())


def test_largest_sums() -> None:
    ones = torch.ones(2, 4096, dtype=torch.int8)
    ones[1, 1::2] = -1
    product = int_mm(to_engine_order(ones * 127), pack_int4(ones * 7), TileConfig(16, 64, 256))
    assert torch.equal(product.long(), (ones.long() @ ones.long().t()) * 127 * 7)


def test_nothing_to_do() -> None:
    weight = pack_int4(random_codes(5, 32, largest=7))
    assert int_mm(torch.empty(0, 32, dtype=torch.int8), weight, SMALL).shape == (0, 5)
