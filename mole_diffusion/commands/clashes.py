"""Versions of libraries that are known not to go together, each met in a run of the tests, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clash:
    """Versions that do not work together, or one that does not work at all.

    Attributes:
        together: requirements that are all true where it happens, such as "peft<0.22".
        effect: what does not work.
        way_out: what to do.
        breaks: whether mole_diffusion itself is hit, and not only what others do beside it.
    """

    together: tuple[str, ...]
    effect: str
    way_out: str
    breaks: bool = False

    def __str__(self) -> str:
        return f"{' with '.join(self.together)}: {self.effect}; {self.way_out}"


CLASHES = (
    Clash(
        ("transformers>=5.24", "peft<0.19"),
        "load_lora_weights fails on text encoders, and with it the method plain of mole evaluate",
        'pip install "peft>=0.19"',
        breaks=True,
    ),
    Clash(
        ("transformers>=5.24", "peft<0.22"),
        "add_adapter and set_adapter of text encoders raise ImportError (mole_diffusion uses neither)",
        'where you need them: pip install "peft>=0.22", or as long as there is none "transformers<5.24"',
    ),
    Clash(
        ("nevergrad<1.0.13", "numpy>=2.4"),
        "longer searches for weights (LoRAHub) end in a TypeError: it makes numbers of arrays of one entry",
        'pip install "numpy<2.4"',
        breaks=True,
    ),
)
