"""A vision-language model in W4A4 beside itself in float answers questions about pictures.

    make demo-vlm        or:  python benchmarks/demo_vlm.py [--help]

Nobody tells the compiler which tokens are vision and which are text: the pass finds the merge of
the picture's features into the embeddings. The pictures with both models' answers are saved as a
PNG.
"""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from calibrated import VLM_CONFIG, vlm_checkpoint
from evaluation import VLM_LENGTH, Questions, load_questions, prompt_ids, score_answers
from measure import environment, time_interleaved
from PIL import Image, ImageDraw, ImageFont
from presentation import complete_report, heading, linears_summary, paragraph, table, working
from small_models import CACHE, EOS, REPOSITORY, Tokenizer, load_tokenizer, load_vision_language
from storage import describe_bytes
from torch import Tensor

import freeact_fx

ABOUT = """
The model is a small vision-language adaptation of SmolLM2-135M-Instruct, made for this
repository: generated pictures of 4x4 cells with shapes and handwritten digits, seven kinds of
question. The base weights were 4-bit before (dequantised GGUF), so float here means the
dequantised model, and that flatters 4-bit weights. Not results of LLaVA or Qwen-VL.
"""
BATCH = 8

Model = Callable[[Tensor, Tensor], Tensor]


def choose_examples(data: Questions) -> list[int]:
    """The first question of each kind, and one more to fill the batch."""
    first = {kind: data.kinds.index(kind) for kind in dict.fromkeys(data.kinds)}
    rest = (i for i in range(len(data)) if i not in first.values())
    return sorted([*first.values(), *(next(rest) for _ in range(BATCH - len(first)))])


@torch.no_grad()
def answer(model: Model, data: Questions, tokenizer: Tokenizer, max_tokens: int = 4) -> list[str]:
    """Greedy answers to a batch of questions, all rows in lockstep, padded to one length."""
    prompts = [prompt_ids(question, tokenizer) for question in data.questions]
    ids = torch.full((len(data), VLM_LENGTH), EOS)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    rows, start = torch.arange(len(data)), torch.tensor([len(p) for p in prompts])
    for step in range(max_tokens):
        logits = model(ids, data.images)
        ids[rows, start + step] = logits[rows, start + step - 1].argmax(-1)
    answers = (row[s : s + max_tokens].tolist() for row, s in zip(ids, start, strict=True))
    return [tokenizer.decode([*tokens, EOS][: [*tokens, EOS].index(EOS)]) for tokens in answers]


def draw_answers(data: Questions, answers: dict[str, list[str]], path: Path) -> None:
    """A sheet of pictures, each with its question and what each model answered."""
    scale, margin, line, columns = 3, 12, 20, 4
    cell_width = 64 * scale + 2 * margin + 60
    cell_height = 64 * scale + 2 * margin + line * (4 + len(answers))
    num_rows = -(-len(data) // columns)
    sheet = Image.new("RGB", (columns * cell_width, num_rows * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i in range(len(data)):
        x, y = margin + i % columns * cell_width, margin + i // columns * cell_height
        picture = Image.fromarray(data.images[i].numpy())
        sheet.paste(picture.resize((64 * scale, 64 * scale), Image.Resampling.NEAREST), (x, y))
        y += 64 * scale + 6
        question = data.questions[i].removeprefix("Question: ").removesuffix("\nAnswer:")
        draw.multiline_text((x, y), textwrap.fill(question, 34), "black", font)
        y += line * 3
        for name, given in answers.items():
            color = "darkgreen" if given[i] == data.answers[i] else "firebrick"
            draw.text((x, y), f"{name}:{given[i]}", color, font)
            y += line
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="of the base and checkpoints")
    parser.add_argument("--calibration-questions", type=int, default=240)
    parser.add_argument("--questions", type=int, default=200, help="of 2,000, to score")
    parser.add_argument("--picture", type=Path, default=REPOSITORY / "out" / "demo_vlm.png")
    args = parser.parse_args()

    paragraph(ABOUT)
    facts = environment()
    print(f"{facts['cpu']}, {facts['num_threads']} threads, torch {facts['torch']}")

    heading("Calibrate and convert")
    tokenizer = load_tokenizer(args.cache)
    dense = load_vision_language(args.cache)
    checkpoint = vlm_checkpoint(dense, tokenizer, args.cache, args.calibration_questions)
    data_free, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    freeact_fx.convert(data_free, VLM_CONFIG)
    freeact_fx.convert(calibrated, checkpoint)
    data = load_questions("vlm-validation")
    examples = data.take(choose_examples(data))
    print(describe_bytes(calibrated))

    heading("Compile")
    models: dict[str, Model] = {
        "float": torch.compile(dense, dynamic=False),
        "W4A4 data-free": torch.compile(data_free, backend="freeact", dynamic=False),
        "W4A4 calibrated": torch.compile(calibrated, backend="freeact", dynamic=False),
    }
    answers = {}
    for name, model in models.items():
        with working(f"compiling {name}, first answers"):
            answers[name] = answer(model, examples, tokenizer)
    print(linears_summary(complete_report(models["W4A4 calibrated"])))

    heading("Questions and answers")
    rows = [["question", "wanted", *answers]]
    for i, question in enumerate(examples.questions):
        short = question.removeprefix("Question: ").removesuffix("\nAnswer:")
        rows.append([short, examples.answers[i].strip(), *(a[i].strip() for a in answers.values())])
    print(table(rows))
    shown = {"float": answers["float"], "W4A4": answers["W4A4 calibrated"]}
    draw_answers(examples, shown, args.picture)
    print(f"pictures with answers: {args.picture}")

    heading(f"The first {args.questions} validation questions")
    rows = [["", "exact match", "NLL per token"]]
    for name, model in models.items():
        score = score_answers(model, data.take(list(range(args.questions))), tokenizer, name, BATCH)
        exact = f"{score.accuracy:.3f} (se {score.accuracy_se:.3f})"
        rows.append([name, exact, f"{score.nll:.3f}"])
    print(table(rows))

    heading(f"Time per pass over {BATCH} questions of {VLM_LENGTH} tokens, both compiled")
    ids = torch.full((BATCH, VLM_LENGTH), EOS)
    prompt = prompt_ids(data.questions[0], tokenizer)
    ids[:, : len(prompt)] = torch.tensor(prompt)
    timings = time_interleaved(
        {
            name: lambda m=models[model]: m(ids, examples.images)
            for name, model in (("float", "float"), ("W4A4", "W4A4 calibrated"))
        },
        "timing",
        runs=10,
    )
    for name, timing in timings.items():
        print(f"{name:6} {timing}")
    print(f"{timings['float'].median_ms / timings['W4A4'].median_ms:.2f} times as fast")


if __name__ == "__main__":
    main()
