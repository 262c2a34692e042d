"""How many bytes do the converted Linears take, in the state dict and on disk, against bf16?

    python benchmarks/storage.py [--check] [--write]

Counts every tensor that a converted Linear carries: packed weights, scales, transforms, shifts
and bias tables. `--check` fails above 0.30 of bf16 with one transform set (plan "single"). What
the CPU engine holds besides at run time, oneDNN's prepacked int8 weights, is a row of its own.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from calibrated import DLLM_CONFIG, dllm_checkpoint
from evaluation import text_windows
from measure import RESULTS, append_result
from presentation import table
from safetensors.torch import save_file
from small_models import CACHE, load_masked_diffusion
from torch import nn

import freeact_fx

LIMIT = 0.30


def converted_linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, freeact_fx.FreeActLinear)}


def state_dict_bytes(model: nn.Module, names: set[str]) -> int:
    """Bytes of the state dict's tensors under the modules `names`; shared storage counts once."""
    storages = {}
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] in names:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def bf16_bytes(dense: nn.Module, names: set[str]) -> int:
    parameters = (p for n, p in dense.named_parameters() if n.rpartition(".")[0] in names)
    return 2 * sum(p.numel() for p in parameters)


def file_bytes(model: nn.Module, names: set[str]) -> int:
    """Size of a safetensors file with the state dict's tensors under the modules `names`."""
    tensors = {k: t for k, t in model.state_dict().items() if k.rpartition(".")[0] in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "converted.safetensors"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
        return path.stat().st_size


def engine_bytes(model: nn.Module) -> int:
    """Bytes of oneDNN's prepacked int8 weights, which the CPU engine keeps after its first run."""
    packed = (b for m in converted_linears(model).values() for b in m.buffers())
    return sum(freeact_fx.ops.onednn_weight_bytes(b) for b in packed if b.dtype == torch.uint8)


def describe_bytes(dense: nn.Module, converted: nn.Module) -> str:
    """One line for the demos: bytes of the converted Linears before and after."""
    names = set(converted_linears(converted))
    before, after = bf16_bytes(dense, names), state_dict_bytes(converted, names)
    return (
        f"weights of the {len(names)} converted Linears: {2 * before / 1e6:.1f} MB in fp32, "
        f"{before / 1e6:.1f} MB in bf16, {after / 1e6:.1f} MB packed with scales, transforms and "
        f"tables ({after / before:.3f} of bf16)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help=f"exit 1 above {LIMIT} of bf16")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()

    dense = load_masked_diffusion(args.cache)
    one_transform, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    freeact_fx.convert(one_transform, dataclasses.replace(DLLM_CONFIG, plan="single"))
    freeact_fx.convert(calibrated, dllm_checkpoint(dense, args.cache))
    models = {"one transform set": one_transform, "calibrated, own shifts": calibrated}

    rows = [["", "bf16", "state dict", "file", "oneDNN's int8 copy, CPU only"]]
    worst = 0.0
    for name, model in models.items():
        with torch.no_grad():
            model(text_windows("evals", "wiki", 1, length=16))
        linears = set(converted_linears(model))
        before = bf16_bytes(dense, linears)
        found = {
            "state_dict_bytes": state_dict_bytes(model, linears),
            "file_bytes": file_bytes(model, linears),
            "engine_bytes": engine_bytes(model),
        }
        cells = [f"{size / 1e6:.1f} MB ({size / before:.3f})" for size in found.values()]
        rows.append([name, f"{before / 1e6:.1f} MB", *cells])
        if model is one_transform:
            worst = max(found["state_dict_bytes"], found["file_bytes"]) / before
        if args.write:
            fields = {"variant": name, "num_linears": len(linears), "bf16_bytes": before, **found}
            append_result(RESULTS / "storage.jsonl", **fields)
    print(table(rows))
    print(f"allowed with one transform set: {LIMIT} of bf16, measured {worst:.3f}")
    if args.check and worst > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
