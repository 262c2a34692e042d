"""Errors by kind of Linear and token type, as benchmarks/plan_errors.py shows them of each plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plan_errors
import pytest
import torch
from plan_errors import error_rows, mean_errors, measured_plans, plan_rows
from torch import Tensor, nn

from freeact_fx import QuantConfig, TokenTypes

MASK = 15


class Model(nn.Module):
    """One Linear of each of two kinds, named as the real model's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(MASK + 1, 32)
        self.o_proj = nn.Linear(32, 32)
        self.down_proj = nn.Linear(32, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.o_proj(self.embed(input_ids))))


def test_errors_are_means_over_layers_and_linears_of_a_kind() -> None:
    first = {"layers.0.q_proj": {"masked": 1.0}, "layers.0.k_proj": {"masked": 3.0}}
    second = {"layers.1.q_proj": {"masked": 5.0, "first": 7.0}}
    other = {"layers.1.down_proj": {"masked": 9.0}, "head": {"masked": 11.0}}
    groups = {str(i): {"error": error} for i, error in enumerate((first, second, other))}
    assert mean_errors(groups) == {
        "q, k, v": {"masked": 3.0, "first": 7.0},
        "down": {"masked": 9.0},
    }


def test_a_row_for_each_kind_and_type() -> None:
    errors = {
        "single": {"o": {"masked": 0.5, "first": 0.25}},
        "shift": {"o": {"masked": 0.4, "first": 0.2}},
    }
    assert error_rows(errors) == [
        ["Linears", "token type", "single", "shift"],
        ["o", "masked", "0.5000", "0.4000"],
        ["o", "first", "0.2500", "0.2000"],
    ]


def test_plans_from_the_worst_to_the_best() -> None:
    def group(name: str, **measured: float) -> dict[str, Any]:
        plans = {label: {"measured": error} for label, error in measured.items()}
        return {"error": {f"layers.{name}": {}}, "plans": plans}

    of_kinds = measured_plans(
        {
            "a": group("0.o_proj", single=3.0, shift=4.0),
            "b": group("1.o_proj", single=5.0, shift=2.0, branch=9.0),
            "c": group("1.down_proj", single=1.0, branch=0.5),
        }
    )
    assert list(of_kinds["o"]) == ["single", "shift"]
    assert plan_rows(of_kinds) == [
        ["Linears", "single", "shift"],
        ["o", "4.0000 (1)", "3.0000 (1)"],
        ["down", "1.0000 (0)", ""],
    ]


def test_run_records_every_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, MASK + 1, (4, 32))}]
    config = QuantConfig(token_types=TokenTypes.mask_token(MASK), sink=None, memory_budget=1.5)
    monkeypatch.setattr(plan_errors, "DLLM_CONFIG", config)
    monkeypatch.setattr(plan_errors, "load_masked_diffusion", lambda cache: Model().eval())
    monkeypatch.setattr(plan_errors, "dllm_calibration_batches", lambda windows: batches)
    out = tmp_path / "plan_errors.jsonl"
    plan_errors.main(["--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["plan"] for record in records] == ["single", "shift", "branch", "auto"]
    for record in records:
        assert record["num_groups"] == 2
        assert record["errors"].keys() == {"o", "down"}
        assert all(
            by_type.keys() == {"unmasked", "masked"} for by_type in record["errors"].values()
        )
    for plans in records[-1]["plans"].values():
        errors = [plan["error"] for plan in plans.values()]
        assert errors == sorted(errors, reverse=True)
        assert {"single", "branch", "branch, types alike", "paper"} <= plans.keys()
        assert sum(plan["best_in"] for plan in plans.values()) == 1  # one group of each kind
    shown = capsys.readouterr().out.splitlines()
    assert shown[4].split()[-3:] == ["single", "shift", "branch"]
