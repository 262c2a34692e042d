"""What calibration keeps of one group: its Linears and the moments and tokens of the activation that they read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .config import MAX_RANK, QuantConfig
from .token_moments import TokenMoments


class GroupStatistics(TokenMoments):
    """One group: its Linears and what was seen of the activation that they read."""

    def __init__(
        self,
        names: list[str],
        weights: list[Tensor],  # [N, K] each, dense
        biases: list[Tensor | None],
        config: QuantConfig,
    ) -> None:
        self.names, self.weights, self.biases, self.config = names, weights, biases, config
        self.are_alike = False
        super().__init__(
            weights[0].shape[1], config.num_types + 1, config.sample_tokens, config.seed, names[0]
        )

    def keep_linears(self, wanted: Callable[[str], bool]) -> None:
        """Drop the other Linears."""
        kept = [i for i, name in enumerate(self.names) if wanted(name)]
        self.names = [self.names[i] for i in kept]
        self.weights = [self.weights[i] for i in kept]
        self.biases = [self.biases[i] for i in kept]

    def alike(self) -> GroupStatistics:
        """The same as a plan sees it that treats all types alike: one mean, one type in the samples. Not a copy."""
        found = copy.copy(self)
        found.are_alike = True
        return found

    def means(self) -> Tensor:
        """[P, K] fp64; see ``TokenMoments``."""
        if not self.are_alike:
            return super().means()
        return self.pooled_mean().expand_as(self.total).clone()

    def samples(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        tokens, types = super().samples(held_out=held_out)
        return tokens, torch.zeros_like(types) if self.are_alike else types

    def branch_rank(self) -> int:
        """Columns of a shared branch that ``memory_budget`` pays for, and what tables by type would take if there are
        none; a quarter of K and ``MAX_RANK`` at most. From 64 on in sixteens: rows of whole words."""
        num_features = self.weights[0].shape[1]
        num_outputs = sum(w.shape[0] for w in self.weights)
        room_bytes = (self.config.memory_budget - 1) * num_features * num_outputs / 2
        if room_bytes > 0 and self.are_alike:
            # For every further type a shift in bf16 and a bias in fp32.
            room_bytes += (self.config.num_types - 1) * (2 * num_features + 4 * num_outputs)
        # One byte for each entry of a column and of its row in each Linear, and the row's scale.
        column_bytes = num_features + num_outputs + 4 * len(self.weights)
        rank = int(min(room_bytes / column_bytes, num_features // 4, MAX_RANK))
        return rank if rank < 64 else rank - rank % 16
