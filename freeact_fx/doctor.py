"""What this machine can run, and which speed-up can be expected of it: ``freeact doctor``.

Every statement is a ``Check``: of something that was looked up (versions, instructions, folders) or done (a model
compiled and held against the reference, the integer product held against 64-bit integers, and both timed).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .memory import free_bytes
from .reference import pack_int4
from .timing import time_interleaved

OK, LIMIT, FAILED = "ok", "limit", "failed"
# Distributions that work without, and what they are for.
_OPTIONAL = {
    "triton": "kernels on a GPU",
    "transformers": "models by id or folder on the command line",
    "rich": "the command line",
    "typer": "the command line",
}
_PRODUCT_SHAPE = (256, 2048, 2048)  # M, N, K, as in README.md


@dataclass(frozen=True)
class Check:
    """One statement about the machine.

    section  "versions", "processor", "gpu", "compiler", "cache", "checks", "speed"
    status   "ok", "limit" (works, but less than it could) or "failed"
    way_out  what would change a limit or a failure; None: nothing is amiss, or nothing would
    """

    section: str
    name: str
    status: str
    value: str
    way_out: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks. ``exit_code``: 0 all is well, 1 it works with limits, 2 it does not work."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        statuses = {check.status for check in self.checks}
        return 2 if FAILED in statuses else int(LIMIT in statuses)

    @property
    def verdict(self) -> str:
        return ("all is well", "works, with limits", "does not work")[self.exit_code]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose(
    *, quick: bool = False, on_section: Callable[[str], object] | None = None
) -> Diagnosis:
    """Examine this machine. ``quick`` leaves out what compiles or takes times (some ten seconds).

    on_section  is called with the name of each part before it is examined
    """
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "versions": _versions,
        "processor": _processor,
        "gpu": _gpu,
        "compiler": _compiler,
        "cache": _cache,
    }
    if not quick:
        parts |= {"checks": _executed, "speed": _speed}
    checks: list[Check] = []
    for name, part in parts.items():
        if on_section is not None:
            on_section(name)
        checks += part()
    return Diagnosis(tuple(checks))


# ------------------------------------------------------------------ versions


def _versions() -> Iterator[Check]:
    required = _requirements()
    wanted = required.pop("python", "3.10")
    yield _version_check("python", platform.python_version(), wanted, "")
    for name in ("torch", *_OPTIONAL):
        found = _version_of(name)
        yield _version_check(name, found, required.get(name), _OPTIONAL.get(name, ""))
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="freeact")
    yield Check(
        "versions",
        "backend",
        OK if entries else FAILED,
        f"freeact_fx {_version_of('freeact-fx')}, backend 'freeact' is "
        + (f"registered as {next(iter(entries)).value}" if entries else "not registered"),
        None
        if entries
        else "Install the package (pip install): torch finds the backend through its entry point.",
    )


def _version_of(distribution: str) -> str | None:
    if distribution == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """The least version of each distribution that the installed package asks for, extras included."""
    try:
        meta = importlib.metadata.metadata("freeact-fx")
    except importlib.metadata.PackageNotFoundError:
        return {}
    least = {}
    for line in meta.get_all("Requires-Dist") or ():
        if found := re.match(r"([\w.-]+)\s*(?:\[.*?\])?\s*>=\s*([\d.]+)", line):
            least[found[1].lower()] = found[2]
    if found := re.match(r">=\s*([\d.]+)", meta["Requires-Python"] or ""):
        least["python"] = found[1]
    return least


def _version_check(name: str, found: str | None, least: str | None, use: str) -> Check:
    if found is None:
        # On the CPU nothing needs Triton.
        status = OK if name == "triton" and not torch.cuda.is_available() else LIMIT
        way_out = None if status == OK else f"pip install {name}"
        return Check("versions", name, status, f"not installed; for {use}", way_out)
    rule = f", {least} or newer is needed" if least else ""
    if least and _numbers(found) < _numbers(least):
        status = LIMIT if use else FAILED
        return Check("versions", name, status, found + rule, f"pip install '{name}>={least}'")
    return Check("versions", name, OK, found + rule)


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[\d.]+", version)
    return tuple(int(n) for n in release[0].split(".") if n) if release else ()


# ------------------------------------------------------------------ processor


def cpu_name() -> str:
    """As /proc/cpuinfo has it, else as Python knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _instructions() -> dict[str, bool]:
    """Which of the instructions that matter here the processor has."""
    has = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "amx_bf16")
    return {name: bool(has.get(name)) for name in names}


