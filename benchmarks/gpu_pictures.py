"""The GPU table as Markdown and as a picture: rates of our rows under the ceilings that the same run measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_columns import OURS
from gpu_rows import KEYS

_BEGIN, _END = "<!-- begin table -->", "<!-- end table -->"


def _rated(table: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, ratio in table["ratios"].items():
        for row in ratio["rows"]:
            if "achieved" in row:
                yield key, row


def roof_tops(ceilings: Mapping[str, Any], ops_per_byte: float) -> float:
    """What memory and the fastest 8-bit product allow at an intensity, in TOP/s."""
    return min(ops_per_byte * float(ceilings["copy_gbs"]) / 1e3, _fastest_product(ceilings))


def _fastest_product(ceilings: Mapping[str, Any]) -> float:
    return max(float(ceilings.get(name, 0)) for name in ("int8_tops", "fp8_tops"))


def plot(table: Mapping[str, Any], path: Path) -> None:
    """Left, rates over intensity on logarithmic axes; right, each row's part of its roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(_rated(table))
    size = (16, max(4.0, 1 + 0.24 * len(rows)))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, layout="constrained")
    environment = table["environment"]
    rehearsal = " (rehearsal, no result)" if environment["rehearsal"] else ""
    figure.suptitle(f"{environment['device']}, commit {environment['commit']}{rehearsal}")
    if rows:
        _roofline(left, rows)
        names, parts = [], []
        for key, row in rows:
            intensity = row["ops"] / row["bytes"]
            names.append(f"{key}: {row['label']}")
            parts.append(100 * row["achieved"]["tops"] / roof_tops(row["ceilings"], intensity))
        right.barh(names, parts, color="tab:orange")
        right.invert_yaxis()
        right.tick_params(labelsize=7)
        right.axvline(100, color="gray", linewidth=1)
        right.set_xlabel("% of the roof at the row's intensity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _roofline(axis: Any, rows: list[tuple[str, dict[str, Any]]]) -> None:
    intensities = [row["ops"] / row["bytes"] for _, row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    # Ceilings were measured once in each run; the last stands for all.
    ceilings = rows[-1][1]["ceilings"]
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    axis.plot(grid, [roof_tops(ceilings, x) for x in grid], color="black", label="roof (measured)")
    for name, style in (("bf16_tops", ":"), ("int8_tops", "--"), ("fp8_tops", "-.")):
        if name in ceilings:
            label = f"dense {name.partition('_')[0]} product, {ceilings[name]:g} TOP/s"
            axis.axhline(float(ceilings[name]), color="gray", linestyle=style, label=label)
    colors = [f"C{i}" for i in range(10)]
    keys = list(dict.fromkeys(key for key, _ in rows))
    for index, key in enumerate(keys):
        points = [
            (row["ops"] / row["bytes"], row["achieved"]["tops"]) for k, row in rows if k == key
        ]
        axis.scatter(*zip(*points, strict=True), color=colors[index % 10], label=key,
                     marker="os^D"[index // 10], zorder=3)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(f"operations per byte (copy: {ceilings['copy_gbs']:g} GB/s)")
    axis.set_ylabel("TOP/s")
    axis.legend(fontsize=7)


def fill_document(table: Mapping[str, Any], path: Path) -> None:
    """Write the table between its marks in a Markdown file."""
    text = path.read_text()
    before, rest = text.split(_BEGIN, 1)
    _, after = rest.split(_END, 1)
    path.write_text(f"{before}{_BEGIN}\n{markdown(table)}\n{_END}{after}")


def markdown(table: Mapping[str, Any]) -> str:
    """Environment in a line, the keys, then every row with its columns in microseconds."""
    e = table["environment"]
    gpu = e["gpu"] or {}
    power = gpu.get("power.limit", "unknown")
    lines = [
        f"{e['device']} (power limit {power}, driver {gpu.get('driver_version', 'unknown')}), torch {e['torch']}, "
        f"Triton {e['triton']}, commit {e['commit']}, {e['date']}.",
        "",
        "| key | what | asked for | worst row |",
        "|---|---|---|---|",
    ]
    for key, ratio in table["ratios"].items():
        sign = "<=" if KEYS[key].at_most else ">="
        value = "incomplete" if ratio["value"] is None else f"{ratio['value']:.2f}"
        lines.append(f"| `{key}` | {KEYS[key].what} | {sign} {KEYS[key].bound} | {value} |")
    lines += ["", "| key | row | value | ours | others |", "|---|---|---|---|---|"]
    for key, ratio in table["ratios"].items():
        for row in ratio["rows"]:
            columns = row.get("variants", {})
            others = [f"{n} {_time(c)}" for n, c in columns.items() if n != OURS]
            value = row.get("error") if row["value"] is None else f"{row['value']:.2f}"
            ours = _time(columns[OURS]) if OURS in columns else ""
            lines.append(f"| `{key}` | {row['label']} | {value} | {ours} | {'; '.join(others)} |")
    return "\n".join(lines)


def _time(column: Mapping[str, Any]) -> str:
    if "median_ms" not in column:
        return f"({column['error']})".replace("|", "/")
    low, middle, high = (1e3 * column[n] for n in ("lower_ms", "median_ms", "upper_ms"))
    alone = f", alone {1e3 * column['alone_ms']:.1f}" if "alone_ms" in column else ""
    return f"{middle:.1f} us ({low:.1f} to {high:.1f}){alone}"
