"""What the transform kernel may compute: bounds that follow from where it rounds, around the reference in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freeact_fx import reference
from freeact_fx.transform import GroupTransform

FP16_ROUNDING = 2.0**-11
FP16_SMALLEST = 2.0**-25  # half the distance of subnormals
BF16_ROUNDING = 2.0**-9
FP32_ROUNDING = 2.0**-24


class Bounds(NamedTuple):
    """Lowest and highest codes [M, K'], scale [M, 1] in fp64 and how far from it a kernel may be."""

    low: Tensor
    high: Tensor
    scale: Tensor
    scale_error: Tensor

    @property
    def share_of_ties(self) -> float:
        """Part of the codes that rounding could move; a test with many of them shows nothing."""
        return float((self.low != self.high).double().mean())

    def check(self, codes: Tensor, scale: Tensor) -> None:
        assert bool(((scale - self.scale).abs() <= self.scale_error).all())
        values = codes.double()  # e4m3 has no comparison
        assert bool(((self.low <= values) & (values <= self.high)).all())


def codes_of(
    transform: GroupTransform,
    x: Tensor,
    types: Tensor | None,
    default_type: int,
    qmax: int,
    x_error: Tensor | None = None,
    *,
    in_bf16: bool = False,
) -> Bounds:
    """Bounds on the codes of x [M, K]; the rest is that of ``values_of``."""
    t = transform
    exact, error = values_of(t, x, types, default_type, x_error, in_bf16=in_bf16)
    types = None if types is None else types.long()
    clip = reference.rows_of_type(t.clip, types, default_type).double().unsqueeze(-1)
    scale = exact.abs().amax(-1, keepdim=True) * clip / qmax
    scale_error = error.amax(-1, keepdim=True) * clip / qmax + 8 * FP32_ROUNDING * scale
    grid = exact / scale
    grid_error = (error / scale + grid.abs() * scale_error / scale) * (1 + 2**-8)
    ends = ((grid + e).clamp(-qmax, qmax) for e in (-grid_error, grid_error))
    low, high = (nearest_e4m3(e) if qmax == 448 else e.round() for e in ends)
    return Bounds(low, high, scale, scale_error)


def values_of(
    transform: GroupTransform,
    x: Tensor,
    types: Tensor | None,
    default_type: int,
    x_error: Tensor | None = None,
    *,
    in_bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [M, K] transformed, in fp64, and how far a kernel may be from that: there the token, both factors and the
    half-way result are fp16, in units of the largest magnitude of each, and sums are fp32.

    x_error  [M, K]: how far the kernel's x may be from x
    in_bf16  the kernel for Hopper, where all that is bf16, each step of a token's way there too
    """
    t = transform
    d1, d2 = t.left.shape[0], t.right.shape[-1]
    wide = [None if o is None else o.double() for o in (t.shift, t.channel_scale, t.left, t.right)]
    types = None if types is None else types.long()
    exact, _ = reference.transform(
        x.double(), types, *wide, None, t.widths, t.slice_of_type, default_type, 0
    )
    # The reference's own steps on magnitudes, once plain and once with each operand at the end of its rounding.
    shift = 0.0 if wide[0] is None else reference.rows_of_type(wide[0], types, default_type)
    channel_scale = 1.0 if wide[1] is None else wide[1]
    token = ((x.double() - shift) * channel_scale).abs().view(-1, d1, d2)
    largest = token
    if x_error is not None:
        # The shift is one more rounding, of numbers that may be larger than what it leaves.
        moved = x_error + FP32_ROUNDING * (x.double().abs() + abs(shift))
        largest = token + (moved * abs(channel_scale)).view(-1, d1, d2)
    if in_bf16:
        # x, its norm and the norm's weight, weight and norm together, the shift; two differences (the shift of an RMS
        # norm is taken away in two parts), scale, product.
        moved = BF16_ROUNDING * (4 * x.double().abs() + abs(shift)) * abs(channel_scale)
        largest = (largest + moved.view(-1, d1, d2)) * (1 + BF16_ROUNDING) ** 4
    index = reference.slice_of_token(types, t.slice_of_type, default_type)
    index = torch.as_tensor(index).expand(x.shape[0])
    starts = torch.tensor([0, *t.widths]).cumsum(0)
    error = torch.zeros_like(exact)
    for m in range(x.shape[0]):
        first, last = int(starts[index[m]]), int(starts[index[m] + 1])
        left, right = t.left[:, first:last].double().abs().t(), t.right[index[m]].double().abs()
        units = [part.max() for part in (left, largest[m], right)]
        if in_bf16:
            half = left @ largest[m] * (1 + BF16_ROUNDING) ** 2
            most = half @ right * (1 + BF16_ROUNDING)
        else:
            half = rounded(left, units[0]) @ rounded(largest[m], units[1])
            most = rounded(half, units[0] * units[1]) @ rounded(right, units[2])
        most = most * (1 + (d1 + d2 + 8) * FP32_ROUNDING)
        error[m, first * d2 : last * d2] = (most - left @ token[m] @ right).flatten()
    return exact, error


def nearest_e4m3(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).double()


def rounded(magnitudes: Tensor, unit: Tensor) -> Tensor:
    """The most that fp16 makes of magnitudes, kept in units."""
    return magnitudes * (1 + FP16_ROUNDING) + FP16_SMALLEST * unit
