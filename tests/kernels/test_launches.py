"""A ``Launch`` finds the compiled kernel that Triton would, and hands it what Triton would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from freeact_fx.codegen.kernels.launches import Launch, _kind_of
from freeact_fx.codegen.kernels.transform_quantize import (
    _launch_of,
    transform_quantize_kernel,
)

CPU = torch.device("cpu")


class NoGpu:
    """Triton's driver, as far as the look-up of a kernel asks for it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A compiled kernel that notes what it is launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, *arguments))


class Kernel:
    """A kernel that compiles at each call."""

    def __init__(self, arg_names: Sequence[str], constants: dict[str, Any]) -> None:
        self.arg_names, self.constants = arg_names, constants
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*operands: Any, **constants: Any) -> Compiled:
            assert constants == self.constants
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


@pytest.fixture
def binder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """How Triton describes the arguments of ``transform_quantize_kernel``."""
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    if not hasattr(transform_quantize_kernel, "device_caches"):
        pytest.skip("interpreted")
    caches = transform_quantize_kernel.device_caches
    before = set(caches)
    yield caches[0][-1]
    for device in set(caches) - before:
        del caches[device]


def test_compiles_once_for_each_kind_of_operands() -> None:
    constants = {"SECOND": 2, "FIRST": 1, "num_warps": 4}
    kernel = Kernel(("x", "y", "num", "FIRST", "SECOND"), constants)
    launch = Launch(kernel, **constants)
    x, wide = torch.zeros(64), torch.zeros(65)
    calls: list[tuple[Any, ...]] = [
        (x, None, 3),
        (x, x, 3),
        (x.half(), None, 3),
        (wide[1:], None, 3),  # not at a multiple of 16 bytes
        (x, None, 1),
        (x, None, 32),
        (x, None, 2**31 + 1),
    ]
    for _ in range(2):
        for operands in calls:
            launch(CPU, 5, *operands)
    launch(CPU, 7, wide[4:], None, 5)
    assert len(kernel.compiled) == len(calls)
    for operands, compiled in zip(calls[1:], kernel.compiled[1:], strict=True):
        assert compiled.launched == [((5, 1, 1), *operands, 1, 2)]
    assert kernel.compiled[0].launched[1][0] == (7, 1, 1)


def operands_of(x: torch.Tensor, types: torch.Tensor | None, num_tokens: int) -> tuple[Any, ...]:
    rest = torch.zeros(64)
    return (x, None, None, None, None, types, *[rest] * 7, num_tokens, x.stride(0), 0)


def test_operands_of_one_kind_are_the_same_to_triton(binder: Any) -> None:
    constants = _launch_of(8, 8, (8,), (0, 0), 0, 7, "none", 0.0, 0.0)._constants
    buffer = torch.zeros(64, 65)
    variants = [
        operands_of(x.to(dtype), types, num_tokens)
        for x in (buffer, buffer[:, 1:], buffer[1:, 4:], buffer[:, :64].contiguous(), buffer[:1])
        for dtype in (torch.float32, torch.bfloat16)
        for types in (None, torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int64))
        for num_tokens in (1, 2, 15, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 1)
    ]
    described: dict[tuple[Any, ...], str] = {}
    for operands in variants:
        _, description, _ = binder(*operands, **constants)
        text = described.setdefault(tuple(map(_kind_of, operands)), str(description))
        assert str(description) == text
    assert len(described) < len(variants) / 2


def test_constants_come_in_the_order_of_the_parameters(binder: Any) -> None:
    constants = _launch_of(8, 8, (8,), (0, 0), 0, 7, "none", 0.0, 0.0)._constants
    operands = operands_of(torch.zeros(4, 64), None, 4)
    bound, _, _ = binder(*operands, **constants)
    kernel = Kernel(transform_quantize_kernel.arg_names, constants)
    launch = Launch(kernel, **constants)
    for _ in range(2):
        launch(CPU, 1, *operands)
    (compiled,) = kernel.compiled
    ((_, *given),) = compiled.launched
    assert all(one is other for one, other in zip(given, bound.values(), strict=True))
