"""What the measurements of a group (``GroupCheck``) say is wrong, and which operand it is.

An output is wrong beyond its rounding if it errs far more than rounding to nearest does on the same tokens. Measured
on healthy groups (six plans, 4, 8 and e4m3 bits, random models of two layers on 30 to 50 tokens) the ratio stays below
1.41 over all tokens and 1.53 for a type of token; on a real model of 120 groups and 512 tokens it is below 1. Against
what calibration measured on other tokens it stays below 2.1. The tokens of a type are at most 1.6 times as right as
another type in one group, over all groups at most 1.13 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checkpoint import fingerprint, same_fingerprint
from .group_check import SMALL_ERROR, Alternatives, GroupCheck, LinearCheck
from .result import Finding, GroupErrors, TypeErrors

# Of relative L2 errors; what healthy groups reach is in the module's docstring.
_TOO_FAR_FROM_NEAREST = 1.5  # all tokens together
_TOO_FAR_OF_TYPE = (
    2.0  # tokens of a type may be nearly one vector, whose rounding is a matter of luck
)
_TOO_FAR_OF_FEW = 3.0
_MEDIAN_TOO_FAR = 1.7  # over the channels: then all of them are wrong, not a few
_CHANNEL_TOO_FAR = 5.0
_TOO_FAR_FROM_CALIBRATED = 4.0
_ANOTHER_IS_BETTER = 2.0
_MISTYPED = 1.2
_FEWEST_TOKENS = 8  # to say anything of a type in one group
# Of a bias table's row, relative; the table is made in fp64 and kept in fp32.
_TABLE_TOLERANCE = 1e-4
_REPACK = "Calibrate anew, or convert the original again from a good checkpoint."


def errors_of(check: GroupCheck) -> GroupErrors:
    """A group's row in the result; errors in the running model are filled in later."""

    def relative(kind: str, row: int | None = None) -> float:
        sums = [getattr(linear, kind) for linear in check.linears]
        pick = slice(None) if row is None else slice(row, row + 1)
        error = sum(float(s.error[pick].sum()) for s in sums)
        energy = sum(float(s.energy[pick].sum()) for s in sums)
        if not math.isfinite(error):
            return math.inf
        return math.sqrt(error / energy) if energy else 0.0

    def calibrated(row: int | None) -> float | None:
        error = energy = 0.0
        for linear in check.linears:
            for r in check.seen if row is None else [row]:
                found = check.calibrated(linear.name, r)
                if found is None:
                    return None
                error += found**2 * float(linear.rounded.energy[r])
                energy += float(linear.rounded.energy[r])
        return math.sqrt(error / energy) if energy else None

    nearest = "nearest" if check.config.qmax else "exact"
    return GroupErrors(
        check.name,
        [linear.name for linear in check.linears],
        check.plan,
        check.state,
        check.num_tokens,
        relative("exact"),
        relative("rounded"),
        relative(nearest),
        calibrated(None),
        types={
            check.row_names[row]: TypeErrors(
                int(check.tokens_by_row[row]),
                relative("rounded", row),
                relative(nearest, row),
                calibrated(row),
            )
            for row in check.seen
        },
    )


# ---------------------------------------------------------------------------------------------- parts


def wrong_weight(
    linear: LinearCheck,
    stored: tuple[float, float, float] | None,
    exact_bias: bool,
    check: GroupCheck,
) -> Finding | None:
    """Whether the dense weight is the one that was packed, and the bias table the one that follows from it."""
    assert linear.weight is not None
    dense = linear.weight.detach()
    if stored is not None and not same_fingerprint(fingerprint(dense), stored):
        return Finding(
            "parts",
            linear.name,
            "its dense weight must be the one that was calibrated (fingerprint)",
            "another: it was changed since, or the checkpoint is of another model",
            "Calibrate this model, or load the weights that were calibrated.",
        )
    table = linear.packed.bias_table
    if table is None or not exact_bias:
        return None
    want = check.transform.bias_table(dense, linear.bias)
    if want is None:
        return None
    norm = want.norm(dim=1).clamp_min(1e-6 * float(dense.norm()))
    rows = (table - want).norm(dim=1) / norm
    wrong = [i for i, r in enumerate(rows.tolist()) if not r <= _TABLE_TOLERANCE]
    if not wrong:
        return None
    names = ", ".join(check.row_names[i] for i in wrong)
    worst = max(rows.tolist(), key=lambda r: math.inf if math.isnan(r) else r)
    return Finding(
        "parts",
        linear.name,
        "its bias table must be mu_t W + b",
        f"rows of the types {names} that are off by {worst:.2g} (relative)",
        _REPACK,
    )


