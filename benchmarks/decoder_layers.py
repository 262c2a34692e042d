"""A float model decoder layer by decoder layer: what each sees, does, and which Linears share an input.

Layers and groups are found by what the model does, not by names: the longest list of modules of
one class, and Linears that read the same memory. Each layer is run by itself on what the one before
put out, so only one layer's tokens are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from freeact_fx import QuantConfig
from freeact_fx.eligibility import ineligible_reason, is_tower_name
from freeact_fx.transform import kronecker_shape

Batch = Mapping[str, Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # a layer's arguments without its hidden states


@dataclass
class Group:
    """Linears of a decoder layer that read the same tensor, and what is known of that tensor."""

    names: list[str]  # qualified, in the order the model calls them
    linears: list[nn.Linear]
    largest: Tensor  # [K] largest magnitude of each channel
    moment: Tensor | None  # [K, K] sum of x^T x; only for GPTQ
    sample: list[Tensor]  # tokens [m, K], a few of each batch; only for the clip search

    @property
    def weights(self) -> list[Tensor]:
        return [linear.weight for linear in self.linears]

    @property
    def shape(self) -> tuple[int, int]:
        shape = kronecker_shape(self.linears[0].in_features)
        assert shape is not None, "ineligible Linears are in no group"
        return shape


@dataclass
class Block:
    """A decoder layer with its inputs and outputs in the float model, one entry per batch."""

    name: str
    layer: nn.Module
    calls: list[Call]
    inputs: list[Tensor]  # [B, T, width]
    outputs: list[Tensor]
    groups: list[Group]
    bar: tqdm[Any]

    def run(self, index: int) -> Tensor:
        return _call(self.layer, self.inputs[index], self.calls[index])


def _call(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    args, kwargs = call
    output = layer(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of one class outside of a vision or audio tower, with its name."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and not is_tower_name(name)
    ]
    if not lists:
        raise ValueError(
            f"baselines: {type(model).__name__} has no nn.ModuleList of decoder layers. Use "
            f"freeact_fx.calibrate, which reads the graph."
        )
    return max(lists, key=lambda item: len(item[1]))


@torch.no_grad()
def decoder_blocks(
    model: nn.Module, batches: Iterable[Batch], config: QuantConfig, label: str, progress: bool
) -> Iterator[Block]:
    """Each decoder layer in turn, with what it sees and does in the float model.

    Only one layer's inputs and outputs are held. Raises RuntimeError if the layers do not simply
    follow one another: then the inputs made here would not be the model's.
    """
    prefix, layers = _decoder_layers(model)
    hidden, calls, last_input = _record_calls(model, batches, layers)
    num_sampled = -(-config.sample_tokens // len(hidden)) if config.clip_search else 0
    bar = tqdm(enumerate(layers), label, total=len(layers), disable=not progress)
    for index, layer in bar:
        if index == len(layers) - 1 and not _close(hidden[0], last_input):
            raise RuntimeError(
                f"baselines: {prefix}: the input of layer {index} is not the output of the one "
                f"before. Use freeact_fx.calibrate, which runs the whole model."
            )
        own_calls = [call[index] for call in calls]
        groups = _groups(layer, f"{prefix}.{index}", hidden[0], own_calls[0], config)
        hooks = [
            group.linears[0].register_forward_pre_hook(_observer(group, config, num_sampled))
            for group in groups
        ]
        outputs = [_call(layer, x, call) for x, call in zip(hidden, own_calls, strict=True)]
        for hook in hooks:
            hook.remove()
        if groups:  # else the whole layer is skipped
            yield Block(f"{prefix}.{index}", layer, own_calls, hidden, outputs, groups, bar)
        hidden = outputs


def _close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).norm()) <= 1e-3 * float(want.norm())


def _record_calls(
    model: nn.Module, batches: Iterable[Batch], layers: nn.ModuleList
) -> tuple[list[Tensor], list[list[Call]], Tensor]:
    """Run the float model: for each batch the first layer's hidden states and all layers' other
    arguments; and the last layer's hidden states in the first batch."""
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    last_input: list[Tensor] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A cache would grow with each call.
        kwargs = {k: None if k.startswith("past_key_value") else v for k, v in kwargs.items()}
        x = args[0] if args else kwargs.pop("hidden_states")
        if layer is layers[0]:
            hidden.append(x)
            calls.append([])
        if layer is layers[-1] and not last_input:
            last_input.append(x)
        calls[-1].append((args[1:], kwargs))

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    for batch in batches:
        model(**{name: value.to(device) for name, value in batch.items()})
    for hook in hooks:
        hook.remove()
    if not hidden:
        raise ValueError("baselines: no batch reached the decoder layers. Give at least one batch.")
    return hidden, calls, last_input[0]


def _groups(
    layer: nn.Module, prefix: str, hidden: Tensor, call: Call, config: QuantConfig
) -> list[Group]:
    """The layer's groups of Linears, in the order it calls them: those that read the same memory."""
    found: dict[tuple[Any, ...], Group] = {}
    inputs: list[Tensor] = []  # kept, so that no address is used twice
    hooks = []
    for name, linear in layer.named_modules():
        full_name = f"{prefix}.{name}"
        if not isinstance(linear, nn.Linear) or ineligible_reason(
            full_name, linear.in_features, linear.weight, False, config
        ):
            continue

        def see(linear: nn.Module, args: tuple[Tensor, ...], name: str = full_name) -> None:
            assert isinstance(linear, nn.Linear)
            (x,) = args
            inputs.append(x)
            key = (x.data_ptr(), x.shape, x.stride())
            if key not in found:
                size = linear.in_features
                largest = torch.zeros(size, device=x.device)
                moment = torch.zeros(size, size, device=x.device) if config.gptq else None
                found[key] = Group([], [], largest, moment, [])
            found[key].names.append(name)
            found[key].linears.append(linear)

        hooks.append(linear.register_forward_pre_hook(see))
    _call(layer, hidden, call)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def _observer(
    group: Group, config: QuantConfig, num_sampled: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    generator = torch.Generator().manual_seed(config.seed)

    def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0].flatten(0, -2).float()
        group.largest = torch.maximum(group.largest, tokens.abs().amax(0))
        if group.moment is not None:
            group.moment.addmm_(tokens.t(), tokens)
        if num_sampled:
            chosen = torch.randperm(tokens.shape[0], generator=generator)[:num_sampled]
            group.sample.append(tokens[chosen.to(tokens.device)])

    return observe


def rebatched(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """Batches of `rows` rows each: those of equal shapes are joined, in order, and split again."""
    by_shape: dict[tuple[Any, ...], list[Batch]] = {}
    for batch in batches:
        shapes = tuple((name, value.shape[1:]) for name, value in batch.items())
        by_shape.setdefault(shapes, []).append(batch)
    result: list[Batch] = []
    for alike in by_shape.values():
        joined = {
            name: torch.cat([batch[name] for batch in alike]).split(rows) for name in alike[0]
        }
        result += [
            dict(zip(joined, parts, strict=True)) for parts in zip(*joined.values(), strict=True)
        ]
    return result
