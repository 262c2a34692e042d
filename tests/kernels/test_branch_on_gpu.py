"""Plan ``branch`` on a Hopper that is there: its own kernels, the transform before them, the Linear's branch. Run by
hand: ``benchmarks/gpu_tests.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from poison import poisoned_empty
from prologue_bound import exact_row
from random_codes import random_codes
from random_prologues import random_prologue
from random_transforms import random_transform
from torch import Tensor
from transform_bound import BF16_ROUNDING, values_of

from freeact_fx import reference
from freeact_fx.codegen import engine_ops
from freeact_fx.codegen.engine_ops import to_engine_order, to_plain_order
from freeact_fx.codegen.tiles import TileConfig, few_tokens, hopper_tiles, hopper_transform_tile
from freeact_fx.reference import branch_codes, pack_int4

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="for Hopper alone")]
if HOPPER:
    from freeact_fx.codegen.kernels import hopper_branch_quantize
    from freeact_fx.codegen.kernels.hopper_int_mm import hopper_linear
GPU = torch.device("cuda")
E4M3 = torch.float8_e4m3fn
NUM_TYPES = 2
KINDS = ["none", "rms", "rms of a sum", "layer", "layer of a sum", "silu", "gelu", "gelu_tanh"]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def exact_product(codes: Tensor, weight_i4: Tensor) -> Tensor:
    return codes.double() @ weight_i4.double().t()


# ------------------------------------------------------------------ the Linear


@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("rank", [8, 61, 72, 128])
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_codes"),
    [(1, 12288, 4096), (65, 256, 128), (1000, 4112, 4096), (8192, 12288, 4096)],
)
def test_linear(
    num_tokens: int, num_outputs: int, num_codes: int, rank: int, typed: bool, dtype: torch.dtype
) -> None:
    codes = random_codes(num_tokens, num_codes, largest=7, device=GPU)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7, device=GPU)
    scale, weight_scale = torch.rand(num_tokens, 1, device=GPU), torch.rand(num_outputs, device=GPU)
    table = torch.randn(NUM_TYPES + 1, num_outputs, device=GPU)
    types = torch.randint(-1, NUM_TYPES + 1, (num_tokens,), device=GPU) if typed else None
    c = 100 * torch.randn(num_tokens, rank, device=GPU).bfloat16()
    v = torch.randint(-127, 128, (rank, num_outputs), device=GPU).to(torch.int8)
    v_scale = torch.rand(rank, device=GPU)
    got = engine_ops.engine_linear(
        to_engine_order(codes.to(dtype)),
        scale,
        pack_int4(weight_i4),
        weight_scale[None],
        table,
        types,
        [num_codes],
        [0] * (NUM_TYPES + 1),
        1,
        torch.bfloat16,
        torch.nn.functional.pad(c, (0, -rank % 8)),
        v,
        v_scale,
    )
    factor = scale.double() * weight_scale.double()
    product = exact_product(codes, weight_i4)
    v_double = v.double() * v_scale.double()[:, None] / weight_scale.double()
    branch, of_branch = c.double() @ v_double, c.double().abs() @ v_double.abs()
    size = product.abs() + of_branch
    rows = reference.rows_of_type(table, types, 1).double()
    want = (product + branch) * factor + rows
    # A product of 16 columns is added to sums of which the tensor core keeps 2^-22 of the largest addend.
    bound = rank / 16 * 2**-21 * size * factor + 8 * 2**-24 * (size * factor + rows.abs())
    bound += 2**-8 * of_branch * factor  # weights of the branch are rounded to bf16
    assert bool(((got.double() - want).abs() <= bound + want.abs() * 2**-8 + 1e-6).all())


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [
        (tile, dtype)
        for dtype in (torch.int8, E4M3)
        for tile, _ in hopper_tiles(4096, promoted=dtype == E4M3)
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [48, 200])
def test_every_tile_of_the_linear(tile: TileConfig, dtype: torch.dtype, num_tokens: int) -> None:
    """Small integers, so that the outputs are exact; again and again, to see the counters left as zeros."""
    codes, weight_i4 = (random_codes(n, 4096, largest=1, device=GPU) for n in (num_tokens, 400))
    codes[:, 60:] *= torch.rand(codes[:, 60:].shape, device=GPU) < 0.02
    c = torch.randint(-1, 2, (num_tokens, 40), device=GPU).bfloat16()
    v = torch.randint(-1, 2, (40, 400), device=GPU).to(torch.int8)
    want = exact_product(codes, weight_i4) + c.double() @ v.double()
    assert int(want.abs().max()) <= 256
    for _ in range(3):
        got = hopper_linear(
            to_engine_order(codes.to(dtype)),
            torch.ones(num_tokens, device=GPU),
            pack_int4(weight_i4),
            torch.ones(1, 400, device=GPU),
            *(None, None, [4096], [0], 0, torch.bfloat16),
            tile,
            coefficients=c,
            branch_weight=v,
            branch_scale=torch.ones(40, device=GPU),
        )
        assert torch.equal(got.double(), want)


# ------------------------------------------------------------------ coefficients, and what is left


def random_branch(
    num_tokens: int, num_features: int, rank: int, own_rank: int, typed: bool
) -> tuple[Any, ...]:
    """Tokens of different sizes, columns, types and clips."""
    num_rows = rank // own_rank + 1 if own_rank else NUM_TYPES + 1
    sizes = 1 + torch.rand(num_tokens, 1, device=GPU)
    z = (torch.randn(num_tokens, num_features, device=GPU) * sizes).bfloat16()
    columns = torch.linalg.qr(torch.randn(num_features, rank, device=GPU))[0]
    types = torch.randint(-1, num_rows, (num_tokens,), device=GPU) if typed else None
    clip = 0.5 + 0.5 * torch.rand(num_rows, device=GPU)
    return z, branch_codes(columns), types, clip


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("qmax", [7, 448])
@pytest.mark.parametrize(
    ("num_features", "rank", "own_rank"),
    [
        (4096, 61, 0),
        (4096, 72, 24),
        (3584, 128, 64),
        (11008, 64, 0),
        (18944, 102, 0),
        (12288, 64, 32),
        (640, 8, 4),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 64, "few", "one more", 1000])
def test_branch(
    num_tokens: int | str, num_features: int, rank: int, own_rank: int, qmax: int, typed: bool
) -> None:
    """Beside the reference in fp64, rounded in the same places: sums in fp32 turn few roundings, of coefficients and so
    of codes."""
    if isinstance(num_tokens, str):
        num_tokens = few_tokens(num_features) + (num_tokens == "one more")
    z, columns, types, clip = random_branch(num_tokens, num_features, rank, own_rank, typed)
    codes, scale, coefficients = engine_ops.engine_branch_quantize(
        z, columns, types, clip, 1, own_rank, qmax
    )
    wide = reference.branch_columns(columns).double()
    ordered = torch.cat([wide[0::2], wide[1::2]])
    exact = reference.branch_coefficients(z.double(), ordered, types, 1, own_rank)
    rest = z.double() - exact.bfloat16().double() @ ordered.t()
    clips = reference.rows_of_type(clip, types, 1).double().unsqueeze(-1)
    want, want_scale = reference.quantize_tokens(rest, clips, qmax)
    assert torch.allclose(scale.double(), want_scale, rtol=1e-3)
    found = coefficients[:, :rank].double() * scale
    assert bool((coefficients[:, rank:] == 0).all())
    assert bool(((found - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all())
    difference = (codes.double() - want.double()).abs()
    assert float((difference > 0).double().mean()) < 1e-3
    assert float(difference.max()) <= (1 if qmax == 7 else 32)


@pytest.mark.parametrize("num_tokens", [70, few_tokens(4096) + 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_poisons_its_own_token(bad: float, num_tokens: int) -> None:
    z, columns, _, clip = random_branch(num_tokens, 4096, 64, 0, False)
    args = (columns, None, clip, 0, 0, 7)
    good = engine_ops.engine_branch_quantize(z, *args)
    z[1] = bad
    others = torch.arange(num_tokens) != 1
    found = engine_ops.engine_branch_quantize(z, *args)
    assert not bool(found[1][1].isfinite())
    for got, want in zip(found, good, strict=True):
        assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("num_tokens", [70, 1025, 4096, 20000])
@pytest.mark.parametrize("parts", [2, 4, 6, 8])  # of six the last has fewer features
def test_parts_of_the_features(
    parts: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that share a token's features, again and again, beside one alone: sums in another order turn few
    roundings."""
    monkeypatch.setattr(hopper_branch_quantize, "few_tokens", lambda num_features: 0)
    z, columns, types, clip = random_branch(num_tokens, 4096, 64, 0, True)
    args = (z, columns, types, clip, 1, 0, 7)
    want_codes, *want = hopper_branch_quantize.hopper_branch_quantize(*args, 1)
    first = hopper_branch_quantize.hopper_branch_quantize(*args, parts)
    difference = (first[0].int() - want_codes.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).double().mean()) < 1e-3
    for got, expected in zip(first[1:], want, strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=2**-6, atol=1e-3)
    for _ in range(20):
        again = hopper_branch_quantize.hopper_branch_quantize(*args, parts)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("num_tokens", [16, 1000, 8192])
