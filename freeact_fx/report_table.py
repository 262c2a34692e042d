"""A report in the terminal: plain text, and a table for rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

_HEADER = ("Linear", "[N, K]", "precision", "plan", "types", "source or reason")


def plain_table(report: Report) -> str:
    rows = [
        (
            r.name,
            f"[{r.shape[0]}, {r.shape[1]}]",
            r.precision,
            r.plan or "-",
            r.state or "left alone",
            r.reason or r.type_source,
        )
        for r in report.linears
    ]
    widths = [max(len(row[i]) for row in (_HEADER, *rows)) for i in range(len(_HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADER, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join([*lines, "", *summary(report)])


def summary(report: Report) -> list[str]:
    """Counts and bytes in words, a line each."""
    counts, size = report.counts(), report.bytes()
    lines = [
        f"{counts['quantized']} of {counts['found']} Linears quantised in {counts['groups']} groups "
        f"({counts['typed']} typed, {counts['default']} default, {counts['refused']} refused), "
        f"{counts['left_alone']} left alone; {report.num_graphs} graphs; token types: "
        f"{', '.join(report.type_names)}"
    ]
    if size["dense"]:
        lines.append(
            f"weights {size['dense']:,} bytes dense, {size['packed']:,} packed; on the CPU oneDNN holds "
            f"{size['engine']:,} besides, never a dense float copy"
        )
    return lines


def rich_parts(report: Report) -> Iterator[Any]:
    yield plain_table(report)
