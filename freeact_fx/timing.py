"""Wall times: of any calls side by side, and of each kind of group of a report, dense against quantised.

Variants are interleaved, so that whatever else the machine does falls on all of them; the median and the quartiles are
reported, never the best.

Groups are timed in isolation and compiled, on random weights of their shapes: a time depends on shape, plan, dtype and
the number of tokens alone, so groups that agree in these are timed once, and a report that was saved elsewhere will do.
Every call carries what a whole model pays once for each graph (guards, the look-up of weights): some 50 microseconds on
either side, which count where a group takes no longer than that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import QuantConfig
from .convert import FreeActLinear, GroupTransformModule
from .errors import ConfigError
from .reference import branch_codes, pack_int4
from .report import GroupReport, LinearReport, Report
from .token_types import TokenTypes, token_types
from .transform import GroupTransform, PackedLinear, kronecker_shape

# Compiled against eager, relative: sums in another order turn a code on the border between two, and bf16 rounds.
_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of the wall time of one call."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    num_runs: int

    def __str__(self) -> str:
        digits = 1 if self.median_ms >= 10 else 3
        low, middle, high = (
            f"{t:.{digits}f}" for t in (self.lower_ms, self.median_ms, self.upper_ms)
        )
        return f"{middle} ms ({low} to {high})"


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    runs: int = 15,
    warmup: int = 3,
    on_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Wall time of each variant: ``runs`` rounds after ``warmup``, every variant once a round, under no_grad.

    on_round  is called after each round, for a progress bar

    Raises ConfigError for fewer than two runs, which have no quartiles.
    """
    if runs < 2:
        raise ConfigError(f"time_interleaved: runs must be at least 2 for a spread, got {runs}.")
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for round_ in range(warmup + runs):
            for name, call in variants.items():
                _wait_for_device()
                start = time.perf_counter()
                call()
                _wait_for_device()
                if round_ >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
            if on_round is not None:
                on_round()
    timings = {}
    for name, values in times.items():
        lower, median, upper = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, lower, upper, runs)
    return timings


def _wait_for_device() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def num_tokens_of(inputs: Any) -> int:
    """Tokens of a model's call: of the ``input_ids`` [B, T] in a mapping, or of the first tensor [B, T, ...]."""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        values = [inputs["input_ids"]]
    values = [values] if isinstance(values, Tensor) else values
    shape = next((v.shape for v in values if isinstance(v, Tensor) and v.dim() >= 2), (1, 1))
    return int(shape[0] * shape[1])


@dataclass(frozen=True)
class GroupTiming:
    """One kind of group: what it is, which groups are of it, and both times of a call of all its Linears.

    shapes      [N, K] of each Linear
    num_tokens  tokens of the call
    """

    groups: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    plan: str
    precision: str
    num_tokens: int
    dense: Timing
    quantized: Timing

    @property
    def speedup(self) -> float:
        return self.dense.median_ms / self.quantized.median_ms

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": self.speedup}


def time_groups(
    report: Report,
    *,
    num_tokens: int = 256,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    runs: int = 15,
    on_group: Callable[[str, int, int], object] | None = None,
) -> list[GroupTiming]:
    """Compile and time every distinct kind of group of a report, the slowest of all its groups together first.

    device    None: the report's; the CPU for a model that was on the meta device
    dtype     of activations and dense weights; None: that of the dense weights, bf16 for a converted model's
    on_group  is called before each kind with its first group's name, its number and how many kinds there are

    Answers of compiled code are checked against the reference before they are timed. A branch is timed as one that
    all types share. Raises ConfigError for a report without quantised Linears.
    """
    if not report.quantized:
        raise ConfigError("time_groups: no Linear of the report is quantised: nothing to time.")
    if device is None:
        device = str(report.environment.get("device", "cpu"))
        device = "cpu" if device == "meta" else device
    kinds: dict[Any, list[GroupReport]] = {}
    for group in report.groups:
        kinds.setdefault(_kind(report, group), []).append(group)
    timings = []
    for index, groups in enumerate(kinds.values()):
        if on_group is not None:
            on_group(groups[0].name, index, len(kinds))
        timings.append(_time_kind(report, groups, num_tokens, device, dtype, runs))
    return sorted(timings, key=lambda t: -t.dense.median_ms * len(t.groups))


def fill_times(report: Report, timings: Sequence[GroupTiming]) -> None:
    """Write ``time_ms`` and ``dense_time_ms`` of every Linear that was timed: its group's, by its share of outputs."""
    rows = {row.name: row for row in report.linears}
    members = {group.name: group.members for group in report.groups}
    for timing in timings:
        total = sum(num_outputs for num_outputs, _ in timing.shapes)
        for group in timing.groups:
            for name in members[group]:
                row = rows[name]
                share = row.shape[0] / total
                row.time_ms = timing.quantized.median_ms * share
                row.dense_time_ms = timing.dense.median_ms * share


