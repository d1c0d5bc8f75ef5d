"""From a path, folder or hub id to the file or folder of an expert."""

import json
import shutil
from pathlib import Path

import pytest

from mole_diffusion.core.errors import ExpertLoadError
from mole_diffusion.sources import find_expert_file


def test_file(lora_files) -> None:
    assert find_expert_file(lora_files["cat"]) == (lora_files["cat"], "cat")
    assert find_expert_file(str(lora_files["cat"])) == (lora_files["cat"], "cat")


def test_folder_of_one(lora_files, tmp_path) -> None:
    shutil.copy(lora_files["cat"], tmp_path / "tom.safetensors")
    assert find_expert_file(tmp_path) == (tmp_path / "tom.safetensors", "tom")


def test_usual_file_name_gives_the_folders_name(lora_files, tmp_path) -> None:
    folder = tmp_path / "dog-lora"
    folder.mkdir()
    file = shutil.copy(lora_files["cat"], folder / "pytorch_lora_weights.safetensors")
    assert find_expert_file(folder) == (file, "dog-lora")
    assert find_expert_file(file) == (file, "dog-lora")


def test_folder_of_many_needs_a_name(lora_files) -> None:
    folder = lora_files["cat"].parent
    with pytest.raises(ExpertLoadError, match=r"3 safetensors files.*weight_name=.*boot.*cat.*clock"):
        find_expert_file(folder)
    assert find_expert_file(folder, "cat.safetensors")[0] == lora_files["cat"]
    with pytest.raises(ExpertLoadError, match=r"no file 'dog.safetensors'; it has \['boot"):
        find_expert_file(folder, "dog.safetensors")


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(ExpertLoadError, match="not a file, not a folder, and not a hub id"):
        find_expert_file(tmp_path / "none.safetensors")
    with pytest.raises(ExpertLoadError, match="0 safetensors files"):
        find_expert_file(tmp_path)


def test_hub_repository_from_the_local_cache(lora_files, tmp_path) -> None:
    repository = tmp_path / "models--some--dog-lora"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(lora_files["cat"], snapshot / "pytorch_lora_weights.safetensors")
    file, name = find_expert_file("some/dog-lora", cache_dir=tmp_path, local_files_only=True)
    assert file == snapshot / "pytorch_lora_weights.safetensors"
    assert name == "dog-lora"
    with pytest.raises(ExpertLoadError, match="the hub gave nothing for 'some/cat-lora'"):
        find_expert_file("some/cat-lora", cache_dir=tmp_path, local_files_only=True)


def peft_folder(folder: Path, lora: Path) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(parents=True)
    shutil.copy(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


def test_peft_folders_are_named_after_the_folder(lora_files, tmp_path) -> None:
    for name in ("dog", "tom"):
        folder = peft_folder(tmp_path / name, lora_files["cat"])
        assert find_expert_file(folder) == (folder, name)
        file = folder / "adapter_model.safetensors"
        assert find_expert_file(file) == (file, name)
        assert find_expert_file(folder, "adapter_model.safetensors") == (file, name)
        shutil.copy(lora_files["cat"], folder / "another.safetensors")
        assert find_expert_file(folder) == (folder, name)
        assert find_expert_file(folder, "another.safetensors") == (folder / "another.safetensors", "another")
    for part in ("unet", "text_encoder"):
        peft_folder(tmp_path / "pipe" / part, lora_files["cat"])
    assert find_expert_file(tmp_path / "pipe") == (tmp_path / "pipe", "pipe")
    part = tmp_path / "pipe" / "unet"
    assert find_expert_file(part) == (part, "pipe")
    (tmp_path / "only-bin").mkdir()
    (tmp_path / "only-bin" / "adapter_model.bin").write_bytes(b"")
    assert find_expert_file(tmp_path / "only-bin") == (tmp_path / "only-bin", "only-bin")


def test_a_file_beside_networks_folders_counts(lora_files, tmp_path) -> None:
    """As in repositories that hold a whole model too."""
    peft_folder(tmp_path / "unet", lora_files["cat"])
    shutil.copy(lora_files["cat"], tmp_path / "tom.safetensors")
    assert find_expert_file(tmp_path) == (tmp_path / "tom.safetensors", "tom")


def test_experts_of_peft_folders_have_their_strength_and_names(pipe, lora_files, tmp_path) -> None:
    for name in ("dog", "tom"):
        expert = pipe.load_expert(peft_folder(tmp_path / name, lora_files["cat"]))
        assert {factors.scaling for factors in expert.factors["unet"].values()} == {2.0}
    assert list(pipe.experts) == ["dog", "tom"]


def test_hub_repository_of_peft_from_the_local_cache(lora_files, tmp_path) -> None:
    repository = tmp_path / "models--some--dog-lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = peft_folder(repository / "snapshots" / ("0" * 40), lora_files["cat"])
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert find_expert_file("some/dog-lora", **options) == (snapshot, "dog-lora")
    assert find_expert_file("some/dog-lora", "adapter_model.safetensors", **options) == (
        snapshot / "adapter_model.safetensors",
        "dog-lora",
    )
    shutil.rmtree(snapshot)
    peft_folder(snapshot / "unet", lora_files["cat"])
    assert find_expert_file("some/dog-lora", **options) == (snapshot, "dog-lora")
