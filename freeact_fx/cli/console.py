"""What the commands print: tables, progress and errors; plain where the output is not a terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer
import typer.core
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from freeact_fx.timing import GroupTiming

# A pipe has no width: nothing is cut there.
_PIPE_WIDTH = 1000


def output() -> Console:
    """Standard output. Made at each use: tests and shells change it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def notes() -> Console:
    """Standard error, for what is not the answer."""
    console = Console(stderr=True, highlight=False)
    return (
        console if console.is_terminal else Console(stderr=True, highlight=False, width=_PIPE_WIDTH)
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; the first column is aligned left, and so is every one with words in it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(header):
        is_number = index > 0 and all(row[index][:1].isdigit() for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    output().print(table)


def print_group_times(timings: Sequence[GroupTiming]) -> None:
    """A row for each kind of group; the slowest of all its groups together comes first."""
    rows = [
        (
            timing.groups[0],
            str(len(timing.groups)),
            " ".join(f"[{n}, {k}]" for n, k in timing.shapes),
            f"{timing.plan}, {timing.precision}",
            str(timing.dense),
            str(timing.quantized),
            f"{timing.speedup:.2f}x",
        )
        for timing in timings
    ]
    print_table(("group", "number", "[N, K]", "plan", "dense", "freeact", "speed"), rows)


def say(text: str = "", style: str = "") -> None:
    """A line of the answer."""
    output().print(Text(text, style))


@contextmanager
def working(label: str) -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done, if that is a terminal; gives the function that changes the words."""
    console = notes()
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(Text(label)) as status:
        yield lambda text: status.update(Text(text))


class Commands(typer.core.TyperGroup):
    """Commands whose errors are one message and exit code 2; ``freeact --debug`` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with nullcontext() if ctx.params.get("debug") else _quiet():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            notes().print("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Whoever read it has seen enough; nothing more is to be written, at exit neither.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            # Typer's own know their exit code and are shown by it.
            is_typers = isinstance(error, typer.Abort) or hasattr(error, "exit_code")
            if is_typers or ctx.params.get("debug"):
                raise
            notes().print(Text.assemble(("error: ", "bold red"), message_of(error)))
            raise typer.Exit(2) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Of all warnings only ours, a line each; TORCH_LOGS and --debug bring the others back."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if str(message).startswith("freeact"):
            notes().print(Text.assemble(("warning: ", "yellow"), str(message)))

    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        if "TORCH_LOGS" not in os.environ:
            # Dynamo tells of every graph break; the report has them.
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def message_of(error: BaseException) -> str:
    """What an error says to a user: our own in its own words, another with its kind in front."""
    from freeact_fx.errors import CheckpointError, ConfigError, UnsupportedLinear

    ours = (ConfigError, CheckpointError, UnsupportedLinear)
    chain = error
    while chain is not None:
        inner = getattr(chain, "inner_exception", None) or chain.__cause__
        if isinstance(chain, ours):
            return str(chain)
        if inner is None:
            break
        chain = inner
    first = next((line for line in str(error).strip().split("\n") if line.strip()), "")
    return f"{type(error).__name__}: {first} (freeact --debug shows where)"
