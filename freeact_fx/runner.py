"""What the backend hands back to Dynamo: the compiled graph, fed with the inputs that the passes added.

At each call the runner looks up the packed weights of dense Linears (anew if a weight changed) and the token types that
come from outside the graph: those of an enclosing ``freeact_fx.token_types``, else those that an earlier graph recorded
for the hidden states that come in here (after a graph break), else none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .bindings import Binding, Bindings
from .config import QuantConfig
from .errors import ConfigError
from .profiler_names import named_graph
from .report_log import Recorded
from .token_types import TokenTypes, check_type_range, explicit_types

# Hidden states that left a graph -> ``Recorded``.
_recorded: WeakIdKeyDictionary = WeakIdKeyDictionary()
# The same of a dry run, which knows no types.
_left_dry: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Type tensors whose numbers are known to be in range, by version: checking waits for the device, so it is done once.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Shapes of tokens whose tensor of no types a runner keeps.
_MOST_SHAPES = 8


class _Root(Protocol):
    name: str
    shape: Callable[[Sequence[Any]], tuple[int, ...]]
    device: torch.device
    is_ids: bool
    holders: tuple[int, ...]
    is_needed: bool


class _Trailing(Protocol):
    feeds: list[tuple[Any, ...]]
    roots: list[Any]  # of _Root
    recorded: list[tuple[int, list[Any], list[str]]]
    num_outputs: int


@dataclass
class Runner:
    """Callable with the original arguments; returns the original outputs."""

    compiled: Callable[..., Any]
    original: Callable[..., Any]
    trailing: _Trailing
    bindings: Bindings
    config: QuantConfig
    label: str
    _warned: bool = field(default=False, init=False)
    _untyped: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False)

    @property
    def _kept(self) -> WeakIdKeyDictionary:
        return _recorded

    def __call__(self, *args: Any) -> Any:
        binding = self.bindings.of(args)
        if binding.problem is not None:
            with torch.no_grad():
                return self.original(*args)
        operands = self.bindings.pack(binding, args)
        extra: list[Any] = []
        unknown: list[_Root] = []
        for root in self.trailing.roots:
            self._notice(root, args)
        for kind, what, *name in self.trailing.feeds:
            if kind in ("transform", "packed"):
                found = operands[what]
                if not isinstance(found, tuple):
                    raise ConfigError(f"{binding.names[what]}: {found}.")
                extra.append(getattr(found[kind == "packed"], name[0]))
            elif kind == "explicit":
                extra.append(self._explicit(what, args))
            else:
                found = self._recorded(what, args)
                if found is None and explicit_types() is None:
                    unknown.append(what)
                extra.append(self._no_types(what, args) if found is None else found.types)
        if any(root.is_needed for root in unknown):
            self._warn_default()
        with named_graph(lambda: self._named_weights(binding, operands, args)), torch.no_grad():
            outputs = self.compiled(*args, *extra)
        if not self.trailing.recorded:
            return outputs
        own = outputs[: self.trailing.num_outputs]
        self._record(own, outputs[self.trailing.num_outputs :], unknown, args)
        return own

    def _record(
        self,
        outputs: Sequence[Any],
        types: Sequence[Tensor | None],
        unknown: Sequence[_Root],
        args: Sequence[Any],
    ) -> None:
        """Keep what is known of the hidden states that leave this graph, for the next one."""
        graph = self.bindings.report
        earlier: list[Any] = []
        for root in self.trailing.roots:
            if not root.is_ids and (found := self._recorded(root, args)) is not None:
                earlier += found.claims
        for (position, roots, claims), of_output in zip(self.trailing.recorded, types, strict=True):
            tensor = outputs[position]
            # Types that rest on nothing must not be taken for known ones by the next graph.
            if isinstance(tensor, Tensor) and not _among(roots, unknown):
                own = [(graph, claim) for claim in claims]
                if explicit_types() is not None:
                    own.append((graph, "token_types()"))
                told = tuple(dict.fromkeys([*earlier, *own]))
                self._kept[tensor] = Recorded(_version(tensor), of_output, graph, told)

    def _notice(self, root: _Root, args: Sequence[Any]) -> None:
        """Tell the report who says which types the tokens of a root have."""
        report = self.bindings.report
        given = explicit_types()
        if given is not None and tuple(given.shape) == root.shape(args):
            report.notice(root.name, "handed in")
        elif root.is_ids:
            report.notice(root.name, "ids")
        elif (found := self._recorded(root, args)) is not None:
            report.notice(root.name, "an earlier graph", found)
        elif root.is_needed:
            report.notice(root.name, "unknown")

    def _named_weights(
        self, binding: Binding, operands: Sequence[Any], args: Sequence[Any]
    ) -> list[tuple[str, Tensor]]:
        """The packed weight of each Linear that this call multiplies with."""
        weights = [
            found[1].weight if isinstance(found, tuple) else place.parameters(args)[0]
            for place, found in zip(self.bindings.places, operands, strict=True)
        ]
        return [(n, w) for n, w in zip(binding.names, weights, strict=True) if w is not None]

    def _explicit(self, root: _Root, args: Sequence[Any]) -> Tensor:
        """Types that an enclosing ``token_types`` hands in, [B, T] int32; -1 where there are none.

        Why not copied to an address that stays: a CUDA graph of Inductor's copies its inputs to such a one itself, and
        without a graph the next call could overwrite what a kernel on another stream still reads.
        """
        types = self._handed_in(root, args)
        return self._no_types(root, args) if types is None else types.to(root.device)

    def _handed_in(self, root: _Root, args: Sequence[Any]) -> Tensor | None:
        """What the enclosing ``token_types`` says of a root's tokens; raises ConfigError if it fits no root."""
        shape = root.shape(args)
        types = explicit_types()
        if types is None:
            return None
        if tuple(types.shape) != shape:
            if any(tuple(types.shape) == other.shape(args) for other in self.trailing.roots):
                return None
            raise ConfigError(
                f"token_types(types): the tokens of {self.label} have shape {list(shape)}, "
                f"types has {list(types.shape)}. Give one type per token of this call."
            )
        version = _version(types)
        if _checked.get(types) != version:
            check_type_range(types, self.config.type_names)
            _checked[types] = version
        return types

    def _no_types(self, root: _Root, args: Sequence[Any]) -> Tensor:
        """-1 for each token. One tensor for all calls of a shape on a stream: graphs read it, and none writes it."""
        shape, device = root.shape(args), root.device
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():  # its memory is the graph's
                return _full_of_no_type(shape, device)
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (shape, device, stream)
        found = self._untyped.pop(key, None)
        if found is None:
            with torch.inference_mode(False):  # calls outside of that mode may read it, too
                found = _full_of_no_type(shape, device)
        self._untyped[key] = found
        if len(self._untyped) > _MOST_SHAPES:
            del self._untyped[next(iter(self._untyped))]  # not used for the longest time
        return found

    def _recorded(self, root: _Root, args: Sequence[Any]) -> Recorded | None:
        """What an earlier graph recorded for the hidden states that come in."""
        shape = root.shape(args)
        for holder in root.holders:
            found = self._kept.get(args[holder])
            if found is None or found.version != _version(args[holder]):
                continue
            if found.types is None or tuple(found.types.shape) == shape:
                return found
        return None

    def _warn_default(self) -> None:
        """Types exist, but nothing says which tokens have them: say so once."""
        types = self.config.token_types
        several = len(types.types) > 1 and (types != TokenTypes.auto() or bool(_recorded))
        if self._warned or not several:
            return
        self._warned = True
        warnings.warn(
            f"freeact: the token types of {self.label} are not known (its hidden states come in from outside "
            f"the graph); its Linears use the default type {self.config.type_names[0]!r}. Call the model "
            f"inside freeact_fx.token_types(types).",
            stacklevel=3,
        )


class DryRunner(Runner):
    """Runs the graph as it was, and tells the report what ``Runner`` would have found out."""

    def __call__(self, *args: Any) -> Any:
        self.bindings.of(args)
        unknown: list[_Root] = []
        for root in self.trailing.roots:
            self._handed_in(root, args)  # raises what a run would
            self._notice(root, args)
            known = root.is_ids or explicit_types() is not None
            if not known and self._recorded(root, args) is None:
                unknown.append(root)
        outputs = self.original(*args)
        self._record(outputs, [None] * len(self.trailing.recorded), unknown, args)
        return outputs

    @property
    def _kept(self) -> WeakIdKeyDictionary:
        return _left_dry


def _among(roots: Sequence[_Root], others: Sequence[_Root]) -> bool:
    return any(root is other for root in roots for other in others)


def _version(tensor: Tensor) -> int:
    """Changes when a tensor is written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _full_of_no_type(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32, device=device)
