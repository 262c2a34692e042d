"""``freeact_fx.verify``: planted faults are found and named, healthy models raise no alarm."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import MASK, TinyModel, masked_ids, tiny_model
from torch import Tensor, nn

import freeact_fx
from freeact_fx import (
    Checkpoint,
    ConfigError,
    Finding,
    QuantConfig,
    TokenTypes,
    Verification,
    compat,
    ops,
)
from freeact_fx.linear_form import group_form, text_of
from freeact_fx.passes import insert
from freeact_fx.verification import Unchecked

TYPES = TokenTypes.mask_token(MASK)
PLANS = ("single", "shift", "paper", "duplicate", "branch", "auto")


@functools.cache
def calibrated(plan: str, seed: int = 0) -> tuple[TinyModel, Checkpoint]:
    """A model and its calibration; both are shared by tests, which change copies."""
    torch.manual_seed(seed)
    model = TinyModel().eval()
    budget = {"duplicate": 4.0, "branch": 1.5}.get(plan, 1.1)
    config = QuantConfig(token_types=TYPES, plan=plan, memory_budget=budget, sample_tokens=128)
    batches = [masked_ids(4, 32, seed=1000 * seed + i) for i in range(1, 7)]
    return model, freeact_fx.calibrate(model, batches, config, progress=False)


def with_transform(checkpoint: Checkpoint, group: str, **changes: Any) -> Checkpoint:
    transform = replace(checkpoint.groups[group], **changes)
    return replace(checkpoint, groups=checkpoint.groups | {group: transform})


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Verification:
    """Without Inductor, unless it is asked for."""
    kwargs.setdefault("options", {})
    kwargs["options"] = {"bypass": ("lowering",), **kwargs["options"]}
    return freeact_fx.verify(model, *args, **kwargs)


def unchecked(result: Verification) -> set[str]:
    return {u.stage for u in result.unchecked}


# ---------------------------------------------------------------------------------------------- healthy models


@pytest.mark.parametrize("plan", PLANS)
def test_no_alarm(plan: str) -> None:
    for seed in range(2):
        model, checkpoint = calibrated(plan, seed)
        result = verify(model, masked_ids(2, 24, seed=50 + seed), checkpoint=checkpoint)
        assert result.ok, str(result)
        assert [g.name for g in result.groups][:2] == ["blocks.0.q", "blocks.0.o"]
        assert len(result.groups) == 8
        for group in result.groups:
            assert group.accumulated is not None
            assert group.transform_accumulated is not None
            assert 0 < group.local < 1.6 * group.nearest
            if plan != "paper":
                assert group.transform_local < 1e-6
                assert group.transform_accumulated < 1e-5
            alike = checkpoint.groups[group.name].num_rows == 2
            assert set(group.types) == ({"all types"} if alike else {"unmasked", "masked", "first"})
        assert unchecked(result) == {"lowering"} | ({"transforms"} if plan == "paper" else set())


@pytest.mark.parametrize("activation_bits", [8, "e4m3"])
def test_no_alarm_without_calibration(activation_bits: Any) -> None:
    options = {"token_types": TYPES, "plan": "branch", "activation_bits": activation_bits}
    for seed in range(2):
        result = verify(calibrated("single", seed)[0], masked_ids(seed=seed), options=options)
        assert result.ok, str(result)


def test_no_alarm_in_bf16() -> None:
    model = tiny_model().bfloat16()
    for plan in ("shift", "duplicate"):
        result = verify(model, masked_ids(), options={"token_types": TYPES, "plan": plan})
        assert result.ok, str(result)
        assert result.output["transformed"] < result.tolerance_of_output < 0.05


def test_no_alarm_in_a_converted_model(tmp_path: Path) -> None:
    model, checkpoint = calibrated("auto")
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    ids = masked_ids()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    whole = verify(converted, ids, dense=model, checkpoint=checkpoint)
    assert whole.ok
    assert unchecked(whole) == {"lowering"}
    by_path = verify(converted, ids, dense=tmp_path / "dense.pt")
    assert by_path.ok
    assert unchecked(by_path) == {"parts", "lowering"}
    assert by_path.groups == whole.groups
    # Without the original there are still the engine and the passes, and it says what is missing.
    alone = verify(converted, ids)
    assert alone.ok
    assert unchecked(alone) == {"parts", "transforms", "rounding", "types", "lowering"}
    assert not alone.groups
    assert "not checked" in str(alone)
    assert "dense=" in str(alone)
    with pytest.raises(ConfigError, match=r"no float original .* dense="):
        alone.plot(tmp_path / "picture.png")


@pytest.mark.inductor
def test_no_alarm_through_inductor() -> None:
    model, checkpoint = calibrated("branch")
    result = freeact_fx.verify(model, masked_ids(), checkpoint=checkpoint)
    assert result.ok, str(result)
    assert result.output["compiled"] == pytest.approx(result.output["quantised"], rel=0.5)
    assert not result.unchecked


@pytest.mark.parametrize("bypass", ["passes", "engine"])
def test_a_bypassed_stage_is_not_checked(bypass: str) -> None:
    model, checkpoint = calibrated("single")
    options = {"bypass": ("lowering", bypass)}
    result = freeact_fx.verify(model, masked_ids(), checkpoint=checkpoint, options=options)
    assert result.ok
    assert bypass in unchecked(result)
    assert ("quantised" in result.output) == (bypass == "engine")


# ---------------------------------------------------------------------------------------------- planted faults


def exchanged_ids(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"checkpoint": checkpoint, "options": {"token_types": TokenTypes.mask_token(12)}}


def perturbed_transform(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    left = checkpoint.groups["blocks.1.o"].left
    noise = torch.randn(left.shape, generator=torch.Generator().manual_seed(1))
    changed = left + 0.3 * left.square().mean().sqrt() * noise
    return {"checkpoint": with_transform(checkpoint, "blocks.1.o", left=changed)}


def singular_transform(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    left = checkpoint.groups["blocks.1.o"].left.clone()
    left[:, 0] = left[:, 1]
    return {"checkpoint": with_transform(checkpoint, "blocks.1.o", left=left)}


def clipped_type(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    clip = checkpoint.groups["blocks.0.down"].clip.clone()
    clip[1] *= 0.1
    return {"checkpoint": with_transform(checkpoint, "blocks.0.down", clip=clip)}


def exchanged_rows(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that belongs to a type belongs to the other, in one group: nothing is inexact, only less right."""
    shift = checkpoint.groups["blocks.0.q"].shift
    assert shift is not None
    return {"checkpoint": with_transform(checkpoint, "blocks.0.q", shift=shift[[1, 0, 2, 3]])}


