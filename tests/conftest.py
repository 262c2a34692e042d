"""Settings of the whole suite; fixtures that only one file needs stand in that file."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from freeact_fx import runner

# What our ops return is of the size and strides that their fakes say. Without the variable nobody checks.
os.environ.setdefault("TORCHINDUCTOR_SIZE_ASSERTS", "1")

# Deterministic, so that a red run can be repeated; --hypothesis-profile=random hunts for more.
settings.register_profile("freeact", deadline=None, database=None, derandomize=True)
settings.register_profile("random", deadline=None, database=None)
settings.load_profile("freeact")
# The models are tiny: a second thread costs more than it gives.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What the imported modules hold stays: no collection needs to walk over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Each test compiles on its own: Dynamo counts recompilations per code object, over all tests, and types that are
    recorded for hidden states of an earlier test, not collected yet, are no types of this one's."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    runner._recorded.clear()
    yield
    torch._dynamo.reset()
