"""The main job, start to end: a masked-diffusion model in W4A4 beside itself in float, on the CPU.

    make demo            or:  python benchmarks/demo_dllm.py [--help]

Calibrates on real text, converts, compiles with backend="freeact", fills masked spans of an
encyclopedia article and of a GSM8K solution step by step, and measures. The first run downloads
the base model (93 MB) and takes a few minutes; the converted base and the calibrated checkpoint
are kept.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from calibrated import DLLM_CONFIG, dllm_checkpoint
from evaluation import denoise_step, mask_tokens, score_masked_tokens, text_windows
from measure import RESULTS, append_result, environment, time_interleaved
from presentation import (
    complete_report,
    heading,
    linears_summary,
    mark_tokens,
    paragraph,
    side_by_side,
    table,
    visible,
    working,
)
from small_models import CACHE, MASK_TOKEN, Tokenizer, load_masked_diffusion, load_tokenizer
from storage import describe_bytes
from torch import Tensor
from tqdm import tqdm

import freeact_fx

ABOUT = """
The model is a small masked-diffusion adaptation of SmolLM2-135M-Instruct, made for this
repository. It fills short gaps; it does not solve GSM8K problems from an empty answer. The base
weights were 4-bit before (dequantised GGUF), so float here means the dequantised model, and that
flatters 4-bit weights. Not results of LLaDA or Dream.
"""


@dataclass(frozen=True)
class Passage:
    """A window of 512 test tokens. Spans of `region` are masked; `excerpt` of it is shown."""

    title: str
    name: str  # "wiki" or "gsm" of evals.npz
    start: int  # of the window, in tokens
    excerpt: tuple[int, int]
    region: tuple[int, int]


# Chosen for few <unk> and for whole sentences, before any model had filled them.
PASSAGES = (
    Passage("WikiText-2 test, on ironclads", "wiki", 83 * 512, (95, 231), (97, 230)),
    Passage("GSM8K test, a solution", "gsm", 183, (269, 473), (383, 473)),
)
LENGTH = 512


def mask_spans(passage: Passage, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [1, T] of the passage, and which are masked [T]: 1 to 3 tokens, 4 to 8 apart."""
    window = text_windows("evals", passage.name, 1, LENGTH, offset=passage.start)
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    masked = torch.zeros(LENGTH, dtype=torch.bool)
    position = passage.region[0] + draw(4, 8)
    while position < passage.region[1]:
        end = min(position + draw(1, 3), passage.region[1])
        masked[position:end] = True
        position = end + draw(4, 8)
    return window, masked


Model = Callable[[Tensor], Tensor]


