"""What Inductor makes of the freeact ops.

* The transforms decompose into the reference's own lines. On the CPU Inductor fuses shift, scale, rounding and the norm
  before them into C++ loops around two small matrix products. On the GPU a transform is a kernel of ours; with a branch
  it is two, on Hopper alone.
* The branch's product becomes an ordinary matrix product, in bf16 where the CPU has instructions for it. On Hopper it
  stays whole, for ``fuse_linear`` to put into its Linear.
* ``int_mm`` stays opaque on the CPU: oneDNN's u8 x s8 linear. Scales, bias table, residual and SiLU * mul after it are
  pointwise and fuse into one loop. On the GPU it is a Triton template, and they fuse into its kernel;
  for e4m3 codes, too, where the chip has fp8 tensor cores.

The GPU has its own ops, in ``engine_ops``; ``engine_graph`` swaps them in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from freeact_fx import reference
from freeact_fx.compat import register_decomposition

from .engine_ops import has_kernels, is_hopper, makes_codes, takes_branch
from .tiles import fits_branch


@functools.cache
def register() -> None:
    """Teach Inductor our ops; once per process.

    Through Inductor's global table: a ``decompositions=`` argument to ``compile_fx`` would bypass the graph cache.
    """
    register_decomposition(torch.ops.freeact.transform_quantize.default, _transform_quantize)
    register_decomposition(
        torch.ops.freeact.transform_quantize_branch.default, _transform_quantize_branch
    )
    register_decomposition(torch.ops.freeact.branch_product.default, _branch_product)


def prepare(devices: Iterable[torch.device]) -> None:
    """Have there what the kernels need on the devices of a graph, before it is compiled and before any CUDA graph is
    captured. Why not on all devices there are: memory on one that nobody uses would open a context there."""
    for device in devices:
        if has_kernels(device):
            from .templates import int_mm  # noqa: F401  (registers its lowering)
        if is_hopper(device):
            from .kernels.stream_order import make_counters

            make_counters(device)


def _transform_quantize(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    operands, (widths, slice_of_type, default_type, qmax) = args[:-4], args[-4:]
    device = operands[0].device
    if has_kernels(device) and makes_codes(device, qmax):
        return NotImplemented
    with_no_branch: Any = (*operands, None, widths, slice_of_type, default_type, 0, qmax)
    codes, scale, _ = reference.transform_quantize(*with_no_branch)
    return codes, scale


def _transform_quantize_branch(*args: Any) -> Any:
    *_, left, right, _, lowrank = args[:8]
    if takes_branch(left, right, lowrank, args[8], args[-1]):
        return NotImplemented
    return reference.transform_quantize(*args)


def _branch_product(
    coefficients: torch.Tensor, branch_weight: torch.Tensor, branch_scale: torch.Tensor
) -> torch.Tensor:
    rank, num_outputs = branch_weight.shape
    if is_hopper(branch_weight.device) and fits_branch(rank, num_outputs):
        operands = (coefficients, branch_weight, branch_scale)
        product: torch.Tensor = torch.ops.freeact.engine_branch_product.default(*operands)
        return product
    on_cpu = branch_weight.device.type == "cpu"
    if branch_weight.dtype != torch.int8 or not (on_cpu and _has_bf16_instructions()):
        return reference.branch_product(coefficients, branch_weight, branch_scale)
    # Rounding the product to bf16 adds 0.2 % of the branch to the 0.8 % of its codes. M=512, R=48, N=3072 on one
    # thread of an AMD EPYC: 0.4 ms, in fp32 2.0 ms.
    scaled = (coefficients * branch_scale).to(torch.bfloat16)
    return (scaled @ branch_weight.to(torch.bfloat16)).float()


def _has_bf16_instructions() -> bool:
    """Without them bf16 products are slower than fp32, on AVX2 by far."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
