"""What kernels on Hopper share about being launched one after the other.

Programmatic dependent launch: a kernel that is launched with ``launch_pdl`` may be there before its inputs are. What it
does first, fetching weights, overlaps the end of the kernel before. It must wait before it reads what that one wrote,
and before it writes anything. So packed weights and factors must be there before a graph runs: who makes them on the
GPU waits for the stream (``packing``).

Counters by which programs of one launch find out who is last: zeros that every launch leaves as it found them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_NUM_STREAMS, _NUM_COUNTERS = 16, 4096
_tables: dict[torch.device, tuple[Tensor, dict[int, int]]] = {}


@gluon.jit
def wait_for_previous_kernel():
    """Return when the kernel before is done and what it wrote is visible."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def allow_next_kernel():
    """Let the next kernel start as soon as there is room on the chip."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


def make_counters(device: torch.device) -> None:
    """Allocate the counters of a device; before a CUDA graph is captured there, whose memory is not for keeping."""
    if device not in _tables:
        table = torch.zeros(_NUM_STREAMS, _NUM_COUNTERS, dtype=torch.int32, device=device)
        _tables[device] = table, {}


def counters(device: torch.device, number: int) -> Tensor:
    """At least ``number`` zeros [..] int32 that no other stream uses.

    Kernels of a stream run one after the other, so they may share them. Two CUDA graphs captured on one stream may not
    be replayed on two at a time.
    """
    make_counters(device)
    table, place = _tables[device]
    stream = torch.cuda.current_stream(device).cuda_stream
    if number > _NUM_COUNTERS or (stream not in place and len(place) == _NUM_STREAMS):
        return torch.zeros(number, dtype=torch.int32, device=device)
    return table[place.setdefault(stream, len(place))]
