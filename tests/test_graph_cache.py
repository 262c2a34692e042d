"""Inductor's cache of compiled graphs: found again by another process, and only for the same sources and options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from freeact_fx import compat

PROGRAM = """
import json

import torch
from torch import nn
from torch._dynamo.utils import counters

from freeact_fx import compat


def found(**options):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        torch.compile(model, backend="freeact", options=options)(torch.ones(2, 8, 64))
    kinds = ("hit", "miss", "bypass")
    return {kind: counters["inductor"][f"fxgraph_cache_{kind}"] for kind in kinds}


torch.set_num_threads(1)
results = {"as it was": found()}
if ASK_MORE:
    results["another option"] = found(seed=1)
    compat._source_digest = lambda: "of other sources"
    results["other sources"] = found()
print(json.dumps(results))
"""


def in_a_process(cache: Path, *, ask_more: bool) -> dict[str, dict[str, int]]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ASK_MORE", str(ask_more))],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        },
        cwd=cache.anchor,  # the checkout's freeact_fx has no codegen
    )
    assert result.returncode == 0, result.stderr
    counted: dict[str, dict[str, int]] = json.loads(result.stdout.splitlines()[-1])
    return counted


@pytest.mark.inductor
def test_graphs_are_found_by_another_process(tmp_path: Path) -> None:
    hit, miss = ({"hit": int(is_hit), "miss": int(not is_hit), "bypass": 0} for is_hit in (1, 0))
    assert in_a_process(tmp_path, ask_more=False) == {"as it was": miss}
    assert in_a_process(tmp_path, ask_more=True) == {
        "as it was": hit,
        "another option": miss,
        "other sources": miss,
    }


def test_sources_are_all_files_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes and codegen, which an editable install has elsewhere, too; in all folders below."""
    names = {folder.name for folder in compat._mapped_folders()}
    assert names == {"passes", "codegen"}
    digests = {compat._source_digest()}
    monkeypatch.setattr(compat, "_mapped_folders", lambda: [tmp_path])
    kernel = tmp_path / "kernels" / "product.py"
    kernel.parent.mkdir()
    for text in ("x = 1\n", "x = 2\n"):
        kernel.write_text(text)
        digests.add(compat._source_digest())
    assert len(digests) == 3
