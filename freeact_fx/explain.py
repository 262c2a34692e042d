"""``freeact_fx.explain``: what happens to every Linear of a model, and why."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .report import Report


def explain(
    model: nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    code: bool = False,
    activations: Sequence[str] = (),
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
        ):
            traced(*positional, **named)
    finally:
        model.train(was_training)
    return graphs


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
