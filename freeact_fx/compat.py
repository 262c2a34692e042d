"""The one place that imports torch's private compiler modules, but for ``codegen.templates``, which is written in
Inductor's own terms; torch 2.11 to 2.15 agree on what is used here.

Imported at the first backend call, never by ``import freeact_fx``.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import dynamo_timed, get_debug_dir
from torch._inductor import config as inductor_config
from torch._inductor import decomposition as inductor_decomposition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from .codegen.engine_graph import use_engine_ops
from .passes.node_facts import source_name, value_of
from .report import GraphReport
from .report_log import paths_of

__all__ = ["compile_with_inductor", "mode_options", "register_decomposition", "traced_module"]


def _source_digest() -> str:
    """Hash of every source file of the package: Inductor's cache key does not see our lowerings."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, *_mapped_folders()):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _mapped_folders() -> list[Path]:
    """Where ``freeact_fx.passes`` and ``freeact_fx.codegen`` are: elsewhere in an editable install."""
    import freeact_fx.codegen
    import freeact_fx.passes

    folders = [p for m in (freeact_fx.codegen, freeact_fx.passes) for p in m.__path__]
    return [Path(p) for p in sorted(folders)]


class CacheKey(CustomGraphPass):
    """Puts the GPU engine's ops in; its ``uuid`` puts our sources and options into Inductor's cache key."""

    def __init__(self, options_digest: str) -> None:
        self._uuid = f"freeact:{_source_digest()}:{options_digest}"

    def __call__(self, graph: torch.fx.Graph) -> None:
        use_engine_ops(graph, tune=inductor_config.max_autotune)

    def uuid(self) -> str:
        return self._uuid


class _Both(CustomGraphPass):
    """A user's own pass, then ours: torch 2.11 takes one object only."""

    def __init__(self, theirs: CustomGraphPass, ours: CacheKey) -> None:
        self._theirs, self._ours = theirs, ours

    def __call__(self, graph: torch.fx.Graph) -> None:
        self._theirs(graph)
        self._ours(graph)

    def uuid(self) -> Any:
        theirs = self._theirs.uuid()
        return None if theirs is None else (theirs, self._ours.uuid())


def register_decomposition(op: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Have Inductor replace an op by what ``function`` traces to.

    Inductor copies its table at the first compilation of the process and keeps the copy: it must go, or a process that
    compiled anything before would run our op as an opaque call.
    """
    inductor_decomposition.register_decomposition([op])(function)
    inductor_decomposition.fast_random_decomps.cache_clear()


def _our_options() -> dict[str, Any]:
    """Inductor's options where the user has not said otherwise."""
    # A product writes its Linear's output: its epilogue is not to be fused with what reads that first, leaving the
    # product to write fp32.
    options = {"epilogue_fusion_first": True}
    # Checks of sizes and strides, at each call, of inputs that Dynamo's guards have just seen: a model of 1,400 tensors
    # waits longer for them than for all other Python of a call.
    if "TORCHINDUCTOR_SIZE_ASSERTS" not in os.environ:
        options["size_asserts"] = False
    return options


def compile_with_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any], options_digest: str
) -> Callable[..., Any]:
    """Hand a rewritten Dynamo graph to Inductor, as inference, with our sources in the cache key."""
    key = CacheKey(options_digest)
    slot = "post_grad_custom_pre_pass"
    theirs = options.get(slot, getattr(inductor_config, slot))
    if theirs is None:
        pass_value: Any = key
    elif isinstance(theirs, (list, tuple)):
        pass_value = [*theirs, key]
    else:
        pass_value = _Both(theirs, key)
    with torch.no_grad():
        compiled: Any = compile_fx(
            gm, list(example_inputs), config_patches={**_our_options(), **options, slot: pass_value}
        )
        return compiled


