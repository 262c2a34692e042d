"""The rows of the GPU table: which there are, with which shapes, and what is asked of them.

A row's value is a ratio of medians of calls that took turns in one run. Linears and models are timed through the
callable that ``torch.compile(backend="freeact")`` returned; rows of the product or the transform alone call the
engine's op by hand and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_peers as peer
from gpu_decoder import LLADA_8B, QWEN_VL_7B, DecoderShape
from gpu_layers import (
    BRANCH,
    E4M3_ACTIVATIONS,
    ONE_TYPE,
    SLICED,
    TWO_TYPES,
    GatedLinear,
    NormLinear,
)
from gpu_linear_rows import Layer, linear_row, plan_row
from gpu_model_rows import memory_row, model_plan_row, model_row
from gpu_operators import NOTHING, RMS_NORM, SILU_MUL, product_row, transform_row
from gpu_timing import Bench

from freeact_fx import QuantConfig


@dataclass(frozen=True)
class Key:
    """What must be true of every row of a key; ``at_most``: the largest value is the worst one."""

    bound: float
    what: str
    at_most: bool = False


KEYS = {
    "linear_8192": Key(1.5, "RMSNorm + W4A4 linear against Inductor's RMSNorm + cuBLAS bf16, M = 8192"),
    "linear_4096": Key(1.4, "the same, M = 4096"),
    "down_8192": Key(1.35, "SiLU * mul + W4A4 linear against Inductor's SiLU * mul + cuBLAS bf16, M = 8192"),
    "down_4096": Key(1.25, "the same, M = 4096"),
    "product_vs_fp8": Key(0.90, "product alone against cuBLASLt fp8 row-wise, M = 4096 and 8192"),
    "product_small": Key(1.1, "the same, M = 256"),
    "transform_vs_copy_narrow": Key(0.80, "transform and quantise against a copy of its bytes, d = 3584 and 4096"),
    "transform_vs_copy_wide": Key(0.50, "the same, d = 11008, 12288, 14336"),
    "two_types": Key(1.05, "time of two mixed types over that of one type", at_most=True),
    "branch": Key(1.08, "time of plan branch, R = 64, over that of plan shift", at_most=True),
    "decode": Key(2.8, "RMSNorm or SiLU * mul + W4A4 linear against the best bf16, M = 1 and 16, CUDA graph"),
    "mid_m": Key(1.1, "the same against the better of bf16 and fp8, M = 64 and 256"),
    "sliced": Key(2.3, "sliced plan, types sorted, half of K each, against bf16, M = 8192"),
    "e2e_dllm": Key(1.4, "LLaDA-8B-shaped denoising step, 4 x 1024 tokens, against max-autotune bf16"),
    "e2e_vlm": Key(1.35, "Qwen2.5-VL-7B-shaped decoder prefill, 4096 tokens, 70 % vision, the same"),
    "e2e_block32": Key(1.8, "the same models, 32 tokens a step, CUDA graphs, step after step"),
    "memory": Key(0.28, "bytes of the quantised Linears over those in bf16", at_most=True),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of the table, or small ones of the same structure for a rehearsal."""

    tiny: bool = False
    num_layers: int | None = None  # of the decoders; None: all

    def tokens(self, num_tokens: int) -> int:
        return max(1, num_tokens // 64) if self.tiny else num_tokens

    def features(self, num_features: int) -> int:
        return num_features // 64 if self.tiny else num_features

    def decoder(self, shape: DecoderShape) -> DecoderShape:
        shape = shape.tiny() if self.tiny else shape
        return shape if self.num_layers is None else shape.with_layers(self.num_layers)


@dataclass(frozen=True)
class Row:
    """One row: ``measure`` gives its fields, "value" among them. ``counts``: it takes part in its key's value."""

    key: str
    label: str
    part: str
    measure: Callable[[Bench], dict[str, Any]]
    counts: bool = True


def all_rows(sizes: Sizes) -> list[Row]:
    """Short ones that tell most first."""
    return [
        *_memory_rows(sizes),
        *_transform_rows(sizes),
        *_product_rows(sizes),
        *_linear_rows(sizes),
        *_plan_rows(sizes),
        *_small_rows(sizes),
        *_model_rows(sizes),
    ]


def _linear_rows(sizes: Sizes) -> Iterator[Row]:
    def row(key: str, kind: Any, m: int, n: int, k: int, config: QuantConfig = TWO_TYPES) -> Row:
        layer = Layer(kind, sizes.tokens(m), sizes.features(n), sizes.features(k))
        is_w4a4 = config is TWO_TYPES
        label = f"M={m}, N={n}, K={k}" + ("" if is_w4a4 else ", e4m3 activations")
        part = key.partition("_")[0]
        return Row(
            key,
            label,
            part,
            lambda b: linear_row(b, layer, [peer.INDUCTOR], config=config),
            counts=is_w4a4,
        )

    for m in (8192, 4096):
        yield row(f"linear_{m}", NormLinear, m, 12288, 4096)
    for m in (8192, 4096):
        yield row(f"down_{m}", GatedLinear, m, 4096, 12288)
    yield row("linear_8192", NormLinear, 8192, 12288, 4096, E4M3_ACTIVATIONS)
    yield row("down_8192", GatedLinear, 8192, 4096, 12288, E4M3_ACTIVATIONS)


def _layers(sizes: Sizes, m: int) -> dict[str, Layer]:
    """A decoder's wide layers for m tokens, by label: one up, one down."""
    return {
        f"M={m}, N={n}, K={k}": Layer(kind, sizes.tokens(m), sizes.features(n), sizes.features(k))
        for kind, n, k in ((NormLinear, 12288, 4096), (GatedLinear, 4096, 12288))
    }


_BRANCH_AND_SHIFT = {"branch": (BRANCH, True), "shift": (TWO_TYPES, True)}


def _branch_row(label: str, part: str, layer: Layer) -> Row:
    """For fewer tokens than the row that counts."""
    return Row(
        "branch",
        label,
        part,
        lambda b: plan_row(b, layer, _BRANCH_AND_SHIFT, cuda_graph=True),
        counts=False,
    )


def _plan_rows(sizes: Sizes) -> Iterator[Row]:
    up, down = _layers(sizes, 8192).values()
    types = {"two types": (TWO_TYPES, True), "one type": (ONE_TYPE, False)}
    yield Row("two_types", "M=8192, N=12288, K=4096", "plans", lambda b: plan_row(b, up, types))
    yield Row("two_types", "M=8192, N=4096, K=12288", "plans", lambda b: plan_row(b, down, types))
    yield Row(
        "branch",
        "M=8192, N=12288, K=4096",
        "plans",
        lambda b: plan_row(b, up, _BRANCH_AND_SHIFT),
    )
    for m in (1024, 256):
        for label, layer in _layers(sizes, m).items():
            yield _branch_row(label, "plans", layer)
    for order in ("sorted", "mixed"):
        yield Row(
            "sliced",
            f"M=8192, N=12288, K=4096, types {order}",
            "plans",
            lambda b, order=order: linear_row(b, up, [peer.INDUCTOR], config=SLICED, order=order),
            counts=order == "sorted",
        )


def _small_rows(sizes: Sizes) -> Iterator[Row]:
    for m in (1, 16, 64, 256):
        key = "decode" if m <= 16 else "mid_m"
        against = peer.BF16 if key == "decode" else (*peer.BF16, peer.FP8)
        for label, layer in _layers(sizes, m).items():
            yield Row(
                key,
                label,
                key,
                lambda b, layer=layer, against=against: linear_row(
                    b, layer, against, cuda_graph=True
                ),
            )
            if key == "decode":
                yield _branch_row(label, key, layer)


def _product_rows(sizes: Sizes) -> Iterator[Row]:
    for m in (8192, 4096, 256):
        key = "product_small" if m == 256 else "product_vs_fp8"
        for n, k in ((12288, 4096), (4096, 12288)):
            shape = sizes.tokens(m), sizes.features(n), sizes.features(k)
            yield Row(
                key,
                f"M={m}, N={n}, K={k}, product alone",
                "product",
                lambda b, shape=shape, graph=m == 256: product_row(b, *shape, cuda_graph=graph),
            )


def _transform_rows(sizes: Sizes) -> Iterator[Row]:
    for d in (3584, 4096, 11008, 12288, 14336, 18944):
        narrow = d <= 4096
        key = "transform_vs_copy_narrow" if narrow else "transform_vs_copy_wide"
        shape = sizes.tokens(8192), sizes.features(d)
        for before in (NOTHING, RMS_NORM if narrow else SILU_MUL):
            yield Row(
                key,
                f"M=8192, d={d}, {before} + transform alone",
                "transform",
                lambda b, shape=shape, before=before: transform_row(b, *shape, before),
                counts=d != 18944 and before != SILU_MUL,
            )


def _model_rows(sizes: Sizes) -> Iterator[Row]:
    llada, qwen = sizes.decoder(LLADA_8B), sizes.decoder(QWEN_VL_7B)
    length = sizes.tokens(1024)
    yield Row(
        "e2e_dllm",
        "LLaDA-8B-shaped, 4 x 1024 tokens, half masked",
        "dllm",
        lambda b: model_row(b, llada, 4, length, 0.5, 0),
    )
    yield Row(
        "e2e_block32",
        "LLaDA-8B-shaped, a block of 32 tokens after 992",
        "dllm_block",
        lambda b: model_row(b, llada, 1, 4 if sizes.tiny else 32, 0.5, length),
    )
    for what, batch, tokens, cached in (
        ("4 x 1024 tokens, half masked", 4, length, 0),
        ("a block of 32 tokens after 992", 1, 4 if sizes.tiny else 32, length),
    ):
        yield Row(
            "branch",
            f"LLaDA-8B-shaped, {what}, R = 128",
            "dllm_plans",
            lambda b, step=(batch, tokens, 0.5, cached): model_plan_row(b, llada, *step),
            counts=False,
        )
    yield Row(
        "e2e_vlm",
        "Qwen2.5-VL-7B-shaped, 4096 tokens, 70 % vision",
        "vlm",
        lambda b: model_row(b, qwen, 1, sizes.tokens(4096), 0.7, 0),
    )
    yield Row(
        "e2e_block32",
        "Qwen2.5-VL-7B-shaped, 32 sequences, one token each after 511",
        "vlm_block",
        lambda b: model_row(b, qwen, 32, 1, 0.7, sizes.tokens(512)),
    )


def _memory_rows(sizes: Sizes) -> Iterator[Row]:
    for name, shape in (("LLaDA-8B", LLADA_8B), ("Qwen2.5-VL-7B", QWEN_VL_7B)):
        small = sizes.decoder(shape)
        label = f"{name}-shaped, plan shift, three types"
        yield Row("memory", label, "memory", lambda b, small=small: memory_row(b, small))
