"""``freeact_fx.verify``: where a quantised model leaves its float original, and whose fault it is.

The model runs a few times on the same inputs, each time with one stage more::

    float        the original, graph by graph; in front of each group a ``GroupCheck`` measures what the group's own
                 operands would make of the float activation (parts, transforms, rounding, types, engine)
    transformed  the original with the model's transforms, quantisers off
    quantised    the passes' graph, eagerly; its Linears are compared with the reference (passes, engine)
    compiled     the same through Inductor, graph by graph beside the eager one (lowering)

Errors in the running model are differences to what the float run gave, which is kept on disk meanwhile: in memory there
is one group at a time.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..checkpoint import Checkpoint
from ..config import QuantConfig
from ..convert import FreeActLinear
from ..errors import ConfigError
from ..memory import free_bytes
from ..observe import padding_of
from .group_check import Errors, GroupCheck, LinearCheck
from .original import original_of, sharing_copy
from .result import STAGES, Finding, Unchecked, Verification
from .wrong_rounding import (
    better_elsewhere,
    errors_of,
    misfits,
    mistyped,
    unlike_calibration,
    wrong_transform,
    wrong_weight,
)

# With quantisers off, in fp32; an output in fewer bits is rounded once in every group besides.
_TOLERANCE = 1e-4
# The running graph beside the reference, on the same tokens: a code that falls on the other side of a half moves a
# token's output by a hundredth; a wrong graph by all of it.
_AS_RUN = 0.05
# What Inductor changes may be this many times what a change in the last digits of every scale does.
_LOWERING_NOISE = 3.0
_LOWERING_LEAST = 0.02  # products of a branch run in bf16 there
_NO_ORIGINAL = "Give verify the original model, its state dict or its checkpoint's path: dense=."


def verify(
    model: nn.Module,
    *args: Any,
    checkpoint: Checkpoint | str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    dense: nn.Module | Mapping[str, Tensor] | str | Path | None = None,
    **kwargs: Any,
) -> Verification:
    """Find where a quantised model leaves its float original on these inputs, and name the first culprit.

    model         dense (as ``torch.compile(model, backend="freeact", options=...)`` would quantise it), converted, or
                  compiled; it is run in eval mode and not changed
    args, kwargs  its inputs; call inside ``freeact_fx.token_types`` if the model is
    checkpoint    of a dense model: what to quantise it with; of a converted one: what it was converted with, to
                  compare it with
    options       as for ``torch.compile``; a stage in ``options["bypass"]`` is not checked
    tolerance     relative error of a group with quantisers off; None: 1e-4
    dense         the float original of a converted model: a model, a state dict, or the path of one (safetensors, a
                  folder of them, or what ``torch.save`` wrote). Without it the model's own parts are compared with
                  each other, and the result says what was left out

    Memory: the models, and about five fp32 copies of the weights of one group; the run with quantisers off holds all
    weights once more in fp32, and is left out where they do not fit. Time: 23 to 30 forwards of the float model (135M
    parameters, 512 tokens, one core), and Inductor's compilation unless the lowering is bypassed. Raises ConfigError
    for inputs that do not fit; what is wrong with the model is not raised but in the result.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(
            f"verify(tolerance=...): must be above 0, got {tolerance!r}. 1e-4 is the default."
        )
    subject = _Subject.of(model, checkpoint, options, dense)
    with tempfile.TemporaryDirectory(prefix="freeact-verify-") as folder, torch.no_grad():
        return _Verifier(subject, (args, kwargs), tolerance, Path(folder)).run()


