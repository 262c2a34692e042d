"""The Triton that Inductor emits for a decoder layer, read without a GPU: one kernel per Linear, its epilogue inside.

Inductor is told to write Triton for CPU tensors and that there is a Hopper; the kernels are caught before they would be
compiled, so nothing runs.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import triton
from offline import E4M3_INSTRUCTIONS, INT8_INSTRUCTIONS, Compiled, compile_kernel
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.codegen import engine_graph, engine_ops, lowering

WIDTH, HIDDEN, MASK = 1024, 2048, 60


class Layer(nn.Module):
    """What a decoder layer has around attention; attention itself is a sum, to keep its kernels out."""

    def __init__(self) -> None:
        super().__init__()
        linear = lambda n, k: nn.Linear(k, n, bias=False)  # noqa: E731
        self.embed = nn.Embedding(64, WIDTH)
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = (
            linear(n, k) for n, k in ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.norm_1(x)
        x = x + self.o(self.q(y) + self.k(y) + self.v(y))
        y = self.norm_2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Emitted(Exception):
    """Everything is emitted, and the first kernel is called."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Emitted


class NoGpu:
    """Triton's driver, as far as emitting code asks for it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@dataclass
class Emissions:
    """What Inductor wrote: the sources of distinct kernels, and the code that calls them."""

    kernels: list[str] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)

    def calls(self, kind: str) -> int:
        return sum(len(re.findall(rf"\b(triton_{kind}_\w+)\.run\(", code)) for code in self.callers)

    @property
    def products(self) -> list[str]:
        return [source for source in self.kernels if "def triton_tem_" in source]


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emissions]:
    """What Inductor emits meanwhile."""
    pytest.importorskip("freeact_fx.codegen.templates.int_mm")
    emissions = Emissions()

    def catch(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
        emissions.kernels.append(source)
        return SimpleNamespace(run=stop)

    monkeypatch.setattr(AsyncCompile, "triton", catch)
    monkeypatch.setattr(GraphLowering, "save_output_code", emissions.callers.append)
    for module in (engine_graph, lowering):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(engine_ops, "has_fp8", lambda device: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    options = {"cpu_backend": "triton", "compile_threads": 1, "fx_graph_cache": False}
    with inductor_config.patch(options):
        yield emissions


def compile_layer(num_tokens: int, bits: Any = 4, plan: str = "shift") -> None:
    config = QuantConfig(plan=plan, token_types=TokenTypes.mask_token(MASK), activation_bits=bits)
    with torch.no_grad():
        model = Layer().eval().bfloat16()
        freeact_fx.convert(model, config)
        ids = torch.randint(0, 64, (2, num_tokens))
        torch._dynamo.mark_dynamic(ids, 1)
        with pytest.raises(Emitted):
            torch.compile(model, backend="freeact", options={"strict": True})(ids)


@pytest.mark.inductor
def test_one_kernel_per_linear_with_its_epilogue(emitted: Emissions) -> None:
    compile_layer(512)
    assert emitted.calls("tem") == 7
    # The types of the tokens, and the embedding.
    others = sum(emitted.calls(kind) for kind in ("poi", "red", "per"))
    assert others <= 2
    transforms = Counter(
        re.findall(r"torch\.ops\.freeact\.engine_(\w+)\.default\(", emitted.callers[0])
    )
    assert transforms == {
        "norm_transform_quantize": 2,
        "transform_quantize": 1,
        "gated_transform_quantize": 1,
    }
    for source in emitted.products:
        assert "* 0.0625" in source
        (stored,) = re.findall(r"tl\.store\((\w+)", source)
        signature = source.split("'signature': {")[1]
        assert re.search(rf"'{stored}': '\*bf16'", signature), (
            "what is stored is the Linear's output"
        )


@pytest.mark.inductor
def test_linears_of_one_input_in_one_call_on_hopper(
    emitted: Emissions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine_ops, lowering):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    compile_layer(512)
    (caller,) = emitted.callers
    calls = Counter(re.findall(r"torch\.ops\.freeact\.(engine_linears?)\.default\(", caller))
    assert calls == {"engine_linear": 2, "engine_linears": 2}
    assert emitted.calls("tem") == 0
    # The types of the tokens, the embedding, and the sums in place of attention and at the end.
    others = sum(emitted.calls(kind) for kind in ("poi", "red", "per"))
    assert others <= 4


@pytest.mark.inductor
def test_a_transform_runs_right_before_its_product(
    emitted: Emissions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Linears that know nothing of each other, too: Inductor would have all transforms first."""
    for module in (engine_ops, lowering):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
            self.linears = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(3))

        def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
            each = zip(self.norms, self.linears, inputs, strict=True)
            return [linear(norm(x)) for norm, linear, x in each]

    config = QuantConfig(plan="shift", token_types=TokenTypes.single())
    with torch.no_grad():
        model = Several().eval().bfloat16()
        freeact_fx.convert(model, config)
        inputs = [torch.randn(1, 4, WIDTH).bfloat16() for _ in range(3)]
        with pytest.raises(Emitted):
            torch.compile(model, backend="freeact")(*inputs)
    (caller,) = emitted.callers
    calls = re.findall(r"torch\.ops\.freeact\.engine_(\w+)\.default\(", caller)
    assert calls == 3 * ["norm_transform_quantize", "linear"]


