"""Configurations and calibrated checkpoints of the two small models, kept in the cache folder.

A checkpoint is found again by everything that determines it: configuration, calibration data,
adapter and the package's own source. So an edit to any of them calibrates anew, and nothing else
does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from evaluation import dllm_calibration_batches, vlm_calibration_batches
from safetensors.torch import save
from small_models import (
    CACHE,
    DATA,
    MASK_TOKEN,
    MaskedDiffusionModel,
    Tokenizer,
    VisionLanguageModel,
)

import freeact_fx
import freeact_fx.codegen
import freeact_fx.passes
from freeact_fx import Checkpoint, QuantConfig, TokenTypes

DLLM_CONFIG = QuantConfig(token_types=TokenTypes.mask_token(MASK_TOKEN))
VLM_CONFIG = QuantConfig()  # vision and text: the pass finds the merge in the graph


def package_sources() -> list[Path]:
    """Every source file of the package, wherever it is installed."""
    packages = (freeact_fx, freeact_fx.passes, freeact_fx.codegen)
    return [file for p in packages for file in sorted(Path(p.__file__).parent.glob("*.py"))]


def dllm_checkpoint(
    model: MaskedDiffusionModel,
    cache: Path = CACHE,
    num_windows: int = 32,
    config: QuantConfig = DLLM_CONFIG,
) -> Checkpoint:
    """Calibrated on windows of WikiText-2 and GSM8K with uniformly drawn mask ratios."""
    batches = dllm_calibration_batches(num_windows)
    return _cached_checkpoint(model, batches, config, "dllm", cache)


def vlm_checkpoint(
    model: VisionLanguageModel, tokenizer: Tokenizer, cache: Path = CACHE, num_questions: int = 240
) -> Checkpoint:
    """Calibrated on pictures with questions and answers."""
    batches = vlm_calibration_batches(num_questions, tokenizer)
    return _cached_checkpoint(model, batches, VLM_CONFIG, "vlm", cache)


def _cached_checkpoint(
    model: torch.nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    config: QuantConfig,
    name: str,
    cache: Path,
) -> Checkpoint:
    digest = hashlib.sha256(config.digest.encode())
    for batch in batches:
        digest.update(save(batch))
    digest.update((DATA / f"{name}-adapter.safetensors").read_bytes())
    for source in package_sources():
        digest.update(source.read_bytes())
    folder = cache / f"{name}-w4a4-{digest.hexdigest()[:16]}"
    if not folder.exists():
        unfinished = folder.with_name(folder.name + "-unfinished")
        freeact_fx.calibrate(model, batches, config, progress=True).save(unfinished)
        unfinished.rename(folder)
    return Checkpoint.load(folder)
