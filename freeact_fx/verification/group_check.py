"""One group of a quantised model beside its float original, on the same tokens: how wrong it is, what would mend it.

Everything is computed from the float activation that the group reads, so an error here is the group's own. For each
Linear and type of token::

    exact      without rounding, with the weight side made anew: 0, but for a slice narrower than K
    nearest    what rounding to nearest without clipping costs on these tokens: the yardstick
    rounded    what the model's own operands cost; its integer product is exact here, whatever the engine does

Operands that fit each other and the weight cost about as much as the yardstick, whatever the tokens. To tell tokens
that run as the wrong type, each is also taken as every other type (and sent into every other slice). Only sums are
kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..config import QuantConfig
from ..transform import (
    GroupTransform,
    PackedLinear,
    quantize_branch,
    quantize_weight,
    treats_types_alike,
)

# Tokens at a time: an output of 16384 channels takes 64 MB in fp32.
_BLOCK = 1024
# Tokens that are tried as other types, evenly spaced.
TRIED_TOKENS = 512
# Tokens on which the running graph is compared with the reference, evenly spaced.
RUN_TOKENS = 32
# Below this relative error an output is right, whatever was predicted.
SMALL_ERROR = 0.01


@dataclass
class Errors:
    """Sums of squares by row (type of token, or output channel)."""

    error: Tensor  # [rows] fp64
    energy: Tensor  # [rows] fp64

    @staticmethod
    def zeros(rows: int) -> Errors:
        return Errors(
            torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        )

    def add(self, error: Tensor, energy: Tensor, rows: Tensor | None = None) -> None:
        """Sums of squares of tokens (``rows``: their types) or of channels."""
        error, energy = error.detach().double().cpu(), energy.detach().double().cpu()
        if rows is None:
            self.error += error
            self.energy += energy
        else:
            self.error.index_add_(0, rows.cpu(), error)
            self.energy.index_add_(0, rows.cpu(), energy)

    def relative(self, row: int | None = None) -> float:
        """Relative L2 error of a row, or of all of them; 0 where nothing was seen."""
        error, energy = (
            (self.error.sum(), self.energy.sum())
            if row is None
            else (self.error[row], self.energy[row])
        )
        if not bool(error.isfinite()):
            return math.inf
        return math.sqrt(float(error) / float(energy)) if float(energy) else 0.0


@dataclass
class LinearCheck:
    """What was measured of one Linear; errors are of its outputs without the bias, by type of token."""

    name: str
    weight: Tensor | None  # [N, K], dense; None: there is no float original
    bias: Tensor | None
    packed: PackedLinear
    exact: Errors
    nearest: Errors
    rounded: Errors
    nearest_by_channel: Errors
    rounded_by_channel: Errors
    engine: float = (
        0.0  # difference of the engine's integer product from the exact one; above 1 it is wrong
    )
    as_run: Errors = field(
        default_factory=lambda: Errors.zeros(1)
    )  # of the running graph from the reference

    @staticmethod
    def of(
        name: str, weight: Tensor | None, bias: Tensor | None, packed: PackedLinear, rows: int
    ) -> LinearCheck:
        channels = packed.weight.shape[0]
        exact, nearest, rounded = (Errors.zeros(rows) for _ in range(3))
        return LinearCheck(
            name,
            weight,
            bias,
            packed,
            exact,
            nearest,
            rounded,
            Errors.zeros(channels),
            Errors.zeros(channels),
        )

    def compare_engine(self, codes: Tensor, product: Tensor, codes_w: Tensor) -> None:
        """Compare the engine's integer product of codes [n, K'] with the exact one [n, N]."""
        if codes.numel() == 0:
            return
        by_engine = torch.ops.freeact.int_mm(codes, self.packed.weight)
        worst = ((by_engine - product).abs() / _engine_limit(codes, codes_w)).max()
        self.engine = max(self.engine, math.inf if bool(worst.isnan()) else float(worst))


@dataclass(frozen=True)
class Alternatives:
    """Errors of tokens [n] as they ran, and as each type or in each slice [n, choices]; relative to their energy."""

    tokens: Tensor  # [n] positions
    types: Tensor  # [n] as they ran
    own: Tensor  # [n]
    others: Tensor  # [n, choices]


@dataclass
class GroupCheck:
    """One group.

    state       "typed", "default" or "refused", as annotate found
    statistics  what calibration measured of it, or empty
    """

    transform: GroupTransform
    linears: list[LinearCheck]
    config: QuantConfig
    state: str
    statistics: dict[str, Any]
    num_tokens: int = 0
    tokens_by_row: Tensor = field(init=False)
    as_types: list[Alternatives] = field(default_factory=list)
    in_slices: list[Alternatives] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens_by_row = torch.zeros(len(self.row_names), dtype=torch.int64)

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def plan(self) -> str:
        return ("own " if self.transform.own_rank else "") + self.transform.plan

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost without rounding: every slice is as wide as K."""
        return all(width == self.transform.left.shape[0] for width in self.transform.widths)

    @property
    def is_alike(self) -> bool:
        """Whether there are types, and the group treats all of them alike."""
        return treats_types_alike(self.transform.num_rows, self.config.num_types)

    @property
    def row_names(self) -> tuple[str, ...]:
        return ("all types", "untyped") if self.is_alike else self.config.row_names

    @property
    def seen(self) -> list[int]:
        """Rows of the types that tokens had."""
        return [i for i, e in enumerate(self.linears[0].rounded.energy.tolist()) if e]

    def calibrated(self, linear: str, row: int) -> float | None:
        """The relative L2 error that calibration measured on tokens that it had held out."""
        by_type = self.statistics.get("error", {}).get(linear, {})
        found = by_type.get(self.row_names[row])
        if self.is_alike and row == 0 and by_type:
            tokens, energy = self.statistics["tokens"], self.statistics["energy"][linear]
            parts = {name: tokens[name] * energy[name] for name in by_type}
            total = max(sum(parts.values()), 1e-30)
            found = sum(parts[name] * error for name, error in by_type.items()) / total
        return None if found is None else math.sqrt(found)

    # ------------------------------------------------------------------ measuring

    def take(self, x: Tensor, types: Tensor | None, there: Tensor | None) -> None:
        """Measure a call.

        x      [..., K], the activation of the float model
        types  [...] of its tokens, or None: all have the one that the state says
        there  [...] bool, False for padding, or None
        """
        tokens = x.detach().reshape(-1, x.shape[-1])
        positions = torch.arange(tokens.shape[0], device=x.device)
        if there is not None:
            positions = positions[there.reshape(-1)]
        rows = self.rows_of(types, x).reshape(-1)
        if not len(positions):
            return
        self.num_tokens += len(positions)
        self.tokens_by_row += torch.bincount(rows[positions], minlength=len(self.row_names)).cpu()
        sides = [self._sides(linear) for linear in self.linears]
        for block in positions.split(_BLOCK):
            u = tokens[block].float()
            for linear, side in zip(self.linears, sides, strict=True):
                self._measure(linear, side, u, rows[block])
        if self.state == "refused" or self.config.qmax == 0:
            return
        step = -(-len(positions) // TRIED_TOKENS)
        tried = positions[::step]
        u, own = tokens[tried].float(), rows[tried]
        wanted = u @ dense_of(self.linears[0]).t()
        if self._depends_on_type():
            choices = [torch.full_like(own, t) for t in range(self.config.num_types)]
            self.as_types.append(self._tried(u, own, wanted, tried, choices, []))
        slices = range(len(self.transform.widths))
        if len(slices) > 1:
            self.in_slices.append(self._tried(u, own, wanted, tried, [], list(slices)))

    def rows_of(self, types: Tensor | None, x: Tensor) -> Tensor:
        """Rows of the tables that the tokens of an activation use."""
        if self.is_alike:
            types, row = None, 0
        else:
            row = len(self.row_names) - 1 if self.state == "refused" else 0
        if types is not None:
            return types.long().to(x.device)
        return torch.full(x.shape[:-1], row, device=x.device)

    def _depends_on_type(self) -> bool:
        t = self.transform
        by_table = t.shift is not None or t.own_rank or len(set(t.slice_of_type)) > 1
        return bool(by_table) and self.transform.is_typed

    def _transformed(
        self, u: Tensor, rows: Tensor, transform: GroupTransform
    ) -> tuple[Tensor, Tensor | None]:
        t = transform
        return reference.transform(
            u,
            rows,
            t.shift,
            t.channel_scale,
            t.left,
            t.right,
            t.lowrank,
            t.widths,
            t.slice_of_type,
            0,
            t.own_rank,
        )

    def _sides(self, linear: LinearCheck) -> tuple[PackedLinear, PackedLinear, Tensor]:
        """A Linear's operands with quantisers off, rounded to nearest (codes as fp32), and its own codes as fp32."""
        t = self.transform
        dense = dense_of(linear)
        rest, branch = t.split_branch(t.transformed_weight(dense))
        rest, table = rest.float(), t.bias_table(dense, None)
        ones = torch.ones(len(t.widths), dense.shape[0], device=dense.device)
        exact = PackedLinear(rest, ones, table)
        sizes = [width * t.right.shape[-1] for width in t.widths]
        pairs = [quantize_weight(part, search=False) for part in rest.split(sizes, 1)]
        codes = torch.cat([c for c, _ in pairs], 1).float()
        nearest = PackedLinear(codes, torch.stack([s for _, s in pairs]), table)
        if branch is not None:
            kept = branch.float()
            exact = replace(
                exact,
                branch_weight=kept,
                branch_scale=torch.ones(kept.shape[0], device=kept.device),
            )
            branch_weight, branch_scale = quantize_branch(kept)
            nearest = replace(nearest, branch_weight=branch_weight, branch_scale=branch_scale)
        return exact, nearest, self.codes_of(linear)

    def codes_of(self, linear: LinearCheck) -> Tensor:
        """A Linear's own weight codes [N, K'] fp32."""
        weight = linear.packed.weight
        if weight.is_floating_point():
            return weight
        return reference.unpack_int4(weight, self.transform.num_codes).float()

    def _measure(
        self,
        linear: LinearCheck,
        sides: tuple[PackedLinear, PackedLinear, Tensor],
        u: Tensor,
        rows: Tensor,
    ) -> None:
        exact, nearest, own_codes = sides
        t, qmax = self.transform, self.config.qmax
        want = u @ dense_of(linear).t()
        energy, by_channel = want.square().sum(1), want.square().sum(0)
        z, coefficients = self._transformed(u, rows, t)
        ones = torch.ones_like(z[:, :1])

        def difference(product: Tensor, scale: Tensor, side: PackedLinear) -> Tensor:
            return self.epilogue(product, scale, coefficients, side, rows).sub_(want).square_()

        off = difference(z @ exact.weight.t(), ones, exact)
        linear.exact.add(off.sum(1), energy, rows)
        if not qmax:
            linear.rounded.add(off.sum(1), energy, rows)
            return
        codes, scale = reference.quantize_tokens(z, torch.ones_like(t.clip[:1]), qmax)
        near = difference(codes.float() @ nearest.weight.t(), scale, nearest)
        linear.nearest.add(near.sum(1), energy, rows)
        linear.nearest_by_channel.add(near.sum(0), by_channel)
        codes, scale = reference.quantize_tokens(z, t.clip[rows].unsqueeze(1), qmax)
        product = exact_product(codes, linear.packed.weight, own_codes)
        got = self.epilogue(product, scale, coefficients, linear.packed, rows)
        if linear.bias is not None:
            got = got - linear.bias.detach().float()
        wrong = got.sub_(want).square_()
        linear.rounded.add(wrong.sum(1), energy, rows)
        linear.rounded_by_channel.add(wrong.sum(0), by_channel)
        linear.compare_engine(codes, product, own_codes)

    def epilogue(
        self,
        product: Tensor,
        scale: Tensor,
        coefficients: Tensor | None,
        side: PackedLinear,
        rows: Tensor,
        transform: GroupTransform | None = None,
    ) -> Tensor:
        return reference.epilogue(
            product,
            scale,
            side.weight_scale,
            side.bias_table,
            coefficients,
            side.branch_weight,
            side.branch_scale,
            rows,
            (transform or self.transform).slice_of_type,
            0,
            torch.float32,
        )

    def take_run(
        self, linear: LinearCheck, x: Tensor, types: Tensor | None, y: Tensor, there: Tensor | None
    ) -> None:
        """Compare what the running graph made of an activation with the reference, on a few tokens.

        x, y  [..., K] and [..., N], as they ran; types and there as in ``take``
        """
        tokens, outputs = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        positions = torch.arange(tokens.shape[0], device=x.device)
        if there is not None:
            positions = positions[there.reshape(-1)]
        few = positions[:: -(-len(positions) // RUN_TOKENS) or 1]
        if not len(few):
            return
        rows = self.rows_of(types, x).reshape(-1)[few]
        codes_w = self.codes_of(linear)
        want = self.output(linear, tokens[few].float(), rows, codes_w, compare_engine=True)
        got = outputs[few].float()
        error, energy = (got - want).square().sum(), want.square().sum()
        linear.as_run.add(error[None], energy[None])

    def output(
        self,
        linear: LinearCheck,
        u: Tensor,
        rows: Tensor,
        codes_w: Tensor,
        transform: GroupTransform | None = None,
        *,
        compare_engine: bool = False,
    ) -> Tensor:
        """What a Linear's own operands make of tokens [n, K] fp32, its bias included: [n, N] fp32."""
        t = transform or self.transform
        z, coefficients = self._transformed(u, rows, t)
        clip = t.clip[rows].unsqueeze(1)
        codes, scale = reference.quantize_tokens(z, clip, self.config.qmax)
        product = exact_product(codes, linear.packed.weight, codes_w)
        if compare_engine and self.config.qmax:
            linear.compare_engine(codes, product, codes_w)
        return self.epilogue(product, scale, coefficients, linear.packed, rows, t)

    def _tried(
        self,
        u: Tensor,
        own: Tensor,
        wanted: Tensor,
        positions: Tensor,
        types: Sequence[Tensor],
        slices: Sequence[int],
    ) -> Alternatives:
        linear = self.linears[0]
        codes_w = self.codes_of(linear)
        bias = 0.0 if linear.bias is None else linear.bias.detach().float()
        energy = wanted.square().sum(1).clamp_min(1e-30)

        def error(rows: Tensor, transform: GroupTransform | None = None) -> Tensor:
            got = self.output(linear, u, rows, codes_w, transform) - bias
            return ((got - wanted).square().sum(1) / energy).cpu()

        moved = [
            replace(self.transform, slice_of_type=(i,) * self.transform.num_rows) for i in slices
        ]
        errors = [error(rows) for rows in types] + [error(own, t) for t in moved]
        return Alternatives(positions.cpu(), own.cpu(), error(own), torch.stack(errors, 1))


def dense_of(linear: LinearCheck) -> Tensor:
    """A Linear's dense weight [N, K] fp32."""
    assert linear.weight is not None, "measured against a float original only"
    return linear.weight.detach().float()


def exact_product(codes: Tensor, packed: Tensor, codes_w: Tensor) -> Tensor:
    """The integer product [n, N] fp32, free of the engine: in fp32 where that is exact."""
    if codes.dtype != torch.int8 or codes.shape[1] * 127 * 7 < 2**24:
        return codes.float() @ codes_w.t()
    return reference.int_mm(codes, packed)


def _engine_limit(codes: Tensor, codes_w: Tensor) -> Tensor | float:
    """By how much an engine may differ from ``exact_product``: half an integer, or the rounding of fp32 sums."""
    if codes.dtype == torch.int8 and codes.shape[1] * 127 * 7 < 2**24:
        return 0.5
    terms = codes.float().abs() @ codes_w.abs().t()
    return terms.mul_(2.0**-23 * math.sqrt(codes.shape[1])).clamp_min_(0.5)
