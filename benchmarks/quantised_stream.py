"""The default, its weights refitted to what the quantised layers before really deliver.

`QuantConfig.refit` fits weights to rounding as a model of noise has it, on moments of the float
model's activations (`freeact_fx/round_group.py`). Here they are fitted to rounding itself and to the
errors of all Linears before: group by group in the order of the model, with two streams of hidden
states, the float model's x and x^ of the model whose Linears so far are quantised. With x^ a
Linear's weight meets `u = [codes * scale, c]`, c the coefficients of the branch, and should make of
it what the dense Linear makes of x, less the bias table::

    r = x W^T + b - table[type],    S = sum_tokens w_type u^T u,    C = sum_tokens w_type u^T r

    V = argmin  sum_tokens w_type |r - u V^T|^2  +  ridge |V - V_0|^2
    V^T = (S + ridge I)^-1 (C + ridge V_0^T)

V_0 is the float weight under the group's transform, with its branch, and ridge the default's
`gptq_damping` as a part of the mean m of S's diagonal over the codes. The part of V that meets codes
is rounded by GPTQ under what the branch cannot make up for, `H_zz - H_zc H_cc^-1 H_cz` of
`H = S + ridge I`; then the branch is fitted to what the codes leave.

A row of V has as many unknowns as tokens have channels, and C the rounding of as many tokens as
there are: fitted to C alone, a Linear errs less on these tokens and more on others (14 windows of
512 tokens, masked diffusion, `down`: by 12 to 21 % more than at share 0 below). So C is mixed with
what the default's model of noise has in its place, without chance: of the rounded codes' energy a
part `noise` is rounding, which is uncorrelated with r, and they are smaller by `1 - noise` than what
was rounded::

    (1 - share) (S V_1^T - [noise m V_1z^T, 0])  +  share C,      V_1 = [V_0z / (1 - noise), V_0c]

Every eighth batch is held out, and each Linear takes the share whose codes, fitted to the other
batches, err least there. Its codes are then fitted to all batches; at share 0 it keeps the default's,
which come of the same model. Why not compare with the default's codes themselves: they have seen
the tokens that are held out here, which alone makes 4 to 9 % with 16 windows, in the first layer more.

What stays the default's: plans, transforms, clips, columns of the branch, bias tables, and w_type
(`GroupMoments.type_weights`); the checkpoint takes the same bytes. So do Linears of groups with
several slices (plans "duplicate" and "paper").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from decoder_layers import Batch, Block, decoder_blocks
from torch import Tensor, nn

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, compat
from freeact_fx.backend import observe_graph
from freeact_fx.convert import FreeActLinear, GroupTransformModule
from freeact_fx.gptq import gptq
from freeact_fx.observe import padding_of
from freeact_fx.predict import rounding_noise
from freeact_fx.reference import rows_of_type, transform_quantize, unpack_int4
from freeact_fx.round_group import RoundedLinear
from freeact_fx.transform import (
    GroupTransform,
    PackedLinear,
    quantize_branch,
    quantize_weight,
    treats_types_alike,
)

SHARES = (0.0, 0.25, 0.5, 1.0)
_EVERY = 8  # batches of which one is held out


class _Reached(Exception):
    """Raised inside a model to leave it, with what was to be seen there."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen


@dataclass
class _Moments:
    """Sums over tokens, by their weights, of what a group's weights meet and should make of it."""

    square: Tensor  # [U, U] fp64, of u^T u
    cross: Tensor  # [U, N] fp64, of u^T r, all Linears side by side
    energy: Tensor  # [N] fp64, of r^2

    def add(self, met: Tensor, wanted: Tensor, weight: Tensor) -> None:
        """u [n, U], r [n, N] and the tokens' weights [n, 1], all fp32."""
        weighted = met * weight
        self.square += weighted.t() @ met
        self.cross += weighted.t() @ wanted
        self.energy += (wanted.square() * weight).sum(0)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.square + other.square, self.cross + other.cross, self.energy + other.energy
        )

    def errors(self, weight: Tensor) -> Tensor:
        """Squared error [N] of each row of a weight [N, U], all fp64."""
        return self.energy + (weight * (weight @ self.square - 2 * self.cross.t())).sum(1)


