"""The GPU benchmarks, rehearsed on the CPU: all of their code but the kernels; and what is made of measured rows."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import calibrate_8b_layer
import gpu_pictures
import gpu_table
import pytest
import torch
from gpu_decoder import LLADA_8B, QWEN_VL_7B
from gpu_layers import SLICED, TWO_TYPES, typed_transform
from gpu_peers import FP8, INDUCTOR, INT8, MAX_AUTOTUNE, TORCHAO_INT4, TORCHAO_INT8, peers
from gpu_rows import KEYS, Row, Sizes, all_rows
from gpu_table import TableError, add_row, chosen_rows, describe, open_table
from gpu_timing import Bench, brief, covered, sources_digest
from measure import RESULTS
from torch import nn

REHEARSAL = ["--device", "cpu", "--shapes", "tiny", "--compiler", "eager"]
ROWS = all_rows(Sizes(tiny=True))
ENVIRONMENT = {
    "rehearsal": False,
    "device": "A GPU",
    "commit": "abc",
    "sources": "0123",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "compiler": "inductor",
    "date": "2026-01-01",
    "gpu": {"power.limit": "700 W", "driver_version": "580"},
}


def rehearse(out: Path, *arguments: str) -> int:
    return gpu_table.main([*REHEARSAL, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A table of two runs: one row of every kind."""
    out = tmp_path_factory.mktemp("gpu") / "table.json"
    kinds = ["memory", "product_small", "transform_vs_copy_narrow", "branch", "sliced"]
    assert rehearse(out, "--part", *kinds, "--peers", "ratio") == 0
    assert rehearse(out, "--part", "down_4096", "dllm_block", "vlm_block") == 0
    return out, json.loads(out.read_text())


def row_of(table: dict[str, Any], key: str) -> dict[str, Any]:
    row: dict[str, Any] = table["ratios"][key]["rows"][0]
    return row


# ------------------------------------------------------------------ the rehearsal


def test_runs_are_merged(rehearsed: tuple[Path, dict[str, Any]]) -> None:
    _, table = rehearsed
    assert table["environment"]["rehearsal"] is True
    assert {"memory", "sliced", "down_4096", "e2e_block32"} <= set(table["ratios"])
    assert len(table["ratios"]["e2e_block32"]["rows"]) == 2
    for ratio in table["ratios"].values():
        assert ratio["value"] is not None
        assert ratio["missing"] == []


def test_linear_is_timed_compiled_beside_its_peers(rehearsed: tuple[Path, dict[str, Any]]) -> None:
    row = row_of(rehearsed[1], "down_4096")
    columns = row["variants"]
    for name in ("W4A4", INDUCTOR, MAX_AUTOTUNE, FP8, INT8):
        assert (
            0 < columns[name]["lower_ms"] <= columns[name]["median_ms"] <= columns[name]["upper_ms"]
        )
        assert columns[name]["device_ms"] > 0
        assert columns[name]["host_ms"] > 0
    assert "torchao" in columns[TORCHAO_INT8].get("error", "torchao")
    assert row["value"] == columns[INDUCTOR]["median_ms"] / columns["W4A4"]["median_ms"]
    counts = {k["name"]: k["count"] for k in columns["W4A4"]["kernels"]}
    assert counts["freeact::int_mm"] == row["copies"] == 2
    assert not any(k["name"].startswith("freeact") for k in columns[INDUCTOR]["kernels"])
    assert 0.05 < columns["W4A4"]["error_to_bf16"] < 0.35  # 4 bits, not bf16 and not noise
    assert row["types"] == "mixed"


def test_all_linears_of_a_model_are_quantised_and_typed(
    rehearsed: tuple[Path, dict[str, Any]],
) -> None:
    for row in rehearsed[1]["ratios"]["e2e_block32"]["rows"]:
        assert row["states"]["typed"] == row["states"]["quantized"] == 14
        counts = {k["name"]: k["count"] for k in row["variants"]["W4A4"]["kernels"]}
        assert counts["freeact::int_mm"] == 14


def test_short_steps_are_timed_one_after_the_other_and_alone(
    rehearsed: tuple[Path, dict[str, Any]],
) -> None:
    for row in rehearsed[1]["ratios"]["e2e_block32"]["rows"]:
        columns = row["variants"]
        assert row["steps"] == 16
        assert row["value"] == columns[MAX_AUTOTUNE]["median_ms"] / columns["W4A4"]["median_ms"]
        assert all(column["alone_ms"] > 0 for column in columns.values() if "error" not in column)
    assert row_of(rehearsed[1], "down_4096")["steps"] == 1


