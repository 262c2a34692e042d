"""What takes a GPU and more room or time: the portable kernels on a chip that has its own, tensors of more than 2^31
elements, and shapes that hypothesis draws. Run by hand: ``benchmarks/gpu_tests.py``."""

from __future__ import annotations

import fcntl
import itertools
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_block import Block
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_empty
from prologue_bound import exact_row
from random_codes import codes_of_slices, random_codes
from random_prologues import random_prologue
from random_transforms import random_transform
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transform_bound import codes_of
from transformed_on import transformed_on

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes, reference
from freeact_fx.codegen import engine_ops, lowering
from freeact_fx.codegen.engine_ops import to_engine_order, to_plain_order
from freeact_fx.codegen.prologue import NO_PROLOGUE, Prologue
from freeact_fx.codegen.tiles import hopper_transform_tile
from freeact_fx.reference import pack_int4
from freeact_fx.transform import kronecker_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
HOPPER = CAPABILITY[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="for Hopper alone")
needs_fp8 = pytest.mark.skipif(CAPABILITY < (8, 9), reason="for chips with fp8 tensor cores")
GPU = torch.device("cuda")
E4M3 = torch.float8_e4m3fn
NUM_TYPES = 2
KINDS = ("none", "rms", "rms of a sum", "layer", "layer of a sum", "silu", "gelu", "gelu_tanh")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def without_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the portable kernels run whatever the chip is."""
    for module in (engine_ops, lowering):
        monkeypatch.setattr(module, "is_hopper", lambda device: False)


# ------------------------------------------------------------------ the portable kernels in a compiled model


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch's own: of fp32 products
@pytest.mark.parametrize("portable", [True, pytest.param(False, marks=needs_hopper)])
@pytest.mark.parametrize("sizes", [(512, 1024), (576, 1536)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16, 512])
@pytest.mark.parametrize("bits", [4, 8, pytest.param("e4m3", marks=needs_fp8)])
def test_portable_kernels_in_a_compiled_model(
    bits: Any,
    num_tokens: int,
    sizes: tuple[int, int],
    portable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All Linears have them, or those of a width that Hopper's product does not take: 576 is no multiple of 128."""
    if portable:
        without_hopper(monkeypatch)
    config = QuantConfig(plan="shift", token_types=TokenTypes.mask_token(60), activation_bits=bits)
    ids = torch.randint(0, 64, (1, num_tokens))
    # The cache of graphs knows nothing of what is patched.
    options = {"strict": True, "inductor": {"fx_graph_cache": False}}
    with torch.no_grad():
        model = Block(*sizes).eval()
        freeact_fx.convert(model, config)
        with freeact_fx.token_types(config.token_types.from_ids(ids)):
            want = model(ids)
        fast = torch.compile(model.to(GPU, torch.bfloat16), backend="freeact", options=options)
        got, (code,) = run_and_get_code(fast, ids.to(GPU))
        again = fast(ids.to(GPU))
    products = re.findall(r"triton_tem_\w+\.run|freeact\.engine_linears?\b", code)
    found = {product.startswith("triton") for product in products}
    assert found == ({True} if portable else {True, False} if sizes[0] % 128 else {False})
    assert torch.equal(again, got)
    assert torch.linalg.norm(got.float().cpu() - want) < 0.05 * torch.linalg.norm(want)


