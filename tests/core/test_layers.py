"""Imports go down only, and the core needs torch and safetensors only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mole_diffusion

PACKAGE = Path(mole_diffusion.__file__).parent
ROOT = PACKAGE.parent
#: The rooms from the bottom up: each may import those before it, for types and inside functions too.
ROOMS = "core sources starter training pictures text methods evaluation app commands cli".split()
#: Neither knows of the other, so that each works without the other's libraries.
STRANGERS = {"pictures", "text"}
#: What hosts may know of the package. Whatever they import beside it is theirs.
HOSTS = {
    "comfy_nodes": (
        "core",
        "starter",
        "training",
        "pictures.training",
        "pictures.auto",
        "pictures.denoiser",
        "pictures.flow_matching",
        "pictures.files",
    ),
    "webui_extension": ("core",),
}
#: Folders beside the package whose files are as short as its own.
PRODUCT = (*HOSTS, "tools", "bench")
LONGEST = 400
HOST_MODULES = "comfy comfy_api comfy_extras nodes modules modules_forge".split()
BLOCKED = "diffusers transformers peft accelerate open_clip gradio timm matplotlib".split()


def module_name(path: Path) -> str:
    """Dotted name of a file below the repository's root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute module names of all imports in a file, those for types and inside functions included."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*parts, *([node.module] if node.module else [])])
            inside = [name for alias in node.names if is_module(name := f"{module}.{alias.name}")]
            yield from inside or [module]


def is_module(name: str) -> bool:
    """Whether this is a module of the repository."""
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def room(name: str) -> str | None:
    """Room of a module of the package; None for others and for the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "mole_diffusion" and len(parts) > 1 else None


FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ("cli", "sources")
)


def test_every_room_is_in_the_list() -> None:
    assert {room(module_name(path)) for path in FILES} <= set(ROOMS)
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own = room(module_name(path))
    assert own is not None
    for module in imports(path):
        assert module.split(".")[0] not in {*HOSTS, *HOST_MODULES}, f"{path.name} imports the host's {module}"
        below = room(module)
        if below is not None:
            assert ROOMS.index(below) <= ROOMS.index(own), f"{path.name} in {own} imports {module}"
            assert below == own or {below, own} != STRANGERS, f"{path.name} in {own} imports {module}"


def test_the_core_imports_torch_and_safetensors_beside_itself() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        for module in imports(path):
            root = module.split(".")[0]
            known = root in {"torch", "safetensors", "mole_diffusion"} or root in sys.stdlib_module_names
            assert known, f"{path.name}: {module}"


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_know_the_rooms_below_pipelines(host: str) -> None:
    for path in (ROOT / host).rglob("*.py"):
        for module in imports(path):
            inside = module.removeprefix("mole_diffusion").removeprefix(".")
            if room(module) is not None:
                assert inside.startswith(HOSTS[host]), f"{path.name} imports {module}"


def test_measuring_knows_no_domain_but_in_the_domains_folder() -> None:
    """So that texts are measured without the libraries that draw, and pictures without those that write."""
    for path in (PACKAGE / "evaluation").rglob("*.py"):
        own = path.parent.name if path.parent.name in STRANGERS else None
        for module in imports(path):
            inside = module.removeprefix("mole_diffusion.").removeprefix("evaluation.").split(".")[0]
            assert inside not in STRANGERS - {own}, f"{path.name} imports {module}"


def product_files() -> list[Path]:
    """What people run, and what builds what they run; tests may be long."""
    return sorted(
        path for folder in (PACKAGE, *(ROOT / name for name in PRODUCT)) for path in folder.rglob("*.py")
    )


def test_no_file_of_the_product_is_longer_than_400_lines() -> None:
    sizes = {module_name(path): len(path.read_text().splitlines()) for path in product_files()}
    assert len(sizes) > 200
    assert {name: lines for name, lines in sizes.items() if lines > LONGEST} == {}


def test_docstrings_mark_names_in_one_way() -> None:
    """As `this`; not with two marks, nor with the roles of a tool that nobody runs here."""
    other = re.compile(r"``|:\w+:`")
    found = {module_name(path): other.findall(path.read_text()) for path in product_files()}
    assert {name: marks for name, marks in found.items() if marks} == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = {module_name(path): {m for m in imports(path) if is_module(m)} for path in FILES}
    edges = {name: (below & set(edges)) - {name} for name, below in edges.items()}
    while edges:
        leaves = [name for name, below in edges.items() if not below & set(edges)]
        assert leaves, f"circle among {sorted(edges)}"
        for name in leaves:
            del edges[name]


def test_the_package_itself_and_the_entry_of_the_command_line_import_no_library() -> None:
    code = "import sys, mole_diffusion.cli; print({'torch', 'typer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_core_works_with_everything_else_blocked() -> None:
    code = f"""
import sys, tempfile
for name in {BLOCKED!r}:
    sys.modules[name] = None
import torch, mole_diffusion
from mole_diffusion import Expert, MoLEConfig, inject
from mole_diffusion.core import checkpoint, functional
from torch import nn
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
    def forward(self, x):
        return self.q_proj(x)
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
    def forward(self, x):
        return self.self_attn(x)
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Layer()])
    def forward(self, x):
        return self.encoder.layers[0](x)
key = "encoder.layers.0.self_attn.q_proj"
state = {{f"{{key}}.lora_A.weight": torch.randn(2, 4), f"{{key}}.lora_B.weight": torch.randn(4, 2)}}
network, x = Encoder(), torch.randn(1, 3, 4)
base = network(x)
mixture = inject(network, [Expert.from_state_dict(state, name="dog")], MoLEConfig())
assert not torch.equal(network(x), base)
mixture.eject()
assert torch.equal(network(x), base)
with tempfile.TemporaryDirectory() as folder:
    checkpoint.save_gates(folder + "/gates.safetensors", {{"text_encoder": mixture}})
    checkpoint.load_gates(folder + "/gates.safetensors", {{"text_encoder": mixture}})
loaded = {{name.split(".")[0] for name in sys.modules if sys.modules[name] is not None}}
assert not loaded & set({BLOCKED!r}), loaded & set({BLOCKED!r})
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
