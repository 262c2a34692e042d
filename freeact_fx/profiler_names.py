"""Names of Linears in the trace of ``torch.profiler``; while no profiler runs, nothing is made of them.

An event of a compiled graph is called after its kernel, and one kernel serves every layer of the same shapes. So the
product of a Linear is put into a range with the Linear's name, found by the identity of its packed weight: right even
where layers share a graph::

    freeact graph of blocks.0.q
    └ freeact::int_mm
      └ freeact: blocks.0.q
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.weak import WeakIdKeyDictionary

# Packed weight -> the name of its Linear, as of the last call that was profiled.
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()


@contextlib.contextmanager
def named_graph(named_weights: Callable[[], list[tuple[str, Tensor]]]) -> Iterator[None]:
    """Around the call of a compiled graph.

    named_weights  gives the Linears' names with their packed weights, in graph order; called if a profiler runs
    """
    if not _profiler_runs():
        yield
        return
    pairs = named_weights()
    for name, weight in pairs:
        _names[weight] = name
    with record_function(f"freeact graph of {pairs[0][0]}" if pairs else "freeact graph"):
        yield


def named_after_linear(
    product: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """A kernel of ``freeact::int_mm``, in a range that is called after the Linear of its packed weight."""

    @functools.wraps(product)
    def run(codes: Tensor, weight: Tensor) -> Tensor:
        if not _profiler_runs() or weight not in _names:
            return product(codes, weight)
        with record_function(f"freeact: {_names[weight]}"):
            return product(codes, weight)

    return run


def _profiler_runs() -> bool:
    return torch.autograd.profiler._is_profiler_enabled
