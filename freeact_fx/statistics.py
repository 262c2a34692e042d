"""What calibration keeps of one group's activations: counts, means and second moments by type, and sampled tokens.

Memory per group: ``seen types * (K^2 + 2 * sample_tokens * K) * 4`` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import QuantConfig
from .errors import ConfigError

# Below this many tokens a type's mean says less than that of all tokens.
MIN_TOKENS_FOR_MEAN = 8


@dataclass
class GroupStatistics:
    """What was seen of one group's activation: counts, means and second moments by type, and a sample of tokens."""

    names: list[str]
    weights: list[Tensor]  # [N, K] each, dense
    biases: list[Tensor | None]
    config: QuantConfig
    count: Tensor = field(init=False)  # [P]
    total: Tensor = field(init=False)  # [P, K] fp64
    moment: dict[int, Tensor] = field(default_factory=dict)  # type -> [K, K] fp32, sum of x^T x
    sample: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # type -> keys [n], tokens [n, K]

    def __post_init__(self) -> None:
        num_rows, num_features = self.config.num_types + 1, self.weights[0].shape[1]
        self.count = torch.zeros(num_rows, dtype=torch.float64)
        self.total = torch.zeros(num_rows, num_features, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(self.config.seed)

    def observe(self, x: Tensor, types: Tensor | None) -> None:
        """Take in an activation [..., K] and its types [...] (None: the default). Raises ConfigError for NaN or inf."""
        tokens = x.detach().reshape(-1, x.shape[-1]).float()
        if not bool(tokens.isfinite().all()):
            raise ConfigError(
                f"calibrate: the input of {self.names[0]} holds NaN or infinite values. Check the batch, "
                f"or run the model in bfloat16 or float32."
            )
        if types is None:
            self._observe_type(0, tokens)
            return
        flat = types.reshape(-1)
        for index in flat.unique().tolist():
            self._observe_type(index, tokens[flat == index])

    def _observe_type(self, index: int, tokens: Tensor) -> None:
        self.count[index] += tokens.shape[0]
        self.total[index] += tokens.sum(0, dtype=torch.float64).cpu()
        moment = (tokens.t() @ tokens).cpu()
        self.moment[index] = self.moment[index].add_(moment) if index in self.moment else moment
        # A uniform sample without replacement: each token draws a key, the largest keys stay.
        keys = torch.rand(tokens.shape[0], generator=self._generator)
        if index in self.sample:
            keys = torch.cat([self.sample[index][0], keys])
            tokens = torch.cat([self.sample[index][1], tokens.cpu()])
        best = keys.topk(min(2 * self.config.sample_tokens, keys.shape[0])).indices
        self.sample[index] = (keys[best], tokens.cpu()[best].clone())

    def samples(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Sampled tokens [n, K] and their types [n]: at most ``sample_tokens`` of each type, in the order of the types.

        held_out  False: the half to fit on; True: the other, to compare what was fitted. They have no token in
                  common, except that a type of which one token was seen has it in both.
        """
        halves = {}
        for index, (_, tokens) in sorted(self.sample.items()):
            # By their keys the tokens are in random order, so every second one is a random half.
            halves[index] = tokens[1::2] if held_out and tokens.shape[0] > 1 else tokens[::2]
        types = [torch.full((half.shape[0],), index) for index, half in halves.items()]
        return torch.cat(list(halves.values())), torch.cat(types)

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
        room = (self.config.memory_budget - 1) * num_features * num_outputs
        return int(min(room / (4 * (num_features + num_outputs)), num_features // 4))

    def means(self) -> Tensor:
        """Mean of each type, [P, K]; that of all tokens for a type that was hardly seen."""
        pooled = self.total.sum(0) / self.count.sum().clamp_min(1)
        means = self.total / self.count.clamp_min(1).unsqueeze(1)
        rare = self.count < MIN_TOKENS_FOR_MEAN
        return torch.where(rare.unsqueeze(1), pooled, means)
