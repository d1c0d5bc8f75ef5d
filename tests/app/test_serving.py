"""The server itself: who may come in, what is taken from whom, and what is left behind."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from app_tools import Server, running
from gradio_client import Client, handle_file
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from mole_diffusion.app.metadata import PictureSettings, read_settings
from mole_diffusion.cli import app
from mole_diffusion.starter.location import starter_experts

PROMPT = "a zor boot and a kip clock on the beach"


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Client:
    return Client(server.url, verbose=False, download_files=str(tmp_path))


def test_programs_compose_train_and_export(client: Client) -> None:
    assert client.predict(api_name="/experts")["chosen"] == ["boot", "monster", "clock"]
    experts = ["boot", "clock"]
    file, facts = client.predict(
        prompt=PROMPT, experts=experts, seed=4, steps=2, strengths={"boot": 0.5}, api_name="/compose"
    )
    settings = read_settings(file)
    assert settings == PictureSettings.from_json(facts["settings"])
    assert (settings.seed, settings.gates) == (4, "fresh")
    assert [(use.name, use.strength) for use in settings.experts] == [("boot", 0.5), ("clock", 1.0)]
    with Image.open(file) as picture:
        assert picture.size == (128, 128)
    file, facts = client.predict(
        prompts=[PROMPT], experts=experts, iterations=3, batch=1, backgrounds=False, api_name="/train"
    )
    assert facts["iteration"] == 3
    with safe_open(file, framework="pt") as gates:
        assert gates.metadata()["iterations"] == "3"
    file, facts = client.predict(prompt=PROMPT, seed=4, steps=2, api_name="/compose")
    assert read_settings(file).gates == "trained"
    file, facts = client.predict(prompts=[PROMPT], format="diffusers", rank=2, steps=2, api_name="/export")
    assert facts["experts"] == experts
    assert 0 < facts["effect_difference"] < 2
    with safe_open(file, framework="pt") as lora:
        assert all(".lora_" in key for key in lora.keys())  # noqa: SIM118 - not a mapping


def test_programs_bring_experts_of_their_own(client: Client, server: Server, tmp_path: Path) -> None:
    path = starter_experts()["cat"].path
    added = client.predict(file=handle_file(path), name="my cat", api_name="/add_expert")
    assert added == {"name": "my cat", "text": "a fen cat"}
    assert "my cat" in client.predict(api_name="/experts")["chosen"]
    other = Client(server.url, verbose=False, download_files=str(tmp_path))
    assert "my cat" not in other.predict(api_name="/experts")["library"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": PROMPT, "steps": 0}, "steps is 0"),
        ({"prompt": PROMPT, "width": 100}, "width is 100"),
        ({"prompt": PROMPT, "experts": ["boott"]}, "Did you mean"),
        ({"prompt": PROMPT, "mixture": "mean"}, "mixture is"),
    ],
)
def test_programs_are_told_what_is_wrong(client: Client, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        client.predict(**arguments, api_name="/compose")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.html", b"<script>alert(1)</script>"),
        ("lora.safetensors", b"\x80\x04 a pickle"),
        ("picture.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("model.ckpt", b"\x80\x02"),
        ("noname", b"x"),
    ],
)
def test_uploads_of_other_files_are_not_kept(server: Server, name: str, content: bytes) -> None:
    answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 415, answer.text
    assert not [path for path in server.folder.rglob("*") if path.is_file() and path.read_bytes() == content]


def test_everything_is_on_this_machine_only(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    page = httpx.get(server.url)
    assert "HttpOnly" in page.headers["set-cookie"]
    with socket.socket() as outside:
        outside.settimeout(2)
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            pytest.skip("this machine has no name of its own")
        if address.startswith("127."):
            pytest.skip("this machine has no address but the loopback")
        assert outside.connect_ex((address, port)) != 0


def test_a_password_and_ctrl_c(tmp_path: Path) -> None:
    with running(tmp_path, "--auth", "ada:secret") as server:
        assert httpx.get(f"{server.url}/gradio_api/info").status_code == 401
        with pytest.raises(Exception, match=r"401|auth|login"):
            Client(server.url, verbose=False)
        client = Client(
            server.url, auth=("ada", "secret"), verbose=False, download_files=str(tmp_path / "got")
        )
        client.predict(prompt=PROMPT, steps=1, api_name="/compose")
        assert list(tmp_path.glob("mole-app-*/**/*.png"))
        assert server.stop() == 0
    assert not list(tmp_path.glob("mole-app-*"))
    assert not [path for path in tmp_path.iterdir() if path.name != "got"]
    assert "Traceback" not in server.said


def test_bad_options_are_usage_errors() -> None:
    for options in (["--auth", "ada"], ["--port", "0"], ["--port", "99999"]):
        result = CliRunner().invoke(app, ["app", *options])
        assert result.exit_code == 2, result.output
    result = CliRunner().invoke(app, ["app", "--model", "/there/is/none.safetensors"])
    assert result.exit_code == 1
    assert "the model '/there/is/none.safetensors' cannot be opened" in result.stderr
    result = CliRunner().invoke(app, ["app", "--device", "toaster"])
    assert result.exit_code == 1
    assert "device 'toaster' cannot be used" in result.stderr
