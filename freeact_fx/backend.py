"""``torch.compile(model, backend="freeact")``: the whole walk in one short function.

::

    model -> Dynamo graph -> detect -> annotate -> insert -> Inductor lowering
          -> Triton kernel (GPU), fused C++ and oneDNN (CPU)

Dynamo finds ``freeact`` through the entry point group ``torch_dynamo_backends``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import compat
from .bindings import Bindings, LinearPlace
from .codegen import lowering
from .config import QuantConfig
from .convert import FreeActLinear
from .errors import ConfigError, UnsupportedLinear
from .graph_text import readable
from .logs import Watch
from .options import Options
from .packing import Packer, ShapePacker
from .passes.annotate import annotate_token_types
from .passes.detect import detect_linears
from .passes.editor import TrailingInputs
from .passes.insert import (
    TRAILING_KEY,
    LinearOperands,
    insert_freeact_ops,
    insert_observers,
    use_reference_product,
)
from .passes.node_facts import LinearFact, facts_of, tensor_of, value_of
from .reasons import Reason
from .report_log import GraphRecord, record
from .runner import DryRunner, Runner
from .transform import GroupTransform


def freeact(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. ``options`` are described in ``Options``; inference only.

    Raises ConfigError for options that do not exist or do not fit, and for a module in training mode;
    UnsupportedLinear under ``strict=True``. (Dynamo wraps both in ``BackendCompilerFailed``.)
    """
    chosen = Options.parse(mode, options)
    if not chosen.enabled:
        return (
            gm.forward
            if chosen.compiler == "eager"
            else compat.plain_inductor(gm, example_inputs, chosen.inductor)
        )
    check_inference(compat.traced_module())
    return quantise_graph(compat.copy_of_graph(gm), example_inputs, chosen, gm.forward)


def quantise_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    chosen: Options,
    original: Callable[..., Any],
) -> Callable[..., Any]:
    """The passes, then the compiler. ``gm`` is edited; ``original`` runs it as it was."""
    inputs = dict(zip(_placeholders(gm), example_inputs, strict=True))
    compat.name_arguments(gm)
    # A converted Linear says which types it was made for; detect needs no more than the options.
    config = chosen.config_for(gm)
    packer = _packer(gm, config, chosen)
    graph = compat.origin_of(gm)
    graph.num_nodes_before = len(gm.graph.nodes)
    watch = Watch(gm, chosen.inductor)

    # Which Linears there are, and which may be quantised.
    paths = compat.module_paths(example_inputs)
    with watch.step("detect"):
        gm = detect_linears(
            gm, inputs=inputs, config=config, paths=paths, converted=_is_of_converted_model(gm)
        )
    # Which tokens they see; facts only, so that a rule never meets a half-edited graph.
    with watch.step("annotate"):
        gm = annotate_token_types(gm, inputs=inputs, config=config)
    graph.label = _label(gm)
    graph.before = readable(gm) if chosen.code else None
    # The one edit: one transform per group, one integer product per Linear, epilogues as plain pointwise nodes.
    with watch.step("insert"):
        gm = insert_freeact_ops(
            gm, inputs=inputs, config=config, operands=_operands_of(gm, inputs, packer)
        )
    if "engine" in chosen.bypass:
        use_reference_product(gm)
    graph.num_nodes_after = len(gm.graph.nodes)
    graph.after = readable(gm) if chosen.code else None
    report = GraphRecord.of(gm, inputs, config, packer, graph, compat.outermost_module())
    watch.finish(report, quiet=chosen.dry_run)
    if config.strict and not chosen.dry_run:
        _raise_on_refusals(report, config)

    trailing: TrailingInputs = gm.meta[TRAILING_KEY]
    placeholders = _placeholders(gm)
    added = [value_of(node) for node in placeholders[len(example_inputs) :]]
    compiled: Callable[..., Any] = original
    if not chosen.dry_run:
        compiled = _compile(gm, [*example_inputs, *added], chosen, config.digest)
    places = [
        _place(linear, placeholders, gm, inputs, trailing.transforms.get(index))
        for index, linear in enumerate(facts_of(gm))
    ]
    bindings = Bindings(places, report, packer, config, compat.module_paths, chosen.dry_run)
    kind = DryRunner if chosen.dry_run else Runner
    runner = kind(compiled, original, trailing, bindings, config, graph.label)
    report.held_by(runner)
    record(report)
    return runner


def _packer(gm: GraphModule, config: QuantConfig, chosen: Options) -> Packer:
    if chosen.dry_run:
        return ShapePacker(config, chosen.checkpoint, compat.fake_mode_of(gm))
    return Packer(config, chosen.checkpoint)


