"""How calls are timed on a GPU, and what a number needs beside it: environment, ceilings, kernel names.

Device times between CUDA events, every variant once a round, median and quartiles. In front of each call the device
spins for longer than the host needs to issue it, so that a time is the device's and not Python's; a whole model is
timed without that, as its user sees it: alone, and its short steps also one after the other.

Weights are cold in the L2 cache because each call goes through several Linears, as many as it takes to move three
times the cache's size between two uses of a weight. Why not one Linear and a flush between calls: a CUDA graph holds
addresses, so other weights have to be other nodes in it; around one replay of 5 microseconds the events would measure
the gap before its first kernel too; and the flush leaves dirty lines, whose writing back falls on what comes next.
For the same reason a call is timed behind one of its own kind: else a variant would pay for what another has left.

On the CPU (a rehearsal of the same code) it is wall time, and nothing is flushed or captured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.autograd import DeviceType

import freeact_fx
from freeact_fx import timing
from freeact_fx.timing import Timing

Call = Callable[[], Any]
_CACHE_TURNS = 3  # sizes of the L2 cache that pass between two uses of a weight
_CYCLES_PER_SECOND = 2.5e9  # no chip's clock is above; only how long the device spins depends on it
_LEAST_ROUNDS, _MOST_ROUNDS = 15, 300
_LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel")
_PARTS = ("passes", "codegen")  # of the package, with folders of their own in a checkout


@dataclass(frozen=True)
class Bench:
    """Where and how everything is run.

    compiler  "inductor", or "eager" for a rehearsal that compiles nothing
    seconds   of timed rounds for each row
    peers     "all", or "ratio": only those that a ratio is against
    """

    device: torch.device
    compiler: str = "inductor"
    seconds: float = 2.0
    peers: str = "all"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def copies(self, bytes_per_call: int) -> int:
        """How many Linears of this traffic (weights and activations) make each other's weights cold."""
        if not self.on_gpu:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, -(-_CACHE_TURNS * cache // bytes_per_call))

    # ---------------------------------------------------------------- what is called

    def freeact(self, module: nn.Module, *, cuda_graph: bool) -> Callable[..., Any]:
        """``torch.compile(module, backend="freeact")``, as the table wants it timed."""
        if self.compiler == "eager":
            options = {"compiler": "eager"}
            return torch.compile(module, backend="freeact", dynamic=False, options=options)
        mode = "reduce-overhead" if cuda_graph else None
        return torch.compile(module, backend="freeact", dynamic=False, mode=mode)

    def inductor(
        self, module: nn.Module, *, cuda_graph: bool, max_autotune: bool
    ) -> Callable[..., Any]:
        if self.compiler == "eager":
            return torch.compile(module, backend="eager", dynamic=False)
        mode = "reduce-overhead" if cuda_graph else None
        if max_autotune:
            mode = "max-autotune" if cuda_graph else "max-autotune-no-cudagraphs"
            # Its search halves the blocks of a long scan (in masked_scatter) without a limit, and memory behind their
            # workspace is overwritten (pytorch/pytorch#197493): a workspace for blocks of one.
            inductor_config.triton.min_split_scan_rblock = 1
        return torch.compile(module, dynamic=False, mode=mode)

    def captured(self, call: Call) -> Call:
        """An uncompiled call as a CUDA graph; on the CPU as it is."""
        if not self.on_gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            output = call()

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    def loop(self, call: Call, steps: int) -> Call:
        """A call made so often without waiting for any, as a generation loop that picks its tokens on the device."""

        def repeated() -> None:
            for _ in range(steps):
                _next_step()
                call()

        return repeated

    def keep_address(self, *tensors: Tensor) -> None:
        """Say that inputs stay where they are, so that a CUDA graph does not copy them at each replay."""
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)

    # ---------------------------------------------------------------- times

    def time(
        self, variants: Mapping[str, Call], *, copies: int = 1, hide_launches: bool = True
    ) -> dict[str, Timing]:
        """Times of one of the ``copies`` that each call goes through."""
        if self.on_gpu:
            timings = self._time_on_gpu(variants, hide_launches)
        else:
            timings = timing.time_interleaved(variants, runs=3, warmup=1)
        return {name: _divided(t, copies) for name, t in timings.items()}

    @torch.no_grad()
    def _time_on_gpu(self, variants: Mapping[str, Call], hide_launches: bool) -> dict[str, Timing]:
        issue_s: dict[str, float] = {}
        rounds, start_s = 0, time.perf_counter()
        # Warm up until the clocks are up, too.
        while rounds < 3 or time.perf_counter() - start_s < 0.5:
            for name, call in variants.items():
                issue_s[name] = self._issued_s(call)
            torch.cuda.synchronize()
            rounds += 1
        calls_a_round = 2 if hide_launches else 1
        a_round_s = calls_a_round * (time.perf_counter() - start_s) / rounds
        rounds = min(max(_LEAST_ROUNDS, int(self.seconds / a_round_s)), _MOST_ROUNDS)
        times: dict[str, list[float]] = defaultdict(list)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(rounds):
            for name, call in variants.items():
                torch.cuda.synchronize()
                _next_step()
                if hide_launches:
                    torch.cuda._sleep(int(4 * issue_s[name] * _CYCLES_PER_SECOND))
                    call()
                    _next_step()
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times[name].append(begin.elapsed_time(end))
        return {name: _timing_of(values) for name, values in times.items()}

    @torch.no_grad()
    def host_ms(self, call: Call) -> float:
        """Until a call has issued its work to an idle device; median."""
        return round(1e3 * statistics.median(self._issued_s(call) for _ in range(7)), 4)

    def _issued_s(self, call: Call) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        _next_step()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @torch.no_grad()
    def profiled(self, call: Call) -> dict[str, Any]:
        """Kernels of one call by name, with count and device time, the longest first; on the CPU its ops. A kernel that
        waits for the one before it counts that as its time; ``device_ms`` is the time with any of them on the device,
        ``launch_ms`` that of the host in the driver's calls that launch kernels and graphs.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        call()
        with torch.profiler.profile(activities=activities) as profile:
            _next_step()
            call()
            if self.on_gpu:
                torch.cuda.synchronize()
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        found: dict[str, list[float]] = defaultdict(list)
        ranges = []
        launch_us = 0.0
        for event in profile.events():
            if event.name.startswith(_LAUNCHES):
                launch_us += event.time_range.elapsed_us()
            is_range = getattr(event, "is_user_annotation", False)
            if event.device_type == kind and not is_range:
                found[event.name[:160]].append(event.time_range.elapsed_us())
                ranges.append((event.time_range.start, event.time_range.end))
        rows = [
            {"name": name, "count": len(us), "us": round(sum(us), 1)} for name, us in found.items()
        ]
        return {
            "kernels": sorted(rows, key=lambda row: -row["us"]),
            "device_ms": round(covered(ranges) / 1e3, 4),
            "launch_ms": round(launch_us / 1e3, 4),
        }

    # ---------------------------------------------------------------- ceilings

    def ceilings(self, size: int) -> dict[str, float | str]:
        """What the chip does at best here: a copy in GB/s (bytes read and written) and dense products in TOP/s.

        size  of a product is [2 size, size] x [size, size]; a copy's buffer has 64 bytes for each of its elements
        """
        m, n, k = 2 * size, size, size
        source = torch.empty(64 * size * size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        x, w = _random(self.device, m, k), _random(self.device, n, k)
        codes_x, codes_w = (
            torch.randint(-127, 128, t.shape, dtype=torch.int8, device=self.device) for t in (x, w)
        )
        calls: dict[str, Call] = {
            "copy_gbs": lambda: target.copy_(source),
            "bf16_tops": lambda: x @ w.t(),
            "int8_tops": lambda: torch._int_mm(codes_x, codes_w.t()),
        }
        try:
            scales = torch.ones(m, 1, device=self.device), torch.ones(1, n, device=self.device)
            x8, w8 = (t.to(torch.float8_e4m3fn) for t in (x, w))
            calls["fp8_tops"] = lambda: scaled_mm(x8, w8, *scales)
            calls["fp8_tops"]()
        except Exception as error:  # a chip or a torch without it: there is no such ceiling
            calls.pop("fp8_tops", None)
            missing = {"fp8_error": brief(error)}
        else:
            missing = {}
        timings = self.time(calls)
        found: dict[str, float | str] = {}
        for name, result in timings.items():
            amount = 2 * source.numel() if name == "copy_gbs" else 2 * m * n * k / 1e3
            # Four digits, not decimals: never 0, whatever else a machine does.
            found[name] = float(f"{amount / result.median_ms / 1e6:.4g}")
        return {**found, **missing}


def scaled_mm(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """cuBLASLt's fp8 product with a scale for each row: x [M, K], weight [N, K] e4m3; [M, N] bf16."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def brief(error: Exception) -> str:
    """Type and beginning of an error in one line, for a table's cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"


def _next_step() -> None:
    """What CUDA graphs put out before may be overwritten."""
    torch.compiler.cudagraph_mark_step_begin()


def _timing_of(times_ms: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times_ms, n=4)
    return Timing(median, lower, upper, len(times_ms))


def covered(ranges: Sequence[tuple[float, float]]) -> float:
    """The length of what ranges cover together."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _divided(t: Timing, copies: int) -> Timing:
    parts = {n: getattr(t, n) / copies for n in ("median_ms", "lower_ms", "upper_ms")}
    return replace(t, **parts)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


