"""What a row of the GPU table says: times and kernels of its columns, the ratio, the rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_peers import Variant
from gpu_timing import Bench, nvidia_smi

OURS = "W4A4"


def measured(
    bench: Bench,
    variants: Mapping[str, Variant],
    *,
    copies: int = 1,
    hide_launches: bool = True,
    steps: int = 1,
) -> dict[str, Any]:
    """Times of all columns, the host's part and the kernels of each, or why there are none.

    steps  with more than one the time is that of a step among so many, issued without waiting for any;
           ``alone_ms`` is then that of a step that is waited for
    """
    calls = {name: v.call for name, v in variants.items() if v.call is not None}
    timings = bench.time(calls, copies=copies, hide_launches=hide_launches)
    alone = timings if steps > 1 else {}
    if alone:
        loops = {name: bench.loop(call, steps) for name, call in calls.items()}
        timings = bench.time(loops, copies=copies * steps, hide_launches=hide_launches)
    clocks = nvidia_smi(("clocks.sm", "clocks.mem", "power.draw")) if bench.on_gpu else {}
    columns = {}
    for name, variant in variants.items():
        fields = {
            "compile_s": variant.compile_s,
            "error_to_bf16": variant.error_to_bf16,
            "error": variant.error,
        }
        columns[name] = {n: value for n, value in fields.items() if value is not None}
        if name in timings:
            columns[name] |= vars(timings[name]) | {"host_ms": bench.host_ms(calls[name])}
            columns[name] |= bench.profiled(calls[name])
        if name in alone:
            columns[name]["alone_ms"] = alone[name].median_ms
    return {"variants": columns, "copies": copies, "steps": steps, "clocks_after": clocks}


def median_of(fields: Mapping[str, Any], name: str) -> float:
    """Median of a column in ms; raises RuntimeError with its error if it has none."""
    column = fields["variants"][name]
    if "median_ms" not in column:
        raise RuntimeError(f"{name}: {column['error']}")
    return float(column["median_ms"])


def speedup(fields: Mapping[str, Any], against: Sequence[str]) -> dict[str, Any]:
    """How many times as fast as the fastest of some peers, and than each."""
    ours = median_of(fields, OURS)
    there = {n: c["median_ms"] for n, c in fields["variants"].items() if "median_ms" in c}
    # A peer that the ratio is against and that failed is no reason for a better ratio.
    fastest = min((median_of(fields, name), name) for name in against)[1]
    return {
        "value": there[fastest] / ours,
        "against": fastest,
        "speedup_over": {n: round(t / ours, 4) for n, t in there.items() if n != OURS},
    }


def achieved(fields: Mapping[str, Any], ops: float, num_bytes: int) -> dict[str, Any]:
    """Our rates, for the roofline; operations of the product or transform, least bytes of all that was timed."""
    seconds = median_of(fields, OURS) / 1e3
    return {
        "ops": ops,
        "bytes": num_bytes,
        "achieved": {"tops": ops / seconds / 1e12, "gbs": num_bytes / seconds / 1e9},
    }
