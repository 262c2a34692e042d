"""Which tile of the product is fastest on this GPU? Makes the defaults that are shipped for it.

    python benchmarks/tune_tiles.py                                into this machine's cache
    python benchmarks/tune_tiles.py --out codegen/tuned            ... and as a file to ship
    python benchmarks/tune_tiles.py --shapes 12288x4096 4096x12288 --tokens 16 256

Shapes are N x K of what is one launch; the default ones are those of LLaDA-8B and Qwen2.5-VL-7B, with q, k and v, and
gate and up, together. What is known is not measured again: delete the cache file that is printed to start anew.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measure import environment

from freeact_fx.codegen import tuning
from freeact_fx.codegen.engine_ops import is_hopper
from freeact_fx.codegen.tune_linear import tune_linear

SHAPES = (
    "12288x4096",
    "4096x4096",
    "24576x4096",
    "4096x12288",
    "4608x3584",
    "3584x3584",
    "37888x3584",
    "3584x18944",
)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, help="folder for a file of all that is known here")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no problem after that")
    args = parser.parse_args()
    device = torch.device("cuda")
    if not is_hopper(device):
        parser.error("the kernel with tiles to choose from is for Hopper; this GPU is another")
    start, gpu = time.perf_counter(), tuning.gpu_name(device)
    for shape in args.shapes:
        num_outputs, num_codes = map(int, shape.split("x"))
        for num_tokens in args.tokens:
            if time.perf_counter() - start < args.seconds:
                tile = tune_linear(num_tokens, num_outputs, [num_codes], torch.int8, device)
                print(f"{num_tokens} x {shape}: {tile}", flush=True)
    print(f"{tuning.cache_file(gpu)} in {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        facts = environment()
        file = tuning.ship(gpu, args.out, {n: facts[n] for n in ("torch", "commit", "date")})
        print(f"shipped: {file}")


if __name__ == "__main__":
    main()
