"""Learned refinement: a group's transform by gradient descent on the error of the group's outputs.

``LearnableTransform`` computes what the quantised Linears of a group compute, in floating point, with rounding that
lets gradients through (straight-through: the derivative of ``round`` is taken as 1). Everything that a
``GroupTransform`` may choose freely is a parameter: the Kronecker factors (free matrices, inverted in fp64 for the
weight side), the channel scale (its logarithm), the clip of each token type and that of each weight row (their logits).
Shift and branch stay as they were fitted. Whatever the parameters become, the weight side inverts the activation side,
so without rounding the outputs stay exact.

``refine`` trains one on the calibration's token sample as FlatQuant (arXiv 2410.09426) trains its transforms: AdamW
with a cosine, ten times the rate for clips, and a loss divided by its own value. Left out: FlatQuant's other
parametrisation of the factors (singular value decomposition, orthogonal parts by Cayley's formula), which spares an
inverse of a small matrix and costs two solves; and plans with slices, whose factors are no square matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from .reference import SMALLEST_SCALE, branch_columns, kronecker, rows_of_type, transform
from .statistics import GroupStatistics
from .transform import GroupTransform, quantize_weight

# The largest clip a parameter starts from: further up the sigmoid is so flat that it would never move.
LARGEST_CLIP = 0.982
_LEARNING_RATE = 5e-3
_CLIP_RATE = 10  # times the learning rate


class _RoundStraightThrough(torch.autograd.Function):
    """Round to the grid of the codes; the derivative is taken as 1."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, qmax: int) -> Tensor:
        return grid.to(torch.float8_e4m3fn).float() if qmax == 448 else grid.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _fake_quantize(values: Tensor, clip: Tensor, qmax: int) -> Tensor:
    """Each row of values [..., K'] rounded to its own grid and scaled back; clip [..., 1] as in ``quantize_tokens``."""
    largest = values.abs().amax(-1, keepdim=True)
    scale = (largest * clip / qmax).clamp_min(SMALLEST_SCALE)
    rounded: Tensor = _RoundStraightThrough.apply((values / scale).clamp(-qmax, qmax), qmax)
    return rounded * scale


def _inverse(factor: Tensor) -> Tensor:
    # Why not inv: it waits on the GPU for whether the matrix is singular. Then the values are not finite.
    return torch.linalg.inv_ex(factor.double())[0].float()


