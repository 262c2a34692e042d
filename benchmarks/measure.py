"""Timing and the facts that belong beside a number: shared by every benchmark here.

How calls are timed is in `freeact_fx.timing`. A result is one JSON line with hardware, versions and
commit.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from freeact_fx import timing
from freeact_fx.doctor import cpu_name
from freeact_fx.timing import Timing

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], label: str, runs: int = 15, warmup: int = 3
) -> dict[str, Timing]:
    """Wall time of each variant, with a progress bar."""
    with tqdm(total=warmup + runs, desc=label, leave=False) as bar:
        return timing.time_interleaved(variants, runs=runs, warmup=warmup, on_round=bar.update)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((actual - expected).norm() / expected.norm())


def environment() -> dict[str, Any]:
    """Hardware, versions and commit, as every result carries them."""
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Short hash of the checkout, with "-dirty" where tracked files other than results differ."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append_result(path: Path, *, commit: str | None = None, **fields: Any) -> None:
    """Add one JSON line with the environment to `path`; `commit` if git does not know that of this copy."""
    facts = environment() | ({"commit": commit} if commit else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**fields, **facts}) + "\n")


def peak_memory_bytes() -> int:
    """Most memory that this process has had resident.

    Not ``ru_maxrss`` where Linux has better: a child begins with that of the process that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
