"""The float original of a converted model: the model itself, or made from its dense weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import ConfigError


def sharing_copy(model: nn.Module, *, new_parameters: bool = False) -> nn.Module:
    """A copy of a model's modules around the same tensors.

    new_parameters  the parameters are other objects (around the same memory)
    """
    memo: dict[int, Any] = {}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    for parameter in model.parameters():
        shared = nn.Parameter(parameter.detach(), requires_grad=False)
        memo[id(parameter)] = shared if new_parameters else parameter
    return copy.deepcopy(model, memo)


def original_of(
    model: nn.Module,
    carried: Checkpoint | None,
    dense: nn.Module | Mapping[str, Tensor] | str | Path | None,
) -> nn.Module | None:
    """The float model to compare with, or None if there is none.

    carried  what a converted model carries; None: the model is dense
    dense    a model, a state dict, or the path of one

    Raises ConfigError if they are of different models.
    """
    if dense is None:
        return model if carried is None else None
    if not isinstance(dense, nn.Module):
        tensors = dense if isinstance(dense, Mapping) else _read(Path(dense))
        if carried is None:
            raise ConfigError(
                "verify(dense=...): this model is dense, it is its own original. Leave dense out, or give a "
                "model to compare with."
            )
        return _with_dense_linears(model, carried, tensors)
    dense = getattr(dense, "_orig_mod", dense)
    names = {name for name, _ in dense.named_modules()}
    missing = [n for n in (carried.linears if carried is not None else ()) if n not in names]
    if missing:
        raise ConfigError(
            f"verify(dense=...): {type(dense).__name__} has no {missing[0]}, which the converted model has. Give "
            f"the model that was converted."
        )
    return dense


def _with_dense_linears(
    model: nn.Module, carried: Checkpoint, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a converted model with dense Linears in place of the converted ones; it shares everything else."""
    shapes = {
        name: (entry.packed.weight.shape[0], entry.num_features)
        for name, entry in carried.linears.items()
    }
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None or tuple(weight.shape) not in (shape, shape[::-1]):
            got = "nothing" if weight is None else f"shape {list(weight.shape)}"
            raise ConfigError(
                f"verify(dense=...): {name}.weight must have shape {list(shape)}, got {got}. Give the state dict "
                f"of the model that was converted."
            )
        weights[name] = weight
    # transformers' Conv1D keeps [K, N]; of square ones the others tell.
    uneven = [name for name, (n, k) in shapes.items() if n != k]
    turned = bool(uneven) and all(tuple(weights[n].shape) == shapes[n][::-1] for n in uneven)
    original = sharing_copy(model)
    for name, weight in weights.items():
        converted = original.get_submodule(name)
        device = carried.linears[name].packed.weight.device
        dense = nn.Linear(1, 1, device="meta")
        dense.out_features, dense.in_features = shapes[name]
        bias = tensors.get(f"{name}.bias")
        held = (weight.t().contiguous() if turned else weight).to(device)
        dense.weight = nn.Parameter(held, requires_grad=False)
        if bias is not None:
            bias = nn.Parameter(bias.to(device, held.dtype), requires_grad=False)
        dense.register_parameter("bias", bias)
        for parent in list(original.modules()):
            for child, module in parent._modules.items():
                if module is converted:
                    parent._modules[child] = dense
    return original.eval()


def _read(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a safetensors file, a folder of them, or what ``torch.save`` wrote."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ConfigError(
            f"verify(dense=...): {path} must be a safetensors file, a folder of them, or what torch.save wrote, "
            f"and is not there. Give the path of the original's weights."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors |= load_file(file)
        else:
            tensors |= torch.load(file, weights_only=True, map_location="cpu")
    return tensors
