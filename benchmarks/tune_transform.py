"""How many registers should a program of Hopper's transform have, and how far ahead should it be?

    python benchmarks/tune_transform.py
    python benchmarks/tune_transform.py --tokens 8192 --features 3584 4096 --before nothing RMSNorm

Tiles (``HopperTransformTile``) beside each other and a copy, in one run; the chosen one is marked. Two types, mixed, as
in the table's rows of the transform alone; ``4096/2`` is a transform of two slices. Results of all tiles are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import torch
from gpu_layers import SLICED, TWO_TYPES, typed_transform
from gpu_operators import NOTHING, RMS_NORM, SILU_MUL
from gpu_timing import Bench
from torch import Tensor

from freeact_fx.codegen.kernels.hopper_transform_quantize import hopper_transform_quantize
from freeact_fx.codegen.prologue import Prologue
from freeact_fx.codegen.tiles import HopperTransformTile, hopper_transform_tile

_COPY_BYTES = 1 << 30
_REGISTERS = 65536
_PER_WARP = 8  # registers of a thread come in groups of


def candidates(chosen: HopperTransformTile) -> Iterator[HopperTransformTile]:
    """The chosen tile; one program more and one less, with the registers that they leave; each with tokens on their way
    to registers, to shared memory, or prepared ahead."""
    yield chosen
    threads = 32 * chosen.num_warps
    for programs in range(max(1, chosen.per_multiprocessor - 1), chosen.per_multiprocessor + 2):
        registers = min(255, _REGISTERS // (programs * threads) // _PER_WARP * _PER_WARP)
        tile = replace(chosen, registers=registers, per_multiprocessor=programs, ahead=False)
        in_shared = range(chosen.tokens_ahead + 2) if chosen.tokens_ahead else (0,)
        for other in (
            *(replace(tile, tokens_ahead=number) for number in in_shared),
            replace(tile, ahead=True, tokens_ahead=0),
        ):
            if other != chosen:
                yield other


@torch.no_grad()
def measure(bench: Bench, num_tokens: int, features: str, before: str) -> None:
    num_features, _, slices = features.partition("/")
    d = int(num_features)
    config = SLICED if slices else TWO_TYPES
    transform = typed_transform(d, config, bench.device)
    d1, d2 = transform.left.shape[0], transform.right.shape[-1]
    num_inputs = 2 if before == SILU_MUL else 1
    num_bytes = num_tokens * (2 * num_inputs * d + sum(transform.widths) * d2 + 8)
    copies = bench.copies(num_bytes)
    tokens = torch.randn(
        (copies, num_inputs, num_tokens, d), device=bench.device, dtype=torch.bfloat16
    )
    weight = torch.rand(d, device=bench.device).bfloat16() + 0.5
    types = torch.randint(0, 2, (num_tokens,), device=bench.device, dtype=torch.int32)
    operands = (transform.shift, transform.channel_scale, transform.left, transform.right)
    static = (transform.clip, transform.widths, transform.slice_of_type, 0, 7)

    def call(x: Tensor, tile: HopperTransformTile) -> tuple[Tensor, Tensor]:
        prologue = Prologue()
        if before == RMS_NORM:
            prologue = Prologue("rms", weight=weight, eps=1e-6)
        elif before == SILU_MUL:
            prologue = Prologue("silu", other=x[1])
        return hopper_transform_quantize(x[0], types, *operands, *static, prologue, tile)

    kind = {NOTHING: "none", RMS_NORM: "rms", SILU_MUL: "silu"}[before]
    chosen = hopper_transform_tile(d1, transform.widths, d2, kind)
    assert chosen is not None
    source = torch.randint(0, 255, (_COPY_BYTES // 2,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    first = call(tokens[0], chosen)
    with ThreadPoolExecutor() as pool:  # compiled side by side
        wait([pool.submit(call, tokens[0], tile) for tile in candidates(chosen)])
    for tile in candidates(chosen):
        name = f"{tile.registers:3} registers x {tile.per_multiprocessor}"
        name += f" {tile.tokens_ahead} in shared" if tile.tokens_ahead else ""
        name += (" ahead" if tile.ahead else "") + (" (chosen)" if tile == chosen else "")
        try:
            same = all(map(torch.equal, call(tokens[0], tile), first))
        except Exception as error:  # more shared memory than there is
            print(f"  {name}: {str(error)[:80]}")
            continue
        if not same:
            print(f"  {name}: OTHER CODES")
        calls[name] = lambda tile=tile: [call(x, tile) for x in tokens]
    timings = bench.time(calls)
    floor_ms = timings.pop("copy").median_ms * num_bytes / _COPY_BYTES
    print(f"{features} ({d1} x {d2}), {before}, M = {num_tokens}: copy {floor_ms * 1000:.1f} us")
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        ms = timing.median_ms / copies
        print(f"  {name:32} {ms * 1000:7.1f} us  {floor_ms / ms:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    features = ["3584", "4096", "4096/2", "8192", "11008", "12288", "14336", "18944"]
    parser.add_argument("--features", nargs="+", default=features)
    parser.add_argument("--before", nargs="+", choices=[NOTHING, RMS_NORM, SILU_MUL])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape")
    args = parser.parse_args()
    bench = Bench(torch.device("cuda"), seconds=args.seconds)
    for features in args.features:
        wide = int(features.partition("/")[0]) > 8192
        for before in args.before or (NOTHING, SILU_MUL if wide else RMS_NORM):
            measure(bench, args.tokens, features, before)


if __name__ == "__main__":
    main()
