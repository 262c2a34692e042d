"""A Linear with what comes before it, dense and in W4A4, with operands as a calibration leaves them.

Nothing is calibrated here: factors are random and orthogonal, means random and different for each token type. Times
depend on shapes, dtypes and the mix of types alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import gpu_peers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from freeact_fx import FreeActLinear, QuantConfig, TokenTypes
from freeact_fx.convert import GroupTransformModule
from freeact_fx.transform import GroupTransform, orthogonal_transform, pack_linear

ONE_TYPE = QuantConfig(token_types=TokenTypes.single(), sink=None, plan="shift")
TWO_TYPES = QuantConfig(
    token_types=TokenTypes.explicit("unmasked", "masked"), sink=None, plan="shift"
)
E4M3_ACTIVATIONS = dataclasses.replace(TWO_TYPES, activation_bits="e4m3")
BRANCH = dataclasses.replace(TWO_TYPES, plan="branch", branch_rank=64)
# Half of K for each type. The plan's subspaces are chosen by a calibration; here they are random.
SLICED = dataclasses.replace(TWO_TYPES, plan="paper")
_NO_FINGERPRINT = (0.0, 0.0, 0.0)  # of a dense weight; only checkpoints are compared by it


class NormLinear(nn.Module):
    """RMSNorm and a Linear: q/k/v, gate/up."""

    num_inputs = 1

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.norm = nn.RMSNorm(in_features)
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class GatedLinear(nn.Module):
    """SiLU * mul and a Linear: down."""

    num_inputs = 2

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.linear(F.silu(gate) * up)


class Several(nn.Module):
    """Layers that know nothing of each other, each on inputs of its own."""

    def __init__(self, blocks: Sequence[nn.Module], num_inputs: int):
        super().__init__()
        self.blocks, self.num_inputs = nn.ModuleList(blocks), num_inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        n = self.num_inputs
        return tuple(block(*inputs[i * n : (i + 1) * n]) for i, block in enumerate(self.blocks))


def typed_transform(num_features: int, config: QuantConfig, device: torch.device) -> GroupTransform:
    """A group's transform as calibration leaves it: a scale for each channel, and a mean for each type if it shifts."""
    sliced = config.plan == "paper"
    base = orthogonal_transform(
        num_features, dataclasses.replace(config, plan="shift") if sliced else config
    )
    generator = torch.Generator().manual_seed(num_features)
    shift = None
    if base.shift is not None:
        shift = (torch.randn(base.shift.shape, generator=generator) / 8).bfloat16()
    transform = dataclasses.replace(
        base, shift=shift, channel_scale=torch.rand(num_features, generator=generator) + 0.5
    )
    if sliced:
        half = transform.left.shape[0] // 2
        transform = dataclasses.replace(
            transform,
            plan="paper",
            right=transform.right.repeat(2, 1, 1),
            widths=(half, transform.left.shape[0] - half),
            slice_of_type=(0, 1, 0),
        )
    assert transform.problem() is None, transform.problem()
    return transform.to(device)


def quantized_linear(
    linear: nn.Linear, transform: GroupTransformModule, config: QuantConfig
) -> FreeActLinear:
    """A dense Linear, packed; ``transform`` is shared by the Linears of a group."""
    packed = pack_linear(transform.to_group_transform(), linear.weight, linear.bias, config)
    return FreeActLinear(transform, packed, config, _NO_FINGERPRINT)


def quantized(module: nn.Module, config: QuantConfig) -> nn.Module:
    """A copy of a module with every Linear in W4A4, each a group of its own."""

    def make(linear: nn.Linear) -> FreeActLinear:
        transform = typed_transform(linear.in_features, config, linear.weight.device)
        return quantized_linear(linear, GroupTransformModule(transform), config)

    return gpu_peers.with_linears(module, make).eval()


def linear_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes of everything that converted Linears hold, on whatever device, and of their weights in bf16."""
    linears = [m for m in module.modules() if isinstance(m, FreeActLinear)]
    storages = {
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes()
        for linear in linears
        for buffer in linear.buffers()
    }
    return sum(storages.values()), sum(2 * m.in_features * m.out_features for m in linears)
