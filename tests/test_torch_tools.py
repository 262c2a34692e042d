"""What torch's own tools show of the passes: logs, structured trace, debug folder, pass observers, profiler."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder
from tiny_model import LINEARS, MASK, TinyModel, masked_ids, tiny_model
from torch import Tensor, nn
from torch.fx import GraphModule

import freeact_fx
from freeact_fx import TokenTypes, profiler_names

MASKED = TokenTypes.mask_token(MASK)


def python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as a script (torch quotes its lines) in a fresh Python, where torch reads the environment anew."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"compiler": "eager", "token_types": MASKED, **options}
    return torch.no_grad()(torch.compile(model, backend="freeact", options=given))


# ------------------------------------------------------------------ one compilation that everyone looks at


@dataclass
class Looked:
    """What a process left behind in which every tool of torch was switched on."""

    output: str
    log: list[str]
    folder: Path

    @property
    def artifacts(self) -> dict[str, str]:
        """Payloads of the structured trace by name."""
        (trace,) = (self.folder / "trace").glob("*.log")
        found, name = {}, None
        for line in trace.read_text().splitlines():
            if line.startswith("\t"):
                if name is not None:
                    found[name] += line[1:] + "\n"
                continue
            metadata = json.loads(line[line.index("{") :])
            name = metadata.get("artifact", {}).get("name")
            if name is not None:
                found[name] = ""
        return found

    def debug_file(self, pattern: str) -> str:
        (file,) = self.folder.glob(f"debug/torch_compile_debug/run_*/{pattern}")
        return file.read_text()


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Looked:
    folder = tmp_path_factory.mktemp("looked")
    result = python(
        folder,
        """
        import sys
        import torch
        from torch import nn

        assert "freeact_fx" in sys.modules  # torch looked whether the log's name is a module
        for name in ("torch._dynamo", "torch._inductor", "triton", "rich", "typer"):
            assert name not in sys.modules, name
        torch.set_num_threads(1)


        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(64, 32)
                self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
                self.lm_head = nn.Linear(32, 64)

            def forward(self, input_ids):
                x = self.embed(input_ids)
                x = x + self.down(torch.relu(self.up(x)))
                return self.lm_head(x)


        torch.manual_seed(0)
        types = sys.modules["freeact_fx"].TokenTypes.mask_token(63)
        fast = torch.compile(Model().eval(), backend="freeact", options={"token_types": types})
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            fast(ids)
            with torch.profiler.profile(acc_events=True) as profile:
                fast(ids)
        for event in profile.events():
            if event.name.startswith("freeact: "):
                print(event.name, "in", event.cpu_parent.name)
        """,
        TORCH_LOGS="+freeact_fx",
        TORCH_TRACE=str(folder / "trace"),
        TORCH_COMPILE_DEBUG="1",
        TORCH_COMPILE_DEBUG_DIR=str(folder / "debug"),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"),
    )
    log = [line for line in result.stderr.splitlines() if "freeact_fx/logs.py" in line]
    return Looked(result.stdout, log, folder)


@pytest.mark.inductor
def test_logs_of_a_fresh_process(looked: Looked) -> None:
    """One line per graph on INFO ("I"), the rest on DEBUG ("V"), nothing above."""
    assert {line[0] for line in looked.log} == {"I", "V"}
    (line,) = [line for line in looked.log if line[0] == "I"]
    assert re.search(
        r"\[0/0\] the graph with up: 3 Linears, 2 quantised in 2 groups \(2 typed, 0 default, 0 refused\), "
        r"1 left alone \(1 x listed in QuantConfig.skip \['lm_head'\]\); \d+ -> \d+ nodes; "
        r"detect [\d.]+ ms, annotate [\d.]+ ms, insert [\d.]+ ms$",
        line,
    )
    details = "\n".join(looked.log)
    assert "] up [64, 32]: W4A4, plan " in details
    assert "] lm_head [64, 32]: float32, left alone: listed in QuantConfig.skip" in details
    assert "torch._C._nn.linear(" in details
    assert "torch.ops.freeact.int_mm.default(" in details


@pytest.mark.inductor
def test_structured_trace(looked: Looked) -> None:
    artifacts = looked.artifacts
    assert "# freeact: up" not in artifacts["freeact_before"]
    assert "# freeact: up [64, 32]\n" in artifacts["freeact_detect"]
    assert re.search(
        r"# freeact: up \[64, 32\], typed: input_ids == 63", artifacts["freeact_annotate"]
    )
    assert "# freeact: lm_head [64, 32] is left alone: listed" in artifacts["freeact_insert"]
    assert "up_int_mm" in artifacts["freeact_insert"]
    report = freeact_fx.Report.from_dict(json.loads(artifacts["freeact_report"]))
    assert [row.name for row in report.quantized] == ["up", "down"]


@pytest.mark.inductor
def test_tlparse_shows_our_files(looked: Looked, tmp_path: Path) -> None:
    (trace,) = (looked.folder / "trace").glob("*.log")
    # Beside the interpreter, whose folder is not on the path of whoever did not activate its environment.
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which("tlparse", path=folders)
    assert tool is not None, "tlparse is not installed: pip install -e '.[test]'"
    command = [tool, str(trace), "-o", str(tmp_path / "out"), "--no-browser"]
    subprocess.run(command, check=True, capture_output=True)
    shown = (tmp_path / "out" / "index.html").read_text()
    for name in ("before", "detect", "annotate", "insert", "report"):
        assert f"freeact_{name}" in shown


@pytest.mark.inductor
def test_files_beside_those_of_inductor(looked: Looked) -> None:
    for name in ("before", "detect", "annotate", "insert"):
        file = looked.debug_file(f"freeact/graph_0_0.0/{name}.py")
        assert file.strip() == looked.artifacts[f"freeact_{name}"].strip()
    assert json.loads(looked.debug_file("freeact/graph_0_0.0/report.json"))["version"] == 2
    # Inductor's own files name the user's line above what became of it, and the Linear in the names.
    aten = looked.debug_file("torchinductor/*/fx_graph_readable.py")
    line = "code: x = x + self.down(torch.relu(self.up(x)))\n"
    assert "freeact.int_mm" in aten.partition(line)[2]
    code = looked.debug_file("torchinductor/*/output_code.py")
    calls = re.findall(r"Source Nodes: \[(.*)\],.*\n(?:.*\n)?.* = torch.ops.freeact.int_mm", code)
    assert [re.findall(r"\w+_int_mm", nodes) for nodes in calls] == [["up_int_mm"], ["down_int_mm"]]


@pytest.mark.inductor
def test_which_kernel_belongs_to_which_linear(looked: Looked) -> None:
    """docs/debugging.md: by torch's provenance, in the order of the calls; and by our ranges in the profile."""
    nodes = json.loads(
        looked.debug_file("torchinductor/*/inductor_provenance_tracking_node_mappings.json")
    )
    products = {
        node
        for kernel, posts in nodes["cppCodeToPost"].items()
        if kernel.startswith("torch.ops.freeact.int_mm")
        for post in posts
        for node in nodes["postToPre"][post]
    }
    assert {"up_int_mm", "down_int_mm"} <= products
    assert looked.output.splitlines() == [
        "freeact: up in freeact::int_mm",
        "freeact: down in freeact::int_mm",
    ]