def observe_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: QuantConfig,
    observer: Callable[[list[tuple[LinearFact, Tensor, Tensor | None]]], Callable[..., None]],
) -> Callable[..., Any]:
    """The same walk for calibration: an observer in front of each group, run eagerly.

    observer  gives the function that takes each activation and its types, for the Linears (with their dense weight
              and bias) that read it
    """
    compat.guard_identity(gm)
    gm = compat.copy_of_graph(gm)
    compat.name_arguments(gm)
    inputs = dict(zip(_placeholders(gm), example_inputs, strict=True))
    paths = compat.module_paths(example_inputs)
    gm = detect_linears(gm, inputs=inputs, config=config, paths=paths)
    gm = annotate_token_types(gm, inputs=inputs, config=config)

    def of_group(linears: list[LinearFact]) -> Callable[..., None]:
        parameters = [_parameters(gm, inputs, linear) for linear in linears]
        return observer([(f, *p) for f, p in zip(linears, parameters, strict=True)])

    gm = insert_observers(gm, inputs=inputs, config=config, observer=of_group)
    packer = Packer(config, None)
    bindings = Bindings(
        [], GraphRecord([], [], config, packer), packer, config, compat.module_paths
    )
    return Runner(gm.forward, gm.forward, gm.meta[TRAILING_KEY], bindings, config, _label(gm))


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], chosen: Options, digest: str
) -> Callable[..., Any]:
    if chosen.compiler == "eager":
        return gm.forward
    lowering.register()
    lowering.prepare({value.device for value in example_inputs if isinstance(value, Tensor)})
    return compat.compile_with_inductor(gm, example_inputs, chosen.inductor, digest)


def _is_of_converted_model(gm: GraphModule) -> bool:
    """True if a converted Linear is in the graph, or elsewhere in the model that is being called."""
    return any(node.target is torch.ops.freeact.linear.default for node in gm.graph.nodes) or any(
        isinstance(module, FreeActLinear)
        for root in compat.calling_modules()
        for module in root.modules()
    )


def _placeholders(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def _operands_of(
    gm: GraphModule, inputs: dict[Node, Any], packer: Packer
) -> Callable[[LinearFact], LinearOperands | Reason]:
    def operands(linear: LinearFact) -> LinearOperands | Reason:
        weight, bias = _parameters(gm, inputs, linear)
        found = packer.pack(linear.name, weight, bias, transposed=linear.transposed)
        return found if isinstance(found, str) else LinearOperands(*found)

    return operands


def _parameters(
    gm: GraphModule, inputs: dict[Node, Any], linear: LinearFact
) -> tuple[Tensor, Tensor | None]:
    weight = tensor_of(gm, linear.weight, inputs)
    assert weight is not None, "detect refuses a Linear without a weight"
    return weight, None if linear.bias is None else tensor_of(gm, linear.bias, inputs)


def _place(
    linear: LinearFact,
    placeholders: list[Node],
    gm: GraphModule,
    inputs: dict[Node, Any],
    transform: GroupTransform | None,
) -> LinearPlace:
    def locate(node: Node | None) -> Any:
        if node is None or node.op != "placeholder":
            return None if node is None else tensor_of(gm, node, inputs)
        return placeholders.index(node)

    weight = tensor_of(gm, linear.weight, inputs)
    return LinearPlace(
        locate(linear.weight),
        locate(linear.bias),
        linear.transposed,
        transform,
        weight.dtype if weight is not None and weight.is_floating_point() else None,
    )


def _label(gm: GraphModule) -> str:
    names = [linear.name for linear in facts_of(gm)]
    return f"the graph with {names[0]}" if names else "a graph without Linears"


def _raise_on_refusals(report: GraphRecord, config: QuantConfig) -> None:
    refused = [r for r in report.unexpected(config)]
    if refused:
        lines = "; ".join(f"{r.name}: {r.reason} ({r.way_out})" for r in refused)
        raise UnsupportedLinear(
            f"strict=True and {len(refused)} Linears cannot be quantised: {lines}. "
            f"List them in QuantConfig.skip, or set strict=False."
        )


def check_inference(module: torch.nn.Module | None) -> None:
    """Raise ConfigError for a module in training mode: quantised Linears have no gradients."""
    if module is not None and module.training:
        raise ConfigError(
            f"{type(module).__name__}: backend 'freeact' is for inference, but the module is in training "
            f"mode (training=True). Call model.eval() first."
        )
