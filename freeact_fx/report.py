"""What happened to every Linear: the record that ``explain`` shows and that ``strict`` looks at.

``Report.to_dict()`` is a stable, versioned schema (version 2), plain JSON::

    version       2
    model         {class, num_parameters}
    environment   {freeact_fx, torch, triton (or null), device}
    config        QuantConfig.to_dict()
    type_names    token types in the order of their numbers; default_type is the first
    counts        {found, quantized, left_alone, typed, default, refused, groups}
    bytes         {dense, packed, engine} of the Linears that are quantised
    graphs        [GraphReport], in the order in which they were compiled
    groups        [GroupReport], Linears that read the same activation
    linears       [LinearReport], in model order, each Linear of the model once
    activations   [ActivationReport], on request

Fields are never renamed or dropped within a version; new ones may be added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA_VERSION = 2


@dataclass
class LinearReport:
    """One Linear of one model.

    name             qualified module name
    shape            (N, K)
    kind             "linear", "conv1d" (a ``Conv1D`` or ``addmm``), "matmul", "converted" (a ``FreeActLinear``)
    group            name of its group; "" if it is left alone
    state            "typed", "default" or "refused" (types lost or in conflict); "" if it is left alone
    type_source      how the types of its tokens are known, one readable chain
    plan             transform plan, "" if it is left alone
    types_alike      its transform has the same rows for tokens of all types (``QuantConfig.plan="auto"``)
    engine           what computes the integer product, "" if it is left alone
    kernel           the kernel, or the parts that the compiler fuses
    precision        what it runs in: "W4A4", or the dtype it kept
    dense_bytes      of the weight in its own dtype (bf16 for a converted one)
    packed_bytes     of codes, scales, bias table and branch; 0 if it is left alone
    engine_bytes     what the engine holds besides (oneDNN's int8 copy, one byte per code)
    predicted_error  by token type: squared error of its outputs relative to their energy, as the calibration
                     predicted it; None without a calibration
    measured_error   the same, measured on tokens that were held out
    reason           why it is left alone, or None
    way_out          what would change that, or give a Linear without types its types; None if nothing is amiss
    graphs           indices of the graphs that it is in
    time_ms          of one call, if it was timed; dense_time_ms of the dense Linear
    """

    name: str
    shape: tuple[int, int]
    kind: str = "linear"
    group: str = ""
    state: str = ""
    type_source: str = ""
    plan: str = ""
    types_alike: bool = False
    engine: str = ""
    kernel: str = ""
    precision: str = ""
    dense_bytes: int = 0
    packed_bytes: int = 0
    engine_bytes: int = 0
    predicted_error: dict[str, float] | None = None
    measured_error: dict[str, float] | None = None
    reason: str | None = None
    way_out: str | None = None
    graphs: tuple[int, ...] = ()
    time_ms: float | None = None
    dense_time_ms: float | None = None

    @property
    def quantized(self) -> bool:
        return self.reason is None

    @property
    def plan_text(self) -> str:
        """The plan, and whether it treats types alike, which "single" does by its nature."""
        says_more = self.types_alike and self.plan != "single"
        return f"{self.plan}, types alike" if says_more else self.plan


@dataclass
class GroupReport:
    """Linears that read the same activation, and the transform that they share.

    name             its first Linear's
    members          names of its Linears
    left, right      factors of the transform: left[0] x right[0] = K channels; the others are the columns of each slice
    rank             columns of the branch, of all types together; 0: none
    widths           columns of each slice's left factor
    predicted_error  by plan: mean over Linears and types; None without a calibration
    measured_error   the same, measured; a plan that was not measured is missing
    type_counts      tokens that the calibration saw, by type
    rare_types       types of which it saw too few to fit anything to them alone
    """

    name: str
    members: tuple[str, ...]
    plan: str = ""
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    rank: int = 0
    widths: tuple[int, ...] = ()
    predicted_error: dict[str, float] | None = None
    measured_error: dict[str, float] | None = None
    type_counts: dict[str, int] | None = None
    rare_types: tuple[str, ...] = ()


@dataclass
class GraphReport:
    """One compiled graph.

    label                   the graph in words: "the graph with model.layers.0.q_proj"
    linears                 names of its Linears, quantised or not, in graph order
    num_nodes_before/after  nodes of the graph that Dynamo gave, and of the rewritten one (0: not rewritten)
    break_reason            why the graph ends where it does; None: the call was over
    compiled_again_because  the guard that failed; None: compiled for the first time
    types_from              for each place where tokens enter: ``tokens`` (the argument) and ``source``: "ids", "handed
                            in", "an earlier graph", "unknown" (the default type was assumed)
    before, after           the graph as readable code, on request
    """

    index: int
    label: str = ""
    linears: tuple[str, ...] = ()
    num_nodes_before: int = 0
    num_nodes_after: int = 0
    break_reason: str | None = None
    compiled_again_because: str | None = None
    types_from: tuple[dict[str, str], ...] = ()
    before: str | None = None
    after: str | None = None


@dataclass
class ActivationReport:
    """Histogram of one group's activation, of the tokens of one type, before or after the transform.

    stage   "before" or "after"
    edges   len(counts) + 1 bounds
    counts  values in each bin
    """

    group: str
    type: str
    stage: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    num_tokens: int


@dataclass
class Report:
    """Every Linear of a model, in model order; ``str()`` is a table, ``to_dict()`` plain JSON, ``to_html()`` a page."""

    linears: list[LinearReport] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    graphs: list[GraphReport] = field(default_factory=list)
    activations: list[ActivationReport] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    type_names: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LinearReport:
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(f"no Linear {name!r} in this report")

    @property
    def quantized(self) -> list[LinearReport]:
        return [r for r in self.linears if r.quantized]

    @property
    def left_alone(self) -> list[LinearReport]:
        return [r for r in self.linears if not r.quantized]

    @property
    def num_graphs(self) -> int:
        return len(self.graphs)

    @property
    def default_type(self) -> str:
        """The type of a token of which nothing is known."""
        return self.type_names[0] if self.type_names else ""

    def counts(self) -> dict[str, int]:
        """Linears found, quantised, left alone, and quantised by state."""
        states = Counter(r.state for r in self.quantized)
        return {
            "found": len(self.linears),
            "quantized": len(self.quantized),
            "left_alone": len(self.left_alone),
            **{state: states[state] for state in ("typed", "default", "refused")},
            "groups": len({r.group for r in self.quantized}),
        }

    def bytes(self) -> dict[str, int]:
        """Of the Linears that are quantised: dense, packed, and what the engine holds besides."""
        rows = self.quantized
        return {
            "dense": sum(r.dense_bytes for r in rows),
            "packed": sum(r.packed_bytes for r in rows),
            "engine": sum(r.engine_bytes for r in rows),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON; see the module's docstring for the schema."""
        return {
            "version": SCHEMA_VERSION,
            "model": self.model,
            "environment": self.environment,
            "config": self.config,
            "type_names": list(self.type_names),
            "default_type": self.default_type,
            "counts": self.counts(),
            "bytes": self.bytes(),
            **{name: [_plain(row) for row in getattr(self, name)] for name in _ROWS},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """The inverse of ``to_dict``. Raises ConfigError for another version or an entry that is not one of ours."""
        version = data.get("version")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"Report.from_dict: version must be {SCHEMA_VERSION}, got {version!r}. Make the report anew with "
                f"this freeact_fx."
            )
        rows: dict[str, Any] = {
            name: [_row_from(kind, entry, name) for entry in data.get(name, ())]
            for name, kind in _ROWS.items()
        }
        facts = {name: data.get(name, {}) for name in ("model", "environment", "config")}
        return Report(**rows, **facts, type_names=tuple(data.get("type_names", ())))

    def to_html(self, path: str | Path, **options: Any) -> None:
        """Write the report as one self-contained HTML file; options as for ``inspection.html.write_html``."""
        from .inspection.html import write_html

        write_html(self, path, **options)

    def __str__(self) -> str:
        from .report_table import plain_table

        return plain_table(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .report_table import rich_parts

        yield from rich_parts(self, options.max_width)


_ROWS: dict[str, Any] = {
    "graphs": GraphReport,
    "groups": GroupReport,
    "linears": LinearReport,
    "activations": ActivationReport,
}


def _plain(row: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(row).items()
    }


def _row_from(kind: Any, entry: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    try:
        return kind(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in entry.items()
                if name in known
            }
        )
    except TypeError as error:
        raise ConfigError(
            f"Report.from_dict: {where}: an entry is incomplete ({error}). Make the report anew."
        ) from error
