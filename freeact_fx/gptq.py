"""GPTQ (arXiv 2210.17323) on a transformed weight: round columns in turn, let later columns make up for the error.

In the form of LDLQ (QuIP, arXiv 2307.13304), which gives the same codes without an inverse. With ``H = U D U^T``, U
unit upper triangular, column j is rounded as::

    code_j = round(w_j + (w_0 - code_0) U_0j + ... + (w_(j-1) - code_(j-1)) U_(j-1)j)

The Linears of a group share H, so their rows go through together: on a GPU the time is that of launching four kernels
for each column, however many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64


def gptq(weight: Tensor, scale: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Codes for a weight, with row scales already chosen.

    weight   [N, K'] fp32
    scale    [N] fp32
    hessian  [K', K'] second moment of the activations that meet the weight, all types mixed
    damping  added to the diagonal, as a part of its mean; more for fewer tokens

    Returns codes [N, K'] int8 in [-7, 7].
    """
    # Columns with the largest moment first: their errors find the most columns to make up for them.
    order = hessian.diagonal().argsort(descending=True)
    feedback = unit_upper_factor(damped(hessian, damping)[order][:, order])
    exact = (weight / scale.unsqueeze(1)).t()[
        order
    ]  # [K', N] in units of codes; rows are contiguous
    codes, errors = torch.empty_like(exact), torch.empty_like(exact)
    for start in range(0, exact.shape[0], _BLOCK):
        stop = min(start + _BLOCK, exact.shape[0])
        block = torch.addmm(exact[start:stop], feedback[:start, start:stop].t(), errors[:start])
        for column in range(start, stop):
            code = torch.round(block[0], out=codes[column]).clamp_(-7, 7)
            error = torch.sub(exact[column], code, out=errors[column])
            block = block[1:].addr_(feedback[column, column + 1 : stop], error)
    result = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    result[:, order] = codes.t().to(torch.int8)
    return result


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Add a part of the mean to the diagonal; the mean itself where nothing was seen."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(1e-30)
    return hessian + torch.diag(torch.where(diagonal <= 0, mean - diagonal, damping * mean))


def unit_upper_factor(matrix: Tensor) -> Tensor:
    """U of ``matrix = U D U^T`` in fp32, [n, n] unit upper triangular; the identity, which rounds to nearest, for a
    matrix that is not positive definite."""
    # Backwards, a lower triangular factor is an upper one.
    backwards = matrix.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(backwards.float())
    if bool(failed):
        lower, failed = torch.linalg.cholesky_ex(backwards.double())
    if bool(failed):
        return torch.eye(matrix.shape[0], device=matrix.device)
    upper = lower.flip(0, 1)
    return (upper / upper.diagonal()).float()
