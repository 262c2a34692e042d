"""What calibration keeps of one group, and what the fits derive from it: mixtures of the types, their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import QuantConfig
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
        super().__init__(
            weights[0].shape[1], config.num_types + 1, config.sample_tokens, config.seed, names[0]
        )

    def keep_linears(self, wanted: Callable[[str], bool]) -> None:
        """Drop the other Linears."""
        kept = [i for i, name in enumerate(self.names) if wanted(name)]
        self.names = [self.names[i] for i in kept]
        self.weights = [self.weights[i] for i in kept]
        self.biases = [self.biases[i] for i in kept]

    def gram(self) -> Tensor:
        """Sum of ``W W^T`` over the group's Linears, [K, K] fp64."""
        total = torch.zeros(self.weights[0].shape[1], self.weights[0].shape[1], dtype=torch.float64)
        for weight in self.weights:
            dense = weight.detach().float()
            total += (dense.t() @ dense).double().cpu()
        return total

    def mixture(self, gram: Tensor, *, centred: bool) -> Tensor:
        """Second moment [K, K] fp64 of all types; one counts by its tokens, relative to the energy of their outputs."""
        means = self.means().to(gram.device)
        total = torch.zeros_like(gram)
        for index, moment in self.moment.items():
            own = moment.to(gram.device).double() / self.count[index].to(gram.device)
            share = float(self.count[index] / self.count.sum())
            energy = float((own * gram).sum())
            if centred and index < self.config.num_types:
                # About the shift, which is not the type's own mean if the type was hardly seen.
                mean, shift = (self.total[index] / self.count[index]).to(gram.device), means[index]
                floor = 1e-5 * own.diagonal()
                own = own - torch.outer(mean, shift) - torch.outer(shift, mean - shift)
                # What is left of a constant input is rounding, of either sign and as large as the channel was.
                own.diagonal().add_(floor)
            total += own * (share / max(energy, 1e-30))
        return total

    def branch_rank(self) -> int:
        """Columns of a shared branch that ``memory_budget`` pays for."""
        num_features = self.weights[0].shape[1]
        num_outputs = sum(w.shape[0] for w in self.weights)
        room_bytes = (self.config.memory_budget - 1) * num_features * num_outputs / 2
        # One byte for each entry of a column and of its row in each Linear, and the row's scale.
        column_bytes = num_features + num_outputs + 4 * len(self.weights)
        return int(min(room_bytes / column_bytes, num_features // 4))
