"""Collect statistics of the activations of every group, and fit its transform.

The model runs over the batches through the same ``detect`` and ``annotate`` as the backend; in front of each group an
observer takes what it needs (``statistics``). Whatever compiles can be calibrated. Then each group is fitted (``fit``).

Memory: that of ``statistics`` summed over the groups of the model: 1.2 GB for SmolLM2-135M (K = 576 and 1536) with
three types.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, PackedEntry, fingerprint
from .config import QuantConfig
from .errors import ConfigError
from .fit import PLANS_TO_FIT, fit_group
from .statistics import MIN_TOKENS_FOR_MEAN, GroupStatistics
from .transform import GroupTransform

if TYPE_CHECKING:
    from .passes.node_facts import LinearFact


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
            fitted, packed, errors = fit_group(statistics)
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
