"""The picture of a ``Verification``: how the error grows from group to group."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from .result import GroupErrors, Verification

# Okabe and Ito's colours, which the colour-blind tell apart; lines differ in their style as well.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
_LEAST = 1e-8  # what is drawn for an error of 0


def plot(verification: Verification, path: str | Path) -> None:
    """See ``Verification.plot``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Verification.plot: drawing needs matplotlib, which is not installed. Install "
            "freeact_fx[bench], or take the numbers from to_dict()."
        ) from error
    groups = verification.groups
    if not groups:
        raise ConfigError(
            "Verification.plot: no group's error was measured, for there was no float original to measure it "
            "against. Give verify the original model: dense=."
        )
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    errors, types = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    lines = (
        ("accumulated", "in the running model", _BLUE, "-", 2.0),
        ("local", "of the group alone (float input)", _ORANGE, "-", 1.5),
        ("nearest", "rounding to nearest, same tokens", _GREY, "--", 1.2),
        ("calibrated", "measured by calibration", _GREEN, ":", 1.5),
        ("transform_accumulated", "quantisers off, running", _BLUE, "-.", 1.0),
        ("transform_local", "quantisers off, alone", _RED, "-.", 1.0),
    )
    for attribute, label, colour, style, width in lines:
        values = [getattr(group, attribute) for group in groups]
        if any(value is not None for value in values):
            _line(errors, values, label, colour, style, width)
    for at, group in enumerate(groups):
        stages = {f.stage for f in verification.findings if f.place in (group.name, *group.members)}
        if stages:
            errors.axvline(at, color=_RED, alpha=0.35, linewidth=6, zorder=0)
            errors.annotate(
                f"{group.name}: {', '.join(sorted(stages))}",
                (at, 1.01),
                xycoords=("data", "axes fraction"),
                color=_RED,
                ha="center" if 0.2 < at / len(groups) < 0.8 else "left" if at == 0 else "right",
                fontsize=8,
            )
    errors.axhline(verification.tolerance, color=_RED, linewidth=0.5)
    errors.set_yscale("log")
    errors.set_ylabel("relative error of outputs")
    # Above the axes: inside them it would lie on a line.
    above: dict[str, Any] = {
        "fontsize": 8,
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "frameon": False,
    }
    errors.legend(ncols=3, **above)
    first = verification.first_culprit
    verdict = "ok" if first is None else f"first culprit: {first.place} ({first.stage})"
    figure.suptitle(f"{verification.model}: {verdict}", fontsize=11)

    for (name, found), marker in zip(verification.types.items(), "osv^Dx+*" * 8, strict=False):
        values = [g.types[name].local if name in g.types else None for g in groups]
        _line(types, values, f"{name} ({found.tokens} tokens)", None, "-", 1.0, marker)
    types.set_ylabel("local error by type")
    types.set_ylim(bottom=0)
    types.legend(ncols=8, **above)
    types.set_xlabel("group, in the order of the model")
    ticks = _layer_starts(groups)
    types.set_xticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    types.set_xlim(-0.5, len(groups) - 0.5)
    for axes in (errors, types):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _line(
    axes: Any,
    values: list[float | None],
    label: str,
    colour: str | None,
    style: str,
    width: float,
    marker: str | None = None,
) -> None:
    known = [(at, max(v, _LEAST)) for at, v in enumerate(values) if v is not None]
    xs, ys = [at for at, _ in known], [v for _, v in known]
    marker = marker or ("." if len(known) < 60 else None)
    axes.plot(
        xs, ys, style, color=colour, label=label, linewidth=width, marker=marker, markersize=3
    )


def _layer_starts(groups: list[GroupErrors]) -> list[tuple[int, str]]:
    """Where each layer begins, by the first number in its name; where there are none, every group."""
    starts: list[tuple[int, str]] = []
    for at, group in enumerate(groups):
        found = re.match(r"(.*?\.(\d+))(\.|$)", group.name)
        label = found[2] if found else group.name.rpartition(".")[2]
        before = re.match(r"(.*?\.(\d+))(\.|$)", groups[at - 1].name) if at else None
        if not (found and before and found[1] == before[1]):
            starts.append((at, label))
    step = -(-len(starts) // 40)
    return starts[::step]
