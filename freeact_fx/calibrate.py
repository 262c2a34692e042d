"""Collect statistics of the activations of every group, and fit its transform.

The model runs over the batches with observers in front of its groups (``observe``), which collect counts, means, second
moments and samples of tokens (``token_moments``). Then each group is fitted (``fit``) and its statistics are freed. If
the statistics of all groups do not fit into memory, groups take turns: a pass over the batches for as many as fit, then
their fits, then the next pass.

Memory
    Statistics of a group of K channels with T token types take ``T * (4 K^2 + 8 (sample_tokens + 1) K)`` bytes, on the
    device of its weights. A layer of an 8B model (K = 4096 three times, 12288 once; T = 3) takes 2.4 GB for moments and
    0.15 GB for samples, so its 32 layers 82 GB. Beside 16 GB of weights on a GPU of 80 GB half of the free 64 GB is
    taken: 12 layers in each of three passes. Fitting a group takes about 12 matrices ``[K, K]`` in fp64 besides: 15 GB
    for K = 12288, N = 4096 (the layer took 17.3 GB above its weights on an H100, 2.6 GB of statistics among them). The
    host holds no more than the result, 3.9 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint, PackedEntry, fingerprint
from .config import QuantConfig
from .errors import ConfigError
from .fit import fit_group
from .moments import FEW_TOKENS
from .observe import fit_cost, observed
from .progress import Progress
from .resume import RunFolder
from .spool import Batches
from .statistics import GroupStatistics
from .transform import PackedLinear


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None,
    config: QuantConfig | None = None,
    *,
    progress: bool = True,
    max_bytes: int | None = None,
    resume: str | Path | None = None,
) -> Checkpoint:
    """Run a model over batches and fit the transform of every group.

    model      dense, any device; it is run in eval mode under no_grad and not changed
    batches    any iterable of inputs: a mapping is passed as keyword arguments, a tuple or list as positional ones,
               anything else as the only argument. For a diffusion language model mask them at various ratios
               (``MaskCollator``). Positions where a mapping's ``attention_mask`` [B, T] is 0 are left out of the
               statistics. What is needed more than once is read again; an iterator is kept on disk
    config     None: the default one
    progress   show a progress bar with the time left
    max_bytes  bound on the statistics that are held at a time on each device; None: half of its free memory. Less
               means more passes over the batches, not another result
    resume     a folder in which to keep every group that was fitted, so that a killed run is continued by the same
               call: with one more pass over the batches, but no group fitted twice, and with the same result. It must
               be the same model, config and batches; batches=None are those of an iterator, which are kept there.
               Once finished the folder answers the same call at once; delete it when the checkpoint is saved

    Returns a checkpoint on the CPU.
    Raises ConfigError if there is nothing to calibrate, for NaN or infinite activations (naming the Linear), for a
    plan that a group has no room for, and for a folder of another run.
    """
    config = config or QuantConfig()
    if not config.quantize:
        config = replace(config, quantize=True)
    folder = None if resume is None else RunFolder(resume, config, model)
    with closing(_reader(batches, folder)) as reader, closing(Progress(progress)) as bar:
        if folder is not None and folder.groups is not None:
            for _ in reader if batches is not None else ():
                pass  # They must be those of the run.
            return _joined(config, [folder.load(linears) for linears in folder.groups])
        fitted: dict[str, Checkpoint] = {}
        is_done = (lambda linears: False) if folder is None else folder.has
        with observed(model, config, max_bytes, is_done) as observers:
            while not observers.groups or observers.is_waiting:
                complete = observers.collect(reader, bar)
                if not observers.groups:
                    raise ConfigError(
                        "calibrate: no Linear was reached. Give at least one batch, and check QuantConfig.skip; "
                        "freeact_fx.explain(model, ...) shows every Linear with its reason."
                    )
                if folder is not None:
                    folder.batches_read(reader.digests, kept=reader.once)
                for statistics in complete:
                    group = _fit(statistics)
                    if folder is None:
                        fitted[statistics.names[0]] = group
                    else:
                        folder.save(statistics.names, group)
                    # The moments are the bulk of the memory, and this group is done with them.
                    statistics.release()
                    bar.step(bar.fitting, fit_cost(statistics), f"fitting {statistics.names[0]}")
            groups = [statistics.names for statistics in observers.groups]
        if folder is None:
            return _joined(config, [fitted[linears[0]] for linears in groups])
        folder.finish(groups)
        return _joined(config, [folder.load(linears) for linears in groups])


def _reader(batches: Iterable[Any] | None, folder: RunFolder | None) -> Batches:
    if folder is None:
        if batches is None:
            raise ConfigError(
                "calibrate: batches=None goes on with those kept in resume=FOLDER. Give batches."
            )
        return Batches(batches)
    if batches is None and not folder.num_kept and folder.groups is None:
        raise ConfigError(
            f"calibrate: batches=None goes on with those kept in {folder.folder}, and there are none: the run was "
            f"killed before it had read all of an iterator, or had none. Give batches."
        )
    reader = Batches(
        batches, folder=folder.batch_folder, expected=folder.batches, kept=folder.num_kept
    )
    reader.compare()
    if folder.groups is None:
        reader.keep()
    return reader


@torch.no_grad()
def _fit(statistics: GroupStatistics) -> Checkpoint:
    """A checkpoint of one group, on the CPU."""
    config, group = statistics.config, statistics.names[0]
    transform, packed, report = fit_group(statistics)
    host = torch.device("cpu")
    linears = {
        name: PackedEntry(
            group,
            weight.shape[1],
            PackedLinear(**{n: t.to(host) for n, t in entry.tensors().items()}),
            fingerprint(weight),
        )
        for name, weight, entry in zip(statistics.names, statistics.weights, packed, strict=True)
    }
    tokens = {
        name: int(count)
        for name, count in zip(config.row_names, statistics.count.tolist(), strict=True)
    }
    measured = {
        "tokens": tokens,
        "rare_types": [n for n in config.type_names if tokens[n] < FEW_TOKENS],
        **report,
    }
    return Checkpoint(config, {group: transform.to(host)}, linears, {group: measured})


def _joined(config: QuantConfig, parts: Sequence[Checkpoint]) -> Checkpoint:
    return Checkpoint(
        config,
        {name: group for part in parts for name, group in part.groups.items()},
        {name: linear for part in parts for name, linear in part.linears.items()},
        {name: measured for part in parts for name, measured in part.statistics.items()},
    )
