"""What a token type is, and how types come out of a model's inputs.

A *token type* is a class of tokens with an activation distribution of its own: masked and unmasked
tokens of a diffusion language model, vision and text tokens of a multimodal one. Types are numbered in
the order they are declared; number 0 is the default, which every token has that nothing else claims::

    TokenTypes.mask_token(126336)          # unmasked 0, masked 1 (input id 126336)
    TokenTypes.image_tokens(151655)        # text 0, vision 1
    TokenTypes.from_config(model.config)   # whatever ids the Hugging Face config declares
    TokenTypes.auto()                      # text 0, vision 1: any merge that the graph shows

The compiler finds the types in the graph (see ``freeact_fx.passes.annotate``). Where a graph shows neither
ids nor merge, the caller hands them in::

    with freeact_fx.token_types(types):    # [B, T] integers
        model(inputs_embeds=...)
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .errors import ConfigError, nearest_name

_INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TokenType:
    """One token type.

    name       shown in reports and stored in checkpoints
    token_ids  input ids that make a token this type; empty: none do
    merge      True: a merge whose mask is a bool input, or an id comparison that no ``token_ids``
               claims, makes the tokens it writes this type
    """

    name: str
    token_ids: tuple[int, ...] = ()
    merge: bool = False


@dataclass(frozen=True)
class TokenTypes:
    """The token types of a model, in order; number 0 is the default. Raises ConfigError if ill-formed.

    Two instances with the same content are equal and hash alike (torch compares compiler options to
    decide on recompiling).
    """

    types: tuple[TokenType, ...]

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("TokenTypes.types: at least one type is needed, got none.")
        names = [t.name for t in self.types]
        if len(set(names)) != len(names) or "first" in names:
            raise ConfigError(
                f"TokenTypes.types: names must differ and 'first' is reserved for the sink type "
                f"(QuantConfig.sink), got {names}. Rename one."
            )
        claimed: dict[int, str] = {}
        for t in self.types:
            for i in t.token_ids:
                if isinstance(i, bool) or not isinstance(i, int) or i < 0:
                    raise ConfigError(
                        f"TokenTypes, type {t.name!r}: token ids are integers >= 0, got {i!r}. "
                        f"Take them from the tokenizer or the model's config."
                    )
                if i in claimed:
                    raise ConfigError(
                        f"TokenTypes: an id belongs to one type, but {i} is claimed by "
                        f"{claimed[i]!r} and {t.name!r}. Remove one of them."
                    )
                claimed[i] = t.name
        if self.types[0].token_ids or self.types[0].merge:
            raise ConfigError(
                f"TokenTypes: the first type ({self.types[0].name!r}) is the default and needs no "
                f"ids or merge. Put a plain type first, for example TokenType('text')."
            )

    @staticmethod
    def auto() -> TokenTypes:
        """Text, and vision wherever the graph merges something else into the embeddings."""
        return TokenTypes((TokenType("text"), TokenType("vision", merge=True)))

    @staticmethod
    def single() -> TokenTypes:
        """One type for all tokens."""
        return TokenTypes((TokenType("token"),))

    @staticmethod
    def mask_token(token_id: int) -> TokenTypes:
        """Unmasked and masked tokens of a diffusion language model; ``token_id`` is the [MASK] id."""
        return TokenTypes((TokenType("unmasked"), TokenType("masked", (token_id,))))

    @staticmethod
    def image_tokens(
        token_id: int, *, video: int | None = None, audio: int | None = None
    ) -> TokenTypes:
        """Text and vision tokens; ``video`` and ``audio`` ids become types of their own."""
        types = [TokenType("text"), TokenType("vision", (token_id,), merge=True)]
        types += [
            TokenType(n, (i,)) for n, i in (("video", video), ("audio", audio)) if i is not None
        ]
        return TokenTypes(tuple(types))

    @staticmethod
    def explicit(*names: str) -> TokenTypes:
        """Types that only ``freeact_fx.token_types(...)`` hands in; the first is the default."""
        return TokenTypes(tuple(TokenType(n) for n in names))

    @staticmethod
    def from_config(hf_config: Any) -> TokenTypes:
        """Read the image, video, audio and mask token ids of a Hugging Face config.

        Looks for ``{image,video,audio,mask}_token_id`` (older: ``_token_index``) on the config and on its
        ``text_config``. A config with none of them gives ``single()``.
        """

        def read(kind: str) -> int | None:
            for config in (hf_config, getattr(hf_config, "text_config", None)):
                for suffix in ("_token_id", "_token_index"):
                    value = getattr(config, kind + suffix, None)
                    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                        return value
            return None

        image, video, audio, mask = (read(kind) for kind in ("image", "video", "audio", "mask"))
        if image is None and video is None and audio is None:
            return TokenTypes.single() if mask is None else TokenTypes.mask_token(mask)
        types = [TokenType("text")]
        types += [TokenType("vision", (image,), merge=True)] if image is not None else []
        types += [
            TokenType(n, (i,)) for n, i in (("video", video), ("audio", audio)) if i is not None
        ]
        types += [TokenType("masked", (mask,))] if mask is not None else []
        return TokenTypes(tuple(types))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.types)

    def index_of_id(self, token_id: int) -> int | None:
        """Number of the type that claims an input id, or None."""
        return next((i for i, t in enumerate(self.types) if token_id in t.token_ids), None)

    @property
    def merge_index(self) -> int | None:
        """Number of the first type that a bool-mask merge makes, or None."""
        return next((i for i, t in enumerate(self.types) if t.merge), None)

    def from_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Types of input ids, of any shape, as int32 of the same shape."""
        types = torch.zeros_like(input_ids, dtype=torch.int32)
        for index, token_type in enumerate(self.types):
            for token_id in token_type.token_ids:
                types = torch.where(input_ids == token_id, index, types)
        return types.to(torch.int32)

    def to_dict(self) -> dict[str, Any]:
        return {"types": [asdict(t) for t in self.types]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TokenTypes:
        """The inverse of ``to_dict``; raises ConfigError on anything else."""
        known = {"name", "token_ids", "merge"}
        if set(data) != {"types"}:
            raise ConfigError(
                f"TokenTypes.from_dict: expected {{'types': [...]}}, got keys {sorted(data)}."
            )
        types = []
        for entry in data["types"]:
            for key in set(entry) - known:
                raise ConfigError(
                    f"TokenTypes.from_dict: unknown key {key!r}.{nearest_name(key, known)}"
                )
            types.append(
                TokenType(
                    entry["name"], tuple(entry.get("token_ids", ())), entry.get("merge", False)
                )
            )
        return TokenTypes(tuple(types))

    @property
    def digest(self) -> str:
        """Content digest, part of every cache key."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


_explicit: contextvars.ContextVar[torch.Tensor | None] = contextvars.ContextVar(
    "freeact_token_types", default=None
)


@contextlib.contextmanager
def token_types(types: torch.Tensor) -> Iterator[None]:
    """Hand in the token types of the calls inside this context; they win over every other source.

    types  [B, T] (or [T] for inputs without a batch) integers in [0, P): the numbers of ``TokenTypes``
           (``TokenTypes.from_ids`` makes them out of input ids). A negative entry means "as the
           graph says".

    Raises ConfigError for a dtype that is not an integer or a shape that is not [B, T] or [T]. Whether the
    numbers are in range is checked at the first call, which knows P.
    """
    if not isinstance(types, torch.Tensor) or types.dtype not in _INTEGER_DTYPES:
        got = str(types.dtype) if isinstance(types, torch.Tensor) else type(types).__name__
        raise ConfigError(
            f"token_types(types): types must be an integer tensor of type numbers, got {got}. "
            f"For input ids use token_types(config.token_types.from_ids(input_ids)); for a bool "
            f"mask, mask.int()."
        )
    if types.dim() not in (1, 2):
        raise ConfigError(
            f"token_types(types): types must have shape [B, T] or [T], got {list(types.shape)}."
        )
    token = _explicit.set(types.to(torch.int32))
    try:
        yield
    finally:
        _explicit.reset(token)


def explicit_types() -> torch.Tensor | None:
    """The types of the enclosing ``token_types`` context, or None."""
    return _explicit.get()


def check_type_range(types: torch.Tensor, names: tuple[str, ...]) -> None:
    """Raise ConfigError if a type number has no name. Waits for the device, so: once per tensor."""
    if types.numel() and int(types.max()) >= len(names):
        raise ConfigError(
            f"token_types(types): type numbers must be below {len(names)} "
            f"({', '.join(f'{i} {n}' for i, n in enumerate(names))}), got {int(types.max())}. "
            f"Declare the type in QuantConfig.token_types, or correct the tensor."
        )