# ---------------------------------------------------------------------------------------------- transforms


def wrong_transform(check: GroupCheck, tolerance: float) -> Finding | None:
    """Whether a group gives what it gave, without rounding. A slice narrower than K drops something: not asked."""
    if not check.is_exact:
        return None
    worst = max(check.linears, key=lambda linear: linear.exact.relative())
    error = worst.exact.relative()
    if error <= tolerance:
        return None
    conditions = ", ".join(f"{name} {c:.1e}" for name, c in _conditions(check).items())
    return Finding(
        "transforms",
        check.name,
        f"with quantisers off its outputs must be the original's within {tolerance:.0e}",
        f"{error:.2g} ({worst.name}); condition numbers of its factors: {conditions}",
        "Its transform does not invert: calibrate anew.",
    )


def _conditions(check: GroupCheck) -> dict[str, float]:
    t = check.transform
    found, start = {}, 0
    for index, width in enumerate(t.widths):
        left = t.left[:, start : start + width].double()
        found[f"left[{index}]"] = float(torch.linalg.cond(left))
        found[f"right[{index}]"] = float(torch.linalg.cond(t.right[index].double()))
        start += width
    return found


# ---------------------------------------------------------------------------------------------- rounding


def misfits(check: GroupCheck, trusted: Sequence[LinearCheck]) -> list[Finding]:
    """Outputs that are wrong beyond their rounding. ``trusted``: the Linears nothing is known to be wrong with."""
    findings = []
    wrong: dict[str, list[int]] = {}
    for linear in trusted:
        by_channel, nearest = linear.rounded_by_channel, linear.nearest_by_channel
        relative = (by_channel.error / by_channel.energy.clamp_min(1e-30)).sqrt()
        # Where tokens are nearly one vector, a channel's error is one random number, which may be 0 by luck: what is
        # usual for a channel counts, too.
        usual = (nearest.error / nearest.energy.clamp_min(1e-30)).sqrt()
        expected = usual.clamp_min(float(usual.square().mean().sqrt()))
        ratio = relative / expected.clamp_min(1e-30)
        bad = ~((ratio <= _CHANNEL_TOO_FAR) | (relative <= SMALL_ERROR))
        channels = bad.nonzero().flatten().tolist()
        is_few = len(channels) <= max(1, len(bad) // 4)
        if channels and is_few and float(ratio.median()) <= _MEDIAN_TOO_FAR:
            findings.append(_wrong_channels(check, linear, channels, relative))
            continue
        error, nearest_error = linear.rounded.relative(), linear.nearest.relative()
        if channels or not error <= max(_TOO_FAR_FROM_NEAREST * nearest_error, SMALL_ERROR):
            wrong[linear.name] = check.seen
        if types := [r for r in check.seen if _is_far(check, linear, r)]:
            # A type is to blame if its tokens alone go wrong: the others are about as right as the nearest.
            others = [r for r in check.seen if r not in types]
            healthy = any(_ratio(linear, r) <= _TOO_FAR_FROM_NEAREST for r in others)
            wrong[linear.name] = types if healthy else check.seen
    if not wrong:
        return findings
    types = sorted({r for rows in wrong.values() for r in rows})
    worst = max(trusted, key=lambda linear: linear.rounded.relative())
    measured = (
        f"{worst.rounded.relative():.2g} of {worst.name}, where rounding to nearest costs "
        f"{worst.nearest.relative():.2g}"
    )
    if len(types) < len(check.seen):
        names = ", ".join(check.row_names[r] for r in types)
        clips = ", ".join(f"{float(check.transform.clip[r]):.2g}" for r in types)
        rule = f"tokens of type {names} must be as right as their rounding allows, like the others"
        way_out = (
            f"Its rows of these types (shift, clip [{clips}], slice, branch) are wrong. {_REPACK}"
        )
    else:
        rule = "its outputs must be as right as their rounding allows"
        way_out = (
            "Its packed weights were not made under this transform (Q no longer inverts P): one of them was changed. "
            f"{_REPACK}"
        )
    whole = len(wrong) == len(check.linears)
    place = check.name if whole else ", ".join(wrong)
    return [*findings, Finding("rounding", place, f"plan {check.plan}: {rule}", measured, way_out)]


def _is_far(check: GroupCheck, linear: LinearCheck, row: int) -> bool:
    error, nearest = linear.rounded.relative(row), linear.nearest.relative(row)
    is_few = int(check.tokens_by_row[row]) < _FEWEST_TOKENS
    factor = _TOO_FAR_OF_FEW if is_few else _TOO_FAR_OF_TYPE
    return not error <= max(factor * nearest, SMALL_ERROR)


def _ratio(linear: LinearCheck, row: int) -> float:
    return linear.rounded.relative(row) / max(linear.nearest.relative(row), 1e-30)


def _wrong_channels(
    check: GroupCheck, linear: LinearCheck, channels: list[int], relative: Tensor
) -> Finding:
    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    worst = max(channels, key=lambda n: float(relative[n]))
    return Finding(
        "rounding",
        linear.name,
        "its output channels must be as right as their rounding allows",
        f"{float(relative[worst]):.2g} in channel {worst} ({len(channels)} wrong: {shown}); "
        f"{_what_of_row(check, linear, worst)}",
        f"Rows of its packed weight or scale were changed. {_REPACK}",
    )


def _what_of_row(check: GroupCheck, linear: LinearCheck, row: int) -> str:
    """Which operand of an output channel does not fit the dense weight."""
    assert linear.weight is not None
    t = check.transform
    rest, _ = t.split_branch(t.transformed_weight(linear.weight.detach()[row : row + 1].float()))
    codes = check.codes_of(linear)[row]
    sizes = [width * t.right.shape[-1] for width in t.widths]
    for index, (want, own) in enumerate(
        zip(rest[0].float().split(sizes), codes.split(sizes), strict=True)
    ):
        scale = linear.packed.weight_scale[index, row]
        factor = float((want @ own) / (own @ own).clamp_min(1e-30))
        left = (want - factor * own).norm() / want.norm().clamp_min(1e-30)
        if abs(math.log(max(factor, 1e-30) / max(float(scale), 1e-30))) > 0.3 and left < 0.4:
            return f"weight_scale[{index}, {row}] is {float(scale) / factor:.2g} times what fits its codes"
    steps = torch.cat(
        [s.expand(n) for s, n in zip(linear.packed.weight_scale[:, row], sizes, strict=True)]
    )
    off = ((rest[0].float() / steps.clamp_min(1e-30)).clamp(-7, 7) - codes).abs() > 3
    words = (off.nonzero().flatten() // 8).unique().tolist()
    if 0 < len(words) <= 2:
        return f"weight_packed[{row}, {words[0]}] does not hold its codes"
    return f"weight_packed[{row}] does not hold its codes"


def unlike_calibration(check: GroupCheck, errors: GroupErrors) -> Finding | None:
    """Whether a type errs far more than calibration measured, although its operands fit."""
    far = {
        name: e
        for name, e in errors.types.items()
        if e.calibrated is not None
        and e.tokens >= _FEWEST_TOKENS
        and name not in check.statistics.get("rare_types", ())
        and not e.local <= max(_TOO_FAR_FROM_CALIBRATED * e.calibrated, 5 * SMALL_ERROR)
    }
    if not far:
        return None
    worst = max(far, key=lambda name: far[name].local)
    return Finding(
        "rounding",
        check.name,
        f"plan {check.plan}: tokens of type {worst} must be about as right as calibration measured "
        f"({far[worst].calibrated:.2g})",
        f"{far[worst].local:.2g} on {far[worst].tokens} tokens",
        "These inputs are unlike those of the calibration, or its checkpoint is of another model: calibrate on "
        "inputs like these.",
    )


# ---------------------------------------------------------------------------------------------- types


def better_elsewhere(check: GroupCheck) -> Finding | None:
    """Whether, in this group, the tokens of a type would be far more right in another slice, or as another type."""
    rare = check.statistics.get("rare_types", ())
    for alternatives, choices, what in (
        (check.in_slices, [f"slice {i}" for i in range(len(check.transform.widths))], "slice"),
        (check.as_types, [f"type {n}" for n in check.config.type_names], "type"),
    ):
        joined = join(alternatives)
        if joined is None:
            continue
        for row in joined.types.unique().tolist():
            if what == "type" and row == check.config.sink_index:
                continue
            mine = joined.types == row
            name = check.row_names[row]
            own = math.sqrt(float(joined.own[mine].mean()))
            others = joined.others[mine].mean(0).sqrt()
            if what == "type" and check.config.sink_index is not None:
                others[check.config.sink_index] = math.inf
            best = int(others.argmin())
            if int(mine.sum()) < _FEWEST_TOKENS or name in rare or own <= SMALL_ERROR:
                continue
            if own <= _ANOTHER_IS_BETTER * float(others[best]):
                continue
            has = (
                f"slice {check.transform.slice_of_type[row]}" if what == "slice" else f"type {name}"
            )
            table = (
                "slice_of_type or widths"
                if what == "slice"
                else "shift, bias_table, branch or slice_of_type"
            )
            return Finding(
                "types",
                check.name,
                f"plan {check.plan}: tokens of type {name} must be most right as they run, in {has}",
                f"an error of {own:.2g}, and {float(others[best]):.2g} in {choices[best]}"
                if what == "slice"
                else f"an error of {own:.2g}, and {float(others[best]):.2g} as {choices[best]}",
                f"Rows of its tables ({table}) are exchanged. {_REPACK}",
            )
    return None


def join(parts: Sequence[Alternatives]) -> Alternatives | None:
    """The alternatives of several calls as one; None if there are none."""
    if not parts:
        return None
    return Alternatives(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("tokens", "types", "own", "others")
        )
    )


def mistyped(checks: Sequence[GroupCheck]) -> Finding | None:
    """Whether tokens behave as another type than they run as: over all groups, as that type they are far more right."""
    summed: dict[int, list[Alternatives]] = {}
    for check in checks:
        for number, alternatives in enumerate(check.as_types):
            summed.setdefault(number, []).append(alternatives)
    names = checks[0].config.type_names if checks else ()
    # What the sink is is a matter of position: other tokens may behave like it, and it like them.
    sink = checks[0].config.sink_index if checks else None
    rare = {n for check in checks for n in check.statistics.get("rare_types", ())}
    pairs: dict[tuple[int, int], list[int]] = {}
    for call in summed.values():
        like = [
            a
            for a in call
            if len(a.tokens) == len(call[0].tokens) and torch.equal(a.types, call[0].types)
        ]
        floor = SMALL_ERROR**2
        gain = torch.stack(
            [((a.own[:, None] + floor) / (a.others + floor)).log() for a in like]
        ).mean(0)
        if sink is not None:
            gain[:, sink] = 0
        best, at = gain.max(1)
        wrong = best > 2 * math.log(_MISTYPED)
        for index in wrong.nonzero().flatten().tolist():
            own, better = int(like[0].types[index]), int(at[index])
            if own != sink and names[own] not in rare:
                pairs.setdefault((own, better), []).append(int(like[0].tokens[index]))
    if not pairs:
        return None
    texts = []
    for (own, better), tokens in sorted(pairs.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, tokens[:8])) + (", ..." if len(tokens) > 8 else "")
        texts.append(
            f"{len(tokens)} tokens of type {names[own]} behave as {names[better]} (tokens {shown})"
        )
    found = {names[i] for pair in pairs for i in pair}
    return Finding(
        "types",
        f"token types {', '.join(n for n in names if n in found)}",
        "tokens must run as the type that they behave as",
        "; ".join(texts),
        "Their types are wrong: look at TokenTypes (ids exchanged?) and at what token_types() hands in; explain() "
        "shows where types come from.",
    )
