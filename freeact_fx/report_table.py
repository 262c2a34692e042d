"""A report in the terminal: plain text, and coloured tables for rich.

Layers about which the same is to be said share a line, so that a model of a thousand Linears fits on a screen::

    model.layers.{0..31}.self_attn.q_proj  x32  [4096, 4096]  W4A4  branch  input_ids == 126336 -> masked
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import GraphReport, LinearReport, Report

_STYLES = {"typed": "green", "default": "yellow", "refused": "red", "": "dim"}


@dataclass
class Fold:
    """Linears about which the same is said; ``name`` has ranges where their names differ."""

    name: str
    linears: list[LinearReport]

    @property
    def label(self) -> str:
        count = len(self.linears)
        return self.name if count == 1 else f"{self.name}  x{count}"


def folded(linears: Sequence[LinearReport]) -> list[Fold]:
    """Put together the Linears whose names differ in numbers only and whose facts are equal, in model order."""
    groups: dict[Any, list[LinearReport]] = {}
    for r in linears:
        plan = r.plan_text
        said = (r.shape, r.kind, r.precision, plan, r.engine, r.state, r.type_source, r.reason)
        groups.setdefault((_template(r.name), said), []).append(r)
    folds = [fold for members in groups.values() for fold in _fold(members)]
    position = {id(r): i for i, r in enumerate(linears)}
    return sorted(folds, key=lambda fold: position[id(fold.linears[0])])


def _template(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1{}", name)


def _fold(members: list[LinearReport]) -> Iterator[Fold]:
    """One line if the numbers are every combination of their values, else one for each first number."""
    numbers = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", r.name) for r in members]
    columns = [sorted({int(n) for n in column}) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, columns)) == len(members):
        name = _template(members[0].name)
        for column in columns:
            name = name.replace("{}", _ranges(column), 1)
        yield Fold(name, members)
        return
    for first in dict.fromkeys(row[0] for row in numbers):
        yield from _fold([r for r, row in zip(members, numbers, strict=True) if row[0] == first])


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``{0..2,5}``; one number is itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    return "{" + ",".join(parts) + "}"


def _worst_error(linears: Sequence[LinearReport]) -> str:
    """The largest error of a type in any of the Linears, measured if it was, else predicted (with a ~)."""
    for which, sign in (("measured_error", ""), ("predicted_error", "~")):
        errors = [(e, t) for r in linears for t, e in (getattr(r, which) or {}).items()]
        if errors:
            error, token_type = max(errors)
            return f"{sign}{error:.2%} {token_type}"
    return "-"


def _shape(linear: LinearReport) -> str:
    return f"[{linear.shape[0]}, {linear.shape[1]}]"


_HEADER = ("Linear", "[N, K]", "runs as", "plan", "worst error")


@dataclass
class Section:
    """Linears with the same types or the same reason: what is said of them all, and a row for each fold."""

    titles: list[str]
    style: str
    rows: list[tuple[str, ...]]


def sections(report: Report) -> list[Section]:
    """Quantised Linears by the source of their types, then those left alone by the reason."""
    found: dict[Any, Section] = {}
    for fold in folded([*report.quantized, *report.left_alone]):
        r = fold.linears[0]
        key = (r.state, r.type_source if r.quantized else r.reason)
        if key not in found:
            title = f"{r.state}: {r.type_source}" if r.quantized else f"left alone: {r.reason}"
            titles = [title, *([f"  way out: {r.way_out}"] if r.way_out else [])]
            found[key] = Section(titles, _STYLES.get(r.state, ""), [])
        row = (fold.label, _shape(r), r.precision, r.plan_text or "-", _worst_error(fold.linears))
        found[key].rows.append(row)
    return list(found.values())


# ------------------------------------------------------------------------------------- below the tables


def summary(report: Report) -> list[tuple[str, str]]:
    """Counts, bytes, graphs and what deserves attention: a line each, with its style."""
    counts, size = report.counts(), report.bytes()
    lines = [
        (
            f"{counts['quantized']} of {counts['found']} Linears quantised in {counts['groups']} groups "
            f"({counts['typed']} typed, {counts['default']} default, {counts['refused']} refused), "
            f"{counts['left_alone']} left alone",
            "bold",
        ),
        (f"token types: {', '.join(report.type_names)}; default: {report.default_type}", ""),
    ]
    if size["dense"]:
        text = f"weights: {bytes_text(size['dense'])} dense, {bytes_text(size['packed'])} packed"
        if size["engine"]:
            text += f"; the engine holds {bytes_text(size['engine'])} besides"
        lines.append((text, ""))
    engines = Counter(f"{r.engine}, {r.kernel}" for r in report.quantized)
    lines += [(f"engine: {engine} (x{n})", "") for engine, n in engines.items()]
    lines += [(line, "") for line in _graph_lines(report.graphs)]
    return lines + [(f"! {line}", "yellow") for line in warnings_of(report)]


def _graph_lines(graphs: Sequence[GraphReport]) -> Iterator[str]:
    breaks = Counter(g.break_reason for g in graphs if g.break_reason)
    yield f"{_number(len(graphs), 'graph')}, {_number(breaks.total(), 'break')}"
    for reason, count in breaks.most_common():
        yield f"  broken x{count}: {reason}"
    again = Counter(g.compiled_again_because for g in graphs if g.compiled_again_because)
    for reason, count in again.most_common():
        yield f"  compiled again x{count}: {reason.strip()}"
    for graph in graphs:
        for entry in graph.types_from:
            if "graph" in entry:
                yield (
                    f"  graph {graph.index} takes the types of {entry['tokens']} from graph "
                    f"{entry['graph']}"
                )


def warnings_of(report: Report) -> Iterator[str]:
    """What a user should look at."""
    default = [r for r in report.quantized if r.state == "default" and r.way_out]
    if default:
        yield (
            f"{_number(len(default), 'Linear')} take every token for the default type {report.default_type!r}, no "
            f"source of types is in sight: {default[0].way_out}"
        )
    refused = [r for r in report.quantized if r.state == "refused"]
    if refused:
        yield f"{_number(len(refused), 'Linear')} without types, which were lost: {refused[0].type_source}"
    unknown = [g for g in report.graphs if any(e["source"] == "unknown" for e in g.types_from)]
    if unknown and not default:
        yield (
            f"the default type {report.default_type!r} is assumed in {_number(len(unknown), 'graph')} for hidden "
            f"states that come in from outside: call the model inside freeact_fx.token_types(types)"
        )
    rare = Counter(t for group in report.groups for t in group.rare_types)
    for token_type, count in rare.items():
        yield (
            f"calibration saw too few tokens of type {token_type!r} in {count} of {len(report.groups)} groups to fit "
            f"anything to it alone: calibrate with more of them"
        )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_text(count: int) -> str:
    """3600000 as "3.6 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