class LearnableTransform(nn.Module):
    """A group's transform with trainable operands: tokens to the fake-quantised outputs of the group's Linears.

    fitted       where to start from; any plan with one slice
    weights      [N_i, K] each, dense; constants here
    biases       [N_i] or None each
    qmax         of the activation codes, as in ``quantize_tokens``; 0: nothing is rounded, weights neither
    clip_search  start from the weight clips of least squared error, instead of nearly 1

    Parameters (fp32): left [D1, D1], right [D2, D2], log_scale [K], clip_logit [P], weight_clip_logit [sum of N_i].
    """

    def __init__(
        self,
        fitted: GroupTransform,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        qmax: int,
        clip_search: bool,
    ) -> None:
        super().__init__()
        assert len(fitted.widths) == 1, "slices are not learned"
        self.fitted, self.qmax = fitted, qmax
        self.sizes = [weight.shape[0] for weight in weights]
        # One matrix for the group: one transform and one product instead of one per Linear.
        self.weight = torch.cat([weight.detach().float() for weight in weights])  # [sum of N_i, K]
        self.columns = None if fitted.lowrank is None else branch_columns(fitted.lowrank)
        tables = [
            fitted.bias_table(weight.detach(), None if bias is None else bias.detach())
            for weight, bias in zip(weights, biases, strict=True)
        ]
        self.bias_table = None  # [P, sum of N_i]
        if any(table is not None for table in tables):
            none = torch.zeros(fitted.num_rows, 1, device=fitted.left.device)
            filled = [
                none.expand(-1, size) if table is None else table
                for table, size in zip(tables, self.sizes, strict=True)
            ]
            self.bias_table = torch.cat(filled, 1)
        scale = fitted.channel_scale
        ones = torch.ones(fitted.num_features, device=fitted.left.device)
        self.left = nn.Parameter(fitted.left.contiguous().clone())
        self.right = nn.Parameter(fitted.right[0].contiguous().clone())
        self.log_scale = nn.Parameter((ones if scale is None else scale).log())
        self.clip_logit = nn.Parameter(fitted.clip.clamp(max=LARGEST_CLIP).logit())
        ratio = torch.full_like(self.weight[:, 0], LARGEST_CLIP)
        if clip_search:
            with torch.no_grad():
                transformed = self._transformed_weight()[0]
                searched = 7 * quantize_weight(transformed, search=True)[1]
                largest = transformed.abs().amax(1).clamp_min(SMALLEST_SCALE)
                ratio = (searched / largest).clamp(max=LARGEST_CLIP)
        self.weight_clip_logit = nn.Parameter(ratio.logit())

    def _transformed_weight(self) -> tuple[Tensor, Tensor | None]:
        """What is rounded of the weight [sum of N_i, K'], and its part along the branch [sum of N_i, R] or None."""
        inverses = _inverse(self.left).t(), _inverse(self.right).t()
        transformed = kronecker(self.weight * (-self.log_scale).exp(), *inverses)
        if self.columns is None:
            return transformed, None
        along = transformed @ self.columns
        if self.fitted.own_rank:
            return transformed, along
        # As ``GroupTransform.split_branch``: exact also for columns that are only nearly orthonormal.
        rest = transformed - along @ self.columns.t()
        return rest, along + rest @ self.columns

    def forward(self, x: Tensor, token_type: Tensor | None = None) -> tuple[Tensor, ...]:
        """Tokens [..., K] of types [...] (None: all are type 0) to each Linear's output [..., N_i], in x's dtype."""
        z, coefficients = transform(
            x,
            token_type,
            self.fitted.shift,
            self.log_scale.exp(),
            self.left,
            self.right.unsqueeze(0),
            self.columns,
            self.fitted.widths,
            self.fitted.slice_of_type,
            0,
            self.fitted.own_rank,
        )
        weight, along = self._transformed_weight()
        if self.qmax:
            clip = rows_of_type(self.clip_logit.sigmoid(), token_type, 0).unsqueeze(-1)
            z = _fake_quantize(z, clip, self.qmax)
            weight = _fake_quantize(weight, self.weight_clip_logit.sigmoid().unsqueeze(1), 7)
        y = z @ weight.t()
        if coefficients is not None and along is not None:
            y = y + coefficients @ along.t()
        if self.bias_table is not None:
            y = y + rows_of_type(self.bias_table, token_type, 0)
        return y.to(x.dtype).split(self.sizes, -1)

    @torch.no_grad()
    def to_group_transform(self) -> GroupTransform:
        """The transform as it stands."""
        return replace(
            self.fitted,
            left=self.left.detach().clone(),
            right=self.right.detach().clone().unsqueeze(0),
            clip=self.clip_logit.sigmoid(),
            channel_scale=self.log_scale.exp(),
        )

    @torch.no_grad()
    def weight_scales(self) -> list[Tensor]:
        """The scale [N_i] fp32 of each Linear's weight rows: its learned clip's, in units of weight per code."""
        largest = self._transformed_weight()[0].abs().amax(1)
        scale = (largest * self.weight_clip_logit.sigmoid() / 7).clamp_min(SMALLEST_SCALE)
        return list(scale.split(self.sizes))