@dataclass
class _Subject:
    """What is verified.

    options   for compiling the model, without the stages to go around
    bypass    those stages
    original  the float model, or None
    carried   operands of a converted model, as they are in it; None: it is dense
    given     the checkpoint to compare with, or to quantise with
    """

    model: nn.Module
    options: dict[str, Any]
    bypass: tuple[str, ...]
    config: QuantConfig
    original: nn.Module | None
    carried: Checkpoint | None
    given: Checkpoint | None

    @staticmethod
    def of(
        model: nn.Module,
        checkpoint: Checkpoint | str | Path | None,
        options: Mapping[str, Any] | None,
        dense: nn.Module | Mapping[str, Tensor] | str | Path | None,
    ) -> _Subject:
        from ..converted import checkpoint_of
        from ..options import Options

        given = dict(options or {})
        if checkpoint is not None and given.get("checkpoint") not in (None, checkpoint):
            raise ConfigError(
                "verify: checkpoint= and options['checkpoint'] are two different ones. Give one of them."
            )
        converted = any(isinstance(m, FreeActLinear) for m in model.modules())
        carried = checkpoint_of(model) if converted else None
        if carried is not None:
            reference = checkpoint or given.pop("checkpoint", None)
            stored = None
            if reference is not None:
                stored = Options.parse(None, {"checkpoint": reference}).checkpoint
            parsed = Options.parse(None, given)
            types = carried.config if not parsed.types_given else parsed.config
            config = replace(carried.config, token_types=types.token_types, sink=types.sink)
            names = tuple(escape(name) for name in carried.linears)
            config = replace(config, include=(*config.include, *names), skip=())
            if not parsed.config.quantize:
                raise ConfigError(
                    "verify: quantize=False needs dense weights, and this model was converted. verify the "
                    "original with checkpoint= and these options."
                )
        else:
            if checkpoint is not None:
                given["checkpoint"] = checkpoint
            parsed = Options.parse(None, given)
            config, stored = parsed.config, parsed.checkpoint
        for alias in ("bypass", "compiler", "enabled"):
            given.pop(alias, None)
        original = original_of(model, carried, dense)
        return _Subject(model, given, parsed.bypass, config, original, carried, stored)

    def operands(self, name: str, weight: Tensor, bias: Tensor | None) -> Any:
        """Transform and packed weight that a Linear runs with; None: it stays as it was."""
        if self.carried is not None:
            entry = self.carried.linears.get(name)
            return None if entry is None else (self.carried.groups[entry.group], entry.packed)
        from ..packing import Packer

        module = self.model.get_submodule(name)
        own, own_bias = module.weight, module.bias
        transposed = own.shape != weight.shape or type(module).__name__ == "Conv1D"
        packer = Packer(self.config, self.given)
        found = packer.pack(name, own, own_bias, transposed=transposed)  # type: ignore[arg-type]
        return found if isinstance(found, tuple) else None

    def fingerprint_of(self, name: str, weight: Tensor) -> tuple[float, float, float] | None:
        """Fingerprint of the dense weight that was packed, or None if nothing keeps it."""
        source = self.carried or self.given
        if source is None:
            return None
        found = source.find(name, weight)
        return None if found is None else source.linears[found].fingerprint

    def statistics_of(self, name: str) -> dict[str, Any]:
        """What calibration measured of a Linear's group."""
        for source in (self.given, self.carried):
            if source is not None and name in source.linears:
                found: dict[str, Any] = source.statistics.get(source.linears[name].group, {})
                if found:
                    return found
        return {}

    @property
    def runs_in(self) -> dict[str, Any]:
        """Options for running the model."""
        return self.options

    @property
    def off_options(self) -> dict[str, Any]:
        """Options that give the original this model's transforms, quantisers off."""
        if self.carried is None:
            return {**self.options, "quantize": False}
        return {
            "checkpoint": self.carried,
            "include": self.config.include,
            "skip": (),
            "token_types": self.config.token_types,
            "sink": self.config.sink,
            "quantize": False,
        }


