"""Learned refinement: what it computes is what the codes compute, it stays exact, and it helps."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_transforms import random_transform
from tiny_model import MASK, masked_ids, tiny_model
from torch import Tensor

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.fit import fit_group
from freeact_fx.moments import GroupMoments
from freeact_fx.predict import mean_error
from freeact_fx.reference import (
    epilogue,
    int_mm,
    pack_int4,
    transform_quantize,
)
from freeact_fx.refine import LearnableTransform, descend, optimizer_with_schedule, refine
from freeact_fx.statistics import GroupStatistics
from freeact_fx.transform import GroupTransform, PackedLinear, orthogonal_transform, pack_linear

refine_module = sys.modules["freeact_fx.refine"]

K, SIZES = 48, (48, 24, 40)
PLANS = ["single", "shift", "branch", "own branch"]
CONFIG = QuantConfig(token_types=TokenTypes.mask_token(63), sink=None, refine_steps=60)


def weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = 2 ** torch.randn(K, generator=generator)
    return [torch.randn(n, K, generator=generator) * spread for n in SIZES]


def tokens(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [num, K] of correlated channels, a few of them large, in two types with means of their own."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    mixing = torch.randn(K, K, generator=fixed) * 2 ** torch.randn(K, 1, generator=fixed)
    mixing[:, [3, 17]] *= 10
    means = torch.randn(2, K, generator=fixed) * torch.tensor([[1.0], [8.0]])
    types = torch.randint(0, 2, (num,), generator=generator)
    return torch.randn(num, K, generator=generator) @ mixing + means[types], types


def learnable(
    fitted: GroupTransform, qmax: int = 7, biases: list[Any] | None = None
) -> LearnableTransform:
    none: list[Any] = [None] * len(SIZES)
    return LearnableTransform(fitted, weights(), biases or none, qmax=qmax, clip_search=False)


def statistics_of(config: QuantConfig, num: int = 512) -> GroupStatistics:
    statistics = GroupStatistics(
        [f"linear{i}" for i in range(len(SIZES))], weights(), [None] * len(SIZES), config
    )
    statistics.observe(*tokens(num, seed=1))
    return statistics


def start(plan: str) -> GroupTransform:
    """Data-free, but with the types' means and a branch on some of the channels' directions."""
    fitted = (
        random_transform(plan, K, 2, seed=0)
        if "branch" in plan
        else orthogonal_transform(K, CONFIG)
    )
    if plan == "single":
        return fitted
    x, types = tokens(512, seed=2)
    shift = torch.stack([x[types == 0].mean(0), x[types == 1].mean(0), torch.zeros(K)])
    return replace(fitted, plan=plan.removeprefix("own "), shift=shift)


def outputs_on_codes(
    fitted: GroupTransform, packed: PackedLinear, x: Tensor, types: Tensor, qmax: int
) -> Tensor:
    t = fitted
    codes, scale, coefficients = transform_quantize(
        x, types, t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank, t.widths,
        t.slice_of_type, 0, t.own_rank, qmax,
    )  # fmt: skip
    product = int_mm(codes, packed.weight) if qmax else codes @ packed.weight.t()
    operands = packed.weight_scale, packed.bias_table, coefficients, packed.branch_weight
    more = (packed.branch_scale,)
    return epilogue(product, scale, *operands, *more, types, t.slice_of_type, 0, torch.float32)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def error_on_codes(fitted: GroupTransform, seed: int) -> float:
    """Of packed Linears, rounded to nearest, on tokens that nothing was fitted to."""
    x, types = tokens(512, seed)
    pairs = [
        (outputs_on_codes(fitted, pack_linear(fitted, w, None, CONFIG), x, types, 7), x @ w.t())
        for w in weights()
    ]
    got, want = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    return relative(got, want)


def trained(plan: str, num_steps: int = 40) -> LearnableTransform:
    module = learnable(start(plan))
    x, types = tokens(256, seed=1)
    want = x @ module.weight.t()
    optimizer, schedule = optimizer_with_schedule([module], num_steps)
    for _ in range(num_steps):
        loss = (torch.cat(module(x, types), -1) - want).square().mean()
        descend(optimizer, schedule, loss)
    return module


@pytest.mark.parametrize("bits", [4, 8, "e4m3"])
@pytest.mark.parametrize("plan", PLANS)
def test_forward_is_what_the_codes_compute(plan: str, bits: Any) -> None:
    qmax = replace(CONFIG, activation_bits=bits).qmax
    biases = [torch.randn(SIZES[0]), None, None]
    module = learnable(start(plan), qmax, biases)
    with torch.no_grad():
        module.left += 0.1 * torch.randn_like(module.left)
        module.weight_clip_logit += torch.randn_like(module.weight_clip_logit)
        module.clip_logit += torch.randn_like(module.clip_logit)
    x, types = tokens(64, seed=3)
    fitted, scales = module.to_group_transform(), module.weight_scales()
    assert fitted.problem() is None
    for output, w, bias, scale in zip(module(x, types), weights(), biases, scales, strict=True):
        rest, branch = fitted.split_branch(fitted.transformed_weight(w))
        codes = (rest / scale[:, None]).round().clamp(-7, 7).to(torch.int8)
        branch = None if branch is None else branch.float()
        ones = None if branch is None else torch.ones(branch.shape[0])
        table = fitted.bias_table(w, bias)
        packed = PackedLinear(pack_int4(codes), scale[None], table, branch, ones)
        want = outputs_on_codes(fitted, packed, x, types, qmax)
        assert relative(output.detach(), want) < 1e-3


@pytest.mark.parametrize("plan", PLANS)
def test_exact_without_rounding(plan: str) -> None:
    module = trained(plan)
    fitted = module.to_group_transform()
    assert not torch.equal(fitted.left, start(plan).left)
    x, types = tokens(64, seed=3)
    types[:5] = 2  # untyped
    with torch.no_grad():
        off = learnable(fitted, qmax=0)(x, types)
    for w, got in zip(weights(), off, strict=True):
        want = x @ w.t()
        assert relative(got, want) < 1e-4
        packed = pack_linear(fitted, w, None, replace(CONFIG, quantize=False))
        assert relative(outputs_on_codes(fitted, packed, x, types, 0), want) < 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_reach_every_parameter(plan: str) -> None:
    module = learnable(start(plan))
    x, types = tokens(64, seed=1)
    loss = (torch.cat(module(x, types), -1) - x @ module.weight.t()).square().mean()
    loss.backward()
    parameters = dict(module.named_parameters())
    assert set(parameters) == {"left", "right", "log_scale", "clip_logit", "weight_clip_logit"}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # No token is untyped, which is the clips' last row.
        of_seen = parameter.grad[:2] if name == "clip_logit" else parameter.grad
        assert float((of_seen != 0).float().mean()) > 0.9, name


@pytest.mark.parametrize("plan", PLANS)
def test_refinement_lowers_the_error_on_new_tokens(plan: str) -> None:
    fitted = start(plan)
    refined = refine(fitted, statistics_of(CONFIG))
    assert refined.problem() is None
    assert refined.plan == fitted.plan
    assert refined.clip[2] == refined.clip[:2].max()
    assert error_on_codes(refined, seed=5) < 0.8 * error_on_codes(fitted, seed=5)


def test_refinement_is_reproducible_and_leaves_its_start_alone() -> None:
    fitted = start("shift")
    before = {name: tensor.clone() for name, tensor in fitted.tensors().items()}
    with torch.no_grad():  # as calibrate calls it
        one, two = (refine(fitted, statistics_of(CONFIG)) for _ in range(2))
    for name, tensor in fitted.tensors().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name])
        assert not tensor.requires_grad


def test_refinement_that_does_not_help_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = start("shift")

    def spoil(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].mul_(torch.linspace(0.01, 1, 6))

    monkeypatch.setattr(refine_module, "descend", spoil)
    assert refine(fitted, statistics_of(CONFIG)) is fitted

    def make_singular(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].zero_()

    monkeypatch.setattr(refine_module, "descend", make_singular)
    assert refine(fitted, statistics_of(CONFIG)) is fitted


def test_schedule_is_a_cosine_and_clips_learn_ten_times_as_fast() -> None:
    """From 5e-3 (clips 5e-2) down to 5e-6, one step of it for each step of descent."""
    module, num_steps = learnable(start("shift")), 8
    optimizer, schedule = optimizer_with_schedule([module], num_steps)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    free, clips = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert free == {"left", "right", "log_scale"}
    assert clips == {"clip_logit", "weight_clip_logit"}
    x, types = tokens(64, seed=1)
    for step in range(num_steps + 1):
        down = (1 + math.cos(math.pi * step / num_steps)) / 2
        for group, rate in zip(optimizer.param_groups, (5e-3, 5e-2), strict=True):
            assert group["lr"] == pytest.approx(5e-6 + (rate - 5e-6) * down, rel=1e-6)
        if step < num_steps:
            descend(optimizer, schedule, torch.cat(module(x, types), -1).square().mean())


def test_refinement_takes_its_schedule_over_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def watched(*args: Any) -> Any:
        made.append((args[1:], optimizer_with_schedule(*args)))
        return made[-1][1]

    monkeypatch.setattr(refine_module, "optimizer_with_schedule", watched)
    refine(start("shift"), statistics_of(replace(CONFIG, refine_steps=7)))
    ((options, (optimizer, _)),) = made
    assert options == (7,)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-6, 5e-6])


def test_nothing_to_refine() -> None:
    fitted = start("shift")
    assert refine(fitted, statistics_of(replace(CONFIG, refine_steps=0))) is fitted
    slices = orthogonal_transform(K, replace(CONFIG, plan="duplicate"))
    assert refine(slices, statistics_of(CONFIG)) is slices


@pytest.mark.parametrize("num", [1, 2, 3])
def test_hardly_any_tokens(num: int) -> None:
    assert refine(start("shift"), statistics_of(CONFIG, num)).problem() is None


def test_calibration_refines_the_plan_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[str, list[float]] = defaultdict(list)

    def watched(statistics: GroupStatistics) -> Any:
        found = fit_group(statistics)
        moments = GroupMoments.of(statistics.without_held_out())
        errors[statistics.names[0]].append(mean_error(found[2]["error"], moments))
        return found

    monkeypatch.setattr(sys.modules["freeact_fx.calibrate"], "fit_group", watched)
    model = tiny_model()
    batches = [masked_ids(4, 32, seed=seed) for seed in range(1, 5)]
    config = QuantConfig(token_types=TokenTypes.mask_token(MASK), plan="shift")
    plain, refined = (
        freeact_fx.calibrate(model, batches, replace(config, refine_steps=n), progress=False)
        for n in (0, 30)
    )
    assert set(errors) == set(plain.groups)
    assert all(after <= before for before, after in errors.values())
    changed = [
        g for g in plain.groups if not torch.equal(plain.groups[g].left, refined.groups[g].left)
    ]
    assert len(changed) >= len(plain.groups) // 2
