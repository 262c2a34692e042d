"""Rows measured side by side: one queue, several processes, until a deadline.

The process that was started hands out the rows one by one, in their order, and alone writes to the
work file. A worker has a `Benchmark` of its own (its float model stays loaded), one GPU where there
are any, and answers each job with its row. A worker that dies has lost the row in work; the next row
gets a new one.

Two things that would fill a GPU are limited: rows that learn on it, by who hands out the rows, and
processes that score on it, by locks (`place_to_score`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import statistics
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
_MARGIN = 1.1
# Seconds expected of a row whose like was never measured: on two cores in closed form; learning on a GPU.
_GUESS, _GUESS_LEARNING = 200.0, 450.0


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
        self.gpu = gpu
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


@contextlib.contextmanager
def place_to_score(folder: Path, num: int) -> Iterator[None]:
    """Hold one of `num` places on the GPU that the process sees; waits for one.

    A place is a lock on a file in the folder. Why not a semaphore: who is killed would keep its place.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for number in range(num):
            with (folder / f"{gpu}-{number}").open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(0.2)


def expected_seconds(rows: Sequence[Mapping[str, Any]], benchmark: Benchmark, job: Job) -> float:
    """How long a row will take: as rows of its model and method took, or a guess before there is one.

    rows  measured before; those at other sizes or on other devices tell nothing
    """
    key, devices = benchmark.key(job), _devices(benchmark.devices(job))
    like = [
        row
        for row in rows
        if _devices(row["environment"]) == devices
        and all(row[name] == key[name] for name in ("model", "method", "sizes", "hub"))
    ]
    like = [row for row in like if row["compiler"] == key["compiler"]] or like
    if like:
        return _MARGIN * statistics.median(r.get("calibrate_s", 0) + r["score_s"] for r in like)
    return _GUESS_LEARNING if benchmark.learns(job) else _GUESS


def _devices(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Scored on, calibrated on; rows of older runs say the first alone, where they are the same."""
    return facts["device"], facts.get("calibrated_on", facts["device"])


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
    most_learning = benchmark.args.learning_per_gpu
    bar = tqdm(total=len(waiting), unit="row")
    try:
        while True:
            while idle:
                # On a GPU where as few rows as possible learn.
                learning = Counter(w.gpu for w in busy.values() if benchmark.learns(w.job))
                worker = min(idle, key=lambda w: learning[w.gpu])
                full = worker.gpu is not None and learning[worker.gpu] >= most_learning
                job = _next(benchmark, waiting, measured, deadline, may_learn=not full)
                if job is None:
                    break
                waiting.remove(job)
                idle.remove(worker)
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
    *,
    may_learn: bool,
) -> Job | None:
    """The first row that would be finished in time; `may_learn`: it may be one that learns."""
    for job in waiting:
        if benchmark.learns(job) and not may_learn:
            continue
        if deadline is None or expected_seconds(measured, benchmark, job) <= _left(deadline):
            return job
    return None


def _left(deadline: float) -> float:
    return deadline - time.monotonic()


def _in_words(row: Mapping[str, Any]) -> str:
    numbers = {n: round(v, 4) for n, v in row["metrics"].items() if " " not in n}
    return f"{numbers}, calibrated {row.get('calibrate_s')} s, scored {row['score_s']} s"