def mutated_weight(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    model.blocks[1].up.weight.data.mul_(1.01)
    return {"checkpoint": checkpoint}


def other_model(model: TinyModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Inputs unlike those of the calibration: a few channels are far larger."""
    model.blocks[0].attention_norm.weight.data[:2] *= 40
    return {"checkpoint": checkpoint}


FAULTS: dict[str, tuple[str, Callable[..., dict[str, Any]], tuple[str, str, str]]] = {
    # plan, plant, (stage, place, what the text says)
    "ids exchanged": ("shift", exchanged_ids, ("parts", "token types", r"masked = \[12\]")),
    "transform perturbed": (
        "shift",
        perturbed_transform,
        ("rounding", "blocks.1.o", "Q no longer"),
    ),
    "transform singular": (
        "single",
        singular_transform,
        ("transforms", "blocks.1.o", r"does not invert"),
    ),
    "clip": (
        "shift",
        clipped_type,
        ("rounding", "blocks.0.down", r"tokens of type masked .* clip"),
    ),
    "rows exchanged": (
        "shift",
        exchanged_rows,
        ("types", "blocks.0.q", r"tokens of type \w+ .* as type \w+.*exchanged"),
    ),
    "weight": ("branch", mutated_weight, ("parts", "blocks.1.up", "fingerprint")),
    "other inputs": ("shift", other_model, ("rounding", "blocks.0.q", "calibrate on inputs like")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str) -> None:
    plan, plant, (stage, place, text) = FAULTS[name]
    healthy, checkpoint = calibrated(plan)
    model = copy.deepcopy(healthy)
    result = verify(model, masked_ids(seed=50), **plant(model, checkpoint))
    first = result.first_culprit
    assert first is not None, str(result)
    assert (first.stage, first.place) == (stage, place), str(result)
    assert re.search(text, str(first)), str(first)
    assert place in str(result).splitlines()[0]


class TwoSubspaces(nn.Module):
    """Ids from 32 on lie in other channels than those below: each type has a slice that it is right in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 48)
        with torch.no_grad():
            self.embed.weight[:32, 24:] *= 0.02
            self.embed.weight[32:, :24] *= 0.02
        self.up, self.twice, self.bent = (nn.Linear(48, 96) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.up(x) + self.twice(2 * x) + self.bent(torch.tanh(x))


@functools.cache
def in_two_subspaces(plan: str) -> tuple[nn.Module, Checkpoint]:
    torch.manual_seed(0)
    model = TwoSubspaces().eval()
    high = freeact_fx.TokenType("high", tuple(range(32, 64)))
    types = TokenTypes((freeact_fx.TokenType("low"), high))
    config = QuantConfig(token_types=types, plan=plan, sink=None, memory_budget=2.0)
    batches = [torch.randint(64, (8, 64)) for _ in range(4)]
    return model, freeact_fx.calibrate(model, batches, config, progress=False)


@pytest.mark.parametrize("plan", ["paper", "duplicate"])
def test_wrong_slices(plan: str) -> None:
    model, checkpoint = in_two_subspaces(plan)
    ids = torch.randint(64, (2, 32))
    result = verify(model, ids, checkpoint=checkpoint)
    assert result.ok, str(result)
    assert result.groups[0].plan == plan
    slices = checkpoint.groups["up"].slice_of_type
    assert slices[:2] == (0, 1)
    changed = with_transform(checkpoint, "up", slice_of_type=(1, 0, *slices[2:]))
    result = verify(model, ids, checkpoint=changed)
    assert [(f.stage, f.place) for f in result.findings] == [("types", "up")], str(result)
    assert re.search(r"low must .* in slice 1, got .* in slice 0", str(result.findings[0]))
    # In a converted model the checkpoint shows it.
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    own_transform: Any = converted.up.transform
    form = replace(group_form(own_transform.form), slice_of_type=(1, 0, *slices[2:]))
    own_transform.form = text_of(form)
    result = verify(converted, ids, checkpoint=checkpoint)
    assert [f.place for f in result.findings] == ["up"]
    assert "slice_of_type of its transform must be (0, 1" in str(result.findings[0])


def test_wrong_widths() -> None:
    model, checkpoint = in_two_subspaces("paper")
    first, second = checkpoint.groups["up"].widths
    changed = with_transform(checkpoint, "up", widths=(first + 1, second - 1))
    result = verify(model, torch.randint(64, (2, 32)), checkpoint=changed)
    assert [f.place for f in result.findings] == ["up"], str(result)
    assert "plan paper" in str(result)


def flipped_word(model: nn.Module) -> None:
    model.blocks[1].v.weight_packed[5, 2] ^= -1


def shuffled_row(model: nn.Module) -> None:
    row = model.blocks[1].v.weight_packed[5]
    row.copy_(row.roll(1))


def wrong_scale(model: nn.Module) -> None:
    model.blocks[1].v.to_packed_linear().weight_scale[0, 5] *= 3


def wrong_bias(model: nn.Module) -> None:
    model.blocks[1].v.to_packed_linear().bias_table[1] *= 1.1


CORRUPTIONS: dict[str, tuple[Callable[[nn.Module], None], str, tuple[str, str]]] = {
    # what is changed, what the checkpoint shows, (stage, text) without the checkpoint
    "word": (flipped_word, r"weight_packed .* at \[5, 2\]", ("rounding", r"channel 5 .*\[5")),
    "row": (
        shuffled_row,
        r"weight_packed .* at \[5, 0\]",
        ("rounding", r"channel 5 .*packed\[5\]"),
    ),
    "scale": (
        wrong_scale,
        r"weight_scale .* 1 other values, the first at \[0, 5\]",
        ("rounding", r"channel 5 .*weight_scale\[0, 5\] is (2\.\d|3(\.\d)?) times"),
    ),
    "bias": (
        wrong_bias,
        r"bias_table .* at \[1, 0\]",
        ("parts", r"types masked that are off by 0.1"),
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_operand_of_a_converted_model(name: str) -> None:
    corrupt, exactly, (stage, text) = CORRUPTIONS[name]
    model, checkpoint = calibrated("shift")
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    corrupt(converted)
    # The checkpoint tells it to the word, without the original ...
    result = verify(converted, masked_ids(seed=50), checkpoint=checkpoint)
    assert [(f.stage, f.place) for f in result.findings] == [("parts", "blocks.1.v")]
    assert re.search(exactly, str(result.findings[0])), str(result)
    # ... and the original tells the row, without the checkpoint.
    result = verify(converted, masked_ids(seed=50), dense=model)
    assert [(f.stage, f.place) for f in result.findings] == [(stage, "blocks.1.v")], str(result)
    assert re.search(text, str(result.findings[0])), str(result)


@pytest.mark.parametrize("plan", ["branch", "duplicate"])
def test_exchanged_types_of_some_tokens(plan: str) -> None:
    """What ``token_types`` hands in is wrong for four tokens: these four are named."""
    model, checkpoint = calibrated(plan)
    ids = masked_ids(seed=50)
    types = TYPES.from_ids(ids)
    with freeact_fx.token_types(types):
        assert verify(model, ids, checkpoint=checkpoint).ok
    masked = (types.flatten() == 1).nonzero().flatten()[2:4]
    unmasked = (types.flatten() == 0).nonzero().flatten()[4:6]
    types.view(-1)[masked], types.view(-1)[unmasked] = 0, 1
    with freeact_fx.token_types(types):
        result = verify(model, ids, checkpoint=checkpoint)
    (finding,) = result.findings
    assert finding.stage == "types"
    assert finding.place == "token types unmasked, masked"
    for own, other, tokens in (("masked", "unmasked", unmasked), ("unmasked", "masked", masked)):
        named = ", ".join(map(str, tokens.tolist()))
        assert f"2 tokens of type {own} behave as {other} (tokens {named})" in finding.value


def test_a_mutated_original_under_a_converted_model() -> None:
    model, checkpoint = calibrated("shift")
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    other = copy.deepcopy(model)
    other.blocks[0].k.weight.data[3] += 0.5
    result = verify(converted, masked_ids(), dense=other.state_dict())
    assert [(f.stage, f.place) for f in result.findings] == [("parts", "blocks.0.k")], str(result)
    assert "fingerprint" in str(result.findings[0])


def wrong_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    row = insert._row
    monkeypatch.setattr(insert, "_row", lambda e, table, types, default: row(e, table, None, 0))


def wrong_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(gm: Any, *args: Any) -> Callable[..., Any]:
        return lambda *inputs: [t * 1.5 if t.is_floating_point() else t for t in gm(*inputs)]

    monkeypatch.setattr(compat, "compile_with_inductor", compile_wrongly)


def wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_UNSIGNED_ZERO", 120)


def test_a_fault_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint = calibrated("auto")
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    wrong_engine(monkeypatch)
    for given in ({"dense": model}, {}):
        result = verify(converted, masked_ids(), checkpoint=checkpoint, **given)
        (finding,) = result.findings
        assert finding.stage == "engine"
        assert "blocks.0.q" in finding.place
        assert "'bypass': ('engine',)" in finding.way_out


def test_a_fault_of_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias of the default type for all tokens: every group by itself is right, the graph is not."""
    model, checkpoint = calibrated("shift")
    wrong_passes(monkeypatch)
    result = verify(model, masked_ids(), checkpoint=checkpoint)
    assert {f.stage for f in result.findings} == {"passes"}, str(result)
    assert result.findings[0].place == "blocks.0.q"
    assert "quantisers off" in str(result.findings[0])
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    result = verify(converted, masked_ids(), checkpoint=checkpoint, dense=model)
    assert {f.stage for f in result.findings} == {"passes"}, str(result)


def test_a_fault_of_the_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_lowering(monkeypatch)
    model, checkpoint = calibrated("shift")
    result = freeact_fx.verify(model, masked_ids(), checkpoint=checkpoint)
    (finding,) = result.findings
    assert finding.stage == "lowering"
    assert finding.place == "the graph with blocks.0.q"
    assert "a difference of 0.5" in finding.value
    assert "'bypass': ('lowering',)" in finding.way_out


@pytest.mark.parametrize(
    ("stage", "plant"),
    [("passes", wrong_passes), ("lowering", wrong_lowering), ("engine", wrong_engine)],
)
def test_a_fault_goes_with_the_stage_that_is_bypassed(
    stage: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any call of ``torch.compile``; the other stages run as they are."""
    model, checkpoint = calibrated("shift")
    ids = masked_ids()

    def run(*bypass: str) -> Tensor:
        torch.compiler.reset()
        options = {"checkpoint": checkpoint, "bypass": bypass}
        with torch.no_grad():
            return torch.compile(model, backend="freeact", options=options)(ids)

    # Inductor's C++ is left out where it is not what is wrong.
    others = () if stage == "lowering" else ("lowering",)
    want = model(ids) if stage == "passes" else run("lowering")
    plant(monkeypatch)
    assert not torch.allclose(run(*others), want, atol=1e-3)
    torch.testing.assert_close(run(*others, stage), want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the result


def test_the_table_and_the_dict() -> None:
    model, checkpoint = calibrated("branch")
    result = verify(model, masked_ids(), checkpoint=checkpoint)
    text = str(result)
    assert text.startswith("TinyModel: ok")
    for words in ("blocks.1.down", "type masked", "plan ", "accumulated", "transformed"):
        assert words in text
    data = json.loads(json.dumps(result.to_dict()))
    assert data["version"] == 1
    assert data["ok"] is True
    assert data["findings"] == []
    assert data["unchecked"][0]["stage"] == "lowering"
    assert data["groups"][0]["members"] == ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    assert set(data["types"]) == {"unmasked", "masked", "first"}
    assert sum(p["groups"] for p in data["plans"].values()) == 8
    assert data["output"]["transformed"] < 1e-5 < data["output"]["quantised"]


def test_a_finding_says_place_rule_value_and_way_out() -> None:
    finding = Finding("types", "here", "it must be so", "that", "Do this.")
    assert str(finding) == "here: it must be so, got that. Do this."
    assert str(Unchecked("types", "that", "Do this.")) == "types: that. Do this."
    result = Verification("Model", [finding])
    assert not result.ok
    assert str(result).startswith("Model: FAILED at types. First culprit: here")
    result.output["compiled"] = float("inf")
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["output"]["compiled"] == "inf"


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    model, checkpoint = calibrated("branch")
    result = verify(model, masked_ids(), **perturbed_transform(model, checkpoint))
    result.plot(tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    assert "blocks.1.o: rounding" in drawn
    assert "masked (" in drawn
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Install freeact_fx\[bench\]"):
        result.plot(tmp_path / "picture.png")


class Padded(nn.Module):
    """A model whose padding holds what no token is like."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 48)
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        noise = 1e4 * torch.sin(torch.arange(48.0) ** 2)
        x = torch.where(attention_mask[..., None] == 1, x, noise)
        return self.down(torch.relu(self.up(x)))


def test_padding_does_not_count() -> None:
    model, ids = Padded().eval(), masked_ids()
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    options = {"token_types": TokenTypes.single(), "sink": None}
    result = verify(model, input_ids=ids, attention_mask=mask, options=options)
    assert result.ok
    assert [g.tokens for g in result.groups] == [24, 24]
    whole = verify(model, input_ids=ids, attention_mask=mask.clone().fill_(1), options=options)
    assert [g.tokens for g in whole.groups] == [32, 32]
    assert result.groups[0].local == pytest.approx(whole.groups[0].local, rel=0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tolerance": 0}, r"verify\(tolerance=\.\.\.\): must be above 0, got 0"),
        ({"dense": {}}, r"this model is dense, it is its own original"),
        ({"options": {"skip": "*"}}, "no Linear of this model is quantised on these inputs"),
        ({"options": {"bypas": "passes"}}, "Did you mean 'bypass'"),
    ],
)
def test_wrong_calls(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeact_fx.verify(tiny_model(), masked_ids(), **given)


def test_wrong_calls_of_a_converted_model(tmp_path: Path) -> None:
    model, checkpoint = calibrated("single")
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    for dense, message in (
        (nn.Linear(2, 2), "Linear has no blocks.0.q, which the converted model has"),
        ({}, r"blocks.0.q.weight must have shape \[48, 48\], got nothing"),
        (tmp_path / "none.pt", "must be a safetensors file"),
    ):
        with pytest.raises(ConfigError, match=message):
            verify(converted, masked_ids(), dense=dense)
    with pytest.raises(ConfigError, match="quantize=False needs dense weights"):
        verify(converted, masked_ids(), dense=model, options={"quantize": False})


def test_nothing_is_changed() -> None:
    model, checkpoint = calibrated("auto")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    try:
        verify(model, masked_ids(), checkpoint=checkpoint)
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