def test_operators_are_marked_as_called_by_hand(rehearsed: tuple[Path, dict[str, Any]]) -> None:
    for key in ("product_small", "transform_vs_copy_narrow"):
        for row in rehearsed[1]["ratios"][key]["rows"]:
            assert row["called"].startswith("by hand")
            assert row["achieved"]["tops"] > 0


def test_plot_of_a_rehearsal_says_so_and_documents_refuse_it(
    rehearsed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = rehearsed
    document = tmp_path / "gpu.md"
    document.write_text("<!-- begin table -->\n<!-- end table -->\n")
    picture = tmp_path / "roofline.png"
    arguments = ["--out", str(out), "--show", "--plot", str(picture), "--docs", str(document)]
    assert gpu_table.main(arguments) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert document.read_text() == "<!-- begin table -->\n<!-- end table -->\n"


def test_rehearsal_is_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(RESULTS / "gpu_table.json", "--part", "memory") == 2
    assert "a rehearsal is not a result" in capsys.readouterr().err
    assert not (RESULTS / "gpu_table.json.unfinished").exists()


def test_no_gpu_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_table.main(["--out", str(tmp_path / "t.json")]) == 2
    assert "--device cpu --shapes tiny" in capsys.readouterr().err


# ------------------------------------------------------------------ rows and values


def test_every_key_of_the_table_has_rows() -> None:
    assert {row.key for row in ROWS} == set(KEYS)
    for key in KEYS:
        assert any(row.counts for row in ROWS if row.key == key)
        assert len({row.label for row in ROWS if row.key == key}) == sum(r.key == key for r in ROWS)


def test_value_is_the_worst_row_and_waits_for_all() -> None:
    table: dict[str, Any] = {"environment": ENVIRONMENT, "ratios": {}}
    for key, values, worst in (("decode", (3.0, 2.0, 4.0, 5.0), 2.0), ("memory", (0.2, 0.3), 0.3)):
        rows = [row for row in ROWS if row.key == key]
        for row, value in zip(rows, values, strict=True):
            assert table["ratios"].get(key, {}).get("value") is None
            add_row(table, ROWS, row, {"value": value})
        assert table["ratios"][key]["value"] == worst
        add_row(table, ROWS, rows[0], {"value": None, "error": "it broke"})
        assert table["ratios"][key]["value"] is None
        assert table["ratios"][key]["missing"] == [rows[0].label]
    assert "decode" in describe(table)
    assert "incomplete" in describe(table)


def test_tables_of_one_environment_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for number, row in enumerate(row for row in ROWS if row.key == "memory"):
        table: dict[str, Any] = {"environment": ENVIRONMENT, "ratios": {}}
        add_row(table, ROWS, row, {"value": 0.25 + number / 100})
        tables.append(tmp_path / f"{number}.json")
        tables[-1].write_text(json.dumps(table))
    first, second = map(str, tables)
    assert gpu_table.main(["--out", first, "--merge", second]) == 0
    assert json.loads(tables[0].read_text())["ratios"]["memory"]["value"] == 0.26
    other = {"environment": {**ENVIRONMENT, "commit": "another"}, "ratios": {}}
    tables[1].write_text(json.dumps(other))
    assert gpu_table.main(["--out", first, "--merge", second]) == 2
    assert "its rows are of commit 'another'" in capsys.readouterr().err


def test_row_that_is_only_reported_does_not_count() -> None:
    table: dict[str, Any] = {"environment": ENVIRONMENT, "ratios": {}}
    key = "transform_vs_copy_wide"
    for row in ROWS:
        if row.key == key:
            add_row(table, ROWS, row, {"value": 0.7 if row.counts else 0.1})
    assert table["ratios"][key]["value"] == 0.7
    assert any("18944" in r["label"] and not r["counts"] for r in table["ratios"][key]["rows"])


def test_failed_row_is_kept_and_the_others_run(tmp_path: Path) -> None:
    def broken(bench: Bench) -> dict[str, Any]:
        raise ValueError("no such kernel\nand more")

    first, second = (row for row in ROWS if row.key == "memory")
    rows = [Row(first.key, first.label, first.part, broken), second]
    out, table = tmp_path / "t.json", {"environment": ENVIRONMENT, "ratios": {}}
    bench = Bench(torch.device("cpu"), "eager")
    assert gpu_table.run(bench, rows, rows, table, out) is False
    failed, measured = json.loads(out.read_text())["ratios"]["memory"]["rows"]
    assert failed["error"] == "ValueError: no such kernel and more"
    assert measured["value"] < 1


@pytest.mark.parametrize("name", ["commit", "sources", "device", "torch", "rehearsal"])
def test_rows_of_another_environment_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"environment": ENVIRONMENT, "ratios": {}}))
    assert open_table(path, ENVIRONMENT)["ratios"] == {}
    with pytest.raises(TableError, match=f"its rows are of {name} "):
        open_table(path, {**ENVIRONMENT, name: "another"})


