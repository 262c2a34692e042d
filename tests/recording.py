"""A ``torch.compile`` backend that shows what the real one did: the rewritten graphs, and the types Linears ran with.

The types are read out of the running graph (an ``fx.Interpreter`` over it), not out of the passes' own facts. Linears
are named by the identity of their weight, so the names are the model's across graph breaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from freeact_fx.backend import freeact
from freeact_fx.passes.node_facts import LinearFact, facts_of
from freeact_fx.rewrite import RewrittenModule
from freeact_fx.runner import Runner

TRANSFORMS = (
    torch.ops.freeact.transform_quantize.default,
    torch.ops.freeact.transform_quantize_branch.default,
)
PRODUCTS = (torch.ops.freeact.int_mm.default, torch.ops.aten.linear.default)


@dataclass
class Seen:
    """One run of one quantised Linear.

    types         [...] as the running graph had them; None: all tokens are ``default_type``
    default_type  that of the transform node
    leading       shape of the activation without its features
    weight        the packed weight it was multiplied with
    """

    name: str
    types: Tensor | None
    default_type: int
    leading: tuple[int, ...]
    weight: Tensor


@dataclass
class Graph:
    """One compiled graph: the rewritten module, how it is called, and the facts of its Linears."""

    module: GraphModule
    runner: Runner
    linears: list[LinearFact]
    num_calls: int = 0

    def count(self, *targets: Any) -> int:
        return sum(node.target in targets for node in self.module.graph.nodes)

    @property
    def num_transforms(self) -> int:
        return self.count(*TRANSFORMS)

    @property
    def num_products(self) -> int:
        return sum(_transform_of(node) is not None for node in self.module.graph.nodes)


def _transform_of(node: Node) -> Node | None:
    """The transform whose codes a product multiplies, or None: not a product of ours."""
    if node.target not in PRODUCTS or not isinstance(node.args[0], Node):
        return None
    codes = node.args[0]
    above = codes.args[0] if codes.args else None
    return above if isinstance(above, Node) and above.target in TRANSFORMS else None


class _Reader(Interpreter):
    """Runs a rewritten graph and notes the operands of its products."""

    def __init__(self, module: GraphModule, names: dict[Node, str], seen: list[Seen]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._names, self._seen = names, seen

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        transform = _transform_of(n)
        if transform is not None:
            types = None if transform.args[1] is None else self.env[transform.args[1]]
            default_at = 9 if transform.target is TRANSFORMS[0] else 10
            self._seen.append(
                Seen(
                    self._names[n],
                    None if types is None else types.clone(),
                    transform.args[default_at],  # type: ignore[arg-type]
                    tuple(self.env[transform.args[0]].shape[:-1]),
                    self.env[n.args[1]],
                )
            )
        return result


@dataclass
class Recorder:
    """``torch.compile(model, backend=Recorder(model, token_types=..., ...))``; ``options`` as for backend "freeact"."""

    model: nn.Module
    options: dict[str, Any]
    graphs: list[Graph] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.options = model, {"compiler": "eager", **options}
        self.graphs, self.seen = [], []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        runner = freeact(gm, example_inputs, options=self.options)
        assert isinstance(runner, Runner)
        module = runner.compiled.__self__  # type: ignore[attr-defined]
        graph = Graph(module, runner, facts_of(module))
        self.graphs.append(graph)
        num_inputs = len(example_inputs)

        def run(*args: Any) -> Any:
            graph.num_calls += 1
            return _Reader(module, self._names(graph, args, num_inputs), self.seen).run(*args)

        runner.compiled = run
        return runner

    def _names(self, graph: Graph, args: Sequence[Any], num_inputs: int) -> dict[Node, str]:
        """Which Linear each product is in this call: a graph may serve several layers."""
        own = {
            id(p): name.rpartition(".")[0]
            for name, p in [*self.model.named_parameters(), *self.model.named_buffers()]
        }
        placeholders = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
        names: dict[Node, str] = {}
        for node in graph.module.graph.nodes:
            if _transform_of(node) is None:
                continue
            at = placeholders.index(node.args[1])
            if at >= num_inputs:  # dense: fed with a packed copy
                _, index, _ = graph.runner.trailing.feeds[at - num_inputs]
                weight, _ = graph.runner.bindings.places[index].parameters(args)
            else:
                weight = args[at]
            names[node] = own[id(weight)]
        return names

    # ------------------------------------------------------------------ what was seen

    def compile(self, **kwargs: Any) -> nn.Module:
        """The model, compiled with this recorder."""
        return torch.compile(self.model, backend=self, **kwargs)  # type: ignore[return-value]

    def take(self) -> dict[str, Seen]:
        """What ran since the last call; every Linear at most once."""
        counts = Counter(s.name for s in self.seen)
        assert all(n == 1 for n in counts.values()), f"ran more than once: {counts}"
        found = {s.name: s for s in self.seen}
        self.seen.clear()
        return found

    @property
    def num_transforms(self) -> int:
        return sum(g.num_transforms for g in self.graphs)

    @property
    def num_products(self) -> int:
        return sum(g.num_products for g in self.graphs)

    @property
    def facts(self) -> dict[str, LinearFact]:
        """Facts by the name that the passes gave."""
        return {fact.name: fact for graph in self.graphs for fact in graph.linears}


def wrong_types(seen: dict[str, Seen], expected: Tensor) -> dict[str, str]:
    """The Linears whose types are not the expected ones [B, T], each with both."""
    wrong = {}
    for name, s in seen.items():
        types = torch.full(s.leading, s.default_type) if s.types is None else s.types
        if types.shape != expected.shape or not torch.equal(types.long(), expected.long()):
            wrong[name] = f"got {types.tolist()}, expected {expected.tolist()}"
    return wrong


def run_rewritten(rewritten: RewrittenModule, *inputs: Any) -> tuple[Any, list[Seen]]:
    """Call a rewritten FX graph: its output, and the runs of its quantised Linears."""
    runner, module = rewritten._runner, rewritten.graph_module
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    names = {}
    for node in module.graph.nodes:
        if _transform_of(node) is not None:
            at = placeholders.index(node.args[1]) - len(inputs)
            names[node] = facts_of(module)[runner.trailing.feeds[at][1]].name
    seen: list[Seen] = []
    compiled = runner.compiled
    runner.compiled = lambda *args: _Reader(module, names, seen).run(*args)
    try:
        return rewritten(*inputs), seen
    finally:
        runner.compiled = compiled
