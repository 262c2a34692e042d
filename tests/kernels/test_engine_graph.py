"""The GPU engine's ops put into graphs; where there is no GPU they run the reference, so the results are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from random_transforms import random_transform
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import freeact_fx  # noqa: F401  (registers the ops)
from freeact_fx.codegen import engine_graph, engine_ops
from freeact_fx.codegen.engine_graph import use_engine_ops
from freeact_fx.reference import pack_int4

ops = torch.ops.freeact
NUM_TYPES = 2
# torch compares no fp8, which test_schema would do.
CHECKS_OF_E4M3 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
EVERY_CHECK = ("test_schema", *CHECKS_OF_E4M3)


def operands(plan: str, qmax: int = 7) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]]:
    t = random_transform(plan, 48, NUM_TYPES, seed=0)
    tensors = (t.shift, t.channel_scale, t.left, t.right, t.clip)
    return tensors, (list(t.widths), list(t.slice_of_type), 0, qmax)


def rewritten(
    function: Callable[..., Tensor], *args: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """The ops of a function's graph afterwards; it must compute the same."""
    gm = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    want = gm(*args)
    monkeypatch.setattr(engine_graph, "has_kernels", lambda device: True)
    use_engine_ops(gm.graph)
    gm.recompile()
    for got, expected in zip(gm(*args), want, strict=True):
        assert torch.equal(got, expected)
    return Counter(node.target.__name__ for node in gm.graph.nodes if node.op == "call_function")


@pytest.fixture
def fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a chip with fp8 tensor cores."""
    monkeypatch.setattr(engine_ops, "has_fp8", lambda device: True)


def arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = (pack_int4(torch.randint(-7, 8, (n, 48)).to(torch.int8)) for n in (11, 24))
    return torch.randn(2, 3, 48), torch.randint(0, NUM_TYPES, (2, 3)), *weights


def test_transform_and_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, static = operands("shift")

    def two_linears(x: Tensor, types: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
        codes, scale = ops.transform_quantize(x, types, *tensors, *static)
        return [ops.int_mm(codes, first), ops.int_mm(codes, second), scale]

    counts = rewritten(two_linears, *arguments(), monkeypatch=monkeypatch)
    assert counts["engine_transform_quantize.default"] == 1
    assert counts["engine_int_mm.default"] == 2
    assert counts["cat.default"] == 0


def test_codes_that_something_else_reads_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, static = operands("shift")

    def codes_as_result(x: Tensor, types: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
        codes, _ = ops.transform_quantize(x, types, *tensors, *static)
        return [codes, ops.int_mm(codes, first), ops.int_mm(codes, second)]

    counts = rewritten(codes_as_result, *arguments(), monkeypatch=monkeypatch)
    assert counts["transform_quantize.default"] == counts["cat.default"] == 1
    assert counts["engine_int_mm.default"] == 2


@pytest.mark.parametrize("plan", ["shift", "duplicate"])
def test_e4m3(plan: str, fp8: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, static = operands(plan, 448)

    def linear(x: Tensor, types: Tensor, weight: Tensor) -> list[Tensor]:
        codes, scale = ops.transform_quantize(x, types, *tensors, *static)
        return [ops.int_mm(codes, weight), scale]

    num_codes = sum(static[0]) * tensors[3].shape[-1]  # type: ignore[union-attr,call-overload]
    weight = pack_int4(torch.randint(-7, 8, (11, num_codes)).to(torch.int8))
    counts = rewritten(linear, *arguments()[:2], weight, monkeypatch=monkeypatch)
    assert counts["engine_transform_quantize.default"] == counts["engine_int_mm.default"] == 1


def test_e4m3_codes_of_a_branch_are_reordered_as_bytes(
    fp8: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(x: Tensor, weight: Tensor) -> list[Tensor]:
        return [ops.int_mm(x.to(torch.float8_e4m3fn), weight)]

    x, *_, weight = arguments()
    counts = rewritten(product, x, weight, monkeypatch=monkeypatch)
    assert counts["engine_int_mm.default"] == counts["cat.default"] == 1
    assert counts["view.dtype"] == 2


def test_codes_without_a_kernel_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def e4m3(codes: Tensor, weight: Tensor) -> list[Tensor]:
        return [ops.int_mm(codes, weight)]

    codes = torch.randn(5, 48).to(torch.float8_e4m3fn)
    counts = rewritten(e4m3, codes, arguments()[2], monkeypatch=monkeypatch)
    assert counts == {"int_mm.default": 1}


def test_nothing_changes_without_a_gpu() -> None:
    codes = torch.randint(-7, 8, (5, 48)).to(torch.int8)
    gm = make_fx(lambda c, w: ops.int_mm(c, w), tracing_mode="fake")(codes, arguments()[2])
    before = gm.code
    use_engine_ops(gm.graph)
    gm.recompile()
    assert gm.code == before


@pytest.mark.parametrize("num_codes", [1, 2, 7, 8])
def test_orders_are_each_others_inverse(num_codes: int) -> None:
    codes = torch.arange(3 * num_codes).view(3, num_codes)
    engine = engine_ops.to_engine_order(codes)
    assert torch.equal(engine_ops.to_plain_order(engine), codes)
    assert engine[0].tolist() == [*range(0, num_codes, 2), *range(1, num_codes, 2)]


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("qmax", [7, 448])
@pytest.mark.parametrize("own_rank", [0, 2])
def test_opcheck_of_a_branch(lead: tuple[int, ...], qmax: int, own_rank: int) -> None:
    x, types = torch.randn(*lead, 48), torch.randint(0, NUM_TYPES, lead)
    tensors, static = operands("shift", 0)
    unrounded = (x, types, *tensors, *static)
    torch.library.opcheck(ops.engine_transform_quantize.default, unrounded)
    z, _ = ops.engine_transform_quantize(*unrounded)
    assert z.dtype == torch.bfloat16
    clip = tensors[-1]
    lowrank = torch.randint(-127, 128, (48, 4)).to(torch.int8)
    args = (z, lowrank, types, clip, 0, own_rank, qmax)
    tests = list(EVERY_CHECK if qmax == 7 else CHECKS_OF_E4M3)
    torch.library.opcheck(ops.engine_branch_quantize.default, args, test_utils=tests)
    product = (
        torch.randn(*lead, 4),
        torch.randint(-127, 128, (4, 6)).to(torch.int8),
        torch.rand(4),
    )
    torch.library.opcheck(ops.engine_branch_product.default, product)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("qmax", [7, 448])
def test_opcheck(lead: tuple[int, ...], qmax: int) -> None:
    x, types = torch.randn(*lead, 48), torch.randint(0, NUM_TYPES, lead)
    tensors, static = operands("duplicate", qmax)
    args = (x, types, *tensors, *static)
    tests = list(EVERY_CHECK if qmax == 7 else CHECKS_OF_E4M3)
    torch.library.opcheck(ops.engine_transform_quantize.default, args, test_utils=tests)
    codes, _ = ops.engine_transform_quantize(*args)
    weight = pack_int4(torch.randint(-7, 8, (5, codes.shape[-1])).to(torch.int8))
    torch.library.opcheck(ops.engine_int_mm.default, (codes, weight), test_utils=tests)
