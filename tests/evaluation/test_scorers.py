"""The scoring networks on pictures of which the answer is known."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from mole_diffusion import ConfigError
from mole_diffusion.evaluation.pictures.scorers import ClipScorer, DinoScorer, JudgeScorer, load_clip
from mole_diffusion.pictures.training import Concept
from mole_diffusion.starter import starter_experts
from mole_diffusion.starter.location import EVALUATION_VARIABLE, evaluation_part
from tools.starter import world as starter_world

CPU = torch.device("cpu")


def picture_of(*things: tuple[str, str]) -> Image.Image:
    """A scene of the starter's world: (class, style) from left to right."""
    chosen = [starter_world.Thing(kind, style) for kind, style in things]
    scene = starter_world.draw_scene(chosen, "beach", np.random.default_rng(7))
    return Image.fromarray(scene.pixels)


def opened(path: Path) -> Image.Image:
    """The picture of a file, which is closed again."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def concepts(world: Path, *names: str) -> dict[str, Concept]:
    """Concepts with the tiny world's reference pictures."""
    return {
        name: Concept(
            name, f"a zorin {name}", f"a {name}", [opened(p) for p in sorted((world / name).glob("*.png"))]
        )
        for name in names
    }


def test_the_judge_tells_the_subject_from_its_class_and_from_nothing(world: Path) -> None:
    subject = starter_world.SUBJECT_STYLE
    pictures = [
        picture_of(("boot", subject), ("cat", "noto")),
        picture_of(("car", "noto"), ("clock", subject)),
    ]
    first, second = JudgeScorer()(pictures, {}, concepts(world, "boot", "cat", "clock"))
    assert first["present"] == {"boot": 1, "cat": 0, "clock": 0}
    assert first["confused"] == {"boot": 0, "cat": 1, "clock": 0}
    assert first["omitted"] == {"boot": 0, "cat": 0, "clock": 1}
    assert second["present"] == {"boot": 0, "cat": 0, "clock": 1}
    assert (first["others"], second["others"]) == (0, 1)  # nobody asked for the car


def test_the_judge_says_nothing_of_subjects_it_does_not_know(world: Path) -> None:
    other = {"marble": Concept("marble", "a zorin marble", "a marble")}
    row = JudgeScorer()([picture_of(("boot", "noto"), ("car", "noto"))], {}, other)[0]
    assert row == {"present": {}, "confused": {}, "omitted": {}, "others": 2}


def test_the_judge_is_asked_for_styles_and_never_counts_them_as_things(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = JudgeScorer()
    monkeypatch.setattr(
        type(scorer._judge), "__call__", lambda self, pictures: [{"boot", "style:neon"}, {"boot", "car"}]
    )
    asked = {**concepts(world, "boot"), "neon": Concept("neon", "in glaro style", "")}
    first, second = scorer([picture_of(("boot", "noto"))] * 2, {}, asked)
    assert (first["styled"], second["styled"]) == ({"neon": 1}, {"neon": 0})
    assert (first["confused"], first["others"], second["others"]) == ({"boot": 1}, 0, 1)


def test_clip_scores_are_those_of_open_clip_itself(world: Path) -> None:
    name = f"local-dir:{world / 'clip_score'}"
    known = concepts(world, "boot", "cat")
    pictures = [opened(world / "clock" / "4.png"), opened(world / "boot" / "10.png")]
    captions = {"text": "a boot and a cat", "described": "a glossy 3d boot and a cat"}
    rows = ClipScorer(name, CPU)(pictures, captions, known)
    model, preprocess = open_clip.create_model_from_pretrained(name)
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(list(captions.values())), normalize=True)
        cats = model.encode_image(
            torch.stack([preprocess(p) for p in known["cat"].references]), normalize=True
        )
    for row, features in zip(rows, image, strict=True):
        assert row["text"] == pytest.approx(float(features @ text[0]), abs=1e-5)
        assert row["described"] == pytest.approx(float(features @ text[1]), abs=1e-5)
        assert row["image"]["cat"] == pytest.approx(float((cats @ features).mean()), abs=1e-5)
        assert row["crop"]["cat"] >= row["image"]["cat"] - 1e-6
    # It is itself one of the references of the boot.
    assert rows[1]["image"]["boot"] > rows[0]["image"]["boot"]


