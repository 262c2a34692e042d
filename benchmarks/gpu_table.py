"""What does W4A4 bring on a GPU, beside bf16, fp8 and int8, in one run?

    python benchmarks/gpu_table.py --out FILE                      # everything
    python benchmarks/gpu_table.py --out FILE --part linear down   # some parts or keys, merged into FILE
    python benchmarks/gpu_table.py --list                          # parts, keys and rows
    python benchmarks/gpu_table.py --out FILE --merge OTHER ...    # rows measured elsewhere at the same time
    python benchmarks/gpu_table.py --out FILE --show --plot roofline.png --docs docs/gpu.md

FILE is ``{"environment": {...}, "ratios": {key: {"value", "rows": [...]}}}``. It is written after every row, so a
run that is killed keeps what it measured; a later run adds to it if commit, sources, device and versions agree.
``value`` is the worst row of a key, and null while a row is missing or failed. Exit status 1 if a row failed.

Without a GPU the same code rehearses on small shapes, which says nothing about speed and cannot be published:

    python benchmarks/gpu_table.py --device cpu --shapes tiny --out /tmp/rehearsal.json
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_peers import brief
from gpu_rows import KEYS, Row, Sizes, all_rows
from gpu_timing import Bench, environment, write_json
from measure import RESULTS

Table = dict[str, Any]
# What must be the same for rows to stand in one table.
_AGREE = ("rehearsal", "device", "commit", "sources", "torch", "triton", "compiler")
_CEILING_SIZE = 4096


class TableError(Exception):
    """A request that would make a table that is not what it says."""


def open_table(path: Path, facts: Mapping[str, Any]) -> Table:
    """The table in a file, or a new one. Raises TableError if its environment is another one."""
    if facts["rehearsal"] and RESULTS in path.resolve().parents:
        raise TableError(f"--out {path}: a rehearsal is not a result. Write it elsewhere.")
    if not path.exists():
        return {"environment": dict(facts), "ratios": {}}
    table: Table = json.loads(path.read_text())
    _check(path, table, facts)
    return table


def _check(path: Path, table: Table, facts: Mapping[str, Any]) -> None:
    for name in _AGREE:
        old, new = table["environment"].get(name), facts[name]
        if old != new:
            raise TableError(
                f"{path}: its rows are of {name} {old!r}, this run is of {new!r}, and rows of both cannot "
                f"stand in one table. Move the file away, or name another."
            )


def add_row(table: Table, rows: Sequence[Row], row: Row, fields: Mapping[str, Any]) -> None:
    """Put a measured row in, in place of an earlier one, and renew the value of its key."""
    ratio = table["ratios"].setdefault(row.key, {"value": None, "rows": []})
    found = {old["label"]: old for old in ratio["rows"]}
    found[row.label] = {"label": row.label, "counts": row.counts, **fields}
    wanted = [r for r in rows if r.key == row.key]
    ratio["rows"] = [found[r.label] for r in wanted if r.label in found]
    counted = [found.get(r.label, {}).get("value") for r in wanted if r.counts]
    worst = max if KEYS[row.key].at_most else min
    ratio["value"] = None if None in counted else worst(counted)
    ratio["bound"] = KEYS[row.key].bound
    ratio["missing"] = [r.label for r in wanted if found.get(r.label, {}).get("value") is None]


def merge(table: Table, rows: Sequence[Row], others: Sequence[Path]) -> None:
    """Add the rows of other tables. Raises TableError if one is of another environment."""
    for path in others:
        other: Table = json.loads(path.read_text())
        _check(path, other, table["environment"])
        for row in rows:
            for fields in other["ratios"].get(row.key, {"rows": ()})["rows"]:
                if fields["label"] == row.label:
                    add_row(table, rows, row, fields)
    table["ratios"] = {key: table["ratios"][key] for key in KEYS if key in table["ratios"]}


def is_met(key: str, value: float) -> bool:
    return value <= KEYS[key].bound if KEYS[key].at_most else value >= KEYS[key].bound


def describe(table: Table) -> str:
    """One line for each key: value, what is asked for, and whether it is that."""
    lines = []
    for key, ratio in table["ratios"].items():
        value, sign = ratio["value"], "<=" if KEYS[key].at_most else ">="
        state = "incomplete" if value is None else "yes" if is_met(key, value) else "NO"
        shown = "-" if value is None else f"{value:.3f}"
        lines.append(f"{key:26} {shown:>8}  {sign} {KEYS[key].bound:<5} {state}")
    return "\n".join(lines)


def measure(bench: Bench, row: Row, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row; "error" instead of a value if it cannot be measured."""
    # Every row counts as the first. Its columns are compilations of the same code.
    torch.compiler.reset()
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            fields = row.measure(bench)
    except Exception as error:  # the rows after it are to be measured still
        traceback.print_exc(limit=-6)
        fields = {"value": None, "error": brief(error)}
    if bench.on_gpu:
        gc.collect()
        fields["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = round(time.perf_counter() - start, 1)
    return {**fields, "ceilings": dict(ceilings), "seconds": seconds}


def chosen_rows(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """Rows of parts or keys; all if none are named. Raises TableError for a name that is neither."""
    known = {row.part for row in rows} | {row.key for row in rows}
    for name in names or ():
        if name not in known:
            raise TableError(f"--part {name}: unknown. Known are: {', '.join(sorted(known))}.")
    return [row for row in rows if not names or row.part in names or row.key in names]


def run(bench: Bench, rows: Sequence[Row], chosen: Sequence[Row], table: Table, out: Path) -> bool:
    """Measure and save row after row; False if one failed."""
    size = _CEILING_SIZE if bench.on_gpu else 64
    print(f"ceilings: {(ceilings := bench.ceilings(size))}", flush=True)
    all_well = True
    for row in chosen:
        fields = measure(bench, row, ceilings)
        add_row(table, rows, row, fields)
        write_json(out, table)
        value = fields["value"]
        shown = fields.get("error") or f"{value:.3f} against {fields['against']}"
        print(f"{row.key:26} {row.label}: {shown}  [{fields['seconds']:.0f} s]", flush=True)
        for name, column in fields.get("variants", {}).items():
            time_ms = column.get("median_ms")
            shown = f"{1e3 * time_ms:10.1f} us" if time_ms else f"   {column.get('error')}"
            print(f"{'':26}   {name:24} {shown}", flush=True)
        all_well &= value is not None
    return all_well


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the table, read if it exists")
    parser.add_argument("--part", nargs="+", metavar="NAME", help="parts or keys; default: all")
    parser.add_argument("--list", action="store_true", help="show parts, keys and rows")
    parser.add_argument("--merge", type=Path, nargs="+", default=(), metavar="OTHER",
                        help="measure nothing, add the rows of these tables")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="write the roofline there")
    parser.add_argument("--docs", type=Path, help="fill the table of this Markdown file")
    parser.add_argument("--peers", choices=("all", "ratio"), default="all",
                        help="ratio: only the columns that a ratio is against")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed rounds for each row")
    parser.add_argument("--commit", help="of this copy of the sources, if its git does not know")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=("table", "tiny"), default="table")
    parser.add_argument("--layers", type=int, help="of the decoders; a rehearsal")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor",
                        help="eager: compile nothing; a rehearsal")  # fmt: skip
    args = parser.parse_args(arguments)
    rows = all_rows(Sizes(args.shapes == "tiny", args.layers))
    if args.list:
        for row in rows:
            print(f"{row.part:12} {row.key:26} {row.label}")
        return 0
    if args.out is None:
        parser.error("--out FILE is needed")
    try:
        return _act(args, rows)
    except TableError as error:
        print(f"gpu_table: {error}", file=sys.stderr)
        return 2


def _act(args: argparse.Namespace, rows: Sequence[Row]) -> int:
    status = 0
    if args.show or args.merge:
        table: Table = json.loads(args.out.read_text())
        if args.merge:
            merge(table, rows, args.merge)
            write_json(args.out, table)
    else:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise TableError("no CUDA device. Rehearse with: --device cpu --shapes tiny.")
        chosen = chosen_rows(rows, args.part)
        bench = Bench(torch.device(args.device), args.compiler, args.seconds, args.peers)
        is_table = (args.device, args.shapes, args.compiler) == ("cuda", "table", "inductor")
        rehearsal = not is_table or args.layers is not None
        facts = environment(bench, rehearsal=rehearsal, commit=args.commit)
        table = open_table(args.out, facts)
        status = 0 if run(bench, rows, chosen, table, args.out) else 1
    print(describe(table))
    if args.plot or args.docs:
        import gpu_pictures

        if args.plot:
            gpu_pictures.plot(table, args.plot)
        if args.docs:
            if table["environment"]["rehearsal"]:
                raise TableError(f"--docs {args.docs}: a rehearsal is not a result.")
            gpu_pictures.fill_document(table, args.docs)
    return status


if __name__ == "__main__":
    sys.exit(main())
