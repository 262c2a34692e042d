"""Graphs made at random, through the passes: right without rounding, right with it, and with the right types.

A program is a list of steps over a list of values. It runs three times: in float; on *shadows*, tensors of the same
shape that hold the number of the token that each element belongs to, moved about by the same views; and quantised by
the reference, Linear by Linear, with the types of the tokens that the shadows show. The passes know nothing of shadows,
and must agree with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.backend import freeact
from freeact_fx.passes.node_facts import LinearFact, facts_of, roots_of, value_of
from freeact_fx.reference import epilogue, int_mm, transform_quantize
from freeact_fx.runner import Runner
from freeact_fx.transform import orthogonal_transform, pack_linear

BATCH, MASK, WIDTHS = 2, 5, (32, 48, 64)
LOST, NO_TOKENS = "lost", "no tokens"
Shadow = Any  # a tensor, LOST or NO_TOKENS


# ------------------------------------------------------------------ steps

# One operand, elements moved only: the same function moves a shadow.
VIEWS: dict[str, Callable[..., Tensor]] = {
    "flatten": lambda x: x.flatten(0, 1),
    "reshape": lambda x: x.reshape(-1, x.shape[-1]),
    "heads": lambda x, n: x.unflatten(-1, (n, -1)).transpose(1, 2),
    "heads by size": lambda x, n: x.reshape(x.size(0), x.size(1), n, -1).permute(0, 2, 1, 3),
    "merge heads": lambda x: x.transpose(1, 2).flatten(2),
    "merge heads wrongly": lambda x: x.reshape(x.shape[0], x.shape[2], -1),
    "fold heads": lambda x: x.flatten(0, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "swap batch": lambda x: x.permute(1, 0, 2),
    "skip": lambda x, n: x[:, n:],
    "every": lambda x, n: x[:, ::n],
    "last": lambda x: x[:, -1:],
    "pick": lambda x, n: x[:, n],
    "one sequence": lambda x: x[1:],
    "windows": lambda x: x.unflatten(1, (-1, 2)).flatten(0, 1),
    "repeat": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1),
    "features": lambda x, n: x[..., :n],
    "second half": lambda x: x.chunk(2, -1)[1],
    "unflatten": lambda x: x.unflatten(0, (2, -1)),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "t": lambda x: x.t(),
}
# One operand, elements stay where they are.
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "affine": lambda x: x * 1.5 + 0.1,
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "rms_norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "less the mean token": lambda x: x - 0.5 * x.mean(1, keepdim=True),
    "in place": lambda x: x.clone().add_(0.25),
    "there and back": lambda x: x.double().to(torch.float32),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}
PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "gate": lambda a, b: F.silu(a) * b,
    "cat tokens": lambda a, b: torch.cat([a, b], 1),
    "cat features": lambda a, b: torch.cat([a, b], -1),
}
STYLES = ("module", "functional", "matmul", "addmm")


@dataclass(frozen=True)
class Step:
    """``kind`` of VIEWS, POINTWISE, PAIRS or STYLES; operands by position; ``number`` a parameter, or a Linear."""

    kind: str
    operands: tuple[int, ...]
    number: int | None = None

    def run(self, values: Sequence[Tensor], linear: Callable[[Step, Tensor], Tensor]) -> Tensor:
        given = [values[i] for i in self.operands]
        if self.kind in STYLES:
            return linear(self, given[0])
        if self.kind in PAIRS:
            return PAIRS[self.kind](*given)
        if self.kind in POINTWISE:
            return POINTWISE[self.kind](given[0])
        return VIEWS[self.kind](given[0], *(() if self.number is None else (self.number,)))


@dataclass
class Program:
    """A random program: its steps, its Linears (in, out, bias, the one whose weight it takes), and its outputs."""

    length: int
    has_ids: bool
    steps: list[Step] = field(default_factory=list)
    linears: list[tuple[int, int, bool, int | None]] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)  # steps whose result nobody reads

    @property
    def outputs(self) -> list[int]:
        read = {i for step in self.steps for i in step.operands}
        last = [
            i for i in range(2, 2 + len(self.steps)) if i not in read and i - 2 not in self.dead
        ]
        return last or [0]

    @property
    def ids(self) -> Tensor:
        ids = torch.arange(BATCH * self.length).view(BATCH, self.length) * 7 % 11
        return ids.where(ids != 6, MASK)

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        side = torch.randn(BATCH, self.length, 48, generator=generator)
        hidden = torch.randn(BATCH, self.length, 48, generator=generator)
        return (self.ids if self.has_ids else hidden), side

    def types(self) -> Tensor:
        return (self.ids == MASK).int()

    def tokens(self) -> Tensor:
        """The shadow of the hidden states: tokens numbered through."""
        numbers = torch.arange(BATCH * self.length).view(BATCH, self.length, 1)
        return numbers.expand(-1, -1, 48)


class Model(nn.Module):
    """A program as a module: what ``symbolic_trace``, Dynamo and ``torch.export`` are given."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.outputs = tuple(program.steps), tuple(program.outputs)
        self.embed = nn.Embedding(64, 48) if program.has_ids else nn.Identity()
        self.linears = nn.ModuleList()
        for num_features, num_outputs, bias, tied in program.linears:
            linear = nn.Linear(num_features, num_outputs, bias=bias)
            if tied is not None:
                linear.weight = self.linears[tied].weight
            self.linears.append(linear)
        # transformers' Conv1D layout: [K, N].
        self.transposed = nn.ParameterList(linear.weight.t().clone() for linear in self.linears)

    def forward(self, first: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        values = [self.embed(first), side]
        for step in self.steps:
            values.append(step.run(values, self.linear))
        return tuple([values[i] for i in self.outputs])

    def linear(self, step: Step, x: Tensor) -> Tensor:
        module = self.linears[step.number]
        if step.kind == "module":
            return module(x)
        if step.kind == "functional":
            return F.linear(x, module.weight, bias=module.bias)
        if step.kind == "matmul":
            y = x @ module.weight.t()
            return y if module.bias is None else y + module.bias
        if module.bias is None:
            return torch.mm(x, self.transposed[step.number])
        return torch.addmm(module.bias, x, self.transposed[step.number])


# ------------------------------------------------------------------ shadows


def constant_over_features(shadow: Shadow) -> bool:
    return isinstance(shadow, Tensor) and bool((shadow == shadow[..., :1]).all())


def shadow_of(step: Step, shadows: Sequence[Shadow], num_outputs: int | None) -> Shadow:
    """The shadow of a step's result."""
    given = [shadows[i] for i in step.operands]
    if step.kind in STYLES:
        if not isinstance(given[0], Tensor):
            return given[0]
        if not constant_over_features(given[0]):
            return LOST
        return given[0][..., :1].expand(*given[0].shape[:-1], num_outputs)
    if step.kind == "cat tokens":
        return torch.cat(given, 1) if all(isinstance(s, Tensor) for s in given) else _neither(given)
    known = [s for s in given if isinstance(s, Tensor)]
    if not known:
        return LOST if LOST in given else NO_TOKENS
    if step.kind == "cat features":
        if len(known) == 2:
            return torch.cat(known, -1)
        if not constant_over_features(known[0]):
            return LOST
        return known[0][..., :1].expand(*known[0].shape[:-1], num_outputs)
    if step.kind in PAIRS:
        return _one_of(known[0], known[-1])
    if step.kind in POINTWISE:
        return known[0]
    return step.run(shadows, _no_linear)


def _one_of(a: Tensor, b: Tensor) -> Shadow:
    """The tokens of a sum: both operands' if they agree; one that only repeats along the other's does not count."""
    if torch.equal(a, b):
        return a
    varying = [{d for d in range(s.dim()) if bool((s != s.narrow(d, 0, 1)).any())} for s in (a, b)]
    if varying[0] < varying[1]:
        return b
    return a if varying[1] < varying[0] else LOST


def _neither(given: Sequence[Shadow]) -> Shadow:
    return NO_TOKENS if all(isinstance(s, str) and s == NO_TOKENS for s in given) else LOST


def _no_linear(step: Step, x: Tensor) -> Tensor:
    raise AssertionError(step)


# ------------------------------------------------------------------ drawing a program


def candidates(shape: tuple[int, ...], shadow: Shadow) -> list[tuple[str, int | None]]:
    """The steps with one operand that a value can take, Linears aside."""
    found: list[tuple[str, int | None]] = [
        (name, None)
        for name in ("gelu", "affine", "layer_norm", "rms_norm", "in place", "there and back")
    ]
    last = shape[-1]
    if last == 64:
        found += [("features", 48), ("features", 32), ("second half", None)]
    if last == 96:
        found += [("features", 48), ("second half", None)]
    if len(shape) == 4:
        found += [("merge heads", None), ("fold heads", None)]
        found += [("merge heads wrongly", None)]
    if len(shape) == 3:
        found += [("flatten", None), ("reshape", None), ("transpose", None), ("swap batch", None)]
        found += [("less the mean token", None), ("last", None), ("repeat", None)]
        found += [("skip", 1), ("every", 2), ("pick", 1)] if shape[1] > 2 else []
        found += [("windows", None)] if shape[1] % 2 == 0 else []
        found += [("one sequence", None)] if shape[0] > 1 else []
        found += [("heads", 2), ("heads by size", 2)] if last in (64, 96) else []
        found += [("attention", None)] if constant_over_features(shadow) else []
    if len(shape) == 2:
        found += [("unsqueeze", None), ("t", None)]
        found += [("unflatten", None)] if shape[0] % 2 == 0 else []
    return found


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """The first steps of an endless random program: fewer of them is what a failure shrinks to."""
    # A length of 48 makes tokens and features look alike to anyone who goes by size.
    program = Program(draw(st.sampled_from([6, 48])), draw(st.booleans()))
    random = Random(draw(st.integers(0, 2**32)))
    root = program.tokens()
    shapes: list[tuple[int, ...]] = [(BATCH, program.length, 48)] * 2
    shadows: list[Shadow] = [root, NO_TOKENS if program.has_ids else root]
    for _ in range(draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 16, 24, 24]))):
        alive = [i for i in range(len(shapes)) if i - 2 not in program.dead]
        # Mostly one of the last, so that steps make chains.
        index = random.choice(alive[-3:] if random.random() < 0.7 else alive)
        shape, shadow = shapes[index], shadows[index]
        same = [i for i in alive if shapes[i] == shape]
        choice = random.random()
        if choice < 0.35 and shape[-1] in WIDTHS:
            step = draw_linear(random, program, index, shape)
            new = (*shape[:-1], program.linears[step.number or 0][1])
        elif choice < 0.5 and len(same) > 1:
            kinds = ["add", "gate"] + ["cat tokens"] * (len(shape) == 3)
            kinds += ["cat features"] * (shape[-1] in (32, 48))
            step = Step(random.choice(kinds), (index, random.choice(same)))
            dim = {"cat tokens": 1, "cat features": len(shape) - 1}.get(step.kind)
            new = tuple(2 * s if d == dim else s for d, s in enumerate(shape))
        else:
            kind, number = random.choice(candidates(shape, shadow))
            step = Step(kind, (index,), number)
            new = tuple(step.run([torch.empty(s) for s in shapes], _no_linear).shape)
        program.steps.append(step)
        shapes.append(new)
        shadows.append(shadow_of(step, shadows, new[-1]))
    return program


