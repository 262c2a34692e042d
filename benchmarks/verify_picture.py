"""What ``freeact_fx.verify`` shows of a real model, healthy and with a fault, and what it costs.

    python benchmarks/verify_picture.py [--checkpoint FOLDER] [--out docs/pictures]

The demo's masked-diffusion model on 512 tokens, with its calibrated checkpoint (made in minutes if it is not in the
cache). The fault: one transform is changed after its weights were packed. Costs are processor times, relative to one
forward of the float model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from calibrated import dllm_checkpoint
from evaluation import mask_tokens, text_windows
from measure import REPOSITORY
from small_models import CACHE, load_masked_diffusion

import freeact_fx
from freeact_fx import Checkpoint, Verification

BROKEN = "decoder.model.layers.11.mlp.gate_proj"
Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What a call gives, and its processor time in seconds."""
    start = time.process_time()
    return run(), time.process_time() - start


def with_changed_transform(checkpoint: Checkpoint, group: str) -> Checkpoint:
    """A checkpoint in which a group's left factor is another than its weights were packed for."""
    left = checkpoint.groups[group].left
    noise = torch.randn(left.shape, generator=torch.Generator().manual_seed(0))
    changed = left + 0.3 * left.square().mean().sqrt() * noise
    groups = checkpoint.groups | {group: replace(checkpoint.groups[group], left=changed)}
    return replace(checkpoint, groups=groups)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--checkpoint", type=Path, help="a folder; made by default")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = load_masked_diffusion(args.cache)
    stored = args.checkpoint
    checkpoint = Checkpoint.load(stored) if stored else dllm_checkpoint(model, args.cache)
    ids, _ = mask_tokens(text_windows("evals", "wiki", 1, 512), 0.3, torch.Generator())
    with torch.no_grad():
        model(ids)
        forward_s = min(timed(lambda: model(ids))[1] for _ in range(3))

    def verify(given: Checkpoint) -> Verification:
        # Inductor would take longer than all the rest.
        return freeact_fx.verify(model, ids, checkpoint=given, options={"bypass": ("lowering",)})

    for name, given in (
        ("verify-ok", checkpoint),
        ("verify-fault", with_changed_transform(checkpoint, BROKEN)),
    ):
        result, seconds = timed(lambda given=given: verify(given))  # type: ignore[misc]
        print(
            f"{result}\n\n{seconds:.0f} s, {seconds / forward_s:.0f} forwards of {forward_s:.2f} s\n"
        )
        result.plot(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
