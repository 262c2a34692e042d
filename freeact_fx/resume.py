"""The folder of a calibration that can be continued: every group that was fitted, and what it was fitted from.

::

    run.json                    digests of configuration, model and batches; when finished, the groups in model order
    groups/{name}-{digest}/     a checkpoint of this group alone, put there in one step when it was fitted
    batches/000000.pt           what an iterator of batches gave, until the run is finished

Statistics are not written: they are many times larger than the result and cost one pass over the batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import VERSION, Checkpoint, update_digest
from .config import QuantConfig
from .errors import ConfigError

_SAMPLES_PER_PARAMETER = 64


class RunFolder:
    """The folder ``resume`` of one call of ``calibrate``; made if it is not there.

    Raises ConfigError for a folder that holds something else, or the run of another model or configuration.
    """

    def __init__(self, folder: str | Path, config: QuantConfig, model: nn.Module) -> None:
        self.folder = Path(folder)
        self.batch_folder = self.folder / "batches"
        expected = {"version": VERSION, "config": config.digest, "model": model_digest(model)}
        file = self.folder / "run.json"
        if not file.is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(
                    f"calibrate(resume={str(folder)!r}): the folder holds files, but none is a run.json. Give an "
                    f"empty or new folder, or that of a killed run."
                )
            self.state: dict[str, Any] = expected | {"batches": None, "kept": False, "groups": None}
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
        self.state = json.loads(file.read_text())
        for key, what in (("version", "version"), ("config", "QuantConfig"), ("model", "model")):
            if self.state[key] != expected[key]:
                raise ConfigError(
                    f"calibrate(resume={str(folder)!r}): the run there was begun with another {what} "
                    f"(digest {self.state[key]}, now {expected[key]}). Continue with the same one, or give a new "
                    f"folder."
                )

    @property
    def batches(self) -> list[str] | None:
        """Digests of all batches, once they have been read."""
        digests: list[str] | None = self.state["batches"]
        return digests

    @property
    def num_kept(self) -> int:
        """How many batches are in the folder."""
        return len(self.batches or []) if self.state["kept"] else 0

    def batches_read(self, digests: list[str], *, kept: bool) -> None:
        """All batches have been read once; ``kept``: and written."""
        if self.batches is None:
            self.state |= {"batches": digests, "kept": kept}
            self._write()

    def has(self, linears: list[str]) -> bool:
        """Whether the group of these Linears has been fitted."""
        return self._part(linears).is_dir()

    def load(self, linears: list[str]) -> Checkpoint:
        return Checkpoint.load(self._part(linears))

    def save(self, linears: list[str], fitted: Checkpoint) -> None:
        """Write a fitted group; it is there entirely or not at all."""
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        fitted.save(unfinished)
        self._part(linears).parent.mkdir(exist_ok=True)
        unfinished.rename(self._part(linears))

    def finish(self, groups: list[list[str]]) -> None:
        """All groups have been fitted; kept batches are deleted."""
        self.state |= {"groups": groups, "kept": False}
        self._write()
        shutil.rmtree(self.batch_folder, ignore_errors=True)

    @property
    def groups(self) -> list[list[str]] | None:
        """The Linears of each group in model order, once the run is finished."""
        groups: list[list[str]] | None = self.state["groups"]
        return groups

    def _part(self, linears: list[str]) -> Path:
        digest = hashlib.sha256(json.dumps(linears).encode()).hexdigest()[:8]
        return (
            self.folder / "groups" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', linears[0])[-80:]}-{digest}"
        )

    def _write(self) -> None:
        file = self.folder / "run.json"
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.state, indent=1))
        os.replace(unfinished, file)


def model_digest(model: nn.Module) -> str:
    """Digest of a model's parameter names and shapes, and of 64 values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.dtype}{list(parameter.shape)}".encode())
        values = parameter.detach().reshape(-1)
        chosen = values[:: max(1, values.numel() // _SAMPLES_PER_PARAMETER)]
        update_digest(digest, chosen)
    return digest.hexdigest()[:16]
