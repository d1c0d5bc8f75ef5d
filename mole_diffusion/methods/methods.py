"""The ways of putting several concepts into one picture that can be compared, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mole_diffusion.core.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """One way of combining experts.

    Attributes:
        name: how arguments call it.
        label: how tables and pictures call it.
        needs_preparation: whether `prepare` has to run first; the others are words that the pipeline knows.
        description: one line for people.
    """

    name: str
    label: str
    needs_preparation: bool
    description: str


_ALL = (
    Method(
        "gates", "gates", True, "Mixture of LoRA Experts: gates trained for the prompts (Wu et al. 2024)."
    ),
    Method(
        "auto",
        "auto",
        False,
        "Gates without training: words go to their experts by the prompt, places by cross-attention to them.",
    ),
    Method("none", "base", False, "The base model without any expert."),
    Method("la", "LA", False, "Linear arithmetic: the sum of the experts, weight 1 each."),
    Method("nla", "NLA", False, "Normalised linear arithmetic: the mean of the experts, weight 1/N each."),
    Method("svdiff", "SVDiff", True, "Shifts of singular values, trained per concept (Han et al. 2023)."),
    Method(
        "textual_inversion",
        "Textual Inversion",
        True,
        "The embedding of a new word, trained per concept (Gal et al. 2022).",
    ),
    Method(
        "custom_diffusion",
        "Custom Diffusion",
        True,
        "Keys and values of cross-attention and a new word, trained per concept (Kumari et al. 2023).",
    ),
    Method(
        "searched",
        "LoRAHub",
        True,
        "A weight per expert by gradient-free search on the objective of gate training (Huang et al. 2023).",
    ),
    Method("svd", "SVD merge", True, "PEFT's merge 'svd': the sum of the deltas, cut to the largest rank."),
    Method("ties", "TIES", True, "PEFT's merge 'ties': trim, elect signs, merge (Yadav et al. 2023)."),
    Method("dare_linear", "DARE", True, "PEFT's merge 'dare_linear': drop and rescale (Yu et al. 2024)."),
    Method("ssr", "SSR-Merge", True, "One LoRA that routes signals back to their expert (arXiv 2606.10617)."),
    Method("arrow", "Arrow", False, "Each matrix, token by token, by the experts' first directions."),
    Method("energy", "energy", False, "Each matrix, token by token, by the size of the experts' answers."),
    Method(
        "klora", "K-LoRA", False, "Each matrix to one expert by its largest entries (Ouyang et al. 2025)."
    ),
    Method("freefuse", "FreeFuse", False, "Hard masks from cross-attention (the form of arXiv 2510.23515)."),
    Method(
        "loratorio",
        "LoRAtorio",
        False,
        "Patches of the experts' predictions by their distance from the base's (Foteinopoulou et al. 2025).",
    ),
    Method("switch", "LoRA-Switch", False, "One expert per denoising step, in turn (Zhong et al. 2024)."),
    Method(
        "composite", "LoRA-Composite", False, "Mean of the experts' guided predictions (Zhong et al. 2024)."
    ),
)

#: Method name -> what it is, in the order of tables.
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}, expected one of {list(METHODS)}")
    return METHODS[name]
