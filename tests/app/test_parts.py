"""The parts of the app below its pages: queue, settings of pictures, uploads, regions, sessions, curves."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from app_tools import blocked
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file

from mole_diffusion.app import browser, charts, page, regions, tiles
from mole_diffusion.app.composing import ComposeRequest, compose
from mole_diffusion.app.folders import loras_in
from mole_diffusion.app.infotext import read_infotext
from mole_diffusion.app.jobs import Job, QueueFullError, Worker, duration
from mole_diffusion.app.library import add_file, add_gates, add_source
from mole_diffusion.app.maps import maps_html, overlay
from mole_diffusion.app.metadata import (
    KEY,
    ExpertUse,
    PictureSettings,
    mask_from_text,
    mask_to_text,
    read_settings,
    save_picture,
)
from mole_diffusion.app.session import MAX_EXPERTS, Picture, Session
from mole_diffusion.app.setup import Gates
from mole_diffusion.app.show import progress_bar
from mole_diffusion.app.studio import Studio
from mole_diffusion.app.tabs.compose import ComposeTab
from mole_diffusion.app.tabs.models import preview_of
from mole_diffusion.app.tabs.train import TrainTab
from mole_diffusion.app.teaching import TeachRequest, teach
from mole_diffusion.app.uploads import check_upload
from mole_diffusion.core.errors import ConfigError, ExpertLoadError, GateMismatchError, UnknownExpertError
from mole_diffusion.core.experts import load_expert
from mole_diffusion.starter.location import starter_dir, starter_experts


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(length=2)
    yield made
    made.close()


def test_jobs_run_in_turn_and_the_queue_has_an_end(worker: Worker) -> None:
    first, go = blocked()
    worker.submit(first)
    seen = iter(first.watch())
    while next(seen).progress.done != 1:
        pass
    second, third = Job("a", lambda job: 1), Job("b", lambda job: 2)
    worker.submit(second)
    worker.submit(third)
    assert [worker.position(job) for job in (first, second, third)] == [0, 1, 2]
    with pytest.raises(QueueFullError, match="2 pieces of work are waiting already"):
        worker.submit(Job("c", lambda job: 3))
    second.cancel()
    assert second.state == "cancelled"
    fourth = worker.submit(Job("d", lambda job: 4))
    go.set()
    assert fourth.wait(10).result == 4
    assert (first.result, second.result, third.result) == ("awake", None, 2)


def test_a_running_job_stops_when_asked_and_errors_are_kept(worker: Worker) -> None:
    job, _ = blocked()
    worker.submit(job)
    assert "width: 25" in next(progress_bar(j) for j in job.watch() if j.progress.done)
    job.cancel()
    assert job.wait(10).state == "cancelled"

    def fail(job: Job) -> None:
        raise ConfigError("<b>no</b>")

    failed = worker.submit(Job("fail", fail)).wait(10)
    assert failed.state == "failed"
    assert "&lt;b&gt;no" in progress_bar(failed)
    assert [duration(s) for s in (3.2, 65, 3700)] == ["3 s", "1 min 05 s", "1 h 01 min"]


def settings() -> PictureSettings:
    return PictureSettings(
        prompt="a zorin boot",
        seed=3,
        experts=(
            ExpertUse(name="boot", sha256="ab", strength=0.5),
            ExpertUse(name="cat", sha256="cd", active=False),
        ),
        regions={"boot": mask_to_text(Image.new("L", (8, 8), 255))},
    )


def test_a_picture_carries_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    save_picture(Image.new("RGB", (16, 16)), path, settings())
    assert read_settings(path) == settings()
    assert np.asarray(mask_from_text(read_settings(path).regions["boot"])).min() == 255
    with Image.open(path) as picture:
        assert 'MoLE experts: "boot 0.5"' in picture.info["parameters"]
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


A1111 = (
    'a zorin boot, <lora:boot:0.8> on the "beach"\nin the sun\nNegative prompt: rain,\nfog\n'
    "Steps: 12, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 77, Size: 516x512, Model hash: 6ce0161689,"
    ' Model: v1-5, Lora hashes: "boot: 3e4f, cat: 12", Version: v1.10.1'
)


def test_a_picture_of_a_web_ui_is_read(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", A1111)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    found = read_settings(tmp_path / "a.png")
    assert found.prompt == 'a zorin boot, on the "beach"\nin the sun'
    assert found.negative == "rain,\nfog"
    assert (found.steps, found.guidance, found.seed, found.sampler) == (12, 6.5, 77, "DPM++ 2M")
    assert (found.width, found.height, found.model) == (512, 512, "v1-5")
    assert [(use.name, use.strength) for use in found.experts] == [("boot", 0.8)]
    own = PictureSettings(
        prompt="p, q",
        negative="n",
        experts=(ExpertUse(name="a, b", sha256="", lora_hash="12"),),
        sampled="DDIM",
    )
    again = PictureSettings.from_infotext(own.summary())
    assert (again.prompt, again.negative, again.sampler, again.steps) == ("p, q", "n", "DDIM", 25)
    assert read_infotext(own.summary()).parameters["MoLE experts"] == "a, b 1"
    for text in ("no parameters", "Steps: many, Seed: 1", "Steps: 5, Seed: 9999999999999", ""):
        with pytest.raises(ConfigError):
            PictureSettings.from_infotext(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "carries no settings"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 1, "experts": [], "prompt": ["x"]}', "prompt is"),
        ('{"format_version": 1, "experts": [], "prompt": "x", "seed": "1"}', "seed is"),
        ('{"format_version": 1, "experts": [], "prompt": "x", "more": 1}', "cannot be read"),
        ('{"format_version": 2, "experts": [], "prompt": "x"}', "format_version 2"),
    ],
)
def test_pictures_from_elsewhere_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text(KEY, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ConfigError, match=message):
        read_settings(tmp_path / "a.png")


def test_uploads_are_judged_by_their_content(tmp_path: Path) -> None:
    assert check_upload(starter_experts()["boot"].path) == "safetensors"
    assert check_upload(starter_experts()["boot"].references[0]) == "picture"
    gif = tmp_path / "moving.png"
    Image.new("RGB", (4, 4)).save(gif, format="GIF")
    with pytest.raises(ConfigError, match="is a GIF picture"):
        check_upload(gif)
    large = tmp_path / "large.png"
    Image.new("1", (9000, 9000)).save(large)
    with pytest.raises(ConfigError, match="81 megapixels"):
        check_upload(large)
    for name in ("a.html", "a.ckpt", "a"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ConfigError, match="is not taken"):
            check_upload(tmp_path / name)


def test_paint_becomes_masks_and_back(tmp_path: Path) -> None:
    session = Session(tmp_path)
    masks = {name: Image.new("L", (64, 64)) for name in ("boot", "clock", "stranger", "monster")}
    masks["boot"].paste(255, (0, 0, 32, 64))
    masks["clock"].paste(255, (40, 0, 64, 64))
    masks["stranger"].paste(255, (0, 0, 64, 64))
    masks["monster"].putpixel((3, 3), 255)
    sent = [{"name": name, "mask": mask_to_text(mask)} for name, mask in masks.items()]
    kept = regions.kept(sent)
    assert regions.painted(kept) == sent
    found = regions.masks_of(session, kept)
    assert list(found) == ["boot", "clock"], "of chosen experts, and no slips of the brush"
    for name, mask in found.items():
        small = mask.resize((64, 64), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(small), np.asarray(masks[name]))
    assert regions.kept(None) == {}
    assert regions.masks_of(session, None) == {}


def test_the_sheet_sends_masks_or_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900), dtype=np.uint8)
    (text,) = regions.kept([{"name": "boot", "mask": mask_to_text(Image.fromarray(noise))}]).values()
    assert len(text) < 128 * 2**10, "what is kept is small, whatever comes"
    wrong: list[Any] = [
        "text",
        [1],
        [{"name": "boot"}],
        [{"name": 1, "mask": text}],
        [{"name": "boot", "mask": "no picture"}],
        [{"name": str(i), "mask": text} for i in range(100)],
    ]
    for value in wrong:
        with pytest.raises(ConfigError):
            regions.kept(value)


def test_the_browser_counts_only_where_it_is_newer_and_of_this_session(tmp_path: Path) -> None:
    session = Session(tmp_path / "a")

    def brought(mark: str, stamp: Any, held: Any) -> str:
        return json.dumps([{"mark": mark, "stamp": stamp, "held": held}, None])

    mark, held = browser.mark_of(session), {"prompt": "newer"}
    assert browser.newer(session, "page", 0, brought(mark, 20, held)) == held
    session.set_page(stamps=browser.stamps(session, "page", 20))
    assert browser.newer(session, "page", 0, brought(mark, 20, held)) == {}
    assert browser.newer(session, "page", 0, brought(mark, 21, held)) == held
    assert browser.newer(session, "regions", 1, brought(mark, 21, held)) == {}
    assert (
        browser.newer(session, "page", 0, brought(browser.mark_of(Session(tmp_path / "b")), 99, held)) == {}
    )
    session.use_model("another")
    assert browser.newer(session, "page", 0, brought(mark, 99, held)) == {}
    mark = browser.mark_of(session)
    for text in (None, "", "[", "7", "[[]]", "[" * 9999, brought(mark, "x", held), brought(mark, 99, 7)):
        assert browser.newer(session, "page", 0, text) == {}


def test_a_session_knows_its_experts(tmp_path: Path) -> None:
    session = Session(tmp_path / "s")
    assert session.chosen == ("boot", "monster", "clock")
    assert session.gates() == Gates(starter_dir() / "experts" / "gates.safetensors")
    session.choose(["clock", "boot"])
    assert session.chosen == ("boot", "clock")
    assert session.gates() is None
    with pytest.raises(UnknownExpertError, match="Did you mean 'boot'"):
        session.choose(["boott"])
    with pytest.raises(ConfigError, match=f"at most {MAX_EXPERTS}"):
        session.choose(list(session.library)[: MAX_EXPERTS + 1])
    shown = tiles.mixing_tiles(session, [{"name": "boot", "on": False, "strength": "0.50"}])
    assert [(tile["name"], tile["on"], tile["strength"]) for tile in shown] == [
        ("boot", False, "0.50"),
        ("clock", True, "1.00"),
    ]
    with pytest.raises(ConfigError, match="strength of 'boot' is 9"):
        tiles.read([{"name": "boot", "on": True, "strength": 9}])
    assert tiles.read([{"name": "boot", "on": True, "strength": 0}])[0]["strength"] == 0.0
    session.set_page(tiles=tiles.read(shown))
    session.choose(["clock"])
    session.choose(["boot", "clock"])
    assert [tile["on"] for tile in tiles.mixing_tiles(session, session.page["tiles"])] == [True, True]
    session.close()
    assert not (tmp_path / "s").exists()


def test_a_session_is_there_again_after_the_server_ended(tmp_path: Path) -> None:
    first = Studio(tmp_path, device="cpu")
    session = first.session("visitor")
    card = add_file(first, session, starter_experts()["cat"].path)
    session.describe("boot", text="a big boot", references=())
    gates = session.keep_file(starter_dir() / "experts" / "gates.safetensors", "gates")
    session.choose(["boot", card.name])
    session.set_gates(session.cards, Gates(gates, 3, 5))
    session.set_page(prompt="two things")
    for seed in (1, 2):
        path = session.new_path("picture", ".png")
        settings = PictureSettings(prompt="p", seed=seed)
        save_picture(Image.new("RGB", (8, 8)), path, settings)
        session.keep(Picture(path, settings))
    first.close()
    again = Studio(tmp_path, device="cpu")
    found = again.session("visitor")
    assert found is not session
    assert (found.library, found.chosen, found.page) == (session.library, session.chosen, session.page)
    assert found.gates() == Gates(gates, 3, 5)
    assert found.pictures == session.pictures
    assert [picture.settings.seed for picture in found.pictures] == [2, 1]
    assert again.session("another").pictures == []
    (session.folder / "session.json").write_text("{")
    again.close()
    third = Studio(tmp_path, device="cpu")
    assert third.session("visitor").chosen == ("boot", "monster", "clock")
    third.close()


def test_what_users_bring_is_copied_and_checked(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("library")
    card = add_file(studio, session, starter_experts()["cat"].path)
    assert (card.name, card.text, card.class_text) == ("cat 2", "a fenna cat", "a cat")
    assert session.folder in card.path.parents
    assert "cat 2" in session.chosen
    gates = starter_dir() / "experts" / "gates.safetensors"
    assert add_gates(session, gates) == ("boot", "monster", "clock")
    assert session.chosen == ("boot", "monster", "clock")
    with pytest.raises(GateMismatchError, match="not a gates file"):
        add_gates(session, card.path)
    with pytest.raises(ExpertLoadError):
        add_file(studio, session, gates)
    session.remove("cat 2")
    assert not card.path.exists()
    with pytest.raises(UnknownExpertError):
        session.remove("boot")


def test_an_expert_is_trained_on_pictures(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("teacher")
    pictures = starter_experts()["cat"].references[:2]
    request = TeachRequest(pictures=pictures, text="a qix cat", steps=1)
    job = studio.submit(session, "teach", teach(studio, session, request)).wait(300)
    assert job.error is None, job.error
    card = session.library["qix-cat"]
    assert (job.result, card.text, card.class_text) == (card, "a qix cat", "a cat")
    assert load_expert(card.path).triggers == ("a qix cat",)
    assert len(card.references) == 2
    assert "qix-cat" in session.chosen
    for wrong in ({"pictures": ()}, {"text": "cat"}, {"steps": 0}):
        with pytest.raises(ConfigError):
            TeachRequest(**{"pictures": pictures, "text": "a qix cat", "steps": 1, **wrong})


def test_a_folder_of_loras_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with safe_open(starter_experts()["cat"].path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    save_file(tensors, tmp_path / "deep" / "xl.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    save_file(tensors, tmp_path / "Plain.safetensors")
    Image.new("RGB", (2000, 1000)).save(tmp_path / "Plain.png")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = loras_in(tmp_path)
    assert [lora.label for lora in found] == [
        "broken · cannot be read",
        "deep/xl · Stable Diffusion XL",
        "Plain",
    ]
    assert [lora.preview is not None for lora in found] == [True, False, True]
    # A broken picture takes nothing from the others.
    assert [picture.size for lora in found if (picture := preview_of(lora))] == [(256, 256)]
    with pytest.raises(ConfigError, match="there is no folder"):
        loras_in(tmp_path / "none")


def test_a_tab_that_is_shown_while_experts_are_chosen_holds_no_old_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The browser sends both events with the prompt from before; they run at the same time."""
    session, choose = Session(tmp_path), page.choose
    old = page.carried(session, "train", "")
    tab = object.__new__(TrainTab)
    tab.studio = SimpleNamespace(session=lambda key: session)
    asked = SimpleNamespace(cookies={}, session_hash="x")

    def meanwhile(*given: Any) -> str:
        prompt = choose(*given)
        tab.refresh([], old, None, asked)
        return prompt

    monkeypatch.setattr(page, "choose", meanwhile)
    shown = tiles.library_tiles(session)
    for tile in shown:
        tile["on"] = tile["name"] in ("boot", "clock")
    _, prompt, *_ = tab.choose(shown, old, None, asked)
    assert prompt == "a zorin boot and a kipra clock on the beach"
    _, prompt, *_ = tab.choose(shown, "my own", None, asked)
    assert prompt == "my own"


