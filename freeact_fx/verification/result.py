"""What ``freeact_fx.verify`` found: findings first, then the errors of every group, type and plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
# In the order in which they are answered; a fault of one shows in those after it.
STAGES = ("parts", "transforms", "rounding", "types", "passes", "lowering", "engine")
_QUESTIONS = {
    "parts": "weights, tables and token types are those that were calibrated",
    "transforms": "quantisers off, every group gives what it gave",
    "rounding": "quantisers on, every group is as wrong as its rounding explains",
    "types": "tokens run as the type that they behave as",
    "passes": "the rewritten graph computes what the reference does",
    "lowering": "Inductor computes what the rewritten graph does",
    "engine": "the engine's integer products are exact",
}
_MOST_ROWS = 40


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    stage    one of ``STAGES``
    place    a group or Linear by its name, or what else it is about
    rule     what should be
    value    what is
    way_out  what to do
    """

    stage: str
    place: str
    rule: str
    value: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}, got {self.value}. {self.way_out}"


@dataclass(frozen=True)
class Unchecked:
    """What could not be checked, and how to have it checked."""

    stage: str
    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}. {self.way_out}"


@dataclass
class TypeErrors:
    """Relative L2 errors of one type's outputs in a group, without biases.

    tokens       how many
    local        with the float model's activation as input
    nearest      what rounding to nearest costs on the same tokens
    calibrated   what calibration measured on tokens that it had held out, or None
    accumulated  in the running model, or None
    """

    tokens: int
    local: float
    nearest: float
    calibrated: float | None = None
    accumulated: float | None = None


@dataclass
class GroupErrors:
    """Relative L2 errors of one group's outputs, in the order in which the model reaches them.

    transform_local        quantisers off, with the float model's activation as input
    transform_accumulated  quantisers off, in the running model, or None
    local                  quantisers on, with the float model's activation as input
    nearest                what rounding to nearest costs on the same tokens
    calibrated             what calibration measured, weighted by the types of these tokens, or None
    accumulated            quantisers on, in the running model, or None
    """

    name: str
    members: list[str]
    plan: str
    state: str
    tokens: int
    transform_local: float
    local: float
    nearest: float
    calibrated: float | None = None
    transform_accumulated: float | None = None
    accumulated: float | None = None
    types: dict[str, TypeErrors] = field(default_factory=dict)


