"""The operators of the GPU's engines: like those of ``ops``, but codes are in *engine order*.

In engine order the even columns of the codes come first, then the odd ones, since a byte of packed weights holds one of
each (``kernels/int_mm``)::

    plain   x0 x1 x2 x3 x4 x5        engine   x0 x2 x4 | x1 x3 x5

* ``freeact::engine_transform_quantize``   one kernel per group; ``prologue_ops`` has those with what precedes it
* ``freeact::engine_branch_quantize``      one more per group with a branch, whose transform leaves its values in bf16
  (Hopper)
* ``freeact::engine_branch_product``       a Linear's part of it, where ``engine_linear`` does not take it (Hopper)
* ``freeact::engine_int_mm``               one kernel per Linear; a template that Inductor fuses the epilogue into
* ``freeact::engine_linear``               one kernel per Linear that brings its epilogue along (Hopper)
* ``freeact::engine_linears``              one kernel for up to three of one input

The dtype of the codes chooses the engine: int8 tensor cores for int8, fp8 tensor cores for e4m3.

``engine_graph`` puts them into a graph for their plain counterparts. Where there is no kernel for a device they run the
reference, so that graphs with them can be tested anywhere.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from freeact_fx import reference

from .prologue import NO_PROLOGUE, Prologue, before_transform
from .tiles import (
    LARGEST_NUM_CODES,
    branch_tile,
    branch_width,
    fits_branch,
    fits_hopper,
    hopper_transform_tile,
)

E4M3 = torch.float8_e4m3fn
_Op = TypeVar("_Op", bound=Callable[..., object])


_library = torch.library.Library("freeact", "FRAGMENT")


def engine_op(function: _Op) -> _Op:
    """Register a function as the op ``freeact::<its name>`` of all devices, without autograd.

    Why not ``torch.library.custom_op``: its handling of autograd, its look for outputs that alias inputs, and its guard
    against Dynamo are Python at every call, 30 us of an op whose kernel takes 10. Ops of compiled graphs, which are
    called below both, need none.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return function


def engine_fake(function: Callable[..., object]) -> Callable[[_Op], _Op]:
    """The fake of an op that ``engine_op`` registered."""
    return torch.library.register_fake(f"freeact::{function.__name__}", lib=_library)


def to_engine_order(codes: Tensor) -> Tensor:
    as_bytes = codes.view(torch.int8) if codes.dtype == E4M3 else codes
    return torch.cat([as_bytes[..., 0::2], as_bytes[..., 1::2]], -1).view(codes.dtype)


def to_plain_order(codes: Tensor) -> Tensor:
    num_even = (codes.shape[-1] + 1) // 2
    plain = torch.empty_like(codes, memory_format=torch.contiguous_format)
    plain[..., 0::2], plain[..., 1::2] = codes[..., :num_even], codes[..., num_even:]
    return plain


def has_kernels(device: torch.device) -> bool:
    """Whether our Triton kernels run on a device: NVIDIA from sm_80 on, with Triton installed."""
    return device.type == "cuda" and _capability(device) >= (8, 0)


def has_fp8(device: torch.device) -> bool:
    """Whether a device that may have kernels has fp8 tensor cores: NVIDIA from sm_89 on."""
    return device.type == "cuda" and _capability(device) >= (8, 9)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where Triton runs nothing."""
    has_triton = torch.version.hip is None and importlib.util.find_spec("triton") is not None
    if not has_triton or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def makes_codes(device: torch.device, qmax: int) -> bool:
    """Whether a device that has kernels has the transform's for a format."""
    return qmax in (7, 127) or (qmax == 448 and has_fp8(device))


def takes_codes(codes: Tensor) -> bool:
    """Whether a device that has kernels has the product's for these codes."""
    if codes.shape[-1] > LARGEST_NUM_CODES:
        return False
    return codes.dtype == torch.int8 or (codes.dtype == E4M3 and has_fp8(codes.device))