def test_a_page_that_is_loading_is_filled_by_its_load_alone(tmp_path: Path) -> None:
    """The tab that is shown first is refreshed too, with a page that holds nothing yet."""
    session = Session(tmp_path)
    kept = tiles.mixing_tiles(session, [])
    kept[2]["on"] = False
    session.set_page(tiles=kept)
    tab = ComposeTab(SimpleNamespace(session=lambda key: session))

    async def built() -> None:  # Gradio makes loops of its own, and leaves them open, where none runs
        with gr.Blocks() as demo:
            tab.build(demo)

    asyncio.run(built())
    handler, inputs, outputs = tab.refreshed
    asked = SimpleNamespace(cookies={}, session_hash="x")
    told = dict.fromkeys(inputs) | {tab.prompt: "", tab.mix: [], tab.mark: ""}
    assert handler(*told.values(), asked) == [gr.skip()] * len(outputs)
    filled = tab.restore("", asked)
    told |= {tab.mix: kept, tab.mark: filled[-1]}
    assert dict(zip(outputs, handler(*told.values(), asked), strict=True))[tab.mark] == filled[-1] != ""


def test_the_prompt_follows_the_experts_unless_the_user_wrote_one(tmp_path: Path) -> None:
    session = Session(tmp_path)
    first = page.controls(session)["prompt"]
    assert first == "a zorin boot, a vekka monster and a kipra clock on the beach"
    assert page.carried(session, "train", "") == first
    assert page.choose(session, ("boot", "cat"), first) == "a zorin boot and a fenna cat on the beach"
    assert page.carried(session, "train", first) == "a zorin boot and a fenna cat on the beach"
    assert page.carried(session, "export", "my own") == "my own"
    assert page.is_own(session, "export", "my own")
    assert not page.is_own(session, "train", "")
    assert page.choose(session, ("boot", "clock"), "a Boot at night") == "a Boot at night"
    missing = page.missing_phrases(session, "a ZORIN boot at night")
    assert missing == {"clock": "a kipra clock"}
    assert page.missing_phrases(session, "a boot", ("boot",)) == {"boot": "a zorin boot"}
    assert (
        page.with_phrases(", at night", ["a zorin boot", "a kipra clock"])
        == "a zorin boot and a kipra clock, at night"
    )
    assert page.controls(session)["guidance"] == 2.0
    session.use_model("owner/other")
    assert page.controls(session)["guidance"] == 7.5
    session.set_page(steps="many", seed=3)
    assert (page.controls(session)["steps"], page.controls(session)["seed"]) == (25, 3)