def test_again_and_again(num_tokens: int) -> None:
    """A race between copies and reads would show as a result that differs from run to run."""
    args = (*random_branch(num_tokens, 4096, 64, 0, True), 1, 0, 7)
    first = engine_ops.engine_branch_quantize(*args)
    for _ in range(50):
        for got, want in zip(engine_ops.engine_branch_quantize(*args), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_features", [3584, 4096, 12288])
def test_transform_without_rounding(num_features: int, kind: str) -> None:
    t = random_transform("shift", num_features, NUM_TYPES, seed=1)
    (d1, d2), widths = (t.left.shape[0], t.right.shape[-1]), tuple(t.widths)
    if hopper_transform_tile(d1, widths, d2, kind.split()[0]) is None:
        pytest.skip("no kernel leaves the values of this shape")
    x = torch.randn(37, num_features).bfloat16()
    types = torch.randint(-1, NUM_TYPES + 1, (37,), dtype=torch.int32)
    prologue, moved = random_prologue(kind, x), t.to(GPU)
    names = ("other", "weight", "bias", "total")
    there = {n: v.to(GPU) for n in names if (v := getattr(prologue, n)) is not None}
    values, ones = engine_ops.run_transform(
        x.to(GPU),
        replace(prologue, **there),
        types.to(GPU),
        *(moved.shift, moved.channel_scale, moved.left, moved.right, moved.clip),
        *(list(t.widths), list(t.slice_of_type), 1, 0),
    )
    row, row_error = exact_row(x, prologue)
    exact, error = values_of(t, row, types, 1, row_error, in_bf16=True)
    error += BF16_ROUNDING * (exact.abs() + error)
    assert bool(((to_plain_order(values).cpu().double() - exact).abs() <= error).all())
    assert bool((ones == 1).all())
