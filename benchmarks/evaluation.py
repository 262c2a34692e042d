"""What goes into the two small models and how good their answers are.

Masked diffusion: windows of real text, masked at a ratio; negative log likelihood (NLL) and
accuracy of the masked tokens. Vision-language: questions about pictures; NLL of the answer's
tokens and exact match. One pass gives both: greedy decoding writes the wanted answer exactly when
every wanted token is the most probable one after those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from small_models import BOS, DATA, EOS, IMAGE_TOKEN, MASK_TOKEN, NUM_PATCHES, Tokenizer
from torch import Tensor
from tqdm import tqdm

# <bos>, 64 image tokens, the longest question (19 tokens), the longest answer (3) and <eos>.
VLM_LENGTH = 88


@dataclass(frozen=True)
class Score:
    nll: float  # mean over the predicted tokens, nats
    accuracy: float  # dLLM: share of masked tokens; VLM: share of answers that match exactly
    num_scored: int  # what accuracy is a share of

    @property
    def accuracy_se(self) -> float:
        """Standard error of the accuracy, tokens or answers taken as independent."""
        return (self.accuracy * (1 - self.accuracy) / self.num_scored) ** 0.5


def text_windows(split: str, name: str, num: int, length: int = 512, offset: int = 0) -> Tensor:
    """Token ids [num, length]; split is "evals" or "calibration", name is "wiki" or "gsm"."""
    ids = np.load(DATA / f"{split}.npz")[name][offset : offset + num * length]
    return torch.from_numpy(ids.astype(np.int64)).view(num, length)


def mask_tokens(
    ids: Tensor, ratio: float | Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mask a random share of the tokens, never the first; returns the new ids and the bool mask."""
    masked = torch.rand(ids.shape, generator=generator) < ratio
    masked[:, 0] = False
    return ids.masked_fill(masked, MASK_TOKEN), masked


