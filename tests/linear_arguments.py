"""Arguments of ``freeact::linear``, made as a converted model makes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from freeact_fx import QuantConfig
from freeact_fx.convert import FreeActLinear, GroupTransformModule
from freeact_fx.transform import GroupTransform, PackedLinear


def linear_arguments(
    x: Tensor,
    types: Tensor | None,
    transform: GroupTransform,
    packed: PackedLinear,
    config: QuantConfig,
) -> tuple[Any, ...]:
    t = GroupTransformModule(transform)
    linear = FreeActLinear(t, packed, config, (0.0, 0.0, 0.0))
    return (
        *(x, types, t.values, t.shift_bf16, t.lowrank),
        *(linear.weight_packed, linear.values, linear.branch_weight, t.form, linear.form),
    )
