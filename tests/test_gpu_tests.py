"""What the record of the GPU tests is made of."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from gpu_tests import SANITIZED, command, counts


def test_counts_of_pytest_and_the_sanitizer() -> None:
    output = """
12 passed to the next stage
FAILED kernels/test_on_gpu.py::test_a - assert 1 == 2
= 3 failed, 595 passed, 2 skipped, 10 errors in 94.13s (0:01:34) =
========= ERROR SUMMARY: 2 errors
========= ERROR SUMMARY: 0 errors
"""
    expected = {"failed": 3, "passed": 595, "skipped": 2, "error": 10, "sanitizer_errors": 2}
    assert counts(output) == expected
    race = """
========= Error: Race reported between Read access at a_kernel+0x130 in a.py:6
=========     and Write access at a_kernel+0xcad0 in a.py:9 [3 hazards]
========= Error: Race reported between Read access at a_kernel+0x100 in a.py:6
5 passed in 1.0s
========= RACECHECK SUMMARY: 2 hazards displayed (767 errors, 0 warnings)
"""
    places = ["Read a_kernel a.py:6", "Write a_kernel a.py:9"]
    assert counts(race) == {"passed": 5, "sanitizer_errors": 767, "races": places}
    assert counts("no summary at all") == {}


def test_commands() -> None:
    plain = command(argparse.Namespace(k=None, processes=14, sanitizer=None))
    assert plain[-2:] == ["-n", "14"]
    assert "-k" not in plain
    watched = command(argparse.Namespace(k=None, processes=14, sanitizer="racecheck"))
    assert watched[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert watched[watched.index("-k") + 1] == SANITIZED
    assert "-n" not in watched


def test_there_are_tests_of_all_names_that_the_sanitizers_watch() -> None:
    """Names have the numbers of tokens in them, and those the bounds between kernels."""
    folder = Path(__file__).parent
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "kernels"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    ).stdout.splitlines()
    for names in SANITIZED.split(" or "):
        wanted = names.strip(" ()").split(" and ")
        assert any(all(part in line for part in wanted) for line in collected), names
