"""Fitting a group: every plan from planted statistics, the prediction, GPTQ, and what ``auto`` promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import MASK, masked_ids, relative, tiny_model
from torch import Tensor

import freeact_fx
from freeact_fx import fit
from freeact_fx.config import QuantConfig
from freeact_fx.errors import ConfigError
from freeact_fx.fit import fit_group
from freeact_fx.gptq import gptq
from freeact_fx.moments import GroupMoments
from freeact_fx.narrow_slices import best_widths
from freeact_fx.plans import fit_transform, strongest_directions, with_branch
from freeact_fx.predict import mean_error, predicted_errors, ranking_share, rounding_noise
from freeact_fx.reference import (
    branch_codes,
    epilogue,
    quantize_tokens,
    transform,
    transform_quantize,
    unpack_int4,
)
from freeact_fx.round_group import (
    RoundedLinear,
    Sample,
    measured_errors,
    refitted,
    round_group,
    search_clip,
    weight_sides,
)
from freeact_fx.statistics import GroupStatistics
from freeact_fx.token_types import TokenTypes
from freeact_fx.transform import GroupTransform, pack_linear

SEEDS = st.integers(0, 10**6)
FEATURES = st.sampled_from([32, 48, 96])
EXACT = QuantConfig(quantize=False)


def config_of(num_types: int, **fields: Any) -> QuantConfig:
    types = TokenTypes.explicit(*(f"t{i}" for i in range(num_types)))
    return QuantConfig(token_types=types, sink=None, **fields)


def statistics_of(
    config: QuantConfig,
    tokens: list[Tensor],
    weights: list[Tensor],
    biases: list[Any] | None = None,
) -> GroupStatistics:
    """Of a group of Linears; tokens[t] [n, K] are those of type t."""
    names = [f"linear{i}" for i in range(len(weights))]
    statistics = GroupStatistics(names, weights, biases or [None] * len(weights), config)
    types = torch.cat([torch.full((x.shape[0],), t) for t, x in enumerate(tokens)])
    statistics.observe(torch.cat(tokens), types)
    return statistics


def random_tokens(num_features: int, generator: torch.Generator, num_tokens: int = 300) -> Tensor:
    """With a mean, a basis and a decaying spectrum of their own, and a few channels of outliers."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(normal(num_features, num_features))[0]
    spectrum = 1 / (1 + torch.arange(num_features)) ** 0.5
    outliers = 1 + 9 * (torch.rand(num_features, generator=generator) < 0.1)
    mean = normal(num_features) * torch.rand(1, generator=generator)
    return (normal(num_tokens, num_features) * spectrum @ basis + mean) * outliers


def random_statistics(
    num_features: int, num_types: int, seed: int, **fields: Any
) -> GroupStatistics:
    generator = torch.Generator().manual_seed(seed)
    tokens = [random_tokens(num_features, generator) for _ in range(num_types)]
    weights = [torch.randn(n, num_features, generator=generator) for n in (24, 16)]
    biases = [None, torch.randn(16, generator=generator)]
    return statistics_of(config_of(num_types, seed=seed, **fields), tokens, weights, biases)


def outputs(fitted: GroupTransform, weight: Tensor, x: Tensor, types: Tensor) -> Tensor:
    """Of a Linear under a transform, without rounding."""
    packed = pack_linear(fitted, weight, None, EXACT)
    codes, scale, coefficients = transform_quantize(
        *(x, types, fitted.shift, fitted.channel_scale, fitted.left, fitted.right, fitted.clip),
        *(fitted.lowrank, fitted.widths, fitted.slice_of_type, 0, fitted.own_rank, 0),
    )
    return epilogue(
        *(codes @ packed.weight.t(), scale, packed.weight_scale, packed.bias_table, coefficients),
        *(packed.branch_weight, packed.branch_scale, types, fitted.slice_of_type, 0, x.dtype),
    )


# ------------------------------------------------------------------ closed form


@pytest.mark.parametrize("label", ["single", "shift", "duplicate", "branch", "own branch"])
@settings(max_examples=15)
@given(FEATURES, st.integers(1, 4), SEEDS)
def test_without_rounding_a_fitted_plan_is_exact(
    label: str, num_features: int, num_types: int, seed: int
) -> None:
    """For tokens of every type and untyped ones, seen in calibration or not."""
    statistics = random_statistics(num_features, num_types, seed)
    moments = GroupMoments.of(statistics)
    fitted = fit_transform(label.removeprefix("own "), moments)
    if "branch" in label:
        fitted = with_branch(fitted, moments, 2 * num_types, own=label == "own branch")
    assert fitted.problem() is None
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(40, num_features, generator=generator)
    types = torch.arange(40) % (num_types + 1)
    for weight in statistics.weights:
        want = x @ weight.t()
        error = (outputs(fitted, weight, x, types) - want).norm() / want.norm()
        assert error < 1e-4


