"""What does quantisation cost in accuracy? Rows are methods, models are small but real.

    python benchmarks/accuracy.py --quick --out quick.json          a bit of everything, 2 cores
    python benchmarks/accuracy.py --out accuracy.json --device cuda --calibrate-on cpu --workers 8    everything
    python benchmarks/accuracy.py --set headlines --deadline 3600   what matters most, in an hour
    python benchmarks/accuracy.py --models dllm --methods default "one type" --formats w4a4
    python benchmarks/accuracy.py --model-id GSAI-ML/LLaDA-8B-Base --kind dllm --mask-token-id 126336 \\
        --text-file test.txt --trust-remote-code --dtype bfloat16 --device cuda

Every row is measured on the real thing: calibrate, save, then in a fresh process load, convert,
torch.compile(backend="freeact") and score on integer codes. `accuracy_methods.py` holds the methods,
`accuracy_models.py` the models with their data, `accuracy_jobs.py` which rows are measured in which
order, `accuracy_workers.py` the processes that do it, `accuracy_summary.py` what is made of the
numbers.

A row goes to the work file (`--parts`) as soon as it is measured, and a later run skips what is
there: same row, sizes and compiler, same source of the package and of the row. So a run can be
killed, or its rows (`--set`, `--models`, `--seeds`, `--jobs` and so on) divided among machines, each
with a work file of its own, and the work files given together.

Calibration in closed form is many small operations: several processes on one GPU wait for each
other, while two cores each are enough. So with GPUs give `--calibrate-on cpu` and half as many workers
as there are cores; only rows that learn are then calibrated on a GPU, and all are scored there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accuracy_hub import KINDS, HubModel
from accuracy_jobs import BASIC, COMPILERS, OURS, SETS, Job, Rows, jobs_of, read_jobs
from accuracy_methods import FORMATS, METHODS
from accuracy_models import MODELS, BenchmarkModel, Sizes
from accuracy_scoring import Request, score_folder, source_digest
from accuracy_summary import (
    extended,
    fill_document,
    find_row,
    plot,
    print_summary,
    read_rows,
    summarise,
)
from accuracy_workers import Worker, gpus_of_workers, measure_all, place_to_score
from measure import REPOSITORY, environment
from small_models import CACHE
from torch import nn

from freeact_fx import QuantConfig
from freeact_fx.predict import ranking_share

QUICK_SIZES = Sizes(
    calibration_windows=8,
    calibration_questions=24,
    windows=1,
    text_windows=3,
    questions=32,
    layer_step=6,
)
QUICK_METHODS = {
    "dllm": ("float", "flatquant-like short", "default", "one type"),
    "vlm": ("float", "default"),
    "smollm2": ("float", "default"),
    "gemma3": ("float", "default"),
}


class Benchmark:
    """Measures rows; the float model of the last one stays loaded, where it was, for the next."""

    def __init__(self, args: argparse.Namespace, hub: HubModel | None, sizes: Sizes) -> None:
        self.args, self.hub, self.sizes = args, hub, sizes
        self._loaded: tuple[tuple[str, str], nn.Module] | None = None  # of a name and a device
        self._sources = {name: source_digest(name) for name in METHODS}

    def key(self, job: Job) -> dict[str, Any]:
        """What a measured row must agree in to stand for this one."""
        quantised = METHODS[job.method].calibrate is not None
        return {
            **asdict(job),
            "config": self._config(job).digest if quantised else None,
            "sizes": asdict(self.sizes),
            "hub": None if self.hub is None else asdict(self.hub),
            "source": self._sources[job.method],
        }

    def learns(self, job: Job) -> bool:
        return METHODS[job.method].learns

    def devices(self, job: Job) -> dict[str, str]:
        """Where a row is scored ("device"), and where calibrated; the float model is not."""
        device = self.args.device
        if METHODS[job.method].calibrate is None:
            return {"device": device}
        on_cpu = self.args.calibrate_on == "cpu" and not self.learns(job)
        return {"device": device, "calibrated_on": "cpu" if on_cpu else device}

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
            request = Request(
                model=job.model,
                method=job.method,
                source=key["source"],
                cache=str(self.args.cache),
                device=self.args.device,
                compiler=job.compiler,
                sizes=self.sizes,
                hub=self.hub,
                lm_eval=tuple(self.args.lm_eval),
                lm_eval_limit=self.args.lm_eval_limit,
            )
            request.save(folder)
            with self._place_to_score():
                start = time.perf_counter()
                subprocess.run([sys.executable, __file__, "--score", str(folder)], check=True)
                facts["score_s"] = round(time.perf_counter() - start, 1)
            facts |= json.loads((folder / "score.json").read_text())
        return {**key, **facts, "environment": self._environment(job)}

    def _calibrate(self, job: Job, folder: Path) -> dict[str, Any]:
        """Save the row's checkpoint in a folder; returns time, storage, plans, and the predictor's share."""
        method, spec = METHODS[job.method], self._spec(job.model)
        assert method.calibrate is not None
        device = self.devices(job)["calibrated_on"]
        batches = [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in spec.calibration(self.args.cache, self.sizes, job.seed)
        ]
        model = self._float_model(job.model, device)
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
            "num_typed": sum(group.is_typed for group in checkpoint.groups.values()),
            "ranking": None if method.baseline else ranking_share(checkpoint.statistics),
        }

    def _config(self, job: Job) -> QuantConfig:
        types, skip = self._spec(job.model).token_types, self.sizes.skipped_layers
        return METHODS[job.method].config(types, job.format, job.seed, skip)

    def _spec(self, name: str) -> BenchmarkModel:
        return self.hub.benchmark_model() if self.hub else MODELS[name]

    def _float_model(self, name: str, device: str) -> nn.Module:
        if self._loaded is None or self._loaded[0] != (name, device):
            self._loaded = None  # goes before the next one comes
            self._loaded = ((name, device), self._spec(name).load(self.args.cache).to(device))
        return self._loaded[1]

    def _place_to_score(self) -> contextlib.AbstractContextManager[None]:
        if self.args.device == "cpu":
            return contextlib.nullcontext()
        return place_to_score(self.args.cache / "scoring", self.args.scoring_per_gpu)

    def _environment(self, job: Job) -> dict[str, Any]:
        facts = {
            **facts_of_run(self.args.commit),
            **self.devices(job),
            "compiler": job.compiler,
            "num_workers": self.args.workers,
        }
        if self.args.device != "cpu":
            facts["gpu"] = torch.cuda.get_device_name(self.args.device)
        return facts


def main() -> None:
    start = time.monotonic()
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
    jobs = chosen_jobs(args)
    benchmark = Benchmark(args, hub, chosen_sizes(args))
    failed = []
    if not args.only_measured:
        deadline = None if args.deadline is None else start + args.deadline
        failed = measure_all(benchmark, jobs, args.parts, workers_of(benchmark), deadline)
    measured = [row for file in args.parts for row in read_rows(file)]
    # In the order of the tables.
    jobs.sort(key=lambda job: list(METHODS).index(job.method))
    found = [find_row(measured, benchmark.key(job), any_source=args.any_source) for job in jobs]
    summary = summarise([row for row in found if row is not None], facts_of_run(args.commit))
    if args.extend is not None:
        summary = extended(json.loads(args.extend.read_text()), summary, list(METHODS))
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


def facts_of_run(commit: str | None) -> dict[str, Any]:
    return environment() if commit is None else {**environment(), "commit": commit}


def chosen_sizes(args: argparse.Namespace) -> Sizes:
    sizes = QUICK_SIZES if args.quick else Sizes()
    given = {name: getattr(args, name) for name in asdict(sizes)}
    return Sizes(**{**asdict(sizes), **{n: v for n, v in given.items() if v is not None}})


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """The rows that the arguments ask for, in the order in which to measure them."""
    if args.jobs is not None:
        return read_jobs(args.jobs, args.compiler)
    if args.quick or args.model_id is not None or (args.methods is not None and args.set is None):
        models = args.models or list(OURS if args.quick else MODELS)
        if args.model_id is not None:
            models = [args.model_id]
        rows = [
            Rows((m,), args.methods or QUICK_METHODS.get(m, BASIC), args.formats, args.seeds)
            for m in models
        ]
        return jobs_of([rows], args.compiler)
    return [
        job
        for job in jobs_of([SETS[name] for name in args.set or SETS], args.compiler)
        if job.model in (args.models or MODELS)
        and job.method in (args.methods or METHODS)
        and (job.method == "float" or (job.format in args.formats and job.seed in args.seeds))
    ]


def workers_of(benchmark: Benchmark) -> list[Worker]:
    """The processes that `--workers` asks for; several share the processor's cores, and write to logs."""
    args = benchmark.args
    num_gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    gpus = gpus_of_workers(args.workers, num_gpus)
    if args.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.workers == 1:
        return [Worker(benchmark, gpus[0])]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // args.workers)))
    # Why: threads that spin while they wait took 4 times as long on cores that others used too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    first = args.parts[0]
    return [
        Worker(benchmark, gpu, first.with_name(f"{first.stem}-worker-{number}.log"))
        for number, gpu in enumerate(gpus)
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--set", nargs="+", choices=SETS, help="rows of some sets only, in this order; default: all"
    )
    add("--models", nargs="+", choices=MODELS)
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help="these, whether they are in a set or not, or with --set those of it: "
        + "; ".join(METHODS),
    )
    add("--formats", nargs="+", choices=FORMATS)
    add("--seeds", nargs="+", type=int)
    add("--jobs", type=Path, help="JSON lines, each a row to measure (accuracy_jobs.read_jobs)")
    add("--quick", action="store_true", help="few rows on little data, one seed")
    for name in asdict(Sizes()):
        add(f"--{name.replace('_', '-')}", type=int, help="see accuracy_models.Sizes")
    add("--device", default="cpu", help="cpu or cuda, to calibrate and to score on")
    add(
        "--calibrate-on",
        choices=("device", "cpu"),
        default="device",
        help="cpu: calibrate there what has a closed form; rows that learn stay on --device",
    )
    add("--compiler", choices=COMPILERS, help="eager: the passes without Inductor")
    add("--cache", type=Path, default=CACHE, help="of base models and the float models' rows")
    add("--parts", type=Path, nargs="+", help="work files; the first is appended to")
    add("--workers", type=int, default=1, help="processes, spread over the visible GPUs")
    add("--threads", type=int, help="of a worker; default: cores / workers")
    add("--learning-per-gpu", type=int, default=3, help="rows that learn on a GPU at a time")
    add("--scoring-per-gpu", type=int, default=8, help="rows that are scored on a GPU at a time")
    add(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="from now: begin no row that would not be finished by then, going by rows of its model "
        "and method that are in the work files; without any it counts as 200 s, as 450 s if it learns",
    )
    add(
        "--extend",
        type=Path,
        metavar="FILE",
        help="an earlier --out, whose rows stand beside those measured now; FILE is not written",
    )
    add("--only-measured", action="store_true", help="measure nothing, sum up the work files")
    add(
        "--any-source",
        action="store_true",
        help="sum up rows of older code and of either compiler too",
    )
    add("--commit", help="of this copy of the sources, if its git does not know")
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
    for name in ("workers", "threads", "learning_per_gpu", "scoring_per_gpu"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    args.formats = args.formats or (["w4a4"] if args.quick else list(FORMATS))
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.compiler = args.compiler or ("eager" if args.quick else "inductor")
    args.parts = args.parts or [REPOSITORY / "out" / "accuracy.jsonl"]
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that workers end too
    main()
