"""The report: every reason provoked, types across graph breaks, dry runs, no weights, the terminal table."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_transforms import random_transform
from tiny_model import GROUPS, LINEARS, MASK, masked_ids, tiny_llama, tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import freeact_fx
from freeact_fx import Checkpoint, ConfigError, QuantConfig, Report, TokenTypes
from freeact_fx.checkpoint import PackedEntry, fingerprint
from freeact_fx.codegen import engine_ops
from freeact_fx.compat import guard_in_short
from freeact_fx.engines import engine_of
from freeact_fx.model_report import FOLLOW, HAND_IN
from freeact_fx.packing import _packed
from freeact_fx.reasons import RULES, Reason
from freeact_fx.report import ActivationReport, GraphReport, GroupReport, LinearReport
from freeact_fx.report_table import folded
from freeact_fx.transform import pack_linear

MASKED = {"token_types": TokenTypes.mask_token(MASK)}
REPOSITORY = Path(__file__).parents[1]
H = 64
PLAIN = QuantConfig(token_types=TokenTypes.explicit("a", "b"), sink=None, clip_search=False)


# ------------------------------------------------------------------------------------- every reason


class Calls(nn.Module):
    """Calls ``function(self, x)``; the modules are its attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def row_of(linear: nn.Linear, x: Tensor | None = None, **options: Any) -> LinearReport:
    """The row of a model that calls one Linear."""
    model = Calls(lambda m, x: m.layer(x), layer=linear).eval()
    x = torch.zeros(2, linear.in_features, dtype=linear.weight.dtype) if x is None else x
    return freeact_fx.explain(model, x, options=options)["layer"]


def tied() -> LinearReport:
    model = Calls(
        lambda m, ids: m.layer(m.table(ids)), layer=nn.Linear(H, 9), table=nn.Embedding(9, H)
    )
    model.layer.weight = model.table.weight
    return freeact_fx.explain(model, torch.zeros(1, 4, dtype=torch.int64))["layer"]


def tower() -> LinearReport:
    def forward(m: Any, ids: Tensor) -> Tensor:
        pictures = m.layer(torch.ones(3, H))
        x = m.table(ids)
        return m.after(x.masked_scatter((ids == 7).unsqueeze(-1), pictures))

    modules = {"layer": nn.Linear(H, H), "after": nn.Linear(H, H), "table": nn.Embedding(9, H)}
    ids = torch.tensor([[1, 7, 7, 7, 2]])
    report = freeact_fx.explain(Calls(forward, **modules), ids)
    assert report["after"].type_source.startswith(
        "eq(x, 7) -> unsqueeze -> masked_scatter -> vision"
    )
    return report["layer"]


def left_dense() -> LinearReport:
    model = tiny_model()
    freeact_fx.convert(model, QuantConfig(skip=("q",)))
    return freeact_fx.explain(model, masked_ids(), options={"skip": ()})["blocks.1.q"]


def not_finite() -> LinearReport:
    linear = nn.Linear(H, H)
    with torch.no_grad():
        linear.weight[3, 4] = torch.nan
    return row_of(linear)


def not_plain() -> LinearReport:
    linear = nn.Linear(H, H)
    linear.weight = nn.Parameter(TwoTensor(torch.ones(H, H), torch.ones(H, H)))
    return row_of(linear, torch.zeros(2, H))


def computed_weight() -> LinearReport:
    model = Calls(
        lambda m, x: F.linear(x, m.layer.weight + m.low.weight.t() @ m.high.weight),
        layer=nn.Linear(H, H),
        low=nn.Linear(H, 2),
        high=nn.Linear(H, 2),
    )
    report = freeact_fx.explain(model, torch.zeros(2, H))
    assert [r.name for r in report.linears] == ["layer", "low", "high"]
    return report["layer"]


def computed_bias() -> LinearReport:
    model = Calls(lambda m, x: F.linear(x, m.layer.weight, 2 * m.layer.bias), layer=nn.Linear(H, H))
    return freeact_fx.explain(model, torch.zeros(2, H))["layer"]


class Layer(nn.Module):
    def __init__(self, linears: int) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(linears))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(fc(x) for fc in self.fc)