def test_logs_of_one_pass_and_imported_by_torch_half_way(tmp_path: Path) -> None:
    """Our import imports torch, which imports us again before it is done."""
    result = python(
        tmp_path,
        """
        import freeact_fx
        import logging

        assert callable(freeact_fx.calibrate)
        for name, level in {
            "freeact_fx.passes.annotate": logging.DEBUG,
            "freeact_fx.passes.detect": logging.WARNING,
            "freeact_fx.backend": logging.WARNING,
        }.items():
            assert logging.getLogger(name).getEffectiveLevel() == level, name
        logging.getLogger("freeact_fx.passes.annotate").debug("once")
        """,
        TORCH_LOGS="+freeact_fx.passes.annotate",
    )
    assert result.stderr.count("once") == 1


# ------------------------------------------------------------------ logs


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Take our records, not torch's."""
    records = [record for record in caplog.records if record.name.startswith("freeact_fx")]
    caplog.clear()
    return records


def test_levels(caplog: pytest.LogCaptureFixture) -> None:
    """Silent unless asked; then as much as was asked for."""
    compiled(tiny_model())(masked_ids())
    assert not ours(caplog)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "freeact_fx"):
        compiled(tiny_model())(masked_ids())
    assert [record.name for record in ours(caplog)] == ["freeact_fx.backend"]
    torch._dynamo.reset()
    with caplog.at_level(logging.DEBUG, "freeact_fx.passes.annotate"):
        compiled(tiny_model())(masked_ids())
    (record,) = ours(caplog)
    title, *lines = record.getMessage().splitlines()
    assert title == "after annotate:"
    assert len(lines) == len(LINEARS) + 1  # lm_head
    assert lines[13].startswith("linear_13: blocks.1.down [48, 96], typed: input_ids == 63")


