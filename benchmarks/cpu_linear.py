"""How fast is one W4A4 linear, transform and quantisation included, beside fp32, on the CPU?

    python benchmarks/cpu_linear.py [--check] [--write]

Columns: `torch.compile` in fp32 and bf16; ours with one token type and with two (plan "shift");
and as the ceiling the bare integer product of the same shape. The compiled answer is checked
against the eager one, which is the package's reference, before anything is timed. `--check` fails
under 2.5 times fp32 at M=256, N=K=2048.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from measure import RESULTS, append_result, environment, relative_error, time_interleaved
from presentation import table
from torch import Tensor, nn

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes

REQUIRED_SPEEDUP = 2.5
CHECKED_SHAPE = (256, 2048, 2048)
SHAPES = (  # M tokens, N out features, K in features
    CHECKED_SHAPE,
    (1, 2048, 2048),
    (32, 2048, 2048),
    (1024, 2048, 2048),
    (256, 4096, 4096),
    (512, 576, 576),  # SmolLM2-135M: q or o; gate or up; down
    (512, 1536, 576),
    (512, 576, 1536),
)

ONE_TYPE = QuantConfig(token_types=TokenTypes.single(), sink=None)
TWO_TYPES = QuantConfig(token_types=TokenTypes.explicit("text", "vision"), sink=None, plan="shift")


class OneLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def variants_of(
    shape: tuple[int, int, int],
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
    """Calls to time by column, and the error of each of ours against float. Answers are checked."""
    num_tokens, out_features, in_features = shape
    torch.manual_seed(0)
    dense = OneLinear(in_features, out_features).eval().requires_grad_(False)
    x = torch.randn(1, num_tokens, in_features)
    types = (torch.arange(num_tokens) % 2)[None]  # [1, M]

    one_type, two_types = copy.deepcopy(dense), copy.deepcopy(dense)
    freeact_fx.convert(one_type, ONE_TYPE)
    with freeact_fx.token_types((torch.arange(256) % 2)[None]):
        batches = [torch.randn(1, 256, in_features)]
        checkpoint = freeact_fx.calibrate(dense, batches, TWO_TYPES, progress=False)
    freeact_fx.convert(two_types, checkpoint)

    def with_types(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with freeact_fx.token_types(types):
                return model(x)

        return call

    backend = {"backend": "freeact", "dynamic": False}
    ours = {
        "W4A4, one type": (one_type, torch.compile(one_type, **backend)),
        "W4A4, two types": (with_types(two_types), with_types(torch.compile(two_types, **backend))),
    }
    expected, errors = dense(x), {}
    for name, (eager, compiled) in ours.items():
        reference = eager(x)
        # Sums in another order: a code on the border between two may round the other way.
        difference = relative_error(compiled(x), reference)
        assert difference < 1e-2, f"{name}, {shape}: compiled differs from reference: {difference}"
        errors[name] = relative_error(reference, expected)
        assert errors[name] < 0.3, f"{name}, {shape}: far from float: {errors[name]}"

    half, x_half = copy.deepcopy(dense).bfloat16(), x.bfloat16()
    compiled_fp32 = torch.compile(dense, dynamic=False)
    compiled_bf16 = torch.compile(half, dynamic=False)
    codes = torch.randint(-7, 8, (num_tokens, in_features), dtype=torch.int8)
    packed = one_type.linear.weight_packed
    calls = {
        "fp32": lambda: compiled_fp32(x),
        "bf16": lambda: compiled_bf16(x_half),
        **{name: lambda c=compiled: c(x) for name, (_, compiled) in ours.items()},
        "product alone": lambda: torch.ops.freeact.int_mm(codes, packed),
    }
    return calls, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the speed-up is too small")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/")
    parser.add_argument("--runs", type=int, default=31)
    args = parser.parse_args()
    facts = environment()
    print(f"{facts['cpu']}, {facts['num_threads']} threads, torch {facts['torch']}; median ms")

    rows, checked_speedup = [], 0.0
    for shape in SHAPES[: 1 if args.check else None]:
        torch.compiler.reset()  # every shape counts as the first: static, and no limit is reached
        calls, errors = variants_of(shape)
        timings = time_interleaved(calls, str(shape), args.runs)
        speedup = {n: timings["fp32"].median_ms / t.median_ms for n, t in timings.items()}
        if shape == CHECKED_SHAPE:
            checked_speedup = min(s for n, s in speedup.items() if n.startswith("W4A4"))
        if not rows:
            rows.append(["M, N, K", *timings])
        cells = [f"{t.median_ms:.2f} ({speedup[n]:.2f}x)" for n, t in timings.items()]
        rows.append([", ".join(map(str, shape)), *cells])
        if args.write:
            append_result(
                RESULTS / "cpu_linear.jsonl",
                shape=dict(zip("MNK", shape, strict=True)),
                timings={n: vars(t) for n, t in timings.items()},
                speedup_over_fp32=speedup,
                relative_error_to_float=errors,
            )
    print(table(rows))
    print(
        f"required of W4A4 at {CHECKED_SHAPE}: {REQUIRED_SPEEDUP}x, measured {checked_speedup:.2f}x"
    )
    if args.check and checked_speedup < REQUIRED_SPEEDUP:
        sys.exit(1)


if __name__ == "__main__":
    main()