def draw_linear(random: Random, program: Program, index: int, shape: tuple[int, ...]) -> Step:
    """A Linear, new or once more the same; its result may go nowhere, its weight may be another one's."""
    style = random.choice(STYLES if len(shape) == 2 else STYLES[:3])
    dead = random.random() < 0.1
    usable = [i for i, entry in enumerate(program.linears) if entry[0] == shape[-1]]
    if usable and not dead and random.random() < 0.3:
        return Step(style, (index,), random.choice(usable))
    tied = random.choice(usable) if usable and random.random() < 0.3 else None
    num_outputs = random.choice([*WIDTHS, 96]) if tied is None else program.linears[tied][1]
    program.linears.append((shape[-1], num_outputs, random.random() < 0.5, tied))
    if dead:
        program.dead.add(len(program.steps))
    return Step(style, (index,), len(program.linears) - 1)


# ------------------------------------------------------------------ what must come out


def config_for(program: Program, plan: str, sink: str | None) -> QuantConfig:
    types = (
        TokenTypes.mask_token(MASK) if program.has_ids else TokenTypes.explicit("plain", "special")
    )
    return QuantConfig(token_types=types, plan=plan, sink=sink, branch_rank=4)


def context_of(program: Program) -> AbstractContextManager[None]:
    """Hidden states do not show their types: they are handed in."""
    return nullcontext() if program.has_ids else freeact_fx.token_types(program.types())


