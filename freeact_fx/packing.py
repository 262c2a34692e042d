"""Packed copies of dense weights, for models that were not converted.

A packed copy belongs to a Parameter: it is made once per parameter and set of options, shared by every graph that uses
the parameter (prefill and decode), made anew when the weight changes (``load_state_dict``, ``.to()``, a merged LoRA),
and dropped with the parameter.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .config import QuantConfig
from .transform import GroupTransform, PackedLinear, orthogonal_transform, pack_linear

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _state(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Changes whenever the values of a tensor may have changed.

    An edit through ``.data`` (as PEFT merges adapters) moves neither address nor version: on the CPU a few dozen values
    are looked at as well. Elsewhere that would wait for the device at every call; there such an edit goes unseen.
    """
    if tensor is None:
        return None
    version = 0 if tensor.is_inference() else tensor._version
    probe = None
    if tensor.device.type == "cpu":
        few = tensor.detach()[tuple(slice(None, None, max(1, -(-n // 8))) for n in tensor.shape)]
        probe = float(few.sum(dtype=torch.float64))
    return (id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device, probe)


@functools.lru_cache(maxsize=256)
def _orthogonal(num_features: int, config: QuantConfig, device: str) -> GroupTransform:
    return orthogonal_transform(num_features, config).to(torch.device(device))


class Packer:
    """Gives each dense Linear its transform and its packed weight."""

    def __init__(self, config: QuantConfig, checkpoint: Checkpoint | None) -> None:
        self.config, self.checkpoint = config, checkpoint
        self._key = (config.digest, checkpoint.digest if checkpoint else None)

    def transform(self, name: str, dense: Tensor) -> GroupTransform | str:
        """The transform of a Linear's group, or why there is none."""
        if not bool(dense.isfinite().all()):
            return "its weight holds NaN or infinite values"
        if self.checkpoint is None:
            return _orthogonal(dense.shape[1], self.config, str(dense.device))
        return self.checkpoint.transform_of(name, dense)

    def pack(
        self, name: str, weight: Tensor, bias: Tensor | None, *, transposed: bool
    ) -> tuple[GroupTransform, PackedLinear] | str:
        """Transform and packed weight of a dense weight [N, K] ([K, N] if transposed), or why there are none."""
        state = (_state(weight), _state(bias))
        entries = _packed.setdefault(weight, {})
        # One weight may serve several Linears: with another bias, or none, it is packed beside.
        key = (self._key, name, transposed, None if bias is None else id(bias))
        cached = entries.get(key)
        if cached is not None and cached[0] == state:
            return cached[1]
        dense = weight.detach().t() if transposed else weight.detach()
        transform = self.transform(name, dense)
        if isinstance(transform, str):
            return transform
        stored = None if self.checkpoint is None else self.checkpoint.packed_for(name, dense)
        dense_bias = None if bias is None else bias.detach()
        if stored is None or not self.config.quantize:
            stored = pack_linear(transform, dense, dense_bias, self.config)
        else:
            # The codes were made from this weight; the bias may be another by now.
            stored = replace(stored, bias_table=transform.bias_table(dense, dense_bias))
        entries[key] = (state, (transform, stored))
        return transform, stored