@settings(max_examples=15)
@given(FEATURES, st.integers(2, 4), SEEDS)
def test_paper_drops_what_is_predicted(num_features: int, num_types: int, seed: int) -> None:
    """Without rounding, the error is that of a projection by type, and the prediction knows it."""
    statistics = random_statistics(num_features, num_types, seed)
    moments = GroupMoments.of(statistics)
    fitted = fit_transform("paper", moments)
    assert fitted.problem() is None
    assert sum(fitted.widths) == fitted.left.shape[0]
    assert len(fitted.widths) == num_types
    assert fitted.channel_scale is not None
    nothing_to_round = [torch.zeros(w.shape[0], num_features) for w in statistics.weights]
    predicted = predicted_errors(fitted, nothing_to_round, moments)
    for index in range(num_types):
        # All tokens that the moments were made of.
        x = statistics.sample[index][1]
        start = sum(fitted.widths[:index])
        left = fitted.left[:, start : start + fitted.widths[index]].double()
        basis = torch.linalg.qr(left)[0]
        kept = torch.kron(basis @ basis.t(), torch.eye(fitted.right.shape[-1]).double())
        projected = (x.double() * fitted.channel_scale) @ kept / fitted.channel_scale
        types = torch.full((x.shape[0],), index)
        for name, weight in zip(statistics.names, statistics.weights, strict=True):
            got, want = outputs(fitted, weight, x, types), x @ weight.t()
            assert torch.allclose(got, (projected @ weight.double().t()).float(), atol=1e-2)
            error = float((got - want).square().sum() / want.square().sum())
            assert predicted[name][f"t{index}"] == pytest.approx(error, rel=1e-2, abs=1e-6)


