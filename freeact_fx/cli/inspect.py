"""``freeact explain``: a report of what MODEL names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freeact_fx.eligibility import matches
from freeact_fx.errors import ConfigError
from freeact_fx.report import LinearReport, Report
from freeact_fx.report_table import folded

from .console import working
from .models import Quantisation, Source

if TYPE_CHECKING:
    from torch import nn

    from freeact_fx import TokenTypes
    from freeact_fx.report_diff import Change
    from freeact_fx.timing import GroupTiming


# Rules of ``reasons`` for Linears that were left out by name, or by what they are.
_ON_PURPOSE = ("skipped", "tied", "tower", "left_dense")


@dataclass(frozen=True)
class WantedInputs:
    """The options that say what a model is called with."""

    text: str | None
    num_tokens: int | None
    batch: int
    image: Path | None
    file: Path | None

    def make(self, model: nn.Module, source: Source, types: TokenTypes) -> dict[str, Any]:
        from freeact_fx.model_inputs import load_batches, make_inputs

        if self.file is not None:
            inputs = load_batches(self.file)
            if not isinstance(inputs, dict):
                raise ConfigError(
                    f"--inputs {self.file}: must be keyword arguments, a mapping from names to tensors, got a "
                    f"{type(inputs).__name__}."
                )
            return inputs
        return make_inputs(
            model,
            source.model,
            types,
            text=self.text,
            num_tokens=self.num_tokens,
            batch=self.batch,
            image=self.image,
            trust_remote_code=source.trust_remote_code,
        )


def explained(
    source: Source,
    quantisation: Quantisation,
    *,
    weights: bool,
    num_layers: int | None,
    inputs: WantedInputs,
    code: bool,
    activations: Sequence[str],
    timed: bool,
) -> tuple[Report, list[GroupTiming]]:
    """The report, and the times of its groups if they were asked for; the report has these too."""
    import freeact_fx
    from freeact_fx.timing import fill_times, num_tokens_of, time_groups

    if num_layers is not None and weights:
        raise ConfigError("--layers cuts a model that is built with --no-weights. Add that.")
    if not weights and source.device != "cpu":
        raise ConfigError(
            f"--device {source.device}: with --no-weights there is nothing to put there. Leave one of them out."
        )
    if not weights and source.is_converted:
        raise ConfigError(f"--no-weights: {source.model} is a converted model. Leave it out.")
    with working(f"loading {source.model}") as show:
        model = source.open() if weights else source.open_without_weights(num_layers)
        options = quantisation.options(model, is_converted=source.is_converted)
        call = inputs.make(model, source, quantisation.types(model))
        show("tracing")
        report = freeact_fx.explain(
            model, options=options, code=code, activations=activations, **call
        )
        timings: list[GroupTiming] = []
        if timed:
            timings = time_groups(
                report,
                num_tokens=num_tokens_of(call),
                dtype=next(model.parameters()).dtype,
                on_group=lambda name, index, count: show(f"timing {name} ({index + 1} of {count})"),
            )
            fill_times(report, timings)
    return report, timings


def problems_of(report: Report) -> list[tuple[str, str]]:
    """What ``--strict`` objects to, names with reasons: Linears left alone though nobody asked for it, and those whose
    types were lost."""
    included = tuple(report.config.get("include", ()))
    left = [
        (r.name, str(r.reason))
        for r in report.left_alone
        if getattr(r.reason, "rule", "") not in _ON_PURPOSE or matches(r.name, included)
    ]
    return left + [(r.name, r.type_source) for r in report.quantized if r.state == "refused"]


def is_shown(name: str, pattern: str | None) -> bool:
    """Whether ``--filter`` lets a name through: a pattern, or a part of the name."""
    return pattern is None or matches(name, [pattern]) or pattern in name


def without_others(report: Report, pattern: str) -> Report:
    """The report of the Linears that a pattern matches. Raises ConfigError if none does."""
    linears = [row for row in report.linears if is_shown(row.name, pattern)]
    if not linears:
        example = f", such as {report.linears[0].name}" if report.linears else ""
        raise ConfigError(
            f"--filter {pattern}: matches none of the model's {len(report.linears)} Linears{example}."
        )
    used = {row.group for row in linears}
    return replace(report, linears=linears, groups=[g for g in report.groups if g.name in used])


def change_rows(changes: Sequence[Change]) -> list[tuple[str, str, str, str]]:
    """A row for every change, the same change of Linears in several layers in one."""
    alike: dict[tuple[str, str, str], list[LinearReport]] = {}
    for change in changes:
        sides = (_in_words(change.what, side) for side in (change.before, change.after))
        linear = LinearReport(change.linear, (0, 0))
        alike.setdefault((change.what, *sides), []).append(linear)  # type: ignore[arg-type]
    return [(fold.label, *said) for said, linears in alike.items() for fold in folded(linears)]


def _in_words(what: str, value: Any) -> str:
    """One side of a difference."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and what.endswith("bytes"):
        return f"{value:,}"
    return str(value)
