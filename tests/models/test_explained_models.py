"""The report of real models: every Linear once, quantised or with a reason, and as many as the graphs hold."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from model_zoo import KINDS
from model_zoo import build as build_kind
from small_models import (
    IMAGE_TOKEN,
    MASK_TOKEN,
    NUM_PATCHES,
    MaskedDiffusionModel,
    Projector,
    VisionLanguageModel,
)
from torch import nn
from tracing import checks_of_transformers, inputs_of, token_types_of
from transformers import LlamaConfig, LlamaForCausalLM

import freeact_fx
from freeact_fx import FreeActLinear, Report, TokenTypes
from freeact_fx.reasons import RULES, Reason

Demo = tuple[nn.Module, dict[str, Any], TokenTypes]


def _decoder() -> LlamaForCausalLM:
    """Of the demos' kind: SmolLM2's code, and a head of its own."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def demo_dllm() -> Demo:
    ids = torch.randint(20, 64, (2, 16))
    ids[:, 3::3] = MASK_TOKEN
    model = MaskedDiffusionModel(_decoder(), torch.zeros(64))
    return model.eval(), {"input_ids": ids}, TokenTypes.mask_token(MASK_TOKEN)


def demo_vlm() -> Demo:
    ids = torch.randint(20, 64, (2, NUM_PATCHES + 8))
    ids[:, 2 : 2 + NUM_PATCHES] = IMAGE_TOKEN
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    model = VisionLanguageModel(_decoder(), Projector(64)).eval().requires_grad_(False)
    return model, {"input_ids": ids, "images": images}, TokenTypes.image_tokens(IMAGE_TOKEN)


DEMOS: dict[str, Callable[[], Demo]] = {"demo dllm": demo_dllm, "demo vlm": demo_vlm}


def model_of(name: str) -> Demo:
    if name in DEMOS:
        return DEMOS[name]()
    model = build_kind(name)
    return model, inputs_of(name)[0], token_types_of(name, model)


def linears_of(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, FreeActLinear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def check_report(report: Report, names: Sequence[str]) -> None:
    """Every Linear once, in model order, with what was done or why not; as many as the graphs' code has."""
    # A bare product with a parameter is no nn.Linear: it is in the report besides.
    assert [r.name for r in report.linears if r.kind in ("linear", "converted")] == list(names)
    assert max(Counter(r.name for r in report.linears).values()) == 1
    for row in report.left_alone:
        assert isinstance(row.reason, Reason), row.name
        assert row.reason.rule in RULES
        assert row.way_out
    for row in report.quantized:
        assert row.state in ("typed", "default", "refused"), row.name
        assert row.type_source
        assert row.group
        assert row.plan
        assert row.engine
        assert row.graphs
    rows = {r.name: r for r in report.linears}
    assert all(n in rows for graph in report.graphs for n in graph.linears)
    for row in report.linears:
        assert row.graphs == tuple(g.index for g in report.graphs if row.name in g.linears)
    groups = {r.group for r in report.quantized}
    assert {g.name for g in report.groups} == groups
    assert sorted(n for g in report.groups for n in g.members) == sorted(
        r.name for r in report.quantized
    )
    for graph in report.graphs:
        quantized = [n for n in graph.linears if rows[n].quantized]
        dense = [n for n in graph.linears if not rows[n].quantized]
        assert graph.before is not None
        assert graph.after is not None
        shared = shares(graph.before, len(graph.linears))
        own_groups = {rows[n].group for n in quantized}
        assert _products(graph.after) * shared == len(quantized), graph.label
        assert _transforms(graph.after) * shared == len(own_groups), graph.label
        assert _dense(graph.after) * shared == len(dense), graph.label
    counts = report.counts()
    assert counts["found"] == len(report.linears) == counts["quantized"] + counts["left_alone"]
    assert counts["quantized"] == counts["typed"] + counts["default"] + counts["refused"]
    assert counts["groups"] == len(groups)


def shares(code: str, num_linears: int) -> int:
    """How many layers share a graph: Dynamo compiles layers of one kind once."""
    return max(num_linears // max(_dense(code) + _products(code), 1), 1)


def _products(code: str) -> int:
    return len(re.findall(r"freeact\.(?:int_mm|linear)\(", code))


def _transforms(code: str) -> int:
    return len(re.findall(r"freeact\.transform_quantize(?:_branch)?\(", code))


def _dense(code: str) -> int:
    return len(re.findall(r"= (?:linear|addmm|matmul)\(", code))


@pytest.mark.parametrize("name", [*KINDS, *DEMOS])
def test_every_linear_is_in_the_report_once(name: str) -> None:
    model, inputs, types = model_of(name)
    with checks_of_transformers(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Dynamo's own, when it traces Gemma's masks.
        warnings.filterwarnings("ignore", ".* should not be instantiated", DeprecationWarning)
        report = freeact_fx.explain(model, **inputs, options={"token_types": types}, code=True)
    check_report(report, linears_of(model))
    assert report.quantized
    assert not [r.name for r in report.linears if r.reason == "no graph has it"]
    if name == "gemma3":
        row = report["model.vision_tower.head.attention.out_proj"]
        assert row.reason == "its weight is read by multi_head_attention_forward, not by a linear"
    # How the types are known is told from the ids on, graph breaks or not.
    told = "vision" if types.merge_index is not None else "masked"
    for row in report.quantized:
        assert re.match(rf"(eq\()?input_ids.* -> {told}", row.type_source), row.type_source
        assert row.way_out is None