def plain_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor without us (``enabled=False``)."""
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=options)
    return compiled


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a ``torch.compile`` mode."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode else {}


def known_modes() -> tuple[str, ...]:
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses on the CPU. Raises what torch's search raises if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    found: str = get_cpp_compiler()
    return found


def inductor_cache() -> tuple[Path, bool]:
    """Folder of Inductor's caches, and whether compiled graphs are looked up there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()), bool(inductor_config.fx_graph_cache)


def unknown_inductor_option(options: dict[str, Any]) -> str | None:
    """The first key that is not an Inductor option, or None."""
    known = inductor_config.get_config_copy()
    return next((key for key in options if key.replace("-", "_") not in known), None)


def known_inductor_options() -> list[str]:
    return list(inductor_config.get_config_copy())


def traced_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is tracing, if it can be told."""
    return _traced_module()[0]


def _traced_module() -> tuple[torch.nn.Module | None, int]:
    """That module, and its number of places among the ``*args`` of a wrapper around its forward: 0 or 1."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        output = InstructionTranslator.current_tx().output
        scope, code = output.local_scope, output.root_tx.f_code
    except (ImportError, AttributeError):
        return None, 0
    if isinstance(module := scope.get("self"), torch.nn.Module):
        return module, 0
    match scope.get("args"):
        case (torch.nn.Module() as module, *_) if _wraps_forward(code, module):
            return module, 1
    return None, 0


def _wraps_forward(code: Any, module: torch.nn.Module) -> bool:
    function: Any = type(module).forward
    while function is not None and getattr(function, "__code__", None) is not code:
        function = getattr(function, "__wrapped__", None)
    return function is not None


def calling_modules() -> list[torch.nn.Module]:
    """The modules whose methods are running, the outermost first; the last is the one that is traced."""
    callers = []
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            callers.append(frame.f_locals.get("self"))
        frame = frame.f_back
    return [
        module
        for module in [*reversed(callers), traced_module()]
        if isinstance(module, torch.nn.Module) and not isinstance(module, OptimizedModule)
    ]


def outermost_module() -> torch.nn.Module | None:
    """The module that is being called, if there is one."""
    return next(iter(calling_modules()), None)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The mode of a graph's fake values; a new one if it has none."""
    values = (value_of(node) for node in gm.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), FakeTensorMode())


def origin_of(gm: GraphModule) -> GraphReport:
    """Why a graph that Dynamo gives ends where it does, and why it is compiled, if not for the first time."""
    from torch._dynamo.utils import get_metrics_context

    report = GraphReport(0)
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        # Below its first line are an explanation and advice on how to report it.
        report.break_reason = reason.reason.strip().partition("\n")[0]
        if reason.user_stack:
            frame = reason.user_stack[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
            report.break_reason += f" ({place}: {frame.line})" if frame.line else f" ({place})"
    metrics = getattr(get_metrics_context(), "_metrics", {})
    reason = metrics.get("recompile_reason")
    report.compiled_again_because = None if reason is None else guard_in_short(reason)
    return report


def guard_in_short(reason: str) -> str:
    """Dynamo's reason for a recompilation in a line: the guard that failed, and the user's line that it is for.

    >>> guard_in_short("3/0: n == 3    # y = f(n)  # models/net.py:9 in forward\\nUser stack trace: ...")
    '3/0: n == 3 (net.py:9 in forward: y = f(n))'
    """
    guard, *comments = re.split(r"\s+# ", reason.strip().partition("\n")[0])
    if len(comments) < 2:
        return guard
    return f"{guard} ({comments[-1].rpartition('/')[2]}: {' '.join(comments[:-1])})"


def module_paths(tensors: Iterable[Any]) -> dict[int, str]:
    """The module path of each parameter or buffer by its id, in the outermost module that is being called.

    After a graph break Dynamo names things from the frame it goes on in: ``qkv``, not ``visual.blocks.0.attn.qkv``.
    """
    wanted = {id(t) for t in tensors if isinstance(t, torch.Tensor)}
    for module in calling_modules():
        paths = {key: names[0] for key, names in paths_of(module).items() if key in wanted}
        if paths:
            return paths
    return {}


def name_arguments(gm: GraphModule) -> None:
    """Give positional arguments behind a ``*args`` wrapper the names that the module's ``forward`` has for them.

    Hugging Face wraps ``forward``: of ``model(ids, mask)`` Dynamo sees ``args[0]`` and ``args[1]``; or, where the
    wrapper takes the module by ``*args`` too, ``args[1]`` and ``args[2]``.
    """
    module, offset = _traced_module()
    if module is None:
        return
    names = list(inspect.signature(module.forward).parameters)
    for node in gm.graph.nodes:
        found = re.fullmatch(r"L\['args'\]\[(\d+)\]", source_name(node))
        if node.op == "placeholder" and found and 0 <= int(found[1]) - offset < len(names):
            node.meta["freeact_argument"] = names[int(found[1]) - offset]


@contextlib.contextmanager
def observed_pass(gm: GraphModule, name: str) -> Iterator[None]:
    """Around a pass of ours: torch notes which nodes it makes and erases if it is asked to, and the time it takes."""
    with GraphTransformObserver(gm, f"freeact_{name}"), dynamo_timed(f"pass.freeact.{name}"):
        yield


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Put a file into torch's structured trace (``TORCH_TRACE``); ``payload`` is not called if no one takes it."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload
    )


