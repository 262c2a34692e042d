"""What others do for all tokens alike, as checkpoints: convert and compile run them on real codes.

    rtn              round to nearest, no transform at all
    smooth_hadamard  SmoothQuant's channel scale (arXiv 2211.10438, alpha 0.5) and a random Hadamard
                     transform like QuaRot's (arXiv 2404.00456), as Kronecker factors; a factor of a
                     size without a construction here is a random orthogonal matrix
    closed_single    freeact_fx's own plan "single"
    flatquant_like   one learned Kronecker transform per group, like FlatQuant's (arXiv 2410.09426)

Each takes a model in eval mode with a list of decoder layers (any of Hugging Face's), batches of
keyword arguments and a config, of which formats, seed and calibration settings count; the token
types do not. With `gptq=True` weights are rounded by our GPTQ instead of to nearest, with
`clip_search=True` clips are chosen by our search instead of none or the learned ones. The Linears
inside of decoder layers are quantised, which are those that freeact_fx.calibrate takes. Statistics,
inputs and targets all come from the float model, on its device; the checkpoint is on the CPU.

FlatQuant as published: a channel scale, random orthogonal factors to start from in the
direct-inverse form, clips for activations and weight rows, all trained decoder layer by decoder
layer on the squared error of the layer's output; AdamW at 5e-3 (clips at 5e-2), cosine to 5e-6, 15
epochs at batch 4, weights rounded to nearest. What differs, since only such a transform can run
here: codes in [-7, 7]; one activation clip per group and for both signs; `o` has a transform of its
own, unshared with the V cache, and the cache is not quantised. And: fp32 throughout (without TF32,
unless the caller allows it) instead of autocast to 16 bits; the channel scale is trained as its
logarithm, so that it stays positive.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from decoder_layers import Batch, Block, Group, decoder_blocks, rebatched
from torch import Tensor, nn

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.checkpoint import PackedEntry, fingerprint
from freeact_fx.gptq import gptq as gptq_codes
from freeact_fx.reference import pack_int4, quantize_tokens, transform
from freeact_fx.refine import LearnableTransform, descend, optimizer_with_schedule
from freeact_fx.transform import GroupTransform, PackedLinear, quantize_weight


def rtn(
    model: nn.Module,
    batches: Iterable[Batch],
    config: QuantConfig,
    *,
    gptq: bool = False,
    clip_search: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """The identity as transform."""
    parts = _Parts(config, gptq, clip_search)
    for block in decoder_blocks(model, batches, parts.config, "round to nearest", progress):
        for group in block.groups:
            d1, d2 = group.shape
            parts.add(group, _single(torch.eye(d1), torch.eye(d2), group))
    return parts.checkpoint()


def smooth_hadamard(
    model: nn.Module,
    batches: Iterable[Batch],
    config: QuantConfig,
    *,
    gptq: bool = False,
    clip_search: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """SmoothQuant's channel scale at alpha 0.5, then random Hadamard factors."""
    parts = _Parts(config, gptq, clip_search)
    generator = torch.Generator().manual_seed(config.seed)
    for block in decoder_blocks(model, batches, parts.config, "smooth + Hadamard", progress):
        for group in block.groups:
            left, right = (random_hadamard(size, generator) for size in group.shape)
            parts.add(group, _single(left, right, group, _smooth_scale(group, 0.5)))
    return parts.checkpoint()


def closed_single(
    model: nn.Module,
    batches: Iterable[Batch],
    config: QuantConfig,
    *,
    gptq: bool = False,
    clip_search: bool = True,
    progress: bool = True,
) -> Checkpoint:
    """The package's own transform for all tokens alike."""
    one_type = _one_type(config, gptq, clip_search)
    return freeact_fx.calibrate(model, batches, one_type, progress=progress)