def test_several_pictures_another_sampler_and_from_a_picture(studio: Studio) -> None:
    session = studio.session("several")
    request = ComposeRequest(prompt="a zorin boot", steps=2, seed=2**32 - 1, count=2, sampler="Euler")
    job = studio.submit(session, "compose", compose(studio, session, request)).wait(300)
    assert job.error is None, job.error
    first, second = (picture.settings for picture in job.result)
    assert (first.seed, second.seed) == (2**32 - 1, 0)
    assert (first.sampler, first.sampled) == ("Euler", "Euler")
    assert first.experts[0].lora_hash
    with Image.open(job.result[0].path) as begin:
        begun = ComposeRequest(prompt="a zorin boot", steps=2, image=begin.convert("RGB"), denoising=0.5)
    job = studio.submit(session, "compose", compose(studio, session, begun)).wait(300)
    assert job.error is None, job.error
    assert job.result[0].settings.image_sha256
    assert job.result[0].settings.sampled == "DDIM"
    for wrong in ({"count": 0}, {"sampler": "x"}, {"image": begun.image, "denoising": 0.1}):
        with pytest.raises(ConfigError):
            ComposeRequest(prompt="p", steps=2, **wrong)


def test_a_picture_shows_where_each_expert_acts(studio: Studio) -> None:
    session = studio.session("maps")
    left = Image.new("L", (128, 128))
    left.paste(255, (0, 0, 64, 128))
    request = ComposeRequest(prompt="a zorin boot and a kipra clock", steps=2, regions={"boot": left})
    session.choose(["boot", "clock"])
    job = studio.submit(session, "compose", compose(studio, session, request)).wait(300)
    assert job.error is None, job.error
    assert list(session.maps) == ["boot", "clock"]
    assert session.maps_of is job.result[0]
    half = session.maps["boot"].shape[1] // 2
    assert (
        float(session.maps["boot"][:, half + 1 :].max()) < 0.02 < float(session.maps["boot"][:, :half].max())
    )
    picture = Image.new("RGB", (64, 64), (90, 90, 90))
    shown = np.asarray(overlay(picture, session.maps["boot"], "#ff0000", 1.0)).astype(int)
    assert shown[:, :20, 0].mean() > shown[:, :20, 1].mean() + 40
    assert abs(shown[:, 50:] - 90).max() < 12
    page_part = str(maps_html(picture, {"<b>": session.maps["boot"]}, {"<b>": "#ff0000"}))
    assert "&lt;b&gt;" in page_part
    assert "<b>:" not in page_part


