"""Packed copies of dense weights, for models that were not converted.

A packed copy belongs to a Parameter: it is made once per parameter and set of options, shared by every graph that uses
the parameter (prefill and decode), made anew when the weight changes (``load_state_dict``, ``.to()``, a merged LoRA),
and dropped with the parameter.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.weak import WeakIdKeyDictionary

from .checkpoint import Checkpoint, has_values
from .config import QuantConfig
from .reasons import Reason, reason
from .reference import CODES_PER_WORD
from .transform import GroupTransform, PackedLinear, orthogonal_transform, pack_linear

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


def empty_packed(
    transform: GroupTransform, num_outputs: int, has_bias: bool, config: QuantConfig
) -> PackedLinear:
    """What ``pack_linear`` makes of a dense weight [N, K], without values, on torch's default device."""
    num_codes, num_slices = transform.num_codes, len(transform.widths)
    weight = torch.empty(num_outputs, num_codes)
    if config.quantize:
        weight = torch.empty(num_outputs, -(-num_codes // CODES_PER_WORD), dtype=torch.int32)
    has_table = has_bias or transform.shift is not None
    table = torch.empty(transform.num_rows, num_outputs) if has_table else None
    scale = torch.empty(num_slices, num_outputs)
    if transform.lowrank is None:
        return PackedLinear(weight, scale, table)
    rank, dtype = transform.lowrank.shape[1], torch.int8 if config.quantize else torch.float32
    branch = torch.empty(rank, num_outputs, dtype=dtype)
    return PackedLinear(weight, scale, table, branch, torch.empty(rank))


class Packer:
    """Gives each dense Linear its transform and its packed weight."""

    def __init__(self, config: QuantConfig, checkpoint: Checkpoint | None) -> None:
        self.config, self.checkpoint = config, checkpoint
        self._key = (config.digest, checkpoint.digest if checkpoint else None)

    def transform(self, name: str, dense: Tensor) -> GroupTransform | Reason:
        """The transform of a Linear's group, or why there is none."""
        if has_values(dense) and not bool(dense.isfinite().all()):
            return reason("not_finite")
        if self.checkpoint is None:
            return _orthogonal(dense.shape[1], self.config, str(dense.device))
        return self.checkpoint.transform_of(name, dense)

    def pack(
        self, name: str, weight: Tensor, bias: Tensor | None, *, transposed: bool
    ) -> tuple[GroupTransform, PackedLinear] | Reason:
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
        if stored.weight.is_cuda:
            # Kernels fetch weights before the kernel in front of them is done (codegen/kernels/stream_order).
            torch.cuda.current_stream(stored.weight.device).synchronize()
        entries[key] = (state, (transform, stored))
        return transform, stored


class ShapePacker(Packer):
    """For a dry run: packed weights of the right shapes, without values.

    fake_mode  that of the graph
    """

    def __init__(
        self, config: QuantConfig, checkpoint: Checkpoint | None, fake_mode: FakeTensorMode
    ) -> None:
        super().__init__(config, checkpoint)
        self._fake_mode = fake_mode

    def pack(
        self, name: str, weight: Tensor, bias: Tensor | None, *, transposed: bool
    ) -> tuple[GroupTransform, PackedLinear] | Reason:
        dense = weight.detach().t() if transposed else weight.detach()
        transform = self.transform(name, dense)
        if isinstance(transform, Reason):
            return transform
        with self._fake_mode, dense.device:
            return transform, empty_packed(transform, dense.shape[0], bias is not None, self.config)
