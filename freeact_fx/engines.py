"""Which engine multiplies the codes of a quantised Linear: the one place that says so."""

from __future__ import annotations

import torch

from .config import QuantConfig


def engine_of(device: torch.device, config: QuantConfig) -> tuple[str, str]:
    """The engine of a device, and the kernel that ``int_mm`` is there; what ``ops`` and ``codegen`` do."""
    if not config.quantize:
        return "float32", "aten.linear"
    if device.type == "meta":
        return "depends on the device", "freeact.int_mm"
    if config.activation_bits == "e4m3":
        if _has_kernels(device, fp8=True):
            return "fp8 tensor cores", "freeact.engine_int_mm"
        return "float32", "aten.mm"
    if _has_kernels(device):
        return "int8 tensor cores", "freeact.engine_int_mm"
    if device.type != "cpu":
        return "float64", "reference.int_mm"
    if not torch.backends.mkldnn.is_available():
        return "float64", "reference.int_mm"
    return "onednn u8s8", "onednn.qlinear_pointwise"


def _has_kernels(device: torch.device, *, fp8: bool = False) -> bool:
    from .codegen.engine_ops import has_fp8, has_kernels

    return has_kernels(device) and (has_fp8(device) or not fp8)
