"""Calibration: what is counted, what is fitted, and what it is good for."""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import (
    GROUPS,
    LINEARS,
    MASK,
    TinyModel,
    masked_ids,
    relative,
    tiny_llama,
    tiny_model,
)
from torch import Tensor, nn

import freeact_fx
from freeact_fx import Checkpoint, ConfigError, QuantConfig, TokenType, TokenTypes
from freeact_fx import observe as observe_module
from freeact_fx.observe import ObservedModel
from freeact_fx.token_moments import TokenMoments

# The package's attribute of that name is the function.
calibrate_module = sys.modules["freeact_fx.calibrate"]
FEW_TOKENS = calibrate_module.FEW_TOKENS

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK))
BATCHES = [masked_ids(seed=seed) for seed in range(1, 5)]


def calibrate(model: nn.Module, batches: Any, config: QuantConfig = CONFIG) -> Checkpoint:
    return freeact_fx.calibrate(model, batches, config, progress=False)


def activations_of(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What each Linear reads, in plain Python: [B, T, K] of all batches, one after the other."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                seen.setdefault(name, []).append(args[0].detach())

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By group, what was known when it was fitted: counts, sums, moments and both halves of the sample."""
    seen: dict[str, Any] = {}
    fit_group = calibrate_module.fit_group

    def watched(statistics: Any) -> Any:
        seen[statistics.names[0]] = SimpleNamespace(
            count=statistics.count.clone(),
            total=statistics.total.clone(),
            moment={index: moment.clone() for index, moment in statistics.moment.items()},
            halves=[statistics.samples(held_out=half) for half in (False, True)],
            shift=statistics.without_held_out().means(),
        )
        return fit_group(statistics)

    monkeypatch.setattr(calibrate_module, "fit_group", watched)
    return seen


def types_of(batches: list[Tensor]) -> Tensor:
    """[B, T]: 0 unmasked, 1 masked, 2 the first of each sequence."""
    ids = torch.cat(batches)
    types = (ids == MASK).long()
    types[:, 0] = 2
    return types


def error_of(checkpoint: Checkpoint, group: str) -> float:
    """Mean over a group's Linears and types of the squared relative error that was measured."""
    by_linear = checkpoint.statistics[group]["error"].values()
    return sum(sum(e.values()) / len(e) for e in by_linear) / len(by_linear)


# ------------------------------------------------------------------ statistics


def test_statistics_are_those_of_the_tokens(fitted: dict[str, Any]) -> None:
    """Batches of several sizes, so that the graph is compiled again on the way."""
    model = tiny_llama()
    batches = [masked_ids(2, 16, seed=1), masked_ids(3, 16, seed=2), masked_ids(1, 9, seed=3)]
    config = replace(CONFIG, plan="shift")
    checkpoint = calibrate(model, batches, config)
    expected = [activations_of(model, [batch]) for batch in batches]
    groups = [
        tuple(f"model.layers.{i}.{name}" for name in names)
        for i in range(2)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    ]
    assert list(checkpoint.groups) == [group[0] for group in groups]
    types = torch.cat([types_of([batch]).flatten() for batch in batches])
    counts = {n: int((types == i).sum()) for i, n in enumerate(config.type_names)}
    for group in groups:
        assert checkpoint.statistics[group[0]]["tokens"] == counts | {"untyped": 0}
        seen, shift = fitted[group[0]], checkpoint.groups[group[0]].shift
        assert shift is not None
        assert torch.equal(shift[:3], seen.shift[:3].bfloat16())
        assert not shift[3].any()
        for name in group:
            assert checkpoint.linears[name].group == group[0]
            tokens = torch.cat([e[name].flatten(0, 1) for e in expected])
            for index in range(3):
                own = tokens[types == index].double()
                assert torch.allclose(seen.total[index], own.sum(0), rtol=1e-5, atol=1e-5)
                moment = seen.moment[index].double()
                assert torch.allclose(moment, own.t() @ own, rtol=1e-5, atol=1e-5)


def test_recorded_errors_are_those_of_the_converted_linears(fitted: dict[str, Any]) -> None:
    """What was measured is what the converted Linears do to the held-out tokens, and not to those that were fitted."""
    model = tiny_llama()
    checkpoint = calibrate(model, [masked_ids(4, 16, seed=1), masked_ids(4, 16, seed=2)])
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    for name, entry in checkpoint.linears.items():
        recorded = checkpoint.statistics[entry.group]["error"][name]
        assert list(recorded) == ["unmasked", "masked", "first"]
        of_halves = []
        for tokens, types in fitted[entry.group].halves:
            with torch.no_grad(), freeact_fx.token_types(types):
                got = converted.get_submodule(name)(tokens)
                want = model.get_submodule(name)(tokens)
            squared = (got - want).square()
            of_halves.append(
                [
                    float(squared[types == i].sum() / want[types == i].square().sum())
                    for i in range(3)
                ]
            )
        to_fit, held_out = of_halves
        assert list(recorded.values()) == pytest.approx(held_out, rel=1e-2)
        assert list(recorded.values()) != pytest.approx(to_fit, rel=1e-2)


def test_batches_may_be_a_one_shot_iterator() -> None:
    def once() -> Iterator[Tensor]:
        yield from BATCHES

    assert calibrate(tiny_model(), once()) == calibrate(tiny_model(), BATCHES)


@pytest.mark.parametrize(
    "wrap",
    [lambda b: {"input_ids": b}, lambda b: (b,), lambda b: [b]],
    ids=["mapping", "tuple", "list"],
)
def test_batches_may_be_mappings_tuples_lists_or_tensors(wrap: Callable[[Tensor], Any]) -> None:
    wrapped = [wrap(batch) for batch in BATCHES]
    assert calibrate(tiny_model(), wrapped) == calibrate(tiny_model(), BATCHES)


def test_reproducible_and_seeded() -> None:
    config = replace(CONFIG, sample_tokens=16)
    one = calibrate(tiny_model(), BATCHES, config)
    torch.manual_seed(123)
    assert calibrate(tiny_model(), BATCHES, config) == one
    other = calibrate(tiny_model(), BATCHES, replace(config, seed=1))
    assert not torch.equal(other.groups[GROUPS[0][0]].left, one.groups[GROUPS[0][0]].left)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    before = copy.deepcopy(model.state_dict())
    modules = [type(module) for module in model.modules()]
    calibrate(model, BATCHES)
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_shared_block_counts_each_pass() -> None:
    model = tiny_model()
    model.blocks[1] = model.blocks[0]
    checkpoint = calibrate(model, BATCHES)
    assert set(checkpoint.linears) == set(LINEARS[:7])
    tokens = checkpoint.statistics["blocks.0.q"]["tokens"]
    assert sum(tokens.values()) == 2 * sum(batch.numel() for batch in BATCHES)
    freeact_fx.convert(model, checkpoint)
    assert model.blocks[1].q is model.blocks[0].q


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str, fitted: dict[str, Any]) -> None:
    """Sequences filled up to one length give the statistics that they give one by one."""
    model, lengths = tiny_llama(), (16, 9, 12)
    rows = [masked_ids(1, n, seed=n) for n in lengths]
    ids, attended = torch.full((3, 16), 7), torch.zeros(3, 16, dtype=torch.int64)
    for index, row in enumerate(rows):
        n = row.shape[1]
        part = slice(16 - n, None) if side == "left" else slice(0, n)
        ids[index, part], attended[index, part] = row[0], 1
    config = replace(CONFIG, plan="shift", gptq=False)
    calibrate(model, [{"input_ids": row} for row in rows], config)
    apart = dict(fitted)
    calibrate(model, [{"input_ids": ids, "attention_mask": attended}], config)
    assert len(apart) == 8
    for group, seen in fitted.items():
        assert torch.equal(seen.count, apart[group].count)
        assert seen.count.sum() == sum(lengths)
        for index in range(3):
            moment = apart[group].moment[index]
            assert torch.allclose(seen.moment[index], moment, rtol=1e-3, atol=1e-4)


