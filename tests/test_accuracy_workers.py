"""The accuracy benchmark's queue: rows side by side, a worker that dies, the deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import accuracy_workers
import pytest
from accuracy_summary import read_rows
from accuracy_workers import (
    Worker,
    expected_seconds,
    gpus_of_workers,
    measure_all,
    place_to_score,
)


@dataclass(frozen=True)
class Row:
    """Stands for accuracy_jobs.Job, without torch: a worker imports this file."""

    method: str
    model: str = "m"
    compiler: str = "eager"


class Benchmark:
    """What it does is said by the method."""

    args = Namespace(learning_per_gpu=1)

    def learns(self, job: Row) -> bool:
        return job.method.startswith("learns")

    def devices(self, job: Row) -> dict[str, str]:
        return {"device": "cuda", "calibrated_on": "cuda" if self.learns(job) else "cpu"}

    def key(self, job: Row) -> dict[str, Any]:
        return {**asdict(job), "sizes": {}, "hub": None, "source": "s", "config": None}

    def measure(self, job: Row) -> dict[str, Any]:
        kind, _, seconds = job.method.partition(" ")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stops":
            raise SystemExit("the source has changed")
        if kind == "fails":
            raise ValueError("no such thing")
        if kind == "child":  # as the one that scores a row
            subprocess.run(["sleep", seconds], check=True)
        time.sleep(float(seconds or 0))
        print("measured", flush=True)
        facts = {"process": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
        times = {"calibrate_s": float(seconds or 0), "score_s": 0.0, "ended": time.monotonic()}
        rest = {"metrics": {"nll": 1.0}, "environment": self.devices(job)}
        return {**self.key(job), **facts, **times, **rest}


def measure(
    tmp_path: Path, *methods: str, num: int = 1, deadline: float | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows in the work file, and methods that failed."""
    benchmark: Any = Benchmark()
    workers = [
        Worker(benchmark, gpu, tmp_path / f"{number}.log")
        for number, gpu in enumerate(gpus_of_workers(num, 2))
    ]
    jobs: list[Any] = [Row(method) for method in methods]
    ends = None if deadline is None else time.monotonic() + deadline
    failed = measure_all(benchmark, jobs, [tmp_path / "rows.jsonl"], workers, ends)
    return read_rows(tmp_path / "rows.jsonl"), [job.method for job in failed]


def test_rows_are_shared_out_and_each_is_measured_once(tmp_path: Path) -> None:
    names = [f"{letter} 0.2" for letter in "abcdef"]
    rows, failed = measure(tmp_path, *names, num=3)
    assert failed == []
    assert sorted(row["method"] for row in rows) == names
    assert len({row["process"] for row in rows}) > 1
    assert {row["gpu"] for row in rows} == {"0", "1"}
    assert "measured" in (tmp_path / "0.log").read_text()
    again, _ = measure(tmp_path, *names, "g", num=2)
    assert [row["method"] for row in again[6:]] == ["g"]


def test_a_worker_that_dies_loses_its_row_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, failed = measure(tmp_path, "a", "dies", "b", "fails", "c")
    assert [row["method"] for row in rows] == ["a", "b", "c"]
    assert failed == ["dies", "fails"]
    assert rows[0]["process"] != rows[1]["process"] == rows[2]["process"]
    output = capsys.readouterr().out
    assert "its process ended with -9" in output
    assert "ValueError: no such thing" in output


def test_some_failures_stop_all(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="source has changed"):
        measure(tmp_path, "a", "stops", "b")
    assert [row["method"] for row in read_rows(tmp_path / "rows.jsonl")] == ["a"]


