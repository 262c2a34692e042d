"""The kernels for Hopper in ``gluon_interpreter``: every tile, slices, split sums, and the transform with all that
precedes it, beside the reference. The same on a GPU: ``test_on_gpu.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

import gluon_interpreter
import torch
from gluon_interpreter import InterpretedLaunch, InterpreterError
from poison import poisoned_empty
from prologue_bound import exact_row
from random_codes import random_codes
from random_prologues import random_prologue
from random_transforms import random_transform
from torch import Tensor
from transform_bound import BF16_ROUNDING, codes_of, values_of

from freeact_fx import reference
from freeact_fx.codegen import engine_ops
from freeact_fx.codegen.engine_ops import to_engine_order, to_plain_order
from freeact_fx.codegen.kernels import (
    hopper_branch_few,
    hopper_branch_quantize,
    hopper_int_mm,
    hopper_transform_quantize,
)
from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.codegen.tiles import (
    HopperTransformTile,
    TileConfig,
    branch_tile,
    hopper_tiles,
    hopper_transform_tile,
    parts_of_branch,
)
from freeact_fx.reference import branch_codes, pack_int4
from freeact_fx.transform import GroupTransform

E4M3 = torch.float8_e4m3fn
counter = torch.zeros(4096, dtype=torch.int32)


def clear_launches(module: Any) -> None:
    for name, function in vars(module).items():
        if name.startswith("_launch_of"):
            function.cache_clear()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A chip of three multiprocessors."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    modules: Any = (
        hopper_int_mm,
        hopper_transform_quantize,
        hopper_branch_quantize,
        hopper_branch_few,
    )
    for module in modules:
        monkeypatch.setattr(module, "Launch", InterpretedLaunch)
        clear_launches(module)
    for module in (hopper_int_mm, hopper_branch_quantize):
        monkeypatch.setattr(module, "multiprocessors_of", lambda device: 3)
        monkeypatch.setattr(module, "counters", lambda device, number: counter)
    monkeypatch.setattr(hopper_transform_quantize, "multiprocessors_of", lambda device: 1)
    yield
    for module in modules:
        clear_launches(module)


@pytest.mark.parametrize(
    ("order", "rank"), [("untyped", 0), ("one type", 72), ("mixed", 0), ("mixed", 32)]
)
@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize(
    ("num_codes", "tile"),
    [
        *((1024, tile) for tile, _ in hopper_tiles(1024)),
        *((768, tile) for tile, _ in hopper_tiles(768) if tile.split_k == 3),
    ],
    ids=str,
)
def test_linear(
    num_codes: int, tile: TileConfig, dtype: torch.dtype, order: str, rank: int
) -> None:
    """Three slices for the types if they are mixed and there is no branch, one otherwise."""
    promoted = dtype == E4M3
    if promoted and tile.block_m * tile.rows > 64 * 128:
        tile = replace(tile, block_m=64 * 128 // tile.rows)
    num_tokens, num_outputs = tile.block_m + 9, tile.block_n + (16 if rank else 24)
    size = num_codes // 2 - 12
    sizes = [num_codes] if order != "mixed" or rank else [size, 24, size]
    slice_of_type = [*range(len(sizes)), 0, len(sizes) - 1]
    types = torch.randint(-1, len(slice_of_type), (num_tokens,)) if order == "mixed" else None
    default = len(slice_of_type) - 1
    chosen = torch.tensor(slice_of_type)[default if types is None else types]
    in_slice = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    codes = random_codes(num_tokens, num_codes, largest=7) * (in_slice == chosen.view(-1, 1))
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    scale, weight_scale = torch.rand(num_tokens), torch.rand(len(sizes), num_outputs)
    table = torch.randn(len(slice_of_type), num_outputs) if order != "untyped" else None
    num_columns = max(rank - 2, 0)
    c = torch.randn(num_tokens, num_columns).bfloat16()
    v = torch.randint(-127, 128, (num_columns, num_outputs)).to(torch.int8)
    v_scale = torch.rand(num_columns)
    # Behind the columns of the weight are zeros on the GPU; here nothing may read them.
    padded = torch.nn.functional.pad(c, (0, rank - num_columns), value=7.0)
    got = hopper_int_mm.hopper_linear(
        to_engine_order(codes.to(dtype)),
        scale,
        pack_int4(weight_i4),
        weight_scale,
        table,
        types,
        sizes,
        slice_of_type,
        default,
        torch.bfloat16,
        tile,
        promoted,
        *((padded, v, v_scale) if rank else ()),
    )
    want = codes.double() @ weight_i4.double().t() * scale[:, None] * weight_scale.double()[chosen]
    rows = torch.zeros_like(want)
    if table is not None:
        rows += reference.rows_of_type(table, types, default).double()
    weights = v.double() * v_scale.double()[:, None]
    of_branch = scale[:, None].double() * (c.double() @ weights)
    terms = scale[:, None].double() * (c.double().abs() @ weights.abs())
    fp32_steps = (4 + rank) * (want.abs() + terms) + 4 * rows.abs()
    want = want + rows + of_branch
    # A weight of the branch is rounded to bf16.
    bound = 2**-24 * fp32_steps + 2**-8 * (want.abs() + terms) + 1e-7
    assert bool(((got.double() - want).abs() <= bound).all())
    assert int(counter.abs().max()) == 0


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("outputs", [(128, 304, 64), (304, 128), (64, 128, 64, 64)], ids=str)
def test_linears_of_one_input(outputs: tuple[int, ...], split_k: int, rank: int) -> None:
    num_tokens = 20
    codes = to_engine_order(random_codes(num_tokens, 512, largest=7))
    scale, types = torch.rand(num_tokens), torch.randint(0, 2, (num_tokens,))
    static = (types, [512], [0, 0], 0, torch.bfloat16)
    tile = next(t for t, _ in hopper_tiles(512) if t.block_m == 16 and t.split_k == split_k)
    coefficients = torch.randn(num_tokens, rank).bfloat16() if rank else None

    def linear(n: int) -> Any:
        tables = torch.rand(1, n) + 0.1, torch.randn(2, n)
        branch = torch.randint(-127, 128, (rank, n)).to(torch.int8), torch.rand(rank)
        weight = pack_int4(random_codes(n, 512, largest=7))
        return (weight, *tables, *(branch if rank else (None, None)))

    linears = [linear(n) for n in outputs]
    got = hopper_int_mm.hopper_linears(
        codes, scale, linears, *static, tile, coefficients=coefficients
    )
    for out, (weight, *tables, v, v_scale) in zip(got, linears, strict=True):
        of_branch = (None, coefficients, v, v_scale)
        want = hopper_int_mm.hopper_linear(codes, scale, weight, *tables, *static, tile, *of_branch)
        assert torch.equal(out, want)
    assert int(counter.abs().max()) == 0


@pytest.mark.parametrize(
    ("number", "dtype", "rank", "launches"),
    [(3, torch.int8, 8, 1), (4, torch.int8, 8, 2), (3, E4M3, 0, 1), (3, E4M3, 8, 3)],
)
def test_launches_of_linears(
    number: int, dtype: torch.dtype, rank: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(InterpretedLaunch, "__call__", lambda self, *args: launched.append(args))
    codes = to_engine_order(random_codes(20, 512, largest=7).to(dtype))
    branch = torch.zeros(rank, 64, dtype=torch.int8), torch.ones(rank)
    weight = pack_int4(random_codes(64, 512, largest=7))
    linear = (weight, torch.rand(1, 64), None, *(branch if rank else (None, None)))
    static = (None, [512], [0], 0, torch.bfloat16)
    tile = next(t for t, _ in hopper_tiles(512) if t.block_m == 16)
    coefficients = torch.zeros(20, rank).bfloat16() if rank else None
    hopper_int_mm.hopper_linears(
        codes, torch.rand(20), number * [linear], *static, tile, coefficients=coefficients
    )
    assert len(launched) == launches


@pytest.mark.parametrize("kind", ["none", "rms", "rms of a sum", "layer", "silu", "gelu_tanh"])
@pytest.mark.parametrize("num_features", [3584, 4096, 5120, 8192, 12288])
@pytest.mark.parametrize("qmax", [7, 448])
def test_transform(num_features: int, kind: str, qmax: int) -> None:
    x = torch.randn(7, num_features).bfloat16()
    prologue, t = random_prologue(kind, x), random_transform("shift", num_features, 2, seed=1)
    types = torch.randint(-1, 3, (7,))
    check(x, prologue, t, types, qmax)


@pytest.mark.parametrize("kind", ["none", "silu"])
@pytest.mark.parametrize("num_features", [4608, 11008, 18944])  # 64 x 72, 86 x 128, 128 x 148
def test_transform_of_odd_shapes(num_features: int, kind: str) -> None:
    x = torch.randn(4, num_features).bfloat16()
    prologue, t = random_prologue(kind, x), random_transform("shift", num_features, 2, seed=1)
    check(x, prologue, t, torch.randint(-1, 3, (4,)), 7)


@pytest.mark.parametrize("kind", ["none", "rms", "layer", "silu"])
@pytest.mark.parametrize(
    ("plan", "num_features", "num_types"),
    [("paper", 4096, 2), ("paper", 4096, 3), ("paper", 12288, 2), ("duplicate", 3584, 2)],
)
def test_transform_of_slices(plan: str, num_features: int, num_types: int, kind: str) -> None:
    """With fewer, as many and more rows of codes than a token has rows."""
    x = torch.randn(8, num_features).bfloat16()
    prologue, t = random_prologue(kind, x), random_transform(plan, num_features, num_types, seed=1)
    types = torch.randint(-1, num_types + 1, (8,))
    check(x, prologue, t, types, 7)
    narrow = replace(t, left=t.left[:, :-8], widths=(*t.widths[:-1], t.widths[-1] - 8))
    check(x, prologue, narrow, types, 448)


@pytest.mark.parametrize(
    ("ahead", "tokens_ahead"), [(False, 0), (False, 1), (False, 2), (False, 3), (True, 0)]
)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 10, 21])
def test_transform_by_tokens(num_tokens: int, ahead: bool, tokens_ahead: int) -> None:
    """Three programs that prepare the next token early or not, if there is a next one."""
    tile = hopper_transform_tile(56, (56,), 64, "rms")
    assert tile is not None
    tile = replace(tile, ahead=ahead, tokens_ahead=tokens_ahead, per_multiprocessor=3)
    x = torch.randn(num_tokens, 3584).bfloat16()
    prologue, t = random_prologue("rms of a sum", x), random_transform("shift", 3584, 2, seed=1)
    total = check(x, prologue, t, torch.randint(-1, 3, (num_tokens,)), 7, tile)
    assert prologue.other is not None
    assert torch.equal(total, x + prologue.other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("typed", [True, False])
def test_transform_of_other_dtypes(dtype: torch.dtype, typed: bool) -> None:
    x = torch.randn(5, 3, 4096)[:, 1].to(dtype)
    for t in (random_transform(plan, 4096, 2, seed=2) for plan in ("single", "shift")):
        shift = None if t.shift is None else t.shift.bfloat16()
        types = torch.randint(-1, 3, (5,)) if typed else None
        check(x, random_prologue("rms", x), replace(t, shift=shift), types, 7)


def test_transform_of_rows_that_are_not_aligned() -> None:
    """Values of 16 bits are read in pairs."""
    x = torch.randn(5, 4097).bfloat16()
    for part in (x[:, 1:], x[:, :-1]):
        check(
            part, random_prologue("rms", part), random_transform("shift", 4096, 2, seed=1), None, 7
        )


def check(
    x: Tensor,
    prologue: Prologue,
    t: GroupTransform,
    types: Tensor | None,
    qmax: int,
    tile: HopperTransformTile | None = None,
) -> Any:
    """Codes and scale are what the kernel's rounding allows. Returns ``total``."""
    row, error = exact_row(x, prologue)
    bounds = codes_of(t, row, types, 2, qmax, error, in_bf16=True)
    codes, scale = hopper_transform_quantize.hopper_transform_quantize(
        x, types, t.shift, t.channel_scale, t.left, t.right, t.clip, t.widths, t.slice_of_type,
        2, qmax, prologue, tile,
    )  # fmt: skip
    bounds.check(to_plain_order(codes), scale)
    return prologue.total