def test_widths_follow_the_rank_of_the_types() -> None:
    """One type lives in an eighth of the left factor's space, the other in all of it."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(400, 1, 12, generator=generator) * torch.eye(8)[:, :1]
    thin = few.reshape(400, 96) + 1e-3 * torch.randn(400, 96, generator=generator)
    wide = torch.randn(400, 96, generator=generator)
    weights = [torch.randn(64, 96, generator=generator)]
    fitted = fit_transform(
        "paper", GroupMoments.of(statistics_of(config_of(2), [thin, wide], weights))
    )
    assert fitted.left.shape[0] == 8
    assert fitted.widths == (1, 7)
    fitted = fit_transform(
        "paper", GroupMoments.of(statistics_of(config_of(2), [wide, thin], weights))
    )
    assert fitted.widths == (7, 1)


@given(st.integers(1, 4), st.integers(4, 9), SEEDS)
def test_widths_are_the_best(num_slices: int, columns: int, seed: int) -> None:
    losses = torch.rand(num_slices, columns + 1, generator=torch.Generator().manual_seed(seed))
    widths = best_widths(losses)
    every = itertools.product(range(1, columns + 1), repeat=num_slices)

    def loss(chosen: tuple[int, ...]) -> float:
        return sum(float(losses[i, k]) for i, k in enumerate(chosen))

    assert sum(widths) == columns
    assert min(widths) >= 1
    assert loss(widths) == pytest.approx(min(loss(w) for w in every if sum(w) == columns))


def test_more_slices_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="5 slices need as many columns of the left factor, got 4"):
        best_widths(torch.zeros(5, 5))


@given(st.integers(1, 8), SEEDS)
@settings(max_examples=20)
def test_strongest_directions_are_the_leading_eigenvectors(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(100, 100, generator=generator))[0]
    values = 2.0 ** -torch.arange(100)
    found = strongest_directions((basis * values) @ basis.t(), rank, generator)
    assert torch.allclose(found.t() @ found, torch.eye(rank), atol=1e-4)
    assert torch.allclose(found @ found.t(), basis[:, :rank] @ basis[:, :rank].t(), atol=1e-2)


def test_a_rare_type_shares_the_slice_of_the_most_frequent() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [random_tokens(48, generator, n) for n in (50, 3, 200)]
    statistics = statistics_of(config_of(4), tokens, [torch.randn(16, 48, generator=generator)])
    for plan in ("duplicate", "paper"):
        fitted = fit_transform(plan, GroupMoments.of(statistics))
        # Types 1 (3 tokens) and 3 (none), and the untyped row.
        assert fitted.slice_of_type == (0, 1, 1, 1, 1)
        assert fitted.problem() is None


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 31, 32, 100])
def test_held_out_tokens_are_in_no_moment(num_tokens: int) -> None:
    """Half of a full sample, a quarter of one that is not, and fewer than four tokens are in both."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(n, 32, generator=generator) for n in (num_tokens, 60)]
    config = config_of(2, sample_tokens=16)
    statistics = statistics_of(config, tokens, [torch.randn(8, 32, generator=generator)])
    fit = statistics.without_held_out()
    held_out, types = statistics.samples(held_out=True)
    for index, own in enumerate(tokens):
        aside = held_out[types == index]
        if len(own) < 4:
            assert len(aside) == len(own)
            aside = aside[:0]
        else:
            assert len(aside) == (16 if len(own) >= 32 else len(own) // 4)
        assert fit.count[index] == len(own) - len(aside)
        assert torch.allclose(fit.total[index].float(), own.sum(0) - aside.sum(0), atol=1e-4)
        moment = own.t() @ own - aside.t() @ aside
        assert torch.allclose(fit.moment[index], moment, atol=1e-3)
        assert torch.allclose(statistics.moment[index], own.t() @ own, atol=1e-3)


# ------------------------------------------------------------------ the freedom theorem


@settings(max_examples=20)
@given(FEATURES, st.integers(1, 10), SEEDS)
def test_a_square_weight_transform_leaves_no_freedom(
    num_features: int, rank: int, seed: int
) -> None:
    """If Q is square and invertible, every P_t that keeps x P_t Q = x quantises the same vector, x Q^-1: on all of
    R^K because P_t must be Q^-1, on tokens of low rank because P_t may differ only where no token is. Two slices
    (duplicate) do leave freedom: there the types' own P_t quantise different vectors."""
    statistics = random_statistics(num_features, 2, seed)
    moments = GroupMoments.of(statistics)
    generator = torch.Generator().manual_seed(seed + 1)
    eye = torch.eye(num_features, dtype=torch.float64)

    def matrices(fitted: GroupTransform) -> tuple[list[Tensor], Tensor]:
        """P_t [K, K'] of both types, and Q [K', K]; fp64."""
        own = []
        for index in range(2):
            operands = (None, fitted.channel_scale, fitted.left, fitted.right, None)
            own.append(
                transform(
                    *(eye.float(), torch.full((num_features,), index), *operands),
                    *(fitted.widths, fitted.slice_of_type, 0, 0),
                )[0].double()
            )
        return own, fitted.transformed_weight(eye).t()

    (p, other), q = matrices(fit_transform("single", moments))
    assert torch.equal(p, other)
    # All of R^K: the equations P Q = I, one unknown for each entry of P, have this one solution.
    solved = torch.linalg.lstsq(q.t(), eye)
    assert int(torch.linalg.matrix_rank(q)) == num_features
    assert torch.allclose(solved.solution.t(), p, atol=1e-4 * float(p.abs().max()))
    # Tokens of low rank: another P with the same outputs differs, and not on the tokens.
    tokens = torch.randn(50, rank, generator=generator).double()
    tokens = tokens @ torch.randn(rank, num_features, generator=generator).double()
    basis = torch.linalg.svd(tokens, full_matrices=False)[2][:rank]
    outside = eye - basis.t() @ basis
    changed = p + outside @ torch.randn(num_features, num_features, generator=generator).double()
    assert (changed - p).norm() > 0.1
    assert torch.allclose(tokens @ changed @ q, tokens @ p @ q, atol=1e-6 * float(tokens.norm()))
    full = torch.ones(1)
    codes = [quantize_tokens((tokens @ m).float(), full, 127)[0].int() for m in (p, changed)]
    # Rounding of the two products may tip a value that lies between two codes.
    assert int((codes[0] - codes[1]).abs().max()) <= 1
    assert float((codes[0] != codes[1]).float().mean()) < 1e-2
    # Two slices: both P_t invert Q, and they are not the same.
    (p, other), q = matrices(fit_transform("duplicate", moments))
    for own in (p, other):
        assert torch.allclose(own @ q, eye, atol=1e-4)
    assert (p[:, :num_features] - other[:, num_features:]).norm() > 1e-2 * p.norm()


# ------------------------------------------------------------------ prediction


@pytest.mark.parametrize("qmax", [7, 127, 448])
@pytest.mark.parametrize("num_codes", [64, 512, 2048])
def test_rounding_noise_is_that_of_gaussian_vectors(qmax: int, num_codes: int) -> None:
    z = torch.randn(200, num_codes, generator=torch.Generator().manual_seed(0))
    errors = []
    for ratio in torch.linspace(0.5, 1, 11):
        codes, scale = quantize_tokens(z, ratio[None], qmax)
        errors.append(float((codes.float() * scale - z).square().mean() / z.square().mean()))
    assert rounding_noise(num_codes, qmax) == pytest.approx(min(errors), rel=0.25)


def planted(case: str) -> GroupStatistics:
    """Two types of 96 channels in the cases of which the order of the plans is known."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    flat = normal(600, 96)
    if case == "mask":
        tokens = [flat, 0.1 * normal(600, 96) + 2 * normal(96)]
    elif case == "disjoint":
        # Each type in half of the channels, of unlike energy.
        loud = torch.where(torch.arange(96) < 48, 1.0, 0.03)
        tokens = [flat * loud, normal(600, 96) * loud.flip(0)]
    else:
        tokens = [flat, normal(600, 96)]
    weights = [normal(64, 96), normal(32, 96)]
    return statistics_of(config_of(2, memory_budget=2.0, plans_measured=8), tokens, weights)


@pytest.mark.parametrize(
    ("case", "better", "worse"),
    [
        ("mask", "shift", "single"),
        ("disjoint", "duplicate", "shift"),
        ("disjoint", "duplicate", "single"),
        ("flat", "single", "paper"),
        ("mask", "shift", "paper"),
    ],
)
def test_planted_cases_are_ranked_rightly(case: str, better: str, worse: str) -> None:
    plans = fit_group(planted(case))[2]["plans"]
    for kind in ("predicted", "measured"):
        assert plans[better][kind] < 0.95 * plans[worse][kind], kind


@pytest.mark.parametrize("case", ["mask", "disjoint", "flat"])
def test_prediction_is_near_the_measurement(case: str) -> None:
    """Within a factor of 1.5 for every plan, Gaussian tokens and codes to nearest."""
    for label, plan in fit_group(planted(case))[2]["plans"].items():
        assert 1 / 1.5 < plan["predicted"] / plan["measured"] < 1.5, label


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("loud", [1, 100], ids=["even outputs", "a loud output"])
def test_prediction_of_a_branch_is_near_the_measurement(loud: float, own: bool) -> None:
    """By type: of a few alike and faint tokens too, and where 8 bits are too coarse for the branch's weight."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    many = 3 * normal(600, 8) @ normal(8, 96) + 0.3 * normal(600, 96)
    few = 0.1 * (normal(96) + 0.1 * normal(20, 96))
    weight = normal(64, 96)
    weight[0] = loud * weight[0]
    statistics = statistics_of(config_of(2), [many, few], [weight])
    moments = GroupMoments.of(statistics.without_held_out())
    fitted = with_branch(fit_transform("branch", moments), moments, 16, own=own)
    fitted = search_clip(fitted, statistics)
    (side,) = sides = weight_sides(fitted, statistics)
    linears = round_group(fitted, sides, moments, by_gptq=False)
    measured = measured_errors(fitted, linears, Sample.of(statistics, held_out=True))["linear0"]
    predicted = predicted_errors(fitted, [side.rest], moments, [side.branch])["linear0"]
    for name, error in measured.items():
        assert 1 / 1.5 < predicted[name] / error < 1.5, name


def test_share_of_groups_ranked_rightly() -> None:
    def group(*plans: tuple[float, float | None]) -> dict[str, Any]:
        names = "abc"
        return {
            "plans": {
                names[i]: {"predicted": predicted, "measured": measured}
                for i, (predicted, measured) in enumerate(plans)
            }
        }

    right = group((1, 10), (2, 20), (3, 30))
    wrong = group((1, 20), (2, 10))
    tied = group((1, 1.04), (2, 1.0))
    unmeasured = group((1, 20), (2, None))
    assert ranking_share({"g": right}) == 1
    assert ranking_share({"g": wrong}) == 0
    assert ranking_share({"g": right, "h": wrong}) == 0.5
    assert ranking_share({"g": tied, "h": unmeasured}) == 1
    assert ranking_share({"g": tied}, tolerance=0.01) == 0


# ------------------------------------------------------------------ auto


def error_of(statistics: GroupStatistics) -> float:
    """Of the group's best plan, on the held-out tokens."""
    return mean_error(
        fit_group(statistics)[2]["error"], GroupMoments.of(statistics.without_held_out())
    )


@settings(max_examples=15)
@given(st.integers(1, 3), st.sampled_from([1.0, 1.2, 2.0, 3.0]), st.booleans(), SEEDS)
def test_auto_is_never_worse_than_single(
    num_types: int, budget: float, by_gptq: bool, seed: int
) -> None:
    """On the held-out tokens, and the storage is within the budget."""
    fields: dict[str, Any] = {"memory_budget": budget, "gptq": by_gptq, "plans_measured": 2}
    statistics = random_statistics(48, num_types, seed, **fields)
    moments = GroupMoments.of(statistics.without_held_out())
    fitted, packed, report = fit_group(statistics)
    statistics.config = replace(statistics.config, plan="single")
    _, plain, single = fit_group(statistics)
    assert mean_error(report["error"], moments) <= mean_error(single["error"], moments)
    assert set(report["predicted"]) == set(report["error"]) == set(statistics.names)
    codes = sum(linear.weight.nbytes for linear in plain)
    branch = 0 if fitted.lowrank is None else fitted.lowrank.nbytes
    for linear in packed:
        branch += sum(t.nbytes for n, t in linear.tensors().items() if n.startswith("branch"))
    if fitted.num_rows < num_types + 1:
        # In place of tables by type.
        num_outputs = sum(linear.weight.shape[0] for linear in packed)
        branch -= (num_types - 1) * (2 * 48 + 4 * num_outputs)
    assert sum(linear.weight.nbytes for linear in packed) + branch <= budget * codes


def test_auto_is_never_worse_than_single_refined() -> None:
    """Types without means of their own: shift is no better to begin with, and refinement decides."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        spectrum = (1 + torch.arange(48)) ** -0.5
        tokens = [torch.randn(300, 48, generator=generator) * spectrum for _ in range(2)]
        config = config_of(2, refine_steps=20, memory_budget=1.0, seed=seed)
        statistics = statistics_of(config, tokens, [torch.randn(24, 48, generator=generator)])
        auto = error_of(statistics)
        statistics.config = replace(config, plan="single")
        assert auto <= error_of(statistics)


def test_plans_out_of_reach_are_not_tried() -> None:
    def labels(num_types: int, **fields: Any) -> set[str]:
        return set(fit_group(random_statistics(48, num_types, 0, **fields))[2]["plans"])

    assert labels(1, memory_budget=1.0) == {"single", "shift"}
    alike = {"shift, types alike"}
    assert labels(2, memory_budget=1.0) == {"single", "shift", "paper"} | alike
    alike |= {"branch, types alike"}
    assert (
        labels(2, memory_budget=1.9) == {"single", "shift", "paper", "branch", "own branch"} | alike
    )
    assert "duplicate" in labels(2, memory_budget=2.0)
    assert labels(2, plan="duplicate") == {"duplicate"}
    assert labels(2, plan="branch", memory_budget=2.0) == {"branch", "own branch"}


def test_types_share_their_rows_where_they_are_alike() -> None:
    """What tables by type would take goes into a larger branch."""
    generator = torch.Generator().manual_seed(1)

    def fitted(*means: Tensor) -> dict[str, Any]:
        tokens = [torch.randn(600, 96, generator=generator) + mean for mean in means]
        weights = [torch.randn(512, 96, generator=generator)]
        config = config_of(2, memory_budget=1.2)
        group, (linear,), _ = fit_group(statistics_of(config, tokens, weights))
        return {**group.tensors(), **linear.tensors()}

    def num_rows(tensors: dict[str, Any]) -> set[int]:
        return {tensors[name].shape[0] for name in ("shift", "clip", "bias_table")}

    one, other = torch.randn(2, 96, generator=generator)
    alike, typed = fitted(one, one), fitted(one, 3 * other)
    assert (num_rows(alike), num_rows(typed)) == ({2}, {3})
    further = alike["lowrank"].shape[1] - typed["lowrank"].shape[1]
    assert further == (2 * 96 + 4 * 512) // (96 + 512 + 4)


def test_what_types_that_are_alike_are_measured_with_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What refinement and a bias correction find for their one row is measured with the tokens of all types."""

    def moved(table: Tensor | None, by: float) -> Any:
        return None if table is None else torch.cat([table[:1] + by, table[1:]])

    def corrected(*args: Any, **kwargs: Any) -> list[RoundedLinear]:
        found = round_group(*args, **kwargs)
        return [replace(rounded, bias_table=moved(rounded.bias_table, 0.02)) for rounded in found]

    monkeypatch.setattr(fit, "round_group", corrected)
    monkeypatch.setattr(fit, "refine", lambda t, _: replace(t, clip=moved(t.clip, 1e-3)))
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(96, generator=generator)
    tokens = [torch.randn(600, 96, generator=generator) + mean for _ in range(2)]
    weights = [torch.randn(512, 96, generator=generator)]
    statistics = statistics_of(config_of(2, memory_budget=1.2), tokens, weights)
    fitted, (linear,), report = fit_group(statistics)
    assert not fitted.is_typed
    assert fitted.shift is not None
    assert linear.bias_table is not None
    rows = [0, 0, 1]
    typed = replace(
        fitted, shift=fitted.shift[rows], clip=fitted.clip[rows], slice_of_type=(0, 0, 0)
    )
    rounded = RoundedLinear(
        unpack_int4(linear.weight, 96),
        linear.weight_scale,
        linear.bias_table[rows],
        linear.branch_weight,
        linear.branch_scale,
    )
    again = measured_errors(typed, [rounded], Sample.of(statistics, held_out=True))
    for name, by_type in report["error"].items():
        assert set(by_type) == {"t0", "t1"}
        assert again[name] == pytest.approx(by_type, rel=1e-5)


def test_a_plan_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"linear0: QuantConfig.memory_budget=1.0 leaves no room"):
        fit_group(random_statistics(48, 2, 0, plan="branch", memory_budget=1.0))
    with pytest.raises(
        ConfigError, match=r"linear0: QuantConfig.plan='paper' has room for 4 token"
    ):
        fit_group(random_statistics(32, 5, 0, plan="paper"))


