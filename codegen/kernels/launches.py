"""Launch a kernel without Triton's look-up.

At each call Triton describes all arguments of a kernel as text and looks the compiled kernel up by that: for the 30 of
``hopper_linear_kernel`` longer than the kernel runs. Most are constants of a Linear. So they make one ``Launch``, once,
and a call looks the kernel up by what Triton specialises on in the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class Launch:
    """A kernel with its constants.

    kernel     its parameters are operands first, then constants
    constants  of those names, and of the options of the compiler
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self._kernel, self._constants = kernel, constants
        self._values: tuple[Any, ...] = ()
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, device: torch.device, num_programs: int, *operands: Any) -> None:
        """Run ``num_programs`` programs on the current device, which is ``device`` or one that can read it.

        operands  tensors, None, integers, and descriptors of tensors whose tile and layout follow from the constants
                  and their dtype
        """
        current = torch.cuda.current_device() if device.type == "cuda" else -1
        key = (current, *map(_kind_of, operands))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[num_programs, 1, 1](*operands, *self._values)
            return
        names = self._kernel.arg_names[len(operands) :]
        self._values = tuple(self._constants[name] for name in names)
        # The interpreter compiles nothing: None.
        self._compiled[key] = self._kernel[(num_programs,)](*operands, **self._constants)


def _kind_of(operand: Any) -> Any:
    """What Triton compiles an operand for."""
    if operand is None:
        return None
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() % 16 == 0
    if isinstance(operand, int):
        return operand == 1, operand % 16 == 0, operand >> 31
    return operand.base.dtype


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