# ------------------------------------------------------------------------------------- the two forms


def plain_table(report: Report) -> str:
    """Plain text, as wide as it gets."""
    found = sections(report)
    widths = _widths(found)
    lines = [_padded(_HEADER, widths), _padded(["-" * width for width in widths], widths)]
    for section in found:
        lines += [*section.titles, *(_padded(row, widths) for row in section.rows), ""]
    return "\n".join([*lines, *(line for line, _ in summary(report))])


def _widths(found: Sequence[Section]) -> list[int]:
    rows = [_HEADER, *(row for section in found for row in section.rows)]
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def rich_parts(report: Report, max_width: int) -> Iterator[Any]:
    """Tables and lines for a rich console of a width; rich leaves out colours where there are none to be."""
    from rich.table import Table
    from rich.text import Text

    found = sections(report)
    widths = _widths(found)
    # Names are broken over lines where there is no room; what stands beside them never is.
    beside = sum(widths[1:]) + 2 * len(widths[1:])
    widths[0] = min(widths[0], max(max_width - beside, 16))
    for index, section in enumerate(found):
        for title in section.titles:
            yield Text(title, style=section.style)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=not index)
        for name, width in zip(_HEADER, widths, strict=True):
            table.add_column(name, width=width, overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        yield table
        yield Text()
    for line, style in summary(report):
        yield Text(line, style=style)
