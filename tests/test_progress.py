"""The time left: at the rate of the steps behind the first, of observing and of fitting apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from freeact_fx.progress import Progress


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the clock go on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    # Without tqdm a line is printed every five seconds.
    monkeypatch.setitem(sys.modules, "tqdm", None)

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_time_left(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(True)

    def step(kind: str, amount: float, seconds: float) -> str:
        wait(seconds)
        bar.step(getattr(bar, kind), amount, kind)
        return capsys.readouterr().err

    # How many batches there are is not known.
    assert step("observing", 1, 60) == "observing: 1:00, time left unknown\n"
    bar.observing.total, bar.fitting.total = 5, 300
    # Three batches at 10 seconds, and as long for the fits as for the pass: 60 + 4 * 10.
    assert step("observing", 1, 10) == "observing: 1:10, 2:10 left\n"
    assert step("observing", 1, 2) == "", "no line so soon"
    assert step("observing", 2, 18) == "observing: 1:30, 1:30 left\n"
    # The rest of the fits at the rate of the first; then at that of the others.
    assert step("fitting", 100, 20) == "fitting: 1:50, 0:40 left\n"
    assert step("fitting", 100, 3600) == "fitting: 1:01:50, 1:00:00 left\n"
    assert step("fitting", 100, 3600) == "fitting: 2:01:50, 0:00 left\n"
    bar.close()


def test_nothing_is_shown_if_it_is_not_wanted(
    wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress(False)
    wait(100)
    bar.step(bar.observing, 1, "observing")
    bar.close()
    assert not capsys.readouterr().err
