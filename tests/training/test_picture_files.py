"""Picture files, and telling pictures apart."""

import io
from pathlib import Path

import pytest
from PIL import Image

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.pictures.files import open_picture, pictures_digest, pictures_in, read_pictures


def test_every_kind_of_picture_is_read_as_rgb(tmp_path: Path) -> None:
    for mode, name in (("RGBA", "c.png"), ("L", "b.JPG"), ("P", "d.webp"), ("CMYK", "a.jpeg")):
        Image.new(mode, (5, 3)).convert("RGB" if name == "d.webp" else mode).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("none")
    assert [path.name for path in pictures_in(tmp_path)] == ["a.jpeg", "b.JPG", "c.png", "d.webp"]
    assert {(picture.mode, picture.size) for picture in read_pictures(tmp_path)} == {("RGB", (5, 3))}
    assert read_pictures(tmp_path / "nowhere") == []


def cut_short() -> bytes:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    return whole.getvalue()[:900]


@pytest.mark.parametrize("content", [b"", b"no picture", cut_short()], ids=["empty", "text", "cut"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "boot.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"boot\.png' cannot be read as a picture: "):
        open_picture(path)
    with pytest.raises(ConfigError, match=r"boot\.png"):
        read_pictures(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.png"):
        open_picture(tmp_path / "none.png")


def test_digests_tell_pictures_sizes_and_captions_apart() -> None:
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")
    tall = Image.frombytes("RGB", (2, 4), red.tobytes())
    digests = [
        pictures_digest([red]),
        pictures_digest([blue]),
        pictures_digest([tall]),
        pictures_digest([red, blue]),
        pictures_digest([blue, red]),
        pictures_digest([red], ["a boot"]),
        pictures_digest([red], ["a shoe"]),
    ]
    assert len(set(digests)) == len(digests)
    assert pictures_digest([red.copy()], ["a boot"]) == digests[5]
