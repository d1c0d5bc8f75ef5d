"""End to end in a real web UI: opt-in, with a checkout that has an SD 1.5 checkpoint, if of random weights.

Random weights need a bias in the text encoder's last layer norm. Without one its output has the mean zero, by
which the hosts' emphasis divides: the picture is black, or A1111 says that the UNet produced NaNs.

    MOLE_WEBUI_DIR=/path/to/webui MOLE_WEBUI_PYTHON=/path/to/its/python \\
        pytest -m slow tests/webui/test_real_host.py

`MOLE_WEBUI_ARGS` replaces the arguments for its start (such as `--always-cpu`), `MOLE_WEBUI_SHOTS` names a
folder for screenshots.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import browser
from PIL import Image

from .real_host import Host, running, write_files

DIR, PYTHON = os.environ.get("MOLE_WEBUI_DIR"), os.environ.get("MOLE_WEBUI_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DIR and PYTHON), reason="MOLE_WEBUI_DIR and MOLE_WEBUI_PYTHON name no web UI"),
]
A, B = "mole-test-a", "mole-test-b"
TWO = {"experts": {A: 1.0, B: 1.0}, "gates": "mole-test"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    data = tmp_path_factory.mktemp("webui")
    gates = Path(DIR) / "models" / "mole"
    write_files(data, gates)
    try:
        with running(Path(DIR), Path(PYTHON), data) as found:
            found.data = data
            yield found
    finally:
        for name in ("mole-test", "mole-test-trained"):
            (gates / f"{name}.safetensors").unlink(missing_ok=True)


def draw(host: Host, settings: dict[str, Any] | None = None, **more: Any) -> tuple[bytes, str, list[str]]:
    """(pixels of the first picture, its PNG info, comments)"""
    body = {
        "prompt": "a dog and a cat",
        "seed": 1,
        "steps": 2,
        "width": 128,
        "height": 128,
        "cfg_scale": 5,
        **more,
    }
    if settings is not None:
        body["alwayson_scripts"] = {"mole": {"args": [settings]}}
    kind = "img2img" if "init_images" in body else "txt2img"
    status, answer = host.call(f"/sdapi/v1/{kind}", body)
    assert status == 200, answer
    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")
    assert any(high > low for low, high in image.getextrema()), "a blank picture"
    info = json.loads(answer["info"])
    return image.tobytes(), info["infotexts"][0], answer["images"]


def test_off_on_off(host: Host) -> None:
    before, text, _ = draw(host)
    assert "MoLE" not in text
    on, text, _ = draw(host, TWO)
    assert on != before
    assert f'MoLE experts: "{A}: 1 | {B}: 1"' in text
    assert "MoLE gates: mole-test" in text
    assert draw(host)[0] == before
    assert draw(host, TWO)[0] == on
    assert draw(host, {**TWO, "gates": "equal shares"})[0] not in (before, on)
    left = {
        "experts": [{"name": A, "region": "left half"}, {"name": B, "region": "right half"}],
        "gates": "mole-test",
    }
    assert draw(host, left)[0] not in (before, on)


def test_the_gates_were_used(host: Host) -> None:
    draw(host, TWO)
    _, run = host.call("/mole/v1/last-run")
    assert run["experts"] == [A, B]
    assert set(run["weights"]) == {"unet", "text_encoder"}
    assert len([gate for gate in run["weights"]["unet"] if not gate.endswith(".context")]) == 16
    assert run["forwards"]["unet"] >= 2


def test_batches_hires_fix_and_img2img(host: Host) -> None:
    plain, on = draw(host), draw(host, TWO)
    pictures = draw(host, TWO, n_iter=2)[2]
    assert len(pictures) >= 2
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 1, "denoising_strength": 0.7}
    # Forge's API fails without it; the others pass over it.
    hires["hr_additional_modules"] = ["Use same choices"]
    left = {**TWO, "experts": [{"name": A, "region": [0, 0, 0.4, 1]}, {"name": B}]}
    assert draw(host, left, **hires)[0] != draw(host, **hires)[0]
    source = {"init_images": [plain[2][0]], "denoising_strength": 0.8}
    before = draw(host, **source)[0]
    assert draw(host, TWO, **source)[0] != before
    assert draw(host, **source)[0] == before
    assert draw(host, TWO)[0] == on[0]


def test_next_to_the_hosts_own_lora(host: Host) -> None:
    prompt = {"prompt": f"a dog and a cat <lora:{B}:1>"}
    plain, lora = draw(host)[0], draw(host, **prompt)[0]
    both = draw(host, {"experts": [A]}, **prompt)[0]
    assert len({plain, lora, both, draw(host, {"experts": [A]})[0]}) == 4
    assert draw(host, **prompt)[0] == lora
    assert draw(host)[0] == plain


def test_errors_are_shown_and_leave_nothing(host: Host) -> None:
    before = draw(host)[0]
    body = {"prompt": "x", "steps": 1, "width": 128, "height": 128}
    for settings, message in (
        ({"experts": ["bird"]}, "no LoRA 'bird'"),
        ({**TWO, "experts": [A]}, f"choose '{B}' too"),
    ):
        body["alwayson_scripts"] = {"mole": {"args": [settings]}}
        status, answer = host.call("/sdapi/v1/txt2img", body)
        assert status == 500
        assert message in json.dumps(answer)
    assert draw(host)[0] == before


def test_interrupt(host: Host) -> None:
    before = draw(host)[0]

    def stop() -> None:
        # Once it draws, however long the machine takes to get there.
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            _, shown = host.call("/sdapi/v1/progress?skip_current_image=true")
            if shown["state"]["job_count"] > 0 and shown["state"]["sampling_step"] > 0:
                break
            time.sleep(0.2)
        host.call("/sdapi/v1/interrupt", {})

    thread = threading.Thread(target=stop)
    thread.start()
    draw(host, TWO, steps=150)
    thread.join()
    _, shown = host.call("/sdapi/v1/progress?skip_current_image=true")
    assert shown["state"]["interrupted"]
    assert draw(host)[0] == before


def test_xyz_plot(host: Host) -> None:
    _, answer = host.call("/sdapi/v1/script-info")
    info = next(s for s in answer if s["name"] == "x/y/z plot" and not s["is_img2img"])
    labels = info["args"][0]["choices"]
    axis = labels.index("[MoLE] Active experts")
    names = [entry["label"] for entry in info["args"]]
    # Types are given by their number, as the page does.
    args = [
        entry["choices"].index(entry["value"]) if entry["label"].endswith(" type") else entry["value"]
        for entry in info["args"]
    ]
    args[0], args[1] = axis, f"{A}, {B}, {A}+{B}"
    for label in ("Draw legend", "Include Sub Images", "Include Sub Grids"):
        if label in names:
            args[names.index(label)] = label == "Include Sub Images"
    body = {"prompt": "a dog and a cat", "seed": 1, "steps": 2, "width": 128, "height": 128, "cfg_scale": 5}
    body |= {"script_name": "x/y/z plot", "script_args": args, "alwayson_scripts": {"mole": {"args": [TWO]}}}
    status, answer = host.call("/sdapi/v1/txt2img", body)
    assert status == 200, answer
    texts = json.loads(answer["info"])["infotexts"]
    assert any(f"MoLE active: {A}," in text for text in texts)
    assert len(set(answer["images"])) >= 3


def test_in_a_browser(host: Host) -> None:
    shots = Path(os.environ.get("MOLE_WEBUI_SHOTS", host.data))
    host.call("/sdapi/v1/options", {"mole_python": sys.executable})
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1500, "height": 1700})
        page.goto(host.url, wait_until="domcontentloaded", timeout=120_000)
        panel = page.locator("#script_txt2img_mole_mole")
        panel.wait_for(timeout=120_000)
        _fill_panel(page, panel)
        page.locator("#txt2img_prompt textarea").fill("a dog and a cat")
        page.locator("#txt2img_generate").click()
        page.locator("#txt2img_gallery img").first.wait_for(timeout=600_000)
        panel.locator("#script_txt2img_mole_mole_show").click()
        page.locator("#script_txt2img_mole_mole_heat_map svg").first.wait_for(timeout=60_000)
        assert page.locator("#txt2img_gallery img").count() >= 1
        assert page.locator("#script_txt2img_mole_mole_heat_map svg title").count() > 2
        page.screenshot(path=shots / "txt2img.png")
        panel.screenshot(path=shots / "panel.png")
        _open_tab(page)
        page.screenshot(path=shots / "tab.png")


def _fill_panel(page: Any, panel: Any) -> None:
    panel.locator(".label-wrap").first.click()
    page.wait_for_timeout(1500)
    box = panel.locator("#script_txt2img_mole_mole_gates input")
    box.click()
    page.wait_for_timeout(1500)
    box.fill("mole-test")
    page.wait_for_timeout(500)
    box.press("Enter")
    box.press("Tab")
    page.locator("#script_txt2img_mole_mole_fill").click()
    page.wait_for_timeout(2500)
    first = panel.locator("#script_txt2img_mole_mole_expert_0 input")
    assert first.input_value() == A
    for row, region in enumerate(("left half", "right half")):
        box = panel.locator(f"#script_txt2img_mole_mole_region_{row} input")
        box.click()
        box.fill(region)
        page.wait_for_timeout(500)
        box.press("Enter")
        box.press("Tab")
    panel.locator("#script_txt2img_mole_mole_sketch svg").wait_for(timeout=30_000)
    for side in ("width", "height"):
        page.locator(f"#txt2img_{side} input[type=number]").fill("128")
    page.locator("#txt2img_steps input[type=number]").fill("2")


def _open_tab(page: Any) -> None:
    page.get_by_role("tab", name="MoLE", exact=True).or_(
        page.locator("#tabs > .tab-nav button", has_text="MoLE")
    ).first.click()
    page.locator("#mole_train_start").wait_for(timeout=30_000)
    page.get_by_text("Python for training", exact=True).click()
    page.locator("#mole_python_check").click()
    page.locator("#mole_python_status", has_text="is ready").first.wait_for(timeout=180_000)
    page.get_by_text("Train gates", exact=True).click()
