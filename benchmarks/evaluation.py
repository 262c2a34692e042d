"""What goes into the models and how good their predictions are.

Masked diffusion: windows of real text, masked at a ratio; negative log likelihood (NLL) and
accuracy of the masked tokens. Text: NLL of every next token. Vision-language: questions about
pictures; NLL of the answer's tokens and exact match. One pass gives both: greedy decoding writes
the wanted answer exactly when every wanted token is the most probable one after those before it.

All three are `Predictions`: inputs, the positions that predict, and what they should predict. So
one function, `score`, measures them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from small_models import BOS, DATA, EOS, IMAGE_TOKEN, MASK_TOKEN, NUM_PATCHES, Tokenizer
from torch import Tensor
from tqdm import tqdm

from freeact_fx import MaskCollator

# <bos>, 64 image tokens, the longest question (19 tokens), the longest answer (3) and <eos>.
VLM_LENGTH = 88


@dataclass(frozen=True)
class Predictions:
    """One batch of a test set: what goes in, which positions predict, and what comes after them.

    inputs   arguments of the model, by name; the first dimensions of its output are [B, T]
    where    [n] int64, the predicting positions in the flattened [B * T]
    targets  [n] int64, the tokens that should be predicted there
    items    [n] int64, what accuracy counts: an item is right if all its tokens are
    """

    inputs: dict[str, Tensor]
    where: Tensor
    targets: Tensor
    items: Tensor

    def to(self, device: torch.device | str) -> Predictions:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Predictions(inputs, *(t.to(device) for t in (self.where, self.targets, self.items)))


@dataclass(frozen=True)
class Score:
    nll: float  # mean over the predicted tokens, nats
    accuracy: float  # share of the items; masked tokens and next tokens are items, so are answers
    num_scored: int  # what accuracy is a share of
    num_tokens: int  # what nll and kl are means over
    kl: float | None = None  # from the float model's distribution to this one's, nats per token

    @property
    def accuracy_se(self) -> float:
        """Standard error of the accuracy, tokens or answers taken as independent."""
        return (self.accuracy * (1 - self.accuracy) / self.num_scored) ** 0.5


def text_ids(split: str, name: str) -> Tensor:
    """All token ids [n] of a text; split is "evals" or "calibration", name is "wiki" or "gsm"."""
    return torch.from_numpy(np.load(DATA / f"{split}.npz")[name].astype(np.int64))


def text_windows(split: str, name: str, num: int, length: int = 512, offset: int = 0) -> Tensor:
    """Token ids [num, length] of a text, one window after the other."""
    return text_ids(split, name)[offset : offset + num * length].view(num, length)


def calibration_windows(name: str, num: int, length: int = 512, seed: int = 0) -> Tensor:
    """Token ids [num, length] to calibrate on; each seed goes on where the one before ended."""
    ids = text_ids("calibration", name)
    num_there = len(ids) // length
    windows = ids[: num_there * length].view(num_there, length)
    return windows[(seed * num + torch.arange(num)) % num_there]


def mask_tokens(
    ids: Tensor,
    ratio: float | Tensor,
    generator: torch.Generator,
    mask_token: int = MASK_TOKEN,
) -> tuple[Tensor, Tensor]:
    """Mask a random share of the tokens, never the first; returns the new ids and the bool mask."""
    masked = torch.rand(ids.shape, generator=generator) < ratio
    masked[:, 0] = False
    return ids.masked_fill(masked, mask_token), masked


def dllm_calibration_batches(
    num_windows: int, length: int = 512, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Windows of WikiText-2 and GSM8K, half each, with mask ratios uniform in (0.05, 1].

    Another seed takes other windows, as long as there are any: seed 0 the first, seed 1 the next.
    """
    half = num_windows // 2
    wiki = calibration_windows("wiki", num_windows - half, length, seed)
    gsm = calibration_windows("gsm", half, length, seed)
    return masked_calibration_batches(torch.cat([wiki, gsm]), seed)


def masked_calibration_batches(
    windows: Tensor, seed: int, mask_token: int = MASK_TOKEN
) -> list[dict[str, Tensor]]:
    """Windows [num, length], one a batch, each masked at a ratio of its own."""
    collate = MaskCollator(mask_token, seed=seed)
    return [collate(window) for window in windows.split(1)]


# Logits that are held at a time: 268 MB in fp32.
_MAX_LOGITS = 1 << 26


