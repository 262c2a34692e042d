"""The passes without ``torch.compile``: on any FX GraphModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from .checkpoint import Checkpoint
from .config import QuantConfig
from .report import Report


class RewrittenModule(nn.Module):
    """A rewritten graph that takes the original inputs. ``graph_module`` is the graph, ``report`` what was done."""

    def __init__(self, graph_module: GraphModule, runner: Any, report: Report) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._runner = runner
        self.report = report

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    def forward(self, *args: Any) -> Any:
        return self._runner(*args)


class _Inliner(torch.fx.Tracer):
    """Traces through every module, so that a Linear is a function with its parameters beside it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.MultiheadAttention)


def functional_form(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """A copy of a graph with modules inlined and a fake value on every node, as Dynamo's graphs have it."""
    from . import compat

    if any(n.op == "call_module" for n in gm.graph.nodes):
        gm = GraphModule(gm, _Inliner().trace(gm))
    else:
        gm = compat.copy_of_graph(gm)
    compat.propagate_shapes(gm, example_inputs)
    return gm


def rewrite(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    config: QuantConfig | None = None,
    *,
    checkpoint: Checkpoint | None = None,
) -> RewrittenModule:
    """Quantise an FX graph with the passes of the backend; the result runs eagerly.

    graph_module    from ``torch.fx.symbolic_trace``, ``torch.export.export(...).module()``, or recorded from Dynamo;
                    it is not changed. Rewriting a rewritten graph changes nothing.
    example_inputs  one value per placeholder: shapes and dtypes are taken from them
    config          None: the checkpoint's, or the default one

    Raises ConfigError for a module in training mode and UnsupportedLinear under ``strict=True``.
    """
    from . import model_report, report_log
    from .backend import check_inference, quantise_graph
    from .options import Options
    from .runner import Runner

    if isinstance(graph_module, RewrittenModule):
        return graph_module
    if "eval" not in vars(
        graph_module
    ):  # torch.export puts one there that refuses: its mode says nothing
        check_inference(graph_module)
    given: dict[str, Any] = {} if config is None else dict(config.to_dict())
    given |= {"compiler": "eager"} | ({"checkpoint": checkpoint} if checkpoint else {})
    chosen = Options.parse(None, given)
    gm = functional_form(graph_module, example_inputs)
    with report_log.collected() as graphs:
        runner = quantise_graph(gm, example_inputs, chosen, graph_module.forward)
    assert isinstance(runner, Runner)
    return RewrittenModule(gm, runner, model_report.model_report(graph_module, graphs))