def _has_int8(instructions: dict[str, bool]) -> bool:
    return any(instructions[name] for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _has_bf16(instructions: dict[str, bool]) -> bool:
    return instructions["avx512_bf16"] or instructions["amx_bf16"]


def _processor() -> Iterator[Check]:
    threads = torch.get_num_threads()
    memory = free_bytes(torch.device("cpu"))
    yield Check(
        "processor",
        "cpu",
        OK,
        f"{cpu_name()}, {platform.machine()}, {threads} threads used of {os.cpu_count()}, "
        f"{memory / 2**30:.1f} GiB of memory free",
    )
    if not torch.backends.mkldnn.is_available():
        yield Check(
            "processor",
            "cpu engine",
            LIMIT,
            "this torch has no oneDNN: integer products run in plain PyTorch, correct and slow",
            "Use a torch build with oneDNN; PyTorch's own wheels for x86-64 and AArch64 have it.",
        )
        return
    instructions = _instructions()
    found = [name for name, there in instructions.items() if there]
    has_int8 = _has_int8(instructions)
    listed = ", ".join(found) or "none of the instructions that matter here"
    note = "" if has_int8 else "; without VNNI or AMX it is exact too, and slow"
    yield Check(
        "processor",
        "cpu engine",
        OK if has_int8 else LIMIT,
        f"oneDNN, unsigned x signed 8 bits ({listed}){note}",
    )


# ------------------------------------------------------------------ GPU


def _gpu() -> Iterator[Check]:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built for the CPU)"
        yield Check("gpu", "gpu", OK, f"none that torch can use{built}")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Check(
            "gpu",
            f"gpu {index}",
            OK,
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.total_memory / 2**30:.0f} GiB",
        )
    if _has_gpu_kernels():
        yield Check(
            "gpu",
            "gpu engine",
            OK,
            "int8 tensor cores, by kernels in Triton; e4m3 activations run in plain PyTorch, correct and slow",
        )
        return
    yield Check(
        "gpu",
        "gpu engine",
        LIMIT,
        "none: on this GPU products run in plain PyTorch, correct and slower than dense",
        "The kernels need an NVIDIA GPU of compute capability 8.0 or above, and Triton. Or run on the CPU.",
    )


def _has_gpu_kernels() -> bool:
    from .codegen.engine_ops import has_kernels

    return torch.cuda.is_available() and has_kernels(torch.device("cuda"))


# ------------------------------------------------------------------ compiler and cache


def _compiler() -> Iterator[Check]:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception as error:  # any failure of torch's search is the answer
        reason = str(error).strip().split("\n")[0]
        yield Check(
            "compiler",
            "c++ compiler",
            LIMIT,
            f"none that torch finds ({reason}): on the CPU only options={{'compiler': 'eager'}} works",
            "Install g++ (or clang++), or name one in the environment variable CXX.",
        )
    else:
        yield Check("compiler", "c++ compiler", OK, shutil.which(compiler) or compiler)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    yield Check(
        "compiler",
        "python headers",
        OK if header.exists() else LIMIT,
        str(header) if header.exists() else f"{header} is not there; compiled code may need it",
        None if header.exists() else "Install Python's headers (python3-dev).",
    )


