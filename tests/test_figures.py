"""Figures are checked by what is in them: axes, labels and pixels, not by comparing files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.heat_map import heat_map, short_group_name
from mole_diffusion.core.records import GateRecord, GateWeights, in_order
from mole_diffusion.pictures.grid import GridRow, picture_grid
from mole_diffusion.training.charts import entropy_curve
from mole_diffusion.training.heat_map import gate_heat_map

NAMES = ["boot", "cat", "clock"]


def record(network: str, group: str, weights: dict[str, float]) -> GateRecord:
    row = torch.tensor([list(weights.values())])
    return GateRecord(network, group, 0, "prompt", (0,), tuple(weights), row)


def test_means_are_over_steps_and_keep_the_order_of_gates_and_names() -> None:
    weights = GateWeights(
        [
            record("text_encoder", "layer", {"cat": 1.0}),
            record("unet", "late", dict(zip(NAMES, [1.0, 0.0, 0.0], strict=True))),
            record("unet", "early", dict(zip(NAMES, [0.2, 0.3, 0.5], strict=True))),
            record("unet", "late", dict(zip(NAMES, [0.0, 0.5, 0.5], strict=True))),
        ]
    )

    means = in_order(weights.means(), ["clock", "boot", "cat"])

    assert list(means) == ["text_encoder", "unet"]
    assert list(means["unet"]) == ["late", "early"]
    np.testing.assert_allclose(means["unet"]["late"], [0.25, 0.5, 0.25])
    np.testing.assert_allclose(means["unet"]["early"], [0.5, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(means["text_encoder"]["layer"], [0.0, 0.0, 1.0])


def test_means_of_an_expert_without_a_place_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"expert 'dog' has weights but is not among \['boot', 'cat', 'clock'\]"
    ):
        in_order({"unet": {"g": {"dog": 1.0}}}, NAMES)


def test_a_heat_map_has_one_panel_per_network_with_experts_as_rows() -> None:
    column = np.array([0.1, 0.2, 0.7])
    weights = {
        "unet": {f"down_blocks.{i}.attentions.0.transformer_blocks.0": column for i in range(3)},
        "text_encoder": {"encoder.layers.0": np.array([0.4, 0.4, 0.2])},
    }
    shown = heat_map(weights, NAMES, {"unet": "UNet"})
    unet, text = shown.panels
    assert (unet.title, text.title) == (
        "UNet: 3 gates, first to last",
        "text encoder: 1 gates, first to last",
    )
    assert unet.labels == ("down 0.0.0", "down 1.0.0", "down 2.0.0")
    np.testing.assert_allclose(unet.rows, [[0.1] * 3, [0.2] * 3, [0.7] * 3])
    assert shown.experts == tuple(NAMES)
    assert shown.top == 0.7
    assert (shown.colour(0.0), shown.colour(0.7)) == ((68, 1, 84), (253, 231, 37))
    assert shown.is_light(0.7)
    assert not shown.is_light(0.1)


@pytest.mark.parametrize("ground", ["paper", "glass"])
def test_a_drawn_heat_map_has_a_cell_of_the_right_colour_for_each_weight(ground: str) -> None:
    """Names, values and all: wide columns for few gates, narrow ones for many."""
    for count in (2, 48, 160):
        weights = {"unet": {f"mid_block.{i}": np.array([0.5, 0.25, 0.0]) for i in range(count)}}
        shown = heat_map(weights, NAMES)
        drawn = gate_heat_map(weights, NAMES, **({} if ground == "paper" else {"paper": (0, 0, 0, 0)}))
        assert drawn.mode == ("RGB" if ground == "paper" else "RGBA")
        pixels = np.asarray(drawn)[..., :3]
        found = [(pixels == shown.colour(weight)).all(-1).sum() for weight in (0.5, 0.25, 0.0)]
        assert min(found) > 0.5 * 28 * max(4, min(32, 34 * 48 // count - 2)) * count
        assert drawn.width < 2200


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no gate weights"),
        ({"unet": {}}, "no gate weights"),
        ({"unet": {"g": np.array([0.5, 0.5])}}, r"weights\['unet'\]\['g'\]: 2 for 3 experts"),
    ],
)
def test_heat_map_refuses(weights: dict[str, dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gate_heat_map(weights, NAMES)


def test_figures_can_be_written(tmp_path) -> None:
    gate_heat_map({"unet": {"a": np.array([0.2, 0.3, 0.5])}}, NAMES).save(tmp_path / "map.png")
    entropy_curve([0, 50], [1.09, 0.4], 3).savefig(tmp_path / "curve.png")
    for name in ("map.png", "curve.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_entropy_curve_shows_the_values_and_the_uniform_level() -> None:
    axes = entropy_curve([1, 2, 3], [1.0, 0.9, 0.5], 3).axes[0]
    level, curve = axes.lines
    np.testing.assert_allclose(level.get_ydata(), math.log(3))
    np.testing.assert_allclose(curve.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(curve.get_ydata(), [1.0, 0.9, 0.5])
    assert axes.get_ylim()[1] > math.log(3)


@pytest.mark.parametrize(("iterations", "entropies"), [([], []), ([1, 2], [0.5])])
def test_entropy_curve_refuses(iterations: list[int], entropies: list[float]) -> None:
    with pytest.raises(ConfigError, match=f"{len(entropies)} values for {len(iterations)} iterations"):
        entropy_curve(iterations, entropies, 3)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0", "down 0.1.0"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2", "mid 0.0 attn2"),
        ("encoder.layers.3", "encoder 3"),
        ("network", "network"),
    ],
)
def test_short_group_name(name: str, short: str) -> None:
    assert short_group_name(name) == short


def test_picture_grid_shows_every_picture_at_its_place_and_labels_at_the_left() -> None:
    red, blue, green = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime"))
    rows = [
        GridRow("first row", [red, blue], note="what it means", captions=["seed 0", "seed 1"]),
        GridRow("second", [green]),
    ]

    sheet = picture_grid(rows, title="two rows", cell=64)

    left, gap = int(64 * 1.15), 4
    assert sheet.width == left + 2 * (64 + gap) + gap
    pixels = np.asarray(sheet)
    places = {}
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}.items():
        rows_seen, columns_seen = np.nonzero((pixels == colour).all(axis=-1))
        assert len(rows_seen) == 64 * 64
        places[name] = (columns_seen.min(), rows_seen.min())
    assert places["red"][0] == places["green"][0] == left
    assert places["blue"] == (left + 64 + gap, places["red"][1])
    assert places["green"][1] == places["red"][1] + 64 + gap
    above = sheet.crop((left, places["red"][1] - 8, left + 64, places["red"][1])).convert("L")
    assert np.asarray(above).min() < 200  # the caption
    label = sheet.crop((0, places["red"][1], left, places["red"][1] + 64)).convert("L")
    assert np.asarray(label).min() < 100


def test_picture_grid_keeps_the_aspect_of_a_wide_picture() -> None:
    wide = Image.new("RGB", (48, 24), "red")
    sheet = np.asarray(picture_grid([GridRow("wide", [wide])], cell=64)).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 50)
    assert red.any(axis=0).sum() == 64
    assert red.any(axis=1).sum() == 32


def test_picture_grid_wraps_long_labels_instead_of_writing_over_pictures() -> None:
    white = Image.new("RGB", (8, 8), "white")
    label = "a label with far more words than fit in one line"
    sheet = picture_grid([GridRow(label, [white])], cell=128)
    pictures = np.asarray(sheet.crop((int(128 * 1.15), 0, *sheet.size)))
    assert (pictures == 255).all()


def test_picture_grid_shortens_captions_that_would_run_into_the_next() -> None:
    pictures = [Image.new("RGB", (8, 8), "white")] * 2

    def sheet(caption: str) -> np.ndarray:
        return np.asarray(picture_grid([GridRow("", pictures, captions=[caption, ""])], cell=128))

    changed = np.nonzero((sheet("a caption with far more words than fit") != sheet("")).any(axis=(0, 2)))[0]
    left = int(128 * 1.15)
    assert left <= changed[0]
    assert left + 64 < changed[-1] <= left + 128


def test_picture_grid_refuses_no_pictures_and_a_wrong_number_of_captions() -> None:
    with pytest.raises(ConfigError, match="no pictures"):
        picture_grid([GridRow("empty", [])])
    with pytest.raises(ConfigError, match="row 'two': 1 captions for 2 pictures"):
        picture_grid([GridRow("two", [Image.new("L", (8, 8))] * 2, captions=["one"])])
