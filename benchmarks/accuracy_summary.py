"""From measured rows to what is said of them: the JSON, the tables, the plot.

A *row* is one line of the work file of `accuracy.py`: one checkpoint, scored on all sets of its
model::

    {"model": "dllm", "method": "default", "format": "w4a4", "seed": 0,
     "metrics": {"nll": 1.9, "kl": 0.1, "nll wiki 0.15": 1.8, ...}, "calibrate_s": 80.1, ...}

Metrics without a set in their name are means over the sets, each counting alike. A *gap* is a
metric less the float model's; KL has no float value, it is a gap by itself.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

DEFAULT = "default"
# Tables by type take bytes, which one type for all spends on its branch; else the types would be paid for apart.
ONE_TYPE = ("one type, same bytes", "one type")  # the first that was measured counts
BASELINES = ("flatquant-like", "flatquant-like short")  # the first that was measured counts
# The second measures only those plans that the predictor puts first.
RANKED = ("all plans measured", DEFAULT)
GAPS = ("nll", "kl")
_CHECKPOINT = ("model", "method", "format", "seed")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a work file; a last line that a killed run left unfinished is not one."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows


def find_row(
    rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any], *, any_source: bool = False
) -> Mapping[str, Any] | None:
    """The last row that agrees with the key; `any_source`: of whatever code and compiler."""
    ignored = ("source", "config", "compiler") if any_source else ()
    wanted = {name: value for name, value in key.items() if name not in ignored}
    fitting = (row for row in reversed(rows) if all(row[n] == v for n, v in wanted.items()))
    return next(fitting, None)


def summarise(rows: Sequence[Row], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of `--out`. What the rows do not suffice for is left out.

    A row that was scored under two compilers counts once, as it comes first; `compilers` has its NLL under each.
    """
    compilers = _under_compilers(rows)
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        first.setdefault(_checkpoint(row), row)
    rows = list(first.values())
    return {
        "environment": {**environment, "measured": _measured(rows)},
        "results": list(_results(rows)),
        **_ratios(rows),
        "tokens_scored": {row["model"]: sum(row["scored"].values()) for row in rows},
        "predictor_ranking": _predictor_ranking(rows),
        "compilers": compilers,
    }


def extended(
    earlier: Mapping[str, Any], summary: Mapping[str, Any], methods: Sequence[str]
) -> dict[str, Any]:
    """A summary with the rows of an earlier one, whose work file may be gone; a row of both is the new one.

    methods  in the order of the tables

    Of what a summary does not keep by row (tokens scored, ranking of plans, compilers) the earlier one's is kept where
    it has any.
    """
    rows = {_checkpoint(row): row for one in (earlier, summary) for row in _rows_of(one)}
    ordered = sorted(rows.values(), key=lambda row: methods.index(row["method"]))
    measured = [fact for one in (earlier, summary) for fact in one["environment"]["measured"]]
    kept = {
        name: {**summary[name], **earlier[name]} for name in ("tokens_scored", "predictor_ranking")
    }
    return {
        "environment": {**summary["environment"], "measured": measured},
        "results": [result for row in ordered for result in _results([row])],
        **_ratios(ordered),
        **kept,
        "compilers": [*earlier["compilers"], *summary["compilers"]],
    }


