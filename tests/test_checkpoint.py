"""Checkpoints: what is written is what is read, bit for bit, and small."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_transforms import EXACT_PLANS, random_transform
from safetensors.torch import load_file
from tiny_model import LINEARS, MASK, TinyModel, masked_ids, relative, tiny_model
from torch import nn

import freeact_fx
from freeact_fx import Checkpoint, QuantConfig, TokenTypes
from freeact_fx.checkpoint import PackedEntry, _load_linear, fingerprint
from freeact_fx.errors import CheckpointError
from freeact_fx.reference import unpack_int4
from freeact_fx.statistics import GroupStatistics
from freeact_fx.transform import orthogonal_transform, pack_linear

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK))
BATCHES = [masked_ids(seed=seed) for seed in range(1, 5)]


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    return freeact_fx.calibrate(tiny_model(), BATCHES, CONFIG, progress=False)


def checkpoint_of(model: TinyModel, plan: str, *, seed: int = 0) -> Checkpoint:
    """A checkpoint for the tiny model with random transforms of any plan, one per Linear."""
    config = replace(CONFIG, plan=plan.removeprefix("own "))
    groups, linears = {}, {}
    for name in LINEARS:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        transform = random_transform(plan, module.in_features, config.num_types, seed=seed)
        groups[name] = transform
        packed = pack_linear(transform, module.weight, module.bias, config)
        linears[name] = PackedEntry(name, module.in_features, packed, fingerprint(module.weight))
    return Checkpoint(config, groups, linears)


PLANS = ["single", "shift", "paper", "duplicate", "branch", "own branch"]


@pytest.mark.parametrize("plan", PLANS)
def test_round_trip_is_bit_exact(plan: str, tmp_path: Path) -> None:
    saved = checkpoint_of(tiny_model(), plan)
    saved.save(tmp_path / "nested" / "folder")
    loaded = Checkpoint.load(str(tmp_path / "nested" / "folder"))
    assert loaded.config == saved.config
    assert list(loaded.linears) == list(saved.linears)
    for name, group in saved.groups.items():
        again = loaded.groups[name]
        tensors = again.tensors()
        assert tensors.keys() == group.tensors().keys()
        assert all(torch.equal(t, tensors[operand]) for operand, t in group.tensors().items())
        assert (again.plan, again.widths, again.slice_of_type, again.own_rank) == (
            *(group.plan, group.widths, group.slice_of_type, group.own_rank),
        )
    for name, entry in saved.linears.items():
        again_entry = loaded.linears[name]
        assert again_entry.group == entry.group
        assert again_entry.fingerprint == entry.fingerprint
        tensors = again_entry.packed.tensors()
        assert tensors.keys() == entry.packed.tensors().keys()
        for field, tensor in entry.packed.tensors().items():
            assert tensors[field].dtype == tensor.dtype
            assert torch.equal(tensors[field], tensor)
    assert loaded == saved
    assert hash(loaded) == hash(saved)


@pytest.mark.parametrize("plan", ["branch", "own branch"])
def test_branches_are_stored_in_8_bits(plan: str, tmp_path: Path) -> None:
    checkpoint_of(tiny_model(), plan).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = LINEARS[0]
    assert tensors[f"freeact.{name}.lowrank"].dtype == torch.int8
    assert tensors[f"{name}.branch_weight"].dtype == torch.int8
    assert tensors[f"{name}.branch_scale"].dtype == torch.float32
    assert tensors[f"{name}.branch_scale"].shape == tensors[f"{name}.branch_weight"].shape[:1]


@pytest.mark.parametrize(
    ("field", "change", "problem"),
    [
        ("branch_weight", lambda t: t.bfloat16(), "must be torch.int8"),
        (
            "branch_weight",
            lambda t: t[1:],
            r"must be torch.int8 of shape \[4, 48\], got torch.int8 of shape \[3",
        ),
        ("branch_scale", lambda t: t[None], r"must be torch.float32 of shape \[4\]"),
        ("branch_scale", lambda t: t * float("nan"), "must be finite"),
        ("branch_scale", None, "is missing"),
    ],
)
def test_a_damaged_branch_is_named(
    field: str, change: Callable[[torch.Tensor], torch.Tensor] | None, problem: str
) -> None:
    checkpoint = checkpoint_of(tiny_model(), "branch")
    tensors, name = checkpoint._tensors(), f"{LINEARS[0]}.{field}"
    found = tensors.pop(name)
    if change is not None:
        tensors[name] = change(found)
    meta = checkpoint._structure()["linears"][LINEARS[0]]
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: .*{re.escape(name)} {problem}"
    ):
        _load_linear(LINEARS[0], meta, checkpoint.groups, tensors)


def test_statistics_survive(calibrated: Checkpoint, tmp_path: Path) -> None:
    calibrated.save(tmp_path)
    assert Checkpoint.load(tmp_path).statistics == calibrated.statistics


def test_equality_is_by_content() -> None:
    model = tiny_model()
    one, same = checkpoint_of(model, "shift"), checkpoint_of(model, "shift")
    assert one is not same
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same}) == 1
    assert one != checkpoint_of(model, "shift", seed=1)
    assert one != replace(one, config=replace(one.config, seed=9))
    assert one != "a checkpoint"
    name = LINEARS[3]
    entry = one.linears[name]
    # One code changed, and two rows exchanged: sums over a tensor would not see the second.
    for order in ([1, 0], [0, 0]):
        weight = entry.packed.weight.clone()
        weight[:2] = weight[order]
        changed = replace(entry, packed=replace(entry.packed, weight=weight))
        assert one != replace(one, linears={**one.linears, name: changed})
    moved = replace(one.groups[name], slice_of_type=(0,) * 4, plan="single")
    assert one != replace(one, groups={**one.groups, name: moved})


def test_saving_again_overwrites(tmp_path: Path) -> None:
    first, second = (checkpoint_of(tiny_model(), plan) for plan in ("branch", "single"))
    first.save(tmp_path)
    second.save(tmp_path)
    assert Checkpoint.load(tmp_path) == second


def test_names_and_layout_on_disk(calibrated: Checkpoint, tmp_path: Path) -> None:
    """compressed-tensors' names; every tensor is accounted for."""
    calibrated.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = set()
    for name, entry in calibrated.linears.items():
        fields = ["weight_packed", "weight_scale", "weight_shape"]
        fields += ["bias_table"] if entry.packed.bias_table is not None else []
        fields += [field for field in entry.packed.tensors() if field.startswith("branch")]
        expected |= {f"{name}.{field}" for field in fields}
        num_outputs, num_codes = tensors[f"{name}.weight_shape"].tolist()
        module = tiny_model().get_submodule(name)
        assert (num_outputs, num_codes) == (module.out_features, module.in_features)
        packed = tensors[f"{name}.weight_packed"]
        assert packed.dtype == torch.int32
        assert packed.shape == (num_outputs, num_codes // 8)
        assert tensors[f"{name}.weight_scale"].shape == (num_outputs, 1)
        assert int(unpack_int4(packed, num_codes).abs().max()) == 7
    for name, group in calibrated.groups.items():
        expected |= {f"freeact.{name}.{operand}" for operand in group.tensors()}
    assert set(tensors) == expected
    assert len(calibrated.groups) == 8


_FRESH = """
import sys, torch, freeact_fx
from tiny_model import masked_ids, relative, tiny_model
model = tiny_model()
freeact_fx.convert(model, freeact_fx.Checkpoint.load(sys.argv[1]))
with torch.no_grad():
    torch.save(torch.compile(model, backend="freeact", options={"compiler": "eager"})(masked_ids()), sys.argv[2])
"""


def test_a_fresh_process_computes_the_same(calibrated: Checkpoint, tmp_path: Path) -> None:
    calibrated.save(tmp_path)
    command = [sys.executable, "-c", _FRESH, str(tmp_path), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    model = tiny_model()
    freeact_fx.convert(model, calibrated)
    compiled = torch.compile(model, backend="freeact", options={"compiler": "eager"})
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), compiled(masked_ids()))


