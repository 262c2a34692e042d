"""Why a Linear is left alone, and what would change that: every reason there is, in one table.

::

    reason("odd_features", num_features=33)          # "in_features must be even ..., got 33"
    reason("odd_features", num_features=33).way_out  # "pad the layer to 34 in features"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One reason: what is said of a Linear, and what its user can do. Both have the fields that ``reason`` fills in."""

    text: str
    way_out: str


RULES = {
    "skipped": Rule(
        "listed in QuantConfig.skip {skip}",
        "take it out of QuantConfig.skip, or list it in QuantConfig.include",
    ),
    "tied": Rule(
        "its weight is tied to an embedding",
        "list it in QuantConfig.include; the embedding keeps the dense weight",
    ),
    "tower": Rule(
        "computes what is merged into the embeddings",
        "set QuantConfig.vision_tower=True, or list it in QuantConfig.include",
    ),
    "left_dense": Rule(
        "convert left it dense",
        "list it in QuantConfig.include to quantise it without calibration, or calibrate it and convert anew",
    ),
    "not_in_checkpoint": Rule(
        "not in the checkpoint",
        "calibrate with inputs that reach it and without skipping it",
    ),
    "dtype": Rule(
        "weights must be float32, bfloat16 or float16, got {dtype}",
        "cast the layer to one of them",
    ),
    "not_plain": Rule(
        "weights must be plain dense tensors, got {kind}",
        "make it a plain torch.nn.Parameter: dequantise it, or densify it",
    ),
    "few_features": Rule(
        "in_features must be at least {least} for a transform to help, got {num_features}",
        "pad the layer to {least} in features",
    ),
    "odd_features": Rule(
        "in_features must be even to pack two 4-bit codes per byte, got {num_features}",
        "pad the layer to {legal} in features",
    ),
    "no_factors": Rule(
        "in_features needs a Kronecker shape D1 x D2 with both factors in 2..{most}, and {num_features} has none",
        "pad the layer to {legal} in features",
    ),
    "many_features": Rule(
        "in_features can be at most {most} for a Kronecker transform, got {num_features}",
        "split the layer",
    ),
    "not_finite": Rule(
        "its weight holds NaN or infinite values",
        "load the weights again; bfloat16 or float32 where float16 overflowed",
    ),
    "computed_weight": Rule(
        "its weight is computed in the graph ({node}), not a parameter",
        "merge what computes it (an adapter, a parametrization) into the weight before compiling",
    ),
    "computed_bias": Rule(
        "its bias is computed in the graph ({node}), not a parameter",
        "merge what computes it into the bias before compiling",
    ),
    "other_plan": Rule(
        "the compiled graph that it shares with {other} was made for plan {theirs}, not {own}",
        "convert the model: converted Linears do not share graphs; or use one plan for all groups",
    ),
    "other_group": Rule(
        "in the compiled graph that it shares with {other} its group is another one",
        "convert the model: converted Linears do not share graphs",
    ),
    "beside": Rule(
        "in the compiled graph that it shares with {other}, {beside} cannot run: {problem}",
        "convert the model: converted Linears do not share graphs",
    ),
    "read_otherwise": Rule(
        "its weight is read by {operation}, not by a linear",
        "have its module call torch.nn.functional.linear, or the Linear itself",
    ),
    "not_reached": Rule(
        "no graph has it",
        "give inputs that reach it; see also why graphs break: what Dynamo cannot trace runs as it is",
    ),
}


class Reason(str):
    """Why one Linear is left alone: a string, with the name of its ``rule`` and the ``way_out``."""

    rule: str
    way_out: str


def reason(rule: str, **facts: Any) -> Reason:
    """A reason of the table, its fields filled in."""
    made = Reason(RULES[rule].text.format(**facts))
    made.rule, made.way_out = rule, RULES[rule].way_out.format(**facts)
    return made
