"""Trace a model once, with the real backend in several settings at a time, and keep what was seen.

Dynamo's tracing is most of the time that a test of a model takes. So each graph is handed to the backend once per
setting, and at each call every setting runs on the same inputs; what the last one returns goes on to the next graph.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from model_zoo import KINDS, MASK_ID, PAD_ID, build, picture_inputs, text_ids
from random_transforms import EXACT_PLANS, random_transform
from recording import Recorder, Seen
from torch import Tensor, nn
from torch.fx import GraphModule

from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.checkpoint import PackedEntry, fingerprint
from freeact_fx.passes.node_facts import LinearFact
from freeact_fx.transform import pack_linear

QUANTISED = "W4A4"


@contextmanager
def checks_of_transformers(on: bool) -> Iterator[None]:
    """Hugging Face checks the number of picture tokens, which breaks the graph; a variable turns that off."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ.pop(name, None) if on else os.environ.__setitem__(name, "1")
    try:
        yield
    finally:
        os.environ.pop(name, None) if before is None else os.environ.__setitem__(name, before)


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def token_types_of(name: str, model: nn.Module) -> TokenTypes:
    if KINDS[name].pictures is None:
        return TokenTypes.mask_token(MASK_ID)
    return TokenTypes.from_config(model.config)


def expected_types(inputs: dict[str, Any], types: TokenTypes, *, first: bool = True) -> Tensor:
    """Types [B, T] of a call, in plain Python: by id, and the first token that is not padding."""
    rows = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        by_id = {i: n for n, t in enumerate(types.types) for i in t.token_ids}
        found = [by_id.get(i, 0) for i in ids]
        visible = inputs["attention_mask"][row].tolist() if "attention_mask" in inputs else [1]
        if first:
            found[visible.index(1)] = len(types.types)
        rows.append(found)
    return torch.tensor(rows)


def random_checkpoint(
    plan: str, groups: Sequence[Sequence[str]], model: nn.Module, config: QuantConfig
) -> Checkpoint:
    """A checkpoint whose transforms differ from group to group, and from type to type."""
    transforms, linears = {}, {}
    for seed, group in enumerate(groups):
        members = [model.get_submodule(name) for name in group]
        num_features = members[0].weight.shape[1]
        transform = random_transform(plan, num_features, config.num_types, seed=seed)
        if (
            transform.shift is not None
        ):  # of the size of a random model's activations, or it swamps them
            transform = replace(transform, shift=transform.shift / 8)
        transforms[group[0]] = transform
        for name, module in zip(group, members, strict=True):
            packed = pack_linear(transform, module.weight, module.bias, config)
            mark = fingerprint(module.weight)
            linears[name] = PackedEntry(group[0], num_features, packed, mark)
    return Checkpoint(config, transforms, linears)


def groups_of(linears: Sequence[LinearFact]) -> list[tuple[str, ...]]:
    """Names of the quantised Linears by the activation they read."""
    groups: dict[Any, list[str]] = {}
    for linear in linears:
        if linear.refusal is None:
            groups.setdefault(linear.x, []).append(linear.name)
    return [tuple(group) for group in groups.values()]


class Settings:
    """A backend that runs each graph in several settings: rounded, and with each exact plan."""

    def __init__(self, model: nn.Module, types: TokenTypes, plans: Sequence[str]) -> None:
        self.model, self.types, self.plans = model, types, plans
        config = QuantConfig(token_types=types, clip_search=False)
        self.config = config
        self.recorders = {QUANTISED: Recorder(model, token_types=types, clip_search=False)}
        self.recorders |= {plan: Recorder(model) for plan in plans}
        self.errors: dict[str, list[float]] = {plan: [] for plan in plans}

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        runners = {QUANTISED: self.recorders[QUANTISED](gm, example_inputs)}
        groups = groups_of(self.recorders[QUANTISED].graphs[-1].linears)
        for plan in self.plans:
            checkpoint = random_checkpoint(plan, groups, self.model, self.config)
            options = {"checkpoint": checkpoint, "quantize": False, "compiler": "eager"}
            self.recorders[plan].options = options
            runners[plan] = self.recorders[plan](gm, example_inputs)

        def run(*args: Any) -> Any:
            want = gm(*args)
            result = want
            for setting, runner in runners.items():
                result = runner(*args)
                if setting in self.errors:
                    self.errors[setting] += [
                        relative(a, b)
                        for a, b in zip(result, want, strict=True)
                        if isinstance(a, Tensor) and a.is_floating_point()
                    ]
            return result

        return run


@dataclass
class Call:
    """One call of a traced model: its inputs, what each setting ran, and the error of the logits end to end."""

    inputs: dict[str, Any]
    seen: dict[str, dict[str, Seen]]
    error: float
    num_graphs: int


@dataclass
class Trace:
    """A model and its calls."""

    name: str
    model: nn.Module
    settings: Settings
    calls: list[Call] = field(default_factory=list)

    @property
    def recorder(self) -> Recorder:
        return self.settings.recorders[QUANTISED]


def inputs_of(name: str) -> list[dict[str, Any]]:
    """Calls of one shape and different mixes of types; sequences are padded on the left."""
    if KINDS[name].pictures is not None:
        return [
            picture_inputs(name, starts=(3, 9), padding=(0, 4)) | {"use_cache": False},
            picture_inputs(name, starts=(12, 1), padding=(2, 0)) | {"use_cache": False},
        ]
    calls = []
    for seed, masked in enumerate((0.0, 0.3, 1.0)):
        ids = text_ids(2, 16, masked=masked, seed=seed)
        mask = torch.ones_like(ids)
        ids[1, :3], mask[1, :3] = PAD_ID, 0
        calls.append({"input_ids": ids, "attention_mask": mask})
    return calls


@functools.cache
def traced(name: str, checks: bool = True) -> Trace:
    """Compile a model of a kind and call it with ``inputs_of``; once per process."""
    model = build(name)
    settings = Settings(model, token_types_of(name, model), EXACT_PLANS)
    trace = Trace(name, model, settings)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=settings)
    with torch.no_grad(), checks_of_transformers(checks), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Dynamo's own, when it traces Gemma's masks.
        warnings.filterwarnings("ignore", ".* should not be instantiated", DeprecationWarning)
        for inputs in inputs_of(name):
            want = logits_of(model(**inputs))
            got = logits_of(compiled(**inputs))
            seen = {s: r.take() for s, r in settings.recorders.items()}
            graphs = len(settings.recorders[QUANTISED].graphs)
            trace.calls.append(Call(inputs, seen, relative(got, want), graphs))
    torch._dynamo.reset()
    return trace
