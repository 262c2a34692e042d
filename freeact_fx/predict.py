"""Predict what a plan's rounding costs, from moments alone: which plans are worth measuring.

A model of noise, one function for every plan. Per-token and per-row scales make the rounding error of K' coordinates
about ``c(K')`` times their mean square, evenly spread (``rounding_noise``). So an output ``z W'`` of a token of type t
in slice i, with second moment ``Z`` of what is rounded (the branch taken off), is wrong by::

    (c_activation + c_weight) tr(Z) |W'_i|^2 / k_i   +   what a narrow slice drops (plan paper)
                                                     +   the branch's own rounding, tr(C dV dV^T)

with C the second moment of the branch's coefficients and dV what 8 bits change of its weight: as much as all the rest
where a few of a Linear's outputs are loud (a row of the branch has one scale) or a type's outputs are faint beside what
the branch adds to them and the bias table takes away. And this is stated relative to the
energy of the type's outputs, about zero: relative to the energy about the mean, types with a strong mean would look as
if they needed the same care. GPTQ and errors of the tables by type are left out: all plans have about the same part of
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .moments import (
    GroupMoments,
    branch_of_type,
    columns_of_type,
    factors_of_slice,
    kronecker_trace,
    scaled,
)
from .reference import kronecker
from .transform import GroupTransform, quantize_branch

ErrorsByLinear = dict[str, dict[str, float]]


def predicted_errors(
    fitted: GroupTransform,
    weights: Sequence[Tensor],
    moments: GroupMoments,
    branches: Sequence[Tensor] = (),
) -> ErrorsByLinear:
    """Squared error of each Linear's outputs relative to their energy, by type name.

    weights   [N, K'] fp32 of each Linear: what is rounded (``GroupTransform.split_branch``)
    branches  [R, N] of each Linear, before rounding; none without a branch
    """
    statistics, config = moments.statistics, moments.statistics.config
    names = config.row_names
    d2 = fitted.right.shape[-1]
    sizes = [width * d2 for width in fitted.widths]
    weight_energy = [[float(part.square().sum()) for part in w.split(sizes, 1)] for w in weights]
    changes = [_rounding_of(branch) for branch in branches]
    errors: ErrorsByLinear = {name: {} for name in statistics.names}
    for index in moments.seen:
        own = scaled(moments.own(index, centred=fitted.shift is not None), fitted.channel_scale)
        at = fitted.slice_of_type[index]
        energy, coefficients = _rounded_energy(fitted, own, index)
        noise = rounding_noise(sizes[at], config.qmax) + rounding_noise(sizes[at], 7)
        noise *= energy / sizes[at]
        dropped = _dropped_moment(fitted, own, at)
        for j, name in enumerate(statistics.names):
            error = noise * weight_energy[j][at]
            if dropped is not None:
                error += float((dropped * moments.grams[j]).sum())
            if coefficients is not None:
                change = changes[j][branch_of_type(fitted, index)]
                error += float((coefficients * (change @ change.t())).sum())
            errors[name][names[index]] = error / max(moments.energies[index][j], 1e-30)
    return errors


def _rounding_of(branch: Tensor) -> Tensor:
    """What 8 bits change of a branch's weight [R, N], fp32."""
    codes, scale = quantize_branch(branch)
    return (codes * scale.unsqueeze(1) - branch).float()


def mean_error(errors: ErrorsByLinear, moments: GroupMoments) -> float:
    """Relative error of a group: types count as much as in its mixtures (``GroupMoments.type_weights``), Linears alike.

    errors  of the Linears of ``moments``, in their order
    """
    names = moments.statistics.config.row_names
    weights, total = moments.type_weights, 0.0
    for j, by_type in enumerate(errors.values()):
        parts = {names[t]: weight * moments.energies[t][j] for t, weight in weights.items()}
        error = sum(parts[name] * error for name, error in by_type.items())
        total += error / max(sum(parts[name] for name in by_type), 1e-30)
    return total / len(errors)


def ranking_share(statistics: Mapping[str, Any], tolerance: float = 0.05) -> float:
    """The share of groups whose plans the prediction puts in the order in which they were measured.

    statistics  of a checkpoint: for each group ``plans``, with ``predicted`` and ``measured`` of each; those without
                a measurement are left out (``QuantConfig.plans_measured``)
    tolerance   plans whose measured errors differ by less, relatively, may come in either order
    """
    groups = [
        [p for p in group["plans"].values() if p["measured"] is not None]
        for group in statistics.values()
    ]
    return sum(_in_order(plans, tolerance) for plans in groups) / max(len(groups), 1)


def _in_order(plans: Sequence[Mapping[str, float]], tolerance: float) -> bool:
    return all(
        abs(a["measured"] - b["measured"]) <= tolerance * max(a["measured"], b["measured"])
        or (a["measured"] < b["measured"]) == (a["predicted"] < b["predicted"])
        for a, b in combinations(plans, 2)
    )


def rounding_noise(num_codes: int, qmax: int) -> float:
    """Mean squared rounding error of a coordinate, relative to its mean square, in a vector of K' Gaussian ones.

    The largest of them is about ``m = a + (0.58 - (ln ln 2K' + ln 4 pi) / 2) / a`` times the root mean square, with
    ``a = sqrt(2 ln 2K')``. A clip of 0.5 to 1 of that stands for the largest code, whichever gives the least of
    rounding within and cutting outside. e4m3 codes (448) have 3 bits of mantissa: their error is relative to a value.
    """
    if qmax == 448:
        return 7e-4
    doubled = 2 * max(num_codes, 2)
    a = math.sqrt(2 * math.log(doubled))
    largest = a + (0.5772 - (math.log(math.log(doubled)) + math.log(4 * math.pi)) / 2) / a

    def error(clip: float) -> float:
        threshold = clip * largest
        outside = math.erfc(threshold / math.sqrt(2))
        density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
        cut = (1 + threshold**2) * outside - 2 * threshold * density
        return (threshold / qmax) ** 2 / 12 + (cut if clip < 1 else 0)

    return min(error(percent / 100) for percent in range(50, 101, 5))


def _rounded_energy(
    fitted: GroupTransform, moment: Tensor, index: int
) -> tuple[float, Tensor | None]:
    """For tokens of a type, of the second moment [K, K] fp32 of their scaled channels: the mean of ``|z|^2``, their
    branch taken off, and the second moment [R, R] of the branch's coefficients (None without a branch).
    """
    left, right = factors_of_slice(fitted, fitted.slice_of_type[index])
    energy = float(kronecker_trace(moment, left, right))
    columns = columns_of_type(fitted, index)
    if columns is None:
        return energy, None
    # P U as [R, K]; z loses c U^T with c = u U. Of the same tokens as the energy, or it would lose more than it has.
    rows = columns.t().reshape(-1, left.shape[1], right.shape[0])
    directions = (left @ rows @ right.t()).flatten(1)
    inner = directions @ moment @ directions.t()
    lost = 2 * inner.trace() - (inner * (columns.t() @ columns)).sum()
    return max(energy - float(lost), 0.0), inner


def _dropped_moment(fitted: GroupTransform, moment: Tensor, at: int) -> Tensor | None:
    """Second moment [K, K] of what a slice drops of the scaled channels; None if it is as wide as K."""
    left, right = factors_of_slice(fitted, at)
    if left.shape[1] == left.shape[0]:
        return None
    others = torch.eye(left.shape[0], device=left.device) - left @ torch.linalg.pinv(left)
    eye = torch.eye(right.shape[0], device=left.device)
    half = kronecker(moment, others, eye)
    dropped = kronecker(half.t().contiguous(), others, eye)
    return dropped if fitted.channel_scale is None else scaled(dropped, 1 / fitted.channel_scale)