def optimizer_with_schedule(
    transforms: Iterable[LearnableTransform], num_steps: int, learning_rate: float = _LEARNING_RATE
) -> tuple[torch.optim.Optimizer, CosineAnnealingLR]:
    """AdamW over the transforms' parameters, clips at ten times the rate, and a cosine down to a thousandth of it."""
    free: list[nn.Parameter] = []
    clips: list[nn.Parameter] = []
    for module in transforms:
        free += [module.left, module.right, module.log_scale]
        clips += [module.clip_logit, module.weight_clip_logit]
    groups = [
        {"params": free, "lr": learning_rate},
        {"params": clips, "lr": _CLIP_RATE * learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    return optimizer, CosineAnnealingLR(optimizer, num_steps, eta_min=learning_rate * 1e-3)


def descend(optimizer: torch.optim.Optimizer, schedule: CosineAnnealingLR, loss: Tensor) -> None:
    """One step on a loss divided by its own value: losses of any size then move the parameters alike."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Why not backward: it would leave gradients on the model's own parameters too.
    gradients = torch.autograd.grad(loss / loss.detach().clamp_min(SMALLEST_SCALE), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # Fused AdamW reads memory in order, and a factor's gradient comes transposed.
        parameter.grad = gradient.contiguous()
    optimizer.step()
    schedule.step()


@dataclass(frozen=True)
class _Sample:
    """Tokens that an error is measured on."""

    tokens: Tensor  # [M, K]
    types: Tensor  # [M]
    wanted: Tensor  # [M, sum of N_i]
    token_weight: Tensor  # [M], what a token's squared error counts

    @staticmethod
    def of(statistics: GroupStatistics, *, held_out: bool) -> _Sample:
        device = statistics.weights[0].device
        tokens, types = (t.to(device) for t in statistics.samples(held_out=held_out))
        wanted = torch.cat([tokens @ w.detach().float().t() for w in statistics.weights], 1)
        share = (statistics.count / statistics.count.sum()).to(device, torch.float32)
        energy = torch.zeros_like(share).index_add_(0, types, wanted.square().sum(1))
        return _Sample(tokens, types, wanted, (share / energy.clamp_min(SMALLEST_SCALE))[types])

    def error(self, module: LearnableTransform) -> Tensor:
        outputs = torch.cat(module(self.tokens, self.types), -1)
        return (self.token_weight * (outputs - self.wanted).square().sum(1)).sum()


def refine(fitted: GroupTransform, statistics: GroupStatistics) -> GroupTransform:
    """Train a fitted transform for ``QuantConfig.refine_steps`` steps on the tokens that were sampled to fit on.

    Returns ``fitted`` itself if the error on the held-out tokens is not smaller in the end, and always if it has
    several slices, as ``duplicate`` and ``paper`` do. Branch columns stay; in the new coordinates others may be
    stronger. Weights are to be packed anew, and their clips searched then: the learned ones are those of the training.

    Error: squared, of the group's outputs, of each type relative to the energy of its outputs, and mixed by the numbers
    of their tokens. (A type counts otherwise in ``GroupMoments.type_weights``, with the root of that energy.)
    """
    config = statistics.config
    if not config.refine_steps or len(fitted.widths) > 1:
        return fitted

    def learnable(start: GroupTransform) -> LearnableTransform:
        # A bias is in the wanted outputs and in ours alike.
        weights, no_biases = statistics.weights, [None] * len(statistics.weights)
        return LearnableTransform(
            start, weights, no_biases, qmax=config.qmax, clip_search=config.clip_search
        )

    sample = _Sample.of(statistics, held_out=False)
    with torch.enable_grad():
        module = learnable(fitted)
        optimizer, schedule = optimizer_with_schedule([module], config.refine_steps)
        for _ in range(config.refine_steps):
            descend(optimizer, schedule, sample.error(module))
    refined = module.to_group_transform()
    refined.clip[-1] = refined.clip[sample.types.unique()].max()  # untyped tokens may be any
    new_tokens = _Sample.of(statistics, held_out=True)
    with torch.no_grad():
        before, after = (float(new_tokens.error(learnable(t))) for t in (fitted, refined))
    return refined if after < before else fitted
