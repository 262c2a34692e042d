"""The rows of the accuracy benchmark: a name, what it is, and how its checkpoint is calibrated.

To add a row, add a line to `METHODS`: a function `(model, batches, config) -> Checkpoint` and the
fields in which its configuration differs from the default one; `accuracy_jobs.py` says of which
models, formats and seeds it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import baselines
import torch
from accuracy_models import Batches
from quantised_stream import refit_on_quantised_stream
from sensitivity import gradient_energies
from small_models import MASK_TOKEN
from torch import nn

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, TokenTypes, fit
from freeact_fx.moments import GroupMoments

FORMATS = {"w4a4": 4, "w4a8": 8}
# What the tables by type take comes on top of it: with them, scales and transforms a checkpoint of the
# 135M models is 1.24 times as large as under plan "single". 1.25 is for counting codes and branch alone.
MEMORY_BUDGET = 1.19

ONE_TYPE = {"token_types": TokenTypes.single(), "sink": None}

Calibrate = Callable[[nn.Module, Batches, QuantConfig], Checkpoint]


def ours(model: nn.Module, batches: Batches, config: QuantConfig) -> Checkpoint:
    return freeact_fx.calibrate(model, batches, config)


def ours_with_branch(label: str) -> Calibrate:
    """Ours with one of the two kinds of branch in every group; QuantConfig.plan names both alike."""

    def calibrate(model: nn.Module, batches: Batches, config: QuantConfig) -> Checkpoint:
        plans = fit._plans

        def only(moments: Any) -> dict[str, int]:
            found = plans(moments)
            return {label: found[label]} if label in found else found

        with mock.patch.object(fit, "_plans", only):
            return ours(model, batches, config)

    return calibrate


def ours_with_types_everywhere(
    model: nn.Module, batches: Batches, config: QuantConfig
) -> Checkpoint:
    """Ours without the plans that treat all types alike."""

    def none(plans: dict[str, int], moments: GroupMoments) -> list[fit.Candidate]:
        return [] if moments.statistics.are_alike else fitted(plans, moments)

    fitted = fit._fitted
    with mock.patch.object(fit, "_fitted", none):
        return ours(model, batches, config)


def ours_by_sensitivity(model: nn.Module, batches: Batches, config: QuantConfig) -> Checkpoint:
    """Ours, with types that count for what their errors cost the predictions; from 8 of the batches."""
    energies = gradient_energies(model, batches[:8], config, MASK_TOKEN)

    def by_gradient(moments: GroupMoments) -> dict[int, float]:
        statistics = moments.statistics
        counts = statistics.count / statistics.count.sum()
        of_type = torch.stack([energies[name] for name in statistics.names]).sum(0)
        largest = float(of_type.max())
        return {t: float(counts[t] * of_type[t]) / largest for t in moments.energies}

    with mock.patch.object(GroupMoments, "type_weights", property(by_gradient)):
        return ours(model, batches, config)


@dataclass(frozen=True)
class Method:
    """One row.

    what       said in the table of the documentation
    calibrate  None: the float model itself
    changes    fields of QuantConfig that differ from the default row's
    sources    files beside this one that its numbers depend on, besides those of the data
    baseline   True: not the package's own fit, so there is no prediction of its errors
    learns     True: by gradient descent, which is for the device even if others calibrate on the CPU
    """

    what: str
    calibrate: Calibrate | None = ours
    changes: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()
    baseline: bool = False
    learns: bool = False

    def config(
        self, token_types: TokenTypes, format_: str, seed: int, skip: Sequence[str] = ()
    ) -> QuantConfig:
        """The row's configuration; `skip` are layers to leave float besides the head."""
        default = QuantConfig(
            token_types=token_types,
            activation_bits=FORMATS[format_],
            memory_budget=MEMORY_BUDGET,
            seed=seed,
            skip=("lm_head", *skip),
        )
        return replace(default, **self.changes)


def _ablation(what: str, **changes: Any) -> Method:
    """Our default with something changed."""
    return Method(what, ours, changes)


def _baseline(what: str, calibrate: Callable[..., Checkpoint], **options: Any) -> Method:
    """Takes formats, seed and calibration settings from the default row's configuration."""
    sources = ("baselines.py", "decoder_layers.py")
    return Method(what, partial(calibrate, **options), sources=sources, baseline=True)


