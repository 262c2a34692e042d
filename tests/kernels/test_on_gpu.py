"""Every kernel on the GPU that is there. Run by hand: ``benchmarks/gpu_tests.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_empty
from prologue_bound import exact_row
from random_codes import codes_of_slices, random_codes
from random_prologues import random_prologue
from random_transforms import random_transform
from torch import Tensor
from transform_bound import codes_of
from transformed_on import transformed_on

from freeact_fx import reference
from freeact_fx.codegen import engine_ops
from freeact_fx.codegen.engine_ops import to_engine_order
from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.codegen.tiles import TileConfig, hopper_tiles, hopper_transform_tile
from freeact_fx.reference import pack_int4
from freeact_fx.transform import GroupTransform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
if torch.cuda.is_available():
    from freeact_fx.codegen.kernels.hopper_int_mm import hopper_linear
    from freeact_fx.codegen.kernels.hopper_transform_quantize import hopper_transform_quantize
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="for chips with fp8 tensor cores")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="for Hopper alone")
NUM_TYPES = 2
GPU = torch.device("cuda")
ops = torch.ops.freeact
KINDS = [
    "none",
    "rms",
    "rms of a sum",
    "layer",
    "layer of a sum",
    "silu",
    "silu alone",
    "gelu",
    "gelu_tanh",
]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def exact_product(codes: Tensor, weight_i4: Tensor) -> Tensor:
    """In fp64 on the GPU, where integers of this size are exact."""
    return codes.to(GPU).double() @ weight_i4.to(GPU).double().t()


# ------------------------------------------------------------------ the integer product


@settings(max_examples=60)
@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(1, 300).map(lambda pairs: 2 * pairs),
    st.sampled_from([7, 127]),
)
def test_product_of_any_shape(
    num_tokens: int, num_outputs: int, num_codes: int, largest: int
) -> None:
    codes = random_codes(num_tokens, num_codes, largest=largest)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    product = ops.int_mm(codes.to(GPU), pack_int4(weight_i4).to(GPU))
    assert torch.equal(product.double(), exact_product(codes, weight_i4))


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 1000])
@pytest.mark.parametrize(("num_outputs", "num_codes"), [(4096, 4096), (12288, 4096), (4096, 12288)])
def test_product_of_real_shapes(num_tokens: int, num_outputs: int, num_codes: int) -> None:
    codes = random_codes(num_tokens, num_codes, largest=127)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    product = ops.int_mm(codes.to(GPU), pack_int4(weight_i4).to(GPU))
    assert torch.equal(product.double(), exact_product(codes, weight_i4))


def test_product_of_more_than_2_to_the_31_elements() -> None:
    num_tokens, num_codes, num_outputs = 2**31 // 4096 + 200, 4096, 8
    codes = torch.zeros(num_tokens, num_codes, dtype=torch.int8, device=GPU)
    rows = torch.tensor([0, num_tokens // 2, num_tokens - 1])
    codes[rows] = random_codes(3, num_codes, largest=7).to(GPU)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    product = engine_ops.engine_int_mm(to_engine_order(codes), pack_int4(weight_i4).to(GPU))
    assert torch.equal(product[rows].double(), exact_product(codes[rows], weight_i4))
    assert int(product.count_nonzero()) <= 3 * num_outputs


# ------------------------------------------------------------------ the product for Hopper


@needs_hopper
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_codes"),
    [
        (1, 12288, 4096),
        (16, 4096, 12288),
        (33, 264, 512),
        (65, 256, 128),
        (100, 72, 256),
        (129, 8, 128),
        (256, 12288, 4096),
        (1000, 4096, 4096),
        (8192, 12288, 4096),
    ],
)
def test_hopper_linear(
    num_tokens: int, num_outputs: int, num_codes: int, dtype: torch.dtype, typed: bool
) -> None:
    codes = random_codes(num_tokens, num_codes, largest=7)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    scale, weight_scale = torch.rand(num_tokens, 1, device=GPU), torch.rand(num_outputs, device=GPU)
    table = torch.randn(NUM_TYPES + 1, num_outputs, device=GPU)
    types = torch.randint(-1, NUM_TYPES + 1, (num_tokens,), device=GPU) if typed else None
    got = engine_ops.engine_linear(
        to_engine_order(codes).to(GPU),
        scale,
        pack_int4(weight_i4).to(GPU),
        weight_scale[None],
        table,
        types,
        [num_codes],
        [0] * (NUM_TYPES + 1),
        1,
        dtype,
    )
    want = exact_product(codes, weight_i4) * scale.double() * weight_scale.double()
    rows = reference.rows_of_type(table, types, 1).double()
    # fp32 rounds four times on the way, the output once.
    bound = 4 * 2**-24 * (want.abs() + rows.abs()) + (want + rows).abs() * torch.finfo(dtype).eps
    assert bool(((got.double() - want - rows).abs() <= bound + 1e-7).all())


@needs_hopper
@pytest.mark.parametrize("num_tokens", [1, 48, 200])
@pytest.mark.parametrize("tile", [tile for tile, _ in hopper_tiles(12288)], ids=str)
def test_every_tile_of_the_hopper_linear(tile: TileConfig, num_tokens: int) -> None:
    """Small integers, so that the outputs are exact; K is split among programs in some."""
    codes, weight_i4 = (random_codes(n, 12288, largest=1) for n in (num_tokens, 400))
    codes[:, 60:] *= torch.rand(codes[:, 60:].shape) < 0.007
    ones = torch.ones(num_tokens, device=GPU), torch.ones(400, device=GPU)
    weight = pack_int4(weight_i4).to(GPU)
    table = torch.arange(400.0, device=GPU)[None] % 8
    for _ in range(3):  # each leaves the counters as zeros
        got = hopper_linear(
            to_engine_order(codes).to(GPU),
            ones[0],
            weight,
            ones[1][None],
            table,
            None,
            [12288],
            [0],
            0,
            torch.bfloat16,
            tile,
        )
        want = exact_product(codes, weight_i4) + table
        assert int(want.abs().max()) <= 256
        assert torch.equal(got.double(), want)


@needs_hopper
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("order", ["sorted", "mixed", "untyped", "one type"])
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "sizes"),
    [
        (8192, 12288, [2048, 2048]),
        (1000, 4096, [4096, 4096]),
        (1000, 264, [130, 62, 640, 192]),  # boundaries within a step, and a slice within one
        (300, 72, [254, 2]),
        (129, 8, [2, 126]),
        (65, 256, [1000, 24, 1024]),
        (16, 264, [3000, 1000, 96]),  # parts of K without steps
        (1, 12288, [2048, 2048]),
    ],
    ids=str,
)
def test_hopper_linear_of_slices(
    num_tokens: int, num_outputs: int, sizes: list[int], order: str, with_bias: bool
) -> None:
    codes, types, chosen, slice_of_type = codes_of_slices(num_tokens, sizes, order, GPU)
    default_type = len(slice_of_type) - 1
    weight_i4 = random_codes(num_outputs, sum(sizes), largest=7)
    scale = torch.rand(num_tokens, 1, device=GPU)
    weight_scale = torch.rand(len(sizes), num_outputs, device=GPU)
    table = torch.randn(len(slice_of_type), num_outputs, device=GPU) if with_bias else None
    got = engine_ops.engine_linear(
        to_engine_order(codes).to(GPU),
        scale,
        pack_int4(weight_i4).to(GPU),
        weight_scale,
        table,
        types,
        sizes,
        slice_of_type,
        default_type,
        torch.bfloat16,
    )
    want = exact_product(codes, weight_i4) * scale.double() * weight_scale.double()[chosen]
    rows = torch.zeros_like(want)
    if table is not None:
        rows += reference.rows_of_type(table, types, default_type).double()
    bound = 4 * 2**-24 * (want.abs() + rows.abs()) + (want + rows).abs() * 2**-7
    assert bool(((got.double() - want - rows).abs() <= bound + 1e-7).all())


@needs_hopper
@pytest.mark.parametrize("order", ["sorted", "mixed", "untyped"])
@pytest.mark.parametrize(
    ("tile", "dtype"),
    [
        (tile, dtype)
        for dtype in (torch.int8, torch.float8_e4m3fn)
        for tile, _ in hopper_tiles(4096, promoted=dtype != torch.int8)
    ],
    ids=str,
)
def test_every_tile_of_the_hopper_linear_of_slices(
    tile: TileConfig, dtype: torch.dtype, order: str
) -> None:
    """One output for each code, so that the output is the codes; again and again, to see the counters left as zeros."""
    sizes = [1000, 96, 3000]
    codes, types, _, slice_of_type = codes_of_slices(200, sizes, order, GPU)
    weight_i4 = torch.zeros(400, 4096, dtype=torch.int8)
    columns = torch.randperm(4096)[:400]
    weight_i4[torch.arange(400), columns] = 1
    for _ in range(3):
        got = hopper_linear(
            to_engine_order(codes.to(GPU).to(dtype)),
            torch.ones(200, device=GPU),
            pack_int4(weight_i4).to(GPU),
            torch.ones(3, 400, device=GPU),
            None,
            types,
            sizes,
            slice_of_type,
            len(slice_of_type) - 1,
            torch.bfloat16,
            tile,
        )
        assert torch.equal(got.cpu(), codes[:, columns].bfloat16())


@needs_hopper
@pytest.mark.parametrize("num_tokens", [16, 256, 4096])
def test_hopper_linear_again_and_again(num_tokens: int) -> None:
    """A race between its warps or programs would show as a result that differs from run to run."""
    codes = to_engine_order(random_codes(num_tokens, 4096, largest=7)).to(GPU)
    weight = pack_int4(random_codes(4096, 4096, largest=7)).to(GPU)
    scale, weight_scale = torch.rand(num_tokens, 1, device=GPU), torch.rand(4096, device=GPU)
    one_slice = (None, None, [4096], [0], 0)
    args = (codes, scale, weight, weight_scale[None], *one_slice, torch.bfloat16)
    first = engine_ops.engine_linear(*args)
    for _ in range(50):
        assert torch.equal(engine_ops.engine_linear(*args), first)


@needs_hopper
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("outputs", [(4096, 512, 4096), (4096, 512, 4096, 12288)], ids=len)
@pytest.mark.parametrize("num_tokens", [1, 16, 40, 256, 1000])
def test_linears_of_one_input(num_tokens: int, outputs: tuple[int, ...], rank: int) -> None:
    """Up to three are one launch, and what follows must not begin before all are done."""
    x = torch.randn(num_tokens, 4096, device=GPU).bfloat16()
    t = random_transform("shift", 4096, NUM_TYPES, seed=1).to(GPU)
    types = torch.randint(0, NUM_TYPES, (num_tokens,), device=GPU)
    linears = [
        [
            pack_int4(random_codes(n, 4096, largest=7)).to(GPU),
            torch.rand(1, n, device=GPU) / 4096,
            torch.randn(NUM_TYPES + 1, n, device=GPU),
        ]
        for n in outputs
    ]
    static = (types, [4096], [0] * (NUM_TYPES + 1), 0, torch.bfloat16)
    branches = [
        (random_codes(rank, n, largest=127).to(GPU), torch.rand(rank, device=GPU) / 127)
        for n in outputs
    ]
    coefficients = torch.randn(num_tokens, rank, device=GPU).bfloat16()
    of_branch: list[Any] = [(coefficients, *branch) if rank else () for branch in branches]
    of_branches: Any = (None, [], [])
    if rank:
        of_branches = (coefficients, *map(list, zip(*branches, strict=True)))

    def transformed(x: Tensor) -> tuple[Tensor, Tensor]:
        operands = (types, t.shift, t.channel_scale, t.left, t.right, t.clip)
        return engine_ops.engine_transform_quantize(
            x, *operands, list(t.widths), list(t.slice_of_type), 0, 7
        )

    def one_after_the_other() -> list[Tensor]:
        codes, scale = transformed(x)
        outputs = []
        for linear, branch in zip(linears, of_branch, strict=True):
            outputs.append(engine_ops.engine_linear(codes, scale, *linear, *static, *branch))
            torch.cuda.synchronize()
        return [*outputs, *transformed(outputs[0]), *transformed(outputs[2])]

    def together() -> list[Tensor]:
        columns: list[list[Tensor]] = [list(column) for column in zip(*linears, strict=True)]
        outputs = engine_ops.engine_linears(*transformed(x), *columns, *static, *of_branches)
        return [*outputs, *transformed(outputs[0]), *transformed(outputs[2])]

    want = one_after_the_other()
    for _ in range(30):
        assert all(map(torch.equal, together(), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = together()
    for _ in range(30):
        graph.replay()
        assert all(map(torch.equal, got, want))


# ------------------------------------------------------------------ the fp8 engine

E4M3 = torch.float8_e4m3fn


def correlated_codes(num_tokens: int, num_outputs: int, num_codes: int) -> tuple[Tensor, Tensor]:
    """Tokens and weights whose large codes meet, with the same sign; the first rows are 7 throughout."""
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    codes = random_codes(num_tokens, num_codes, largest=1)
    outliers = torch.rand(num_codes) < 0.5
    sign = random_codes(num_codes, largest=7).sign()
    codes[:, outliers] = 7 * sign[outliers]
    weight_i4[:, outliers] = weight_i4[:, outliers].abs() * sign[outliers]
    codes[0], weight_i4[: num_outputs // 2] = 7, 7
    return codes, weight_i4


@needs_fp8
@settings(max_examples=60)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 300).map(lambda pairs: 2 * pairs))
def test_e4m3_product_of_integers(num_tokens: int, num_outputs: int, num_codes: int) -> None:
    codes = random_codes(num_tokens, num_codes, largest=7)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    product = ops.int_mm(codes.to(GPU).to(E4M3), pack_int4(weight_i4).to(GPU))
    assert torch.equal(product.double(), exact_product(codes, weight_i4))


def e4m3_bound(codes: Tensor, weight_i4: Tensor) -> Tensor:
    """How far a product may be from the exact one: in a sum of 256 codes, eight times 33 addends lose less than 2^-13
    of the largest; each sum is added in fp32."""
    size = codes.to(GPU).double().abs() @ weight_i4.to(GPU).double().abs().t()
    return size * (8 * 33 * 2**-13 + codes.shape[-1] / 64 * 2**-24)


@needs_fp8
@pytest.mark.parametrize("num_tokens", [1, 16, 256, 1000])
@pytest.mark.parametrize(("num_outputs", "num_codes"), [(4096, 4096), (4096, 12288), (70, 98)])
def test_e4m3_product(num_tokens: int, num_outputs: int, num_codes: int) -> None:
    codes = (torch.randn(num_tokens, num_codes) * 100).clamp(-448, 448).to(E4M3)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    product = ops.int_mm(codes.to(GPU), pack_int4(weight_i4).to(GPU)).double()
    exact = exact_product(codes, weight_i4)
    assert bool(((product - exact).abs() <= e4m3_bound(codes, weight_i4)).all())
    # What is lost goes in both directions.
    assert float((product - exact).norm() / exact.norm()) < 2**-9


@needs_hopper
@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_codes"),
    [
        (1, 12288, 4096),
        (16, 4096, 12288),
        (33, 264, 512),
        (65, 256, 128),
        (129, 8, 128),
        (256, 12288, 4096),
        (1000, 4096, 14336),
    ],
)
def test_engines_are_bit_equal(
    num_tokens: int, num_outputs: int, num_codes: int, typed: bool, adversarial: bool
) -> None:
    codes = random_codes(num_tokens, num_codes, largest=7)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    if adversarial:
        codes, weight_i4 = correlated_codes(num_tokens, num_outputs, num_codes)
    types = torch.randint(-1, NUM_TYPES + 1, (num_tokens,), device=GPU) if typed else None
    rest = (
        torch.rand(num_tokens, 1, device=GPU),
        pack_int4(weight_i4).to(GPU),
        torch.rand(1, num_outputs, device=GPU),
        torch.randn(NUM_TYPES + 1, num_outputs, device=GPU),
        types,
        [num_codes],
        [0] * (NUM_TYPES + 1),
        1,
        torch.bfloat16,
    )
    by_int8, by_fp8 = (
        engine_ops.engine_linear(to_engine_order(codes.to(GPU).to(dtype)), *rest)
        for dtype in (torch.int8, E4M3)
    )
    assert torch.equal(by_fp8, by_int8)


@needs_hopper
@pytest.mark.parametrize("num_tokens", [1, 48, 200])
@pytest.mark.parametrize("tile", [tile for tile, _ in hopper_tiles(4096, promoted=True)], ids=str)
def test_every_tile_of_the_fp8_engine(tile: TileConfig, num_tokens: int) -> None:
    codes, weight_i4 = correlated_codes(num_tokens, 400, 4096)
    scale, weight_scale = torch.rand(num_tokens, device=GPU), torch.rand(1, 400, device=GPU)
    one_slice = (None, None, [4096], [0], 0)
    rest = (scale, pack_int4(weight_i4).to(GPU), weight_scale, *one_slice, torch.bfloat16, tile)
    for _ in range(3):
        by_int8, by_fp8 = (
            hopper_linear(to_engine_order(codes.to(GPU).to(dtype)), *rest)
            for dtype in (torch.int8, E4M3)
        )
        assert torch.equal(by_fp8, by_int8)


@needs_hopper
@pytest.mark.parametrize("num_tokens", [16, 256, 4096])
def test_e4m3_linear_again_and_again(num_tokens: int) -> None:
    codes = (torch.randn(num_tokens, 4096) * 100).clamp(-448, 448).to(E4M3)
    weight_i4 = random_codes(4096, 4096, largest=7)
    scale, weight_scale = torch.rand(num_tokens, 1, device=GPU), torch.rand(4096, device=GPU)
    args = (
        to_engine_order(codes).to(GPU),
        scale,
        pack_int4(weight_i4).to(GPU),
        weight_scale[None],
        *(None, None, [4096], [0], 0, torch.bfloat16),
    )
    first = engine_ops.engine_linear(*args)
    factor = scale.double() * weight_scale.double()
    error = (first.double() - exact_product(codes, weight_i4) * factor).abs()
    bound = e4m3_bound(codes, weight_i4) * factor + first.double().abs() * 2**-8
    assert bool((error <= bound).all())
    for _ in range(50):
        assert torch.equal(engine_ops.engine_linear(*args), first)


# ------------------------------------------------------------------ the transform


def check(
    t: GroupTransform, x: Tensor, prologue: Prologue, types: Tensor | None, qmax: int
) -> Tensor | None:
    """Codes are those that the kernel's rounding allows, and few of them are not the reference's; returns ``total``."""
    codes, scale = transformed_on(GPU, t, x, types, qmax, prologue)
    row, error = exact_row(x, prologue)
    tile = hopper_transform_tile(t.left.shape[0], t.widths, t.right.shape[-1], prologue.kind)
    in_bf16 = HOPPER and tile is not None and qmax != 127
    codes_of(t, row, types, 1, qmax, error, in_bf16=in_bf16).check(codes, scale)
    operands = (t.shift, t.channel_scale, t.left, t.right, t.clip)
    wide = [None if o is None else o.double() for o in operands]
    exact, *_ = reference.transform_quantize(
        row, types, *wide, None, t.widths, t.slice_of_type, 1, 0, qmax
    )
    differing = codes.double() != exact.double()  # torch compares no fp8
    # Neighbouring integers of 8 bits and values of e4m3 are nearer to each other than 4-bit codes.
    assert float(differing.float().mean()) < {7: 0.02, 127: 0.1, 448: 0.2}[qmax]
    return prologue.total


@pytest.mark.parametrize("qmax", [7, 127, pytest.param(448, marks=needs_fp8)])
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "paper"])
@pytest.mark.parametrize(
    "num_features", [48, 576, 3584, 4096, 5120, 8192, 11008, 12288, 14336, 18944]
)
def test_transform(num_features: int, plan: str, typed: bool, qmax: int) -> None:
    t = random_transform(plan, num_features, NUM_TYPES, seed=1)
    if t.shift is not None:
        t = replace(t, shift=t.shift.bfloat16())
    x = torch.randn(37, num_features).bfloat16()
    x[:, 3] *= 50
    types = torch.randint(-1, NUM_TYPES + 1, (37,), dtype=torch.int32) if typed else None
    check(t, x, NO_PROLOGUE, types, qmax)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_features", [576, 3584, 4096, 8192, 11008, 12288, 14336])
def test_transform_with_what_precedes_it(num_features: int, kind: str) -> None:
    t = random_transform("shift", num_features, NUM_TYPES, seed=1)
    assert t.shift is not None
    t = replace(t, shift=t.shift.bfloat16())
    x = torch.randn(37, num_features).bfloat16()
    types = torch.randint(-1, NUM_TYPES + 1, (37,), dtype=torch.int32)
    prologue = random_prologue(kind, x)
    total = check(t, x, prologue, types, 7)
    if prologue.total is not None:
        assert prologue.other is not None
        assert torch.equal(total, x + prologue.other)


@pytest.mark.parametrize("num_features", [48, 4096, 12288])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_poisons_its_own_token(num_features: int, bad: float) -> None:
    t = random_transform("shift", num_features, NUM_TYPES, seed=2)
    x = torch.randn(5, num_features)
    x[4] = 0
    codes, scale = transformed_on(GPU, t, x, None, 7)
    x[1, 7] = bad
    bad_codes, bad_scale = transformed_on(GPU, t, x, None, 7)
    assert not bool(bad_scale[1].isfinite())
    others = [0, 2, 3, 4]
    assert torch.equal(bad_codes[others], codes[others])
    assert torch.equal(bad_scale[others], scale[others])


@needs_hopper
@pytest.mark.parametrize(
    ("num_features", "plan", "kind"),
    [
        (3584, "shift", "rms"),
        (4096, "shift", "none"),
        (4096, "paper", "rms of a sum"),
        (8192, "shift", "layer"),
        (11008, "shift", "silu"),
        (12288, "paper", "silu"),
        (14336, "shift", "none"),
        (18944, "shift", "silu"),
    ],
)
def test_the_hopper_transform_again_and_again(num_features: int, plan: str, kind: str) -> None:
    """Many tokens for each program, which prepares the next one early or not: each token is what it is alone, with few
    others or with 200."""
    t = random_transform(plan, num_features, 2, seed=1)
    x = torch.randn(3000, num_features).bfloat16()
    types = torch.randint(-1, 3, (3000,), dtype=torch.int32)
    prologue = random_prologue(kind, x)
    tile = hopper_transform_tile(t.left.shape[0], t.widths, t.right.shape[-1], prologue.kind)
    assert tile is not None
    moved = t.to(GPU)
    operands = (moved.shift, moved.channel_scale, moved.left, moved.right, moved.clip)

    def part(rows: slice, device: torch.device) -> tuple[Tensor, Tensor, Prologue]:
        there = {
            name: (value[rows] if value.dim() == 2 else value).to(device)
            for name in ("other", "weight", "bias", "total")
            if (value := getattr(prologue, name)) is not None
        }
        return x[rows].to(device), types[rows].to(device), replace(prologue, **there)

    last, last_200 = slice(2990, 3000), slice(2800, 3000)
    row, last_types, of_last = part(last, torch.device("cpu"))
    check(t, row, of_last, last_types, 7)
    static = (t.widths, t.slice_of_type, 1, 7)
    tokens, token_types, of_tokens = part(slice(None), GPU)
    row, last_types, of_last = part(last, GPU)
    alone = hopper_transform_quantize(row, last_types, *operands, *static, of_last)
    row, last_types, of_last = part(last_200, GPU)
    together = hopper_transform_quantize(row, last_types, *operands, *static, of_last)
    in_registers = replace(tile, tokens_ahead=0)
    for other in (tile, in_registers, replace(in_registers, ahead=not tile.ahead)):
        args = (tokens, token_types, *operands, *static, of_tokens, other)
        first = hopper_transform_quantize(*args)
        for whole, *of_parts in zip(first, alone, together, strict=True):
            for rows, of_part in zip((last, last_200), of_parts, strict=True):
                assert torch.equal(whole[rows], of_part)
        for _ in range(20):
            assert all(map(torch.equal, hopper_transform_quantize(*args), first))
