"""Outputs begin as what no kernel writes, so that an element that nobody wrote is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_empty = torch.empty


def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
    """``torch.empty`` full of NaN, or of -1 where there is none."""
    tensor: Tensor = _empty(*args, **kwargs)
    if tensor.device.type != "meta" and tensor.numel() > 0:
        tensor.view(torch.uint8).fill_(0xFF)
    return tensor
