"""The kernels in Triton's interpreter, which decides for a whole process: ``interpreted_*.py`` run in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_interpreted() -> None:
    # numpy, which the interpreter computes with, warns of NaN and of what Triton does with it.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    result = subprocess.run(
        [*command, *map(str, HERE.glob("interpreted_*.py"))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parent.parent,
    )
    assert result.returncode == 0, result.stdout[-4000:]