def test_types_that_are_handed_in() -> None:
    """A stack without ids: the enclosing context says which token is which."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = tiny_model().blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    config = QuantConfig(token_types=TokenTypes.explicit("plain", "special"), sink=None)
    types = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1]])
    with freeact_fx.token_types(types):
        checkpoint = calibrate(Stack().eval(), [torch.randn(1, 8, 48)] * 3, config)
    for group in GROUPS:
        tokens = checkpoint.statistics[group[0]]["tokens"]
        assert tokens == {"plain": 9, "special": 15, "untyped": 0}


def test_video_beside_image(fitted: dict[str, Any]) -> None:
    """Two merges into one sequence: each is a type of its own, with its own mean, and so it runs."""
    image, video = 61, 62

    class Multimodal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = tiny_model()

        def forward(self, input_ids: Tensor, images: Tensor, videos: Tensor) -> Tensor:
            x = self.text.embed(input_ids)
            for token, seen in ((image, images), (video, videos)):
                x = x.masked_scatter((input_ids == token).unsqueeze(-1), seen)
            for block in self.text.blocks:
                x = block(x)
            return x

    ids = torch.randint(0, 60, (4, 32))
    ids[:, 3:11], ids[:, 14:26] = image, video
    batch = {
        "input_ids": ids,
        "images": torch.randn(32, 48) + 3,
        "videos": torch.randn(48, 48) - 3,
    }
    config = QuantConfig(token_types=TokenTypes.image_tokens(image, video=video))
    model = Multimodal().eval()
    checkpoint = calibrate(model, [batch], config)
    first = GROUPS[0][0]
    tokens = checkpoint.statistics[f"text.{first}"]["tokens"]
    assert tokens == {"text": 44, "vision": 32, "video": 48, "first": 4, "untyped": 0}
    errors = checkpoint.statistics[f"text.{first}"]["error"][f"text.{first}"]
    assert list(errors) == ["text", "vision", "video", "first"]
    # Normalised, an image is about the opposite of a video.
    means = fitted[f"text.{first}"].shift
    assert float(torch.cosine_similarity(means[1], means[2], dim=0)) < -0.9
    with torch.no_grad():
        want = model(**batch)
        freeact_fx.convert(model, checkpoint)
        compiled = torch.compile(model, backend="freeact", options={"compiler": "eager"})
        got = compiled(**batch)
    assert "video" in freeact_fx.explain(compiled)[f"text.{first}"].type_source
    assert relative(got, want) < 0.2


# ------------------------------------------------------------------ awkward data


def assert_usable(model: nn.Module, checkpoint: Checkpoint, ids: Tensor) -> float:
    """Every operand is finite, and the converted model runs; returns its relative error."""
    for group in checkpoint.groups.values():
        assert group.problem() is None
    with torch.no_grad():
        want = model(ids)
        converted = copy.deepcopy(model)
        freeact_fx.convert(converted, checkpoint)
        got = torch.compile(converted, backend="freeact", options={"compiler": "eager"})(ids)
    assert bool(got.isfinite().all())
    return relative(got, want)


def test_absent_type_is_reported_and_usable() -> None:
    batches = [batch.clamp_max(MASK - 1) for batch in BATCHES]
    model = tiny_model()
    checkpoint = calibrate(model, batches)
    for group in GROUPS:
        statistics = checkpoint.statistics[group[0]]
        assert statistics["tokens"]["masked"] == 0
        assert statistics["rare_types"] == ["masked"]
        assert "masked" not in statistics["error"][group[0]]
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


@pytest.mark.parametrize("count", [1, FEW_TOKENS - 1, FEW_TOKENS])
def test_rare_type_is_reported_and_usable(count: int) -> None:
    batches = [batch.clamp_max(MASK - 1) for batch in BATCHES]
    batches[0][0, 1 : 1 + count] = MASK
    model = tiny_model()
    checkpoint = calibrate(model, batches, replace(CONFIG, plan="shift"))
    statistics = checkpoint.statistics["blocks.0.q"]
    assert statistics["tokens"]["masked"] == count
    rare = count < FEW_TOKENS
    assert statistics["rare_types"] == (["masked"] if rare else [])
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


@pytest.mark.parametrize("largest", [1, 1e4])
@pytest.mark.parametrize("plan", ["auto", "shift", "single"])
def test_one_token_in_all(plan: str, largest: float) -> None:
    """Centred, its moment is rounding, of either sign; a massive channel makes that rounding large."""
    model = tiny_model()
    with torch.no_grad():
        model.embed.weight[5, 7] *= largest
    checkpoint = calibrate(model, [torch.tensor([[5]])], replace(CONFIG, plan=plan))
    assert sum(checkpoint.statistics["blocks.0.q"]["tokens"].values()) == 1
    assert_usable(model, checkpoint, masked_ids())


@pytest.mark.parametrize("plan", ["auto", "single", "shift", "duplicate", "branch", "paper"])
def test_one_token_of_each_type(plan: str, fitted: dict[str, Any]) -> None:
    model = tiny_model()
    checkpoint = calibrate(model, [torch.tensor([[5, MASK, 7]])], replace(CONFIG, plan=plan))
    for group in GROUPS:
        assert fitted[group[0]].count.tolist() == [1, 1, 1, 0]
        assert checkpoint.statistics[group[0]]["rare_types"] == ["unmasked", "masked", "first"]
        found = checkpoint.groups[group[0]]
        assert plan in ("auto", found.plan)
        assert len(found.widths) == 1  # no type has a slice of its own
    assert_usable(model, checkpoint, masked_ids())


@pytest.mark.parametrize("plan", ["auto", "single", "branch"])
def test_singular_moments(plan: str, fitted: dict[str, Any]) -> None:
    """Activations of three directions among 48, with no part at all in the others."""
    model = tiny_model()
    with torch.no_grad():
        left, _, right = torch.linalg.svd(model.embed.weight, full_matrices=False)
        model.embed.weight.copy_(left[:, :3] @ right[:3])
    config = replace(CONFIG, plan=plan, memory_budget=1.5)
    checkpoint = calibrate(model, BATCHES, config)
    moments = fitted["blocks.0.q"].moment
    # All masked tokens are one vector there.
    ranks = [int(torch.linalg.matrix_rank(moments[index], rtol=1e-5)) for index in range(3)]
    assert ranks == [3, 1, 3]
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.4


def test_fewer_tokens_than_channels(fitted: dict[str, Any]) -> None:
    model = tiny_model()
    checkpoint = calibrate(model, [masked_ids(1, 20)])
    assert all(int(seen.count.sum()) == 20 for seen in fitted.values())
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


@pytest.mark.parametrize("plan", ["auto", "shift", "duplicate", "branch", "paper"])
def test_five_types(plan: str, fitted: dict[str, Any]) -> None:
    ids = {"a": (), "b": tuple(range(1, 9)), "c": tuple(range(9, 16)), "d": (MASK,)}
    types = TokenTypes(tuple(TokenType(name, token_ids) for name, token_ids in ids.items()))
    config = QuantConfig(token_types=types, plan=plan)
    model, batches = tiny_model(), [masked_ids(8, 32, seed=seed) for seed in (1, 2)]
    checkpoint = calibrate(model, batches, config)
    flat = torch.cat(batches)
    expected = [int((torch.isin(flat, torch.tensor(own)))[:, 1:].sum()) for own in ids.values()]
    expected[0] = 16 * 31 - sum(expected)
    for group in GROUPS:
        assert fitted[group[0]].count.tolist() == [*expected, 16, 0]
        assert list(checkpoint.statistics[group[0]]["error"][group[0]]) == [
            "a",
            "b",
            "c",
            "d",
            "first",
        ]
        found = checkpoint.groups[group[0]]
        if plan != "auto":  # which may find them alike
            assert (found.plan, found.num_rows) == (plan, 6)
            assert len(found.widths) == (5 if plan in ("duplicate", "paper") else 1)
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


def test_overflow_in_half_precision() -> None:
    """The first Linear that it reaches is named, in whichever batch it happens."""
    model = tiny_model().half()
    with torch.no_grad():
        # Channel 0 of the residual stream is that of token 5 alone.
        for block in model.blocks:
            block.o.weight[0] = block.down.weight[0] = block.down.bias[0] = 0
        model.embed.weight[:, 0] = 0
        model.embed.weight[5, 0] = 20
        model.blocks[1].up.weight[3, 0] = 60000
        model.blocks[1].gate.weight[3, 0] = 1
    calm = [batch.where(batch != 5, 6) for batch in BATCHES]
    message = r"the input of blocks\.1\.down holds NaN or infinite.*bfloat16 or float32"
    with pytest.raises(ConfigError, match=message):
        calibrate(model, [*calm, torch.full((2, 16), 5)])
    with torch.no_grad():
        assert all(model(batch).isfinite().all() for batch in calm)


def test_constant_channels(fitted: dict[str, Any]) -> None:
    """Channels that are always zero, or always the same, have no variance to divide by."""
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attention_norm.weight[:8] = 0
            block.mlp_norm.weight[3:20] = 0
            block.up.weight[5] = 0
        for row in model.blocks[0].v.weight, model.blocks[0].v.bias:
            row[3] = 0
        model.blocks[0].v.bias[3] = 2
    checkpoint = calibrate(model, BATCHES)
    attention, up = fitted["blocks.0.o"], fitted["blocks.1.down"]
    for index in range(3):
        variance = (
            attention.moment[index].diagonal()
            - attention.total[index] ** 2 / attention.count[index]
        )
        assert abs(float(variance[3])) < 1e-4 * float(attention.moment[index][3, 3])
        assert float(attention.total[index][3] / attention.count[index]) == pytest.approx(2)
        assert not up.moment[index][5].any()
        assert not fitted["blocks.0.q"].moment[index][:8].any()
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


def test_activations_that_are_all_zero() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].mlp_norm.weight.zero_()
    checkpoint = calibrate(model, BATCHES)
    assert checkpoint.statistics["blocks.0.gate"]["tokens"]["unmasked"] > 0
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


def test_weight_of_zeros() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].o.weight.zero_()
        model.blocks[1].q.weight[7] = 0
    assert assert_usable(model, calibrate(model, BATCHES), masked_ids(seed=9)) < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    checkpoint = calibrate(model, BATCHES)
    assert assert_usable(model, checkpoint, masked_ids(seed=9)) < 0.3


@pytest.mark.parametrize("bits", [8, "e4m3"])
def test_other_activation_formats(bits: Any) -> None:
    model = tiny_model()
    narrow = assert_usable(model, calibrate(model, BATCHES), masked_ids(seed=9))
    config = replace(CONFIG, activation_bits=bits)
    assert assert_usable(model, calibrate(model, BATCHES, config), masked_ids(seed=9)) < narrow


# ------------------------------------------------------------------ passes


class Watched(list[Tensor]):
    """Batches that count how often they are read."""

    readings = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.readings += 1
        return super().__iter__()


# Of the tiny model the groups at K = 48 need less, those at K = 96 are the largest.
LARGEST = TokenMoments.bytes_needed(96, 3, 256)
SMALLER = TokenMoments.bytes_needed(48, 3, 256)
ONE_TYPE = TokenMoments.bytes_needed(96, 1, 256)


@pytest.mark.parametrize(
    ("max_bytes", "passes"),
    [(6 * SMALLER + 2 * LARGEST, 1), (3 * SMALLER + LARGEST, 2), (LARGEST, 6)],
)
def test_less_memory_means_more_passes_and_the_same_result(
    max_bytes: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrate(tiny_model(), BATCHES)
    held: list[int] = []
    collect = ObservedModel.collect

    def watched(self: ObservedModel, *args: Any) -> Any:
        complete = collect(self, *args)
        held.append(sum(s.total.shape[1] for s in complete))
        sizes = [(s.total.shape[1], s.config) for s in complete]
        needed = [TokenMoments.bytes_needed(k, 3, c.sample_tokens) for k, c in sizes]
        assert sum(needed) <= max_bytes
        assert all(not s.moment and not s.sample for s in self.groups if s not in complete)
        return complete

    monkeypatch.setattr(ObservedModel, "collect", watched)
    batches = Watched(BATCHES)
    checkpoint = freeact_fx.calibrate(
        tiny_model(), batches, CONFIG, progress=False, max_bytes=max_bytes
    )
    assert batches.readings == len(held) == passes
    assert sum(held) == 2 * (3 * 48 + 96)
    assert_same(checkpoint, expected)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    """To the last bit, and in what was measured."""
    assert one == other
    assert one.statistics == other.statistics
    assert list(one.groups) == list(other.groups)
    assert list(one.linears) == list(other.linears)


def test_an_iterator_is_kept_on_disk_for_later_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nested inputs of every kind come back as they were, and nothing is left behind."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, parts: Any, *, flip: bool, nothing: None) -> Tensor:
            ids, (offset, _) = parts
            assert flip
            assert nothing is None
            return self.inner((ids + offset["by"]).clamp_max(MASK))

    def nested() -> Iterator[Any]:
        for batch in BATCHES:
            yield {
                "parts": (batch, [{"by": torch.ones(1, dtype=torch.int64)}, "text"]),
                "flip": True,
                "nothing": None,
            }

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files: list[list[str]] = []
    collect = ObservedModel.collect

    def watched(self: ObservedModel, *args: Any) -> Any:
        complete = collect(self, *args)
        files.append(sorted(p.name for p in tmp_path.glob("freeact-batches-*/*")))
        return complete

    monkeypatch.setattr(ObservedModel, "collect", watched)
    config = replace(CONFIG, plan="single", gptq=False)
    once = freeact_fx.calibrate(
        Wrapped().eval(), nested(), config, progress=False, max_bytes=4 * LARGEST // 3
    )
    assert files == [[f"{i:06}.pt" for i in range(4)]] * len(files)
    assert len(files) > 1
    assert not list(tmp_path.glob("freeact-batches-*"))
    assert_same(once, calibrate(Wrapped().eval(), list(nested()), config))
    # If everything fits, nothing is written.
    files.clear()
    calibrate(Wrapped().eval(), nested(), config)
    assert files == [[]]


def test_groups_that_only_later_batches_reach(tmp_path: Path) -> None:
    """A second tower that the first batches do not use: it is found when they are gone, and nothing of it is lost."""

    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = tiny_model(), tiny_model()

        def forward(self, ids: Tensor, *, both: bool) -> Any:
            return (self.one(ids), self.two(ids)) if both else self.one(ids)

    batches = [{"ids": b, "both": i >= 2} for i, b in enumerate(BATCHES)]
    config = replace(CONFIG, plan="single", gptq=False)
    checkpoint = calibrate(TwoTowers().eval(), batches, config)
    tokens = checkpoint.statistics["two.blocks.0.q"]["tokens"]
    assert sum(tokens.values()) == 2 * BATCHES[0].numel()
    assert sum(checkpoint.statistics["one.blocks.0.q"]["tokens"].values()) == 4 * BATCHES[0].numel()
    for given in (batches, iter(batches)):
        several = freeact_fx.calibrate(
            TwoTowers().eval(), given, config, progress=False, max_bytes=2 * LARGEST
        )
        assert_same(several, checkpoint)


@pytest.mark.parametrize("max_bytes", [None, ONE_TYPE])
def test_the_head_of_the_model_is_not_run(max_bytes: int | None) -> None:
    """Nothing behind the last group of a pass is: with several passes, few blocks are run each time."""
    ran: list[str] = []

    def mark(x: Tensor, name: str) -> Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            ran.append(name)
        return x.clone()

    torch._dynamo.allow_in_graph(mark)

    class Marked(TinyModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for index, block in enumerate(self.blocks):
                x = block(mark(x, f"block {index}"))
            return self.lm_head(mark(self.norm(x), "head"))

    torch.manual_seed(0)
    # Types would not be known behind a function that nobody knows.
    config = QuantConfig(token_types=TokenTypes.single(), sink=None)
    checkpoint = freeact_fx.calibrate(
        Marked().eval(), BATCHES, config, progress=False, max_bytes=max_bytes
    )
    assert_same(checkpoint, calibrate(tiny_model(), BATCHES, config))
    # The second and the third of six passes stop in block 0.
    expected = {None: (4, 4), ONE_TYPE: (6 * 4, 4 * 4)}[max_bytes]
    assert (ran.count("block 0"), ran.count("block 1")) == expected
    assert "head" not in ran


def test_a_model_that_decides_by_itself_how_deep_it_goes() -> None:
    """The first batch goes through the block once, the second often: no batch is left too early."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.inner.embed(input_ids)
            while True:
                x = self.inner.blocks[0](x)
                if x.abs().mean() > 1.2 * (input_ids.shape[0] - 1):
                    return x

    model, config = Deep().eval(), QuantConfig(token_types=TokenTypes.single(), sink=None)
    batches = [masked_ids(1), masked_ids(2, seed=1)]
    calls: list[int] = []
    hook = model.inner.blocks[0].q.register_forward_pre_hook(
        lambda _, args: calls.append(args[0].shape[0])
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    assert calls.count(1) == 1
    assert calls.count(2) > 1
    for max_bytes in (None, LARGEST):
        checkpoint = freeact_fx.calibrate(
            model, batches, config, progress=False, max_bytes=max_bytes
        )
        tokens = checkpoint.statistics["inner.blocks.0.q"]["tokens"]
        assert tokens["token"] == 16 * sum(calls)


def test_max_bytes_that_is_too_little() -> None:
    message = (
        rf"blocks\.0\.down: its statistics need {LARGEST} bytes, max_bytes is 700000\. Raise it"
    )
    with pytest.raises(ConfigError, match=message):
        freeact_fx.calibrate(tiny_model(), BATCHES, CONFIG, progress=False, max_bytes=700_000)


def test_default_budget_is_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what holds two blocks holds one. It is a guess: what alone is more gets a pass of its own."""
    expected = calibrate(tiny_model(), BATCHES)
    for free, passes in ((6 * SMALLER + 2 * LARGEST, 2), (100, 8)):
        monkeypatch.setattr(observe_module, "free_bytes", lambda _, free=free: free)
        batches = Watched(BATCHES)
        assert_same(calibrate(tiny_model(), batches), expected)
        assert batches.readings == passes


def test_an_exhausted_iterator() -> None:
    batches = iter(BATCHES)
    list(batches)
    with pytest.raises(ConfigError, match=r"an iterator that gave nothing.*read before.*explain"):
        calibrate(tiny_model(), batches)


def test_batches_that_give_less_the_second_time() -> None:
    class Leaky(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from [self.pop(0) for _ in range(len(self))]

    with pytest.raises(ConfigError, match=r"got 0 and before 4.*Give a list"):
        freeact_fx.calibrate(
            tiny_model(), Leaky(BATCHES), CONFIG, progress=False, max_bytes=LARGEST
        )


@pytest.mark.parametrize("given", [{"input_ids": BATCHES[0]}, 3], ids=["a batch", "a number"])
def test_what_is_not_batches(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"batches must be an iterable.*\[batch\]"):
        calibrate(tiny_model(), given)


def test_an_iterator_that_cannot_be_kept() -> None:
    batches = ({"input_ids": batch, "extra": object()} for batch in BATCHES)

    class Lax(TinyModel):
        def forward(self, input_ids: Tensor, extra: Any) -> Tensor:
            return super().forward(input_ids)

    with pytest.raises(ConfigError, match=r"batch 0\['extra'\].*got object"):
        freeact_fx.calibrate(Lax().eval(), batches, CONFIG, progress=False, max_bytes=LARGEST)


# ------------------------------------------------------------------ resuming


class Killed(Exception):
    pass


def resumed(
    folder: Path, batches: Any = BATCHES, config: QuantConfig = CONFIG, **kwargs: Any
) -> Checkpoint:
    kwargs = {"progress": False} | kwargs
    return freeact_fx.calibrate(tiny_model(), batches, config, resume=folder, **kwargs)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the groups that were fitted; ``"kill"`` in front of the list ends the run at the fifth."""
    fit_group, names = calibrate_module.fit_group, []

    def watched(statistics: Any) -> Any:
        if names[:1] == ["kill"] and len(names) == 5:
            raise Killed
        names.append(statistics.names[0])
        return fit_group(statistics)

    monkeypatch.setattr(calibrate_module, "fit_group", watched)
    return names


@pytest.mark.parametrize("max_bytes", [None, LARGEST])
@pytest.mark.parametrize("once", [False, True], ids=["list", "iterator"])
def test_killed_in_a_fit(
    fits: list[str], tmp_path: Path, max_bytes: int | None, once: bool
) -> None:
    expected = calibrate(tiny_model(), BATCHES)

    def given() -> Any:
        return iter(BATCHES) if once else BATCHES

    fits[:] = ["kill"]
    with pytest.raises(Killed):
        resumed(tmp_path, given(), max_bytes=max_bytes)
    done = fits[1:]
    assert len(done) == 4
    fits.clear()
    assert_same(resumed(tmp_path, given(), max_bytes=max_bytes), expected)
    assert sorted(done + fits) == sorted(group[0] for group in GROUPS)
    # Finished: it is read, not run.
    fits.clear()
    assert_same(resumed(tmp_path, given(), max_bytes=max_bytes), expected)
    assert not fits
    assert not (tmp_path / "batches").exists()


def test_killed_by_a_batch(tmp_path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield from BATCHES[:2]
        raise Killed

    with pytest.raises(Killed):
        resumed(tmp_path, broken())
    # Nothing was known of all batches yet, so any will do.
    others = [masked_ids(seed=seed) for seed in range(21, 24)]
    assert_same(resumed(tmp_path, iter(others)), calibrate(tiny_model(), others))


def test_killed_while_a_group_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str]
) -> None:
    save = Checkpoint.save

    def half(self: Checkpoint, folder: Any) -> None:
        save(self, folder)
        if "blocks.0.gate" in self.groups:
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", half)
        with pytest.raises(Killed):
            resumed(tmp_path)
    fits.clear()
    assert_same(resumed(tmp_path), calibrate(tiny_model(), BATCHES))
    assert fits[0] == "blocks.0.gate"


