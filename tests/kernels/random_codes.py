"""Codes with nothing special about them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_codes(*shape: int, largest: int, device: torch.device | None = None) -> Tensor:
    """int8 in [-largest, largest]."""
    return torch.randint(-largest, largest + 1, shape, device=device).to(torch.int8)


def codes_of_slices(
    num_tokens: int, sizes: list[int], order: str, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor, list[int]]:
    """Codes with zeros outside of a token's slice, types, slices of the tokens, and of the types; the last type is the
    default.

    order  of the types: "sorted", "mixed", "one type", or "untyped": None
    """
    num_slices = len(sizes)
    slice_of_type = [*range(num_slices), num_slices - 1, 0, min(1, num_slices - 1)]
    types = torch.randint(-1, len(slice_of_type), (num_tokens,))
    types = {"sorted": types.sort()[0], "one type": types * 0 + 1}.get(order, types)
    chosen = torch.tensor(slice_of_type)[types if order != "untyped" else types * 0 - 1]
    in_slice = torch.arange(num_slices).repeat_interleave(torch.tensor(sizes))
    codes = random_codes(num_tokens, sum(sizes), largest=7) * (in_slice == chosen[:, None])
    given = None if order == "untyped" else types.to(device)
    return codes, given, chosen.to(device), slice_of_type