def expected_types(
    program: Program, sink: str | None, shadows: Sequence[Shadow], facts: Sequence[LinearFact]
) -> Tensor:
    """[B * T]; the sink is laid over the ids' types if attention shows where sequences begin.

    Attention of all tokens to all tokens must be seen to show it. What else (of windows, of copies) does is for the
    passes to say.
    """
    types = program.types()
    attended = [shadows[s.operands[0]] for s in program.steps if s.kind == "attention"]
    roots = [root for fact in facts if fact.types for root in roots_of(fact.types.expr)]
    known = any(root.sink_known for root in roots)
    assert attended or not known
    assert (
        known
        or not roots
        or not any(torch.equal(s[..., 0], program.tokens()[..., 0]) for s in attended)
    )
    if program.has_ids and sink and known:
        types[:, 0] = 2
    return types.flatten()


def shadows_of(program: Program) -> list[Shadow]:
    shadows: list[Shadow] = [program.tokens()]
    shadows.append(NO_TOKENS if program.has_ids else program.tokens())
    shapes = [torch.empty(BATCH, program.length, 48)] * 2

    def linear(step: Step, x: Tensor) -> Tensor:
        assert step.number is not None
        return x.new_empty(*x.shape[:-1], program.linears[step.number][1])

    for step in program.steps:
        shapes.append(step.run(shapes, linear))
        shadows.append(shadow_of(step, shadows, shapes[-1].shape[-1]))
    return shadows