def test_the_kept_batches_go_on(fits: list[str], tmp_path: Path) -> None:
    """Of an iterator that nobody can repeat."""
    fits[:] = ["kill"]
    with pytest.raises(Killed):
        resumed(tmp_path, iter(BATCHES))
    fits.clear()
    assert_same(resumed(tmp_path, None), calibrate(tiny_model(), BATCHES))
    assert_same(resumed(tmp_path, None), calibrate(tiny_model(), BATCHES))


def test_another_run_is_refused(fits: list[str], tmp_path: Path) -> None:
    fits[:] = ["kill"]
    with pytest.raises(Killed):
        resumed(tmp_path)
    with pytest.raises(ConfigError, match="begun with another QuantConfig"):
        resumed(tmp_path, config=replace(CONFIG, seed=1))
    other = tiny_model()
    with torch.no_grad():
        other.blocks[1].down.weight.mul_(1.001)
    with pytest.raises(ConfigError, match="begun with another model"):
        freeact_fx.calibrate(other, BATCHES, CONFIG, progress=False, resume=tmp_path)
    changed = [*BATCHES[:2], masked_ids(seed=77), BATCHES[3]]
    for given in (changed, iter(changed), [*BATCHES, BATCHES[0]]):
        with pytest.raises(ConfigError, match=r"batch [24] is not the one that the run began with"):
            resumed(tmp_path, given)
    with pytest.raises(ConfigError, match="got 3 and before 4"):
        resumed(tmp_path, BATCHES[:3])
    with pytest.raises(ConfigError, match="batches=None goes on with those kept in"):
        resumed(tmp_path, None)
    fits.clear()
    assert_same(resumed(tmp_path), calibrate(tiny_model(), BATCHES))
    with pytest.raises(ConfigError, match="batch 2 is not the one"):
        resumed(tmp_path, changed)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"the folder holds files, but none is a run\.json"):
        resumed(tmp_path)
    with pytest.raises(ConfigError, match="batches=None goes on with those kept in resume=FOLDER"):
        calibrate(tiny_model(), None)


