"""``freeact_fx.verify`` on real graphs: a masked-diffusion model, and a vision-language model in several graphs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from model_zoo import build
from torch import nn
from tracing import checks_of_transformers, inputs_of, token_types_of

import freeact_fx
from freeact_fx import Verification


def verify(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Verification:
    with checks_of_transformers(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"bypass": ("lowering",), **kwargs.pop("options", {})}
        return freeact_fx.verify(model, **inputs, options=options, **kwargs)


@pytest.mark.parametrize("name", ["bidirectional", "llava"])
def test_no_alarm_and_a_corrupted_weight(name: str) -> None:
    """As a dense model with plan ``duplicate``; and converted, with one scale changed."""
    model, inputs = build(name), inputs_of(name)[1]
    types = token_types_of(name, model)
    result = verify(model, inputs, options={"token_types": types, "plan": "duplicate"})
    assert result.ok, str(result)
    # The head of the first is not called lm_head, which is skipped.
    assert [g.state for g in result.groups] == ["typed"] * {"bidirectional": 9, "llava": 8}[name]
    assert set(result.types) == {*types.names, "first"}
    assert all(g.accumulated is not None and g.transform_local < 1e-5 for g in result.groups)
    assert result.output["transformed"] < 1e-4 < result.output["quantised"]

    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, freeact_fx.QuantConfig(token_types=types))
    group = result.groups[-1].name
    converted.get_submodule(group).to_packed_linear().weight_scale[0, 3] *= 3
    result = verify(converted, inputs, dense=model)
    assert [(f.stage, f.place) for f in result.findings] == [("rounding", group)], str(result)
    assert "weight_scale[0, 3] is 3 times" in str(result.findings[0])