class Stack(nn.Module):
    """Layers apart, so that Dynamo compiles one of them and calls its graph for all."""

    def __init__(self, linears: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(linears) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def stack_report(plans: dict[str, str], groups: dict[str, str]) -> Report:
    """Of a stack with a checkpoint: the plan of each group, and the group of each Linear."""
    model = Stack(len({name[-1] for name in groups})).eval()
    transforms = {
        group: random_transform(plan, H, PLAIN.num_types, seed=seed)
        for seed, (group, plan) in enumerate(plans.items())
    }
    linears = {}
    for name, group in groups.items():
        weight = model.get_submodule(name).weight
        packed = pack_linear(transforms[group], weight, None, PLAIN)
        linears[name] = PackedEntry(group, H, packed, fingerprint(weight))
    checkpoint = Checkpoint(PLAIN, transforms, linears)
    return freeact_fx.explain(model, torch.zeros(2, 4, H), options={"checkpoint": checkpoint})


def not_in_checkpoint() -> LinearReport:
    return stack_report({"a": "single"}, {"layers.1.fc.0": "a"})["layers.0.fc.0"]


def other_plan() -> LinearReport:
    plans = {"a": "shift", "b": "single"}
    return stack_report(plans, {"layers.0.fc.0": "a", "layers.1.fc.0": "b"})["layers.1.fc.0"]


def other_group() -> LinearReport:
    plans = dict.fromkeys("abc", "single")
    groups = {"layers.0.fc.0": "a", "layers.0.fc.1": "a"}
    report = stack_report(plans, groups | {"layers.1.fc.0": "b", "layers.1.fc.1": "c"})
    return report["layers.1.fc.1"]


def beside() -> LinearReport:
    groups = dict.fromkeys(("layers.0.fc.0", "layers.0.fc.1", "layers.1.fc.0"), "a")
    report = stack_report({"a": "single"}, groups)
    assert str(report["layers.1.fc.1"].reason) == RULES["not_in_checkpoint"].text
    return report["layers.1.fc.0"]


def read_otherwise() -> LinearReport:
    model = Calls(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(H, 2)).eval()
    return freeact_fx.explain(model, torch.zeros(3, 1, H))["a.out_proj"]


def not_reached() -> LinearReport:
    model = Calls(lambda m, x: m.layer(x), layer=nn.Linear(H, H), idle=nn.Linear(H, 3))
    return freeact_fx.explain(model, torch.zeros(2, H))["idle"]


PROVOKED: dict[str, Callable[[], LinearReport]] = {
    "skipped": lambda: row_of(nn.Linear(H, H), skip=("layer",)),
    "tied": tied,
    "tower": tower,
    "left_dense": left_dense,
    "not_in_checkpoint": not_in_checkpoint,
    "dtype": lambda: row_of(nn.Linear(H, H, dtype=torch.float64)),
    "not_plain": not_plain,
    "few_features": lambda: row_of(nn.Linear(30, H)),
    "odd_features": lambda: row_of(nn.Linear(33, H)),
    "no_factors": lambda: row_of(nn.Linear(514, H)),
    "many_features": lambda: row_of(nn.Linear(65538, 2)),
    "not_finite": not_finite,
    "computed_weight": computed_weight,
    "computed_bias": computed_bias,
    "other_plan": other_plan,
    "other_group": other_group,
    "beside": beside,
    "read_otherwise": read_otherwise,
    "not_reached": not_reached,
}


def test_every_reason_is_provoked() -> None:
    assert set(PROVOKED) == set(RULES)


@pytest.mark.parametrize("rule", PROVOKED)
def test_reason(rule: str) -> None:
    """A Linear in a real graph is left alone for it, and told what would change that."""
    row = PROVOKED[rule]()
    assert isinstance(row.reason, Reason)
    assert row.reason.rule == rule
    assert re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(RULES[rule].text)), row.reason)
    assert re.fullmatch(
        re.sub(r"\\{\w+\\}", ".+", re.escape(RULES[rule].way_out)), str(row.way_out)
    )
    assert not row.quantized
    assert (row.state, row.plan, row.engine, row.packed_bytes) == ("", "", "", 0)


@pytest.mark.parametrize(("num_features", "legal"), [(33, 34), (514, 516), (4095, 4096)])
def test_padding_as_told_helps(num_features: int, legal: int) -> None:
    row = row_of(nn.Linear(num_features, 8))
    assert row.way_out == f"pad the layer to {legal} in features"
    assert row_of(nn.Linear(legal, 8)).quantized


# ------------------------------------------------------------------------------------- what a row says


