"""A converted model in a folder: what a fresh process loads computes the same, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import LINEARS, MASK, TinyModel, masked_ids, tiny_llama, tiny_model
from torch import Tensor, nn

import freeact_fx
from freeact_fx import Checkpoint, CheckpointError, ConfigError, QuantConfig, TokenTypes
from freeact_fx.converted import checkpoint_of

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK), plan="shift")


def answer(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad(), freeact_fx.token_types(CONFIG.token_types.from_ids(ids)):
        found: Any = model(ids)
    return found if isinstance(found, Tensor) else found.logits


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    return freeact_fx.calibrate(tiny_model(), [masked_ids(seed=1)], CONFIG, progress=False)


FRESH = """
import sys, torch, freeact_fx
folder, data = sys.argv[1:]
given = torch.load(data)
model = freeact_fx.load_converted(folder)
with torch.no_grad(), freeact_fx.token_types(given["types"]):
    torch.save(model(given["ids"]).logits, data)
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    """Without the dense model, whose head shares the embedding's weight."""
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    checkpoint = freeact_fx.calibrate(model, [masked_ids(seed=1)], CONFIG, progress=False)
    freeact_fx.convert(model, checkpoint)
    freeact_fx.save_converted(model, tmp_path / "folder")
    ids = masked_ids()
    types = CONFIG.token_types.from_ids(ids)
    torch.save({"ids": ids, "types": types}, tmp_path / "data.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "folder"), str(tmp_path / "data.pt")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "data.pt"), answer(model, ids))

    loaded = freeact_fx.load_converted(tmp_path / "folder")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.training
    stored = loaded.state_dict()
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name


def test_a_folder_is_a_checkpoint_as_well(calibrated: Checkpoint, tmp_path: Path) -> None:
    model = tiny_model()
    freeact_fx.convert(model, calibrated)
    assert checkpoint_of(model) == calibrated
    assert checkpoint_of(model).statistics == calibrated.statistics
    freeact_fx.save_converted(model, tmp_path)
    again = Checkpoint.load(tmp_path)
    assert again == calibrated
    dense = tiny_model()
    assert not set(freeact_fx.convert(dense, again)) & set(LINEARS)
    ids = masked_ids()
    assert torch.equal(answer(dense, ids), answer(model, ids))


def test_data_free_and_shared_transforms(tmp_path: Path) -> None:
    model = tiny_model()
    freeact_fx.convert(model, QuantConfig(token_types=TokenTypes.mask_token(MASK), plan="branch"))
    freeact_fx.save_converted(model, tmp_path)
    with torch.device("meta"):
        bare = TinyModel()
    loaded = freeact_fx.load_converted(tmp_path, bare)
    assert torch.equal(answer(loaded, masked_ids()), answer(model, masked_ids()))


class WithTables(nn.Module):
    """A buffer that no state dict has, and one that every state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 48)
        self.register_buffer("hidden", torch.arange(48.0), persistent=False)
        self.register_buffer("shown", torch.ones(48, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.hidden) + self.shown


def test_buffers_come_back_persistent_or_not(tmp_path: Path) -> None:
    model = WithTables().eval()
    model.hidden.mul_(0.5)
    freeact_fx.convert(model, QuantConfig(token_types=TokenTypes.single(), sink=None))
    freeact_fx.save_converted(model, tmp_path)
    with torch.device("meta"):
        bare = WithTables()
    loaded = freeact_fx.load_converted(tmp_path, bare)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


# ------------------------------------------------------------------ what is refused


def saved(folder: Path) -> nn.Module:
    model = tiny_model()
    freeact_fx.convert(model, QuantConfig(token_types=TokenTypes.single(), sink=None))
    freeact_fx.save_converted(model, folder)
    return tiny_model()


def test_damage_is_named(tmp_path: Path) -> None:
    bare = saved(tmp_path)
    file = tmp_path / "dense.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"dense\.safetensors: its SHA-256 is not the one"):
        freeact_fx.load_converted(tmp_path, bare)
    file.unlink()
    with pytest.raises(CheckpointError, match="Write it with"):
        freeact_fx.load_converted(tmp_path, bare)


def test_another_model_is_refused(tmp_path: Path) -> None:
    bare = saved(tmp_path)
    bare.extra = nn.Embedding(3, 3)
    with pytest.raises(CheckpointError, match=r"1 are missing \['extra.weight'\], 0 have no place"):
        freeact_fx.load_converted(tmp_path, bare)
    del bare.extra
    bare = tiny_model()
    bare.norm = nn.RMSNorm(12)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[48\], the model's has"):
        freeact_fx.load_converted(tmp_path, bare)


def test_tensors_that_are_no_parameter_nor_buffer_are_refused(tmp_path: Path) -> None:
    """They would stay on the meta device."""
    saved(tmp_path)
    with torch.device("meta"):
        bare = TinyModel()
        bare.blocks[0].plain = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.plain: a plain tensor"):
        freeact_fx.load_converted(tmp_path, bare)


def test_a_model_that_transformers_does_not_know_is_handed_in(tmp_path: Path) -> None:
    saved(tmp_path)
    assert "architectures" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"load_converted\(folder, model\)"):
        freeact_fx.load_converted(tmp_path)


def test_only_converted_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has no converted Linear"):
        freeact_fx.save_converted(tiny_model(), tmp_path)
    parts = [nn.Sequential(nn.Linear(48, 48)).eval() for _ in range(2)]
    for seed, part in enumerate(parts):
        freeact_fx.convert(part, QuantConfig(seed=seed))
    mixed = nn.Sequential(*parts)
    with pytest.raises(ConfigError, match="2 different configurations"):
        freeact_fx.save_converted(mixed, tmp_path)
