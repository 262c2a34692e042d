"""Compile a kernel for a GPU that is not there: Triton brings its own assembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

# The matrix instruction that a chip must be given for 8-bit integers, for e4m3, for bf16 and for fp16.
INT8_INSTRUCTIONS = {
    80: r"mma\.sync\.\S*\.s32\.s8\.s8\.s32",
    90: r"wgmma\.mma_async\.\S*\.s32\.s8\.s8",
    100: r"tcgen05\.mma\.\S*kind::i8",
}
E4M3_INSTRUCTIONS = {
    89: r"mma\.sync\.\S*\.f32\.e4m3\.e4m3\.f32",
    90: r"wgmma\.mma_async\.\S*\.f32\.e4m3\.e4m3",
    100: r"tcgen05\.mma\.\S*kind::f8f6f4",
}
BF16_ON_HOPPER = r"wgmma\.mma_async\.\S*\.f32\.bf16\.bf16"
FP16_INSTRUCTIONS = {
    80: r"mma\.sync\.\S*\.f32\.f16\.f16\.f32",
    90: r"wgmma\.mma_async\.\S*\.f32\.f16\.f16",
    100: r"tcgen05\.mma\.\S*kind::f16",
}


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel: its PTX, and what a thread and a program use.

    local_bytes  stack of a thread, where registers are spilled to
    """

    ptx: str
    registers: int
    local_bytes: int
    shared_bytes: int


def compile_kernel(
    kernel: Any,
    capability: int,
    *,
    pointers: dict[str, str],
    numbers: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
) -> Compiled:
    """Compile a ``triton.jit`` function with all pointers and sizes divisible by 16."""
    source = ASTSource(**_source(kernel, pointers | numbers, constants))
    return compile_source(source, capability, num_warps=num_warps, num_stages=num_stages)


def compile_gluon(
    kernel: Any,
    *,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    maxnreg: int | None = None,
) -> Compiled:
    """The same for a ``gluon.jit`` function, for Hopper."""
    source = GluonASTSource(**_source(kernel, arguments, constants))
    return compile_source(source, 90, num_warps=num_warps, maxnreg=maxnreg)


def _source(kernel: Any, arguments: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    kinds = arguments | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.startswith("i")
    }
    return {"fn": kernel, "signature": signature, "constexprs": constants, "attrs": divisible}


def compile_source(source: Any, capability: int, **options: int | None) -> Compiled:
    options["enable_fp_fusion"] = True  # as the launchers say
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(compiled.asm["ptx"], registers, stack + local, compiled.metadata.shared)
