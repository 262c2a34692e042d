"""``freeact_fx.explain``: what happens to every Linear of a model, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .report import Report


def explain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Report on every Linear of a model: shapes, group, token types, plan, precision, or why it is left alone.

    model         a module; or one that ``torch.compile`` returned, then without inputs the report tells of what has
                  been compiled so far
    args, kwargs  inputs of the model: it is traced and run once, in its own precision; nothing is changed
    options       as for ``torch.compile(model, backend="freeact", options=...)``

    Raises ConfigError if there is nothing to report on.
    """
    from . import report_log

    if isinstance(model, torch._dynamo.OptimizedModule) and not args and not kwargs:
        report = report_log.model_report(model._orig_mod, report_log.logged())
        if not report.num_graphs:
            raise ConfigError(
                "explain(compiled): nothing was compiled with backend='freeact' yet. Call the model "
                "first, or give explain the inputs."
            )
        return report
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    graphs = trace(model, args, kwargs, options)
    return report_log.model_report(model, graphs)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> list[Any]:
    """Run a model once with the passes in report mode; the graphs it consisted of."""
    from . import compat, report_log
    from .backend import freeact

    chosen = {**(options or {}), "dry_run": True, "compiler": "eager"}

    def report_only(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return freeact(gm, example_inputs, options=chosen)

    was_training = model.training
    model.eval()
    try:
        with (
            report_log.collected() as graphs,
            torch.no_grad(),
            compat.traced_apart(model, report_only) as traced,
        ):
            traced(*args, **kwargs)
    finally:
        model.train(was_training)
    return graphs
