"""What Inductor makes of the freeact ops.

* The transforms decompose into the reference's own lines. On the CPU Inductor fuses shift, scale, rounding and the norm
  before them into C++ loops around two small matrix products.
* ``int_mm`` stays opaque: oneDNN's u8 x s8 linear on the CPU. Scales, bias table, residual and SiLU * mul after it are
  pointwise and fuse into one loop.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from freeact_fx import reference
from freeact_fx.compat import register_decomposition


@functools.cache
def register() -> None:
    """Teach Inductor our ops; once per process.

    Through Inductor's global table: a ``decompositions=`` argument to ``compile_fx`` would bypass the graph cache.
    """
    register_decomposition(torch.ops.freeact.transform_quantize.default, _transform_quantize)
    register_decomposition(
        torch.ops.freeact.transform_quantize_branch.default, reference.transform_quantize
    )


def _transform_quantize(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    operands, (widths, slice_of_type, default_type, qmax) = args[:-4], args[-4:]
    with_no_branch: Any = (*operands, None, widths, slice_of_type, default_type, 0, qmax)
    codes, scale, _ = reference.transform_quantize(*with_no_branch)
    return codes, scale