class _Outputs:
    """Outputs of the float run by Linear and call, with the types of their tokens; on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, int], Path] = {}

    def put(self, name: str, call: int, y: Tensor, types: Tensor | None) -> None:
        file = self._folder / f"{len(self._files):06}.pt"
        torch.save((y.cpu(), None if types is None else types.cpu()), file)
        self._files[name, call] = file

    def get(self, name: str, call: int) -> tuple[Tensor, Tensor | None] | None:
        file = self._files.get((name, call))
        if file is None:
            return None
        y, types = torch.load(file, weights_only=True)
        return y, types


@dataclass
class _Run:
    """Errors of a run of the model against the float one, by Linear and type; and its outputs."""

    errors: dict[str, Errors] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


class _Verifier:
    """The runs of one verification."""

    def __init__(
        self,
        subject: _Subject,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        tolerance: float | None,
        folder: Path,
    ) -> None:
        self.subject, self.inputs = subject, inputs
        self.groups: dict[str, GroupCheck] = {}
        self.linears: dict[str, tuple[GroupCheck, LinearCheck]] = {}
        self.float_outputs = _Outputs(folder)
        self.result = Verification(type(subject.model).__name__)
        self.result.tolerance = self.result.tolerance_of_output = tolerance or _TOLERANCE
        padding = padding_of(inputs[1])
        self.there = None if padding is None else ~padding
        self.parts: list[Finding] = []

    def run(self) -> Verification:
        subject, result = self.subject, self.result
        self.parts += self._compare_with_checkpoint()
        if "passes" in subject.bypass:
            way_out = "Leave them out of options['bypass']."
            self._leave_out("passes", "options bypass them: nothing is quantised", way_out)
        if "engine" in subject.bypass:
            way_out = "Leave it out of options['bypass']."
            self._leave_out("engine", "options bypass it", way_out)
        runs: dict[str, _Run] = {}
        if subject.original is not None:
            runs["float"] = self._run_float(subject.original)
            if not self.groups:
                raise ConfigError(
                    "verify: no Linear of this model is quantised on these inputs. freeact_fx.explain shows each "
                    "with its reason."
                )
            if self._fits(subject.original):
                runs["transformed"] = self._run_transformed(subject.original)
        else:
            for stage in ("transforms", "rounding", "types"):
                what = "a converted model has no dense weights to compare with"
                self._leave_out(stage, what, _NO_ORIGINAL)
        if subject.config.quantize and "passes" not in subject.bypass:
            runs["quantised"] = self._run_quantised()
        lowering: list[Finding] = []
        if "lowering" in subject.bypass or "passes" in subject.bypass:
            self._leave_out("lowering", "options bypass it", "Leave it out of options['bypass'].")
        else:
            runs["compiled"], lowering = self._run_compiled()
        if "float" in runs:
            wanted = runs["float"].outputs
            for name in ("transformed", "quantised", "compiled"):
                if name in runs:
                    result.output[name] = _distance(runs[name].outputs, wanted)
        self._fill_groups(runs)
        findings = [*self.parts, *self._findings(runs), *lowering]
        result.findings = sorted(findings, key=lambda f: STAGES.index(f.stage))
        return result

    # ------------------------------------------------------------------ runs

    def _call(self, model: nn.Module, backend: Callable[..., Any]) -> list[Tensor]:
        """Run a model once through a backend of ours; the floating tensors that it gives."""
        from .. import compat

        args, kwargs = copy.deepcopy(self.inputs)
        was_training = model.training
        model.eval()
        try:
            with compat.traced_apart(model, backend) as traced:
                return _tensors_of(traced(*args, **kwargs))
        finally:
            model.train(was_training)

    def _run_float(self, original: nn.Module) -> _Run:
        from ..backend import observe_graph

        names = {id(p): n.rpartition(".")[0] for n, p in original.named_parameters()}
        calls: dict[str, int] = {}

        def observer(linears: list[Any]) -> Callable[..., None] | None:
            own = []
            for fact, weight, bias in linears:
                dense = weight.t() if fact.transposed else weight
                name = names.get(id(weight), fact.name)
                own.append((fact, name, dense, bias))
            checks = self._checks_of(own)
            if not checks:
                return None
            return lambda x, types: self._take(checks, calls, x, types)

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
            return observe_graph(gm, example_inputs, self.subject.config, observer)  # type: ignore[arg-type]

        return _Run(outputs=self._call(original, backend))

    def _checks_of(self, linears: list[tuple[Any, str, Tensor, Tensor | None]]) -> list[GroupCheck]:
        """The checks of the Linears that read one activation; one for each transform that they use."""
        config, checks = self.subject.config, []
        by_transform: dict[int, list[LinearCheck]] = {}
        transforms, facts = {}, {}
        for fact, name, dense, bias in linears:
            if name in self.linears:
                known = self.linears[name][0]
                checks += [known] if known not in checks else []
                continue
            found = self.subject.operands(name, dense, bias)
            if found is None:
                continue
            transform, packed = found
            transforms[id(transform)], facts[id(transform)] = transform, fact
            linear = LinearCheck.of(name, dense, bias, packed, transform.num_rows)
            by_transform.setdefault(id(transform), []).append(linear)
        for key, members in by_transform.items():
            statistics = self.subject.statistics_of(members[0].name)
            check = GroupCheck(transforms[key], members, config, facts[key].state, statistics)
            self.groups[check.name] = check
            self.linears |= {linear.name: (check, linear) for linear in members}
            checks.append(check)
            self.parts += self._wrong_parts(check)
        return checks

    def _take(
        self, checks: list[GroupCheck], calls: dict[str, int], x: Tensor, types: Tensor | None
    ) -> None:
        there = self._there(x)
        for check in checks:
            for linear in check.linears:
                assert linear.weight is not None
                y = nn.functional.linear(x, linear.weight, linear.bias)
                calls[linear.name] = calls.get(linear.name, -1) + 1
                self.float_outputs.put(linear.name, calls[linear.name], y, types)
            if check.transform.problem() is None:
                check.take(x, types, there)

    def _there(self, x: Tensor) -> Tensor | None:
        """Which tokens of an activation are no padding; None: all, or it is not known."""
        there = self.there
        if there is None or x.shape[:-1] not in (there.shape, (there.numel(),)):
            return None
        return there.to(x.device).reshape(x.shape[:-1])

    def _fits(self, original: nn.Module) -> bool:
        """Whether there is room for the whole model with quantisers off: its weights once more, in fp32."""
        device = next(original.parameters()).device
        needed = sum(
            4 * check.transform.num_codes * linear.packed.weight.shape[0]
            for check, linear in self.linears.values()
        )
        free = free_bytes(device)
        if needed <= free // 2:
            return True
        self._leave_out(
            "passes",
            f"the whole model with quantisers off needs {needed / 1e9:.1f} GB, of {free / 1e9:.1f} that are free; each "
            f"group by itself was checked",
            "Free some memory, or verify a model of fewer layers.",
        )
        return False

    def _run_transformed(self, original: nn.Module) -> _Run:
        # Weights in fp32 that no one else will ask for: packed for other parameters, they go with them.
        apart = sharing_copy(original, new_parameters=True)
        return self._run_tapped(apart, self.subject.off_options, compare=False)

    def _run_quantised(self) -> _Run:
        bypass = ("engine",) if "engine" in self.subject.bypass else ()
        return self._run_tapped(
            self.subject.model, {**self.subject.runs_in, "bypass": bypass}, compare=True
        )

    def _run_tapped(self, model: nn.Module, options: dict[str, Any], *, compare: bool) -> _Run:
        """Run the passes' graphs eagerly and compare each Linear's output with the float run's.

        compare  with the reference, too
        """
        from .. import compat
        from ..backend import freeact
        from ..runner import Runner

        run = _Run()
        names = {
            id(t): n.rpartition(".")[0]
            for n, t in [*model.named_parameters(), *model.named_buffers()]
        }
        chosen = {**options, "bypass": ("lowering", *options.get("bypass", ()))}

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
            compat.guard_identity(gm)
            runner = freeact(gm, list(example_inputs), options=chosen)
            if isinstance(runner, Runner):
                self._insert_taps(runner, example_inputs, names, run, compare)
            return runner

        run.outputs = self._call(model, backend)
        return run

    def _insert_taps(
        self, runner: Any, inputs: Sequence[Any], names: dict[int, str], run: _Run, compare: bool
    ) -> None:
        """Behind each Linear of an eager graph, hand its activation and its output to ``_tap``."""
        from ..passes.node_facts import facts_of

        module = runner.compiled.__self__
        for place, linear in zip(runner.bindings.places, facts_of(module), strict=True):
            if linear.result is None:
                continue
            name = names.get(id(place.parameters(inputs)[0]), linear.name)
            if name not in self.linears and self.subject.original is None:
                self._add_without_original(name, linear)
            if name not in self.linears:
                continue

            def tap(x: Tensor, types: Tensor | None, y: Tensor, name: str = name) -> None:
                self._tap(run, name, x, types, y, compare)

            with module.graph.inserting_after(_last(linear.result, linear.x)):
                types = _types_of(linear.result, linear.x)
                module.graph.call_function(tap, (linear.x, types, linear.result))
        module.recompile()
        runner.compiled = module.forward

    def _add_without_original(self, name: str, fact: Any) -> None:
        assert self.subject.carried is not None
        entry = self.subject.carried.linears.get(name)
        if entry is None:
            return
        transform = self.subject.carried.groups[entry.group]
        linear = LinearCheck.of(name, None, None, entry.packed, transform.num_rows)
        check = GroupCheck(transform, [linear], self.subject.config, fact.state, {})
        self.linears[name] = (check, linear)

    def _tap(
        self, run: _Run, name: str, x: Tensor, types: Tensor | None, y: Tensor, compare: bool
    ) -> None:
        call = run.calls[name] = run.calls.get(name, -1) + 1
        check, linear = self.linears[name]
        there = self._there(y)
        found = self.float_outputs.get(name, call)
        if found is not None and found[0].shape == y.shape:
            # The float run's types: those in this graph are to be checked.
            want, types = found[0].to(y.device), found[1]
            error = (y.float() - want.float()).square().sum(-1)
            energy = want.float().square().sum(-1)
            rows = check.rows_of(types, y)
            kept = slice(None) if there is None else there
            sums = run.errors.setdefault(name, Errors.zeros(len(check.row_names)))
            sums.add(*(t[kept].reshape(-1) for t in (error, energy, rows)))
        elif self.subject.original is not None and name not in run.unmatched:
            run.unmatched.append(name)
        if compare and check.transform.problem() is None:
            check.take_run(linear, x, types, y, there)

    def _run_compiled(self) -> tuple[_Run, list[Finding]]:
        """Inductor's graphs beside the eager ones, on the same inputs; the outputs of Inductor's go on."""
        from ..backend import freeact
        from ..runner import Runner

        graphs: list[tuple[str, list[float]]] = []
        bypass = tuple(stage for stage in self.subject.bypass if stage == "engine")
        options = {**self.subject.runs_in, "bypass": bypass}
        eager_options = {**options, "bypass": ("lowering", *bypass)}

        def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
            if not any(True for n in gm.graph.nodes if n.op.startswith("call")):
                return gm.forward
            inputs = list(example_inputs)
            eager = freeact(gm, inputs, options=eager_options)
            nudged = freeact(gm, inputs, options=eager_options)
            compiled = freeact(gm, inputs, options=options)
            label = eager.label if isinstance(eager, Runner) else "a graph"
            num_scales = _nudge(nudged) if isinstance(nudged, Runner) else 0
            seen: list[float] = [0.0, 0.0]
            graphs.append((label, seen))

            def run(*args: Any) -> Any:
                want = _tensors_of(eager(*args))
                noise = _distance(_tensors_of(nudged(*args)), want) if num_scales else 0.0
                got = compiled(*args)
                seen[0] = max(seen[0], _distance(_tensors_of(got), want))
                seen[1] = max(seen[1], noise)
                return got

            return run

        outputs = self._call(self.subject.model, backend)
        eps = max((torch.finfo(t.dtype).eps for t in outputs), default=1e-7)
        least = max(_LOWERING_LEAST if self.subject.config.quantize else 0, _TOLERANCE, 4 * eps)
        findings = [
            Finding(
                "lowering",
                label,
                f"Inductor must give what the eager graph gives within {max(least, _LOWERING_NOISE * noise):.2g}",
                f"a difference of {difference:.2g}",
                "Go around it with options={'bypass': ('lowering',)}, and report the graph (TORCH_COMPILE_DEBUG=1).",
            )
            for label, (difference, noise) in graphs
            if not difference <= max(least, _LOWERING_NOISE * noise)
        ]
        return _Run(outputs=outputs), findings

    # ------------------------------------------------------------------ findings

    def _leave_out(self, stage: str, what: str, way_out: str) -> None:
        self.result.unchecked.append(Unchecked(stage, what, way_out))

    def _compare_with_checkpoint(self) -> list[Finding]:
        """What can be told without running anything: is this the checkpoint's model, with its token types?"""
        subject = self.subject
        findings = []
        if (
            subject.given is not None
            and subject.given.config.token_types != subject.config.token_types
        ):
            findings.append(
                Finding(
                    "parts",
                    "token types",
                    f"must be those of the calibration, {_ids(subject.given.config)}",
                    _ids(subject.config),
                    "Leave token_types out of the options, or calibrate anew.",
                )
            )
        for source in (subject.carried, subject.given if subject.carried is None else None):
            for name, transform in ({} if source is None else source.groups).items():
                if (problem := transform.problem()) is not None:
                    rule = "the operands of its transform must fit each other"
                    way_out = "Convert the original again, from a good checkpoint."
                    findings.append(Finding("parts", name, rule, problem, way_out))
        if subject.carried is None:
            return findings
        if subject.given is None:
            what = "packed weights and tables were not compared with those of the checkpoint"
            self._leave_out("parts", what, "Give verify the checkpoint: checkpoint=.")
            return findings
        return [*findings, *_differences(subject.carried, subject.given)]

    def _wrong_parts(self, check: GroupCheck) -> list[Finding]:
        if check.transform.problem() is not None:
            return []
        # Corrected tables hold what rounding takes from the mean, too.
        exact_bias = not check.config.bias_correction or not check.config.quantize
        found = [
            wrong_weight(
                linear, self.subject.fingerprint_of(linear.name, linear.weight), exact_bias, check
            )
            for linear in check.linears
            if linear.weight is not None
        ]
        return [f for f in found if f is not None]

    def _findings(self, runs: dict[str, _Run]) -> Iterator[Finding]:
        broken = {f.place for f in self.parts}
        checks = [c for c in self.groups.values() if c.transform.problem() is None and c.num_tokens]
        tolerance = self.result.tolerance
        found = [wrong_transform(check, tolerance) for check in checks]
        yield from (f for f in found if f is not None)
        broken |= {f.place for f in found if f is not None}
        if self.subject.config.quantize and self.subject.original is not None:
            yield from self._wrong_rounding(checks, broken)
        if "transformed" in runs and not broken:
            yield from self._wrong_graph(runs["transformed"], checks)
        engine = [linear for _, linear in self.linears.values() if not linear.engine <= 1]
        if engine and "engine" not in self.subject.bypass:
            names = ", ".join(linear.name for linear in engine[:3])
            worst = max(linear.engine for linear in engine)
            yield Finding(
                "engine",
                names if len(engine) <= 3 else f"{names} and {len(engine) - 3} others",
                "integer products must be exact",
                f"products that are off by {worst / 2:.3g}",
                "Go around it with options={'bypass': ('engine',)}, and report the machine (freeact doctor).",
            )
        if engine:
            return
        for check, linear in self.linears.values():
            error = linear.as_run.relative()
            if not error <= _AS_RUN and check.name not in broken:
                yield Finding(
                    "passes",
                    linear.name,
                    "the rewritten graph must compute what the reference does from the same activation and types",
                    f"an error of {error:.2g}",
                    "Go around it with options={'bypass': ('passes',)}, and report the graph.",
                )

    def _wrong_rounding(self, checks: list[GroupCheck], broken: set[str]) -> Iterator[Finding]:
        types = mistyped(checks)
        if types is not None:
            yield types
        found: list[tuple[GroupCheck, Finding]] = []
        for check in checks:
            if check.name in broken:
                continue
            trusted = [linear for linear in check.linears if linear.name not in broken]
            mine = misfits(check, trusted) if trusted else []
            if not mine and len(trusted) == len(check.linears) and types is None:
                errors = errors_of(check)
                mine = [f for f in (better_elsewhere(check),) if f is not None]
                mine = mine or [f for f in (unlike_calibration(check, errors),) if f is not None]
            found += [(check, finding) for finding in mine]
        yield from _by_plan(checks, found)
        yield from (finding for _, finding in found)

    def _wrong_graph(self, run: _Run, checks: list[GroupCheck]) -> Iterator[Finding]:
        """With quantisers off every group is right by itself: is the model that they make, too?"""
        dtype = next(iter(run.outputs), torch.empty(0)).dtype
        eps = torch.finfo(dtype).eps
        limit = max(self.result.tolerance, eps * math.sqrt(max(len(checks), 1)))
        self.result.tolerance_of_output = limit
        for check in checks:
            if not check.is_exact:
                self._leave_out(
                    "transforms",
                    f"from {check.name} on, plan {check.plan} keeps a part of K only: the model with quantisers off is "
                    f"not the original",
                    "The groups by themselves were checked.",
                )
                return
            for linear in check.linears:
                error = run.errors[linear.name].relative() if linear.name in run.errors else 0.0
                if not error <= limit:
                    yield Finding(
                        "passes",
                        linear.name,
                        f"with quantisers off its outputs must be the original's within {limit:.0e}",
                        f"{error:.2g} in the running model, {linear.exact.relative():.2g} by itself",
                        "The graph around it was rewritten wrongly. Go around it with options={'bypass': "
                        "('passes',)}, and report the graph.",
                    )
                    return

    def _fill_groups(self, runs: dict[str, _Run]) -> None:
        for check in self.groups.values():
            if not check.num_tokens:
                continue
            row = errors_of(check)
            for run, attribute in (
                ("transformed", "transform_accumulated"),
                ("quantised", "accumulated"),
            ):
                sums = [
                    runs[run].errors[linear.name]
                    for linear in check.linears
                    if run in runs and linear.name in runs[run].errors
                ]
                if not sums:
                    continue
                joint = Errors.zeros(len(check.row_names))
                for s in sums:
                    joint.error += s.error
                    joint.energy += s.energy
                setattr(row, attribute, joint.relative())
                if attribute == "accumulated":
                    for index in check.seen:
                        row.types[check.row_names[index]].accumulated = joint.relative(index)
            self.result.groups.append(row)
        unmatched = sorted({n for run in runs.values() for n in run.unmatched})
        if unmatched:
            self._leave_out(
                "rounding",
                f"the error in the running model of {', '.join(unmatched[:3])}: it saw other tokens than in the float "
                f"model (experts are chosen anew)",
                "Its error by itself was measured.",
            )
        refused = [c.name for c in self.groups.values() if c.state == "refused"]
        if refused:
            self._leave_out(
                "types",
                f"{len(refused)} groups run untyped ({refused[0]}, ...): their types were lost in the graph",
                "freeact_fx.explain says where.",
            )


