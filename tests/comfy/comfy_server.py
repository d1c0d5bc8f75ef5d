"""A running ComfyUI with our nodes, driven over HTTP as its front end does."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_environment import ComfyInstallation

ROOT = Path(__file__).resolve().parents[2]
STARTUP_SECONDS = 120
RUN_SECONDS = 600

#: An API prompt: node id -> {"class_type", "inputs"}.
Prompt = dict[str, dict[str, Any]]


@dataclass
class Run:
    """What became of a queued prompt.

    Attributes:
        status: "success" or "error" (an interrupt is an error too).
        outputs: node id -> what it showed.
        messages: ComfyUI's messages: kind -> content.
    """

    status: str
    outputs: dict[str, dict[str, Any]]
    messages: dict[str, dict[str, Any]]

    @property
    def error(self) -> str:
        """Message of the exception that ended it; empty if none did."""
        return str(self.messages.get("execution_error", {}).get("exception_message", "")).strip()


@dataclass
class ComfyServer:
    """Starts ComfyUI on loopback.

    Args:
        installation: from `comfy_environment.install`.
        base: folder for its input, output, user files and custom nodes.
        pack: what is linked into custom_nodes.
        others: more node packs to link there.
    """

    installation: ComfyInstallation
    base: Path
    pack: Path
    others: tuple[Path, ...] = ()
    port: int = field(init=False)

    def __enter__(self) -> ComfyServer:
        for name in ("custom_nodes", "input", "output", "user/default", "models/loras"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
            "LiteGraph.Canvas.MinFontSizeForLOD": 0,
        }
        (self.base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))
        for name, pack in {"mole": self.pack, **{other.name: other for other in self.others}}.items():
            (self.base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = self.base / "comfyui.log"
        options = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        options += ["--disable-api-nodes", "--base-directory", str(self.base)]
        options += ["--database-url", f"sqlite:///{self.base}/user/comfyui.db"]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(self.installation.python), "main.py", *options],
                cwd=self.installation.source,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.installation.environment(),
            )
        self._wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def url(self) -> str:
        """Where the front end is."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """JSON of an address."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: Any) -> Any:
        """Send JSON; the answer's JSON, or None where it is empty."""
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            # What ComfyUI thinks of a prompt that it does not even begin with.
            raise AssertionError(error.read().decode()) from None
        return json.loads(text) if text.strip() else None

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt; returns its id."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str) -> Run:
        """Wait for a queued prompt."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            found = self.get(f"/history/{prompt_id}").get(prompt_id)
            if found is not None:
                status = found["status"]
                return Run(status["status_str"], found["outputs"], dict(status["messages"]))
            time.sleep(0.2)
        raise AssertionError(f"prompt {prompt_id} is not done after {RUN_SECONDS} s; log: {self.tail()}")

    def run(self, prompt: Prompt) -> Run:
        """Queue a prompt and wait for it."""
        return self.wait(self.queue(prompt))

    def picture(self, shown: dict[str, Any]) -> bytes:
        """The file of a picture that a node showed."""
        query = urllib.parse.urlencode({k: shown[k] for k in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=30) as answer:
            content: bytes = answer.read()
        return content

    def tail(self) -> str:
        """The end of ComfyUI's log."""
        return self.log.read_text(errors="replace")[-3000:]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"ComfyUI did not start:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"ComfyUI does not answer after {STARTUP_SECONDS} s:\n{self.tail()}")
