"""Codes with nothing special about them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_codes(*shape: int, largest: int, device: torch.device | None = None) -> Tensor:
    """int8 in [-largest, largest]."""
    return torch.randint(-largest, largest + 1, shape, device=device).to(torch.int8)
