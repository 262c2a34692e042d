"""The tensors that a runner feeds a graph with, where the caller says nothing of types."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import freeact_fx
from freeact_fx import TokenTypes, runner
from freeact_fx.backend import freeact

TYPES = TokenTypes.explicit("plain", "marked")


class Fed:
    """A backend that keeps what the added inputs of a graph were at each call."""

    def __init__(self) -> None:
        self.types: list[list[Tensor]] = []
        self.runner: Any = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.runner = freeact(
            gm, example_inputs, options={"compiler": "eager", "token_types": TYPES}
        )
        compiled, feeds = self.runner.compiled, self.runner.trailing.feeds

        def run(*args: Any) -> Any:
            added = zip(feeds, args[len(args) - len(feeds) :], strict=True)
            self.types.append([t for (kind, *_), t in added if kind in ("explicit", "recorded")])
            return compiled(*args)

        self.runner.compiled = run
        return self.runner

    def take(self) -> list[list[Tensor]]:
        found, self.types = self.types, []
        return found


@pytest.fixture
def fed() -> tuple[Fed, Callable[[Tensor], Tensor]]:
    """The backend and a model that it has compiled for sequences of any length."""
    backend = Fed()
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    return backend, torch.no_grad()(torch.compile(model, backend=backend, dynamic=True))


pytestmark = pytest.mark.filterwarnings("ignore:freeact. the token types of .* are not known")


def test_no_types_are_one_tensor_for_all_calls_of_a_shape(fed: Any) -> None:
    backend, fast = fed
    for length in (5, 7, 5, 7):
        fast(torch.randn(2, length, 32))
    calls = backend.take()
    for types in calls:
        assert len(types) == 2  # those of an earlier graph, and explicit ones
        assert {t.data_ptr() for t in types} == {types[0].data_ptr()}
    assert [tuple(t.shape) for t, _ in calls] == [(2, 5), (2, 7)] * 2
    assert all(t.dtype == torch.int32 and bool((t == -1).all()) for t, _ in calls)
    pointers = [t.data_ptr() for t, _ in calls]
    assert pointers[:2] == pointers[2:]
    assert pointers[0] != pointers[1]


def test_what_is_handed_in_leaves_it_alone(fed: Any) -> None:
    backend, fast = fed
    x, given = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.int32)
    outputs = []
    for context in (nullcontext(), freeact_fx.token_types(given), nullcontext()):
        with context:
            outputs.append(fast(x))
    (before, _), (recorded, explicit), (after, _) = backend.take()
    assert torch.equal(explicit, given)
    assert recorded.data_ptr() == before.data_ptr() == after.data_ptr()
    assert bool((after == -1).all())
    assert torch.equal(outputs[0], outputs[2])


def test_no_more_shapes_are_kept_than_a_few(fed: Any) -> None:
    backend, fast = fed
    for length in range(4, 2 * runner._MOST_SHAPES):
        fast(torch.randn(2, length, 32))
        fast(torch.randn(2, 3, 32))  # used all the time, so kept
    first = backend.take()[1][0]
    assert len(backend.runner._untyped) == runner._MOST_SHAPES
    fast(torch.randn(2, 3, 32))
    assert backend.take()[0][0].data_ptr() == first.data_ptr()


def test_a_tensor_made_in_inference_mode_serves_outside(fed: Any) -> None:
    backend, fast = fed
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        want = fast(x)
    assert torch.equal(fast(x), want)
    assert not any(t.is_inference() for types in backend.take() for t in types)


def test_of_each_stream_and_never_of_a_capture(fed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not there: what one stream fills is not read by another, and a CUDA graph owns its memory."""
    backend, fast = fed
    fast(torch.randn(2, 5, 32))
    gpu = SimpleNamespace(capturing=False, stream=1)
    stream_now = lambda device: SimpleNamespace(cuda_stream=gpu.stream)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", stream_now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(runner, "_full_of_no_type", lambda shape, device: torch.full(shape, -1))
    root = SimpleNamespace(shape=lambda args: (2, 5), device=torch.device("cuda", 0))
    no_types = backend.runner._no_types
    first = no_types(root, ())
    assert no_types(root, ()) is first
    gpu.stream = 2
    second = no_types(root, ())
    assert second is not first
    gpu.capturing = True
    assert no_types(root, ()) is not no_types(root, ())
    gpu.capturing = False
    assert no_types(root, ()) is second


def test_a_binding_goes_with_its_weights(fed: Any) -> None:
    """Another tensor may then be where a weight was."""
    backend, _ = fed
    layers = [nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)).eval() for _ in range(3)]
    forward = torch.compile(lambda layer, x: layer(x), backend=backend)
    with torch.no_grad():
        for layer in layers:
            forward(layer, torch.randn(3, 32))
    known = backend.runner.bindings._known
    assert len(known) == 3
    del layer, layers[0]
    gc.collect()
    assert len(known) == 2