@torch.no_grad()
def score(
    model: Callable[..., Tensor],
    batches: Sequence[Predictions],
    label: str,
    head: Callable[[Tensor], Tensor] | None = None,
    float_rows: Sequence[Tensor] | None = None,
) -> Score:
    """How well a model predicts, and how far its distributions are from the float model's.

    model       inputs by name -> [B, T, D]
    head        [n, D] -> logits [n, V], so that only predicting positions meet the vocabulary;
                None: the model's own output are logits
    float_rows  per batch the float model's output at `where`, [n, D]; None: no KL
    """
    nll = kl = 0.0
    num_right = num_items = num_tokens = 0
    for index, batch in enumerate(tqdm(batches, label, leave=False)):
        rows = model(**batch.inputs).flatten(0, 1)[batch.where]
        wrong = torch.zeros(int(batch.items.max()) + 1, dtype=torch.bool, device=rows.device)
        vocabulary = rows.shape[1] if head is None else head(rows[:1]).shape[1]
        step = max(1, _MAX_LOGITS // vocabulary)
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            log_p = _log_probabilities(rows[chunk], head)
            targets = batch.targets[chunk]
            nll += F.nll_loss(log_p, targets, reduction="sum").item()
            wrong[batch.items[chunk][log_p.argmax(-1) != targets]] = True
            if float_rows is not None:
                kept = float_rows[index][chunk].to(rows.device)
                kl += _kl(_log_probabilities(kept, head), log_p)
        num_items += len(wrong)
        num_right += len(wrong) - int(wrong.sum())
        num_tokens += len(rows)
    distance = None if float_rows is None else kl / num_tokens
    return Score(nll / num_tokens, num_right / num_items, num_items, num_tokens, distance)


def _log_probabilities(rows: Tensor, head: Callable[[Tensor], Tensor] | None) -> Tensor:
    return (rows if head is None else head(rows)).float().log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over the rows of KL(p || q); a token that p excludes adds nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -math.inf, 0).sum().item()


def masked_predictions(
    windows: Tensor,
    ratio: float,
    seed: int = 1,
    batch_size: int = 1,
    mask_token: int = MASK_TOKEN,
    shifted: bool = True,
) -> list[Predictions]:
    """The masked tokens of `windows` [num, length]; shifted: the row at i - 1 is for token i."""
    generator = torch.Generator().manual_seed(seed)
    inputs, masked = mask_tokens(windows, ratio, generator, mask_token)
    triples = zip(*(t.split(batch_size) for t in (windows, inputs, masked)), strict=True)
    batches = []
    for ids, ids_in, mask in triples:
        where = mask.flatten().nonzero()[:, 0]
        targets = ids.flatten()[where]
        items = torch.arange(len(where))
        batches.append(Predictions({"input_ids": ids_in}, where - int(shifted), targets, items))
    return batches


def next_token_predictions(windows: Tensor, batch_size: int = 1) -> list[Predictions]:
    """Every token of `windows` [num, length] but each window's first."""
    batches = []
    for ids in windows.split(batch_size):
        where = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
        items = torch.arange(len(where))
        batches.append(Predictions({"input_ids": ids}, where, ids[:, 1:].flatten(), items))
    return batches


def score_masked_tokens(
    model: Callable[[Tensor], Tensor], windows: Tensor, ratio: float, label: str, seed: int = 1
) -> Score:
    """NLL and accuracy of the masked tokens of `windows` [num, length], one window at a time."""
    # Why by position: with arguments by name Dynamo would compile a second time.
    return score(
        lambda input_ids: model(input_ids), masked_predictions(windows, ratio, seed), label
    )


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
    num: int, tokenizer: Tokenizer, batch_size: int = 8, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Questions with answers, batched by equal length: no padding enters the statistics.

    Each seed goes on where the one before ended, and round to the first after the last.
    """
    data = load_questions("vlm-calibration")
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for i in ((seed * num + n) % len(data) for n in range(num)):
        ids = prompt_ids(data.questions[i], tokenizer) + answer_ids(data.answers[i], tokenizer)
        by_length.setdefault(len(ids), []).append((i, ids))
    batches = []
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            indices, ids = zip(*rows[start : start + batch_size], strict=True)
            batches.append({"input_ids": torch.tensor(ids), "images": data.images[list(indices)]})
    return batches


def score_answers(
    model: Callable[[Tensor, Tensor], Tensor],
    data: Questions,
    tokenizer: Tokenizer,
    label: str,
    batch_size: int = 8,
) -> Score:
    """NLL per answer token and exact match."""
    batches = list(answer_predictions(data, tokenizer, batch_size))
    return score(lambda input_ids, images: model(input_ids, images), batches, label)


def answer_predictions(
    data: Questions, tokenizer: Tokenizer, batch_size: int = 8
) -> Iterator[Predictions]:
    """The tokens of the answers, each answer an item, in batches of one shape: ids [batch_size, VLM_LENGTH].

    Why one shape: every further shape costs a compilation. The last batch is filled up with its own
    first row, which is not scored again. Causal: the padding on the right is not seen.
    """
    for start in range(0, len(data), batch_size):
        part = data.take(list(range(start, min(start + batch_size, len(data)))))
        ids = torch.full((batch_size, VLM_LENGTH), EOS)
        where, items = [], []
        for row, (question, answer) in enumerate(zip(part.questions, part.answers, strict=True)):
            prompt, wanted = prompt_ids(question, tokenizer), answer_ids(answer, tokenizer)
            ids[row, : len(prompt) + len(wanted)] = torch.tensor(prompt + wanted)
            first = row * VLM_LENGTH + len(prompt) - 1
            where += range(first, first + len(wanted))
            items += [row] * len(wanted)
        ids[len(part) :] = ids[0]
        images = part.images[[row if row < len(part) else 0 for row in range(batch_size)]]
        at = torch.tensor(where)
        targets = ids.flatten()[at + 1]
        yield Predictions({"input_ids": ids, "images": images}, at, targets, torch.tensor(items))
