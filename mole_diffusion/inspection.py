"""What is in a LoRA file or a gates file, in words and as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mole_diffusion.checkpoint import FORMAT as GATES_FORMAT
from mole_diffusion.checkpoint import GatesHeader, read_gates_header
from mole_diffusion.errors import ExpertLoadError
from mole_diffusion.experts import Expert, load_expert

__all__ = ["FileDescription", "describe_expert", "describe_file", "describe_gates"]

# Reasons and examples are for reading; a file for another base model has thousands of ignored keys.
EXAMPLES_PER_REASON = 3


@dataclass(frozen=True)
class FileDescription:
    """A file in words: one title, short facts, and sections of lines; `data` has all of it for programs.

    Attributes:
        kind: "expert" or "gates".
    """

    kind: str
    title: str
    facts: Mapping[str, str]
    sections: Mapping[str, list[str]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the kind and the data."""
        return {"kind": self.kind, **self.data}


def describe_file(path: str | Path) -> FileDescription:
    """Describe a safetensors file, whichever of the two kinds it is.

    Raises:
        ExpertLoadError: no such file, not safetensors, or neither gates nor a usable LoRA.
        GateMismatchError: gates of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpertLoadError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ExpertLoadError(f"{str(path)!r} cannot be read as safetensors: {error}.") from error
    if metadata.get("format") == GATES_FORMAT:
        return describe_gates(read_gates_header(path), path.name)
    return describe_expert(load_expert(path))


def describe_expert(expert: Expert) -> FileDescription:
    """Networks, ranks, triggers, and every ignored or missing key of a LoRA."""
    networks = {
        network: dict(sorted(Counter(factor.rank for factor in matrices.values()).items()))
        for network, matrices in expert.factors.items()
    }
    report = expert.report
    facts = {
        "kind": "LoRA expert",
        "sha256": expert.sha256,
        "triggers": ", ".join(expert.triggers) or "none named in the file",
        "keys": report.summary(),
    }
    sections = {
        "networks": [
            f"{network}: {len(expert.factors[network])} matrices, "
            + ", ".join(f"{count} of rank {rank}" for rank, count in ranks.items())
            for network, ranks in networks.items()
        ]
    }
    if report.ignored:
        sections["ignored keys"] = _by_reason(report.ignored)
    if report.missing:
        sections["missing"] = list(report.missing)
    data = {
        "name": expert.name,
        "sha256": expert.sha256,
        "triggers": list(expert.triggers),
        "networks": {
            network: {
                name: {"rank": factor.rank, "alpha": factor.alpha}
                for name, factor in expert.factors[network].items()
            }
            for network in networks
        },
        "ignored": dict(report.ignored),
        "missing": list(report.missing),
        "metadata": dict(expert.metadata),
    }
    return FileDescription("expert", expert.name, facts, sections, data)


def describe_gates(header: GatesHeader, name: str) -> FileDescription:
    """Experts, form and network of the gates in a file called `name`, and what the writer noted."""
    experts: dict[str, dict[str, Any]] = {}
    for part, content in header.parts.items():
        for expert in content["experts"]:
            entry = experts.setdefault(
                expert["name"], {"name": expert["name"], "sha256": expert["sha256"], "ranks": {}}
            )
            entry["ranks"][part] = expert["ranks"]
    facts = {
        "kind": "gates",
        "format version": str(header.version),
        "experts": ", ".join(experts),
        **{key: str(value) for key, value in header.metadata.items()},
    }
    sections = {
        "experts": [f"{name}: sha256 {entry['sha256']}" for name, entry in experts.items()],
        **{
            f"{part} ({content['base']['class']}), {len(content['groups'])} gates": [
                f"{setting}: {value}" for setting, value in content["config"].items()
            ]
            for part, content in header.parts.items()
        },
    }
    data = {
        "format_version": header.version,
        "experts": list(experts.values()),
        "parts": {part: dict(content) for part, content in header.parts.items()},
        "metadata": dict(header.metadata),
    }
    return FileDescription("gates", name, facts, sections, data)


def _by_reason(ignored: Mapping[str, str]) -> list[str]:
    keys: dict[str, list[str]] = {}
    for key, reason in ignored.items():
        keys.setdefault(reason, []).append(key)
    lines = []
    for reason, of_reason in keys.items():
        examples = ", ".join(of_reason[:EXAMPLES_PER_REASON])
        more = ", ..." if len(of_reason) > EXAMPLES_PER_REASON else ""
        lines.append(f"{len(of_reason)} x {reason}: {examples}{more}")
    return lines
