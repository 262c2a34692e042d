"""Calibrated tensors on disk: ``config.json`` and ``model.safetensors`` in a folder.

``config.json`` holds ``quantization_config`` with ``quant_method: "freeact"``: a reader that ignores token types
must not mistake it for plain compressed-tensors. Packed weights have compressed-tensors' names and bit layout:

====================================  ===================================================================
``{linear}.weight_packed``            [N, ceil(K' / 8)] int32, see ``reference.pack_int4``
``{linear}.weight_scale``             [N, S] fp32, one column per K slice
``{linear}.weight_shape``             [2] int64: N, K'
``{linear}.bias_table``               [P, N] fp32, ``mu_t W + b``
``{linear}.branch_weight``            [R, N] int8 codes of the branch
``{linear}.branch_scale``             [R] fp32
``freeact.{group}.{operand}``         the group's transform, see ``transform.GroupTransform``
====================================  ===================================================================

Layouts that an engine prefers are made when a model is loaded, never saved.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import QuantConfig
from .errors import CheckpointError, ConfigError
from .reasons import Reason, reason
from .reference import unpack_int4
from .transform import GroupTransform, PackedLinear

VERSION = 2
_OPERANDS = ("left", "right", "clip", "shift", "channel_scale", "lowrank")
# What config.json says of a group and of a Linear.
_GROUP_KINDS = {"plan": str, "widths": list, "slice_of_type": list, "own_rank": int}
_LINEAR_KINDS = {"group": str, "num_features": int, "fingerprint": list}


def fingerprint(weight: Tensor) -> tuple[float, float, float]:
    """Three sums that tell whether a dense weight is the one that was calibrated (compared to 1e-6)."""
    values = weight.detach().double()
    return (
        float(values.sum()),
        float(values.square().sum()),
        float((values * torch.arange(values.shape[1], device=values.device)).sum()),
    )


def has_values(tensor: Tensor) -> bool:
    """False for a tensor that is a shape only: on the meta device, or a fake one."""
    return not tensor.is_meta and not isinstance(tensor, torch._subclasses.FakeTensor)


@dataclass(frozen=True)
class PackedEntry:
    """One Linear of a checkpoint: its group, its packed operands, and which dense weight they were made from."""

    group: str
    num_features: int
    packed: PackedLinear
    fingerprint: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Transforms by group and packed weights by Linear. Two checkpoints are equal if their contents are.

    config     the configuration it was calibrated with
    groups     transform of each group
    linears    packed weight of each Linear, by qualified name
    statistics per group: tokens seen per type, and what the calibration measured; plain JSON
    """

    config: QuantConfig
    groups: dict[str, GroupTransform]
    linears: dict[str, PackedEntry]
    statistics: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """Content digest, part of every cache key."""
        structure = json.dumps([self.config.digest, self._structure()], sort_keys=True)
        digest = hashlib.sha256(structure.encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
            update_digest(digest, tensor)
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({len(self.linears)} Linears in {len(self.groups)} groups, {self.digest})"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    # ------------------------------------------------------------------ look-up

    def find(self, name: str, dense: Tensor) -> str | None:
        """The stored name of a Linear: its own, or one that ends in it (only a part of the model was compiled, or a
        graph break cut its path short); of several, the one whose weight was this one."""
        if name in self.linears:
            return name
        ending = [n for n in self.linears if n.endswith("." + name) or name.endswith("." + n)]
        if len(ending) > 1 and has_values(dense):
            now = fingerprint(dense)
            ending = [n for n in ending if same_fingerprint(now, self.linears[n].fingerprint)]
        return ending[0] if len(ending) == 1 else None

    def transform_of(self, name: str, dense: Tensor) -> GroupTransform | Reason:
        """The transform of a Linear's group, on the weight's device, or why there is none."""
        stored = self.find(name, dense)
        if stored is None:
            return reason("not_in_checkpoint")
        entry = self.linears[stored]
        expected = [entry.packed.weight.shape[0], entry.num_features]
        if list(dense.shape) != expected:
            raise CheckpointError(
                f"{name}: the checkpoint was made for a weight of shape {expected}, the model has "
                f"{list(dense.shape)}. Use the checkpoint of this model."
            )
        return self._on_device(entry.group, dense.device)

    def _on_device(self, group: str, device: torch.device) -> GroupTransform:
        cache: dict[tuple[str, str], GroupTransform] = self.__dict__.setdefault("_device_cache", {})
        key = (group, str(device))
        if key not in cache:
            cache[key] = self.groups[group].to(device)
        return cache[key]

    def packed_for(self, name: str, dense: Tensor) -> PackedLinear | None:
        """The stored packed weight, if it was made from this dense weight; else None: pack anew."""
        entry = self.linears[self.find(name, dense) or name]
        if not same_fingerprint(fingerprint(dense), entry.fingerprint):
            return None
        tensors = {n: t.to(dense.device) for n, t in entry.packed.tensors().items()}
        return PackedLinear(**tensors)

    # ------------------------------------------------------------------ disk

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for group, transform in self.groups.items():
            for operand, tensor in transform.tensors().items():
                tensors[f"freeact.{group}.{operand}"] = tensor
        for name, entry in self.linears.items():
            packed = entry.packed
            num_codes = self.groups[entry.group].num_codes
            tensors[f"{name}.weight_packed"] = packed.weight
            tensors[f"{name}.weight_scale"] = packed.weight_scale.t()
            tensors[f"{name}.weight_shape"] = torch.tensor([packed.weight.shape[0], num_codes])
            if packed.bias_table is not None:
                tensors[f"{name}.bias_table"] = packed.bias_table
            if packed.branch_weight is not None and packed.branch_scale is not None:
                tensors[f"{name}.branch_weight"] = packed.branch_weight
                tensors[f"{name}.branch_scale"] = packed.branch_scale
        return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}

    def _structure(self) -> dict[str, Any]:
        """What is not a tensor, as config.json holds it."""
        groups = {
            name: {
                "plan": t.plan,
                "widths": list(t.widths),
                "slice_of_type": list(t.slice_of_type),
                "own_rank": t.own_rank,
            }
            for name, t in self.groups.items()
        }
        linears = {
            name: {
                "group": e.group,
                "num_features": e.num_features,
                "fingerprint": list(e.fingerprint),
            }
            for name, e in self.linears.items()
        }
        return {"groups": groups, "linears": linears}

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, which is made if need be."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / "model.safetensors", metadata={"format": "pt"})
        content = {
            "quantization_config": {
                "quant_method": "freeact",
                "format": "pack-quantized",
                "freeact": {
                    "version": VERSION,
                    "config": self.config.to_dict(),
                    "type_names": list(self.config.type_names),
                    **self._structure(),
                    "statistics": self.statistics,
                    "sha256": sha256_of(folder / "model.safetensors"),
                },
            }
        }
        (folder / "config.json").write_text(json.dumps(content, indent=1))

    @staticmethod
    def load(folder: str | Path) -> Checkpoint:
        """Read a checkpoint and check every shape. Raises CheckpointError, naming the file or tensor at fault."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder}: a checkpoint is a folder with config.json and model.safetensors, "
                    f"{name} is missing. Write it with Checkpoint.save."
                )
        file = folder / "model.safetensors"
        meta = _read_meta(folder / "config.json")
        try:
            tensors = load_file(file)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or damaged ({error}). Copy it again."
            ) from error
        if sha256_of(file) != meta["sha256"]:
            raise CheckpointError(
                f"{file}: its SHA-256 is not the one in config.json: damaged, or the two files are of "
                f"different checkpoints. Copy both again."
            )
        try:
            config = QuantConfig.from_options(meta["config"])
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
        if tuple(meta["type_names"]) != config.type_names:
            raise CheckpointError(
                f"{folder / 'config.json'}: type_names {meta['type_names']} do not match its token types "
                f"{list(config.type_names)}. The file was edited; restore it."
            )
        groups = {name: _load_group(name, g, config, tensors) for name, g in meta["groups"].items()}
        linears = {
            name: _load_linear(name, m, groups, tensors) for name, m in meta["linears"].items()
        }
        return Checkpoint(config, groups, linears, meta["statistics"])


def same_fingerprint(now: tuple[float, ...], then: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= 1e-6 * (1 + abs(a) + abs(b)) for a, b in zip(now, then, strict=True))


def update_digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Take in the bytes of a tensor, wherever it lies. Not by way of numpy, which is no dependency."""
    held = tensor.detach().cpu().contiguous()
    if held.numel():
        digest.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_meta(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())["quantization_config"]
        if not isinstance(content, dict) or not isinstance(content.get("freeact", {}), dict):
            raise TypeError("quantization_config is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: not a checkpoint's config.json ({type(error).__name__}: {error})."
        ) from error
    if content.get("quant_method") != "freeact":
        raise CheckpointError(
            f"{file}: quant_method must be 'freeact', got {content.get('quant_method')!r}. "
            f"Load it with the library it was made by."
        )
    meta: dict[str, Any] = content.get("freeact", {})
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: version must be {VERSION}, got {meta.get('version')!r}. Calibrate anew, or "
            f"install the freeact_fx that wrote it."
        )
    required = ("config", "type_names", "groups", "linears", "statistics", "sha256")
    missing = [key for key in required if key not in meta]
    if missing:
        raise CheckpointError(f"{file}: {', '.join(missing)} missing. The file is incomplete.")
    return meta


