"""Put packed 4-bit weights into a model, in place: dense weights out, layer by layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, fingerprint
from .config import QuantConfig
from .eligibility import ineligible_reason, is_tower_name, matches
from .errors import CheckpointError, ConfigError, UnsupportedLinear
from .linear_form import (
    GroupForm,
    LinearForm,
    group_form,
    join,
    linear_form,
    take_part,
    text_of,
)
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

    values      [n] fp32: its fp32 tensors side by side, since each buffer costs time at every call (``linear_form``)
    shift_bf16  [P, K], or None: the means are in ``values``, or there are none
    lowrank     [K', R] int8 or None
    form        text of a ``GroupForm``

    ``statistics`` is what calibration measured of the group, as in ``Checkpoint.statistics``.
    """

    values: Tensor
    shift_bf16: Tensor | None
    lowrank: Tensor | None

    def __init__(
        self, transform: GroupTransform, statistics: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.statistics = dict(statistics or {})
        t = transform
        is_narrow = t.shift is not None and t.shift.dtype == torch.bfloat16
        names = ("channel_scale", "left", "right", "clip", *(() if is_narrow else ("shift",)))
        values, parts = join({name: getattr(t, name) for name in names})
        self.register_buffer("values", values)
        self.register_buffer("shift_bf16", t.shift if is_narrow else None)
        self.register_buffer("lowrank", t.lowrank)
        self.plan = t.plan
        self.num_features = t.num_features
        self.form = text_of(GroupForm(parts, t.widths, t.slice_of_type, t.own_rank))

    def to_group_transform(self) -> GroupTransform:
        """What it was made of; its tensors are views of the buffers."""
        form = group_form(self.form)
        named: dict[str, Any] = {p.name: take_part(self.values, p) for p in form.parts}
        if self.shift_bf16 is not None:
            named["shift"] = self.shift_bf16
        return GroupTransform(
            plan=self.plan,
            **named,
            lowrank=self.lowrank,
            widths=form.widths,
            slice_of_type=form.slice_of_type,
            own_rank=form.own_rank,
        )


class FreeActLinear(_FixedDtype):
    """A converted Linear: [..., K] to [..., N]. Its forward is one op, which the backend takes apart.

    In eager mode it runs the reference, with the types of an enclosing ``freeact_fx.token_types``; without one (or
    with one of another shape) it uses the default type and warns once if there are others. ``fingerprint`` is that of
    the dense weight it was made from.

    weight_packed  [N, K' / 8] int32, as in ``PackedLinear``
    values         [n] fp32: its scales and bias table side by side, as in ``GroupTransformModule``
    branch_weight  [R, N] int8 or None
    form           text of a ``LinearForm``
    """

    weight_packed: Tensor
    values: Tensor
    branch_weight: Tensor | None

    def __init__(
        self,
        transform: GroupTransformModule,
        packed: PackedLinear,
        config: QuantConfig,
        fingerprint: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.transform = transform
        names = ("weight_scale", "bias_table", "branch_scale")
        values, parts = join({name: getattr(packed, name) for name in names})
        self.register_buffer("weight_packed", packed.weight)
        self.register_buffer("values", values)
        self.register_buffer("branch_weight", packed.branch_weight)
        self.in_features = transform.num_features
        self.out_features = packed.weight.shape[0]
        self.config, self.fingerprint = config, fingerprint
        self.form = text_of(LinearForm(parts, config.qmax, config.types_json))

    def to_packed_linear(self) -> PackedLinear:
        """What it was made of; its tensors are views of the buffers."""
        parts = linear_form(self.form).parts
        named: dict[str, Any] = {p.name: take_part(self.values, p) for p in parts}
        return PackedLinear(self.weight_packed, **named, branch_weight=self.branch_weight)

    def forward(self, x: Tensor) -> Tensor:
        types = None if torch.compiler.is_compiling() else self._eager_types(x)
        t = self.transform
        return torch.ops.freeact.linear.default(
            x,
            types,
            t.values,
            t.shift_bf16,
            t.lowrank,
            self.weight_packed,
            self.values,
            self.branch_weight,
            t.form,
            self.form,
        )

    def _eager_types(self, x: Tensor) -> Tensor | None:
        type_names = self.config.type_names
        if treats_types_alike(len(group_form(self.transform.form).slice_of_type), len(type_names)):
            return None
        types = explicit_types()
        if types is not None and tuple(types.shape) == tuple(x.shape[:-1]):
            check_type_range(types, type_names)
            return torch.where(types >= 0, types, 0).to(x.device)
        if len(type_names) > 1:
            # One text and one place for all Linears: Python shows it once.
            warnings.warn(
                "freeact: converted Linears run in eager mode without token types; they use the default "
                f"type {type_names[0]!r}. Compile the model with backend='freeact', or call it inside "
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
