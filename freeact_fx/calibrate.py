"""Collect statistics of the activations of every group, and fit its transform.

The model runs over the batches through the same ``detect`` and ``annotate`` as the backend; in front of each group an
observer takes what it needs. Whatever compiles can be calibrated.

Memory: per group (P types and the untyped row) ``seen types * (K^2 + sample_tokens * K) * 4`` bytes, summed over the
groups of the model: 1.2 GB for SmolLM2-135M (K = 576 and 1536) with three types.

Plans ``single``, ``shift`` and ``branch`` (shared) are fitted in closed form (``closed_form``), activation clips by
type on the sample, weight codes by GPTQ. ``plan="auto"`` takes the plan with the least error on the sample.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, PackedEntry, fingerprint
from .closed_form import fit_transform, transformed_moment
from .config import QuantConfig
from .errors import ConfigError
from .reference import quantize_tokens, rows_of_type, transform, unpack_int4
from .transform import GroupTransform, PackedLinear, pack_linear

if TYPE_CHECKING:
    from .passes.node_facts import LinearFact

# Below this many tokens a type's mean says less than that of all tokens.
MIN_TOKENS_FOR_MEAN = 8
PLANS_TO_FIT = ("single", "shift", "branch")
_CLIPS = torch.linspace(0.5, 1.0, 11).tolist()


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
        best = keys.topk(min(self.config.sample_tokens, keys.shape[0])).indices
        self.sample[index] = (keys[best], tokens.cpu()[best].clone())

    def samples(self) -> tuple[Tensor, Tensor]:
        """Sampled tokens [n, K] and their types [n]."""
        tokens = [tokens for _, (_, tokens) in sorted(self.sample.items())]
        types = [
            torch.full((kept.shape[0],), index) for index, (_, kept) in sorted(self.sample.items())
        ]
        return torch.cat(tokens), torch.cat(types)

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


def _fit_group(
    statistics: GroupStatistics,
) -> tuple[GroupTransform, list[PackedLinear], dict[str, Any]]:
    """Fit each plan that may be chosen, keep the one with the least error on the sample, and choose its codes well."""
    config = statistics.config
    device = statistics.weights[0].device
    gram, means = statistics.gram().to(device), statistics.means().to(device)
    best: tuple[float, GroupTransform, list[PackedLinear], dict[str, Any]] | None = None
    for plan in PLANS_TO_FIT if config.plan == "auto" else (config.plan,):
        rank = statistics.branch_rank() if plan == "branch" else 0
        if plan == "branch" and not rank:
            continue
        moment = statistics.mixture(gram, centred=plan != "single")
        fitted = fit_transform(plan, means, moment, gram, config, rank)
        if config.clip_search:
            fitted = replace(fitted, clip=_search_clip(fitted, statistics))
        packed = _pack(fitted, statistics, None)
        errors = _measure(fitted, packed, statistics)
        if best is None or _mean_error(errors) < best[0]:
            best = (_mean_error(errors), fitted, packed, errors)
    if best is None:
        raise ConfigError(
            f"calibrate: {statistics.names[0]}: QuantConfig.memory_budget={config.memory_budget} leaves no "
            f"room for a branch. Raise it, or choose plan='auto'."
        )
    error, fitted, packed, errors = best
    if config.gptq:
        # Plans are compared rounded to nearest, which ranks them alike at a fraction of the time.
        moment = statistics.mixture(gram, centred=fitted.shift is not None)
        repacked = _pack(fitted, statistics, transformed_moment(fitted, moment))
        remeasured = _measure(fitted, repacked, statistics)
        if _mean_error(remeasured) < error:
            packed, errors = repacked, remeasured
    return fitted, packed, errors


def _pack(
    fitted: GroupTransform, statistics: GroupStatistics, hessian: Tensor | None
) -> list[PackedLinear]:
    return [
        pack_linear(
            fitted,
            weight.detach().float(),
            None if bias is None else bias.detach().float(),
            statistics.config,
            hessian,
        )
        for weight, bias in zip(statistics.weights, statistics.biases, strict=True)
    ]


def _mean_error(errors: dict[str, dict[str, float]]) -> float:
    """Relative error of a group: types count alike, and so do its Linears."""
    return sum(sum(by_type.values()) / len(by_type) for by_type in errors.values()) / len(errors)


def _search_clip(fitted: GroupTransform, statistics: GroupStatistics) -> Tensor:
    """The clip of each type with the least squared error on the sample, in transformed coordinates.

    Why not of the outputs: the transform has made all coordinates matter about equally, and this is far cheaper.
    """
    clip = fitted.clip.clone()
    for index, (_, tokens) in statistics.sample.items():
        types = torch.full((tokens.shape[0],), index, device=clip.device)
        z, _ = _transformed(fitted, tokens.to(clip.device), types)
        errors = []
        for candidate in _CLIPS:
            ratio = torch.tensor([candidate], device=clip.device)
            codes, scale = quantize_tokens(z, ratio, statistics.config.qmax)
            errors.append(float((codes.float() * scale - z).square().sum()))
        clip[index] = _CLIPS[errors.index(min(errors))]
    clip[-1] = max(clip[i] for i in statistics.sample)
    return clip


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


def _measure(
    fitted: GroupTransform, packed: list[PackedLinear], statistics: GroupStatistics
) -> dict[str, dict[str, float]]:
    """Squared error of each Linear's outputs on the sample, relative to their energy, by type name."""
    names = (*statistics.config.type_names, "untyped")
    tokens, types = (t.to(fitted.left.device) for t in statistics.samples())
    z, coefficients = _transformed(fitted, tokens, types)
    codes, scale = quantize_tokens(
        z, rows_of_type(fitted.clip, types, 0).unsqueeze(1), statistics.config.qmax
    )
    errors: dict[str, dict[str, float]] = {}
    for name, weight, bias, linear in zip(
        statistics.names, statistics.weights, statistics.biases, packed, strict=True
    ):
        want = tokens @ weight.detach().float().t()
        dequantized = (
            unpack_int4(linear.weight, codes.shape[1]).float() * linear.weight_scale[0][:, None]
        )
        got = (codes.float() * scale) @ dequantized.t()
        if coefficients is not None and linear.branch_weight is not None:
            got = got + coefficients.bfloat16().float() @ linear.branch_weight.float()
        if linear.bias_table is not None:
            got = got + linear.bias_table[types] - (0 if bias is None else bias.detach().float())
        difference, energy = (got - want).square().sum(1), want.square().sum(1)
        errors[name] = {
            names[i]: float(
                difference[types == i].sum() / energy[types == i].sum().clamp_min(1e-30)
            )
            for i in types.unique().tolist()
        }
    return errors


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantConfig | None = None,
    *,
    progress: bool = True,
) -> Checkpoint:
    """Run a model over batches and fit the transform of every group.

    model    dense, any device; it is run in eval mode under no_grad and not changed
    batches  any iterable of inputs: a mapping is passed as keyword arguments, a tuple or list as positional ones,
             anything else as the only argument. For a diffusion language model mask them at various ratios
    config   None: the default one. ``plan`` must be "auto", "single", "shift" or "branch" so far
    progress show progress bars

    Raises ConfigError if there is nothing to calibrate, for NaN or infinite activations (naming the Linear), and for
    a plan that calibration cannot fit.
    """
    config = config or QuantConfig()
    if config.plan not in ("auto", *PLANS_TO_FIT):
        raise ConfigError(
            f"calibrate: QuantConfig.plan must be 'auto', 'single', 'shift' or 'branch' so far, got {config.plan!r}."
        )
    if not config.quantize:
        config = replace(config, quantize=True)
    groups = _observe(model, batches, config, progress)
    if not groups:
        raise ConfigError(
            "calibrate: no Linear was reached. Give at least one batch, and check QuantConfig.skip; "
            "freeact_fx.explain(model, ...) shows every Linear with its reason."
        )
    transforms: dict[str, GroupTransform] = {}
    linears: dict[str, PackedEntry] = {}
    measured: dict[str, Any] = {}
    with torch.no_grad():
        for statistics in _bar(groups, "fitting", len(groups), progress):
            fitted, packed, errors = _fit_group(statistics)
            group = statistics.names[0]
            transforms[group] = fitted
            for name, weight, entry in zip(
                statistics.names, statistics.weights, packed, strict=True
            ):
                linears[name] = PackedEntry(group, weight.shape[1], entry, fingerprint(weight))
            tokens = dict(
                zip((*config.type_names, "untyped"), statistics.count.tolist(), strict=True)
            )
            measured[group] = {
                "tokens": {n: int(c) for n, c in tokens.items()},
                "rare_types": [
                    n for n, c in tokens.items() if c < MIN_TOKENS_FOR_MEAN and n != "untyped"
                ],
                "error": errors,
            }
            # The moments are the bulk of the memory, and this group is done with them.
            statistics.moment.clear()
    return Checkpoint(config, transforms, linears, measured)


