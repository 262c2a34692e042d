"""Compiled models and checkpoints on a GPU, beside the CPU; run by hand: ``benchmarks/gpu_tests.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gated_block import Block
from torch import nn

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="for chips with fp8 tensor cores")
GPU = torch.device("cuda")
ops = torch.ops.freeact


@pytest.mark.filterwarnings(
    "ignore:The CUDA Graph is empty", "ignore:TensorFloat32 tensor cores"
)  # torch's own: of the pool of its graphs, and of fp32 products, which branches have
@pytest.mark.parametrize("plan", ["shift", "branch", "duplicate"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("num_tokens", [1, 16, 512])
@pytest.mark.parametrize("bits", [4, pytest.param("e4m3", marks=needs_fp8)])
def test_compiled_model_agrees_with_the_cpu(
    num_tokens: int, mode: str | None, plan: str, bits: Any
) -> None:
    # Branches have kernels at larger widths.
    sizes = (4096, 8192) if plan == "branch" and num_tokens < 512 else (512, 1024)
    config = QuantConfig(plan=plan, token_types=TokenTypes.mask_token(60), activation_bits=bits)
    ids = torch.randint(0, 64, (2, num_tokens))
    with torch.no_grad():
        model = Block(*sizes).eval()
        freeact_fx.convert(model, config)
        with freeact_fx.token_types(config.token_types.from_ids(ids)):
            want = model(ids)
        options = {"strict": True} | ({} if mode is None else {"mode": mode})
        fast = torch.compile(model.to(GPU, torch.bfloat16), backend="freeact", options=options)
        for _ in range(3):  # the third replays the CUDA graph
            got = fast(ids.to(GPU)).float().cpu()
    assert torch.linalg.norm(got - want) < 0.05 * torch.linalg.norm(want)


@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "branch"])
def test_a_checkpoint_made_on_the_cpu(plan: str, tmp_path: Path) -> None:
    """Loaded on the GPU it is the same codes of weights, bit for bit, and makes the same codes of activations.

    The transform's own rounding, in 16 bits, decides where a value is about half-way between two codes: that may be at
    most 2 % of them, each by one.
    """
    config = QuantConfig(plan=plan, token_types=TokenTypes.mask_token(60), memory_budget=1.5)
    model = Block(512, 1024).eval()
    batches = [torch.randint(0, 64, (4, 128)) for _ in range(2)]
    made = freeact_fx.calibrate(model, batches, config, progress=False)
    made.save(tmp_path)
    loaded = freeact_fx.Checkpoint.load(tmp_path)
    assert loaded == made
    freeact_fx.convert(model.to(GPU), loaded)
    for name, entry in made.linears.items():
        assert torch.equal(model.get_buffer(f"{name}.weight_packed").cpu(), entry.packed.weight)
    x = torch.randn(300, 512).bfloat16()
    types = torch.randint(-1, config.num_types, (300,), dtype=torch.int32)
    t = loaded.groups["gate"]
    rows = (t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank)
    static = (t.widths, t.slice_of_type, 0)
    codes, scale, _ = reference.transform_quantize(
        x.float(), types, *rows, *static, t.own_rank, config.qmax
    )
    operands = [None if o is None else o.to(GPU) for o in rows]
    lists = (list(t.widths), list(t.slice_of_type), 0)
    if t.lowrank is None:
        got = ops.transform_quantize(x.to(GPU), types.to(GPU), *operands[:-1], *lists, config.qmax)
    else:
        got = ops.transform_quantize_branch(
            x.to(GPU), types.to(GPU), *operands, *lists, t.own_rank, config.qmax
        )
    difference = (got[0].cpu().int() - codes.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference != 0).float().mean()) <= 0.02
    assert torch.allclose(got[1].cpu(), scale, rtol=0.01)


def test_no_types_are_filled_once() -> None:
    """Where nobody says which types there are, no kernel of a later call writes so."""
    types = TokenTypes.explicit("plain", "marked")
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    model = model.to(GPU, torch.bfloat16)
    options = {"token_types": types, "strict": True}
    fast = torch.compile(model, backend="freeact", options=options)
    x, given = torch.randn(2, 8, 512, device=GPU).bfloat16(), torch.ones(2, 8, device=GPU).int()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="are not known"):
            want = fast(x)
        with freeact_fx.token_types(given):
            fast(x)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            got = fast(x)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert names
    assert not any("FillFunctor" in name for name in names)
    assert torch.equal(got, want)
