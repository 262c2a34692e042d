"""Which plan errs how much in which Linears, for tokens of which type?

    python benchmarks/plan_errors.py                   appends to benchmarks/results/plan_errors.jsonl

The masked-diffusion model, calibrated once under each plan: one transform for all tokens, with clips by type
("single"), a mean of its own for each type as well ("shift"), a low-rank branch besides ("branch"). Shown is the
squared error of the outputs on held-out tokens, relative to the energy of the type's outputs, as calibration measures
it: weights and activations in 4 bits, each Linear by itself behind the float model. It is a mean over layers, and over
the Linears of a kind.

Then once under plan "auto" that measures all plans, weights rounded to nearest: a mean over types, too, and in how many
groups each plan errs least. "types alike" has one mean and one clip for all tokens, and more branch for the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_models import Sizes
from calibrated import DLLM_CONFIG
from evaluation import dllm_calibration_batches
from measure import RESULTS, append_result
from presentation import table
from small_models import CACHE, load_masked_diffusion

import freeact_fx

PLANS = ("single", "shift", "branch", "auto")
_ALL_OF_THEM = 100  # more plans than there are
# By the last part of a Linear's name.
KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}

Errors = dict[str, dict[str, float]]  # by kind of Linear and token type


def mean_errors(of_groups: Mapping[str, Any]) -> Errors:
    """From a checkpoint's statistics. A kind or type that does not occur is left out."""
    by_linear = {
        linear: errors for group in of_groups.values() for linear, errors in group["error"].items()
    }
    found: Errors = {}
    for kind, endings in KINDS.items():
        of_kind = [e for name, e in by_linear.items() if name.rpartition(".")[2] in endings]
        types = dict.fromkeys(name for errors in of_kind for name in errors)
        if types:
            found[kind] = {t: statistics.mean(e[t] for e in of_kind if t in e) for t in types}
    return found


def measured_plans(of_groups: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """From a checkpoint's statistics, by kind of Linear and plan, the worst first: mean error, and ``best_in`` how many
    groups it is the least. A plan that some group of the kind does not have is left out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, endings in KINDS.items():
        of_kind = [
            {label: plan["measured"] for label, plan in group["plans"].items()}
            for group in of_groups.values()
            if next(iter(group["error"])).rpartition(".")[2] in endings
        ]
        if not of_kind:
            continue
        best = [min(errors, key=errors.__getitem__) for errors in of_kind]
        labels = [label for label in of_kind[0] if all(label in errors for errors in of_kind)]
        means = {label: statistics.mean(e[label] for e in of_kind) for label in labels}
        found[kind] = {
            label: {"error": means[label], "best_in": best.count(label)}
            for label in sorted(means, key=means.__getitem__, reverse=True)
        }
    return found


def plan_rows(of_kinds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """Head, then a row for each kind; a column for each plan: its error, and in how many groups it is the least."""
    labels = list(next(iter(of_kinds.values())))
    rows = [["Linears", *labels]]
    for kind, plans in of_kinds.items():
        there = [plans.get(label) for label in labels]
        rows.append([kind, *(f"{p['error']:.4f} ({p['best_in']})" if p else "" for p in there)])
    return rows


def error_rows(errors: Mapping[str, Errors]) -> list[list[str]]:
    """Head, then a row for each kind and type; a column for each plan."""
    first = next(iter(errors.values()))
    rows = [["Linears", "token type", *errors]]
    for kind, by_type in first.items():
        for name in by_type:
            rows.append(
                [kind, name, *(f"{of_plan[kind][name]:.4f}" for of_plan in errors.values())]
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    add("--windows", type=int, default=32, help="of 512 tokens")
    add("--layer-step", type=int, default=1, help="n: only each n-th layer")
    add("--cache", type=Path, default=CACHE, help="of the base model")
    add("--out", type=Path, default=RESULTS / "plan_errors.jsonl")
    args = parser.parse_args(arguments)
    sizes = Sizes(layer_step=args.layer_step)
    model = load_masked_diffusion(args.cache)
    batches = dllm_calibration_batches(args.windows)
    errors = {}
    for plan in args.plans:
        config = replace(
            DLLM_CONFIG,
            plan=plan,
            plans_measured=_ALL_OF_THEM,
            skip=("lm_head", *sizes.skipped_layers),
        )
        checkpoint = freeact_fx.calibrate(model, batches, config, progress=True)
        facts: dict[str, Any] = {"errors": mean_errors(checkpoint.statistics)}
        if plan == "auto":
            facts["plans"] = measured_plans(checkpoint.statistics)
            print(table(plan_rows(facts["plans"])))
        else:
            errors[plan] = facts["errors"]
        append_result(
            args.out,
            plan=plan,
            memory_budget=config.memory_budget,
            num_windows=args.windows,
            layer_step=args.layer_step,
            num_groups=len(checkpoint.groups),
            **facts,
        )
    if errors:
        print(table(error_rows(errors)))


if __name__ == "__main__":
    main()
