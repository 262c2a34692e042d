"""The accuracy benchmark's row "refit on the quantised stream": what it fits to, what that gives, what stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantised_stream
import torch
from quantised_stream import refit_on_quantised_stream, types_of
from test_baselines import model_with_outliers
from tiny_model import GROUPS, LINEARS, MASK, TinyModel, masked_ids, relative, tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.transform import GroupTransform, pack_linear

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK))
BATCHES = [{"input_ids": masked_ids(16, 16, seed=seed)} for seed in range(1, 17)]
FEW = [{"input_ids": masked_ids(2, 16, seed=seed)} for seed in range(1, 9)]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def error(model: nn.Module, checkpoint: Checkpoint, batches: list[dict[str, Tensor]]) -> float:
    """Of the logits that the converted and compiled model gives for the batches, relative."""
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    run = torch.compile(converted, backend="freeact", options={"compiler": "eager"})
    ids = torch.cat([batch["input_ids"] for batch in batches])
    return relative(logits(run, ids), logits(model, ids))


@cache
def calibrated(
    make: Callable[[], nn.Module], few: bool, config: QuantConfig
) -> tuple[Checkpoint, Checkpoint]:
    """The default's checkpoint, and the refitted one."""
    batches = FEW if few else BATCHES
    return (
        freeact_fx.calibrate(make(), batches, config, progress=False),
        refit_on_quantised_stream(make(), batches, config, progress=False),
    )


@pytest.mark.parametrize(
    ("make", "bits"), [(model_with_outliers, 4), (model_with_outliers, 8), (tiny_llama, 4)]
)
def test_errs_less_than_the_default(make: Callable[[], nn.Module], bits: Any) -> None:
    model = make()
    default, refitted = calibrated(make, False, replace(CONFIG, activation_bits=bits))
    assert error(model, refitted, BATCHES) < 0.9 * error(model, default, BATCHES)
    others = [{"input_ids": masked_ids(64, 16, seed=99)}]
    assert error(model, refitted, others) < 0.95 * error(model, default, others)


def test_checkpoint_has_the_format_of_the_default(tmp_path: Path) -> None:
    default, refitted = calibrated(model_with_outliers, True, CONFIG)
    assert refitted.config == default.config
    assert refitted._structure() == default._structure()
    was, now = default._tensors(), refitted._tensors()
    assert {n: (t.shape, t.dtype) for n, t in now.items()} == {
        n: (t.shape, t.dtype) for n, t in was.items()
    }
    changed = {n.rpartition(".")[2] for n in was if not torch.equal(was[n], now[n])}
    assert changed == {"weight_packed", "weight_scale", "branch_weight", "branch_scale"}
    refitted.save(tmp_path)
    loaded = Checkpoint.load(tmp_path)
    assert loaded == refitted
    assert loaded.statistics == refitted.statistics


