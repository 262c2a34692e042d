"""Add nodes to an ATen graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node


def add_call(graph: Graph, op: Any, *args: Any, **kwargs: Any) -> Node:
    """A call of an op where the graph inserts, with its value on fake tensors in ``meta``."""
    node = graph.call_function(op, args, kwargs)
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    first = next(v for n in node.all_input_nodes for v in _tensors(n.meta["val"]))
    with first.fake_mode:
        node.meta["val"] = op(*values, **kwargs)
    return node


def _tensors(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
