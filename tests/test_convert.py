"""Converting a model in place; and models that are not converted, whose packed copies must never be stale."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import GROUPS, LINEARS, MASK, TinyModel, masked_ids, relative, tiny_model
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

import freeact_fx
from freeact_fx import Checkpoint, ConfigError, FreeActLinear, QuantConfig, TokenTypes
from freeact_fx import packing as packing_module

CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK), plan="duplicate")
# One type: nothing to hand in, nothing to warn of.
PLAIN = QuantConfig(token_types=TokenTypes.single(), sink=None)
BATCHES = [masked_ids(seed=seed) for seed in range(1, 5)]


def compiled(model: nn.Module, config: QuantConfig | None = None, **options: Any) -> Any:
    given = {} if config is None else config.to_dict()
    options = {"compiler": "eager", **given, **options}
    return torch.compile(model, backend="freeact", options=options)


def run(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


def types_of(ids: Tensor) -> Tensor:
    """What the graph passes find: masked tokens, and the sink."""
    types = (ids == MASK).int()
    types[:, 0] = 2
    return types


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    config = replace(CONFIG, plan="shift")
    return freeact_fx.calibrate(tiny_model(), BATCHES, config, progress=False)


# ------------------------------------------------------------------ what convert does to a model


def test_linears_are_replaced_in_place_and_dense_weights_are_gone() -> None:
    model = tiny_model()
    gone = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
    kept = model.lm_head
    left = freeact_fx.convert(model, CONFIG)
    gc.collect()
    assert [ref() for ref in gone] == [None] * 14
    assert left == {"lm_head": "listed in QuantConfig.skip ['lm_head']"}
    assert model.lm_head is kept
    for name in LINEARS:
        module = model.get_submodule(name)
        assert isinstance(module, FreeActLinear)
        assert not module.training
        assert not list(module.parameters())
    assert {name for name, _ in model.named_parameters()} == {
        *("embed.weight", "lm_head.weight", "norm.weight"),
        *(f"blocks.{i}.{norm}_norm.weight" for i in range(2) for norm in ("attention", "mlp")),
    }


def test_checkpoint_replaces_exactly_its_linears(calibrated: Checkpoint) -> None:
    partial = replace(
        calibrated,
        linears={n: e for n, e in calibrated.linears.items() if n.startswith("blocks.1")},
    )
    model = tiny_model()
    left = freeact_fx.convert(model, partial)
    assert set(left) == {*LINEARS[:7], "lm_head"}
    assert set(left.values()) == {"not in the checkpoint"}
    names = [n for n, m in model.named_modules() if isinstance(m, FreeActLinear)]
    assert names == LINEARS[7:]


def test_what_convert_left_dense_stays_dense_when_compiled() -> None:
    """Unless ``include`` names it."""
    model = tiny_model()
    freeact_fx.convert(model, replace(PLAIN, skip=("lm_head", "blocks.0.*")))
    options = {"compiler": "eager"}
    rows = freeact_fx.explain(model, masked_ids(), options=options).linears
    left = {row.name: row.reason for row in rows if row.name.startswith("blocks.0")}
    assert len(left) == 7
    assert all(str(reason).startswith("convert left it dense") for reason in left.values())
    options |= {"include": ("blocks.0.o",)}
    rows = freeact_fx.explain(model, masked_ids(), options=options).linears
    assert [row.name for row in rows if row.reason is None] == ["blocks.0.o", *LINEARS[7:]]


def test_groups_share_one_transform(calibrated: Checkpoint) -> None:
    model = tiny_model()
    freeact_fx.convert(model, calibrated)
    transforms = [{id(model.get_submodule(n).transform) for n in group} for group in GROUPS]
    assert [len(t) for t in transforms] == [1] * 8
    assert len(set.union(*transforms)) == 8


def test_skip_and_include() -> None:
    model = tiny_model()
    config = replace(PLAIN, skip=("lm_head", "blocks.0.*", "down"), include=("blocks.0.o",))
    left = freeact_fx.convert(model, config)
    converted = {n for n, m in model.named_modules() if isinstance(m, FreeActLinear)}
    names = {f"blocks.1.{n}" for n in ("q", "k", "v", "o", "gate", "up")}
    assert converted == {*names, "blocks.0.o"}
    assert set(left) == {*LINEARS, "lm_head"} - converted
    assert len(left) == 8


def test_shared_module_is_replaced_once_and_stays_shared() -> None:
    model = tiny_model()
    model.blocks[1] = model.blocks[0]
    want = run(model, masked_ids())
    freeact_fx.convert(model, PLAIN)
    assert model.blocks[1].q is model.blocks[0].q
    assert isinstance(model.blocks[0].q, FreeActLinear)
    assert relative(run(model, masked_ids()), want) < 0.4


def test_shared_linear_is_replaced_wherever_it_stands() -> None:
    model = tiny_model()
    model.blocks[1].q = model.blocks[0].q
    freeact_fx.convert(model, PLAIN)
    assert model.blocks[1].q is model.blocks[0].q
    assert isinstance(model.blocks[1].q, FreeActLinear)


def test_shared_weight_of_two_linears() -> None:
    """Two modules with one Parameter: both are converted, each computes what it did."""
    model = tiny_model()
    model.blocks[1].q.weight = model.blocks[0].q.weight
    want = run(model, masked_ids())
    freeact_fx.convert(model, PLAIN)
    assert all(isinstance(model.blocks[i].q, FreeActLinear) for i in range(2))
    assert relative(run(model, masked_ids()), want) < 0.4


def test_tied_head_stays_unless_included() -> None:
    model = tiny_model()
    model.lm_head.weight = model.embed.weight
    left = freeact_fx.convert(model, replace(PLAIN, skip=()))
    assert "tied to an embedding" in left["lm_head"]
    assert model.lm_head.weight is model.embed.weight

    model = tiny_model()
    model.lm_head.weight = model.embed.weight
    want = run(model, masked_ids())
    embedding = model.embed.weight.clone()
    assert freeact_fx.convert(model, replace(PLAIN, include=("lm_head",))) == {}
    assert isinstance(model.lm_head, FreeActLinear)
    assert torch.equal(model.embed.weight, embedding)
    assert relative(run(model, masked_ids()), want) < 0.4


def test_conv1d_is_converted() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(96, 48), nn.GELU(), Conv1D(48, 96)).eval()
    x = torch.randn(3, 7, 48)
    want = run(model, x)
    assert freeact_fx.convert(model, PLAIN) == {}
    assert [m.out_features for m in model if isinstance(m, FreeActLinear)] == [96, 48]
    assert relative(run(model, x), want) < 0.3


def test_vision_tower_by_name() -> None:
    model = nn.ModuleDict({"vision_tower": nn.Linear(48, 48), "text": nn.Linear(48, 48)})
    left = freeact_fx.convert(copy.deepcopy(model), PLAIN)
    assert set(left) == {"vision_tower"}
    assert "QuantConfig.vision_tower=True" in left["vision_tower"].way_out
    assert freeact_fx.convert(model, replace(PLAIN, vision_tower=True)) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_a_converted_model_keeps_codes_and_transforms(dtype: torch.dtype) -> None:
    model = tiny_model()
    freeact_fx.convert(model, replace(PLAIN, plan="branch", branch_rank=4))
    want = run(model, masked_ids())
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.to(dtype)
    assert model.embed.weight.dtype == dtype
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert torch.equal(after[name], buffer)
    got = run(model, masked_ids())
    assert got.dtype == dtype
    assert relative(got, want) < 0.1
    assert relative(run(compiled(model), masked_ids()), want) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model_is_converted(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    want = run(model, masked_ids())
    freeact_fx.convert(model, PLAIN)
    assert model.blocks[0].q.values.dtype == torch.float32
    got = run(model, masked_ids())
    assert got.dtype == dtype
    assert relative(got, want) < 0.4


def test_state_dict_round_trip(calibrated: Checkpoint) -> None:
    one, other = tiny_model(), tiny_model()
    freeact_fx.convert(one, calibrated)
    freeact_fx.convert(other, calibrated)
    for buffer in other.buffers():
        buffer.zero_()
    zeroed = run(compiled(other), masked_ids())
    want = run(compiled(one), masked_ids())
    assert not torch.equal(zeroed, want)
    result = other.load_state_dict(one.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    # The engine's copies of the packed weights follow, in the same compiled code.
    assert torch.equal(run(compiled(other), masked_ids()), want)


def test_deepcopy_of_a_converted_model(calibrated: Checkpoint) -> None:
    model = tiny_model()
    freeact_fx.convert(model, calibrated)
    again = copy.deepcopy(model)
    assert again.blocks[0].q.transform is again.blocks[0].k.transform
    assert torch.equal(run(compiled(again), masked_ids()), run(compiled(model), masked_ids()))


# ------------------------------------------------------------------ eager mode


@pytest.mark.parametrize("plan", ["single", "shift", "duplicate", "branch"])
def test_eager_with_types_equals_compiled(plan: str) -> None:
    model = tiny_model()
    freeact_fx.convert(model, replace(CONFIG, plan=plan))
    ids = masked_ids()
    with freeact_fx.token_types(types_of(ids)):
        eager = run(model, ids)
    assert torch.equal(run(compiled(model), ids), eager)


def test_eager_without_types_warns_once_and_uses_the_default() -> None:
    model = tiny_model()
    freeact_fx.convert(model, CONFIG)
    ids = masked_ids()
    message = r"eager mode without token types; they use the default type 'unmasked'.*token_types\(types\)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # once per place, as users have it
        untyped = run(model, ids)
        assert torch.equal(run(model, ids), untyped)
    assert len(caught) == 1
    assert re.search(message, str(caught[0].message))
    with freeact_fx.token_types(torch.zeros_like(ids)):  # warnings are errors
        assert torch.equal(run(model, ids), untyped)


def test_eager_with_one_type_does_not_warn() -> None:
    model = tiny_model()
    freeact_fx.convert(model, PLAIN)
    run(model, masked_ids())  # warnings are errors


def test_eager_negative_types_are_the_default() -> None:
    model = tiny_model()
    freeact_fx.convert(model, CONFIG)
    ids = masked_ids()
    outputs = []
    for types in (torch.full_like(ids, -1), torch.zeros_like(ids)):
        with freeact_fx.token_types(types):
            outputs.append(run(model, ids))
    assert torch.equal(*outputs)


def test_repr_shows_shapes_and_plan() -> None:
    model = tiny_model()
    freeact_fx.convert(model, CONFIG)
    assert "in_features=48, out_features=96, plan=duplicate" in repr(model.blocks[0].gate)


# ------------------------------------------------------------------ dense models: packed copies are never stale


def fresh_result(model: TinyModel, ids: Tensor, config: QuantConfig) -> Tensor:
    """What a model with these weights gives if it was never compiled before."""
    torch._dynamo.reset()
    return run(compiled(copy.deepcopy(model), config), ids)


def load_other_weights(model: TinyModel) -> None:
    torch.manual_seed(7)
    model.load_state_dict(TinyModel().state_dict())


def scale_in_place(model: TinyModel) -> None:
    with torch.no_grad():
        model.blocks[0].q.weight.mul_(-0.5)


def change_one_bias(model: TinyModel) -> None:
    with torch.no_grad():
        model.blocks[0].q.bias.add_(1)


def new_data(model: TinyModel) -> None:
    weight = model.blocks[0].gate.weight
    weight.data = torch.randn_like(weight) * 0.1


def merge_an_adapter(model: TinyModel) -> None:
    """As PEFT does: through ``.data``, which moves neither address nor version."""
    weight = model.blocks[0].q.weight
    weight.data += 0.1 * torch.randn(48, 2) @ torch.randn(2, 48)


def copy_into_data(model: TinyModel) -> None:
    weight = model.blocks[1].down.weight
    weight.data.copy_(torch.randn_like(weight) * 0.1)


def new_parameter(model: TinyModel) -> None:
    model.blocks[1].o.weight = nn.Parameter(torch.randn(48, 48) * 0.1)


def replace_module(model: TinyModel) -> None:
    torch.manual_seed(3)
    model.blocks[0].down = nn.Linear(96, 48).eval()


CHANGES = [
    load_other_weights,
    scale_in_place,
    change_one_bias,
    new_data,
    merge_an_adapter,
    copy_into_data,
    new_parameter,
    replace_module,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_packed_anew(change: Callable[[TinyModel], None]) -> None:
    model, ids = tiny_model(), masked_ids()
    fast = compiled(model, CONFIG)
    before = run(fast, ids)
    change(model)
    after = run(fast, ids)
    assert relative(after, before) > 1e-3
    assert torch.equal(after, fresh_result(model, ids, CONFIG))


def test_a_cast_model_is_never_served_stale() -> None:
    model, ids = tiny_model(), masked_ids()
    fast = compiled(model, CONFIG)
    run(fast, ids)
    model.to(torch.bfloat16)
    if torch.__version__ < "2.12":  # its Dynamo does not see the cast
        with pytest.raises(
            ConfigError, match=r"q: its weight was torch.float32 .* torch.compiler.reset"
        ):
            run(fast, ids)
        torch.compiler.reset()
    after = run(fast, ids)
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, fresh_result(model, ids, CONFIG))


def test_unchanged_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lengths, two graphs (one of them of another batch size), one packed copy."""
    packed: list[Tensor] = []
    original = packing_module.pack_linear

    def counting(transform: Any, weight: Tensor, *args: Any) -> Any:
        packed.append(weight)
        return original(transform, weight, *args)

    monkeypatch.setattr(packing_module, "pack_linear", counting)
    model = tiny_model()
    fast = compiled(model, CONFIG)
    for ids in (masked_ids(2, 16), masked_ids(1, 16), masked_ids(2, 24), masked_ids(1, 1)):
        run(fast, ids)
    report = freeact_fx.explain(fast)
    assert report.num_graphs >= 2
    assert len(packed) == len(LINEARS)
    run(compiled(model, replace(CONFIG, seed=1)), masked_ids())
    assert len(packed) == 2 * len(LINEARS)