def test_facts_of_a_quantised_linear() -> None:
    report = freeact_fx.explain(tiny_model(), masked_ids(), options=MASKED)
    assert [r.name for r in report.linears] == [*LINEARS, "lm_head"]
    assert [group.members for group in report.groups] == GROUPS
    row, group = report["blocks.1.up"], report.groups[-2]
    assert row.type_source == f"input_ids == {MASK} -> masked; first position"
    assert (row.kind, row.shape, row.state) == ("linear", (96, 48), "typed")
    assert (row.group, row.plan, row.precision) == ("blocks.1.gate", "single", "W4A4")
    assert (row.engine, row.kernel) == ("onednn u8s8", "onednn.qlinear_pointwise")
    # Codes of 48 features in 6 words of 4 bytes and a scale, for each of 96 outputs.
    assert (row.dense_bytes, row.packed_bytes, row.engine_bytes) == (18432, 96 * 28, 96 * 48)
    assert (group.left, group.right, group.rank, group.widths) == ((6, 6), (8, 8), 0, (6,))
    assert report.graphs[0].types_from == ({"tokens": "input_ids", "source": "ids"},)
    assert row.graphs == (0,)
    assert report.model == {
        "class": "TinyModel",
        "num_parameters": sum(p.numel() for p in tiny_model().parameters()),
    }


@pytest.mark.parametrize(
    ("options", "engine", "precision"),
    [
        ({"activation_bits": 8}, "onednn u8s8", "W4A8"),
        ({"activation_bits": "e4m3"}, "float32", "W4Ae4m3"),
        ({"quantize": False}, "float32", "transformed, not rounded"),
    ],
)
def test_engine_and_precision(options: dict[str, Any], engine: str, precision: str) -> None:
    row = row_of(nn.Linear(H, H), **options)
    assert (row.engine, row.precision) == (engine, precision)
    assert (row.engine_bytes > 0) == engine.startswith("onednn")


@pytest.mark.parametrize(
    ("bits", "fp8", "engine"),
    [
        (4, True, "int8 tensor cores"),
        ("e4m3", True, "fp8 tensor cores"),
        ("e4m3", False, "float32"),
    ],
)
def test_engines_of_a_gpu(
    bits: Any, fp8: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_ops, "has_kernels", lambda device: True)
    monkeypatch.setattr(engine_ops, "has_fp8", lambda device: fp8)
    config = QuantConfig(activation_bits=bits)
    assert engine_of(torch.device("cuda"), config)[0] == engine


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    """Of the tiny model; it saw no masked token."""
    batches = [masked_ids(seed=seed).clamp_max(MASK - 1) for seed in range(4)]
    config = QuantConfig(token_types=TokenTypes.mask_token(MASK), clip_search=False, gptq=False)
    return freeact_fx.calibrate(tiny_model(), batches, config, progress=False)


@pytest.mark.parametrize("converted", [False, True], ids=["dense", "converted"])
def test_what_calibration_measured(calibrated: Checkpoint, converted: bool) -> None:
    model = tiny_model()
    options = {} if converted else {"checkpoint": calibrated}
    if converted:
        freeact_fx.convert(model, calibrated)
    report = freeact_fx.explain(model, masked_ids(), options=options)
    for group in report.groups:
        statistics = calibrated.statistics[group.name]
        assert group.type_counts == statistics["tokens"]
        assert group.rare_types == ("masked",)
        assert group.plan == calibrated.groups[group.name].plan
        plans = statistics["plans"]
        assert group.predicted_error == {plan: e["predicted"] for plan, e in plans.items()}
        measured = {p: e["measured"] for p, e in plans.items() if e["measured"] is not None}
        assert group.measured_error == measured
        for name in group.members:
            assert report[name].predicted_error == statistics["predicted"][name]
            assert report[name].measured_error == statistics["error"][name]
            assert report[name].kind == ("converted" if converted else "linear")
    assert "too few tokens of type 'masked' in 8 of 8 groups" in str(report)
    # Of both layers, which have one row.
    error, worst = max(
        (e, t) for n in (0, 1) for t, e in report[f"blocks.{n}.q"].measured_error.items()
    )
    assert f"{error:.2%} {worst}" in str(report)


# ------------------------------------------------------------------------------------- graphs


