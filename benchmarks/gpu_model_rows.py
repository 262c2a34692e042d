"""Rows of whole models, and of the bytes of their Linears."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from gpu_columns import OURS, measured, median_of, speedup
from gpu_decoder import (
    DecoderLayer,
    DecoderShape,
    quantized_decoder,
    random_decoder,
    random_inputs,
)
from gpu_layers import linear_bytes
from gpu_peers import MAX_AUTOTUNE, Variant, difference, peers
from gpu_timing import Bench
from torch import Tensor, nn

import freeact_fx
from freeact_fx.config import MAX_RANK


def _steps(cache_length: int) -> int:
    """How many steps of a generation loop are timed together: so many that the first one's launch does not count."""
    return 16 if cache_length else 1


@torch.no_grad()
def model_row(
    bench: Bench,
    shape: DecoderShape,
    batch: int,
    length: int,
    share: float,
    cache_length: int,
) -> dict[str, Any]:
    """One pass of a whole model in a CUDA graph, which is what torch's max-autotune makes of it too. Steps with a
    cache, which are short, follow each other as in a generation loop; beside that, a step that is waited for."""
    cuda_graph = True
    cache = (batch, cache_length) if cache_length else (0, 0)
    dense = random_decoder(shape, bench.device, cache)
    inputs = random_inputs(shape, batch, length, share, bench.device)
    bench.keep_address(*inputs)
    expected = dense(*inputs)
    ours = quantized_decoder(dense, shape.config)
    variant, states = _compiled(bench, shape, ours, inputs, expected)
    variants = {OURS: variant}
    variants |= peers(
        bench, dense, inputs, against=[MAX_AUTOTUNE], cuda_graph=cuda_graph, expected=expected
    )
    fields = measured(bench, variants, hide_launches=False, steps=_steps(cache_length))
    quantized_bytes, bf16_bytes = linear_bytes(ours)
    facts = {
        "shape": {"batch": batch, "length": length, "cache": cache_length, **vars(shape)},
        "plan": shape.config.plan,
        "types": f"{share:.0%} {shape.config.type_names[1]}, at random",
        "states": states,
        "cuda_graph": cuda_graph,
        "linear_bytes": quantized_bytes,
        "linear_bytes_in_bf16": bf16_bytes,
    }
    return fields | facts | speedup(fields, [MAX_AUTOTUNE])


@torch.no_grad()
def model_plan_row(
    bench: Bench, shape: DecoderShape, batch: int, length: int, share: float, cache_length: int
) -> dict[str, Any]:
    """The time of plan ``branch`` over that of ``shift``, with as many columns as kernels take: what the default budget
    gives an 8B model's groups."""
    dense = random_decoder(shape, bench.device, (batch, cache_length) if cache_length else (0, 0))
    inputs = random_inputs(shape, batch, length, share, bench.device)
    bench.keep_address(*inputs)
    expected = dense(*inputs)
    branch = dataclasses.replace(shape.config, plan="branch", branch_rank=MAX_RANK)
    variants = {
        config.plan: _compiled(bench, shape, quantized_decoder(dense, config), inputs, expected)[0]
        for config in (branch, shape.config)
    }
    fields = measured(bench, variants, hide_launches=False, steps=_steps(cache_length))
    first, second = (median_of(fields, name) for name in variants)
    facts = {
        "shape": {"batch": batch, "length": length, "cache": cache_length, **vars(shape)},
        "branch_rank": MAX_RANK,
        "types": f"{share:.0%} {shape.config.type_names[1]}, at random",
        "cuda_graph": True,
    }
    return fields | facts | {"value": first / second, "against": "shift"}


def _compiled(
    bench: Bench, shape: DecoderShape, ours: nn.Module, inputs: Any, expected: Tensor
) -> tuple[Variant, dict[str, int]]:
    """A quantised decoder in a CUDA graph, and in which states its Linears are: all must be quantised."""
    compiled = bench.freeact(ours, cuda_graph=True)
    start = time.perf_counter()
    got = compiled(*inputs)
    compile_s = round(time.perf_counter() - start, 1)
    if not bool(got.isfinite().all()):
        raise RuntimeError("the quantised model's logits are not finite")
    num_linears = shape.num_layers * sum(map(len, DecoderLayer.groups))
    report = freeact_fx.explain(compiled)
    num_quantized = len(report.quantized)
    if num_quantized != num_linears:
        raise RuntimeError(f"{num_quantized} of {num_linears} Linears are quantised")
    error = float(f"{difference(got, expected):.3g}")
    return Variant(lambda: compiled(*inputs), None, compile_s, error), report.counts()


@torch.no_grad()
def memory_row(bench: Bench, shape: DecoderShape) -> dict[str, Any]:
    """One layer of a model; all have the same Linears."""
    dense = random_decoder(shape.with_layers(1), bench.device)
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    model = quantized_decoder(dense, shape.config)
    allocated = torch.cuda.memory_allocated() - before if bench.on_gpu else None
    found, in_bf16 = linear_bytes(model)
    return {
        "value": found / in_bf16,
        "against": "bf16",
        "bytes": found,
        "bytes_in_bf16": in_bf16,
        "allocated_bytes": allocated,
        "plan": shape.config.plan,
        "shape": vars(shape),
    }
