"""Gates files: the same outputs after loading, and refusal of what does not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.networks import (
    CLIP_TEXT,
    lora_state,
    make_clip,
    make_experts,
    make_unet,
    randomise,
    run,
    to_experts,
)
from torch import nn

from mole_diffusion import (
    Expert,
    GateMismatchError,
    Mixture,
    MoLEConfig,
    inject,
    load_gates,
    read_gates_header,
    save_gates,
)
from mole_diffusion.core.checkpoint import FORMAT_VERSION
from mole_diffusion.core.inspection import describe_file

from .test_invariants import FORMS, assert_close, differs, form_id

DATA = Path(__file__).parents[1] / "data"


def both(unet: nn.Module, clip: nn.Module, config: MoLEConfig, count: int = 3) -> dict[str, Mixture]:
    return {
        "unet": inject(unet, make_experts(count, unet), config),
        "text_encoder": inject(clip, make_experts(count, clip), config, flatten_tokens=CLIP_TEXT),
    }


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_saved_and_loaded_gates_give_the_same_outputs(form: MoLEConfig, tmp_path: Path) -> None:
    unet, clip = make_unet(), make_clip()
    mixtures = both(unet, clip, form)
    for mixture in mixtures.values():
        randomise(mixture)
    expected = run(unet), run(clip)
    save_gates(tmp_path / "gates.safetensors", mixtures, metadata={"prompt": "a dog"})
    other = make_unet(), make_clip()
    fresh = both(*other, form)
    assert differs(run(other[0]), expected[0])
    assert load_gates(tmp_path / "gates.safetensors", fresh) == {"prompt": "a dog"}
    assert torch.equal(run(other[0]), expected[0])
    assert torch.equal(run(other[1]), expected[1])
    assert list(tmp_path.iterdir()) == [tmp_path / "gates.safetensors"]


def test_a_host_without_the_text_encoder_reads_the_other_part(
    tmp_path: Path, unet: nn.Module, clip: nn.Module
) -> None:
    mixtures = both(unet, clip, MoLEConfig())
    randomise(mixtures["unet"])
    expected = run(unet)
    save_gates(tmp_path / "gates.safetensors", mixtures)
    for mixture in mixtures.values():
        mixture.eject()
    only = {"unet": inject(unet, make_experts(3, unet), MoLEConfig())}
    with pytest.raises(GateMismatchError, match="part 'text_encoder' is in the file, not here"):
        load_gates(tmp_path / "gates.safetensors", only)
    load_gates(tmp_path / "gates.safetensors", only, parts=["unet"])
    assert torch.equal(run(unet), expected)


def test_a_gate_file_has_the_rights_of_any_new_file(tmp_path: Path, unet: nn.Module) -> None:
    (tmp_path / "any").touch()
    mixture = inject(unet, make_experts(2, unet), MoLEConfig())
    save_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    assert (tmp_path / "gates.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("gate_input", ["experts", "hidden"])
def test_experts_may_stand_in_another_order(gate_input: str, tmp_path: Path, unet: nn.Module) -> None:
    experts = make_experts(3, unet)
    config = MoLEConfig(gate_input=gate_input)
    mixture = inject(unet, experts, config)
    randomise(mixture)
    expected = run(unet)
    save_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    mixture.eject()
    mixture = inject(unet, [experts[i] for i in (1, 2, 0)], config)
    load_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    assert_close(run(unet), expected)


def test_the_header_says_what_the_gates_are_for(tmp_path: Path, unet: nn.Module, clip: nn.Module) -> None:
    mixtures = both(unet, clip, MoLEConfig())
    save_gates(tmp_path / "deep" / "gates.safetensors", mixtures, metadata={"prediction_type": "epsilon"})
    header = read_gates_header(tmp_path / "deep" / "gates.safetensors")
    assert header.version == 2
    assert header.config("unet") == MoLEConfig()
    assert header.expert_names("text_encoder") == ("dog", "cat", "boot")
    assert header.metadata == {"prediction_type": "epsilon"}
    part = header.parts["unet"]
    assert part["base"]["class"] == "UNet2DConditionModel"
    assert part["groups"] == [group.name for group in mixtures["unet"].groups]
    assert part["experts"][2]["ranks"] == [4]
    assert part["experts"][0]["sha256"] == mixtures["unet"].experts[0].sha256
    with pytest.raises(ValueError, match=r"metadata may not use \['format'\]"):
        save_gates(tmp_path / "x.safetensors", mixtures, metadata={"format": "x"})
    with pytest.raises(ValueError, match="no mixtures to save"):
        save_gates(tmp_path / "x.safetensors", {})


def refused(path: Path, mixtures: Mapping[str, Mixture], strict: bool = True) -> list[str]:
    """The differences with which a file is refused; the gates must stay as they were."""
    before = {part: copy.deepcopy(m.gates.state_dict()) for part, m in mixtures.items()}
    with pytest.raises(GateMismatchError, match="do not fit") as caught:
        load_gates(path, mixtures, strict)
    for part, mixture in mixtures.items():
        assert all(torch.equal(v, before[part][k]) for k, v in mixture.gates.state_dict().items())
    return caught.value.differences


def test_gates_that_do_not_fit(tmp_path: Path, unet: nn.Module, clip: nn.Module) -> None:
    path = tmp_path / "gates.safetensors"
    mixtures = both(unet, clip, MoLEConfig())
    for mixture in mixtures.values():
        randomise(mixture)
    save_gates(path, mixtures)
    assert refused(path, {"unet": mixtures["unet"]}) == ["part 'text_encoder' is in the file, not here"]
    for mixture in mixtures.values():
        mixture.eject()

    form = both(unet, clip, MoLEConfig(granularity="layer", pooling="mean"))
    found = refused(path, form)
    assert "unet: granularity is 'block' in the file, 'layer' here" in found
    assert "text_encoder: pooling is 'token' in the file, 'mean' here" in found
    for mixture in form.values():
        mixture.eject()

    experts = make_experts(3, unet)
    renamed = Expert(**{**vars(experts[1]), "name": "lion"})
    one = inject(unet, [experts[0], renamed, experts[2]], MoLEConfig())
    found = refused(path, {"unet": one, "text_encoder": mixtures["text_encoder"]})
    assert found == [
        "unet: expert 'cat' is in the file, not here",
        "unet: expert 'lion' is here, not in the file",
    ]
    one.eject()

    retrained = Expert(**{**vars(experts[1]), "sha256": "f" * 64})
    one = inject(unet, [experts[0], retrained, experts[2]], MoLEConfig())
    fitting = {"unet": one, "text_encoder": mixtures["text_encoder"]}
    [sentence] = refused(path, fitting)
    assert sentence.startswith("unet: expert 'cat' has sha256 ")
    assert sentence.endswith(" in the file, ffffffffffff here")
    load_gates(path, fitting, strict=False)
    one.eject()

    bigger = make_unet(layers=2)
    loras = {name: lora_state(bigger, 2, 1) for name in ("dog", "cat", "boot")}
    two = inject(bigger, to_experts(loras, "unet"), MoLEConfig())
    other = {"unet": two, "text_encoder": mixtures["text_encoder"]}
    assert any("the base network has other matrices" in sentence for sentence in refused(path, other))
    found = refused(path, other, strict=False)
    assert any(
        "group 'down_blocks.0.attentions.1.transformer_blocks.0' is here" in sentence for sentence in found
    )


def test_not_strict_says_what_it_passes_over(
    tmp_path: Path, unet: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts under other names, other files, other ranks, another base: loaded, and told one by one."""
    path = tmp_path / "gates.safetensors"
    experts = make_experts(3, unet)
    mixture = inject(unet, experts, MoLEConfig())
    randomise(mixture)
    expected = run(unet)
    save_gates(path, {"unet": mixture}, metadata={"prediction_type": "epsilon"})
    mixture.eject()

    renamed = Expert(**{**vars(experts[0]), "name": "hund"})
    retrained = Expert(**{**vars(experts[1]), "sha256": "f" * 64})
    one = {"unet": inject(unet, [retrained, renamed, experts[2]], MoLEConfig())}
    facts = {"prediction_type": "v_prediction", "other": "x"}
    assert refused(path, one) == [
        "unet: expert 'dog' is in the file, not here",
        "unet: expert 'hund' is here, not in the file",
        f"unet: expert 'cat' has sha256 {experts[1].sha256[:12]} in the file, ffffffffffff here",
    ]
    with pytest.raises(GateMismatchError, match="base model: prediction_type is 'epsilon' in the file"):
        load_gates(path, one, facts=facts)
    assert not caplog.text
    load_gates(path, one, strict=False, facts=facts)
    assert_close(run(unet), expected)
    assert caplog.messages == [
        f"The gates in {str(path)!r} were loaded with strict=False onto what they were not trained for:"
        "\n  - base model: prediction_type is 'epsilon' in the file, 'v_prediction' here"
        f"\n  - unet: expert 'cat' has sha256 {experts[1].sha256[:12]} in the file, ffffffffffff here"
        "\n  - unet: expert 'dog' of the file is called 'hund' here"
    ]
    one["unet"].eject()
    caplog.clear()

    two = inject(
        unet, [*experts[:2], Expert(**{**vars(experts[2]), "name": "lion", "sha256": "f" * 64})], MoLEConfig()
    )
    assert "unet: expert 'boot' is in the file, not here" in refused(path, {"unet": two}, strict=False)
    assert not caplog.text


