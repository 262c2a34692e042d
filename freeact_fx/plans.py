"""The transform of each plan, in closed form from a group's moments.

The plans differ in the moments that go in:

==========  ==========================================================================
single      the mixture of the types, about zero
shift       the mixture, each type about its mean
branch      as shift; its columns are the strongest directions of what comes out
duplicate   each type's own about its mean, one slice each, under the mixture's channel scale
paper       each type's own about zero, narrow slices (``narrow_slices``)
==========  ==========================================================================
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .closed_form import channel_scale, damped, kronecker_factors
from .moments import GroupMoments, scaled, transformed_gram, transformed_moment
from .narrow_slices import narrow_factors
from .reference import branch_codes
from .transform import GroupTransform

_SUBSPACE_ITERATIONS = 6
_BRANCH_ROUNDS = 3
_LEAST_REST = 1e-3


def fit_transform(plan: str, moments: GroupMoments) -> GroupTransform:
    """The transform of a plan for a group's statistics, fp32 on the device of the weights; clips are 1, to be searched.

    plan  one of ``config.PLANS``; ``branch`` is ``shift`` until it has columns (``with_branch``)
    """
    config = moments.statistics.config
    shifted = plan not in ("single", "paper")
    generator = torch.Generator().manual_seed(config.seed)
    mixture, gram = damped(moments.mixture(centred=shifted)), damped(moments.gram)
    scale = channel_scale(mixture, gram)
    gram = scaled(gram, 1 / scale)
    slice_of_type = (0,) * (config.num_types + 1)
    if plan in ("duplicate", "paper"):
        owners, slice_of_type = moments.slices()
        # A factor has about as many rows to be estimated.
        prior = sum(moments.shape)
        own = [moments.shrunk(t, prior, centred=shifted) for t in owners]
        of_slices = [scaled(damped(moment), scale) for moment in own]
    else:
        of_slices = [scaled(mixture, scale)]
    if plan == "paper":
        factors = narrow_factors(of_slices, gram, moments.shape, config.qmax, generator)
    else:
        factors = [kronecker_factors(c, gram, moments.shape, generator) for c in of_slices]
    shift = None
    if shifted:
        shift = moments.statistics.means().to(gram.device).bfloat16()
        if not moments.statistics.are_alike:
            shift[-1] = 0
    return GroupTransform(
        plan=plan,
        left=torch.cat([left for left, _ in factors], 1).float(),
        right=torch.stack([right for _, right in factors]).float(),
        clip=torch.ones(config.num_types + 1, device=gram.device),
        shift=shift,
        channel_scale=scale,
        widths=tuple(left.shape[1] for left, _ in factors),
        slice_of_type=slice_of_type,
    )


def with_branch(
    fitted: GroupTransform, moments: GroupMoments, rank: int, *, own: bool
) -> GroupTransform:
    """Plan ``branch``: the strongest directions of what a fitted plan ``shift`` makes of the tokens, as columns.

    rank  columns of all types together
    own   each type has its own ``rank // num_types`` of them, in place of sharing all

    A shared branch also takes its directions out of what is rounded of the weight. Rounding error goes with the product
    of both traces; where that is least, the columns are the strongest directions of the sum of both moments, each
    relative to what the columns leave of its trace. Along own columns the weight still meets other types' tokens and
    stays whole: the type's own moment decides alone.
    """
    num_types = moments.statistics.config.num_types
    generator = torch.Generator().manual_seed(moments.statistics.config.seed)
    if own:
        own_rank = rank // num_types
        by_type = []
        for index in range(num_types):
            moment = moments.shrunk(index, fitted.num_features, centred=True)
            joint = transformed_moment(fitted, moment, index)
            by_type.append(strongest_directions(joint, own_rank, generator))
        lowrank = branch_codes(torch.cat(by_type, 1))
        return replace(fitted, plan="branch", lowrank=lowrank, own_rank=own_rank)
    c = transformed_moment(fitted, moments.mixture(centred=True), 0)
    g = transformed_gram(fitted, moments.gram)
    rest_of_c, rest_of_g = c.trace(), g.trace()
    for _ in range(_BRANCH_ROUNDS):
        joint = c / rest_of_c.clamp_min(1e-30) + g / rest_of_g.clamp_min(1e-30)
        columns = strongest_directions(joint, rank, generator)
        # Few tokens leave nothing at all, other ones would.
        rest_of_c, rest_of_g = (
            torch.maximum(m.trace() - (columns * (m @ columns)).sum(), _LEAST_REST * m.trace())
            for m in (c, g)
        )
    lowrank = branch_codes(columns)
    return replace(fitted, plan="branch", lowrank=lowrank)


def strongest_directions(joint: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The leading eigenvectors [n, R] of a positive semidefinite matrix [n, n] fp32, by subspace iteration.

    Directions whose eigenvalues are close may come out mixed with one another; a branch does not mind.
    """
    size = joint.shape[0]
    if 4 * rank >= size:
        return torch.linalg.eigh(joint)[1][:, -rank:].flip(1).contiguous()
    basis = torch.randn(size, rank + 16, generator=generator).to(joint.device)
    for _ in range(_SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(joint @ basis)[0]
    vectors = torch.linalg.eigh(basis.t() @ joint @ basis)[1]
    return (basis @ vectors[:, -rank:].flip(1)).contiguous()
