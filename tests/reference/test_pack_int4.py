"""Eight 4-bit codes to a word, in compressed-tensors' order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freeact_fx import transform
from freeact_fx.reference import pack_int4, unpack_int4
from freeact_fx.transform import quantize_weight


@st.composite
def codes(draw: st.DrawFn, lowest: int = -7) -> Tensor:
    num_outputs, num_features = draw(st.integers(1, 5)), draw(st.integers(1, 41))
    row = st.lists(st.integers(lowest, 7), min_size=num_features, max_size=num_features)
    rows = draw(st.lists(row, min_size=num_outputs, max_size=num_outputs))
    return torch.tensor(rows, dtype=torch.int8)


def words_by_hand(row: list[int]) -> list[int]:
    """The documented layout, on Python integers: code 8 j + i plus 8 in bits 4 i .. 4 i + 3 of word j."""
    words = []
    for start in range(0, len(row), 8):
        word = 0
        for i in range(8):
            code = row[start + i] if start + i < len(row) else 0
            word |= (code + 8) << (4 * i)
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@given(codes())
def test_unpack_inverts_pack_for_any_tail(weight: Tensor) -> None:
    packed = pack_int4(weight)
    assert packed.dtype == torch.int32
    assert packed.shape == (weight.shape[0], -(-weight.shape[1] // 8))
    unpacked = unpack_int4(packed, weight.shape[1])
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, weight)


@given(codes())
def test_layout_is_the_documented_one(weight: Tensor) -> None:
    assert pack_int4(weight).tolist() == [words_by_hand(row) for row in weight.tolist()]


def test_one_word_bit_by_bit() -> None:
    word = int(pack_int4(torch.tensor([[-7, -1, 0, 1, 2, 3, 4, 7]], dtype=torch.int8)))
    #      code 7     4    3    2    1    0   -1   -7
    assert word & 0xFFFFFFFF == 0b1111_1100_1011_1010_1001_1000_0111_0001


def test_no_rows() -> None:
    assert pack_int4(torch.zeros(0, 9, dtype=torch.int8)).shape == (0, 2)
    assert unpack_int4(torch.zeros(0, 2, dtype=torch.int32), 9).shape == (0, 9)


@pytest.mark.parametrize("code", [-128, -8, 8, 127])
def test_code_out_of_range_is_refused(code: int) -> None:
    weight = torch.zeros(2, 8, dtype=torch.int8)
    weight[1, 3] = code
    with pytest.raises(ValueError, match=rf"codes must be in \[-7, 7\], got {abs(code)}"):
        pack_int4(weight)


@given(st.integers(0, 10**6), st.booleans())
def test_weights_are_rounded_to_the_nearest_code_of_their_row(seed: int, search: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 24, generator=generator) * 10 ** torch.randint(
        -6, 6, (3, 1), generator=generator
    )
    weight[2] = 0
    weight_i4, scale = quantize_weight(weight, search=search)
    assert torch.equal(unpack_int4(pack_int4(weight_i4), 24), weight_i4)
    kept = weight.abs() <= 7 * scale[:, None]
    error = (weight_i4 * scale[:, None] - weight).abs()
    assert bool((error <= scale[:, None] * 0.500001)[kept].all())
    assert bool((weight_i4 == 7 * weight.sign())[~kept].all())
    assert not weight_i4[2].any()


def test_search_never_loses_to_the_largest_magnitude() -> None:
    weight = torch.randn(64, 96)
    weight[:, 0] *= 8
    errors = []
    for search in (False, True):
        weight_i4, scale = quantize_weight(weight, search=search)
        errors.append((weight_i4 * scale[:, None] - weight).square().sum(1))
    assert bool((errors[1] <= errors[0] * 1.000001).all())
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 4), ("meta", 1)])
def test_a_search_takes_few_launches_where_nothing_is_cached(
    device: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    best_scale = transform._best_scale

    def counted(weight: Tensor, largest: Tensor) -> Tensor:
        searched.append(len(weight))
        return best_scale(weight, largest)

    monkeypatch.setattr(transform, "_best_scale", counted)
    quantize_weight(torch.ones(128, 4096, device=device), search=True)
    assert searched == blocks * [128 // blocks]
