"""``freeact_fx.explain``: what happens to every Linear of a model, and why."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import ConfigError
from .report import Report

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode


def explain(
    model: nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    code: bool = False,
    activations: Sequence[str] = (),
    timed: bool = False,
    **kwargs: Any,
) -> Report:
    """Report on every Linear of a model: shapes, group, token types, plan, precision, or why it is left alone.

    model         a module, also one on the meta device or of fake tensors; or one that ``torch.compile`` returned, then
                  without inputs the report tells of what has been compiled so far
    args, kwargs  inputs of the model: it is traced and run once, in its own precision; nothing is changed
    options       as for ``torch.compile(model, backend="freeact", options=...)``
    code          keep each graph as readable code, before and after the passes (``GraphReport.before``, ``after``);
                  of a compiled model those that were compiled with ``options={"code": True}`` have it
    activations   name patterns, as in ``QuantConfig.skip``: record histograms of the activations that these Linears'
                  groups read, per token type, before and after the transform (``Report.activations``)
    timed         compile and time each kind of group, dense and quantised, with as many tokens as the inputs have
                  (``timing.time_groups``), for ``LinearReport.time_ms``; needs inputs

    Raises ConfigError if there is nothing to report on.
    """
    from .model_report import model_report
    from .report_log import logged

    if isinstance(model, torch._dynamo.OptimizedModule) and not args and not kwargs:
        if activations:
            raise ConfigError(
                "explain(compiled, activations=...): activations are recorded while the model runs. Give explain "
                "the inputs too."
            )
        report = model_report(model._orig_mod, logged())
        if not report.num_graphs:
            raise ConfigError(
                "explain(compiled): nothing was compiled with backend='freeact' yet. Call the model "
                "first, or give explain the inputs."
            )
        return report
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    report = model_report(model, trace(model, args, kwargs, {**(options or {}), "code": code}))
    if activations:
        from .inspection.activations import record_activations

        report = record_activations(report, model, args, kwargs, options, activations)
    if timed:
        from .timing import fill_times, num_tokens_of, time_groups

        fill_times(report, time_groups(report, num_tokens=num_tokens_of(kwargs or args)))
    return report


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[Any]:
    """Run a model once with the passes in report mode; the graphs it consisted of."""
    from . import compat, report_log
    from .backend import freeact

    chosen = {**options, "dry_run": True}

    def report_only(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return freeact(gm, example_inputs, options=chosen)

    positional, named = _by_name(model, args, kwargs)
    was_training = model.training
    model.eval()
    try:
        with (
            report_log.collected() as graphs,
            torch.no_grad(),
            compat.traced_apart(model, report_only) as traced,
            _without_values(model, positional, named) as inputs,
        ):
            traced(*inputs[0], **inputs[1])
    finally:
        model.train(was_training)
    for graph in graphs:
        graph.model = weakref.ref(model)
    return graphs


@contextlib.contextmanager
def _without_values(model: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The inputs as a model needs them whose parameters are shapes only, on the meta device or fake; others as they
    are."""
    parameters = list(model.parameters())
    fake = next((p for p in parameters if isinstance(p, torch._subclasses.FakeTensor)), None)
    if fake is not None:
        mode = fake.fake_mode
        with mode:
            yield tree_map_only(torch.Tensor, _to_fake(mode), (args, kwargs))
    elif parameters and all(p.is_meta for p in parameters):
        # accelerate's init_empty_weights leaves buffers their values.
        held = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
        try:
            for module, name, buffer in held:
                module._buffers[name] = buffer.to("meta")
            yield tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        finally:
            for module, name, buffer in held:
                module._buffers[name] = buffer
    else:
        yield args, kwargs


def _to_fake(mode: FakeTensorMode) -> Callable[[torch.Tensor], torch.Tensor]:
    def to_fake(tensor: torch.Tensor) -> torch.Tensor:
        is_fake = isinstance(tensor, torch._subclasses.FakeTensor)
        return tensor if is_fake else mode.from_tensor(tensor, static_shapes=True)

    return to_fake


def _by_name(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand positional inputs over by name, where they have one, so that the report can call them by it."""
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(args)]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters) or len(parameters) < len(
        args
    ):
        return args, dict(kwargs)
    return (), {**{p.name: a for p, a in zip(parameters, args, strict=True)}, **kwargs}
