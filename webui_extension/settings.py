"""`Settings`: one validated object behind the panel, PNG info, the API and the X/Y/Z plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# Keys in the PNG info.
EXPERTS, GATES, ACTIVE, REGIONS = "MoLE experts", "MoLE gates", "MoLE active", "MoLE regions"
INFOTEXT_KEYS = (EXPERTS, GATES, ACTIVE, REGIONS)
# What mixes experts without a gates file: the prompt, or nothing, so that each counts as much as the others.
# Older pictures have another word for the last.
AUTO, EQUAL = WITHOUT_GATES = ("auto", "equal shares")
_EARLIER = {"uniform": EQUAL}
NO_FILE = (*WITHOUT_GATES, *_EARLIER)
EVERYWHERE = "everywhere"
# Names of rectangles (left, top, width, height as shares of the picture) that the panel offers.
NAMED_REGIONS = {
    EVERYWHERE: None,
    "left half": (0.0, 0.0, 0.5, 1.0),
    "right half": (0.5, 0.0, 0.5, 1.0),
    "top half": (0.0, 0.0, 1.0, 0.5),
    "bottom half": (0.0, 0.5, 1.0, 0.5),
    "left third": (0.0, 0.0, 0.3333, 1.0),
    "middle third": (0.3333, 0.0, 0.3334, 1.0),
    "right third": (0.6667, 0.0, 0.3333, 1.0),
}
# Arguments of the panel before the rows, and in each row.
HEAD = ("enabled", "gates", "record")
ROW = ("active", "expert", "scale", "region")
_BETWEEN = " | "

Region = tuple[float, float, float, float]


class SettingsError(ValueError):
    """A setting is not allowed."""


@dataclass(frozen=True)
class ExpertSetting:
    """One expert of a mixture.

    Attributes:
        name: file in the Lora folder, without its suffix; folders are separated by "/".
        scale: the user's factor for it.
        active: whether it takes part; the others are renormalised in proportion.
        region: (left, top, width, height) as shares of the picture; None for everywhere.
    """

    name: str
    scale: float = 1.0
    active: bool = True
    region: Region | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or _BETWEEN.strip() in self.name:
            raise SettingsError(f"expert {self.name!r} is not allowed; give a file name without '|'")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise SettingsError(f"scale {self.scale!r} of expert {self.name!r} is not a number")
        if not math.isfinite(self.scale):
            raise SettingsError(f"scale {self.scale!r} of expert {self.name!r} is not a finite number")
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "active", _as_bool(self.active, f"active of expert {self.name!r}"))
        object.__setattr__(self, "region", parse_region(self.region, self.name))


@dataclass(frozen=True)
class Settings:
    """What to do in one generation.

    Attributes:
        enabled: False leaves the picture as it is without the extension.
        experts: in the order of the panel's rows; names differ.
        gates: a gates file by its name without suffix; "auto" for words and places by the prompt, "equal
            shares" for equal weights.
        record: keep the gate weights for the heat map.

    Raises:
        SettingsError: a value is not allowed, or it is enabled and no expert is active.
    """

    enabled: bool = False
    experts: tuple[ExpertSetting, ...] = ()
    gates: str = AUTO
    record: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "enabled", _as_bool(self.enabled, "enabled"))
        object.__setattr__(self, "record", _as_bool(self.record, "record"))
        object.__setattr__(self, "experts", tuple(self.experts))
        gates = self.gates or AUTO
        if not isinstance(gates, str):
            raise SettingsError(f"gates {gates!r} is not the name of a gates file")
        object.__setattr__(self, "gates", _EARLIER.get(gates, gates))
        names = [expert.name for expert in self.experts]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise SettingsError(f"experts must differ; chosen more than once: {', '.join(doubled)}")
        if self.enabled and not any(expert.active for expert in self.experts):
            raise SettingsError("choose at least one expert, and tick at least one of them")

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the experts that take part."""
        return tuple(expert.name for expert in self.experts if expert.active)

    @classmethod
    def from_args(cls, args: Sequence[Any]) -> Settings:
        """From the values of the panel's components, or from the API's one dictionary.

        Raises:
            SettingsError: a value is not allowed.
        """
        if args and isinstance(args[0], Mapping):
            return cls.from_dict(args[0])
        if not args or not _as_bool(args[0], "enabled"):
            return cls()
        head, rest = dict(zip(HEAD, args, strict=False)), list(args[len(HEAD) :])
        rows = (dict(zip(ROW, rest[i : i + len(ROW)], strict=False)) for i in range(0, len(rest), len(ROW)))
        experts = [
            ExpertSetting(
                row["expert"], row.get("scale", 1.0), row.get("active", True), row.get("region") or None
            )
            for row in rows
            if row.get("expert") not in (None, "", "None")
        ]
        return cls(True, tuple(experts), head.get("gates") or AUTO, head.get("record", True))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The reverse of `to_dict`; `experts` may also be a mapping of names to scales, or names.

        Raises:
            SettingsError: a name is unknown, or a value is not allowed.
        """
        _known(values, [field.name for field in fields(cls)], "settings")
        experts = values.get("experts", ())
        if isinstance(experts, Mapping):
            experts = [{"name": name, "scale": scale} for name, scale in experts.items()]
        if isinstance(experts, str) or not isinstance(experts, Sequence):
            raise SettingsError(f"experts {experts!r} is not a list")
        chosen = []
        for entry in experts:
            entry = {"name": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping) or "name" not in entry:
                raise SettingsError(f"expert {entry!r} is not an object with a name")
            _known(entry, [field.name for field in fields(ExpertSetting)], "an expert")
            chosen.append(ExpertSetting(**entry))
        return cls(**{"enabled": True, **values, "experts": tuple(chosen)})

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, as the API takes them."""
        return asdict(self)

    def to_args(self, rows: int) -> list[Any]:
        """Values for the panel's components; experts beyond its rows are left out."""
        args: list[Any] = [self.enabled, self.gates, self.record]
        for i in range(rows):
            expert = self.experts[i] if i < len(self.experts) else None
            if expert is None:
                args += [True, "", 1.0, EVERYWHERE]
            else:
                args += [expert.active, expert.name, expert.scale, format_region(expert.region)]
        return args

    def to_infotext(self) -> dict[str, str]:
        """Entries for the PNG info; none when it is off."""
        if not self.enabled:
            return {}
        entries = {
            EXPERTS: _BETWEEN.join(f"{expert.name}: {expert.scale:g}" for expert in self.experts),
            GATES: self.gates,
        }
        if len(self.active) < len(self.experts):
            entries[ACTIVE] = _BETWEEN.join(self.active)
        regions = [f"{e.name}: {format_region(e.region)}" for e in self.experts if e.region is not None]
        if regions:
            entries[REGIONS] = _BETWEEN.join(regions)
        return entries

    @classmethod
    def from_infotext(cls, params: Mapping[str, Any]) -> Settings:
        """The reverse of `to_infotext`; off where the PNG info says nothing of experts.

        Raises:
            SettingsError: an entry was changed into something that is not allowed.
        """
        if not params.get(EXPERTS):
            return cls()
        scales = _pairs(params[EXPERTS], EXPERTS)
        regions = _pairs(params[REGIONS], REGIONS) if params.get(REGIONS) else {}
        active = params[ACTIVE].split(_BETWEEN) if params.get(ACTIVE) else list(scales)
        unknown = [name for name in (*regions, *active) if name not in scales]
        if unknown:
            raise SettingsError(f"{', '.join(unknown)}: not among the experts {', '.join(scales)}")
        experts = [
            ExpertSetting(
                name, as_number(scale, EXPERTS), name in active, parse_region(regions.get(name), name)
            )
            for name, scale in scales.items()
        ]
        return cls(True, tuple(experts), params.get(GATES) or AUTO)

    def with_active(self, names: Sequence[str]) -> Settings:
        """The same with these experts active and no others (all for none)."""
        known = [expert.name for expert in self.experts]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise SettingsError(f"{', '.join(unknown)}: not among the experts {', '.join(known) or 'none'}")
        experts = tuple(replace(e, active=not names or e.name in names) for e in self.experts)
        return replace(self, experts=experts)

    def with_scale(self, scale: float, name: str | None = None) -> Settings:
        """The same with another scale of one expert, or of all."""
        known = [expert.name for expert in self.experts]
        if name is not None and name not in known:
            raise SettingsError(f"{name}: not among the experts {', '.join(known) or 'none'}")
        experts = (replace(e, scale=scale) if name in (None, e.name) else e for e in self.experts)
        return replace(self, experts=tuple(experts))

    def with_gates(self, gates: str) -> Settings:
        """The same with another gates file."""
        return replace(self, gates=gates)