def _by_plan(
    checks: list[GroupCheck], found: list[tuple[GroupCheck, Finding]]
) -> Iterator[Finding]:
    """If all groups of one plan are wrong, and of no other, it is the plan."""
    wrong = {id(check) for check, _ in found}
    plans = {check.plan for check, _ in found}
    if len(plans) != 1 or len(wrong) < 2 or len({c.plan for c in checks}) < 2:
        return
    (plan,) = plans
    members = [check for check in checks if check.plan == plan]
    if all(id(check) in wrong for check in members):
        yield Finding(
            found[0][1].stage,
            f"plan {plan}",
            "groups of every plan must be as right as their rounding allows",
            f"all {len(members)} groups of this plan wrong, and none of another",
            "Calibrate with another plan meanwhile, and report this.",
        )


def _differences(carried: Checkpoint, given: Checkpoint) -> Iterator[Finding]:
    """Operands of a converted model that are not the checkpoint's."""
    way_out = "They were changed since: convert the original again, or load its state dict."
    seen: set[str] = set()
    for name, entry in carried.linears.items():
        stored = given.linears.get(name)
        if stored is None:
            value = "a Linear that is not in the checkpoint"
            rule = "it must be one of the checkpoint's"
            yield Finding(
                "parts", name, rule, value, "Give the checkpoint that it was converted with."
            )
            continue
        pairs = [("", entry.packed, stored.packed)]
        if stored.group not in seen:
            seen.add(stored.group)
            pairs.append(("transform.", carried.groups[entry.group], given.groups[stored.group]))  # type: ignore[arg-type]
        for prefix, own, expected in pairs:
            theirs = expected.tensors()
            for operand, tensor in own.tensors().items():
                label = prefix + ("weight_packed" if operand == "weight" else operand)
                other = theirs.get(operand)
                if other is None or other.shape != tensor.shape:
                    value = "a tensor of another shape"
                else:
                    where = (tensor.cpu() != other.cpu()).nonzero()
                    if not len(where):
                        continue
                    value = f"{len(where)} other values, the first at {where[0].tolist()}"
                place, rule = f"{name}.{label}", "must hold what the checkpoint holds"
                yield Finding("parts", name, f"{place} {rule}", value, way_out)
        own_transform, expected_transform = carried.groups[entry.group], given.groups[stored.group]
        for attribute in ("widths", "slice_of_type", "own_rank"):
            mine, right = getattr(own_transform, attribute), getattr(expected_transform, attribute)
            if mine != right and name == stored.group:
                rule = f"{attribute} of its transform must be {right}, as in the checkpoint"
                yield Finding("parts", name, rule, str(mine), way_out)


