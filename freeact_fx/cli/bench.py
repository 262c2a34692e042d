"""``freeact bench``: dense and quantised, compiled, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from freeact_fx.errors import ConfigError

from .console import working
from .inspect import WantedInputs
from .models import Quantisation, Source

if TYPE_CHECKING:
    from torch import nn

    from freeact_fx.timing import GroupTiming, Timing


@dataclass
class Bench:
    """What was timed.

    model      time of a call of each variant
    groups     time of each kind of group
    agreement  of the quantised model's answers with the dense one's: ``relative_error`` of the outputs, and the share
               of positions with the ``same_token`` on top; None without a dense model
    """

    title: str
    num_tokens: int
    environment: dict[str, Any]
    model: dict[str, Timing] = field(default_factory=dict)
    groups: list[GroupTiming] = field(default_factory=list)
    agreement: dict[str, float] | None = None

    def model_rows(self) -> list[tuple[str, ...]]:
        first = next(iter(self.model.values()))
        return [
            (
                name,
                str(timing),
                f"{self.num_tokens / timing.median_ms * 1e3:,.0f}",
                f"{first.median_ms / timing.median_ms:.2f}x",
            )
            for name, timing in self.model.items()
        ]

    def agreement_lines(self) -> list[str]:
        if self.agreement is None:
            return []
        return [
            f"outputs against dense: relative error {self.agreement['relative_error']:.3g}, same token on top at "
            f"{self.agreement['same_token']:.1%} of the positions"
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "num_tokens": self.num_tokens,
            "environment": self.environment,
            "model": {name: asdict(timing) for name, timing in self.model.items()},
            "agreement": self.agreement,
            "groups": [timing.to_dict() for timing in self.groups],
        }


def benched(
    source: Source,
    quantisation: Quantisation,
    *,
    dense: Source | None,
    inputs: WantedInputs,
    whole: bool,
    groups: bool,
    runs: int,
) -> Bench:
    import torch

    import freeact_fx
    from freeact_fx.doctor import cpu_name
    from freeact_fx.timing import num_tokens_of, time_groups

    if not whole and not groups:
        raise ConfigError("--no-model and --no-groups leave nothing to time.")
    if dense is not None and not source.is_converted:
        raise ConfigError(f"--dense: {source.model} is dense itself. Leave it out.")
    with working(f"loading {source.model}") as show:
        model = source.open()
        if source.is_converted:
            if options := quantisation.options(model, is_converted=True):
                raise ConfigError(f"{source.model} is converted; leave out: {', '.join(options)}.")
            dense_model = None if dense is None else dense.open()
        else:
            dense_model, model = model, copy.deepcopy(model)
            show("packing")
            quantisation.convert(model)
        call = inputs.make(model, source, quantisation.types(model))
        num_tokens = num_tokens_of(call)
        chip = torch.cuda.get_device_name() if source.device != "cpu" else cpu_name()
        num_threads = torch.get_num_threads()
        result = Bench(
            f"{source.model}: {num_tokens} tokens in {inputs.batch} sequences; {chip}, {num_threads} threads, torch "
            f"{torch.__version__}; median of {runs} runs (quartiles)",
            num_tokens,
            {"chip": chip, "num_threads": num_threads, "torch": torch.__version__, "runs": runs},
        )
        if whole:
            _time_models(result, dense_model, model, call, runs, show)
        if groups:
            report = freeact_fx.explain(model, **call)
            result.groups = time_groups(
                report,
                num_tokens=num_tokens,
                dtype=next(model.parameters()).dtype,
                runs=runs,
                on_group=lambda name, index, count: show(
                    f"compiling and timing {name} ({index + 1} of {count} kinds of group)"
                ),
            )
    return result


def _time_models(
    result: Bench,
    dense: nn.Module | None,
    model: nn.Module,
    call: dict[str, Any],
    runs: int,
    show: Callable[[str], None],
) -> None:
    import torch

    from freeact_fx.timing import time_interleaved

    compiled: dict[str, Any] = {}
    if dense is not None:
        dtype = str(next(dense.parameters()).dtype).removeprefix("torch.")
        compiled[f"dense, {dtype}"] = torch.compile(dense, dynamic=False)
    compiled["freeact"] = torch.compile(model, backend="freeact", dynamic=False)
    outputs = []
    with torch.no_grad():
        for name, function in compiled.items():
            show(f"compiling: {name}")
            outputs.append(_logits(function(**call)))
    if dense is not None:
        result.agreement = _agreement(outputs)
    done = [0]

    def on_round() -> None:
        done[0] += 1
        show(f"timing the model: round {done[0]}")

    calls = {name: partial(function, **call) for name, function in compiled.items()}
    result.model = time_interleaved(calls, runs=runs, on_round=on_round)


def _logits(output: Any) -> Any:
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name).float()
    return (output[0] if isinstance(output, (tuple, list)) else output).float()


def _agreement(outputs: Sequence[Any]) -> dict[str, float]:
    want, got = outputs
    return {
        "relative_error": float((got - want).norm() / want.norm()),
        "same_token": float((got.argmax(-1) == want.argmax(-1)).float().mean()),
    }
