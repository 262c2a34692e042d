"""What torch's own tools show of the passes; nothing of it is made unless someone looks.

=========================  ===================================================================================
``TORCH_LOGS``             ``freeact_fx.backend``: INFO one line per graph, DEBUG the graph as it came in and one line
                           per Linear; ``freeact_fx.passes.detect``, ``.annotate``: DEBUG what they found out of each
                           Linear; ``freeact_fx.passes.insert``: DEBUG the graph it made
``TORCH_TRACE``, tlparse   artifacts ``freeact_before``, ``freeact_detect``, ``freeact_annotate``, ``freeact_insert``
                           (the graph each pass leaves) and ``freeact_report``
``TORCH_COMPILE_DEBUG=1``  the same as files, beside Inductor's folder
pass observers             every pass is a ``GraphTransformObserver``, and has its time in ``compile_times()``
=========================  ===================================================================================

docs/debugging.md tells how to use them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from . import compat
from .passes.node_facts import LinearFact, linears_of
from .report import LinearReport, Report
from .report_log import GraphRecord

log = logging.getLogger("freeact_fx.backend")


class Watch:
    """One graph on its way through the passes, as torch's own tools see it.

    gm                the graph as Dynamo gave it; the passes edit it in place
    inductor_options  Inductor's options of this compilation: they may ask for files, too
    """

    def __init__(self, gm: GraphModule, inductor_options: Mapping[str, Any]) -> None:
        self._gm = gm
        self._folder = compat.debug_folder(inductor_options)
        self._times_ms: dict[str, float] = {}
        self._num_nodes = len(gm.graph.nodes)
        _write(log, logging.DEBUG, lambda: f"the graph that came in:\n{annotated_code(gm)}")
        self._show("before", "string", lambda: annotated_code(gm))

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around one pass: time it, have torch observe it, and show what it leaves."""
        start = time.perf_counter()
        with compat.observed_pass(self._gm, name):
            yield
        self._times_ms[name] = 1e3 * (time.perf_counter() - start)
        text = annotated_code if name == "insert" else _notes
        pass_log = logging.getLogger(f"freeact_fx.passes.{name}")
        _write(pass_log, logging.DEBUG, lambda: f"after {name}:\n{text(self._gm)}")
        self._show(name, "string", lambda: annotated_code(self._gm))

    def finish(self, record: GraphRecord, *, quiet: bool = False) -> None:
        """Tell what became of the graph's Linears: the last call, before the compiler has the graph.

        quiet  no warnings: the user asked for a report
        """
        rows = [row for row, _ in record.linears]
        label, config = record.graph.label, record.config
        report = Report(
            rows,
            record.groups,
            [record.graph],
            config=config.to_dict(),
            type_names=config.type_names,
        )
        _write(log, logging.INFO, lambda: f"{label}: {self._summary(report)}")
        _write(log, logging.DEBUG, lambda: "\n".join(map(_row_text, rows)))
        for text in () if quiet else _warnings(rows, record.unexpected(config)):
            torch._logging.warning_once(log, f"{label}: {text}")
        self._show("report", "json", lambda: json.dumps(report.to_dict(), indent=1))

    def _show(self, name: str, encoding: str, text: Callable[[], str]) -> None:
        compat.trace_artifact(f"freeact_{name}", encoding, text)
        if self._folder is not None:
            suffix = "json" if encoding == "json" else "py"
            (self._folder / f"{name}.{suffix}").write_text(text())

    def _summary(self, report: Report) -> str:
        counts = report.counts()
        states = ", ".join(f"{counts[s]} {s}" for s in ("typed", "default", "refused"))
        reasons = Counter(str(row.reason) for row in report.linears if not row.quantized)
        why = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self._times_ms.items())
        return (
            f"{counts['found']} Linears, {counts['quantized']} quantised in {counts['groups']} groups "
            f"({states}), {counts['left_alone']} left alone{f' ({why})' if why else ''}; "
            f"{self._num_nodes} -> {len(self._gm.graph.nodes)} nodes; {times}"
        )


def _warnings(rows: list[LinearReport], unexpected: list[LinearReport]) -> Iterator[str]:
    """Where a user gets less than he asked for, and can do something about it."""
    if unexpected and len(unexpected) == len(rows):
        yield f"none of its {len(rows)} Linears can be quantised. {_first(unexpected[0])}"
    refused = [row for row in rows if row.quantized and row.state == "refused"]
    if refused:
        yield (
            f"{len(refused)} of its {len(rows)} Linears run without the types of their tokens. "
            f"{_first(refused[0])}"
        )


def _first(row: LinearReport) -> str:
    way_out = f" Way out: {row.way_out}." if row.way_out else ""
    return f"{row.name}: {row.reason or row.type_source}.{way_out}"


def annotated_code(gm: GraphModule) -> str:
    """A graph as torch prints it, the user's lines as comments, and above each Linear what the passes know of it."""
    notes = {node.name: _note(linear) for node, linear in linears_of(gm)}
    lines = []
    for line in gm.print_readable(print_output=False).splitlines():
        assigned = re.match(r"(\s*)(\w+)(?:: \"[^\"]*\")? = ", line)
        if assigned and assigned[2] in notes:
            lines.append(f"{assigned[1]}# freeact: {notes[assigned[2]]}")
        lines.append(line)
    return "\n".join(lines)


def _notes(gm: GraphModule) -> str:
    return "\n".join(f"{node.name}: {_note(linear)}" for node, linear in linears_of(gm))


def _note(linear: LinearFact) -> str:
    shape = f"{linear.name} [{linear.num_outputs}, {linear.num_features}]"
    if linear.refusal is not None:
        return f"{shape} is left alone: {linear.refusal}"
    types = f", {linear.state}: {linear.type_source}" if linear.type_source else ""
    return f"{shape}{types}"


def _row_text(row: LinearReport) -> str:
    shape = f"{row.name} [{row.shape[0]}, {row.shape[1]}]"
    if not row.quantized:
        return f"{shape}: {row.precision}, left alone: {row.reason}"
    return (
        f"{shape}: {row.precision}, plan {row.plan_text}, group of {row.group}, "
        f"{row.state}: {row.type_source}"
    )


def _write(logger: logging.Logger, level: int, text: Callable[[], str]) -> None:
    """Log a text that costs something to make."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", text(), stacklevel=2)