def test_parts_and_keys() -> None:
    assert {row.key for row in chosen_rows(ROWS, ["plans"])} == {"two_types", "branch", "sliced"}
    assert {row.part for row in chosen_rows(ROWS, ["e2e_block32"])} == {"dllm_block", "vlm_block"}
    assert chosen_rows(ROWS, None) == ROWS
    with pytest.raises(TableError, match=r"unknown. Known are: branch, decode"):
        chosen_rows(ROWS, ["linears"])


def test_document_is_filled_between_its_marks(tmp_path: Path) -> None:
    table: dict[str, Any] = {"environment": ENVIRONMENT, "ratios": {}}
    time_of = {"lower_ms": 0.9, "median_ms": 1.0, "upper_ms": 1.1}
    columns = {"W4A4": time_of, INDUCTOR: time_of, FP8: {"error": "a | b"}}
    row = next(row for row in ROWS if row.key == "linear_8192")
    add_row(table, ROWS, row, {"value": 1.62, "variants": columns})
    path = tmp_path / "gpu.md"
    path.write_text("before\n<!-- begin table -->\nold\n<!-- end table -->\nafter\n")
    gpu_pictures.fill_document(table, path)
    text = path.read_text()
    assert text.startswith("before\n<!-- begin table -->\nA GPU (power limit 700 W, driver 580)")
    assert text.endswith("<!-- end table -->\nafter\n")
    assert "old" not in text
    assert "| `linear_8192` |" in text
    assert "1000.0 us (900.0 to 1100.0)" in text
    assert "(a / b)" in text
    written = (Path(gpu_table.__file__).parent.parent / "docs" / "gpu.md").read_text()
    assert written.count("<!-- begin table -->") == written.count("<!-- end table -->") == 1


def test_roof_is_the_lower_of_memory_and_arithmetic() -> None:
    ceilings = {"copy_gbs": 3000.0, "bf16_tops": 800.0, "int8_tops": 1100.0, "fp8_tops": 1400.0}
    assert gpu_pictures.roof_tops(ceilings, 100) == 300.0
    assert gpu_pictures.roof_tops(ceilings, 1e4) == 1400.0


# ------------------------------------------------------------------ what is timed


def test_sizes_of_the_table() -> None:
    sizes = Sizes()
    assert (sizes.tokens(8192), sizes.features(12288)) == (8192, 12288)
    assert sizes.decoder(LLADA_8B) is LLADA_8B
    assert (LLADA_8B.hidden, LLADA_8B.mlp, LLADA_8B.num_layers, LLADA_8B.heads) == (
        4096,
        12288,
        32,
        32,
    )
    assert (QWEN_VL_7B.hidden, QWEN_VL_7B.mlp, QWEN_VL_7B.num_layers) == (3584, 18944, 28)
    assert (QWEN_VL_7B.heads, QWEN_VL_7B.kv_heads) == (28, 4)


def test_operands_are_as_a_calibration_leaves_them() -> None:
    cpu = torch.device("cpu")
    shifted = typed_transform(128, TWO_TYPES, cpu)
    assert shifted.shift is not None
    assert not torch.equal(shifted.shift[0], shifted.shift[1])
    assert shifted.channel_scale is not None
    sliced = typed_transform(4096, SLICED, cpu)
    assert sliced.widths == (32, 32)
    assert sliced.slice_of_type[:2] == (0, 1)
    assert sliced.num_codes == 4096  # half of K for each type


def test_as_many_linears_as_make_weights_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    bench = Bench(torch.device("cuda"))
    assert bench.copies(25 << 20) == 6
    assert bench.copies(151 << 20) == 1


