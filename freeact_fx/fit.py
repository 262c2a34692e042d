"""Fit a group's transform to its statistics, and its packed weights: plans, clips by type, codes, measured errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .closed_form import fit_transform, transformed_moment
from .errors import ConfigError
from .reference import branch_product, quantize_tokens, rows_of_type, transform, unpack_int4
from .statistics import GroupStatistics
from .transform import GroupTransform, PackedLinear, pack_linear

PLANS_TO_FIT = ("single", "shift", "branch")
_CLIPS = torch.linspace(0.5, 1.0, 11).tolist()


def fit_group(
    statistics: GroupStatistics,
) -> tuple[GroupTransform, list[PackedLinear], dict[str, Any]]:
    """Fit each plan that may be chosen, keep the one with the least error on the sample, and choose its codes well."""
    config = statistics.config
    device = statistics.weights[0].device
    gram, means = statistics.gram().to(device), statistics.means().to(device)
    best: tuple[float, GroupTransform, list[PackedLinear], dict[str, Any]] | None = None
    for plan in PLANS_TO_FIT if config.plan == "auto" else (config.plan,):
        rank = statistics.branch_rank() if plan == "branch" else 0
        if plan == "branch" and not rank:
            continue
        moment = statistics.mixture(gram, centred=plan != "single")
        fitted = fit_transform(plan, means, moment, gram, config, rank)
        if config.clip_search:
            fitted = replace(fitted, clip=_search_clip(fitted, statistics))
        packed = _pack(fitted, statistics, None)
        errors = _measure(fitted, packed, statistics)
        if best is None or _mean_error(errors) < best[0]:
            best = (_mean_error(errors), fitted, packed, errors)
    if best is None:
        raise ConfigError(
            f"calibrate: {statistics.names[0]}: QuantConfig.memory_budget={config.memory_budget} leaves no "
            f"room for a branch. Raise it, or choose plan='auto'."
        )
    error, fitted, packed, errors = best
    if config.gptq:
        # Plans are compared rounded to nearest, which ranks them alike at a fraction of the time.
        moment = statistics.mixture(gram, centred=fitted.shift is not None)
        repacked = _pack(fitted, statistics, transformed_moment(fitted, moment))
        remeasured = _measure(fitted, repacked, statistics)
        if _mean_error(remeasured) < error:
            packed, errors = repacked, remeasured
    return fitted, packed, errors


def _pack(
    fitted: GroupTransform, statistics: GroupStatistics, hessian: Tensor | None
) -> list[PackedLinear]:
    return [
        pack_linear(
            fitted,
            weight.detach().float(),
            None if bias is None else bias.detach().float(),
            statistics.config,
            hessian,
        )
        for weight, bias in zip(statistics.weights, statistics.biases, strict=True)
    ]


def _mean_error(errors: dict[str, dict[str, float]]) -> float:
    """Relative error of a group: types count alike, and so do its Linears."""
    return sum(sum(by_type.values()) / len(by_type) for by_type in errors.values()) / len(errors)


def _search_clip(fitted: GroupTransform, statistics: GroupStatistics) -> Tensor:
    """The clip of each type with the least squared error on the sample, in transformed coordinates.

    Why not of the outputs: the transform has made all coordinates matter about equally, and this is far cheaper.
    """
    clip = fitted.clip.clone()
    tokens, types = (t.to(clip.device) for t in statistics.samples())
    seen = types.unique().tolist()
    for index in seen:
        z, _ = _transformed(fitted, tokens[types == index], types[types == index])
        errors = []
        for candidate in _CLIPS:
            ratio = torch.tensor([candidate], device=clip.device)
            codes, scale = quantize_tokens(z, ratio, statistics.config.qmax)
            errors.append(float((codes.float() * scale - z).square().sum()))
        clip[index] = _CLIPS[errors.index(min(errors))]
    clip[-1] = max(clip[i] for i in seen)
    return clip


def _transformed(
    fitted: GroupTransform, tokens: Tensor, types: Tensor
) -> tuple[Tensor, Tensor | None]:
    return transform(
        tokens,
        types,
        fitted.shift,
        fitted.channel_scale,
        fitted.left,
        fitted.right,
        fitted.lowrank,
        fitted.widths,
        fitted.slice_of_type,
        0,
        fitted.own_rank,
    )


def _measure(
    fitted: GroupTransform, packed: list[PackedLinear], statistics: GroupStatistics
) -> dict[str, dict[str, float]]:
    """Squared error of each Linear's outputs on the sample, relative to their energy, by type name."""
    names = (*statistics.config.type_names, "untyped")
    tokens, types = (t.to(fitted.left.device) for t in statistics.samples())
    z, coefficients = _transformed(fitted, tokens, types)
    codes, scale = quantize_tokens(
        z, rows_of_type(fitted.clip, types, 0).unsqueeze(1), statistics.config.qmax
    )
    errors: dict[str, dict[str, float]] = {}
    for name, weight, bias, linear in zip(
        statistics.names, statistics.weights, statistics.biases, packed, strict=True
    ):
        want = tokens @ weight.detach().float().t()
        dequantized = (
            unpack_int4(linear.weight, codes.shape[1]).float() * linear.weight_scale[0][:, None]
        )
        got = (codes.float() * scale) @ dequantized.t()
        if coefficients is not None:
            assert linear.branch_weight is not None
            assert linear.branch_scale is not None
            got = got + branch_product(coefficients, linear.branch_weight, linear.branch_scale)
        if linear.bias_table is not None:
            got = got + linear.bias_table[types] - (0 if bias is None else bias.detach().float())
        difference, energy = (got - want).square().sum(1), want.square().sum(1)
        errors[name] = {
            names[i]: float(
                difference[types == i].sum() / energy[types == i].sum().clamp_min(1e-30)
            )
            for i in types.unique().tolist()
        }
    return errors
