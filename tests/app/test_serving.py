"""The server itself: who may come in, what is taken from whom, and what is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from app_tools import ROOT, Server, running
from gradio_client import Client, handle_file
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from mole_diffusion.app.metadata import PictureSettings, read_settings
from mole_diffusion.cli import app
from mole_diffusion.starter.location import starter_experts

PROMPT = "a zorin boot and a kipra clock on the beach"


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
    assert (settings.seed, settings.mixture, settings.gates) == (4, "auto", "")
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
    files, several = client.predict(
        prompt=PROMPT,
        seed=4,
        steps=4,
        sampler="Euler",
        image=handle_file(file),
        denoising=0.5,
        count=2,
        api_name="/compose_several",
    )
    drawn = [read_settings(one) for one in files]
    assert drawn == [PictureSettings.from_json(one["settings"]) for one in several]
    assert [(one.seed, one.sampler, one.denoising) for one in drawn] == [(4, "Euler", 0.5), (5, "Euler", 0.5)]
    assert drawn[0].image_sha256 == drawn[1].image_sha256 != ""
    file, facts = client.predict(prompts=[PROMPT], format="diffusers", rank=2, steps=2, api_name="/export")
    assert facts["experts"] == experts
    assert 0 < facts["effect_difference"] < 2
    with safe_open(file, framework="pt") as lora:
        assert all(".lora_" in key for key in lora.keys())  # noqa: SIM118 - not a mapping


def test_programs_bring_experts_of_their_own(client: Client, server: Server, tmp_path: Path) -> None:
    path = starter_experts()["cat"].path
    added = client.predict(file=handle_file(path), name="my cat", api_name="/add_expert")
    assert added == {"name": "my cat", "text": "a fenna cat"}
    assert "my cat" in client.predict(api_name="/experts")["chosen"]
    other = Client(server.url, verbose=False, download_files=str(tmp_path))
    assert "my cat" not in other.predict(api_name="/experts")["library"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": PROMPT, "steps": 0}, "steps is 0"),
        ({"prompt": PROMPT, "width": 100}, "width is 100"),
        ({"prompt": PROMPT, "denoising": 0}, "denoising is 0"),
        ({"prompt": PROMPT, "sampler": "Eule"}, "allowed are .*Euler a.*"),
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


@pytest.mark.parametrize("way", ["--auth", "--auth-file", "MOLE_APP_AUTH"])
def test_a_taken_port_is_one_line_at_once(tmp_path: Path, way: str) -> None:
    """Whatever else is asked for: nothing is loaded before."""
    (tmp_path / "auth").write_text("ada:secret\n")
    options = {"--auth": ["--auth", "a:b"], "--auth-file": ["--auth-file", str(tmp_path / "auth")]}.get(
        way, []
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), *options]
        environment = {**os.environ, "MOLE_APP_AUTH": "ada:secret"} if way == "MOLE_APP_AUTH" else None
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].endswith("choose another --port, or leave it out")
    assert f"port {port} is taken by another program" in result.stderr
    assert "Starting" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("option", "words"), [("--listen", "networks"), ("--share", "learns its address")])
def test_what_is_opened_without_a_password_is_said(
    option: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def serving(*_: object) -> Iterator[tuple[str, None]]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("mole_diffusion.app.interface.serving", serving)
    said = CliRunner().invoke(app, ["app", option]).stderr
    assert words in " ".join(said.split())
    assert "without a password: they can draw, train and upload" in " ".join(said.split())
    said = CliRunner().invoke(app, ["app", option], env={"MOLE_APP_AUTH": "a:b"}).stderr
    assert "without a password" not in said


def test_a_password_and_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_APP_AUTH", "ada:secret")
    with running(tmp_path) as server:
        for _ in range(2):
            wrong = {"username": "ada", "password": "guess"}
            answer = httpx.post(f"{server.url}/login", data=wrong, timeout=30)
            assert answer.status_code == 400
        assert answer.elapsed.total_seconds() > 0.45
        assert httpx.get(f"{server.url}/gradio_api/info").status_code == 401
        with pytest.raises(Exception, match=r"401|auth|login"):
            Client(server.url, verbose=False)
        client = Client(
            server.url, auth=("ada", "secret"), verbose=False, download_files=str(tmp_path / "got")
        )
        client.predict(prompt=PROMPT, steps=1, api_name="/compose")
        assert list(tmp_path.glob("mole-app-*"))
        assert server.stop() == 0
    assert "Traceback" not in server.said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "outputs"]
    (picture,) = tmp_path.glob("outputs/app/visitor-*/picture/*.png")
    assert read_settings(picture).prompt == PROMPT
    assert server.said.rstrip().splitlines()[-1] == "Ended. What was made is in outputs/app."


def test_a_folder_that_cannot_be_written_is_one_line_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["app", "--out", str(tmp_path / "file" / "app")])
    assert result.exit_code == 1
    assert "cannot be written: Not a directory" in result.stderr
    assert "Starting" not in result.stderr


def test_bad_options_are_usage_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for options in (
        ["--auth", "ada"],
        ["--auth-file", str(empty)],
        ["--auth-file", str(tmp_path / "none")],
        ["--port", "0"],
        ["--port", "99999"],
    ):
        result = CliRunner().invoke(app, ["app", *options])
        assert result.exit_code == 2, result.output
    assert "hunter2" not in CliRunner().invoke(app, ["app", "--auth", "hunter2"]).stderr
    result = CliRunner().invoke(app, ["app", "--model", "/there/is/none.safetensors"])
    assert result.exit_code == 1
    assert "the model '/there/is/none.safetensors' cannot be opened" in result.stderr
    result = CliRunner().invoke(app, ["app", "--device", "toaster"])
    assert result.exit_code == 1
    assert "device 'toaster' cannot be used" in result.stderr
