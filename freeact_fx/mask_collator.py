"""Batches for calibrating a masked-diffusion language model: every sequence masked at a ratio of its own.

Such a model meets all ratios while it denoises, from nearly everything masked to nearly nothing, and its activations
differ from one to the other. So each sequence draws its ratio uniformly.

What is drawn depends on the seed and on the ids of the batch alone: a batch is masked alike in every epoch, by every
worker of a ``DataLoader`` and after a restart, as several passes over it and ``calibrate(resume=...)`` need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checkpoint import update_digest
from .errors import ConfigError


class MaskCollator:
    """Puts token ids into a batch and masks them; a ``collate_fn`` for a ``DataLoader``, or called by itself::

        collate = MaskCollator(126336, never_mask=(126080, 126081), pad_token_id=126081)
        batches = DataLoader(sequences, batch_size=8, collate_fn=collate)
        checkpoint = freeact_fx.calibrate(model, batches, config)

    mask_token_id  the [MASK] id; that of ``TokenTypes.mask_token``
    ratio          from where to where the masked part of a sequence is drawn, uniformly. It counts among the positions
                   that may be masked, of which one always is
    seed           another one masks the same batch differently
    keep_first     never mask the first position of a sequence that is not padding
    never_mask     ids that stay as they are: special tokens
    pad_token_id   fills up sequences of different lengths, and is never masked; None: they must be of one length
    """

    def __init__(
        self,
        mask_token_id: int,
        *,
        ratio: tuple[float, float] = (0.05, 1.0),
        seed: int = 0,
        keep_first: bool = True,
        never_mask: Sequence[int] = (),
        pad_token_id: int | None = None,
    ) -> None:
        low, high = ratio
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                f"MaskCollator.ratio: must be (low, high) with 0 <= low <= high <= 1, got {ratio!r}. (0.05, 1.0) is "
                f"the default."
            )
        self.mask_token_id, self.ratio, self.seed = mask_token_id, (low, high), seed
        self.keep_first, self.pad_token_id = keep_first, pad_token_id
        self.never_mask = (*never_mask, *(() if pad_token_id is None else (pad_token_id,)))

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Mask a batch.

        examples  token ids [B, T]; a mapping with ``input_ids`` [B, T], as a tokenizer gives it; or a sequence of
                  examples: ids [T] as tensors or lists, or mappings with ``input_ids`` [T]

        Returns a mapping for the model: ``input_ids``, an ``attention_mask`` [B, T] if there is padding, and whatever
        else a mapping of a whole batch holds. Nothing that is given is changed. Raises ConfigError for ids of another
        form, and for sequences of different lengths without a ``pad_token_id``.
        """
        if isinstance(examples, Mapping):
            batch = dict(examples)
        elif isinstance(examples, Tensor):
            batch = {"input_ids": examples}
        else:
            batch = self._padded(examples)
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            got = (
                f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            )
            raise ConfigError(
                f"MaskCollator: input_ids must be a tensor of integers [B, T], got {got}. Give one sequence as "
                f"ids[None]."
            )
        there = self._there(ids, batch.get("attention_mask")).cpu()
        allowed = there.clone()
        for token_id in self.never_mask:
            allowed &= ids.cpu() != token_id
        if self.keep_first:
            allowed &= there.cumsum(1) > 1
        masked = self._draw(allowed, self._generator(ids)).to(ids.device)
        return batch | {"input_ids": ids.masked_fill(masked, self.mask_token_id)}

    def _there(self, ids: Tensor, attention_mask: Any) -> Tensor:
        """Which positions are no padding, [B, T] bool."""
        if isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape:
            return attention_mask != 0
        if self.pad_token_id is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != self.pad_token_id

    def _draw(self, allowed: Tensor, generator: torch.Generator) -> Tensor:
        """A random part of the allowed positions [B, T] of each row, [B, T] bool."""
        low, high = self.ratio
        drawn = low + (high - low) * torch.rand(allowed.shape[0], 1, generator=generator)
        number = (drawn * allowed.sum(1, keepdim=True)).round().clamp_min(1)
        keys = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, 2)
        return (keys.argsort(1).argsort(1) < number) & allowed

    def _generator(self, ids: Tensor) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}{list(ids.shape)}".encode())
        update_digest(digest, ids)
        return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))

    def _padded(self, examples: Any) -> dict[str, Any]:
        given = [dict(e) if isinstance(e, Mapping) else {"input_ids": e} for e in examples]
        rows = [torch.as_tensor(e["input_ids"]) for e in given]
        if not rows or any(row.dim() != 1 for row in rows):
            raise ConfigError(
                f"MaskCollator: examples must be ids [B, T] or a list of ids [T], got a list of shapes "
                f"{[list(row.shape) for row in rows]}. Flatten them."
            )
        lengths = {row.shape[0] for row in rows}
        if len(lengths) > 1 and self.pad_token_id is None:
            raise ConfigError(
                f"MaskCollator: sequences must have one length, got {sorted(lengths)}. Cut them, or give pad_token_id."
            )
        ids = torch.full((len(rows), max(lengths)), self.pad_token_id or 0)
        attended = torch.zeros_like(ids)
        for index, (row, example) in enumerate(zip(rows, given, strict=True)):
            ids[index, : len(row)] = row
            attended[index, : len(row)] = torch.as_tensor(example.get("attention_mask", 1))
        return {"input_ids": ids} | ({} if bool(attended.all()) else {"attention_mask": attended})
