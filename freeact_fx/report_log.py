"""Records of compiled graphs, and how ``explain`` puts them together into one report of a model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .config import QuantConfig
from .eligibility import TOWER_REASON, matches
from .packing import Packer
from .passes.node_facts import LinearFact, facts_of, tensor_of, value_of
from .reference import CODES_PER_WORD
from .report import GraphReport, GroupReport, LinearReport, Report
from .transform import GroupTransform, PackedLinear

# Graphs compiled in this process, oldest first. Weights are held weakly.
_log: deque[GraphRecord] = deque(maxlen=4096)


@dataclass
class GraphRecord:
    """The Linears of one compiled graph, each with a weak reference to its weight."""

    linears: list[tuple[LinearReport, weakref.ref[Tensor] | None]]
    members: dict[str, tuple[str, ...]]
    config: QuantConfig
    label: str = ""

    @staticmethod
    def of(
        gm: GraphModule, inputs: dict[Node, Any], config: QuantConfig, packer: Packer
    ) -> GraphRecord:
        facts = facts_of(gm)
        rows: list[tuple[LinearReport, weakref.ref[Tensor] | None]] = []
        for linear in facts:
            weight = tensor_of(gm, linear.weight, inputs)
            row = _row(linear, weight, config, packer)
            rows.append((row, None if weight is None else weakref.ref(weight)))
        groups: dict[Any, list[str]] = {}
        for linear, (row, _) in zip(facts, rows, strict=True):
            if row.quantized:
                groups.setdefault(_group_key(linear), []).append(row.name)
        members = {names[0]: tuple(names) for names in groups.values()}
        for row, _ in rows:
            row.group = next((g for g, names in members.items() if row.name in names), "")
        label = f"the graph with {facts[0].name}" if facts else "a graph without Linears"
        return GraphRecord(rows, members, config, label)

    def unexpected(self, config: QuantConfig) -> list[LinearReport]:
        """Linears left alone that the user did not leave out himself."""
        expected = ("listed in QuantConfig.skip", "its weight is tied", TOWER_REASON)
        return [
            row
            for row, _ in self.linears
            if row.reason is not None
            and (not row.reason.startswith(expected) or matches(row.name, config.include))
        ]


def _group_key(linear: LinearFact) -> Any:
    return (linear.x, id(linear.operands.get("left")) if linear.converted else None)


def _row(
    linear: LinearFact,
    weight: Tensor | None,
    config: QuantConfig,
    packer: Packer,
) -> LinearReport:
    shape = (linear.num_outputs, linear.num_features)
    bytes_per_weight = 2 if weight is None or linear.converted else weight.element_size()
    row = LinearReport(
        linear.name,
        shape,
        type_source=linear.type_source,
        dense_bytes=shape[0] * shape[1] * bytes_per_weight,
    )
    if linear.refusal is None and linear.converted:
        operands = (linear.operands[f.name] for f in fields(PackedLinear))
        tensors = [value_of(node) for node in operands if isinstance(node, Node)]
        row.packed_bytes = sum(t.numel() * t.element_size() for t in tensors)
        width = sum(linear.operands["widths"])
        row.engine_bytes = shape[0] * width * int(value_of(linear.operands["right"]).shape[-1])
        row.plan = _converted_plan(linear)
    elif linear.refusal is None and weight is not None:
        dense = weight.detach().t() if linear.transposed else weight.detach()
        transform = packer.transform(linear.name, dense)
        if isinstance(transform, str):
            linear.refusal = transform
        else:
            row.packed_bytes = _packed_bytes(transform, linear)
            row.engine_bytes = shape[0] * transform.num_codes
            row.plan = transform.plan
    if linear.refusal is not None:
        row.reason = linear.refusal
        row.precision = "-" if weight is None else str(weight.dtype).removeprefix("torch.")
        return row
    row.state = linear.state
    row.precision = (
        f"W4A{config.activation_bits}" if config.quantize else "transformed, not rounded"
    )
    return row


def _packed_bytes(transform: GroupTransform, linear: LinearFact) -> int:
    """Bytes of the operands that ``pack_linear`` will make of a dense Linear."""
    words = -(-transform.num_codes // CODES_PER_WORD)
    table_rows = 0 if transform.shift is None and linear.bias is None else transform.num_rows
    rank = 0 if transform.lowrank is None else transform.lowrank.shape[1]
    per_output = 4 * (words + len(transform.widths) + table_rows) + rank
    return linear.num_outputs * per_output + 4 * rank


def _converted_plan(linear: LinearFact) -> str:
    """A converted Linear's plan, read off its operands."""
    o = linear.operands
    if o["lowrank"] is not None:
        return "branch"
    if len(o["widths"]) > 1:
        return "duplicate" if len(set(o["widths"])) == 1 and _is_full(linear) else "paper"
    return "single" if o["shift"] is None else "shift"