def test_fits_to_what_the_quantised_layers_before_deliver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group to the very inputs, and types, that its Linears have in the model that comes out."""
    model = model_with_outliers()
    seen: dict[str, list[tuple[Tensor, ...]]] = {}
    add = quantised_stream._Group.add

    def watched(group: Any, moments: Any, *args: Any) -> None:
        seen.setdefault(group.names[0], []).append(args[:3])
        add(group, moments, *args)

    monkeypatch.setattr(quantised_stream._Group, "add", watched)
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, refit_on_quantised_stream(model, FEW, CONFIG, progress=False))
    inputs = {id(m): inputs_of(m, FEW) for m in (model, converted)}
    assert list(seen) == [group[0] for group in GROUPS]
    for name, calls in seen.items():
        for index, (x, delivered, types) in enumerate(calls):
            assert torch.equal(types, types_by_hand(FEW[index]["input_ids"]))
            assert torch.allclose(x, inputs[id(model)][name][index], atol=1e-5)
            assert torch.allclose(delivered, inputs[id(converted)][name][index], atol=1e-5)
            assert name == "blocks.0.q" or relative(delivered, x) > 1e-3


def types_by_hand(ids: Tensor) -> Tensor:
    types = CONFIG.token_types.from_ids(ids)
    types[:, 0] = 2
    return types


def inputs_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """By name of the first Linear of each group, what it reads in each batch."""
    found: dict[str, list[Tensor]] = {group[0]: [] for group in GROUPS}
    for name, inputs in found.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0])
        )
    for batch in batches:
        with freeact_fx.token_types(types_by_hand(batch["input_ids"])):
            logits(model, batch["input_ids"])
    return found


def test_without_a_share_of_what_was_seen_it_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantised_stream, "SHARES", (0.0,))
    refitted = refit_on_quantised_stream(model_with_outliers(), FEW, CONFIG, progress=False)
    assert refitted == calibrated(model_with_outliers, True, CONFIG)[0]


def test_model_of_noise_fits_as_the_default_does() -> None:
    """Share 0 stands for the default's codes: on the tokens that both were fitted to they err alike."""
    model = model_with_outliers()
    default, _ = calibrated(model_with_outliers, False, CONFIG)
    ratios = []

    def compare(group: Any, fitted: Any, held_out: Any) -> tuple[list[Any], list[Any]]:
        everything = fitted + held_out
        own, of_default = (
            group.errors(everything, linears)
            for linears in (group.refitted(everything, 0.0), group.packed)
        )
        ratios.extend(a / b for a, b in zip(own, of_default, strict=True))
        return group.packed, [{} for _ in group.names]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised_stream._Group, "best", compare)
        assert refit_on_quantised_stream(model, BATCHES, CONFIG, progress=False) == default
    assert len(ratios) == len(LINEARS)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_model_of_noise_is_what_many_tokens_show() -> None:
    """Channels of like size and directions of unlike ones, the least of them lost in rounding; nothing is quantised
    before."""
    directions = torch.linalg.qr(torch.randn(64, 64))[0] * torch.logspace(0, -1.5, 64)[:, None]
    dense, config = nn.Linear(64, 48, bias=False), QuantConfig(token_types=TokenTypes.single())
    transform = GroupTransform(
        plan="single",
        left=torch.eye(8),
        right=torch.eye(8)[None],
        clip=torch.full((3,), 0.8),
        widths=(8,),
        slice_of_type=(0, 0, 0),
    )
    packed = pack_linear(transform, dense.weight, None, config)
    group = quantised_stream._Group(
        "linear", ["linear"], [dense], [packed], transform, torch.ones(3), config
    )
    moments = group.moments()
    for _ in range(50):
        x = torch.randn(1, 4096, 64) @ directions
        group.add(moments, x, x, torch.zeros(1, 4096, dtype=torch.int32), None)
    shown, modelled = (
        torch.linalg.solve(moments.square, cross)
        for cross in (moments.cross, group.modelled(moments))
    )
    assert relative(modelled, shown) < 0.4 * relative(dense.weight.t(), shown)


def test_few_tokens_are_trusted_less_than_many() -> None:
    shares = []
    for few in (True, False):
        _, refitted = calibrated(model_with_outliers, few, CONFIG)
        kept = [s["quantised_stream"] for s in refitted.statistics.values()]
        shares.append([facts["share"] for by_linear in kept for facts in by_linear.values()])
        assert len(shares[-1]) == len(LINEARS)
    assert sum(shares[0]) < sum(shares[1])


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Masked(TinyModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input_ids)

    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    weights = []
    add = quantised_stream._Moments.add

    def watched(moments: Any, met: Tensor, wanted: Tensor, weight: Tensor) -> None:
        weights.append(weight)
        add(moments, met, wanted, weight)

    monkeypatch.setattr(quantised_stream._Moments, "add", watched)
    batches = [batch | {"attention_mask": mask} for batch in FEW]
    refit_on_quantised_stream(Masked().eval(), batches, CONFIG, progress=False)
    assert len(weights) == len(GROUPS) * len(FEW)
    assert all(torch.equal(weight.view(2, 16) > 0, mask > 0) for weight in weights)


def test_layers_left_float_are_on_the_way() -> None:
    model = model_with_outliers()
    config = replace(CONFIG, skip=("lm_head", "blocks.0.*"))
    default, refitted = calibrated(model_with_outliers, False, config)
    assert set(refitted.linears) == {name for name in LINEARS if name.startswith("blocks.1.")}
    assert error(model, refitted, BATCHES) < error(model, default, BATCHES)


def test_types_are_those_of_calibration() -> None:
    model = model_with_outliers()
    for types, batch in zip(types_of(model, FEW, CONFIG), FEW, strict=True):
        assert torch.equal(types, types_by_hand(batch["input_ids"]))
    one_type = replace(CONFIG, token_types=TokenTypes.single(), sink=None)
    assert all(torch.equal(t, torch.zeros(2, 16)) for t in types_of(model, FEW, one_type))


def test_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    refit_on_quantised_stream(model, FEW, CONFIG, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one batch is held out\. Give at least 2"):
        refit_on_quantised_stream(model_with_outliers(), FEW[:1], CONFIG)


def test_a_layer_that_the_stream_would_miss_is_refused() -> None:
    class NoLinear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    model = model_with_outliers()
    model.blocks.insert(1, copy.deepcopy(model.blocks[0]))
    for name, child in list(model.blocks[1].named_children()):
        if isinstance(child, nn.Linear):
            setattr(model.blocks[1], name, NoLinear(child))
    config = replace(CONFIG, skip=("lm_head", "*blocks.1.*"))
    with pytest.raises(RuntimeError, match=r"a layer between blocks\.0 and blocks\.2 has no"):
        refit_on_quantised_stream(model, FEW, config, progress=False)
