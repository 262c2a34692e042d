"""Inputs for a model of transformers: for one call, made from its config or given text and picture; and calibration
batches from files.

A picture goes through the model's processor. Where only a config is at hand, pixels are random, in the shape that the
config asks for, and the model itself says how many tokens a picture has.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .hub import is_multimodal
from .mask_collator import MaskCollator
from .token_types import TokenTypes

_QUESTION = "What is in this picture?"
_MASKED_PART = 0.3


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an id or a folder, or None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return None  # transformers has as many ways to say that there is none


def load_processor(source: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of pictures and text of an id or a folder, or None."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return None
    return found if hasattr(found, "image_processor") else None


def make_inputs(
    model: nn.Module,
    source: str,
    types: TokenTypes,
    *,
    text: str | None = None,
    num_tokens: int | None = None,
    batch: int = 1,
    image: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for one call of a model.

    source      id or folder, for its tokenizer or processor
    types       the tokens of a type "masked" are put in at random
    text        None: random ids
    num_tokens  of each sequence; None: as many as the text has, or 32 random ones
    image       for a model that takes pictures; None: random pixels

    Raises ConfigError where the model's files do not hold what is needed.
    """
    config = model.config
    if is_multimodal(config):
        processor = load_processor(source, trust_remote_code=trust_remote_code)
        if processor is not None:
            examples = [(image or _noise_picture(), text or _QUESTION)] * batch
            inputs = processed(processor, examples)
        elif image is not None or text is not None:
            raise ConfigError(
                f"{source}: it has no processor, which a picture or a text needs. Name a folder with "
                f"preprocessor_config.json, or leave them out: pixels and ids are then random."
            )
        else:
            inputs = _random_picture_inputs(model, config, num_tokens or 32, batch)
    else:
        if image is not None:
            raise ConfigError(f"{source}: its config describes no model that takes pictures.")
        ids = _ids(source, config, types, text, num_tokens, batch, trust_remote_code)
        inputs = {"input_ids": ids}
    parameter = next(iter((*model.parameters(), *model.buffers())))
    dtype = getattr(model, "dtype", torch.float32)
    placed = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(parameter.device, dtype if value.is_floating_point() else None)
        placed[name] = value
    return placed


def load_batches(file: Path) -> Any:
    """What ``torch.save`` wrote: tensors in mappings and lists, nothing else. Raises ConfigError."""
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to
        # Behind its first sentence torch advises to trust the file.
        reason = str(error).strip().split("\n")[0].partition(". ")[0]
        raise ConfigError(
            f"{file}: must hold tensors that torch.save wrote, in mappings and lists ({reason})."
        ) from error


# ------------------------------------------------------------------ one call


def _ids(
    source: str,
    config: Any,
    types: TokenTypes,
    text: str | None,
    num_tokens: int | None,
    batch: int,
    trust_remote_code: bool,
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    claimed = [i for t in types.types for i in t.token_ids]
    if text is None:
        size = config.get_text_config().vocab_size
        allowed = torch.tensor([i for i in range(min(size, 4096)) if i not in claimed])
        shape = (batch, num_tokens or 32)
        ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
    else:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise ConfigError(
                f"{source}: it has no tokenizer, which a text needs. Leave the text out: ids are then random."
            )
        row = tokenizer(text, return_tensors="pt").input_ids[0, :num_tokens]
        ids = row.expand(batch, -1).clone()
    masked = next((t.token_ids[0] for t in types.types if t.name == "masked" and t.token_ids), None)
    if masked is not None and not bool((ids == masked).any()):
        drawn = torch.rand(ids.shape, generator=generator) < _MASKED_PART
        drawn[:, 0] = False
        ids[drawn] = masked
    return ids


def _noise_picture() -> Any:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    size = 224
    pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (size, size), bytes(pixels.flatten().tolist()))


def processed(processor: Any, examples: Sequence[tuple[Any, str]]) -> dict[str, Any]:
    """Pictures (files or PIL images), each with its text, as a batch for the model."""
    from PIL import Image

    pictures, texts = [], []
    for picture, text in examples:
        if isinstance(picture, (str, Path)):
            try:
                picture = Image.open(picture).convert("RGB")
            except OSError as error:
                raise ConfigError(
                    f"{picture}: not a picture that can be read ({error})."
                ) from error
        pictures.append([picture])
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        else:
            sign = getattr(processor, "image_token", None) or "<image>"
            texts.append(f"{sign}\n{text}")
    made = processor(images=pictures, text=texts, return_tensors="pt", padding=len(texts) > 1)
    return dict(made)


