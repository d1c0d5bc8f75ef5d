"""What is installed, which devices there are, and what is missing: the content of `mole doctor`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from mole_diffusion import __version__
from mole_diffusion.commands.clashes import CLASHES, Clash
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.starter.location import starter_dir, starter_experts

_OURS = "mole-diffusion"
_INSTALL = "pip install --editable FOLDER, with the folder that holds pyproject.toml"
#: What the extras of the package are for; extras for developers are not spoken of.
_EXTRAS = {
    "app": "the app (mole app)",
    "evaluate": "evaluation (mole evaluate)",
    "baselines": "searched weights (LoRAHub) among the baselines",
    "xformers": "faster attention on older NVIDIA GPUs",
}
#: What `from_starter` opens.
_STARTER_FILES = (
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
    "experts/experts.json",
)


@dataclass(frozen=True)
class Package:
    """One library.

    Attributes:
        name: as pip knows it.
        version: the installed version; None if it is missing.
        purpose: what it is for.
        required: whether a plain installation has it.
        fits: whether it is there in a version that the project allows.
        install: the command that gets it.
    """

    name: str
    version: str | None
    purpose: str
    required: bool
    fits: bool
    install: str


@dataclass(frozen=True)
class Diagnosis:
    """The state of an installation.

    Attributes:
        system: Python, platform and this package.
        devices: what PyTorch can compute on, a line each.
        packages: libraries, required ones first.
        starter: its folder, and what is in it or missing.
        problems: what keeps the project from working, with the way out; empty if all is well.
        notes: versions that may give trouble.
    """

    system: dict[str, str]
    devices: list[str]
    packages: list[Package]
    starter: dict[str, str]
    problems: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this installation; nothing is changed and no network is used."""
    packages = [_package(wanted, "everything", required=True) for wanted in requirements()]
    # Some extras only narrow what is required; `CLASHES` says what happens outside of that.
    required = {package.name for package in packages}
    packages += [
        _package(wanted, purpose, required=False)
        for extra, purpose in _EXTRAS.items()
        for wanted in requirements(extra)
        if wanted.name not in required
    ]
    starter, problem = _starter(starter_dir())
    found = clashes()
    return Diagnosis(
        system={
            "mole_diffusion": __version__,
            "Python": platform.python_version(),
            "platform": platform.platform(),
        },
        devices=_devices(),
        packages=packages,
        starter=starter,
        problems=[
            *([] if packages else [f"the package was never installed, only its code is here: {_INSTALL}"]),
            *(f"{p.name} is missing: {p.install}" for p in packages if p.required and p.version is None),
            *(str(clash) for clash in found if clash.breaks),
            *([problem] if problem else []),
        ],
        notes=[
            *(_outside(p) for p in packages if p.version is not None and not p.fits),
            *(str(clash) for clash in found if not clash.breaks),
        ],
    )


def requirements(extra: str = "") -> list[Requirement]:
    """What the installed package asks for: always, or beyond that with one of its extras.

    Nothing where the code runs from a folder and was never installed.
    """
    try:
        found = [Requirement(text) for text in metadata.requires(_OURS) or ()]
    except metadata.PackageNotFoundError:
        return []

    def asked(wanted: Requirement, name: str) -> bool:
        return wanted.marker is None or wanted.marker.evaluate({"extra": name})

    return [r for r in found if asked(r, extra) and (not extra or not asked(r, ""))]


def need_extra(extra: str, what: str) -> None:
    """See that the packages of an extra are there.

    Args:
        extra: its name.
        what: what needs it, as the message begins.

    Raises:
        ConfigError: some are missing; the message says how to get them.
    """
    gone = [p for p in (_package(r, what, required=True) for r in requirements(extra)) if p.version is None]
    if gone:
        wanted = " ".join(p.install.removeprefix("pip install ") for p in gone)
        raise ConfigError(f"{what} needs {', '.join(p.name for p in gone)}: pip install {wanted}")


def clashes(version: Callable[[str], str] = metadata.version) -> list[Clash]:
    """The entries of `CLASHES` that are true of this installation.

    Args:
        version: the installed version of a package by name; raises PackageNotFoundError if there is none.
    """
    return [c for c in CLASHES if all(_satisfied(Requirement(text), version) for text in c.together)]


def _satisfied(wanted: Requirement, version: Callable[[str], str] = metadata.version) -> bool:
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _package(wanted: Requirement, purpose: str, *, required: bool) -> Package:
    try:
        version: str | None = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        version = None
    plain = f"{wanted.name}{wanted.specifier}"
    return Package(wanted.name, version, purpose, required, _satisfied(wanted), f'pip install "{plain}"')


def _outside(package: Package) -> str:
    """What is said of a version that the project does not allow."""
    return f"{package.name} {package.version} is not a version the project is tested with: {package.install}"


def _devices() -> list[str]:
    """CPU, CUDA and Apple GPUs."""
    import torch

    devices = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}: {found.name}, {found.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps: Apple GPU")
    return devices


def _starter(folder: Path) -> tuple[dict[str, str], str | None]:
    """(facts, problem or None) about the starter."""
    missing = [name for name in _STARTER_FILES if not (folder / name).is_file()]
    if missing:
        way_out = "reinstall the package, or get the folder assets/starter with the repository"
        problem = f"the starter in {folder} lacks {', '.join(missing)}: {way_out}"
        return {"folder": str(folder), "missing": ", ".join(missing)}, problem
    return {"folder": str(folder), "experts": ", ".join(starter_experts(folder))}, None