def test_compressed_experts_are_others(tmp_path: Path, unet: nn.Module) -> None:
    """`rank=` leaves the file's hash alone and changes what the expert does."""
    state = {f"unet.{k}": v for k, v in lora_state(unet, 4, 1).items()}
    whole, less = (Expert.from_state_dict(state, name="dog", sha256="a", rank=rank) for rank in (None, 2))
    cat = make_experts(2, unet)[1]
    mixture = inject(unet, [whole, cat], MoLEConfig())
    save_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    mixture.eject()
    mixture = inject(unet, [less, cat], MoLEConfig())
    found = refused(tmp_path / "gates.safetensors", {"unet": mixture})
    assert found == ["unet: expert 'dog' has ranks [4] in the file, [2] here"]


def test_the_fingerprint_knows_convolutions(tmp_path: Path, unet: nn.Module) -> None:
    """Two bases whose transformers are alike differ in a residual block."""
    experts = make_experts(2, unet)
    mixture = inject(unet, experts, MoLEConfig())
    save_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    other = make_unet()
    other.conv_in = nn.Conv2d(9, 16, 3, padding=1)
    changed = inject(other, experts, MoLEConfig())
    assert changed.base["shapes"] == mixture.base["shapes"]
    [sentence] = refused(tmp_path / "gates.safetensors", {"unet": changed})
    assert sentence.startswith("unet: the base network has other matrices")
    load_gates(tmp_path / "gates.safetensors", {"unet": changed}, strict=False)


