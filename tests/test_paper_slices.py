"""What half of the coordinates lose, as benchmarks/paper_slices.py says."""

from __future__ import annotations

import json
from pathlib import Path

import paper_slices
import pytest
import torch
from paper_slices import KEEPS, lost
from torch import Tensor, nn

MASK = paper_slices.MASK_TOKEN


class Model(nn.Module):
    """Linears of two kinds, of 32 features."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.ModuleDict(
            {name: nn.Linear(32, 32) for name in ("gate_proj", "up_proj", "down_proj")}
        )
        self.embed, self.layers = nn.Embedding(100, 32), nn.ModuleList([layer])

    def forward(self, input_ids: Tensor) -> Tensor:
        x, layer = self.embed(input_ids), self.layers[0]
        return layer["down_proj"](layer["gate_proj"](x) * layer["up_proj"](x))


class Named(nn.Module):
    """A module of one input, which is called ``input_ids``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.module(input_ids)


def energy_in(directions: Tensor) -> Tensor:
    return directions @ directions.t() + 1e-9 * torch.eye(len(directions))


def test_only_what_can_turn_the_energy_into_half_of_the_coordinates_keeps_it() -> None:
    shape, gram = (4, 4), torch.eye(16)
    generator = torch.Generator().manual_seed(0)
    full = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    left = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    cases = {
        # Every other channel: half of each row of the left factor.
        "permutation": torch.eye(16)[:, ::2],
        "left factor": torch.kron(left.contiguous(), torch.eye(4))[:, :8],
        "full rotation": full[:, :8],
    }
    can = {
        "permutation": {"permutation", "full rotation"},
        "left factor": {"left factor", "full rotation"},
        "full rotation": {"full rotation"},
    }
    for case, directions in cases.items():
        moment = energy_in(directions)
        losses = lost(moment, moment, gram, shape)
        assert {name for name, loss in losses.items() if loss < 1e-6} == can[case]
        assert all(loss > 0.1 for name, loss in losses.items() if name not in can[case])


def test_it_is_lost_of_the_held_out_tokens() -> None:
    strong, weak = torch.eye(16)[:, :8], torch.eye(16)[:, 8:]
    losses = lost(energy_in(strong), energy_in(weak), torch.eye(16), (4, 4))
    assert all(loss == pytest.approx(1.0) for loss in losses.values())


def test_moments_are_means_by_type_without_first_tokens() -> None:
    linear = nn.Linear(2, 2)
    model = nn.Sequential(nn.Embedding(100, 2), linear)
    ids = torch.tensor([[7, MASK, 8, MASK]])
    rows = model[0].weight.data
    rows[7], rows[8], rows[MASK] = torch.tensor([[100.0, 0.0], [1.0, 2.0], [3.0, 0.0]])
    moments = paper_slices.second_moments(Named(model), {"linear": linear}, [{"input_ids": ids}])
    assert moments["linear"]["unmasked"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert moments["linear"]["masked"].tolist() == [[9.0, 0.0], [0.0, 0.0]]


def test_run_records_every_kind_and_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (4, 1, 64))
    batches = [
        {"input_ids": window.where(torch.rand(1, 64) < 0.5, torch.tensor(MASK))} for window in ids
    ]
    monkeypatch.setattr(
        paper_slices, "load_masked_diffusion", lambda cache: Model().eval().requires_grad_(False)
    )
    monkeypatch.setattr(paper_slices, "dllm_calibration_batches", lambda windows: batches)
    out = tmp_path / "paper_slices.jsonl"
    paper_slices.main(["--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["linears"], r["token_type"]) for r in records] == [
        (kind, name) for kind in ("gate, up", "down") for name in ("unmasked", "masked")
    ]
    for record in records:
        assert tuple(record["lost"]) == KEEPS
        assert all(0 <= loss < 1 for loss in record["lost"].values())
        assert record["lost"]["full rotation"] == min(record["lost"].values())
