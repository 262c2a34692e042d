"""The algebra of the plans: transform and counter-transform cancel, types choose, permutations permute."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transforms import EXACT_PLANS, random_transform, transform_arguments
from torch import Tensor

from freeact_fx.config import QuantConfig
from freeact_fx.reference import (
    branch_codes,
    branch_columns,
    branch_product,
    epilogue,
    int_mm,
    pack_int4,
    quantize_tokens,
    transform,
    transform_quantize,
)
from freeact_fx.transform import (
    GroupTransform,
    PackedLinear,
    orthogonal_transform,
    pack_linear,
    quantize_branch,
)

SEEDS = st.integers(0, 10**6)
# 34 = 2 x 17 and 130 = 10 x 13: one thin, one with no power of two in its factors.
WIDTHS = st.sampled_from([32, 34, 48, 96, 130])
EXACT = QuantConfig(quantize=False)


def linear(
    t: GroupTransform,
    packed: PackedLinear,
    x: Tensor,
    types: Tensor | None,
    *,
    qmax: int,
    default_type: int = 0,
) -> Tensor:
    """A quantised Linear by the reference: [..., K] to [..., N]."""
    codes, scale, coefficients = transform_quantize(
        *(x, types, t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank),
        *(t.widths, t.slice_of_type, default_type, t.own_rank, qmax),
    )
    product = int_mm(codes, packed.weight) if qmax else codes @ packed.weight.t()
    return epilogue(
        *(product, scale, packed.weight_scale, packed.bias_table, coefficients),
        *(packed.branch_weight, packed.branch_scale),
        *(types, t.slice_of_type, default_type, x.dtype),
    )


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def activation_matrix(t: GroupTransform, type_index: int, *, branch: bool = True) -> Tensor:
    """P_t, [K, K']: what a token of a type is multiplied by, its shift aside."""
    eye = torch.eye(t.num_features)
    lowrank = t.lowrank if branch else None
    operands = (None, t.channel_scale, t.left, t.right, lowrank)
    return transform(
        eye, None, *operands, t.widths, t.slice_of_type, type_index, t.own_rank if branch else 0
    )[0]


def weight_matrix(t: GroupTransform) -> Tensor:
    """Q, [K', K]."""
    return t.transformed_weight(torch.eye(t.num_features)).float().t()


# ------------------------------------------------------------------ exactness without rounding


@pytest.mark.parametrize("plan", EXACT_PLANS)
@settings(max_examples=20)
@given(WIDTHS, st.integers(1, 4), st.booleans(), SEEDS)
def test_without_rounding_a_linear_is_the_dense_one(
    plan: str, num_features: int, num_types: int, with_bias: bool, seed: int
) -> None:
    t = random_transform(plan, num_features, num_types, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, num_features, generator=generator)
    bias = torch.randn(7, generator=generator) if with_bias else None
    x = torch.randn(2, 5, num_features, generator=generator)
    # The last type is the untyped row.
    types = torch.randint(0, num_types + 1, (2, 5), generator=generator)
    packed = pack_linear(t, weight, bias, EXACT)
    want = torch.nn.functional.linear(x, weight, bias)
    assert relative(linear(t, packed, x, types, qmax=0), want) < 1e-5
    for default_type in range(num_types + 1):
        got = linear(t, packed, x, None, qmax=0, default_type=default_type)
        assert relative(got, want) < 1e-5


@settings(max_examples=20)
@given(WIDTHS, st.integers(1, 2), SEEDS)
def test_paper_is_the_predicted_projection(num_features: int, num_types: int, seed: int) -> None:
    """A type with w_i of D1 columns keeps the part of ``(x - mu) s`` in span(L_i) kron R^D2, and its mean."""
    t = random_transform("paper", num_features, num_types, seed=seed)
    assert sum(t.widths) == t.left.shape[0]
    assert t.num_codes == num_features
    assert t.shift is not None
    assert t.channel_scale is not None
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, num_features, generator=generator)
    x = torch.randn(12, num_features, generator=generator)
    types = torch.arange(12) % num_types
    packed = pack_linear(t, weight, None, EXACT)
    got = linear(t, packed, x, types, qmax=0)
    for index in range(num_types):
        start = sum(t.widths[:index])
        columns = t.left[:, start : start + t.widths[index]].double()
        basis = torch.linalg.qr(columns)[0]
        projection = torch.kron(basis @ basis.t(), torch.eye(t.right.shape[-1]).double())
        centred = (x[types == index] - t.shift[index]).double() * t.channel_scale
        kept = (centred @ projection) / t.channel_scale + t.shift[index]
        assert relative(got[types == index], (kept @ weight.double().t()).float()) < 1e-5


