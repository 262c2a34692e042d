"""The integer product on the CPU: oneDNN gives the reference's integers, and never those of an older weight."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freeact_fx import ops, reference
from freeact_fx.reference import pack_int4

int_mm = torch.ops.freeact.int_mm.default


def random_codes(*shape: int, largest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(torch.int8)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([7, 127]),
    st.integers(0, 10**6),
)
def test_equals_the_reference_exactly(
    lead: list[int], num_features: int, num_outputs: int, largest: int, seed: int
) -> None:
    codes = random_codes(*lead, num_features, largest=largest, seed=seed)
    weight = pack_int4(random_codes(num_outputs, num_features, largest=7, seed=seed + 1))
    product = int_mm(codes, weight)
    assert product.dtype == torch.float32
    assert product.shape == (*lead, num_outputs)
    assert torch.equal(product, reference.int_mm(codes, weight))


@pytest.mark.parametrize("largest", [7, 127])
@pytest.mark.parametrize("num_features", [8, 34, 576, 4096, 14336])
def test_largest_sums_are_exact(num_features: int, largest: int) -> None:
    """The sums that would overflow first: all codes at their ends, alike or alternating."""
    ones = torch.ones(num_features, dtype=torch.int8)
    alternating = ones.clone()
    alternating[1::2] = -1
    one_hot = torch.zeros(num_features, dtype=torch.int8)
    one_hot[-1] = 1
    rows = torch.stack([ones, -ones, alternating, -alternating, one_hot])
    product = int_mm(rows * largest, pack_int4(rows * 7))
    want = (rows.long() @ rows.long().t()) * largest * 7
    assert int(want.max()) == num_features * largest * 7 < 2**24
    assert torch.equal(product.long(), want)


@pytest.mark.parametrize("num_features", [34, 576])
def test_one_hot_codes_read_the_weight_out(num_features: int) -> None:
    weight_i4 = random_codes(23, num_features, largest=7)
    eye = torch.eye(num_features, dtype=torch.int8)
    assert torch.equal(int_mm(eye, pack_int4(weight_i4)).t(), weight_i4.float())


def test_strided_codes() -> None:
    codes = random_codes(34, 6, 3, largest=7).permute(2, 1, 0)[:, ::2]
    weight = pack_int4(random_codes(5, 34, largest=7))
    assert torch.equal(int_mm(codes, weight), reference.int_mm(codes, weight))


def test_e4m3_codes() -> None:
    """Not integers: the fp32 sum of the codes' products, in any order."""
    codes = (torch.randn(9, 70) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight_i4 = random_codes(5, 70, largest=7)
    product = int_mm(codes, pack_int4(weight_i4))
    want = codes.double() @ weight_i4.double().t()
    magnitude = codes.double().abs() @ weight_i4.double().abs().t()
    assert bool(((product - want).abs() <= 70 * 2**-24 * magnitude).all())


def test_a_change_in_place_is_seen() -> None:
    codes = random_codes(3, 48, largest=7)
    first, second = (pack_int4(random_codes(5, 48, largest=7, seed=s)) for s in (1, 2))
    weight = first.clone()
    assert torch.equal(int_mm(codes, weight), reference.int_mm(codes, first))
    weight.copy_(second)
    assert torch.equal(int_mm(codes, weight), reference.int_mm(codes, second))
    assert not torch.equal(reference.int_mm(codes, first), reference.int_mm(codes, second))


def test_new_storage_is_seen() -> None:
    codes = random_codes(3, 48, largest=7)
    first, second = (pack_int4(random_codes(5, 48, largest=7, seed=s)) for s in (1, 2))
    weight = first.clone()
    int_mm(codes, weight)
    weight.data = second
    assert torch.equal(int_mm(codes, weight), reference.int_mm(codes, second))


def test_engine_copy_lives_as_long_as_the_packed_weight() -> None:
    weight = pack_int4(random_codes(5, 48, largest=7))
    assert ops.onednn_weight_bytes(weight) == 0
    int_mm(random_codes(3, 48, largest=7), weight)
    assert ops.onednn_weight_bytes(weight) == 5 * 48
    copy = weakref.ref(ops._onednn_weights[weight][1])
    assert copy() is not None
    del weight
    gc.collect()
    assert copy() is None


def test_no_tokens_make_no_engine_copy() -> None:
    weight = pack_int4(random_codes(5, 48, largest=7))
    assert int_mm(torch.empty(2, 0, 48, dtype=torch.int8), weight).shape == (2, 0, 5)
    assert ops.onednn_weight_bytes(weight) == 0


def test_without_onednn_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    codes, weight = random_codes(3, 48, largest=7), pack_int4(random_codes(5, 48, largest=7))
    assert torch.equal(int_mm(codes, weight), reference.int_mm(codes, weight))
    assert ops.onednn_weight_bytes(weight) == 0
