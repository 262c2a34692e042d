"""Activations of a real model with what a calibration made for them: a few tokens and outputs of three of its Linears.

    PYTHONPATH=benchmarks python tests/kernels/real_operands.py      makes the file again (minutes, on the CPU)

They are SmolLM2-135M's with the masked-diffusion adapter (``benchmarks/models/README.md``), on a text that is masked in
part; two MLPs of plan ``shift`` at W4A4, calibrated on the model's own calibration windows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.transform import GroupTransform

FILE = Path(__file__).with_name("real_operands.safetensors")
NAMES = ("layers.15.mlp.gate_proj", "layers.2.mlp.down_proj", "layers.15.mlp.down_proj")
_NUM_TOKENS, _NUM_OUTPUTS = 24, 48


@dataclass(frozen=True)
class RealLinear:
    """x [M, K] bf16 and types [M] int32 with the group's transform; weight [N, K / 8] packed, weight_scale [1, N] and
    bias_table [P, N]."""

    x: Tensor
    types: Tensor
    transform: GroupTransform
    weight: Tensor
    weight_scale: Tensor
    bias_table: Tensor


def real_linear(name: str) -> RealLinear:
    with safe_open(FILE, "pt") as file:
        facts = json.loads(file.metadata()[name])
        found = {
            key.rpartition(".")[2]: file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118  (no dictionary)
            if key.startswith(f"{name}.")
        }
    rest = ("x", "types", "weight", "weight_scale", "bias_table")
    operands = {field: found.pop(field) for field in rest}
    widths, slices = (tuple(facts[field]) for field in ("widths", "slice_of_type"))
    transform = GroupTransform("shift", **found, widths=widths, slice_of_type=slices)
    return RealLinear(transform=transform, **operands)


def main() -> None:
    from evaluation import dllm_calibration_batches, mask_tokens, text_windows
    from small_models import CACHE, MASK_TOKEN, load_masked_diffusion

    import freeact_fx

    skip = (
        "lm_head",
        *(f"*layers.{i}.*" for i in range(30) if f"layers.{i}.mlp" not in str(NAMES)),
    )
    types = TokenTypes.mask_token(MASK_TOKEN)
    config = QuantConfig(plan="shift", token_types=types, skip=(*skip, "*self_attn*"))
    model = load_masked_diffusion(CACHE)
    made = freeact_fx.calibrate(model, dllm_calibration_batches(8), config)
    ids, _ = mask_tokens(
        text_windows("evals", "wiki", 1, 512), 0.3, torch.Generator().manual_seed(0)
    )
    seen: dict[str, Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        return lambda module, args: seen.update({name: args[0][0, :_NUM_TOKENS].bfloat16()})

    for name, module in model.named_modules():
        if name.endswith(NAMES):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(ids)
    of_tokens = types.from_ids(ids)[0, :_NUM_TOKENS]
    if config.sink_index is not None:
        of_tokens[0] = config.sink_index
    tensors: dict[str, Tensor] = {}
    facts: dict[str, str] = {}
    for full, x in seen.items():
        (name,) = (n for n in NAMES if full.endswith(n))
        entry = made.linears[full]
        transform, packed = made.groups[entry.group], entry.packed
        assert packed.bias_table is not None
        operands = transform.tensors() | {
            "x": x,
            "types": of_tokens.to(torch.int32),
            "weight": packed.weight[:_NUM_OUTPUTS],
            "weight_scale": packed.weight_scale[:, :_NUM_OUTPUTS],
            "bias_table": packed.bias_table[:, :_NUM_OUTPUTS],
        }
        tensors |= {f"{name}.{field}": t.clone().contiguous() for field, t in operands.items()}
        facts[name] = json.dumps(
            {"widths": transform.widths, "slice_of_type": transform.slice_of_type}
        )
    assert set(facts) == set(NAMES)
    save_file(tensors, FILE, metadata=facts)


if __name__ == "__main__":
    main()
