"""Dynamic rounding of tokens: bounds, and what becomes of tokens that hold nothing, NaN or infinity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from freeact_fx.config import QuantConfig
from freeact_fx.reference import epilogue, int_mm, quantize_tokens, transform_quantize
from freeact_fx.transform import orthogonal_transform, pack_linear

SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.sampled_from([7, 127]), st.floats(0.3, 1.0), st.integers(1, 40))
def test_error_is_at_most_half_a_scale_where_nothing_is_clipped(
    seed: int, qmax: int, clip: float, num_features: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** torch.randint(-8, 8, (5, 1), generator=generator)
    z = torch.randn(5, num_features, generator=generator) * magnitude
    codes, scale = quantize_tokens(z, torch.tensor([clip]), qmax)
    assert codes.dtype == torch.int8
    assert scale.shape == (5, 1)
    assert int(codes.abs().max()) <= qmax
    kept = z.abs() <= qmax * scale
    error = (codes * scale - z).abs()
    assert bool((error <= 0.50001 * scale).masked_select(kept).all())
    assert bool((codes == qmax * z.sign()).masked_select(~kept).all())
    assert torch.allclose(scale, z.abs().amax(1, keepdim=True) * clip / qmax)


@given(SEEDS)
def test_e4m3_codes_keep_their_relative_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 32, generator=generator)
    codes, scale = quantize_tokens(z, torch.ones(1), 448)
    assert codes.dtype == torch.float8_e4m3fn
    # Three mantissa bits: half a step is 2^-4 of the value; below 2^-6 the steps are 2^-9.
    bound = (z.abs() * 2**-4).maximum(scale * 2**-10)
    assert bool(((codes.float() * scale - z).abs() <= bound * 1.0001).all())
    assert float(codes.float().abs().max()) == 448


def test_no_rounding_gives_the_values_themselves() -> None:
    z = torch.randn(3, 8)
    codes, scale = quantize_tokens(z, torch.ones(1), 0)
    assert torch.equal(codes, z)
    assert torch.equal(scale, torch.ones(3, 1))


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_spoils_its_own_row_only(activation_bits: int, bad: float) -> None:
    config = QuantConfig(activation_bits=activation_bits)  # type: ignore[arg-type]
    transform = orthogonal_transform(48, config)
    weight, bias = torch.randn(16, 48), torch.randn(16)
    packed = pack_linear(transform, weight, bias, config)

    def run(x: torch.Tensor) -> torch.Tensor:
        t = transform
        codes, scale, _ = transform_quantize(
            *(x, None, t.shift, t.channel_scale, t.left, t.right, t.clip, None),
            *(t.widths, t.slice_of_type, 0, 0, config.qmax),
        )
        assert bool((codes.to(torch.int32).abs() <= config.qmax)[[0, 1, 3]].all())
        product = int_mm(codes, packed.weight)
        table = (packed.weight_scale, packed.bias_table, None, None, None)
        return epilogue(product, scale, *table, None, t.slice_of_type, 0, x.dtype)

    x = torch.randn(4, 48)
    x[1] = 0
    before = run(x)
    assert torch.equal(before[1], bias)  # a token of zeros: codes 0, no division by zero
    x[2, 7] = bad
    after = run(x)
    assert not after[2].isfinite().any()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
