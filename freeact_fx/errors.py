"""The errors users can meet, and the one way we suggest a name that was probably meant.

Every message names the place, the rule, the value and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """An option or an input that cannot be used as given."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another version, or made for another model."""


class UnsupportedLinear(ValueError):
    """Raised under ``strict=True`` when a Linear that was asked for cannot be quantised."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known name, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