@pytest.mark.parametrize("plan", [*EXACT_PLANS, "paper"])
@given(WIDTHS, st.integers(1, 4), SEEDS)
@settings(max_examples=20)
def test_counter_transforms_cancel(plan: str, num_features: int, num_types: int, seed: int) -> None:
    num_types = min(num_types, 2 if plan == "paper" else 4)
    t = random_transform(plan, num_features, num_types, seed=seed)
    q = weight_matrix(t)
    d2 = t.right.shape[-1]
    for index in range(num_types):
        # Q_t P_t = I on the columns of the type's own slice, zeros elsewhere.
        p = activation_matrix(t, index, branch=False)
        start = sum(t.widths[: t.slice_of_type[index]]) * d2
        stop = start + t.widths[t.slice_of_type[index]] * d2
        own = (q @ p)[start:stop]
        assert torch.allclose(own[:, start:stop], torch.eye(stop - start), atol=1e-5)
        assert not p[:, :start].any()
        assert not p[:, stop:].any()
        if plan == "paper":
            continue
        # P_t Q = I: what the activation side does, the weight side undoes, the branch included.
        p = activation_matrix(t, index)
        product = p @ q
        if t.lowrank is not None:
            mine = torch.ones(t.lowrank.shape[1])
            if t.own_rank:
                mine = (torch.arange(t.lowrank.shape[1]) // t.own_rank == index).float()
            columns = branch_columns(t.lowrank) * mine
            assert not torch.allclose(product, torch.eye(num_features), atol=1e-2)
            along = activation_matrix(t, index, branch=False) @ columns
            product = product + along @ (columns.t() @ q)
        assert torch.allclose(product, torch.eye(num_features), atol=1e-5)


def any_columns(kind: str, num_features: int, rank: int, generator: torch.Generator) -> Tensor:
    """Columns of a branch as they may be stored; none of these are orthonormal."""
    if kind == "floating":
        return torch.randn(num_features, rank, generator=generator) / num_features**0.5
    if kind == "cut off":
        # A column along one axis has an entry of 1, further out than codes reach where K' > 36.
        return branch_codes(torch.eye(num_features)[:, :rank])
    return torch.randint(-40, 41, (num_features, rank), generator=generator).to(torch.int8)


@pytest.mark.parametrize("kind", ["codes", "cut off", "floating"])
@settings(max_examples=20)
@given(WIDTHS, st.integers(1, 6), SEEDS)
def test_any_columns_are_made_up_for(kind: str, num_features: int, rank: int, seed: int) -> None:
    """The weight side undoes a branch whatever its columns are, so their rounding costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    columns = any_columns(kind, num_features, rank, generator)
    t = replace(random_transform("branch", num_features, 2, seed=seed), lowrank=columns)
    assert t.problem() is None
    weight = torch.randn(7, num_features, generator=generator)
    x = torch.randn(9, num_features, generator=generator)
    types = torch.arange(9) % 3
    got = linear(t, pack_linear(t, weight, None, EXACT), x, types, qmax=0)
    assert relative(got, x @ weight.t()) < 1e-4


# ------------------------------------------------------------------ rounding


@given(WIDTHS, st.integers(1, 6), SEEDS)
@settings(max_examples=20)
def test_orthonormal_columns_stay_nearly_so(num_features: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.linalg.qr(torch.randn(num_features, rank, generator=generator))[0]
    codes = branch_codes(columns)
    assert codes.dtype == torch.int8
    rounded = branch_columns(codes)
    half_step = 3.001 / (127 * num_features**0.5)
    largest = 6 / num_features**0.5
    assert bool(((rounded - columns.clamp(-largest, largest)).abs() <= half_step).all())
    assert torch.equal(branch_codes(rounded), codes)
    assert torch.allclose(rounded.t() @ rounded, torch.eye(rank), atol=0.03)


@given(st.integers(1, 6), st.integers(1, 40), SEEDS)
@settings(max_examples=20)
def test_branch_weight_in_8_bits(rank: int, num_outputs: int, seed: int) -> None:
    """Each row has its own scale, so that a weak one is as exact as a strong one; zeros stay zeros."""
    generator = torch.Generator().manual_seed(seed)
    branch = (
        torch.randn(rank, num_outputs, generator=generator) * 10.0 ** torch.arange(rank)[:, None]
    )
    branch[-1] = 0
    codes, scale = quantize_branch(branch)
    assert codes.dtype == torch.int8
    assert bool(((codes * scale[:, None] - branch).abs() <= 0.5001 * scale[:, None]).all())
    assert bool((codes[:-1].abs().amax(1) == 127).all())
    assert not codes[-1].any()
    # Coefficients of which bf16 is exact leave nothing to round but the codes.
    coefficients = torch.diag(1 / scale).clamp(max=1e6)
    assert torch.equal(branch_product(coefficients, codes, scale)[:-1], codes[:-1].float())


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("plan", [*EXACT_PLANS, "paper"])
@settings(max_examples=10)
@given(WIDTHS, st.integers(1, 3), SEEDS)
def test_rounded_linear_is_within_its_bound(
    plan: str, activation_bits: int, num_features: int, num_types: int, seed: int
) -> None:
    """``|y_q - y| <= sum |e| |w| + |z_q| |f|`` for the errors e of the activation and f of the weight."""
    config = QuantConfig(activation_bits=activation_bits)  # type: ignore[arg-type]
    num_types = min(num_types, 2 if plan == "paper" else 4)
    t = random_transform(plan, num_features, num_types, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, num_features, generator=generator)
    bias = torch.randn(6, generator=generator)
    x = torch.randn(9, num_features, generator=generator)
    types = torch.randint(0, num_types + 1, (9,), generator=generator)
    rounded, exact = pack_linear(t, weight, bias, config), pack_linear(t, weight, bias, EXACT)
    z = transform(x, types, *transform_arguments(t), t.widths, t.slice_of_type, 0, t.own_rank)[0]
    codes, scale = quantize_tokens(z, t.clip[types].unsqueeze(1), config.qmax)
    z_rounded = codes * scale
    # Exactly: half a scale, and what the clip cut off.
    cut = (z.abs() - config.qmax * scale).clamp_min(0)
    assert bool(((z_rounded - z).abs() <= 0.50001 * scale + cut).all())
    eye = torch.eye(t.num_codes, dtype=torch.int8)
    codes_w = int_mm(eye, rounded.weight).t()
    column_slice = torch.repeat_interleave(
        torch.arange(len(t.widths)), torch.tensor(t.widths) * t.right.shape[-1]
    )
    w_rounded = codes_w * rounded.weight_scale[column_slice].t()
    bound = (z_rounded - z).abs() @ exact.weight.t().abs()
    bound += z_rounded.abs() @ (w_rounded - exact.weight).t().abs()
    if t.lowrank is not None:
        # The coefficients are rounded to 8 bits of mantissa, the weight by up to half a scale.
        assert exact.branch_weight is not None
        assert rounded.branch_scale is not None
        whole = (t.shift, t.channel_scale, t.left, t.right, None)
        u = transform(x, types, *whole, t.widths, t.slice_of_type, 0, 0)[0]
        coefficients = u.abs() @ branch_columns(t.lowrank).abs()
        bound += 2**-8 * coefficients @ exact.branch_weight.abs()
        bound += 0.51 * (coefficients @ rounded.branch_scale)[:, None]
    got = linear(t, rounded, x, types, qmax=config.qmax)
    want = linear(t, exact, x, types, qmax=0)
    assert bool(((got - want).abs() <= bound + 1e-4 * want.abs().max()).all())


# ------------------------------------------------------------------ types


def integers(generator: torch.Generator, *shape: int, largest: int = 3) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def integer_transform(plan: str, num_types: int, generator: torch.Generator) -> GroupTransform:
    """Operands with small integers, K = 48: every sum is exact in fp32, so that results can be compared exactly."""
    d1, d2 = 6, 8
    rows, num_slices = num_types + 1, num_types if plan == "duplicate" else 1
    return GroupTransform(
        plan=plan.removeprefix("own "),
        left=integers(generator, d1, d1 * num_slices),
        right=integers(generator, num_slices, d2, d2),
        clip=2.0 ** -torch.randint(0, 2, (rows,), generator=generator),
        shift=None if plan == "single" else integers(generator, rows, d1 * d2),
        channel_scale=2.0 ** integers(generator, d1 * d2, largest=1),
        lowrank=integers(generator, d1 * d2, 2 * num_types, largest=1)
        if plan.endswith("branch")
        else None,
        widths=(d1,) * num_slices,
        slice_of_type=(*range(num_types), 0) if num_slices > 1 else (0,) * rows,
        own_rank=2 if plan == "own branch" else 0,
    )


def random_packed(t: GroupTransform, generator: torch.Generator) -> PackedLinear:
    """Codes drawn at random: integer transforms have no inverse to fold into a weight."""
    codes = torch.randint(-7, 8, (5, t.num_codes), generator=generator).to(torch.int8)
    rank = 0 if t.lowrank is None else t.lowrank.shape[1]
    return PackedLinear(
        pack_int4(codes),
        torch.rand(len(t.widths), 5, generator=generator),
        None if t.shift is None else integers(generator, t.num_rows, 5),
        integers(generator, rank, 5).to(torch.int8) if rank else None,
        2.0 ** integers(generator, rank, largest=1) if rank else None,
    )


@pytest.mark.parametrize("plan", EXACT_PLANS)
@settings(max_examples=20)
@given(st.integers(1, 4), SEEDS)
def test_permuting_tokens_permutes_rows(plan: str, num_types: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = integer_transform(plan, num_types, generator)
    packed = random_packed(t, generator)
    x = integers(generator, 13, 48, largest=9)
    types = torch.randint(0, num_types + 1, (13,), generator=generator)
    order = torch.randperm(13, generator=generator)
    y = linear(t, packed, x, types, qmax=7)
    assert torch.equal(linear(t, packed, x[order], types[order], qmax=7), y[order])
    assert y.unique().numel() > 13


@pytest.mark.parametrize("plan", EXACT_PLANS)
def test_type_minus_one_is_the_last(plan: str) -> None:
    generator = torch.Generator().manual_seed(0)
    t = integer_transform(plan, 2, generator)
    t = replace(t, slice_of_type=(*t.slice_of_type[:-1], len(t.widths) - 1))
    packed = random_packed(t, generator)
    x = integers(generator, 4, 48, largest=9)
    types = torch.tensor([0, 1, 2, -1])
    y = linear(t, packed, x, types, qmax=7)
    assert torch.equal(y, linear(t, packed, x, types % 3, qmax=7))


@pytest.mark.parametrize("plan", EXACT_PLANS)
@settings(max_examples=20)
@given(st.integers(2, 4), SEEDS)
def test_equal_transforms_make_types_irrelevant(plan: str, num_types: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = integer_transform(plan, num_types, generator)
    packed = random_packed(t, generator)
    x = integers(generator, 13, 48, largest=9)
    types = torch.randint(0, num_types, (13,), generator=generator)
    plain = linear(t, packed, x, None, qmax=7)
    if plan != "single":
        assert not torch.equal(linear(t, packed, x, types.roll(1), qmax=7), plain)

    def first_row(table: Tensor | None) -> Tensor | None:
        return None if table is None else table[:1].expand_as(table)

    t = replace(
        t,
        left=t.left[:, :6].repeat(1, len(t.widths)),
        right=t.right[:1].expand_as(t.right),
        clip=t.clip[:1].expand_as(t.clip),
        shift=first_row(t.shift),
    )
    if t.own_rank:
        assert t.lowrank is not None
        assert packed.branch_weight is not None
        t = replace(t, lowrank=t.lowrank[:, :2].repeat(1, num_types))
        assert packed.branch_scale is not None
        packed = replace(
            packed,
            branch_weight=packed.branch_weight[:2].repeat(num_types, 1),
            branch_scale=packed.branch_scale[:2].repeat(num_types),
        )
    words = packed.weight.shape[1] // len(t.widths)
    packed = replace(
        packed,
        weight=packed.weight[:, :words].repeat(1, len(t.widths)),
        weight_scale=first_row(packed.weight_scale),
        bias_table=first_row(packed.bias_table),
    )
    plain = linear(t, packed, x, None, qmax=7)
    assert torch.equal(linear(t, packed, x, types, qmax=7), plain)


@pytest.mark.parametrize("plan", EXACT_PLANS)
@given(SEEDS)
@settings(max_examples=10)
def test_one_type_is_the_plain_path(plan: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = integer_transform(plan, 1, generator)
    packed = random_packed(t, generator)
    x = integers(generator, 2, 7, 48, largest=9)
    types = torch.zeros(2, 7, dtype=torch.int32)
    plain = linear(t, packed, x, None, qmax=7)
    assert torch.equal(linear(t, packed, x, types, qmax=7), plain)


@pytest.mark.parametrize("plan", EXACT_PLANS)
@given(st.integers(2, 4), SEEDS)
@settings(max_examples=10)
def test_mixed_types_are_each_type_alone(plan: str, num_types: int, seed: int) -> None:
    """Every row of a mixed batch is what a batch of that type alone gives, the untyped row included."""
    generator = torch.Generator().manual_seed(seed)
    t = integer_transform(plan, num_types, generator)
    packed = random_packed(t, generator)
    x = integers(generator, 11, 48, largest=9)
    types = torch.arange(11) % (num_types + 1)
    mixed = linear(t, packed, x, types, qmax=7)
    for index in range(num_types + 1):
        alone = linear(t, packed, x, None, qmax=7, default_type=index)
        assert torch.equal(mixed[types == index], alone[types == index])


# ------------------------------------------------------------------ data-free transforms


@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "branch"])
def test_data_free_transform_is_orthogonal_and_reproducible(plan: str) -> None:
    config = QuantConfig(plan=plan, seed=3, branch_rank=4)
    t = orthogonal_transform(96, config)
    assert t.plan == plan
    assert t.problem() is None
    start = 0
    for width, right in zip(t.widths, t.right, strict=True):
        left = t.left[:, start : start + width]
        start += width
        assert torch.allclose(left.t() @ left, torch.eye(width), atol=1e-5)
        assert torch.allclose(right.t() @ right, torch.eye(right.shape[0]), atol=1e-5)
    again, other = (
        orthogonal_transform(96, replace(config, seed=seed)).tensors() for seed in (3, 4)
    )
    assert all(torch.equal(a, again[name]) for name, a in t.tensors().items())
    assert not torch.equal(t.left, other["left"])


def test_auto_without_data_is_single() -> None:
    assert orthogonal_transform(64, QuantConfig(plan="auto")).plan == "single"


def test_rotation_spreads_an_outlier_channel() -> None:
    """What the transform is for: one huge channel costs all others their codes, unless it is spread first."""
    x = torch.randn(64, 1024)
    x[:, 17] *= 30
    t = orthogonal_transform(1024, QuantConfig())
    rotated = transform(x, None, *transform_arguments(t), t.widths, t.slice_of_type, 0, 0)[0]

    def error(z: Tensor) -> float:
        codes, scale = quantize_tokens(z, torch.ones(1), 7)
        return float((codes * scale - z).square().sum())

    assert error(rotated) < 0.5 * error(x)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"plan": "shifty"}, "plan must be one of"),
        ({"clip": torch.ones(2, 2)}, r"clip \[P\]"),
        ({"widths": (6, 0)}, "each slice at least one column"),
        ({"left": torch.zeros(6, 4)}, "left must have shape"),
        ({"right": torch.zeros(2, 8, 8)}, "right must have shape"),
        ({"shift": torch.zeros(1, 48)}, "shift must have shape"),
        ({"channel_scale": torch.zeros(3)}, "channel_scale must have shape"),
        ({"clip": torch.ones(3).half()}, "clip must be float32"),
        ({"clip": torch.tensor([1.0, float("nan"), 1.0])}, "clip must be finite"),
        ({"lowrank": torch.zeros(48, 3), "own_rank": 2}, "lowrank needs 2 columns"),
        ({"lowrank": torch.zeros(48, 3).bfloat16()}, "lowrank must be float32 or int8"),
        ({"slice_of_type": (0, 1, 0)}, "slice_of_type must give each of 3 rows a slice"),
        ({"slice_of_type": (0, 0)}, "slice_of_type must give each of 3 rows a slice"),
    ],
)
def test_ill_formed_transform_says_what_is_wrong(changes: dict[str, object], problem: str) -> None:
    t = integer_transform("shift", 2, torch.Generator().manual_seed(0))
    assert t.problem() is None
    assert re.search(problem, str(replace(t, **changes).problem()))  # type: ignore[arg-type]
