"""The models of the accuracy benchmark: where each comes from, what it is calibrated and scored on.

A `BenchmarkModel` is all that `accuracy.py` knows of a model. The four of this repository stand in
`MODELS`; `accuracy_hub.py` makes one from any Hugging Face model id. Calibration and test data are
disjoint everywhere: validation and training splits there, test splits here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from evaluation import (
    Predictions,
    answer_predictions,
    calibration_windows,
    dllm_calibration_batches,
    load_questions,
    masked_predictions,
    next_token_predictions,
    text_ids,
    text_windows,
    vlm_calibration_batches,
)
from small_models import (
    GEMMA3,
    MASK_TOKEN,
    SMOLLM2,
    Source,
    load_language_model,
    load_masked_diffusion,
    load_tokenizer,
    load_vision_language,
)
from torch import Tensor, nn

from freeact_fx import TokenTypes

WINDOW = 512  # tokens, of text to calibrate on and to score; they do not overlap
MASK_RATIOS = (0.15, 0.3, 0.6)
TEXTS = ("wiki", "gsm")  # WikiText-2 and GSM8K, test splits
BATCH = 8

Batches = list[dict[str, Tensor]]
TestSets = dict[str, list[Predictions]]


@dataclass(frozen=True)
class Sizes:
    """How much to calibrate and to score on; part of what makes two results comparable."""

    calibration_windows: int = 64
    calibration_questions: int = 400
    windows: int = 24  # masked diffusion: of each text at each ratio
    text_windows: int = 608  # plain text: all of WikiText-2's test split, but for a rest
    questions: int = 2000
    layer_step: int = 1  # n: only each n-th decoder layer is quantised, the others stay float

    @property
    def skipped_layers(self) -> tuple[str, ...]:
        """Name patterns of the layers that stay float, for models of up to 200."""
        return tuple(f"*layers.{i}.*" for i in range(200) if i % self.layer_step)


@dataclass(frozen=True)
class BenchmarkModel:
    """One model with its data. Every function takes the cache folder first."""

    token_types: TokenTypes
    load: Callable[[Path], nn.Module]  # float, on the CPU
    calibration: Callable[[Path, Sizes, int], Batches]  # the last is the seed
    test_sets: Callable[[Path, Sizes], TestSets]
    accuracy: str = "accuracy"  # what Score.accuracy is called here
    with_kl: bool = True
    dynamic: bool | None = False  # of torch.compile; False: every test batch has one shape


def _dllm_calibration(cache: Path, sizes: Sizes, seed: int) -> Batches:
    return dllm_calibration_batches(sizes.calibration_windows, WINDOW, seed)


def _dllm_test_sets(cache: Path, sizes: Sizes) -> TestSets:
    batch_size = math.gcd(sizes.windows, BATCH)
    return {
        f"{text} {ratio}": masked_predictions(
            text_windows("evals", text, sizes.windows, WINDOW), ratio, batch_size=batch_size
        )
        for text in TEXTS
        for ratio in MASK_RATIOS
    }


def _vlm_calibration(cache: Path, sizes: Sizes, seed: int) -> Batches:
    return vlm_calibration_batches(sizes.calibration_questions, load_tokenizer(cache), seed=seed)


def _vlm_test_sets(cache: Path, sizes: Sizes) -> TestSets:
    questions = load_questions("vlm-validation").take(list(range(sizes.questions)))
    return {"answers": list(answer_predictions(questions, load_tokenizer(cache), BATCH))}


def windows_of(ids: Tensor, num: int, bos: int | None = None) -> Tensor:
    """The first `num` windows of a text [n], or as many as it has; with `bos` each begins with it."""
    content = WINDOW if bos is None else WINDOW - 1
    num = min(num, len(ids) // content)
    windows = ids[: num * content].view(num, content)
    return windows if bos is None else torch.cat([torch.full((num, 1), bos), windows], 1)


def _retokenised(cache: Path, split: str) -> tuple[Tensor, int]:
    """Gemma's ids of a WikiText-2 split, and its <bos>, without which it predicts badly."""
    ids = text_ids(split, "wiki")
    text = load_tokenizer(cache).decode(ids, clean_up_tokenization_spaces=False)
    tokenizer = load_tokenizer(cache, GEMMA3)
    # Why split: the text's "<unk>" are words of WikiText, not the special token of that name.
    own = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return torch.tensor(own["input_ids"]), tokenizer.bos_token_id


def _text_calibration(source: Source, cache: Path, sizes: Sizes, seed: int) -> Batches:
    if source is SMOLLM2:
        windows = calibration_windows("wiki", sizes.calibration_windows, WINDOW, seed)
    else:
        ids, bos = _retokenised(cache, "calibration")
        there = windows_of(ids, len(ids), bos)
        num = sizes.calibration_windows
        windows = there[(seed * num + torch.arange(num)) % len(there)]
    return [{"input_ids": window} for window in windows.split(1)]


def _text_test_sets(source: Source, cache: Path, sizes: Sizes) -> TestSets:
    if source is SMOLLM2:
        windows = text_windows("evals", "wiki", sizes.text_windows, WINDOW)
    else:
        ids, bos = _retokenised(cache, "evals")
        windows = windows_of(ids, sizes.text_windows, bos)
    if len(windows) > BATCH:
        windows = windows[: len(windows) // BATCH * BATCH]
    return {"wiki": next_token_predictions(windows, BATCH)}


def _text_model(source: Source) -> BenchmarkModel:
    return BenchmarkModel(
        TokenTypes.single(),
        partial(load_language_model, source),
        partial(_text_calibration, source),
        partial(_text_test_sets, source),
        # Why no KL: 300,000 predictions are precise enough, and the second vocabulary costs more
        # than all Linears.
        with_kl=False,
    )


MODELS = {
    "dllm": BenchmarkModel(
        TokenTypes.mask_token(MASK_TOKEN), load_masked_diffusion, _dllm_calibration, _dllm_test_sets
    ),
    "vlm": BenchmarkModel(
        TokenTypes.auto(),
        load_vision_language,
        _vlm_calibration,
        _vlm_test_sets,
        accuracy="exact_match",
    ),
    "smollm2": _text_model(SMOLLM2),
    "gemma3": _text_model(GEMMA3),
}
