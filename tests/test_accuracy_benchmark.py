"""The accuracy benchmark: what is predicted where, scores by rows, and what is made of measured rows."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import accuracy
import accuracy_models
import accuracy_scoring
import evaluation
import numpy as np
import pytest
import torch
from accuracy_hub import HubModel, lm_eval_scores
from accuracy_methods import METHODS
from accuracy_models import TEXTS
from accuracy_scoring import Request, put_head_on, take_head_off
from accuracy_summary import (
    extended,
    fill_document,
    gap_closed,
    headlines,
    metric_by_seed,
    plot,
    read_rows,
    summarise,
    tables,
)
from evaluation import (
    Predictions,
    load_questions,
    masked_predictions,
    next_token_predictions,
    score,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def row(
    model: str, method: str, seed: int = 0, format_: str = "w4a4", **fields: Any
) -> dict[str, Any]:
    fields = {"ranking": 0.25, "num_groups": 120, **fields}
    metrics = {name: fields.pop(name) for name in ("nll", "kl", "exact_match") if name in fields}
    key = {"model": model, "method": method, "format": format_, "seed": seed, "compiler": "eager"}
    rest = {"environment": {"cpu": "a"}, "scored": {"wiki": 6, "gsm": 4}, "score_s": 600.0}
    return {**key, "metrics": metrics, **rest, **fields}


def of_float(model: str, nll: float) -> dict[str, Any]:
    return row(model, "float", format_="float", nll=nll)


DLLM = [
    of_float("dllm", 2.0),
    row("dllm", "default", 0, nll=2.1, kl=0.05),
    row("dllm", "default", 1, nll=2.2, kl=0.06),
    row("dllm", "flatquant-like", 0, nll=2.4, kl=0.20),
    row("dllm", "flatquant-like", 1, nll=2.4, kl=0.20),
]


# ------------------------------------------------------------------ from rows to numbers


def test_gap_closed_is_a_ratio_of_gaps_averaged_over_seeds() -> None:
    closed = gap_closed(DLLM, "dllm", "default", "flatquant-like")
    assert closed["nll"] == pytest.approx(1 - 0.15 / 0.4)
    assert closed["kl"] == pytest.approx(1 - 0.055 / 0.2)
    # Per seed 0.75 and 0.5 in NLL, 0.75 and 0.7 in KL.
    assert closed["nll_spread"] == pytest.approx(0.25 / math.sqrt(2))
    assert closed["kl_spread"] == pytest.approx(0.05 / math.sqrt(2))
    assert closed["spread"] == closed["nll_spread"]
    assert closed["against"] == "flatquant-like"
    assert gap_closed(DLLM, "dllm", "default", "not measured", "flatquant-like") == closed


def test_gap_closed_takes_only_seeds_that_both_have() -> None:
    closed = gap_closed(DLLM[:4], "dllm", "default", "flatquant-like")
    assert closed["nll"] == pytest.approx(0.75)
    assert closed["nll_spread"] is None


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([r for r in DLLM if r["method"] != "float"], {"kl"}),
        ([r for r in DLLM if r["method"] != "flatquant-like"], set()),
        ([of_float("dllm", 2.5), *DLLM[1:]], {"kl"}),
    ],
    ids=["no float row, no NLL gap", "nothing to compare with", "no gap to close"],
)
def test_gap_closed_without_a_gap(rows: list[dict[str, Any]], what: set[str]) -> None:
    assert gap_closed(rows, "dllm", "default", "flatquant-like").keys() & {"nll", "kl"} == what


def test_summary_has_the_promised_keys() -> None:
    rows = [
        *DLLM,
        row("dllm", "one type", 0, nll=2.2, kl=0.08),
        row("dllm", "all plans measured", 0, nll=2.1, ranking=1.0, num_groups=120),
        row("smollm2", "default", 0, nll=3.1, ranking=0.5, num_groups=40),
        of_float("vlm", 0.08),
        row("vlm", "default", 0, nll=0.09, exact_match=0.9),
        row("vlm", "default", 1, nll=0.11, exact_match=0.9),
        row("vlm", "default", 0, "w4a8", nll=5.0, exact_match=0.9, calibrate_s=7.0),
    ]
    summary = summarise(rows, {"torch": "2"})
    assert json.loads(json.dumps(summary)) == summary
    measured = {"cpu": "a", "num_rows": 12, "hours": 2.0}
    assert summary["environment"] == {"torch": "2", "measured": [measured]}
    assert {tuple(result) for result in summary["results"]} == {
        ("model", "method", "format", "seed", "metric", "value")
    }
    assert {"nll", "kl", "exact_match", "calibrate_s", "score_s"} == {
        r["metric"] for r in summary["results"]
    }
    assert summary["gap_closed"].keys() == {"dllm"}
    assert summary["types_alone"]["dllm"]["nll"] == pytest.approx(0.5)
    assert summary["types_alone"]["dllm"]["kl"] == pytest.approx(1 - 0.05 / 0.08)
    assert summary["tokens_scored"] == {"dllm": 10, "smollm2": 10, "vlm": 10}
    assert summary["vlm_dnll"] == pytest.approx(0.02)
    ranking = {"dllm": 1.0, "smollm2": 0.5, "vlm": 0.25}
    assert summary["predictor_ranking"] == {**ranking, "all": (120 + 20 + 2 * 30) / 400}


def test_two_compilers_are_one_row_and_a_comparison() -> None:
    again = {**row("dllm", "default", 1, nll=2.3, kl=0.06), "compiler": "inductor"}
    summary = summarise([*DLLM, again], {})
    assert summary["results"] == summarise(DLLM, {})["results"]
    key = {"model": "dllm", "method": "default", "format": "w4a4", "seed": 1}
    assert summary["compilers"] == [{**key, "nll": {"eager": 2.2, "inductor": 2.3}}]
    line = "NLL under both compilers, dllm W4A4, default, seed 1: eager 2.2000, inductor 2.3000"
    assert line in headlines(summary)


def test_rows_stand_beside_those_of_an_earlier_summary() -> None:
    methods = ["float", "default", "flatquant-like"]
    together = summarise(DLLM, {"torch": "3"})
    earlier, later = summarise(DLLM[:4], {"torch": "2"}), summarise(DLLM[4:], {"torch": "3"})
    both = extended(earlier, later, methods)
    both["environment"]["measured"] = together["environment"]["measured"]
    assert both == together
    assert len(extended(earlier, later, methods)["environment"]["measured"]) == 2
    again = summarise([row("dllm", "default", 0, nll=2.0, kl=0.01)], {})
    closed = extended(together, again, methods)["gap_closed"]["dllm"]
    assert closed["nll"] == pytest.approx(1 - 0.1 / 0.4)


def test_table_shows_mean_and_spread_of_each_method() -> None:
    rows = tables(summarise(DLLM, {}))["dllm", "w4a4"]
    assert rows[0] == ["method", "NLL", "above float", "KL to float", "score, s"]
    assert rows[1] == ["float", "2.0000", "", "", "600"]
    assert rows[2] == ["default", "2.1500 ± 0.0707", "0.1500 ± 0.0707", "0.0550 ± 0.0071", "600"]
    rows = tables(summarise(DLLM[1:], {}))["dllm", "w4a4"]
    assert rows[0] == ["method", "NLL", "KL to float", "score, s"]  # above what?


def test_document_keeps_what_is_outside_the_marks(tmp_path: Path) -> None:
    file = tmp_path / "doc.md"
    marks = "<!-- begin {0} -->\nold\n<!-- end {0} -->\n"
    file.write_text("prose\n" + marks.format("dllm w4a4") + "more\n" + marks.format("vlm w4a4"))
    fill_document(file, summarise(DLLM, {}), {"default": "ours"})
    text = file.read_text()
    assert text.startswith(
        "prose\n<!-- begin dllm w4a4 -->\n| method | NLL | above float | KL to float | score, s |\n|---|"
    )
    assert "| default | 2.1500 ± 0.0707 | 0.1500 ± 0.0707 | 0.0550 ± 0.0071 | 600 |\n" in text
    assert text.endswith("more\n" + marks.format("vlm w4a4"))


@pytest.mark.parametrize("methods", [None, ("float", "default")], ids=["all", "without a baseline"])
def test_plot_is_a_picture(tmp_path: Path, methods: tuple[str, ...] | None) -> None:
    rows = [row for row in DLLM if methods is None or row["method"] in methods]
    plot(summarise(rows, {}), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ the work file


def test_an_unfinished_last_line_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_rows(file) == [{"a": 1}, {"a": 2}]
    file.write_text('{"a": \n{"a": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_rows(file)


def test_types_alone_are_measured_at_the_same_bytes() -> None:
    rows = [*DLLM, row("dllm", "one type", 0, nll=2.5, kl=0.5)]
    assert summarise(rows, {})["types_alone"]["dllm"]["against"] == "one type"
    rows.append(row("dllm", "one type, same bytes", 0, nll=2.2, kl=0.1))
    alone = summarise(rows, {})["types_alone"]["dllm"]
    assert alone["against"] == "one type, same bytes"
    assert (alone["nll"], alone["kl"]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_row_stands_only_for_its_own_key() -> None:
    old = {"model": "dllm", "seed": 0, "source": "a", "config": "c", "value": 1}
    rows = [old, old | {"value": 2}, old | {"source": "b", "value": 3}]
    key = {"model": "dllm", "seed": 0, "source": "a", "config": "c"}
    assert accuracy.find_row(rows, key) == rows[1]
    assert accuracy.find_row(rows, key | {"source": "new"}) is None
    assert accuracy.find_row(rows, key | {"source": "new"}, any_source=True) == rows[2]
    assert accuracy.find_row(rows, key | {"seed": 1}, any_source=True) is None


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("rtn", "baselines.py"),
        ("flatquant-like", "decoder_layers.py"),
        ("sensitivity", "sensitivity.py"),
        ("refit on the quantised stream", "quantised_stream.py"),
        ("refit on the quantised stream", "decoder_layers.py"),
    ],
)
def test_the_source_of_a_row_has_the_files_of_its_method(
    method: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for original in accuracy_scoring.HERE.glob("*.py"):
        (tmp_path / original.name).write_bytes(original.read_bytes())
    monkeypatch.setattr(accuracy_scoring, "HERE", tmp_path)
    before = {name: accuracy_scoring.source_digest(name) for name in (method, "default")}
    (tmp_path / file).write_text("changed")
    after = {name: accuracy_scoring.source_digest(name) for name in before}
    assert after[method] != before[method]
    assert after["default"] == before["default"]


def test_a_run_stops_when_its_source_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "source_digest", lambda method: "before")
    benchmark = accuracy.Benchmark(Namespace(), None, accuracy.Sizes())
    monkeypatch.setattr(accuracy, "source_digest", lambda method: "after")
    with pytest.raises(SystemExit, match="source has changed"):
        benchmark.measure(accuracy.Job("dllm", "default", "w4a4", 0, "eager"))


def test_every_method_has_a_legal_config() -> None:
    types = accuracy.MODELS["dllm"].token_types
    for method in METHODS.values():
        for format_ in accuracy.FORMATS:
            assert method.config(types, format_, seed=3).seed == 3
    one, default = (METHODS[n].config(types, "w4a4", 0) for n in ("one type", "default"))
    assert (one.num_types, default.num_types) == (1, 3)
    assert one.memory_budget == default.memory_budget <= 1.25


# ------------------------------------------------------------------ predictions and scores


def test_masked_positions_predict_what_was_there() -> None:
    windows = torch.randint(20, VOCABULARY, (4, 16))
    for shifted in (True, False):
        batches = masked_predictions(windows, 0.4, batch_size=2, mask_token=3, shifted=shifted)
        assert len(batches) == 2
        for batch, originals in zip(batches, windows.split(2), strict=True):
            ids = batch.inputs["input_ids"]
            assert (ids.flatten()[batch.where + int(shifted)] == 3).all()
            assert len(batch.where) == (ids == 3).sum() > 0
            assert torch.equal(originals.flatten()[batch.where + int(shifted)], batch.targets)
            assert not (ids[:, 0] == 3).any()


def test_next_tokens_are_predicted_within_their_window() -> None:
    windows = torch.arange(12).view(3, 4)
    first, second = next_token_predictions(windows, batch_size=2)
    assert first.where.tolist() == [0, 1, 2, 4, 5, 6]
    assert first.targets.tolist() == [1, 2, 3, 5, 6, 7]
    assert second.targets.tolist() == [9, 10, 11]


def random_batch(items: list[int]) -> Predictions:
    ids = torch.randint(0, VOCABULARY, (2, 8))
    where = torch.randperm(16)[: len(items)]
    targets = torch.randint(0, VOCABULARY, (len(items),))
    return Predictions({"input_ids": ids}, where, targets, torch.tensor(items))


def test_scores_by_rows_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head on chosen rows, in chunks, a token that can never be predicted, two models apart."""
    embedding = torch.nn.Embedding(VOCABULARY, 5)
    head = torch.nn.Linear(5, VOCABULARY)
    head.bias.data[7] = -math.inf
    batches = [random_batch(list(range(9))), random_batch(list(range(4)))]
    for batch in batches:
        batch.targets[batch.targets == 7] = 8
    log_p, log_q, targets, float_rows = [], [], [], []
    for batch in batches:
        rows = embedding(batch.inputs["input_ids"]).flatten(0, 1)[batch.where].detach()
        float_rows.append(rows + 0.3 * torch.randn_like(rows))
        log_q.append(head(rows).log_softmax(-1))
        log_p.append(head(float_rows[-1]).log_softmax(-1))
        targets.append(batch.targets)
    p, q, target = torch.cat(log_p), torch.cat(log_q), torch.cat(targets)
    possible = torch.arange(VOCABULARY) != 7
    kl = (p.exp() * (p - q))[:, possible].sum(1).mean()
    for limit in (1 << 26, 3 * VOCABULARY):
        monkeypatch.setattr(evaluation, "_MAX_LOGITS", limit)
        got = score(lambda input_ids: embedding(input_ids), batches, "", head, float_rows)
        assert got.num_scored == got.num_tokens == 13
        assert got.nll == pytest.approx(-q[torch.arange(13), target].mean().item(), rel=1e-5)
        assert got.accuracy == pytest.approx((q.argmax(-1) == target).float().mean().item())
        assert got.kl == pytest.approx(kl.item(), rel=1e-5)
        same = score(lambda input_ids: head(embedding(input_ids)), batches, "")
        assert same.nll == pytest.approx(got.nll, rel=1e-5)
        assert (same.accuracy, same.kl) == (got.accuracy, None)


