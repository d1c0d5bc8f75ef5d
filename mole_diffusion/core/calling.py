"""How prompts call experts, and which of those that are called count in the whole picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from .experts import Expert
from .phrases import STYLE, kind_of, names_phrase, without_article


@dataclass(frozen=True)
class Calling:
    """What calls experts in prompts.

    Attributes:
        phrases: expert name -> its phrase, for files that do not say one.
        styles: names of experts that change the whole picture, for files that do not say so.
    """

    phrases: Mapping[str, str] = field(default_factory=dict)
    styles: Sequence[str] = ()

    def of(self, expert: Expert) -> tuple[str, ...]:
        """The phrases that call an expert, without articles; its name where nobody says any."""
        given = self.phrases.get(expert.name)
        found = (given,) if given else expert.triggers or (expert.name,)
        return tuple(without_article(phrase.strip()) for phrase in found)

    def named_in(self, text: str, experts: Mapping[str, Expert]) -> list[str]:
        """The experts that a text names by one of their phrases, in their order."""
        return [
            name
            for name, expert in experts.items()
            if any(names_phrase(text, phrase) for phrase in self.of(expert))
        ]

    def is_style(self, expert: Expert) -> bool:
        """Whether an expert changes the whole picture."""
        kind = kind_of(self.of(expert)[0], expert.metadata.get("mole.kind", ""))
        return expert.name in self.styles or kind == STYLE

    def is_mute(self, expert: Expert) -> bool:
        """Whether nobody says how prompts call it."""
        return not expert.triggers and expert.name not in self.phrases

    def everywhere(self, named: Collection[str], experts: Mapping[str, Expert]) -> dict[str, float]:
        """Weights of the experts that count in the whole picture.

        Styles that are named, at 1; those that nobody can name, at equal shares of 1; and the only one that
        counts at all, as if no other were loaded.

        Args:
            named: those whose phrases stand in the prompt.
            experts: those that may count.
        """
        mute = [name for name, expert in experts.items() if self.is_mute(expert) and name not in named]
        if len(named) == 1 and not mute:
            return dict.fromkeys(named, 1.0)
        styles = [name for name in named if self.is_style(experts[name])]
        return {**dict.fromkeys(mute, 1.0 / max(len(mute), 1)), **dict.fromkeys(styles, 1.0)}
