"""Rows measured side by side: one queue, several processes, until a deadline.

The process that was started hands out the rows one by one, in their order, and alone writes to the
work file. A worker has a `Benchmark` of its own (its float model stays loaded), one GPU where there
are any, and answers each job with its row. A worker that dies has lost the row in work; the next row
gets a new one.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accuracy_summary import find_row, read_rows
from tqdm import tqdm

if TYPE_CHECKING:
    from accuracy import Benchmark
    from accuracy_jobs import Job

_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
# A row is begun if this many times what rows like it took is left: their times vary with who else runs.
_MARGIN = 1.25


@dataclass(frozen=True)
class Failure:
    """Why there is no row."""

    reason: str
    stops_all: bool = False  # such as a source that has changed: the next row would fail alike


class Worker:
    """A process that measures rows; started with the first, and again after it died."""

    def __init__(
        self, benchmark: Benchmark, gpu: str | None = None, log: Path | None = None
    ) -> None:
        """
        benchmark  copied into the process
        gpu        the only one that the process sees, as CUDA_VISIBLE_DEVICES has it; None: all
        log        where its output goes, and that of the processes it starts; None: to ours
        """
        self._arguments = (benchmark, gpu, log)
        self._process: Any = None

    def begin(self, job: Job) -> None:
        if self._process is not None and not self._process.is_alive():
            self.stop()
        if self._process is None:
            self.pipe, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(
                target=_serve, args=(theirs, *self._arguments), daemon=True
            )
            self._process.start()
            theirs.close()  # else its end would not be seen
        self.job = job
        self.pipe.send(job)

    def answer(self) -> dict[str, Any] | Failure:
        """The row, or why there is none; waits for it."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=10)
            code = self._process.exitcode
            self.stop()
            return Failure(f"its process ended with {code}")

    def stop(self) -> None:
        """End the process and those that it started; the row in work is lost."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # where it had no group of its own yet
            self._process.join()
            self.pipe.close()
            self._process = None


def _serve(pipe: Connection, benchmark: Benchmark, gpu: str | None, log: Path | None) -> None:
    """A worker's life."""
    os.setsid()
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore, which a process that is killed leaves
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if log is not None:
        with log.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    with contextlib.suppress(EOFError):  # who gives the jobs is gone
        while True:
            pipe.send(_row_or_failure(benchmark, pipe.recv()))


def _row_or_failure(benchmark: Benchmark, job: Job) -> dict[str, Any] | Failure:
    try:
        return benchmark.measure(job)
    except SystemExit as stop:
        return Failure(str(stop), stops_all=True)
    except Exception:
        return Failure(traceback.format_exc())


def gpus_of_workers(num_workers: int, num_gpus: int) -> list[str | None]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES has it: spread evenly over those that are visible."""
    if num_gpus == 0:
        return [None] * num_workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
    names = visible.split(",")[:num_gpus]
    return [names[number % num_gpus] for number in range(num_workers)]


def expected_seconds(
    rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any], device: str
) -> float:
    """How long a row will take: as long as rows of its method took, or its model, or any; 0 before there is one.

    rows  measured before; those at other sizes or on other devices tell nothing
    key   of the row (`Benchmark.key`)
    """
    like = [
        row
        for row in rows
        if row["environment"]["device"] == device
        and all(row[name] == key[name] for name in ("sizes", "hub"))
    ]
    for names in (("compiler", "model", "method"), ("model", "method"), ("model",), ()):
        seconds = [
            row.get("calibrate_s", 0) + row["score_s"]
            for row in like
            if all(row[n] == key[n] for n in names)
        ]
        if seconds:
            return _MARGIN * statistics.median(seconds)
    return 0


def measure_all(
    benchmark: Benchmark,
    jobs: Sequence[Job],
    parts: Sequence[Path],
    workers: Sequence[Worker],
    deadline: float | None = None,
) -> list[Job]:
    """Measure what no work file has, and append it to the first; returns the jobs that failed.

    deadline  of time.monotonic(). No row is begun that would not be finished by then, as far as those
              before it tell; rows still in work are given up, and are not failures

    Raises SystemExit if going on makes no sense.
    """
    measured = [row for file in parts for row in read_rows(file)]
    waiting = [job for job in jobs if find_row(measured, benchmark.key(job)) is None]
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    idle, busy, failed = list(workers), {}, []
    bar = tqdm(total=len(waiting), unit="row")
    try:
        while True:
            while idle and (job := _next(benchmark, waiting, measured, deadline)):
                waiting.remove(job)
                worker = idle.pop(0)
                worker.begin(job)
                busy[worker.pipe] = worker
            if not busy:
                break
            bar.set_description_str(str(next(iter(busy.values())).job))
            ready = wait(list(busy), None if deadline is None else max(0, _left(deadline)))
            if not ready:  # the deadline
                break
            for pipe in ready:
                worker = busy.pop(pipe)
                answer = worker.answer()
                idle.append(worker)
                bar.update()
                if isinstance(answer, Failure):
                    if answer.stops_all:
                        raise SystemExit(answer.reason)
                    tqdm.write(f"{worker.job} FAILED: {answer.reason}")
                    failed.append(worker.job)
                    continue
                with parts[0].open("a") as file:
                    file.write(json.dumps(answer) + "\n")
                measured.append(answer)
                tqdm.write(f"{worker.job}: {_in_words(answer)}")
    finally:
        bar.close()
        for worker in workers:
            worker.stop()
    if left := len(waiting) + len(busy):
        print(f"{left} rows were not measured by the deadline")
    return failed


def _next(
    benchmark: Benchmark,
    waiting: Sequence[Job],
    measured: Sequence[Mapping[str, Any]],
    deadline: float | None,
) -> Job | None:
    """The first row that would be finished in time."""
    if deadline is None:
        return next(iter(waiting), None)
    left, device = _left(deadline), benchmark.args.device
    for job in waiting:
        if expected_seconds(measured, benchmark.key(job), device) <= left:
            return job
    return None


def _left(deadline: float) -> float:
    return deadline - time.monotonic()


def _in_words(row: Mapping[str, Any]) -> str:
    numbers = {n: round(v, 4) for n, v in row["metrics"].items() if " " not in n}
    return f"{numbers}, calibrated {row.get('calibrate_s')} s, scored {row['score_s']} s"
