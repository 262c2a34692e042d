"""The command line, on folders of tiny Hugging Face models: what it prints, what it writes, its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import tiny_llama
from typer.main import get_command
from typer.testing import CliRunner

import freeact_fx
from freeact_fx import Checkpoint, ConfigError, Report, TokenTypes, doctor_probes
from freeact_fx import doctor as doctor_module
from freeact_fx.cli.app import app
from freeact_fx.cli.arguments import parse_settings, parse_token_types
from freeact_fx.cli.prepare import parse_bytes
from freeact_fx.codegen import engine_ops, tuning
from freeact_fx.model_inputs import read_examples, text_batches

ROOT = Path(__file__).parent.parent
MASK = 63
PLAIN_ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}


def freeact(*words: str | Path, code: int = 0, **environment: str) -> str:
    """Run a command in this process; what it printed, errors included."""
    result = CliRunner().invoke(app, [str(w) for w in words], env=environment or None)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def shell(*words: str | Path, code: int = 0) -> str:
    """Run the entry point in a process of its own, its output a pipe."""
    start = "import sys; sys.argv[0] = 'freeact'; from freeact_fx.cli import main; main()"
    command = [sys.executable, "-c", start, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=PLAIN_ENVIRONMENT)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


# ------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked-diffusion model with its weights and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    model = tiny_llama()
    model.config.mask_token_id = MASK
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=60)
    words.train_from_iterator(["a small model reads few words and fills in the others"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a vision-language model, and nothing else."""
    import transformers

    folder = tmp_path_factory.mktemp("llava")
    part = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    text = transformers.LlamaConfig(**part, vocab_size=128, num_hidden_layers=3)
    vision = transformers.CLIPVisionConfig(
        **part, num_hidden_layers=3, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=120)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("a small model reads few words and fills in the others " * 40)
    return file


CALIBRATE = ("--tokens", "32", "--windows", "4", "--set", "sample_tokens=16", "--set", "plan=shift")