def quantised_by_reference(
    program: Program, model: Model, config: QuantConfig, facts: Sequence[LinearFact]
) -> tuple[list[Tensor], int]:
    """Run the program with the reference in place of every Linear; also the number of Linears with types.

    Which Linears the passes gave up on (state "refused") is taken from them; which types the others have is not.
    """
    shadows = shadows_of(program)
    types_of_tokens = expected_types(program, config.sink, shadows, facts)
    remaining = list(facts)
    num_typed = 0

    def linear(step: Step, x: Tensor) -> Tensor:
        nonlocal num_typed
        module = model.linears[step.number]
        weight = module.weight
        if step.kind == "addmm":
            weight = model.transposed[step.number].t()
        fact = remaining.pop(0)
        shadow = shadows[step.operands[0]]
        types, default_type = None, 0
        if fact.state == "refused":
            assert not (isinstance(shadow, str) and shadow == NO_TOKENS), fact.type_source
            default_type = config.num_types
        elif fact.types is None:
            assert isinstance(shadow, str), f"{fact.type_source}: tokens were lost without a word"
            assert shadow == NO_TOKENS, fact.type_source
        else:
            assert constant_over_features(shadow), f"{fact.type_source}: there are no such types"
            types = types_of_tokens[shadow[..., 0]]
            num_typed += 1
        # A product with a bias added afterwards is a Linear without bias, and an addition.
        bias = None if step.kind == "matmul" else module.bias
        y = reference_linear(x, weight, bias, types, default_type, config)
        return y + module.bias if step.kind == "matmul" and module.bias is not None else y

    first, side = program.inputs()
    values = [model.embed(first), side]
    num_linears = sum(step.kind in STYLES for step in program.steps)
    for index, step in enumerate(program.steps):
        if index in program.dead and len(facts) < num_linears:
            values.append(values[0])  # the tracer has left it out
        else:
            values.append(step.run(values, linear))
    assert not remaining
    return [values[i] for i in program.outputs], num_typed


def reference_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    types: Tensor | None,
    default_type: int,
    config: QuantConfig,
) -> Tensor:
    t = orthogonal_transform(x.shape[-1], config)
    packed = pack_linear(t, weight, bias, config)
    codes, scale, coefficients = transform_quantize(
        *(x, types, t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank),
        *(t.widths, t.slice_of_type, default_type, t.own_rank, config.qmax),
    )
    return epilogue(
        *(int_mm(codes, packed.weight), scale, packed.weight_scale, packed.bias_table),
        *(coefficients, packed.branch_weight, packed.branch_scale),
        *(types, t.slice_of_type, default_type, x.dtype),
    )


def assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-6


Traced = Callable[[Model, Program, QuantConfig], tuple[Callable[..., Any], list[LinearFact]]]


