"""One row's scores, in a process of their own: load, convert, compile, predict.

`accuracy.py` writes a checkpoint and a `request.json` into a folder and starts
`accuracy.py --score FOLDER`, which leaves `score.json` there. Nothing else passes from the process
that calibrated to the one that scores.

Only positions that predict something meet the vocabulary: the head, which is never quantised, is
taken off the model and applied to their rows. The float model's rows are kept in the cache, so that
a KL costs a second softmax and no second model.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_hub import HubModel, lm_eval_scores
from accuracy_methods import METHODS
from accuracy_models import MODELS, BenchmarkModel, Sizes, TestSets
from calibrated import package_sources
from evaluation import Score, score
from measure import relative_error
from safetensors.torch import load_file, save_file
from small_models import locked
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import freeact_fx
from freeact_fx import Checkpoint

HERE = Path(__file__).parent
DATA_SOURCES = ("evaluation.py", "small_models.py", "accuracy_models.py", "accuracy_scoring.py")

Rows = dict[str, list[Tensor]]  # of each test set, per batch [n, D]


@dataclass(frozen=True)
class Request:
    """What a process must know to score a checkpoint; JSON.

    model   name in accuracy_models.MODELS, or what a row of `hub` is called
    source  digest of the code that the row was calibrated with
    """

    model: str
    method: str
    source: str
    cache: str
    device: str
    compiler: str
    sizes: Sizes
    hub: HubModel | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None

    def save(self, folder: Path) -> None:
        (folder / "request.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(folder: Path) -> Request:
        data = json.loads((folder / "request.json").read_text())
        data["sizes"] = Sizes(**data["sizes"])
        data["hub"] = HubModel(**data["hub"]) if data["hub"] else None
        return Request(**data)


def source_digest(method: str) -> str:
    """Digest of the code that a row's numbers come from: the package, the data, and what the method has of its own."""
    names = [*DATA_SOURCES, *METHODS[method].sources]
    digest = hashlib.sha256()
    for file in [*package_sources(), *(HERE / name for name in names)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def score_folder(folder: Path) -> None:
    """Do what `request.json` asks for; write `score.json`."""
    request = Request.load(folder)
    if source_digest(request.method) != request.source:
        raise SystemExit("The source has changed since this row was begun. Start the run again.")
    spec = request.hub.benchmark_model() if request.hub else MODELS[request.model]
    cache, device = Path(request.cache), request.device
    test_sets = {
        name: [batch.to(device) for batch in batches]
        for name, batches in spec.test_sets(cache, request.sizes).items()
    }
    model = spec.load(cache).to(device)
    facts: dict[str, Any] = {}
    options: dict[str, Any] = {"compiler": request.compiler}
    if METHODS[request.method].calibrate is None:
        head = take_head_off(model, test_sets)
        scores = score_sets(model, head, test_sets)
    else:
        float_rows = kept_rows(model, test_sets, cache / "float-rows") if spec.with_kl else {}
        checkpoint = Checkpoint.load(folder)
        freeact_fx.convert(model, checkpoint)
        head = take_head_off(model)
        compiled = torch.compile(model, backend="freeact", dynamic=spec.dynamic, options=options)
        scores = score_sets(compiled, head, test_sets, float_rows)
        report = freeact_fx.explain(compiled)
        facts["quantised"] = f"{len(report.quantized)} of {len(report.linears)} Linears"
    put_head_on(model, head)
    metrics = metrics_of(scores, spec)
    if request.lm_eval:
        if request.hub is None:
            raise SystemExit("--lm-eval: only with --model-id.")
        if METHODS[request.method].calibrate is not None:
            model.compile(backend="freeact", options=options)
        metrics |= lm_eval_scores(model, request.hub, request.lm_eval, request.lm_eval_limit)
    facts["scored"] = {name: s.num_tokens for name, s in scores.items()}
    (folder / "score.json").write_text(json.dumps({"metrics": metrics, **facts}))


def metrics_of(scores: Mapping[str, Score], spec: BenchmarkModel) -> dict[str, float]:
    """Means over the sets, each counting alike; then each set's own, as "METRIC SET"."""
    by_set: dict[str, dict[str, float]] = {}
    for name, s in scores.items():
        by_set[name] = {"nll": s.nll, spec.accuracy: s.accuracy}
        if s.kl is not None:
            by_set[name]["kl"] = s.kl
    names = list(next(iter(by_set.values())))
    metrics = {n: statistics.mean(values[n] for values in by_set.values()) for n in names}
    if not spec.with_kl:
        metrics["perplexity"] = math.exp(metrics["nll"])
    if len(by_set) > 1:
        for name, values in by_set.items():
            metrics |= {f"{n} {name}": value for n, value in values.items()}
    return metrics


def score_sets(
    model: Callable[..., Any],
    head: nn.Module,
    test_sets: TestSets,
    float_rows: Rows | None = None,
) -> dict[str, Score]:
    return {
        name: score(_logits_of(model), batches, name, head, (float_rows or {}).get(name))
        for name, batches in test_sets.items()
    }


def _logits_of(model: Callable[..., Any]) -> Callable[..., Tensor]:
    """The model as a function to its logits, which Hugging Face's have in an output object."""

    def run(**inputs: Tensor) -> Tensor:
        output = model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    return run


# ------------------------------------------------------------------ the float model's rows


@torch.no_grad()
def kept_rows(model: nn.Module, test_sets: TestSets, folder: Path) -> Rows:
    """The float model's rows at the predicting positions, from the folder if they are there.

    They are found again by the test sets and the sums of the model's parameters.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.dtype}{parameter.double().sum():.6e}".encode())
    for batch in (batch for batches in test_sets.values() for batch in batches):
        for tensor in (*batch.inputs.values(), batch.where):
            digest.update(tensor.cpu().numpy().tobytes())
    file = folder / f"{digest.hexdigest()[:16]}.safetensors"
    if not file.exists():
        with locked(folder):
            if not file.exists():
                _make_rows(model, test_sets, file)
    rows = load_file(file)
    return {
        name: [rows[f"{name}/{index}"] for index in range(len(batches))]
        for name, batches in test_sets.items()
    }


def _make_rows(model: nn.Module, test_sets: TestSets, file: Path) -> None:
    head = take_head_off(model, test_sets)
    rows = {
        f"{name}/{index}": _logits_of(model)(**batch.inputs).flatten(0, 1)[batch.where].cpu()
        for name, batches in test_sets.items()
        for index, batch in enumerate(tqdm(batches, f"float, {name}", leave=False))
    }
    put_head_on(model, head)
    unfinished = file.with_suffix(".unfinished")
    save_file(rows, unfinished)
    unfinished.rename(file)


# ------------------------------------------------------------------ the head


def take_head_off(model: nn.Module, test_sets: TestSets | None = None) -> nn.Module:
    """Replace the output embeddings by an identity and return them.

    test_sets  given: check on a batch that both together still do what the model did, and raise
               SystemExit if not (some models scale or cap their logits)
    """
    owner, name = _place_of_head(model)
    head = getattr(owner, name)
    if test_sets is None:
        setattr(owner, name, nn.Identity())
        return head
    batch = next(iter(test_sets.values()))[0]
    with torch.no_grad():
        want = _logits_of(model)(**batch.inputs).flatten(0, 1)[batch.where[:64]]
        setattr(owner, name, nn.Identity())
        got = head(_logits_of(model)(**batch.inputs).flatten(0, 1)[batch.where[:64]])
    finite = want.isfinite()
    if (error := relative_error(got[finite], want[finite])) > 1e-3:
        raise SystemExit(
            f"{type(model).__name__}: does more to its logits than its head does (relative "
            f"difference {error:.1e}), so they cannot be scored by rows."
        )
    return head


def put_head_on(model: nn.Module, head: nn.Module) -> None:
    """Undo `take_head_off`."""
    owner, name = _place_of_head(model)
    setattr(owner, name, head)


def _place_of_head(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the output embeddings, or what replaces them, and under which name."""
    for owner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        head = owner.get_output_embeddings()
        for module in owner.modules() if head is not None else ():
            for name, child in module.named_children():
                if child is head:
                    return module, name
    raise SystemExit(f"{type(model).__name__}: get_output_embeddings() finds no head.")