def test_an_item_is_right_if_all_its_tokens_are() -> None:
    batch = random_batch([0, 0, 1, 1, 2])
    logits = torch.nn.functional.one_hot(batch.targets, VOCABULARY).float()
    logits[1] = -logits[1]  # the second token of item 0
    output = torch.zeros(16, VOCABULARY)
    output[batch.where] = logits
    got = score(lambda input_ids: output.view(2, 8, VOCABULARY), [batch], "")
    assert (got.accuracy, got.num_scored, got.num_tokens) == (2 / 3, 3, 5)


def test_the_head_comes_off_and_on() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    batch = random_batch(list(range(6)))
    before = model(**batch.inputs).logits
    head = take_head_off(model, {"set": [batch]})
    assert model(**batch.inputs).logits.shape == (2, 8, 32)
    put_head_on(model, head)
    torch.testing.assert_close(model(**batch.inputs).logits, before)


def test_capped_logits_cannot_be_scored_by_rows() -> None:
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.05)
    with pytest.raises(SystemExit, match="does more to its logits than its head"):
        take_head_off(Gemma2ForCausalLM(config).eval(), {"set": [random_batch([0, 1])]})


# ------------------------------------------------------------------ calibration and test data


def runs_of(ids: torch.Tensor, length: int) -> np.ndarray:
    """A 64-bit hash of every `length` (a power of two) tokens in a row, wherever they begin."""
    hashes = ids.numpy().astype(np.uint64) + np.uint64(1)
    joined = 1
    while joined < length:
        base = np.uint64(pow(0x9E3779B97F4A7C15, joined, 1 << 64))
        hashes = hashes[:-joined] * base + hashes[joined:]
        joined *= 2
    return hashes