def parse_region(value: Any, expert: str) -> Region | None:
    """A rectangle from a name, four numbers, or text such as "0 0 0.5 1".

    Raises:
        SettingsError: it is neither, or reaches out of the picture.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        name = value.strip().lower()
        if name in NAMED_REGIONS:
            return NAMED_REGIONS[name]
        value = name.replace(",", " ").split()
    what = f"region {value!r} of expert {expert!r}"
    if not isinstance(value, Sequence) or len(value) != 4:
        names = ", ".join(NAMED_REGIONS)
        raise SettingsError(f"{what}: give left, top, width, height as shares of the picture, or {names}")
    left, top, width, height = (as_number(part, what) for part in value)
    # Two thirds and a third, rounded, may add up to a hair over 1.
    inside = 0 <= left < 1 and 0 <= top < 1 and left + width <= 1.001 and top + height <= 1.001
    if not (inside and width > 0 and height > 0):
        raise SettingsError(
            f"{what} does not lie in the picture: shares from 0 to 1, with some width and height"
        )
    return left, top, width, height


def format_region(region: Region | None) -> str:
    """The name of a rectangle, or its four numbers."""
    for name, known in NAMED_REGIONS.items():
        if region == known:
            return name
    return " ".join(f"{value:g}" for value in region or ())


def _as_bool(value: Any, what: str) -> bool:
    """APIs and PNG info also say "True" and 1."""
    words = {"true": True, "false": False, "1": True, "0": False, "": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if value is None or isinstance(value, str) or value not in (0, 1):
        raise SettingsError(f"{what}={value!r} is not allowed; choose true or false")
    return bool(value)


def as_number(value: Any, what: str) -> float:
    """A finite number, also from text.

    Raises:
        SettingsError: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{what}: {value!r} is not a number") from None
    if not math.isfinite(number):
        raise SettingsError(f"{what}: {value!r} is not a finite number")
    return number


def _pairs(text: str, key: str) -> dict[str, str]:
    """`"dog: 1 | cat: 0.8"` as a dictionary."""
    pairs = {}
    for entry in str(text).split(_BETWEEN):
        name, colon, value = entry.rpartition(":")
        if not colon or not name.strip():
            raise SettingsError(f"{key}: {entry!r} is not of the form NAME: VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _known(values: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    unknown = [name for name in values if name not in allowed]
    if unknown:
        raise SettingsError(
            f"unknown {', '.join(map(str, unknown))} in {what}; allowed: {', '.join(allowed)}"
        )
