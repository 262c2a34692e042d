"""Any Hugging Face model in the accuracy benchmark, and its converted form in lm-eval.

The same calibration, scoring and rows as for the models of this repository; only the data are
yours: a text file, cut into windows, or for a vision-language model a file of JSON lines::

    {"image": "pictures/1.png", "question": "How many apples are there?", "answer": "Three"}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_models import MASK_RATIOS, Batches, BenchmarkModel, Sizes, TestSets, windows_of
from evaluation import (
    Predictions,
    masked_calibration_batches,
    masked_predictions,
    next_token_predictions,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from freeact_fx import TokenTypes

KINDS = ("causal", "dllm", "vlm")


@dataclass(frozen=True)
class HubModel:
    """A model id with all that its configuration does not say.

    calibration_file  None: the first half of text_file, and the second half is scored
    shifted           masked diffusion: the output at i - 1 is for token i (Dream), not for i (LLaDA)
    dtype             of the float model, "float32", "bfloat16" ...
    """

    model_id: str
    kind: str
    text_file: str
    calibration_file: str | None = None
    mask_token_id: int | None = None
    shifted: bool = False
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.kind == "dllm" and self.mask_token_id is None:
            raise SystemExit("--kind dllm: --mask-token-id is needed, the id of [MASK].")

    def benchmark_model(self) -> BenchmarkModel:
        return BenchmarkModel(
            self._token_types(),
            lambda cache: self.load(),
            lambda cache, sizes, seed: self._calibration(sizes, seed),
            lambda cache, sizes: self._test_sets(sizes),
            accuracy="exact_match" if self.kind == "vlm" else "accuracy",
            with_kl=self.kind != "causal",
            dynamic=None,
        )

    def _token_types(self) -> TokenTypes:
        if self.kind == "dllm":
            assert self.mask_token_id is not None
            return TokenTypes.mask_token(self.mask_token_id)
        if self.kind == "causal":
            return TokenTypes.single()
        return TokenTypes.from_config(self.obtain(AutoConfig))

    def obtain(self, auto: Any, **options: Any) -> Any:
        remote = {"trust_remote_code": True} if self.trust_remote_code else {}
        return auto.from_pretrained(self.model_id, **remote, **options)

    def load(self) -> PreTrainedModel:
        config = self.obtain(AutoConfig)
        auto: Any = AutoModelForImageTextToText if self.kind == "vlm" else AutoModelForCausalLM
        if "AutoModel" in getattr(config, "auto_map", {}):  # Dream's code declares nothing else
            auto = AutoModel
        model = self.obtain(auto, dtype=getattr(torch, self.dtype))
        model.config.use_cache = False
        return model.eval().requires_grad_(False)

    # ------------------------------------------------------------------ text

    def _windows(self, *, to_calibrate: bool) -> Tensor:
        """All windows of the part to calibrate on or to score, [num, WINDOW]."""
        tokenizer = self.obtain(AutoTokenizer)
        file = self.calibration_file if to_calibrate and self.calibration_file else self.text_file
        text = Path(file).read_text()
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
        ids = tokens["input_ids"][0]
        if self.calibration_file is None:
            ids = ids[: len(ids) // 2] if to_calibrate else ids[len(ids) // 2 :]
        windows = windows_of(ids, len(ids), tokenizer.bos_token_id)
        if not len(windows):
            raise SystemExit(f"{file}: {len(ids)} tokens are no window. Give a longer text.")
        return windows

    def _calibration(self, sizes: Sizes, seed: int) -> Batches:
        if self.kind == "vlm":
            return self._answer_inputs(sizes, seed)
        there, num = self._windows(to_calibrate=True), sizes.calibration_windows
        windows = there[(seed * num + torch.arange(min(num, len(there)))) % len(there)]
        if self.kind == "dllm":
            assert self.mask_token_id is not None
            return masked_calibration_batches(windows, seed, self.mask_token_id)
        return [{"input_ids": window} for window in windows.split(1)]

    def _test_sets(self, sizes: Sizes) -> TestSets:
        if self.kind == "vlm":
            return {"answers": self._answers(self.text_file)[: sizes.questions]}
        windows = self._windows(to_calibrate=False)
        if self.kind == "causal":
            return {"text": next_token_predictions(windows[: sizes.text_windows])}
        assert self.mask_token_id is not None
        windows = windows[: sizes.windows]
        return {
            f"text {ratio}": masked_predictions(
                windows, ratio, mask_token=self.mask_token_id, shifted=self.shifted
            )
            for ratio in MASK_RATIOS
        }

    # ------------------------------------------------------------------ pictures

    def _answer_inputs(self, sizes: Sizes, seed: int) -> Batches:
        if self.calibration_file is None:
            raise SystemExit(
                "--kind vlm: --calibration-file is needed, JSON lines like --text-file."
            )
        there, num = self._answers(self.calibration_file), sizes.calibration_questions
        order = (seed * num + torch.arange(min(num, len(there)))) % len(there)
        return [there[i].inputs for i in order.tolist()]

    def _answers(self, file: str) -> list[Predictions]:
        """One batch per question: pictures of different sizes go into no common one."""
        processor = self.obtain(AutoProcessor)
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        return [self.answer(line, Path(file).parent, processor) for line in lines]

    def answer(self, line: dict[str, str], folder: Path, processor: Any) -> Predictions:
        picture = {"type": "image", "path": str(folder / line["image"])}
        content = [picture, {"type": "text", "text": line["question"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokenizer = processor.tokenizer
        wanted = tokenizer(line["answer"], add_special_tokens=False)["input_ids"]
        answer = torch.tensor([*wanted, tokenizer.eos_token_id])
        shape = prompt["input_ids"].shape
        extensions = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        inputs = {}
        for name, tensor in prompt.items():
            extension = extensions.get(name, torch.zeros_like(answer))
            by_token = tensor.shape == shape  # not pixels
            inputs[name] = (
                torch.cat([tensor, extension.to(tensor)[None]], 1) if by_token else tensor
            )
        where = shape[1] - 1 + torch.arange(len(answer))
        return Predictions(inputs, where, answer, torch.zeros_like(answer))


def lm_eval_scores(
    model: nn.Module, hub: HubModel, tasks: Sequence[str], limit: int | None = None
) -> dict[str, float]:
    """Run lm-eval tasks on a model whose forward is compiled in place (`model.compile(...)`).

    limit  questions per task; None: all

    Returns "lm_eval TASK METRIC" -> value. Raises SystemExit if lm-eval is missing or has no model
    class of the kind.
    """
    if hub.kind == "dllm":
        raise SystemExit(
            "--lm-eval: it has no model class for masked diffusion. Score a --text-file, or a model "
            "of --kind causal or vlm."
        )
    try:
        import lm_eval

        if hub.kind == "vlm":
            from lm_eval.models.hf_vlms import HFMultimodalLM

            # Why no processor of ours: it would be taken for the tokenizer, and its own stay unset.
            wrapped = HFMultimodalLM(pretrained=model, trust_remote_code=hub.trust_remote_code)
        else:
            from lm_eval.models.huggingface import HFLM

            wrapped = HFLM(pretrained=model, tokenizer=hub.obtain(AutoTokenizer))
    except ImportError as error:
        raise SystemExit(
            f"--lm-eval: {error}. pip install lm-eval; it is no dependency."
        ) from error
    scores = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), limit=limit)["results"]
    return {
        f"lm_eval {task} {metric.removesuffix(',none')}": value
        for task, values in scores.items()
        for metric, value in values.items()
        if isinstance(value, float) and "stderr" not in metric
    }
