"""One progress bar over a whole calibration: passes over the batches, then fits, then passes again."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

_SECONDS_BETWEEN_LINES = 5


@dataclass
class _Work:
    """One kind of work, in units of its own: how much there is, what was done and how long that took."""

    total: float | None = None
    done: float = 0.0
    seconds: float = 0.0
    # What its first step did: the model is traced in it, so it says little of the others.
    first_done: float = 0.0
    first_seconds: float = 0.0

    def step(self, amount: float, seconds: float) -> None:
        if not self.done:
            self.first_done, self.first_seconds = amount, seconds
        self.done += amount
        self.seconds += seconds

    def left(self, prior: float | None) -> float | None:
        """Seconds left; ``prior`` is what all of it is taken to need before any was done. None: nobody knows."""
        if self.total is None:
            return None
        if not self.done:
            return prior
        done, seconds = self.done, self.seconds
        if done > self.first_done:
            done, seconds = done - self.first_done, seconds - self.first_seconds
        return max(self.total - self.done, 0) * seconds / done


@dataclass
class Progress:
    """A bar by tqdm if it is installed, else a line every five seconds; nothing if not ``shown``.

    The time left is that of the batches left, at the rate of those done, and that of the fits left. Before the first
    fit these are taken to need as long as a pass.
    """

    shown: bool
    observing: _Work = field(default_factory=_Work, init=False)
    fitting: _Work = field(default_factory=_Work, init=False)

    def __post_init__(self) -> None:
        self._began = self._last = self._printed = time.monotonic()
        self._bar: Any = None
        if self.shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            self._bar = tqdm(total=1.0, bar_format=layout)

    def step(self, work: _Work, amount: float, label: str) -> None:
        """Some work was done since the last step."""
        now = time.monotonic()
        work.step(amount, now - self._last)
        self._last = now
        if not self.shown:
            return
        left = self._seconds_left()
        spent = now - self._began
        if self._bar is not None:
            self._bar.n = 0.0 if left is None else spent / max(spent + left, 1e-9)
            self._bar.set_description_str(label, refresh=False)
            self._bar.set_postfix_str(_left(left), refresh=True)
        elif now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{label}: {_clock(spent)}, {_left(left)}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self) -> float | None:
        observing = self.observing.left(None)
        if observing is None or self.fitting.total is None:
            return None
        fitting = self.fitting.left(observing + self.observing.seconds)
        return None if fitting is None else observing + fitting


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )


def _left(seconds: float | None) -> str:
    return "time left unknown" if seconds is None else f"{_clock(seconds)} left"
