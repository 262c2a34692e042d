"""Norms and activations are recognised however they are written, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from freeact_fx.codegen.prologue_patterns import Activation, Norm, find_activation, find_norm

K, EPS = 24, 1e-5
Written = Callable[[Tensor, Tensor, Tensor], Tensor]


def result_of(written: Written, dtype: torch.dtype) -> Node:
    """The node that a function of x [2, 3, K], weight [K] and bias [K] returns, as it reaches our pass."""
    args = (torch.randn(2, 3, K, dtype=dtype), *(torch.randn(K, dtype=dtype) for _ in range(2)))
    ops = make_fx(written, select_decomp_table())(*args)
    gm = make_fx(torch.func.functionalize(ops), tracing_mode="fake")(*args)
    graph = fx_graph_cse(gm.graph)
    (output,) = [n for n in graph.nodes if n.op == "output"]
    return output.args[0]  # type: ignore[no-any-return]


def normed(x: Tensor, mean_of: Callable[[Tensor], Tensor] = Tensor.square) -> Tensor:
    return x * torch.rsqrt(mean_of(x).mean(-1, keepdim=True) + EPS)


def functional(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (K,), w, EPS)


def llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return w * y.to(x.dtype)


def gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())).type_as(x)


def product_of_squares(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normed(x, lambda y: y * y) * w


def divided(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x / torch.sqrt(x.pow(2).mean(2, keepdim=True) + EPS))


def one_over(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * (1 / torch.sqrt(x.pow(2).mean(-1, True) + EPS)))


def as_power(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * (x.pow(2).mean(-1, True) + EPS).pow(-0.5))


def weight_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (w * x) * torch.rsqrt(EPS + (x * x).mean(-1, keepdim=True))


def no_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normed(x)


def of_a_product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normed(x * x.exp()) * w


def with_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return b + normed(x) * w


RMS = {
    functional: (0.0, "w"),
    llama: (0.0, "w"),
    gemma: (1.0, "w"),
    product_of_squares: (0.0, "w"),
    divided: (0.0, "w"),
    one_over: (0.0, "w"),
    as_power: (0.0, "w"),
    weight_first: (0.0, "w"),
    no_weight: (1.0, ""),
    of_a_product: (0.0, "w"),
    with_bias: (0.0, "wb"),
}


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (K,), w, b, EPS)


def layer_norm_of_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (K,), w, None, EPS)


def layer_norm_alone(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (K,), None, None, EPS)


def layer_norm_in_fp32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (K,), w.float(), b.float(), EPS).to(x.dtype)


def layer_norm_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    centred = y - y.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return (w * (centred * torch.rsqrt(variance + EPS)) + b).to(x.dtype)


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x.to(torch.float32)
    mean = y.mean(-1, keepdim=True)
    variance = (y - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((y - mean) * torch.rsqrt(variance + EPS))).to(x.dtype)


LAYER = {
    layer_norm: (0.0, "wb"),
    layer_norm_of_weight: (0.0, "w"),
    layer_norm_alone: (1.0, ""),
    layer_norm_in_fp32: (0.0, "wb"),
    layer_norm_by_hand: (0.0, "wb"),
    cohere: (0.0, "w"),
}


def computed(norm: Norm, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """What was found, in fp64."""
    assert norm.kind in ("rms", "layer")
    y = x.double()
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y * (norm.weight_offset + (0.0 if norm.weight is None else w.double()))
    return y if norm.bias is None else y + b.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("written", [*RMS, *LAYER], ids=lambda f: f.__name__)
def test_norms(written: Written, dtype: torch.dtype) -> None:
    norm = find_norm(result_of(written, dtype))
    assert norm is not None
    offset, operands = (RMS | LAYER)[written]
    assert norm.kind == ("rms" if written in RMS else "layer")
    assert math.isclose(norm.eps, EPS, rel_tol=1e-6)
    assert norm.weight_offset == offset
    assert (norm.weight is not None, norm.bias is not None) == ("w" in operands, "b" in operands)
    assert norm.source.meta["val"].dtype == dtype, "x itself, not a cast of it"
    if written is not of_a_product:
        assert norm.source.op == "placeholder"
        x, w, b = torch.randn(2, 3, K), torch.randn(K), torch.randn(K)
        torch.testing.assert_close(
            computed(norm, x, w, b).float(), written(x, w, b), atol=1e-5, rtol=1e-5
        )


def eps_outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS))


def largest_with_eps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(EPS)))


def no_eps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def sum_of_squares(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS))


def over_tokens(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))


def of_magnitudes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * normed(x, torch.abs)


def of_something_else(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS))


def upside_down(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def inverted(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) / x * w


def scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * normed(x) * 2


def two_weights(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * normed(x) * b


def over_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normed(x) / w


def twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * normed(x) * x


def unbiased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return w * ((x - mean) * torch.rsqrt(variance + EPS))


def not_centred(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, _ = torch.var_mean(x, -1, correction=0, keepdim=True)
    return w * (x * torch.rsqrt(variance + EPS))


def mean_of_another(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.exp().mean(-1, keepdim=True)
    variance, _ = torch.var_mean(x, -1, correction=0, keepdim=True)
    return w * (centred * torch.rsqrt(variance + EPS))


def two_biases(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * normed(x) + x


NEAR_MISSES = [
    eps_outside,
    largest_with_eps,
    no_eps,
    sum_of_squares,
    over_tokens,
    of_magnitudes,
    of_something_else,
    upside_down,
    inverted,
    scaled,
    two_weights,
    over_weight,
    twice,
    unbiased,
    not_centred,
    mean_of_another,
    two_biases,
]


@pytest.mark.parametrize("written", NEAR_MISSES, ids=lambda f: f.__name__)
def test_what_is_almost_a_norm_is_none(written: Written) -> None:
    assert find_norm(result_of(written, torch.bfloat16)) is None


def test_a_norm_of_a_norm_is_the_last_one() -> None:
    node = result_of(lambda x, w, b: w * normed(b * normed(x) + x), torch.bfloat16)
    norm = find_norm(node)
    assert norm is not None
    assert norm.source.target is torch.ops.aten.add.Tensor
    assert find_norm(result_of(lambda x, w, b: w * normed(b * normed(x)), torch.float32))


# ------------------------------------------------------------------ activations


def tanh_by_hand(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "silu": ("silu", F.silu),
    "sigmoid": ("silu", lambda x: x * torch.sigmoid(x)),
    "gelu": ("gelu", F.gelu),
    "gelu_by_hand": ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "gelu_tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "tanh_by_hand": ("gelu_tanh", tanh_by_hand),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", ["", "after", "before"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, gated: str, dtype: torch.dtype) -> None:
    kind, function = ACTIVATIONS[name]

    def written(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        up = x + 1
        y = function(x)
        return {"": lambda: y, "after": lambda: y * up, "before": lambda: up * y}[gated]()

    found = find_activation(result_of(written, dtype))
    assert isinstance(found, Activation)
    assert (found.kind, found.gate.op) == (kind, "placeholder")
    assert (found.up is not None) == bool(gated)
    if found.up is not None:
        assert found.up.target is torch.ops.aten.add.Tensor
        assert found.up.meta["val"].dtype == dtype


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.relu(x) * x,
        lambda x, w: F.sigmoid(x) * w,
        lambda x, w: F.silu(x) * w,  # not a value for each of x's
        lambda x, w: x * torch.sigmoid(1.702 * x),
        lambda x, w: F.silu(x) * 2,
        lambda x, w: x / (2 + torch.exp(-x)),
        lambda x, w: x / (1 + torch.exp(x)),
        lambda x, w: 0.5 * x * (1 + torch.tanh(x)),
        lambda x, w: 0.5 * x * (1 + torch.erf(x)),
    ],
)
def test_what_is_almost_an_activation_is_none(function: Any) -> None:
    assert find_activation(result_of(lambda x, w, b: function(x, w), torch.bfloat16)) is None
