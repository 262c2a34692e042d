"""Adding to a graph: calls with their fake values, and placeholders for tensors that the graph did not have.

Only OpOverload calls are added, each with its fake value: AOTAutograd's cache refuses anything else. New placeholders
are *trailing* (``TrailingInputs`` says what to feed them): positions of the original arguments never change. What is
added keeps the place in the source of the user's node that it stands for, and its name says which Linear it belongs to.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from freeact_fx.config import QuantConfig
from freeact_fx.transform import GroupTransform

from .node_facts import Size, constant_size, set_value, value_of
from .sizes import SizeReader, Sizes

aten = torch.ops.aten

# What torch's errors, logs and profilers read: the user's line, his module, his function, his annotations.
KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


@dataclass
class RootInput:
    """What the runner has to know of a root.

    name       the argument that holds the ids, or the hidden states
    shape      of its type tensor, from the arguments of a call
    device     of its type tensor
    is_ids     its types show in ids; False: in what an earlier graph recorded for one of ``holders``
    holders    positions of the arguments that hold its hidden states
    is_needed  a Linear's types rest on it alone, no merge says more
    """

    name: str
    shape: SizeReader
    device: torch.device
    is_ids: bool
    holders: tuple[int, ...] = ()
    is_needed: bool = False


@dataclass
class TrailingInputs:
    """What to feed the placeholders that were added, in order.

    feeds         ("transform" or "packed", the Linear's position in ``facts_of(gm)``, field of its transform or
                  packed weight) | ("explicit" or "recorded", ``RootInput``)
    transforms    of the dense Linears that were replaced, by that position
    roots         where tokens come in
    recorded      for each added output: position of the original output whose types it holds, the roots that it
                  says nothing without, and what the graph says about them, in words
    num_outputs   outputs the graph had before
    """

    feeds: list[tuple[Any, ...]] = field(default_factory=list)
    transforms: dict[int, GroupTransform] = field(default_factory=dict)
    roots: list[RootInput] = field(default_factory=list)
    recorded: list[tuple[int, list[RootInput], list[str]]] = field(default_factory=list)
    num_outputs: int = 0


class Editor:
    """Adds nodes and placeholders to a graph, with their fake values."""

    def __init__(self, gm: GraphModule, inputs: dict[Node, Any], config: QuantConfig) -> None:
        self.gm, self.inputs, self.config = gm, inputs, config
        self.graph = gm.graph
        self.trailing = TrailingInputs()
        self._tensors: dict[int, tuple[Tensor, Node]] = {}  # by id, so each is kept alive
        self._label = "added"
        self._like: Node | None = None
        values = (value_of(n) for n in self.graph.nodes)
        fakes = [v for v in values if isinstance(v, torch._subclasses.FakeTensor)]
        self.fake_mode = fakes[0].fake_mode if fakes else torch._subclasses.FakeTensorMode()

    # ------------------------------------------------------------------ nodes

    @contextlib.contextmanager
    def part_of(self, label: str, node: Node | None = None) -> Iterator[None]:
        """``label`` begins the names of what is added in this context; it takes the place in the source of the user's
        ``node`` (None: of the one before)."""
        outer = self._label, self._like
        self._label, self._like = label.replace(".", "_"), node or self._like
        try:
            yield
        finally:
            self._label, self._like = outer

    def call(self, op: Any, *args: Any, called: str | None = None, **kwargs: Any) -> Node:
        """Add a call at the insertion point; its name ends in ``called`` (None: the name of the op)."""
        fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), value_of)
        # Why the dispatcher: torch 2.11 does not know symbolic sizes in composite ops like linear without it.
        with self.fake_mode, enable_python_dispatcher():
            value = op(*fake_args, **fake_kwargs)
        called = called or op._schema.name.partition("::")[2]
        node = self.graph.create_node(
            "call_function", op, args, kwargs, name=f"{self._label}_{called}"
        )
        return self._described(node, value)

    def item(self, node: Node, index: int, called: str) -> Node:
        """Add one output of a call that has several."""
        item = self.graph.create_node(
            "call_function", operator.getitem, (node, index), name=f"{self._label}_{called}"
        )
        return self._described(item, value_of(node)[index])

    def _described(self, node: Node, value: Any) -> Node:
        """Give a node its fake value, and its place in the source."""
        set_value(node, value)
        if self._like is not None:
            node.meta.update({k: self._like.meta[k] for k in KEPT_META if k in self._like.meta})
        return node

    def size(self, node: Node, dim: int) -> int | Node:
        """A size of a node's value, for the arguments of a call."""
        constant = constant_size(value_of(node).shape[dim])
        return self.call(aten.sym_size.int, node, dim) if constant is None else constant

    def size_argument(self, size: Size) -> int | Node:
        """A size that may be of no node's value, computed from the shapes of the graph's inputs."""
        constant = constant_size(size)
        if constant is not None:
            return constant
        assert isinstance(size, torch.SymInt)
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        symbols = {}
        for symbol, (position, dim) in Sizes(self.gm).places.items():
            if symbol in size.node.expr.free_symbols:
                node = placeholders[position]
                if dim is not None:
                    node = self.call(aten.sym_size.int, node, dim)
                symbols[symbol] = torch.fx.Proxy(node)
        result: Node = sympy_interp(PythonReferenceAnalysis, symbols, size.node.expr).node
        self._set_size(result)
        return result

    def _set_size(self, node: Node) -> None:
        """Give the arithmetic that computes a size its values."""
        if value_of(node) is None:
            for argument in node.all_input_nodes:
                self._set_size(argument)
            assert callable(node.target)
            self._described(node, node.target(*torch.fx.node.map_arg(node.args, value_of)))

    def placeholder(self, name: str, value: Tensor, feed: tuple[Any, ...]) -> Node:
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1:]
        with (
            self.graph.inserting_after(last[0])
            if last
            else self.graph.inserting_before(next(iter(self.graph.nodes)))
        ):
            node = self.graph.placeholder(
                f"freeact_{self._label}_{name}_{len(self.trailing.feeds)}"
            )
        set_value(node, value)
        node._dynamo_source = None
        node.meta["tensor_dict"] = {}
        if feed[0] in ("transform", "packed"):
            node.meta["tensor_dict"]["_dynamo_static_input_type"] = "unguarded"
        self.trailing.feeds.append(feed)
        return node

    def tensor_input(self, name: str, tensor: Tensor, feed: tuple[Any, ...]) -> Node:
        """A trailing placeholder for a tensor of ours; one per tensor."""
        if id(tensor) not in self._tensors:
            fake = tensor  # of a dry run
            if not isinstance(tensor, torch._subclasses.FakeTensor):
                fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
            self._tensors[id(tensor)] = (tensor, self.placeholder(name, fake, feed))
        return self._tensors[id(tensor)][1]