def fill_side_by_side(
    passage: Passage, models: dict[str, Model], steps: int, tokenizer: Tokenizer
) -> None:
    """Fill the passage with both models, the surest positions first, and show what each did."""
    original, masked = mask_spans(passage)
    num_masked = int(masked.sum())
    per_step = -(-num_masked // steps)
    states = {name: original.masked_fill(masked, MASK_TOKEN) for name in models}
    nothing = torch.zeros_like(masked)
    shown = slice(*passage.excerpt)
    heading(f"{passage.title}: {num_masked} of {LENGTH} tokens masked, {per_step} filled per step")
    masked_text = next(iter(states.values()))[0, shown]
    paragraph(mark_tokens(masked_text, nothing[shown], nothing[shown], tokenizer))
    print()
    for step in tqdm(range(steps), "denoising", leave=False):
        written = []
        for name, model in models.items():
            states[name], positions = denoise_step(model, states[name], per_step)
            tokens = states[name][0, positions.sort().values]
            words = (visible(tokenizer.decode([token])).strip(" ") for token in tokens)
            written.append(f"{name}: {' · '.join(words)}")
        tqdm.write(f"step {step + 1:2}: " + "   |   ".join(written))
        if not any((state == MASK_TOKEN).any() for state in states.values()):
            break
    (name_a, a), (name_b, b) = states.items()
    differing = (a != b)[0]
    columns = {
        name: mark_tokens(state[0, shown], masked[shown], differing[shown], tokenizer)
        for name, state in states.items()
    }
    print("\n" + side_by_side(columns))
    right = {name: int((state == original)[0][masked].sum()) for name, state in states.items()}
    print(
        f"[filled], <<filled differently>>. As in the original: {name_a} {right[name_a]}, "
        f"{name_b} {right[name_b]} of {num_masked}; "
        f"the same in both: {num_masked - int(differing.sum())}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder for the base and checkpoints"
    )
    parser.add_argument("--calibration-windows", type=int, default=16, help="of 512 tokens")
    parser.add_argument(
        "--thorough", action="store_true", help="calibrate with the default setting, not the quick"
    )
    parser.add_argument(
        "--windows", type=int, default=12, help="of 512 tokens, to score on each text"
    )
    parser.add_argument("--mask-ratio", type=float, default=0.3, help="for the scores")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps per passage")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()

    paragraph(ABOUT)
    facts = environment()
    print(f"{facts['cpu']}, {facts['num_threads']} threads, torch {facts['torch']}")

    heading("Calibrate and convert")
    config = DLLM_CONFIG if args.thorough else DLLM_CONFIG.quick()
    tokenizer = load_tokenizer(args.cache)
    dense = load_masked_diffusion(args.cache)
    checkpoint = dllm_checkpoint(dense, args.cache, args.calibration_windows, config)
    data_free, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    freeact_fx.convert(data_free, DLLM_CONFIG)
    freeact_fx.convert(calibrated, checkpoint)
    example, _ = mask_tokens(text_windows("evals", "wiki", 1, LENGTH), 0.3, torch.Generator())
    print(describe_bytes(calibrated))

    heading("Compile")
    models: dict[str, Model] = {
        "float": torch.compile(dense, dynamic=False),
        "W4A4 data-free": torch.compile(data_free, backend="freeact", dynamic=False),
        "W4A4 calibrated": torch.compile(calibrated, backend="freeact", dynamic=False),
    }
    with torch.no_grad():
        for name, model in models.items():
            with working(f"compiling {name}"):
                model(example)
    print(linears_summary(complete_report(models["W4A4 calibrated"])))

    heading(f"Masked tokens, mask ratio {args.mask_ratio}: NLL / accuracy")
    rows = [["", *models]]
    found = {}
    for text, name in (("WikiText-2 test", "wiki"), ("GSM8K test", "gsm")):
        windows = text_windows("evals", name, args.windows, LENGTH)
        scores = [
            score_masked_tokens(model, windows, args.mask_ratio, f"{text}, {label}")
            for label, model in models.items()
        ]
        rows.append([text, *(f"{s.nll:.3f} / {s.accuracy:.3f}" for s in scores)])
        found[text] = {
            label: {"nll": round(s.nll, 4), "accuracy": round(s.accuracy, 4)}
            for label, s in zip(models, scores, strict=True)
        }
        se = scores[0].accuracy_se
        print(f"{text}: {scores[0].num_scored} masked tokens, standard error of accuracy {se:.3f}")
    print(table(rows))

    both = {"float": models["float"], "W4A4": models["W4A4 calibrated"]}
    for passage in PASSAGES:
        fill_side_by_side(passage, both, args.steps, tokenizer)

    heading(f"Time per denoising step, {LENGTH} tokens, both compiled")
    original, masked = mask_spans(PASSAGES[0])
    state = original.masked_fill(masked, MASK_TOKEN)
    timings = time_interleaved(
        {name: lambda m=model: denoise_step(m, state, 4) for name, model in both.items()},
        "timing",
        runs=10,
    )
    for name, timing in timings.items():
        print(f"{name:6} {timing}")
    print(f"{timings['float'].median_ms / timings['W4A4'].median_ms:.2f} times as fast")
    if args.write:
        append_result(
            RESULTS / "demo_dllm.jsonl",
            setting="default" if args.thorough else "quick",
            calibration_windows=args.calibration_windows,
            windows=args.windows,
            mask_ratio=args.mask_ratio,
            scores=found,
            timings={name: vars(timing) for name, timing in timings.items()},
        )


if __name__ == "__main__":
    main()
