"""The ``freeact::`` operators: schemas, fakes, and the device kernel each picks when it is called.

* ``freeact::transform_quantize``   activation to codes and scale (one per group)
* ``freeact::transform_quantize_branch``   the same, and the branch's coefficients
* ``freeact::int_mm``               codes times packed weight, exact integers in fp32 (one per Linear)
* ``freeact::branch_product``       coefficients times a Linear's branch
* ``freeact::linear``               a whole converted Linear; what ``FreeActLinear.forward`` is, and what the passes
  take apart into those above

Inference only: no autograd formulas. Inductor decomposes the transforms and the branch into ordinary ops and fuses
them; ``int_mm`` stays opaque on the CPU and runs oneDNN's u8 x s8 linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import reference
from .linear_form import operands_of, take_part
from .profiler_names import named_after_linear


@torch.library.custom_op("freeact::transform_quantize", mutates_args=())
def transform_quantize(
    x: Tensor,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    qmax: int,
) -> tuple[Tensor, Tensor]:
    """See ``reference.transform_quantize``; no branch."""
    codes, scale, _ = reference.transform_quantize(
        x,
        token_type,
        shift,
        channel_scale,
        left,
        right,
        clip,
        None,
        widths,
        slice_of_type,
        default_type,
        0,
        qmax,
    )
    return codes, scale


@torch.library.custom_op("freeact::transform_quantize_branch", mutates_args=())
def transform_quantize_branch(
    x: Tensor,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    lowrank: Tensor,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    own_rank: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.transform_quantize``; the third output is [..., R] fp32."""
    codes, scale, coefficients = reference.transform_quantize(
        x,
        token_type,
        shift,
        channel_scale,
        left,
        right,
        clip,
        lowrank,
        widths,
        slice_of_type,
        default_type,
        own_rank,
        qmax,
    )
    assert coefficients is not None
    # A strided activation leaves its strides in the matrix product; the fake promises none.
    return codes, scale, coefficients.contiguous()


def _codes_dtype(qmax: int) -> torch.dtype:
    return {0: torch.float32, 448: torch.float8_e4m3fn}.get(qmax, torch.int8)


def _fake_codes(
    x: Tensor, right: Tensor, widths: Sequence[int], qmax: int
) -> tuple[Tensor, Tensor]:
    num_codes = sum(widths) * right.shape[-1]
    codes = x.new_empty((*x.shape[:-1], num_codes), dtype=_codes_dtype(qmax))
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@transform_quantize.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    token_type,
    shift,
    channel_scale,
    left,
    right,
    clip,
    widths,
    slice_of_type,
    default_type,
    qmax,
):
    return _fake_codes(x, right, widths, qmax)


@transform_quantize_branch.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    token_type,
    shift,
    channel_scale,
    left,
    right,
    clip,
    lowrank,
    widths,
    slice_of_type,
    default_type,
    own_rank,
    qmax,
):
    coefficients = x.new_empty((*x.shape[:-1], lowrank.shape[1]), dtype=torch.float32)
    return (*_fake_codes(x, right, widths, qmax), coefficients)


