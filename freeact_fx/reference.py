"""The specification in plain PyTorch: what every kernel must compute. No Triton, no graph.

One quantised linear is ``y = x W + b`` written for a token of type ``t`` as::

    u      = ((x - mu_t) * s) (L_i kron R_i)            # shift by this type's mean; transform, into its K slice i
    c      = u U_t                ;  z = u - c U_t^T     # branch only: coefficients, residual
    codes  = round(z / a),  a = clip_t max|z| / qmax    # dynamic, per token
    y      = a * w_i * (codes . codes_W)  +  c V  +  (mu_t W + b)
             exact integer product           branch    bias table, row t

``codes_W`` are the 4-bit codes of ``W' = Q W`` where ``Q`` inverts the transform, so that without rounding
``y`` is exactly the original (plan ``paper`` keeps a subspace only). ``U`` and ``V`` are stored in 8 bits. The plans
differ in the operands alone:

==========  ==========================================================================
single      one slice, no shift
shift       one slice, ``mu_t`` per type
paper       slice i of type i is narrower than K: ``L_i`` is [D1, w_i], sum of w_i = D1
duplicate   slice i of type i is all of K: the weight is stored once per type
branch      one slice, ``mu_t``, and ``U``: [K', R] shared, or its own columns for each type
==========  ==========================================================================

Letters: M tokens, K in features = D1 * D2, N out features, P token types, S slices, R branch columns. Tables "by type"
have P rows; the last row is for tokens whose type could not be found out: no shift, no branch columns of their own.
Source: FreeAct, arXiv 2603.01776 (own matrix per type, one static weight); the shift, duplicate and branch plans
are ours. Rounding happens in fp32 whatever the dtype of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CODES_PER_WORD = 8
# Far below any activation scale that matters, far above fp32's denormals.
SMALLEST_SCALE = 1e-30


def pack_int4(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, eight to a word, as compressed-tensors' ``pack-quantized`` does.

    codes  [N, K] int8 in [-7, 7]

    Returns [N, ceil(K / 8)] int32; code ``8 j + i`` of a row, plus 8, stands in bits ``4 i .. 4 i + 3`` of word
    ``j``::

        bit   31..28  27..24   ...   7..4   3..0
        code   8j+7    8j+6    ...   8j+1    8j

    A tail that does not fill its word is padded with code 0. Raises ValueError for a code outside [-7, 7]:
    sign-magnitude engines cannot hold -8.
    """
    wide = codes.to(torch.int32)  # int8 has no absolute value of -128
    if wide.numel() and int(wide.abs().max()) > 7:
        raise ValueError(f"pack_int4: codes must be in [-7, 7], got {int(wide.abs().max())}.")
    padding = -wide.shape[1] % CODES_PER_WORD
    unsigned = torch.nn.functional.pad(wide, (0, padding)) + 8
    nibbles = unsigned.unflatten(1, (unsigned.shape[1] // CODES_PER_WORD, CODES_PER_WORD))
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int32)
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor, num_features: int) -> Tensor:
    """The inverse of ``pack_int4``: [N, ceil(K / 8)] int32 to [N, K] int8."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) >> shifts) & 15
    return (nibbles.flatten(1)[:, :num_features] - 8).to(torch.int8)


def rows_of_type(table: Tensor, token_type: Tensor | None, default_type: int) -> Tensor:
    """Row ``token_type`` of a table [P, ...] for each token; without types the default's row."""
    return table[default_type] if token_type is None else table[token_type]


def slice_of_token(
    token_type: Tensor | None, slice_of_type: Sequence[int], default_type: int
) -> Tensor | int:
    """The K slice each token uses; an int where all tokens use the same. Type -1 is the last, as it is in tables."""
    if token_type is None or len(set(slice_of_type)) == 1:
        return slice_of_type[default_type]
    *others, last = slice_of_type
    index = torch.full_like(token_type, last)
    for type_index, slice_index in enumerate(others):
        index = torch.where(token_type == type_index, slice_index, index)
    return index


