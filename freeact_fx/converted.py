"""A converted model in a folder: nothing of the dense model is needed to load it.

========================  ============================================================================
``config.json``           the model's own config, with ``quantization_config`` as in ``checkpoint``
``model.safetensors``     packed Linears, as in ``checkpoint``: the folder is a checkpoint as well
``dense.safetensors``     every other parameter and buffer, those that a state dict leaves out included
========================  ============================================================================

Loading builds the model on the meta device, replaces its Linears and puts these tensors in: a dense weight that was
packed is never allocated. Only models that transformers can build from a config are loaded by the folder alone;
for others hand in the bare model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, PackedEntry, sha256_of
from .convert import FreeActLinear, convert
from .errors import CheckpointError, ConfigError
from .transform import GroupTransform

DENSE_FILE = "dense.safetensors"


def checkpoint_of(model: nn.Module) -> Checkpoint:
    """The checkpoint that a converted model carries: its transforms, packed weights and what calibration measured.

    Raises ConfigError for a model without converted Linears, or with Linears of different configurations.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, FreeActLinear)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: it has no converted Linear. Call freeact_fx.convert(model) first."
        )
    configs = {linear.config for linear in found.values()}
    if len(configs) > 1:
        raise ConfigError(
            f"{type(model).__name__}: its Linears were converted with {len(configs)} different configurations. "
            f"Convert a model with one checkpoint."
        )
    names: dict[int, str] = {}
    groups: dict[str, GroupTransform] = {}
    statistics: dict[str, Any] = {}
    linears: dict[str, PackedEntry] = {}
    for name, linear in found.items():
        group = names.setdefault(id(linear.transform), name)
        if group == name:
            groups[group] = linear.transform.to_group_transform()
            if linear.transform.statistics:
                statistics[group] = linear.transform.statistics
        linears[name] = PackedEntry(
            group, linear.in_features, linear.to_packed_linear(), linear.fingerprint
        )
    return Checkpoint(configs.pop(), groups, linears, statistics)


def save_converted(model: nn.Module, folder: str | Path) -> None:
    """Write a converted model into a folder, which is made if need be.

    The tokenizer or processor is its own: ``tokenizer.save_pretrained(folder)``. Raises ConfigError for a model that
    was not converted.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    checkpoint_of(model).save(folder)
    dense, aliases = {}, {}
    seen: dict[int, str] = {}
    for name, tensor in _dense_tensors(model):
        if (first := seen.setdefault(id(tensor), name)) != name:
            aliases[name] = first
        else:
            # A copy where two tensors share memory, which the file format does not have.
            dense[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    save_file(dense, folder / DENSE_FILE, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["freeact"]["dense"] = {
        "sha256": sha256_of(folder / DENSE_FILE),
        "aliases": aliases,
    }
    if (own := getattr(model, "config", None)) is not None:
        own = own.to_dict() | {"architectures": [type(model).__name__]}
        content = {**own, **content}
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]


def _dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers outside converted Linears, by every name they have."""
    ours = {
        id(part) for m in model.modules() if isinstance(m, FreeActLinear) for part in m.modules()
    }
    for path, module in model.named_modules():
        if id(module) in ours:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def is_converted(folder: str | Path) -> bool:
    """Whether a folder holds a model that ``save_converted`` wrote."""
    return (Path(folder) / DENSE_FILE).is_file() and (Path(folder) / "config.json").is_file()


def load_converted(
    folder: str | Path, model: nn.Module | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The model that ``save_converted`` wrote, in eval mode on the CPU; its outputs are the same to the bit.

    model              what to fill, dense and best on the meta device; None: built by transformers from config.json
    trust_remote_code  let transformers run Python files that the folder's config names

    Raises CheckpointError for a folder that is damaged, incomplete or of another model.
    """
    folder = Path(folder)
    if not is_converted(folder):
        raise CheckpointError(
            f"{folder}: a converted model is a folder with config.json, model.safetensors and {DENSE_FILE}. Write "
            f"it with freeact_fx.save_converted."
        )
    checkpoint = Checkpoint.load(folder)
    content = json.loads((folder / "config.json").read_text())
    meta = content["quantization_config"]["freeact"].get("dense", {})
    tensors = _load_dense(folder / DENSE_FILE, meta.get("sha256"))
    if model is None:
        model = _bare_model(folder, content, trust_remote_code)
    convert(model, checkpoint)
    _assign(model, tensors, meta.get("aliases", {}), folder / DENSE_FILE)
    return model.eval().requires_grad_(False)


def _load_dense(file: Path, expected: str | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if sha256_of(file) != expected:
        raise CheckpointError(
            f"{file}: its SHA-256 is not the one in config.json: damaged, or of another model. Copy the folder again."
        )
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}). Copy it again.") from error


def _bare_model(folder: Path, content: dict[str, Any], trust_remote_code: bool) -> nn.Module:
    """The dense model on the meta device."""
    from .hub import build_model, read_config

    if "architectures" not in content:
        raise CheckpointError(
            f"{folder / 'config.json'}: it has no 'architectures': this model is none of transformers. Build it (best "
            f"under torch.device('meta')) and call load_converted(folder, model)."
        )
    config = read_config(str(folder), trust_remote_code=trust_remote_code)
    del config.quantization_config
    with torch.device("meta"):
        return build_model(config, trust_remote_code=trust_remote_code)


def _assign(
    model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], file: Path
) -> None:
    """Put each tensor where its name says, as the parameter or buffer that was there."""
    expected = dict(_dense_tensors(model))
    stored = tensors.keys() | aliases.keys()
    if expected.keys() != stored:
        missing, unknown = sorted(expected.keys() - stored), sorted(stored - expected.keys())
        raise CheckpointError(
            f"{file}: the tensors of another model: {len(missing)} are missing {missing[:3]}, {len(unknown)} have no "
            f"place {unknown[:3]}. Use the model, and the version of transformers, that was saved."
        )
    placed: dict[str, Tensor] = {}
    for name in sorted(stored, key=lambda n: n in aliases):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        was = expected[name]
        if name in aliases:
            tensor = placed[aliases[name]]
        else:
            tensor = tensors[name]
            if tensor.shape != was.shape:
                raise CheckpointError(
                    f"{file}: {name} has shape {list(tensor.shape)}, the model's has {list(was.shape)}. Use the model "
                    f"that was saved."
                )
            if isinstance(was, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
        held: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
        held[own] = placed[name] = tensor
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.device.type == "meta":
                raise CheckpointError(
                    f"{path}.{name}: a plain tensor that no folder holds. Build the model with it and call "
                    f"load_converted(folder, model)."
                )