@engine_op
def engine_transform_quantize(
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
    """``freeact::transform_quantize`` to codes in engine order; for ``qmax`` 0 to what it would round, in bf16."""
    operands = (token_type, shift, channel_scale, left, right, clip)
    return run_transform(x, NO_PROLOGUE, *operands, widths, slice_of_type, default_type, qmax)


def run_transform(
    x: Tensor,
    prologue: Prologue,
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
    """What a prologue makes of x [..., K], transformed and rounded to codes in engine order."""
    flat, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    types = None if token_type is None else token_type.reshape(-1)
    operands = (types, shift, channel_scale, left, right, clip)
    static = (widths, slice_of_type, default_type)
    kernel = _transform_kernel(left, right, widths, qmax, prologue)
    if kernel is not None:
        codes, scale = kernel(flat, *operands, *static, qmax, prologue)
    else:
        row = before_transform(flat, prologue)
        codes, scale, _ = reference.transform_quantize(row, *operands, None, *static, 0, qmax)
        codes = to_engine_order(codes if qmax else codes.bfloat16())
    return codes.view(*lead, codes.shape[-1]), scale.reshape(*lead, 1).contiguous()


def _transform_kernel(
    left: Tensor, right: Tensor, widths: Sequence[int], qmax: int, prologue: Prologue
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The fastest kernel of a device for a transform, or None if none has its shape or format."""
    if not has_kernels(left.device):
        return None
    from .kernels import hopper_transform_quantize as hopper
    from .kernels import transform_quantize as portable

    on_hopper = qmax in (0, 7, 448) and is_hopper(left.device)
    if on_hopper and fits_hopper_transform(left, right, widths, prologue.kind):
        return hopper.hopper_transform_quantize
    if not makes_codes(left.device, qmax) or not portable.is_supported(left, right, widths, qmax):
        return None
    return portable.transform_quantize


def fits_hopper_transform(
    left: Tensor, right: Tensor, widths: Sequence[int], prologue: str = "none"
) -> bool:
    """Whether the transform's kernel for Hopper has a shape; ``prologue`` is ``Prologue.kind``."""
    shape = (left.shape[0], tuple(widths), right.shape[-1])
    return hopper_transform_tile(*shape, prologue) is not None


@engine_fake(engine_transform_quantize)
def _(x, token_type, shift, channel_scale, left, right, clip, *static):  # type: ignore[no-untyped-def]
    return fake_codes(x, left, right, static[-1])


def _codes_dtype(qmax: int) -> torch.dtype:
    return E4M3 if qmax == 448 else torch.int8


def fake_codes(x: Tensor, left: Tensor, right: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    num_codes = left.shape[1] * right.shape[-1]
    dtype = torch.bfloat16 if qmax == 0 else _codes_dtype(qmax)
    codes = x.new_empty((*x.shape[:-1], num_codes), dtype=dtype)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@engine_op
def engine_branch_quantize(
    z: Tensor,
    lowrank: Tensor,
    token_type: Tensor | None,
    clip: Tensor,
    default_type: int,
    own_rank: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``freeact::transform_quantize_branch`` does after its transform.

    z         [..., K'] bf16, in engine order
    lowrank   [K', R] int8, in plain order
    own_rank  as there

    Returns codes [..., K'] int8 or e4m3 in engine order, scale [..., 1] fp32 and coefficients [..., branch_width(R)]
    bf16, divided by the scale, zeros behind R.
    """
    flat, lead = z.reshape(-1, z.shape[-1]), z.shape[:-1]
    types = None if token_type is None else token_type.reshape(-1)
    static = (default_type, own_rank, qmax)
    if has_kernels(z.device):
        from .kernels.hopper_branch_quantize import hopper_branch_quantize

        operands = (flat.contiguous(), lowrank.contiguous(), types, clip.contiguous())
        codes, scale, coefficients = hopper_branch_quantize(*operands, *static)
    else:
        codes, scale, coefficients = _branch_quantize(flat, lowrank, types, clip, *static)
    coefficients = coefficients.view(*lead, coefficients.shape[-1])
    return codes.view(z.shape), scale.view(*lead, 1), coefficients


def _branch_quantize(
    z: Tensor,
    lowrank: Tensor,
    types: Tensor | None,
    clip: Tensor,
    default_type: int,
    own_rank: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference with z and the coefficients rounded to bf16."""
    z, columns = z.float(), reference.branch_columns(torch.cat([lowrank[0::2], lowrank[1::2]]))
    exact = reference.branch_coefficients(z, columns, types, default_type, own_rank)
    rest = z - exact.bfloat16().float() @ columns.t()
    clip_of_token = reference.rows_of_type(clip, types, default_type).unsqueeze(-1)
    codes, scale = reference.quantize_tokens(rest, clip_of_token, qmax)
    padding = branch_width(lowrank.shape[1]) - lowrank.shape[1]
    in_units = torch.nn.functional.pad(exact / scale, (0, padding))
    return codes, scale, in_units.bfloat16()


@engine_fake(engine_branch_quantize)
def _(z, lowrank, token_type, clip, *static):  # type: ignore[no-untyped-def]
    codes = z.new_empty(z.shape, dtype=_codes_dtype(static[-1]))
    scale = z.new_empty((*z.shape[:-1], 1), dtype=torch.float32)
    return codes, scale, z.new_empty((*z.shape[:-1], branch_width(lowrank.shape[1])))


@engine_op
def engine_branch_product(
    coefficients: Tensor, branch_weight: Tensor, branch_scale: Tensor
) -> Tensor:
    """``freeact::branch_product``, for ``fuse_linear`` to find; one that it leaves runs as it is."""
    return reference.branch_product(coefficients, branch_weight, branch_scale)


@engine_fake(engine_branch_product)
def _(coefficients, branch_weight, branch_scale):  # type: ignore[no-untyped-def]
    shape = (*coefficients.shape[:-1], branch_weight.shape[1])
    return coefficients.new_empty(shape, dtype=torch.float32)


def takes_branch(
    left: Tensor, right: Tensor, lowrank: Tensor, widths: Sequence[int], qmax: int
) -> bool:
    """Whether kernels on Hopper make codes and coefficients of a branch."""
    return (
        is_hopper(left.device)
        and qmax in (7, 448)
        and lowrank.dtype == torch.int8
        and len(widths) == 1
        and fits_hopper_transform(left, right, widths)
        and branch_tile(*lowrank.shape) is not None
    )


@engine_op
def engine_int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """``freeact::int_mm`` of codes in engine order."""
    if has_kernels(codes.device):
        from .kernels.int_mm import int_mm

        product = int_mm(codes.reshape(-1, codes.shape[-1]).contiguous(), weight.contiguous())
        return product.view(*codes.shape[:-1], weight.shape[0])
    return reference.int_mm(to_plain_order(codes), weight)


@engine_fake(engine_int_mm)
def _(codes, weight):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)


@engine_op
def engine_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias_table: Tensor | None,
    token_type: Tensor | None,
    slice_sizes: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    dtype: torch.dtype,
    coefficients: Tensor | None = None,
    branch_weight: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """Product and epilogue in one: ``reference.epilogue``.

    codes         [..., K'] int8 or e4m3 in engine order, zeros outside of a token's slice
    scale         [..., 1] fp32
    weight        [N, ceil(K' / 8)] int32
    weight_scale  [S, N] fp32
    bias_table    [P, N] fp32, or None
    token_type    [...] integers, or None: all tokens are ``default_type``
    slice_sizes   columns of each slice, even numbers; their sum is K'
    coefficients  [..., branch_width(R)] bf16, divided by ``scale``, with branch_weight [R, N] int8 and branch_scale [R]
                  fp32, for plans of one slice; or None. The weight's values are rounded to bf16 in units of the
                  kernel's sums, onto which their product is added

    Returns [..., N] of ``dtype``. The kernel is for shapes that ``takes_linear`` and Hopper.
    """
    if has_kernels(codes.device):
        bias_tables = [] if bias_table is None else [bias_table]
        branch_weights = [] if branch_weight is None else [branch_weight]
        branch_scales = [] if branch_scale is None else [branch_scale]
        (out,) = engine_linears(
            codes,
            scale,
            [weight],
            [weight_scale],
            bias_tables,
            token_type,
            slice_sizes,
            slice_of_type,
            default_type,
            dtype,
            coefficients,
            branch_weights,
            branch_scales,
        )
        return out
    product = engine_int_mm(codes, weight)
    if coefficients is not None and branch_weight is not None and branch_scale is not None:
        in_sums = branch_weight.float() * branch_scale.unsqueeze(1) / weight_scale
        in_units = coefficients[..., : branch_weight.shape[0]]
        product = product + in_units.float() @ in_sums.bfloat16().float()
    return reference.epilogue(
        product,
        scale,
        weight_scale,
        bias_table,
        None,
        None,
        None,
        token_type,
        slice_of_type,
        default_type,
        dtype,
    )


@engine_op
def engine_linears(
    codes: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    bias_tables: Sequence[Tensor],
    token_type: Tensor | None,
    slice_sizes: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    dtype: torch.dtype,
    coefficients: Tensor | None,
    branch_weights: Sequence[Tensor],
    branch_scales: Sequence[Tensor],
) -> list[Tensor]:
    """``engine_linear`` of several weights; all have bias tables or a branch, or none has, and the list is empty."""
    optional = _lists(len(weights), bias_tables, branch_weights, branch_scales)
    rows = zip(weights, weight_scales, *optional, strict=True)
    if not has_kernels(codes.device):
        return [
            engine_linear(
                codes,
                scale,
                weight,
                weight_scale,
                bias_table,
                token_type,
                slice_sizes,
                slice_of_type,
                default_type,
                dtype,
                coefficients,
                branch_weight,
                branch_scale,
            )
            for weight, weight_scale, bias_table, branch_weight, branch_scale in rows
        ]
    from .kernels.hopper_int_mm import hopper_linears

    outputs = hopper_linears(
        codes.reshape(-1, codes.shape[-1]).contiguous(),
        scale.reshape(-1).contiguous(),
        [tuple(None if t is None else t.contiguous() for t in row) for row in rows],  # type: ignore[misc]
        None if token_type is None else token_type.reshape(-1).contiguous(),
        slice_sizes,
        slice_of_type,
        default_type,
        dtype,
        coefficients=None
        if coefficients is None
        else coefficients.reshape(-1, coefficients.shape[-1]).contiguous(),
    )
    return [out.view(*codes.shape[:-1], out.shape[-1]) for out in outputs]


def _lists(number: int, *lists: Sequence[Tensor]) -> list[Sequence[Tensor | None]]:
    """Lists that may be empty, filled up with None."""
    return [found or [None] * number for found in lists]


@engine_fake(engine_linears)
def _(codes, scale, weights, scales, biases, types, sizes, slices, default, dtype, *branch):  # type: ignore[no-untyped-def]
    return [codes.new_empty((*codes.shape[:-1], w.shape[0]), dtype=dtype) for w in weights]


@engine_fake(engine_linear)
def _(codes, scale, weight, weight_scale, bias, types, sizes, slices, default, dtype, *branch):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def is_hopper(device: torch.device) -> bool:
    """Whether the kernels written for Hopper alone run on a device."""
    return has_kernels(device) and _capability(device)[0] == 9


def takes_linear(codes: Tensor, weight: Tensor, dtype: torch.dtype, rank: int = 0) -> bool:
    """Whether ``engine_linear`` is the kernel for a Linear on Hopper; ``rank`` columns of its branch."""
    fits = fits_hopper(codes.shape[-1], weight.shape[0], dtype.itemsize)
    return is_hopper(codes.device) and fits and fits_branch(rank, weight.shape[0])


@engine_op
def linear_output(y: Tensor) -> Tensor:
    """The output of a Linear, for Inductor to write to memory as it is: a product's fp32 integers, which it would
    otherwise rather write and scale where they are read, are larger."""
    return y.clone()


@engine_fake(linear_output)
def _(y):  # type: ignore[no-untyped-def]
    return torch.empty_like(y)
