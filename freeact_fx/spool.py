"""Batches that can be read more than once, whatever they come from.

A list, a ``DataLoader`` or anything else that gives a new iterator each time is read again. An iterator can be read
once: from the moment that ``keep`` is called on, what it gives is written to disk and read from there. Batches are
told apart by a digest of their content.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import update_digest
from .errors import ConfigError

_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)


class Batches:
    """The batches of a calibration, numbered. Close it when done: it may hold files.

    batches   what the user gave; None: the kept ones in ``folder``
    folder    where to keep what an iterator gives; None: a temporary folder
    expected  digests that they must have, in order; None: any
    kept      how many batches are in ``folder`` already
    """

    def __init__(
        self,
        batches: Iterable[Any] | None,
        *,
        folder: Path | None = None,
        expected: Sequence[str] | None = None,
        kept: int = 0,
    ) -> None:
        if isinstance(batches, Mapping) or not isinstance(batches, (Iterable, type(None))):
            raise ConfigError(
                f"calibrate: batches must be an iterable of model inputs, got {type(batches).__name__}. "
                f"A single batch goes into a list: [batch]."
            )
        self.once = batches is None or isinstance(batches, Iterator)
        self.total: int | None = len(batches) if isinstance(batches, Sized) else None
        self.digests: list[str] = []
        self._batches = batches
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._expected = expected
        self._kept = range(kept)
        self._keeping = self._compares = False
        self._num_readings = 1 if batches is None else 0

    def keep(self) -> None:
        """From the batch at hand on, keep what an iterator gives."""
        self._keeping = self.once

    def compare(self) -> None:
        """Take the digest of each batch, and refuse one that is not the expected one, or not that of the last time."""
        self._compares = True

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Each batch with its number. At the second reading of an iterator, what came before the first kept batch is
        missing: no group that had to wait for that reading was in it."""
        self._num_readings += 1
        if self.once and self._num_readings > 1:
            for index in self._kept:
                yield index, torch.load(self._file(index), weights_only=True)
            return
        assert self._batches is not None
        index = -1
        for index, batch in enumerate(self._batches):
            if self._compares:
                self._check(index, digest_of(batch))
            yield index, batch
            if self._keeping and index not in self._kept:
                self._write(index, batch)
        self._check_number(index + 1)
        self.total = index + 1

    def close(self) -> None:
        """Delete what was written to a temporary folder."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _check(self, index: int, digest: str) -> None:
        if index == len(self.digests):
            self.digests.append(digest)
        expected = self.digests if self._expected is None else self._expected
        if index >= len(expected) or digest != expected[index]:
            raise ConfigError(
                f"calibrate(resume=...): batch {index} is not the one that the run began with. Give the same "
                f"batches in the same order (seed what draws them), or batches=None for those of an iterator, "
                f"which were kept; or begin anew in another folder."
            )

    def _check_number(self, number: int) -> None:
        if number == 0 and self._num_readings == 1:
            problem = (
                "an iterator that gave nothing (it may have been read before)"
                if self.once
                else "empty"
            )
            raise ConfigError(
                f"calibrate: no Linear was reached: batches is {problem}. Give at least one batch; "
                f"freeact_fx.explain(model, ...) shows every Linear."
            )
        expected = self._expected and len(self._expected)
        before = expected or (self.total if self._num_readings > 1 else None) or number
        if number != before:
            raise ConfigError(
                f"calibrate: batches must give the same batches each time they are read, got {number} and "
                f"before {before}. Give a list of them, or an iterator, which is kept on disk."
            )

    def _write(self, index: int, batch: Any) -> None:
        if not self._kept:
            self._kept = range(index, index)
        torch.save(_plain(batch, f"batch {index}"), self._file(index))
        self._kept = range(self._kept.start, index + 1)

    def _file(self, index: int) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="freeact-batches-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{index:06}.pt"


def run(model: Any, batch: Any) -> None:
    """Call a model with a batch: a mapping is keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def digest_of(batch: Any) -> str:
    """Content digest of nested tensors, wherever they lie."""
    digest = hashlib.sha256()
    _update(digest, batch)
    return digest.hexdigest()[:16]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        update_digest(digest, value)
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(f"{key!r}:".encode())
            _update(digest, value[key])
    elif isinstance(value, (tuple, list)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _update(digest, item)
    else:
        digest.update((repr(value) if isinstance(value, _PLAIN) else type(value).__name__).encode())


def _plain(value: Any, where: str) -> Any:
    """A copy of nested tensors in dicts, tuples and lists, as ``torch.load`` reads it without running pickled code."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, _PLAIN):
        return value
    raise ConfigError(
        f"calibrate: {where}: an iterator that is needed more than once is kept on disk, which takes tensors, "
        f"numbers and text in mappings, tuples and lists, got {type(value).__name__}. Give a list of batches, or "
        f"more memory (max_bytes)."
    )
