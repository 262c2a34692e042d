"""Which widths have a Kronecker shape, and which one they get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freeact_fx.transform import MAX_FACTOR, illegal_features_reason, kronecker_shape

# Widths of real models, with the shapes that the transform kernel's tiles like best.
REAL = {
    192: (12, 16),
    576: (24, 24),
    1536: (32, 48),
    3584: (56, 64),
    4096: (64, 64),
    8192: (64, 128),
    11008: (86, 128),
    12288: (96, 128),
    14336: (112, 128),
    18944: (128, 148),
}


@pytest.mark.parametrize(("num_features", "shape"), REAL.items(), ids=str)
def test_real_widths(num_features: int, shape: tuple[int, int]) -> None:
    assert kronecker_shape(num_features) == shape
    assert illegal_features_reason(num_features) is None


@pytest.mark.parametrize(
    ("num_features", "reason"),
    [
        (0, "at least 32"),
        (16, "at least 32"),
        (33, "must be even"),
        (4095, "must be even"),
        (2 * 257, "514 has none"),  # a prime factor above the largest tile
        (256 * 258, "at most 65536"),
    ],
)
def test_illegal_widths(num_features: int, reason: str) -> None:
    assert kronecker_shape(num_features) is None
    assert reason in str(illegal_features_reason(num_features))


@given(st.integers(0, 70000))
def test_a_shape_multiplies_to_the_width_or_there_is_a_reason(num_features: int) -> None:
    shape = kronecker_shape(num_features)
    assert (shape is None) == (illegal_features_reason(num_features) is not None)
    if shape is not None:
        assert shape[0] * shape[1] == num_features
        assert 2 <= shape[0] <= shape[1] <= MAX_FACTOR
    elif num_features >= 32 and num_features % 2 == 0:
        factors = [d for d in range(2, MAX_FACTOR + 1) if num_features % d == 0]
        assert all(num_features // d > MAX_FACTOR or num_features // d < 2 for d in factors)
