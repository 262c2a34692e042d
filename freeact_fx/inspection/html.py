"""The report as one HTML file that needs no network: ``Report.to_html("report.html")``.

The page is made of the readable sources in ``assets`` (one stylesheet, one script for each part of the page), two
libraries in ``assets/vendor`` and the report's dict as JSON::

    report.html   {{title}} {{style}} {{data}} {{script}}
    model.js      layers, groups and kinds, read off the names of Linears
    roving.js     arrow keys in trees and tables
    walk.js       the model's walk; dagre lays out the graph of a layer
    facts.js      everything about what is chosen
    table.js      all Linears, folded by layer
    charts.js     errors, bytes, times, activations; drawn by ECharts
    code.js       each FX graph before and after the passes
    page.js       header, overview, search; draws everything once

Nothing of a report is ever markup: its JSON has no ``<``, and the scripts put text into text nodes only.
"""

from __future__ import annotations

import functools
import html as markup
import json
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..report import Report

_LIBRARIES = ("vendor/dagre.min.js", "vendor/echarts.min.js")
_SCRIPTS = tuple("model roving facts walk charts table code page".split())


def html(report: Report | Mapping[str, Any]) -> str:
    """The report as the text of one HTML file; ``report`` is a Report or its ``to_dict()``."""
    data = report if isinstance(report, Mapping) else report.to_dict()
    parts = {
        "title": markup.escape(f"{data.get('model', {}).get('class', 'model')}, freeact_fx report"),
        "style": _asset("report.css"),
        "data": _json(data),
        "script": _script(),
    }
    text = _asset("report.html")
    for name, part in parts.items():
        before, after = text.split(f"{{{{{name}}}}}", 1)
        text = before + part + after
    return text


def write_html(report: Report | Mapping[str, Any], path: str | Path) -> None:
    """Write ``html(report)``; the file may be moved, mailed and opened anywhere."""
    Path(path).write_text(html(report), encoding="utf-8")


@functools.cache
def _script() -> str:
    names = (*_LIBRARIES, *(f"{name}.js" for name in _SCRIPTS))
    text = "\n".join(_asset(name) for name in names)
    assert not re.search(r"</script|<!--", text, re.IGNORECASE), "a script would end early"
    # A debugger would ask for these files.
    return text.replace("//# sourceMappingURL=", "// source map: ")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", *name.split("/")).read_text("utf-8")


def _json(data: Any) -> str:
    """JSON that can stand inside a script element, and that every browser reads: no ``<``, no NaN."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
