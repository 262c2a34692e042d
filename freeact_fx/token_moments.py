"""Counts, sums, second moments and sampled tokens of one activation, by token type, taken in batch by batch.

Everything stays on the device of the activation. Memory, for T types of K channels and S = ``sample_tokens``::

    T * (4 K^2 + 8 S K + 8 K) bytes            (moments fp32, two halves of a sample fp32, sums fp64)

Products and their totals are fp32. Each batch that is added rounds an entry ``C_ij`` of a moment by 3e-8 of
``sqrt(C_ii C_jj)``, whatever the scales of the channels: for 262144 tokens in batches of 512 about 7e-7 in all, and at
worst, for channels that never change, 1e-5. Sampling moves it by ``1 / sqrt(tokens)``, 2e-3, and the fits add 1e-5 of
the diagonal and 1e-3 of the mean eigenvalue. Sums are fp64 over batches: moments are centred with them. A moment is
symmetric: only blocks on and above the diagonal are computed, 9/16 of the work. (Where the user allows TF32, a model
in fp32 gets moments of factors with 10 bits.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import ConfigError

# A moment is made in this many block rows, each from its diagonal on.
_BLOCK_ROWS = 8
# The variance within a type counts, besides its own tokens', this many tokens' of the variance within all types.
_PRIOR_TOKENS = 8
# Median of the square of a standard normal variable.
_MEDIAN_BY_CHANCE = 0.4549


TokenMomentsT = TypeVar("TokenMomentsT", bound="TokenMoments")


@dataclass(frozen=True)
class TypeSplit:
    """How the tokens of a call fall into types. Made once per call: it waits for the device.

    order   [M'] int64, the tokens sorted by type, without padding; None: they are all of one type
    counts  (type, number of tokens) of each type that occurs, ascending
    """

    order: Tensor | None
    counts: tuple[tuple[int, int], ...]

    @staticmethod
    def of(types: Tensor | None, num_tokens: int, padding: Tensor | None = None) -> TypeSplit:
        """Split by types of any shape, one per token; None: all are of type 0. ``padding`` is True where a token is
        none."""
        if types is None and padding is None:
            return TypeSplit(None, ((0, num_tokens),))
        if types is None:
            assert padding is not None
            types = torch.zeros_like(padding, dtype=torch.int32)
        flat = types.reshape(-1)
        if padding is not None:
            flat = flat.masked_fill(padding.reshape(-1), -1)
        numbers, counts = torch.stack(flat.unique(return_counts=True)).tolist()
        order = flat.argsort(stable=True) if len(numbers) > 1 or numbers[0] < 0 else None
        pairs = list(zip(numbers, counts, strict=True))
        if order is not None and numbers[0] < 0:
            order = order[counts[0] :]
            del pairs[0]
        return TypeSplit(order, tuple(pairs))


class TokenMoments:
    """What was seen of one activation.

    count   [P] fp64 on the CPU, tokens of each type; P counts the untyped row
    total   [P, K] fp64, their sums
    sample  type -> keys [n] fp32 on the CPU and tokens [n, K] fp32: those with the largest of uniformly drawn keys,
            so a uniform sample without replacement
    """

    def __init__(
        self, num_features: int, num_rows: int, sample_tokens: int, seed: int, label: str
    ) -> None:
        """With one seed, two instances that see tokens of the same types sample the same ones; label is for errors."""
        self.count = torch.zeros(num_rows, dtype=torch.float64)
        self.total = torch.zeros(num_rows, num_features, dtype=torch.float64)
        self.sample: dict[int, tuple[Tensor, Tensor]] = {}
        self._moment: dict[int, Tensor] = {}  # only the block rows from their diagonals on
        self._half_made: set[int] = set()
        self._room = 2 * sample_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._label = label

    @staticmethod
    def bytes_needed(num_features: int, num_types: int, sample_tokens: int) -> int:
        """Memory if all types occur, in bytes."""
        return num_types * (4 * num_features**2 + 8 * (sample_tokens + 1) * num_features)

    def observe(self, x: Tensor, types: Tensor | TypeSplit | None = None) -> None:
        """Take in an activation [..., K] and its types [...] (None: all 0). Raises ConfigError for NaN or inf."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        if not isinstance(types, TypeSplit):
            types = TypeSplit.of(types, tokens.shape[0])
        if not _exact_in_half(tokens):
            tokens = tokens.float()
        if types.order is not None:
            tokens = tokens[types.order]
        if not types.counts:
            return
        parts = tokens.split([number for _, number in types.counts])
        sums = torch.stack([part.sum(0, dtype=torch.float32) for part in parts])
        if not bool(sums.isfinite().all()):
            raise ConfigError(
                f"calibrate: the input of {self._label} holds NaN or infinite values. Check the batch, "
                f"or run the model in bfloat16 or float32."
            )
        self.total = self.total.to(tokens.device)
        self.count_tokens(types)
        for (index, _), part, part_sum in zip(types.counts, parts, sums, strict=True):
            self.total[index] += part_sum
            self._add_moment(index, part)
            self._add_to_sample(index, part)

    def count_tokens(self, types: TypeSplit) -> None:
        """Take in no more than how many tokens there were."""
        for index, number in types.counts:
            self.count[index] += number

    def _add_moment(self, index: int, tokens: Tensor) -> None:
        num_features = tokens.shape[1]
        if index not in self._moment:
            self._moment[index] = torch.zeros(
                num_features, num_features, dtype=torch.float32, device=tokens.device
            )
        self._half_made.add(index)
        for start, stop in _block_rows(num_features):
            rows, columns = tokens[:, start:stop].t(), tokens[:, start:]
            # Why not addmm_: it may add token by token to the total, and each addition rounds it.
            product = (
                rows @ columns
                if tokens.dtype == torch.float32
                else torch.mm(rows, columns, out_dtype=torch.float32)
            )
            self._moment[index][start:stop, start:] += product

    def _add_to_sample(self, index: int, tokens: Tensor) -> None:
        keys = torch.rand(tokens.shape[0], generator=self._generator)
        if index not in self.sample:
            self.sample[index] = keys[:0], tokens[:0].float()
        held_keys, held = self.sample[index]
        num_held = held_keys.shape[0]
        if num_held == self._room:
            fresh = (keys > held_keys.min()).nonzero().flatten()
        else:
            fresh = keys.topk(min(self._room, keys.shape[0])).indices
        merged = torch.cat([held_keys, keys[fresh]])
        stays = torch.zeros(merged.shape[0], dtype=torch.bool)
        stays[merged.topk(min(self._room, merged.shape[0])).indices] = True
        new = stays[num_held:].nonzero().flatten()
        # The new ones take the places of those that go, and the rest of them places behind.
        places = (~stays[:num_held]).nonzero().flatten()
        rows = tokens[fresh[new].to(tokens.device)].float()
        held_keys[places] = merged[num_held + new[: len(places)]]
        held[places.to(held.device)] = rows[: len(places)]
        if len(new) > len(places):
            held_keys = torch.cat([held_keys, merged[num_held + new[len(places) :]]])
            held = torch.cat([held, rows[len(places) :]])
        self.sample[index] = held_keys, held

    @property
    def moment(self) -> dict[int, Tensor]:
        """Type -> [K, K] fp32, sum of ``x^T x`` over its tokens. The tensors are not copies."""
        for index in self._half_made:
            moment = self._moment[index]
            for start, stop in _block_rows(moment.shape[0]):
                moment[stop:, start:stop] = moment[start:stop, stop:].t()
        self._half_made.clear()
        return self._moment

    def release(self) -> None:
        """Give the memory back; counts and sums stay."""
        self._moment, self.sample = {}, {}
        self._half_made.clear()

    def samples(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Sampled tokens [n, K] and their types [n]: at most ``sample_tokens`` of each type, in the order of the types.

        held_out  False: those to fit on; True: the others, to compare what was fitted. Half of a sample is held out, or
                  a quarter while there are fewer than ``2 * sample_tokens``. They have no token in common, except that
                  a type of which fewer than four tokens were seen has all of them in both
        """
        chosen = {}
        for index, (keys, tokens) in sorted(self.sample.items()):
            # By their keys the tokens are in random order.
            order = keys.argsort(descending=True, stable=True)
            step = 2 if len(order) == self._room else 4
            if len(order) >= 4:
                is_held_out = torch.arange(len(order)) % step == step - 1
                order = order[is_held_out == held_out]
            chosen[index] = tokens[order.to(tokens.device)]
        types = [
            torch.full((part.shape[0],), index, device=part.device)
            for index, part in chosen.items()
        ]
        return torch.cat(list(chosen.values())), torch.cat(types)

    def without_held_out(self: TokenMomentsT) -> TokenMomentsT:
        """A copy of which counts, sums and moments lack the held-out tokens: for a fit to be measured on those.

        The sample is not a copy. A type of which fewer than four tokens were seen stays as it is.
        """
        fit = copy.copy(self)
        fit.count, fit.total = self.count.clone(), self.total.clone()
        fit._moment = dict(self.moment)
        tokens, types = self.samples(held_out=True)
        for index in types.unique().tolist():
            held_out = tokens[types == index]
            if self.sample[index][0].shape[0] >= 4:
                fit.count[index] -= held_out.shape[0]
                fit.total[index] -= held_out.sum(0, dtype=torch.float64)
                fit._moment[index] = torch.addmm(
                    fit._moment[index], held_out.t(), held_out, alpha=-1
                )
                fit._moment[index].diagonal().clamp_min_(0)
        return fit

    def pooled_mean(self) -> Tensor:
        """Mean of all tokens, [K] fp64; 0 without any."""
        return self.total.sum(0) / self.count.sum().clamp_min(1).to(self.total.device)

    def means(self) -> Tensor:
        """Mean of each type, [P, K] fp64, drawn towards that of all tokens as far as its standard error reaches.

        Per channel, with n tokens of a type, their mean m and the mean p of all tokens::

            m' = p + max(0, 1 - 0.455 / median(r), 1 - 9 / r) (m - p)      r = n (m - p)^2 / v
            v  = (sum of squared deviations from m + 8 w) / (n - 1 + 8)

        w is the variance within types over all tokens (about p, if no type has two); the median is over channels, and
        0.455 that of r if the type does not differ. The first term is the positive part of James and Stein's
        estimator, made robust: how much of a usual distance is no chance. By the second a channel that stands out is
        believed alone: one token tells of a massive activation. A mean moves by three standard errors at most and many
        tokens leave it where it is; without a token it is p.
        """
        squares = torch.zeros_like(self.total)
        for index, moment in self._moment.items():
            squares[index] = moment.diagonal()
        count = self.count.to(self.total.device).unsqueeze(1)
        pooled = self.pooled_mean()
        own = self.total / count.clamp_min(1)
        deviations = (squares - count * own.square()).clamp_min(0)
        freedom = (count - 1).clamp_min(0).sum()
        if freedom > 0:
            within = deviations.sum(0) / freedom
        else:
            within = (squares.sum(0) / count.sum().clamp_min(1) - pooled.square()).clamp_min(0)
        variance = (deviations + _PRIOR_TOKENS * within) / (count - 1 + _PRIOR_TOKENS)
        error, distance = variance / count.clamp_min(1), own - pooled
        ratio = distance.square() / error  # NaN where both are 0
        usual = ratio.nanmedian(1, keepdim=True).values
        kept = torch.maximum(1 - _MEDIAN_BY_CHANCE / usual, 1 - 9 / ratio).clamp_min(0)
        return pooled + torch.where(count > 0, kept, 0).nan_to_num(0) * distance


def _exact_in_half(tokens: Tensor) -> bool:
    """Whether tensor cores multiply these as they are: products of two 16-bit floats are exact in their fp32 totals."""
    # AMD's GPUs answer to is_cuda too, and have no such product.
    nvidia = tokens.is_cuda and torch.version.hip is None
    return nvidia and tokens.dtype in (torch.bfloat16, torch.float16)


def _block_rows(num_features: int) -> list[tuple[int, int]]:
    step = -(-num_features // _BLOCK_ROWS)
    return [(a, min(a + step, num_features)) for a in range(0, num_features, step)]
