"""Fit a group: candidate plans within the budget, the predictor's order, the best few measured, the codes of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .config import QuantConfig
from .errors import ConfigError
from .moments import GroupMoments
from .plans import fit_transform, with_branch
from .predict import ErrorsByLinear, mean_error, predicted_errors
from .refine import refine
from .round_group import (
    RoundedLinear,
    Sample,
    WeightSide,
    measured_errors,
    round_group,
    search_clip,
    weight_sides,
)
from .statistics import GroupStatistics
from .transform import GroupTransform, PackedLinear

# Ends the label of a plan that treats all types alike.
_ALIKE = ", types alike"


@dataclass(frozen=True)
class Candidate:
    """A plan fitted to a group. ``branch`` comes twice: with shared columns, and with own columns by type.

    moments  that it was fitted to; with ``auto`` a shifted plan comes with types and without (``_ALIKE``)
    fitted   has a row for each type in any case
    """

    label: str
    moments: GroupMoments
    fitted: GroupTransform
    sides: list[WeightSide]
    predicted: ErrorsByLinear
    predicted_mean: float

    @property
    def is_alike(self) -> bool:
        """Whether all types are treated alike: their rows agree, and are kept as one."""
        return self.label.endswith(_ALIKE)


@dataclass(frozen=True)
class Measured:
    """A candidate with its codes, and the errors that they make on the held-out tokens."""

    candidate: Candidate
    linears: list[RoundedLinear]
    errors: ErrorsByLinear
    error: float  # their mean


def fit_group(
    statistics: GroupStatistics,
) -> tuple[GroupTransform, list[PackedLinear], dict[str, Any]]:
    """Fit the group's plan, or with ``plan="auto"`` the best of those that ``memory_budget`` pays for.

    All candidates are fitted, to moments without the held-out tokens, and ordered by their predicted error. The first
    ``QuantConfig.plans_measured`` of them are rounded to nearest and measured on the held-out tokens, which ranks them
    as GPTQ would at a fraction of the time. The best one and ``single`` are then treated alike, refined (if
    ``refine_steps`` says so) and given their codes, and the better of the two is kept: so ``auto`` is never worse than
    ``single`` on those tokens.

    Returns the transform, the packed Linears in the order of ``statistics.names``, and what the checkpoint keeps:
    ``predicted`` and ``error`` (measured) by Linear and type, relative to ``energy``, the mean squared norm of the
    type's outputs; and ``plans``, for each both as means (``mean_error``), to nearest.
    Raises ConfigError if the plan leaves no room.
    """
    config = statistics.config
    moments = GroupMoments.of(statistics.without_held_out())
    candidates = _fitted(_plans(moments), moments)
    if config.plan == "auto" and config.num_types > 1:
        alike = moments.alike()
        plans = {n: r for n, r in _plans(alike).items() if n in ("shift", "branch")}
        candidates += [replace(c, label=c.label + _ALIKE) for c in _fitted(plans, alike)]
    candidates.sort(key=lambda candidate: candidate.predicted_mean)
    held_out = Sample.of(statistics, held_out=True)

    def round_(candidate: Candidate, *, by_gptq: bool) -> Measured:
        linears = round_group(candidate.fitted, candidate.sides, candidate.moments, by_gptq=by_gptq)
        if candidate.is_alike:
            linears = [replace(r, bias_table=_first_for_all(r.bias_table)) for r in linears]
        errors = measured_errors(candidate.fitted, linears, held_out)
        return Measured(candidate, linears, errors, mean_error(errors, moments))

    def clipped(candidate: Candidate) -> Candidate:
        # The weight side does not depend on clips.
        if not config.clip_search:
            return candidate
        fitted = search_clip(candidate.fitted, candidate.moments.statistics)
        return replace(candidate, fitted=fitted)

    tried = [round_(clipped(c), by_gptq=False) for c in candidates[: config.plans_measured]]
    best = min(tried, key=lambda m: m.error)
    finalists = [best]
    if config.plan == "auto" and best.candidate.label != "single":
        finalists += [m for m in tried if m.candidate.label == "single"] or [
            round_(clipped(c), by_gptq=False) for c in candidates if c.label == "single"
        ]
    for candidate in [m.candidate for m in finalists]:
        refined = refine(candidate.fitted, candidate.moments.statistics)
        if refined is not candidate.fitted:
            if candidate.is_alike:
                refined = replace(refined, clip=_first_for_all(refined.clip))
            candidate = _candidate(candidate.label, refined, candidate.moments)
            finalists.append(round_(candidate, by_gptq=False))
    if config.gptq:
        finalists += [round_(m.candidate, by_gptq=True) for m in finalists]
    best = min(finalists, key=lambda m: m.error)
    measured = {m.candidate.label: m.error for m in tried}
    names = config.row_names
    report = {
        "error": best.errors,
        "predicted": best.candidate.predicted,
        "energy": {
            name: {names[t]: energies[j] for t, energies in moments.energies.items()}
            for j, name in enumerate(statistics.names)
        },
        "plans": {
            c.label: {"predicted": c.predicted_mean, "measured": measured.get(c.label)}
            for c in candidates
        },
    }
    fitted, packed = best.candidate.fitted, [linear.packed() for linear in best.linears]
    if best.candidate.is_alike:
        return fitted.alike(), [linear.alike() for linear in packed], report
    return fitted, packed, report


def _plans(moments: GroupMoments) -> dict[str, int]:
    """The plans to fit, by label, with the rank of their branch."""
    config = moments.statistics.config
    num_slices = len(moments.slices()[0])
    rank = moments.statistics.branch_rank()
    # A branch of one type's own is a shared one.
    own_rank = rank - rank % config.num_types if config.num_types > 1 else 0
    found = {"single": 0, "shift": 0}
    # With one slice these are single and shift.
    if (num_slices > 1 or config.plan == "paper") and num_slices <= moments.shape[0]:
        found["paper"] = 0
    if 1 < num_slices <= config.memory_budget or config.plan == "duplicate":
        found["duplicate"] = 0
    if rank:
        found["branch"] = rank
    if own_rank:
        found["own branch"] = own_rank
    if config.plan == "auto":
        return found
    found = {label: rank for label, rank in found.items() if label.endswith(config.plan)}
    if not found:
        raise ConfigError(_no_room(moments.statistics.names[0], config, moments))
    return found


def _no_room(name: str, config: QuantConfig, moments: GroupMoments) -> str:
    if config.plan == "branch":
        return (
            f"calibrate: {name}: QuantConfig.memory_budget={config.memory_budget} leaves no room for a "
            f"branch. Raise it, or choose plan='auto'."
        )
    return (
        f"calibrate: {name}: QuantConfig.plan='paper' has room for {moments.shape[0]} token types here, one for each "
        f"column of the left factor, got {len(moments.slices()[0])}. Choose plan='auto'."
    )


def _fitted(plans: dict[str, int], moments: GroupMoments) -> list[Candidate]:
    candidates, shifted = [], None
    for label, rank in plans.items():
        if rank or label == "shift":
            shifted = shifted or fit_transform("shift", moments)
            fitted = shifted
        else:
            fitted = fit_transform(label, moments)
        if rank:
            fitted = with_branch(fitted, moments, rank, own=label == "own branch")
        candidates.append(_candidate(label, fitted, moments))
    return candidates


def _first_for_all(table: Tensor | None) -> Any:
    """A table [P, ..], with the first type's row for all tokens: alone that row was fitted to them."""
    return None if table is None else table[:1].expand_as(table).clone()


def _candidate(label: str, fitted: GroupTransform, moments: GroupMoments) -> Candidate:
    sides = weight_sides(fitted, moments.statistics)
    rest = [side.rest for side in sides]
    branches = [side.branch for side in sides if side.branch is not None]
    predicted = predicted_errors(fitted, rest, moments, branches)
    return Candidate(label, moments, fitted, sides, predicted, mean_error(predicted, moments))