def test_flattened_gates_of_another_resolution(tmp_path: Path, unet: nn.Module) -> None:
    config = MoLEConfig(pooling="flatten")
    mixture = inject(unet, make_experts(2, unet), config)
    save_gates(tmp_path / "gates.safetensors", {"unet": mixture})
    mixture.eject()
    mixture = inject(unet, make_experts(2, unet), config, flatten_tokens=(4, 4))
    found = refused(tmp_path / "gates.safetensors", {"unet": mixture})
    assert len(found) == len(mixture.groups)
    assert "projection: shape (64, 2, 16, 2) in the file, (16, 2, 16, 2) here" in found[0]


def test_files_that_are_no_gate_files(tmp_path: Path, unet: nn.Module) -> None:
    mixtures = {"unet": inject(unet, make_experts(2, unet), MoLEConfig())}
    path = tmp_path / "gates.safetensors"
    with pytest.raises(GateMismatchError, match="cannot be read as a gates file"):
        load_gates(path, mixtures)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(GateMismatchError, match="is not a gates file: its header has no format='mole-gates'"):
        read_gates_header(path)
    save_gates(path, mixtures)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, metadata={**metadata, "format_version": "4"})
    with pytest.raises(GateMismatchError, match="has format_version '4'; this mole_diffusion reads 1 to 3"):
        load_gates(path, mixtures)
    removed = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != removed}, path, metadata=metadata)
    assert refused(path, mixtures) == [f"{removed}: missing in the file"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "header's 'parts': it is no JSON"),
        ("{", "header's 'parts': its brackets are not closed"),
        ("nope", "header's 'parts': it is no JSON"),
        ("[" * 100_000 + "]" * 100_000, "header's 'parts': its brackets are not closed, or nest deeper"),
        ("[]", "header's 'parts' has no object with an entry for each part"),
        ("{}", "header's 'parts' has no object with an entry for each part"),
        ({"unet": []}, "header's 'parts' has no config of 'unet'"),
        ({"unet": {"config": "x"}}, "header's 'parts' has no config of 'unet'"),
        ({"groups": None}, "header's 'parts' has no list of groups of 'unet'"),
        ({"groups": [1]}, "header's 'parts' has no list of groups of 'unet'"),
        ({"base": {}}, "header's 'parts' has no base of 'unet'"),
        ({"base": {"class": "X"}}, "header's 'parts' has no base of 'unet'"),
        ({"base": {"class": "X", "matrices": 3}}, "header's 'parts' has no base of 'unet'"),
        ({"experts": []}, "header's 'parts' has no list of experts of 'unet'"),
        ({"experts": [3]}, "header's 'parts' has no list of experts of 'unet'"),
        ({"experts": [{"name": "dog", "sha256": None, "ranks": []}]}, "no list of experts of 'unet'"),
        ({"experts": [{"name": "dog", "sha256": "a", "ranks": "4"}]}, "no list of experts of 'unet'"),
    ],
)
def test_damaged_headers(tmp_path: Path, unet: nn.Module, parts: object, message: str) -> None:
    mixtures = {"unet": inject(unet, make_experts(2, unet), MoLEConfig())}
    path = tmp_path / "gates.safetensors"
    save_gates(path, mixtures)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    whole = json.loads(metadata.pop("parts"))
    if isinstance(parts, dict):
        parts = json.dumps(parts if "unet" in parts else {"unet": {**whole["unet"], **parts}})
    header = metadata if parts is None else {**metadata, "parts": parts}
    save_file(load_file(path), path, metadata=header)
    for read in (read_gates_header, describe_file, lambda path: load_gates(path, mixtures)):
        with pytest.raises(GateMismatchError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["", "0", "4", "\u00b2", "9" * 5000, "1.0", "x"])
