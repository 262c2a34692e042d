"""The baselines of the accuracy benchmark: faithful transforms, and checkpoints that run like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import pytest
import torch
from accuracy_methods import METHODS as METHOD_ROWS
from decoder_layers import decoder_blocks, rebatched
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
from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.refine import optimizer_with_schedule

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK))
BATCHES = [{"input_ids": masked_ids(2, 16, seed=seed)} for seed in range(1, 9)]
METHODS: dict[str, Callable[..., Checkpoint]] = {
    "rtn": baselines.rtn,
    "hadamard": baselines.smooth_hadamard,
    "closed": baselines.closed_single,
    "flatquant": partial(baselines.flatquant_like, epochs=2),
}
OWN = ["rtn", "hadamard", "flatquant"]  # not calibrate's


def model_with_outliers() -> TinyModel:
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attention_norm.weight[[3, 17, 31]] *= 10
            block.mlp_norm.weight[[5, 29]] *= 10
            block.down.weight *= 2 ** torch.randn(96)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def error(model: nn.Module, checkpoint: Checkpoint, *, compiled: bool = False) -> float:
    """Of the converted model's logits, relative, on ids that calibration did not see."""
    ids = masked_ids(8, 16, seed=99)
    converted = copy.deepcopy(model)
    freeact_fx.convert(converted, checkpoint)
    if compiled:
        run = torch.compile(converted, backend="freeact", options={"compiler": "eager"})
    return relative(logits(run if compiled else converted, ids), logits(model, ids))


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    model = model_with_outliers()
    methods = METHODS | {"flatquant": partial(baselines.flatquant_like, epochs=60)}
    return {
        name: error(model, method(model, BATCHES, CONFIG, progress=False))
        for name, method in methods.items()
    }


def test_each_improves_on_rounding_to_nearest(errors: dict[str, float]) -> None:
    assert max(errors[name] for name in ("hadamard", "closed", "flatquant")) < 0.6 * errors["rtn"]


def test_learned_transform_is_better_than_where_it_started(errors: dict[str, float]) -> None:
    model = model_with_outliers()
    untrained = baselines.flatquant_like(model, BATCHES, CONFIG, epochs=0, progress=False)
    assert errors["flatquant"] < 0.9 * error(model, untrained)
    assert errors["flatquant"] < 1.05 * errors["closed"]


