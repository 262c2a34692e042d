"""What users get wrong, and the message they get for it: the place, the rule, the value, the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import LINEARS, MASK, masked_ids, tiny_model
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import freeact_fx
from freeact_fx import (
    Checkpoint,
    CheckpointError,
    ConfigError,
    QuantConfig,
    TokenType,
    TokenTypes,
    UnsupportedLinear,
)
from freeact_fx.checkpoint import sha256_of
from freeact_fx.reference import unpack_int4

TYPES = TokenTypes.mask_token(MASK)
CONFIG = QuantConfig(token_types=TYPES)
PLAIN = QuantConfig(token_types=TokenTypes.single(), sink=None)


def literally(*parts: str) -> str:
    """A pattern for a message that holds these parts, in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


def compile_and_run(
    model: nn.Module, *args: Tensor, mode: str | None = None, **options: Any
) -> Any:
    options = {} if mode else {"options": {"compiler": "eager", **options}}
    with torch.no_grad():
        return torch.compile(model, backend="freeact", mode=mode, **options)(*args)


@pytest.fixture(scope="module")
def calibrated() -> Checkpoint:
    batches = [masked_ids(seed=seed) for seed in (1, 2)]
    config = replace(CONFIG, plan="shift")
    return freeact_fx.calibrate(tiny_model(), batches, config, progress=False)


# ------------------------------------------------------------------ token types that are handed in


@pytest.mark.parametrize(
    ("types", "parts"),
    [
        (torch.zeros(2, 16), ("integer tensor of type numbers, got torch.float32", "from_ids")),
        (torch.zeros(2, 16, dtype=torch.bool), ("got torch.bool", "mask.int()")),
        ([[0, 1]], ("integer tensor of type numbers, got list",)),
        (torch.zeros(2, 16, 1, dtype=torch.int32), ("[B, T] or [T], got [2, 16, 1]",)),
        (torch.tensor(1), ("[B, T] or [T], got []",)),
    ],
)
def test_types_of_wrong_dtype_or_rank(types: Any, parts: tuple[str, ...]) -> None:
    with (
        pytest.raises(ConfigError, match=literally("token_types(types)", *parts)),
        freeact_fx.token_types(types),
    ):
        pass


@pytest.mark.parametrize("converted", [False, True], ids=["dense", "converted"])
def test_types_of_another_shape(converted: bool) -> None:
    model = tiny_model()
    if converted:
        freeact_fx.convert(model, CONFIG)
    options = {} if converted else CONFIG.to_dict()
    message = literally(
        "token_types(types): the tokens of the graph with blocks.0.q have shape [2, 16]",
        "types has [2, 15]. Give one type per token",
    )
    with (
        pytest.raises(ConfigError, match=message),
        freeact_fx.token_types(torch.zeros(2, 15, dtype=torch.int32)),
    ):
        compile_and_run(model, masked_ids(), **options)


OUT_OF_RANGE = literally(
    "token_types(types): type numbers must be below 3 (0 unmasked, 1 masked, 2 first), got 3",
    "Declare the type in QuantConfig.token_types, or correct the tensor",
)


def test_type_out_of_range() -> None:
    types = torch.zeros(2, 16, dtype=torch.int64)
    types[1, 5] = 3
    with pytest.raises(ConfigError, match=OUT_OF_RANGE), freeact_fx.token_types(types):
        compile_and_run(tiny_model(), masked_ids(), **CONFIG.to_dict())


def test_type_out_of_range_in_eager_mode() -> None:
    model = tiny_model()
    freeact_fx.convert(model, replace(CONFIG, plan="duplicate"))
    types = torch.full((2, 16), 3)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=OUT_OF_RANGE),
        freeact_fx.token_types(types),
    ):
        model(masked_ids())


def test_type_out_of_range_is_found_after_good_ones() -> None:
    """A tensor that was checked once is not trusted after it was written to."""
    model = torch.compile(
        tiny_model(), backend="freeact", options={"compiler": "eager", **CONFIG.to_dict()}
    )
    types = torch.zeros(2, 16, dtype=torch.int32)
    with torch.no_grad(), freeact_fx.token_types(types):
        model(masked_ids())
        types[0, 0] = 7
        with pytest.raises(ConfigError, match="type numbers must be below 3"):
            model(masked_ids())


