"""Put packed 4-bit weights into a model, in place: dense weights out, layer by layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, fingerprint
from .config import QuantConfig
from .eligibility import ineligible_reason, is_tower_name, matches
from .errors import CheckpointError, ConfigError, UnsupportedLinear
from .reasons import Reason, reason
from .token_types import check_type_range, explicit_types
from .transform import (
    GroupTransform,
    PackedLinear,
    orthogonal_transform,
    pack_linear,
    treats_types_alike,
)


class _FixedDtype(nn.Module):
    """Buffers that follow the model's device but keep their dtype: codes, scales and transforms are not activations."""

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class GroupTransformModule(_FixedDtype):
    """A group's transform as buffers; shared by the group's Linears, so the state dict names it under each of them.

    ``statistics`` is what calibration measured of the group, as in ``Checkpoint.statistics``.
    """

    def __init__(
        self, transform: GroupTransform, statistics: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.statistics = dict(statistics or {})
        for name in ("shift", "channel_scale", "left", "right", "clip", "lowrank"):
            self.register_buffer(name, getattr(transform, name))
        self.plan = transform.plan
        self.num_features = transform.num_features
        # As text: where a module has a list, or a property is read, Dynamo goes through all of its guards at each call.
        self.widths_text = _as_text(transform.widths)
        self.slice_of_type_text = _as_text(transform.slice_of_type)
        self.own_rank = transform.own_rank

    @property
    def widths(self) -> tuple[int, ...]:
        """As in ``GroupTransform``."""
        return tuple(_from_text(self.widths_text))

    @property
    def slice_of_type(self) -> tuple[int, ...]:
        """As in ``GroupTransform``."""
        return tuple(_from_text(self.slice_of_type_text))


def _as_text(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def _from_text(text: str) -> list[int]:
    return [int(number) for number in text.split()]


class FreeActLinear(_FixedDtype):
    """A converted Linear: [..., K] to [..., N]. Its forward is one op, which the backend takes apart.

    In eager mode it runs the reference, with the types of an enclosing ``freeact_fx.token_types``; without one (or
    with one of another shape) it uses the default type and warns once if there are others. ``fingerprint`` is that of
    the dense weight it was made from.
    """

    def __init__(
        self,
        transform: GroupTransformModule,
        packed: PackedLinear,
        config: QuantConfig,
        fingerprint: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.transform = transform
        self.register_buffer("weight_packed", packed.weight)
        self.register_buffer("weight_scale", packed.weight_scale)
        self.register_buffer("bias_table", packed.bias_table)
        self.register_buffer("branch_weight", packed.branch_weight)
        self.register_buffer("branch_scale", packed.branch_scale)
        self.in_features = transform.num_features
        self.out_features = packed.weight.shape[0]
        self.config, self.fingerprint = config, fingerprint
        self.qmax = config.qmax
        self.types = config.types_json
        self.type_names = config.type_names

    def forward(self, x: Tensor) -> Tensor:
        types = None if torch.compiler.is_compiling() else self._eager_types(x)
        t = self.transform
        return torch.ops.freeact.linear.default(
            x,
            types,
            t.shift,
            t.channel_scale,
            t.left,
            t.right,
            t.clip,
            t.lowrank,
            self.weight_packed,
            self.weight_scale,
            self.bias_table,
            self.branch_weight,
            self.branch_scale,
            _from_text(t.widths_text),
            _from_text(t.slice_of_type_text),
            0,
            t.own_rank,
            self.qmax,
            self.types,
        )

    def _eager_types(self, x: Tensor) -> Tensor | None:
        if treats_types_alike(len(self.transform.slice_of_type), len(self.type_names)):
            return None
        types = explicit_types()
        if types is not None and tuple(types.shape) == tuple(x.shape[:-1]):
            check_type_range(types, self.type_names)
            return torch.where(types >= 0, types, 0).to(x.device)
        if len(self.type_names) > 1:
            # One text and one place for all Linears: Python shows it once.
            warnings.warn(
                "freeact: converted Linears run in eager mode without token types; they use the default "
                f"type {self.type_names[0]!r}. Compile the model with backend='freeact', or call it inside "
                "freeact_fx.token_types(types).",
                stacklevel=1,
            )
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, plan={self.transform.plan}"


def _dense_weight(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [N, K] and bias of an ``nn.Linear`` or a transformers ``Conv1D``; None for anything else."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers"):
        return module.weight.t(), module.bias  # type: ignore[operator, return-value]
    return None


@torch.no_grad()
def convert(model: nn.Module, source: Checkpoint | QuantConfig | None = None) -> dict[str, Reason]:
    """Replace Linears by ``FreeActLinear``, in place and one at a time: the peak is one dense weight above the result.

    source  a Checkpoint: exactly its Linears are replaced, with its packed weights; on the CPU where a dense weight
            is on the meta device.
            A QuantConfig (or None: the default one): data-free, every Linear that may be quantised.

    Returns the Linears that were left alone, each with its reason (a string; its ``way_out`` says what would change
    that). A weight tied to an embedding stays unless it is included; then the embedding keeps the dense one. Raises
    CheckpointError if a Linear of the checkpoint is missing or has another shape, ConfigError for ``quantize=False``
    (that needs dense weights), UnsupportedLinear under ``strict=True``.
    """
    if isinstance(source, Checkpoint):
        return _convert_from(model, source)
    config = source or QuantConfig()
    if not config.quantize:
        raise ConfigError(
            "convert: QuantConfig.quantize=False needs dense weights, and convert drops them. "
            "Compile the dense model with this config instead."
        )
    if config.plan == "paper":
        raise ConfigError(
            "convert: QuantConfig.plan='paper' needs a calibration to choose what to keep, and there "
            "is no checkpoint. Call calibrate first, or choose another plan."
        )
    embeddings = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.weight is not None
    }
    left: dict[str, Reason] = {}
    transforms: dict[tuple[int, torch.device], GroupTransformModule] = {}
    for name, module in list(model.named_modules()):
        dense = _dense_weight(module)
        if dense is None:
            continue
        weight, bias = dense
        tied = id(module.weight) in embeddings
        why = ineligible_reason(name, weight.shape[1], weight, tied, config)
        if why is None and is_tower_name(name) and not config.vision_tower:
            why = None if matches(name, config.include) else reason("tower")
        if why is None and not bool(weight.isfinite().all()):
            why = reason("not_finite")
        if why is not None:
            if config.strict and not matches(name, config.skip):
                raise UnsupportedLinear(f"{name}: {why}; {why.way_out}.")
            left[name] = why
            continue
        key = (weight.shape[1], weight.device)
        transform = orthogonal_transform(weight.shape[1], config).to(weight.device)
        if key not in transforms:
            transforms[key] = GroupTransformModule(transform)
        packed = pack_linear(transform, weight, bias, config)
        _replace(model, name, FreeActLinear(transforms[key], packed, config, fingerprint(weight)))
    return left


def _convert_from(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Reason]:
    modules = dict(model.named_modules())
    for name, entry in checkpoint.linears.items():
        dense = _dense_weight(modules[name]) if name in modules else None
        if dense is None:
            raise CheckpointError(
                f"convert: the checkpoint has a Linear {name!r}, the model has "
                f"{type(modules[name]).__name__ if name in modules else 'nothing'} there. Use the "
                f"checkpoint of this model, and convert a dense model once."
            )
        expected = [entry.packed.weight.shape[0], entry.num_features]
        if list(dense[0].shape) != expected:
            raise CheckpointError(
                f"convert: {name}: the checkpoint was made for a weight of shape {expected}, the model "
                f"has {list(dense[0].shape)}. Use the checkpoint of this model."
            )
    groups: dict[str, GroupTransformModule] = {}
    for name, entry in checkpoint.linears.items():
        dense = _dense_weight(modules[name])
        assert dense is not None
        device = dense[0].device
        if device.type == "meta":
            device = torch.device("cpu")
        if entry.group not in groups:
            transform = copy.deepcopy(checkpoint.groups[entry.group]).to(device)
            statistics = checkpoint.statistics.get(entry.group)
            groups[entry.group] = GroupTransformModule(transform, statistics)
        # Copies: load_state_dict writes into buffers, and must not write into the checkpoint.
        operands = {n: t.to(device, copy=True) for n, t in entry.packed.tensors().items()}
        packed = PackedLinear(**operands)
        linear = FreeActLinear(groups[entry.group], packed, checkpoint.config, entry.fingerprint)
        _replace(model, name, linear)
    return {
        name: reason("not_in_checkpoint")
        for name, module in model.named_modules()
        if _dense_weight(module) is not None
    }


def _replace(model: nn.Module, name: str, linear: FreeActLinear) -> None:
    """Put a converted Linear in place of a dense one, wherever the model holds it."""
    dense = model.get_submodule(name)
    linear.train(dense.training)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is dense:
                parent._modules[child] = linear
