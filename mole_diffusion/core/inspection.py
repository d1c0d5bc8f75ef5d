"""What is in a LoRA file or a gates file, in words and as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bases import base_of_expert, prediction_type, told_base
from .checkpoint import FORMAT as GATES_FORMAT
from .checkpoint import SHARED_FORMAT, GatesHeader, read_gates_header
from .errors import ExpertLoadError
from .experts import Expert, read_expert
from .factors import LoraFactors
from .networks import of_matrices
from .reading import BadFileError, read_header
from .shared_gates import SharedGates
from .writers import writer_of

__all__ = ["FileDescription", "describe_expert", "describe_file", "describe_gates"]

# Reasons and examples are for reading; a file for another base model has thousands of ignored keys.
EXAMPLES_PER_REASON = 3
# kohya writes whole tag lists into the header; `--json` has them in full.
HEADER_CHARACTERS = 120


@dataclass(frozen=True)
class FileDescription:
    """A file in words: one title, short facts, and sections of lines; `data` has all of it for programs.

    Attributes:
        kind: "expert", "gates" or "shared gates".
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
    """Describe a safetensors file, whichever of the three kinds it is, or an expert's folder.

    Raises:
        ExpertLoadError: nothing is there, it cannot be read, or it is neither gates nor a usable LoRA.
        GateMismatchError: gates that are damaged, or of a newer format.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        try:
            header = read_header(path)
        except (BadFileError, OSError) as error:
            raise ExpertLoadError(f"{str(path)!r} cannot be read as safetensors: {error}.") from error
        if header.metadata.get("format") == GATES_FORMAT:
            return describe_gates(read_gates_header(path), path.name)
        if header.metadata.get("format") == SHARED_FORMAT:
            return describe_shared(SharedGates.load(path), path.name)
    return describe_expert(read_expert(path))


def describe_expert(expert: Expert) -> FileDescription:
    """Dialect, base, networks, ranks, triggers, header, and every ignored or missing key of a LoRA."""
    report = expert.report
    base = base_of_expert(expert)
    prediction = prediction_type(expert.metadata)
    writer = writer_of(expert.metadata)
    facts = {
        "kind": "LoRA expert",
        "form": form_of(expert),
        "writer": f"{writer}, says its header"
        if writer
        else "not named in the file; told by its names below",
        "dialect": "; ".join(report.dialects),
        "base": told_base(expert),
        "prediction": prediction or "not named in the file",
        "sha256": expert.sha256,
        "triggers": ", ".join(expert.triggers) or "none named in the file",
        "strength": strength_of(expert),
        "alpha": report.origin() or "none of these matrices has one",
        "keys": report.summary(),
    }
    sections = {"networks": [_network_line(network, found) for network, found in expert.factors.items()]}
    for network, matrices in expert.factors.items():
        sections[f"matrices of the {network}"] = _by_leaf(matrices)
    if expert.embeddings:
        sections["embeddings"] = [
            f"{word}: "
            + ", ".join(f"{len(vectors)} x {vectors.shape[1]} ({part})" for part, vectors in parts.items())
            for word, parts in expert.embeddings.items()
        ]
    if expert.metadata:
        sections["header"] = [f"{key}: {_shortened(value)}" for key, value in sorted(expert.metadata.items())]
    if report.ignored:
        sections["ignored keys"] = _by_reason(report.ignored)
    if report.missing:
        sections["missing"] = list(report.missing)
    if report.notes:
        sections["notes"] = list(report.notes)
    data = {
        "name": expert.name,
        "sha256": expert.sha256,
        "writer": writer,
        "form": facts["form"],
        "strength": facts["strength"],
        "dialects": list(report.dialects),
        "base": {"family": base.family, "text_width": base.width, "prediction_type": prediction},
        "triggers": list(expert.triggers),
        "embeddings": {
            word: {part: list(vectors.shape) for part, vectors in parts.items()}
            for word, parts in expert.embeddings.items()
        },
        "networks": {
            network: {name: _matrix_data(factors) for name, factors in matrices.items()}
            for network, matrices in expert.factors.items()
        },
        "ignored": dict(report.ignored),
        "missing": list(report.missing),
        "alphas": dict(report.alphas),
        "notes": list(report.notes),
        "metadata": dict(expert.metadata),
    }
    return _described("expert", expert.name, facts, sections, data)


def form_of(expert: Expert) -> str:
    """What the deltas are and of which ranks: "LoRA of rank 16", "LoHa and LoRA of ranks 4 to 32"."""
    pairs = [one for matrices in expert.factors.values() for one in matrices.values()]
    kinds = " and ".join(sorted({one.kind for one in pairs})) or "no matrices"
    return f"{kinds} of {_span([one.rank for one in pairs], 'rank', 'ranks')}" if pairs else kinds


def strength_of(expert: Expert) -> str:
    """What the file multiplies its products by, alpha over rank: "1", or the span of it."""
    scalings = [one.scaling for matrices in expert.factors.values() for one in matrices.values()]
    if not scalings:
        return "no matrices"
    return f"alpha / rank is {_span(scalings)}" + ("" if min(scalings) == max(scalings) else ", by matrix")


def _span(values: Sequence[float], one: str = "", several: str = "") -> str:
    least, most = min(values), max(values)
    text = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
    return f"{one if least == most else several} {text}".strip()


def _described(
    kind: str,
    title: str,
    facts: Mapping[str, str],
    sections: Mapping[str, list[str]],
    data: Mapping[str, Any],
) -> FileDescription:
    """A description whose texts, which a stranger wrote, cannot steer a terminal."""
    return FileDescription(
        kind,
        _printable(title),
        {name: _printable(fact) for name, fact in facts.items()},
        {_printable(heading): [_printable(line) for line in lines] for heading, lines in sections.items()},
        data,
    )


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _network_line(network: str, matrices: Mapping[str, LoraFactors]) -> str:
    kinds = Counter(factors.kind for factors in matrices.values())
    ranks = sorted(Counter(factors.rank for factors in matrices.values()).items())
    line = f"{network}: {len(matrices)} matrices, " + ", ".join(
        f"{count} of rank {rank}" for rank, count in ranks
    )
    if set(kinds) == {"LoRA"}:
        return line
    return f"{line}; " + ", ".join(f"{count} as {kind}" for kind, count in sorted(kinds.items()))


def _matrix_data(factors: LoraFactors) -> dict[str, Any]:
    kind = {} if factors.kind == "LoRA" else {"kind": factors.kind}
    return {"rank": factors.rank, "alpha": factors.alpha, **kind}


def _by_leaf(matrices: Mapping[str, LoraFactors]) -> list[str]:
    """Lines such as "16 x ff.up": names without the numbered blocks that they lie in."""
    architecture = of_matrices(matrices)
    leaves = Counter(name if architecture is None else architecture.leaf(name) for name in matrices)
    return [f"{count} x {leaf}" for leaf, count in sorted(leaves.items())]


def _shortened(text: str) -> str:
    return (
        text if len(text) <= HEADER_CHARACTERS else f"{text[:HEADER_CHARACTERS]}... ({len(text)} characters)"
    )


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
    return _described("gates", name, facts, sections, data)


def describe_shared(shared: SharedGates, name: str) -> FileDescription:
    """The networks that shared gates in a file called `name` are for, and what the writer noted."""
    facts = {"kind": "shared gates, for any experts", **shared.metadata}
    sections = {
        f"{part} ({own['base'].get('class')}), {len(own['gates'])} gates": list(own["gates"])
        for part, own in shared.parts.items()
    }
    data = {"parts": shared.parts, "metadata": shared.metadata}
    return _described("shared gates", name, facts, sections, data)


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
