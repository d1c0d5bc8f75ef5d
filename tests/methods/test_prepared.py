"""What `prepare` writes, what it says it was made for, and that nothing of it stays on the pipeline."""

import json
from typing import Any

import pytest
import torch

from mole_diffusion import MoLEConfig
from mole_diffusion.core.errors import ConfigError, GateMismatchError, NoExpertsError
from mole_diffusion.methods import METHODS, PrepareOptions, load_prepared, prepare

PROMPT = "a zorin boot a vim cat a kipra clock"
QUICK = ("gates", "svd", "ties", "dare_linear")


def train_a_little(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mixture in pipe.mixtures.values():
            for parameter in mixture.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)


def hooks_of(pipe: Any) -> int:
    networks = (pipe.unet, pipe.text_encoder)
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for network in networks for m in network.modules()
    )


@pytest.mark.parametrize("method", QUICK)
def test_the_pipeline_is_as_before(pipe, draw, concepts, tiny, method) -> None:
    train_a_little(pipe)
    before, hooks = draw(pipe), hooks_of(pipe)
    state = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    prepared = prepare(method, pipe, PROMPT, concepts, tiny())
    assert hooks_of(pipe) == hooks
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)
    with_it = draw(pipe, mixture=prepared)
    assert (with_it - before).abs().max() > 1e-3
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        draw(pipe, mixture=prepared, callback_on_step_end=fail)
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)
    torch.testing.assert_close(draw(pipe, mixture=prepared), with_it, rtol=0, atol=0)
    assert hooks_of(pipe) == hooks
    assert all(torch.equal(value, state[key]) for key, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].needs_preparation])
def test_words_can_be_prepared_too(pipe, draw, method, tmp_path) -> None:
    prepared = prepare(method, pipe, folder=tmp_path)
    assert (prepared.method, prepared.label) == (method, METHODS[method].label)
    assert prepared.unet_passes == {"with_gradient": 0, "without_gradient": 0}
    torch.testing.assert_close(
        draw(pipe, mixture=load_prepared(tmp_path)), draw(pipe, mixture=method), rtol=0, atol=0
    )


def test_prepared_gates_are_those_that_training_gives(pipe, draw, concepts, tiny, tmp_path) -> None:
    train_a_little(pipe)
    prepared = prepare("gates", pipe, PROMPT, concepts, tiny(), tmp_path)
    found = draw(pipe, mixture=prepared)
    masked = draw(pipe, mixture=prepared, active_experts=["cat"])
    pipe.configure(pipe.mole_config)  # fresh gates
    result = pipe.train_gates(PROMPT, concepts=concepts, config=tiny())
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=0)
    torch.testing.assert_close(masked, draw(pipe, active_experts=["cat"]), rtol=0, atol=0)
    assert prepared.unet_passes == {name: result.passes[name] for name in prepared.unet_passes}
    assert prepared.unet_passes["with_gradient"] == 3
    assert prepared.seconds > 0
    assert prepared.expert_names == ["boot", "cat", "clock"]


def test_prepared_gates_may_be_of_another_form(pipe, draw, concepts, tiny, tmp_path) -> None:
    own = pipe.mole_config
    pipe.configure(MoLEConfig(granularity="layer", pooling="mean"))
    prepared = prepare("gates", pipe, PROMPT, concepts, tiny(), tmp_path)
    expected = draw(pipe, mixture=prepared)
    pipe.configure(own)
    torch.testing.assert_close(draw(pipe, mixture=load_prepared(tmp_path)), expected, rtol=0, atol=0)
    assert pipe.mole_config == own


