"""What the passes make of real models: counts, reasons, types, and exactness with the quantisers off.

Hugging Face's models run with their own checks on (several graphs for a picture model) and off (one graph, mostly).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version

import pytest
from model_zoo import KINDS, PICTURE_MODELS, TEXT_MODELS
from random_transforms import EXACT_PLANS
from recording import wrong_types
from tracing import QUANTISED, Trace, expected_types, groups_of, traced

from freeact_fx.passes.node_facts import op_name

TOWER = "computes what is merged into the embeddings"
SKIPPED = "listed in QuantConfig.skip ['lm_head']"
TIED = "its weight is tied to an embedding"


@dataclass(frozen=True)
class Expected:
    """Of one model: graphs with the checks on and off, Linears by what became of them, groups by their size."""

    graphs: tuple[int, int]
    typed: int
    left_alone: dict[str, int]
    group_sizes: dict[int, int]


# Two layers of Llama: q/k/v, o, gate/up, down.
DECODER = {3: 2, 2: 2, 1: 4}
EXPECTED = {
    "llama": Expected((1, 1), 14, {SKIPPED: 1}, DECODER),
    "bert": Expected((1, 1), 13, {TIED: 1}, {3: 2, 1: 7}),
    "modernbert": Expected((1, 1), 9, {TIED: 1}, {1: 9}),
    "bidirectional": Expected((1, 1), 15, {}, {3: 2, 2: 2, 1: 5}),
    "llava": Expected((4, 1), 14, {TOWER: 14, SKIPPED: 1}, DECODER),
    # Its projector is a bare matrix product, found by its parameter.
    "gemma3": Expected((4, 1), 14, {TOWER: 15, SKIPPED: 1}, DECODER),
    "smolvlm": Expected((8, 6), 14, {TOWER: 13, SKIPPED: 1}, DECODER),
    "internvl": Expected((4, 1), 14, {TOWER: 14, SKIPPED: 1}, DECODER),
    # Its tower's two blocks share one graph, so five of its Linears are found once for two.
    "qwen2.5-vl": Expected((28, 25), 14, {TOWER: 7, SKIPPED: 1}, DECODER),
}
# transformers 5.17 breaks SmolVLM's graph between the mask and the merge: its types cross as recorded ones.
if version("transformers").startswith("5.17."):
    EXPECTED["smolvlm"] = replace(EXPECTED["smolvlm"], graphs=(14, 13))
RUNS = [(name, True) for name in TEXT_MODELS] + [
    (name, checks) for name in PICTURE_MODELS for checks in (True, False)
]
run_of = pytest.mark.parametrize(
    ("name", "checks"), RUNS, ids=[f"{n}{'' if c else ', one graph'}" for n, c in RUNS]
)


def quantised_names(trace: Trace) -> set[str]:
    return {f.name for g in trace.recorder.graphs for f in g.linears if f.refusal is None}


@run_of
def test_counts(name: str, checks: bool) -> None:
    trace, expected = traced(name, checks), EXPECTED[name]
    graphs = trace.recorder.graphs
    linears = [linear for graph in graphs for linear in graph.linears]
    assert trace.calls[0].num_graphs == expected.graphs[not checks]
    assert Counter(f.refusal for f in linears if f.refusal) == expected.left_alone
    assert [f.state for f in linears if f.refusal is None] == ["typed"] * expected.typed
    assert Counter(map(len, groups_of(linears))) == expected.group_sizes
    # One transform per group and one product per Linear; no dense product is left beside the refused ones.
    assert trace.recorder.num_transforms == sum(expected.group_sizes.values())
    assert trace.recorder.num_products == expected.typed
    nodes = [n for graph in graphs for n in graph.module.graph.nodes]
    dense = [n for n in nodes if n.op == "call_function" and op_name(n) == "linear"]
    assert len(dense) == sum(expected.left_alone.values()) - (name == "gemma3")


@run_of
def test_the_right_linears_run(name: str, checks: bool) -> None:
    """Those of the text model, by their full names, graph breaks or not."""
    trace = traced(name, checks)
    for call in trace.calls:
        assert set(call.seen[QUANTISED]) == quantised_names(trace)
    towers = ("vision", "visual", "projector", "connector")
    text = {
        module_name
        for module_name, module in trace.model.named_modules()
        if type(module).__name__ == "Linear" and not any(t in module_name for t in towers)
    }
    heads = {"lm_head", "decoder", "cls.predictions.decoder"}
    assert quantised_names(trace) == text - heads


@run_of
def test_types_are_those_of_the_inputs(name: str, checks: bool) -> None:
    """At every typed Linear, for every mix of types, with left padding; in every setting."""
    trace = traced(name, checks)
    mixes = []
    for call in trace.calls:
        expected = expected_types(call.inputs, trace.settings.types)
        for setting, seen in call.seen.items():
            assert len(seen) == EXPECTED[name].typed, setting
            assert wrong_types(seen, expected) == {}, setting
        mixes.append(expected.tolist())
    assert all(a != b for i, a in enumerate(mixes) for b in mixes[:i])


@run_of
def test_the_mix_of_types_does_not_recompile(name: str, checks: bool) -> None:
    trace = traced(name, checks)
    assert len({call.num_graphs for call in trace.calls}) == 1


@run_of
@pytest.mark.parametrize("plan", EXACT_PLANS)
def test_without_quantisers_nothing_changes(name: str, checks: bool, plan: str) -> None:
    """Each graph of each call, on the same inputs; the transforms differ by group, the shifts by type."""
    trace = traced(name, checks)
    errors = trace.settings.errors[plan]
    assert len(errors) >= len(trace.calls)
    assert max(errors) <= 1e-4


@run_of
def test_without_quantisers_the_logits_are_the_float_models(name: str, checks: bool) -> None:
    """From end to end, with the last of the plans in every graph."""
    assert max(call.error for call in traced(name, checks).calls) <= 1e-4


@pytest.mark.parametrize("name", PICTURE_MODELS)
def test_the_source_of_the_types_is_told(name: str) -> None:
    sources = {f.type_source for g in traced(name, False).recorder.graphs for f in g.linears}
    crossed = "first position; otherwise as token_types() or an earlier graph says"
    # What stands between is the model's own way of making the mask, which its versions change.
    merged = rf"eq\(input_ids, 500\) -> (\w+ -> )*masked_scatter -> vision; {re.escape(crossed)}"
    in_graph = EXPECTED["smolvlm"].graphs == (8, 6)
    declared = {
        "qwen2.5-vl": re.escape(crossed),
        "smolvlm": merged if in_graph else re.escape(crossed),
    }
    expected = declared.get(name, re.escape("input_ids == 500 -> vision; first position"))
    assert any(re.fullmatch(expected, source) for source in sources)


def test_kinds_and_expectations_agree() -> None:
    assert set(EXPECTED) == set(KINDS)
