"""What the user can choose: one frozen dataclass, its check, and the digest used in cache keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from .errors import ConfigError, nearest_name
from .token_types import TokenTypes

PLANS = ("single", "shift", "paper", "duplicate", "branch")
ActivationBits = Literal[4, 8, "e4m3"]
# What QuantConfig.quick changes. A branch is what a group that is not given to all plans most likely ends up with.
QUICK: Mapping[str, Any] = {"plan": "branch", "plans_measured": 1, "sample_tokens": 128}

# Columns of a branch, of all types together, that the GPU's kernels multiply. Wide groups of an 8B model have room for
# more under the default budget: 153 to 175.
MAX_RANK = 128


@dataclass(frozen=True)
class QuantConfig:
    """How to quantise a model. Unknown names and impossible values raise ConfigError."""

    weight_bits: int = 4
    """Bits of a weight code; 4 is the only width. Symmetric, one scale per output channel and slice."""
    activation_bits: ActivationBits = 4
    """4 (codes in [-7, 7]), 8 ([-127, 127]) or "e4m3" (8-bit floating point); dynamic scale per token."""
    token_types: TokenTypes = field(default_factory=TokenTypes.auto)
    """Which token types there are and what makes a token one of them. A plain dict is accepted too. Each type costs a
    moment of its own in calibration (4 K^2 bytes per group) and about a quarter of the fitting time, and where a group
    keeps types apart a row of its tables: 2 K bytes of shift, 4 N of bias in each Linear."""
    plan: str = "auto"
    """Per group: "single", "shift", "paper", "duplicate", "branch", or "auto" (the best of those that were
    calibrated; without a checkpoint "single"). "auto" takes twice the fitting time of "branch", three times that of
    "single" (q, k, v of a 135M model, three types). Storage: "shift" adds tables by type, "branch" its columns as well;
    "duplicate" has the codes once for each type, whatever ``memory_budget`` says."""
    memory_budget: float = 1.1
    """Storage that a group may use, as a multiple of its packed codes under plan "single": "duplicate" takes one for
    each type, and a branch has as many columns as there is room for. Tables by type (bias, shift) are not counted;
    "auto" may do without them in a group, and gives its branch what they would have taken."""
    branch_rank: int = 32
    """Columns of the 8-bit low-rank branch of a data-free plan "branch", shared by all types: K + N bytes each.
    Calibration takes no notice of it: there ``memory_budget`` sets the number of columns."""
    include: tuple[str, ...] = ()
    """Name patterns (fnmatch) of Linears to quantise even if skipped otherwise."""
    skip: tuple[str, ...] = ("lm_head",)
    """Name patterns of Linears to leave alone; one without a dot also matches the last part of a name. A Linear
    whose weight is an embedding's too is left alone unless it is included."""
    vision_tower: bool = False
    """True: quantise the Linears that compute what is merged into the embeddings, as type 0."""
    sink: str | None = "first"
    """ "first": the first position of each sequence is a token type of its own, for the massive activations
    that sit there; None: it is not. Costs what a type costs (``token_types``)."""
    quantize: bool = True
    """False: transforms stay, rounding goes. For equivalence tests; needs dense weights."""
    strict: bool = False
    """True: a Linear that cannot be quantised raises UnsupportedLinear instead of staying as it was."""
    seed: int = 0
    """Seed of the data-free orthogonal transforms and of the calibration samples."""
    sample_tokens: int = 256
    """Calibration: tokens kept per group and type to fit on, and as many again, held out, to compare plans on; the
    moments do without these. Memory: 2 x tokens x types x K x 4 bytes per group."""
    gptq: bool = True
    """Calibration: choose weight codes by GPTQ with the moments of all types mixed, instead of to nearest; costs about
    a fifth of the fitting time."""
    gptq_damping: float = 0.1
    """Calibration: added to the diagonal of the Hessian of GPTQ and refit, as a part of its mean: tokens of other texts
    take directions that those seen did not. Costs no time; the more of it, the less GPTQ gains on the tokens seen."""
    clip_search: bool = True
    """Calibration: choose the clip of each type and of each output channel by measured error; costs about a
    tenth of the calibration time."""
    plans_measured: int = 3
    """Calibration: how many of the plans that are predicted best are measured before one is chosen; each costs as
    much as fitting it. 8 measures all, so that ``predict.ranking_share`` can check the prediction."""
    branch_absorbs: bool = True
    """Calibration: under GPTQ, let the branch make up for a part of the rounding of the codes; costs nothing, and
    lowers the error on other texts by half a percent."""
    refit: bool = True
    """Calibration: under GPTQ, first fit the weight to rounded activations by least squares, from the moments. Costs a
    triangular solve for each group; lowers the error on other texts by 1 % (branch) to 4 % (single)."""
    bias_correction: bool = False
    """Calibration: take the mean error of each type's outputs, on the sample, out of its bias; no cost at run time, and
    a fifth of the fitting time. The transforms leave no such error that stands out of the sample's noise, so it is
    off."""
    refine_steps: int = 0
    """Calibration: steps of gradient descent on each group's transform and clips; 0: none. What they gave is kept where
    it lowers the error on the held-out tokens; with few ``sample_tokens`` it may not. Plans with several slices,
    "duplicate" and "paper", are never refined. 100 steps cost 4 s (q, k, v) to 12 s (gate, up) per group of a 135M
    model on one core."""

    def __post_init__(self) -> None:
        if isinstance(self.token_types, Mapping):
            object.__setattr__(self, "token_types", TokenTypes.from_dict(self.token_types))
        for name in ("include", "skip"):
            value = getattr(self, name)
            patterns = (value,) if isinstance(value, str) else value
            ok = isinstance(patterns, (tuple, list)) and all(isinstance(p, str) for p in patterns)
            self._check(name, ok, "must be name patterns", "for example ('lm_head', '*.down_proj')")
            object.__setattr__(self, name, tuple(patterns))
        self._check("weight_bits", self.weight_bits == 4, "must be 4", "weights are 4-bit codes")
        self._check(
            "activation_bits",
            self.activation_bits in (4, 8, "e4m3") and not isinstance(self.activation_bits, bool),
            "must be 4, 8 or 'e4m3'",
            "choose one of them",
        )
        self._check(
            "token_types",
            isinstance(self.token_types, TokenTypes),
            "must be a TokenTypes or its dict",
            "for example TokenTypes.mask_token(126336)",
        )
        plans = (*PLANS, "auto")
        self._check(
            "plan",
            self.plan in plans,
            f"must be one of {', '.join(plans)}",
            nearest_name(str(self.plan), plans).strip(" ."),
        )
        for name, least, most, default in (
            ("branch_rank", 1, MAX_RANK, 32),
            ("sample_tokens", 16, None, 256),
            ("plans_measured", 1, None, 3),
            ("refine_steps", 0, None, 0),
        ):
            value = getattr(self, name)
            ok = isinstance(value, int) and value >= least and (most is None or value <= most)
            rule = f"must be an integer of at least {least}" + (f", {most} at most" if most else "")
            self._check(name, ok, rule, f"{default} is the default")
        ok = isinstance(self.memory_budget, (int, float)) and self.memory_budget >= 1
        self._check("memory_budget", ok, "must be at least 1", "1.1 is the default")
        self._check("seed", isinstance(self.seed, int), "must be an integer", "0 is the default")
        self._check("sink", self.sink in (None, "first"), "must be 'first' or None", "use one")

    def _check(self, name: str, ok: bool, rule: str, way_out: str) -> None:
        if not ok:
            end = "" if way_out.endswith("?") else "."
            raise ConfigError(
                f"QuantConfig.{name}: {rule}, got {getattr(self, name)!r}. {way_out}{end}"
            )

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> QuantConfig:
        """Build a config from a plain mapping; an unknown key raises, naming the nearest one."""
        known = {f.name for f in fields(QuantConfig)}
        for key in options:
            if key not in known:
                raise ConfigError(f"QuantConfig: unknown field {key!r}.{nearest_name(key, known)}")
        return QuantConfig(**options)

    def quick(self) -> QuantConfig:
        """The same with a shorter calibration: plan "branch" in every group (the better of its two kinds by prediction)
        in place of the best of all plans, on half of the sampled tokens.

        What it takes and costs stands in docs/calibration.md. Lost is that no group is worse than under "single".
        """
        return replace(self, **QUICK)

    @property
    def type_names(self) -> tuple[str, ...]:
        """Names of all types, the sink's last; their order is the numbering used everywhere."""
        return self.token_types.names + ((self.sink,) if self.sink else ())

    @property
    def row_names(self) -> tuple[str, ...]:
        """Of the rows of tables by type: the types, and "untyped"."""
        return (*self.type_names, "untyped")

    @property
    def num_types(self) -> int:
        return len(self.type_names)

    @property
    def sink_index(self) -> int | None:
        return len(self.token_types.types) if self.sink else None

    @property
    def qmax(self) -> int:
        """Largest activation code; 0: no rounding (quantisers off)."""
        if not self.quantize:
            return 0
        return {4: 7, 8: 127, "e4m3": 448}[self.activation_bits]

    @property
    def types_json(self) -> str:
        """The declaration of the token types, as converted Linears carry it."""
        return json.dumps({"token_types": self.token_types.to_dict(), "sink": self.sink})

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {
            "token_types": self.token_types.to_dict(),
            "include": list(self.include),
            "skip": list(self.skip),
        }

    @property
    def digest(self) -> str:
        """Content digest, part of every cache key."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