def _observe(
    model: nn.Module, batches: Iterable[Any], config: QuantConfig, progress: bool
) -> list[GroupStatistics]:
    """Run the observe pipeline; statistics of each group, in the order the model reaches them."""
    from . import compat
    from .backend import observe_graph

    names = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}
    found: dict[tuple[int, ...], GroupStatistics] = {}

    def observer(
        linears: list[tuple[LinearFact, Tensor, Tensor | None]],
    ) -> Callable[[Tensor, Tensor | None], None]:
        key = tuple(id(weight) for _, weight, _ in linears)
        if key not in found:
            found[key] = GroupStatistics(
                [names.get(id(weight), linear.name) for linear, weight, _ in linears],
                [w.t() if linear.transposed else w for linear, w, _ in linears],
                [bias for _, _, bias in linears],
                config,
            )
        return found[key].observe

    def observe(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return observe_graph(gm, example_inputs, config, observer)

    was_training = model.training
    model.eval()
    try:
        total = len(batches) if isinstance(batches, Sized) else None
        with torch.no_grad(), compat.traced_apart(model, observe) as traced:
            for batch in _bar(batches, "observing", total, progress):
                if isinstance(batch, Mapping):
                    traced(**batch)
                elif isinstance(batch, (tuple, list)):
                    traced(*batch)
                else:
                    traced(batch)
    finally:
        model.train(was_training)
    return _without_repeats(list(found.values()))


def _without_repeats(groups: list[GroupStatistics]) -> list[GroupStatistics]:
    """A Linear that was seen in several groupings belongs to the one that saw the most tokens."""
    groups = [g for g in groups if g.count.sum() > 0]
    taken: set[str] = set()
    kept = []
    for group in sorted(groups, key=lambda g: (-len(g.names), -float(g.count.sum()))):
        free = [i for i, name in enumerate(group.names) if name not in taken]
        if free:
            group.names = [group.names[i] for i in free]
            group.weights = [group.weights[i] for i in free]
            group.biases = [group.biases[i] for i in free]
            taken.update(group.names)
            kept.append(group)
    return sorted(kept, key=groups.index)


def _bar(items: Iterable[Any], label: str, total: int | None, progress: bool) -> Iterator[Any]:
    """A progress bar: tqdm's if it is installed, else a line every five seconds."""
    if not progress:
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        last = time.monotonic()
        for index, item in enumerate(items):
            if time.monotonic() - last > 5:
                last = time.monotonic()
                print(f"{label}: {index} of {total or '?'}", file=sys.stderr)
            yield item
    else:
        yield from tqdm(items, desc=label, total=total)
