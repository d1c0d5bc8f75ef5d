"""From a path, folder or hub id to the file of an expert."""

import shutil

import pytest

from mole_diffusion.core.errors import ExpertLoadError
from mole_diffusion.pictures.sources import find_expert_file


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
