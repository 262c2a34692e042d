"""What happened to every Linear: the record that ``explain`` shows and that ``strict`` looks at."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass
class LinearReport:
    """One Linear of one model.

    name          qualified module name
    shape         (N, K)
    group         names of the Linears that share its activation, itself included
    state         "typed", "default" or "refused"; "" if it is left alone
    type_source   how the types of its tokens are known
    plan          transform plan, "" if it is left alone
    precision     what it runs in: "W4A4", or the dtype it kept
    reason        why it is left alone, or None
    dense_bytes   of the weight in its own dtype (bf16 for a converted one)
    packed_bytes  of codes, scales, bias table and branch; 0 if it is left alone
    engine_bytes  what the CPU engine will hold besides (oneDNN's int8 copy, one byte per code)
    graphs        how many compiled graphs it was seen in
    """

    name: str
    shape: tuple[int, int]
    group: tuple[str, ...] = ()
    state: str = ""
    type_source: str = ""
    plan: str = ""
    precision: str = ""
    reason: str | None = None
    dense_bytes: int = 0
    packed_bytes: int = 0
    engine_bytes: int = 0
    graphs: int = 1

    @property
    def quantized(self) -> bool:
        return self.reason is None


@dataclass
class Report:
    """Every Linear of a model, in model order; ``str()`` is a table, ``to_dict()`` plain JSON."""

    linears: list[LinearReport] = field(default_factory=list)
    type_names: tuple[str, ...] = ()
    num_graphs: int = 0

    def __getitem__(self, name: str) -> LinearReport:
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(f"no Linear {name!r} in this report")

    @property
    def quantized(self) -> list[LinearReport]:
        return [r for r in self.linears if r.quantized]

    def counts(self) -> dict[str, int]:
        """Linears found, quantised, left alone, and quantised by state."""
        states = Counter(r.state for r in self.quantized)
        return {
            "found": len(self.linears),
            "quantized": len(self.quantized),
            "left_alone": len(self.linears) - len(self.quantized),
            **{state: states[state] for state in ("typed", "default", "refused")},
            "groups": len({r.group for r in self.quantized}),
        }

    def to_dict(self) -> dict[str, Any]:
        """``{"version", "type_names", "num_graphs", "counts", "linears": [...]}``; a stable schema."""
        linears = [asdict(r) for r in self.linears]
        for linear in linears:
            linear["shape"], linear["group"] = list(linear["shape"]), list(linear["group"])
        return {
            "version": SCHEMA_VERSION,
            "type_names": list(self.type_names),
            "num_graphs": self.num_graphs,
            "counts": self.counts(),
            "linears": linears,
        }

    def __str__(self) -> str:
        header = ("Linear", "[N, K]", "precision", "plan", "types", "source or reason")
        rows = [
            (
                r.name,
                f"[{r.shape[0]}, {r.shape[1]}]",
                r.precision,
                r.plan or "-",
                r.state or "left alone",
                r.reason or r.type_source,
            )
            for r in self.linears
        ]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, tuple("-" * w for w in widths), *rows)
        ]
        counts = self.counts()
        dense = sum(r.dense_bytes for r in self.quantized)
        packed = sum(r.packed_bytes for r in self.quantized)
        engine = sum(r.engine_bytes for r in self.quantized)
        lines += [
            "",
            f"{counts['quantized']} of {counts['found']} Linears quantised in {counts['groups']} groups "
            f"({counts['typed']} typed, {counts['default']} default, {counts['refused']} refused), "
            f"{counts['left_alone']} left alone; {self.num_graphs} graphs; token types: "
            f"{', '.join(self.type_names)}",
        ]
        if dense:
            lines.append(
                f"weights {dense:,} bytes dense, {packed:,} packed; on the CPU oneDNN holds {engine:,} "
                f"besides, never a dense float copy"
            )
        return "\n".join(lines)
