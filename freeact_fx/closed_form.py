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

import torch
from torch import Tensor

_ALTERNATIONS = 6
_DAMPING = 1e-3


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semidefinite matrix; eigenvalues below 1e-12 of the largest count as that."""
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    floor = values[-1].clamp_min(1e-30) * 1e-12
    return (vectors * values.clamp_min(floor) ** exponent) @ vectors.t()


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """``A # B`` of two symmetric positive definite matrices."""
    root, inverse_root = power(a, 0.5), power(a, -0.5)
    return root @ power(inverse_root @ b @ inverse_root, 0.5) @ root


def damped(matrix: Tensor) -> Tensor:
    """Add a part of the mean eigenvalue: few tokens must not make a direction look free of charge."""
    mean = float(matrix.diagonal().mean())
    result = matrix.clone()
    result.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    return result


def channel_scale(moment: Tensor, gram: Tensor) -> Tensor:
    """The best diagonal transform, [K] fp32 with geometric mean 1; moment and gram are [K, K], damped."""
    scale = (gram.diagonal().double() / moment.diagonal()) ** 0.25
    return (scale / scale.log().mean().exp()).clamp(1e-4, 1e4).float()


def kronecker_factors(
    moment: Tensor, gram: Tensor, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Left [D1, D1] and right [D2, D2] factor, fp64.

    moment, gram  [D1 * D2, D1 * D2] fp32, damped, of channels that are already scaled
    """
    d1, d2 = shape

    def rearranged(matrix: Tensor) -> Tensor:
        """To [D1 * D1, D2 * D2]: a partial trace is then a matrix-vector product."""
        return matrix.view(d1, d2, d1, d2).transpose(1, 2).reshape(d1 * d1, d2 * d2)

    def left_trace(matrix: Tensor, right: Tensor) -> Tensor:
        return (matrix @ right.flatten().float()).view(d1, d1).double()

    def right_trace(matrix: Tensor, left: Tensor) -> Tensor:
        return (left.flatten().float() @ matrix).view(d2, d2).double()

    c, g = rearranged(moment), rearranged(gram)
    m_right = torch.eye(d2, dtype=torch.float64, device=moment.device)
    for _ in range(_ALTERNATIONS):
        c_left, g_left = left_trace(c, m_right), left_trace(g, torch.linalg.inv(m_right))
        m_left = geometric_mean(power(c_left, -1.0), g_left)
        m_left = m_left / m_left.diagonal().mean()
        c_right, g_right = right_trace(c, m_left), right_trace(g, torch.linalg.inv(m_left))
        m_right = geometric_mean(power(c_right, -1.0), g_right)
        m_right = m_right / m_right.diagonal().mean()

    def spread(n: int) -> Tensor:
        square = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square)[0].to(moment.device)

    return power(m_left, 0.5) @ spread(d1), power(m_right, 0.5) @ spread(d2)
