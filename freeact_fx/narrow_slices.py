"""Plan ``paper``: each token type has its own K slice, narrower than K, and zeros elsewhere; widths sum to K.

Source: FreeAct (arXiv 2603.01776): one static weight, for each type a matrix of its own that is not square. Its
training is not public; this is the closed form of that layout. What a slice keeps is fixed by the format: the span of
``L_i kron R^D2`` of the scaled channels, and the part in it orthogonally, since the weight side has the pseudo-inverse.
Sorting channels by energy would put more of a type into few columns, but the format has neither a permutation nor a
rotation before the Kronecker product; so here

* the left factor keeps the strongest directions of the left partial traces, in order (``left_basis``);
* the widths, in columns of the left factor (D2 codes each), minimise the predicted error: dropped energy and rounding
  of what is kept, relative to the energy of the type's outputs, types counting alike (``best_widths``).

There is no shift by type: the paper has none. It would help, and then the plan would no longer be the paper's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .closed_form import geometric_mean, kronecker_factors, power
from .moments import partial_traces
from .predict import rounding_noise


def narrow_factors(
    of_slices: list[Tensor],
    gram: Tensor,
    shape: tuple[int, int],
    qmax: int,
    generator: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """For each slice a left factor [D1, width] with a right one [D2, D2], fp64; the widths sum to D1.

    of_slices  [K, K] fp32 of scaled channels: a type's second moment about zero
    gram       [K, K] fp32 of scaled channels
    """
    bases = [left_basis(moment, gram, shape) for moment in of_slices]
    losses = [
        _losses(moment, gram, basis, shape, qmax)
        for moment, basis in zip(of_slices, bases, strict=True)
    ]
    factors = []
    for moment, basis, width in zip(
        of_slices, bases, best_widths(torch.stack(losses)), strict=True
    ):
        kept = basis[:, :width]
        own, own_gram = _rotated(moment, kept), _rotated(gram, kept)
        left, right = kronecker_factors(own, own_gram, (width, shape[1]), generator)
        factors.append((kept @ left, right))
    return factors


def left_basis(moment: Tensor, gram: Tensor, shape: tuple[int, int]) -> Tensor:
    """Orthonormal [D1, D1] fp64, the directions of the left factor in the order in which a slice should keep them.

    Dropping one direction u costs about ``(u^T c u) (u^T g u)`` of the partial traces c and g: sorted by the
    eigenvalues of their geometric mean, whose square is a lower bound of that and equal to it if c and g commute.
    """
    c, g = (partial_traces(matrix, shape)[0] for matrix in (moment, gram))
    return torch.linalg.eigh(geometric_mean(c, g))[1].flip(1)


def dropped_energy(moment: Tensor, gram: Tensor, basis: Tensor) -> Tensor:
    """[D1 + 1]: output energy that is lost if only the first k columns of the left basis are kept, for each k.

    It is ``tr(D C D G)`` with D the projection on the other columns, kron the identity.
    """
    d1 = basis.shape[0]
    d2 = moment.shape[0] // d1
    blocks = (_rotated(moment, basis) * _rotated(gram, basis)).view(d1, d2, d1, d2)
    crossed = blocks.sum((1, 3)).double()
    from_corner = crossed.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([from_corner, from_corner.new_zeros(1)])


def best_widths(losses: Tensor) -> tuple[int, ...]:
    """The widths, at least 1 each and D1 together, with the least sum of losses.

    losses  [S, D1 + 1], of slice i if it is k wide

    Raises ValueError if there are more slices than columns.
    """
    num_slices, columns = losses.shape[0], losses.shape[1] - 1
    if num_slices > columns:
        raise ValueError(
            f"{num_slices} slices need as many columns of the left factor, got {columns}"
        )
    # best[i][n]: the least loss of the first i slices if they take n columns, and the width of the last of them.
    best = [[(0.0 if n == 0 else math.inf, 0) for n in range(columns + 1)]]
    for row in losses.tolist():
        before = best[-1]
        best.append(
            [
                min(
                    ((before[n - k][0] + row[k], k) for k in range(1, n + 1)), default=(math.inf, 0)
                )
                for n in range(columns + 1)
            ]
        )
    widths, left = [], columns
    for of_slice in reversed(best[1:]):
        widths.append(of_slice[left][1])
        left -= widths[-1]
    return tuple(reversed(widths))


def _rotated(matrix: Tensor, basis: Tensor) -> Tensor:
    """``(B kron I)^T C (B kron I)``: [D1 * D2, D1 * D2] fp32 and B [D1, w] to [w * D2, w * D2]."""
    d1 = basis.shape[0]
    rows = basis.t().to(matrix.dtype)
    half = (rows @ matrix.reshape(d1, -1)).view(-1, matrix.shape[1])
    return (rows @ half.t().reshape(d1, -1)).view(-1, half.shape[0])


def _losses(
    moment: Tensor, gram: Tensor, basis: Tensor, shape: tuple[int, int], qmax: int
) -> Tensor:
    """[D1 + 1] fp64 on the CPU: the predicted error of a slice of k columns, relative to the energy of the outputs."""
    d1, d2 = shape
    (c_left, c_right), (g_left, g_right) = (partial_traces(m, shape) for m in (moment, gram))
    c_left, g_left = basis.t() @ c_left @ basis, basis.t() @ g_left @ basis
    # The best transform makes the product of the traces the square of this norm. Of a Kronecker product it is the
    # product of the factors' norms, and the right factor is kept whole.
    right = _nuclear_norm(c_right, g_right) / float(c_left.trace() * g_left.trace()) ** 0.5
    losses = dropped_energy(moment, gram, basis).cpu()
    for k in range(1, d1 + 1):
        product = (_nuclear_norm(c_left[:k, :k], g_left[:k, :k]) * right) ** 2
        noise = rounding_noise(k * d2, qmax) + rounding_noise(k * d2, 7)
        losses[k] += noise * product / (k * d2)
    return losses / float((moment * gram).sum())


def _nuclear_norm(c: Tensor, g: Tensor) -> float:
    """Of ``C^1/2 G^1/2``."""
    root = power(c, 0.5)
    return float(torch.linalg.eigvalsh(root @ g @ root).clamp_min(0).sqrt().sum())