class InTwoGraphs(nn.Module):
    """Ids are embedded in one graph, the Linears are in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(MASK + 1, H)
        self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.table(input_ids))
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "compiled"])
def test_types_that_cross_a_graph_break(dry_run: bool) -> None:
    model, ids = InTwoGraphs().eval(), masked_ids()
    if dry_run:
        report = freeact_fx.explain(model, ids, options=MASKED)
    else:
        run = torch.compile(model, backend="freeact", options={"compiler": "eager", **MASKED})
        with torch.no_grad():
            run(ids)
        report = freeact_fx.explain(run)
    first, second = report.graphs
    assert first.break_reason is not None
    assert "graph_break" in first.break_reason
    assert "test_explain.py" in first.break_reason  # the place in the user's code
    assert second.break_reason is None
    assert (first.linears, second.linears) == (("first",), ("second",))
    assert first.types_from == ({"tokens": "input_ids", "source": "ids"},)
    (entry,) = second.types_from
    assert (entry["source"], entry["graph"]) == ("an earlier graph", 0)
    assert report["second"].state == "typed"
    assert report["second"].type_source == f"input_ids == {MASK} -> masked (from graph 0)"
    assert "takes the types of" in str(report)


def test_types_that_no_one_knows() -> None:
    model, x = tiny_model().blocks[0], torch.randn(2, 8, 48)
    report = freeact_fx.explain(model, x, options={"sink": None, **MASKED})
    assert {r.state for r in report.quantized} == {"default"}
    assert {r.type_source for r in report.quantized} == {"default: unmasked"}
    assert {r.way_out for r in report.quantized} == {HAND_IN}
    assert report.graphs[0].types_from == ({"tokens": "x", "source": "unknown"},)
    assert "7 Linears take every token for the default type 'unmasked'" in str(report)
    # That the first position is known does not make the others known.
    report = freeact_fx.explain(model, x, options=MASKED)
    assert {r.type_source for r in report.quantized} == {"default: unmasked; first position"}
    assert {r.way_out for r in report.quantized} == {HAND_IN}
    assert "default type 'unmasked' is assumed in 1 graph for" in str(report)


def test_types_that_are_handed_in() -> None:
    model, x = tiny_model().blocks[0], torch.randn(2, 8, 48)
    with freeact_fx.token_types(torch.ones(2, 8, dtype=torch.int32)):
        report = freeact_fx.explain(model, x, options=MASKED)
    assert {r.state for r in report.quantized} == {"typed"}
    assert all("token_types()" in r.type_source for r in report.quantized)
    assert {r.way_out for r in report.quantized} == {None}
    assert report.graphs[0].types_from == ({"tokens": "x", "source": "handed in"},)


def test_types_that_are_lost() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(m.table(x).cumsum(1))

    model = Calls(forward, layer=nn.Linear(H, H), table=nn.Embedding(9, H))
    row = freeact_fx.explain(model, masked_ids().clamp_max(8))["layer"]
    assert (row.state, row.way_out) == ("refused", FOLLOW)
    assert "cumsum" in row.type_source


def test_a_graph_that_was_compiled_again() -> None:
    run = torch.compile(
        tiny_model(), backend="freeact", options={"compiler": "eager"}, dynamic=False
    )
    with torch.no_grad():
        run(masked_ids(2, 16))
        run(masked_ids(2, 20))
    first, again = freeact_fx.explain(run).graphs
    assert first.compiled_again_because is None
    assert "size mismatch" in str(again.compiled_again_because)
    assert "compiled again x1" in str(freeact_fx.explain(run))


def test_a_guard_in_one_line() -> None:
    """As Dynamo words it where a number of the user's program is guarded."""
    reason = (
        "48/0: start_position == 3                       # height = x + start  # models/net.py:926 in go\n"
        "User stack trace:\n  File ..."
    )
    assert (
        guard_in_short(reason) == "48/0: start_position == 3 (net.py:926 in go: height = x + start)"
    )
    reason = "26/0: tensor 'x' size mismatch at index 1. expected 128, actual 32"
    assert guard_in_short(reason) == reason


def test_graphs_that_torch_dropped_are_not_in_the_report() -> None:
    run = torch.compile(tiny_model(), backend="freeact", options={"compiler": "eager"})
    with torch.no_grad():
        run(masked_ids())
    assert freeact_fx.explain(run).num_graphs == 1
    torch.compiler.reset()
    with pytest.raises(ConfigError, match="nothing was compiled"):
        freeact_fx.explain(run)


