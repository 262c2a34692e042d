"""Which rows the accuracy benchmark measures, and in which order."""

from __future__ import annotations

import sys
from pathlib import Path

import accuracy
import pytest
from accuracy_jobs import SEEDS, SETS, Job, Rows, jobs_of, read_jobs
from accuracy_methods import METHODS


def asked(monkeypatch: pytest.MonkeyPatch, words: str) -> list[Job]:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words.split()])
    return accuracy.chosen_jobs(accuracy.parse_arguments())


def test_all_sets_have_every_method_at_every_seed() -> None:
    jobs = jobs_of(SETS.values(), "eager")
    assert len(set(jobs)) == len(jobs)
    assert {job.method for job in jobs} == set(METHODS)
    quantised = [job for job in jobs if job.method != "float" and job.compiler == "eager"]
    of_seed = [{str(j).replace(f"seed {s}", "") for j in quantised if j.seed == s} for s in SEEDS]
    assert of_seed[0] == of_seed[1] == of_seed[2]
    assert sum(len(names) for names in of_seed) == len(quantised)


def test_what_matters_most_comes_first() -> None:
    jobs = jobs_of(SETS.values(), "eager")
    assert [job.method for job in jobs[:3]] == ["float"] * 3
    first = {(job.model, job.method) for job in jobs[3:15]}
    assert first == {
        ("dllm", name) for name in ("flatquant-like", "default", "one type, same bytes", "one type")
    }
    headlines = jobs_of([SETS["headlines"]], "eager")
    assert jobs[: len(headlines)] == headlines
    again = [job for job in headlines if job.compiler == "inductor"]
    assert [str(job) for job in again] == [
        f"{model}, default, w4a4, seed 0, inductor" for model in ("dllm", "vlm", "smollm2")
    ]
    # Under Inductor anyway these are the same rows.
    assert len(jobs_of([SETS["headlines"]], "inductor")) == len(headlines) - 3


def test_the_float_model_has_one_row() -> None:
    rows = Rows(("dllm", "vlm"), ("float", "rtn"), ("w4a4", "w4a8"), SEEDS)
    jobs = jobs_of([[rows]], "eager")
    assert [str(j) for j in jobs if j.method == "float"] == [
        f"{model}, float, float, seed 0, none" for model in ("dllm", "vlm")
    ]
    assert len(jobs) == 2 + 2 * 2 * 3


def test_arguments_choose_from_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = asked(monkeypatch, "--set w4a8 headlines --models vlm --seeds 1 --compiler eager")
    assert [str(job) for job in jobs] == [
        "vlm, float, float, seed 0, none",
        "vlm, default, w4a4, seed 1, eager",
    ]
    jobs = asked(monkeypatch, "--set w4a8 --methods rtn --compiler eager")
    assert [job.model for job in jobs] == ["dllm", "vlm", "smollm2"]
    assert {(job.method, job.format) for job in jobs} == {("rtn", "w4a8")}


def test_methods_asked_for_by_name_need_no_set(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = asked(monkeypatch, "--models gemma3 --methods shift --formats w4a8 --seeds 4")
    assert jobs == [Job("gemma3", "shift", "w4a8", 4, "inductor")]


def test_quick_is_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = asked(monkeypatch, "--quick")
    assert {job.model for job in jobs} == {"dllm", "vlm", "smollm2"}
    assert {(job.format, job.seed, job.compiler) for job in jobs} == {
        ("float", 0, "none"),
        ("w4a4", 0, "eager"),
    }
    assert len(jobs) == 8


def test_a_list_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        '{"model": "dllm", "method": "no sink", "format": "w4a8", "seed": 7}\n'
        '{"model": "vlm", "method": "float"}\n'
        '{"method": "default", "model": "vlm", "compiler": "inductor"}\n'
    )
    assert asked(monkeypatch, f"--jobs {file} --compiler eager") == [
        Job("dllm", "no sink", "w4a8", 7, "eager"),
        Job("vlm", "float", "float", 0, "none"),
        Job("vlm", "default", "w4a4", 0, "inductor"),
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("[]", "no row"),
        ("{", "no row"),
        ('{"model": "dllm"}', "method"),
        ('{"model": "dllm", "method": "best"}', "method must be one of float, rtn"),
        ('{"model": "dllm", "method": "rtn", "format": "w2a2"}', "format must be one of w4a4"),
        ('{"model": "dllm", "method": "rtn", "sed": 1}', "sed"),
    ],
)
def test_a_line_that_is_no_row(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"model": "dllm", "method": "rtn"}\n' + line)
    with pytest.raises(SystemExit, match=rf"line 2: .*{what}"):
        read_jobs(file, "eager")


@pytest.mark.parametrize(
    ("words", "method", "devices"),
    [
        ("", "default", {"device": "cpu", "calibrated_on": "cpu"}),
        ("--device cuda", "default", {"device": "cuda", "calibrated_on": "cuda"}),
        (
            "--device cuda --calibrate-on cpu",
            "default",
            {"device": "cuda", "calibrated_on": "cpu"},
        ),
        (
            "--device cuda --calibrate-on cpu",
            "flatquant-like",
            {"device": "cuda", "calibrated_on": "cuda"},
        ),
        ("--device cuda --calibrate-on cpu", "float", {"device": "cuda"}),
    ],
)
def test_where_a_row_is_calibrated(
    words: str, method: str, devices: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words.split()])
    args = accuracy.parse_arguments()
    benchmark = accuracy.Benchmark(args, None, accuracy.Sizes())
    assert benchmark.devices(Job("dllm", method, "w4a4", 0, "eager")) == devices


def test_which_methods_learn() -> None:
    learning = {name for name, method in METHODS.items() if method.learns}
    flatquant = {f"flatquant-like{kind}" for kind in ("", "+gptq", " short", " brief")}
    assert learning == {*flatquant, "refined"}


def test_the_brief_row_has_the_steps_of_the_refined_one() -> None:
    options = METHODS["flatquant-like brief"].calibrate.keywords
    assert options["batch_size"] == 1
    assert options["epochs"] * options["num_windows"] == METHODS["refined"].changes["refine_steps"]


@pytest.mark.parametrize("option", ["workers", "threads", "learning-per-gpu", "scoring-per-gpu"])
def test_numbers_are_at_least_one(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", f"--{option}", "0"])
    with pytest.raises(SystemExit):
        accuracy.parse_arguments()
    assert f"--{option} must be at least 1, got 0" in capsys.readouterr().err
