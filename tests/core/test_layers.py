"""Imports go down only, and the core needs torch and safetensors only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mole_diffusion

PACKAGE = Path(mole_diffusion.__file__).parent
# Module of the core by its dotted name inside it -> file; a room's own file is called as the room.
CORE = {
    ".".join(path.relative_to(PACKAGE / "core").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((PACKAGE / "core").rglob("*.py"))
    if path != PACKAGE / "core" / "__init__.py"
}
HOSTS = "comfy comfy_api comfy_extras nodes modules modules_forge comfy_nodes webui_extension".split()
BLOCKED = "diffusers transformers peft accelerate open_clip gradio timm matplotlib".split()
# What hosts lay on top; nothing below may import it.
TOP = {"cli", "app", "__main__"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module name, whether it is imported when the file is) of every import in a file."""
    tree = ast.parse(path.read_text())
    package = ["mole_diffusion", *path.relative_to(PACKAGE).parts[:-1]]
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    typing = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test)
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        now = id(node) not in lazy and id(node) not in typing
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            if module == "mole_diffusion" or (node.level and not node.module):
                yield from ((f"{module}.{alias.name}", now) for alias in node.names)
            else:
                yield module, now


def own(name: str) -> str | None:
    """Room of a module of ours, else None."""
    parts = name.split(".")
    return parts[1] if parts[0] == "mole_diffusion" and len(parts) > 1 else None


def core(name: str) -> str | None:
    """Name of a module of the core inside it, also of a name that is imported from it; else None."""
    found = name.removeprefix("mole_diffusion.core.")
    while found != name and found not in CORE and "." in found:
        found = found.rpartition(".")[0]
    return found if found != name else None


@pytest.mark.parametrize("name", CORE)
def test_core_imports_only_core_torch_and_safetensors(name: str) -> None:
    for module, _ in imports(CORE[name]):
        if own(module) is not None:
            assert core(module) in CORE, f"{name}.py imports {module}, which lies above the core"
        else:
            root = module.split(".")[0]
            assert root in {"torch", "safetensors"} or root in sys.stdlib_module_names, f"{name}.py: {module}"


def test_core_modules_import_each_other_without_a_circle() -> None:
    edges = {name: {core(m) for m, _ in imports(path)} & set(CORE) for name, path in CORE.items()}
    while edges:
        leaves = [name for name, below in edges.items() if not below & set(edges)]
        assert leaves, f"circle among {sorted(edges)}"
        for name in leaves:
            del edges[name]


def test_nothing_imports_hosts_or_what_lies_on_top() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > len(CORE)
    for path in files:
        for module, _ in imports(path):
            assert module.split(".")[0] not in HOSTS, f"{path.name} imports {module}"
            if not {path.stem, path.relative_to(PACKAGE).parts[0]} & TOP:
                assert own(module) not in TOP, f"{path.name} imports {module}"


def test_the_package_itself_imports_only_the_core_at_once() -> None:
    for module, now in imports(PACKAGE / "__init__.py"):
        if now and own(module) is not None:
            assert own(module) == "core"


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
