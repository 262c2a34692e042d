"""Timing: every variant once a round, medians and quartiles; each kind of group of a report once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_model import GROUPS, LINEARS, MASK, masked_ids, tiny_model
from torch import nn

import freeact_fx
from freeact_fx import ConfigError, Report, TokenTypes, compat, timing


def report_of(plan: str = "single", **options: Any) -> Report:
    options = {"token_types": TokenTypes.mask_token(MASK), "plan": plan, **options}
    return freeact_fx.explain(tiny_model(), masked_ids(), options=options)


Call = Callable[..., Any]


def run_instead_of_compiling(
    monkeypatch: pytest.MonkeyPatch, changed: Callable[[nn.Module], Call]
) -> None:
    """What is timed runs as it is, or changed; compiling is for other tests. The trace of a report stays."""
    original = compat.traced_apart

    @contextlib.contextmanager
    def instead(model: nn.Module, backend: Any) -> Iterator[Call]:
        if isinstance(backend, str):
            yield changed(model)
        else:
            with original(model, backend) as traced:
                yield traced

    monkeypatch.setattr(compat, "traced_apart", instead)


@pytest.fixture
def in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead_of_compiling(monkeypatch, lambda model: model)


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each call moves by its own amount, and the first rounds do not count."""
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def variant(name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            calls.append(name)
            clock[0] += left.pop(0)

        return call

    rounds: list[None] = []
    found = timing.time_interleaved(
        {"a": variant("a", 9, 1, 2, 3), "b": variant("b", 9, 4, 4, 4)},
        runs=3,
        warmup=1,
        on_round=lambda: rounds.append(None),
    )
    assert "".join(calls) == "abababab"
    assert len(rounds) == 4
    assert found["a"] == timing.Timing(2000.0, 1000.0, 3000.0, 3)
    assert found["b"].median_ms == found["b"].upper_ms == 4000.0
    assert str(timing.Timing(1.5, 1.25, 2.0, 3)) == "1.500 ms (1.250 to 2.000)"


def test_one_run_has_no_spread() -> None:
    with pytest.raises(ConfigError, match="runs must be at least 2"):
        timing.time_interleaved({"a": lambda: None}, runs=1)


def test_tokens_of_a_call() -> None:
    ids = torch.zeros(2, 7, dtype=torch.long)
    assert timing.num_tokens_of({"pixel_values": torch.zeros(9, 9), "input_ids": ids}) == 14
    assert timing.num_tokens_of((ids,)) == timing.num_tokens_of(ids) == 14
    assert timing.num_tokens_of({"hidden": torch.zeros(3, 4, 5)}) == 12


@pytest.mark.usefixtures("in_eager")
def test_kinds_are_timed_once_and_shared_out() -> None:
    report, seen = report_of(), []
    found = timing.time_groups(report, num_tokens=8, runs=2, on_group=lambda *a: seen.append(a))
    assert seen == [(GROUPS[i][0], i, 4) for i in range(4)]
    assert {t.groups for t in found} == {(GROUPS[i][0], GROUPS[i + 4][0]) for i in range(4)}
    by_name = {name: t for t in found for name in t.groups}
    assert by_name["blocks.1.q"].shapes == ((48, 48),) * 3
    assert by_name["blocks.0.down"].to_dict()["precision"] == "W4A4"

    timing.fill_times(report, found)
    for name in LINEARS:
        row = report[name]
        together = by_name[row.group]
        num_members = len(together.shapes)  # here all of a group are as wide
        assert row.time_ms == pytest.approx(together.quantized.median_ms / num_members)
        assert row.dense_time_ms == pytest.approx(together.dense.median_ms / num_members)
    assert report["lm_head"].time_ms is None


@pytest.mark.usefixtures("in_eager")
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("shift", {}),
        ("duplicate", {"memory_budget": 3.0}),
        ("branch", {"branch_rank": 4}),
        ("single", {"activation_bits": 8, "sink": None}),
    ],
)
def test_every_plan_is_built(
    plan: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def with_operands(*args: Any) -> Any:
        built.append(original(*args))
        return built[-1]

    original = timing._quantized
    monkeypatch.setattr(timing, "_quantized", with_operands)
    report = report_of(plan, **options)
    assert len(timing.time_groups(report, num_tokens=4, runs=2)) == 4
    (group,) = [g for g in report.groups if g.name == "blocks.0.q"]
    linear = built[0].linears[0]
    assert linear.transform.plan == plan
    assert linear.transform.to_group_transform().widths == group.widths
    assert (linear.branch_weight is None) == (plan != "branch")
    assert linear.config.activation_bits == options.get("activation_bits", 4)
    # Operands as the model's own have them.
    operands = [t for n, t in linear.to_packed_linear().tensors().items() if n != "bias_table"]
    model = tiny_model()
    freeact_fx.convert(model, freeact_fx.QuantConfig.from_options(report.config))
    own = model.blocks[0].q.to_packed_linear()
    real = [t for n, t in own.tensors().items() if n != "bias_table"]
    assert [(t.shape, t.dtype) for t in operands] == [(t.shape, t.dtype) for t in real]


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead_of_compiling(monkeypatch, lambda model: lambda x: [1.1 * y for y in model(x)])
    with pytest.raises(RuntimeError, match=r"blocks\.0\.q: compiled code differs .* by 0\.1"):
        timing.time_groups(report_of(), num_tokens=4, runs=2)


def test_nothing_quantised_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to time"):
        timing.time_groups(report_of(skip=("*",)))


@pytest.mark.usefixtures("in_eager")
def test_explain_times() -> None:
    report = freeact_fx.explain(tiny_model(), masked_ids(), timed=True)
    assert all(row.time_ms > 0 and row.dense_time_ms > 0 for row in report.quantized)