@needs_fp8
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_codes"), [(1, 4096, 4096), (256, 512, 12288), (1000, 70, 98)]
)
def test_e4m3_sums_that_the_kernel_adds_itself(
    num_tokens: int, num_outputs: int, num_codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on Ada: exact where all products are as large as they get, and of one sign."""
    kernels = pytest.importorskip("freeact_fx.codegen.kernels.int_mm")
    monkeypatch.setattr(kernels, "adds_apart", lambda codes, capability: True)
    codes = random_codes(num_tokens, num_codes, largest=7, device=GPU)
    weight_i4 = random_codes(num_outputs, num_codes, largest=7)
    codes[0], weight_i4[: num_outputs // 2] = 7, 7
    weight = pack_int4(weight_i4).to(GPU)
    product = engine_ops.engine_int_mm(to_engine_order(codes.to(E4M3)), weight)
    assert torch.equal(product.double(), codes.double() @ weight_i4.to(GPU).double().t())


# ------------------------------------------------------------------ more than 2^31 elements


@pytest.fixture
def alone() -> Iterator[None]:
    """One test at a time, of all processes on the machine: each takes up to 25 GB of the GPU."""
    with Path(tempfile.gettempdir(), "freeact_large_tensors.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def rows_in_parts(num_rows: int, size: int = 1 << 15) -> Iterator[slice]:
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


LARGE = [(2**31 // 8192 + 200, 8192, 128), (2**31 // 8192 + 200, 8, 8192)]


def codes_and_weight(num_tokens: int, num_outputs: int, num_codes: int) -> tuple[Tensor, Tensor]:
    """Of so small numbers that sums are exact in fp32; codes are in engine order."""
    codes = torch.randint(-1, 2, (num_tokens, num_codes), dtype=torch.int8, device=GPU)
    return codes, random_codes(num_outputs, num_codes, largest=1, device=GPU)


@needs_hopper
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_outputs", "num_codes"), LARGE)
def test_large_hopper_linear(
    num_tokens: int, num_outputs: int, num_codes: int, dtype: torch.dtype
) -> None:
    codes, weight_i4 = codes_and_weight(num_tokens, num_outputs, num_codes)
    types = torch.randint(0, NUM_TYPES, (num_tokens,), dtype=torch.int32, device=GPU)
    table = torch.randint(-3, 4, (NUM_TYPES, num_outputs), device=GPU).float()
    got = engine_ops.engine_linear(
        codes.to(dtype),
        torch.ones(num_tokens, 1, device=GPU),
        pack_int4(weight_i4),
        torch.ones(1, num_outputs, device=GPU),
        table,
        types,
        [num_codes],
        [0] * NUM_TYPES,
        0,
        torch.bfloat16,
    )
    wide = weight_i4.float().t()
    for rows in rows_in_parts(num_tokens):
        want = to_plain_order(codes[rows]).float() @ wide + table[types[rows].long()]
        assert torch.equal(got[rows], want.bfloat16())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(E4M3, marks=needs_fp8)], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_outputs", "num_codes"), LARGE)
def test_large_portable_product(
    num_tokens: int, num_outputs: int, num_codes: int, dtype: torch.dtype
) -> None:
    codes, weight_i4 = codes_and_weight(num_tokens, num_outputs, num_codes)
    got = engine_ops.engine_int_mm(codes.to(dtype), pack_int4(weight_i4))
    wide = weight_i4.float().t()
    for rows in rows_in_parts(num_tokens):
        assert torch.equal(got[rows], to_plain_order(codes[rows]).float() @ wide)


def part_of(prologue: Prologue, rows: slice | Tensor, device: torch.device) -> Prologue:
    """The same of some tokens; ``total`` is still to be written."""
    named = {
        n: v
        for n in ("other", "weight", "bias", "total")
        if (v := getattr(prologue, n)) is not None
    }
    there = {n: (v[rows] if v.dim() == 2 else v).to(device) for n, v in named.items()}
    if "total" in there:
        there["total"] = torch.empty_like(there["total"])
    return replace(prologue, **there)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("portable", [True, pytest.param(False, marks=needs_hopper)])
@pytest.mark.parametrize("kind", ["none", "rms of a sum", "silu"])
def test_large_transform(kind: str, portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is what it is in a small part of them; some, of all places, are as they should be."""
    if portable:
        without_hopper(monkeypatch)
    num_features = 4096
    num_tokens = 2**31 // num_features + 200
    t = random_transform("shift", num_features, NUM_TYPES, seed=1)
    assert t.shift is not None
    t = replace(t, shift=t.shift.bfloat16())
    moved = t.to(GPU)
    operands = (moved.shift, moved.channel_scale, moved.left, moved.right, moved.clip)
    static = (list(t.widths), list(t.slice_of_type), 1, 7)
    x = torch.randn(num_tokens, num_features, dtype=torch.bfloat16, device=GPU)
    types = torch.randint(-1, NUM_TYPES + 1, (num_tokens,), dtype=torch.int32, device=GPU)
    prologue = random_prologue(kind, x)
    codes, scale = engine_ops.run_transform(x, prologue, types, *operands, *static)
    for rows in rows_in_parts(num_tokens):
        part = part_of(prologue, rows, GPU)
        alone = engine_ops.run_transform(x[rows], part, types[rows], *operands, *static)
        assert torch.equal(codes[rows], alone[0])
        assert torch.equal(scale[rows], alone[1])
        if prologue.total is not None:
            assert prologue.other is not None
            assert torch.equal(prologue.total[rows], x[rows] + prologue.other[rows])
    boundary = 2**31 // num_features
    some = torch.tensor([0, boundary // 2, boundary - 1, boundary, num_tokens - 1], device=GPU)
    row, error = exact_row(x[some].cpu(), part_of(prologue, some, torch.device("cpu")))
    bounds = codes_of(t, row, types[some].cpu(), 1, 7, error, in_bf16=not portable)
    bounds.check(to_plain_order(codes[some]).cpu(), scale[some].cpu())


# ------------------------------------------------------------------ any shape


@st.composite
def linears(draw: st.DrawFn) -> dict[str, Any]:
    """A shape that Hopper's product takes, and what comes with it."""
    num_codes = 128 * draw(st.integers(1, 20))
    cuts = draw(st.sets(st.integers(1, num_codes // 2 - 1).map(lambda n: 2 * n), max_size=3))
    edges = [0, *sorted(cuts), num_codes]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    rank = draw(st.sampled_from([0, 8, 41, 128])) if len(sizes) == 1 else 0
    return {
        "num_tokens": draw(st.integers(1, 400)),
        "num_outputs": (16 if rank else 8) * draw(st.integers(1, 40)),
        "sizes": sizes,
        "order": draw(st.sampled_from(["sorted", "mixed", "one type", "untyped"])),
        "with_bias": draw(st.booleans()),
        "rank": rank,
        "dtype": draw(st.sampled_from([torch.int8, E4M3])),
        "out": draw(st.sampled_from([torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 999)),
    }


@needs_hopper
@settings(max_examples=40)
@given(linears())
def test_hopper_linear_of_any_shape(drawn: dict[str, Any]) -> None:
    check_linear(**drawn, device=GPU)


def check_linear(
    num_tokens: int,
    num_outputs: int,
    sizes: list[int],
    order: str,
    with_bias: bool,
    rank: int,
    dtype: torch.dtype,
    out: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    """One Linear beside fp64, with the roundings that it may make."""
    torch.manual_seed(seed)
    codes, types, chosen, slice_of_type = codes_of_slices(num_tokens, sizes, order, device)
    codes, default_type = codes.to(device), len(slice_of_type) - 1
    weight_i4 = random_codes(num_outputs, sum(sizes), largest=7, device=device)
    scale = torch.rand(num_tokens, 1, device=device)
    weight_scale = torch.rand(len(sizes), num_outputs, device=device)
    table = torch.randn(len(slice_of_type), num_outputs, device=device) if with_bias else None
    branch: tuple[Tensor, ...] = ()
    exact = codes.double() @ weight_i4.double().t()
    size, of_branch = exact.abs(), torch.zeros_like(exact)
    if rank:
        c = 10 * torch.randn(num_tokens, rank, device=device).bfloat16()
        v = torch.randint(-127, 128, (rank, num_outputs), device=device).to(torch.int8)
        v_scale = torch.rand(rank, device=device)
        branch = torch.nn.functional.pad(c, (0, -rank % 8)), v, v_scale
        in_sums = v.double() * v_scale.double()[:, None] / weight_scale.double()
        exact = exact + c.double() @ in_sums
        of_branch = c.double().abs() @ in_sums.abs()
        size = size + of_branch
    got = engine_ops.engine_linear(
        to_engine_order(codes.to(dtype)),
        scale,
        pack_int4(weight_i4),
        weight_scale,
        table,
        types,
        sizes,
        slice_of_type,
        default_type,
        out,
        *branch,
    )
    factor = scale.double() * weight_scale.double()[chosen]
    rows = torch.zeros_like(exact)
    if table is not None:
        rows = reference.rows_of_type(table, types, default_type).double()
    want, size = exact * factor + rows, size * factor
    # A product of 16 columns is added to sums of which the tensor core keeps 2^-22 of the largest addend.
    bound = rank / 16 * 2**-21 * size + 8 * 2**-24 * (size + rows.abs())
    bound += 2**-8 * of_branch * factor  # the branch's weights are rounded to bf16
    bound += want.abs() * torch.finfo(out).eps + 1e-6
    assert bool(((got.double() - want).abs() <= bound).all())


WIDTHS = [n for n in range(32, 20000, 6) if kronecker_shape(n) is not None]


@st.composite
def transforms(draw: st.DrawFn) -> dict[str, Any]:
    """Any width that has a transform, and what comes with it."""
    formats = [7, 127] + [448] * (CAPABILITY >= (8, 9))
    return {
        "num_tokens": draw(st.integers(1, 40)),
        "num_features": draw(st.sampled_from(WIDTHS)),
        "plan": draw(st.sampled_from(["single", "shift", "duplicate", "paper"])),
        "kind": draw(st.sampled_from(KINDS)),
        "typed": draw(st.booleans()),
        "qmax": draw(st.sampled_from(formats)),
        "seed": draw(st.integers(0, 999)),
    }


@settings(max_examples=60)
@given(transforms())
def test_transform_of_any_shape(drawn: dict[str, Any]) -> None:
    check_transform(**drawn, device=GPU)


def check_transform(
    num_tokens: int,
    num_features: int,
    plan: str,
    kind: str,
    typed: bool,
    qmax: int,
    seed: int,
    device: torch.device,
) -> None:
    """Codes are those that the kernel's rounding allows, and few of them are not the reference's."""
    torch.manual_seed(seed)
    t = random_transform(plan, num_features, NUM_TYPES, seed=seed)
    if t.shift is not None:
        t = replace(t, shift=t.shift.bfloat16())
    x = torch.randn(num_tokens, num_features).bfloat16()
    types = torch.randint(-1, NUM_TYPES + 1, (num_tokens,), dtype=torch.int32) if typed else None
    prologue = NO_PROLOGUE if kind == "none" else random_prologue(kind, x)
    codes, scale = transformed_on(device, t, x, types, qmax, prologue)
    if prologue.total is not None:
        assert prologue.other is not None
        assert torch.equal(prologue.total, x + prologue.other)
    row, error = exact_row(x, prologue)
    tile = hopper_transform_tile(t.left.shape[0], t.widths, t.right.shape[-1], prologue.kind)
    in_bf16 = HOPPER and tile is not None and qmax != 127
    codes_of(t, row, types, 1, qmax, error, in_bf16=in_bf16).check(codes, scale)
    wide = [None if o is None else o.double() for o in (t.shift, t.channel_scale, t.left, t.right)]
    exact, *_ = reference.transform_quantize(
        row, types, *wide, t.clip.double(), None, t.widths, t.slice_of_type, 1, 0, qmax
    )
    num_differing = int((codes.double() != exact.double()).sum())
    assert num_differing <= {7: 0.02, 127: 0.1, 448: 0.2}[qmax] * codes.numel() + 8