# ------------------------------------------------------------------ declarations


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: TokenTypes(()), ("at least one type is needed",)),
        (lambda: TokenTypes.explicit("a", "a"), ("names must differ", "['a', 'a']", "Rename one")),
        (lambda: TokenTypes.explicit("a", "first"), ("'first' is reserved", "QuantConfig.sink")),
        (lambda: TokenTypes.mask_token(-1), ("type 'masked'", "integers >= 0, got -1")),
        (lambda: TokenTypes.mask_token(True), ("integers >= 0, got True",)),
        (lambda: TokenTypes.mask_token("9"), ("integers >= 0, got '9'", "tokenizer")),  # type: ignore[arg-type]
        (
            lambda: TokenTypes.image_tokens(5, video=5),
            ("an id belongs to one type", "5 is claimed by 'vision' and 'video'"),
        ),
        (
            lambda: TokenTypes((TokenType("masked", (5,)),)),
            ("the first type ('masked') is the default and needs no ids", "Put a plain type first"),
        ),
        (lambda: TokenTypes.from_dict({"tokens": []}), ("expected {'types': [...]}", "['tokens']")),
        (
            lambda: TokenTypes.from_dict({"types": [{"name": "a", "token_id": [1]}]}),
            ("unknown key 'token_id'", "Did you mean 'token_ids'?"),
        ),
    ],
)
def test_ill_formed_token_types(make: Callable[[], TokenTypes], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=literally(*parts)):
        make()


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("weight_bits", 3, ("must be 4, got 3",)),
        ("activation_bits", 16, ("must be 4, 8 or 'e4m3', got 16",)),
        ("activation_bits", True, ("must be 4, 8 or 'e4m3', got True",)),
        ("activation_bits", [4], ("must be 4, 8 or 'e4m3', got [4]",)),
        ("token_types", "mask", ("must be a TokenTypes or its dict, got 'mask'", "mask_token(")),
        ("plan", "shfit", ("must be one of single, shift", "got 'shfit'. Did you mean 'shift'?")),
        ("plan", None, ("must be one of single, shift", "got None")),
        ("memory_budget", 0.5, ("must be at least 1, got 0.5",)),
        ("memory_budget", "big", ("must be", "got 'big'")),
        ("branch_rank", 0, ("must be", "got 0")),
        ("branch_rank", 2.5, ("must be", "got 2.5")),
        ("branch_rank", 129, ("128 at most", "got 129")),
        ("sink", "last", ("must be 'first' or None, got 'last'",)),
        ("sample_tokens", 1, ("must be", "got 1")),
        ("sample_tokens", None, ("must be", "got None")),
        ("seed", "x", ("must be", "got 'x'")),
        ("skip", 3, ("must be", "got 3")),
        ("include", [re.compile("x")], ("must be", "got")),
    ],
)
def test_impossible_values(field: str, value: Any, parts: tuple[str, ...]) -> None:
    message = literally(f"QuantConfig.{field}: ", *parts)
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**{field: value})
    # The same through the options, where Dynamo puts its name in front.
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(tiny_model(), masked_ids(), **{field: value})


def test_a_question_ends_a_message() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'shift'\?$"):
        QuantConfig(plan="shfit")


