"""Why the fp8 engine gives exact integers: what Hopper's tensor cores keep of a sum, and what the kernels add up.

A product of 32 codes at a time is added to the accumulator: all 33 are aligned to the largest magnitude among them, and
of each 14 bits are kept. (So it was measured; ``test_on_gpu`` holds the kernels themselves against integers.)
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freeact_fx.codegen.tiles import candidates, hopper_tiles

LARGEST_PRODUCT = 7 * 7
EXACT_BELOW = 2**14
CODES_OF_AN_ADDITION = 32


def added(total: Tensor, products: Tensor) -> Tensor:
    addends = torch.cat([total, products], -1)
    largest = addends.abs().amax(-1, keepdim=True).clamp_min(2.0**-20)
    unit = 2.0 ** (largest.log2().floor() - 13)
    return (addends / unit).trunc().sum(-1, keepdim=True) * unit


def on_hopper(codes: Tensor, weight_i4: Tensor, num_codes_of_sum: int) -> Tensor:
    """Sums [M, N] in the accumulator of ``num_codes_of_sum`` codes each, which are added in fp32."""
    products = codes.double()[:, None] * weight_i4.double()
    whole = torch.zeros(products.shape[:2])
    for of_sum in products.split(num_codes_of_sum, -1):
        total = torch.zeros(*whole.shape, 1, dtype=torch.float64)
        for of_addition in of_sum.split(CODES_OF_AN_ADDITION, -1):
            total = added(total, of_addition)
        whole += total.squeeze(-1).float()
    return whole


def adversarial_codes(num_codes: int) -> tuple[Tensor, Tensor]:
    """Tokens and weights whose partial sums are as large as they get, in one direction or in two."""
    sign = torch.ones(num_codes)
    sign[num_codes // 2 :] = -1
    spike = torch.ones(num_codes)
    spike[::17] = 7
    rows = torch.stack([torch.full((num_codes,), 7.0), 7 * sign, spike, spike * sign])
    return rows.to(torch.int8), torch.cat([rows, -rows]).to(torch.int8)


def test_what_the_kernels_leave_to_the_accumulator_stays_exact() -> None:
    most = EXACT_BELOW // LARGEST_PRODUCT
    for num_tokens in (1, 16, 40, 64, 256, 8192):
        for capability in (89, 90, 100):
            assert all(tile.block_k <= most for tile in candidates(num_tokens, capability))
    assert all(2 * tile.block_k <= most for tile, _ in hopper_tiles(4096, promoted=True))


def test_adversarial_codes() -> None:
    codes, weight_i4 = adversarial_codes(4096)
    exact = codes.double() @ weight_i4.double().t()
    assert torch.equal(on_hopper(codes, weight_i4, 256).double(), exact)
    assert not torch.equal(on_hopper(codes, weight_i4, 4096).double(), exact)


@given(seed=st.integers(0, 999), correlation=st.floats(0, 1), num_codes=st.integers(1, 1500))
def test_any_codes(seed: int, correlation: float, num_codes: int) -> None:
    """Also where large codes meet large codes of the same sign."""
    torch.manual_seed(seed)
    weight_i4 = torch.randint(-7, 8, (3, num_codes))
    codes = torch.randint(-7, 8, (2, num_codes))
    codes = torch.where(torch.rand(2, num_codes) < correlation, weight_i4[:1], codes)
    exact = codes.double() @ weight_i4.double().t()
    assert torch.equal(on_hopper(codes, weight_i4, 256).double(), exact)


@pytest.mark.parametrize(("num_codes_of_sum", "kept"), [(256, 4096 - 256), (4096, 0)])
def test_small_products_beside_a_large_one(num_codes_of_sum: int, kept: int) -> None:
    """e4m3 codes reach from 2^-9 to 448: what is aligned to a large product loses the small ones of its own sum."""
    codes = torch.full((1, 4096), 2.0**-6)
    codes[0, 0] = 448
    total = on_hopper(codes, torch.ones(1, 4096), num_codes_of_sum)
    assert float(total) == 448 + kept * 2.0**-6
