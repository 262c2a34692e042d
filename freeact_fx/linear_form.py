"""What the op of a converted Linear takes: few tensors, and two texts that say what is in them.

Each tensor that a compiled model reads, and each attribute, costs time at every call: a guard, an argument, a check of
the CUDA graph. With operands one by one a decoder of 32 layers had 1,400, and a step of few tokens waited for Python.
So the fp32 operands of a group are one tensor, and those of a Linear are another; a text, of which Dynamo makes a
constant, says where each of them is and what else the op has to know.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements that a part begins at a multiple of: 128 bytes, a line of the GPU's caches.
_ALIGNED = 32


class Part(NamedTuple):
    """Where a tensor is in the one that holds it."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class GroupForm:
    """What is in a group's ``values``, and the fields of its ``GroupTransform`` that are no tensors."""

    parts: tuple[Part, ...]
    widths: tuple[int, ...]
    slice_of_type: tuple[int, ...]
    own_rank: int


@dataclass(frozen=True)
class LinearForm:
    """What is in a Linear's ``values``; ``qmax`` and ``types_json`` of its ``QuantConfig``."""

    parts: tuple[Part, ...]
    qmax: int
    types: str


def text_of(form: GroupForm | LinearForm) -> str:
    return json.dumps(asdict(form))


@functools.cache
def group_form(text: str) -> GroupForm:
    read = json.loads(text)
    widths, slices = tuple(read["widths"]), tuple(read["slice_of_type"])
    return GroupForm(_parts(read), widths, slices, read["own_rank"])


@functools.cache
def linear_form(text: str) -> LinearForm:
    read = json.loads(text)
    return LinearForm(_parts(read), read["qmax"], read["types"])


def _parts(read: dict[str, Any]) -> tuple[Part, ...]:
    return tuple(Part(name, tuple(shape), start) for name, shape, start in read["parts"])


def join(tensors: Mapping[str, Tensor | None]) -> tuple[Tensor, tuple[Part, ...]]:
    """Tensors, all fp32 and on one device, in one [n] fp32, and where each is; what is None is left out."""
    pieces: list[Tensor] = []
    parts: list[Part] = []
    start = 0
    for name, tensor in tensors.items():
        if tensor is not None:
            parts.append(Part(name, tuple(tensor.shape), start))
            pieces += [tensor.flatten(), tensor.new_zeros(-tensor.numel() % _ALIGNED)]
            start += tensor.numel() + pieces[-1].numel()
    return torch.cat(pieces), tuple(parts)


def take_part(values: Tensor, part: Part) -> Tensor:
    """One of the tensors that were joined, as a view."""
    return values[part.start : part.end].view(part.shape)


def operands_of(
    take: Callable[[Any, Part], Any],
    group_values: Any,
    shift_bf16: Any,
    lowrank: Any,
    weight: Any,
    values: Any,
    branch_weight: Any,
    group: str,
    own: str,
) -> dict[str, Any]:
    """What ``reference`` takes, by name, out of the arguments of ``freeact::linear`` behind the types.

    take  gives a part of what was joined: of a tensor, or of a graph's node for one
    """
    of_group, of_linear = group_form(group), linear_form(own)
    found: dict[str, Any] = dict.fromkeys(("channel_scale", "bias_table", "branch_scale"))
    found |= {"shift": shift_bf16, "lowrank": lowrank}
    found |= {"weight": weight, "branch_weight": branch_weight}
    found |= {part.name: take(group_values, part) for part in of_group.parts}
    found |= {part.name: take(values, part) for part in of_linear.parts}
    return found | {
        "widths": list(of_group.widths),
        "slice_of_type": list(of_group.slice_of_type),
        "default_type": 0,
        "own_rank": of_group.own_rank,
        "qmax": of_linear.qmax,
    }