def by_symbolic_trace(
    model: Model, program: Program, config: QuantConfig
) -> tuple[Callable[..., Any], list[LinearFact]]:
    rewritten = freeact_fx.rewrite(torch.fx.symbolic_trace(model), program.inputs(), config)
    return rewritten, facts_of(rewritten.graph_module)


def by_export(
    model: Model, program: Program, config: QuantConfig
) -> tuple[Callable[..., Any], list[LinearFact]]:
    graph = torch.export.export(model, program.inputs()).module()
    for module in graph.modules():
        module.training = False
    rewritten = freeact_fx.rewrite(graph, program.inputs(), config)
    return rewritten, facts_of(rewritten.graph_module)


def by_dynamo(
    model: Model, program: Program, config: QuantConfig, *, dynamic: bool = False
) -> tuple[Callable[..., Any], list[LinearFact]]:
    torch._dynamo.reset()
    facts: list[LinearFact] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        options = config.to_dict() | {"compiler": "eager"}
        runner = freeact(gm, example_inputs, options=options)
        assert isinstance(runner, Runner)
        facts.extend(facts_of(runner.compiled.__self__))
        return runner

    def same_sizes(first: Tensor, side: Tensor) -> Any:
        """Two arguments of unknown sizes hold the same tokens only if the graph shows that their sizes agree."""
        return model(first, side + 0.0 * first)

    traced = same_sizes if dynamic and not program.has_ids else model
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    inputs = program.inputs()
    for tensor in inputs if dynamic else ():
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1])
    with torch.no_grad(), context_of(program):
        compiled(*inputs)
    return compiled, facts


by_dynamo_with_symbolic_sizes = functools.partial(by_dynamo, dynamic=True)


def check(program: Program, plan: str, sink: str | None, traced: Traced) -> int:
    """All that must hold of a program; returns how many of its Linears had types."""
    model = Model(program).eval()
    config = config_for(program, plan, sink)
    with torch.no_grad():
        want = model(*program.inputs())
        exact, _ = traced(model, program, replace(config, quantize=False))
        with context_of(program):
            assert_close(exact(*program.inputs()), want, 1e-4)
        rounded, facts = traced(model, program, config)
        with context_of(program):
            got = rounded(*program.inputs())
        simulated, num_typed = quantised_by_reference(program, model, config, facts)
        assert_close(got, simulated, 1e-5)
    return num_typed


PLANS = st.sampled_from(["single", "shift", "duplicate", "branch"])
SINKS = st.sampled_from([None, "first"])
SETTINGS = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(SETTINGS, max_examples=150)
@given(programs(), PLANS, SINKS)
def test_symbolic_trace(program: Program, plan: str, sink: str | None) -> None:
    check(program, plan, sink, by_symbolic_trace)


@settings(SETTINGS, max_examples=30)
@given(programs(), PLANS, SINKS)
def test_dynamo(program: Program, plan: str, sink: str | None) -> None:
    check(program, plan, sink, by_dynamo)


@settings(SETTINGS, max_examples=20)
@given(programs(), PLANS, SINKS)
def test_symbolic_sizes(program: Program, plan: str, sink: str | None) -> None:
    check(program, plan, sink, by_dynamo_with_symbolic_sizes)


@settings(SETTINGS, max_examples=30)
@given(programs(), PLANS, SINKS)
def test_export(program: Program, plan: str, sink: str | None) -> None:
    check(program, plan, sink, by_export)


@settings(SETTINGS, max_examples=40)
@given(programs(), PLANS, st.booleans())
def test_rewriting_again_changes_nothing(program: Program, plan: str, quantize: bool) -> None:
    model = Model(program).eval()
    config = replace(config_for(program, plan, "first"), quantize=quantize)
    once = freeact_fx.rewrite(torch.fx.symbolic_trace(model), program.inputs(), config)
    assert freeact_fx.rewrite(once, program.inputs(), config) is once
    # The graph inside has placeholders for what the passes added; to them they are ordinary inputs.
    graph = once.graph_module
    values = [value_of(node) for node in graph.graph.nodes if node.op == "placeholder"]
    example = [torch.zeros(v.shape, dtype=v.dtype) for v in values]
    twice = freeact_fx.rewrite(graph, example, config)
    assert not twice.report.quantized
    assert str(twice.graph) == str(graph.graph)
