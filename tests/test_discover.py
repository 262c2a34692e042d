"""Token types that are found in the data: a planted set of ids, nothing where nothing is, and what is predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_model import MASK, TinyModel, masked_ids, tiny_model
from torch import nn

import freeact_fx
from freeact_fx import ConfigError, QuantConfig, TokenTypes, discover
from freeact_fx.observe import observed
from freeact_fx.progress import Progress
from freeact_fx.spool import Batches
from freeact_fx.statistics import GroupStatistics

BATCHES = [
    torch.randint(0, MASK, (8, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)
]
PLAIN = QuantConfig(token_types=TokenTypes.single(), sink=None, plan="shift")
PLANTED = (5, 9, 40)


def planted() -> TinyModel:
    """Three ids in a corner of their own, all others in another; without attention, so that no token moves others."""
    model = tiny_model()
    with torch.no_grad():
        for block in model.blocks:
            block.o.weight.zero_()
        model.embed.weight.mul_(0.5).add_(torch.randn(48))
        model.embed.weight[list(PLANTED)] = torch.randn(48) + 0.5 * torch.randn(3, 48)
    return model


def find(model: nn.Module, config: QuantConfig = PLAIN, **options: Any) -> Any:
    return freeact_fx.discover_types(model, BATCHES, config, progress=False, **options)


def test_planted_ids_are_found() -> None:
    found = find(planted(), most_types=1)
    (split,) = found.splits
    assert split.token_ids == PLANTED
    assert split.accepted
    assert split.gain > 0.05
    ids = torch.cat(BATCHES)
    assert split.share == pytest.approx(
        float(torch.isin(ids, torch.tensor(PLANTED)).float().mean())
    )
    assert found.token_types.names == ("token", "found 1")
    assert found.token_types.types[1].token_ids == PLANTED


def test_a_mask_token_is_found() -> None:
    """A third of the tokens are alike: nobody had to say so."""
    batches = [masked_ids(8, 32, seed=seed) for seed in range(3)]
    options = {"most_types": 1, "progress": False}
    (split,) = freeact_fx.discover_types(tiny_model(), batches, PLAIN, **options).splits
    assert split.accepted
    assert split.token_ids == (MASK,)


def test_what_is_found_lowers_the_measured_error() -> None:
    """Over all held-out tokens alike, as it is predicted."""
    model = planted()
    types = find(model, most_types=1).token_types

    def error(config: QuantConfig) -> float:
        checkpoint = freeact_fx.calibrate(model, BATCHES, config, progress=False)
        with torch.no_grad():
            ids = torch.randint(0, MASK, (16, 32))
            want = model(ids)
            options = {"compiler": "eager", "checkpoint": checkpoint}
            torch._dynamo.reset()
            got = torch.compile(model, backend="freeact", options=options)(ids)
        return float((got - want).square().sum() / want.square().sum())

    with_types = QuantConfig(token_types=types, sink=None, plan="shift")
    assert error(with_types) < 0.9 * error(PLAIN)


def test_nothing_is_accepted_where_nothing_is() -> None:
    """One transform and no shift: a type of its own brings at most a clip, which is not predicted."""
    found = find(planted(), replace(PLAIN, plan="single"))
    assert [split.accepted for split in found.splits] == [False]
    assert found.splits[0].gain == pytest.approx(0, abs=0.01)
    assert found.token_types == PLAIN.token_types


def test_types_that_are_known_stay() -> None:
    """The mask token is claimed already, and the first position is the sink: neither is found again."""
    model = planted()
    with torch.no_grad():
        model.embed.weight[MASK] = 20 * torch.randn(48)
    config = QuantConfig(token_types=TokenTypes.mask_token(MASK), plan="shift")
    found = find(model, config, most_types=1)
    assert found.token_types.types[:2] == config.token_types.types
    assert found.splits[0].token_ids == PLANTED


def test_most_ids_keeps_the_frequent_ones() -> None:
    (split,) = find(planted(), most_types=1, most_ids=2, least_gain=0.0).splits
    counts = torch.cat(BATCHES).flatten().bincount()
    rarest = min(PLANTED, key=lambda token_id: int(counts[token_id]))
    assert split.token_ids == tuple(i for i in PLANTED if i != rarest)


def test_an_iterator_of_mappings() -> None:
    batches = ({"input_ids": ids} for ids in BATCHES)
    found = freeact_fx.discover_types(planted(), batches, PLAIN, most_types=1, progress=False)
    assert found == find(planted(), most_types=1)


@pytest.mark.parametrize("batch", [torch.randn(2, 4), {"pixels": torch.zeros(2)}, (torch.ones(3),)])
def test_batches_without_ids(batch: Any) -> None:
    with pytest.raises(ConfigError, match="must hold input ids"):
        freeact_fx.discover_types(tiny_model(), [batch], PLAIN, progress=False)


def test_without_the_last_type_it_is_the_same_as_never_declared() -> None:
    types = TokenTypes.mask_token(MASK)

    def statistics(config: QuantConfig, then: Any) -> list[GroupStatistics]:
        torch._dynamo.reset()
        with observed(tiny_model(), config, None, lambda _: False) as observers:
            return [then(s) for s in observers.collect(Batches(BATCHES), Progress(False))]

    merged = statistics(QuantConfig(token_types=types), discover._without_last_type)
    plain = QuantConfig(token_types=TokenTypes(types.types[:1]))
    for one, other in zip(merged, statistics(plain, lambda s: s), strict=True):
        assert one.config == other.config
        assert one.names == other.names
        assert torch.equal(one.count, other.count)
        assert torch.allclose(one.total, other.total, atol=1e-3)
        assert one.moment.keys() == other.moment.keys()
        for index, moment in one.moment.items():
            assert torch.allclose(moment, other.moment[index], rtol=1e-4, atol=1e-3)


def test_two_means_of_two_heaps() -> None:
    points = torch.cat([torch.randn(20, 3), torch.randn(30, 3) + 20]).double()
    part = discover.two_means(points, torch.ones(50).double(), 0)
    assert part.sum() in (20, 30)
    assert len(part[:20].unique()) == len(part[20:].unique()) == 1


def test_two_means_of_one_point() -> None:
    part = discover.two_means(torch.ones(4, 2).double(), torch.ones(4).double(), 0)
    assert bool(part.any())
    assert not bool(part.all())