def flatquant_like(
    model: nn.Module,
    batches: Iterable[Batch],
    config: QuantConfig,
    *,
    epochs: int = 15,
    batch_size: int = 4,
    num_windows: int | None = None,
    learning_rate: float = 5e-3,
    gptq: bool = False,
    clip_search: bool = False,
    progress: bool = True,
) -> Checkpoint:
    """One learned Kronecker transform per group; see the module's docstring.

    epochs       passes over the batches for each decoder layer
    batch_size   rows per step: batches of equal shapes are joined, or split
    num_windows  rows to learn from, the first so many; None: all

    Raises RuntimeError for a layer whose error is not finite in the end.
    """
    parts = _Parts(config, gptq, clip_search)
    generator = torch.Generator().manual_seed(config.seed)
    if num_windows is not None:
        batches = rebatched(batches, 1)[:num_windows]
    rows = rebatched(batches, batch_size)
    for block in decoder_blocks(model, rows, parts.config, "FlatQuant-like", progress):
        transforms = []
        for group in block.groups:
            left, right = (random_orthogonal(size, generator) for size in group.shape)
            start = _single(left, right, group, _smooth_scale(group, 0.3))
            biases = [linear.bias for linear in group.linears]
            transforms.append(
                LearnableTransform(
                    start, group.weights, biases, qmax=config.qmax, clip_search=False
                )
            )
        error = _train(block, transforms, epochs, learning_rate)
        block.bar.set_postfix_str(f"relative error of the last layer {error:.5f}")
        if not math.isfinite(error):
            raise RuntimeError(
                f"flatquant_like: {block.name}: the error must be finite after {epochs} epochs, got "
                f"{error}. Lower learning_rate from {learning_rate}."
            )
        for group, learned in zip(block.groups, transforms, strict=True):
            scales = None if clip_search else learned.weight_scales()
            parts.add(group, learned.to_group_transform(), scales)
    return parts.checkpoint()


def _one_type(config: QuantConfig, gptq: bool, clip_search: bool) -> QuantConfig:
    return replace(
        config,
        token_types=TokenTypes.single(),
        sink=None,
        plan="single",
        gptq=gptq,
        clip_search=clip_search,
        refine_steps=0,
    )


# ------------------------------------------------------------------ transforms to start from


def _smooth_scale(group: Group, alpha: float) -> Tensor:
    """`w_max^(1-alpha) / x_max^alpha` per channel [K], to be multiplied with the activations."""
    weight = torch.cat([w.detach().float() for w in group.weights]).abs().amax(0)
    scale = weight.clamp_min(1e-5) ** (1 - alpha) / group.largest.clamp_min(1e-5) ** alpha
    return scale / scale.log().mean().exp()


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square)[0].float()


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix over the root of its size, rows with random signs; or a random orthogonal."""
    matrix = hadamard(size)
    if matrix is None:
        return random_orthogonal(size, generator)
    signs = 1 - 2 * torch.randint(0, 2, (size, 1), generator=generator)
    return signs * matrix / math.sqrt(size)


def hadamard(size: int) -> Tensor | None:
    """A matrix [size, size] of 1 and -1 with orthogonal rows, fp32; None if none is known here.

    Constructions: Sylvester's doubling, and Paley's two, from the quadratic residues of a prime.
    """
    if size == 1:
        return torch.ones(1, 1)
    half = hadamard(size // 2) if size % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1], [1, -1]]), half)
    if size % 4:
        return None
    if _is_prime(size - 1):  # 3 mod 4: the conference matrix is skew
        return _conference(size - 1, -1.0) + torch.eye(size)
    if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:  # then it is symmetric
        conference, eye = _conference(size // 2 - 1, 1.0), torch.eye(size // 2)
        zeros = torch.tensor([[1.0, -1], [-1, -1]])
        return torch.kron(conference, torch.tensor([[1.0, 1], [1, -1]])) + torch.kron(eye, zeros)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % n for n in range(2, math.isqrt(number) + 1))


def _conference(prime: int, sign: float) -> Tensor:
    """Paley's [prime + 1, prime + 1]: zero diagonal, 1 and -1 elsewhere, orthogonal rows."""
    residue = torch.full((prime,), -1.0)
    residue[torch.arange(1, prime) ** 2 % prime] = 1
    residue[0] = 0
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[1:, 1:] = residue[(index[:, None] - index) % prime]
    matrix[1:, 0] = sign
    matrix[0, 0] = 0
    return matrix


def _single(
    left: Tensor, right: Tensor, group: Group, scale: Tensor | None = None
) -> GroupTransform:
    fitted = GroupTransform(
        plan="single",
        left=left,
        right=right.unsqueeze(0),
        clip=torch.ones(2),
        channel_scale=scale,
        widths=(left.shape[1],),
        slice_of_type=(0, 0),
    )
    return fitted.to(group.weights[0].device)


# ------------------------------------------------------------------ training


