"""How long does calibrating an 8B masked-diffusion model take on a GPU, and how much memory? From one of its layers.

    python benchmarks/calibrate_8b_layer.py --out FILE
    python benchmarks/calibrate_8b_layer.py --device cpu --shapes tiny --out /tmp/rehearsal.json   # says nothing

Calibrates a decoder with one layer of LLaDA-8B's shapes (hidden 4096, 32 heads, MLP 12288) and random weights on
64 windows of 512 tokens with mask ratios drawn uniformly, and writes seconds and peak bytes, measured, and those of
all 32 layers, extrapolated, with what that assumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_decoder import LLADA_8B, Decoder, DecoderShape, random_decoder
from gpu_timing import Bench, environment, write_json
from measure import RESULTS, peak_memory_bytes
from torch import Tensor

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.token_moments import TokenMoments

_NUM_LAYERS = LLADA_8B.num_layers
_DEVICE_BYTES = 80 * 10**9  # of the GPU that is asked about
# Embedding and head in bf16. The measured decoder has next to none.
_VOCABULARY_BYTES = 2 * 2 * LLADA_8B.vocabulary * LLADA_8B.hidden
ASSUMES = (
    "Every layer costs what this one did: collecting its moments, fitting its groups.",
    "Each pass over the windows runs the whole dense model once; a pass of one layer is one 32nd of it. Embedding and "
    "head are left out: calibration needs no logits of a whole vocabulary.",
    "Statistics of all groups do not fit into half of the memory that an 80 GB GPU has left beside bf16 weights, so "
    "groups take turns: passes = all statistics / that half, rounded up. calibrate() does the same.",
    "Peak: weights, the statistics of one pass, and what calibrating this layer took above its weights and statistics.",
    "Weights are those of all layers, and embedding and head in bf16, 2.1 GB, which the GPU holds but nothing is "
    "calibrated for.",
    "Random weights and tokens: times do not depend on values, errors would.",
)


@dataclass(frozen=True)
class Work:
    """What is calibrated: windows of a length, on a decoder of one layer."""

    shape: DecoderShape
    num_windows: int
    length: int

    @staticmethod
    def of(tiny: bool) -> Work:
        shape = LLADA_8B.tiny() if tiny else LLADA_8B
        # A small vocabulary: the layer does not see it.
        shape = dataclasses.replace(shape, num_layers=1, vocabulary=1024, special_id=1023)
        return Work(shape, 4 if tiny else 64, 32 if tiny else 512)

    def windows(self, device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            0, self.shape.special_id, (self.num_windows, self.length), generator=generator
        )
        ratio = torch.rand(self.num_windows, 1, generator=generator)
        masked = torch.rand(ids.shape, generator=generator) < ratio
        return list(ids.masked_fill(masked, self.shape.special_id).to(device).split(1))

    def statistics_bytes(self, config: QuantConfig) -> int:
        """Of the layer's four groups."""
        widths = (self.shape.hidden, self.shape.hidden, self.shape.hidden, self.shape.mlp)
        sizes = (config.num_types, config.sample_tokens)
        return sum(TokenMoments.bytes_needed(k, *sizes) for k in widths)


def calibrate_layer(work: Work, device: torch.device) -> dict[str, Any]:
    """Seconds and bytes of one layer, and of the forward passes in them."""
    model = random_decoder(work.shape, device)
    windows = work.windows(device)
    config = QuantConfig(token_types=TokenTypes.mask_token(work.shape.special_id), skip=("head",))
    forward_s = _forward_seconds(model, windows)
    weights = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    before = _allocated(device)
    _restart_peak(device)
    start = time.perf_counter()
    checkpoint = freeact_fx.calibrate(model, windows, config, progress=True)
    _wait(device)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "forward_seconds": forward_s,
        "weight_bytes": weights,
        "statistics_bytes": work.statistics_bytes(config),
        "peak_bytes": _peak(device),
        "peak_bytes_above_weights": _peak(device) - before,
        "checkpoint_bytes": checkpoint.num_bytes,
        "plans": {name: group.plan for name, group in checkpoint.groups.items()},
        "config": config.to_dict(),
        "shape": vars(work.shape),
        "num_windows": work.num_windows,
        "length": work.length,
    }


def extrapolate(measured: dict[str, Any], num_layers: int = _NUM_LAYERS) -> dict[str, Any]:
    """All layers, by ``ASSUMES``."""
    weights = num_layers * measured["weight_bytes"] + _VOCABULARY_BYTES
    for_statistics = max(_DEVICE_BYTES - weights, 0) / 2
    statistics = num_layers * measured["statistics_bytes"]
    per_layer = measured["statistics_bytes"]
    layers_per_pass = max(1, min(num_layers, int(for_statistics // per_layer)))
    passes = math.ceil(num_layers / layers_per_pass)
    more_passes_s = (passes - 1) * num_layers * measured["forward_seconds"]
    fitting = max(0, measured["peak_bytes_above_weights"] - per_layer)
    return {
        "num_layers": num_layers,
        "passes": passes,
        "layers_per_pass": layers_per_pass,
        "seconds": num_layers * measured["seconds"] + more_passes_s,
        "statistics_bytes": statistics,
        "peak_bytes": weights + layers_per_pass * per_layer + fitting,
        "checkpoint_bytes": num_layers * measured["checkpoint_bytes"],
        "assumes": list(ASSUMES),
    }


@torch.no_grad()
def _forward_seconds(model: Decoder, windows: Sequence[Tensor]) -> float:
    """Of one pass over the windows, after a first one that loads kernels."""
    device = windows[0].device
    model(windows[0])
    _wait(device)
    start = time.perf_counter()
    for window in windows:
        model(window)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _peak(device)


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """On the GPU allocated by torch; on the CPU of the whole process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=("layer", "tiny"), default="layer")
    parser.add_argument("--commit", help="of this copy of the sources, if git is not there")
    args = parser.parse_args(arguments)
    rehearsal = (args.device, args.shapes) != ("cuda", "layer")
    if rehearsal and RESULTS in args.out.resolve().parents:
        print(
            f"calibrate_8b_layer: --out {args.out}: a rehearsal is not a result.", file=sys.stderr
        )
        return 2
    device = torch.device(args.device)
    torch.manual_seed(0)
    facts = environment(Bench(device), rehearsal=rehearsal, commit=args.commit)
    measured = calibrate_layer(Work.of(args.shapes == "tiny"), device)
    result = {"environment": facts, "one_layer": measured, "all_layers": extrapolate(measured)}
    write_json(args.out, result)
    shown = {n: {k: v for k, v in result[n].items() if k.endswith(("seconds", "bytes", "passes"))}
             for n in ("one_layer", "all_layers")}  # fmt: skip
    print(json.dumps(shown, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
