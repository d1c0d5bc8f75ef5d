"""The app in a real browser: each tab's main path, wrong files, cancel, reload, two visitors, a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from mole_diffusion.app.metadata import read_settings
from mole_diffusion.starter.location import STARTER, shared_gates_of, starter_dir, starter_experts

TABS = ("Compose", "Train", "Inspect", "Compare", "Export", "Models")
# Controls whose name a screen reader would not find.
UNNAMED = """() => [...document.querySelectorAll('input, textarea, select, button, [role=button]')]
  .filter((e) => e.offsetParent !== null && e.type !== 'hidden' && !e.closest('[aria-hidden=true]'))
  .filter((e) => {
    const by = (e.getAttribute('aria-labelledby') || '').split(' ').map((id) => document.getElementById(id));
    const names = [e.getAttribute('aria-label'), e.title, e.innerText, e.placeholder,
      ...[...(e.labels || [])].map((l) => l.innerText), ...by.map((l) => l && l.innerText),
      e.querySelector('img[alt]')?.alt, e.querySelector('svg title')?.textContent];
    return !names.some((name) => name && name.trim());
  })
  .map((e) => e.outerHTML.slice(0, 160))"""


# Names of experts that do not fit their tiles.
CUT = """() => [...document.querySelectorAll('#library .tile-name, #train-experts .tile-name')]
  .filter((e) => e.offsetParent !== null && e.scrollWidth > e.clientWidth).map((e) => e.innerText)"""


def draw(visitor: Any, steps: int = 3) -> None:
    """Draw with few steps and wait for the picture."""
    page = visitor.page
    if not page.locator("#steps").is_visible():
        visitor.unfold("#settings-box")
    visitor.number("#steps", steps)
    before = page.locator("#gallery .thumbnail-item").count()
    page.click("#draw")
    page.wait_for_function(
        "(n) => document.querySelectorAll('#gallery .thumbnail-item').length > n", arg=before
    )


def no_notice(page: Any) -> None:
    """Wait until nothing is said of the gates; while the page asks, Gradio's own unseen words stand there."""
    page.wait_for_function("() => document.querySelector('#gates-notice').innerText.trim() === ''")


