"""Put the records of compiled graphs together into one report of a model: each of its Linears once, in model order."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .convert import FreeActLinear
from .passes.annotate import FROM_OUTSIDE
from .reasons import reason
from .report import GraphReport, GroupReport, LinearReport, Report
from .report_log import GraphRecord, Recorded, paths_of

# Ways out of a Linear that is quantised, but without the types of its tokens.
HAND_IN = "call the model inside freeact_fx.token_types(types)"
FOLLOW = (
    "rewrite the operation that is named so that every token keeps its place, or declare one type"
)


def model_report(model: nn.Module, records: list[GraphRecord]) -> Report:
    """One row per Linear of the model; a Linear in several graphs is listed once.

    Weights are matched by identity, so the names are the model's whatever frame Dynamo saw them in.
    """
    return _Assembly(model).report(records)


class _Assembly:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = paths_of(model)
        self.modules = dict(model.named_modules())
        self.rows: dict[str, LinearReport] = {}
        self.groups: dict[str, GroupReport] = {}
        self.graphs: list[GraphReport] = []
        self.index: dict[int, int] = {}  # of a record's graph, by the record's id
        self.read_otherwise: dict[str, str] = {}

    def report(self, records: list[GraphRecord]) -> Report:
        mine = [record for record in records if self._is_mine(record)]
        for record in mine:
            # More sets of weights of one graph do not make it another graph.
            if id(record.origin or record) not in self.index:
                self.index[id(record.origin or record)] = len(self.graphs)
                self.graphs.append(replace(record.graph, index=len(self.graphs), linears=()))
        for record in mine:
            self._add(record)
        linears = self._in_model_order()
        used = {row.group for row in linears}
        config = mine[-1].config if mine else None
        return Report(
            linears,
            [group for name, group in self.groups.items() if name in used],
            self.graphs,
            model={
                "class": type(self.model).__name__,
                "num_parameters": sum(p.numel() for p in self.model.parameters()),
            },
            environment=_environment((*self.model.parameters(), *self.model.buffers())),
            config={} if config is None else json.loads(json.dumps(config.to_dict())),
            type_names=() if config is None else config.type_names,
        )

    def _is_mine(self, record: GraphRecord) -> bool:
        """A weight that is gone belonged to another model, or to this one before it was changed."""
        weights = [weight for _, weight in record.linears if weight is not None]
        weights += [weight for weight, _ in record.others]
        if weights:
            return any(id(weight()) in self.paths for weight in weights)
        return record.model is not None and record.model() is self.model

    def _add(self, record: GraphRecord) -> None:
        index = self.index[id(record.origin or record)]
        names: dict[str, list[str]] = {}  # in the model, by the name in the record
        for row, weight in record.linears:
            tensor = None if weight is None else weight()
            if weight is None:
                names[row.name] = [self._closest(row.name)]
            elif id(tensor) in self.paths:
                names[row.name] = self.paths[id(tensor)]
        for group in record.groups:
            if group.name in names:
                found = self._group(group, names, record)
                self.groups[found.name] = found
        source = self._types_from(record, index)
        for row, weight in record.linears:
            for name in names.get(row.name, ()):
                own_group = names[row.group][0] if row.group in names else ""
                earlier = self.rows[name].graphs if name in self.rows else ()
                graphs = earlier if index in earlier else (*earlier, index)
                own = replace(row, name=name, group=own_group, graphs=graphs)
                if own.quantized:
                    own.plan = self.groups[own_group].plan
                    self._fill_errors(own, record, None if weight is None else weight())
                    self._fill_types(own, source, record)
                self.rows[name] = own
        for parameter, operation in record.others:
            tensor = parameter()
            for name in self.paths.get(id(tensor), ()):
                self.read_otherwise[name] = operation
        graph = self.graphs[index]
        graph.linears = tuple(
            dict.fromkeys([*graph.linears, *(n for found in names.values() for n in found)])
        )

    def _closest(self, name: str) -> str:
        """The module whose name is this one, or ends in it, if there is one only."""
        if name in self.modules:
            return name
        ending = [n for n in self.modules if n.endswith("." + name)]
        return ending[0] if len(ending) == 1 else name

    # ------------------------------------------------------------------ what calibration measured

    def _group(
        self, group: GroupReport, names: dict[str, list[str]], record: GraphRecord
    ) -> GroupReport:
        members = tuple(n for member in group.members for n in names.get(member, ()))
        found = replace(group, name=members[0], members=members)
        statistics = self._statistics(members[0], record)
        if statistics is None:
            return found
        plans = statistics.get("plans", {})
        for which in ("predicted", "measured"):
            errors = {p: e[which] for p, e in plans.items() if e.get(which) is not None}
            setattr(found, f"{which}_error", errors or None)
        found.type_counts = statistics.get("tokens")
        found.rare_types = tuple(statistics.get("rare_types", ()))
        return found

    def _fill_errors(self, row: LinearReport, record: GraphRecord, weight: Tensor | None) -> None:
        statistics = self._statistics(row.name, record)
        if statistics is not None:
            stored = self._stored_name(row.name, record, weight)
            row.predicted_error = statistics.get("predicted", {}).get(stored)
            row.measured_error = statistics.get("error", {}).get(stored)

    def _stored_name(self, name: str, record: GraphRecord, weight: Tensor | None) -> str:
        checkpoint = record.packer.checkpoint
        if checkpoint is None or weight is None:
            return name
        return checkpoint.find(name, weight) or name

    def _statistics(self, name: str, record: GraphRecord) -> dict[str, Any] | None:
        """What the checkpoint, or a converted Linear itself, knows of a Linear's group."""
        module, checkpoint = self.modules.get(name), record.packer.checkpoint
        if isinstance(module, FreeActLinear):
            return dict(module.transform.statistics) or None
        if checkpoint is None or module is None:
            return None
        stored = self._stored_name(name, record, getattr(module, "weight", None))
        if stored not in checkpoint.linears:
            return None
        return checkpoint.statistics.get(checkpoint.linears[stored].group)

    # ------------------------------------------------------------------ where types come from

    def _types_from(self, record: GraphRecord, index: int) -> str:
        """Who said which types the tokens of a graph have, in words; fills in the graph's ``types_from``."""
        entries: list[dict[str, Any]] = []
        words = []
        for (tokens, source), recorded in record.sources.items():
            entry: dict[str, Any] = {"tokens": tokens, "source": source}
            text = {"handed in": "token_types()", "unknown": "unknown"}.get(source)
            if recorded is not None and (known := self._index_of(recorded.graph)) is not None:
                entry["graph"] = known
                text = self._chain(recorded) or f"types of {tokens} from graph {known}"
            entries.append(entry)
            if source != "ids":
                words.append(text or source)
        self.graphs[index].types_from = tuple(entries)
        return " | ".join(dict.fromkeys(words))

    def _index_of(self, record: GraphRecord) -> int | None:
        return self.index.get(id(record.origin or record))

    def _chain(self, recorded: Recorded) -> str:
        """What earlier graphs said of the tokens, one after the other."""
        claims: dict[int | None, list[str]] = {}
        for graph, claim in recorded.claims:
            claims.setdefault(self._index_of(graph), []).append(claim)
        return "; ".join(f"{'; '.join(own)} (from graph {at})" for at, own in claims.items())

    def _fill_types(self, row: LinearReport, source: str, record: GraphRecord) -> None:
        if FROM_OUTSIDE in row.type_source and source:
            default = f"default: {record.config.type_names[0]}"
            told = default if source == "unknown" else source
            own = [c for c in row.type_source.split("; ") if c not in (FROM_OUTSIDE, default)]
            # Later ones win: what the graph shows stands above what comes in, below what is handed in.
            claims = [*own, told] if source == "token_types()" else [told, *own]
            row.type_source = "; ".join(dict.fromkeys(claims))
            if row.state == "default" and "unknown" not in source:
                row.state = "typed"
        if row.state == "refused":
            row.way_out = FOLLOW
        elif record.config.num_types > 1 and (row.state == "default" or source == "unknown"):
            row.way_out = HAND_IN

    # ------------------------------------------------------------------ what no graph has

    def _in_model_order(self) -> list[LinearReport]:
        found = []
        rows = dict(self.rows)
        for name, module in self.modules.items():
            if name in rows:
                found.append(rows.pop(name))
            elif isinstance(module, (nn.Linear, FreeActLinear)):
                found.append(self._not_in_a_graph(name, module))
        return [*found, *rows.values()]

    def _not_in_a_graph(self, name: str, module: nn.Linear | FreeActLinear) -> LinearReport:
        operation = self.read_otherwise.get(name)
        why = reason("not_reached")
        if operation is not None:
            why = reason("read_otherwise", operation=operation)
        dtype = getattr(getattr(module, "weight", None), "dtype", torch.float32)
        weight = getattr(module, "weight", None)
        return LinearReport(
            name,
            (int(module.out_features), int(module.in_features)),
            "linear" if weight is not None else "converted",
            precision=str(dtype).removeprefix("torch."),
            dense_bytes=0 if weight is None else weight.numel() * weight.element_size(),
            reason=why,
            way_out=why.way_out,
        )


def _environment(tensors: Iterable[Tensor]) -> dict[str, Any]:
    device = next((str(t.device) for t in tensors), "cpu")
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "freeact_fx": _version("freeact-fx"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": device,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