def _ids(config: QuantConfig) -> str:
    return ", ".join(
        f"{t.name} = {list(t.token_ids) if t.token_ids else 'merged' if t.merge else 'the rest'}"
        for t in config.token_types.types
    )


def _tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors in what a model gives, in order."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Relative L2 distance of two lists of tensors, all together; infinite if they do not match."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf
    error = energy = 0.0
    for a, b in zip(got, want, strict=True):
        # Logits may hold -inf, where a token is ruled out.
        difference = torch.where(a == b, 0.0, a.double() - b.double())
        error += float(difference.square().sum())
        energy += float(b.double().masked_fill(~b.isfinite(), 0).square().sum())
    if not math.isfinite(error):
        return math.inf
    return math.sqrt(error / energy) if energy else math.sqrt(error)


def _last(a: Node, b: Node) -> Node:
    """The later of two nodes of a graph."""
    return a if b < a else b


def _types_of(result: Node, x: Node) -> Node | None:
    """The types that a quantised Linear's graph has for its activation; None: all tokens have one."""
    pending = [result]
    while pending:
        node = pending.pop()
        if str(node.target).startswith("freeact.transform_quantize") and node.args[0] is x:
            types = node.args[1]
            return types if isinstance(types, Node) else None
        if node is not x:
            pending += node.all_input_nodes
    raise AssertionError("a quantised Linear without a transform")


def _nudge(runner: Any) -> int:
    """Change every scale of an eager graph in its last digits; returns how many there are.

    Codes at the edge fall to the other side, here and in all layers after it: what that does to the outputs is what any
    other order of the same operations may do.
    """
    module = runner.compiled.__self__
    transforms = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("freeact.transform_quantize")
    ]
    for node in transforms:
        with module.graph.inserting_before(node):
            clip = module.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[6], 1 - 1e-5))
        node.args = (*node.args[:6], clip, *node.args[7:])
    module.recompile()
    runner.compiled = module.forward
    return len(transforms)
