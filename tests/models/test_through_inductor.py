"""A chosen few of the real models all the way through Inductor: what it makes is what the rewritten graphs say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_zoo import MASK_ID, build, picture_inputs, text_ids
from torch import Tensor, nn
from tracing import checks_of_transformers, logits_of, random_checkpoint, relative

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes

MASKED = TokenTypes.mask_token(MASK_ID)


def run(
    model: nn.Module, compiler: str, calls: list[dict[str, Any]], **options: Any
) -> list[Tensor]:
    torch._dynamo.reset()
    options = {"compiler": compiler, **options}
    compiled = torch.compile(model, backend="freeact", options=options)
    with torch.no_grad():
        return [logits_of(compiled(**inputs)) for inputs in calls]


@pytest.mark.inductor
def test_a_diffusion_model_with_types_of_its_own_at_two_lengths() -> None:
    """Static, then dynamic; the mix of types differs from call to call."""
    model = build("bidirectional")
    config = QuantConfig(token_types=MASKED, clip_search=False)
    report = freeact_fx.explain(model, text_ids(2, 16), options={"token_types": MASKED})
    groups = [group.members for group in report.groups]
    checkpoint = random_checkpoint("shift", groups, model, config)
    calls = [
        {"input_ids": text_ids(2, length, masked=masked, seed=length)}
        for length, masked in ((16, 0.3), (16, 1.0), (24, 0.0), (31, 0.3))
    ]
    eager = run(model, "eager", calls, checkpoint=checkpoint)
    fused = run(model, "inductor", calls, checkpoint=checkpoint)
    # Rounding may fall on the other side where sums are ordered otherwise; a wrong type is another matter.
    assert all(relative(a, b) < 0.02 for a, b in zip(fused, eager, strict=True))
    exact = run(model, "inductor", calls, checkpoint=checkpoint, quantize=False)
    with torch.no_grad():
        want = [model(**inputs) for inputs in calls]
    assert all(relative(a, b) < 1e-4 for a, b in zip(exact, want, strict=True))


@pytest.mark.inductor
def test_a_picture_model_in_several_graphs() -> None:
    """Types are recorded by one compiled graph and read by the next; the picture moves between calls."""
    model = build("llava")
    calls = [picture_inputs("llava", starts=s) | {"use_cache": False} for s in ((3, 9), (12, 0))]
    config = QuantConfig(clip_search=False)
    with checks_of_transformers(True):
        report = freeact_fx.explain(model, **calls[0])
        groups = [group.members for group in report.groups]
        checkpoint = random_checkpoint("shift", groups, model, config)
        eager = run(model, "eager", calls, checkpoint=checkpoint)
        fused = run(model, "inductor", calls, checkpoint=checkpoint)
    assert all(relative(a, b) < 0.02 for a, b in zip(fused, eager, strict=True))
