"""The command line: ``freeact explain | calibrate | convert | bench | doctor``, each a thin layer over a function.

Exit codes: 0 done; 1 done, and what was asked about is so (``--strict``, ``--diff``, ``doctor``'s limits); 2 error.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point ``freeact``."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"freeact: the command line needs {error.name}. Install it: pip install 'freeact_fx[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from .app import app

    app()