def test_versions_that_are_none(tmp_path: Path, unet: nn.Module, version: str) -> None:
    path = tmp_path / "gates.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "mole-gates", "format_version": version})
    with pytest.raises(GateMismatchError, match=r"has format_version '.*; this mole_diffusion reads 1 to 3"):
        read_gates_header(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gates_that_are_no_numbers(tmp_path: Path, unet: nn.Module, value: float) -> None:
    mixtures = {"unet": inject(unet, make_experts(2, unet), MoLEConfig())}
    path = tmp_path / "gates.safetensors"
    save_gates(path, mixtures)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    bad, whole = sorted(tensors)[:2]
    tensors[bad] = torch.full_like(tensors[bad], value)
    tensors[whole] = tensors[whole].to(torch.int8)
    save_file(tensors, path, metadata=metadata)
    before = mixtures["unet"].gates.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    assert sorted(refused(path, mixtures)) == [
        f"{key}: holds what are no finite numbers" for key in (bad, whole)
    ]
    after = mixtures["unet"].gates.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, unet: nn.Module, monkeypatch) -> None:
    mixtures = {"unet": inject(unet, make_experts(2, unet), MoLEConfig())}
    path = tmp_path / "gates.safetensors"
    save_gates(path, mixtures)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_gates(path, mixtures)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def tiny_mixtures() -> tuple[nn.Module, dict[str, Mixture]]:
    """What the frozen files were made for, by `python -m tests.core.test_checkpoint`."""
    unet = make_unet()
    loras = {"dog": lora_state(unet, 2, 1, ("attn2.to_k",)), "cat": lora_state(unet, 2, 2, ("attn2.to_k",))}
    return unet, {"unet": inject(unet, to_experts(loras, "unet"), MoLEConfig())}


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate_input", ["experts", "own", "hidden"])
def test_gates_keep_what_they_began_with(
    gate_input: str, function: str, tmp_path: Path, unet: nn.Module
) -> None:
    experts = make_experts(3, unet)
    config = MoLEConfig(gate_input=gate_input, gate_function=function)
    mixture = inject(unet, experts, config)
    save_gates(tmp_path / "even.safetensors", {"unet": mixture})
    assert read_gates_header(tmp_path / "even.safetensors").version == 2
    even = run(unet)
    for group in mixture.groups:
        group.gate.begin_with(torch.tensor([0.7, 0.2, 0.1]))
    assert mixture.is_trained
    begun = run(unet)
    for weights in mixture.live_weights().values():
        assert_close(weights.mean(0), torch.tensor([0.7, 0.2, 0.1]))
    assert differs(begun, even)
    save_gates(tmp_path / "begun.safetensors", {"unet": mixture})
    assert read_gates_header(tmp_path / "begun.safetensors").version == 3
    load_gates(tmp_path / "even.safetensors", {"unet": mixture})
    assert torch.equal(run(unet), even)
    mixture.eject()
    mixture = inject(unet, [experts[i] for i in (1, 2, 0)], config)
    load_gates(tmp_path / "begun.safetensors", {"unet": mixture})
    assert_close(mixture.prior, torch.tensor([0.2, 0.1, 0.7]))
    assert_close(run(unet), begun)
    tensors = load_file(tmp_path / "begun.safetensors")
    with safe_open(tmp_path / "begun.safetensors", "pt") as file:
        metadata = file.metadata()
    name = next(key for key in tensors if key.endswith("/prior"))
    save_file({**tensors, name: torch.zeros(2)}, tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(GateMismatchError, match=r"prior: shape \(2,\) in the file, \(3,\) here"):
        load_gates(tmp_path / "damaged.safetensors", {"unet": mixture})
    assert_close(run(unet), begun)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_frozen_files_still_load(version: int, caplog: pytest.LogCaptureFixture) -> None:
    unet, mixtures = tiny_mixtures()
    fresh = run(unet)
    path = DATA / f"gates_v{version}.safetensors"
    # Not strict: another machine's random numbers may give the experts other hashes.
    assert load_gates(path, mixtures, strict=False) == {"prompt": "frozen"}
    assert "base network" not in caplog.text
    header = read_gates_header(path)
    assert header.version == version
    assert header.config("unet") == MoLEConfig(strength=1.6 if version == 3 else 1.5)
    group = mixtures["unet"].groups[0]
    assert group.gate.strength.item() == pytest.approx(1.75)
    assert group.gate.log_temperature.item() == pytest.approx(-0.25)
    assert (mixtures["unet"].prior is not None) is (version == 3)
    assert group.gate.projection[1, 2, 0].item() == pytest.approx((1 * 32 + 2 * 2) / 64)
    assert not torch.equal(run(unet), fresh)


def freeze() -> None:
    """Write the frozen file; to be run once per format version."""
    _, mixtures = tiny_mixtures()
    with torch.no_grad():
        for group in mixtures["unet"].groups:
            group.gate.strength.fill_(1.75)
            group.gate.log_temperature.fill_(-0.25)
            shape = group.gate.projection.shape
            values = torch.arange(group.gate.projection.numel()).view(shape) / 64
            group.gate.projection.copy_(values)
            group.gate.begin_with(torch.tensor([0.75, 0.25]))
    path = DATA / f"gates_v{FORMAT_VERSION}.safetensors"
    save_gates(path, mixtures, metadata={"prompt": "frozen"})


if __name__ == "__main__":
    freeze()
