"""Gradient energies by token type, as the accuracy benchmark's row "sensitivity" uses them."""

from __future__ import annotations

import torch
from sensitivity import gradient_energies
from tiny_model import LINEARS, MASK, tiny_model

from freeact_fx import QuantConfig, TokenTypes

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK))  # unmasked, masked, first


def test_only_tokens_that_predict_matter_in_the_end() -> None:
    """Unmasked tokens behind the masked ones predict none of them: what attends to them is all that they are for."""
    torch.manual_seed(0)
    ids = torch.randint(1, MASK, (2, 12))
    ids[:, 1:6] = MASK
    model = tiny_model()
    energies = gradient_energies(model, [{"input_ids": ids}], CONFIG, MASK)
    assert set(LINEARS) <= set(energies)
    unmasked, masked, first = energies["blocks.1.down"].tolist()
    assert unmasked == 0
    assert min(masked, first) > 0
    assert (energies["blocks.0.down"] > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_energies_are_means_over_tokens() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, MASK, (2, 12))
    ids[:, 1:6] = MASK
    rows = [{"input_ids": row} for row in ids.split(1)]
    together = gradient_energies(tiny_model(), rows, CONFIG, MASK)
    # Other labels are drawn for the second row when it comes first, so only the first is alike.
    alone = gradient_energies(tiny_model(), rows[:1], CONFIG, MASK)
    rest = 2 * together["blocks.1.o"] - alone["blocks.1.o"]
    assert (rest[1:] > 0).all()
    assert rest[0] == 0
