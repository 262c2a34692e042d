"""How fast is a denoising step of the small masked-diffusion model in W4A4 beside float?

    python benchmarks/cpu_dllm_step.py [--check] [--write]

One step of SmolLM2-135M's shapes over 512 tokens: the whole forward pass with its head (which
stays in float), softmax at the masked positions, and the choice of what to fill. Columns:
`torch.compile` in fp32; ours data-free and calibrated with types. `--check` fails under 1.5 times
fp32.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from calibrated import DLLM_CONFIG, dllm_checkpoint
from evaluation import denoise_step, mask_tokens, text_windows
from measure import RESULTS, append_result, environment, time_interleaved
from presentation import working
from small_models import CACHE, MASK_TOKEN, load_masked_diffusion
from torch import Tensor

import freeact_fx

REQUIRED_SPEEDUP = 1.5
LENGTH = 512


def types_of(ids: Tensor) -> Tensor:
    """What the pass has to find by itself: unmasked 0, masked 1, first 2."""
    types = (ids == MASK_TOKEN).long()
    types[:, 0] = DLLM_CONFIG.sink_index
    return types


def same_token(logits: Tensor, expected: Tensor) -> float:
    """Share of positions at which the most probable token is the expected one."""
    return (logits.argmax(-1) == expected).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the speed-up is too small")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    facts = environment()
    print(f"{facts['cpu']}, {facts['num_threads']} threads, torch {facts['torch']}")

    dense = load_masked_diffusion(args.cache)
    data_free, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    freeact_fx.convert(data_free, DLLM_CONFIG)
    freeact_fx.convert(calibrated, dllm_checkpoint(dense, args.cache))
    ids = text_windows("evals", "wiki", 1, LENGTH)
    state, _ = mask_tokens(ids, 0.3, torch.Generator().manual_seed(0))
    models = {
        "fp32": torch.compile(dense, dynamic=False),
        "W4A4 data-free": torch.compile(data_free, backend="freeact", dynamic=False),
        "W4A4 calibrated": torch.compile(calibrated, backend="freeact", dynamic=False),
    }
    with torch.no_grad():
        for name, model in models.items():
            with working(f"compiling {name}"):
                model(state)
        # Sums in another order turn a code here and there, and after a few layers compiled and eager
        # are two draws of the same rounding noise. So they are held against float, not each other.
        expected = models["fp32"](state).argmax(-1)
        with freeact_fx.token_types(types_of(state)):
            reference = same_token(calibrated(state), expected)
        compiled = same_token(models["W4A4 calibrated"](state), expected)
    print(f"same token as float: {compiled:.3f} compiled, {reference:.3f} in eager (the reference)")
    assert abs(compiled - reference) < 0.05, "the compiled model differs from the reference"

    timings = time_interleaved(
        {name: lambda m=model: denoise_step(m, state, 4) for name, model in models.items()},
        "denoising step",
        args.runs,
    )
    speedup = {n: timings["fp32"].median_ms / t.median_ms for n, t in timings.items()}
    for name, timing in timings.items():
        print(f"{name:16} {timing}, {speedup[name]:.2f}x")
    measured = min(s for n, s in speedup.items() if n != "fp32")
    print(f"required of W4A4: {REQUIRED_SPEEDUP}x, measured {measured:.2f}x")
    if args.write:
        append_result(
            RESULTS / "cpu_dllm_step.jsonl",
            num_tokens=LENGTH,
            timings={n: vars(t) for n, t in timings.items()},
            speedup_over_fp32=speedup,
            same_token_as_float={"compiled": compiled, "reference": reference},
        )
    if args.check and measured < REQUIRED_SPEEDUP:
        sys.exit(1)


if __name__ == "__main__":
    main()