# ------------------------------------------------------------------ in a model


@pytest.mark.parametrize(
    ("plan", "bound"),
    [("single", 0.2), ("shift", 0.2), ("duplicate", 0.2), ("branch", 0.2), ("paper", 2.0)],
)
def test_a_calibrated_plan_in_a_model(plan: str, bound: float, tmp_path: Path) -> None:
    """Through save and load: exact without rounding, but for what ``paper`` drops; near with it."""
    model, ids = tiny_model(), masked_ids(8, 32, seed=9)
    config = QuantConfig(
        token_types=TokenTypes.mask_token(MASK), plan=plan, memory_budget=1.5, sample_tokens=64
    )
    batches = [masked_ids(8, 32, seed=seed) for seed in range(4)]
    freeact_fx.calibrate(model, batches, config, progress=False).save(tmp_path)
    checkpoint = freeact_fx.Checkpoint.load(tmp_path)
    assert {t.plan for t in checkpoint.groups.values()} == {plan}
    for group in checkpoint.statistics.values():
        assert all(p["measured"] is not None for p in group["plans"].values())
        assert set(group["error"]) == set(group["predicted"])
    options = {"compiler": "eager", "checkpoint": checkpoint}
    with torch.no_grad():
        want = model(ids)
        exact = torch.compile(model, backend="freeact", options={**options, "quantize": False})(ids)
        torch._dynamo.reset()
        got = torch.compile(model, backend="freeact", options=options)(ids)
    assert relative(exact, want) < (bound if plan == "paper" else 1e-4)
    assert relative(got, want) < bound


