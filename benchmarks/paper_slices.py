"""What does plan `paper` lose before anything is rounded: how much of a Linear's outputs is outside a slice of K / 2?

    python benchmarks/paper_slices.py                  appends to benchmarks/results/paper_slices.jsonl

The masked-diffusion model. By kind of Linear and token type: the mean squared output that is lost if tokens of the type
keep K / 2 coordinates, over all of it; a mean over layers, of other windows than the coordinates were chosen on. First
tokens are left out: they are a type of their own, and their massive activations would be all that is seen. Which
coordinates there are to choose from depends on what may rotate the channels first:

* left factor: directions of the left Kronecker factor, as `paper` has them (`freeact_fx/narrow_slices.py`)
* permutation: the channels as they are
* full rotation: any directions, by a dense [K, K] matrix for each type
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from evaluation import dllm_calibration_batches
from measure import RESULTS, append_result
from plan_errors import KINDS
from presentation import table
from small_models import CACHE, MASK_TOKEN, load_masked_diffusion
from torch import Tensor, nn

from freeact_fx.closed_form import channel_scale, damped, geometric_mean
from freeact_fx.moments import scaled
from freeact_fx.narrow_slices import dropped_energy, left_basis
from freeact_fx.token_moments import TokenMoments
from freeact_fx.transform import kronecker_shape

TYPES = ("unmasked", "masked")
KEEPS = ("left factor", "permutation", "full rotation")


def lost(
    moment: Tensor, held_out: Tensor, gram: Tensor, shape: tuple[int, int]
) -> dict[str, float]:
    """By what rotates: the part of the output energy that is lost outside of half of the coordinates.

    moment    [D1 * D2, D1 * D2] fp32, damped, of scaled channels: the coordinates are chosen by it
    held_out  the same of other tokens, whose energy it is
    gram      [D1 * D2, D1 * D2] fp32, damped, of the same channels
    """
    half = moment.shape[0] // 2
    by_left = dropped_energy(held_out, gram, left_basis(moment, gram, shape))[shape[0] // 2]
    weak = (moment.diagonal() * gram.diagonal()).argsort()[:half]
    by_channel = (held_out[weak][:, weak] * gram[weak][:, weak]).sum()
    directions = torch.linalg.eigh(geometric_mean(moment.double(), gram.double()))[1][:, :half]
    c, g = (directions.t() @ matrix.double() @ directions for matrix in (held_out, gram))
    energy = float((held_out * gram).sum())
    losses = (by_left, by_channel, (c * g).sum())
    return {name: float(loss) / energy for name, loss in zip(KEEPS, losses, strict=True)}


@torch.no_grad()
def second_moments(
    model: nn.Module, linears: dict[str, nn.Linear], batches: Sequence[dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """By Linear and token type: mean outer product [K, K] fp32 of its inputs."""
    seen = {
        name: TokenMoments(linear.in_features, len(TYPES), sample_tokens=1, seed=0, label=name)
        for name, linear in linears.items()
    }
    types = torch.empty(0)
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].observe(*args, types)
        )
        for name, linear in linears.items()
    ]
    for batch in batches:
        types = (batch["input_ids"] == MASK_TOKEN).int()
        types[:, 0] = -1
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {
        name: {t: of.moment[i] / float(of.count[i]) for i, t in enumerate(TYPES)}
        for name, of in seen.items()
    }


def inputs_of_layers(model: nn.Module, step: int) -> Iterator[tuple[str, str, list[nn.Linear]]]:
    """The kind and the Linears of each input of each ``step``-th decoder layer, by the name of the first."""
    modules = dict(model.named_modules())
    for kind, endings in KINDS.items():
        firsts = [name for name in modules if name.endswith(f".{endings[0]}")]
        for name in firsts[::step]:
            before = name.removesuffix(endings[0])
            yield kind, name, [modules[before + ending] for ending in endings]  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--windows", type=int, default=32, help="of 512 tokens")
    add("--layer-step", type=int, default=3, help="n: only each n-th layer")
    add("--cache", type=Path, default=CACHE, help="of the base model")
    add("--out", type=Path, default=RESULTS / "paper_slices.jsonl")
    args = parser.parse_args(arguments)
    model = load_masked_diffusion(args.cache)
    inputs = list(inputs_of_layers(model, args.layer_step))
    firsts = {name: linears[0] for _, name, linears in inputs}
    batches = list(dllm_calibration_batches(args.windows))
    moments, held_out = (second_moments(model, firsts, batches[i::2]) for i in (0, 1))
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for kind, name, linears in inputs:
        weights = [linear.weight.detach().float() for linear in linears]
        gram = damped(sum(weight.t() @ weight for weight in weights))
        scale = channel_scale(damped(sum(moments[name].values())), gram)
        shape = kronecker_shape(gram.shape[0])
        assert shape is not None
        for type_name, moment in moments[name].items():
            pair = (scaled(damped(m), scale) for m in (moment, held_out[name][type_name]))
            found[kind, type_name].append(lost(*pair, scaled(gram, 1 / scale), shape))
    rows: list[list[object]] = [["Linears", "token type", *KEEPS]]
    for (kind, type_name), losses in found.items():
        means = {keep: statistics.mean(loss[keep] for loss in losses) for keep in KEEPS}
        append_result(
            args.out,
            linears=kind,
            token_type=type_name,
            lost=means,
            num_windows=args.windows,
            num_layers=len(losses),
        )
        rows.append([kind, type_name, *(f"{mean:.3f}" for mean in means.values())])
    print(table(rows))


if __name__ == "__main__":
    main()