def test_flatquant_like_is_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is said: 15 epochs at batch 4 and 5e-3, from orthogonal factors and SmoothQuant's scale at 0.3,
    learned clips, weights to nearest."""
    schedules, started = [], []

    def watched(transforms: Any, num_steps: int, learning_rate: float) -> Any:
        schedules.append((num_steps, learning_rate))
        started.extend(module.fitted for module in transforms)
        return optimizer_with_schedule(transforms, num_steps, learning_rate)

    smooth_scale, alphas = baselines._smooth_scale, []

    def scale(group: Any, alpha: float) -> Tensor:
        alphas.append(alpha)
        return smooth_scale(group, alpha)

    monkeypatch.setattr(baselines, "optimizer_with_schedule", watched)
    monkeypatch.setattr(baselines, "_smooth_scale", scale)
    checkpoint = baselines.flatquant_like(tiny_model(), BATCHES[:4], CONFIG, progress=False)
    # Two decoder layers; four batches of two rows are two of four.
    assert schedules == [(15 * 2, 5e-3)] * 2
    assert set(alphas) == {0.3}
    for fitted in started:
        for factor in (fitted.left, fitted.right[0]):
            assert torch.allclose(factor @ factor.t(), torch.eye(len(factor)), atol=1e-5)
    config = checkpoint.config
    assert (config.gptq, config.clip_search, config.refine_steps) == (False, False, 0)
    assert METHOD_ROWS["flatquant-like"].calibrate.keywords == {}


def test_flatquant_like_learns_from_the_first_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], int]] = []

    def watched(block: Any, transforms: Any, epochs: int, learning_rate: float) -> float:
        seen.append(([len(x) for x in block.inputs], epochs))
        return 0.0

    monkeypatch.setattr(baselines, "_train", watched)
    baselines.flatquant_like(
        tiny_model(), BATCHES[:4], CONFIG, num_windows=3, batch_size=1, epochs=2, progress=False
    )
    assert seen == [([1, 1, 1], 2)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_has_the_groups_of_calibrate_and_goes_through_disk(
    method: str, tmp_path: Path
) -> None:
    model = tiny_model()
    checkpoint = METHODS[method](model, BATCHES[:2], CONFIG, progress=False)
    assert list(checkpoint.groups) == [group[0] for group in GROUPS]
    assert {n: e.group for n, e in checkpoint.linears.items()} == {
        name: group[0] for group in GROUPS for name in group
    }
    assert checkpoint.config.num_types == 1
    assert {t.plan for t in checkpoint.groups.values()} == {"single"}
    checkpoint.save(tmp_path)
    loaded = Checkpoint.load(tmp_path)
    assert loaded == checkpoint
    assert error(model, loaded, compiled=True) < 0.5


@pytest.mark.parametrize("method", OWN)
def test_hugging_face_model_is_left_as_it_was(method: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    checkpoint = METHODS[method](model, BATCHES[:2], CONFIG, progress=False)
    assert error(model, checkpoint) < 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("switch", ["gptq", "clip_search"])
def test_our_gptq_and_clip_search(method: str, switch: str) -> None:
    model = tiny_model()
    run = partial(METHODS[method], model, BATCHES, CONFIG, progress=False)
    on, off = (run(**{switch: value}) for value in (True, False))
    assert getattr(on.config, switch)
    assert not getattr(off.config, switch)
    for name in LINEARS:
        assert not torch.equal(on.linears[name].packed.weight, off.linears[name].packed.weight)
    # Learned clips are good ones already.
    assert error(model, on) < error(model, off) * (1.1 if method == "flatquant" else 1)


def test_types_and_sink_of_the_configuration_do_not_count() -> None:
    model = tiny_model()
    one_type = QuantConfig(token_types=TokenTypes.single(), sink=None)
    one, other = (
        baselines.smooth_hadamard(model, BATCHES, config, progress=False)
        for config in (CONFIG, one_type)
    )
    assert one == other


@pytest.mark.parametrize("method", ["hadamard", "flatquant"])
@pytest.mark.parametrize("bits", [8, "e4m3"])
def test_other_formats(method: str, bits: Any) -> None:
    model = tiny_model()
    wide, narrow = (
        error(model, METHODS[method](model, BATCHES, config, progress=False))
        for config in (QuantConfig(activation_bits=bits), CONFIG)
    )
    assert wide < narrow


# ------------------------------------------------------------------ Hadamard


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 32, 36, 48, 64, 112, 148])
def test_hadamard(size: int) -> None:
    matrix = baselines.hadamard(size)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size))


@pytest.mark.parametrize("size", [3, 6, 86, 172])
def test_sizes_without_a_hadamard_matrix_get_an_orthogonal_one(size: int) -> None:
    assert baselines.hadamard(size) is None
    matrix = baselines.random_hadamard(size, torch.Generator())
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size), atol=1e-5)


def test_random_signs() -> None:
    generator = torch.Generator()
    one, other = (baselines.random_hadamard(24, generator) for _ in range(2))
    assert torch.allclose(one @ one.t(), torch.eye(24), atol=1e-5)
    assert torch.equal(one.abs(), other.abs())
    assert not torch.equal(one, other)


# ------------------------------------------------------------------ decoder layers


@pytest.mark.parametrize("make", [tiny_model, tiny_llama])
def test_layers_one_by_one_are_the_model(make: Callable[[], nn.Module]) -> None:
    model = make()
    seen: list[Tensor] = []
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for layer in layers:
        layer.register_forward_hook(
            lambda *args: seen.append(args[-1][0] if isinstance(args[-1], tuple) else args[-1])
        )
    with torch.no_grad():
        for batch in BATCHES[:2]:
            model(**batch)
    wanted = [seen[:2], seen[2:]]  # by batch
    for layer in layers:
        layer._forward_hooks.clear()
    blocks = list(decoder_blocks(model, BATCHES[:2], CONFIG, "", progress=False))
    assert len(blocks) == 2
    for index, block in enumerate(blocks):
        assert [len(group.names) for group in block.groups] == [3, 1, 2, 1]
        for batch in range(2):
            assert torch.allclose(block.outputs[batch], wanted[batch][index], atol=1e-5)
            assert torch.equal(block.run(batch), block.outputs[batch])


def test_layers_that_do_not_follow_one_another() -> None:
    class Skipping(TinyModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            first, second = self.blocks
            return self.lm_head(self.norm(second(first(x) + x)))

    with pytest.raises(RuntimeError, match=r"blocks: the input of layer 1 is not the output"):
        baselines.rtn(Skipping().eval(), BATCHES, CONFIG, progress=False)


def test_no_layers() -> None:
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of decoder layers"):
        baselines.rtn(nn.Linear(48, 48), BATCHES, CONFIG, progress=False)


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="no batch reached the decoder layers"):
        baselines.rtn(tiny_model(), [], CONFIG, progress=False)


def test_rebatched() -> None:
    ids = [
        torch.full((rows, length), i) for i, (rows, length) in enumerate([(1, 8), (3, 9), (4, 8)])
    ]
    batches = rebatched([{"input_ids": x} for x in ids], 2)
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [
        [0, 2],
        [2, 2],
        [2],
        [1, 1],
        [1],
    ]
    assert [batch["input_ids"].shape[1] for batch in batches] == [8, 8, 8, 9, 9]
