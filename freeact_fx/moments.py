"""Second moments of a group, as its fits need them: by type and mixed, and of what a transform makes of its tokens.

All in fp32. That is enough: rounding moves an entry by about 1e-7 of its channels' energies, and both the centring here
and the closed form add far more than that to the diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .reference import branch_columns, kronecker
from .statistics import GroupStatistics
from .transform import GroupTransform, illegal_features_reason, kronecker_shape

# Added to a centred moment's diagonal, as a part of what it was about zero.
_FLOOR = 1e-5
# A token type of which fewer tokens were seen is rare: it has no slice or branch columns fitted to it.
FEW_TOKENS = 8


@dataclass(frozen=True)
class GroupMoments:
    """What the fits of a group's plans have in common; each matrix is made at its first use and kept.

    Memory: ``4 K^2`` bytes for each Linear, and for each type twice (about its shift and about zero); once more for
    plans that treat all types alike (about the mean of all).
    """

    statistics: GroupStatistics
    shape: tuple[int, int]  # D1, D2
    grams: list[Tensor]  # [K, K] fp32 of each Linear: W W^T (W is [K, N])
    gram: Tensor  # [K, K] fp32, their sum
    energies: dict[int, list[float]] = field(default_factory=dict)
    """By type: mean squared norm of each Linear's output, its bias aside."""
    _made: dict[tuple[int | None, bool], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(statistics: GroupStatistics) -> GroupMoments:
        """Raises ValueError if K has no legal Kronecker shape."""
        dense = [weight.detach().float() for weight in statistics.weights]
        num_features = dense[0].shape[1]
        shape = kronecker_shape(num_features)
        if shape is None:
            raise ValueError(illegal_features_reason(num_features))
        grams = [weight.t() @ weight for weight in dense]
        gram = torch.stack(grams).sum(0) if len(grams) > 1 else grams[0]
        moments = GroupMoments(statistics, shape, grams, gram)
        for index in moments.seen:
            own = moments.own(index, centred=False)
            moments.energies[index] = [float(torch.vdot(own.flatten(), g.flatten())) for g in grams]
        return moments

    def alike(self) -> GroupMoments:
        """The same for plans that treat all types alike."""
        shared = {key: made for key, made in self._made.items() if not key[1]}
        return replace(self, statistics=self.statistics.alike(), _made=shared)

    @property
    def seen(self) -> list[int]:
        """Types that tokens were seen of; the untyped row may be among them."""
        return sorted(self.statistics.moment)

    @property
    def type_weights(self) -> dict[int, float]:
        """What the tokens of each type count for in a mixture: by their number, over the root of their outputs' energy.

        Why the root: by energy itself, an error would count relative to its own type's outputs, and not at all for how
        much of the residual stream they are; without it, types with small outputs would hardly count. Between the two
        the masked-diffusion model's KL was least.
        """
        count = self.statistics.count / self.statistics.count.sum()
        return {t: float(count[t]) / max(sum(e), 1e-30) ** 0.5 for t, e in self.energies.items()}

    def own(self, index: int, *, centred: bool) -> Tensor:
        """Second moment [K, K] of a type that was seen, about its shift or about zero; on the weights' device."""
        if not self.statistics.are_alike:
            centred = centred and index < self.statistics.config.num_types
        key = (index, centred)
        if key not in self._made:
            device = self.gram.device
            own = self.statistics.moment[index].to(device) / float(self.statistics.count[index])
            if centred:
                # About the shift, which is not the type's own mean if the type was hardly seen.
                total, count = self.statistics.total[index], float(self.statistics.count[index])
                mean = (total / count).to(device)
                shift = self.statistics.means()[index].to(device)
                floor = _FLOOR * own.diagonal()
                own.addr_(mean.float(), shift.float(), alpha=-1)
                own.addr_(shift.float(), (mean - shift).float(), alpha=-1)
                # What is left of a constant input is rounding, of either sign and as large as the channel was.
                own.diagonal().clamp_min_(0).add_(floor)
            self._made[key] = own
        return self._made[key]

    def mixture(self, *, centred: bool) -> Tensor:
        """Second moment [K, K] of all types, by their weights."""
        key = (None, centred)
        if key not in self._made:
            self._made[key] = self.mixture_of(self.type_weights, centred=centred)
        return self._made[key]

    def mixture_of(self, weights: dict[int, float], *, centred: bool) -> Tensor:
        """Second moment [K, K] of some types, each by its weight."""
        total = torch.zeros_like(self.gram)
        for index, weight in weights.items():
            total.add_(self.own(index, centred=centred), alpha=weight)
        return total

    def shrunk(self, index: int, prior_tokens: int, *, centred: bool) -> Tensor:
        """A type's own moment and, as if that many more tokens had been seen, the mixture at the type's energy."""
        mixture = self.mixture(centred=centred)
        if self.is_rare(index):
            return mixture
        own, gram = self.own(index, centred=centred), self.gram.flatten()
        energy, of_mixture = (float(torch.vdot(m.flatten(), gram)) for m in (own, mixture))
        share = prior_tokens / (prior_tokens + float(self.statistics.count[index]))
        return (1 - share) * own + (share * energy / max(of_mixture, 1e-30)) * mixture

    def is_rare(self, index: int) -> bool:
        """Whether too few tokens of a type were seen to fit anything to it alone."""
        return float(self.statistics.count[index]) < FEW_TOKENS

    def slices(self) -> tuple[list[int], tuple[int, ...]]:
        """For plans with a slice per type: the type each slice is made for, and ``slice_of_type``. A rare type shares
        the slice of the most frequent one, and so do untyped tokens."""
        num_types = self.statistics.config.num_types
        largest = int(self.statistics.count[:num_types].argmax())
        owners = [t for t in range(num_types) if not self.is_rare(t)] or [largest]
        shared = owners.index(largest)
        of_type = [owners.index(t) if t in owners else shared for t in range(num_types)]
        return owners, (*of_type, shared)


def factors_of_slice(fitted: GroupTransform, at: int) -> tuple[Tensor, Tensor]:
    """Left [D1, w] and right [D2, D2] factor of a slice."""
    start = sum(fitted.widths[:at])
    return fitted.left[:, start : start + fitted.widths[at]], fitted.right[at]


def columns_of_type(fitted: GroupTransform, index: int) -> Tensor | None:
    """The branch's columns [K', R] fp32 that tokens of a type use; None without any."""
    if fitted.lowrank is None:
        return None
    return branch_columns(fitted.lowrank)[:, branch_of_type(fitted, index)]


def branch_of_type(fitted: GroupTransform, index: int) -> slice:
    """Which of the branch's columns tokens of a type use."""
    start = index * fitted.own_rank
    return slice(start, start + fitted.own_rank) if fitted.own_rank else slice(None)


def scaled(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """``diag(s) C diag(s)`` for a matrix [K, K]."""
    return matrix if scale is None else (matrix * scale).mul_(scale[:, None])


def transformed_moment(fitted: GroupTransform, moment: Tensor, index: int) -> Tensor:
    """``P^T C P`` in the slice of type ``index``, [k, k] fp32, the branch still in it; C is [K, K]."""
    factors = factors_of_slice(fitted, fitted.slice_of_type[index])
    half = kronecker(scaled(moment, fitted.channel_scale), *factors)
    return kronecker(half.t().contiguous(), *factors)


def transformed_gram(fitted: GroupTransform, gram: Tensor) -> Tensor:
    """``Q G Q^T`` of a plan with one slice as wide as K, [K, K] fp32, the branch still in it; G is [K, K]."""
    left, right = (torch.linalg.inv(f.double()).float().t() for f in factors_of_slice(fitted, 0))
    scale = fitted.channel_scale
    half = kronecker(scaled(gram, None if scale is None else 1 / scale), left, right)
    return kronecker(half.t().contiguous(), left, right)


def kronecker_trace(moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``tr(P^T C P)`` for ``P = left kron right``: [D1, w] and [D2, D2], C [D1 * D2, D1 * D2]; a scalar."""
    d1, d2 = left.shape[0], right.shape[0]
    by_right = (moment.view(d1, d2, d1, d2) * (right @ right.t())[:, None]).sum((1, 3))
    return (by_right * (left @ left.t())).sum()


def partial_traces(moment: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Left [D1, D1] and right [D2, D2] partial trace of a matrix [D1 * D2, D1 * D2], fp64."""
    blocks = moment.view(*shape, *shape).double()
    return blocks.diagonal(dim1=1, dim2=3).sum(-1), blocks.diagonal(dim1=0, dim2=2).sum(-1)
