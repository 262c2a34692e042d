"""Measured tiles: shipped ones, and those on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph, Node

from freeact_fx.codegen import tune_linear, tuning
from freeact_fx.codegen.engine_ops import E4M3
from freeact_fx.codegen.tiles import TileConfig, hopper_tiles, is_legal_for_hopper
from freeact_fx.codegen.tuning import Problem, bucket_of, cache_file, known_tile, tune

GPU = "Some GPU 80GB"
PROBLEM = Problem(64, 256, 1024)
TILES = [tile for tile, _ in hopper_tiles(1024)][:3]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tuning._tiles_of.cache_clear()
    yield tmp_path
    tuning._tiles_of.cache_clear()


def another_process() -> None:
    tuning._tiles_of.cache_clear()


def test_the_fastest_is_kept_on_disk(folder: Path) -> None:
    times = dict(zip(TILES, (3.0, 1.0, 2.0), strict=True))
    assert known_tile(PROBLEM, GPU) is None
    assert tune(PROBLEM, GPU, TILES, times.__getitem__) == TILES[1]
    another_process()
    assert folder in cache_file(GPU).parents
    assert known_tile(PROBLEM, GPU) == TILES[1]
    assert known_tile(PROBLEM, "Another GPU") is None
    assert known_tile(Problem(128, 256, 1024), GPU) is None


def test_nothing_is_measured_twice() -> None:
    tune(PROBLEM, GPU, TILES, lambda tile: 1.0)
    another_process()

    def never(tile: TileConfig) -> float:
        raise AssertionError("measured again")

    assert tune(PROBLEM, GPU, TILES, never) == TILES[0]


def test_measurements_of_two_problems_stand_side_by_side() -> None:
    other = Problem(128, 256, 1024, plan="2 slices")
    tune(PROBLEM, GPU, TILES, lambda tile: 1.0)
    another_process()
    tune(other, GPU, TILES[1:], lambda tile: 1.0)
    another_process()
    assert (known_tile(PROBLEM, GPU), known_tile(other, GPU)) == (TILES[0], TILES[1])


def test_a_tile_that_does_not_run_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def time_us(tile: TileConfig) -> float:
        if tile is TILES[0]:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    assert tune(PROBLEM, GPU, TILES, time_us) == TILES[1]
    assert "cannot be measured: out of resource" in caplog.text
    with pytest.raises(RuntimeError, match=r"no tile runs on Some GPU 80GB; run `freeact doctor`"):
        tune(Problem(1, 2, 3), GPU, TILES[:1], time_us)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "which has the graphs compiled with it, to measure anew"),
        (json.dumps({"version": 0, "tiles": []}), "version 0, this is 1"),
        (json.dumps({"version": 1, "tiles": [{"problem": {"m": 1}}]}), "an entry is not used"),
    ],
)
def test_a_broken_file_is_not_used(
    content: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache_file(GPU).parent.mkdir(parents=True)
    cache_file(GPU).write_text(content)
    with caplog.at_level(logging.WARNING):
        assert known_tile(PROBLEM, GPU) is None
        assert tune(PROBLEM, GPU, TILES, lambda tile: 1.0) == TILES[0]
    assert said in caplog.text
    another_process()
    assert known_tile(PROBLEM, GPU) == TILES[0]


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.parametrize(("num_tokens", "behind_transform"), [(16, True), (128, False)])
def test_a_linear_of_few_tokens_is_timed_behind_a_transform(
    num_tokens: int, behind_transform: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(L2_cache_size=100_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    problem = Problem(num_tokens, 64, 256)
    call = tune_linear._Call(problem, [256], dtype, torch.device("cpu"))
    codes, scale = call._codes_of(1)
    assert (codes is not call._codes[1]) == behind_transform
    assert codes.dtype == dtype
    assert codes.shape == (num_tokens, 256)
    assert scale.shape == (num_tokens,)
    assert codes.is_contiguous()
    assert scale.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "rank", "outputs"),
    [(torch.int8, 0, [256]), (torch.int8, 16, [256]), (E4M3, 16, [128, 64, 64])],
)
def test_what_is_one_launch_is_measured_as_one(
    dtype: torch.dtype, rank: int, outputs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(tune_linear, "is_hopper", lambda device: True)
    monkeypatch.setattr(tune_linear, "tune_linear", lambda m, n, *rest: measured.append(n))
    graph = Graph()

    def given(*shape: int, dtype: torch.dtype = torch.float32) -> Node:
        node = graph.placeholder("x")
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    weights = [given(n, 32) for n in (128, 64, 64)]
    static = (None, [256], [0], 0, torch.bfloat16)
    of_branch = (given(32, rank) if rank else None, [], [])
    args = (given(32, 256, dtype=dtype), given(32, 1), weights, [], [], *static, *of_branch)
    graph.call_function(torch.ops.freeact.engine_linears.default, args)
    tune_linear.tune_linears(graph)
    assert measured == outputs


@pytest.mark.parametrize(
    ("num_tokens", "bucket"), [(1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192)]
)
def test_buckets(num_tokens: int, bucket: int) -> None:
    assert bucket_of(num_tokens) == bucket


def test_shipped_tiles_are_legal_and_found() -> None:
    files = list(tuning._SHIPPED.glob("*.json"))
    assert files
    for file in files:
        data = json.loads(file.read_text())
        assert file.name == f"tiles-{tuning._slug(data['gpu'])}.json"
        for entry in data["tiles"]:
            problem, tile = Problem(**entry["problem"]), TileConfig(**entry["tile"])
            assert problem.num_tokens == bucket_of(problem.num_tokens)
            assert is_legal_for_hopper(tile, problem.num_codes)
            assert known_tile(problem, data["gpu"]) == tile