@pytest.mark.parametrize("kind", ["rms", "none"])
@pytest.mark.parametrize("num_features", [4096, 12288, 18944])
def test_transform_without_rounding(num_features: int, kind: str) -> None:
    x = torch.randn(5, num_features).bfloat16()
    prologue, t = random_prologue(kind, x), random_transform("shift", num_features, 2, seed=1)
    types = torch.randint(-1, 3, (5,))
    row, x_error = exact_row(x, prologue)
    exact, error = values_of(t, row, types, 2, x_error, in_bf16=True)
    values, ones = hopper_transform_quantize.hopper_transform_quantize(
        x, types, t.shift, t.channel_scale, t.left, t.right, t.clip, t.widths, t.slice_of_type,
        2, 0, prologue,
    )  # fmt: skip
    error += BF16_ROUNDING * (exact.abs() + error)
    assert bool(((to_plain_order(values).double() - exact).abs() <= error).all())
    assert bool((ones == 1).all())


@pytest.mark.parametrize("order", ["untyped", "mixed"])
@pytest.mark.parametrize(
    ("num_features", "rank", "own_rank", "qmax"),
    [
        (4096, 64, 0, 7),
        (4096, 72, 24, 448),
        (3584, 128, 32, 7),
        (11008, 32, 0, 7),  # smaller chunks
        (640, 9, 3, 7),  # columns that are not in memory at multiples of eight
        (256, 40, 0, 7),  # fewer chunks than places
    ],
)
@pytest.mark.parametrize("parts", [0, 1, 2, 4], ids=["few", "many", "two parts", "four parts"])
def test_branch(
    parts: int,
    num_features: int,
    rank: int,
    own_rank: int,
    qmax: int,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference that rounds in the same places sums in another order: of the codes a few may be others.

    parts  programs for a tile of tokens; 0: as for few tokens
    """
    tile = branch_tile(num_features, rank)
    assert tile is not None
    parts = min(parts, num_features // tile.block_k)
    monkeypatch.setattr(hopper_branch_quantize, "few_tokens", lambda _: 0 if parts else 70)
    z = (torch.randn(70, num_features) * (1 + torch.arange(70).unsqueeze(1))).bfloat16()
    columns = torch.linalg.qr(torch.randn(num_features, rank))[0]
    num_rows = 3 if own_rank == 0 else rank // own_rank + 1
    operands = (
        z,
        branch_codes(columns),
        torch.randint(-1, num_rows, (70,)) if order == "mixed" else None,
        0.5 + 0.5 * torch.rand(num_rows),
        1,
        own_rank,
        qmax,
    )
    found = hopper_branch_quantize.hopper_branch_quantize(*operands, parts)
    codes, scale, coefficients = found
    want_codes, want_scale, want_coefficients = engine_ops.engine_branch_quantize(*operands)
    difference = (codes.float() - want_codes.float()).abs()
    assert float((difference > 0).float().mean()) < 2e-4
    assert float(difference.max()) <= (1 if qmax == 7 else 32)
    assert torch.allclose(scale, want_scale, rtol=1e-3)
    assert torch.allclose(coefficients, want_coefficients, rtol=2**-6, atol=1e-3)
    assert int(counter.abs().max()) == 0


@pytest.mark.parametrize("num_features", [256, 640, 3584, 4096, 11008, 12288, 18944, 53248])
@pytest.mark.parametrize("rank", [16, 128])
def test_each_program_has_features_of_a_branch(num_features: int, rank: int) -> None:
    tile = branch_tile(num_features, rank)
    assert tile is not None
    num_chunks = num_features // tile.block_k
    for num_tiles in range(1, 300):
        parts = parts_of_branch(num_tiles, num_features, tile.block_k, 132)
        of_each = -(-num_chunks // parts)
        assert (parts - 1) * of_each < num_chunks <= parts * of_each
        assert parts == 1 or parts * num_tiles <= 132


@pytest.mark.parametrize("few_tokens", [0, 4])
def test_what_is_not_finite_in_a_branch_poisons_its_own_token(
    few_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_branch_quantize, "few_tokens", lambda _: few_tokens)
    z = torch.randn(4, 4096).bfloat16()
    z[1], z[2] = torch.nan, torch.inf
    columns = branch_codes(torch.linalg.qr(torch.randn(4096, 8))[0])
    _, scale, _ = hopper_branch_quantize.hopper_branch_quantize(
        z, columns, None, torch.ones(1), 0, 0, 7
    )
    assert scale.isfinite().flatten().tolist() == [True, False, False, True]


def test_what_is_not_finite_poisons_its_own_token() -> None:
    x = torch.randn(4, 4096)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    t = random_transform("shift", 4096, 2, seed=1)
    _, scale = hopper_transform_quantize.hopper_transform_quantize(
        x, None, t.shift, t.channel_scale, t.left, t.right, t.clip, t.widths, t.slice_of_type,
        0, 7, NO_PROLOGUE,
    )  # fmt: skip
    assert scale.isfinite().flatten().tolist() == [True, False, False, True]


def test_the_interpreter_finds_what_is_wrong() -> None:
    pointer = gluon_interpreter.Pointer.to_tensor(torch.zeros(4))
    with pytest.raises(InterpreterError, match="element 4 of a tensor that has 4"):
        gluon_interpreter.load(pointer + 4)
    barrier = gluon_interpreter.Barrier()
    barrier.count = 1
    barrier.arrive()
    with pytest.raises(InterpreterError, match="more arrivals"):
        barrier.arrive(2)
