"""What is installed, which devices there are, and what is missing: the content of `mole doctor`."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mole_diffusion import __version__
from mole_diffusion.starter.location import starter_dir, starter_experts

#: Requirement -> what it is for. Those of a plain installation, as in pyproject.toml.
REQUIRED = {
    "torch>=2.1": "everything",
    "safetensors>=0.4": "LoRA and gates files",
    "numpy>=1.24": "pictures",
    "pillow>=10.1": "pictures",
    "diffusers>=0.30": "Stable Diffusion",
    "transformers>=4.41": "text encoders",
    "peft>=0.12": "LoRAs outside the mixture",
    "accelerate>=0.31": "loading large models",
    "open_clip_torch>=2.24": "training with CLIP guidance",
    "matplotlib>=3.7": "figures",
    "typer>=0.12": "this command line",
    "rich>=13": "this command line",
}
#: The same for what only some parts of the project need.
OPTIONAL = {
    "gradio>=6.31": "the app (mole app)",
    "torchmetrics>=1.2": "evaluation (mole evaluate)",
    "pydantic>=2.6": "evaluation (mole evaluate)",
    "pyyaml>=6": "evaluation (mole evaluate)",
    "scipy>=1.10": "evaluation (mole evaluate)",
    "psutil>=5.9": "evaluation (mole evaluate)",
    "timm>=1.0": "evaluation with the starter's judge",
    "nevergrad>=1.0": "searched weights (LoRAHub) among the baselines",
    "xformers>=0.0.23": "faster attention on older NVIDIA GPUs",
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
        install: the command that gets it.
    """

    name: str
    version: str | None
    purpose: str
    required: bool
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
    """

    system: dict[str, str]
    devices: list[str]
    packages: list[Package]
    starter: dict[str, str]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this installation; nothing is changed and no network is used."""
    packages = [_package(text, purpose, required=True) for text, purpose in REQUIRED.items()]
    packages += [_package(text, purpose, required=False) for text, purpose in OPTIONAL.items()]
    starter, problem = _starter(starter_dir())
    problems = [f"{p.name} is missing: {p.install}" for p in packages if p.required and p.version is None]
    return Diagnosis(
        system={
            "mole_diffusion": __version__,
            "Python": platform.python_version(),
            "platform": platform.platform(),
        },
        devices=_devices(),
        packages=packages,
        starter=starter,
        problems=[*problems, *([problem] if problem else [])],
    )


def _package(requirement: str, purpose: str, *, required: bool) -> Package:
    name = requirement.partition(">=")[0]
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    return Package(name, version, purpose, required, f'pip install "{requirement}"')


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
