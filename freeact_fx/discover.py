"""Find a token type in the data: input ids whose activations are unlike those of all others.

A type must be known at run time from the graph, so a cluster of activations is of use only as a set of input ids. Each
id that occurs is described by what its tokens make of every group on average; a half of the ids by 2-means, or one id,
whichever is most unlike the rest, becomes a type of its own::

    one pass     sketches of every group's outputs [8], summed by id         -> 2-means -> at most ``most_ids`` ids
    another      moments with the new type, and, summed up, without it       -> predicted error of the best plan

The split is accepted only if the predicted error falls by ``least_gain``, and then the rest is parted again. Tokens of
types that the configuration knows already stay what they are. Left out: types by position (only the first is known, as
the sink) and clusters that depend on context, which no graph can tell before the Linear is reached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import QuantConfig
from .errors import ConfigError
from .fit import _fitted, _plans
from .moments import FEW_TOKENS, GroupMoments
from .observe import fit_cost, observed
from .progress import Progress
from .spool import Batches, run
from .statistics import GroupStatistics
from .token_types import TokenType, TokenTypes

if TYPE_CHECKING:
    from .passes.node_facts import LinearFact

_SKETCH = 8
_STARTS, _ROUNDS = 8, 30


@dataclass(frozen=True)
class Split:
    """A set of ids that was tried as a type.

    share     of the default type's tokens that it takes
    gain      by how much of itself the predicted error of the model's groups falls; negative: it rises
    accepted  whether that was enough
    """

    name: str
    token_ids: tuple[int, ...]
    share: float
    gain: float
    accepted: bool


@dataclass(frozen=True)
class DiscoveredTypes:
    """The types to calibrate with, and every split that was tried, in order."""

    token_types: TokenTypes
    splits: tuple[Split, ...]


def discover_types(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantConfig | None = None,
    *,
    least_gain: float = 0.05,
    most_types: int = 2,
    most_ids: int = 32,
    progress: bool = True,
) -> DiscoveredTypes:
    """Part the tokens of the default type by their ids, as long as that lowers the predicted error enough.

    model, batches  as for ``calibrate``; each batch must hold input ids, [B, T] or [T] integers: under "input_ids", or
                    as the only or first tensor
    config          its types stay; None: the default one
    least_gain      part of the predicted error by which a split must lower it
    most_types      splits that are accepted at most
    most_ids        ids of a new type at most; each costs a comparison of the ids at run time
    progress        show a progress bar

    Returns the types, with accepted ones (``found 1``, ...) behind those of the config, and every split tried.
    Costs two passes and the closed-form fits, about half a calibration, for each split tried.
    Raises ConfigError for batches without ids, and as ``calibrate`` does.
    """
    config = config or QuantConfig()
    splits: list[Split] = []
    with closing(Batches(batches)) as reader, closing(Progress(progress)) as bar:
        reader.keep()
        while sum(split.accepted for split in splits) < most_types:
            sketches = _sketches(model, reader, config, bar)
            ids, share = _most_unlike(sketches, config, most_ids)
            if not ids:
                break
            name = f"found {len(splits) + 1}"
            types = TokenTypes((*config.token_types.types, TokenType(name, ids)))
            gain = predicted_gain(model, reader, replace(config, token_types=types), bar)
            splits.append(Split(name, ids, share, gain, gain >= least_gain))
            if not splits[-1].accepted:
                break
            config = replace(config, token_types=types)
    return DiscoveredTypes(config.token_types, tuple(splits))


# ------------------------------------------------------------------ ids, described and parted


class _Sketches:
    """Of every group: the sum of its outputs' sketches by id, and how many tokens of the default type there were."""

    def __init__(self, config: QuantConfig) -> None:
        self._config = config
        self._slot: dict[int, int] = {}
        self._slots = torch.empty(0, dtype=torch.int64)  # of this batch's tokens
        self._groups: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, ids: Tensor) -> None:
        for token_id in ids.unique().tolist():
            self._slot.setdefault(token_id, len(self._slot))
        flat = ids.flatten().tolist()
        self._slots = torch.tensor([self._slot[token_id] for token_id in flat])

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """The backend for ``torch.compile``: the graph with observers."""
        from .backend import observe_graph

        def observer(
            linears: list[tuple[LinearFact, Tensor, Tensor | None]],
        ) -> Callable[[Tensor, Tensor | None], None]:
            key = tuple(id(weight) for _, weight, _ in linears)
            dense = [w.t() if linear.transposed else w for linear, w, _ in linears]
            weight = torch.cat([w.detach().float() for w in dense])  # [N, K]
            generator = torch.Generator().manual_seed(self._config.seed)
            signs = torch.randn(weight.shape[0], _SKETCH, generator=generator).to(weight.device)
            projection = weight.t() @ signs
            return lambda x, types: self._take(key, x, types, projection)

        return observe_graph(gm, example_inputs, self._config, observer)

    def _take(
        self, key: tuple[int, ...], x: Tensor, types: Tensor | None, projection: Tensor
    ) -> None:
        tokens = x.detach().reshape(-1, x.shape[-1])
        if tokens.shape[0] != len(self._slots):  # a vision tower's, say
            return
        sketch = (tokens.float() @ projection).cpu().double()
        is_default = torch.ones(len(sketch), dtype=torch.bool)
        if types is not None:
            is_default = (types.reshape(-1) == 0).cpu()
        num = len(self._slot)
        sums, counts, energy = self._groups.get(
            key, (torch.zeros(0, _SKETCH).double(), torch.zeros(0).double(), torch.zeros(()))
        )
        missing = num - len(counts)
        sums = torch.cat([sums, sums.new_zeros(missing, _SKETCH)])
        counts = torch.cat([counts, counts.new_zeros(missing)])
        where = self._slots[is_default]
        sums.index_add_(0, where, sketch[is_default])
        counts.index_add_(0, where, torch.ones(len(where)).double())
        self._groups[key] = sums, counts, energy + sketch[is_default].square().sum()

    @property
    def num_tokens(self) -> float:
        """Of the default type."""
        return max((float(counts.sum()) for _, counts, _ in self._groups.values()), default=0.0)

    def by_id(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [U] of the default type that often enough occur, how many tokens they have [U], and their sketches
        [U, 8 G], in units of the root mean square of each group's."""
        ids = torch.tensor(list(self._slot))
        counts = [counts for _, counts, _ in self._groups.values() if len(counts) == len(ids)]
        if not counts:
            return ids[:0], torch.zeros(0), torch.zeros(0, 0)
        count = torch.stack(counts).amin(0)
        often = count >= FEW_TOKENS
        parts = [
            sums[often] / own[often].unsqueeze(1) / (energy / own.sum()).sqrt().clamp_min(1e-30)
            for sums, own, energy in self._groups.values()
            if len(own) == len(ids)
        ]
        return ids[often], count[often], torch.cat(parts, 1)


@torch.no_grad()
def _sketches(model: nn.Module, reader: Batches, config: QuantConfig, bar: Progress) -> _Sketches:
    from . import compat

    sketches = _Sketches(config)
    was_training = model.training
    model.eval()
    try:
        with compat.traced_apart(model, sketches.compile) as traced:
            for index, batch in reader:
                sketches.begin(_ids_of(batch))
                run(traced, batch)
                bar.step(bar.observing, 1, f"describing ids, batch {index + 1}")
    finally:
        model.train(was_training)
    return sketches


def _ids_of(batch: Any) -> Tensor:
    values = [batch]
    if isinstance(batch, Mapping):
        values = [batch.get("input_ids")]
    elif isinstance(batch, (tuple, list)):
        values = list(batch)
    for value in values:
        is_ids = isinstance(value, Tensor) and not value.is_floating_point()
        if is_ids and value.dtype != torch.bool and value.dim() in (1, 2):
            return value.cpu()
    raise ConfigError(
        "discover_types: a batch must hold input ids, [B, T] or [T] integers, under 'input_ids' or as its first "
        "tensor. Without ids no graph could tell the types; hand them in with freeact_fx.token_types(...)."
    )


def _most_unlike(
    sketches: _Sketches, config: QuantConfig, most_ids: int
) -> tuple[tuple[int, ...], float]:
    """The ids to part from the rest, and their share of the tokens; none if there is nothing to part.

    Of either half of 2-means, cut to its ``most_ids`` most frequent ids, and each single id, the set whose mean sketch
    differs most from that of the rest: by the variance between the two.
    """
    ids, count, features = sketches.by_id()
    known = [config.token_types.index_of_id(token_id) is None for token_id in ids.tolist()]
    free = torch.tensor(known, dtype=torch.bool)
    ids, count, features = ids[free], count[free], features[free]
    if len(ids) < 2:
        return (), 0.0
    half = two_means(features, count, config.seed)
    frequent = count.argsort(descending=True, stable=True)
    sets = [frequent[half[frequent] == side][:most_ids] for side in (True, False)]
    sets += list(torch.arange(len(ids)).split(1))
    total = count.sum()
    mean = (features * count.unsqueeze(1)).sum(0) / total

    def between(chosen: Tensor) -> float:
        weight = count[chosen]
        if not weight.sum() < total:
            return 0.0
        away = ((features[chosen] - mean) * weight.unsqueeze(1)).sum(0)
        return float(away.square().sum() / weight.sum() / (total - weight.sum()))

    chosen = max(sets, key=between)
    share = float(count[chosen].sum()) / sketches.num_tokens
    return tuple(sorted(ids[chosen].tolist())), share


def two_means(points: Tensor, weight: Tensor, seed: int) -> Tensor:
    """Part points [n, D] into two by k-means with weights [n]; True for one part, and neither is empty.

    Of several starts (two points, the second drawn by its distance from the first) the one with the least spread.
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(points), dtype=torch.bool), torch.inf
    best[0] = True
    for _ in range(_STARTS):
        first = int(torch.multinomial(weight, 1, generator=generator))
        distance = (points - points[first]).square().sum(1) * weight
        if not float(distance.sum()) > 0:
            break
        second = int(torch.multinomial(distance, 1, generator=generator))
        centres = points[[first, second]]
        for _ in range(_ROUNDS):
            distances = torch.cdist(points, centres).square()
            part = distances[:, 1] < distances[:, 0]
            if not bool(part.any()) or bool(part.all()):
                break
            centres = torch.stack(
                [
                    (points[own] * weight[own, None]).sum(0) / weight[own].sum()
                    for own in (~part, part)
                ]
            )
        else:
            spread = float((distances.amin(1) * weight).sum())
            if spread < least:
                best, least = part, spread
    return best


# ------------------------------------------------------------------ what a split would give


@torch.no_grad()
def predicted_gain(model: nn.Module, reader: Batches, config: QuantConfig, bar: Progress) -> float:
    """Part of the predicted error that the last of the config's declared types takes off, of all groups alike."""
    split, merged = [], []
    with observed(model, config, None, lambda linears: False) as observers:
        while not observers.groups or observers.is_waiting:
            for statistics in observers.collect(reader, bar):
                split.append(_least_error(statistics))
                merged.append(_least_error(_without_last_type(statistics)))
                statistics.release()
                bar.step(bar.fitting, fit_cost(statistics), f"predicting {statistics.names[0]}")
    return 1 - sum(split) / max(sum(merged), 1e-30)


def _least_error(statistics: GroupStatistics) -> float:
    """The predicted error of the group's best plan, relative to the energy of its outputs, over all tokens alike."""
    moments = GroupMoments.of(statistics)
    names = statistics.config.row_names
    energy = {
        index: [float(statistics.count[index]) * e for e in moments.energies[index]]
        for index in moments.seen
    }
    total = max(sum(map(sum, energy.values())), 1e-30)

    def error(predicted: Mapping[str, Mapping[str, float]]) -> float:
        by_linear: Sequence[Mapping[str, float]] = [predicted[name] for name in statistics.names]
        return sum(
            by_linear[j][names[index]] * own
            for index, of_linears in energy.items()
            for j, own in enumerate(of_linears)
        )

    return min(error(c.predicted) for c in _fitted(_plans(moments), moments)) / total


def _without_last_type(statistics: GroupStatistics) -> GroupStatistics:
    """The same tokens, those of the last declared type counted as the default one. Shares no moment that changes."""
    config = statistics.config
    last = len(config.token_types.types) - 1
    fewer = TokenTypes(config.token_types.types[:-1])
    merged = copy.copy(statistics)
    merged.config = replace(config, token_types=fewer)
    rows = [index for index in range(config.num_types + 1) if index != last]
    merged.count, merged.total = statistics.count[rows], statistics.total[rows]
    merged.count[0] += statistics.count[last]
    merged.total[0] += statistics.total[last]
    moments = dict(statistics.moment)
    if last in moments:
        own = moments.pop(last)
        moments[0] = moments[0] + own if 0 in moments else own
    merged._moment = {rows.index(index): moment for index, moment in moments.items()}
    return merged
