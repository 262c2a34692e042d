"""4-bit activations for diffusion and multimodal language models, as a ``torch.compile`` backend.

::

    config = QuantConfig(token_types=TokenTypes.mask_token(126336))
    checkpoint = freeact_fx.calibrate(model, batches, config)
    freeact_fx.convert(model, checkpoint)
    fast = torch.compile(model, backend="freeact")
    print(freeact_fx.explain(model, **inputs))

Importing this package imports neither ``torch._inductor`` nor Triton.
"""

from . import ops  # noqa: F401  (registers torch.ops.freeact)
from .calibrate import calibrate
from .checkpoint import Checkpoint
from .config import QuantConfig
from .convert import FreeActLinear, convert
from .converted import load_converted, save_converted
from .discover import DiscoveredTypes, discover_types
from .errors import CheckpointError, ConfigError, UnsupportedLinear
from .explain import explain
from .mask_collator import MaskCollator
from .report import LinearReport, Report
from .rewrite import rewrite
from .token_types import TokenType, TokenTypes, token_types
from .verification import Finding, Verification, verify

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DiscoveredTypes",
    "Finding",
    "FreeActLinear",
    "LinearReport",
    "MaskCollator",
    "QuantConfig",
    "Report",
    "TokenType",
    "TokenTypes",
    "UnsupportedLinear",
    "Verification",
    "calibrate",
    "convert",
    "discover_types",
    "explain",
    "load_converted",
    "rewrite",
    "save_converted",
    "token_types",
    "verify",
]
