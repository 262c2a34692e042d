"""Which rows the accuracy benchmark measures, and in which order: those that matter most first.

A `Job` is one row. `SETS` are the rows that are measured unless others are asked for, by name
(`--set`) or all; a run that is stopped has measured the first of them. `read_jobs` takes a list of
anybody's own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy_methods import FORMATS, METHODS
from accuracy_models import MODELS

COMPILERS = ("inductor", "eager")  # eager: the passes and our kernels without Inductor
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Job:
    """One row to be measured. The float model has one, of format "float" and compiler "none"."""

    model: str
    method: str
    format: str
    seed: int
    compiler: str

    def __str__(self) -> str:
        return f"{self.model}, {self.method}, {self.format}, seed {self.seed}, {self.compiler}"

    @staticmethod
    def of(model: str, method: str, format: str, seed: int, compiler: str) -> Job:
        """The row of a method; of the float model the only one there is."""
        if method == "float":
            return Job(model, method, "float", 0, "none")
        return Job(model, method, format, seed, compiler)


@dataclass(frozen=True)
class Rows:
    """Each of some methods on each of some models, all of one seed before the next seed."""

    models: Sequence[str]
    methods: Sequence[str]
    formats: Sequence[str] = ("w4a4",)
    seeds: Sequence[int] = (0,)
    compiler: str | None = None  # None: that of the run

    def jobs(self, compiler: str) -> Iterator[Job]:
        """May name a row twice."""
        for seed in self.seeds:
            for format_ in self.formats:
                for model in self.models:
                    for method in self.methods:
                        yield Job.of(model, method, format_, seed, self.compiler or compiler)


OURS = ("dllm", "vlm", "smollm2")
BASELINES = (
    "rtn",
    "smooth+hadamard",
    "smooth+hadamard+gptq",
    "closed-form single",
    "closed-form single+gptq",
    "flatquant-like+gptq",
)
# What is measured of any model.
BASIC = ("float", "default", "flatquant-like", "one type", *BASELINES)
ABLATIONS = (
    "all plans measured",
    "types in all groups",
    "no branch",
    "shared branch",
    "own branch",
    "no gptq",
    "single",
    "shift",
    "no sink",
    "only sink",
    "no refit",
    "refit on the quantised stream",
    "no clip search",
    "no absorbing",
    "sensitivity",
    "bias correction",
    "refined",
    "flatquant-like short",
    "flatquant-like brief",
    "budget 1.1",
    "budget 1.25",
    "branch",
    "paper",
    "duplicate",
)

_HEADLINES = (
    Rows(OURS, ("float",)),
    Rows(("dllm",), ("flatquant-like", "default", "one type, same bytes", "one type"), seeds=SEEDS),
    Rows(("smollm2",), ("flatquant-like", "default", "no sink"), seeds=SEEDS),
    Rows(("vlm",), ("default",), seeds=SEEDS),
    Rows(("vlm",), ("flatquant-like short", "closed-form single", "closed-form single+gptq")),
    Rows(OURS, ("default",), compiler="inductor"),
)
_BASELINES = (
    Rows(("dllm", "smollm2"), BASELINES),
    Rows(("vlm",), ("smooth+hadamard+gptq", "one type", "no sink", "rtn", "smooth+hadamard")),
    Rows(("smollm2",), ("one type",)),
)
_W4A8 = (
    Rows(OURS, ("default", "closed-form single+gptq", "rtn"), ("w4a8",)),
    Rows(("dllm", "smollm2"), ("flatquant-like", "one type", "smooth+hadamard+gptq"), ("w4a8",)),
)
_ABLATIONS = (
    Rows(OURS, ("all plans measured",)),
    Rows(("dllm",), ABLATIONS),
)
_GEMMA3 = (
    Rows(("gemma3",), ("float", "default", "flatquant-like", "no sink", "all plans measured")),
    Rows(("gemma3",), BASIC, tuple(FORMATS)),
)
_OTHERS = (Rows(OURS, BASIC, tuple(FORMATS)),)
_ALL = (*_HEADLINES, *_BASELINES, *_W4A8, *_ABLATIONS, *_GEMMA3, *_OTHERS)
SETS: Mapping[str, Sequence[Rows]] = {
    "headlines": _HEADLINES,
    "baselines": _BASELINES,
    "w4a8": _W4A8,
    "ablations": _ABLATIONS,
    "gemma3": _GEMMA3,
    "others": _OTHERS,
    "seeds": tuple(
        Rows(rows.models, rows.methods, rows.formats, SEEDS)
        for rows in _ALL
        if rows.compiler is None
    ),
}


def jobs_of(sets: Iterable[Sequence[Rows]], compiler: str) -> list[Job]:
    """The rows of some sets, each once and in their order."""
    return list(dict.fromkeys(job for rows in sets for r in rows for job in r.jobs(compiler)))


def read_jobs(path: Path, compiler: str) -> list[Job]:
    """Rows from JSON lines: {"model": "dllm", "method": "default"}; "format", "seed", "compiler" may stand there too.

    Raises SystemExit for a line that names no row.
    """
    legal: dict[str, Collection[str]] = {
        "model": MODELS,
        "method": METHODS,
        "format": FORMATS,
        "compiler": COMPILERS,
    }
    jobs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        default = {"format": "w4a4", "seed": 0, "compiler": compiler}
        try:
            fields = {**default, **json.loads(line)}
            for name, names in legal.items():
                if fields[name] not in names:
                    raise ValueError(f"{name} must be one of {', '.join(names)}")
            jobs.append(Job.of(**fields))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: no row: {line!r} ({error!r}).") from error
    return list(dict.fromkeys(jobs))