def test_a_finished_preparation_is_not_done_again(pipe, concepts, tiny, tmp_path) -> None:
    prepare("gates", pipe, PROMPT, concepts, tiny(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = prepare("gates", pipe, PROMPT, concepts, tiny(progress=False, checkpoint_every=1), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert again.unet_passes["with_gradient"] == 3


def test_an_unfinished_training_goes_on(pipe, draw, concepts, tiny, tmp_path) -> None:
    whole = prepare("gates", pipe, PROMPT, concepts, tiny(), tmp_path / "whole")
    half = tmp_path / "half"
    pipe.configure(pipe.mole_config)
    pipe.train_gates(
        PROMPT, concepts=concepts, config=tiny(), checkpoint_dir=half, callback=lambda event: False
    )
    with pytest.raises(ConfigError, match=r"no prepared baseline in .*half"):
        load_prepared(half)
    resumed = prepare("gates", pipe, PROMPT, concepts, tiny(), half)
    torch.testing.assert_close(draw(pipe, mixture=resumed), draw(pipe, mixture=whole), rtol=0, atol=0)
    assert resumed.unet_passes == whole.unet_passes


def test_a_folder_of_another_preparation_is_refused(pipe, concepts, tiny, tmp_path) -> None:
    prepare("gates", pipe, PROMPT, concepts, tiny(), tmp_path)
    with pytest.raises(ConfigError, match=r"holds another preparation(.|\n)*seed"):
        prepare("gates", pipe, PROMPT, concepts, tiny(seed=1), tmp_path)
    with pytest.raises(ConfigError, match="holds another preparation"):
        prepare("svd", pipe, folder=tmp_path)


def test_other_experts_and_another_base_are_refused(pipe, draw, tmp_path, lora_files) -> None:
    prepared = prepare("svd", pipe, folder=tmp_path)
    draw(pipe, mixture=prepared)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("to_q.weight"):
                parameter.mul_(1.5)
    with pytest.raises(GateMismatchError, match="unet: other weights"):
        draw(pipe, mixture=prepared)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("to_q.weight"):
                parameter.div_(1.5)
    draw(pipe, mixture=prepared)
    pipe.unload_expert("clock")
    with pytest.raises(GateMismatchError, match=r"experts: boot .*clock .* there, boot"):
        draw(pipe, mixture=prepared)


def test_the_order_of_the_experts_does_not_matter(pipe, draw, concepts, tiny, lora_files) -> None:
    prepared = prepare("gates", pipe, PROMPT, concepts, tiny(iterations=8))
    expected = draw(pipe, mixture=prepared)
    pipe.eject()
    for name in ("clock", "boot", "cat"):
        pipe.load_expert(lora_files[name], name=name)
    torch.testing.assert_close(
        draw(pipe, mixture=load_prepared(prepared.folder)), expected, rtol=0, atol=2e-4
    )


def test_the_same_base_in_half_precision_is_accepted_and_drawn_with(pipe, draw, tmp_path) -> None:
    prepared = prepare("svd", pipe, folder=tmp_path)
    pipe.to(torch.bfloat16)
    with_merge, base = draw(pipe, mixture=prepared), draw(pipe, mixture="none")
    assert with_merge.isfinite().all()
    assert (with_merge - base).abs().max() > 0.05


def test_methods_and_needs(pipe, empty, tiny) -> None:
    with pytest.raises(ConfigError, match="method is 'magic'"):
        prepare("magic", pipe)
    with pytest.raises(ConfigError, match="trained for prompts"):
        prepare("gates", pipe, concepts={n: f"a {n}" for n in ("boot", "cat", "clock")}, config=tiny())
    pipe.eject()
    with pytest.raises(NoExpertsError):
        prepare("svd", pipe)


def test_files_that_are_something_else(tmp_path) -> None:
    (tmp_path / "prepared.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a prepared baseline"):
        load_prepared(tmp_path)
    (tmp_path / "prepared.json").write_text(json.dumps({"format": "mole-baseline", "format_version": 99}))
    with pytest.raises(ConfigError, match="format_version 99"):
        load_prepared(tmp_path)
    with pytest.raises(ConfigError, match="weights gives 'a' inf"):
        PrepareOptions(weights={"a": float("inf")})
