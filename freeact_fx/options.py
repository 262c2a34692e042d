"""What ``torch.compile(..., options={...})`` accepts: the fields of QuantConfig, and a few of the backend's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from . import compat
from .checkpoint import Checkpoint
from .config import QuantConfig
from .errors import ConfigError, nearest_name
from .linear_form import linear_form

COMPILERS = ("inductor", "eager")
STAGES = ("passes", "lowering", "engine")


@dataclass(frozen=True)
class Options:
    """Parsed options of one ``torch.compile`` call.

    config      the fields of ``QuantConfig`` that were given, over the checkpoint's, over the defaults
    checkpoint  a Checkpoint, or the path of one
    bypass      stages of ``STAGES`` to go around, to see whose fault an error is:

                "passes"    the graph goes to the compiler as it is; also said as ``enabled=False``
                "lowering"  what the passes made runs eagerly, without Inductor; also said as ``compiler="eager"``
                "engine"    the integer product is the reference's (fp64), not the engine's

    dry_run     True: report what would happen, change nothing
    code        True: keep each graph before and after the passes as text, for the report
    mode        as in ``torch.compile(mode=...)``, which torch does not allow beside ``options=``
    inductor    Inductor's own options
    """

    config: QuantConfig
    checkpoint: Checkpoint | None = None
    bypass: tuple[str, ...] = ()
    dry_run: bool = False
    code: bool = False
    inductor: dict[str, Any] = field(default_factory=dict)
    types_given: bool = False

    @property
    def enabled(self) -> bool:
        return "passes" not in self.bypass

    @property
    def compiler(self) -> str:
        return "eager" if "lowering" in self.bypass else "inductor"

    @staticmethod
    def parse(mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """Check the names and values; raises ConfigError with the nearest valid name."""
        given = dict(options or {})
        config_fields = {f.name for f in fields(QuantConfig)}
        own = {"checkpoint", "enabled", "dry_run", "code", "compiler", "mode", "inductor", "bypass"}
        for key in given:
            if key not in config_fields | own:
                raise ConfigError(
                    f"options: unknown key {key!r}.{nearest_name(key, config_fields | own)}"
                )
        if mode is not None and given.get("mode") not in (None, mode):
            raise ConfigError(
                f"options['mode'] is {given['mode']!r}, but mode={mode!r} was given too."
            )
        mode = mode or given.get("mode")
        if mode not in (None, *compat.known_modes()):
            raise ConfigError(
                f"mode: unknown {mode!r}.{nearest_name(str(mode), compat.known_modes())}"
            )
        if not isinstance(given.get("inductor", {}), Mapping):
            raise ConfigError(
                f"options['inductor']: must be a dict of Inductor options, got {given['inductor']!r}."
            )
        inductor = {**compat.mode_options(mode), **given.get("inductor", {})}
        if (unknown := compat.unknown_inductor_option(inductor)) is not None:
            hint = nearest_name(unknown, compat.known_inductor_options())
            raise ConfigError(f"options['inductor']: unknown key {unknown!r}.{hint[:200]}")
        bypass = _bypassed(given)
        checkpoint = given.get("checkpoint")
        if isinstance(checkpoint, (str, Path)):
            checkpoint = _load_once(str(Path(checkpoint).resolve()))
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
            raise ConfigError(
                f"options['checkpoint']: must be a Checkpoint or its path, got {type(checkpoint).__name__}."
            )
        chosen = {k: v for k, v in given.items() if k in config_fields}
        config = QuantConfig.from_options(chosen)
        if checkpoint is not None:
            config = replace(checkpoint.config, **{k: getattr(config, k) for k in chosen})
            _check_types(config, checkpoint)
        elif config.plan == "paper":
            raise ConfigError(
                "QuantConfig.plan: 'paper' needs a calibration to choose what to keep, and there is no "
                "checkpoint. Call calibrate first, or choose another plan."
            )
        return Options(
            config,
            checkpoint,
            bypass,
            bool(given.get("dry_run", False)),
            bool(given.get("code", False)),
            inductor,
            "token_types" in chosen or checkpoint is not None,
        )

    def config_for(self, gm: GraphModule) -> QuantConfig:
        """The config for a graph: converted Linears in it bring their own token types.

        Raises ConfigError if they contradict each other or the options, or with ``quantize=False``.
        """
        declared = {
            linear_form(str(node.args[-1])).types
            for node in gm.graph.nodes
            if node.target is torch.ops.freeact.linear.default
        }
        if not declared:
            return self.config
        if not self.config.quantize:
            raise ConfigError(
                "quantize=False needs dense weights, and this model was converted: they are gone. "
                "Compile the dense model with options={'checkpoint': ..., 'quantize': False}."
            )
        if len(declared) > 1:
            raise ConfigError(
                f"the converted Linears of this graph declare {len(declared)} different sets of token "
                f"types. Convert a model with one checkpoint."
            )
        own = json.loads(declared.pop())
        config = replace(self.config, **own)
        if self.types_given and config.type_names == self.config.type_names:
            return self.config
        if self.types_given:
            raise ConfigError(
                f"options['token_types']: the model was converted for the types "
                f"{list(config.type_names)}, the options give {list(self.config.type_names)}. Leave "
                f"them out, or use a checkpoint with these types."
            )
        return config


def _bypassed(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages to go around, in the order of ``STAGES``, whichever way they were said."""
    stages = given.get("bypass", ())
    stages = (stages,) if isinstance(stages, str) else stages
    if not isinstance(stages, (tuple, list)):
        raise ConfigError(
            f"options['bypass']: must be a tuple of stages ({', '.join(STAGES)}), got {stages!r}. "
            f"For example ('lowering',)."
        )
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(
                f"options['bypass']: unknown stage {stage!r}.{nearest_name(str(stage), STAGES)}"
            )
    compiler = given.get("compiler")
    if compiler not in (None, *COMPILERS):
        raise ConfigError(f"options['compiler']: must be 'inductor' or 'eager', got {compiler!r}.")
    aliases = {"passes": ("enabled", True), "lowering": ("compiler", "inductor")}
    for stage, (key, value) in aliases.items():
        if stage in stages and given.get(key) == value:
            raise ConfigError(
                f"options['bypass'] leaves out {stage!r}, and options[{key!r}]={value!r} asks for it. "
                f"Drop one of them."
            )
    chosen = {*stages}
    chosen |= set() if given.get("enabled", True) else {"passes"}
    chosen |= {"lowering"} if compiler == "eager" else set()
    return tuple(stage for stage in STAGES if stage in chosen)


def _check_types(config: QuantConfig, checkpoint: Checkpoint) -> None:
    if config.type_names != checkpoint.config.type_names:
        raise ConfigError(
            f"options: the checkpoint was calibrated for the token types "
            f"{list(checkpoint.config.type_names)}, the options give {list(config.type_names)}. Leave "
            f"token_types and sink out, or calibrate anew."
        )


_loaded: dict[tuple[str, int], Checkpoint] = {}


def _load_once(path: str) -> Checkpoint:
    """torch calls the backend once per graph; the file is read once per version of it."""
    file = Path(path) / "config.json"
    key = (path, file.stat().st_mtime_ns if file.exists() else 0)
    if key not in _loaded:
        _loaded[key] = Checkpoint.load(path)
    return _loaded[key]
