"""Whose weights a compiled graph is called with.

Dynamo compiles the forward of a layer class once and calls the graph with each layer's parameters (if a graph break
keeps the layers apart, or each is compiled by itself). So a graph is bound anew for every set of weights it meets:
names, transforms and packed weights are those of the layer that is running. Where another layer cannot use the graph
(its plan has other shapes, or it was skipped by name), that layer runs the graph as it was before the passes.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import QuantConfig
from .eligibility import matches
from .errors import ConfigError
from .packing import Packer
from .reasons import Reason, reason
from .report_log import GraphRecord, record
from .transform import GroupTransform, PackedLinear


@dataclass(frozen=True)
class LinearPlace:
    """Where a Linear's parameters are among the arguments of a graph (or the parameters themselves).

    transform  what the graph was built for, if it is a dense Linear that was replaced
    dtype      of the weight when the graph was compiled, if it is a dense parameter
    """

    weight: int | Tensor | None
    bias: int | Tensor | None
    transposed: bool
    transform: GroupTransform | None
    dtype: torch.dtype | None = None

    def parameters(self, args: Sequence[Any]) -> tuple[Any, Tensor | None]:
        weight = args[self.weight] if isinstance(self.weight, int) else self.weight
        bias = args[self.bias] if isinstance(self.bias, int) else self.bias
        return weight, bias


def _check_dtype(name: str, place: LinearPlace, weight: Tensor) -> None:
    """torch 2.11 does not compile anew after ``model.to(dtype)``: the graph would read one dtype as another."""
    if place.dtype is not None and weight.dtype is not place.dtype:
        raise ConfigError(
            f"{name}: its weight was {place.dtype} when the graph was compiled and is {weight.dtype} now, and torch "
            f"{torch.__version__} did not compile anew. Call torch.compiler.reset() after model.to(dtype)."
        )


@dataclass
class Binding:
    """One set of weights: their names, and why they cannot run here, or None."""

    weights: list[weakref.ref[Tensor] | None]
    names: list[str]
    problem: str | None = None


@dataclass
class Bindings:
    """The sets of weights that one graph has met.

    places    all Linears of the graph, replaced or not, in the order of ``report``
    paths_of  module paths of tensors by id, in the model that is being called
    quiet     a dry run: what cannot run is in the report
    """

    places: list[LinearPlace]
    report: GraphRecord
    packer: Packer
    config: QuantConfig
    paths_of: Callable[[Sequence[Tensor]], dict[int, str]]
    quiet: bool = False
    _known: dict[tuple[int, ...], Binding] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """What each call needs, so that one step of a large converted model does not wait for Python."""
        self._dense = [(i, p) for i, p in enumerate(self.places) if p.transform or p.dtype]
        positions = [p.weight for p in self.places if isinstance(p.weight, int)]
        self._weights_of: Callable[[Sequence[Any]], Sequence[Any]] = self._any_weights_of
        if len(positions) == len(self.places) > 1:
            self._weights_of = operator.itemgetter(*positions)

    def of(self, args: Sequence[Any]) -> Binding:
        weights = self._weights_of(args)
        key = tuple(map(id, weights))
        binding = self._known.get(key)
        if binding is None:
            binding = self._known[key] = self._bind(key, weights, args)
        return binding

    def _any_weights_of(self, args: Sequence[Any]) -> list[Any]:
        return [place.parameters(args)[0] for place in self.places]

    def pack(
        self, binding: Binding, args: Sequence[Any]
    ) -> list[tuple[GroupTransform, PackedLinear] | Reason | None]:
        """Transform and packed weight of every dense Linear that was replaced, or why there are none."""
        found: list[tuple[GroupTransform, PackedLinear] | Reason | None] = [None] * len(self.places)
        for index, place in self._dense:
            (weight, bias), name = place.parameters(args), binding.names[index]
            _check_dtype(name, place, weight)
            if place.transform is not None:
                found[index] = self.packer.pack(name, weight, bias, transposed=place.transposed)
        return found

    def _bind(self, key: tuple[int, ...], weights: Sequence[Any], args: Sequence[Any]) -> Binding:
        known = self._known

        def forget(_: Any) -> None:
            """With the first of its weights: another tensor may then be where that was."""
            known.pop(key, None)

        refs: list[weakref.ref[Tensor] | None] = [
            w if w is None else weakref.ref(w, forget) for w in weights
        ]
        compiled_for = [ref and ref() for _, ref in self.report.linears]
        rows = [row for row, _ in self.report.linears]
        if all(a is b for a, b in zip(weights, compiled_for, strict=True)):
            return Binding(refs, [row.name for row in rows])
        paths = self.paths_of(weights)
        names = [paths.get(id(w), row.name) for w, row in zip(weights, rows, strict=True)]
        binding = Binding(refs, names)
        problem = self._problem(binding, args)
        record(self.report.bound(names, refs, problem))
        if problem is not None:
            binding.problem = f"{problem[0]}: {problem[1]}"
        if problem is not None and not self.quiet:
            warnings.warn(
                f"freeact: {names[0]} shares a compiled graph with {rows[0].name} and stays as it was. "
                f"{binding.problem}. freeact_fx.convert(model, checkpoint) does not have this limit.",
                stacklevel=4,
            )
        return binding

    def _problem(self, binding: Binding, args: Sequence[Any]) -> tuple[str, Reason] | None:
        """A Linear that cannot run in this graph with these weights, and why; or None."""
        own: dict[int, GroupTransform] = {}
        other = self.report.linears[0][0].name
        for place, name, found in zip(
            self.places, binding.names, self.pack(binding, args), strict=True
        ):
            if place.transform is None or found is None:
                continue
            if isinstance(found, Reason):
                return name, found
            if matches(name, self.config.skip) and not matches(name, self.config.include):
                return name, reason("skipped", skip=list(self.config.skip))
            transform, theirs = found[0], place.transform
            if _structure(transform) != _structure(theirs):
                plans = {"own": transform.plan, "theirs": theirs.plan}
                return name, reason("other_plan", other=other, **plans)
            if own.setdefault(id(theirs), transform) is not transform:
                return name, reason("other_group", other=other)
        return None


def _structure(transform: GroupTransform) -> tuple[Any, ...]:
    """What of a transform is part of a graph, and not an input."""
    shapes = {name: tuple(tensor.shape) for name, tensor in transform.tensors().items()}
    return transform.widths, transform.slice_of_type, transform.own_rank, shapes
