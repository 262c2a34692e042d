"""What calibration keeps of one group: its Linears and the moments and tokens of the activation that they read."""

from __future__ import annotations

from collections.abc import Callable

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

    def branch_rank(self) -> int:
        """Columns of a shared branch that ``memory_budget`` pays for."""
        num_features = self.weights[0].shape[1]
        num_outputs = sum(w.shape[0] for w in self.weights)
        room_bytes = (self.config.memory_budget - 1) * num_features * num_outputs / 2
        # One byte for each entry of a column and of its row in each Linear, and the row's scale.
        column_bytes = num_features + num_outputs + 4 * len(self.weights)
        return int(min(room_bytes / column_bytes, num_features // 4))
