"""`fuse_qkv_projections()` of a pipeline, before or after its experts are loaded: the same pictures."""

import torch
from pipeline_helpers import CLOSE, train_a_little


def test_fusing_and_parting_change_no_picture(loaded, plain, draw) -> None:
    base = draw(plain)
    train_a_little(loaded)
    expected = draw(loaded)
    assert (expected - base).abs().max() > 0.05
    loaded.fuse_qkv_projections(vae=False)
    torch.testing.assert_close(draw(loaded), expected, **CLOSE)
    torch.testing.assert_close(draw(loaded, mixture="none"), base, **CLOSE)
    loaded.unfuse_qkv_projections(vae=False)
    torch.testing.assert_close(draw(loaded), expected, rtol=0, atol=0)
    loaded.eject()
    torch.testing.assert_close(draw(loaded), base, rtol=0, atol=0)


def test_experts_of_a_pipeline_that_is_fused_already(loaded, pipe, plain, draw, lora_files) -> None:
    expected = draw(loaded, mixture="la")
    other = type(pipe)(**{name: getattr(plain, name) for name in pipe.components})
    other.set_progress_bar_config(disable=True)
    other.fuse_qkv_projections(vae=False)
    for name, path in lora_files.items():
        other.load_expert(path, name=name)
    torch.testing.assert_close(draw(other, mixture="la"), expected, **CLOSE)
    assert (draw(other) - draw(other, mixture="none")).abs().max() > 0.05