@torch.library.custom_op("freeact::int_mm", mutates_args=())
def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.int_mm``. On the CPU int8 codes go through oneDNN, whose repacked int8 weight is cached; on the
    GPU through int8 tensor cores, and e4m3 codes through fp8 ones."""
    if codes.dtype == torch.int8:
        return reference.int_mm(codes, weight)
    # e4m3 codes without an engine of their own: the sum is rounded in fp32.
    return codes.float() @ reference.unpack_int4(weight, codes.shape[-1]).float().t()


@int_mm.register_fake
def _(codes, weight):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("freeact::int_mm_reference", mutates_args=())
def int_mm_reference(codes: Tensor, weight: Tensor) -> Tensor:
    """``int_mm`` without an engine, on any device: what ``options={"bypass": ("engine",)}`` runs."""
    return int_mm._init_fn(codes, weight)


@int_mm_reference.register_fake
def _(codes, weight):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)


# Packed weight -> (its version, oneDNN's copy, two small constants). Weak: the copy goes when the packed weight goes.
_onednn_weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Activation codes are signed and oneDNN's fast path takes unsigned: codes xor 128, read as unsigned, are codes + 128.
# Why not s8 x s8: oneDNN accepts it and takes seconds per call.
_UNSIGNED_ZERO = 128


def onednn_weight_bytes(weight: Tensor) -> int:
    """Bytes of oneDNN's copy of a packed weight: one per code; 0 before the first call."""
    return _onednn_weights[weight][1].numel() if weight in _onednn_weights else 0


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@int_mm.register_kernel("cpu")
@named_after_linear
def _int_mm_cpu(codes: Tensor, weight: Tensor) -> Tensor:
    if codes.dtype != torch.int8 or not torch.backends.mkldnn.is_available():
        return int_mm._init_fn(codes, weight)
    num_codes = codes.shape[-1]
    flat = codes.reshape(-1, num_codes)
    if flat.shape[0] == 0:
        return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)
    cached = _onednn_weights.get(weight)
    if cached is None or cached[0] != _version(weight):
        unpacked = reference.unpack_int4(weight, num_codes)
        cached = (
            _version(weight),
            torch.ops.onednn.qlinear_prepack(unpacked, None),
            torch.ones(weight.shape[0]),
            torch.zeros(weight.shape[0], dtype=torch.int32),
        )
        _onednn_weights[weight] = cached
    _, prepacked, ones, zeros = cached
    product = torch.ops.onednn.qlinear_pointwise(
        flat.contiguous().view(torch.uint8) ^ _UNSIGNED_ZERO,
        1.0,
        _UNSIGNED_ZERO,
        prepacked,
        ones,
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return product.view(*codes.shape[:-1], weight.shape[0])


@torch.library.custom_op("freeact::branch_product", mutates_args=())
def branch_product(coefficients: Tensor, branch_weight: Tensor, branch_scale: Tensor) -> Tensor:
    """See ``reference.branch_product``."""
    return reference.branch_product(coefficients, branch_weight, branch_scale)


@branch_product.register_fake
def _(coefficients, branch_weight, branch_scale):  # type: ignore[no-untyped-def]
    shape = (*coefficients.shape[:-1], branch_weight.shape[1])
    return coefficients.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("freeact::linear", mutates_args=())
def linear(
    x: Tensor,
    token_type: Tensor | None,
    group_values: Tensor,
    shift_bf16: Tensor | None,
    lowrank: Tensor | None,
    weight: Tensor,
    values: Tensor,
    branch_weight: Tensor | None,
    group_form: str,
    form: str,
) -> Tensor:
    """One converted Linear, [..., K] to [..., N] in the dtype of ``x``; the formula of ``reference``.

    Arguments are the buffers and texts of ``convert.GroupTransformModule`` and ``FreeActLinear``. The declaration of
    the token types in ``form`` takes no part in the arithmetic: the passes read it off the graph, so that a converted
    model compiles without options.
    """
    o = operands_of(
        take_part,
        *(group_values, shift_bf16, lowrank, weight, values, branch_weight, group_form, form),
    )
    codes, scale, coefficients = reference.transform_quantize(
        x,
        token_type,
        o["shift"],
        o["channel_scale"],
        o["left"],
        o["right"],
        o["clip"],
        lowrank,
        o["widths"],
        o["slice_of_type"],
        o["default_type"],
        o["own_rank"],
        o["qmax"],
    )
    return reference.epilogue(
        int_mm(codes, weight),
        scale,
        o["weight_scale"],
        o["bias_table"],
        coefficients,
        branch_weight,
        o["branch_scale"],
        token_type,
        o["slice_of_type"],
        o["default_type"],
        x.dtype,
    )


@linear.register_fake
def _(x, token_type, group_values, shift_bf16, lowrank, weight, *args):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# On the GPU the kernels' codes are in another order (``codegen.engine_ops``). Compiled graphs keep it between the two
# ops; called by hand each keeps to its contract.


@transform_quantize.register_kernel("cuda")
def _transform_quantize_cuda(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from .codegen import engine_ops

    qmax = args[-1]
    if not engine_ops.has_kernels(x.device) or not engine_ops.makes_codes(x.device, qmax):
        return transform_quantize._init_fn(x, *args)
    codes, scale = engine_ops.engine_transform_quantize(x, *args)
    return engine_ops.to_plain_order(codes), scale


@int_mm.register_kernel("cuda")
@named_after_linear
def _int_mm_cuda(codes: Tensor, weight: Tensor) -> Tensor:
    from .codegen import engine_ops

    if not engine_ops.has_kernels(codes.device) or not engine_ops.takes_codes(codes):
        return int_mm._init_fn(codes, weight)
    return engine_ops.engine_int_mm(engine_ops.to_engine_order(codes), weight)
