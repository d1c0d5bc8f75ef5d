"""PEFT's settings of an adapter: which scaling they give to a matrix, and what of them cannot be had here.

They stand in `adapter_config.json` (PEFT's `save_pretrained`) and in the header's `lora_adapter_metadata`
(diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import ExpertLoadError
from .scaling import Scaling, Target, number, short, truth

TYPES = ("LORA", "LOHA", "LOKR")
# What PEFT takes for alpha and r where they are not named.
_DEFAULT = 8.0
_PATTERN_LENGTH = 1000
_PATTERN_REPEATS = 3
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")
_USED = {"r", "lora_alpha", "alpha", "use_rslora", "alpha_pattern", "rank_pattern", "peft_type"}
# Where they come true is seen in the tensors; or they speak of training, of finding matrices, of memory.
_HARMLESS = {
    *(
        "use_dora",
        "lora_bias",
        "fan_in_fan_out",
        "decompose_both",
        "decompose_factor",
        "use_effective_conv2d",
    ),
    *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("runtime_config", "init_weights", "init_lora_weights"),
}
_MOVED = (
    "such a start moves a part of the base's weights into the LoRA, so the file fits a base that was changed "
    "in the same way; let PEFT convert it: save_pretrained(path_initial_model_for_weight_conversion=...)"
)
_INITS_ON_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
# Option -> why the LoRA is another thing than two factors of a matrix.
_REFUSED = {
    "bias": "the file holds whole biases of the base, and no differences",
    "use_qalora": "QALoRA averages its input before the down factor",
    "alora_invocation_tokens": "aLoRA acts after certain tokens only",
    "layer_replication": "the base's layers are repeated first",
    "target_parameters": "the LoRA belongs to parameters that are no matrices of layers",
    "use_bdlora": "factors of blocks are not read",
    "arrow_config": "Arrow chooses among other LoRAs",
    "kasa_config": "KaSA removes a part of the base's weights",
    "monteclora_config": "factors are drawn at random in every call",
    "megatron_config": "factors are those of Megatron's parallel layers",
}
_TOLD = {
    "modules_to_save": "whole modules of the base are no differences; what the file has of them is not used",
    "trainable_token_indices": "rows of embedding tables are not used",
}


@dataclass(frozen=True)
class PeftOptions:
    """Settings of one part of a file.

    Attributes:
        label: where they stand, for people.
        values: option of `peft.LoraConfig`, `LoHaConfig` or `LoKrConfig` -> value.
        complete: whether PEFT's defaults count for what is not named.
    """

    label: str
    values: Mapping[str, Any]
    complete: bool = False

    def scaling(self, target: Target) -> Scaling | None:
        """What they say of one matrix; None if nothing.

        Raises:
            ExpertLoadError: an entry is no finite number, or a pattern is not allowed.
        """
        alpha = self._patterned("alpha_pattern", target)
        for name in ("lora_alpha", "alpha"):
            alpha = number(self.label, name, self.values.get(name)) if alpha is None else alpha
        if alpha is None and not self.complete:
            return None
        r = self._patterned("rank_pattern", target)
        r = number(self.label, "r", self.values.get("r")) if r is None else r
        r = _DEFAULT if r is None and self.complete else r
        if r is not None and r <= 0:
            raise ExpertLoadError(f"{self.label}: r={r:g} is not allowed; it is a number above 0.")
        root = truth(self.label, "use_rslora", self.values.get("use_rslora"))
        return Scaling(_DEFAULT if alpha is None else alpha, self.label, r, root, fixed=target.rank is None)

    def notes(self) -> Iterator[str]:
        """Sentences on what the settings name and nothing here uses.

        Raises:
            ExpertLoadError: they make the LoRA something that cannot be gated.
        """
        kind = str(self.values.get("peft_type") or TYPES[0]).rpartition(".")[2].upper()
        if kind not in TYPES:
            raise ExpertLoadError(
                f"{self.label}: peft_type={kind!r:.40} is not read; allowed: {', '.join(TYPES)}."
            )
        start = str(self.values.get("init_lora_weights", True)).lower()
        if start.startswith(_INITS_ON_BASE):
            raise ExpertLoadError(f"{self.label}: init_lora_weights={start!r:.40} is not read: {_MOVED}.")
        if start not in _INITS:
            yield f"{self.label}: init_lora_weights={start!r:.40} is not known here"
        for name, value in self.values.items():
            if value in (None, False, "", "none") or value == [] or value == {}:
                continue
            if name in _REFUSED:
                raise ExpertLoadError(f"{self.label}: {name}={short(value)} is not read: {_REFUSED[name]}.")
            if name in _TOLD:
                yield f"{self.label}: {name}={short(value)}: {_TOLD[name]}"
            elif name not in _USED | _HARMLESS:
                yield f"{self.label}: {name}={short(value)} is not known here and not used"

    def expects(self) -> Iterator[tuple[str, str]]:
        """(option, role) of tensors that each matrix has by these settings."""
        for option, role in (("use_dora", "magnitude"), ("lora_bias", "up_bias")):
            if truth(self.label, option, self.values.get(option)):
                yield option, role

    def _patterned(self, option: str, target: Target) -> float | None:
        """The value of the first pattern that is a name, or the end of one after a dot, as in PEFT."""
        patterns = self.values.get(option)
        if patterns in (None, "", "None"):
            return None
        if not isinstance(patterns, Mapping):
            raise ExpertLoadError(f"{self.label}: {option}={short(patterns)} is no table of names.")
        for pattern, value in patterns.items():
            regex = _compiled(pattern)
            if regex is None:
                raise ExpertLoadError(
                    f"{self.label}: {option} has {short(pattern)}, which is no pattern of names."
                )
            if pattern in target.names or any(regex.match(name) for name in target.names):
                return number(self.label, f"{option} of {short(pattern)}", value)
        return None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """PEFT's matching of a pattern; None for what is no regular expression, or could take forever."""
    endless = len(_REPEAT.findall(pattern)) > _PATTERN_REPEATS or re.search(r"\)[*+?{]", pattern)
    if len(pattern) > _PATTERN_LENGTH or endless:
        return None
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return None
