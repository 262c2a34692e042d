"""The edit: one transform per group, one product per Linear, and nothing else changed."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_transforms import random_transform
from recording import PRODUCTS, TRANSFORMS, Recorder, run_rewritten
from torch import Tensor, nn

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.checkpoint import PackedEntry, fingerprint
from freeact_fx.transform import pack_linear

H, MASK = 64, 9
MASKED = TokenTypes.mask_token(MASK)


class Block(nn.Module):
    """Groups of three, one, two and one; a Linear that reads the same as another, but not alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, H)
        self.q, self.k, self.v, self.o = (nn.Linear(H, H) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(H, 96), nn.Linear(H, 96), nn.Linear(96, H)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        h = F.rms_norm(x, (H,))
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = F.rms_norm(x, (H,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def ids() -> Tensor:
    return torch.tensor([[1, 9, 2, 3], [9, 4, 5, 9]])


def compiled(model: nn.Module, **options: Any) -> tuple[Any, Recorder]:
    recorder = Recorder(model.eval(), **({"token_types": MASKED} | options))
    return torch.no_grad()(recorder.compile(fullgraph=True)), recorder


def test_linears_that_read_the_same_share_a_transform() -> None:
    run, recorder = compiled(Block())
    run(ids())
    assert recorder.num_transforms == 4
    assert recorder.num_products == 7
    by_transform: dict[Any, list[int]] = {}
    for node in recorder.graphs[0].module.graph.nodes:
        if node.target in PRODUCTS:
            by_transform.setdefault(node.args[0].args[0], []).append(1)
    assert sorted(map(len, by_transform.values())) == [1, 1, 2, 3]


def checkpoint_of(model: Block, groups: list[tuple[str, ...]], config: QuantConfig) -> Checkpoint:
    transforms, linears = {}, {}
    for seed, group in enumerate(groups):
        width = model.get_submodule(group[0]).in_features
        transforms[group[0]] = random_transform("shift", width, config.num_types, seed=seed)
        for name in group:
            module = model.get_submodule(name)
            packed = pack_linear(transforms[group[0]], module.weight, module.bias, config)
            mark = fingerprint(module.weight)
            linears[name] = PackedEntry(group[0], width, packed, mark)
    return Checkpoint(config, transforms, linears)


def test_linears_of_two_groups_do_not_share_although_they_read_the_same() -> None:
    """A checkpoint may put q apart from k and v: then the graph has a transform for each."""
    model = Block().eval()
    config = QuantConfig(token_types=MASKED, clip_search=False)
    groups = [("q",), ("k", "v"), ("o",), ("gate", "up"), ("down",)]
    checkpoint = checkpoint_of(model, groups, config)
    run, recorder = compiled(model, checkpoint=checkpoint, quantize=False)
    got = run(ids())
    assert recorder.num_transforms == 5
    with torch.no_grad():
        assert torch.allclose(got, model(ids()), atol=1e-4)


def test_only_operators_with_fake_values_are_added() -> None:
    """Anything else makes AOTAutograd pass its cache by."""
    run, recorder = compiled(Block())
    before: list[str] = []
    plain = torch.compile(
        Block().eval(), backend=lambda gm, _: before.extend(n.name for n in gm.graph.nodes) or gm
    )
    with torch.no_grad():
        plain(ids())
    run(ids())
    added = [n for n in recorder.graphs[0].module.graph.nodes if n.name not in before]
    assert len(added) > 30
    for node in added:
        assert "val" in node.meta or "example_value" in node.meta, node
        if node.op == "call_function":
            assert node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
        else:
            assert node.op == "placeholder"
            assert node._dynamo_source is None


def test_dense_weights_lose_their_users_and_arguments_keep_their_places() -> None:
    model = Block()
    run, recorder = compiled(model)
    run(ids())
    graph, runner = recorder.graphs[0].module.graph, recorder.graphs[0].runner
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    own = placeholders[: len(placeholders) - len(runner.trailing.feeds)]
    assert not any(n.name.startswith("freeact") for n in own)
    assert all(n.name.startswith("freeact") for n in placeholders[len(own) :])
    dense = [n for n in own if "_parameters_weight_" in n.name and "embedding" not in n.name]
    assert len(dense) == 7
    assert all(not n.users for n in dense)


def test_graphs_without_linears_are_left_alone() -> None:
    class Norms(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (H,)) @ x.mT

    run, recorder = compiled(Norms(), token_types=TokenTypes.single(), sink=None)
    x = torch.randn(2, 4, H)
    assert torch.equal(run(x), Norms()(x))
    assert recorder.graphs[0].runner.trailing.feeds == []
    assert not [n for n in recorder.graphs[0].module.graph.nodes if "freeact" in str(n.target)]


def test_one_type_needs_no_type_tensor() -> None:
    run, recorder = compiled(Block(), token_types=TokenTypes.single(), sink=None)
    run(ids())
    assert all(s.types is None and s.default_type == 0 for s in recorder.seen)
    kinds = {feed[0] for feed in recorder.graphs[0].runner.trailing.feeds}
    assert kinds == {"transform", "packed"}


# ------------------------------------------------------------------------------------- idempotence


def test_rewriting_twice_changes_nothing_more() -> None:
    model = Block().eval().requires_grad_(False)
    config = QuantConfig(token_types=MASKED)
    once = freeact_fx.rewrite(torch.fx.symbolic_trace(model), (ids(),), config)
    assert freeact_fx.rewrite(once, (ids(),), config) is once
    output, seen = run_rewritten(once, ids())
    assert len(seen) == 7
    assert torch.equal(output, once(ids()))


def test_the_module_that_was_given_is_not_changed() -> None:
    model = Block().eval().requires_grad_(False)
    graph_module = torch.fx.symbolic_trace(model)
    before, want = str(graph_module.graph), graph_module(ids())
    freeact_fx.rewrite(graph_module, (ids(),), QuantConfig(token_types=MASKED))
    assert str(graph_module.graph) == before
    assert torch.equal(graph_module(ids()), want)


def test_an_exported_graph_is_rewritten_like_any_other() -> None:
    model = Block().eval().requires_grad_(False)
    exported = torch.export.export(model, (ids(),)).module()
    rewritten = freeact_fx.rewrite(exported, (ids(),), QuantConfig(token_types=MASKED, sink=None))
    assert rewritten.report.counts()["quantized"] == 7
    assert rewritten.report.counts()["typed"] == 7
    _, seen = run_rewritten(rewritten, ids())
    assert all(s.types.tolist() == (ids() == MASK).int().tolist() for s in seen)
    count = sum(n.target in TRANSFORMS for n in rewritten.graph.nodes)
    assert count == 4


# ------------------------------------------------------------------------------------- weights that change


def test_weights_that_change_are_packed_anew() -> None:
    model = Block()
    run, recorder = compiled(model)
    first = run(ids())
    packed = {s.name: s.weight for s in recorder.seen}
    recorder.seen.clear()
    other = Block()
    model.load_state_dict(other.state_dict())
    second = run(ids())
    assert all(s.weight is not packed[s.name] for s in recorder.seen)
    run_other, _ = compiled(other)
    assert torch.equal(second, run_other(ids()))
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------------- graphs shared by layers


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


class Stack(nn.Module):
    """Layers apart, so that Dynamo compiles one of them and calls its graph for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


TWO = QuantConfig(token_types=TokenTypes.explicit("a", "b"), sink=None, clip_search=False)


def stack_checkpoint(model: Stack, plans: tuple[str, ...]) -> Checkpoint:
    transforms, linears = {}, {}
    for seed, plan in enumerate(plans):
        name = f"layers.{seed}.fc"
        module = model.get_submodule(name)
        transforms[name] = random_transform(plan, H, TWO.num_types, seed=seed)
        packed = pack_linear(transforms[name], module.weight, module.bias, TWO)
        linears[name] = PackedEntry(name, H, packed, fingerprint(module.weight))
    return Checkpoint(TWO, transforms, linears)


def stack_run(model: Stack, x: Tensor, **options: Any) -> tuple[Tensor, Recorder]:
    recorder = Recorder(model, **options)
    with torch.no_grad(), freeact_fx.token_types(torch.zeros(2, 4, dtype=torch.int32)):
        return recorder.compile()(x), recorder


def test_layers_that_share_a_graph_have_their_own_transforms() -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 4, H)
    checkpoint = stack_checkpoint(model, ("shift",) * 3)
    got, recorder = stack_run(model, x, checkpoint=checkpoint)
    assert len(recorder.graphs) == 1
    assert recorder.graphs[0].num_calls == 3
    # The packed weights are the checkpoint's: each layer's own.
    assert [s.name for s in recorder.seen] == ["layers.0.fc", "layers.1.fc", "layers.2.fc"]
    for s in recorder.seen:
        assert s.weight is checkpoint.linears[s.name].packed.weight
    # Each layer compiled by itself, with no sharing, says the same.
    want = x
    for index, layer in enumerate(model.layers):
        torch._dynamo.reset()
        own = Checkpoint(
            TWO,
            {"fc": checkpoint.groups[f"layers.{index}.fc"]},
            {"fc": PackedEntry("fc", H, *_packed(checkpoint, index))},
        )
        recorder = Recorder(layer, checkpoint=own)
        with torch.no_grad(), freeact_fx.token_types(torch.zeros(2, 4, dtype=torch.int32)):
            want = recorder.compile()(want)
    assert torch.equal(got, want)


def _packed(checkpoint: Checkpoint, index: int) -> tuple[Any, Any]:
    entry = checkpoint.linears[f"layers.{index}.fc"]
    return entry.packed, entry.fingerprint


def test_a_layer_whose_plan_has_other_shapes_stays_as_it_was_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 4, H)
    checkpoint = stack_checkpoint(model, ("shift", "single", "shift"))
    message = (
        r"freeact: layers.1.fc shares a compiled graph with layers.0.fc and stays as it was. layers.1.fc: "
        r"the compiled graph that it shares with layers.0.fc was made for plan shift, not single. "
        r"freeact_fx.convert\(model, checkpoint\) does not have this limit."
    )
    with pytest.warns(UserWarning, match=message):
        got, recorder = stack_run(model, x, checkpoint=checkpoint, quantize=False)
    assert [s.name for s in recorder.seen] == ["layers.0.fc", "layers.2.fc"]
    with torch.no_grad():
        assert torch.allclose(got, model(x), atol=1e-4)
    report = freeact_fx.explain(torch.compile(model, backend="freeact"))
    assert report["layers.1.fc"].reason == (
        "the compiled graph that it shares with layers.0.fc was made for plan shift, not single"
    )
    assert report["layers.2.fc"].reason is None


def test_every_layer_that_shares_a_graph_is_explained_and_calibrated() -> None:
    model, x = Stack().eval(), torch.randn(2, 40, H)
    options = {"token_types": TokenTypes.explicit("a", "b"), "sink": None}
    report = freeact_fx.explain(model, x, options=options)
    given = torch.zeros(2, 40, dtype=torch.int32)
    names = ["layers.0.fc", "layers.1.fc", "layers.2.fc"]
    assert [r.name for r in report.quantized] == names
    assert [g.members for g in report.groups] == [(name,) for name in names]
    with freeact_fx.token_types(given):
        checkpoint = freeact_fx.calibrate(model, [x], TWO, progress=False)
    assert sorted(checkpoint.linears) == names
    # Statistics of one layer are not those of another.
    shifts = {
        float(t.shift.abs().sum()) if t.shift is not None else float(t.clip.sum() + t.left.sum())
        for t in checkpoint.groups.values()
    }
    assert len(shifts) == 3


def test_converted_layers_share_a_graph_too() -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 4, H)
    checkpoint = stack_checkpoint(model, ("shift", "single", "shift"))
    dense, _ = stack_run(model, x, checkpoint=stack_checkpoint(model, ("shift",) * 3))
    freeact_fx.convert(model, checkpoint)
    torch._dynamo.reset()
    got, recorder = stack_run(model, x)
    # The layer of another plan has a graph of its own.
    assert len(recorder.graphs) == 2
    assert sum(g.num_calls for g in recorder.graphs) == 3
    assert len(recorder.seen) == 3
    assert not torch.equal(got, dense)