def test_a_shared_run_of_tokens_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(0, 50000, (2, 3000), generator=generator)
    assert not np.intersect1d(runs_of(one, 64), runs_of(other, 64)).size
    other[1501:1565] = one[77:141]
    assert np.intersect1d(runs_of(one, 64), runs_of(other, 64)).tolist() == [runs_of(one, 64)[77]]


def test_no_text_to_calibrate_on_is_scored() -> None:
    """Not even 64 tokens in a row, an eighth of a window."""
    to_calibrate, scored = (
        np.concatenate([runs_of(evaluation.text_ids(split, text), 64) for text in TEXTS])
        for split in ("calibration", "evals")
    )
    assert min(len(to_calibrate), len(scored)) > 500_000
    assert not np.intersect1d(to_calibrate, scored).size


def test_no_picture_to_calibrate_on_is_scored() -> None:
    to_calibrate, scored = (
        {hashlib.sha256(image.numpy()).digest() for image in load_questions(split).images}
        for split in ("vlm-calibration", "vlm-validation")
    )
    assert (len(to_calibrate), len(scored)) == (600, 2000)
    assert not to_calibrate & scored


@pytest.mark.parametrize(
    ("model", "to_calibrate", "scored"),
    [
        ("dllm", "calibration", "evals"),
        ("smollm2", "calibration", "evals"),
        ("vlm", "vlm-calibration", "vlm-validation"),
    ],
)
def test_each_reads_its_own_file(
    model: str, to_calibrate: str, scored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    load = np.load

    def watched(file: Path) -> Any:
        read.add(file.stem)
        return load(file)

    monkeypatch.setattr(np, "load", watched)
    monkeypatch.setattr(accuracy_models, "load_tokenizer", lambda cache: Words())
    spec = accuracy.MODELS[model]
    sizes = accuracy.Sizes(2, 2, windows=1, text_windows=1, questions=1)
    spec.calibration(tmp_path, sizes, 0)
    assert read == {to_calibrate}
    read.clear()
    spec.test_sets(tmp_path, sizes)
    assert read == {scored}


# ------------------------------------------------------------------ any Hugging Face model


class Words:
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [20, 21]}


