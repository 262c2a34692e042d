"""Which token types does `freeact_fx.discover_types` find in real models, and what does it predict they give?

    python benchmarks/discovered_types.py              appends to benchmarks/results/discovered_types.jsonl

The masked-diffusion model, once as if nobody had said which token is [MASK] and once with its types, and SmolLM2 on
plain text. Every sixth layer is looked at. Each row is a split that was tried: its ids as text, the share of tokens,
and by how much of itself the predicted error falls, under plan "auto" (with a branch), "shift" or "single". "[MASK],
declared" is not found but given, for comparison.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from accuracy_models import MODELS, Batches, Sizes
from measure import RESULTS, append_result
from presentation import table
from small_models import CACHE, MASK_TOKEN, load_tokenizer
from torch import nn

import freeact_fx
from freeact_fx import QuantConfig, TokenTypes
from freeact_fx.discover import Split, predicted_gain
from freeact_fx.progress import Progress
from freeact_fx.spool import Batches as SpooledBatches

CASES = {
    "dllm, no types": ("dllm", {"token_types": TokenTypes.single(), "sink": None}),
    "dllm, its types": ("dllm", {}),
    "smollm2, no types": ("smollm2", {"sink": None}),
    "smollm2, its sink": ("smollm2", {}),
}


def declared_mask(model: nn.Module, batches: Batches, config: QuantConfig) -> Split:
    gain = predicted_gain(model, SpooledBatches(batches), config, Progress(True))
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    share = float((ids == MASK_TOKEN).float().mean())
    return Split("[MASK], declared", (MASK_TOKEN,), share, gain, False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--plans", nargs="+", default=["auto", "shift"])
    add("--windows", type=int, default=16, help="of 512 tokens")
    add("--layer-step", type=int, default=6)
    add("--cache", type=Path, default=CACHE, help="of the base model")
    add("--out", type=Path, default=RESULTS / "discovered_types.jsonl")
    args = parser.parse_args()
    sizes = Sizes(calibration_windows=args.windows, layer_step=args.layer_step)
    tokenizer = load_tokenizer(args.cache)
    rows = [["case", "plan", "split", "ids", "share of tokens", "predicted gain", "accepted"]]
    for case in args.cases:
        name, changes = CASES[case]
        spec = MODELS[name]
        model = spec.load(args.cache)
        batches = spec.calibration(args.cache, sizes, 0)
        for plan in args.plans:
            config = QuantConfig(
                token_types=spec.token_types, plan=plan, skip=("lm_head", *sizes.skipped_layers)
            )
            found = freeact_fx.discover_types(model, batches, replace(config, **changes))
            splits = list(found.splits)
            if case == "dllm, no types":
                splits.append(declared_mask(model, batches, replace(config, sink=None)))
            for split in splits:
                words = [tokenizer.decode([i]) for i in split.token_ids]
                append_result(
                    args.out,
                    case=case,
                    plan=plan,
                    split=split.name,
                    ids=split.token_ids,
                    words=words,
                    share=round(split.share, 4),
                    gain=round(split.gain, 4),
                    accepted=split.accepted,
                    num_windows=args.windows,
                    layer_step=args.layer_step,
                )
                shown = " ".join(map(repr, words[:6])) + (" ..." if len(words) > 6 else "")
                numbers = (f"{split.share:.3f}", f"{split.gain:+.3f}", str(split.accepted))
                rows.append([case, plan, split.name, shown, *numbers])
                print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
