"""Do the kernels and compiled models agree with the reference on this GPU? Runs the tests marked `gpu`, keeps a record.

    python benchmarks/gpu_tests.py --processes 14               all of them, side by side (pytest-xdist)
    python benchmarks/gpu_tests.py --sanitizer memcheck         a few under compute-sanitizer: out of bounds
    python benchmarks/gpu_tests.py --sanitizer racecheck        ... hazards in shared memory
    python benchmarks/gpu_tests.py -k "transform and 4096"      those of names

Appends a line to `benchmarks/results/gpu_tests.jsonl`; exit status 1 if a test failed or the sanitizer found anything.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import REPOSITORY, RESULTS, append_result

QUESTION = "Do the kernels and compiled models agree with the reference on a GPU?"
# Every kernel once, at sizes that a tool which slows a kernel a hundred times gets through.
SANITIZED = (
    "(every_tile and 48) or (hopper_linear and 65-256) or (slices and 129) or (product_of_real_shapes and 4096-4096-16)"
    " or (test_transform and 4096 and shift and True) or (precedes and 4096) or (precedes and 12288)"
    " or (test_branch and 64-4096-61) or (test_branch and more-4096-61) or (linears_of_one_input and 16)"
    " or (parts_of_the_features and 2-70)"
)
_SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")
_SANITIZED = re.compile(r"=+ (?:ERROR SUMMARY: |RACECHECK SUMMARY: .*\()(\d+) error")
_ACCESS = re.compile(r"(Read|Write) access at (\w+)\+0x\w+ in (\S+:\d+)")


def command(args: argparse.Namespace) -> list[str]:
    """How the tests are run."""
    chosen = args.k or (SANITIZED if args.sanitizer else None)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(REPOSITORY / "tests")]
    pytest += ["--ignore-glob=*html_report*"]  # of a browser, which is not to be needed here
    pytest += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "timeout=0"]
    pytest += ["-k", chosen] if chosen else []
    if args.sanitizer is None:
        return pytest + (["-n", str(args.processes)] if args.processes > 1 else [])
    tool = ["compute-sanitizer", "--tool", args.sanitizer, "--error-exitcode", "9"]
    # racecheck reports the same place again and again; the record has each once.
    return [*tool, "--print-limit", "5" if args.sanitizer == "memcheck" else "5000", *pytest]


def counts(output: str) -> dict[str, Any]:
    """What pytest counts, and the sanitizer its errors, out of all that was printed; and the places that race."""
    lines = [line for line in output.splitlines() if _SUMMARY.search(line) and " in " in line]
    found: dict[str, Any] = {
        name.rstrip("s"): int(n) for n, name in _SUMMARY.findall(lines[-1] if lines else "")
    }
    reports = _SANITIZED.findall(output)
    if reports:
        found["sanitizer_errors"] = sum(map(int, reports))
    if accesses := _ACCESS.findall(output):
        found["races"] = sorted({" ".join(access) for access in accesses})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", help="expression for pytest: the tests of these names")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sanitizer", choices=("memcheck", "racecheck"))
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_tests.jsonl")
    parser.add_argument("--commit", help="of this copy of the sources, if its git does not know")
    args = parser.parse_args()
    if args.sanitizer and shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    import torch
    import triton

    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; `make test` has what runs without one")
    asked, start = command(args), time.perf_counter()
    # Elsewhere than the checkout, whose freeact_fx lacks the folders that installing puts into it.
    process = subprocess.Popen(
        asked, cwd=REPOSITORY / "tests", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    found = counts("".join(lines))
    failures = [line.split(" - ")[0][7:].strip() for line in lines if line.startswith("FAILED ")]
    append_result(
        args.out,
        question=QUESTION,
        command=" ".join(Path(part).name if "/" in part else part for part in asked),
        **found,
        failures=failures,
        status=status,
        seconds=round(time.perf_counter() - start, 1),
        gpu=torch.cuda.get_device_name(),
        triton=triton.__version__,
        commit=args.commit,
    )
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