# ------------------------------------------------------------------ codes


def textbook_gptq(weight: Tensor, scale: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """As the paper writes it: with the Cholesky factor of the inverse, updating all columns behind."""
    hessian = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, codes = weight.double()[:, order], torch.empty_like(weight, dtype=torch.int8)
    for column in range(work.shape[1]):
        code = (work[:, column] / scale).round().clamp(-7, 7)
        error = (work[:, column] - code * scale) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
        codes[:, order[column]] = code.to(torch.int8)
    return codes


@settings(max_examples=15)
@given(st.sampled_from([2, 63, 64, 65, 130]), st.sampled_from([0.01, 0.3]), SEEDS)
def test_gptq_is_the_textbooks(num_codes: int, damping: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, num_codes, generator=generator)
    tokens = random_tokens(num_codes, generator, 200)
    hessian = tokens.t() @ tokens / 200
    scale = weight.abs().amax(1) * 0.8 / 7
    got, want = (f(weight, scale, hessian, damping) for f in (gptq, textbook_gptq))
    # A value between two codes may fall to either, and then the rest of its row goes another way.
    same = (got == want).all(1)
    assert int(same.sum()) >= 16

    def error(codes: Tensor) -> float:
        off = codes * scale[:, None] - weight
        return float(((off @ hessian) * off).sum())

    assert error(got) == pytest.approx(error(want), rel=0.05)


def test_gptq_beats_rounding_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, tokens = torch.randn(32, 96, generator=generator), random_tokens(96, generator)
    hessian, scale = tokens.t() @ tokens, weight.abs().amax(1) / 7
    nearest = (weight / scale[:, None]).round()

    def error(codes: Tensor) -> float:
        return float((tokens @ (codes * scale[:, None] - weight).t()).square().sum())

    assert error(gptq(weight, scale, hessian, 0.1)) < 0.8 * error(nearest)


def test_gptq_with_channels_that_are_always_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, tokens = (
        torch.randn(8, 48, generator=generator),
        torch.randn(30, 48, generator=generator),
    )
    tokens[:, 5:20] = 0
    scale = weight.abs().amax(1) / 7
    codes = gptq(weight, scale, tokens.t() @ tokens, 0.1)
    assert torch.equal(codes[:, 5:20], (weight / scale[:, None]).round()[:, 5:20].to(torch.int8))


def test_gptq_with_an_indefinite_hessian_rounds_to_nearest() -> None:
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(1) / 7
    hessian = torch.eye(48) - torch.ones(48, 48) / 2
    nearest = (weight / scale[:, None]).round().to(torch.int8)
    assert torch.equal(gptq(weight, scale, hessian, 0.1), nearest)


def gptq_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The Hessian of each slice that GPTQ was given, as they come."""
    seen: list[Tensor] = []

    def watched(weight: Tensor, scale: Tensor, hessian: Tensor, damping: float) -> Tensor:
        assert damping == 0  # it was added before
        seen.append(hessian)
        return gptq(weight, scale, hessian, damping)

    monkeypatch.setattr("freeact_fx.round_group.gptq", watched)
    return seen


@pytest.mark.parametrize("absorbs", [False, True], ids=["apart", "absorbing"])
@pytest.mark.parametrize("label", ["single", "shift", "branch", "own branch", "duplicate", "paper"])
def test_gptq_sees_the_mixture_of_the_types(
    label: str, absorbs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second moments of the tokens as they meet the codes, each type by its share over the root of its outputs' energy;
    a branch that absorbs takes out what it can make up for."""
    generator = torch.Generator().manual_seed(0)
    # Of unlike numbers and loudness, so that every other weighting differs.
    tokens = [a * random_tokens(48, generator, n) for a, n in ((1, 300), (4, 150), (0.2, 600))]
    weights = [torch.randn(n, 48, generator=generator) for n in (24, 16)]
    config = config_of(3, gptq_damping=0.0, refit=False, branch_absorbs=absorbs)
    statistics = statistics_of(config, tokens, weights)
    moments = GroupMoments.of(statistics)
    fitted = fit_transform(label.removeprefix("own "), moments)
    if "branch" in label:
        fitted = with_branch(fitted, moments, 6, own=label == "own branch")
        # Columns that are no eigenvectors: what they leave of a token goes along with what they take.
        parts = [torch.randn(48, fitted.own_rank or 6, generator=generator) for _ in range(3)]
        columns = [torch.linalg.qr(part)[0] for part in parts[: 6 // (fitted.own_rank or 6)]]
        fitted = replace(fitted, lowrank=branch_codes(torch.cat(columns, 1)))
    seen = gptq_calls(monkeypatch)
    round_group(fitted, weight_sides(fitted, statistics), moments, by_gptq=True)
    assert len(seen) == len(fitted.widths) == (3 if label in ("duplicate", "paper") else 1)

    joint: Any = 0  # of z, all slices side by side, and of the branch's coefficients behind it
    for index, x in enumerate(tokens):
        energy = sum(float((x @ w.t()).square().sum(1).mean()) for w in weights)
        weight = len(x) / 1050 / energy**0.5
        assert moments.type_weights[index] == pytest.approx(weight, rel=1e-4)
        operands = (fitted.shift, fitted.channel_scale, fitted.left, fitted.right, fitted.lowrank)
        z, c = transform(
            *(x, torch.full((len(x),), index), *operands),
            *(fitted.widths, fitted.slice_of_type, 0, fitted.own_rank),
        )
        both = (z if c is None else torch.cat([z, c], 1)).double()
        joint = joint + weight * both.t() @ both / len(x)
    wanted, n = joint, fitted.num_codes
    if absorbs and fitted.lowrank is not None:
        cross, inner = joint[:n, n:], joint[n:, n:]
        damping = 1e-3 * inner.diagonal().mean() * torch.eye(6)
        wanted = joint[:n, :n] - cross @ torch.linalg.solve(inner + damping, cross.t())
    start = 0
    for hessian, width in zip(seen, fitted.widths, strict=True):
        own = slice(start, start + width * fitted.right.shape[-1])
        assert relative(hessian.double(), wanted[own, own]) < 1e-3
        start = own.stop


def test_damping_of_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the mean is added to the diagonal, for the refit too; very much of it leaves nothing but rounding."""
    seen, codes = gptq_calls(monkeypatch), {}
    for damping, refit in ((0.0, False), (0.5, False), (1e7, False), (0.0, True), (0.5, True)):
        statistics = random_statistics(48, 2, 0, gptq_damping=damping, refit=refit)
        moments = GroupMoments.of(statistics)
        fitted = fit_transform("shift", moments)
        sides = weight_sides(fitted, statistics)
        linears = round_group(fitted, sides, moments, by_gptq=True)
        codes[damping, refit] = torch.cat([linear.codes for linear in linears])
    nearest = round_group(fitted, sides, moments, by_gptq=False)
    plain, damped = seen[:2]
    added = 0.5 * plain.diagonal().mean() * torch.eye(48)
    assert torch.allclose(damped, plain + added, rtol=1e-5, atol=1e-6 * float(plain.trace()))
    assert torch.equal(codes[1e7, False], torch.cat([linear.codes for linear in nearest]))
    for refit in (False, True):
        assert not torch.equal(codes[0.0, refit], codes[0.5, refit])


def test_bias_correction_takes_a_mean_error_out_of_the_bias() -> None:
    """Type 0 has one long tail, which its clip cuts off: rounding errs to one side. Type 1 has two, and no mean error
    that stands out of the sample's noise."""
    generator = torch.Generator().manual_seed(0)
    skewed = torch.empty(800, 64).exponential_(generator=generator)
    even = torch.randn(800, 64, generator=generator)
    weights = [torch.randn(n, 64, generator=generator) + 0.5 for n in (24, 16)]
    biases = [None, torch.randn(16, generator=generator)]
    statistics = statistics_of(config_of(2), [skewed, even], weights, biases)
    fit, held_out = (Sample.of(statistics, held_out=half) for half in (False, True))
    found = {}
    for corrects in (False, True):
        statistics.config = replace(statistics.config, bias_correction=corrects)
        moments = GroupMoments.of(statistics.without_held_out())
        identity = replace(
            fit_transform("shift", moments),
            left=torch.eye(8),
            right=torch.eye(8)[None],
            channel_scale=None,
            clip=torch.tensor([0.5, 0.8, 0.8]),
        )
        sides = weight_sides(identity, statistics)
        linears = round_group(identity, sides, moments, by_gptq=False)
        found[corrects] = linears, measured_errors(identity, linears, held_out)
    (plain, before), (corrected, after) = found[False], found[True]
    of_fit, of_held_out = (
        [want - got for got, want in zip(s.outputs(identity, plain), s.wanted, strict=True)]
        for s in (fit, held_out)
    )
    for name, one, other, seen, new in zip(
        statistics.names, plain, corrected, of_fit, of_held_out, strict=True
    ):
        assert one.bias_table is not None
        assert other.bias_table is not None
        assert torch.equal(one.codes, other.codes)
        moved = other.bias_table - one.bias_table
        assert relative(moved[0], new[held_out.types == 0].mean(0)) < 0.2
        assert moved[1].norm() < 0.5 * seen[fit.types == 1].mean(0).norm()
        assert not moved[2].any()  # of untyped tokens nothing is known
        assert after[name]["t0"] < 0.8 * before[name]["t0"]
        assert after[name]["t1"] == pytest.approx(before[name]["t1"], rel=0.02)


@settings(max_examples=20)
@given(
    st.integers(0, 3),
    st.integers(1, 40),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from(["auto", "branch", "duplicate", "paper", "single"]),
    SEEDS,
)
def test_tokens_of_any_rank_can_be_fitted(
    rank: int, num_tokens: int, size: float, plan: str, seed: int
) -> None:
    """Few tokens, of few directions or none at all, loud or faint."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(number: int) -> Tensor:
        factor = torch.randn(rank, 48, generator=generator)
        return size * torch.randn(number, rank, generator=generator) @ factor

    config = config_of(2, plan=plan, memory_budget=2.0)
    weights = [torch.randn(16, 48, generator=generator)]
    statistics = statistics_of(config, [tokens(max(num_tokens, 8)), tokens(8)], weights)
    fitted, _, report = fit_group(statistics)
    assert fitted.problem() is None
    errors = report["error"]["linear0"].values()
    assert all(0 <= error < 2 for error in errors)


@pytest.mark.parametrize("label", ["branch", "own branch"])
def test_a_branch_absorbs_rounding(label: str) -> None:
    total = {}
    for absorbs in (False, True):
        fields: dict[str, Any] = {"branch_absorbs": absorbs, "memory_budget": 1.5, "plan": "branch"}
        total[absorbs] = 0.0
        for seed in range(5):
            statistics = random_statistics(96, 2, seed, **fields)
            total[absorbs] += error_of(statistics)
    assert total[True] < total[False], label


@pytest.mark.parametrize(("decay", "of_best", "of_none"), [(0.5, 1.03, 0.99), (1.0, 1.4, 0.6)])
def test_refit_is_nearly_the_least_squares_of_rounded_tokens(
    decay: float, of_best: float, of_none: float
) -> None:
    """Against the normal equations of very many rounded tokens, and the weight as it was, on new tokens."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    spectrum = 1 / (1 + torch.arange(256)) ** decay

    def sample(num_tokens: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(num_tokens, 256, generator=generator) * spectrum @ basis
        codes, scale = quantize_tokens(z, torch.tensor([0.75]), 7)
        return z, codes * scale

    weight = torch.randn(16, 256, generator=generator)
    z, rounded = sample(20000)
    refit, _ = refitted(weight, z.t() @ z / len(z), rounding_noise(256, 7))
    best = torch.linalg.lstsq(rounded, z @ weight.t()).solution.t()
    new, rounded = sample(5000)
    error, error_of_best, error_of_none = (
        float((rounded @ w.t() - new @ weight.t()).square().sum()) for w in (refit, best, weight)
    )
    assert error < of_best * error_of_best
    assert error < of_none * error_of_none
    # Eight bits leave nothing to gain.
    assert refitted(weight, z.t() @ z, rounding_noise(256, 127))[0] is weight


@pytest.mark.parametrize("plan", ["single", "shift"])
def test_refit_helps_on_held_out_tokens(plan: str) -> None:
    total = {
        refit: sum(error_of(random_statistics(96, 2, s, plan=plan, refit=refit)) for s in range(5))
        for refit in (False, True)
    }
    assert total[True] < total[False]


def test_types_without_a_sample_take_the_widest_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(300, 64, generator=generator)
    flat = torch.randn(300, 64, generator=generator).tanh()  # has less to cut
    weights = [torch.randn(16, 64, generator=generator)]
    statistics = statistics_of(config_of(3, plan="single"), [gaussian, flat], weights)
    fitted = fit_transform("single", GroupMoments.of(statistics))
    identity = replace(fitted, left=torch.eye(8), right=torch.eye(8)[None])
    clip = search_clip(identity, statistics).clip.tolist()
    assert clip[0] < clip[1] < 1
    assert clip[2:] == [clip[1]] * 2


def test_sides_are_what_a_packed_linear_holds() -> None:
    statistics = random_statistics(48, 2, 0)
    moments = GroupMoments.of(statistics)
    fitted = with_branch(fit_transform("shift", moments), moments, 4, own=False)
    for weight, bias, side in zip(
        statistics.weights, statistics.biases, weight_sides(fitted, statistics), strict=True
    ):
        packed = pack_linear(fitted, weight, bias, EXACT)
        assert torch.equal(packed.weight, side.rest)
