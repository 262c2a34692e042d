"""``freeact calibrate`` and ``freeact convert``."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from freeact_fx.config import QUICK
from freeact_fx.errors import ConfigError

from .console import working
from .models import Quantisation, Source

if TYPE_CHECKING:
    from torch import nn

    from freeact_fx import Checkpoint, TokenTypes

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
# What a folder holds beside weights and config.json.
_COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "*processor_config.json", "chat_template*", "*.py"),
)


@dataclass(frozen=True)
class Calibrated:
    """What ``freeact calibrate`` tells of a checkpoint."""

    checkpoint: Checkpoint
    num_batches: int

    @property
    def type_names(self) -> tuple[str, ...]:
        """Of the columns with errors: the types that were seen."""
        types = self.checkpoint.config.type_names
        return tuple(f"error, {name}" for name in types if self._tokens(name))

    def _tokens(self, name: str) -> int:
        counts = (s.get("tokens", {}).get(name, 0) for s in self.checkpoint.statistics.values())
        return max(counts, default=0)

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each plan: how often it was chosen, and the mean measured error of each type."""
        rows = []
        types = [name for name in self.checkpoint.config.type_names if self._tokens(name)]
        plans = {name: group.plan for name, group in self.checkpoint.groups.items()}
        for plan, number in Counter(plans.values()).most_common():
            members = {n: e for n, e in self.checkpoint.linears.items() if plans[e.group] == plan}
            errors = []
            for name in types:
                found = [
                    error
                    for linear, entry in members.items()
                    if (error := self._error(entry.group, linear, name)) is not None
                ]
                errors.append(f"{sum(found) / len(found):.4f}" if found else "-")
            rows.append((plan, str(number), str(len(members)), *errors))
        return rows

    def _error(self, group: str, linear: str, token_type: str) -> float | None:
        measured = self.checkpoint.statistics.get(group, {}).get("error", {})
        value = measured.get(linear, {}).get(token_type)
        return None if value is None else float(value)

    def notes(self) -> list[str]:
        types = self.checkpoint.config.type_names
        tokens = ", ".join(f"{self._tokens(name):,} {name}" for name in types)
        lines = [
            f"{self.num_batches} batches; tokens seen by type: {tokens}",
            f"{self.checkpoint.num_bytes:,} bytes in {len(self.checkpoint.groups)} groups",
        ]
        rare = Counter(
            name for s in self.checkpoint.statistics.values() for name in s.get("rare_types", ())
        )
        lines += [
            f"warning: {number} groups saw hardly any token of type {name!r}; give more text"
            for name, number in rare.items()
        ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "digest": self.checkpoint.digest,
            "num_batches": self.num_batches,
            "num_bytes": self.checkpoint.num_bytes,
            "config": self.checkpoint.config.to_dict(),
            "plans": {name: group.plan for name, group in self.checkpoint.groups.items()},
            "statistics": self.checkpoint.statistics,
        }


def calibrated(
    source: Source,
    quantisation: Quantisation,
    out: Path,
    *,
    text_file: Path | None,
    batches_file: Path | None,
    num_tokens: int,
    batch: int,
    num_windows: int | None,
    quick: bool,
    max_bytes: str | None,
    resume: Path | None,
    progress: bool,
) -> Calibrated:
    import freeact_fx
    from freeact_fx import QuantConfig

    if source.is_converted:
        raise ConfigError(
            f"{source.model}: a converted model cannot be calibrated: name the dense one."
        )
    bound = None if max_bytes is None else parse_bytes(max_bytes)
    with working(f"loading {source.model}"):
        model = source.open()
        types = quantisation.types(model)
        batches = _batches(
            source, model, types, text_file, batches_file, num_tokens, batch, num_windows
        )
    options = (dict(QUICK) if quick else {}) | quantisation.options(model)
    config = QuantConfig.from_options(options)
    checkpoint = freeact_fx.calibrate(
        model, batches, config, progress=progress, max_bytes=bound, resume=resume
    )
    checkpoint.save(out)
    return Calibrated(checkpoint, len(batches))


