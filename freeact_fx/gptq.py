"""GPTQ (arXiv 2210.17323) on a transformed weight: round columns in turn, let later columns make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128


def gptq(weight: Tensor, scale: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Codes for a weight, with row scales already chosen.

    weight   [N, K'] fp32
    scale    [N] fp32
    hessian  [K', K'] second moment of the activations that meet the weight, all types mixed
    damping  added to the diagonal, as a part of its mean; more for fewer tokens

    Returns codes [N, K'] int8 in [-7, 7].
    """
    num_codes = weight.shape[1]
    hessian = hessian.double()
    dead = hessian.diagonal() <= 0
    mean = hessian.diagonal().mean().clamp_min(1e-30)
    hessian = hessian + torch.diag(torch.where(dead, mean, damping * mean))
    # Columns with the largest moment first: their errors find the most columns to make up for them.
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    work = weight[:, order].clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, num_codes, _BLOCK):
        stop = min(start + _BLOCK, num_codes)
        block, errors = work[:, start:stop], torch.empty_like(work[:, start:stop])
        for column in range(stop - start):
            value = block[:, column]
            code = (value / scale).round().clamp(-7, 7)
            codes[:, start + column] = code.to(torch.int8)
            row = upper[start + column, start + column : stop]
            error = (value - code * scale) / row[0]
            block[:, column:] -= error[:, None] * row
            errors[:, column] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
