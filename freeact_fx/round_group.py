"""Round the Linears of a group under a fitted transform: clips, codes, what absorbs the rounding; measure the error.

Codes are chosen to nearest or by GPTQ. GPTQ's Hessian comes from the moments, so it costs no pass over tokens and has
seen all of them. Columns that stay in high precision behind the codes, those of a branch, can make up for a part of
the rounding: with activations ``[z, c]``, codes for z and the branch for c, the best branch for given codes is::

    V = V_0 + H_cc^-1 H_cz (W' - codes)^T       and GPTQ then minimises under  H_zz - H_zc H_cc^-1 H_cz

Constants by type would be further such columns, but about the types' means z and c have mean zero: only the bias that
rounding itself has is left for them (``QuantConfig.bias_correction``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gptq import damped, gptq
from .moments import GroupMoments, branch_of_type, columns_of_type, transformed_moment
from .predict import ErrorsByLinear, rounding_noise
from .reference import epilogue, pack_int4, quantize_tokens, rows_of_type, transform
from .statistics import GroupStatistics
from .transform import GroupTransform, PackedLinear, quantize_branch, quantize_weight

_CLIPS = torch.linspace(0.5, 1.0, 11).tolist()
# Added to the diagonal of a branch's moment, as a part of its mean: columns of a type that was not seen.
_BRANCH_DAMPING = 1e-3
# Of a sum of products in fp32, relative to the energy that goes in.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WeightSide:
    """A Linear under a fitted transform, before rounding: what becomes codes [N, K'] fp32, and the branch [R, N]."""

    rest: Tensor
    branch: Tensor | None
    bias_table: Tensor | None  # [P, N] fp32


@dataclass(frozen=True)
class RoundedLinear:
    """A Linear's operands before packing: ``PackedLinear`` with codes [N, K'] int8 in place of words."""

    codes: Tensor
    weight_scale: Tensor  # [S, N] fp32
    bias_table: Tensor | None  # [P, N] fp32
    branch_weight: Tensor | None  # [R, N] int8
    branch_scale: Tensor | None  # [R] fp32

    def packed(self) -> PackedLinear:
        branch = (self.branch_weight, self.branch_scale)
        return PackedLinear(pack_int4(self.codes), self.weight_scale, self.bias_table, *branch)


@dataclass(frozen=True)
class Sample:
    """Sampled tokens of a group and the outputs that its dense Linears make of them, their biases aside."""

    statistics: GroupStatistics
    tokens: Tensor  # [n, K] fp32
    types: Tensor  # [n]
    wanted: list[Tensor]  # [n, N] fp32 of each Linear

    @staticmethod
    def of(statistics: GroupStatistics, *, held_out: bool) -> Sample:
        device = statistics.weights[0].device
        tokens, types = (t.to(device) for t in statistics.samples(held_out=held_out))
        wanted = [tokens @ weight.detach().float().t() for weight in statistics.weights]
        return Sample(statistics, tokens, types, wanted)

    def outputs(self, fitted: GroupTransform, linears: Sequence[RoundedLinear]) -> list[Tensor]:
        """What the rounded Linears make of the tokens, biases aside: [n, N] fp32 each, as ``reference`` has them."""
        z, coefficients = _transformed(fitted, self.tokens, self.types)
        clip = rows_of_type(fitted.clip, self.types, 0).unsqueeze(1)
        codes, scale = quantize_tokens(z, clip, self.statistics.config.qmax)
        codes = codes.float()
        outputs = []
        for linear, bias in zip(linears, self.statistics.biases, strict=True):
            output = epilogue(
                codes @ linear.codes.float().t(),
                scale,
                linear.weight_scale,
                linear.bias_table,
                coefficients,
                linear.branch_weight,
                linear.branch_scale,
                self.types,
                fitted.slice_of_type,
                0,
                torch.float32,
            )
            outputs.append(output if bias is None else output - bias.detach().float())
        return outputs


def _transformed(
    fitted: GroupTransform, tokens: Tensor, types: Tensor
) -> tuple[Tensor, Tensor | None]:
    return transform(
        tokens,
        types,
        fitted.shift,
        fitted.channel_scale,
        fitted.left,
        fitted.right,
        fitted.lowrank,
        fitted.widths,
        fitted.slice_of_type,
        0,
        fitted.own_rank,
    )


def search_clip(fitted: GroupTransform, statistics: GroupStatistics) -> GroupTransform:
    """Set the clip of each type to that with the least squared error on the sample, in transformed coordinates; of a
    type that the sample lacks, and of untyped tokens, to the widest of these.

    Why not of the outputs: the transform has made all coordinates matter about equally, and this is far cheaper.
    """
    device = fitted.clip.device
    tokens, types = (t.to(device) for t in statistics.samples())
    z, _ = _transformed(fitted, tokens, types)
    errors = []
    for candidate in _CLIPS:
        ratio = torch.tensor([candidate], device=device)
        codes, scale = quantize_tokens(z, ratio, statistics.config.qmax)
        errors.append((codes.float() * scale).sub_(z).square_().sum(1))
    by_token = torch.stack(errors)
    best = {
        index: _CLIPS[int(by_token[:, types == index].sum(1).argmin())]
        for index in types.unique().tolist()
    }
    widest = max(best.values())
    clip = [best.get(index, widest) for index in range(len(fitted.clip))]
    return replace(fitted, clip=torch.tensor(clip, device=device))


def weight_sides(fitted: GroupTransform, statistics: GroupStatistics) -> list[WeightSide]:
    """What the group's Linears become under a transform, in the order of ``statistics.names``."""
    sides = []
    for weight, bias in zip(statistics.weights, statistics.biases, strict=True):
        dense = weight.detach().float()
        rest, branch = fitted.split_branch(fitted.transformed_weight(dense))
        table = fitted.bias_table(dense, None if bias is None else bias.detach().float())
        sides.append(WeightSide(rest.float(), branch, table))
    return sides


def round_group(
    fitted: GroupTransform, sides: Sequence[WeightSide], moments: GroupMoments, *, by_gptq: bool
) -> list[RoundedLinear]:
    """Choose the codes of a group's Linears: by GPTQ, or to nearest. A branch absorbs rounding only under GPTQ."""
    config = moments.statistics.config
    sizes = [width * fitted.right.shape[-1] for width in fitted.widths]
    num_rows = [side.rest.shape[0] for side in sides]
    # Rows are rounded independently of one another: all Linears at once.
    rest = torch.cat([side.rest for side in sides])
    codes, scales = [], []
    delta: Tensor | None = None
    for at, part in enumerate(rest.split(sizes, 1)):
        target, to_branch = part, None
        if by_gptq:
            hessian, to_branch = _hessian(fitted, moments, at, absorb=config.branch_absorbs)
            # Before the refit: it would let go directions that only tokens of new texts take.
            hessian = damped(hessian, config.gptq_damping)
            if config.refit:
                noise = rounding_noise(part.shape[1], config.qmax)
                target, hessian = refitted(part, hessian, noise)
        rounded, scale = quantize_weight(target, search=config.clip_search)
        if by_gptq:
            rounded = gptq(target, scale, hessian, 0.0)
            if to_branch is not None:
                delta = (part - rounded * scale.unsqueeze(1)) @ to_branch
        codes.append(rounded)
        scales.append(scale)
    parts = zip(
        sides,
        torch.cat(codes, 1).split(num_rows),
        torch.stack(scales).split(num_rows, 1),
        [None] * len(sides) if delta is None else delta.split(num_rows),
        strict=True,
    )
    linears = []
    for side, own_codes, own_scale, own_delta in parts:
        branch = side.branch
        if branch is not None and own_delta is not None:
            branch = branch + own_delta.t()
        operands = (None, None) if branch is None else quantize_branch(branch)
        linears.append(RoundedLinear(own_codes, own_scale.contiguous(), side.bias_table, *operands))
    if config.bias_correction and fitted.shift is not None:
        return _without_bias(fitted, linears, moments.statistics)
    return linears


def refitted(weight: Tensor, hessian: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """The weight whose product with rounded tokens is nearest to that of ``weight`` with the tokens as they are.

    weight   [N, k] fp32
    hessian  [k, k] fp32, moment H of the tokens, damped
    noise    mean squared rounding error of a coordinate, relative to its mean square

    With its best clip a quantiser's error is orthogonal to what it gives, so ``z_hat = (1 - noise) z + d`` with d
    about uncorrelated with z and alike in all coordinates (Bussgang): ``D = noise * mean(diag H) * I``. Then::

        W_hat = W H (H + D)^-1 / (1 - noise)

    which keeps directions that are louder than the noise, and lets go those that would only pass on noise. Nothing is
    done where the noise is below 1e-3 (8-bit activations): there is nothing to gain.

    Returns it, and ``H + D``, the moment that its own rounding meets.
    """
    if noise < 1e-3:
        return weight, hessian
    spread = noise * hessian.diagonal().mean().clamp_min(1e-30)
    noisy = hessian.clone()
    noisy.diagonal().add_(spread)
    factor, failed = torch.linalg.cholesky_ex(noisy)
    if bool(failed):
        return weight, hessian
    # W H (H + D)^-1 = W - W D (H + D)^-1
    target = (weight - spread * torch.cholesky_solve(weight.t(), factor).t()) / (1 - noise)
    return target.contiguous(), noisy


def _hessian(
    fitted: GroupTransform, moments: GroupMoments, at: int, *, absorb: bool
) -> tuple[Tensor, Tensor | None]:
    """Of slice ``at``: the [k, k] fp32 moment of what meets its codes, all types mixed; and [k, R], by which an error
    of the codes goes into the branch, if there is one and it absorbs."""
    centred = fitted.shift is not None
    of_type = {
        index: weight
        for index, weight in moments.type_weights.items()
        if fitted.slice_of_type[index] == at
    }
    if fitted.own_rank:
        own = {i: moments.own(i, centred=centred) * w for i, w in of_type.items()}
    else:
        # Linear in the moment: mix first, transform once.
        mixed = moments.mixture_of(of_type, centred=centred)
        own = {index: mixed for index in list(of_type)[:1]}
    size = fitted.widths[at] * fitted.right.shape[-1]
    rank = 0 if fitted.lowrank is None else fitted.lowrank.shape[1]
    zz = torch.zeros(size, size, device=fitted.left.device)
    zc, cc = zz.new_zeros(size, rank), zz.new_zeros(rank, rank)
    for index, moment in own.items():
        u = transformed_moment(fitted, moment, index)
        # What the branch takes off leaves rounding, of either sign and as large as what was there.
        zz.diagonal().add_(_ROUNDING * u.trace())
        columns = columns_of_type(fitted, index)
        if columns is None or not columns.shape[1]:
            zz += u
            continue
        mine = branch_of_type(fitted, index)
        u_c = u @ columns
        inner = columns.t() @ u_c
        z_c = u_c - columns @ inner
        zz += u - u_c @ columns.t() - columns @ z_c.t()
        zc[:, mine] += z_c
        cc[mine, mine] += inner
    if not (absorb and rank):
        return zz, None
    cc.diagonal().add_(_BRANCH_DAMPING * cc.diagonal().mean().clamp_min(1e-30))
    to_branch = torch.linalg.solve(cc, zc.t()).t()
    return zz - to_branch @ zc.t(), to_branch


def _without_bias(
    fitted: GroupTransform, linears: list[RoundedLinear], statistics: GroupStatistics
) -> list[RoundedLinear]:
    """Add to the tables what rounding takes from the mean of each type's outputs, as the sample has it.

    A mean over n tokens of a type is itself wrong by a part 1 / n of the error's energy; it counts in full only
    against a bias that is larger than that.
    """
    sample = Sample.of(statistics, held_out=False)
    outputs = sample.outputs(fitted, linears)
    corrected = []
    for linear, got, want in zip(linears, outputs, sample.wanted, strict=True):
        missing = want - got
        assert linear.bias_table is not None
        table = linear.bias_table.clone()
        for index in sample.types.unique().tolist():
            own = missing[sample.types == index]
            mean = own.mean(0)
            spread = (own - mean).square().sum() / max(own.shape[0] - 1, 1) / own.shape[0]
            energy = mean.square().sum().clamp_min(1e-30)
            table[index] += mean * (1 - spread / energy).clamp_min(0)
        corrected.append(replace(linear, bias_table=table))
    return corrected


def measured_errors(
    fitted: GroupTransform, linears: Sequence[RoundedLinear], sample: Sample
) -> ErrorsByLinear:
    """Squared error of each Linear's outputs on a sample, relative to their energy, by type name."""
    names = sample.statistics.config.row_names
    seen = {names[i]: sample.types == i for i in sample.types.unique().tolist()}
    errors: ErrorsByLinear = {}
    for name, got, want in zip(
        sample.statistics.names, sample.outputs(fitted, linears), sample.wanted, strict=True
    ):
        difference, energy = (got - want).square().sum(1), want.square().sum(1)
        errors[name] = {
            type_name: float(difference[own].sum() / energy[own].sum().clamp_min(1e-30))
            for type_name, own in seen.items()
        }
    return errors
