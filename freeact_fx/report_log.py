"""What has been compiled in this process: a record of each graph, which ``model_report`` puts together."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .config import QuantConfig
from .eligibility import matches
from .engines import engine_of
from .packing import Packer, empty_packed
from .passes.insert import TRAILING_KEY
from .passes.node_facts import (
    LinearFact,
    facts_of,
    op_name,
    tensor_of,
    value_of,
)
from .passes.roots import is_own
from .reasons import Reason, reason
from .report import GraphReport, GroupReport, LinearReport
from .transform import GroupTransform, PackedLinear, treats_types_alike

# Rules whose Linears the user left out himself, or that the defaults leave out.
_EXPECTED = ("skipped", "tied", "tower")
# By operation; "linear", "matmul" and "converted" are their own.
_KINDS = {"addmm": "conv1d", "mm": "matmul"}

WeakTensor = weakref.ref[Tensor]


@dataclass(frozen=True)
class Recorded:
    """What is known of hidden states that left a graph.

    version  of the tensor, when it left
    types    [B, T] int32; None in a dry run
    graph    the one that they left
    claims   who said so, each with its graph, first to last
    """

    version: int
    types: Tensor | None
    graph: GraphRecord
    claims: tuple[tuple[GraphRecord, str], ...]


@dataclass(eq=False)
class GraphRecord:
    """One compiled graph, or one more set of weights that it was called with. Weights are held weakly.

    linears   each with its weight, None where it is computed in the graph
    groups    by the names of their Linears in ``linears``
    graph     its facts as a graph; names of Linears are filled in later
    sources   who said which types the tokens have, in the calls so far: the argument that holds them, "ids",
              "handed in", "an earlier graph" or "unknown", and what that graph recorded
    others    parameters that other operations read, with the operation
    origin    the record of the graph, if this is one more set of weights
    model     the outermost module that was called
    """

    linears: list[tuple[LinearReport, WeakTensor | None]]
    groups: list[GroupReport]
    config: QuantConfig
    packer: Packer
    graph: GraphReport = field(default_factory=lambda: GraphReport(0))
    sources: dict[tuple[str, str], Recorded | None] = field(default_factory=dict)
    others: list[tuple[WeakTensor, str]] = field(default_factory=list)
    origin: GraphRecord | None = None
    model: weakref.ref[nn.Module] | None = None
    _runner: weakref.ref[Callable[..., Any]] | None = None

    @staticmethod
    def of(
        gm: GraphModule,
        inputs: dict[Node, Any],
        config: QuantConfig,
        packer: Packer,
        graph: GraphReport,
        model: nn.Module | None,
    ) -> GraphRecord:
        """The record of a rewritten graph."""
        rows: list[tuple[LinearReport, WeakTensor | None]] = []
        groups: dict[Any, GroupReport] = {}
        for index, linear in enumerate(facts_of(gm)):
            weight = tensor_of(gm, linear.weight, inputs)
            transform = gm.meta[TRAILING_KEY].transforms.get(index)
            row = _row(linear, weight, transform, config)
            rows.append((row, None if weight is None else weakref.ref(weight)))
            if row.quantized:
                key = (linear.x, id(linear.operands.get("left")) if linear.converted else None)
                group = groups.setdefault(key, _group(linear, transform, row))
                group.members = (*group.members, row.name)
                row.group = group.name
        return GraphRecord(
            rows,
            list(groups.values()),
            config,
            packer,
            graph,
            others=_others(gm, inputs),
            model=None if model is None else weakref.ref(model),
        )

    def bound(
        self, names: list[str], weights: list[WeakTensor | None], problem: tuple[str, Reason] | None
    ) -> GraphRecord:
        """The record of another set of weights in the same graph.

        problem  the Linear that cannot run in it, and why; then none of them does
        """
        renamed = dict(zip((row.name for row, _ in self.linears), names, strict=True))
        rows = []
        for (row, _), weight in zip(self.linears, weights, strict=True):
            name = renamed[row.name]
            row = replace(row, name=name, group=renamed.get(row.group, ""))
            if problem is not None and row.quantized:
                beside, why = problem
                if name != beside:
                    why = reason(
                        "beside", other=self.linears[0][0].name, beside=beside, problem=why
                    )
                row = _left_alone(row, why)
            rows.append((row, weight))
        groups = [
            replace(
                group,
                name=renamed[group.name],
                members=tuple(renamed[member] for member in group.members),
            )
            for group in self.groups
        ]
        groups = [] if problem is not None else groups
        return replace(self, linears=rows, groups=groups, origin=self.origin or self)

    def notice(self, tokens: str, source: str, recorded: Recorded | None = None) -> None:
        """In one call, this is who said which types some tokens have."""
        # Only the words are kept: the types would hold memory.
        self.sources[tokens, source] = recorded and replace(recorded, types=None)

    def held_by(self, runner: Callable[..., Any]) -> None:
        """The record goes when torch drops the compiled graph."""
        self._runner = weakref.ref(runner)

    @property
    def is_alive(self) -> bool:
        record = self.origin or self
        return record._runner is None or record._runner() is not None

    def unexpected(self, config: QuantConfig) -> list[LinearReport]:
        """Linears left alone that the user did not leave out himself."""
        return [
            row
            for row, _ in self.linears
            if isinstance(row.reason, Reason)
            and (row.reason.rule not in _EXPECTED or matches(row.name, config.include))
        ]


def _row(
    linear: LinearFact,
    weight: Tensor | None,
    transform: GroupTransform | None,
    config: QuantConfig,
) -> LinearReport:
    shape = (linear.num_outputs, linear.num_features)
    bytes_per_weight = 2 if weight is None or linear.converted else weight.element_size()
    row = LinearReport(
        linear.name,
        shape,
        kind=_KINDS.get(linear.operation, linear.operation),
        state=linear.state,
        type_source=linear.type_source,
        precision=f"W4A{config.activation_bits}" if config.quantize else "transformed, not rounded",
        dense_bytes=shape[0] * shape[1] * bytes_per_weight,
    )
    if linear.refusal is not None:
        row.precision = "-" if weight is None else str(weight.dtype).removeprefix("torch.")
        return _left_alone(row, linear.refusal)
    device = value_of(linear.x).device
    row.engine, row.kernel = engine_of(device, config)
    if linear.converted:
        operands = (linear.operands[f.name] for f in fields(PackedLinear))
        tensors = [value_of(node) for node in operands if isinstance(node, Node)]
        num_codes = sum(linear.operands["widths"]) * int(
            value_of(linear.operands["right"]).shape[-1]
        )
        num_rows = len(linear.operands["slice_of_type"])
    else:
        assert transform is not None, "insert keeps the transform of what it replaces"
        with torch.device("meta"):
            packed = empty_packed(transform, shape[0], linear.bias is not None, config)
        tensors = list(packed.tensors().values())
        num_codes, num_rows = transform.num_codes, transform.num_rows
    row.types_alike = treats_types_alike(num_rows, config.num_types)
    row.packed_bytes = sum(t.numel() * t.element_size() for t in tensors)
    if row.engine.startswith("onednn"):
        row.engine_bytes = shape[0] * num_codes
    return row


def _left_alone(row: LinearReport, why: str) -> LinearReport:
    return replace(
        row,
        state="",
        plan="",
        types_alike=False,
        group="",
        engine="",
        kernel="",
        packed_bytes=0,
        engine_bytes=0,
        reason=why,
        way_out=why.way_out if isinstance(why, Reason) else None,
    )


def _group(linear: LinearFact, transform: GroupTransform | None, row: LinearReport) -> GroupReport:
    if transform is not None:
        left, right, lowrank = transform.left, transform.right, transform.lowrank
        widths, plan = transform.widths, transform.plan
    else:
        operands = linear.operands
        left, right = value_of(operands["left"]), value_of(operands["right"])
        lowrank = (
            operands["lowrank"] if operands["lowrank"] is None else value_of(operands["lowrank"])
        )
        widths, plan = tuple(operands["widths"]), _converted_plan(linear)
    return GroupReport(
        row.name,
        (),
        plan,
        tuple(map(int, left.shape)),
        tuple(map(int, right.shape[1:])),
        0 if lowrank is None else int(lowrank.shape[1]),
        tuple(widths),
    )


def _converted_plan(linear: LinearFact) -> str:
    """A converted Linear's plan, read off its operands."""
    o = linear.operands
    if o["lowrank"] is not None:
        return "branch"
    if len(o["widths"]) > 1:
        is_full = int(o["widths"][0]) == int(value_of(o["left"]).shape[0])
        return "duplicate" if len(set(o["widths"])) == 1 and is_full else "paper"
    return "single" if o["shift"] is None else "shift"


