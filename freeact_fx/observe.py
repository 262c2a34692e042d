"""Passes over the batches that collect the statistics of groups, as many groups at a time as fit into memory.

The model runs through the same ``detect`` and ``annotate`` as the backend, with an observer in front of each group. All
passes share the compiled graphs. In the first pass every group counts its tokens, and those that fit collect, in the
order in which the model reaches them; the others wait for a pass of their own. From then on it is known how often a
batch reaches each group, so a later pass leaves a batch as soon as its groups have seen all of it.

Every pass leaves a batch behind the last observer of a graph with which the call ends: what follows (the head of a
language model, a fifth of a small one's time) reaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import QuantConfig
from .errors import ConfigError
from .memory import free_bytes
from .progress import Progress
from .spool import Batches, run
from .statistics import GroupStatistics
from .token_moments import TokenMoments, TypeSplit

if TYPE_CHECKING:
    from .passes.node_facts import LinearFact


class _SeenAll(Exception):
    """Raised inside a model to leave it: nothing that collects is reached in the rest of this batch."""


@dataclass(eq=False)
class _Group:
    """A group as the model reached it."""

    statistics: GroupStatistics
    num_bytes: int
    collects: bool = False
    is_waiting: bool = True
    calls: dict[int, int] = field(default_factory=dict)  # batch -> how often it reached the group

    @property
    def device(self) -> torch.device:
        return self.statistics.weights[0].device


@dataclass(eq=False)
class _Graph:
    """A compiled graph with observers."""

    ends_the_call: bool
    num_observers: int = 0
    num_calls: int = 0  # of observers, since it was entered


class ObservedModel:
    """A model with observers, for several passes over the same batches. Made by ``observed``."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig,
        max_bytes: int | None,
        is_done: Callable[[list[str]], bool],
    ) -> None:
        self._config, self._max_bytes, self._is_done = config, max_bytes, is_done
        self._names = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._unsettled: list[_Group] = []
        self._taken: set[str] = set()
        self._budget: dict[torch.device, int] = {}
        self._room: dict[torch.device, int] = {}
        self._pass = self._batch = 0
        self._knows_calls = True
        self._calls_left: int | None = None
        self._split: tuple[Tensor | None, int, TypeSplit] | None = None
        self._padding: Tensor | None = None  # of this batch, [B, T] bool
        self.call: Callable[..., Any] = model

    @property
    def is_waiting(self) -> bool:
        """Whether a group needs another pass."""
        return any(group.is_waiting for group in self._groups.values())

    @property
    def groups(self) -> list[GroupStatistics]:
        """The groups of the model, in its order. Once a pass has been run, every Linear is in one of them."""
        return [g.statistics for g in self._groups.values() if g.statistics.names]

    def collect(self, batches: Batches, progress: Progress) -> list[GroupStatistics]:
        """Run a pass; the statistics that it completed, in the order of the model."""
        self._begin_pass()
        for self._batch, batch in batches:
            self._split, self._padding = None, padding_of(batch)
            collecting = [g for g in self._groups.values() if g.collects]
            if self._pass > 1 and self._knows_calls:
                self._calls_left = sum(g.calls.get(self._batch, 0) for g in collecting)
            if self._calls_left != 0:
                with suppress(_SeenAll):
                    run(self.call, batch)
            if self.is_waiting:
                self._check_sizes()
                batches.keep()
            passes = self._expect(progress, batches.total)
            label = f"observing {self._batch + 1} of {batches.total or '?'}"
            label += f", pass {self._pass} of {passes}" if passes > 1 else ""
            progress.step(progress.observing, 1, label)
        self._expect(progress, batches.total)
        return self._end_pass()

    # ------------------------------------------------------------------ passes

    def _begin_pass(self) -> None:
        self._pass += 1
        self._room = dict(self._budget)
        for group in self._groups.values():
            if group.is_waiting:
                self._admit(group)

    def _admit(self, group: _Group) -> None:
        """Let a group collect in this pass if it fits; if it does not, none behind it on its device does either."""
        device = group.device
        if device not in self._budget:
            self._budget[device] = self._max_bytes or free_bytes(device) // 2
            self._room[device] = self._budget[device]
        # Of the default budget, which is a guess, one group may take more.
        is_first = self._max_bytes is None and self._room[device] == self._budget[device]
        if group.num_bytes <= self._room[device] or is_first:
            self._room[device] -= group.num_bytes
            group.collects, group.is_waiting = True, False
            group.statistics.count.zero_()
        else:
            self._room[device] = 0

    def _check_sizes(self) -> None:
        # Not when a group is reached: Dynamo, compiling then, would wrap the error.
        for group in self._groups.values():
            if self._max_bytes is not None and group.num_bytes > self._max_bytes:
                raise ConfigError(
                    f"calibrate: {group.statistics.names[0]}: its statistics need {group.num_bytes} bytes, max_bytes "
                    f"is {self._max_bytes}. Raise it, or list the Linear in QuantConfig.skip."
                )

    def _end_pass(self) -> list[GroupStatistics]:
        """A Linear that was seen in several groups belongs to the largest, and of these to the one with most tokens."""
        seen = [g for g in self._unsettled if g.statistics.count.sum() > 0]
        for group in sorted(
            seen, key=lambda g: (-len(g.statistics.names), -float(g.statistics.count.sum()))
        ):
            group.statistics.keep_linears(lambda name: name not in self._taken)
            self._taken.update(group.statistics.names)
        for group in self._unsettled:
            if group.statistics.count.sum() == 0:
                group.statistics.keep_linears(lambda _: False)
            if not group.statistics.names or self._is_done(group.statistics.names):
                group.statistics.release()
                group.collects = group.is_waiting = False
        self._unsettled = []
        complete = [g for g in self._groups.values() if g.collects]
        for group in complete:
            group.collects = False
        return [g.statistics for g in complete]

    def _expect(self, progress: Progress, num_batches: int | None) -> int:
        """Tell how much work there is, as far as it is known; the number of passes."""
        waiting = [g for g in self._groups.values() if g.is_waiting]
        bytes_waiting: dict[torch.device, int] = {}
        for group in waiting:
            bytes_waiting[group.device] = bytes_waiting.get(group.device, 0) + group.num_bytes
        more = max((-(-n // self._budget[d]) for d, n in bytes_waiting.items()), default=0)
        passes = self._pass + more
        progress.observing.total = None if num_batches is None else float(num_batches * passes)
        to_fit = [g for g in self._groups.values() if g.collects or g.is_waiting]
        left = sum(fit_cost(group.statistics) for group in to_fit)
        progress.fitting.total = progress.fitting.done + left
        return passes

    # ------------------------------------------------------------------ observers

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """The backend for ``torch.compile``: the graph with observers."""
        from . import compat
        from .backend import observe_graph

        graph = _Graph(compat.ends_the_call(gm))

        def observer(
            linears: list[tuple[LinearFact, Tensor, Tensor | None]],
        ) -> Callable[[Tensor, Tensor | None], None]:
            graph.num_observers += 1
            group = self._reached(linears)
            return lambda x, types: self._take(graph, group, x, types)

        runner = observe_graph(gm, example_inputs, self._config, observer)

        def run_graph(*args: Any) -> Any:
            graph.num_calls = 0
            return runner(*args)

        return run_graph

    def _reached(self, linears: list[tuple[LinearFact, Tensor, Tensor | None]]) -> _Group:
        key = tuple(id(weight) for _, weight, _ in linears)
        if key in self._groups:
            return self._groups[key]
        config = self._config
        statistics = GroupStatistics(
            [self._names.get(id(weight), linear.name) for linear, weight, _ in linears],
            [w.t() if linear.transposed else w for linear, w, _ in linears],
            [bias for _, _, bias in linears],
            config,
        )
        num_features = statistics.weights[0].shape[1]
        needed = TokenMoments.bytes_needed(num_features, config.num_types, config.sample_tokens)
        group = self._groups[key] = _Group(statistics, needed)
        self._unsettled.append(group)
        if self._is_done(statistics.names):
            group.is_waiting = False
        elif self._pass == 1:
            self._admit(group)
        else:
            # Batches differ from reading to reading: what earlier ones reached says nothing.
            self._knows_calls, self._calls_left = False, None
        return group

    def _take(self, graph: _Graph, group: _Group, x: Tensor, types: Tensor | None) -> None:
        graph.num_calls += 1
        if self._pass == 1:
            group.calls[self._batch] = group.calls.get(self._batch, 0) + 1
        split = self._split_of(x, types)
        if group.collects:
            group.statistics.observe(x, split)
            if self._calls_left is not None:
                self._calls_left -= 1
        elif group in self._unsettled:
            group.statistics.count_tokens(split)
        is_end = graph.ends_the_call and graph.num_calls == graph.num_observers
        if is_end or self._calls_left == 0:
            raise _SeenAll

    def _split_of(self, x: Tensor, types: Tensor | None) -> TypeSplit:
        """The groups of a call mostly share one tensor of types."""
        num_tokens = x.numel() // x.shape[-1]
        if self._split is None or self._split[0] is not types or self._split[1] != num_tokens:
            padding = self._padding
            if padding is not None and x.shape[:-1] in (padding.shape, (padding.numel(),)):
                padding = padding.to(x.device)
            else:
                padding = None
            self._split = types, num_tokens, TypeSplit.of(types, num_tokens, padding)
        return self._split[2]


def padding_of(batch: Any) -> Tensor | None:
    """Where a batch says that its tokens are none: ``attention_mask`` [B, T] is 0. None: nowhere."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return mask == 0


def fit_cost(statistics: GroupStatistics) -> float:
    """About proportional to the time that fitting a group takes."""
    num_features = statistics.weights[0].shape[1]
    return num_features**2 * (num_features + sum(w.shape[0] for w in statistics.weights))


@contextmanager
def observed(
    model: nn.Module,
    config: QuantConfig,
    max_bytes: int | None,
    is_done: Callable[[list[str]], bool],
) -> Iterator[ObservedModel]:
    """A model with observers, in eval mode meanwhile.

    max_bytes  bound on the statistics on each device; None: half of what is free
    is_done    whether the group of these Linears needs no statistics
    """
    from . import compat

    observers = ObservedModel(model, config, max_bytes, is_done)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), compat.traced_apart(model, observers.compile) as traced:
            observers.call = traced
            yield observers
    finally:
        model.train(was_training)