class OneWeight(nn.Module):
    """One weight with a bias, with another, and without; its Linears have one name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)
        self.other_bias = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.inner.weight
        functional = nn.functional.linear
        return self.inner(x), functional(x, weight, self.other_bias), functional(x, weight)


def test_one_weight_with_several_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Tensor] = []
    original = packing_module.pack_linear

    def counting(transform: Any, weight: Tensor, *args: Any) -> Any:
        packed.append(weight)
        return original(transform, weight, *args)

    monkeypatch.setattr(packing_module, "pack_linear", counting)
    torch.manual_seed(0)
    model, x = OneWeight().eval(), torch.randn(5, 48)
    fast = compiled(model, PLAIN)
    for _ in range(3):
        with torch.no_grad():
            own, other, none = fast(x)
        assert torch.allclose(own - none, model.inner.bias.detach().expand(5, -1), atol=1e-5)
        assert torch.allclose(other - none, model.other_bias.detach().expand(5, -1), atol=1e-5)
    assert len(packed) == 3


def test_packed_copy_goes_with_the_model() -> None:
    model = tiny_model()
    run(compiled(model, CONFIG), masked_ids())
    weight = model.blocks[0].q.weight
    (_, (_, packed)) = next(iter(packing_module._packed[weight].values()))
    words = weakref.ref(packed.weight)
    del packed, weight, model
    torch._dynamo.reset()
    gc.collect()
    assert words() is None


def test_groups_that_treat_types_alike(calibrated: Checkpoint, tmp_path: Path) -> None:
    """Two rows for any number of types: as if all types had the first one, compiled and in eager mode, and it does not
    ask for types."""

    def first(table: Tensor) -> Tensor:
        return torch.cat([table[:1].expand_as(table[:-1]), table[-1:]])

    groups, linears = {}, {}
    for name, group in calibrated.groups.items():
        assert group.shift is not None
        groups[name] = replace(group, shift=first(group.shift), clip=first(group.clip))
    for name, entry in calibrated.linears.items():
        assert entry.packed.bias_table is not None
        table = first(entry.packed.bias_table)
        linears[name] = replace(entry, packed=replace(entry.packed, bias_table=table))
    typed = replace(calibrated, groups=groups, linears=linears)
    replace(
        typed,
        groups={name: group.alike() for name, group in groups.items()},
        linears={name: replace(e, packed=e.packed.alike()) for name, e in linears.items()},
    ).save(tmp_path)
    alike = Checkpoint.load(tmp_path)
    assert alike.num_bytes < typed.num_bytes
    assert not any(group.is_typed for group in alike.groups.values())
    ids = masked_ids(seed=5)
    want = run(compiled(tiny_model(), checkpoint=typed), ids)
    fast = compiled(tiny_model(), checkpoint=alike)
    assert torch.equal(run(fast, ids), want)
    report = freeact_fx.explain(fast)
    assert {(row.plan, row.types_alike) for row in report.quantized} == {("shift", True)}
    assert "shift, types alike" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny_model()
        freeact_fx.convert(model, alike)
        assert relative(run(model, ids), want) < 1e-5
    fast = compiled(model)
    run(fast, ids)
    assert all(row.types_alike for row in freeact_fx.explain(fast).quantized)
    without_inductor = {"bypass": ("lowering",)}
    assert freeact_fx.verify(tiny_model(), ids, checkpoint=alike, options=without_inductor).ok


def test_calls_do_not_go_through_the_guards_of_each_tensor() -> None:
    """Dynamo skips what is below a module whose dictionaries have not changed, if all there are of a kind that cannot
    change otherwise. A list in one of ours, and each call checks some 40 tensors for each layer of a model."""
    model = tiny_model()
    freeact_fx.convert(model)
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True), torch.no_grad():
        torch.compile(model, backend="freeact")(masked_ids())
    (entry,) = _debug_get_cache_entry_list(type(model).forward.__code__)
    lines = str(entry.guard_manager).splitlines()
    ours = [
        line for line in lines if re.search(r"GuardManager: .*<class 'freeact_fx\.convert", line)
    ]
    assert len(ours) >= len(LINEARS)
    assert not [line for line in ours if "tag_safe=(True" not in line]


def test_guards_of_modules_can_be_left_out() -> None:
    """As ``docs/gpu.md`` says; torch.compile takes that option for itself."""
    model, ids = tiny_model(), masked_ids()
    freeact_fx.convert(model)
    want = run(compiled(model), ids)
    torch._dynamo.reset()
    unguarded = compiled(model, guard_filter_fn=torch.compiler.skip_guard_on_all_nn_modules_unsafe)
    assert torch.equal(run(unguarded, ids), want)
    (entry,) = _debug_get_cache_entry_list(type(model).forward.__code__)
    assert "freeact_fx.convert.FreeActLinear" not in str(entry.guard_manager)