def test_options_take_a_path_or_a_checkpoint(calibrated: Checkpoint, tmp_path: Path) -> None:
    """On a dense model; the packed weights are the checkpoint's, so the result is that of a converted model."""
    calibrated.save(tmp_path)
    converted = tiny_model()
    freeact_fx.convert(converted, calibrated)
    results = []
    for model, given in [
        (converted, None),
        (tiny_model(), calibrated),
        (tiny_model(), tmp_path),
        (tiny_model(), str(tmp_path)),
    ]:
        options = {"compiler": "eager"} | ({} if given is None else {"checkpoint": given})
        with torch.no_grad():
            results.append(torch.compile(model, backend="freeact", options=options)(masked_ids()))
        torch._dynamo.reset()
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    outputs = []
    for seed in (0, 1):
        checkpoint_of(tiny_model(), "duplicate", seed=seed).save(tmp_path)
        options = {"compiler": "eager", "checkpoint": str(tmp_path)}
        with torch.no_grad():
            compiled = torch.compile(tiny_model(), backend="freeact", options=options)
            outputs.append(compiled(masked_ids()))
        torch._dynamo.reset()
    assert not torch.equal(*outputs)


def test_fine_tuned_weights_are_packed_anew(calibrated: Checkpoint) -> None:
    """The stored codes are those of the calibrated weight; another weight keeps the transform, not the codes."""
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].q.weight.mul_(-1)
        want = model(masked_ids())
    options = {"compiler": "eager", "checkpoint": calibrated}
    with torch.no_grad():
        got = torch.compile(model, backend="freeact", options=options)(masked_ids())
    assert float((got - want).norm() / want.norm()) < 0.15


