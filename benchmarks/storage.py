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
from evaluation import dllm_calibration_batches, text_windows
from measure import RESULTS, append_result
from presentation import table
from small_models import CACHE, load_masked_diffusion
from torch import nn

import freeact_fx
from freeact_fx import Checkpoint

LIMIT = 0.30


def converted_linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, freeact_fx.FreeActLinear)}


def state_dict_bytes(model: nn.Module) -> int:
    """Bytes of the converted Linears' tensors; a transform shared by a group counts once."""
    storages = {}
    for linear in converted_linears(model).values():
        for tensor in linear.state_dict().values():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def bf16_bytes(model: nn.Module) -> int:
    """What the converted Linears' weights were in bf16."""
    linears = converted_linears(model).values()
    return 2 * sum(linear.in_features * linear.out_features for linear in linears)


def folder_bytes(checkpoint: Checkpoint) -> int:
    """Size of the checkpoint on disk: packed weights, scales, transforms, tables and its config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoint.save(path)
        return sum(file.stat().st_size for file in path.iterdir())


def engine_bytes(model: nn.Module) -> int:
    """Bytes of oneDNN's prepacked int8 weights, which the CPU engine keeps after its first run."""
    linears = converted_linears(model).values()
    return sum(freeact_fx.ops.onednn_weight_bytes(linear.weight_packed) for linear in linears)


def describe_bytes(converted: nn.Module) -> str:
    """One line for the demos: bytes of the converted Linears before and after."""
    before, after = bf16_bytes(converted), state_dict_bytes(converted)
    return (
        f"weights of the converted Linears: {2 * before / 1e6:.1f} MB in fp32, {before / 1e6:.1f} MB "
        f"in bf16, {after / 1e6:.1f} MB packed with scales, transforms and tables "
        f"({after / before:.3f} of bf16)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help=f"exit 1 above {LIMIT} of bf16")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()

    dense = load_masked_diffusion(args.cache)
    one_set = dataclasses.replace(DLLM_CONFIG, plan="single")
    # Two windows: how many do not change how large the result is.
    checkpoints = {
        "one transform set": freeact_fx.calibrate(dense, dllm_calibration_batches(2), one_set),
        'calibrated, plan "auto"': dllm_checkpoint(dense, args.cache),
    }
    rows = [["", "bf16", "state dict", "on disk", "oneDNN's int8 copy at run time"]]
    worst = 0.0
    for name, checkpoint in checkpoints.items():
        model = copy.deepcopy(dense)
        freeact_fx.convert(model, checkpoint)
        with torch.no_grad(), freeact_fx.token_types(torch.zeros(1, 16, dtype=torch.long)):
            model(
                text_windows("evals", "wiki", 1, length=16)
            )  # the engine repacks at its first run
        before = bf16_bytes(model)
        found = {
            "state_dict_bytes": state_dict_bytes(model),
            "disk_bytes": folder_bytes(checkpoint),
            "engine_bytes": engine_bytes(model),
        }
        cells = [f"{size / 1e6:.1f} MB ({size / before:.3f})" for size in found.values()]
        rows.append([name, f"{before / 1e6:.1f} MB", *cells])
        if checkpoint.config.plan == "single":
            worst = max(found["state_dict_bytes"], found["disk_bytes"]) / before
        if args.write:
            fields = {"variant": name, "num_linears": len(converted_linears(model)), **found}
            append_result(RESULTS / "storage.jsonl", bf16_bytes=before, **fields)
    print(table(rows))
    print(f"allowed with one transform set: {LIMIT} of bf16, measured {worst:.3f}")
    if args.check and worst > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