class Processor:
    """Stands for a vision-language model's: two image tokens, a question of three, two patches."""

    tokenizer = Words()

    def apply_chat_template(self, chat: Any, **options: Any) -> dict[str, torch.Tensor]:
        (turn,) = chat
        assert [part["type"] for part in turn["content"]] == ["image", "text"]
        return {
            "input_ids": torch.tensor([[4, 4, 10, 11, 12]]),
            "attention_mask": torch.ones(1, 5, dtype=torch.int64),
            "mm_token_type_ids": torch.tensor([[1, 1, 0, 0, 0]]),
            "pixel_values": torch.rand(2, 5),
        }


def test_an_answer_is_appended_to_every_input_that_goes_by_token() -> None:
    hub = HubModel("a model", "vlm", "questions.jsonl")
    line = {"image": "1.png", "question": "What?", "answer": "That"}
    batch = hub.answer(line, Path("folder"), Processor())
    assert batch.inputs["input_ids"].tolist() == [[4, 4, 10, 11, 12, 20, 21, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 8]
    assert batch.inputs["mm_token_type_ids"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.inputs["pixel_values"].shape == (2, 5)
    assert batch.where.tolist() == [4, 5, 6]
    assert batch.targets.tolist() == [20, 21, 2]
    assert batch.items.tolist() == [0, 0, 0]


def test_lm_eval_gets_the_float_model_with_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores by rows need it off; a task needs logits."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(str(i % VOCABULARY) for i in range(4 * 512)))
    hub = HubModel(str(tmp_path / "model"), "causal", str(tmp_path / "text.txt"))

    def task(model: Any, *_: Any) -> dict[str, float]:
        return {"lm_eval has a head": float(isinstance(model.lm_head, torch.nn.Linear))}

    monkeypatch.setattr(accuracy_scoring, "lm_eval_scores", task)
    request = Request(
        "a model",
        "float",
        accuracy_scoring.source_digest("float"),
        str(tmp_path),
        "cpu",
        "eager",
        accuracy.Sizes(text_windows=1),
        hub,
        ("task",),
    )
    request.save(tmp_path)
    accuracy_scoring.score_folder(tmp_path)
    metrics = json.loads((tmp_path / "score.json").read_text())["metrics"]
    assert metrics["lm_eval has a head"] == 1


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", ["causal", "vlm"])
def test_lm_eval_may_run_the_code_of_a_model_if_you_may(
    kind: str, trust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of its tokenizer or processor. lm_eval is a stand-in."""
    loaded: dict[str, Any] = {}

    def wrap(**arguments: Any) -> dict[str, Any]:
        return arguments

    def evaluate(wrapped: Any, tasks: list[str], limit: int) -> Any:
        assert wrapped["pretrained"] is model
        assert (tasks, limit) == (["some task"], 3)
        loaded.update(wrapped)
        metrics = {"alias": "some task", "acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": {"some task": metrics}}

    def tokenizer(model_id: str, **options: Any) -> tuple[str, dict[str, Any]]:
        return model_id, options

    for name, contents in {
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": wrap},
        "lm_eval.models.hf_vlms": {"HFMultimodalLM": wrap},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    model = torch.nn.Identity()
    hub = HubModel("a model", kind, "text.txt", trust_remote_code=trust)
    assert lm_eval_scores(model, hub, ["some task"], 3) == {"lm_eval some task acc": 0.5}
    if kind == "vlm":
        assert loaded == {"pretrained": model, "trust_remote_code": trust}
    else:
        assert loaded["tokenizer"] == ("a model", {"trust_remote_code": True} if trust else {})


def test_lm_eval_has_no_masked_diffusion() -> None:
    hub = HubModel("a model", "dllm", "text.txt", mask_token_id=3)
    with pytest.raises(SystemExit, match="no model class for masked diffusion"):
        lm_eval_scores(torch.nn.Identity(), hub, ["hellaswag"])


def test_lm_eval_is_no_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        lm_eval_scores(torch.nn.Identity(), HubModel("a model", "causal", "text.txt"), ["arc_easy"])


def test_a_masked_model_needs_its_mask() -> None:
    with pytest.raises(SystemExit, match="--mask-token-id is needed"):
        HubModel("a model", "dllm", "text.txt")


# ------------------------------------------------------------------ the whole walk


def save_tiny_model(folder: Path) -> None:
    """A random Llama with a tokenizer whose words are numbers."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = {str(i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)


def test_any_model_id_through_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrate, save, load elsewhere, convert, compile, score, sum up. Slow: two processes import torch."""
    save_tiny_model(tmp_path / "model")
    words = torch.randint(0, VOCABULARY - 1, (4 * 512,)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(map(str, words)))
    command = (
        f"accuracy.py --model-id {tmp_path}/model --kind dllm --mask-token-id {VOCABULARY - 1} "
        f"--text-file {tmp_path}/text.txt --methods float default --formats w4a8 --seeds 0 "
        f"--compiler eager --workers 2 --calibration-windows 2 --windows 2 --layer-step 2 --cache {tmp_path}/cache "
        f"--parts {tmp_path}/rows.jsonl --plot {tmp_path}/plot.png --out {tmp_path}/out.json"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    accuracy.main()
    rows = read_rows(tmp_path / "rows.jsonl")
    of_method = {r["method"]: r for r in rows}  # in the order in which they were finished
    assert of_method.keys() == {"float", "default"}
    assert of_method["default"]["quantised"] == "7 of 14 Linears"  # one of two layers
    summary = json.loads((tmp_path / "out.json").read_text())
    model = f"{tmp_path}/model"
    found = {r["metric"]: r["value"] for r in summary["results"] if r["method"] == "default"}
    assert found["nll text 0.6"] > 0
    assert 0 < found["kl"] < 0.01
    before = metric_by_seed(rows, model, "float", "float", "nll")[0]
    assert abs(found["nll"] - before) < 0.01
    accuracy.main()  # everything is there: nothing is measured again
    assert len(read_rows(tmp_path / "rows.jsonl")) == 2
