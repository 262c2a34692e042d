"""What does quantisation cost in accuracy? Rows are methods, models are small but real.

    python benchmarks/accuracy.py --quick --out quick.json          a bit of everything, 2 cores
    python benchmarks/accuracy.py --out accuracy.json --device cuda  everything
    python benchmarks/accuracy.py --models dllm --methods default "one type" --formats w4a4
    python benchmarks/accuracy.py --model-id GSAI-ML/LLaDA-8B-Base --kind dllm --mask-token-id 126336 \\
        --text-file test.txt --trust-remote-code --dtype bfloat16 --device cuda

Every row is measured on the real thing: calibrate, save, then in a fresh process load, convert,
torch.compile(backend="freeact") and score on integer codes. `accuracy_methods.py` holds the rows,
`accuracy_models.py` the models with their data, `accuracy_summary.py` what is made of the numbers.

A row goes to the work file (`--parts`) as soon as it is measured, and a later run skips what is
there: same row, sizes and compiler, same source of the package and of the row. So a run can be
killed, or split over processes or machines (`--shard`, each with a work file of its own) and the
work files given together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_hub import KINDS, HubModel
from accuracy_methods import FORMATS, METHODS
from accuracy_models import MODELS, BenchmarkModel, Sizes
from accuracy_scoring import Request, score_folder, source_digest
from accuracy_summary import fill_document, plot, print_summary, read_rows, summarise
from measure import REPOSITORY, environment
from small_models import CACHE
from torch import nn
from tqdm import tqdm

from freeact_fx import QuantConfig
from freeact_fx.predict import ranking_share

QUICK_SIZES = Sizes(
    calibration_windows=8,
    calibration_questions=48,
    windows=2,
    text_windows=8,
    questions=96,
    layer_step=3,
)
QUICK_METHODS = {
    "dllm": ("float", "flatquant-like short", "default", "one type"),
    "vlm": ("float", "default"),
    "smollm2": ("float", "default"),
}


@dataclass(frozen=True)
class Job:
    """One row to be measured."""

    model: str
    method: str
    format: str  # "float" for the method of that name
    seed: int

    def __str__(self) -> str:
        return f"{self.model}, {self.method}, {self.format}, seed {self.seed}"


def jobs_of(
    models: Sequence[str],
    methods: Mapping[str, Sequence[str]],
    formats: Sequence[str],
    seeds: Sequence[int],
    *,
    all_asked_for: bool,
) -> Iterator[Job]:
    """The rows, those of one model together, every method once before any has a second seed.

    methods        names by model
    all_asked_for  False: leave out what METHODS does not give to a model or a format by itself
    """
    for model in models:
        if "float" in methods[model]:
            yield Job(model, "float", "float", 0)
        for format_ in formats:
            for seed in seeds:
                for name in methods[model]:
                    belongs = all_asked_for or METHODS[name].belongs(model, format_)
                    if name != "float" and belongs:
                        yield Job(model, name, format_, seed)


class Benchmark:
    """Measures rows; the float model of the last one stays loaded for the next."""

    def __init__(self, args: argparse.Namespace, hub: HubModel | None, sizes: Sizes) -> None:
        self.args, self.hub, self.sizes = args, hub, sizes
        self._loaded: tuple[str, nn.Module] | None = None
        self._sources = {name: source_digest(name) for name in METHODS}

    def key(self, job: Job) -> dict[str, Any]:
        """What a measured row must agree in to stand for this one."""
        quantised = METHODS[job.method].calibrate is not None
        return {
            **asdict(job),
            "config": self._config(job).digest if quantised else None,
            "sizes": asdict(self.sizes),
            "hub": None if self.hub is None else asdict(self.hub),
            "compiler": self.args.compiler,
            "source": self._sources[job.method],
        }

    def measure(self, job: Job) -> dict[str, Any]:
        """Calibrate, save, score in a fresh process; returns the row.

        Raises SystemExit if the source is no longer what this process imported: a row would be of two.
        """
        if source_digest(job.method) != self._sources[job.method]:
            raise SystemExit(
                "The source has changed since this run was begun. Start it again; rows measured so far "
                "are kept."
            )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if self.args.keep_checkpoints is not None:
                folder = self.args.keep_checkpoints / str(job).replace(", ", "-").replace(" ", "_")
                folder.mkdir(parents=True, exist_ok=True)
            key = self.key(job)
            facts = {} if METHODS[job.method].calibrate is None else self._calibrate(job, folder)
            start = time.perf_counter()
            request = Request(
                model=job.model,
                method=job.method,
                source=key["source"],
                cache=str(self.args.cache),
                device=self.args.device,
                compiler=self.args.compiler,
                sizes=self.sizes,
                hub=self.hub,
                lm_eval=tuple(self.args.lm_eval),
                lm_eval_limit=self.args.lm_eval_limit,
            )
            request.save(folder)
            subprocess.run([sys.executable, __file__, "--score", str(folder)], check=True)
            facts |= json.loads((folder / "score.json").read_text())
            facts["score_s"] = round(time.perf_counter() - start, 1)
        return {**key, **facts, "environment": self._environment()}

    def _calibrate(self, job: Job, folder: Path) -> dict[str, Any]:
        """Save the row's checkpoint in a folder; returns time, storage, plans, and the predictor's share."""
        method, spec = METHODS[job.method], self._spec(job.model)
        assert method.calibrate is not None
        batches = [
            {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            for batch in spec.calibration(self.args.cache, self.sizes, job.seed)
        ]
        model = self._float_model(job.model)
        start = time.perf_counter()
        checkpoint = method.calibrate(model, batches, self._config(job))
        seconds = time.perf_counter() - start
        checkpoint.save(folder)
        num_weights = sum(
            entry.packed.weight.shape[0] * entry.num_features
            for entry in checkpoint.linears.values()
        )
        return {
            "calibrate_s": round(seconds, 1),
            "of_bf16": checkpoint.num_bytes / (2 * num_weights),
            "plans": Counter(group.plan for group in checkpoint.groups.values()),
            "num_groups": len(checkpoint.groups),
            "ranking": None if method.baseline else ranking_share(checkpoint.statistics),
        }

    def _config(self, job: Job) -> QuantConfig:
        types, skip = self._spec(job.model).token_types, self.sizes.skipped_layers
        return METHODS[job.method].config(types, job.format, job.seed, skip)

    def _spec(self, name: str) -> BenchmarkModel:
        return self.hub.benchmark_model() if self.hub else MODELS[name]

    def _float_model(self, name: str) -> nn.Module:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # goes before the next one comes
            self._loaded = (name, self._spec(name).load(self.args.cache).to(self.args.device))
        return self._loaded[1]

    def _environment(self) -> dict[str, Any]:
        facts = {**environment(), "device": self.args.device, "compiler": self.args.compiler}
        if self.args.device != "cpu":
            facts["gpu"] = torch.cuda.get_device_name(self.args.device)
        return facts


def measure_all(benchmark: Benchmark, jobs: Sequence[Job], parts: Sequence[Path]) -> list[Job]:
    """Measure what no work file has, and append it to the first; returns the jobs that failed."""
    measured = [row for file in parts for row in read_rows(file)]
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    failed = []
    bar = tqdm([job for job in jobs if find_row(measured, benchmark.key(job)) is None], unit="row")
    for job in bar:
        bar.set_description_str(str(job))
        try:
            row = benchmark.measure(job)
        except Exception:  # the other rows are worth having
            traceback.print_exc()
            failed.append(job)
            continue
        with parts[0].open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {n: round(v, 4) for n, v in row["metrics"].items() if " " not in n}
        tqdm.write(
            f"{job}: {numbers}, calibrated {row.get('calibrate_s')} s, scored {row['score_s']} s"
        )
    return failed


def find_row(
    rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any], *, any_source: bool = False
) -> Mapping[str, Any] | None:
    """The last row that agrees with the key; `any_source`: of whatever code and compiler."""
    ignored = ("source", "config", "compiler") if any_source else ()
    wanted = {name: value for name, value in key.items() if name not in ignored}
    fitting = (row for row in reversed(rows) if all(row[n] == v for n, v in wanted.items()))
    return next(fitting, None)


def main() -> None:
    args = parse_arguments()
    if args.score is not None:
        score_folder(args.score)
        return
    hub = None
    if args.model_id is not None:
        hub = HubModel(
            args.model_id,
            args.kind,
            args.text_file,
            args.calibration_file,
            args.mask_token_id,
            args.shifted,
            args.dtype,
            args.trust_remote_code,
        )
    models = (
        [args.model_id] if hub else args.models or list(QUICK_METHODS if args.quick else MODELS)
    )
    default = QUICK_METHODS if args.quick and not hub else dict.fromkeys(models, tuple(METHODS))
    methods = {model: args.methods or default[model] for model in models}
    named = args.methods is not None or args.quick
    jobs = list(jobs_of(models, methods, args.formats, args.seeds, all_asked_for=named))
    benchmark = Benchmark(args, hub, chosen_sizes(args))
    mine = jobs[args.shard[0] :: args.shard[1]]
    failed = [] if args.only_measured else measure_all(benchmark, mine, args.parts)
    measured = [row for file in args.parts for row in read_rows(file)]
    found = [find_row(measured, benchmark.key(job), any_source=args.any_source) for job in jobs]
    summary = summarise([row for row in found if row is not None], environment())
    print_summary(summary)
    plot(summary, args.plot)
    print(f"plot: {args.plot}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(summary, indent=1) + "\n")
    if args.docs is not None:
        fill_document(args.docs, summary, {name: method.what for name, method in METHODS.items()})
    if failed:
        sys.exit("failed: " + "; ".join(map(str, failed)))


def chosen_sizes(args: argparse.Namespace) -> Sizes:
    sizes = QUICK_SIZES if args.quick else Sizes()
    given = {name: getattr(args, name) for name in asdict(sizes)}
    return Sizes(**{**asdict(sizes), **{n: v for n, v in given.items() if v is not None}})


def shard(text: str) -> tuple[int, int]:
    """ "I/N" as two numbers, 0 <= I < N."""
    index, num = map(int, text.split("/"))
    if not 0 <= index < num:
        raise ValueError(text)
    return index, num


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS)
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="; ".join(METHODS))
    add("--formats", nargs="+", choices=FORMATS)
    add("--seeds", nargs="+", type=int)
    add("--quick", action="store_true", help="few rows on little data, one seed")
    for name in asdict(Sizes()):
        add(f"--{name.replace('_', '-')}", type=int, help="see accuracy_models.Sizes")
    add("--device", default="cpu", help="cpu or cuda, to calibrate and to score on")
    add("--compiler", choices=("inductor", "eager"), help="eager: the passes without Inductor")
    add("--cache", type=Path, default=CACHE, help="of base models and the float models' rows")
    add("--parts", type=Path, nargs="+", help="work files; the first is appended to")
    add(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="measure every N-th row only, from I on",
    )
    add("--only-measured", action="store_true", help="measure nothing, sum up the work files")
    add(
        "--any-source",
        action="store_true",
        help="sum up rows of older code and of either compiler too",
    )
    add("--keep-checkpoints", type=Path, help="folder; default: they are deleted once scored")
    add("--out", type=Path, help="JSON file")
    add("--plot", type=Path, default=REPOSITORY / "out" / "accuracy.png")
    add("--docs", type=Path, help="Markdown file to write the tables into: docs/accuracy.md")
    add("--score", type=Path, help=argparse.SUPPRESS)
    hub = parser.add_argument_group("any Hugging Face model").add_argument
    hub("--model-id")
    hub("--kind", choices=KINDS)
    hub("--text-file", help="text; for --kind vlm JSON lines with image, question, answer")
    hub("--calibration-file", help="default: the first half of --text-file, and the rest is scored")
    hub("--mask-token-id", type=int)
    hub("--shifted", action="store_true", help="output i - 1 is for token i (Dream), not i (LLaDA)")
    hub("--dtype", default="float32")
    hub("--trust-remote-code", action="store_true")
    hub("--lm-eval", nargs="+", default=(), metavar="TASK", help="needs lm-eval")
    hub("--lm-eval-limit", type=int, help="questions per task")
    args = parser.parse_args()
    if args.model_id is not None and (args.kind is None or args.text_file is None):
        parser.error("--model-id needs --kind and --text-file")
    args.formats = args.formats or (["w4a4"] if args.quick else list(FORMATS))
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.compiler = args.compiler or ("eager" if args.quick else "inductor")
    args.parts = args.parts or [REPOSITORY / "out" / "accuracy.jsonl"]
    return args


if __name__ == "__main__":
    main()
