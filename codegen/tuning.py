"""Which tile of the product is fastest, as measured: shipped for some GPUs, and kept on disk for this machine.

Looking up costs a dictionary; nothing is measured unless ``mode="max-autotune"`` asks for it, and then each problem
once per machine. A problem that nobody has measured gets the tile that ``tiles.choose_hopper_tile`` predicts.

Tiles are looked up by the kernel's launcher at each call. Compiled graphs do not hold any, so Inductor's cache of
graphs needs no digest of them in its keys: a graph that is found there runs with the tiles known by then. What it
leaves out is measuring, and rightly so: who put it there under ``max-autotune`` has measured, and left the tiles beside
it, in the same folder. Who deletes the tiles alone gets no new ones for graphs that are found.

A file is ``{"version": 1, "gpu": name, "tiles": [{"problem": {...}, "tile": {...}, "us": median}, ...]}``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .tiles import PROMOTED, TileConfig, is_legal_for_hopper

log = logging.getLogger(__name__)
_VERSION = 1
_SMALLEST_BUCKET = 16
_SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Problem:
    """What a tile is chosen for; ``num_tokens`` is a bucket's upper end."""

    num_tokens: int
    num_outputs: int
    num_codes: int
    engine: str = "int8"
    plan: str = "one slice"


def bucket_of(num_tokens: int) -> int:
    """The next power of two, so that a sequence that grows does not ask for a measurement at each length."""
    return max(_SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())


def problem_of(
    num_tokens: int, num_outputs: int, slice_sizes: Sequence[int], dtype: torch.dtype
) -> Problem:
    """The problem of a Linear; ``dtype`` is that of its codes."""
    engine = "int8" if dtype == torch.int8 else "fp8"
    plan = "one slice" if len(slice_sizes) == 1 else f"{len(slice_sizes)} slices"
    return Problem(bucket_of(num_tokens), num_outputs, sum(slice_sizes), engine, plan)


def known_tile(problem: Problem, gpu: str) -> TileConfig | None:
    """The fastest tile that was measured for a problem on a GPU of that name, if any was."""
    return _tiles_of(gpu).get(problem)


def num_known(gpu: str) -> int:
    """How many problems have a measured tile on a GPU of that name."""
    return len(_tiles_of(gpu))


def tune(
    problem: Problem,
    gpu: str,
    candidates: Iterable[TileConfig],
    time_us: Callable[[TileConfig], float],
) -> TileConfig:
    """The fastest of some tiles; measured now unless it is known, and kept on disk.

    A candidate that does not run is left out, with a line in the log. Raises RuntimeError if none runs.
    """
    known = known_tile(problem, gpu)
    if known is not None:
        return known
    times: dict[TileConfig, float] = {}
    for tile in candidates:
        try:
            times[tile] = time_us(tile)
        except (
            Exception
        ) as error:  # out of shared memory or registers on this chip: the others may run
            log.warning("%s: %s cannot be measured: %s", problem, tile, error)
    if not times:
        raise RuntimeError(f"{problem}: no tile runs on {gpu}; run `freeact doctor`.")
    best = min(times, key=lambda tile: times[tile])
    _remember(problem, gpu, best, times[best])
    return best


def ship(gpu: str, folder: Path, facts: dict[str, Any]) -> Path:
    """Write all that is known of a GPU to a file to be shipped; ``facts`` say where it was measured."""
    shipped = _SHIPPED / f"tiles-{_slug(gpu)}.json"
    found = {str(e["problem"]): e for file in (shipped, cache_file(gpu)) for e in _entries_in(file)}
    file = folder / shipped.name
    write_tiles(file, gpu, found.values(), facts)
    return file


def cache_file(gpu: str) -> Path:
    """Where this machine's measurements are, in Inductor's cache folder (TORCHINDUCTOR_CACHE_DIR)."""
    return _folder() / "freeact" / f"tiles-{_slug(gpu)}.json"


def _folder() -> Path:
    from freeact_fx.compat import inductor_cache  # not above: it imports this, by engine_graph

    return Path(inductor_cache()[0])


def _way_out() -> str:
    return f"Delete {_folder()}, which has the graphs compiled with it, to measure anew."


def entry(problem: Problem, tile: TileConfig, us: float) -> dict[str, Any]:
    """One measurement as it stands in a file."""
    return {"problem": asdict(problem), "tile": asdict(tile), "us": round(us, 1)}


def write_tiles(
    file: Path, gpu: str, entries: Iterable[dict[str, Any]], facts: dict[str, Any] | None = None
) -> None:
    """Whole or not at all: other processes may read meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"version": _VERSION, "gpu": gpu, **(facts or {}), "tiles": list(entries)}
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".unfinished")
    with os.fdopen(handle, "w") as stream:
        json.dump(data, stream, indent=1)
        stream.write("\n")
    os.replace(name, file)


@functools.cache
def _tiles_of(gpu: str) -> dict[Problem, TileConfig]:
    found: dict[Problem, TileConfig] = {}
    for file in (_SHIPPED / f"tiles-{_slug(gpu)}.json", cache_file(gpu)):
        for data in _entries_in(file):
            try:
                problem, tile = Problem(**data["problem"]), TileConfig(**data["tile"])
                promoted = PROMOTED and problem.engine == "fp8"
                if not is_legal_for_hopper(tile, problem.num_codes, promoted=promoted):
                    raise ValueError(f"{tile} is none of the kernel's")
                found[problem] = tile
            except (KeyError, TypeError, ValueError) as error:
                log.warning("%s: an entry is not used: %r. %s", file, error, _way_out())
    return found


def _entries_in(file: Path) -> list[dict[str, Any]]:
    """Entries of a file; none if it is not there, broken or of another version, which is said in the log."""
    if not file.exists():
        return []
    try:
        data = json.loads(file.read_text())
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}, this is {_VERSION}")
        return list(data["tiles"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s: not used: %s. %s", file, error, _way_out())
        return []


def _remember(problem: Problem, gpu: str, tile: TileConfig, us: float) -> None:
    _tiles_of(gpu)[problem] = tile
    file = cache_file(gpu)
    others = [e for e in _entries_in(file) if e.get("problem") != asdict(problem)]
    try:
        write_tiles(file, gpu, [*others, entry(problem, tile, us)])
    except OSError as error:
        log.warning(
            "%s: cannot be written: %s. Tiles will be measured again next time.", file, error
        )


def _slug(gpu: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in gpu).lower().split())


@functools.cache
def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
