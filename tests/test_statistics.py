"""What calibration takes in of an activation: against plain sums in fp64, and as estimates of what was not seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from freeact_fx import ConfigError, memory
from freeact_fx.memory import free_bytes
from freeact_fx.token_moments import TokenMoments, TypeSplit


def moments_of(
    tokens: Tensor, types: Tensor | None = None, *, num_types: int = 3, sample_tokens: int = 16
) -> TokenMoments:
    """After one observation."""
    seen = TokenMoments(tokens.shape[1], num_types + 1, sample_tokens, 0, "layer.q")
    seen.observe(tokens, types)
    return seen


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ counts, sums, moments


@settings(max_examples=40, deadline=None)
@given(
    num_features=st.integers(2, 40),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    num_types=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_sums_and_moments(num_features: int, sizes: list[int], num_types: int, seed: int) -> None:
    """Of several batches of various sizes, in which not every type occurs."""
    tokens = normal(sum(sizes), num_features, seed=seed)
    types = torch.randint(
        0, num_types, (sum(sizes),), generator=torch.Generator().manual_seed(seed)
    )
    seen = TokenMoments(num_features, num_types + 1, 16, 0, "layer.q")
    for batch, batch_types in zip(tokens.split(sizes), types.split(sizes), strict=True):
        seen.observe(batch[None], batch_types[None].int())
        seen.moment  # noqa: B018  (reading it in between must not disturb it)
    present = types.unique().tolist()
    assert sorted(seen.moment) == sorted(seen.sample) == present
    for index in range(num_types):
        own = tokens[types == index].double()
        assert seen.count[index] == len(own)
        assert torch.allclose(seen.total[index], own.sum(0), atol=1e-4)
        if index in present:
            assert torch.allclose(seen.moment[index].double(), own.t() @ own, atol=1e-4)
            assert torch.allclose(seen.moment[index], seen.moment[index].t(), atol=1e-4)
    assert seen.count[-1] == 0


def test_a_split_is_that_of_the_types() -> None:
    types = torch.tensor([[2, 0, 2], [0, 0, 4]], dtype=torch.int32)
    split = TypeSplit.of(types, 6)
    assert split.counts == ((0, 3), (2, 2), (4, 1))
    assert split.order is not None
    assert split.order.tolist() == [1, 3, 4, 0, 2, 5]
    assert TypeSplit.of(torch.full((5,), 3), 5) == TypeSplit(None, ((3, 5),))
    assert TypeSplit.of(None, 7) == TypeSplit(None, ((0, 7),))


def test_padding_is_in_no_type() -> None:
    types = torch.tensor([[2, 0, 2], [0, 0, 4]], dtype=torch.int32)
    padding = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool()
    for own, counts, order in (
        (types, ((0, 2), (2, 1)), [1, 3, 2]),
        (None, ((0, 3),), [1, 2, 3]),
        (torch.full((2, 3), 5), ((5, 3),), [1, 2, 3]),
    ):
        split = TypeSplit.of(own, 6, padding)
        assert split.counts == counts
        assert split.order is not None
        assert split.order.tolist() == order
    seen = TokenMoments(4, 7, 16, 0, "layer.q")
    tokens = normal(6, 4)
    seen.observe(tokens, TypeSplit.of(types, 6, padding))
    seen.observe(tokens, TypeSplit.of(types, 6, torch.ones(2, 3).bool()))
    assert seen.count.tolist() == [2, 0, 1, 0, 0, 0, 0]
    assert torch.allclose(seen.total[2].float(), tokens[2])


def test_rounding_of_many_tokens() -> None:
    """262144 tokens in batches of 512, channels from 1e-3 to 1e3, some of them constant: within the stated 1e-5 of
    sqrt(C_ii C_jj). Token by token into the same totals it would be 1e-3."""
    scales = torch.logspace(-3, 3, 24)
    tokens = normal(1 << 18, 24) * scales + scales.flip(0)
    tokens[:, 5] = 3.0
    seen = TokenMoments(24, 2, 16, 0, "layer.q")
    exact = torch.zeros(24, 24, dtype=torch.float64)
    for batch in tokens.split(512):
        seen.observe(batch)
        exact += batch.double().t() @ batch.double()
    size = exact.diagonal().sqrt()
    off = (seen.moment[0].double() - exact).abs() / torch.outer(size, size)
    assert float(off.max()) < 1e-5
    off = (seen.total[0] - tokens.double().sum(0)).abs() / (size * 512)
    assert float(off.max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tokens_are_taken_exactly(dtype: torch.dtype) -> None:
    """Products of 16-bit floats fit into fp32: the moment is that of the rounded tokens, not a 16-bit one."""
    tokens = normal(300, 32).to(dtype)
    seen = moments_of(tokens)
    exact = tokens.double().t() @ tokens.double()
    assert torch.allclose(seen.moment[0].double(), exact, rtol=1e-5, atol=1e-4)
    assert seen.total.dtype == torch.float64
    assert seen.samples()[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    tokens = normal(9, 8).to(dtype)
    tokens[4, 3] = bad
    with pytest.raises(ConfigError, match=r"the input of layer\.q holds NaN or infinite values"):
        moments_of(tokens, torch.arange(9) % 3)


def test_large_finite_values_are_taken() -> None:
    tokens = torch.full((2, 8), 60000.0, dtype=torch.float16)
    assert moments_of(tokens).total[0, 0] == 120000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_gpu(dtype: torch.dtype) -> None:
    """The same as on the CPU, kept there; the same tokens are sampled."""
    tokens, types = normal(900, 96).to(dtype), torch.arange(900) % 3
    on_cpu, on_gpu = (TokenMoments(96, 4, 16, 0, "layer.q") for _ in range(2))
    for batch, batch_types in zip(tokens.split(200), types.split(200), strict=True):
        on_cpu.observe(batch, batch_types)
        on_gpu.observe(batch.cuda(), batch_types.cuda())
    assert torch.equal(on_cpu.count, on_gpu.count)
    assert torch.allclose(on_cpu.means(), on_gpu.means().cpu(), atol=1e-5)
    for index in range(3):
        assert on_gpu.moment[index].is_cuda
        assert torch.allclose(on_cpu.moment[index], on_gpu.moment[index].cpu(), atol=1e-3)
    for held_out in (False, True):
        pairs = zip(
            on_cpu.samples(held_out=held_out), on_gpu.samples(held_out=held_out), strict=True
        )
        assert all(b.is_cuda and torch.equal(a, b.cpu()) for a, b in pairs)


# ------------------------------------------------------------------ memory


def test_bytes_are_those_of_the_formula() -> None:
    seen = moments_of(normal(600, 128), torch.arange(600) % 3)
    kept = [*seen.moment.values(), *(tokens for _, tokens in seen.sample.values()), seen.total[:3]]
    assert sum(t.nbytes for t in kept) == TokenMoments.bytes_needed(128, 3, 16)
    seen.release()
    assert not seen.moment
    assert not seen.sample
    assert seen.count.sum() == 600


def test_free_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = torch.device("cpu")
    assert 1 << 20 < free_bytes(host) < 1 << 50
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("41000000\n")
    (tmp_path / "memory.stat").write_text("anon 30000000\ninactive_file 2000000\n")
    assert free_bytes(host) == 11_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(host) > 11_000_000


# ------------------------------------------------------------------ the sample


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, (1, 1)), (3, (3, 3)), (4, (3, 1)), (31, (24, 7)), (32, (16, 16)), (500, (16, 16))],
)
def test_parts_of_the_sample(num_tokens: int, expected: tuple[int, int]) -> None:
    """Apart, at most 16 tokens of each type in each, a quarter held out of few; fewer than four are in both."""
    tokens = torch.arange(3.0 * num_tokens)[:, None].expand(-1, 8)
    types = torch.arange(3 * num_tokens) % 3
    seen = TokenMoments(8, 4, 16, 0, "layer.q")
    for batch, batch_types in zip(tokens.split(50), types.split(50), strict=True):
        seen.observe(batch, batch_types)
    numbers = []
    for held_out, kept in zip((False, True), expected, strict=True):
        sampled, sampled_types = seen.samples(held_out=held_out)
        numbers.append(sampled[:, 0].long())
        assert torch.equal(sampled_types, numbers[-1] % 3)
        assert sampled_types.bincount().tolist() == [kept] * 3
    assert len(torch.cat(numbers).unique()) == 3 * min(32, num_tokens)


def test_the_sample_is_uniform() -> None:
    """Early and late tokens are as likely, in both halves: chi-squared over ten parts of the stream, 400 seeds.

    9 degrees of freedom stay below 27.9 in 999 of 1000 cases."""
    tokens = torch.arange(200.0)[:, None].expand(-1, 2)
    hits = torch.zeros(2, 200)
    for seed in range(400):
        seen = TokenMoments(2, 2, 4, seed, "layer.q")
        for batch in tokens.split(30):
            seen.observe(batch)
        for half in (0, 1):
            hits[half][seen.samples(held_out=bool(half))[0][:, 0].long()] += 1
    assert hits.sum(1).tolist() == [1600, 1600]
    parts = hits.view(2, 10, 20).sum(2)
    # Drawn without replacement: the variance of a part is smaller by (200 - 20) / 199.
    assert float(((parts - 160).square() / 160).sum(1).max()) < 27.9


def test_groups_sample_the_same_tokens() -> None:
    """Statistics of two groups hold the same tokens, whatever the width."""
    types = torch.arange(300) % 2
    narrow, wide = TokenMoments(2, 3, 16, 7, "a"), TokenMoments(5, 3, 16, 7, "b")
    other = TokenMoments(2, 3, 16, 8, "c")
    tokens = torch.arange(300.0)[:, None]
    for batch, batch_types in zip(tokens.split(70), types.split(70), strict=True):
        for seen, width in ((narrow, 2), (wide, 5), (other, 2)):
            seen.observe(batch.expand(-1, width), batch_types)
    for held_out in (False, True):
        chosen = [seen.samples(held_out=held_out)[0][:, 0] for seen in (narrow, wide, other)]
        assert torch.equal(chosen[0], chosen[1])
        assert not torch.equal(chosen[0], chosen[2])


# ------------------------------------------------------------------ means


def test_many_tokens_leave_a_mean_where_it_is() -> None:
    """It moves by three standard errors at most, in every channel, wherever the mean of all tokens is."""
    types = torch.arange(30000) % 3
    tokens = normal(30000, 64) + types[:, None] * torch.linspace(-3, 3, 64)
    seen = moments_of(tokens, types)
    for index in range(3):
        own = tokens[types == index].double()
        moved = (seen.means()[index] - own.mean(0)).abs()
        assert bool((moved <= 3.03 * own.std(0) / len(own) ** 0.5).all())
        # Where the type differs, by far less.
        assert float(moved[:20].max()) < 1e-3 * float(own.std()) or index == 1


@pytest.mark.parametrize(("num_tokens", "part"), [(1, 1.05), (4, 0.9), (16, 0.8)])
def test_few_tokens_do_not_overfit_their_mean(num_tokens: int, part: float) -> None:
    """The type lies off by a third of a standard deviation: the shrunk mean is nearer to the true one than the mean of
    the tokens and that of all tokens are."""
    true = 0.3 * normal(800, seed=2).double()
    tokens = torch.cat([normal(2000, 800), normal(num_tokens, 800, seed=1) + true.float()])
    types = (torch.arange(len(tokens)) >= 2000).int()
    seen = moments_of(tokens, types)

    def risk(mean: Tensor) -> float:
        return float((mean - true).square().mean())

    own, pooled = risk(seen.total[1] / num_tokens), risk(tokens.double().mean(0))
    assert risk(seen.means()[1]) < part * min(own, pooled)


@pytest.mark.parametrize("num_tokens", [1, 4, 16])
def test_a_type_that_hardly_differs_has_nearly_the_mean_of_all(num_tokens: int) -> None:
    """But for one channel, by which its few tokens stand out."""
    tokens = normal(2000 + num_tokens, 800)
    tokens[2000:, 7] += 50
    types = (torch.arange(len(tokens)) >= 2000).int()
    means = moments_of(tokens, types).means()
    own = tokens[2000:].double().mean(0)
    assert float(means[1][7]) == pytest.approx(float(own[7]), rel=0.01)
    rest = torch.arange(800) != 7
    assert float(means[1][rest].square().mean()) < 0.15 * float(own[rest].square().mean())


def test_one_massive_token_is_believed() -> None:
    """The first token of a sequence: hundreds of standard deviations away in one channel."""
    tokens = normal(500, 16)
    tokens[0, 3] = 2000.0
    types = torch.zeros(500).int()
    types[0] = 1
    mean = moments_of(tokens, types).means()[1]
    assert mean[3] == pytest.approx(2000, rel=1e-3)
    # ... and its other channels are like anyone's.
    assert float(mean[4:].square().mean()) < float(tokens[0, 4:].square().mean()) / 2


def test_a_type_that_was_not_seen_has_the_mean_of_all() -> None:
    tokens = normal(100, 16) + 1
    means = moments_of(tokens, torch.arange(100) % 2).means()
    assert torch.allclose(means[2], tokens.double().mean(0), rtol=1e-6)
    assert torch.allclose(means[3], tokens.double().mean(0), rtol=1e-6)


def test_one_token_of_each_type() -> None:
    """Nothing is known of a variance within types: that of all tokens is taken."""
    tokens = normal(5, 16)
    means = moments_of(tokens, torch.arange(5), num_types=5).means()
    assert bool(means.isfinite().all())
    spread = (means[:5] - tokens.double().mean(0)).square().mean()
    assert float(spread) < float(tokens.var(0, correction=0).mean()) / 2


def test_constant_channels_have_their_value_as_mean() -> None:
    tokens = torch.full((40, 8), 7.5)
    assert torch.allclose(
        moments_of(tokens, torch.arange(40) % 2).means()[:2].float(), tokens[:2], rtol=1e-6
    )