@pytest.mark.inductor
def test_few_tokens_share_k_and_the_sum_is_in_the_epilogue(emitted: Emissions) -> None:
    compile_layer(4)
    assert emitted.calls("tem") == 7
    for source in emitted.products:
        assert not re.search(r"SPLIT_K : tl\.constexpr = 1\b", source)
        assert "* 0.0625" not in source
    # Each product's sum with the epilogue, the embedding and the types.
    assert sum(emitted.calls(kind) for kind in ("poi", "red", "per")) <= 7 + 2


@pytest.mark.inductor
def test_few_tokens_in_e4m3(emitted: Emissions) -> None:
    compile_layer(4, "e4m3")
    assert emitted.calls("tem") == 7
    for source in emitted.products:
        assert "'*fp8e4nv'" in source
        assert "'*i8'" not in source
        (stored,) = re.findall(r"tl\.store\((\w+)", source)
        assert f"'{stored}': '*fp32'" in source, "partial sums"


def compile_emitted(source: str, folder: Path) -> Compiled:
    (name,) = re.findall(r"def (triton_\w+)\(", source)
    # Without what Inductor writes around the function to launch it.
    code = (
        source[: source.index("@triton_heuristics")]
        + "@triton.jit"
        + source.split("@triton.jit", 1)[1]
    )
    file = folder / "emitted_kernel.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("emitted_kernel", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    signature = dict(
        re.findall(r"'(\w+)': '([*\w]+)'", source.split("'signature': {")[1].split("}")[0])
    )
    return compile_kernel(
        kernel,
        90,
        pointers={n: kind for n, kind in signature.items() if kind.startswith("*")},
        numbers={n: kind for n, kind in signature.items() if not kind.startswith("*")},
        constants={},
        num_warps=int(re.findall(r"num_warps=(\d+)", source)[0]),
    )


@pytest.mark.inductor
@pytest.mark.parametrize("bits", [4, "e4m3"])
def test_an_emitted_kernel_compiles_for_hopper(
    emitted: Emissions, tmp_path: Path, bits: Any
) -> None:
    compile_layer(512, bits)
    compiled = compile_emitted(emitted.products[0], tmp_path)
    instructions = E4M3_INSTRUCTIONS if bits == "e4m3" else INT8_INSTRUCTIONS
    assert re.search(instructions[90], compiled.ptx)
    assert compiled.local_bytes == 0


@pytest.mark.inductor
def test_e4m3_codes_that_are_reordered_as_bytes_are_not_multiplied_as_integers(
    emitted: Emissions, tmp_path: Path
) -> None:
    """A branch's transform is plain ops; Inductor gives the product the buffer of bytes that they end in."""
    compile_layer(4, "e4m3", "branch")
    compiled = compile_emitted(emitted.products[0], tmp_path)
    assert re.search(E4M3_INSTRUCTIONS[90], compiled.ptx)
    assert not re.search(INT8_INSTRUCTIONS[90], compiled.ptx)
