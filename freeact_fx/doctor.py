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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import compat
from .memory import free_bytes

OK, LIMIT, FAILED = "ok", "limit", "failed"
# Distributions that work without, and what they are for.
_OPTIONAL = {
    "triton": "kernels on a GPU",
    "transformers": "models by id or folder on the command line",
    "rich": "the command line",
    "typer": "the command line",
}


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
        from . import doctor_probes

        parts |= {"checks": doctor_probes.executed, "speed": doctor_probes.speed}
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


def instructions() -> dict[str, bool]:
    """Which of the instructions that matter here the processor has."""
    has = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "amx_bf16")
    return {name: bool(has.get(name)) for name in names}


def _has_int8(found: dict[str, bool]) -> bool:
    return any(found[name] for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def has_bf16(found: dict[str, bool]) -> bool:
    return found["avx512_bf16"] or found["amx_bf16"]


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
    available = instructions()
    found = [name for name, there in available.items() if there]
    has_int8 = _has_int8(available)
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
    if has_gpu_kernels():
        yield Check(
            "gpu",
            "gpu engine",
            OK,
            "int8 tensor cores, by kernels in Triton; e4m3 activations: "
            + (
                "fp8 tensor cores"
                if has_fp8()
                else "in plain PyTorch, correct and slow: fp8 needs compute capability 8.9"
            ),
        )
        yield Check(
            "gpu",
            "cuda graphs",
            OK,
            'options={"mode": "reduce-overhead"} keeps one for each shape of inputs it meets: pad tokens to a few '
            "lengths, or leave the mode out where lengths vary",
        )
        yield _tiles()
        return
    yield Check(
        "gpu",
        "gpu engine",
        LIMIT,
        "none: on this GPU products run in plain PyTorch, correct and slower than dense",
        "The kernels need an NVIDIA GPU of compute capability 8.0 or above, and Triton. Or run on the CPU.",
    )


def _tiles() -> Check:
    """How the product's tiles are chosen here."""
    from .codegen import engine_ops, tuning

    device = torch.device("cuda")
    if not engine_ops.is_hopper(device):
        return Check("gpu", "tiles", OK, "fixed for this chip by the number of tokens")
    number = tuning.num_known(tuning.gpu_name(device))
    if number:
        state = f"{number} problems measured on this kind of GPU; others get the tile predicted to be fastest"
        return Check("gpu", "tiles", OK, state)
    return Check(
        "gpu",
        "tiles",
        LIMIT,
        "none measured on this kind of GPU: every problem gets the tile predicted to be fastest",
        'options={"mode": "max-autotune"} measures those of a model once and keeps them.',
    )


def has_fp8() -> bool:
    from .codegen import engine_ops

    return torch.cuda.is_available() and engine_ops.has_fp8(torch.device("cuda"))


def has_gpu_kernels() -> bool:
    from .codegen.engine_ops import has_kernels

    return torch.cuda.is_available() and has_kernels(torch.device("cuda"))


# ------------------------------------------------------------------ compiler and cache


def _compiler() -> Iterator[Check]:
    try:
        compiler = compat.cpp_compiler()
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
    folder, has_graph_cache = compat.inductor_cache()
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
        OK if has_graph_cache else LIMIT,
        "on: a model that was compiled before starts in seconds"
        if has_graph_cache
        else "off: every process compiles anew",
        None if has_graph_cache else "Unset TORCHINDUCTOR_FX_GRAPH_CACHE=0.",
    )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another process removed it
        return 0