def test_unknown_config_field() -> None:
    message = literally("QuantConfig: unknown field 'activation_bit'", "'activation_bits'")
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_options({"activation_bit": 4})


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"activation_bit": 4}, ("unknown key 'activation_bit'", "Did you mean 'activation_bits'")),
        ({"checkpoints": "x"}, ("unknown key 'checkpoints'", "Did you mean 'checkpoint'")),
        ({"zzz": 1}, ("unknown key 'zzz'", "Known: ", "activation_bits", "checkpoint")),
        ({"bypass": ("engines",)}, ("options['bypass']: unknown stage", "Did you mean 'engine'?")),
        ({"bypass": 1}, ("options['bypass']: must be a tuple of stages", "got 1")),
        (
            {"bypass": "passes", "enabled": True},
            ("options['bypass'] leaves out 'passes'", "Drop one of them"),
        ),
        ({"compiler": "tvm"}, ("options['compiler']: must be 'inductor' or 'eager', got 'tvm'",)),
        ({"mode": "max-autotuned"}, ("unknown 'max-autotuned'", "Did you mean 'max-autotune")),
        ({"inductor": {"max_autotun": 1}}, ("['inductor']: unknown key 'max_autotun'", "Did you")),
        ({"inductor": 3}, ("options['inductor']: must be", "got 3")),
        ({"checkpoint": 3}, ("options['checkpoint']: must be a Checkpoint or its path, got int",)),
        (
            {"checkpoint": "/nowhere"},
            ("/nowhere: a checkpoint is a folder", "config.json is missing"),
        ),
        ({"plan": "paper"}, ("'paper' needs a calibration", "Call calibrate first")),
    ],
)
def test_wrong_options(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(BackendCompilerFailed, match=literally(*parts)):
        compile_and_run(tiny_model(), masked_ids(), **options)


def test_unknown_mode() -> None:
    message = literally("mode: unknown 'fastest'", "Known: default", "reduce-overhead")
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(tiny_model(), masked_ids(), mode="fastest")


def test_types_of_options_and_checkpoint_disagree(calibrated: Checkpoint) -> None:
    message = literally(
        "calibrated for the token types ['unmasked', 'masked', 'first']",
        "the options give ['text', 'vision', 'first']",
        "Leave token_types and sink out, or calibrate anew",
    )
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(
            *(tiny_model(), masked_ids()),
            checkpoint=calibrated,
            token_types=TokenTypes.image_tokens(3),
        )


def test_types_of_options_and_converted_model_disagree() -> None:
    model = tiny_model()
    freeact_fx.convert(model, CONFIG)
    message = literally(
        "options['token_types']: the model was converted for the types ['unmasked', 'masked', 'first']",
        "the options give ['text', 'vision', 'first']",
    )
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(model, masked_ids(), token_types=TokenTypes.image_tokens(3))


# ------------------------------------------------------------------ models that cannot be quantised


def test_training_mode() -> None:
    message = literally("TinyModel: backend 'freeact' is for inference", "Call model.eval() first")
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(tiny_model().train(), masked_ids())
    model = nn.Sequential(nn.Linear(48, 48)).train()
    graph = torch.fx.symbolic_trace(model)
    with pytest.raises(ConfigError, match=literally("training mode", "Call model.eval() first")):
        freeact_fx.rewrite(graph, [torch.randn(2, 48)])


class OneLinear(nn.Module):
    def __init__(self, num_features: int = 48, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(num_features, 40, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


REFUSED = [
    (16, torch.float32, ("in_features must be at least 32", "got 16")),
    (33, torch.float32, ("in_features must be even", "two 4-bit codes per byte, got 33")),
    (514, torch.float32, ("Kronecker shape", "2..256", "514 has none")),
    (48, torch.float64, ("float32, bfloat16 or float16, got torch.float64",)),
    (48, torch.complex64, ("float32, bfloat16 or float16, got torch.complex64",)),
]


@pytest.mark.parametrize(("num_features", "dtype", "parts"), REFUSED, ids=lambda v: str(v)[:20])
def test_linear_that_cannot_be_quantised(
    num_features: int, dtype: torch.dtype, parts: tuple[str, ...]
) -> None:
    """It stays as it was and its reason is reported; under strict=True it raises, naming the way out."""
    model = OneLinear(num_features, dtype).eval()
    x = torch.randn(3, num_features, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(compile_and_run(model, x), model(x))
    (row,) = freeact_fx.explain(model, x).linears
    assert not row.quantized
    assert re.search(literally(*parts), str(row.reason))
    message = literally("strict=True and 1 Linears", "inner: ", *parts, "QuantConfig.skip")
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(model, x, strict=True)
    # Left out by the user himself it is no surprise.
    compile_and_run(model, x, strict=True, skip=("inner",))
    # convert says the same.
    with pytest.raises(UnsupportedLinear, match=literally("inner: ", *parts)):
        freeact_fx.convert(model, replace(PLAIN, strict=True))
    left = freeact_fx.convert(model, PLAIN)
    assert re.search(literally(*parts), left["inner"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(bad: float) -> None:
    model, x = OneLinear().eval(), torch.randn(3, 48)
    with torch.no_grad():
        model.inner.weight[3, 5] = bad
        want = model(x)
    assert torch.equal(compile_and_run(model, x).nan_to_num(), want.nan_to_num())
    reason = "its weight holds NaN or infinite values"
    (row,) = freeact_fx.explain(model, x).linears
    assert row.reason == reason
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=literally("inner: " + reason)):
        compile_and_run(model, x, strict=True)
    assert freeact_fx.convert(model, PLAIN) == {"inner": reason}


def test_weight_that_stops_being_finite() -> None:
    """A packed weight cannot be made any more, and the old one is not served."""
    model, x = OneLinear().eval(), torch.randn(3, 48)
    fast = torch.compile(model, backend="freeact", options={"compiler": "eager"})
    with torch.no_grad():
        fast(x)
        model.inner.weight[3, 5] = float("nan")
        with pytest.raises(ConfigError, match="inner: its weight holds NaN or infinite values"):
            fast(x)


def test_sparse_weight() -> None:
    model = OneLinear().eval()
    model.inner.weight = nn.Parameter(model.inner.weight.detach().to_sparse())
    left = freeact_fx.convert(model, PLAIN)
    assert "weights must be plain dense tensors" in left["inner"]


def test_linear_that_is_included_but_impossible() -> None:
    """What the user asked for by name is never silently left out."""
    model, x = OneLinear(514).eval(), torch.randn(3, 514)
    message = literally("inner: in_features needs a Kronecker shape")
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(model, x, include=("inner",), strict=True)


# ------------------------------------------------------------------ calibrate and convert


def test_calibrate_without_batches() -> None:
    message = literally("calibrate: no Linear was reached", "at least one batch", "explain")
    for batches in ([], iter(())):
        with pytest.raises(ConfigError, match=message):
            freeact_fx.calibrate(tiny_model(), batches, CONFIG, progress=False)


def test_calibrate_when_everything_is_skipped() -> None:
    config = replace(CONFIG, skip=("*",))
    with pytest.raises(ConfigError, match=literally("no Linear was reached", "QuantConfig.skip")):
        freeact_fx.calibrate(tiny_model(), [masked_ids()], config, progress=False)


def test_calibrate_a_branch_without_memory_for_one() -> None:
    config = replace(CONFIG, plan="branch", memory_budget=1)
    message = literally("calibrate: blocks.0.q", "memory_budget=1 leaves no room", "Raise it")
    with pytest.raises(ConfigError, match=message):
        freeact_fx.calibrate(tiny_model(), [masked_ids()], config, progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibrate_on_activations_that_are_not_finite(bad: float) -> None:
    model = tiny_model()
    model.blocks[1].attention_norm.weight.data[3] = bad
    message = literally("calibrate: the input of blocks.1.q holds NaN or infinite values", "batch")
    with pytest.raises(ConfigError, match=message):
        freeact_fx.calibrate(model, [masked_ids()], CONFIG, progress=False)


def test_convert_with_quantisers_off() -> None:
    with pytest.raises(ConfigError, match=literally("quantize=False needs dense weights")):
        freeact_fx.convert(tiny_model(), replace(CONFIG, quantize=False))


def test_convert_to_plan_paper_without_checkpoint() -> None:
    message = literally("convert: QuantConfig.plan='paper' needs a calibration", "calibrate first")
    with pytest.raises(ConfigError, match=message):
        freeact_fx.convert(tiny_model(), replace(CONFIG, plan="paper"))


def test_quantisers_off_on_a_converted_model() -> None:
    model = tiny_model()
    freeact_fx.convert(model, CONFIG)
    message = literally("quantize=False needs dense weights", "was converted", "dense model with")
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(model, masked_ids(), quantize=False)


def test_two_conversions_in_one_model() -> None:
    model = tiny_model()
    freeact_fx.convert(model.blocks[0], CONFIG)
    freeact_fx.convert(model.blocks[1], replace(CONFIG, token_types=TokenTypes.mask_token(3)))
    message = literally("declare 2 different sets of token types", "Convert a model with one")
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(model, masked_ids())


def test_converting_twice(calibrated: Checkpoint) -> None:
    model = tiny_model()
    freeact_fx.convert(model, calibrated)
    message = literally("'blocks.0.q'", "the model has FreeActLinear there", "convert", "once")
    with pytest.raises(CheckpointError, match=message):
        freeact_fx.convert(model, calibrated)


def test_checkpoint_of_a_model_with_other_names(calibrated: Checkpoint) -> None:
    model = nn.ModuleDict({"layers": tiny_model().blocks})
    message = literally("a Linear 'blocks.0.q', the model has nothing there", "of this model")
    with pytest.raises(CheckpointError, match=message):
        freeact_fx.convert(model, calibrated)
    # Compiled, it is a reason of each Linear; under strict=True an error.
    model, x = OneLinear().eval(), torch.randn(3, 48)
    compile_and_run(model, x, checkpoint=calibrated)
    (row,) = freeact_fx.explain(model, x, options={"checkpoint": calibrated}).linears
    assert str(row.reason).startswith("not in the checkpoint")
    with pytest.raises(BackendCompilerFailed, match=literally("inner: not in the checkpoint")):
        compile_and_run(model, x, checkpoint=calibrated, strict=True)


def test_checkpoint_of_a_model_with_other_shapes(calibrated: Checkpoint) -> None:
    model = tiny_model()
    model.blocks[0].up = nn.Linear(48, 192, bias=False).eval()
    message = literally("blocks.0.up", "weight of shape [96, 48]", "the model has [192, 48]")
    with pytest.raises(CheckpointError, match=message):
        freeact_fx.convert(model, calibrated)
    # Nothing was replaced before all was checked.
    assert isinstance(model.blocks[0].q, nn.Linear)

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model.blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0].up(x)

    with pytest.raises(BackendCompilerFailed, match=message):
        compile_and_run(Only().eval(), torch.randn(2, 48), checkpoint=calibrated)


# ------------------------------------------------------------------ damaged checkpoints


def edit_json(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    edit(content["quantization_config"]["freeact"])
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """As a tool would that rewrites the file and its digest, but not what it means."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    digest = sha256_of(folder / "model.safetensors")
    edit_json(folder, lambda meta: meta.update(sha256=digest))


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def change_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        edit_tensors(folder, lambda t: t.update({name: change(t[name]).contiguous()}))

    return edit


def drop_tensor(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.pop(name))


def change_meta(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, edit)


def code_minus_8(packed: Tensor) -> Tensor:
    assert unpack_int4(packed, 48)[5, 9] + 8 > 0
    packed[5, 1] &= ~(15 << 4)  # code 8 * 1 + 1
    return packed


Q = "blocks.0.q"
DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no folder": (
        lambda f: [file.unlink() for file in f.iterdir()] and f.rmdir(),
        ("a checkpoint is a folder with config.json and model.safetensors", "Checkpoint.save"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json is missing",)),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors is missing",)),
    "truncated config": (
        lambda f: truncate(f / "config.json"),
        ("config.json: not a checkpoint's config.json",),
    ),
    "binary config": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        ("config.json: not a checkpoint's config.json",),
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ("config.json: not a checkpoint's config.json",),
    ),
    "config of something else": (
        lambda f: (f / "config.json").write_text('{"quantization_config": 4}'),
        ("config.json: not a checkpoint's config.json",),
    ),
    "another method": (
        lambda f: (f / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        ("quant_method must be 'freeact', got 'gptq'", "library it was made by"),
    ),
    "truncated tensors": (
        lambda f: truncate(f / "model.safetensors"),
        ("model.safetensors: truncated or damaged", "Copy it again"),
    ),
    "empty tensors": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        ("model.safetensors: truncated or damaged",),
    ),
    "one bit": (
        lambda f: flip_a_bit(f / "model.safetensors"),
        ("SHA-256 is not the one in config.json", "Copy both again"),
    ),
    "future version": (
        change_meta(lambda m: m.update(version=99)),
        ("version must be 2, got 99", "install the freeact_fx that wrote it"),
    ),
    "no version": (change_meta(lambda m: m.pop("version")), ("version must be 2, got None",)),
    "no groups": (
        change_meta(lambda m: m.pop("groups")),
        ("config.json: groups missing", "incomplete"),
    ),
    "no digest": (
        change_meta(lambda m: m.pop("sha256")),
        ("config.json: sha256 missing", "incomplete"),
    ),
    "no plan": (
        change_meta(lambda m: m["groups"][Q].pop("plan")),
        (f"config.json: group {Q}: 'plan' is missing",),
    ),
    "widths of words": (
        change_meta(lambda m: m["groups"][Q].update(widths=["six"])),
        (f"config.json: group {Q}: 'widths' is missing or ill-formed, got ['six']",),
    ),
    "no fingerprint": (
        change_meta(lambda m: m["linears"][Q].pop("fingerprint")),
        (f"config.json: Linear {Q}: 'fingerprint' is missing", "restore it"),
    ),
    "unknown plan": (
        change_meta(lambda m: m["groups"][Q].update(plan="magic")),
        (f"freeact.{Q}", "plan must be one of", "'magic'"),
    ),
    "other slices": (
        change_meta(lambda m: m["groups"][Q].update(slice_of_type=[0, 1, 0, 0])),
        (f"freeact.{Q}", "slice_of_type must give each of 4 rows a slice"),
    ),
    "unknown group": (
        change_meta(lambda m: m["linears"][Q].update(group="nowhere")),
        (f"{Q} is in group 'nowhere', which is not there",),
    ),
    "other width": (
        change_meta(lambda m: m["linears"][Q].update(num_features=96)),
        (f"{Q} has num_features 96, its group's transform 48",),
    ),
    "unknown config field": (
        change_meta(lambda m: m["config"].update(weight_bit=4)),
        ("config.json", "unknown field 'weight_bit'", "Did you mean 'weight_bits'"),
    ),
    "impossible config value": (
        change_meta(lambda m: m["config"].update(weight_bits=5)),
        ("config.json", "QuantConfig.weight_bits: must be 4, got 5"),
    ),
    "other type names": (
        change_meta(lambda m: m.update(type_names=["text", "vision", "first"])),
        ("type_names ['text', 'vision', 'first'] do not match its token types", "restore it"),
    ),
    "one type more": (
        change_meta(
            lambda m: (
                m["config"]["token_types"]["types"].append({"name": "more"}),
                m.update(type_names=["unmasked", "masked", "more", "first"]),
            )
        ),
        (f"freeact.{Q}", "clip must have 5 rows"),
    ),
    "no packed weight": (drop_tensor(f"{Q}.weight_packed"), (f"{Q}.weight_packed is missing",)),
    "no scale": (drop_tensor(f"{Q}.weight_scale"), (f"{Q}.weight_scale is missing",)),
    "no left factor": (drop_tensor(f"freeact.{Q}.left"), (f"freeact.{Q}.left is missing",)),
    "cut packed weight": (
        change_tensor(f"{Q}.weight_packed", lambda t: t[:, 1:]),
        (f"{Q}.weight_packed", "shape [48, 6], got torch.int32 of shape [48, 5]"),
    ),
    "float packed weight": (
        change_tensor(f"{Q}.weight_packed", lambda t: t.float()),
        (f"{Q}.weight_packed", "torch.int32", "got torch.float32"),
    ),
    "code -8": (
        change_tensor(f"{Q}.weight_packed", code_minus_8),
        (f"{Q}.weight_packed holds code -8", "symmetric range"),
    ),
    "half scale": (
        change_tensor(f"{Q}.weight_scale", lambda t: t.half()),
        (f"{Q}.weight_scale", "torch.float32", "got torch.float16"),
    ),
    "NaN scale": (
        change_tensor(f"{Q}.weight_scale", lambda t: t * float("nan")),
        (f"{Q}.weight_scale", "finite"),
    ),
    "infinite bias": (
        change_tensor(f"{Q}.bias_table", lambda t: t + float("inf")),
        (f"{Q}.bias_table", "finite"),
    ),
    "short bias table": (
        change_tensor(f"{Q}.bias_table", lambda t: t[:2]),
        (f"{Q}.bias_table", "shape [4, 48], got torch.float32 of shape [2, 48]"),
    ),
    "other number of codes": (
        change_tensor(f"{Q}.weight_shape", lambda t: t + torch.tensor([0, 8])),
        (f"{Q}.weight_shape says 56 codes per row, its group's transform makes 48",),
    ),
    "NaN transform": (
        change_tensor(f"freeact.{Q}.right", lambda t: t * float("nan")),
        (f"freeact.{Q}: right must be finite",),
    ),
    "short shift": (
        change_tensor(f"freeact.{Q}.shift", lambda t: t[:, 1:]),
        (f"freeact.{Q}: shift must have shape [4, 48], got [4, 47]",),
    ),
    "left of another rank": (
        change_tensor(f"freeact.{Q}.left", lambda t: t[0]),
        (f"freeact.{Q}: left must be [D1, sum(widths)]",),
    ),
    "no bias table": (drop_tensor(f"{Q}.bias_table"), (f"{Q}.bias_table is missing",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage: str, calibrated: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    calibrated.save(folder)
    assert Checkpoint.load(folder) == calibrated
    destroy, parts = DAMAGES[damage]
    destroy(folder)
    with pytest.raises(CheckpointError, match=literally(*parts)):
        Checkpoint.load(folder)


def test_explain_before_anything_was_compiled() -> None:
    message = literally("nothing was compiled with backend='freeact' yet", "Call the model first")
    with pytest.raises(ConfigError, match=message):
        freeact_fx.explain(torch.compile(tiny_model(), backend="freeact"))


def test_report_of_a_linear_that_is_not_there() -> None:
    report = freeact_fx.explain(tiny_model(), masked_ids())
    assert len(report.linears) == len(LINEARS) + 1
    with pytest.raises(KeyError, match=r"no Linear 'blocks\.9\.q'"):
        report["blocks.9.q"]