# -------------------------------------------------------------------- environment


def environment(bench: Bench, *, rehearsal: bool, commit: str | None = None) -> dict[str, Any]:
    """Hardware, versions and commit; ``commit`` is for a copy of the sources whose git does not know."""
    facts = measure.environment()
    if commit:
        facts["commit"] = commit
    return {
        "rehearsal": rehearsal,
        "device": _device_name(bench),
        "sources": sources_digest(),
        "triton": _version("triton"),
        "torchao": _version("torchao"),
        "cuda": torch.version.cuda,
        "compiler": bench.compiler,
        "peers": bench.peers,
        **facts,
        "gpu": _gpu_facts() if bench.on_gpu else None,
    }


def _device_name(bench: Bench) -> str:
    return torch.cuda.get_device_name(bench.device) if bench.on_gpu else measure.cpu_name()


def sources_digest(package: Path | None = None) -> str:
    """Of the package's source: a commit that was given by hand may be wrong, and a checkout may be edited.

    package  folder of freeact_fx, by default the one that was imported; passes and codegen are in it where it
             is installed, beside it in a checkout, and the digest is the same
    """
    package = package or Path(freeact_fx.__file__).parent
    parts = [package / n if (package / n).exists() else package.parent / n for n in _PARTS]
    own = (f for f in package.rglob("*.py") if f.relative_to(package).parts[0] not in _PARTS)
    digest = hashlib.sha256()
    for files in (own, *(part.rglob("*.py") for part in parts)):
        for file in sorted(files):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


_QUERY = (
    "driver_version",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.sm",
    "power.draw",
    "temperature.gpu",
)


def _gpu_facts() -> dict[str, Any]:
    """Memory and multiprocessors; driver, clocks and power as nvidia-smi says, if it is there."""
    found = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
    }
    return facts | nvidia_smi(_QUERY)


def nvidia_smi(query: tuple[str, ...]) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing if it is not there."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in result.stdout.strip().split(",")]
    return dict(zip(query, values, strict=False)) if result.returncode == 0 else {}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: a run may be killed while it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    unfinished.replace(path)
