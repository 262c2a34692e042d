"""Which Linears may be quantised: one predicate for the graph passes and for ``convert``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import QuantConfig
from .reasons import Reason, reason
from .transform import illegal_features_reason

# The fallback where the graph does not show the merge: path components that name an encoder of something else.
_TOWER_NAME = re.compile(
    r"(^|[._])(vision|visual|image|audio|video|pixel|patch|multi_modal|connector)"
)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a pattern matches the whole name or, for a pattern without a dot, its last component."""
    last = name.rpartition(".")[2]
    return any(
        fnmatch.fnmatch(name, p) or ("." not in p and fnmatch.fnmatch(last, p)) for p in patterns
    )


def is_tower_name(name: str) -> bool:
    """True if a path says that the Linear belongs to a vision, audio or similar encoder."""
    return _TOWER_NAME.search(name) is not None


def ineligible_reason(
    name: str, num_features: int, weight: Tensor | None, tied: bool, config: QuantConfig
) -> Reason | None:
    """Why a Linear stays as it is, or None.

    weight  the dense weight, or None where a converted Linear holds packed codes already
    tied    the weight is an embedding's too
    """
    included = matches(name, config.include)
    if not included and matches(name, config.skip):
        return reason("skipped", skip=list(config.skip))
    if weight is not None:
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return reason("dtype", dtype=weight.dtype)
        if type(weight) not in (Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor):
            return reason("not_plain", kind=type(weight).__name__)
        if weight.layout != torch.strided:
            return reason("not_plain", kind=str(weight.layout))
    illegal = illegal_features_reason(num_features)
    if illegal is None and tied and not included:
        return reason("tied")
    return illegal