@dataclass
class Verification:
    """Where a quantised model leaves its float original; ``str()`` is a table, ``to_dict()`` plain JSON.

    model       class of the model
    findings    what is wrong, the first culprit first; empty: nothing
    unchecked   what could not be checked
    groups      errors by group, in the order of the model
    output      relative L2 error of the model's outputs by run: "transformed" (quantisers off), "quantised" (without
                Inductor), "compiled"; what was not run is not there
    tolerance   of a group's outputs with quantisers off
    tolerance_of_output  of the model's outputs with quantisers off
    """

    model: str
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)
    groups: list[GroupErrors] = field(default_factory=list)
    output: dict[str, float] = field(default_factory=dict)
    tolerance: float = 1e-4
    tolerance_of_output: float = 1e-4

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def first_culprit(self) -> Finding | None:
        return self.findings[0] if self.findings else None

    def of_stage(self, stage: str) -> list[Finding]:
        return [f for f in self.findings if f.stage == stage]

    @property
    def types(self) -> dict[str, TypeErrors]:
        """Errors by type of token over all groups: groups count alike."""
        return {
            name: _mean([g.types[name] for g in self.groups if name in g.types])
            for name in dict.fromkeys(name for g in self.groups for name in g.types)
        }

    @property
    def plans(self) -> dict[str, dict[str, float]]:
        """By plan: ``groups``, and the means of ``local`` and ``nearest``."""
        found: dict[str, list[GroupErrors]] = {}
        for group in self.groups:
            found.setdefault(group.plan, []).append(group)
        return {
            plan: {
                "groups": len(groups),
                "local": _rms([g.local for g in groups]),
                "nearest": _rms([g.nearest for g in groups]),
            }
            for plan, groups in found.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """``{"version", "ok", "findings", "unchecked", "groups", "types", "plans", "output", ...}``; a stable schema.

        A number that is not finite is given as text, which JSON has no numbers for.
        """
        data = {
            "version": SCHEMA_VERSION,
            "ok": self.ok,
            **asdict(self),
            "types": {name: asdict(errors) for name, errors in self.types.items()},
            "plans": self.plans,
        }
        plain: dict[str, Any] = _finite(data)
        return plain

    # ------------------------------------------------------------------ text

    def __str__(self) -> str:
        lines = [self._verdict(), ""]
        for stage in STAGES:
            lines.append(f"  {self._state(stage):11}  {stage:10}  {_QUESTIONS[stage]}")
        errors = ", ".join(f"{run} {error:.2g}" for run, error in self.output.items())
        if errors:
            lines += ["", f"error of the model's outputs: {errors}"]
        if self.findings:
            lines += ["", f"{len(self.findings)} findings, the first is the first culprit:"]
            lines += [f"  [{f.stage}] {f}" for f in self.findings]
        if self.unchecked:
            lines += ["", "not checked:", *(f"  {u}" for u in self.unchecked)]
        if self.groups:
            lines += ["", *self._group_table(), "", *self._summary_table()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        first = self.first_culprit
        if first is not None:
            return f"{self.model}: FAILED at {first.stage}. First culprit: {first.place}"
        return f"{self.model}: ok" + (", as far as it could be checked" if self.unchecked else "")

    def _state(self, stage: str) -> str:
        if self.of_stage(stage):
            return "FAILED"
        return "not checked" if any(u.stage == stage for u in self.unchecked) else "ok"

    def _group_table(self) -> list[str]:
        flagged = {f.place for f in self.findings}
        shown = self.groups
        left_out = ""
        if len(shown) > _MOST_ROWS:
            named = [g for g in shown if flagged & {g.name, *g.members}]
            by_ratio = sorted(shown, key=lambda g: -g.local / max(g.nearest, 1e-9))
            kept = {id(g) for g in [*named[:_MOST_ROWS], shown[0], *by_ratio[:9], shown[-1]]}
            shown = [g for g in shown if id(g) in kept]
            left_out = f", {len(shown)} of {len(self.groups)} shown (all: to_dict())"
        rows = [
            (
                ("> " if flagged & {g.name, *g.members} else "  ") + g.name,
                g.plan,
                _number(g.transform_local),
                _number(g.local),
                _number(g.nearest),
                _number(g.calibrated),
                _number(g.accumulated),
            )
            for g in shown
        ]
        header = (
            "  group",
            "plan",
            "transform",
            "local",
            "nearest",
            "calibrated",
            "accumulated",
        )
        return [f"relative errors by group{left_out}:", *_table(header, rows)]

    def _summary_table(self) -> list[str]:
        rows = [
            (f"  type {name}", str(e.tokens), *map(_number, (e.local, e.nearest, e.calibrated)))
            for name, e in self.types.items()
        ]
        rows += [
            (f"  plan {n}", f"{p['groups']} groups", _number(p["local"]), _number(p["nearest"]), "")
            for n, p in self.plans.items()
        ]
        return _table(("  by type and plan", "tokens", "local", "nearest", "calibrated"), rows)

    # ------------------------------------------------------------------ picture

    def plot(self, path: str | Path) -> None:
        """Draw the error's growth over the groups, in the order of the model, into a picture (PNG, SVG, PDF).

        Raises ImportError without matplotlib, ConfigError if nothing was measured.
        """
        from .plot import plot

        plot(self, path)


def _mean(errors: list[TypeErrors]) -> TypeErrors:
    def known(name: str) -> float | None:
        values = [v for e in errors if (v := getattr(e, name)) is not None]
        return _rms(values) if values else None

    return TypeErrors(
        max(e.tokens for e in errors),
        _rms([e.local for e in errors]),
        _rms([e.nearest for e in errors]),
        known("calibrated"),
        known("accumulated"),
    )


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / max(len(values), 1))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