def _check_entry(meta: Any, where: str, kinds: Mapping[str, type]) -> None:
    """Raise CheckpointError for an entry of config.json that lacks a field or has one of another kind."""
    for key, kind in kinds.items():
        value = meta.get(key) if isinstance(meta, dict) else None
        numbers = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(n, (int, float)) for n in numbers):
            raise CheckpointError(
                f"config.json: {where}: {key!r} is missing or ill-formed, got {value!r}. The file was "
                f"edited; restore it."
            )


def _take(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    if name not in tensors:
        raise CheckpointError(
            f"model.safetensors: tensor {name} is missing. The file is incomplete."
        )
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointError(
            f"model.safetensors: {name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of "
            f"shape {list(tensor.shape)}."
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CheckpointError(f"model.safetensors: {name} must be finite. Calibrate anew.")
    return tensor


def _load_group(
    name: str, meta: Mapping[str, Any], config: QuantConfig, tensors: Mapping[str, Tensor]
) -> GroupTransform:
    _check_entry(meta, f"group {name}", _GROUP_KINDS)
    found = {o: tensors.get(f"freeact.{name}.{o}") for o in _OPERANDS}
    for operand in ("left", "right", "clip"):
        if found[operand] is None:
            raise CheckpointError(f"model.safetensors: tensor freeact.{name}.{operand} is missing.")
    transform = GroupTransform(
        plan=meta["plan"],
        widths=tuple(meta["widths"]),
        slice_of_type=tuple(meta["slice_of_type"]),
        own_rank=meta["own_rank"],
        **found,  # type: ignore[arg-type]
    )
    problem = transform.problem()
    if problem is None and transform.num_rows not in (2, config.num_types + 1):
        problem = (
            f"clip must have {config.num_types + 1} rows (types and the untyped row), or 2 (types alike), got "
            f"{transform.num_rows}"
        )
    if problem is not None:
        raise CheckpointError(f"model.safetensors: freeact.{name}: {problem}.")
    return transform


def _load_linear(
    name: str,
    meta: Mapping[str, Any],
    groups: Mapping[str, GroupTransform],
    tensors: Mapping[str, Tensor],
) -> PackedEntry:
    _check_entry(meta, f"Linear {name}", _LINEAR_KINDS)
    group = groups.get(meta["group"])
    if group is None:
        raise CheckpointError(
            f"config.json: {name} is in group {meta['group']!r}, which is not there."
        )
    if group.num_features != meta["num_features"]:
        raise CheckpointError(
            f"config.json: {name} has num_features {meta['num_features']}, its group's transform "
            f"{group.num_features}."
        )
    shape = _take(tensors, f"{name}.weight_shape", (2,), torch.int64).tolist()
    if shape[1] != group.num_codes:
        raise CheckpointError(
            f"model.safetensors: {name}.weight_shape says {shape[1]} codes per row, its group's "
            f"transform makes {group.num_codes}."
        )
    num_outputs, words = shape[0], -(-shape[1] // 8)
    packed = _take(tensors, f"{name}.weight_packed", (num_outputs, words), torch.int32)
    if bool((unpack_int4(packed, shape[1]) == -8).any()):
        raise CheckpointError(
            f"model.safetensors: {name}.weight_packed holds code -8; codes are in [-7, 7] "
            f"(sign-magnitude engines cannot hold -8). Quantise with a symmetric range."
        )
    slices = (num_outputs, len(group.widths))
    scale = _take(tensors, f"{name}.weight_scale", slices, torch.float32)
    optional: dict[str, Tensor] = {}
    # Without a shift it is the bias, which not every Linear has.
    if f"{name}.bias_table" in tensors or group.shift is not None:
        rows = (group.num_rows, num_outputs)
        optional["bias_table"] = _take(tensors, f"{name}.bias_table", rows, torch.float32)
    if group.lowrank is not None:
        rank = group.lowrank.shape[1]
        codes = _take(tensors, f"{name}.branch_weight", (rank, num_outputs), torch.int8)
        optional["branch_weight"] = codes
        optional["branch_scale"] = _take(tensors, f"{name}.branch_scale", (rank,), torch.float32)
    return PackedEntry(
        meta["group"],
        meta["num_features"],
        PackedLinear(packed, scale.t().contiguous(), **optional),
        tuple(meta["fingerprint"]),
    )
