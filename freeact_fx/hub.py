"""Models of transformers by id or folder: with their weights, or as the config alone describes them.

A model without weights is for looking at (``explain``): its graphs are the real ones. One whose forward computes with
values (a picture's features are counted and compared with the ids) cannot run on the meta device; its weights are
zeros in memory that is never touched.
"""

from __future__ import annotations

import copy
import logging
import math
import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

_AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModel",
)
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")


def read_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """A model's transformers config. Raises ConfigError if there is none, or transformers is not installed."""
    with _said_as_config_error(model):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    # Where files that the config names are to be found.
    config.name_or_path = model
    return config


def load_model(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model with its weights, in eval mode.

    model  id on the Hugging Face hub or a folder
    dtype  None: the one that the weights are stored in

    Raises ConfigError if transformers cannot load it, and for weights that are missing in the files.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    with _said_as_config_error(model):
        loaded, found = _class_of(config, trust_remote_code).from_pretrained(
            model,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ConfigError(
            f"{model}: {len(missing)} weights of {type(loaded).__name__} are not in its files, {missing[0]!r} for "
            f"one. Name the folder of a complete model."
        )
    placed: nn.Module = loaded.eval().requires_grad_(False).to(device)
    return placed


def build_model(
    config: Any, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model that a config describes, in eval mode; ``torch.device`` contexts say where its weights are."""
    with _said_as_config_error(str(config.name_or_path)):
        model_class = _class_of(config, trust_remote_code)
        make = getattr(model_class, "_from_config", None) or model_class.from_config
        built: nn.Module = make(config, **({} if dtype is None else {"dtype": dtype}))
    return built.eval().requires_grad_(False)


def build_without_weights(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    num_layers: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model from its config alone, at no cost in memory.

    A text model is on the meta device. One with pictures or sound is on the CPU, all weights zero, and is cut to
    ``num_layers`` layers (None: two) in each part, since its forward runs with values.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    if num_layers is None and is_multimodal(config):
        num_layers = 2
    if num_layers is not None:
        config = _cut(config, num_layers)
    with torch.device("meta"):
        bare = build_model(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if not is_multimodal(config):
        return bare
    weights = {name: _zeros(p.shape, p.dtype) for name, p in bare.named_parameters()}
    with _said_as_config_error(model):
        # Not build_model: this one computes what is no weight (positions, frequencies).
        filled = type(bare).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=weights, dtype=next(bare.parameters()).dtype
        )
    result: nn.Module = filled.eval().requires_grad_(False)
    return result


def is_multimodal(config: Any) -> bool:
    """Whether a config describes an encoder of pictures, video or sound."""
    return any(getattr(config, f"{kind}_config", None) for kind in ("vision", "audio", "video"))


def _class_of(config: Any, trust_remote_code: bool) -> Any:
    import transformers

    names = config.architectures or []
    found = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if found is not None:
        return found
    remote = getattr(config, "auto_map", None) or {}
    if not trust_remote_code and any(name in remote for name in _AUTO_CLASSES):
        raise ConfigError(
            f"{config.name_or_path}: {', '.join(names) or 'its class'} is code that comes with the model, and it would "
            f"be run. Allow that with trust_remote_code (--trust-remote-code) if you trust its author."
        )
    for name in _AUTO_CLASSES:
        if name in remote:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(remote[name], str(config.name_or_path))
    return transformers.AutoModel


def _cut(config: Any, num_layers: int) -> Any:
    """A copy of a config with fewer layers, in all its parts."""
    config = copy.deepcopy(config)
    for part in [config, *(p for p in vars(config).values() if hasattr(p, "model_type"))]:
        counts = {n: c for n in _LAYER_COUNTS if isinstance(c := getattr(part, n, None), int)}
        for name, count in counts.items():
            setattr(part, name, min(count, num_layers))
        for name, value in list(vars(part).items()):
            if not isinstance(value, list):
                continue
            if len(value) in counts.values() and name.endswith(("types", "pattern")):
                setattr(part, name, value[:num_layers])
            elif name.endswith("indexes"):
                setattr(part, name, [i for i in value if i < num_layers])
    return config


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)


@contextmanager
def _said_as_config_error(model: str) -> Iterator[None]:
    """transformers' errors in one line, without its warnings and progress bars."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{model}: transformers is needed to load it. Install it: pip install 'freeact_fx[hf]'."
        ) from error
    level = transformers.logging.get_verbosity()
    shows_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        missing = "" if Path(model).exists() else " There is no such folder either."
        raise ConfigError(f"{model}: transformers cannot load it: {reason}{missing}") from error
    finally:
        transformers.logging.set_verbosity(level)
        if shows_bars:
            transformers.logging.enable_progress_bar()
