"""Outputs begin as what no kernel writes, so that an element that nobody wrote is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_empty = torch.empty


def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
    """``torch.empty`` full of NaN. Of integers full of the byte that is no code of 4 bits, and NaN as an e4m3."""
    tensor: Tensor = _empty(*args, **kwargs)
    if tensor.device.type != "meta" and tensor.numel() > 0:
        if tensor.dtype.is_floating_point:
            tensor.fill_(torch.nan)
        else:
            tensor.view(-1).view(torch.uint8).fill_(0x7F)
    return tensor
