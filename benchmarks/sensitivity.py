"""What an error in a token of each type costs the predictions of a masked-diffusion model.

To second order the KL divergence that errors dy of a Linear's outputs make is the sum over tokens of
`(g dy)^2 / 2`, with g the gradient of the log-likelihood of labels that the model itself draws
(Fisher). With errors of no preferred direction a token counts by `|g|^2`. Here its mean over the
tokens of each type, for every Linear; the accuracy benchmark's row "sensitivity" weighs types by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeact_fx import QuantConfig


def gradient_energies(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], config: QuantConfig, mask_token: int
) -> dict[str, Tensor]:
    """Mean squared norm of the gradient in each Linear's outputs, by token type [num_types] fp64.

    model    maps input_ids [B, T] to logits [B, T, vocabulary]; those at i - 1 are for token i
    batches  with input_ids; a type that they lack has 0

    Parameters get no gradients. A Linear is called once in a forward. Labels are drawn with the config's seed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    energies = {n: torch.zeros(config.num_types, dtype=torch.float64) for n in names.values()}
    counts = torch.zeros(config.num_types, dtype=torch.float64)
    outputs: dict[str, Tensor] = {}

    def watch(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        return outputs.setdefault(names[module], output)

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in names:
            hooks.callback(module.register_forward_hook(watch).remove)
        for batch in batches:
            outputs.clear()
            ids = batch["input_ids"]
            logits = model(**batch)[:, :-1][ids[:, 1:] == mask_token].float()
            drawn = logits.detach().softmax(-1).cpu().multinomial(1, generator=generator)
            loss = F.cross_entropy(logits, drawn[:, 0].to(ids.device), reduction="sum")
            types = config.token_types.from_ids(ids)
            if config.sink == "first":
                types[:, 0] = config.num_types - 1
            types = types.flatten().long().cpu()
            counts += types.bincount(minlength=config.num_types)
            gradients = torch.autograd.grad(loss, list(outputs.values()))
            for name, gradient in zip(outputs, gradients, strict=True):
                energy = gradient.flatten(0, -2).double().square().sum(1).cpu()
                energies[name].index_add_(0, types, energy)
    return {name: energy / counts.clamp_min(1) for name, energy in energies.items()}
