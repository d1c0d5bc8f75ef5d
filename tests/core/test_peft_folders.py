"""Folders written by PEFT and diffusers act as they do there: each setting is used, told or refused."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny.families import make_text, run_part
from tiny.networks import make_clip, make_unet, run
from tiny.transformers import KINDS
from torch import Tensor, nn

from mole_diffusion import Expert, ExpertLoadError, MoLEConfig, inject, load_expert
from mole_diffusion.core.inspection import describe_file
from mole_diffusion.core.peft_folder import expert_facts, expert_sha256, is_adapter_folder, own_name

TARGETS = ["attn1.to_q", "attn2.to_v", "ff.net.2", "proj_in", "conv1", "downsamplers.0.conv"]
LINEAR = ["attn1.to_q", "attn2.to_v", "ff.net.2"]


def trained(network: nn.Module, config: Any, seed: int = 0) -> PeftModel:
    """A network with an adapter that was trained, as it were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on convolutions and biases
        model = get_peft_model(copy.deepcopy(network), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(model: PeftModel, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def reloaded(network: nn.Module, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on patterns that match nothing
        return PeftModel.from_pretrained(copy.deepcopy(network), folder).eval()


def alone(network: nn.Module, expert: Expert) -> Tensor:
    mixture = inject(network, [expert], MoLEConfig())
    output = run(network)
    mixture.eject()
    return output


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with other settings in its adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


FORMS = {
    "alpha 8 r": LoraConfig(r=2, lora_alpha=16, target_modules=TARGETS),
    "default alpha": LoraConfig(r=4, target_modules=TARGETS),
    "fraction of alpha": LoraConfig(r=3, lora_alpha=2.5, target_modules=TARGETS),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=TARGETS,
        rank_pattern={"attn1.to_q": 4, r"^down_blocks.*conv1": 3},
        alpha_pattern={r"up_blocks\.\d+\..*attn1.to_q": 12, "to_q": 7, "^conv1": 99, "resnets.0.conv1": 5},
    ),
    "patterns and rsLoRA": LoraConfig(
        r=2,
        lora_alpha=2,
        use_rslora=True,
        target_modules=LINEAR,
        rank_pattern={"to_q": 4},
        alpha_pattern={"to_v": 9},
    ),
    "DoRA": LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=LINEAR),
    "bias of the up factor": LoraConfig(
        r=2, lora_alpha=6, lora_bias=True, target_modules=["ff.net.2", "conv1"]
    ),
    "orthogonal start": LoraConfig(r=2, lora_alpha=6, init_lora_weights="orthogonal", target_modules=LINEAR),
    "LoHa": LoHaConfig(r=2, alpha=5, target_modules=TARGETS, alpha_pattern={"conv1": 3}),
    "LoHa with cores": LoHaConfig(r=2, alpha=5, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=TARGETS),
    "LoKr with cores": LoKrConfig(r=2, alpha=5, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr of whole factors": LoKrConfig(
        r=64, alpha=16, target_modules=TARGETS, rank_pattern={"to_q": 32}, alpha_pattern={"to_v": 24}
    ),
    "LoKr, both split": LoKrConfig(
        r=1, alpha=3, target_modules=LINEAR, decompose_both=True, decompose_factor=4
    ),
}


@pytest.mark.parametrize(
    ("form", "kind"),
    [*((form, ".safetensors") for form in FORMS), *((form, ".bin") for form in ("patterns", "DoRA", "LoKr"))],
)
def test_strength_is_that_of_peft(form: str, kind: str, tmp_path: Path, unet: UNet2DConditionModel) -> None:
    model = trained(unet, copy.deepcopy(FORMS[form]))
    folder = saved(model, tmp_path / "dog", safe_serialization=kind == ".safetensors")
    assert (folder / f"adapter_model{kind}").is_file()
    expert = load_expert(folder)
    assert expert.name == "dog"
    assert not expert.report.ignored
    assert not expert.report.notes
    assert set(expert.report.alphas) == {"adapter_config.json"}
    # As PEFT reads it: it sorts patterns when it writes them, and the first that fits counts.
    found, expected = alone(unet, expert), run(reloaded(unet, folder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - run(unet)).abs().max() > 1e-2
    # The file alone finds what lies beside it.
    same = load_expert(folder / f"adapter_model{kind}")
    assert (same.name, same.sha256) == ("dog", expert.sha256)


def test_text_encoders_by_their_folders(tmp_path: Path) -> None:
    """What only a folder's name says: which of two text encoders."""
    networks = {"text_encoder": make_text(False), "text_encoder_2": make_text(True), "unet": make_unet()}
    models = {}
    for seed, (part, network) in enumerate(networks.items()):
        targets = ["to_q"] if part == "unet" else ["q_proj", "fc1"]
        config = LoraConfig(r=2, lora_alpha=4 + seed, target_modules=targets, alpha_pattern={"fc1": 11})
        models[part] = trained(network, config, seed)
        saved(models[part], tmp_path / "dog" / part)
    expert = load_expert(tmp_path / "dog")
    assert expert.name == "dog"
    assert set(expert.factors) == set(networks)
    assert set(expert.report.alphas) == {f"{part}/adapter_config.json" for part in networks}
    for part, network in networks.items():
        mixture = inject(network, [expert], MoLEConfig(), part=part)
        found = run(network) if part == "unet" else run_part(part, network)
        mixture.eject()
        expected = run(models[part]) if part == "unet" else run_part(part, models[part].get_base_model())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    second = load_expert(tmp_path / "dog" / "text_encoder_2")
    assert (second.name, set(second.factors)) == ("dog", {"text_encoder_2"})
    file = load_expert(tmp_path / "dog" / "text_encoder_2" / "adapter_model.safetensors")
    assert (file.name, file.sha256) == ("dog", second.sha256)


def test_folders_of_diffusers_networks(tmp_path: Path) -> None:
    """`save_lora_adapter` writes keys and settings without any network's name."""
    networks = {"unet": make_unet(), "text_encoder": make_clip()}
    unet = networks["unet"]
    expected = {}
    for alpha, (part, network) in enumerate(networks.items(), 5):
        model = trained(network, LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "q_proj"]))
        expected[part] = run(model.get_base_model())
        state = {
            key.removeprefix("base_model.model."): value
            for key, value in load_file(saved(model, tmp_path / "peft") / "adapter_model.safetensors").items()
        }
        (tmp_path / "dog" / part).mkdir(parents=True)
        header = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": alpha})}
        header = header if part == "unet" else {"lora_alpha": str(alpha), "format": "pt"}
        save_file(state, tmp_path / "dog" / part / "pytorch_lora_weights.safetensors", metadata=header)
    expert = load_expert(tmp_path / "dog")
    assert expert.name == "dog"
    torch.testing.assert_close(alone(unet, expert), expected["unet"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        alone(networks["text_encoder"], expert), expected["text_encoder"], rtol=1e-4, atol=1e-5
    )


def test_diffusers_own_save_lora_adapter(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    network = copy.deepcopy(unet)
    network.add_adapter(LoraConfig(r=2, lora_alpha=10, target_modules=["to_q"], init_lora_weights=False))
    expected = run(network)
    network.save_lora_adapter(tmp_path / "dog", adapter_name="default")
    expert = load_expert(tmp_path / "dog" / "pytorch_lora_weights.safetensors")
    assert expert.report.alphas == {"header's lora_adapter_metadata": len(expert.factors["unet"])}
    torch.testing.assert_close(alone(unet, expert), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_base(start: str, tmp_path: Path, unet: UNet2DConditionModel) -> None:
    """Refused as they are; PEFT's own conversion acts as PEFT with the base that it changed."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(unet), config).eval()
    model.peft_config["default"].init_lora_weights = True
    saved(model, tmp_path / "first")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = run(model)
    with pytest.raises(
        ExpertLoadError, match=rf"adapter_config.json: init_lora_weights='{start}' is not read"
    ):
        load_expert(saved(model, tmp_path / "raw"))
    converted = saved(
        model, tmp_path / "dog", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    torch.testing.assert_close(alone(unet, load_expert(converted)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "OFT"}, "peft_type='OFT' is not read; allowed: LORA, LOHA, LOKR"),
        ({"bias": "all"}, "bias='all' is not read: the file holds whole biases"),
        ({"use_qalora": True}, "use_qalora=True is not read"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is not read"),
        ({"layer_replication": [[0, 4], [2, 5]]}, r"layer_replication=.* is not read: the base's layers are"),
        ({"target_parameters": ["x"]}, "target_parameters=.* is not read"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config=.* is not read"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is not read"),
        ({"lora_alpha": "x"}, "lora_alpha='x' is not a finite number"),
        ({"lora_alpha": [1]}, r"lora_alpha=\[1\] is not a finite number"),
        ({"lora_alpha": True}, "lora_alpha=True is not a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a finite number"),
        ({"lora_alpha": 1e300}, r"lora_alpha=1e\+300 is not a finite number"),
        ({"r": 0, "lora_alpha": 1}, "r=0 is not allowed"),
        ({"use_rslora": "perhaps"}, "use_rslora='perhaps' is not allowed; choose true or false"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] is no table of names"),
        ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern of 'to_q'='x' is not a finite number"),
        ({"alpha_pattern": {"to_q": float("inf")}}, "alpha_pattern of 'to_q'=inf is not a finite number"),
        ({"alpha_pattern": {"to_(q": 1}}, r"alpha_pattern has 'to_\(q', which is no pattern of names"),
        ({"alpha_pattern": {"(a+)+": 1}}, r"alpha_pattern has '\(a\+\)\+', which is no pattern of names"),
        ({"alpha_pattern": {"a*a*a*a*b": 1}}, r"has 'a\*a\*a\*a\*b', which is no pattern"),
        ({"rank_pattern": {"to_q": "x"}}, "rank_pattern of 'to_q'='x' is not a finite number"),
        ({"use_dora": True}, r"use_dora is set, and this matrix has no magnitude"),
        ({"lora_bias": True}, r"lora_bias is set, and this matrix has no up_bias"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, unet: UNet2DConditionModel
) -> None:
    folder = saved(trained(unet, LoraConfig(r=2, target_modules=LINEAR)), tmp_path / "dog")
    with pytest.raises(ExpertLoadError, match=message) as caught:
        load_expert(edited(folder, **changes))
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_are_told(
    tmp_path: Path, unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole modules, and what no PEFT of today knows, are not used; the rest is."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR, modules_to_save=["conv_in"])
    folder = saved(trained(unet, config), tmp_path / "dog")
    edited(folder, something_new=3, alpha_pattern={"to_q": None}, r=4)
    with caplog.at_level(logging.WARNING, "mole_diffusion"):
        expert = load_expert(folder)
    assert {factors.scaling for factors in expert.factors["unet"].values()} == {3.0}
    assert set(expert.report.ignored) == {"base_model.model.conv_in.weight", "base_model.model.conv_in.bias"}
    text = "\n".join(expert.report.notes)
    assert (
        "adapter_config.json: modules_to_save=['conv_in']: whole modules of the base are no differences"
        in text
    )
    assert "adapter_config.json: something_new=3 is not known here and not used" in text
    count = len(expert.factors["unet"])
    assert f"names r=4, and the factors of {count} matrices have another ('base_model.model." in text
    for note in expert.report.notes:
        assert note in caplog.text
        assert note in expert.report.summary()


def test_inspection_of_a_folder(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    folder = saved(trained(unet, LoraConfig(r=2, lora_alpha=6, target_modules=LINEAR)), tmp_path / "dog")
    found = describe_file(folder)
    assert found.facts["alpha"] == "adapter_config.json"
    assert found.to_dict()["alphas"] == {"adapter_config.json": len(LINEAR) * 4}
    assert {matrix["alpha"] for matrix in found.to_dict()["networks"]["unet"].values()} == {6.0}
    assert any(line.startswith("adapter_config.json: {") for line in found.sections["header"])


def test_tensors_win_over_settings(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    folder = saved(trained(unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"])), tmp_path / "dog")
    state = load_file(folder / "adapter_model.safetensors")
    module = next(iter(state)).split(".lora_")[0]
    save_file(state | {f"{module}.alpha": torch.tensor(1.0)}, folder / "adapter_model.safetensors")
    expert = load_expert(folder)
    assert sorted({factors.scaling for factors in expert.factors["unet"].values()}) == [0.5, 3.0]
    count = len(expert.factors["unet"])
    assert expert.report.alphas == {"tensors": 1, "adapter_config.json": count - 1}


def test_without_its_settings_a_file_says_so(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    folder = saved(trained(unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"])), tmp_path / "dog")
    (folder / "adapter_config.json").unlink()
    expert = load_expert(folder)
    assert {factors.scaling for factors in expert.factors["unet"].values()} == {1.0}
    assert expert.report.notes == (
        "PEFT's alpha stands in adapter_config.json, which was not found beside the file, so alpha is r",
    )


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 5000 + b"]" * 5000, b""])
def test_settings_that_are_no_json(text: bytes, tmp_path: Path, unet: UNet2DConditionModel) -> None:
    folder = saved(trained(unet, LoraConfig(r=2, target_modules=["to_q"])), tmp_path / "dog")
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(ExpertLoadError, match=r"dog/adapter_config.json': it"):
        load_expert(folder)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_pickled_files_run_nothing(
    tmp_path: Path, unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    bad: dict[str, Any] = {
        "code": {**pair, "evil": Evil()},
        "list": [torch.ones(2)],
        "number": {**pair, "step": 3},
        "sparse": {**pair, "x": torch.eye(3).to_sparse()},
        "expanded": {**pair, "x": torch.ones(1).expand(1 << 40)},
        "empty": {},
    }
    for name, content in bad.items():
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(ExpertLoadError, match=r"adapter_model.bin' cannot be read as PyTorch weights"):
            load_expert(tmp_path)
        assert not Path("evil-was-here").exists(), name
    for content in (b"", b"PK\x03\x04 nothing", pickle.dumps(Evil())):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ExpertLoadError, match="cannot be read as PyTorch weights"):
            load_expert(tmp_path)
    assert not Path("evil-was-here").exists()
    torch.save(pair, tmp_path / "adapter_model.bin")
    shutil.copy(tmp_path / "adapter_model.bin", tmp_path / "dog.bin")
    assert load_expert(tmp_path).report.loaded == tuple(pair)
    with pytest.raises(ExpertLoadError, match=r"dog.bin' is not a .safetensors file"):
        load_expert(tmp_path / "dog.bin")


def test_names_and_hashes(tmp_path: Path, unet: UNet2DConditionModel) -> None:
    model = trained(unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]))
    dog, cat = saved(model, tmp_path / "dog"), saved(model, tmp_path / "cat")
    assert [load_expert(folder).name for folder in (dog, cat)] == ["dog", "cat"]
    assert [own_name(folder / "adapter_model.safetensors") for folder in (dog, cat)] == ["dog", "cat"]
    assert own_name(tmp_path / "tom.safetensors") == "tom"
    assert load_expert(dog).sha256 == load_expert(cat).sha256 == expert_sha256(cat)
    before, facts = load_expert(cat).sha256, expert_facts(cat)
    edited(cat, lora_alpha=7)
    # Another strength is another expert, for gates too.
    assert load_expert(cat).sha256 == expert_sha256(cat) != before
    assert expert_facts(cat) != facts
    plain = tmp_path / "plain.safetensors"
    shutil.copy(dog / "adapter_model.safetensors", plain)
    assert load_expert(plain).sha256 == expert_sha256(plain)
    assert is_adapter_folder(dog)
    assert not is_adapter_folder(tmp_path)
    with pytest.raises(ExpertLoadError, match=r"is no expert: it has no adapter_model.safetensors or"):
        load_expert(tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_folders_for_transformers(kind: type, tmp_path: Path) -> None:
    """Every linear layer of the first block, as PEFT names it of a network that stands alone."""
    network = KINDS[kind].make()
    block = next(name for name, _ in network.named_modules() if name.endswith(".0") and name.count(".") == 1)
    targets = [
        name
        for name, one in network.named_modules()
        if name.startswith(f"{block}.") and isinstance(one, nn.Linear)
    ]
    assert len(targets) >= 6
    for number, config in enumerate(
        (
            LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=targets),
            LoKrConfig(r=2, alpha=1, target_modules=targets),
        )
    ):
        model = trained(network, config)
        folder = saved(model, tmp_path / str(number))
        expert = load_expert(folder)
        assert not expert.report.ignored
        found, base = alone(network, expert), run(network)
        expected = run(model.base_model.model)
        assert (expected - base).abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