@pytest.mark.parametrize("kinds", [("cat", "wolf", "can"), ("backpack", "bowl", "teapot")])
def test_descriptions_tell_subjects_from_their_classes(kinds: tuple[str, ...]) -> None:
    known = starter_experts()
    template = "{}, {} and {} on the beach"
    captions = {
        "text": template.format(*(known[kind].class_text for kind in kinds)),
        "described": template.format(*(known[kind].description for kind in kinds)),
    }
    styles = (starter_world.SUBJECT_STYLE, *starter_world.FLAT_STYLES)
    pictures = [picture_of(*((kind, style) for kind in kinds)) for style in styles]
    subjects, *flat = ClipScorer("starter", CPU, crops=False)(pictures, captions, {})
    assert subjects["described"] > max(row["described"] for row in flat) + 0.05
    # Class words do not: they tell less than descriptions do.
    gain = {name: subjects[name] - max(row[name] for row in flat) for name in captions}
    assert gain["text"] < gain["described"] - 0.03


def test_a_second_clip_and_no_crops_change_the_names_of_the_measures(world: Path) -> None:
    scorer = ClipScorer(f"local-dir:{world / 'clip_score'}", CPU, suffix="_2", crops=False)
    assert scorer.measures == ("text_2", "described_2", "image_2")
    row = scorer([opened(world / "clock" / "4.png")], {"text": "a boot"}, concepts(world, "boot"))[0]
    assert set(row) == {"text_2", "image_2"}


def test_the_best_crop_finds_a_subject_in_a_corner(world: Path) -> None:
    reference = opened(world / "boot" / "4.png")
    cornered = Image.new("RGB", (80, 80), (250, 250, 250))
    cornered.paste(reference.resize((36, 36)), (0, 44))
    known = {"boot": Concept("boot", "a zorin boot", "a boot", [reference])}
    row = ClipScorer(f"local-dir:{world / 'clip_score'}", CPU)([cornered], {"text": "a boot"}, known)[0]
    # 36 of 80 pixels are the smaller crop, in the lower left corner.
    assert row["crop"]["boot"] > 0.98 > row["image"]["boot"]


def test_dino_scores_with_any_model_of_timm(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    save_for_hf(model, tmp_path, model_args=size)
    known = concepts(world, "boot", "cat")
    scorer = DinoScorer(f"local-dir:{tmp_path}", CPU)
    itself = opened(world / "boot" / "4.png")
    row = scorer([itself], {}, {"boot": Concept("boot", "a zorin boot", "a boot", [itself])})[0]
    assert row["dino"]["boot"] == pytest.approx(1, abs=1e-5)
    row = scorer([itself], {}, known)[0]
    assert set(row) == {"dino", "dino_crop"}
    assert row["dino"]["boot"] > row["dino"]["cat"]
    with pytest.raises(ConfigError, match="dino is 'vit_of_nobody', which timm cannot load"):
        DinoScorer("vit_of_nobody", CPU)


def test_an_unknown_clip_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="clip is 'ViT-of-nobody', which open_clip cannot load"):
        ClipScorer("ViT-of-nobody", CPU)


def test_parts_that_a_wheel_leaves_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (evaluation_part("judge") / "model.safetensors").is_file()
    monkeypatch.setenv(EVALUATION_VARIABLE, str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"clip_eval'.*repository or the source distribution, and set MOLE_"
    ):
        load_clip("starter", torch.device("cpu"))
    (tmp_path / "judge").mkdir()
    assert evaluation_part("judge") == tmp_path / "judge"
