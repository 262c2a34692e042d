"""The whole walk on one tiny model: calibrate, save, load, convert, compile, explain. Read this first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import GROUPS, LINEARS, MASK, masked_ids, relative, tiny_model

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes


@pytest.mark.inductor
def test_the_whole_walk(tmp_path: Path) -> None:
    model = tiny_model()
    ids = masked_ids()
    with torch.no_grad():
        want = model(ids)

    # Two token types, told apart by the id: what is masked, and what is not. (A third one of its own is the first
    # position of each sequence, where real models have their massive activations.)
    config = QuantConfig(token_types=TokenTypes.mask_token(MASK))
    batches = [masked_ids(seed=seed) for seed in range(1, 9)]
    checkpoint = freeact_fx.calibrate(model, batches, config, progress=False)

    # What was calibrated is a folder of two files.
    checkpoint.save(tmp_path / "tiny-w4a4")
    checkpoint = freeact_fx.Checkpoint.load(tmp_path / "tiny-w4a4")

    # Packed 4-bit weights in, dense weights out; the head is in QuantConfig.skip.
    left = freeact_fx.convert(model, checkpoint)
    assert left == {"lm_head": "not in the checkpoint"}
    assert isinstance(model.blocks[0].q, freeact_fx.FreeActLinear)
    assert sum(p.numel() for p in model.blocks.parameters()) == 4 * 48  # the norms'

    # The graph shows the ids, so the pass finds the types by itself.
    fast = torch.compile(model, backend="freeact", fullgraph=True)
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad():
        got = fast(ids)
    assert relative(got, want) < 0.15

    # What became of every Linear. q, k and v share one transform, as gate and up do.
    report = freeact_fx.explain(fast)
    assert [linear.name for linear in report.quantized] == LINEARS
    assert report.counts() == {
        "found": 15,
        "quantized": 14,
        "left_alone": 1,
        "typed": 14,
        "default": 0,
        "refused": 0,
        "groups": len(GROUPS),
    }
    query = report["blocks.0.q"]
    assert query.precision == "W4A4"
    assert [group.members for group in report.groups] == GROUPS
    assert query.group == GROUPS[0][0]
    assert "63" in query.type_source
    assert report["lm_head"].reason == "listed in QuantConfig.skip ['lm_head']"

    # Another length, nothing masked or everything: the same code, and still right.
    for longer in (masked_ids(2, 40, seed=3).clamp_max(MASK - 1), torch.full((2, 23), MASK)):
        with torch.no_grad():
            assert relative(fast(longer), tiny_model()(longer)) < 0.15
    assert freeact_fx.explain(fast).num_graphs == 1