class Headed(nn.Module):
    """Layers, the last of them called head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


@pytest.mark.parametrize(
    ("column", "config"),
    [
        (TORCHAO_INT8, "Int8DynamicActivationInt8WeightConfig"),
        (TORCHAO_INT4, "Int4WeightOnlyConfig"),
    ],
)
def test_torchao_quantises_all_but_the_head(
    column: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of torchao, of one that only rounds weights; the dense module stays as it is."""
    asked: list[tuple[str, list[str]]] = []

    def quantize_(model: nn.Module, config: Any, filter_fn: Any) -> None:
        chosen = [name for name, module in model.named_modules() if filter_fn(module, name)]
        asked.append((type(config).__name__, chosen))
        for name in chosen:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight = nn.Parameter((layer.weight.detach() * 128).round() / 128)

    quantization: Any = ModuleType("torchao.quantization")
    quantization.quantize_ = quantize_
    setattr(quantization, config, type(config, (), {}))
    package: Any = ModuleType("torchao")
    package.quantization = quantization
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    dense, x = Headed().eval(), torch.randn(4, 16)
    with torch.no_grad():
        want = dense(x)
        bench = Bench(torch.device("cpu"), "eager", peers="ratio")
        columns = peers(bench, dense, [x], against=[column], cuda_graph=False, expected=want)
        assert asked == [(config, ["layers.0", "layers.2"])]
        assert list(columns) == [column]
        assert columns[column].error is None
        assert columns[column].error_to_bf16 > 0
        assert torch.equal(dense(x), want)


def test_kernels_at_a_time_count_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (1.5, 3.0)]) == 4.0
    assert covered([]) == 0


def test_digest_of_sources_is_that_of_the_package_wherever_it_is(tmp_path: Path) -> None:
    """In a checkout passes and codegen are beside it, in an installation inside."""
    files = ("__init__.py", "cli/app.py", "passes/detect.py", "codegen/kernels/mm.py", "zero.py")
    for name in files:
        parts = name.split("/")
        place = "" if parts[0] in ("passes", "codegen") else "freeact_fx"
        for folder in (tmp_path / "checkout" / place, tmp_path / "installed" / "freeact_fx"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"# {name}")
    before = sources_digest(tmp_path / "checkout" / "freeact_fx")
    assert before == sources_digest(tmp_path / "installed" / "freeact_fx")
    (tmp_path / "installed" / "freeact_fx" / "codegen" / "kernels" / "mm.py").write_text("")
    assert before != sources_digest(tmp_path / "installed" / "freeact_fx")
    nothing = hashlib.sha256().hexdigest()[:16]
    assert sources_digest() != nothing
    results = [json.loads(f.read_text()) for f in RESULTS.glob("*.json")]
    assert all(r.get("environment", {}).get("sources") != nothing for r in results)


def test_error_in_a_line() -> None:
    assert brief(ValueError("a\n  b")) == "ValueError: a b"
    assert brief(ValueError()) == "ValueError: no message"


# ------------------------------------------------------------------ calibrating a layer


def test_calibration_of_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "layer.json"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--out"]
    assert calibrate_8b_layer.main([*arguments, str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["environment"]["rehearsal"] is True
    assert set(result["one_layer"]["plans"]) == {
        f"layers.0.{n}" for n in ("q", "o", "gate", "down")
    }
    assert result["one_layer"]["seconds"] > result["one_layer"]["forward_seconds"] > 0
    assert result["all_layers"]["assumes"]
    assert calibrate_8b_layer.main([*arguments, str(RESULTS / "layer.json")]) == 2
    assert "not a result" in capsys.readouterr().err


def test_extrapolation_to_all_layers() -> None:
    measured = {
        "seconds": 100.0,
        "forward_seconds": 1.0,
        "weight_bytes": 436_000_000,
        "statistics_bytes": 2_550_000_000,
        "peak_bytes_above_weights": 18_550_000_000,
        "checkpoint_bytes": 140_000_000,
    }
    found = calibrate_8b_layer.extrapolate(measured)
    # 32 of 80 GB are half of what 16 GB of weights leave: 12 layers at a time.
    assert (found["layers_per_pass"], found["passes"]) == (12, 3)
    assert found["seconds"] == 32 * 100 + 2 * 32
    weights = 32 * 436_000_000 + 2 * 126_464 * 4096 * 2  # layers; embedding and head
    assert found["peak_bytes"] == weights + 12 * 2_550_000_000 + 16_000_000_000
