"""Tables of a branch in Triton's interpreter, which cuts an fp32 off to bf16, beside the reference behind the op."""

from __future__ import annotations

import pytest
import torch

from freeact_fx.codegen.engine_ops import engine_branch_table
from freeact_fx.codegen.kernels.branch_table import branch_table


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (40, 17), (5, 1032), (1, 1)])
def test_same_as_the_reference(shape: tuple[int, int], scaled: bool, by_columns: bool) -> None:
    table = torch.randint(-127, 128, shape).to(torch.int8)
    table = table.t().contiguous().t() if by_columns else table
    scales = (torch.rand(shape[0]), torch.rand(shape[1]) + 0.1) if scaled else (None, None)
    one = 2.0**-9 if scaled else 1.0
    got, want = branch_table(table, *scales, one), engine_branch_table(table, *scales, one)
    assert got.shape[1] % 8 == 0
    assert torch.allclose(got.float(), want.float(), rtol=2**-7)
