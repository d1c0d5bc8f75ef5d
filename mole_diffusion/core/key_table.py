"""The keys of a LoRA file by matrix, before any tensor is looked at: complete or refused, never half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .embeddings import EmbeddingKey, embedding_keys
from .errors import ExpertLoadError
from .keys import NO_MATRIX, ParsedKey, parse_key, parse_keys
from .lycoris import absent_roles, surplus_roles
from .roles import NOT_LORA

_HALF = "the other factor is missing"
# A tensor of an unknown kind ends in this many dotted words at most after the name of its matrix.
_WORDS = 4


@dataclass
class KeyTable:
    """What each key of a file is for.

    Attributes:
        modules: name of a matrix in the file -> role -> key; all of them complete.
        meanings: the same name -> what it means.
        embeddings: key -> the word and the text encoder it is for.
        ignored: key -> reason.
        missing: keys that should be there and are not.
        strangers: names of matrices that no network known here has.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    meanings: dict[str, ParsedKey] = field(default_factory=dict)
    embeddings: dict[str, EmbeddingKey] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    _owners: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[str], shapes: Mapping[str, Sequence[int]] | None = None) -> KeyTable:
        """Sort the keys of a file.

        Args:
            keys: of the file.
            shapes: of its tensors; they tell kinds of networks apart whose matrices have the same names.
        Raises:
            ExpertLoadError: two keys, or two complete entries, are for the same thing.
        """
        keys = list(keys)
        table = cls()
        table.embeddings, table.ignored = embedding_keys(keys)
        bundled = {*table.embeddings, *table.ignored}
        unknown: dict[str, ParsedKey] = {}
        for key, parsed in parse_keys((key for key in keys if key not in bundled), shapes).items():
            if parsed.role is None or parsed.reason is not None:
                table.ignored[key] = parsed.reason or NOT_LORA
                unknown[key] = parsed
                if parsed.reason == NO_MATRIX:
                    table.strangers.append(parsed.flat)
            else:
                table._enter(key, parsed.role, parsed)
        for key, parsed in unknown.items() if table.modules else ():
            table._refuse_owners(key, parsed)
        for module, roles in list(table.modules.items()):
            absent = absent_roles(roles)
            if absent and module in table.modules:
                table.missing += [f"{module} ({role})" for role in absent]
                table.refuse(module, _HALF)
            elif surplus := surplus_roles(roles):
                table.refuse(
                    module, f"tensors of two kinds for one matrix: {', '.join(surplus)} beside others"
                )
        for matrix, modules in table._owners.items():
            if len(modules) > 1:
                raise ExpertLoadError(
                    f"{modules[1]!r} is the second entry for matrix {matrix[1]!r} of the {matrix[0]}, "
                    f"after {modules[0]!r}."
                )
        return table

    def refuse(self, module: str, reason: str) -> None:
        """Take a matrix out, with all other entries for it; all their keys are ignored for this reason."""
        if module not in self.modules:
            return
        self.ignored.update(dict.fromkeys(self.modules.pop(module).values(), reason))
        for matrix in _matrices(self.meanings.pop(module)):
            others = self._owners[matrix]
            others.remove(module)
            for other in list(others):
                self.refuse(other, f"{reason} ({module!r}, which is the same matrix)")

    def _enter(self, key: str, role: str, parsed: ParsedKey) -> None:
        if parsed.module not in self.modules:
            self.modules[parsed.module] = {}
            self.meanings[parsed.module] = parsed
            for matrix in _matrices(parsed):
                self._owners.setdefault(matrix, []).append(parsed.module)
        elif role == "down":
            # The ends of these keys say who wrote them, which an alpha's does not.
            self.meanings[parsed.module] = parsed
        other = self.modules[parsed.module].setdefault(role, key)
        if other != key:
            raise ExpertLoadError(f"{key!r} and {other!r} are both the {role} of one matrix.")

    def _refuse_owners(self, key: str, parsed: ParsedKey) -> None:
        """Refuse what a key that cannot be used belongs to, however its name is written there."""
        if parsed.role is not None or parsed.module != key:
            names = [parsed.module]
        else:
            words = key.split(".")
            names = [".".join(words[:count]) for count in range(len(words) - 1, 0, -1)[:_WORDS]]
        reason = self.ignored[key]
        if parsed.module == key:
            reason = f"{reason} ({key!r}, which belongs to the same matrix)"
        for name in names:
            meaning = parse_key(f"{name}.alpha")
            owners = [owner for matrix in _matrices(meaning) for owner in self._owners.get(matrix, ())]
            for owner in [name, *owners]:
                self.refuse(owner, reason)


def _matrices(meaning: ParsedKey) -> list[tuple[str, str]]:
    """(network, canonical name) of the matrices that a name means."""
    return [(str(meaning.network), place.matrix) for place in meaning.places]
