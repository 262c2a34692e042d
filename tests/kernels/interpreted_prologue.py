"""Norms and activations in the transform's kernel, in Triton's interpreter, against bounds around fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from prologue_bound import exact_row
from random_prologues import random_prologue
from random_transforms import random_transform
from torch import Tensor
from transform_bound import Bounds, codes_of

from freeact_fx.codegen.engine_ops import to_plain_order
from freeact_fx.codegen.kernels import transform_quantize as kernels
from freeact_fx.codegen.prologue import Prologue
from freeact_fx.transform import GroupTransform

NUM_TYPES = 2
KINDS = (
    "rms",
    "rms of a sum",
    "layer",
    "layer of a sum",
    "silu",
    "gelu",
    "gelu_tanh",
    "silu alone",
)


def run(
    t: GroupTransform, x: Tensor, prologue: Prologue, types: Tensor | None, qmax: int
) -> tuple[Tensor, Tensor]:
    """Codes in plain order, and scale; whatever the kernel does not write is poison."""
    if prologue.total is not None:
        prologue.total.fill_(float("nan"))
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip)
    static = (t.widths, t.slice_of_type, 0)
    codes, scale = kernels.transform_quantize(x, types, *operands, *static, qmax, prologue)
    return to_plain_order(codes), scale


def check(
    t: GroupTransform, x: Tensor, prologue: Prologue, types: Tensor | None, qmax: int = 7
) -> Bounds:
    row, error = exact_row(x, prologue)
    bounds = codes_of(t, row, types, 0, qmax, error)
    bounds.check(*run(t, x, prologue, types, qmax))
    if prologue.total is not None:
        assert prologue.other is not None
        assert torch.equal(prologue.total, x + prologue.other)
    return bounds


def tokens(num_tokens: int, num_features: int) -> tuple[Tensor, Tensor]:
    """Activations with an outlier channel, and types: all there are, and the untyped row by both of its numbers."""
    x = torch.randn(num_tokens, num_features)
    x[:, 3] *= 50
    return x, torch.arange(num_tokens, dtype=torch.int32) % (NUM_TYPES + 2) - 1


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors of results hold NaN, or the code that no token has."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        poison = float("nan") if dtype.is_floating_point else -128
        return torch.full(shape, poison, dtype=dtype, device=device)

    monkeypatch.setattr(kernels.torch, "empty", empty)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "paper"])
def test_plans(plan: str, kind: str) -> None:
    t = random_transform(plan, 48, NUM_TYPES, seed=1)
    x, types = tokens(5, 48)
    for of_tokens in (types, None):
        bounds = check(t, x, random_prologue(kind, x), of_tokens)
        assert bounds.share_of_ties < 0.1


@pytest.mark.parametrize("kind", ["rms of a sum", "layer", "gelu"])
@pytest.mark.parametrize("num_features", [3584, 18944])
def test_real_widths(num_features: int, kind: str) -> None:
    """One with padding, one in two pieces."""
    t = random_transform("shift", num_features, NUM_TYPES, seed=2)
    x, types = tokens(3, num_features)
    x += 3
    check(t, x, random_prologue(kind, x), types)


@settings(max_examples=25, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
@given(
    num_tokens=st.integers(1, 9),
    num_features=st.sampled_from([32, 48, 96, 192, 320]),
    kind=st.sampled_from(KINDS),
    plan=st.sampled_from(["single", "shift", "duplicate", "paper"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    qmax=st.sampled_from([7, 127]),
    seed=st.integers(0, 99),
)
def test_any(
    num_tokens: int,
    num_features: int,
    kind: str,
    plan: str,
    dtype: torch.dtype,
    qmax: int,
    seed: int,
) -> None:
    if dtype == torch.bfloat16 and kind.endswith("of a sum"):
        dtype = torch.float16  # the interpreter truncates to bf16, where a GPU rounds
    torch.manual_seed(seed)
    t = random_transform(plan, num_features, NUM_TYPES, seed=seed)
    x = torch.randn(num_tokens, num_features).to(dtype)
    types = torch.randint(-1, NUM_TYPES + 1, (num_tokens,))
    check(t, x, random_prologue(kind, x), types, qmax)


def test_rows_of_a_wider_matrix() -> None:
    """Gate and up as halves of one product."""
    t = random_transform("shift", 48, NUM_TYPES, seed=3)
    both, types = tokens(5, 96)
    check(t, both[:, :48], Prologue("silu", both[:, 48:]), types)
    check(t, both[:, ::2], Prologue("silu", both[:, 1::2]), types)


@pytest.mark.parametrize("kind", ["rms of a sum", "layer", "silu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_poisons_its_own_token(bad: float, kind: str) -> None:
    t = random_transform("shift", 48, NUM_TYPES, seed=5)
    x, types = tokens(5, 48)
    prologue = random_prologue(kind, x)
    codes, scale = run(t, x, prologue, types, 7)
    x[1, 7] = bad
    bad_codes, bad_scale = run(t, x, prologue, types, 7)
    assert not bool(bad_scale[1].isfinite())
    others = [0, 2, 3, 4]
    assert torch.equal(bad_codes[others], codes[others])
    assert torch.equal(bad_scale[others], scale[others])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_zeros(kind: str) -> None:
    """eps keeps its norm finite."""
    t = replace(random_transform("single", 48, NUM_TYPES, seed=6), channel_scale=None)
    x = torch.zeros(2, 48)
    prologue = replace(random_prologue(kind, x), other=None, total=None, bias=None)
    codes, scale = run(t, x, prologue, None, 7)
    assert not bool(codes.any())
    assert bool((scale > 0).all() and (scale < 1e-20).all())


def test_activations_far_out() -> None:
    t = random_transform("single", 48, NUM_TYPES, seed=7)
    x = torch.linspace(-200, 200, 96).view(2, 48)
    for kind in ("silu", "gelu", "gelu_tanh"):
        check(t, x, Prologue(kind), None)