def test_code_before_and_after() -> None:
    model = tiny_model()
    (graph,) = freeact_fx.explain(model, masked_ids(), options=MASKED, code=True).graphs
    assert graph.before is not None
    assert graph.after is not None
    assert "linear(rms_norm, blocks_0_q_weight, blocks_0_q_bias)  # f32[2, 16, 48]  blocks.0.q" in (
        graph.before
    )
    assert graph.before.count(" linear(") == len(LINEARS) + 1
    assert graph.after.count("freeact.int_mm(") == len(LINEARS)
    assert graph.after.count("freeact.transform_quantize(") == len(GROUPS)
    assert graph.after.count("  blocks.1.up") == 1
    assert graph.num_nodes_before < graph.num_nodes_after
    (without,) = freeact_fx.explain(model, masked_ids(), options=MASKED).graphs
    assert (without.before, without.after) == (None, None)


# ------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_changes_nothing_and_reports_the_same() -> None:
    model, ids = tiny_model(), masked_ids()
    run = torch.compile(model, backend="freeact", options={"dry_run": True, **MASKED})
    with torch.no_grad():
        assert torch.equal(run(ids), model(ids))
        assert torch.equal(run(masked_ids(3, 9)), model(masked_ids(3, 9)))
    assert not any(p in _packed for p in model.parameters())
    dry, traced = freeact_fx.explain(run), freeact_fx.explain(model, ids, options=MASKED)
    torch.compiler.reset()
    real = torch.compile(model, backend="freeact", options={"compiler": "eager", **MASKED})
    with torch.no_grad():
        real(ids)
    done = freeact_fx.explain(real)
    for report in (traced, done):
        assert [replace(r, graphs=()) for r in dry.linears] == [
            replace(r, graphs=()) for r in report.linears
        ]
        assert dry.groups == report.groups
    assert (dry.graphs[0].num_nodes_after, dry.num_graphs) == (done.graphs[0].num_nodes_after, 2)


def test_a_dry_run_sees_layers_that_share_a_graph() -> None:
    """More of them than Dynamo would compile anew."""
    model = Stack()
    model.layers.extend(Layer(1) for _ in range(9))
    run = torch.compile(model.eval(), backend="freeact", options={"dry_run": True})
    with torch.no_grad():
        run(torch.zeros(2, 4, H))
    report = freeact_fx.explain(run)
    assert [r.name for r in report.quantized] == [f"layers.{i}.fc.0" for i in range(12)]
    assert {r.graphs for r in report.quantized} == {report["layers.0.fc.0"].graphs}


# ------------------------------------------------------------------------------------- without weights


def _without_place(report: Report) -> dict[str, Any]:
    data = report.to_dict()
    for row in data["linears"]:
        row["engine"] = row["kernel"] = row["engine_bytes"] = None
    return {k: v for k, v in data.items() if k not in ("environment", "bytes")}


@pytest.mark.parametrize("inputs", ["meta", "real"])
@pytest.mark.parametrize("kind", ["meta", "buffers with values", "fake"])
def test_a_model_without_weights(kind: str, inputs: str) -> None:
    """The report is that of the real one, but for what depends on the device."""
    ids = torch.arange(10)[None]
    want = freeact_fx.explain(tiny_llama(), input_ids=ids, options=MASKED)
    mode = FakeTensorMode()
    with mode if kind == "fake" else torch.device("meta"):
        model = tiny_llama()
    if kind == "buffers with values":
        real = tiny_llama()
        for name, module in model.named_modules():
            module._buffers.update(real.get_submodule(name)._buffers)
    buffers = dict(model.named_buffers())
    given = ids.to("meta") if inputs == "meta" and kind != "fake" else ids
    got = freeact_fx.explain(model, input_ids=given, options=MASKED)
    assert _without_place(got) == _without_place(want)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_a_checkpoint_with_a_model_without_weights(calibrated: Checkpoint) -> None:
    with torch.device("meta"):
        model = tiny_model()
    report = freeact_fx.explain(model, masked_ids(), options={"checkpoint": calibrated})
    assert [group.plan for group in report.groups] == [
        calibrated.groups[group.name].plan for group in report.groups
    ]


