"""Where the alpha of a matrix comes from if no tensor of the file is it.

In order of precedence: `adapter_config.json` beside the file, the header's `lora_adapter_metadata`
(diffusers), single header entries (`lora_alpha`, `network_alpha`, `alpha`; with a part's name before a dot,
or for all parts), kohya's `ss_network_alpha`. An `.alpha` tensor of the matrix counts before all of them; if
there is none of these, alpha is r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ExpertLoadError
from .peft_options import PeftOptions
from .reading import BadFileError, parse_json
from .scaling import ABSENT, Scaling, Target, number, truth

ADAPTER_CONFIG = "adapter_config.json"
TENSORS = "tensors"
NOWHERE = "nowhere (alpha is r)"
ADAPTER_METADATA = "lora_adapter_metadata"
_SINGLE = ("lora_alpha", "network_alpha", "alpha")
#: Header entries that may have a part's name before a dot.
SINGLE_ENTRIES = (*_SINGLE, "r", "use_rslora")
_KOHYA = "ss_network_alpha"


class Alphas:
    """What a file says of alphas beside its tensors.

    Args:
        metadata: the header's texts.
        options: part ("" for all) -> PEFT's settings that lie beside its file.
    Raises:
        ExpertLoadError: the settings make the LoRA something that cannot be gated.
    """

    def __init__(self, metadata: Mapping[str, str], options: Mapping[str, PeftOptions]) -> None:
        self._metadata = metadata
        self._configs = options
        self._broken: str | None = None
        self._header = self._adapter_metadata()
        every = (*self._configs.values(), *self._header.values())
        self.notes = [note for one in every for note in one.notes()]

    def expects(self, part: str) -> list[tuple[str, str]]:
        """(where and what, role) of tensors that each matrix of a part has by PEFT's settings."""
        found = _of_part(self._configs, part) or _of_part(self._header, part)
        return [] if found is None else [(f"{found.label}: {name}", role) for name, role in found.expects()]

    def find(self, target: Target) -> Scaling | None:
        """The scaling of a matrix; None where nothing is said of it.

        Raises:
            ExpertLoadError: what counts for it cannot be read.
        """
        options = _of_part(self._configs, target.part)
        found = None if options is None else options.scaling(target)
        if found is None and self._broken is not None:
            raise ExpertLoadError(self._broken)
        options = _of_part(self._header, target.part)
        if found is None and options is not None:
            found = options.scaling(target)
        return found or self._by_entries(target) or self._by_kohya(target)

    def passed_over(self, sources: Iterable[str]) -> list[str]:
        """Sentences on what the header says of alphas for parts that the file does not have.

        Args:
            sources: those that counted.
        """
        named = [
            f"{key}={value!r:.40}"
            for key, value in self._metadata.items()
            if (key == _KOHYA or key.rpartition(".")[2] in _SINGLE) and value.strip() not in ABSENT
        ]
        if not named or any("header" in source for source in sources):
            return []
        return [f"the header's {', '.join(sorted(named))} is not used: it belongs to none of these matrices"]

    def _adapter_metadata(self) -> dict[str, PeftOptions]:
        """Part -> PEFT's settings that diffusers wrote into the header."""
        label = f"header's {ADAPTER_METADATA}"
        try:
            values = parse_json(self._metadata.get(ADAPTER_METADATA) or "{}")
            if not isinstance(values, dict):
                raise BadFileError("it is no JSON object")
        except BadFileError as error:
            self._broken = f"The {label} cannot be read: {error}."
            return {}
        parts: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            part, _, option = name.rpartition(".")
            parts.setdefault(part, {})[option] = value
        return {part: PeftOptions(label, options) for part, options in parts.items()}

    def _by_entries(self, target: Target) -> Scaling | None:
        """As diffusers' forks write it: one entry for all matrices of a part."""
        for prefix in (f"{target.part}.", ""):
            for name in _SINGLE:
                alpha = number("header", f"{prefix}{name}", self._metadata.get(f"{prefix}{name}"))
                if alpha is not None:
                    key = f"{prefix}use_rslora"
                    root = truth("header", key, self._metadata.get(key))
                    r = number("header", f"{prefix}r", self._metadata.get(f"{prefix}r"))
                    return Scaling(alpha, f"header's {prefix}{name}", r, root)
        return None

    def _by_kohya(self, target: Target) -> Scaling | None:
        """kohya's and LyCORIS' arguments: one alpha for matrices, perhaps another for convolutions."""
        alpha = number("header", _KOHYA, self._metadata.get(_KOHYA))
        if alpha is None:
            return None
        try:
            arguments = parse_json(self._metadata.get("ss_network_args") or "{}")
        except BadFileError:
            arguments = {}
        arguments = arguments if isinstance(arguments, dict) else {}
        r = number("header", "ss_network_dim", self._metadata.get("ss_network_dim"))
        source = f"header's {_KOHYA}"
        if target.convolution:
            own = number("header's ss_network_args", "conv_alpha", arguments.get("conv_alpha"))
            alpha, source = (alpha, source) if own is None else (own, "header's ss_network_args")
            r = number("header's ss_network_args", "conv_dim", arguments.get("conv_dim")) or r
        root = truth("header's ss_network_args", "rs_lora", arguments.get("rs_lora"))
        return Scaling(alpha, source, r, root)


def _of_part(options: Mapping[str, PeftOptions], part: str) -> PeftOptions | None:
    return options.get(part) or options.get("")