@pytest.fixture(scope="module")
def checkpoint(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "shift"
    freeact("calibrate", llama, "--out", folder, "--text-file", text, *CALIBRATE)
    return folder


@pytest.fixture(scope="module")
def converted(llama: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "llama"
    freeact("convert", llama, "--checkpoint", checkpoint, "--out", folder)
    return folder


# ------------------------------------------------------------------ the program


HELP = """
import json, sys
from freeact_fx.cli import main
sys.argv = ["freeact", "--help"]
try:
    main()
except SystemExit as end:
    heavy = ("torch._dynamo", "torch._inductor", "transformers", "triton", "sympy")
    print("END", end.code, [name for name in sys.modules if name.startswith(heavy)])
"""


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    for name in ("explain", "calibrate", "convert", "bench", "doctor"):
        assert name in result.stdout
    assert "END 0 []" in result.stdout


def test_without_typer_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from freeact_fx.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'freeact_fx[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_is_one_message(tmp_path: Path) -> None:
    printed = shell("explain", tmp_path / "nothing", code=2)
    assert printed.startswith("error: ")
    assert "transformers cannot load it" in printed
    assert "Traceback" not in printed
    printed = shell("--debug", "explain", "--diff", tmp_path / "a", tmp_path / "b", code=1)
    assert "Traceback" in printed


def test_usage_errors_and_version() -> None:
    assert "No such option" in freeact("explain", "--wrong", code=2)
    assert "MODEL is missing" in freeact("explain", code=2)
    assert freeact_fx.__version__ in freeact("--version")


def test_colours_only_where_they_are_wanted(tmp_path: Path) -> None:
    words = ("explain", "--diff", tmp_path / "a", tmp_path / "b")
    assert "\x1b[" not in freeact(*words, code=2)
    coloured = freeact(*words, code=2, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;31m" in coloured
    plain = freeact(*words, code=2, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color")
    assert "31m" not in plain


def test_warnings_are_ours_and_a_line_each() -> None:
    import warnings

    from freeact_fx.cli.console import _quiet

    with pytest.MonkeyPatch.context() as patch:
        shown: list[Any] = []
        patch.setattr(
            "freeact_fx.cli.console.notes", lambda: type("C", (), {"print": shown.append})
        )
        with _quiet():
            warnings.warn("freeact: the default type is used", stacklevel=1)
            warnings.warn("something of torch", stacklevel=1)
    assert [str(text) for text in shown] == ["warning: freeact: the default type is used"]


# ------------------------------------------------------------------ explain


def test_explain_writes_what_the_function_returns(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    printed = freeact("explain", llama, "--tokens", "8", "--json", file)
    report = Report.from_dict(json.loads(file.read_text()))
    assert report.counts() == {
        "found": 15, "quantized": 14, "left_alone": 1,
        "typed": 14, "default": 0, "refused": 0, "groups": 8,
    }  # fmt: skip
    assert report.type_names == ("unmasked", "masked", "first")
    assert "model.layers.{0,1}.self_attn.q_proj" in printed
    assert "listed in QuantConfig.skip ['lm_head']" in printed
    assert f"written: {file}" in printed


def test_explain_without_weights_says_the_same(llama: Path, tmp_path: Path) -> None:
    """From config.json alone, and as pure JSON on standard output."""
    whole = json.loads(freeact("explain", llama, "--tokens", "8", "--json", "-"))
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    words = ("explain", tmp_path, "--no-weights", "--tokens", "8", "--json", "-")
    bare = json.loads(freeact(*words))
    assert bare["environment"]["device"] == "meta"
    told = ("name", "shape", "state", "type_source", "plan", "precision", "reason", "packed_bytes")
    for a, b in zip(whole["linears"], bare["linears"], strict=True):
        assert {k: a[k] for k in told} == {k: b[k] for k in told}
    one = json.loads(freeact(*words, "--layers", "1"))
    assert one["counts"]["found"] == 8


def test_explain_of_a_vision_language_config(llava: Path) -> None:
    """Pixels and ids are made up; the merge gives the text model its types."""
    printed = freeact("explain", llava, "--no-weights", "--json", "-")
    report = Report.from_dict(json.loads(printed))
    text = [r for r in report.linears if "language_model.layers" in r.name]
    assert len(text) == 14
    assert all(r.state == "typed" and "-> vision" in r.type_source for r in text)
    tower = [r for r in report.linears if "vision_tower.encoder" in r.name]
    assert tower
    assert all("merged into the embeddings" in str(r.reason) for r in tower)


def test_settings_reach_the_config(llama: Path) -> None:
    words = ("explain", llama, "--no-weights", "--tokens", "8", "--json", "-")
    settings = (
        "--set",
        "skip=lm_head,*.down_proj",
        "--set",
        "activation_bits=8",
        "--set",
        "sink=none",
    )
    report = Report.from_dict(json.loads(freeact(*words, *settings, "--token-types", "single")))
    assert report.type_names == ("token",)
    assert report.counts()["quantized"] == 12
    assert {r.precision for r in report.quantized} == {"W4A8"}


def test_filter(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    words = ("explain", llama, "--no-weights", "--tokens", "8", "--json", file)
    printed = freeact(*words, "--filter", "*.0.*_proj")
    assert "layers.0.mlp.up_proj" in printed
    assert "layers.1" not in printed
    assert "shown: 7 of 15 Linears, --filter *.0.*_proj" in printed
    assert "matches none of the model's 15 Linears, such as model.layers.0" in freeact(
        *words, "--filter", "nothing", code=2
    )
    assert len(json.loads(file.read_text())["linears"]) == 15


def test_strict_fails_for_what_nobody_asked_to_leave_alone(llama: Path, tmp_path: Path) -> None:
    freeact("explain", llama, "--no-weights", "--strict")
    config = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(config))
    printed = freeact("explain", tmp_path, "--no-weights", "--strict", code=1)
    assert "strict: model.layers.0.mlp.down_proj: in_features must be even" in printed
    assert "not as asked for: 2" in printed


def test_inputs_from_a_file(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "inputs.pt"
    torch.save({"input_ids": torch.arange(12).view(1, 12)}, file)
    assert "15 Linears" in freeact("explain", llama, "--inputs", file)
    torch.save(torch.arange(3), file)
    assert "must be keyword arguments" in freeact("explain", llama, "--inputs", file, code=2)
    file.write_bytes(b"nothing")
    printed = freeact("explain", llama, "--inputs", file, code=2)
    assert "torch.save wrote" in printed
    assert "weights_only" not in printed  # torch's advice to load what is not safe


def test_what_does_not_go_together_is_said(llama: Path, tmp_path: Path) -> None:
    words = ("explain", llama, "--no-weights")
    assert "nothing to put there" in freeact(*words, "--device", "cuda", code=2)
    for option in (("--mask-token-id", "64"), ("--token-types", "image:64")):
        printed = freeact(*words, *option, code=2)
        assert f"{option[0]}: ids of type" in printed
        assert "must be below the model's vocab_size of 64, got 64" in printed
    page = tmp_path / "not" / "there" / "report.html"
    freeact(*words, "--html", page)
    assert page.exists()


def test_explain_of_a_converted_model_has_its_errors(converted: Path) -> None:
    report = json.loads(freeact("explain", converted, "--tokens", "8", "--json", "-"))
    rows = [row for row in report["linears"] if row["reason"] is None]
    assert len(rows) == 14
    assert {(row["kind"], row["plan"]) for row in rows} == {("converted", "shift")}
    printed = freeact("explain", converted, "--no-weights", code=2)
    assert "is a converted model" in printed


# ------------------------------------------------------------------ explain --diff


def test_diff_of_equals_and_of_others(
    llama: Path, checkpoint: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    assert "0 Linears differ, 14 are the same" in freeact(
        "explain", "--diff", checkpoint, converted
    )
    other = Checkpoint.load(checkpoint)
    name = "model.layers.1.mlp.down_proj"
    group = other.linears[name].group
    other.statistics[group]["error"][name]["masked"] *= 2
    removed = "model.layers.0.self_attn.o_proj"
    del other.linears[removed]
    other.save(tmp_path / "other")
    printed = freeact("explain", "--diff", checkpoint, tmp_path / "other", code=1)
    assert re.search(rf"{name}\s+measured_error masked\s+[\d.e-]+\s+[\d.e-]+", printed)
    assert re.search(rf"{removed}\s+removed\s+W4A4, plan shift\s+-", printed)
    assert "2 Linears differ, 12 are the same" in printed
    filtered = ("explain", "--diff", checkpoint, tmp_path / "other", "--filter", "*.q_proj")
    assert "0 Linears differ" in freeact(*filtered)


def test_diff_of_a_report_and_a_checkpoint(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "data-free.json"
    freeact("explain", llama, "--no-weights", "--json", file)
    printed = freeact("explain", "--diff", file, checkpoint, code=1)
    assert re.search(r"layers\.\{0,1}\.mlp\.up_proj  x2\s+plan\s+single\s+shift", printed)
    found = json.loads(freeact("explain", "--diff", file, checkpoint, "--json", "-", code=1))
    assert {change["what"] for change in found["changes"]} == {"plan", "packed_bytes"}


def test_diff_of_nonsense(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{")
    assert "not JSON" in freeact("explain", "--diff", file, file, code=2)
    file.write_text("{}")
    assert f"{file}: Report.from_dict: version must be" in freeact(
        "explain", "--diff", file, file, code=2
    )
    file.write_text("[]")
    assert "must hold a report, got a list" in freeact("explain", "--diff", file, file, code=2)
    assert "leave MODEL out" in freeact("explain", "model", "--diff", file, file, code=2)


# ------------------------------------------------------------------ calibrate and convert


def test_calibrate_is_the_function(
    llama: Path, text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The same batches, masked by MaskCollator, and the same result; --batches reads them from a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    types = TokenTypes.mask_token(MASK)
    examples = [{"text": text.read_text()}]
    batches = text_batches(tokenizer, examples, types, num_tokens=32, batch=8, num_windows=4)
    assert [b["input_ids"].shape for b in batches] == [(4, 32)]
    assert (batches[0]["input_ids"] == MASK).any()
    config = freeact_fx.QuantConfig(token_types=types, sample_tokens=16, plan="shift")
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    expected = freeact_fx.calibrate(model, batches, config, progress=False)
    assert Checkpoint.load(checkpoint) == expected
    torch.save(batches, tmp_path / "batches.pt")
    words = (
        "--batches",
        tmp_path / "batches.pt",
        "--max-bytes",
        "1MB",
        "--resume",
        tmp_path / "run",
    )
    printed = freeact("calibrate", llama, "--out", tmp_path / "again", *words, *CALIBRATE)
    assert Checkpoint.load(tmp_path / "again") == expected
    assert "tokens seen by type" in printed
    assert re.search(r"shift\s+8\s+14\s+0\.\d+", printed)


def test_quick_calibration_yields_to_settings(llama: Path, text: Path, tmp_path: Path) -> None:
    words = ("--text-file", text, "--tokens", "32", "--windows", "4")
    freeact("calibrate", llama, "--out", tmp_path / "quick", *words, "--quick")
    config = freeact_fx.QuantConfig(token_types=TokenTypes.mask_token(MASK))
    quick = Checkpoint.load(tmp_path / "quick")
    assert quick.config == config.quick() != config
    assert {group.plan for group in quick.groups.values()} == {"branch"}
    freeact("calibrate", llama, "--out", tmp_path / "set", *words, "--quick", "--set", "plan=shift")
    assert Checkpoint.load(tmp_path / "set").config == replace(config.quick(), plan="shift")


def test_calibrate_says_what_is_missing(
    llama: Path, llava: Path, text: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    assert "give --text-file or --batches" in freeact("calibrate", llama, *out, code=2)
    words = ("calibrate", llama, *out, "--text-file", text)
    assert "one window takes 5000" in freeact(*words, "--tokens", "5000", code=2)
    assert "such as 8GB, got 'much'" in freeact(*words, "--max-bytes", "much", code=2)
    assert "Did you mean 'plan'?" in freeact(*words, "--set", "plam=x", code=2)
    assert not (tmp_path / "out").exists()


def test_examples_in_lines(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "image": "cat.png", "more": 1}\n')
    assert read_examples(file) == [
        {"text": "one"},
        {"text": "two", "image": str(tmp_path / "cat.png")},
    ]
    file.write_text('{"text": "one"}\n{"words": 1}\n')
    with pytest.raises(ConfigError, match=r'data\.jsonl, line 2: must be an object with a "text"'):
        read_examples(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        read_examples(file)


def test_convert_writes_a_folder_of_its_own(llama: Path, checkpoint: Path, converted: Path) -> None:
    """What is loaded computes what the function made, and the tokenizer came along."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    freeact_fx.convert(model, Checkpoint.load(checkpoint))
    loaded = freeact_fx.load_converted(converted)
    ids = AutoTokenizer.from_pretrained(converted)("a small model", return_tensors="pt").input_ids
    with torch.no_grad(), freeact_fx.token_types(torch.zeros_like(ids)):
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    names = {file.name for file in converted.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json"} < names


def test_convert_refuses_what_would_lose_something(
    llama: Path, converted: Path, checkpoint: Path
) -> None:
    assert "the model's own folder" in freeact("convert", llama, "--out", llama, code=2)
    assert "converted already" in freeact("convert", converted, "--out", converted / "x", code=2)
    words = ("convert", llama, "--out", converted / "x", "--checkpoint", checkpoint)
    printed = freeact(*words, "--set", "plan=single", code=2)
    assert "--checkpoint brings its own configuration; leave out: plan" in printed
    assert not (converted / "x").exists()


# ------------------------------------------------------------------ bench and doctor


@pytest.mark.inductor
def test_bench(llama: Path, tmp_path: Path) -> None:
    """One compiled pair: the times are whatever they are, the answers are compared."""
    file = tmp_path / "bench.json"
    words = ("bench", llama, "--tokens", "16", "--runs", "2", "--no-groups", "--json", file)
    printed = freeact(*words)
    found = json.loads(file.read_text())
    assert set(found["model"]) == {"dense, float32", "freeact"}
    assert all(t["num_runs"] == 2 and t["median_ms"] > 0 for t in found["model"].values())
    assert 0 < found["agreement"]["relative_error"] < 0.5
    assert found["num_tokens"] == 16
    assert "same token on top at" in printed


def test_bench_says_what_does_not_go_together(llama: Path, converted: Path) -> None:
    assert "nothing to time" in freeact("bench", llama, "--no-model", "--no-groups", code=2)
    assert "is dense itself" in freeact("bench", llama, "--dense", llama, code=2)
    assert "leave out: plan" in freeact("bench", converted, "--set", "plan=single", code=2)


@pytest.mark.inductor
def test_doctor_runs_its_checks() -> None:
    found = json.loads(
        freeact("doctor", "--json", "-", code=doctor_module.diagnose(quick=True).exit_code)
    )
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["compilation"]["status"] == "ok"
    assert checks["integer product"]["value"].startswith("[64, 512] x [512, 96]: 0 of 6144")
    assert checks["backend"]["status"] == "ok"
    assert re.search(r"fp32 [\d.]+ ms.*bf16 [\d.]+ ms.*int8 [\d.]+ ms", checks["product"]["value"])


@pytest.mark.parametrize(
    ("name", "found", "least", "use", "status"),
    [
        ("torch", "2.13.0+cpu", "2.11", "", "ok"),
        ("torch", "2.9.1", "2.11", "", "failed"),
        ("transformers", "4.60.0", "5.17", "models", "limit"),
        ("transformers", None, "5.17", "models", "limit"),
    ],
)
def test_versions(name: str, found: str | None, least: str, use: str, status: str) -> None:
    assert doctor_module._version_check(name, found, least, use).status == status


@pytest.mark.parametrize(("has_gpu", "status"), [(True, "limit"), (False, "ok")])
def test_a_gpu_needs_triton(has_gpu: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    check = doctor_module._version_check("triton", None, "3.6", "kernels on a GPU")
    assert (check.status, check.value) == (status, "not installed; for kernels on a GPU")
    assert check.way_out == ("pip install triton" if has_gpu else None)


def test_exit_codes_of_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_status(status: str) -> Any:
        check = doctor_module.Check("versions", "torch", status, "2.9.1, 2.11 or newer is needed")
        return lambda **_: doctor_module.Diagnosis((check,))

    for code, status in enumerate(("ok", "limit", "failed")):
        monkeypatch.setattr(doctor_module, "diagnose", with_status(status))
        assert "torch: 2.9.1" in freeact("doctor", code=code)


@pytest.fixture
def gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chip)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: chip.name)


@pytest.mark.usefixtures("gpu_that_is_not_there")
@pytest.mark.parametrize(
    ("hopper", "known", "status", "says"),
    [
        (True, 30, "ok", "30 problems measured"),
        (True, 0, "limit", "max-autotune"),
        (False, 0, "ok", "fixed"),
    ],
)
def test_doctor_on_a_gpu(
    hopper: bool, known: int, status: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of CUDA graphs and of measured tiles."""
    for name in ("has_gpu_kernels", "has_fp8"):
        monkeypatch.setattr(doctor_module, name, lambda: True)
    monkeypatch.setattr(engine_ops, "is_hopper", lambda device: hopper)
    monkeypatch.setattr(tuning, "num_known", lambda gpu: known)
    found = {check.name: check for check in doctor_module._gpu()}
    assert "each shape" in found["cuda graphs"].value
    assert found["tiles"].status == status
    assert says in f"{found['tiles'].value} {found['tiles'].way_out}"


@pytest.mark.usefixtures("gpu_that_is_not_there")
@pytest.mark.parametrize(("capability", "has_triton"), [((7, 5), True), ((9, 0), False)])
def test_doctor_on_a_gpu_without_kernels(
    capability: tuple[int, int], has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model works there, slowly; nothing is said of what only kernels have."""
    monkeypatch.setattr(engine_ops, "_capability", engine_ops._capability.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found_triton = SimpleNamespace(find_spec=lambda name: has_triton or None)
    monkeypatch.setattr(engine_ops, "importlib", SimpleNamespace(util=found_triton))
    found = {check.name: check for check in doctor_module._gpu()}
    assert set(found) == {"gpu 0", "gpu engine"}
    engine = found["gpu engine"]
    assert engine.status == "limit"
    assert engine.value.startswith("none: on this GPU products run in plain PyTorch")
    assert "compute capability 8.0 or above, and Triton" in str(engine.way_out)
    assert doctor_module.Diagnosis(tuple(found.values())).exit_code == 1


def test_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_requirements", lambda: {"torch": "99.0"})
    monkeypatch.setattr(
        doctor_probes, "pack_int4", lambda codes: torch.zeros(96, 64, dtype=torch.int32)
    )
    found = doctor_module.diagnose(quick=True)
    assert found["torch"].status == "failed"
    assert found["torch"].way_out == "pip install 'torch>=99.0'"
    assert doctor_probes._product_check("cpu").status == "failed"


# ------------------------------------------------------------------ words to values


def test_settings_have_the_kind_of_their_field() -> None:
    words = [
        "activation_bits=e4m3",
        "memory_budget=1.5",
        "strict=yes",
        "seed=3",
        "include=a,b",
        "plan=auto",
    ]
    assert parse_settings(words) == {
        "activation_bits": "e4m3",
        "memory_budget": 1.5,
        "strict": True,
        "seed": 3,
        "include": ("a", "b"),
        "plan": "auto",
    }
    with pytest.raises(ConfigError, match="must be FIELD=VALUE"):
        parse_settings(["plan"])
    with pytest.raises(
        ConfigError, match=r"no field 'sik'\. Did you mean 'sink'\?|Did you mean 'skip'"
    ):
        parse_settings(["sik=first"])
    with pytest.raises(ConfigError, match="must be true or false"):
        parse_settings(["strict=maybe"])


def test_token_types_in_words() -> None:
    assert parse_token_types("mask:7", None) == TokenTypes.mask_token(7)
    assert parse_token_types("image:7", None) == TokenTypes.image_tokens(7)
    assert parse_token_types("explicit:a,b", None) == TokenTypes.explicit("a", "b")
    assert parse_token_types("auto", None) == TokenTypes.auto()
    as_json = json.dumps(TokenTypes.mask_token(7).to_dict())
    assert parse_token_types(as_json, None) == TokenTypes.mask_token(7)
    with pytest.raises(ConfigError, match="got 'mask:x'"):
        parse_token_types("mask:x", None)


def test_sizes_in_words() -> None:
    assert [parse_bytes(w) for w in ("8GB", "500m", "1.5 KiB", "12")] == [
        8 * 10**9,
        5 * 10**8,
        1500,
        12,
    ]


# ------------------------------------------------------------------ the documentation


def option_lines(command: str) -> list[str]:
    """Every option of a command as docs/command-line.md has it."""
    lines = []
    for option in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        help_text = getattr(option, "help", None)
        if option.name != "help" and option.opts[0].startswith("-"):
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            lines.append(f"| {names} | {help_text} |")
    return lines


@pytest.mark.parametrize("command", ["explain", "calibrate", "convert", "bench", "doctor"])
def test_documentation_has_every_option(command: str) -> None:
    documentation = (ROOT / "docs" / "command-line.md").read_text()
    section = documentation.split(f"\n## {command}\n")[1].split("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| `-")]
    assert listed == option_lines(command)
