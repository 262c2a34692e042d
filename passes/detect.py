"""Mark every Linear of a graph, and say of each whether it can be quantised.

Recognised: ``torch._C._nn.linear`` / ``aten.linear`` (weight [N, K]); ``addmm`` and ``mm``/``matmul`` with a
two-dimensional parameter, plain ([K, N], transformers' ``Conv1D``) or transposed; and ``freeact::linear``, which is
what a converted module's forward is. Nothing is edited. After this pass each such node carries a ``LinearFact``; one
that stays as it is has a ``refusal``. Whether it belongs to a vision tower is for ``annotate`` to find out.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from freeact_fx.config import QuantConfig
from freeact_fx.eligibility import ineligible_reason, matches
from freeact_fx.reasons import Reason, reason

from .node_facts import (
    LINEAR_KEY,
    LINEARS_KEY,
    LinearFact,
    linears_of,
    op_name,
    qualified_name,
    tensor_of,
    value_of,
)
from .roots import ancestors, is_own

LINEAR_ARGUMENTS = tuple(
    argument.name for argument in torch.ops.freeact.linear.default._schema.arguments
)


def detect_linears(
    gm: GraphModule,
    *,
    inputs: dict[Node, Any],
    config: QuantConfig,
    paths: Mapping[int, str] | None = None,
    converted: bool = False,
) -> GraphModule:
    """Hang a ``LinearFact`` on every Linear node.

    inputs     the values that placeholders were given
    paths      module path of a parameter by its id, where it is known better than the graph tells
    converted  the graph is of a model with converted Linears; then dense ones were left so on purpose
    """
    tables = _embedding_tables(gm, inputs)
    for node in gm.graph.nodes:
        fact = _linear_fact(gm, node, inputs, paths or {})
        if fact is None:
            continue
        if not fact.converted:
            weight = tensor_of(gm, fact.weight, inputs)
            tied = fact.weight in tables or any(weight is t for t in tables.values())
            fact.refusal = _refusal(fact, weight, tied, config)
            if fact.refusal is None and converted and not matches(fact.name, config.include):
                fact.refusal = reason("left_dense")
        node.meta[LINEAR_KEY] = fact
    gm.meta[LINEARS_KEY] = [fact for _, fact in linears_of(gm)]
    gm.graph.lint()
    return gm


def _embedding_tables(gm: GraphModule, inputs: dict[Node, Any]) -> dict[Node, Tensor | None]:
    tables = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and op_name(node) == "embedding":
            table = next((a for a in node.args if isinstance(a, Node) and _is_table(a)), None)
            if table is not None:
                tables[table] = tensor_of(gm, table, inputs)
    return tables


def _is_table(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _linear_fact(
    gm: GraphModule, node: Node, inputs: dict[Node, Any], paths: Mapping[int, str]
) -> LinearFact | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is torch.ops.freeact.linear.default:
        operands: dict[str, Any] = dict(zip(LINEAR_ARGUMENTS, node.args, strict=False))
        operands |= node.kwargs
        x, weight = operands["x"], operands["weight"]
        num_outputs, num_features = value_of(weight).shape[0], value_of(x).shape[-1]
        name = _module_name(node, weight, tensor_of(gm, weight, inputs), paths)
        return LinearFact(
            name, num_features, num_outputs, x, weight, operation="converted", operands=operands
        )
    op = op_name(node)
    bias: Any = None
    transposed = True
    if op == "linear":
        x, weight, bias = _arguments(node, ("input", "weight", "bias"))
        transposed = False
    elif op == "addmm":
        bias, x, weight = _arguments(node, ("input", "mat1", "mat2"))
    elif op in ("mm", "matmul"):
        x, weight, _ = _arguments(node, ("input", "mat2", ""))
    else:
        return None
    if (
        isinstance(weight, Node)
        and op != "linear"
        and op_name(weight) in ("t", "transpose", "permute")
    ):
        if op_name(weight) != "t" and value_of(weight).dim() != 2:
            return None
        transposed, weight = False, weight.args[0]
    if not isinstance(weight, Node) or not isinstance(x, Node) or _is_transformed(x):
        return None
    shape: tuple[Any, ...] = getattr(value_of(weight), "shape", ())
    is_parameter = _is_parameter(gm, weight, inputs)
    if op != "linear" and (len(shape) != 2 or not is_parameter):
        return None  # an ordinary matrix product
    if op != "linear" and _is_parameter(gm, x, inputs):
        return None  # weights among themselves (an adapter that is merged in the graph)
    if len(shape) != 2:
        return None
    num_outputs, num_features = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    bias = bias if isinstance(bias, Node) else None
    name = _module_name(node, weight, tensor_of(gm, weight, inputs), paths)
    return LinearFact(name, num_features, num_outputs, x, weight, bias, transposed, op)


def _is_transformed(x: Node) -> bool:
    """True for what ``insert`` made of a Linear when the quantisers are off."""
    source = x.args[0] if x.target is operator.getitem else None
    return isinstance(source, Node) and source.target in (
        torch.ops.freeact.transform_quantize.default,
        torch.ops.freeact.transform_quantize_branch.default,
    )


def _arguments(node: Node, names: tuple[str, ...]) -> tuple[Any, ...]:
    found = list(node.args[: len(names)])
    return tuple(
        found[i] if i < len(found) else node.kwargs.get(name) for i, name in enumerate(names)
    )


def _is_parameter(gm: GraphModule, node: Node, inputs: dict[Node, Any]) -> bool:
    """A module's parameter or buffer, not an activation that is handed in."""
    if node.op == "get_attr":
        return tensor_of(gm, node, inputs) is not None
    if node.op != "placeholder":
        return False
    return isinstance(inputs.get(node), torch.nn.Parameter) or qualified_name(node).endswith(
        "weight"
    )


def _module_name(node: Node, weight: Node, tensor: Tensor | None, paths: Mapping[int, str]) -> str:
    if tensor is not None and paths.get(id(tensor)):
        return paths[id(tensor)]
    if weight.op not in ("placeholder", "get_attr"):
        weight = _computed_from(weight) or weight
    if weight.op in ("placeholder", "get_attr"):
        name = qualified_name(weight).rpartition(".")[0] or qualified_name(weight)
        return name.partition(".parametrizations")[0]
    return node.name


def _computed_from(weight: Node) -> Node | None:
    """The parameter that a weight is made of by an adapter or the like: one of its shape."""
    shape = getattr(value_of(weight), "shape", None)
    above = [n for n in ancestors([weight]) if is_own(n)]
    alike = [n for n in above if getattr(value_of(n), "shape", None) == shape]
    return min(
        alike, key=lambda n: (not qualified_name(n).endswith("weight"), n.name), default=None
    )


def _refusal(
    fact: LinearFact, weight: Tensor | None, tied: bool, config: QuantConfig
) -> Reason | None:
    if weight is None:
        return reason("computed_weight", node=fact.weight.name)
    if fact.bias is not None and fact.bias.op not in ("placeholder", "get_attr"):
        return reason("computed_bias", node=fact.bias.name)
    return ineligible_reason(
        fact.name, int(weight.shape[0 if fact.transposed else 1]), weight, tied, config
    )