class OddWidths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(33, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Conflict(nn.Module):
    """Adds tokens of one sequence to those of another: no type is right for the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.proj(self.embed(a) + self.embed(b))


def test_warnings_are_for_what_a_user_can_change(caplog: pytest.LogCaptureFixture) -> None:
    freeact_fx.explain(OddWidths(), torch.randn(2, 33))  # says so in its report
    assert not ours(caplog)
    for _ in range(2):  # once each
        torch._dynamo.reset()
        compiled(OddWidths().eval())(torch.randn(2, 33))
        compiled(Conflict().eval())(masked_ids(), masked_ids(seed=1))
    records = ours(caplog)
    odd, conflict = (record.getMessage() for record in records)
    assert odd.startswith(
        "the graph with proj: none of its 1 Linears can be quantised. proj: in_features must be even"
    )
    assert conflict.startswith(
        "the graph with proj: 1 of its 1 Linears run without the types of their tokens. proj: "
    )
    assert all(record.levelname == "WARNING" for record in records)


# ------------------------------------------------------------------ files, observers, times


def test_files_on_request_of_an_option(tmp_path: Path) -> None:
    """As ``TORCH_COMPILE_DEBUG=1``, for one model; each compilation has a folder of its own."""
    options = {"inductor": {"trace.enabled": True, "trace.debug_dir": str(tmp_path)}}
    for _ in range(2):
        torch._dynamo.reset()
        compiled(OddWidths().eval(), skip=(), **options)(torch.randn(2, 33))
    assert sorted(path.name for path in (tmp_path / "freeact").iterdir()) == [
        "graph_0_0.0",
        "graph_0_0.1",
    ]


def test_torch_observes_and_times_the_passes() -> None:
    torch._dynamo.utils.compilation_time_metrics.clear()
    recorder = Recorder(tiny_model(), token_types=MASKED)
    with torch._inductor.config.patch({"trace.provenance_tracking_level": 1}):
        torch.no_grad()(recorder.compile())(masked_ids())
    made = {
        (node.name, source.pass_name)
        for node in recorder.graphs[0].module.graph.nodes
        for source in node.meta.get("from_node", ())
    }
    assert ("blocks_0_q_int_mm", "freeact_insert") in made
    for name in ("detect", "annotate", "insert"):
        assert len(torch._dynamo.utils.compilation_time_metrics[f"pass.freeact.{name}"]) == 1


# ------------------------------------------------------------------ the user's line, the Linear's name


class Originals:
    """A backend around the recorder that keeps Dynamo's graphs too."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.graphs = recorder, list[GraphModule]()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.graphs.append(gm)
        return self.recorder(gm, example_inputs)


@pytest.mark.parametrize("converted", [False, True])
def test_added_nodes_have_the_place_and_the_name_of_their_linear(converted: bool) -> None:
    model = tiny_model()
    if converted:
        freeact_fx.convert(model, freeact_fx.QuantConfig(token_types=MASKED))
    originals = Originals(recorder := Recorder(model, token_types=MASKED))
    torch.no_grad()(torch.compile(model, backend=originals, fullgraph=True))(masked_ids())
    before = {node.name for node in originals.graphs[0].graph.nodes}
    module = recorder.graphs[0].module
    linears = [n for n in originals.graphs[0].graph.nodes if _is_linear(n)]
    meta = {name: node.meta for name, node in zip([*LINEARS, "lm_head"], linears, strict=True)}
    added = [n for n in module.graph.nodes if n.op == "call_function" and n.name not in before]
    assert len(added) > 5 * len(LINEARS)
    owners = set()
    for node in added:
        names = (name for name in LINEARS if node.name.startswith(f"{name.replace('.', '_')}_"))
        owner = next(names, None)
        owners.add(owner)
        if owner is None:
            assert node.name.startswith("token_types_")
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            # The first Linear has the types made.
            assert node.meta[key] == meta[owner or LINEARS[0]][key], (node, key)
    assert owners == {*LINEARS, None}


def _is_linear(node: Any) -> bool:
    return node.target in (torch._C._nn.linear, torch.ops.freeact.linear.default)


def test_errors_name_the_users_line() -> None:
    """As AOTAutograd and Inductor run a graph: node by node."""
    recorder = Recorder(tiny_model(), token_types=MASKED)
    torch.no_grad()(recorder.compile())(masked_ids())
    module = recorder.graphs[0].module
    (node,) = [n for n in module.graph.nodes if n.name == "blocks_1_o_int_mm"]

    def fail(*args: Any) -> Tensor:
        raise RuntimeError("as if the kernel failed")

    node.target = fail
    interpreter = torch.fx.Interpreter(module)
    values = [
        torch.as_tensor(n.meta["example_value"])
        for n in module.graph.nodes
        if n.op == "placeholder"
    ]
    with (
        values[0].fake_mode,
        pytest.raises(
            RuntimeError, match=r"(?s)%blocks_1_o_int_mm .*tiny_model.py.*self.o\(mixed\)"
        ),
    ):
        interpreter.run(*values)


def test_names_are_the_same_in_every_compilation() -> None:
    """Or torch's caches would never hit."""
    names = []
    for _ in range(2):
        torch._dynamo.reset()
        recorder = Recorder(tiny_model(), token_types=MASKED)
        torch.no_grad()(recorder.compile())(masked_ids())
        names.append([node.name for node in recorder.graphs[0].module.graph.nodes])
    assert names[0] == names[1]


# ------------------------------------------------------------------ profiler


class Layered(TinyModel):
    """Each block is compiled by itself: one graph for both."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return self.lm_head(self.norm(x))


@pytest.mark.parametrize("converted", [False, True])
def test_profiler_shows_each_linear_by_name(converted: bool) -> None:
    torch.manual_seed(0)
    model = Layered().eval()
    if converted:
        freeact_fx.convert(model, freeact_fx.QuantConfig(token_types=TokenTypes.single()))
    run = compiled(model, token_types=TokenTypes.single())
    run(masked_ids())
    with torch.profiler.profile(acc_events=True) as profile:
        run(masked_ids())
    ranges = [e for e in profile.events() if e.name.startswith("freeact: ")]
    assert [e.name for e in ranges] == [f"freeact: {name}" for name in LINEARS]
    assert {e.cpu_parent.name for e in ranges} == {"freeact::int_mm"}
    graphs = [e.name for e in profile.events() if e.name.startswith("freeact graph")]
    assert graphs == ["freeact graph of blocks.0.q", "freeact graph of blocks.1.q"]


def test_no_ranges_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiled(tiny_model())
    run(masked_ids())

    def fail(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(profiler_names, "record_function", fail)
    run(masked_ids())