def _batches(
    source: Source,
    model: nn.Module,
    types: TokenTypes,
    text_file: Path | None,
    batches_file: Path | None,
    num_tokens: int,
    batch: int,
    num_windows: int | None,
) -> list[Any]:
    from freeact_fx import model_inputs
    from freeact_fx.hub import is_multimodal

    if (text_file is None) == (batches_file is None):
        raise ConfigError("data is missing: give --text-file or --batches, one of them.")
    if batches_file is not None:
        found = model_inputs.load_batches(batches_file)
        return list(found)[:num_windows] if isinstance(found, (list, tuple)) else [found]
    assert text_file is not None
    examples = model_inputs.read_examples(text_file)
    trust = source.trust_remote_code
    if is_multimodal(model.config) and any("image" in example for example in examples):
        processor = model_inputs.load_processor(source.model, trust_remote_code=trust)
        if processor is None:
            raise ConfigError(
                f"{source.model}: it has no processor for pictures. Make inputs yourself and give them as --batches."
            )
        return list(model_inputs.picture_batches(processor, examples, num_windows=num_windows))
    tokenizer = model_inputs.load_tokenizer(source.model, trust_remote_code=trust)
    if tokenizer is None:
        raise ConfigError(
            f"{source.model}: it has no tokenizer. Make inputs yourself and give them as --batches."
        )
    return model_inputs.text_batches(
        tokenizer, examples, types, num_tokens=num_tokens, batch=batch, num_windows=num_windows
    )


def parse_bytes(words: str) -> int:
    """``8GB``, ``500M`` or plain bytes. Raises ConfigError."""
    found = re.fullmatch(r"([\d.]+)\s*([kmgt]?)i?b?", words.strip().lower())
    try:
        return int(float(found[1]) * _UNITS[found[2]]) if found else int(words)
    except ValueError as error:
        raise ConfigError(f"--max-bytes: must be a size such as 8GB, got {words!r}.") from error


@dataclass(frozen=True)
class Converted:
    """What ``freeact convert`` tells: bytes of the files before and after, and what stayed as it was."""

    num_converted: int
    dense_bytes: int
    packed_bytes: int
    folder_bytes: int
    left: Mapping[str, str]

    def lines(self) -> list[str]:
        saved = f"{self.packed_bytes / self.dense_bytes:.3f} of what they took"
        lines = [
            f"{self.num_converted} Linears packed: {self.packed_bytes:,} bytes, {saved}; the folder has "
            f"{self.folder_bytes:,} bytes"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(
                f"left alone: {len(names)} ({names[0]}{', ...' if names[1:] else ''}): {reason}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_converted": self.num_converted,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "folder_bytes": self.folder_bytes,
            "left": dict(self.left),
        }


def converted(source: Source, quantisation: Quantisation, out: Path) -> Converted:
    from freeact_fx.converted import checkpoint_of, save_converted

    if source.is_converted:
        raise ConfigError(f"{source.model}: it is converted already.")
    if out.resolve() == Path(source.model).resolve():
        raise ConfigError(f"--out {out}: that is the model's own folder. Name another.")
    with working(f"loading {source.model}") as show:
        model = source.open()
        sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
        show("packing")
        left = quantisation.convert(model)
        show(f"writing {out}")
        save_converted(model, out)
        _copy_companions(source.model, out)
    packed = checkpoint_of(model)
    return Converted(
        len(packed.linears),
        sum(sizes[f"{name}.weight"] for name in packed.linears),
        packed.num_bytes,
        sum(file.stat().st_size for file in out.iterdir()),
        left,
    )


def _copy_companions(model: str, out: Path) -> None:
    """Tokenizer, processor and code files of the dense model, as they are."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=list(_COMPANIONS)))
    for pattern in _COMPANIONS:
        for file in folder.glob(pattern):
            shutil.copyfile(file, out / file.name)