def _cache() -> Iterator[Check]:
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    files = [f for f in folder.rglob("*") if f.is_file()] if folder.exists() else []
    size = sum(_size(f) for f in files)
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    is_writable = os.access(nearest, os.W_OK)
    free = shutil.disk_usage(nearest).free
    state = f"{folder}: {len(files)} files, {size / 2**20:.0f} MiB, {free / 2**30:.1f} GiB free"
    if not is_writable:
        yield Check(
            "cache",
            "cache folder",
            FAILED,
            f"{state}, and it cannot be written",
            "Name another in the environment variable TORCHINDUCTOR_CACHE_DIR.",
        )
        return
    yield Check(
        "cache",
        "cache folder",
        OK if free > 2**30 else LIMIT,
        state,
        None if free > 2**30 else "Make room, or name another in TORCHINDUCTOR_CACHE_DIR.",
    )
    yield Check(
        "cache",
        "graph cache",
        OK if config.fx_graph_cache else LIMIT,
        "on: a model that was compiled before starts in seconds"
        if config.fx_graph_cache
        else "off: every process compiles anew",
        None if config.fx_graph_cache else "Unset TORCHINDUCTOR_FX_GRAPH_CACHE=0.",
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process removed it
        return 0


# ------------------------------------------------------------------ what is done


class _Probe(nn.Module):
    """An MLP of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.nn.functional.silu(self.up(x)))
        return result


def _devices() -> list[str]:
    return ["cpu", "cuda"] if _has_gpu_kernels() else ["cpu"]


def _executed() -> Iterator[Check]:
    for device in _devices():
        yield _product_check(device)
        yield _compile_check(device)


def _on(name: str, device: str) -> str:
    return name if device == "cpu" else f"{name} on the gpu"


def _product_check(device: str) -> Check:
    """Codes times packed codes, held against 64-bit integers."""
    name = _on("integer product", device)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (64, 512), generator=generator)
    weight = torch.randint(-7, 8, (96, 512), generator=generator)
    try:
        packed = pack_int4(weight.to(torch.int8)).to(device)
        got = torch.ops.freeact.int_mm(codes.to(device, torch.int8), packed)
    except Exception as error:  # whatever it is, it is the answer
        return _failure(name, error)
    wrong = int((got.cpu().long() != codes @ weight.t()).sum())
    return Check(
        "checks",
        name,
        FAILED if wrong else OK,
        f"[64, 512] x [512, 96]: {wrong} of {got.numel()} values differ from 64-bit integers",
        "Please report this." if wrong else None,
    )


def _compile_check(device: str) -> Check:
    """A tiny model through torch.compile, held against the same passes run eagerly on the CPU, and against float."""
    name = _on("compilation", device)
    generator = torch.Generator().manual_seed(0)
    probe = _Probe().eval().requires_grad_(False)
    x = torch.randn(4, 32, 128, generator=generator)

    def eager(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from .backend import freeact

        return freeact(gm, inputs, options={"compiler": "eager"})

    try:
        from . import compat

        with torch.no_grad():
            exact = probe(x)
            with compat.traced_apart(probe, eager) as compiled:
                want = compiled(x)
            probe.to(device)
            start = time.perf_counter()
            with compat.traced_apart(probe, "freeact") as compiled:
                got = compiled(x.to(device)).cpu()
            seconds = time.perf_counter() - start
    except Exception as error:  # a compiler that is missing or broken, for one
        return _failure(name, error)
    difference = float((got - want).norm() / want.norm())
    rounding = float((want - exact).norm() / exact.norm())
    is_right = difference < 1e-2 and 0 < rounding < 0.5
    return Check(
        "checks",
        name,
        OK if is_right else FAILED,
        f"a model of two Linears compiled in {seconds:.1f} s; it differs from the reference by {difference:.1e}, "
        f"from float by {rounding:.1e} (4-bit rounding)",
        None if is_right else "Please report this.",
    )


def _failure(name: str, error: Exception) -> Check:
    reason = next((line for line in str(error).strip().split("\n") if line), "no message")
    return Check(
        "checks",
        name,
        FAILED,
        f"{type(error).__name__}: {reason}",
        "Look at the compiler's checks above; TORCH_LOGS=+inductor shows more.",
    )


def _speed() -> Iterator[Check]:
    """The product alone in each arithmetic, and what that means."""
    for device in _devices():
        yield from _product_speed(device)
    if _has_bf16(_instructions()):
        yield Check(
            "speed",
            "do not expect",
            OK,
            "on this CPU more speed than compiled bf16: it has bf16 instructions, and a bf16 Linear is about as fast "
            "at K=2048 and faster at K=576 (README.md). What stays is the memory",
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        yield Check(
            "speed",
            "do not expect on hopper",
            OK,
            "more arithmetic from 4-bit activations than from 8-bit ones: both run on the int8 engine, and W4A4 is no "
            "faster than W4A8. 4 bits save the weights' memory and bandwidth",
        )


def _product_speed(device: str) -> Iterator[Check]:
    num_tokens, num_outputs, num_features = _PRODUCT_SHAPE
    x = torch.randn(num_tokens, num_features, device=device)
    weight = torch.randn(num_outputs, num_features, device=device)
    x_half, weight_half = x.bfloat16(), weight.bfloat16()
    codes = torch.randint(-7, 8, x.shape, dtype=torch.int8, device=device)
    packed = pack_int4(torch.randint(-7, 8, weight.shape, dtype=torch.int8, device=device))
    timings = time_interleaved(
        {
            "fp32": lambda: nn.functional.linear(x, weight),
            "bf16": lambda: nn.functional.linear(x_half, weight_half),
            "int8": lambda: torch.ops.freeact.int_mm(codes, packed),
        },
        runs=9,
    )
    shape = f"M={num_tokens}, N={num_outputs}, K={num_features}"
    listed = "; ".join(f"{name} {timing}" for name, timing in timings.items())
    scatter = any(t.upper_ms > 1.5 * t.lower_ms for t in timings.values())
    busy = "; they scatter: the machine is busy, and this says little" if scatter else ""
    yield Check("speed", _on("product", device), OK, f"{shape}: {listed}{busy}")
    over = {n: timings[n].median_ms / timings["int8"].median_ms for n in ("fp32", "bf16")}
    copy = ", and an int8 copy besides at run time" if device == "cpu" else ""
    yield Check(
        "speed",
        _on("expect", device),
        OK,
        f"the bare int8 product is {over['fp32']:.1f} times as fast as fp32 and {over['bf16']:.1f} times as fast as "
        f"bf16; transform and rounding take a part of that, the larger the narrower the layer. Packed weights take "
        f"about a quarter of bf16{copy}",
    )
