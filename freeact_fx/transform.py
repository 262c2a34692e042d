"""The transform of one group: its operands, its weight side, and which shapes are legal.

A *group* is the set of Linears that read the same activation. It has one ``GroupTransform``; each of its Linears has
one ``PackedLinear``, made from the dense weight by ``pack_linear``. The activation side is in ``reference.py``.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .config import PLANS, QuantConfig
from .reasons import Reason, reason
from .reference import branch_codes, branch_columns, pack_int4

MIN_FEATURES = 32
MAX_FACTOR = 256
# Part of a token's largest magnitude that code 7 stands for when nothing was measured.
DATA_FREE_CLIP = 0.8
_CLIP_RATIOS = torch.linspace(0.5, 1.0, 11).tolist()
# Weights that a search for clips takes at a time: as fit a CPU's cache (0.5 MB in fp32), since it reads each a dozen
# times; elsewhere as many as there is memory for (0.25 GB), since each step is a launch.
_SEARCH_BLOCK_ON_CPU, _SEARCH_BLOCK = 1 << 17, 1 << 26


def kronecker_shape(num_features: int) -> tuple[int, int] | None:
    """The legal factorisation D1 * D2 = K, D1 <= D2, that costs least on tiles of powers of two; None if there is none.

    Legal: K even (two 4-bit codes to a byte), K >= 32, both factors >= 2, none above 256 (a factor is one matrix
    tile of the transform kernel). Examples: 4096 = 64 x 64, 11008 = 86 x 128, 12288 = 96 x 128.
    """
    if num_features % 2 or num_features < MIN_FEATURES:
        return None

    def padded(n: int) -> int:
        return 1 << (n - 1).bit_length()

    shapes = [
        (d1, num_features // d1)
        for d1 in range(2, MAX_FACTOR + 1)
        if num_features % d1 == 0 and d1 <= num_features // d1 <= MAX_FACTOR
    ]
    cost = {s: padded(s[0]) * padded(s[1]) * (padded(s[0]) + padded(s[1])) for s in shapes}
    return min(shapes, key=lambda s: (cost[s], s[0] + s[1]), default=None)


def illegal_features_reason(num_features: int) -> Reason | None:
    """Why a Linear with this many in features cannot be quantised, or None if it can."""
    if num_features < MIN_FEATURES:
        return reason("few_features", least=MIN_FEATURES, num_features=num_features)
    if kronecker_shape(num_features) is not None:
        return None
    if num_features > MAX_FACTOR**2:
        return reason("many_features", most=MAX_FACTOR**2, num_features=num_features)
    legal = next(width for width in itertools.count(num_features) if kronecker_shape(width))
    if num_features % 2:
        return reason("odd_features", num_features=num_features, legal=legal)
    return reason("no_factors", most=MAX_FACTOR, num_features=num_features, legal=legal)


@dataclass(frozen=True)
class GroupTransform:
    """Operands of one group's activation side; see ``reference`` for their meaning. P counts the untyped row too.

    The weight side follows from them: slice i of the weight is multiplied by ``(L_i^+ kron R_i^-1) / s``. All tensors
    are fp32; the shift may be bf16 and the branch int8 (``reference.branch_codes``), since the weight side makes up for
    whatever they are. ``slice_of_type[t]`` is the K slice of type t; ``widths`` are the columns of each left factor.

    A group may treat all types alike: P is 2 then, whatever the number of types.
    """

    plan: str
    left: Tensor  # [D1, sum(widths)]
    right: Tensor  # [S, D2, D2]
    clip: Tensor  # [P]
    shift: Tensor | None = None  # [P, K]
    channel_scale: Tensor | None = None  # [K]
    lowrank: Tensor | None = None  # [K', R]
    widths: tuple[int, ...] = ()
    slice_of_type: tuple[int, ...] = ()
    own_rank: int = 0

    @property
    def num_features(self) -> int:
        return self.left.shape[0] * self.right.shape[-1]

    @property
    def num_codes(self) -> int:
        """K': columns of the codes, all slices together."""
        return sum(self.widths) * self.right.shape[-1]

    @property
    def num_rows(self) -> int:
        """P: the token types and the untyped row."""
        return self.clip.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The operands that are there, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def is_typed(self) -> bool:
        """Whether it asks for types."""
        return self.num_rows > 2

    def alike(self) -> GroupTransform:
        """The same without types, if all types' rows agree."""
        shift = None if self.shift is None else _ends(self.shift)
        slices = (self.slice_of_type[0], self.slice_of_type[-1])
        return replace(self, clip=_ends(self.clip), shift=shift, slice_of_type=slices)

    def to(self, device: torch.device) -> GroupTransform:
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def problem(self) -> str | None:
        """What is wrong with the shapes or values, in words, or None."""
        if self.plan not in PLANS:
            return f"plan must be one of {', '.join(PLANS)}, got {self.plan!r}"
        if self.left.dim() != 2 or self.right.dim() != 3 or self.clip.dim() != 1:
            return "left must be [D1, sum(widths)], right [S, D2, D2] and clip [P]"
        if not self.widths or min(self.widths) < 1:
            return f"widths must give each slice at least one column, got {self.widths}"
        num_features, num_rows = self.num_features, self.num_rows
        expected: dict[str, tuple[int, ...]] = {
            "left": (self.left.shape[0], sum(self.widths)),
            "right": (len(self.widths), self.right.shape[-1], self.right.shape[-1]),
            "shift": (num_rows, num_features),
            "channel_scale": (num_features,),
        }
        if self.lowrank is not None:
            expected["lowrank"] = (self.num_codes, self.lowrank.shape[-1])
            if self.own_rank and self.lowrank.shape[-1] != self.own_rank * (num_rows - 1):
                return f"lowrank needs {self.own_rank} columns for each of {num_rows - 1} types"
        for name, tensor in self.tensors().items():
            if name in expected and tuple(tensor.shape) != expected[name]:
                return f"{name} must have shape {list(expected[name])}, got {list(tensor.shape)}"
            small = {"shift": torch.bfloat16, "lowrank": torch.int8}.get(name)
            if tensor.dtype not in (torch.float32, small):
                rule = "float32" if small is None else f"float32 or {str(small).split('.')[1]}"
                return f"{name} must be {rule}, got {tensor.dtype}"
            if not bool(tensor.isfinite().all()):
                return f"{name} must be finite"
        if len(self.slice_of_type) != num_rows or not all(
            0 <= s < len(self.widths) for s in self.slice_of_type
        ):
            return (
                f"slice_of_type must give each of {num_rows} rows a slice, got {self.slice_of_type}"
            )
        return None

    def transformed_weight(self, weight: Tensor) -> Tensor:
        """The weight side, in fp64: [N, K] to ``Q W`` as [N, K'], all slices side by side."""
        rows = weight.double()
        if self.channel_scale is not None:
            rows = rows / self.channel_scale.double()
        d1, d2 = self.left.shape[0], self.right.shape[-1]
        rows = rows.view(-1, d1, d2)
        parts, start = [], 0
        for index, width in enumerate(self.widths):
            left = torch.linalg.pinv(self.left[:, start : start + width].double())  # [width, D1]
            right = torch.linalg.inv(self.right[index].double())
            parts.append((left @ rows @ right.t()).flatten(1))
            start += width
        return torch.cat(parts, 1)

    def bias_table(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """``mu_t W + b`` as [P, N] fp32; None where there is neither."""
        if self.shift is None:
            return None if bias is None else bias.detach().float().expand(self.num_rows, -1).clone()
        table = self.shift.double() @ weight.double().t()
        return (table if bias is None else table + bias.double()).float()

    def split_branch(self, transformed: Tensor) -> tuple[Tensor, Tensor | None]:
        """A transformed weight [N, K'] without, and as [R, N], its part along the branch; fp64.

        What is left of a token is orthogonal to a shared branch, so the weight's part along it meets zeros: it is
        taken out of what is rounded. With own columns per type it meets other types' tokens and stays.
        """
        if self.lowrank is None:
            return transformed, None
        columns = branch_columns(self.lowrank).double()
        along = transformed @ columns
        if self.own_rank:
            return transformed, along.t()
        rest = transformed - along @ columns.t()
        # Exact for any columns, also when rounding left them only nearly orthonormal.
        return rest, (along + rest @ columns).t()


@dataclass(frozen=True)
class PackedLinear:
    """Operands of one Linear's weight side.

    weight         [N, ceil(K' / 8)] int32 codes; with quantisers off [N, K'] fp32
    weight_scale   [S, N] fp32
    bias_table     [P, N] fp32 or None
    branch_weight  [R, N] int8 codes (fp32 with quantisers off) or None
    branch_scale   [R] fp32 (ones with quantisers off) or None
    """

    weight: Tensor
    weight_scale: Tensor
    bias_table: Tensor | None = None
    branch_weight: Tensor | None = None
    branch_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def alike(self) -> PackedLinear:
        """The same without types, if all types' rows agree."""
        return replace(self, bias_table=None if self.bias_table is None else _ends(self.bias_table))


def treats_types_alike(num_rows: int, num_types: int) -> bool:
    """Whether tables of so many rows, the untyped one among them, are for all of several types alike."""
    return num_rows == 2 < num_types + 1


def _ends(table: Tensor) -> Tensor:
    """The first type's row of a table [P, ..], and the untyped one."""
    return torch.stack([table[0], table[-1]])


def quantize_weight(weight: Tensor, *, search: bool) -> tuple[Tensor, Tensor]:
    """Round each row to 4 bits, symmetric.

    weight  [N, K'] fp32
    search  choose each row's clip by squared error on a grid of 0.5 .. 1.0 of its largest magnitude

    Returns codes [N, K'] int8 in [-7, 7] and scale [N] fp32.
    """
    scale = weight.abs().amax(1).clamp_min(1e-30) / 7
    if search:
        block = _SEARCH_BLOCK_ON_CPU if weight.device.type == "cpu" else _SEARCH_BLOCK
        rows = max(1, block // weight.shape[1])
        blocks = zip(weight.split(rows), scale.split(rows), strict=True)
        scale = torch.cat([_best_scale(*block) for block in blocks])
    codes = (weight / scale.unsqueeze(1)).round_().clamp_(-7, 7).to(torch.int8)
    return codes, scale


def _best_scale(weight: Tensor, largest: Tensor) -> Tensor:
    best_scale, best_error = largest, torch.full_like(largest, torch.inf)
    for ratio in _CLIP_RATIOS:
        scale = (largest * ratio).unsqueeze(1)
        rounded = (weight / scale).round_().clamp_(-7, 7).mul_(scale)
        error = rounded.sub_(weight).square_().sum(1)
        best_scale = torch.where(error < best_error, scale.squeeze(1), best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


def quantize_branch(branch: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a branch's weight [R, N] to 8 bits: codes [R, N] int8 in [-127, 127] and scale [R] fp32."""
    scale = (branch.abs().amax(1) / 127).float().clamp_min(1e-30)
    codes = (branch / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return codes.contiguous(), scale


@torch.no_grad()
def pack_linear(
    transform: GroupTransform,
    weight: Tensor,
    bias: Tensor | None,
    config: QuantConfig,
) -> PackedLinear:
    """Fold the group's weight side into a dense weight [N, K] and pack it, rounded to nearest."""
    transform = transform.to(weight.device)
    rest, branch = transform.split_branch(transform.transformed_weight(weight))
    transformed = rest.float()
    bias_table = transform.bias_table(weight, bias)
    if not config.quantize:
        ones = functools.partial(torch.ones, device=weight.device)
        scale = ones(len(transform.widths), weight.shape[0])
        if branch is None:
            return PackedLinear(transformed, scale, bias_table)
        kept = branch.float().contiguous()
        return PackedLinear(transformed, scale, bias_table, kept, ones(kept.shape[0]))
    sizes = [width * transform.right.shape[-1] for width in transform.widths]
    parts = transformed.split(sizes, 1)
    pairs = [quantize_weight(part, search=config.clip_search) for part in parts]
    return PackedLinear(
        pack_int4(torch.cat([codes for codes, _ in pairs], 1)),
        torch.stack([scale for _, scale in pairs]),
        bias_table,
        *((None, None) if branch is None else quantize_branch(branch)),
    )


def orthogonal_transform(num_features: int, config: QuantConfig) -> GroupTransform:
    """The data-free transform: random orthogonal Kronecker factors, which spread outlier channels over all.

    ``plan="auto"`` gives ``single``. ``shift`` has zero means and ``branch`` a random subspace until a calibration
    fills them. ``paper`` is refused by ``config_needs_checkpoint``: which subspace to keep is a question to the data.
    Raises ValueError if K has no legal Kronecker shape.
    """
    shape = kronecker_shape(num_features)
    if shape is None:
        raise ValueError(illegal_features_reason(num_features))
    generator = torch.Generator().manual_seed(config.seed)

    def orthogonal(n: int, columns: int | None = None) -> Tensor:
        square = torch.randn(n, columns or n, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square)[0].float()

    plan = "single" if config.plan == "auto" else config.plan
    num_types, (d1, d2) = config.num_types, shape
    num_rows = num_types + 1
    num_slices = num_types if plan == "duplicate" else 1
    shifted = plan in ("shift", "branch")
    rank = min(config.branch_rank, num_features // 2)
    return GroupTransform(
        plan=plan,
        left=torch.cat([orthogonal(d1) for _ in range(num_slices)], 1),
        right=torch.stack([orthogonal(d2) for _ in range(num_slices)]),
        clip=torch.full((num_rows,), DATA_FREE_CLIP if config.activation_bits == 4 else 1.0),
        shift=torch.zeros(num_rows, num_features) if shifted else None,
        lowrank=branch_codes(orthogonal(num_features, rank)) if plan == "branch" else None,
        widths=(d1,) * num_slices,
        slice_of_type=(*range(num_types), 0) if num_slices > 1 else (0,) * num_rows,
    )
