"""Open what MODEL names: an id, a folder with or without weights, or a converted model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freeact_fx.errors import ConfigError

from .arguments import default_types, parse_dtype, parse_settings, parse_token_types

if TYPE_CHECKING:
    from torch import nn

    from freeact_fx import Checkpoint, TokenTypes


@dataclass(frozen=True)
class Source:
    """MODEL and the options that say how to open it."""

    model: str
    dtype: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    @property
    def is_converted(self) -> bool:
        from freeact_fx.converted import is_converted

        return is_converted(self.model)

    def open(self) -> nn.Module:
        """With weights, in eval mode, and without a key-value cache, which one call does not need."""
        if self.is_converted:
            from freeact_fx.converted import load_converted

            if self.dtype is not None:
                raise ConfigError(
                    f"--dtype: {self.model} is a converted model and has the dtype it was converted in. Leave --dtype "
                    f"out."
                )
            model = load_converted(self.model, trust_remote_code=self.trust_remote_code)
            model = model.to(self.device)
        else:
            from freeact_fx.hub import load_model

            model = load_model(
                self.model,
                dtype=parse_dtype(self.dtype),
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            )
        return _without_cache(model)

    def open_without_weights(self, num_layers: int | None) -> nn.Module:
        """From the config alone."""
        from freeact_fx.hub import build_without_weights

        model = build_without_weights(
            self.model,
            dtype=parse_dtype(self.dtype),
            num_layers=num_layers,
            trust_remote_code=self.trust_remote_code,
        )
        return _without_cache(model)


def _without_cache(model: nn.Module) -> nn.Module:
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    text.use_cache = False
    return model


def _in_vocabulary(option: str, types: TokenTypes, model: nn.Module) -> TokenTypes:
    """The types, unless an id is one that the model has no embedding for: no token would ever be of that type."""
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for token_type in types.types:
        for token_id in token_type.token_ids:
            if token_id >= text.vocab_size:
                raise ConfigError(
                    f"{option}: ids of type {token_type.name!r} must be below the model's vocab_size of "
                    f"{text.vocab_size}, got {token_id}. Look it up in the tokenizer."
                )
    return types


@dataclass(frozen=True)
class Quantisation:
    """The options that say how a model is quantised."""

    checkpoint: Path | None
    settings: Sequence[str]
    mask_token_id: int | None
    token_types: str | None

    @functools.cached_property
    def loaded(self) -> Checkpoint | None:
        """The checkpoint, read once."""
        from freeact_fx import Checkpoint

        return None if self.checkpoint is None else Checkpoint.load(self.checkpoint)

    def types(self, model: nn.Module) -> TokenTypes:
        """The token types of a model: those that it was converted for or that were asked for, the checkpoint's, its
        config's."""
        from freeact_fx import FreeActLinear, TokenTypes

        if self.mask_token_id is not None and self.token_types is not None:
            raise ConfigError("--mask-token-id and --token-types: give one of them.")
        if self.mask_token_id is not None:
            types = TokenTypes.mask_token(self.mask_token_id)
            return _in_vocabulary("--mask-token-id", types, model)
        if self.token_types is not None:
            types = parse_token_types(self.token_types, model.config)
            return _in_vocabulary("--token-types", types, model)
        if self.loaded is not None:
            return self.loaded.config.token_types
        ours = (m.config.token_types for m in model.modules() if isinstance(m, FreeActLinear))
        return next(ours, None) or default_types(model.config)

    def options(self, model: nn.Module, *, is_converted: bool = False) -> dict[str, Any]:
        """As ``torch.compile(options=...)`` takes them. A checkpoint or a converted model brings its own types."""
        if is_converted and self.checkpoint is not None:
            raise ConfigError(
                "--checkpoint: the model is converted, with a checkpoint. Leave it out."
            )
        options = parse_settings(self.settings)
        asked = self.mask_token_id is not None or self.token_types is not None
        if asked or not (is_converted or self.checkpoint or "token_types" in options):
            options["token_types"] = self.types(model)
        if self.loaded is not None:
            options["checkpoint"] = self.loaded
        return options

    def convert(self, model: nn.Module) -> Mapping[str, str]:
        """Convert a dense model in place; what was left alone. A checkpoint brings its own configuration."""
        import freeact_fx
        from freeact_fx import QuantConfig

        options = self.options(model)
        checkpoint = options.pop("checkpoint", None)
        if checkpoint is None:
            return freeact_fx.convert(model, QuantConfig.from_options(options))
        if options:
            raise ConfigError(
                f"--checkpoint brings its own configuration; leave out: {', '.join(options)}."
            )
        return freeact_fx.convert(model, checkpoint)