def _learned(what: str, **options: Any) -> Method:
    return replace(_baseline(what, baselines.flatquant_like, **options), learns=True)


WITH_OURS = {"gptq": True, "clip_search": True}
METHODS = {
    "float": Method("the model as it is", None),
    "rtn": _baseline("round to nearest, no transform", baselines.rtn),
    "smooth+hadamard": _baseline(
        "SmoothQuant's scale and a Hadamard transform, like QuaRot", baselines.smooth_hadamard
    ),
    "smooth+hadamard+gptq": _baseline(
        "the same, our GPTQ and clip search", baselines.smooth_hadamard, **WITH_OURS
    ),
    "closed-form single": _baseline(
        "one closed-form transform, weights to nearest", baselines.closed_single
    ),
    "closed-form single+gptq": _baseline(
        "the same, our GPTQ and clip search", baselines.closed_single, **WITH_OURS
    ),
    "flatquant-like": _learned(
        "one learned Kronecker transform with learned clips, published schedule, weights to nearest"
    ),
    "flatquant-like+gptq": _learned("the same, our GPTQ", gptq=True),
    "flatquant-like short": _learned("flatquant-like, 5 epochs instead of 15", epochs=5),
    "flatquant-like brief": _learned(
        'flatquant-like, 100 steps of 512 tokens, about as many as "refined" has',
        num_windows=50,
        epochs=2,
        batch_size=1,
    ),
    "default": Method(
        f"ours: plan auto at memory_budget {MEMORY_BUDGET}, types, sink, GPTQ, clips"
    ),
    "one type": Method("the default, one type for all tokens", changes=ONE_TYPE),
    # The bytes of the default's tables by type, in columns of the branch.
    "one type, same bytes": _ablation(
        "one type, its branch larger by what the default's tables by type take",
        **ONE_TYPE,
        memory_budget=1.22,
    ),
    "budget 1.1": _ablation(
        "the default at QuantConfig's own memory_budget", memory_budget=QuantConfig().memory_budget
    ),
    "budget 1.25": _ablation(
        "the default at memory_budget 1.25: its tables by type come on top", memory_budget=1.25
    ),
    "all plans measured": _ablation(
        "the default, which otherwise measures only the plans predicted best",
        plans_measured=8,
    ),
    "single": _ablation("plan single: one transform, no shift", plan="single"),
    "shift": _ablation("plan shift: a mean of its own per type", plan="shift"),
    "paper": _ablation("plan paper: zero-padded slices", plan="paper"),
    "duplicate": _ablation(
        "plan duplicate: own transform per type, T times the storage", plan="duplicate"
    ),
    "branch": _ablation("plan branch in every group, shared or own", plan="branch"),
    "shared branch": Method(
        "a branch in every group, its columns for all types", ours_with_branch("branch")
    ),
    "own branch": Method(
        "the same, columns of its own for each type", ours_with_branch("own branch")
    ),
    "sensitivity": Method(
        "the default, types weighed by the gradients of the predictions in their outputs",
        ours_by_sensitivity,
        sources=("sensitivity.py",),
    ),
    "types in all groups": Method(
        "the default, tables by type in every group, not only where they are worth their bytes",
        ours_with_types_everywhere,
    ),
    "no branch": _ablation("the default without room for a branch", memory_budget=1.0),
    "no sink": _ablation("the default, the first token not a type of its own", sink=None),
    "only sink": _ablation(
        "the default, the first token the only type of its own", token_types=TokenTypes.single()
    ),
    "no gptq": _ablation("the default, weights rounded to nearest", gptq=False),
    "no clip search": _ablation("the default without a search for clips", clip_search=False),
    "no refit": _ablation(
        "the default, weights not fitted to rounded activations before GPTQ", refit=False
    ),
    "refit on the quantised stream": Method(
        "the default, weights fitted anew to what the quantised layers before deliver",
        refit_on_quantised_stream,
        sources=("quantised_stream.py", "decoder_layers.py"),
    ),
    "no absorbing": _ablation(
        "the default, the branch not made to absorb rounding", branch_absorbs=False
    ),
    "bias correction": _ablation(
        "the default, mean errors of each type taken out of its bias", bias_correction=True
    ),
    "refined": Method(
        "the default, its transforms refined by 100 steps of descent",
        changes={"refine_steps": 100},
        learns=True,
    ),
}
