"""How the demos show things: a clock while something takes long, tables, two texts side by side."""

from __future__ import annotations

import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from small_models import MASK_TOKEN, Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import freeact_fx

WIDTH = 110


def heading(title: str) -> None:
    print(f"\n== {title} ==", flush=True)


def paragraph(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), WIDTH), flush=True)


@contextmanager
def working(label: str) -> Iterator[None]:
    """Show the seconds go by while one call, a compilation say, takes long."""
    start = time.perf_counter()
    done = threading.Event()
    bar = tqdm(bar_format="{desc}", leave=False)

    def tick() -> None:
        while not done.wait(0.5):
            bar.set_description_str(f"{label} ... {time.perf_counter() - start:.0f} s")

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        bar.close()
    print(f"{label}: {time.perf_counter() - start:.1f} s", flush=True)


def table(rows: Sequence[Sequence[object]]) -> str:
    """The first row is the head; the first column is aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def complete_report(compiled: nn.Module) -> freeact_fx.Report:
    """The report of a compiled model; stops the demo if a Linear is not in it just once, matched or with a reason."""
    report = freeact_fx.explain(compiled)
    kinds = (nn.Linear, freeact_fx.FreeActLinear)
    wanted = {name for name, m in compiled._orig_mod.named_modules() if isinstance(m, kinds)}
    listed = Counter(r.name for r in report.linears)
    assert wanted <= set(listed), wanted - set(listed)
    assert set(listed.values()) == {1}, listed
    assert all(r.quantized or (r.reason and r.way_out) for r in report.linears)
    members = [name for group in report.groups for name in group.members]
    assert sorted(members) == sorted(r.name for r in report.quantized)
    return report


def linears_summary(report: freeact_fx.Report) -> str:
    """How many Linears of an `explain` report were quantised, with which types; what was not."""
    lines = [
        f"{len(report.quantized)} of {len(report.linears)} Linears quantised; "
        f"token types: {', '.join(report.type_names)}"
    ]
    kinds = Counter((r.precision, r.plan, r.state, r.type_source) for r in report.quantized)
    for (precision, plan, state, source), number in kinds.most_common():
        lines.append(f"  {number:4}  {precision}, plan {plan}, {state}: {source}")
    for reason, number in Counter(r.reason for r in report.linears if r.reason).most_common():
        lines.append(f"  {number:4}  left alone: {reason}")
    return "\n".join(lines)


def side_by_side(columns: dict[str, str]) -> str:
    """Texts in columns under their titles; their own line breaks are kept."""
    width = (WIDTH - 3 * (len(columns) - 1)) // len(columns)
    wrapped = []
    for title, text in columns.items():
        lines = [title, "-" * width]
        for line in text.strip().split("\n"):
            lines += textwrap.wrap(line, width, break_on_hyphens=False) or [""]
        wrapped.append(lines)
    height = max(map(len, wrapped))
    padded = [[line.ljust(width) for line in w + [""] * (height - len(w))] for w in wrapped]
    return "\n".join(" | ".join(row).rstrip() for row in zip(*padded, strict=True))


def mark_tokens(ids: Tensor, filled: Tensor, differing: Tensor, tokenizer: Tokenizer) -> str:
    """Decode `ids` [T]: filled tokens in [ ], or in << >> if they differ; masked ones as __."""

    def mark(position: int) -> str:
        if ids[position] == MASK_TOKEN:
            return "masked"
        if not filled[position]:
            return "given"
        return "differs" if differing[position] else "filled"

    brackets = {"given": ("", ""), "filled": ("[", "]"), "differs": ("<<", ">>")}
    pieces = []
    for kind, group in groupby(range(len(ids)), mark):
        positions = list(group)
        if kind == "masked":
            pieces.append(" " + " ".join(["__"] * len(positions)))
            continue
        text = tokenizer.decode(ids[positions])
        if kind != "given":
            text = visible(text)
        bare, (opening, closing) = text.lstrip(" "), brackets[kind]
        pieces.append(" " * (len(text) - len(bare)) + opening + bare + closing)
    return "".join(pieces)


def visible(text: str) -> str:
    """Line breaks and lone spaces of filled tokens as signs."""
    return text.replace("\n", "↵") if text.strip(" ") else text.replace(" ", "␣")