# ------------------------------------------------------------------ what it is good for


def with_outliers(model: TinyModel) -> TinyModel:
    """A few channels of every normed activation are ten times the others, and masked tokens sit far off zero."""
    with torch.no_grad():
        for block in model.blocks:
            block.attention_norm.weight[[3, 17, 31]] *= 10
            block.mlp_norm.weight[[5, 29]] *= 10
        model.embed.weight[MASK] += 2
    return model


@pytest.mark.parametrize("seed", range(3))
def test_auto_is_never_worse_than_single(seed: int) -> None:
    """Group by group, on the sample that it was chosen on."""
    model = with_outliers(tiny_model())
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1 + 0.3 * seed * torch.randn_like(parameter))
    batches = [masked_ids(seed=10 * seed + s) for s in range(4)]
    config = replace(CONFIG, seed=seed, memory_budget=1.5)
    auto = calibrate(model, batches, config)
    single = calibrate(model, batches, replace(config, plan="single"))
    shift = calibrate(model, batches, replace(config, plan="shift"))
    for group in GROUPS:
        best = min(error_of(single, group[0]), error_of(shift, group[0]))
        assert error_of(auto, group[0]) <= best * 1.000001
    assert {t.plan for t in single.groups.values()} == {"single"}
    assert len({t.plan for t in auto.groups.values()} - {"single"}) > 0