def _is_full(linear: LinearFact) -> bool:
    return int(linear.operands["widths"][0]) == int(value_of(linear.operands["left"]).shape[0])


def record(graph: GraphRecord) -> None:
    _log.append(graph)


@contextlib.contextmanager
def collected() -> Iterator[list[GraphRecord]]:
    """The graphs that are recorded inside this context."""
    found: list[GraphRecord] = []
    start = len(_log)
    last = _log[-1] if _log else None
    yield found
    records = list(_log)
    at = next((i for i in reversed(range(len(records))) if records[i] is last), -1)
    found += records[at + 1 :] if last is not None else records[start:]


def logged() -> list[GraphRecord]:
    return list(_log)


def paths_of(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each parameter or buffer, by its id; of a tied one, those of Linears only."""
    paths: dict[int, list[str]] = {}
    tables: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        found = tables if isinstance(module, nn.Embedding) else paths
        for own in [*module._parameters.values(), *module._buffers.values()]:
            if own is not None:
                found.setdefault(id(own), []).append(name)
    return {**tables, **paths}


def model_report(model: nn.Module, graphs: list[GraphRecord]) -> Report:
    """One row per Linear of the model, in model order; a Linear in several graphs is listed once.

    Weights are matched by identity, so the names are the model's whatever frame Dynamo saw them in.
    """
    paths = paths_of(model)
    report = Report(model=_model_facts(model), environment=_environment(model))
    rows: dict[str, LinearReport] = {}
    groups: dict[str, GroupReport] = {}
    for graph in graphs:
        # A weight that is gone belonged to another model, or to this one before it was changed.
        alive = [(row, None if weight is None else weight()) for row, weight in graph.linears]
        mine = [(row, paths[id(tensor)]) for row, tensor in alive if id(tensor) in paths]
        if not mine and any(weight is not None for _, weight in graph.linears):
            continue
        mine += [(row, [row.name]) for row, weight in graph.linears if weight is None]
        if not mine:
            continue
        index = len(report.graphs)
        aliases = {row.name: names for row, names in mine}
        members = {
            aliases.get(group, [group])[0]: tuple(
                n for name in names for n in aliases.get(name, [name])
            )
            for group, names in graph.members.items()
        }
        for row, names in mine:
            group = aliases.get(row.group, [row.group])[0]
            for name in names:
                seen = rows[name].graphs if name in rows else ()
                rows[name] = replace(row, name=name, group=group, graphs=(*seen, index))
        for group, names in members.items():
            groups[group] = GroupReport(group, names, plan=rows[group].plan)
        linears = tuple(name for _, names in mine for name in names)
        report.graphs.append(GraphReport(index, graph.label, linears))
        report.config, report.type_names = graph.config.to_dict(), graph.config.type_names
    for name, module in model.named_modules():
        if name in rows:
            report.linears.append(rows.pop(name))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "FreeActLinear":
            shape = (int(module.out_features), int(module.in_features))
            dtype = getattr(getattr(module, "weight", None), "dtype", torch.float32)
            report.linears.append(
                LinearReport(
                    name,
                    shape,
                    precision=str(dtype).removeprefix("torch."),
                    reason="no graph has it: these inputs do not reach it, or its module calls its weight itself",
                )
            )
    report.linears += rows.values()
    used = {row.group for row in report.linears}
    report.groups = [group for name, group in groups.items() if name in used]
    return report


def _model_facts(model: nn.Module) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


def _environment(model: nn.Module) -> dict[str, Any]:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    return {
        "freeact_fx": _version("freeact-fx"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": str(device),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
