"""``freeact::engine_transform_quantize`` with what precedes it in the same kernel.

* ``freeact::engine_norm_transform_quantize``      a norm
* ``freeact::engine_add_norm_transform_quantize``  a residual add and a norm; the sum is one more result
* ``freeact::engine_gated_transform_quantize``     an activation function, gated or not

Their operands begin with those of the prologue (``prologue.Prologue``), its settings come before the static ones of the
transform. Between x and the codes all is in fp32: where a graph rounds (the normed row to bf16 before it is multiplied
by the weight, or SiLU before it is multiplied by ``up``) they do not, so codes may differ from the graph's by what its
rounding moves across a tie. Only the sum of the residual add, which later layers read, is rounded as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .engine_ops import engine_fake, engine_op, fake_codes, run_transform
from .prologue import Prologue


@engine_op
def engine_norm_transform_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    norm: str,
    eps: float,
    weight_offset: float,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    qmax: int,
) -> tuple[Tensor, Tensor]:
    """x [..., K] normed, then ``freeact::engine_transform_quantize`` of it.

    norm           "rms" or "layer"
    weight, bias   [K] floating, or None, which counts as 0
    weight_offset  what is added to the weight
    """
    prologue = Prologue(norm, None, weight, bias, None, eps, weight_offset)
    operands = (token_type, shift, channel_scale, left, right, clip)
    return run_transform(x, prologue, *operands, widths, slice_of_type, default_type, qmax)


@engine_op
def engine_add_norm_transform_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    norm: str,
    eps: float,
    weight_offset: float,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``engine_norm_transform_quantize`` of ``x + residual``, of one shape and dtype; also returns that sum."""
    lead, num_features = x.shape[:-1], x.shape[-1]
    total = torch.empty(lead.numel(), num_features, dtype=x.dtype, device=x.device)
    other = residual.reshape(-1, num_features)
    prologue = Prologue(norm, other, weight, bias, total, eps, weight_offset)
    operands = (token_type, shift, channel_scale, left, right, clip)
    codes, scale = run_transform(x, prologue, *operands, widths, slice_of_type, default_type, qmax)
    return codes, scale, total.view(*lead, num_features)


@engine_op
def engine_gated_transform_quantize(
    gate: Tensor,
    up: Tensor | None,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    activation: str,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    qmax: int,
) -> tuple[Tensor, Tensor]:
    """``activation(gate) * up`` [..., K], then ``freeact::engine_transform_quantize`` of it.

    activation  "silu", "gelu" or "gelu_tanh"
    up          [..., K], or None: nothing is multiplied
    """
    prologue = Prologue(activation, None if up is None else up.reshape(-1, up.shape[-1]))
    operands = (token_type, shift, channel_scale, left, right, clip)
    return run_transform(gate, prologue, *operands, widths, slice_of_type, default_type, qmax)


@engine_fake(engine_norm_transform_quantize)
def _(x, weight, bias, types, shift, channel_scale, left, right, *rest):  # type: ignore[no-untyped-def]
    return fake_codes(x, left, right, rest[-1])


@engine_fake(engine_add_norm_transform_quantize)
def _(x, residual, weight, bias, types, shift, channel_scale, left, right, *rest):  # type: ignore[no-untyped-def]
    codes, scale = fake_codes(x, left, right, rest[-1])
    return codes, scale, torch.empty_like(x, memory_format=torch.contiguous_format)


@engine_fake(engine_gated_transform_quantize)
def _(gate, up, types, shift, channel_scale, left, right, *rest):  # type: ignore[no-untyped-def]
    return fake_codes(gate, left, right, rest[-1])