def test_compose_draws_keeps_settings_and_takes_a_picture_back(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    page = visitor.page
    page.locator("#beside input").check()
    visitor.unfold("#settings-box")
    visitor.number("#seed", 7)
    page.locator("#mix input[data-tile=clock]").uncheck(force=True)
    draw(visitor)
    page.locator("#picture img").wait_for()
    page.locator("#nla-picture img").wait_for()
    assert page.locator("#gallery .thumbnail-item").count() == 2
    with page.expect_download() as download:
        page.locator("#picture button[aria-label=Download], #picture a[download]").first.click()
    path = tmp_path / "kept.png"
    download.value.save_as(path)
    settings = read_settings(path)
    assert (settings.seed, settings.steps, settings.mixture) == (7, 3, "gates")
    assert {use.name: use.active for use in settings.experts} == {
        "boot": True,
        "monster": True,
        "clock": False,
    }
    visitor.number("#seed", 1)
    page.locator("#prompt textarea").fill("something else")
    page.locator("#drop input[type=file]").set_input_files(path)
    page.wait_for_function("() => document.querySelector('#seed input').value === '7'")
    assert page.locator("#prompt textarea").input_value() == settings.prompt
    assert not page.locator("#mix input[data-tile=clock]").is_checked()


def stroke(page: Any, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Paint on the sheet for regions, from one place to another (shares of its sides)."""
    sheet = page.locator("#canvas canvas")
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()
    spots = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (begin, end)]
    page.mouse.move(*spots[0])
    page.mouse.down()
    page.mouse.move(*spots[1], steps=6)
    page.mouse.up()


def paint(page: Any, x: float, y: float) -> tuple[int, ...]:
    """The colour at a place of the sheet (shares of its sides)."""
    look = "([x, y]) => [...document.querySelector('#canvas canvas').getContext('2d')"
    return tuple(page.evaluate(f"{look}.getImageData(x * 512, y * 512, 1, 1).data]", [x, y]))


def painted(page: Any, x: float, y: float) -> None:
    """Wait for paint at a place of the sheet."""
    page.wait_for_function(
        "([x, y]) => document.querySelector('#canvas canvas').getContext('2d')"
        ".getImageData(x * 512, y * 512, 1, 1).data[3] > 128",
        arg=[x, y],
    )


def test_other_experts_start_without_gates_and_regions_are_kept(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    no_notice(page)
    visitor.unfold("#library-box")
    page.locator("#library input[data-tile=teapot]").check(force=True)
    page.locator("#mix [data-tile=teapot]").wait_for(state="attached")
    page.locator("#gates-notice", has_text="no trained gates yet").wait_for()
    visitor.unfold("#regions-box")
    stroke(page, (0.4, 0.4), (0.55, 0.6))
    draw(visitor, steps=2)
    page.locator("#details dt", has_text="Regions").wait_for()
    assert "boot" in page.locator("#details").inner_text()
    page.locator("#regions-box > button", has_text="on for boot").wait_for()
    page.click("#paint-over")
    painted(page, 0.1, 0.9)  # the picture below
    page.click("#clear-regions")
    page.wait_for_function(
        "() => !document.querySelector('#regions-box > button').innerText.includes('on for')"
    )
    assert paint(page, 0.45, 0.5)[3] == 0
    page.click("#canvas .painter-undo")
    painted(page, 0.45, 0.5)
    page.locator("#regions-box > button", has_text="on for boot").wait_for()


def test_what_is_painted_outlives_a_reload_before_anything_is_drawn(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    no_notice(page)
    visitor.unfold("#regions-box")
    stroke(page, (0.2, 0.3), (0.3, 0.6))
    page.locator("#canvas .painter-chip", has_text="clock").click()
    stroke(page, (0.7, 0.3), (0.8, 0.6))
    page.locator("#regions-box > button", has_text="on for boot, clock").wait_for()
    left, right = paint(page, 0.25, 0.5), paint(page, 0.75, 0.5)
    assert left != right
    visitor.reload()
    page.locator("#regions-box > button", has_text="on for boot, clock").wait_for()
    # The folded sheet is drawn with as it was.
    draw(visitor, steps=2)
    page.locator("#details dd", has_text="boot, clock").last.wait_for()
    # An expert that goes takes none of the others' places, and has its own when it comes back.
    visitor.unfold("#library-box")
    page.locator("#library input[data-tile=boot]").uncheck(force=True)
    page.locator("#regions-box > button", has_text="on for clock").wait_for()
    page.locator("#library input[data-tile=boot]").check(force=True)
    page.locator("#regions-box > button", has_text="on for boot, clock").wait_for()
    visitor.unfold("#regions-box")
    painted(page, 0.25, 0.5)
    assert (paint(page, 0.25, 0.5), paint(page, 0.75, 0.5)) == (left, right)


def test_the_sheet_has_its_experts_and_its_paint_however_early_it_is_opened(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    no_notice(page)
    visitor.unfold("#regions-box")
    stroke(page, (0.2, 0.3), (0.3, 0.6))
    page.locator("#regions-box > button", has_text="on for boot").wait_for()
    for _ in range(6):
        visitor.reload()  # the tiles stand before what fills the page is at its end
        page.locator("#regions-box > button").first.click()
        page.locator("#canvas .painter-chip", has_text="clock").wait_for(timeout=20_000)
        painted(page, 0.25, 0.45)


def test_what_the_server_could_not_be_told_any_more_is_in_the_browser(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    no_notice(page)
    visitor.unfold("#regions-box")
    visitor.unfold("#settings-box")
    waiting: list[Any] = []
    page.route(
        "**/queue/join**", lambda route: waiting.append(route)
    )  # the server is too busy to take anything
    stroke(page, (0.2, 0.3), (0.3, 0.6))
    page.locator("#prompt textarea").fill("a vekka monster alone")
    visitor.number("#seed", 11)
    page.locator("#mix input[data-tile=clock]").uncheck(force=True)
    page.wait_for_function("() => (localStorage.getItem('mole-tiles') || '').includes('\"on\":false')")
    page.wait_for_function("() => (localStorage.getItem('mole-regions') || '').includes('boot')")
    assert waiting
    page.unroute("**/queue/join**")
    visitor.reload()
    page.locator("#regions-box > button", has_text="on for boot").wait_for()
    assert page.locator("#prompt textarea").input_value() == "a vekka monster alone"
    assert not page.locator("#mix input[data-tile=clock]").is_checked()
    visitor.unfold("#settings-box")
    assert page.locator("#seed input").input_value() == "11"
    # Now the server has it: another page of this browser shows it without the storage.
    page.evaluate("localStorage.clear()")
    visitor.reload()
    page.locator("#regions-box > button", has_text="on for boot").wait_for()
    assert page.locator("#prompt textarea").input_value() == "a vekka monster alone"


def test_the_picture_to_begin_from_outlives_a_reload(visit: Any, server: Any) -> None:
    visitor = visit()
    page = visitor.page
    visitor.unfold("#settings-box")
    visitor.unfold("#begin-box")
    page.locator("#begin-from input[type=file]").set_input_files(starter_experts()["boot"].references[0])

    def kept(count: int) -> None:
        while len(list(server.folder.glob("outputs/app/**/begin/*.png"))) != count:
            page.wait_for_timeout(100)

    kept(1)
    visitor.reload()
    draw(visitor, steps=4)
    page.locator("#details dt", has_text="Begun from").wait_for()
    visitor.unfold("#begin-box")
    page.locator("#begin-from img").wait_for()
    page.locator("#begin-from button[aria-label^=Remove]").click()
    kept(0)
    visitor.reload()
    draw(visitor, steps=2)
    page.locator("#details dd", has_text="2, ").wait_for()
    assert "Begun from" not in page.locator("#details").inner_text()


def test_the_page_is_as_it_was_after_a_reload_and_the_prompt_goes_along(visit: Any) -> None:
    visitor = visit()
    page = visitor.page
    visitor.unfold("#settings-box")
    visitor.number("#steps", 2)
    visitor.number("#seed", 5)
    page.locator("#beside input").check()
    page.locator("#prompt textarea").fill("a zorin boot on the beach")
    page.locator("#unnamed", has_text="a vekka monster").wait_for()
    page.locator("#mix input[data-tile=clock]").uncheck(force=True)
    page.click("#insert-phrases")
    wanted = "a vekka monster, a zorin boot on the beach"
    page.wait_for_function("(text) => document.querySelector('#prompt textarea').value === text", arg=wanted)
    page.locator("#prompt textarea").press("Control+Enter")
    pictures = "(n) => document.querySelectorAll('#gallery .thumbnail-item').length === n"
    page.wait_for_function(pictures, arg=2)
    shown = page.locator("#picture img").get_attribute("src")
    page.locator("#gallery .thumbnail-item").first.click()
    page.locator("#details dd", has_text="nla").wait_for()
    page.wait_for_function("(src) => document.querySelector('#picture img').src !== src", arg=shown)
    visitor.reload()
    page.wait_for_function(pictures, arg=2)
    page.locator("#details dd", has_text="nla").wait_for()
    assert page.locator("#prompt textarea").input_value() == wanted
    # The front end shows one part after the other.
    page.locator("#mix input[data-tile=clock]:not(:checked)").wait_for(state="attached")
    page.locator("#beside input:checked").wait_for(state="attached")
    visitor.unfold("#settings-box")
    page.wait_for_function("() => document.querySelector('#seed input').value === '5'")
    visitor.tab("Export")
    page.wait_for_function(
        "(text) => document.querySelector('#export-prompt textarea').value === text", arg=wanted
    )


def test_a_drawing_can_be_cancelled(visit: Any) -> None:
    visitor = visit()
    visitor.unfold("#settings-box")
    visitor.number("#steps", 150)
    visitor.page.click("#draw")
    visitor.page.locator("#draw-progress", has_text=" of 150").wait_for()
    visitor.page.click("#cancel-draw")
    visitor.page.locator("#draw-progress", has_text="Cancelled").wait_for()
    assert visitor.page.locator("#gallery .thumbnail-item").count() == 0


def test_training_survives_a_reload_can_be_cancelled_and_goes_on(visit: Any) -> None:
    visitor = visit()
    page = visitor.tab("Train")
    page.locator("#train-experts input[data-tile=monster]").uncheck(force=True)
    page.wait_for_function(
        "(text) => document.querySelector('#train-prompt textarea').value === text",
        arg="a zorin boot and a kipra clock on the beach",
    )
    visitor.unfold("#train-settings")
    visitor.number("#train-batch", 1)
    page.locator("#backgrounds input").uncheck()
    visitor.number("#iterations", 50)
    page.click("#train")
    page.locator("#curves svg").first.wait_for()
    page.locator("#train-progress", has_text="left").wait_for()
    visitor.reload()
    visitor.tab("Train")
    page.locator("#curves svg").first.wait_for()
    page.locator("#train-progress", has_text="of 50").wait_for()
    page.click("#cancel-train")
    page.locator("#train-progress", has_text="Cancelled").wait_for()
    page.locator("#train-said", has_text="The gates are kept and not in use").wait_for()
    page.wait_for_function("() => !document.querySelector('#resume-train').disabled")
    page.click("#resume-train")
    page.locator("#train-progress", has_text="Done").wait_for(timeout=400_000)
    page.locator("#train-said", has_text="draws boot, clock with these gates now").wait_for()
    assert page.locator("#previews img").count() == 1
    with page.expect_download() as download:
        page.click("#gates-file")
    assert load_file(download.value.path())
    visitor.tab("Compose")
    page.wait_for_function("() => document.querySelectorAll('#mix .tile').length === 2")
    no_notice(page)


def test_inspect_compare_and_export(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    draw(visitor, steps=2)
    page = visitor.tab("Inspect")
    page.locator("#heat img").wait_for()
    page.locator("#expert-maps img").nth(1).wait_for()
    assert "boot" in page.locator("#expert-maps figcaption").first.inner_text()
    page.locator("#over-steps svg").wait_for()
    page.locator("#network label", has_text="Text encoder").click()
    page.locator("#over-steps svg").wait_for(state="detached")
    page.locator("#inspect-upload input[type=file]").set_input_files(starter_experts()["teapot"].path)
    page.locator("#contents", has_text="pelvo teapot").wait_for()
    visitor.tab("Compare")
    for label in ("LoRA-Switch", "LoRA-Composite"):
        page.locator("#methods label", has_text=label).click()
    visitor.unfold("#prepare-box")
    page.locator("#prepare-which label", has_text="SVD merge").click()
    page.click("#prepare")
    page.locator("#methods label", has_text="SVD merge").wait_for()
    visitor.number("#compare-steps", 2)
    page.click("#compare")
    page.wait_for_function("() => document.querySelectorAll('#comparison .thumbnail-item').length === 7")
    visitor.tab("Export")
    visitor.number("#export-steps", 2)
    visitor.number("#export-rank", 4)
    page.click("#export")
    page.locator("#export-report .meter", has_text="Lost by the lower rank").wait_for()
    with page.expect_download() as download:
        page.click("#export-file")
    tensors = load_file(download.value.path())
    assert any(key.startswith("lora_unet_") for key in tensors)


def test_wrong_files_are_refused_and_right_ones_taken(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    page = visitor.tab("Models")
    fake = tmp_path / "fake.safetensors"
    fake.write_text("this is no LoRA")
    page.locator("#lora-upload input[type=file]").set_input_files(fake)
    visitor.message("no safetensors file")
    # The browser itself logs the answer to the upload.
    assert all("415" in problem for problem in visitor.problems)
    visitor.problems.clear()
    gates = starter_dir() / "experts" / "gates.safetensors"
    page.locator("#lora-upload input[type=file]").set_input_files(gates)
    visitor.message("gates")
    page.locator("#lora-upload input[type=file]").set_input_files(starter_experts()["car"].path)
    page.locator("#library-said", has_text="Added: car 2.").wait_for()
    gates = starter_experts()["car"].path
    page.locator("#gates-upload input[type=file]").set_input_files(gates)
    visitor.message("'car.safetensors' is not a gates file")
    page.click("#remove-lora")
    page.locator("#library-said", has_text="Removed: car 2.").wait_for()
    page.locator("#gates-upload input[type=file]").set_input_files(shared_gates_of(STARTER))
    page.locator("#library-said", has_text="These shared gates refine auto").wait_for()
    page.click("#remove-lora")
    page.locator("#library-said", has_text="Removed: (shared gates).").wait_for()
    page.locator("label", has_text="Another model").click()
    page.locator("#model-source textarea, #model-source input").fill(str(tmp_path))
    page.click("#open-model")
    visitor.message("the folder has no model_index.json")
    page.locator("#model-now", has_text="the starter").wait_for()
    visitor.tab("Compose")
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    page.locator("#drop input[type=file]").set_input_files(plain)
    visitor.message("carries no settings")


def test_another_model_is_opened_and_draws_with_a_lora_named_by_its_path(visit: Any) -> None:
    visitor = visit()
    page = visitor.tab("Models")
    page.locator("label", has_text="Another model").click()
    page.locator("#model-source textarea, #model-source input").fill(str(starter_dir()))
    page.click("#open-model")
    page.locator("#model-now", has_text=str(starter_dir())).wait_for()
    page.locator("#lora-source textarea, #lora-source input").fill(str(starter_experts()["wolf"].path))
    page.locator("#lora-name textarea, #lora-name input").fill("grey wolf")
    page.click("#add-lora")
    page.locator("#library-said", has_text="Added: grey wolf").wait_for()
    visitor.tab("Compose")
    page.locator("#prompt textarea").fill("a wolf in the snow")
    page.locator("#mix input[data-tile='grey wolf']").wait_for(state="attached")
    draw(visitor, steps=2)
    assert page.locator("#gallery .thumbnail-item").count() == 1


def test_reference_pictures_and_phrases_of_a_concept(visit: Any) -> None:
    visitor = visit()
    page = visitor.tab("Train")
    visitor.unfold("#concepts-box")
    page.locator("#concept label", has_text="boot").click()
    shown = "(n) => document.querySelectorAll('#references .thumbnail-item').length === n"
    page.wait_for_function(shown, arg=5)
    page.click("#clear-references")
    page.wait_for_function(shown, arg=0)
    page.locator("#reference-upload input[type=file]").set_input_files(
        starter_experts()["boot"].references[:2]
    )
    page.wait_for_function(shown, arg=2)
    page.locator("#concept-class textarea, #concept-class input").fill("a red boot")
    page.click("#save-concept")
    page.locator("#concept label", has_text="clock").click()
    page.wait_for_function(shown, arg=5)
    page.locator("#concept label", has_text="boot").click()
    page.wait_for_function(shown, arg=2)
    assert page.locator("#concept-class textarea, #concept-class input").input_value() == "a red boot"


def test_the_concept_that_is_chosen_last_is_shown_however_late_the_one_before_comes(visit: Any) -> None:
    visitor = visit()
    page = visitor.tab("Train")
    visitor.unfold("#concepts-box")
    phrase = page.locator("#concept-text textarea, #concept-text input")
    page.locator("#concept label", has_text="boot").click()
    page.wait_for_function("() => document.querySelectorAll('#references .thumbnail-item').length === 5")
    kept, held = phrase.input_value(), []

    def hold(route: Any) -> None:
        is_shown = route.request.post_data_json["data"] == ["boot"]
        held.append(route) if is_shown and not held else route.continue_()

    page.route("**/queue/join*", hold)
    page.click("#save-concept")
    while not held:
        page.wait_for_timeout(20)
    page.locator("#concept label", has_text="clock").click()
    page.wait_for_timeout(500)
    held[0].continue_()
    page.wait_for_timeout(1500)
    assert "clock" in phrase.input_value() != kept
    assert page.locator("#concept input:checked").input_value() == "clock"


def test_two_visitors_do_not_see_each_others_experts(visit: Any) -> None:
    first, second = visit(), visit()
    first.tab("Models")
    first.page.locator("#lora-upload input[type=file]").set_input_files(starter_experts()["dog"].path)
    first.page.locator("#library-said", has_text="Added: dog 2.").wait_for()
    first.reload()
    assert first.page.locator("#mix input[data-tile='dog 2']").count() == 1
    second.reload()
    assert second.page.locator("#mix input[data-tile='dog 2']").count() == 0
    assert second.page.locator("#library input[data-tile='dog 2']").count() == 0


@pytest.mark.parametrize(("width", "dark"), [(390, True), pytest.param(1440, False, marks=pytest.mark.slow)])
def test_every_tab_fits_and_every_control_has_a_name(visit: Any, width: int, dark: bool) -> None:
    visitor = visit(width=width, height=844, dark=dark)
    for name in TABS:
        page = visitor.tab(name)
        folds = page.locator(".tabitem:visible .label-wrap:not(.open)")
        while folds.count():
            folds.first.click()
        page.wait_for_timeout(500)
        wide = page.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, f"{name} is {wide} pixels too wide"
        assert page.evaluate(UNNAMED) == [], name
        assert page.evaluate(CUT) == [], name
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    channels = [int(part) for part in ground[ground.index("(") + 1 : -1].split(",")[:3]]
    assert (sum(channels) < 150) == dark