def column_step(num_codes: int) -> float:
    """Units of a branch column per code: entries of K' unit columns without a preferred axis are about N(0, 1 / K'),
    and 6 standard deviations hold them all."""
    return 6 / (127 * math.sqrt(num_codes))


def branch_codes(columns: Tensor) -> Tensor:
    """Round the columns of a branch [K', R], about unit vectors, to int8 codes in [-127, 127] of one constant step.

    Contiguous, as kernels read them: decompositions give columns one after the other, which each call would copy.
    Why no scale by column: the weight side makes up for whatever the columns are (``GroupTransform.split_branch``).
    """
    grid = columns / column_step(columns.shape[0])
    return grid.round().clamp(-127, 127).to(torch.int8).contiguous()


def branch_columns(lowrank: Tensor) -> Tensor:
    """The columns that a branch [K', R] stands for, in fp32: of ``branch_codes``, or what is floating as it is."""
    columns = lowrank.to(torch.float32)
    return columns if lowrank.is_floating_point() else columns * column_step(lowrank.shape[0])


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Multiply rows by ``left kron right``: [M, D1 * D2] x ([D1, w], [D2, D2]) to [M, w * D2]."""
    num_tokens, (d1, width), d2 = x.shape[0], left.shape, right.shape[0]
    half = (x.reshape(num_tokens * d1, d2) @ right).view(num_tokens, d1, d2)
    return torch.bmm(left.t().expand(num_tokens, width, d1), half).reshape(num_tokens, width * d2)


def transform(
    x: Tensor,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    lowrank: Tensor | None,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    own_rank: int,
) -> tuple[Tensor, Tensor | None]:
    """Shift, transform each token into its own K slice, and split off the branch.

    x              [..., K] any floating dtype
    token_type     [...] integers in [0, P), or None: all tokens are ``default_type``
    shift          [P, K] fp32 or bf16, or None
    channel_scale  [K] fp32 or None
    left           [D1, w_0 + ... + w_(S-1)] fp32, the left factors side by side
    right          [S, D2, D2] fp32
    lowrank        [K', R] (nearly) orthonormal columns (within each type's, if own), int8 as ``branch_codes`` makes
                   them or floating; or None
    widths         w_i; slice i has w_i * D2 columns
    own_rank       0: all types share the branch's columns; r: type t owns columns t r .. t r + r - 1

    Returns z [..., K'] fp32, zero outside the token's slice, and c [..., R] fp32 or None.
    """
    lead = x.shape[:-1]
    z = x.to(torch.float32)
    if shift is not None:
        z = z - rows_of_type(shift, token_type, default_type)
    if channel_scale is not None:
        z = z * channel_scale
    z = z.reshape(-1, z.shape[-1])
    in_slice = slice_of_token(token_type, slice_of_type, default_type)
    parts, start = [], 0
    for index, width in enumerate(widths):
        part = kronecker(z, left[:, start : start + width], right[index])
        if isinstance(in_slice, Tensor):
            part = torch.where(in_slice.reshape(-1, 1) == index, part, 0.0)
        elif in_slice != index:
            part = torch.zeros_like(part)
        parts.append(part)
        start += width
    z = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    z = z.reshape(*lead, z.shape[-1])
    if lowrank is None:
        return z, None
    columns = branch_columns(lowrank)
    coefficients = branch_coefficients(z, columns, token_type, default_type, own_rank)
    return z - coefficients @ columns.t(), coefficients


def branch_coefficients(
    z: Tensor, columns: Tensor, token_type: Tensor | None, default_type: int, own_rank: int
) -> Tensor:
    """``z U`` [..., R] of tokens [..., K'], zeros where a column is another type's; the rest as in ``transform``."""
    coefficients = z @ columns
    if not own_rank:
        return coefficients
    owner = torch.arange(columns.shape[1], device=z.device) // own_rank
    mine = owner == (default_type if token_type is None else token_type.unsqueeze(-1))
    return torch.where(mine, coefficients, 0.0)


def quantize_tokens(z: Tensor, clip: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Round each token to its own grid.

    z     [..., K'] fp32
    clip  [..., 1] or [1] fp32 in (0, 1]: the part of a token's largest magnitude that the largest code stands for
    qmax  7 or 127: int8 codes; 448: e4m3 codes; 0: no rounding, codes are z itself

    Returns codes [..., K'] and scale [..., 1] fp32 (units of z per code). A NaN or inf in a token makes its scale, and
    so all its outputs, NaN or inf.
    """
    largest = z.abs().amax(-1, keepdim=True)
    if qmax == 0:
        return z, torch.ones_like(largest)
    scale = (largest * clip / qmax).clamp_min(SMALLEST_SCALE)
    grid = (z / scale).clamp(-qmax, qmax)
    if qmax == 448:
        return grid.to(torch.float8_e4m3fn), scale
    return grid.round().to(torch.int8), scale


def transform_quantize(
    x: Tensor,
    token_type: Tensor | None,
    shift: Tensor | None,
    channel_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    lowrank: Tensor | None,
    widths: Sequence[int],
    slice_of_type: Sequence[int],
    default_type: int,
    own_rank: int,
    qmax: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``transform`` and ``quantize_tokens`` in one; ``clip`` is [P] fp32.

    Returns codes [..., K'], scale [..., 1] fp32, and the branch's coefficients [..., R] fp32 or None.
    """
    z, coefficients = transform(
        x,
        token_type,
        shift,
        channel_scale,
        left,
        right,
        lowrank,
        widths,
        slice_of_type,
        default_type,
        own_rank,
    )
    clip_of_token = rows_of_type(clip, token_type, default_type).unsqueeze(-1)
    return *quantize_tokens(z, clip_of_token, qmax), coefficients


def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """The product of activation codes and packed weight codes.

    codes   [..., K'] int8 (or e4m3)
    weight  [N, ceil(K' / 8)] int32, as ``pack_int4`` writes it

    Returns [..., N] fp32. For int8 codes these are exact integers while K' * qmax * 7 < 2^24, and the exact sum
    rounded once to fp32 (relative 6e-8) above that.
    """
    unpacked = unpack_int4(weight, codes.shape[-1])
    return (codes.double() @ unpacked.double().t()).to(torch.float32)


def branch_product(coefficients: Tensor, branch_weight: Tensor, branch_scale: Tensor) -> Tensor:
    """The branch's part of a linear's output, ``c V``.

    coefficients   [..., R] fp32
    branch_weight  [R, N] int8 codes of V, or V itself in fp32 (quantisers off)
    branch_scale   [R] fp32, units of V per code

    Returns [..., N] fp32. With codes, the scaled coefficients are rounded to bf16, so that a kernel can multiply in
    16 bits, where codes are exact. The sum is in fp32.
    """
    scaled = coefficients * branch_scale
    if branch_weight.dtype == torch.int8:
        scaled = scaled.to(torch.bfloat16).float()
    return scaled @ branch_weight.float()


def epilogue(
    product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias_table: Tensor | None,
    coefficients: Tensor | None,
    branch_weight: Tensor | None,
    branch_scale: Tensor | None,
    token_type: Tensor | None,
    slice_of_type: Sequence[int],
    default_type: int,
    dtype: torch.dtype,
) -> Tensor:
    """Turn the integer product into the linear's output; all in fp32, one rounding at the end.

    product        [..., N] fp32 integers
    scale          [..., 1] fp32
    weight_scale   [S, N] fp32
    bias_table     [P, N] fp32 (``mu_t W + b``), or None
    coefficients   [..., R] fp32 with branch_weight [R, N] int8 and branch_scale [R] fp32, or all three None

    Returns [..., N] of the given dtype.
    """
    y = product * scale * weight_scale[slice_of_token(token_type, slice_of_type, default_type)]
    if coefficients is not None and branch_weight is not None and branch_scale is not None:
        y = y + branch_product(coefficients, branch_weight, branch_scale)
    if bias_table is not None:
        y = y + rows_of_type(bias_table, token_type, default_type)
    return y.to(dtype)