class _SharedOutputs:
    """A group's outputs, computed when its first Linear is called and forgotten after its last."""

    def __init__(self, learned: LearnableTransform) -> None:
        self.learned = learned
        self.outputs: tuple[Tensor, ...] = ()

    def output(self, index: int, x: Tensor) -> Tensor:
        if not self.outputs:
            self.outputs = self.learned(x)
        output = self.outputs[index]
        if index == len(self.outputs) - 1:
            self.outputs = ()
        return output


def _train(
    block: Block, transforms: Sequence[LearnableTransform], epochs: int, learning_rate: float
) -> float:
    """Train a layer's transforms on its outputs, all together.

    Returns the squared error at the end, relative to the energy of what the layer adds to its input.
    """
    num_batches = len(block.inputs)
    optimizer, schedule = optimizer_with_schedule(transforms, epochs * num_batches, learning_rate)
    with contextlib.ExitStack() as patches:
        for group, learned in zip(block.groups, transforms, strict=True):
            shared = _SharedOutputs(learned)
            for index, linear in enumerate(group.linears):
                forward = functools.partial(shared.output, index)
                patches.enter_context(mock.patch.object(linear, "forward", forward))
        with torch.enable_grad():
            for _ in range(epochs):
                for index, wanted in enumerate(block.outputs):
                    loss = F.mse_loss(block.run(index).float(), wanted.float())
                    descend(optimizer, schedule, loss)
        with torch.no_grad():
            errors = [
                (block.run(index) - wanted).float().square().sum()
                for index, wanted in enumerate(block.outputs)
            ]
    energies = [
        (wanted - given).float().square().sum()
        for given, wanted in zip(block.inputs, block.outputs, strict=True)
    ]
    return float(torch.stack(errors).sum() / torch.stack(energies).sum())


# ------------------------------------------------------------------ the checkpoint


class _Parts:
    """The parts of a checkpoint, group by group."""

    def __init__(self, config: QuantConfig, gptq: bool, clip_search: bool) -> None:
        self.config = _one_type(config, gptq, clip_search)
        self.groups: dict[str, GroupTransform] = {}
        self.linears: dict[str, PackedEntry] = {}

    @torch.no_grad()
    def add(
        self, group: Group, fitted: GroupTransform, learned_scales: list[Tensor] | None = None
    ) -> None:
        """Round and pack a group's weights; learned_scales [N] of each row are kept if given."""
        config = self.config
        if config.clip_search:
            fitted = replace(fitted, clip=_searched_clip(fitted, group, config))
        hessian = None
        if group.moment is not None:
            hessian = _transformed(fitted, _transformed(fitted, group.moment).t())
        for index, (name, weight) in enumerate(zip(group.names, group.weights, strict=True)):
            transformed = fitted.transformed_weight(weight.detach().float()).float()
            codes, scale = quantize_weight(transformed, search=config.clip_search)
            if learned_scales is not None:
                scale = learned_scales[index]
                codes = (transformed / scale[:, None]).round().clamp(-7, 7).to(torch.int8)
            if hessian is not None:
                codes = gptq_codes(transformed, scale, hessian, config.gptq_damping)
            bias_table = fitted.bias_table(weight, group.linears[index].bias)
            packed = PackedLinear(pack_int4(codes), scale[None], bias_table)
            on_host = PackedLinear(**{n: t.cpu() for n, t in packed.tensors().items()})
            self.linears[name] = PackedEntry(
                group.names[0], weight.shape[1], on_host, fingerprint(weight)
            )
        self.groups[group.names[0]] = fitted.to(torch.device("cpu"))

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.config, self.groups, self.linears)


def _transformed(fitted: GroupTransform, rows: Tensor) -> Tensor:
    """Rows [n, K] as they are rounded, [n, K] fp32."""
    t = fitted
    operands = (None, t.channel_scale, t.left, t.right, None, t.widths, t.slice_of_type)
    return transform(rows.contiguous(), None, *operands, default_type=0, own_rank=0)[0]


def _searched_clip(fitted: GroupTransform, group: Group, config: QuantConfig) -> Tensor:
    """As the package's clip search: least squared error of the sampled tokens, after the transform."""
    z = _transformed(fitted, torch.cat(group.sample))
    candidates = torch.linspace(0.5, 1.0, 11, device=z.device)
    errors = []
    for candidate in candidates:
        codes, scale = quantize_tokens(z, candidate[None], config.qmax)
        errors.append((codes.float() * scale - z).square().sum())
    return candidates[torch.stack(errors).argmin()].expand(2).clone()
