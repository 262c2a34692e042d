"""What differs between two reports or checkpoints: Linears added or removed, and what changed of the others.

::

    freeact explain --diff before.json after.json
    freeact explain --diff checkpoint-1 checkpoint-2
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import ConfigError
from .report import Report

_FIELDS = ("shape", "state", "plan", "precision", "reason", "dense_bytes", "packed_bytes")
_ERRORS = ("predicted_error", "measured_error")


@dataclass(frozen=True)
class Change:
    """One difference. ``before`` and ``after`` are plain JSON; None stands for nothing there.

    what  a field of ``LinearReport``, with the type behind it for an error ("measured_error masked"), "added" or
          "removed"
    """

    linear: str
    what: str
    before: Any
    after: Any


@dataclass(frozen=True)
class ReportDiff:
    """All differences, in the order of the Linears, and how many Linears are the same in all that both tell."""

    changes: tuple[Change, ...]
    num_same: int

    def __bool__(self) -> bool:
        return bool(self.changes)

    def to_dict(self) -> dict[str, Any]:
        return {"num_same": self.num_same, "changes": [asdict(change) for change in self.changes]}


def read_side(path: str | Path) -> Report | Checkpoint:
    """One side of a comparison: a report that was saved as JSON, or the folder of a checkpoint or converted model.

    Raises ConfigError or CheckpointError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint.load(path)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: neither a checkpoint's folder nor a report (freeact explain --json) that can be read."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}). Save a report with --json.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a report, got a {type(data).__name__}.")
    try:
        return Report.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def diff(
    before: Report | Checkpoint, after: Report | Checkpoint, *, tolerance: float = 0.01
) -> ReportDiff:
    """Compare two reports, two checkpoints or one of each, in what both sides know.

    tolerance  errors that differ by less than this part of the larger one are the same
    """
    sides = [_rows(before), _rows(after)]
    changes: list[Change] = []
    num_same = 0
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        old, new = (side.get(name) for side in sides)
        if old is None or new is None:
            # A checkpoint does not tell of what it leaves alone.
            if (old or new or {}).get("reason") is None:
                changes.append(_whole(name, old, new))
            continue
        found = list(_changed(name, old, new, tolerance))
        changes += found
        num_same += not found
    return ReportDiff(tuple(changes), num_same)


def _whole(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Change:
    def in_short(row: Mapping[str, Any] | None) -> str | None:
        return None if row is None else f"{row['precision']}, plan {row['plan']}"

    return Change(name, "removed" if new is None else "added", in_short(old), in_short(new))


def _changed(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float
) -> list[Change]:
    changes = [
        Change(name, key, old[key], new[key])
        for key in _FIELDS
        if key in old and key in new and old[key] != new[key]
    ]
    for key in _ERRORS:
        was, now = old.get(key), new.get(key)
        if was is None or now is None:
            continue
        for token_type in dict.fromkeys([*was, *now]):
            a, b = was.get(token_type), now.get(token_type)
            if a is None or b is None or abs(a - b) > tolerance * max(abs(a), abs(b)):
                changes.append(Change(name, f"{key} {token_type}", a, b))
    return changes


def _rows(side: Report | Checkpoint) -> dict[str, dict[str, Any]]:
    if isinstance(side, Report):
        keys = (*_FIELDS, *_ERRORS)
        rows = {row.name: {key: getattr(row, key) for key in keys} for row in side.linears}
        return {n: row | {"shape": list(row["shape"])} for n, row in rows.items()}
    rows = {}
    for name, entry in side.linears.items():
        measured = side.statistics.get(entry.group, {})
        packed = entry.packed
        rows[name] = {
            "shape": [packed.weight.shape[0], entry.num_features],
            "plan": side.groups[entry.group].plan,
            "precision": f"W4A{side.config.activation_bits}",
            "reason": None,
            "packed_bytes": sum(t.numel() * t.element_size() for t in packed.tensors().values()),
            "predicted_error": measured.get("predicted", {}).get(name),
            "measured_error": measured.get("error", {}).get(name),
        }
    return rows