def dllm_calibration_batches(
    num_windows: int, length: int = 512, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Windows of WikiText-2 and GSM8K, half each, with mask ratios uniform in (0.05, 1]."""
    generator = torch.Generator().manual_seed(seed)
    half = num_windows // 2
    wiki = text_windows("calibration", "wiki", num_windows - half, length)
    gsm = text_windows("calibration", "gsm", half, length)
    batches = []
    for window in torch.cat([wiki, gsm])[torch.randperm(num_windows, generator=generator)]:
        ratio = 0.05 + 0.95 * (1 - torch.rand((), generator=generator))
        batches.append({"input_ids": mask_tokens(window[None], ratio, generator)[0]})
    return batches


@torch.no_grad()
def score_masked_tokens(
    model: Callable[[Tensor], Tensor], windows: Tensor, ratio: float, label: str, seed: int = 1
) -> Score:
    """NLL and accuracy of the masked tokens of `windows` [num, length], one window at a time."""
    windows_in, masked = mask_tokens(windows, ratio, torch.Generator().manual_seed(seed))
    nll = num_right = num = 0.0
    progress = tqdm(windows, label, leave=False)
    for ids, inputs, mask in zip(progress, windows_in, masked, strict=True):
        logits = model(inputs[None])[0, :-1][mask[1:]]  # the logits at i - 1 are for token i
        target = ids[1:][mask[1:]]
        nll += F.cross_entropy(logits, target, reduction="sum").item()
        num_right += (logits.argmax(-1) == target).sum().item()
        num += len(target)
    return Score(nll / num, num_right / num, int(num))


@torch.no_grad()
def denoise_step(
    model: Callable[[Tensor], Tensor], ids: Tensor, num_to_fill: int
) -> tuple[Tensor, Tensor]:
    """Fill the `num_to_fill` masked positions of `ids` [1, T] that the model is surest of.

    Returns the new ids and the positions filled. Only rows of masked positions enter the softmax.
    """
    masked = (ids[0] == MASK_TOKEN).nonzero()[:, 0]
    probability, token = model(ids)[0][masked - 1].softmax(-1).max(-1)
    surest = probability.topk(min(num_to_fill, len(masked))).indices
    filled = ids.clone()
    filled[0, masked[surest]] = token[surest]
    return filled, masked[surest]


@dataclass(frozen=True)
class Questions:
    """Pictures with one question each; answers begin with a space."""

    images: Tensor  # uint8 [N, 64, 64, 3]
    questions: list[str]  # "Question: ...\nAnswer:"
    answers: list[str]
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, indices: list[int]) -> Questions:
        pick = lambda values: [values[i] for i in indices]  # noqa: E731
        lists = map(pick, (self.questions, self.answers, self.kinds))
        return Questions(self.images[indices], *lists)


def load_questions(split: str) -> Questions:
    """split is "vlm-validation" (2,000) or "vlm-calibration" (600)."""
    data = np.load(DATA / f"{split}.npz")
    texts = ([str(t) for t in data[key]] for key in ("questions", "answers", "kinds"))
    return Questions(torch.from_numpy(data["images"]), *texts)


def prompt_ids(question: str, tokenizer: Tokenizer) -> list[int]:
    text = tokenizer(question, add_special_tokens=False)["input_ids"]
    return [BOS] + [IMAGE_TOKEN] * NUM_PATCHES + text


def answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS]


def vlm_calibration_batches(
    num: int, tokenizer: Tokenizer, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Questions with answers, batched by equal length: no padding enters the statistics."""
    data = load_questions("vlm-calibration")
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for i in range(num):
        ids = prompt_ids(data.questions[i], tokenizer) + answer_ids(data.answers[i], tokenizer)
        by_length.setdefault(len(ids), []).append((i, ids))
    batches = []
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            indices, ids = zip(*rows[start : start + batch_size], strict=True)
            batches.append({"input_ids": torch.tensor(ids), "images": data.images[list(indices)]})
    return batches


@torch.no_grad()
def score_answers(
    model: Callable[[Tensor, Tensor], Tensor],
    data: Questions,
    tokenizer: Tokenizer,
    label: str,
    batch_size: int = 8,
) -> Score:
    """NLL per answer token and exact match. Causal: the padding on the right is not seen."""
    nll = num_exact = num_tokens = 0.0
    batches = list(_answer_batches(data, tokenizer, batch_size))
    for inputs, images, spans in tqdm(batches, label, leave=False):
        logits = model(inputs, images)
        for row, (row_logits, (start, end)) in enumerate(zip(logits, spans, strict=False)):
            target = inputs[row, start:end]
            predicted = row_logits[start - 1 : end - 1]
            nll += F.cross_entropy(predicted, target, reduction="sum").item()
            num_exact += bool((predicted.argmax(-1) == target).all())
            num_tokens += len(target)
    return Score(nll / num_tokens, num_exact / len(data), len(data))


def _answer_batches(
    data: Questions, tokenizer: Tokenizer, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, int]]]]:
    """Batches of one shape: ids [batch_size, VLM_LENGTH], images, and where each row's answer lies.

    Why one shape: every further shape costs a compilation. The last batch is filled up with its own
    first row, which is not scored: it gets no span.
    """
    for start in range(0, len(data), batch_size):
        part = data.take(list(range(start, min(start + batch_size, len(data)))))
        inputs = torch.full((batch_size, VLM_LENGTH), EOS)
        spans = []
        for row, (question, answer) in enumerate(zip(part.questions, part.answers, strict=True)):
            prompt, wanted = prompt_ids(question, tokenizer), answer_ids(answer, tokenizer)
            spans.append((len(prompt), len(prompt) + len(wanted)))
            inputs[row, : spans[-1][1]] = torch.tensor(prompt + wanted)
        inputs[len(part) :] = inputs[0]
        images = part.images[[row if row < len(part) else 0 for row in range(batch_size)]]
        yield inputs, images, spans
