"""Several operands in one tensor: what goes in comes out, and a compiled model reads few tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_transforms import EXACT_PLANS, random_transform
from tiny_model import masked_ids, tiny_model

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.convert import FreeActLinear, GroupTransformModule
from freeact_fx.linear_form import join, take_part
from freeact_fx.transform import pack_linear

SHAPES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=5)


@given(SHAPES, st.integers(0, 4))
def test_what_is_joined_comes_out(shapes: list[list[int]], missing: int) -> None:
    tensors: dict[str, torch.Tensor | None] = {f"t{i}": torch.rand(s) for i, s in enumerate(shapes)}
    tensors[f"t{missing}"] = None
    if all(t is None for t in tensors.values()):
        return
    values, parts = join(tensors)
    assert [p.name for p in parts] == [name for name, t in tensors.items() if t is not None]
    for part in parts:
        assert part.start % 32 == 0  # whole lines of a GPU's cache
        found, put_in = take_part(values, part), tensors[part.name]
        assert put_in is not None
        assert torch.equal(found, put_in)
        assert found.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("plan", [*EXACT_PLANS, "paper"])
def test_modules_give_back_what_they_were_made_of(plan: str, narrow: bool) -> None:
    transform = random_transform(plan, 48, 2, seed=0)
    if narrow and transform.shift is not None:
        transform = replace(transform, shift=transform.shift.bfloat16())
    config = QuantConfig()
    packed = pack_linear(transform, torch.randn(11, 48), torch.randn(11), config)
    module = GroupTransformModule(transform)
    linear = FreeActLinear(module, packed, config, (0.0, 0.0, 0.0))
    for own, expected in (
        (module.to_group_transform(), transform),
        (linear.to_packed_linear(), packed),
    ):
        assert own.tensors().keys() == expected.tensors().keys()  # type: ignore[attr-defined]
        for name, tensor in own.tensors().items():  # type: ignore[attr-defined]
            want = getattr(expected, name)
            assert tensor.dtype == want.dtype
            assert torch.equal(tensor, want)
    own_transform = module.to_group_transform()
    for name in ("plan", "widths", "slice_of_type", "own_rank"):
        assert getattr(own_transform, name) == getattr(transform, name)


def test_a_compiled_model_reads_few_tensors() -> None:
    """Two for a Linear and one for a group (plan "single"), beside those that are not ours."""
    model = tiny_model()
    config = QuantConfig(plan="single", token_types=TokenTypes.mask_token(63))
    freeact_fx.convert(model, config)
    read: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        ours = {id(b) for m in model.modules() if isinstance(m, FreeActLinear) for b in m.buffers()}
        read.append(sum(id(t) in ours for t in example_inputs))
        return gm.forward

    torch.compile(model, backend=backend)(masked_ids())
    linears = [m for m in model.modules() if isinstance(m, FreeActLinear)]
    groups = {id(linear.transform) for linear in linears}
    assert sum(read) == 2 * len(linears) + len(groups)