def _kind(report: Report, group: GroupReport) -> tuple[Any, ...]:
    rows = [report[name] for name in group.members]
    structure = (group.plan, group.left, group.right, group.rank, group.widths)
    return (
        *((row.shape, _dtype(row)) for row in rows),
        *structure,
        rows[0].precision,
        rows[0].state == "typed",
        group.measured_error is None,
    )


def _dtype(row: LinearReport) -> torch.dtype:
    is_wide = row.dense_bytes == 4 * row.shape[0] * row.shape[1]
    return torch.float32 if is_wide else torch.bfloat16


class _Together(nn.Module):
    """The Linears of a group, on one activation."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def _time_kind(
    report: Report,
    groups: Sequence[GroupReport],
    num_tokens: int,
    device: str,
    dtype: torch.dtype | None,
    runs: int,
) -> GroupTiming:
    from . import compat

    rows = [report[name] for name in groups[0].members]
    dtype, num_features = dtype or _dtype(rows[0]), rows[0].shape[1]
    config = replace(QuantConfig.from_options(report.config), quantize=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, num_features, generator=generator).to(device, dtype)
    if rows[0].state != "typed":
        config = replace(config, token_types=TokenTypes.single(), sink=None)
    # No graph shows them: they come in with the call, as behind a graph break.
    types = (torch.arange(num_tokens) % config.num_types)[None].to(device)
    dense = _Together(
        [
            nn.Linear(k, n, bias=False, dtype=dtype, device=device)
            for n, k in (r.shape for r in rows)
        ]
    )
    ours = _quantized(groups[0], rows, config, generator).to(device)
    models = {"dense": dense.eval().requires_grad_(False), "quantized": ours.eval()}
    with (
        torch.no_grad(),
        token_types(types) if config.num_types > 1 else nullcontext(),
        compat.traced_apart(models["dense"], "inductor") as compiled_dense,
        compat.traced_apart(models["quantized"], "freeact") as compiled_ours,
    ):
        for got, want in zip(compiled_ours(x), ours(x), strict=True):
            difference = float((got.float() - want.float()).norm() / want.float().norm())
            if not difference < _TOLERANCE:
                raise RuntimeError(
                    f"{groups[0].name}: compiled code differs from the reference by {difference:.3g} (at most "
                    f"{_TOLERANCE} is rounding). Please report this with the output of: freeact doctor"
                )
        timings = time_interleaved(
            {"dense": lambda: compiled_dense(x), "quantized": lambda: compiled_ours(x)}, runs=runs
        )
    return GroupTiming(
        tuple(group.name for group in groups),
        tuple(row.shape for row in rows),
        groups[0].plan,
        rows[0].precision,
        num_tokens,
        timings["dense"],
        timings["quantized"],
    )


def _quantized(
    group: GroupReport,
    rows: Sequence[LinearReport],
    config: QuantConfig,
    generator: torch.Generator,
) -> _Together:
    """A group of the same structure with random operands."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_features, num_rows = rows[0].shape[1], config.num_types + 1
    d1, d2 = (group.left[0], group.right[0]) if group.left else _factors(num_features)
    widths = group.widths or (d1,)
    num_slices, is_shifted = len(widths), group.plan not in ("", "single")
    num_codes = sum(widths) * d2
    transform = GroupTransform(
        plan=group.plan,
        left=normal(d1, sum(widths)) / d1**0.5,
        right=normal(num_slices, d2, d2) / d2**0.5,
        clip=torch.full((num_rows,), 0.8),
        shift=normal(num_rows, num_features) if is_shifted else None,
        channel_scale=None if group.measured_error is None else torch.ones(num_features),
        lowrank=branch_codes(normal(num_codes, group.rank)) if group.rank else None,
        widths=tuple(widths),
        slice_of_type=(*range(num_slices), *([0] * num_rows))[:num_rows],
    )
    module = GroupTransformModule(transform)
    linears = []
    for num_outputs, _ in (row.shape for row in rows):
        codes = torch.randint(-7, 8, (num_outputs, num_codes), generator=generator)
        branch = {
            "branch_weight": normal(group.rank, num_outputs)
            .mul(40)
            .clamp(-127, 127)
            .to(torch.int8),
            "branch_scale": torch.full((group.rank,), 1e-3),
        }
        packed = PackedLinear(
            pack_int4(codes.to(torch.int8)),
            torch.full((num_slices, num_outputs), 1e-2),
            normal(num_rows, num_outputs) if is_shifted else None,
            **(branch if group.rank else {}),
        )
        linears.append(FreeActLinear(module, packed, config, (0.0, 0.0, 0.0)))
    return _Together(linears)


def _factors(num_features: int) -> tuple[int, int]:
    shape = kronecker_shape(num_features)
    assert shape is not None, "a Linear without one is not quantised"
    return shape