def _random_picture_inputs(
    model: nn.Module, config: Any, num_tokens: int, batch: int
) -> dict[str, Any]:
    """Ids with one picture in each row, and its pixels, from the config alone."""
    image_id = next(
        (
            found
            for name in ("image_token_id", "image_token_index")
            if isinstance(found := getattr(config, name, None), int)
        ),
        None,
    )
    inner: Any = getattr(model, "model", model)
    features_of = getattr(model, "get_image_features", getattr(inner, "get_image_features", None))
    accepted = inspect.signature(model.forward).parameters
    if image_id is None or features_of is None or "pixel_values" not in accepted:
        raise ConfigError(
            f"{type(model).__name__}: its config does not tell how to make inputs with a picture. Name a folder with a "
            f"processor, or give inputs that torch.save wrote (--inputs)."
        )
    pixels = _pixels(config.vision_config, batch, accepted)
    dtype = getattr(model, "dtype", torch.float32)
    with torch.no_grad():
        features = features_of(
            **{n: p.to(dtype) if p.is_floating_point() else p for n, p in pixels.items()}
        )
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (tuple, list)) else [features]
    per_picture = sum(part.numel() // part.shape[-1] for part in parts) // batch
    size, generator = config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    special = {
        v for n, v in config.to_dict().items() if n.endswith("token_id") and isinstance(v, int)
    }
    allowed = torch.tensor([i for i in range(min(size, 4096)) if i not in {*special, image_id}])
    words = allowed[torch.randint(len(allowed), (batch, max(num_tokens, 2)), generator=generator)]
    picture = torch.full((batch, per_picture), image_id)
    ids = torch.cat([words[:, :1], picture, words[:, 1:]], 1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in accepted:
            inputs[name] = (ids == image_id).long()
    return inputs


def _pixels(vision: Any, batch: int, accepted: Any) -> dict[str, Tensor]:
    """Random pixels: flat patches with their grid where the model wants one, else square pictures."""

    def read(*names: str, default: int) -> int:
        found = next((v for n in names if (v := getattr(vision, n, None)) is not None), default)
        return int(found[0] if isinstance(found, (tuple, list)) else found)

    generator = torch.Generator().manual_seed(0)
    channels = read("num_channels", "in_channels", "in_chans", default=3)
    if "image_grid_thw" in accepted:
        patch, side = read("patch_size", default=14), 2 * read("spatial_merge_size", default=2)
        width = channels * read("temporal_patch_size", default=2) * patch**2
        pixels = torch.randn(batch * side * side, width, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * batch)}
    size = read("image_size", default=224)
    pixels = torch.randn(batch, channels, size, size, generator=generator)
    # A row of pictures for each sequence.
    return {"pixel_values": pixels[:, None] if "pixel_attention_mask" in accepted else pixels}


# ------------------------------------------------------------------ calibration batches


def read_examples(file: Path) -> list[dict[str, str]]:
    """Lines of a .jsonl file, each with "text" and perhaps "image" (relative to the file); or a text file as one text.

    Raises ConfigError, naming the line.
    """
    try:
        content = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text ({error}).") from error
    if file.suffix not in (".jsonl", ".json"):
        return [{"text": content}]
    examples = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: not JSON ({error}).") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ConfigError(
                f'{file}, line {number}: must be an object with a "text", and perhaps an "image", got {line[:60]!r}.'
            )
        if "image" in entry:
            entry["image"] = str(file.parent / entry["image"])
        examples.append({k: entry[k] for k in ("text", "image") if k in entry})
    return examples


def text_batches(
    tokenizer: Any,
    examples: Sequence[dict[str, str]],
    types: TokenTypes,
    *,
    num_tokens: int,
    batch: int,
    num_windows: int | None,
) -> list[dict[str, Any]]:
    """Texts end to end, cut into windows of ``num_tokens``; masked at various ratios if there is a type "masked".

    Raises ConfigError if the texts do not fill one window.
    """
    ids: list[int] = []
    for example in examples:
        ids += tokenizer(example["text"]).input_ids
        if num_windows is not None and len(ids) >= num_windows * num_tokens:
            break
    count = min(len(ids) // num_tokens, num_windows or len(ids))
    if not count:
        raise ConfigError(
            f"the text has {len(ids)} tokens, one window takes {num_tokens}. Give more text, or fewer --tokens."
        )
    windows = torch.tensor(ids[: count * num_tokens]).view(count, num_tokens)
    masked = next((t.token_ids[0] for t in types.types if t.name == "masked" and t.token_ids), None)
    if masked is None:
        return [{"input_ids": rows} for rows in windows.split(batch)]
    special = [i for i in tokenizer.all_special_ids if i != masked]
    collate = MaskCollator(masked, never_mask=special)
    return [collate(rows) for rows in windows.split(batch)]


def picture_batches(
    processor: Any, examples: Sequence[dict[str, str]], *, num_windows: int | None
) -> Iterator[dict[str, Any]]:
    """One batch for each example with a picture. Raises ConfigError if one has none."""
    for number, example in enumerate(examples[:num_windows], 1):
        if "image" not in example:
            raise ConfigError(f'example {number} has no "image": this model takes pictures.')
        yield processed(processor, [(example["image"], example["text"])])