def test_a_large_decoder_in_little_memory() -> None:
    """Of 8B shapes; benchmarks/explain_8b.py without --layers is all of it."""
    script = REPOSITORY / "benchmarks" / "explain_8b.py"
    done = subprocess.run(
        [sys.executable, script, "--layers", "3"], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert (result["found"], result["typed"]) == (22, 21)
    assert result["peak_bytes"] < 2e9


# ------------------------------------------------------------------------------------- as data


def test_to_dict_and_back(calibrated: Checkpoint) -> None:
    options = {"checkpoint": calibrated}
    report = freeact_fx.explain(tiny_model(), masked_ids(), options=options, code=True)
    report.activations = [ActivationReport("blocks.0.q", "masked", "after", (0.0, 1.0), (7,), 3)]
    data = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(data) == report
    assert data["version"] == 2
    assert data["counts"]["quantized"] == len(LINEARS)
    assert data["default_type"] == "unmasked"
    for key, kind in (("linears", LinearReport), ("groups", GroupReport), ("graphs", GraphReport)):
        assert list(data[key][0]) == [f.name for f in fields(kind)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": 1}, "version must be 2, got 1. Make the report anew"),
        ({}, "version must be 2, got None"),
        ({"version": 2, "linears": [{"name": "a"}]}, "linears: an entry is incomplete .*'shape'"),
    ],
)
def test_data_that_is_no_report(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Report.from_dict(data)


# ------------------------------------------------------------------------------------- in the terminal


def large_report() -> Report:
    """1441 Linears: 48 layers of 4 and 26 experts; some differ."""
    linears = []
    for layer in range(48):
        source = "input_ids == 5 -> masked" if layer != 7 else "default: text"
        state = "typed" if layer != 7 else "default"
        for name in ("q", "k", "v", "o", *(f"experts.{i}.up" for i in range(26))):
            full = f"model.layers.{layer}.{name}"
            linears.append(
                LinearReport(full, (64, 64), state=state, type_source=source, plan="branch")
            )
    linears.append(LinearReport("lm_head", (9, 64), reason="[b]listed[/b]", way_out="take it out"))
    return Report(linears, type_names=("text", "masked"))


def test_layers_of_equal_facts_are_folded() -> None:
    folds = folded(large_report().linears)
    assert [(fold.name, len(fold.linears)) for fold in folds] == [
        ("model.layers.{0..6,8..47}.q", 47),
        ("model.layers.{0..6,8..47}.k", 47),
        ("model.layers.{0..6,8..47}.v", 47),
        ("model.layers.{0..6,8..47}.o", 47),
        ("model.layers.{0..6,8..47}.experts.{0..25}.up", 47 * 26),
        ("model.layers.7.q", 1),
        ("model.layers.7.k", 1),
        ("model.layers.7.v", 1),
        ("model.layers.7.o", 1),
        ("model.layers.7.experts.{0..25}.up", 26),
        ("lm_head", 1),
    ]


def test_numbers_that_are_not_every_combination_are_told_apart() -> None:
    names = ["a.0.b.0", "a.0.b.1", "a.1.b.1", "a.1.b.3"]
    folds = folded([LinearReport(name, (8, 8)) for name in names])
    assert [fold.label for fold in folds] == ["a.0.b.{0,1}  x2", "a.1.b.{1,3}  x2"]


def test_every_linear_is_in_the_table() -> None:
    report = large_report()
    assert str(report).count("\n") < 40
    counts = [int(n) for n in re.findall(r"  x(\d+)", str(report).partition("quantised")[0])]
    assert sum(counts) + 5 == len(report.linears)  # five stand alone


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("colours", [True, False])
def test_the_table_of_a_rich_console(width: int, colours: bool, monkeypatch: Any) -> None:
    console_module = pytest.importorskip("rich.console")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    console = console_module.Console(
        file=stream, width=width, force_terminal=True, color_system="standard"
    )
    console.print(large_report())
    text = stream.getvalue()
    assert bool(re.search(r"\x1b\[[0-9;]*3\d", text)) == colours
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= width
    assert "[b]listed[/b]" in plain  # names and reasons are no markup
    assert "x1222" in plain


def test_a_report_needs_no_rich() -> None:
    program = (
        "import sys; sys.modules['rich'] = None\n"
        "from freeact_fx import LinearReport, Report\n"
        "print(Report([LinearReport('a.b', (4, 4))]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a.b" in done.stdout


# ------------------------------------------------------------------------------------- the documentation


def test_the_documentation_has_every_field_and_every_reason() -> None:
    text = " ".join((REPOSITORY / "docs" / "explain.md").read_text().split())
    for kind in (LinearReport, GroupReport, GraphReport, ActivationReport):
        for field in fields(kind):
            assert f"`{field.name}`" in text, (kind.__name__, field.name)
    for rule in RULES.values():
        assert f"| {rule.text} | {rule.way_out} |" in text
    for name in ("typed", "default", "refused", "handed in", "an earlier graph", "unknown"):
        assert f"`{name}`" in text
