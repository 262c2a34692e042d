"""Without rounding, is a real model under its fitted transforms still the float model?

    python benchmarks/exactness.py --check      appends to benchmarks/results/exactness.jsonl

The masked-diffusion model in fp32, three of its 30 layers (or all with --layer-step 1): each plan is calibrated, saved,
loaded, and compiled on the dense model with `quantize=False`. The relative error is that of the logits of a window with
a third of its tokens masked, and must be below 1e-4 for every plan but `paper`, which drops what its slices lack. With
rounding on, the same transforms leave the error in the last column, so that it is seen that they were there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy_models import MODELS, Sizes
from evaluation import mask_tokens, text_windows
from measure import RESULTS, append_result, relative_error
from presentation import table
from small_models import CACHE

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig

PLANS = ("single", "shift", "duplicate", "branch")
BOUND = 1e-4


@torch.no_grad()
def run(model: torch.nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    options = {"compiler": "eager", **options}
    logits = torch.compile(model, backend="freeact", options=options)(ids)
    return logits[..., logits[0, 0].isfinite()]  # the mask token is never predicted


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plans", nargs="+", choices=PLANS, default=PLANS)
    add("--windows", type=int, default=4, help="of 512 tokens, to calibrate on")
    add("--layer-step", type=int, default=10)
    add("--cache", type=Path, default=CACHE, help="of the base model")
    add("--out", type=Path, default=RESULTS / "exactness.jsonl")
    add("--check", action="store_true", help=f"exit status 1 if an error is above {BOUND}")
    args = parser.parse_args()
    spec = MODELS["dllm"]
    sizes = Sizes(calibration_windows=args.windows, layer_step=args.layer_step)
    model = spec.load(args.cache)
    batches = spec.calibration(args.cache, sizes, 0)
    window = text_windows("evals", "wiki", 1, 512)
    ids, _ = mask_tokens(window, 0.3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids)
    want = want[..., want[0, 0].isfinite()]
    rows: list[list[object]] = [["plan", "Linears", "error without rounding", "with"]]
    errors = []
    for plan in args.plans:
        config = QuantConfig(
            token_types=spec.token_types, plan=plan, skip=("lm_head", *sizes.skipped_layers)
        )
        with tempfile.TemporaryDirectory() as folder:
            freeact_fx.calibrate(model, batches, config).save(folder)
            checkpoint = Checkpoint.load(folder)
        exact = relative_error(run(model, ids, checkpoint=checkpoint, quantize=False), want)
        rounded = relative_error(run(model, ids, checkpoint=checkpoint), want)
        errors.append(exact)
        append_result(
            args.out,
            plan=plan,
            num_linears=len(checkpoint.linears),
            relative_error=exact,
            relative_error_rounded=rounded,
        )
        rows.append([plan, len(checkpoint.linears), f"{exact:.1e}", f"{rounded:.1e}"])
        print(rows[-1], flush=True)
    print(table(rows))
    return int(args.check and max(errors) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