def _others(gm: GraphModule, inputs: dict[Node, Any]) -> list[tuple[WeakTensor, str]]:
    """Matrices of the model that something else than a Linear reads, each with the operation."""
    found = []
    linears = {linear.weight for linear in facts_of(gm)}
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr") or node in linears or not is_own(node):
            continue
        tensor = tensor_of(gm, node, inputs)
        if tensor is not None and tensor.dim() == 2 and node.users:
            found.append((weakref.ref(tensor), op_name(next(iter(node.users)))))
    return found


# ------------------------------------------------------------------------------------- the log

# Oldest first. A graph that is gone (``torch.compiler.reset``) is dropped.
_log: deque[GraphRecord] = deque(maxlen=4096)
_collecting: list[list[GraphRecord]] = []


def record(graph: GraphRecord) -> None:
    _log.append(graph)
    for found in _collecting:
        found.append(graph)


@contextlib.contextmanager
def collected() -> Iterator[list[GraphRecord]]:
    """The graphs that are recorded inside this context."""
    found: list[GraphRecord] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        # By identity: two empty lists are equal.
        _collecting[:] = [other for other in _collecting if other is not found]


def logged() -> list[GraphRecord]:
    """The graphs that torch still has."""
    alive = [graph for graph in _log if graph.is_alive]
    _log.clear()
    _log.extend(alive)
    return alive


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
