"""Rows of Linears with what precedes them: W4A4 beside its peers, and one plan beside another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_columns import OURS, achieved, measured, median_of, speedup
from gpu_layers import TWO_TYPES, GatedLinear, NormLinear, Several, quantized
from gpu_peers import Variant, attempt, difference, peers
from gpu_timing import Bench
from torch import Tensor, nn

import freeact_fx
from freeact_fx import QuantConfig

# Compiled against eager: eager rounds to bf16 between norm and transform where compiled code does not. That moves a
# code by 2^-9 of itself, so it turns about 1 % of the codes, each by one of their rms of 3: sqrt(0.01) / 3 of the
# output. One token alone scatters around that.
_TOLERANCE = 8e-2
_FOUR_BITS = 0.35  # W4A4 against bf16 on random data, one layer
# Of a kind in a step of few tokens, which is so short that what happens once a call counts: the types, the launch.
_LAYERS, _FEW_TOKENS = 32, 16


@dataclass(frozen=True)
class Layer:
    """``kind`` Linear of N outputs and K inputs on M tokens, as many of them as keep each other's weights cold; with
    few tokens as many as a model has layers."""

    kind: type[NormLinear] | type[GatedLinear]
    num_tokens: int
    num_outputs: int
    num_features: int

    @property
    def ops(self) -> float:
        return 2.0 * self.num_tokens * self.num_outputs * self.num_features

    @property
    def bytes(self) -> int:
        """Least traffic in W4A4: activations in and out in bf16, packed weights."""
        m, n, k = self.num_tokens, self.num_outputs, self.num_features
        return 2 * m * (self.kind.num_inputs * k + n) + n * k // 2

    def dense(self, bench: Bench) -> Several:
        num_blocks = bench.copies(self.bytes)
        if bench.on_gpu and self.num_tokens <= _FEW_TOKENS:
            num_blocks = max(num_blocks, _LAYERS)
        blocks = [
            self.kind(self.num_features, self.num_outputs)
            .to(bench.device, torch.bfloat16)
            .requires_grad_(False)
            for _ in range(num_blocks)
        ]
        return Several(blocks, self.kind.num_inputs).eval()

    def inputs(self, bench: Bench, num_blocks: int) -> list[Tensor]:
        """[1, M, K] each, with some channels larger than others."""
        k = self.num_features
        scale = torch.rand(k, device=bench.device) * 2 + 0.2
        shape = (1, self.num_tokens, k)
        return [
            (torch.randn(shape, device=bench.device) * scale).bfloat16()
            for _ in range(num_blocks * self.kind.num_inputs)
        ]


def _types(bench: Bench, num_tokens: int, order: str) -> Tensor:
    """[1, M] of 0 and 1, "mixed" at random or "sorted"."""
    types = torch.randint(0, 2, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    types = types.sort()[0] if order == "sorted" else types
    return types.to(bench.device, torch.int32)


def compiled_linears(
    bench: Bench,
    dense: nn.Module,
    inputs: Sequence[Tensor],
    config: QuantConfig,
    types: Tensor | None,
    cuda_graph: bool,
    expected: Any,
) -> Variant:
    """The compiled callable, its answer held against the eager reference, and against bf16 where it can be near it."""
    model = quantized(dense, config)

    def with_types(call: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            if types is None:
                return call(*inputs)
            with freeact_fx.token_types(types):
                return call(*inputs)

        return run

    def build() -> Callable[[], Any]:
        call = with_types(bench.freeact(model, cuda_graph=cuda_graph))
        got, want = call(), with_types(model)()
        found = difference(got, want)
        if not found < _TOLERANCE:
            raise RuntimeError(f"compiled code differs from the reference by {found:.3g}")
        return call

    # A sliced plan keeps half of a token, which nothing here was fitted to.
    return attempt(build, expected, 2.0 if config.plan == "paper" else _FOUR_BITS)


@torch.no_grad()
def linear_row(
    bench: Bench,
    layer: Layer,
    against: Sequence[str],
    *,
    config: QuantConfig = TWO_TYPES,
    order: str = "mixed",
    cuda_graph: bool = False,
) -> dict[str, Any]:
    """Against the fastest of some peers."""
    dense = layer.dense(bench)
    inputs = layer.inputs(bench, len(dense.blocks))
    bench.keep_address(*inputs)
    expected, types = dense(*inputs), _types(bench, layer.num_tokens, order)
    variants = {OURS: compiled_linears(bench, dense, inputs, config, types, cuda_graph, expected)}
    variants |= peers(
        bench, dense, inputs, against=against, cuda_graph=cuda_graph, expected=expected
    )
    fields = measured(bench, variants, copies=len(dense.blocks))
    fields |= _shape_of(layer, config, order, cuda_graph)
    return fields | speedup(fields, against) | achieved(fields, layer.ops, layer.bytes)


@torch.no_grad()
def plan_row(
    bench: Bench,
    layer: Layer,
    ours: Mapping[str, tuple[QuantConfig, bool]],
    *,
    cuda_graph: bool = False,
) -> dict[str, Any]:
    """The time of the first of two plans over that of the second; each with its config, and whether types are mixed."""
    dense = layer.dense(bench)
    inputs = layer.inputs(bench, len(dense.blocks))
    bench.keep_address(*inputs)
    expected, mixed = dense(*inputs), _types(bench, layer.num_tokens, "mixed")
    variants = {
        name: compiled_linears(
            bench, dense, inputs, config, mixed if typed else None, cuda_graph, expected
        )
        for name, (config, typed) in ours.items()
    }
    fields = measured(bench, variants, copies=len(dense.blocks))
    first, second = (median_of(fields, name) for name in ours)
    config, _ = next(iter(ours.values()))
    ratio = {"value": first / second, "against": list(ours)[1]}
    return fields | _shape_of(layer, config, "mixed", cuda_graph) | ratio


def _shape_of(layer: Layer, config: QuantConfig, order: str, cuda_graph: bool) -> dict[str, Any]:
    shape = {"M": layer.num_tokens, "N": layer.num_outputs, "K": layer.num_features}
    return {
        "shape": shape,
        "plan": config.plan,
        "activation_bits": config.activation_bits,
        "types": order,
        "cuda_graph": cuda_graph,
    }