class LastLinear(nn.Module):
    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.blocks = model.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1].down(x)


@pytest.mark.parametrize("plan", ["single", "shift"])
def test_fine_tuned_bias_is_seen(plan: str) -> None:
    """The codes are still those of the weight, the bias table is not."""
    checkpoint = checkpoint_of(tiny_model(), plan)
    model = LastLinear(tiny_model()).eval()
    x, types = torch.ones(2, 5, 96), torch.zeros(2, 5, dtype=torch.int32)

    def run() -> torch.Tensor:
        torch._dynamo.reset()
        options = {"compiler": "eager", "checkpoint": checkpoint}
        compiled = torch.compile(model, backend="freeact", options=options)
        with torch.no_grad(), freeact_fx.token_types(types):
            result = compiled(x)
        assert freeact_fx.explain(compiled)["blocks.1.down"].plan == plan
        return result

    before = run()
    with torch.no_grad():
        model.blocks[1].down.bias.add_(1)
    assert torch.allclose(run(), before + 1, atol=1e-5)


# ------------------------------------------------------------------ every plan, through the backend


@pytest.mark.parametrize("plan", EXACT_PLANS)
def test_quantisers_off_is_the_float_model(plan: str, tmp_path: Path) -> None:
    """Shifts, slices and branches cancel on a dense model, with different transforms for each type that went through
    save and load."""
    model = tiny_model()
    checkpoint_of(model, plan).save(tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    assert all(group.plan == plan.removeprefix("own ") for group in checkpoint.groups.values())
    options = {"compiler": "eager", "checkpoint": checkpoint, "quantize": False}
    compiled = torch.compile(model, backend="freeact", options=options)
    with torch.no_grad():
        got, want = compiled(masked_ids()), model(masked_ids())
    assert freeact_fx.explain(compiled).counts()["typed"] == 14
    assert relative(got, want) < 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_converted_model_equals_the_dense_one_with_its_checkpoint(plan: str) -> None:
    checkpoint = checkpoint_of(tiny_model(), plan)
    converted = tiny_model()
    freeact_fx.convert(converted, checkpoint)
    results, bytes_of_linears = [], []
    for model, given in ((converted, {}), (tiny_model(), {"checkpoint": checkpoint})):
        options = {"compiler": "eager", **given}
        compiled = torch.compile(model, backend="freeact", options=options)
        with torch.no_grad():
            results.append(compiled(masked_ids()))
        report = freeact_fx.explain(compiled)
        assert {linear.plan for linear in report.quantized} == {plan.removeprefix("own ")}
        bytes_of_linears.append(
            {r.name: (r.packed_bytes, r.engine_bytes) for r in report.quantized}
        )
    assert torch.equal(*results)
    packed = {name: entry.packed.tensors() for name, entry in checkpoint.linears.items()}
    expected = {
        name: (sum(t.nbytes for t in tensors.values()), 8 * tensors["weight"].numel())
        for name, tensors in packed.items()
    }
    assert bytes_of_linears == [expected, expected]


class Gated(nn.Module):
    """A gated pair of Linears; neither reads what the other rounded, so that errors do not add up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 96)
        self.gate, self.up = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return x + nn.functional.silu(self.gate(x)) * self.up(x)


@pytest.mark.inductor
def test_branch_and_slices_through_inductor() -> None:
    """The two plans with operands of their own, typed, in bf16: what Inductor generates equals the passes alone."""
    torch.manual_seed(0)
    model = Gated().eval().bfloat16()
    plans = {"gate": "own branch", "up": "duplicate"}
    groups = {n: random_transform(p, 96, CONFIG.num_types, seed=0) for n, p in plans.items()}
    linears = {}
    for name in plans:
        module = model.get_submodule(name)
        packed = pack_linear(groups[name], module.weight, module.bias, CONFIG)
        linears[name] = PackedEntry(name, 96, packed, fingerprint(module.weight))
    freeact_fx.convert(model, Checkpoint(CONFIG, groups, linears))
    results = []
    for compiler in ("eager", "inductor"):
        compiled = torch.compile(model, backend="freeact", options={"compiler": compiler})
        with torch.no_grad():
            results.append(compiled(masked_ids()))
        report = freeact_fx.explain(compiled)
        assert [linear.plan for linear in report.quantized] == ["branch", "duplicate"]
        torch._dynamo.reset()
    assert relative(results[1], results[0]) < 0.01


# ------------------------------------------------------------------ size


def test_a_branch_takes_what_the_memory_budget_leaves() -> None:
    """Up to one column: factors at a byte per entry, scales at four."""
    config = QuantConfig(plan="branch", memory_budget=1.25, clip_search=False)
    weights = [torch.randn(n, 576) for n in (576, 192, 192)]
    rank = GroupStatistics(["q", "k", "v"], weights, [None] * 3, config).branch_rank()
    transform = orthogonal_transform(576, replace(config, branch_rank=rank))
    linears = [pack_linear(transform, weight, None, config) for weight in weights]
    branch_bytes, packed_bytes = transform.tensors()["lowrank"].nbytes, 0
    for linear in linears:
        tensors = linear.tensors()
        branch_bytes += tensors["branch_weight"].nbytes + tensors["branch_scale"].nbytes
        packed_bytes += tensors["weight"].nbytes
    assert branch_bytes <= 0.25 * packed_bytes < branch_bytes * (rank + 1) / rank


def test_a_branch_has_no_more_columns_than_kernels_multiply() -> None:
    """The groups of LLaDA-8B have room for 102 to 175 under the default budget; rows are whole words."""

    def rank(num_features: int, *num_outputs: int) -> int:
        weights = [torch.empty(n, num_features, device="meta") for n in num_outputs]
        names, biases = [str(n) for n in num_outputs], [None] * len(num_outputs)
        return GroupStatistics(names, weights, biases, QuantConfig()).branch_rank()

    assert rank(4096, 4096) == 96  # of 102
    assert rank(4096, 4096, 4096, 4096) == rank(4096, 12288, 12288) == rank(12288, 4096) == 128


class TwoWidths(nn.Module):
    """One layer's worth of SmolLM2's Linears: K = 576 and 1536, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(576, 576, bias=False), nn.Linear(576, 576, bias=False)
        self.k, self.v = nn.Linear(576, 192, bias=False), nn.Linear(576, 192, bias=False)
        self.gate, self.up = (nn.Linear(576, 1536, bias=False) for _ in range(2))
        self.down = nn.Linear(1536, 576, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q(x) + self.o(x) + torch.cat([self.k(x), self.v(x), self.v(x)], -1)
        return self.down(self.gate(x) * self.up(x))


def test_packed_linears_take_less_than_a_third_of_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoWidths().eval()
    dense_bytes = 2 * sum(p.numel() for p in model.parameters())
    config = QuantConfig(
        token_types=TokenTypes.single(), sink=None, plan="single", clip_search=False
    )
    checkpoint = freeact_fx.calibrate(model, [torch.randn(1, 64, 576)], config, progress=False)
    checkpoint.save(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert on_disk <= 0.30 * dense_bytes
    assert checkpoint.num_bytes <= on_disk < checkpoint.num_bytes + 20_000  # the header
    freeact_fx.convert(model, checkpoint)
    # A group's transform is named under each of its Linears, and is there once.
    once = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    assert not list(model.parameters())
    assert 0.25 * dense_bytes < sum(once.values()) <= 0.30 * dense_bytes
