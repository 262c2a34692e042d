"""Batches of masked sequences: at which ratios, where, and always the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import MASK, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader

import freeact_fx
from freeact_fx import ConfigError, MaskCollator, QuantConfig, TokenTypes

PAD, BEGIN = 0, 1


def sequences(number: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, MASK, (number, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio", [(0.05, 1.0), (0.3, 0.6)], ids=str)
def test_ratios_are_uniform(ratio: tuple[float, float]) -> None:
    """Kolmogorov and Smirnov: 2000 uniform draws stay within 0.0364 of the diagonal in 99 of 100 cases; a ratio is
    rounded to one of 400 positions besides."""
    low, high = ratio
    masked = MaskCollator(MASK, ratio=ratio)(sequences(2000, 401))["input_ids"] == MASK
    drawn = (masked.sum(1) / 400).sort().values
    expected = (torch.arange(2000) + 0.5) / 2000
    assert float(((drawn - low) / (high - low) - expected).abs().max()) < 0.0364 + 1 / 400 / (
        high - low
    )


def test_positions_are_uniform() -> None:
    """Given its ratio, every position is as likely; 5 standard errors."""
    masked = MaskCollator(MASK, ratio=(0.5, 0.5))(sequences(4000, 33))["input_ids"] == MASK
    share = masked[:, 1:].float().mean(0)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / 4000**0.5
    assert not masked[:, 0].any()
    # Neighbours are drawn apart, but for the fixed number: correlation -1/31.
    both = (masked[:, 1] & masked[:, 2]).float().mean()
    assert abs(float(both) - 0.25 * (1 - 1 / 31)) < 5 * (0.19 / 4000) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    keep_first=st.booleans(),
    seed=st.integers(0, 3),
)
def test_only_allowed_positions_are_masked(lengths: list[int], keep_first: bool, seed: int) -> None:
    rows = [sequences(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    for row in rows:
        row[-1] = BEGIN
    collate = MaskCollator(
        MASK, keep_first=keep_first, seed=seed, never_mask=(BEGIN,), pad_token_id=PAD
    )
    batch = collate(rows)
    ids = batch["input_ids"]
    there = batch.get("attention_mask", torch.ones_like(ids)).bool()
    assert there.sum(1).tolist() == lengths
    for row, got in zip(rows, ids, strict=True):
        kept, padding = got[: len(row)], got[len(row) :]
        assert (padding == PAD).all()
        changed = kept != row
        assert (kept[changed] == MASK).all()
        assert kept[-1] == BEGIN
        allowed = len(row) - 1 - (keep_first and len(row) > 1)
        assert int(changed.sum()) >= min(1, allowed)
        assert int(changed.sum()) <= allowed
        if keep_first:
            assert kept[0] == row[0]


def test_every_form_of_a_batch() -> None:
    ids = sequences(3, 20)
    collate = MaskCollator(MASK)
    expected = collate(ids)["input_ids"]
    assert (expected == MASK).any()
    rows: list[Any] = [*ids]
    for form in (rows, [row.tolist() for row in ids], [{"input_ids": row} for row in ids]):
        assert list(collate(form)) == ["input_ids"]
        assert torch.equal(collate(form)["input_ids"], expected)
    # Left padding that the mask shows: the first real token stays, and all the padding.
    attended = torch.ones_like(ids)
    attended[:, :5] = 0
    batch = collate({"input_ids": ids, "attention_mask": attended, "labels": ids})
    assert torch.equal(batch["attention_mask"], attended)
    assert batch["labels"] is ids
    assert torch.equal(batch["input_ids"][:, :6], ids[:, :6])
    assert (batch["input_ids"][:, 6:] == MASK).any(1).all()
    assert not (ids == MASK).any()
    rows = [
        {"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, attended, strict=True)
    ]
    assert torch.equal(collate(rows)["input_ids"], batch["input_ids"])


def test_the_same_batch_is_masked_alike() -> None:
    ids = sequences(4, 30)
    one, other = MaskCollator(MASK, seed=1), MaskCollator(MASK, seed=2)
    first = one(ids)["input_ids"]
    one(sequences(4, 30, seed=9))
    assert torch.equal(one(ids)["input_ids"], first)
    assert not torch.equal(other(ids)["input_ids"], first)
    rows = one(ids[:1].expand(4, -1))["input_ids"]
    assert not torch.equal(rows[0], rows[1]), "sequences of a batch are masked apart"


def test_calibrates_from_a_data_loader() -> None:
    collate = MaskCollator(MASK)
    batches = DataLoader(sequences(8, 16), batch_size=4, collate_fn=collate)
    config = QuantConfig(token_types=TokenTypes.mask_token(MASK), plan="single", gptq=False)
    checkpoint = freeact_fx.calibrate(tiny_model(), batches, config, progress=False)
    masked = sum(int((batch["input_ids"] == MASK).sum()) for batch in batches)
    assert checkpoint.statistics["blocks.0.q"]["tokens"]["masked"] == masked


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"\[B, T\], got torch.int64 \[4\].*ids\[None\]"),
        (torch.zeros(2, 4), "must be a tensor of integers"),
        ({"tokens": torch.zeros(2, 4)}, "got NoneType"),
        ([[1, 2], [1, 2, 3]], r"one length, got \[2, 3\].*pad_token_id"),
        ([], "got a list of shapes"),
    ],
    ids=["one sequence", "floats", "no ids", "lengths", "empty"],
)
def test_what_is_no_batch(examples: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskCollator(MASK)(examples)


@pytest.mark.parametrize("ratio", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)], ids=str)
def test_a_ratio_that_is_none(ratio: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"MaskCollator\.ratio: must be"):
        MaskCollator(MASK, ratio=ratio)