@dataclass(frozen=True)
class _Group:
    """A group of the checkpoint on the model's device: its Linears, dense and as the default packs them."""

    name: str
    names: list[str]  # in the order the model calls them
    dense: list[nn.Linear]
    packed: list[PackedLinear]
    transform: GroupTransform
    type_weights: Tensor  # [P] fp32
    config: QuantConfig

    def moments(self) -> _Moments:
        t = self.transform
        met = t.num_codes + (0 if t.lowrank is None else t.lowrank.shape[1])
        wanted = sum(linear.out_features for linear in self.dense)
        shapes = ((met, met), (met, wanted), (wanted,))
        return _Moments(
            *(torch.zeros(s, dtype=torch.float64, device=t.left.device) for s in shapes)
        )

    def add(
        self, moments: _Moments, x: Tensor, delivered: Tensor, types: Tensor, padding: Tensor | None
    ) -> None:
        """Take in a batch: x and x^ [..., K], types and padding [B, T]."""
        t, types = self.transform, types.flatten()
        weight = self.type_weights[types]
        if padding is not None:
            weight = weight.masked_fill(padding.flatten().to(weight.device), 0)
        is_alike = treats_types_alike(t.num_rows, self.config.num_types)
        own_types = None if is_alike else types
        codes, scale, coefficients = transform_quantize(
            delivered.flatten(0, -2),
            own_types,
            *(t.shift, t.channel_scale, t.left, t.right, t.clip, t.lowrank),
            *(t.widths, t.slice_of_type, 0, t.own_rank, self.config.qmax),
        )
        met = codes.float() * scale
        if coefficients is not None:
            met = torch.cat([met, coefficients], 1)
        wanted = []
        for linear, packed in zip(self.dense, self.packed, strict=True):
            output = linear(x.flatten(0, -2)).float()
            if packed.bias_table is not None:
                output = output - rows_of_type(packed.bias_table, own_types, 0)
            wanted.append(output)
        moments.add(met, torch.cat(wanted, 1), weight.unsqueeze(1))

    def float_weights(self) -> Tensor:
        """V_0 [N, U] fp64."""
        weights = torch.cat([linear.weight.detach().double() for linear in self.dense])
        rest, branch = self.transform.split_branch(self.transform.transformed_weight(weights))
        return rest if branch is None else torch.cat([rest, branch.t()], 1)

    def mean_energy(self, moments: _Moments) -> Tensor:
        """Of a coordinate of the codes, summed over tokens."""
        return moments.square.diagonal()[: self.transform.num_codes].mean().clamp_min(1e-30)

    def modelled(self, moments: _Moments) -> Tensor:
        """The cross moment [U, N] as the model of noise has it, without errors of the Linears before."""
        k = self.transform.num_codes
        noise = rounding_noise(k, self.config.qmax)
        enlarged = self.float_weights().t().clone()
        enlarged[:k] /= 1 - noise
        cross = moments.square @ enlarged
        cross[:k] -= noise * self.mean_energy(moments) * enlarged[:k]
        return cross

    def refitted(self, moments: _Moments, share: float) -> list[PackedLinear]:
        """Codes and branch of each Linear, with a share of what was seen in the cross moment."""
        k, config = self.transform.num_codes, self.config
        weights = self.float_weights().t()
        ridge = config.gptq_damping * self.mean_energy(moments)
        square = moments.square.clone()
        square.diagonal().add_(ridge)
        cross = self.modelled(moments).lerp(moments.cross, share) + ridge * weights
        zz, zc, cc = square[:k, :k], square[:k, k:], square[k:, k:]
        to_branch = torch.linalg.solve(cc, zc.t())
        hessian = zz - zc @ to_branch
        target = torch.linalg.solve(hessian, cross[:k] - to_branch.t() @ cross[k:])
        rows = target.t().float().contiguous()
        _, scale = quantize_weight(rows, search=config.clip_search)
        codes = gptq(rows, scale, hessian.float(), 0.0)
        left = cross[k:] - zc.t() @ (codes.double() * scale.double().unsqueeze(1)).t()
        branch = torch.linalg.solve(cc, left)
        has_branch = self.transform.lowrank is not None
        num_rows = [linear.out_features for linear in self.dense]
        parts = (codes.split(num_rows), scale.split(num_rows), branch.split(num_rows, 1))
        return [
            RoundedLinear(
                own_codes,
                own_scale[None].contiguous(),
                packed.bias_table,
                *(quantize_branch(own_branch) if has_branch else (None, None)),
            ).packed()
            for packed, own_codes, own_scale, own_branch in zip(self.packed, *parts, strict=True)
        ]

    def errors(self, moments: _Moments, linears: Sequence[PackedLinear]) -> list[float]:
        """Squared error of each Linear on the tokens of the moments."""
        weights = []
        for packed in linears:
            codes = unpack_int4(packed.weight, self.transform.num_codes).double()
            weight = codes * packed.weight_scale.t().double()
            if packed.branch_weight is not None and packed.branch_scale is not None:
                branch = packed.branch_weight.double() * packed.branch_scale.double().unsqueeze(1)
                weight = torch.cat([weight, branch.t()], 1)
            weights.append(weight)
        by_row = moments.errors(torch.cat(weights))
        num_rows = [linear.out_features for linear in self.dense]
        return [float(part.sum()) for part in by_row.split(num_rows)]

    def best(
        self, fitted: _Moments, held_out: _Moments
    ) -> tuple[list[PackedLinear], list[dict[str, float]]]:
        """Each Linear with the share that errs least on held-out tokens; this, and how much less than share 0."""
        errors = {s: self.errors(held_out, self.refitted(fitted, s)) for s in SHARES}
        indices = range(len(self.names))
        shares = [min(SHARES, key=lambda s: errors[s][i]) for i in indices]
        everything = fitted + held_out
        made = {s: self.refitted(everything, s) if s else self.packed for s in set(shares)}
        facts = [
            {"share": s, "error": errors[s][i] / max(errors[0.0][i], 1e-30)}
            for i, s in enumerate(shares)
        ]
        return [made[s][i] for i, s in enumerate(shares)], facts