def test_a_folder_is_copied_with_what_lies_beside_the_file(studio: Studio, tmp_path: Path) -> None:
    session = studio.session("folders")
    folder = tmp_path / "tom"
    folder.mkdir()
    shutil.copy(starter_experts()["cat"].path, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    card = add_source(studio, session, str(folder))
    assert card.name == "tom"
    assert session.folder in card.path.parents
    assert load_expert(card.path).sha256 == load_expert(folder).sha256
    file = add_source(studio, session, str(folder / "adapter_model.safetensors"), "tim")
    assert load_expert(file.path).sha256 == load_expert(folder).sha256
    shutil.rmtree(folder)
    assert load_expert(card.path).metadata["adapter_config.json"]
    for name in ("tom", "tim"):
        session.remove(name)
    assert not card.path.exists()
    assert not file.path.exists()


def test_nothing_is_added_to_a_library_that_is_about_to_go(studio: Studio) -> None:
    session = studio.session("opening")
    opening, go = blocked("open")
    session.enter(studio.worker.submit(opening))
    before = dict(session.library)
    for add in (
        lambda: add_file(studio, session, starter_experts()["cat"].path),
        lambda: add_gates(session, starter_dir() / "experts" / "gates.safetensors"),
    ):
        with pytest.raises(ConfigError, match="another base model is being opened"):
            add()
    assert session.library == before
    go.set()
    opening.wait(120)
    assert add_file(studio, session, starter_experts()["cat"].path).name == "cat 2"


def test_sessions_share_the_base_and_nothing_else(studio: Studio) -> None:
    request = ComposeRequest(prompt="a zorin boot and a fenna cat", steps=2)
    alone, other = studio.session("one"), studio.session("two")
    alone.choose(["boot", "cat"])
    other.choose(["teapot"])

    def draw(session: Session, mixture: str = "gates") -> torch.Tensor:
        job = studio.submit(session, "compose", compose(studio, session, request, [mixture])).wait(120)
        assert job.state == "done", job.error
        with Image.open(job.result[0].path) as picture:
            return torch.from_numpy(np.array(picture))

    first, base = draw(alone), draw(alone, "none")
    assert not torch.equal(first, base)
    assert torch.equal(draw(other, "none"), base)
    draw(other)
    assert torch.equal(draw(alone), first)
    assert len(alone.pictures) == 3
    assert len(other.pictures) == 2
    assert not studio.base("starter").mixtures
    assert {path.parent for path in (picture.path for picture in other.pictures)} == {
        other.folder / "picture"
    }


def test_strangers_cannot_name_paths(tmp_path: Path) -> None:
    closed = Studio(tmp_path / "closed", device="cpu", trusted=False)
    try:
        assert closed.check_source("starter") == "starter"
        with pytest.raises(ConfigError, match="switched off"):
            closed.check_source("/etc")
    finally:
        closed.close()


def test_curves_are_pictures_with_a_text() -> None:
    drawn = charts.curves("Loss <x>", {"a&b": ("#123456", [1.0, float("nan"), 0.5])}, 10, level=("even", 0.7))
    assert drawn.count("<polyline") == 1
    assert "Loss &lt;x&gt;" in drawn
    assert "a&amp;b" in drawn
    assert charts.curves("empty", {}, 10) == ""
    assert charts.smoothed([1.0, 0.0], weight=0.5) == [1.0, 0.5]
