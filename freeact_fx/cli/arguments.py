"""From the words on the command line to values: fields of QuantConfig, token types, dtypes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from freeact_fx.config import QuantConfig
from freeact_fx.errors import ConfigError, nearest_name
from freeact_fx.token_types import TokenTypes

if TYPE_CHECKING:
    import torch

_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``["plan=branch", "skip=lm_head,*.down_proj"]`` as fields of QuantConfig. Raises ConfigError."""
    defaults = {f.name: getattr(QuantConfig(), f.name) for f in fields(QuantConfig)}
    found = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise ConfigError(
                f"--set {setting}: must be FIELD=VALUE, for example --set plan=branch."
            )
        if name not in defaults:
            raise ConfigError(
                f"--set {setting}: QuantConfig has no field {name!r}.{nearest_name(name, defaults)}"
            )
        found[name] = _parse(name, value.strip(), defaults[name])
    return found


def _parse(name: str, value: str, default: Any) -> Any:
    """A value of the kind that the field has; QuantConfig checks what it means."""
    if isinstance(default, TokenTypes):
        return parse_token_types(value, None)
    if isinstance(default, bool):
        if value.lower() not in _SWITCHES:
            raise ConfigError(f"--set {name}={value}: must be true or false.")
        return _SWITCHES[value.lower()]
    if isinstance(default, tuple):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if value.lower() == "none":
        return None
    for kind in (int, float):
        if isinstance(default, (int, float)):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def parse_token_types(words: str, config: Any) -> TokenTypes:
    """``config``, ``auto``, ``single``, ``mask:ID``, ``image:ID``, ``explicit:NAME,NAME`` or JSON as TokenTypes."""
    kind, _, rest = words.partition(":")
    if words.lstrip().startswith("{"):
        try:
            return TokenTypes.from_dict(json.loads(words))
        except ValueError as error:
            raise ConfigError(f"--token-types: {error}") from error
    if kind == "config" and config is not None:
        return default_types(config)
    if kind in ("auto", "single"):
        return TokenTypes.auto() if kind == "auto" else TokenTypes.single()
    if kind in ("mask", "image") and rest.isdigit():
        return (TokenTypes.mask_token if kind == "mask" else TokenTypes.image_tokens)(int(rest))
    if kind == "explicit" and rest:
        return TokenTypes.explicit(*rest.split(","))
    raise ConfigError(
        f"--token-types: must be config, auto, single, mask:ID, image:ID, explicit:NAME,NAME or the JSON of "
        f"TokenTypes.to_dict(), got {words!r}."
    )


def default_types(config: Any) -> TokenTypes:
    """What a model's config declares; a multimodal one that declares nothing still has its merge."""
    from freeact_fx.hub import is_multimodal

    types = TokenTypes.from_config(config)
    return TokenTypes.auto() if types == TokenTypes.single() and is_multimodal(config) else types


def parse_dtype(name: str | None) -> torch.dtype | None:
    """``float32``, ``bfloat16`` or ``float16`` (or fp32, bf16, fp16); None or "auto": as stored."""
    import torch

    known = {
        "auto": None,
        **{n: torch.float32 for n in ("float32", "fp32")},
        **{n: torch.bfloat16 for n in ("bfloat16", "bf16")},
        **{n: torch.float16 for n in ("float16", "fp16")},
    }
    if name is not None and name not in known:
        raise ConfigError(f"--dtype: unknown {name!r}.{nearest_name(name, known)}")
    return known[name or "auto"]