@torch.no_grad()
def refit_on_quantised_stream(
    model: nn.Module, batches: Sequence[Batch], config: QuantConfig, *, progress: bool = True
) -> Checkpoint:
    """The default's checkpoint, codes and branches of the Linears in decoder layers fitted anew.

    Its statistics are the default's; "quantised_stream" among a group's has by Linear the "share" of
    what was seen (0: the default's codes), and the "error" on held-out tokens by which it was chosen,
    relative to that of share 0. The model is left as it was.
    Raises ValueError for a single batch, RuntimeError for layers that do not follow one another.
    """
    if len(batches) < 2:
        raise ValueError("refit_on_quantised_stream: one batch is held out. Give at least 2.")
    checkpoint = freeact_fx.calibrate(model, batches, config, progress=progress)
    linears, statistics = dict(checkpoint.linears), dict(checkpoint.statistics)
    types = types_of(model, batches, config)
    # Layers that stay float, too: the stream goes through them. What else it says is for baselines.
    all_layers = replace(config, skip=(), gptq=False, clip_search=False)
    before: Block | None = None
    stream: list[Tensor] = []
    for block in decoder_blocks(model, batches, all_layers, "quantised stream", progress):
        if before is not None and block.inputs is not before.outputs:
            raise RuntimeError(
                f"refit_on_quantised_stream: a layer between {before.name} and {block.name} has no "
                f"Linear that could be quantised, and the stream would not go through it."
            )
        before = block
        twin = replace(block, layer=copy.deepcopy(block.layer), inputs=stream or block.inputs)
        for group in _groups_of(block, checkpoint):
            chosen = group.packed
            if len(group.transform.widths) == 1:
                moments = {is_held_out: group.moments() for is_held_out in (False, True)}
                for index, batch in enumerate(batches):
                    with freeact_fx.token_types(types[index]):
                        x, delivered = (_input_of(group, b, index) for b in (block, twin))
                    own = moments[(len(batches) - 1 - index) % _EVERY == 0]
                    group.add(own, x, delivered, types[index], padding_of(batch))
                chosen, facts = group.best(moments[False], moments[True])
                own_facts = dict(zip(group.names, facts, strict=True))
                statistics[group.name] = statistics[group.name] | {"quantised_stream": own_facts}
            transform = GroupTransformModule(group.transform)
            for name, packed in zip(group.names, chosen, strict=True):
                on_host = PackedLinear(**{n: t.cpu() for n, t in packed.tensors().items()})
                linears[name] = replace(linears[name], packed=on_host)
                linear = FreeActLinear(transform, packed, config, linears[name].fingerprint)
                twin.layer.set_submodule(name.removeprefix(f"{block.name}."), linear)
        stream = []
        for index, own_types in enumerate(types):
            with freeact_fx.token_types(own_types):
                stream.append(twin.run(index))
    return Checkpoint(checkpoint.config, checkpoint.groups, linears, statistics)


