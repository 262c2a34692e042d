"""Measure which tile a Linear is fastest with on this GPU: for ``mode="max-autotune"``, and for shipped defaults."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from freeact_fx.config import QuantConfig
from freeact_fx.reference import pack_int4
from freeact_fx.transform import kronecker_shape, orthogonal_transform

from .engine_ops import E4M3, is_hopper
from .prologue_ops import engine_norm_transform_quantize
from .tiles import PROMOTED, TileConfig, hopper_tiles, in_launches, predicted_us
from .tuning import Problem, gpu_name, known_tile, problem_of, tune

# Of the tiles whose time is predicted to be shortest; the prediction is seldom off by more than a half.
_NUM_MEASURED = 16
_NUM_REPLAYS = 11
# Up to so many tokens a transform takes about as long as the product, which loads weights meanwhile, and needs room.
_FEW_TOKENS = 64


def tune_linears(graph: Graph) -> None:
    """Measure, once per machine, for every launch of a graph's ``engine_linear`` and ``engine_linears``, and the number
    of tokens of its first call."""
    for node in graph.nodes:
        if node.target not in (
            torch.ops.freeact.engine_linear.default,
            torch.ops.freeact.engine_linears.default,
        ):
            continue
        weights: Any = node.args[2] if isinstance(node.args[2], list) else [node.args[2]]
        codes: Any = node.args[0].meta["val"]
        if is_hopper(codes.device):
            num_tokens = 1
            for size in codes.shape[:-1]:
                num_tokens *= size.node.hint if isinstance(size, torch.SymInt) else size
            has_branch = len(node.args) > 10 and node.args[10] is not None
            is_e4m3 = codes.dtype == E4M3
            for some in in_launches(weights, is_e4m3=is_e4m3, has_branch=has_branch):
                num_outputs = sum(weight.meta["val"].shape[0] for weight in some)
                tune_linear(num_tokens, num_outputs, node.args[6], codes.dtype, codes.device)


def tune_linear(
    num_tokens: int,
    num_outputs: int,
    slice_sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> TileConfig:
    """The fastest tile for a Linear's bucket of tokens, measured if it is not known.

    slice_sizes  codes of each slice of K
    dtype        of the codes: int8 or float8_e4m3fn
    """
    problem = problem_of(num_tokens, num_outputs, slice_sizes, dtype)
    promoted = PROMOTED and dtype == E4M3
    tiles = [tile for tile, _ in hopper_tiles(problem.num_codes, promoted=promoted)]
    tiles.sort(
        key=lambda tile: predicted_us(tile, problem.num_tokens, num_outputs, problem.num_codes)
    )
    known = known_tile(problem, gpu_name(device))
    if known is not None:
        return known
    tiles = tiles[:_NUM_MEASURED]
    call = _Call(problem, slice_sizes, dtype, device)
    call.compile(tiles)
    return tune(problem, gpu_name(device), tiles, call.time_us)


class _Call:
    """A Linear on random operands: as many types as slices, in runs of one type; copies that keep each other cold. With
    few tokens behind a norm's transform, as most are in a model."""

    def __init__(
        self,
        problem: Problem,
        slice_sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        m, n, k = problem.num_tokens, problem.num_outputs, problem.num_codes
        num_types = max(2, len(slice_sizes))
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._copies = max(1, -(-2 * cache // (m * k + n * k // 2 + 2 * m * n)))

        def codes(rows: int) -> Tensor:
            return torch.randint(-7, 8, (rows, k), device=device, dtype=torch.int8)

        self._codes = [codes(m).to(dtype) for _ in range(self._copies)]
        self._weights = [pack_int4(codes(n)) for _ in range(self._copies)]
        self._scale = torch.rand(m, device=device)
        self._weight_scale = torch.rand(len(slice_sizes), n, device=device)
        self._table = torch.randn(num_types, n, device=device)
        types = torch.randint(0, num_types, (m,), device=device, dtype=torch.int32)
        self._types = types.sort()[0]
        slice_of_type = [min(t, len(slice_sizes) - 1) for t in range(num_types)]
        self._static = (list(slice_sizes), slice_of_type, 0, torch.bfloat16)
        self._transform: tuple[Any, ...] = ()
        if m <= _FEW_TOKENS and len(slice_sizes) == 1 and kronecker_shape(k) is not None:
            t = orthogonal_transform(k, QuantConfig(plan="single")).to(device)
            static = ("rms", 1e-6, 0.0, t.widths, t.slice_of_type, 0, 448 if dtype == E4M3 else 7)
            self._transform = (*[None] * 5, t.left, t.right, t.clip, *static)
            self._x = [torch.randn(m, k, device=device).bfloat16() for _ in range(self._copies)]

    def compile(self, tiles: Sequence[TileConfig]) -> None:
        """Compile the kernels of tiles side by side. One that cannot be is left for ``time_us`` to fail with."""
        with ThreadPoolExecutor(
            initializer=torch.cuda.set_device, initargs=(self._codes[0].device,)
        ) as pool:
            # The first one alone: it fills the caches that all kernels share.
            for some in (tiles[:1], tiles[1:]):
                wait([pool.submit(self._run, tile, copies=1) for tile in some])

    def time_us(self, tile: TileConfig) -> float:
        """Median over replays of a CUDA graph, in which the host's time to launch is not."""
        self._run(tile, self._copies)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(tile, self._copies)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(_NUM_REPLAYS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return 1e3 * statistics.median(times) / self._copies

    def _run(self, tile: TileConfig, copies: int) -> None:
        from .kernels.hopper_int_mm import hopper_linear

        for copy, weight in enumerate(self._weights[:copies]):
            codes, scale = self._codes_of(copy)
            operands = (codes, scale, weight, self._weight_scale, self._table, self._types)
            hopper_linear(*operands, *self._static, tile)

    def _codes_of(self, copy: int) -> tuple[Tensor, Tensor]:
        if not self._transform:
            return self._codes[copy], self._scale
        codes, scale = engine_norm_transform_quantize(self._x[copy], *self._transform)
        return codes, scale.reshape(-1)
