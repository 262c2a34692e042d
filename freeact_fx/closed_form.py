"""The closed-form transform of a group from second moments, projected to Kronecker factors.

With per-token and per-channel scales the rounding error of ``x W`` is, up to a constant, ``tr(C M) tr(G M^-1)`` for
``M = P P^T``, ``C`` the second moment of the activation and ``G = W W^T`` of the weights. Its minimum over all M is the
geometric mean of ``C^-1`` and ``G`` (the optimum that WUSH, arXiv 2512.00956, states through an SVD)::

    M* = C^-1 # G = C^-1/2 (C^1/2 G C^1/2)^1/2 C^-1/2

Here ``P = diag(s) (L kron R)``: the channel scale ``s`` first, in closed form, then L and R in turn, each the optimum
for partial traces of C and G under the other. An orthogonal factor behind each, free in this objective, spreads what
is left over all coordinates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .config import QuantConfig
from .reference import branch_codes, branch_columns, kronecker
from .transform import GroupTransform, kronecker_shape

_ALTERNATIONS = 6
_DAMPING = 1e-3


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    floor = values[-1].clamp_min(1e-30) * 1e-12
    return (vectors * values.clamp_min(floor) ** exponent) @ vectors.t()


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """``A # B`` of two symmetric positive definite matrices."""
    root, inverse_root = _power(a, 0.5), _power(a, -0.5)
    return root @ _power(inverse_root @ b @ inverse_root, 0.5) @ root


def _damped(matrix: Tensor) -> Tensor:
    """Add a part of the mean eigenvalue: few tokens must not make a direction look free of charge."""
    size = matrix.shape[0]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    mean = matrix.diagonal().mean()
    return matrix + (_DAMPING * mean if mean > 0 else 1.0) * eye


def kronecker_transform(
    moment: Tensor, gram: Tensor, config: QuantConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Channel scale [K], left [D1, D1] and right [D2, D2] factor, all fp32.

    moment  [K, K] second moment of the activations (already centred if the plan shifts)
    gram    [K, K] sum over the group's Linears of ``W W^T`` (W is [K, N])

    Raises ValueError if K has no legal Kronecker shape.
    """
    num_features = moment.shape[0]
    shape = kronecker_shape(num_features)
    if shape is None:
        raise ValueError(f"in_features {num_features} has no legal Kronecker shape")
    d1, d2 = shape
    moment, gram = _damped(moment.double()), _damped(gram.double())
    scale = (gram.diagonal() / moment.diagonal()) ** 0.25
    scale = (scale / scale.log().mean().exp()).clamp(1e-4, 1e4)

    def rearranged(matrix: Tensor) -> Tensor:
        """[K, K] to [D1 * D1, D2 * D2]: a partial trace is then a matrix-vector product."""
        return matrix.view(d1, d2, d1, d2).transpose(1, 2).reshape(d1 * d1, d2 * d2)

    c = rearranged(scale[:, None] * moment * scale)
    g = rearranged(gram / scale[:, None] / scale)
    m_right = torch.eye(d2, dtype=torch.float64, device=moment.device)
    m_left = torch.eye(d1, dtype=torch.float64, device=moment.device)
    for _ in range(_ALTERNATIONS):
        c_left = (c @ m_right.flatten()).view(d1, d1)
        g_left = (g @ torch.linalg.inv(m_right).flatten()).view(d1, d1)
        m_left = geometric_mean(_power(c_left, -1.0), g_left)
        m_left = m_left / m_left.diagonal().mean()
        c_right = (m_left.flatten() @ c).view(d2, d2)
        g_right = (torch.linalg.inv(m_left).flatten() @ g).view(d2, d2)
        m_right = geometric_mean(_power(c_right, -1.0), g_right)
        m_right = m_right / m_right.diagonal().mean()
    generator = torch.Generator().manual_seed(config.seed)

    def spread(n: int) -> Tensor:
        square = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square)[0].to(moment.device)

    left, right = _power(m_left, 0.5) @ spread(d1), _power(m_right, 0.5) @ spread(d2)
    return scale.float(), left.float(), right.float()


def strongest_directions(moment: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The [K', R] orthonormal directions that carry most of activations and weights together.

    moment, gram  [K', K'] of transformed activations and weights. Rounding error goes with tr(moment) tr(gram), so to
                  first order with the sum of the two, each relative to its trace.
    """
    joint = moment / moment.trace().clamp_min(1e-30) + gram / gram.trace().clamp_min(1e-30)
    return torch.linalg.eigh(joint.float())[1][:, -rank:].flip(1).contiguous()


def fit_transform(
    plan: str,
    means: Tensor,
    moment: Tensor,
    gram: Tensor,
    config: QuantConfig,
    rank: int = 0,
) -> GroupTransform:
    """The transform of plan ``single``, ``shift`` or ``branch`` for a group's statistics; clips are 1, to be searched.

    means   [P, K] fp64, the last (untyped) row unused
    moment  [K, K] mixture of the types' second moments, centred for the plans that shift
    gram    [K, K]
    rank    columns of a shared branch
    """
    shift = None
    if plan != "single":
        shift = means.bfloat16()
        shift[-1] = 0
    scale, left, right = kronecker_transform(moment, gram, config)
    num_rows = config.num_types + 1
    fitted = GroupTransform(
        plan=plan,
        left=left,
        right=right.unsqueeze(0),
        clip=torch.ones(num_rows, device=left.device),
        shift=shift,
        channel_scale=scale,
        widths=(left.shape[1],),
        slice_of_type=(0,) * num_rows,
    )
    if not rank:
        return fitted
    inverse = fitted.transformed_weight(torch.eye(gram.shape[0], device=gram.device)).float()
    c = transformed_moment(fitted, moment)
    g = inverse.t() @ gram.float() @ inverse
    return replace(fitted, lowrank=branch_codes(strongest_directions(c, g, rank)))


def transformed_moment(fitted: GroupTransform, moment: Tensor) -> Tensor:
    """``P^T C P`` of what is rounded, [K', K'] fp32: the moment of the tokens less their branch."""

    def rows(matrix: Tensor) -> Tensor:
        scaled = matrix if fitted.channel_scale is None else matrix * fitted.channel_scale
        z = kronecker(scaled, fitted.left, fitted.right[0])
        if fitted.lowrank is None:
            return z
        columns = branch_columns(fitted.lowrank)
        return z - (z @ columns) @ columns.t()

    return rows(rows(moment.float()).t().contiguous())