def _groups_of(block: Block, checkpoint: Checkpoint) -> Iterator[_Group]:
    """The checkpoint's groups in a layer, in the order the model calls them."""
    called = [name for group in block.groups for name in group.names if name in checkpoint.linears]
    members: dict[str, list[str]] = {}
    for name in called:
        members.setdefault(checkpoint.linears[name].group, []).append(name)
    config, device = checkpoint.config, block.inputs[0].device
    for group, names in members.items():
        # As GroupMoments.type_weights, where a type's share is in the number of its tokens.
        of_types = checkpoint.statistics[group]["energy"].values()
        energies = {name: sum(e[name] for e in of_types) for name in next(iter(of_types))}
        mean = sum(energies.values()) / len(energies)
        energy = torch.tensor([energies.get(name, mean) for name in config.row_names])
        packed = (checkpoint.linears[name].packed.tensors().items() for name in names)
        yield _Group(
            group,
            names,
            [block.layer.get_submodule(name.removeprefix(f"{block.name}.")) for name in names],  # type: ignore[misc]
            [PackedLinear(**{n: t.to(device) for n, t in tensors}) for tensors in packed],
            checkpoint.groups[group].to(device),
            energy.clamp_min(1e-30).rsqrt().to(device),
            config,
        )


def _input_of(group: _Group, block: Block, index: int) -> Tensor:
    """What a group's Linears read in a batch, [B, T, K]; the rest of the layer is not run."""
    first = block.layer.get_submodule(group.names[0].removeprefix(f"{block.name}."))

    def leave(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    hook = first.register_forward_pre_hook(leave)
    try:
        block.run(index)
    except _Reached as reached:
        return reached.seen
    finally:
        hook.remove()
    raise AssertionError("decoder_layers has seen this Linear called")


def types_of(model: nn.Module, batches: Iterable[Batch], config: QuantConfig) -> list[Tensor]:
    """The types [B, T] int32 of each batch's tokens, as calibration finds them; of untyped ones the default."""

    def take(x: Tensor, types: Tensor | None) -> None:
        shape = x.shape[:-1]
        found = torch.zeros(shape, device=x.device) if types is None else types.reshape(shape)
        raise _Reached(found.clamp_min(0).int())

    def observed(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return observe_graph(gm, example_inputs, config, lambda linears: take)

    device = next(model.parameters()).device
    found = []
    with compat.traced_apart(model, observed) as traced:
        for batch in batches:
            try:
                traced(**{name: value.to(device) for name, value in batch.items()})
            except _Reached as reached:
                found.append(reached.seen)
    return found
