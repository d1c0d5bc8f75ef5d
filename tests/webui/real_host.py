"""Starting and stopping a real web UI, and files that fit any SD 1.5 checkpoint in it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from mole_diffusion import MoLEConfig, inject, load_expert, save_gates
from mole_diffusion.core.networks import map_network

EXTENSION = Path(__file__).resolve().parents[2] / "webui_extension"
DEFAULT_ARGUMENTS = "--skip-torch-cuda-test --skip-python-version-check --skip-version-check --no-hashing"


class Host:
    """A running web UI.

    Args:
        url: where it listens.
        process: its process.
        log: file with what it printed.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log

    def call(self, path: str, body: Any = None, *, timeout: float = 600) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            with contextlib.suppress(json.JSONDecodeError):
                return error.code, json.loads(text)
            return error.code, text


@contextlib.contextmanager
def running(folder: Path, python: Path, data: Path) -> Iterator[Host]:
    """Link the extension in, start the web UI on a free port of loopback, and stop it at the end."""
    link = folder / "extensions" / "mole_under_test"
    link.unlink(missing_ok=True)
    link.symlink_to(EXTENSION)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = shlex.split(os.environ.get("MOLE_WEBUI_ARGS", DEFAULT_ARGUMENTS))
    command = [
        str(python),
        "launch.py",
        *arguments,
        "--api",
        "--port",
        str(port),
        "--lora-dir",
        str(data / "Lora"),
    ]
    log = data / "host.log"
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            host = Host(f"http://127.0.0.1:{port}", process, log)
            _wait(host)
            yield host
        finally:
            _stop(process)
    finally:
        link.unlink(missing_ok=True)


def _wait(host: Host, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if host.process.poll() is not None:
            break
        # Not asked before it says so: a request in the middle of its start makes A1111 fail.
        if b"Startup time" in host.log.read_bytes():
            assert host.call("/sdapi/v1/scripts", timeout=60)[0] == 200
            return
        time.sleep(1)
    raise RuntimeError(f"the web UI did not start:\n{host.log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)


def write_files(data: Path, gates: Path) -> None:
    """LoRAs "mole-test-a" and "mole-test-b" for SD 1.5, and gates "mole-test" for both."""
    with torch.device("meta"):
        # Only names and shapes count; SD 1.5 is diffusers' default.
        networks = {
            "unet": UNet2DConditionModel(cross_attention_dim=768),
            "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072)),
        }
    paths = [data / "Lora" / f"mole-test-{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_lora(networks, seed), path)
    experts = [load_expert(path) for path in paths]
    mixtures = {}
    for part, network in networks.items():
        mixtures[part] = inject(network, experts, MoLEConfig(), part=part)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixtures[part].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    save_gates(gates / "mole-test.safetensors", mixtures)


def _lora(networks: dict[str, torch.nn.Module], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}
    for part, network in networks.items():
        for site in map_network(network, part).sites:
            if site.kind != "attention" or "proj_" in site.name.rpartition(".")[2]:
                continue
            out, inputs = network.get_submodule(site.path).weight.shape[:2]
            down, up = torch.randn(4, inputs, generator=generator), torch.randn(out, 4, generator=generator)
            # kohya's names: the hosts' own LoRA loaders know them all.
            stem = f"{prefixes[part]}_{site.name.replace('.', '_')}"
            state[f"{stem}.lora_down.weight"] = (down / inputs**0.5).half()
            # Weak: random networks are not used to more, and some hosts encode text in float16.
            state[f"{stem}.lora_up.weight"] = (0.1 * up).half()
    return state