def test_calibrated_beats_data_free() -> None:
    model = with_outliers(tiny_model())
    ids = masked_ids(8, 32, seed=99)
    calibrated = assert_usable(
        model, calibrate(model, [masked_ids(8, 32, seed=s) for s in (1, 2)]), ids
    )
    data_free = copy.deepcopy(model)
    freeact_fx.convert(data_free, CONFIG)
    with torch.no_grad():
        got = torch.compile(data_free, backend="freeact", options={"compiler": "eager"})(ids)
        baseline = relative(got, model(ids))
    assert calibrated < 0.8 * baseline


@pytest.mark.parametrize("switch", ["clip_search", "gptq"])
def test_switches_change_the_codes(switch: str) -> None:
    model = tiny_model()
    on = calibrate(model, BATCHES, replace(CONFIG, plan="single"))
    off = calibrate(model, BATCHES, replace(CONFIG, plan="single", **{switch: False}))
    name = LINEARS[0]
    assert not torch.equal(on.linears[name].packed.weight, off.linears[name].packed.weight)
    total = [sum(error_of(c, group[0]) for group in GROUPS) for c in (on, off)]
    assert total[0] < total[1]


# ------------------------------------------------------------------ progress


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress_is_shown(
    with_tqdm: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not with_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        # The plain line comes every five seconds.
        clock = itertools.count(0, 10)
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    shown = freeact_fx.calibrate(tiny_model(), iter(BATCHES), CONFIG)
    printed = capsys.readouterr().err
    assert "observing" in printed
    assert "fitting" in printed
    assert shown == calibrate(tiny_model(), BATCHES)
    assert not capsys.readouterr().err
