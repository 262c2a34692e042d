"""How long, and how much memory, does `explain` take for a model of 8B parameters, of which only shapes are there?

    python benchmarks/explain_8b.py [--check] [--write]  # a masked-diffusion decoder, 32 layers, on the meta device
    python benchmarks/explain_8b.py --kind vlm           # Qwen2.5-VL-7B, two layers, with weights
    python benchmarks/explain_8b.py --layers 4 --html report.html

Prints one JSON line: seconds from the config to the HTML file, of these `explain`, and of processor time with all
imports; the peak of memory in bytes; the sizes of the report, its HTML with the graphs' code. `--check` fails above
60 s, 2 GB of memory or 5 MB of HTML; `--write` adds the line, with hardware and versions, to
`results/explain_8b.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import RESULTS, append_result, peak_memory_bytes
from torch import nn

import freeact_fx
from freeact_fx import Report, TokenTypes

MASK_ID = 126336
IMAGE_ID = 151655
# What a report may take on two cores.
LIMITS = {"seconds": 60, "peak_bytes": 2e9, "html_bytes": 5e6}


def decoder(num_layers: int, kind: str) -> tuple[nn.Module, dict[str, Any], TokenTypes]:
    """LLaDA-8B's (or Llama-3-8B's) shapes on the meta device."""
    llada = kind == "llada"
    config = transformers.LlamaConfig(
        vocab_size=126464 if llada else 128256,
        hidden_size=4096,
        intermediate_size=12288 if llada else 14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=32 if llada else 8,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(1, 256, dtype=torch.int64)
    return model.eval(), {"input_ids": ids}, TokenTypes.mask_token(MASK_ID)


def vlm(num_layers: int) -> tuple[nn.Module, dict[str, Any], TokenTypes]:
    """Qwen2.5-VL-7B's widths. Its forward looks at values, so there are some: each weight is one number, expanded."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "use_cache": False,
        },
        vision_config={
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "depth": num_layers,
            "fullatt_block_indexes": [num_layers - 1],
        },
    )
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    buffers = _rotary_buffers(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.full((), 0.01, dtype=torch.bfloat16).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name in list(module._buffers):
            module._buffers[name] = buffers[tuple(module._buffers[name].shape)]
    pictures = torch.tensor([[1, 8, 8]])
    ids = torch.full((1, 64), 9)
    ids[0, 4:20] = IMAGE_ID
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(64, 3 * 2 * 14 * 14, dtype=torch.bfloat16),
        "image_grid_thw": pictures,
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
        "logits_to_keep": 1,
    }
    return model.eval(), inputs, TokenTypes.image_tokens(IMAGE_ID)


def _rotary_buffers(model: nn.Module) -> dict[tuple[int, ...], torch.Tensor]:
    """Values for the frequencies of the rotary embeddings, by shape."""
    shapes = {tuple(buffer.shape) for buffer in model.buffers()}
    return {shape: torch.logspace(0, -4, shape[0]).expand(shape).clone() for shape in shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("llada", "llama", "vlm"), default="llada")
    parser.add_argument("--layers", type=int, help="default: 32, of a VLM 2")
    parser.add_argument("--html", type=Path, help="keep the report there")
    parser.add_argument("--check", action="store_true", help=f"exit 1 above {LIMITS}")
    parser.add_argument("--write", action="store_true", help="add the result to benchmarks/results")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.kind == "vlm":
        model, inputs, types = vlm(arguments.layers or 2)
    else:
        model, inputs, types = decoder(arguments.layers or 32, arguments.kind)
    traced = time.perf_counter()
    report = freeact_fx.explain(model, **inputs, options={"token_types": types}, code=True)
    explain_seconds = time.perf_counter() - traced
    html_bytes = _html_bytes(report, arguments.html)
    result = {
        "kind": arguments.kind,
        "layers": model.config.get_text_config().num_hidden_layers,
        "seconds": round(time.perf_counter() - start, 1),
        "explain_seconds": round(explain_seconds, 1),
        "process_processor_seconds": round(time.process_time(), 1),
        "peak_bytes": peak_memory_bytes(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **report.counts(),
        "graphs": report.num_graphs,
        "json_bytes": len(json.dumps(report.to_dict())),
        "table_lines": str(report).count("\n") + 1,
        "html_bytes": html_bytes,
    }
    print(json.dumps(result))
    if arguments.write:
        append_result(RESULTS / "explain_8b.jsonl", **result, transformers=transformers.__version__)
    too_much = {name: result[name] for name, most in LIMITS.items() if result[name] > most}
    if arguments.check and too_much:
        raise SystemExit(f"more than {LIMITS}: {too_much}")


def _html_bytes(report: Report, path: Path | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = path or Path(folder) / "report.html"
        report.to_html(file)
        return file.stat().st_size


if __name__ == "__main__":
    main()