def test_no_row_is_begun_that_would_not_be_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = Benchmark()
    before = [
        {**benchmark.measure(Row("short")), "source": "old"},
        {**benchmark.measure(Row("long")), "source": "old", "score_s": 1000.0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    rows, failed = measure(tmp_path, "long", "short", deadline=60)
    assert [row["method"] for row in rows[2:]] == ["short"]
    assert failed == []
    assert "1 rows were not measured by the deadline" in capsys.readouterr().out


def test_rows_in_work_at_the_deadline_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy_workers, "_GUESS", 0)
    start, own = time.monotonic(), f"36{os.getpid()}"
    rows, failed = measure(tmp_path, "a", f"child {own}", "b", deadline=8)
    assert time.monotonic() - start < 30
    assert [row["method"] for row in rows] == ["a"]
    assert failed == []
    sleeping = subprocess.run(["pgrep", "-f", f"^sleep {own}$"], capture_output=True, check=False)
    assert not sleeping.stdout


def test_estimates_come_from_rows_of_the_same_model_and_method() -> None:
    benchmark: Any = Benchmark()

    def row(method: str, seconds: float, **fields: Any) -> dict[str, Any]:
        job = Row(method, **fields)
        return {
            **benchmark.key(job),
            "score_s": seconds,
            "environment": benchmark.devices(job),
        }

    rows = [
        row("a", 10),
        row("a", 30),
        row("a", 20),
        row("b", 50),
        row("a", 90, compiler="inductor"),
        {**row("a", 1), "environment": {"device": "cpu"}},
        {**row("a", 2), "sizes": {"windows": 1}},
        row("a", 1000, model="n"),
        {**row("learns", 400), "environment": {"device": "cuda"}},  # as older runs wrote it
        {**row("c", 3), "environment": {"device": "cuda"}},  # was calibrated on the GPU
    ]

    def seconds(method: str, **fields: Any) -> float:
        job: Any = Row(method, **fields)
        return expected_seconds(rows, benchmark, job)

    assert seconds("a") == pytest.approx(1.1 * 20)
    assert seconds("a", compiler="inductor") == pytest.approx(1.1 * 90)
    assert seconds("b", compiler="inductor") == pytest.approx(1.1 * 50)
    assert seconds("a", model="n") == pytest.approx(1.1 * 1000)
    assert seconds("learns") == pytest.approx(1.1 * 400)
    for method, model in (("c", "m"), ("b", "n"), ("new", "m")):
        assert seconds(method, model=model) == 200
    assert seconds("learns", model="n") == seconds("learns too") == 450


def test_few_rows_learn_on_a_gpu_at_a_time(tmp_path: Path) -> None:
    """Two GPUs with two workers each: each GPU learns one row at a time, beside others."""
    learning = [f"learns{letter} 0.5" for letter in "abcd"]
    rows, failed = measure(tmp_path, *learning, "e 0.1", "f 0.1", num=4)
    assert failed == []
    assert {row["method"] for row in rows} == {*learning, "e 0.1", "f 0.1"}
    learned = [row for row in rows if row["method"] in learning]
    assert {row["gpu"] for row in learned} == {"0", "1"}
    for gpu in "01":
        ends = sorted(row["ended"] for row in learned if row["gpu"] == gpu)
        assert all(later - earlier > 0.45 for earlier, later in pairwise(ends))
    assert rows[-1] in learned  # the others did not wait


def test_places_to_score_come_back_from_who_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    command = f"flock {tmp_path}/0-1 sleep 1"
    with place_to_score(tmp_path, 2), subprocess.Popen(["bash", "-c", command]) as other:
        time.sleep(0.3)
        start = time.monotonic()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with place_to_score(tmp_path, 2):
            assert time.monotonic() - start < 0.2  # another GPU
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with place_to_score(tmp_path, 2):
            assert time.monotonic() - start > 0.4
        other.wait()


@pytest.mark.parametrize(
    ("visible", "num_workers", "num_gpus", "want"),
    [
        (None, 2, 0, [None, None]),
        (None, 3, 2, ["0", "1", "0"]),
        ("5,GPU-7", 3, 2, ["5", "GPU-7", "5"]),
    ],
)
def test_workers_are_spread_over_the_gpus_that_are_visible(
    visible: str | None,
    num_workers: int,
    num_gpus: int,
    want: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of_workers(num_workers, num_gpus) == want