def debug_folder(inductor_options: Mapping[str, Any]) -> Path | None:
    """A new folder for the files of the graph that is being compiled, beside Inductor's; None: no one wants files."""
    options = inductor_config.trace
    if not inductor_options.get("trace.enabled", options.enabled):
        return None
    root = inductor_options.get("trace.debug_dir", options.debug_dir) or get_debug_dir()
    compile_id = torch._guards.CompileContext.current_compile_id()
    name = "graph" if compile_id is None else f"graph_{compile_id}".replace("/", "_")
    for number in itertools.count():
        folder = Path(root, "freeact", f"{name}.{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # compiled once more, or by another process
            continue
        return folder
    raise AssertionError("counting ends with a folder")


def guard_identity(gm: GraphModule) -> None:
    """Compile a graph anew for every set of parameters.

    Dynamo reuses a graph for all modules of one class (the layers behind a graph break). A report or a calibration
    is about each of them.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    from .passes.roots import is_own

    for node in gm.graph.nodes:
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and is_own(node):
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))


_DYNAMO_ATTRIBUTES = (
    "_param_name_to_source",
    "_backend_id",
    "_has_user_defined_allowed_in_graph",
    "compile_subgraph_reason",
)


def copy_of_graph(gm: GraphModule) -> GraphModule:
    """A copy that the passes may edit: Dynamo goes on reading its own graph, and may call a backend twice for it."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    graph.output(result).meta.update(output.meta)
    for node, copy in copies.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    copied = GraphModule(gm, graph, type(gm).__name__)
    copied.meta.update(gm.meta)
    for name in _DYNAMO_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    return copied


_TRACED = "freeact_trace"


def ends_the_call(gm: GraphModule) -> bool:
    """Whether a call of what ``traced_apart`` gives is over with this graph. For a backend, of Dynamo's graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or reason.graph_break:
        return False
    # Of an inner function only that function is over.
    return _TRACED in InstructionTranslator.current_tx().output.root_tx.f_code.co_name


@contextlib.contextmanager
def traced_apart(
    model: torch.nn.Module, backend: str | Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """A model compiled for one purpose of ours, beside whatever its user compiles.

    Dynamo counts compilations per code object and gives up silently at its limit; so the model is called from a
    function whose code is new, and the limit is out of the way meanwhile.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=_TRACED)
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield torch.compile(run, backend=backend)


def propagate_shapes(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Give every node of a graph its fake value, where it has none."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    if all("val" in n.meta or "example_value" in n.meta for n in _value_nodes(gm)):
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate(*example_inputs)


def _value_nodes(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op != "output"]
