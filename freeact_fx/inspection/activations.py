"""Histograms of activations per token type, before and after the transform, for the groups of a report.

The model runs once, in its own precision, with an observer in front of each chosen group (the walk that calibration
uses). "before" is the activation as the group's Linears read it; "after" is what would be rounded to codes: shifted,
transformed, without the branch's part, and of a sliced plan only the token's own slice. With a checkpoint it is the
checkpoint's transform, of a converted model the model's own, else the data-free one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import has_values
from ..convert import FreeActLinear
from ..eligibility import matches
from ..errors import ConfigError
from ..options import Options
from ..packing import Packer
from ..passes.node_facts import LinearFact
from ..reference import transform
from ..report import ActivationReport, Report
from ..transform import GroupTransform, treats_types_alike

NUM_BINS = 128  # even: bins are merged in pairs about zero


class _Histogram:
    """Counts in equal bins from -limit to limit; the limit is a power of two and grows with what comes."""

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self.exponent: int | None = None
        self.num_tokens = 0

    def add(self, values: Tensor) -> None:
        """values  [m, K]; what is not finite is not counted"""
        self.num_tokens += values.shape[0]
        flat = values.double().flatten()
        flat = flat[flat.isfinite()]
        largest = float(flat.abs().max()) if flat.numel() else 0.0
        if largest == 0.0 and self.exponent is None:
            return
        needed = math.frexp(largest)[1] if largest else -1074
        while self.exponent is not None and self.exponent < needed:
            self._double()
        if self.exponent is None:
            self.exponent = needed
        limit = math.ldexp(1.0, self.exponent)
        bins = ((flat + limit) * (NUM_BINS / (2 * limit))).long().clamp_(0, NUM_BINS - 1)
        self.counts += bins.bincount(minlength=NUM_BINS).cpu()

    def _double(self) -> None:
        assert self.exponent is not None
        pairs, quarter = self.counts.view(-1, 2).sum(1), NUM_BINS // 4
        self.counts = torch.zeros_like(self.counts)
        self.counts[quarter : 3 * quarter] = pairs
        self.exponent += 1

    def edges(self) -> tuple[float, ...]:
        limit = math.ldexp(1.0, self.exponent or 0)
        return tuple(limit * (2 * i / NUM_BINS - 1) for i in range(NUM_BINS + 1))


class _Recorder:
    """Observes the groups of a report whose Linears match the patterns."""

    def __init__(
        self, report: Report, model: nn.Module, options: Options, patterns: Sequence[str]
    ) -> None:
        self._options = options
        self._groups = {
            name: group.name
            for group in report.groups
            for name in group.members
            if any(matches(member, patterns) for member in group.members)
        }
        self._names = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}
        self._converted: dict[int, FreeActLinear] = {}
        for name, module in model.named_modules():
            if isinstance(module, FreeActLinear):
                self._converted[id(module.weight_packed)] = module
                self._names[id(module.weight_packed)] = name
        self._histograms: dict[tuple[str, str, str], _Histogram] = {}

    @property
    def num_groups(self) -> int:
        return len(set(self._groups.values()))

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """The backend for ``torch.compile``."""
        from ..backend import observe_graph

        config = self._options.config_for(gm)
        packer = Packer(config, self._options.checkpoint)

        def observer(
            linears: list[tuple[LinearFact, Tensor, Tensor | None]],
        ) -> Callable[[Tensor, Tensor | None], None]:
            for linear, weight, _ in linears:
                name = self._names.get(id(weight), linear.name)
                if name in self._groups:
                    found = self._transform_of(name, linear, weight, packer)
                    default = config.num_types if linear.state == "refused" else 0
                    labels = config.row_names
                    group = self._groups[name]
                    return lambda x, types: self._take(group, found, labels, default, x, types)
            return lambda x, types: None

        return observe_graph(gm, example_inputs, config, observer)

    def _transform_of(
        self, name: str, linear: LinearFact, weight: Tensor, packer: Packer
    ) -> GroupTransform:
        module = self._converted.get(id(weight))
        if module is None:
            dense = weight.detach().t() if linear.transposed else weight.detach()
            found = packer.transform(name, dense)
            assert isinstance(found, GroupTransform), "the report has no group for it"
            return found
        return module.transform.to_group_transform()

    def _take(
        self,
        group: str,
        found: GroupTransform,
        labels: tuple[str, ...],
        default: int,
        x: Tensor,  # [..., K]
        types: Tensor | None,  # [...]
    ) -> None:
        rows = x.detach().flatten(0, -2)
        numbers = None if types is None else types.expand(x.shape[:-1]).reshape(-1)
        present = [default] if numbers is None else numbers.unique().tolist()
        for number in present:
            mine = rows if numbers is None else rows[numbers == number]
            index = number if 0 <= number < len(labels) else 0
            row = 0 if treats_types_alike(found.num_rows, len(labels) - 1) else index
            for stage, values in (("before", mine), ("after", _rounded_values(found, mine, row))):
                key = (group, labels[index], stage)
                self._histograms.setdefault(key, _Histogram()).add(values)

    def reports(self) -> list[ActivationReport]:
        return [
            ActivationReport(group, name, stage, h.edges(), tuple(h.counts.tolist()), h.num_tokens)
            for (group, name, stage), h in self._histograms.items()
        ]


def _rounded_values(t: GroupTransform, rows: Tensor, index: int) -> Tensor:
    """What is rounded of tokens [m, K] of type ``index``: their slice of the transformed values, [m, w]."""
    z, _ = transform(
        rows,
        None,
        t.shift,
        t.channel_scale,
        t.left,
        t.right,
        t.lowrank,
        t.widths,
        t.slice_of_type,
        index,
        t.own_rank,
    )
    own, width = t.slice_of_type[index], t.right.shape[-1]
    start = sum(t.widths[:own]) * width
    return z[:, start : start + t.widths[own] * width]


def record_activations(
    report: Report,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    patterns: Sequence[str],
) -> Report:
    """The report with ``activations`` of the groups of which a Linear matches.

    report        of the same model, inputs and options
    args, kwargs  inputs of the model; it is run once and stays as it is
    patterns      of names, as in ``QuantConfig.skip``: "*layers.0.*", "down_proj"

    Raises ConfigError if no group matches, or the model has no values.
    """
    from .. import compat

    if isinstance(patterns, str):
        patterns = (patterns,)
    if not all(has_values(p) for p in (*model.parameters(), *model.buffers())):
        raise ConfigError(
            f"explain(activations={tuple(patterns)}): {type(model).__name__} has parameters without values (on the "
            f"meta device, or fake). Load its weights, or leave activations out."
        )
    recorder = _Recorder(report, model, Options.parse(None, options), patterns)
    if not recorder.num_groups:
        example = report.groups[0].members[0] if report.groups else "none is quantised"
        raise ConfigError(
            f"explain(activations={tuple(patterns)}): no quantised Linear has such a name. Give patterns of "
            f"qualified names ({example!r}), or of last components."
        )
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            compat.traced_apart(model, recorder.compile) as traced,
        ):
            # The report says which Linears have default types.
            warnings.filterwarnings("ignore", "freeact: the token types of .* are not known")
            traced(*args, **kwargs)
    finally:
        model.train(was_training)
    return replace(report, activations=recorder.reports())