def _rows_of(summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of a summary, as far as it has them."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in summary["results"]:
        key = {name: result[name] for name in _CHECKPOINT}
        row = rows.setdefault(_checkpoint(result), {**key, "metrics": {}})
        row["metrics"][result["metric"]] = result["value"]
    return rows.values()


def _checkpoint(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _CHECKPOINT)


def _under_compilers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The NLL under each compiler of every checkpoint that was scored under more than one."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = {name: row[name] for name in _CHECKPOINT}
        values = found.setdefault(_checkpoint(row), {**key, "nll": {}})["nll"]
        values[row["compiler"]] = row["metrics"]["nll"]
    return [one for one in found.values() if len(one["nll"]) > 1]


def _results(rows: Iterable[Row]) -> Iterable[dict[str, Any]]:
    for row in rows:
        key = {name: row[name] for name in _CHECKPOINT}
        others = {
            n: row[n] for n in ("calibrate_s", "score_s", "of_bf16") if row.get(n) is not None
        }
        for metric, value in {**row["metrics"], **others}.items():
            yield {**key, "metric": metric, "value": value}


def _measured(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """On what the rows were measured: each combination once, with the number of rows and their time."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["environment"], sort_keys=True), []).append(row)
    measured = []
    for group in groups.values():
        seconds = sum(row.get("calibrate_s", 0) + row["score_s"] for row in group)
        facts = {"num_rows": len(group), "hours": round(seconds / 3600, 2)}
        measured.append({**group[0]["environment"], **facts})
    return measured


def _by_model(rows: Sequence[Row], value_of: Any) -> dict[str, Any]:
    models = dict.fromkeys(row["model"] for row in rows)
    values = {model: value_of(model) for model in models}
    return {model: value for model, value in values.items() if value}


def metric_by_seed(
    rows: Iterable[Row], model: str, method: str, format_: str, metric: str
) -> dict[int, float]:
    wanted = (model, method, format_)
    return {
        row["seed"]: row["metrics"][metric]
        for row in rows
        if (row["model"], row["method"], row["format"]) == wanted and metric in row["metrics"]
    }


def gap_by_seed(
    rows: Sequence[Row], model: str, method: str, format_: str, metric: str
) -> dict[int, float]:
    """Metric above float; a KL is a gap as it stands. Empty without a float row."""
    values = metric_by_seed(rows, model, method, format_, metric)
    if metric == "kl":
        return values
    of_float = metric_by_seed(rows, model, "float", "float", metric)
    return {seed: value - of_float[0] for seed, value in values.items()} if of_float else {}


def gap_closed(
    rows: Sequence[Row], model: str, ours: str, *others: str, format_: str = "w4a4"
) -> dict[str, Any]:
    """How much of the gap that another row leaves `ours` closes: 1 - gap(ours) / gap(other).

    The other row is the first of `others` that was measured, named under `against`. Per metric, gaps
    are averaged over the seeds that both rows have; where the other leaves none, there is nothing to
    close. `nll_spread` and `kl_spread` are standard deviations over seeds of the same ratio (None
    with one seed), `spread` is the larger one.
    """
    measured = {row["method"] for row in rows if (row["model"], row["format"]) == (model, format_)}
    against = next((other for other in others if other in measured), None)
    if against is None:
        return {}
    closed: dict[str, float | None] = {}
    for metric in GAPS:
        a = gap_by_seed(rows, model, ours, format_, metric)
        b = gap_by_seed(rows, model, against, format_, metric)
        seeds = sorted(a.keys() & b.keys())
        if not seeds or sum(b[s] for s in seeds) <= 0:
            continue
        closed[metric] = 1 - sum(a[s] for s in seeds) / sum(b[s] for s in seeds)
        closed[f"{metric}_spread"] = _spread([1 - a[s] / b[s] for s in seeds])
    spreads = [s for m in GAPS if (s := closed.get(f"{m}_spread")) is not None]
    return {**closed, "spread": max(spreads, default=None), "against": against} if closed else {}


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _ratios(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "gap_closed": _by_model(rows, lambda model: gap_closed(rows, model, DEFAULT, *BASELINES)),
        "types_alone": _by_model(rows, lambda model: gap_closed(rows, model, DEFAULT, *ONE_TYPE)),
        **_vlm_dnll(rows),
    }


def _vlm_dnll(rows: Sequence[Row]) -> dict[str, float]:
    gaps = gap_by_seed(rows, "vlm", DEFAULT, "w4a4", "nll")
    return {"vlm_dnll": statistics.mean(gaps.values())} if gaps else {}


def _predictor_ranking(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the groups, over seeds, whose plans the predictor puts in the measured order."""
    shares: dict[str, list[tuple[float, int]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [r for r in rows if (r["model"], r["format"]) == (model, "w4a4")]
        for method in RANKED:
            counts = [(r["ranking"], r["num_groups"]) for r in of_model if r["method"] == method]
            if counts:
                shares[model] = counts
                break
    if shares:
        shares["all"] = [count for counts in shares.values() for count in counts]
    return {
        model: sum(share * num for share, num in counts) / sum(num for _, num in counts)
        for model, counts in shares.items()
    }


# ------------------------------------------------------------------ tables

COLUMNS = (
    "nll",
    "gap",
    "perplexity",
    "kl",
    "accuracy",
    "exact_match",
    "of_bf16",
    "calibrate_s",
    "score_s",
)
HEADS = {
    "nll": "NLL",
    "gap": "above float",
    "kl": "KL to float",
    "exact_match": "exact match",
    "of_bf16": "bytes / bf16",
    "calibrate_s": "calibrate, s",
    "score_s": "score, s",
}


def method_table(results: Sequence[Row], model: str, format_: str) -> list[list[str]]:
    """Head and one row per method: mean over seeds, ± their standard deviation."""
    there = [r for r in results if r["model"] == model and r["format"] in (format_, "float")]
    nll = [r for r in there if r["metric"] == "nll"]
    for of_float in (r["value"] for r in nll if r["format"] == "float"):
        gaps = [{**r, "metric": "gap", "value": r["value"] - of_float} for r in nll]
        there += [gap for gap in gaps if gap["format"] != "float"]
    columns = [c for c in COLUMNS if any(r["metric"] == c for r in there)]
    lines = [["method", *(HEADS.get(c, c) for c in columns)]]
    for method in dict.fromkeys(r["method"] for r in there):
        cells = []
        for column in columns:
            of_cell = [r for r in there if r["method"] == method and r["metric"] == column]
            cells.append(_cell(column, [r["value"] for r in of_cell]))
        lines.append([method, *cells])
    return lines


def _cell(column: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, spread = statistics.mean(values), _spread(values)
    digits = 0 if column.endswith("_s") else 2 if column == "perplexity" else 4
    text = f"{mean:.{digits}f}"
    return text if spread is None or digits == 0 else f"{text} ± {spread:.{digits}f}"


def tables(summary: Mapping[str, Any]) -> dict[tuple[str, str], list[list[str]]]:
    """One table per model and format, in the order they were measured."""
    results = summary["results"]
    pairs = dict.fromkeys((r["model"], r["format"]) for r in results if r["format"] != "float")
    return {pair: method_table(results, *pair) for pair in pairs}


def print_summary(summary: Mapping[str, Any]) -> None:
    from presentation import table  # with torch, which no worker's queue needs

    for (model, format_), rows in tables(summary).items():
        print(f"\n{model}, {format_.upper()}: mean over seeds ± standard deviation\n{table(rows)}")
    print()
    for line in headlines(summary):
        print(line)


def headlines(summary: Mapping[str, Any]) -> list[str]:
    """The numbers that the tables are made for, a line each."""

    def ratios(values: Mapping[str, Any]) -> str:
        parts = []
        for metric in GAPS:
            if (value := values.get(metric)) is not None:
                spread = values.get(f"{metric}_spread")
                parts.append(
                    f"{metric.upper()} {value:.3f}"
                    + (f" ± {spread:.3f}" if spread is not None else "")
                )
        return ", ".join(parts)

    lines = []
    for model, values in summary["gap_closed"].items():
        left = f"gap to float that {values['against']} leaves, closed by the default"
        lines.append(f"{left}, {model} W4A4: {ratios(values)}")
    for model, values in summary["types_alone"].items():
        left = f"gap to float that {values['against']} leaves, closed by token types alone"
        lines.append(f"{left}, {model} W4A4: {ratios(values)}")
    if "vlm_dnll" in summary:
        lines.append(f"NLL of the answers above float, vlm W4A4: {summary['vlm_dnll']:+.4f}")
    for one in summary["compilers"]:
        values = ", ".join(f"{name} {nll:.4f}" for name, nll in one["nll"].items())
        what = f"{one['model']} {one['format'].upper()}, {one['method']}, seed {one['seed']}"
        lines.append(f"NLL under both compilers, {what}: {values}")
    for model, share in summary["predictor_ranking"].items():
        lines.append(f"plans ranked rightly by the predictor, groups of {model}: {share:.3f}")
    return lines


# ------------------------------------------------------------------ documentation


def fill_document(path: Path, summary: Mapping[str, Any], methods: Mapping[str, str]) -> None:
    """Write the tables into a Markdown file, between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Names: "dllm w4a4" and so on; "headlines"; "methods" (name and description of each row);
    "environment". A name without numbers keeps what stands there.
    """
    filled = {
        "headlines": "\n".join(f"- {line}" for line in headlines(summary)),
        "methods": _markdown([["row", "what it is"], *map(list, methods.items())]),
        "environment": _environment_lines(summary["environment"]),
    }
    for (model, format_), rows in tables(summary).items():
        filled[f"{model} {format_}"] = _markdown(rows)
    text = path.read_text()
    for name, content in filled.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text:
            continue
        before, rest = text.split(begin, 1)
        _, after = rest.split(end, 1)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    path.write_text(text)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def _environment_lines(environment: Mapping[str, Any]) -> str:
    lines = []
    for facts in environment["measured"]:
        lines.append("- " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return "\n".join(lines)


def plot(summary: Mapping[str, Any], path: Path, format_: str = "w4a4") -> None:
    """Bars of every row's NLL above float and KL to float, one panel per model and metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gaps = _gaps_to_plot(summary["results"], format_)
    if not gaps:
        return
    height = max(len(bars) for bars in gaps.values())
    figure, axes = pyplot.subplots(
        1, len(gaps), figsize=(4.5 * len(gaps), 1 + 0.3 * height), squeeze=False
    )
    for axis, ((model, metric), bars) in zip(axes[0], gaps.items(), strict=True):
        means = [statistics.mean(values) for values in bars.values()]
        spreads = [_spread(values) or 0.0 for values in bars.values()]
        colors = ["tab:orange" if name == DEFAULT else "tab:blue" for name in bars]
        axis.barh(list(bars), means, xerr=spreads, color=colors)
        axis.invert_yaxis()
        # Why a limit: round to nearest collapses, and would make all others look alike.
        compared = (mean for name, mean in zip(bars, means, strict=True) if name in BASELINES)
        limits = [2.2 * statistics.median(means), *(1.1 * mean for mean in compared)]
        axis.set_xlim(min(0.0, *means), max(limits))
        label = "NLL above float" if metric == "nll" else "KL to float"
        axis.set_title(f"{model} {format_.upper()}: {label}", fontsize=10)
        axis.set_xlabel("nats per token; longer bars are cut off", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _gaps_to_plot(
    results: Sequence[Row], format_: str
) -> dict[tuple[str, str], dict[str, list[float]]]:
    gaps: dict[tuple[str, str], dict[str, list[float]]] = {}
    of_float = {(r["model"], r["metric"]): r["value"] for r in results if r["format"] == "float"}
    for result in results:
        panel = result["model"], result["metric"]
        if result["format"] != format_ or panel[1] not in GAPS:
            continue
        below = 0.0 if panel[1] == "kl" else of_float.get(panel)
        if below is not None:
            bars = gaps.setdefault(panel, {})
            bars.setdefault(result["method"], []).append(result["value"] - below)
    return gaps
