"""What the tables of bases and files claim, cell by cell, and the tests that say so.

A cell that changes, a row that comes or a test that goes fails here: the claim and its proof change together.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "docs" / "MODELS.md").is_file(), reason="the pages are not part of the source archive"
)

DIALECTS = "core/test_dialects.py::test_outputs_are_those_of_diffusers"
FILES = "core/test_transformer_files.py"
LYCORIS = "core/test_lycoris.py::test_products_equal_peft"
FOLDERS = "core/test_peft_folders.py"
TOLD = "core/test_experts.py::test_every_key_is_accounted_for"
TRIGGERS = "pipeline/test_pipeline_triggers.py"
#: Beginning of a row -> for each column the tests.
OF_FILES = {
    "LoRA of kohya": (
        [DIALECTS],
        [DIALECTS],
        [f"{FILES}::test_every_key_is_used_and_every_delta_is_right", f"{FILES}::test_other_families"],
    ),
    "LoCon": (
        [LYCORIS, "core/test_lycoris.py::test_dora_equals_peft"],
        ["core/test_lycoris.py::test_products_of_an_sdxl"],
        [f"{FILES}::test_lycoris_of_fused_matrices_is_shared_out_by_rows", f"{FILES}::test_xlabs"],
    ),
    "folders of PEFT": (
        [f"{FOLDERS}::test_strength_is_that_of_peft"],
        [f"{FOLDERS}::test_text_encoders_by_their_folders", f"{FOLDERS}::test_folders_of_diffusers_networks"],
        [f"{FOLDERS}::test_folders_for_transformers"],
    ),
    "embeddings bundled": (
        [f"{TRIGGERS}::test_is_textual_inversion_of_diffusers"],
        [f"{TRIGGERS}::test_sdxl_has_one_embedding_per_text_encoder"],
        [f"{TRIGGERS}::test_words_of_flux_are_those_of_its_clip"],
    ),
    "(IA)^3": ([TOLD], [TOLD], [f"{FILES}::test_what_is_no_lora_is_told_by_name"]),
}

TRANSFORMERS = "pipeline/test_pipeline_transformers.py"
FLUX, SD3 = "pipeline/test_pipeline_flux.py", "pipeline/test_pipeline_sd3.py"
ANIMA = "pipeline/test_pipeline_anima.py"
INSIDE = "comfy/inside/inside_flux.py::test_numbers_are_those_of_diffusers"
TRAINED_INSIDE = "comfy/inside/inside_flow.py::test_predictions_and_gradients_are_those_of_diffusers"
BY_CORE = "comfy/inside/inside_flux.py::test_an_export_is_read_by_the_core"
DRAWN = [f"{TRANSFORMERS}::test_experts_mixtures_and_the_base", f"{TRANSFORMERS}::test_region_masks"]
LEARNED = [
    "training/test_training_transformers.py::test_collages_teach_the_gates",
    "pipeline/test_cli_transformers.py::test_training_and_export",
]
EXPORTED = [f"{TRANSFORMERS}::test_gates_folders_and_exports"]
WRITTEN = [f"{FILES}::test_other_families"]
FLUX_FILES = [f"{FILES}::test_every_key_is_used_and_every_delta_is_right", f"{FILES}::test_xlabs"]
FLUX_LEARNED = [
    "training/test_training_flux.py::test_collages_teach_the_gates",
    "pipeline/test_cli_transformers.py::test_training_and_export",
]
FLUX_DRAWN = [f"{FLUX}::test_one_active_expert_is_that_lora", f"{FLUX}::test_from_a_picture_and_a_mask"]
#: The same for the families; [] is a cell that claims nothing.
OF_MODELS = {
    "Stable Diffusion 1.x": (
        ["pipeline/test_pipeline_oracle.py::test_one_active_expert_is_that_lora"],
        ["comfy/inside/inside_numbers.py::test_three_experts_with_trained_gates_are_those_of_diffusers"],
        [DIALECTS],
        ["training/test_training_xl.py::test_collages_teach_the_gates"],
        ["pipeline/test_export_xl.py::test_sdxl_draws_the_static_mixture_from_the_file"],
    ),
    "FLUX.1": (FLUX_DRAWN, [INSIDE], FLUX_FILES, [*FLUX_LEARNED, TRAINED_INSIDE],
               [f"{FLUX}::test_an_export_is_one_lora", BY_CORE]),
    "Chroma": (FLUX_DRAWN, [INSIDE], FLUX_FILES, [*FLUX_LEARNED, TRAINED_INSIDE],
               [f"{FLUX}::test_an_export_is_one_lora", BY_CORE]),
    "Z-Image": (DRAWN, [INSIDE], WRITTEN, [*LEARNED, TRAINED_INSIDE], [*EXPORTED, BY_CORE]),
    "FLUX.2": (DRAWN, [INSIDE], WRITTEN, [*LEARNED, TRAINED_INSIDE], EXPORTED),
    "Krea 2": (DRAWN, [INSIDE], WRITTEN, [*LEARNED, TRAINED_INSIDE], [*EXPORTED, BY_CORE]),
    "Qwen-Image": (DRAWN, [INSIDE], WRITTEN, [*LEARNED, TRAINED_INSIDE], [*EXPORTED, BY_CORE]),
    "Anima": (
        [*DRAWN, f"{ANIMA}::test_pictures_are_those_of_the_modular_blocks",
         f"{ANIMA}::test_pictures_that_begin_from_one_are_those_of_the_modular_blocks"],
        [INSIDE],
        WRITTEN,
        LEARNED,
        [*EXPORTED, BY_CORE],
    ),
    "Stable Diffusion 3": (
        [f"{SD3}::test_experts_mixtures_and_the_base", f"{SD3}::test_from_a_picture_and_a_mask"],
        [INSIDE],
        WRITTEN,
        ["pipeline/test_cli_transformers.py::test_training_and_export", TRAINED_INSIDE],
        [f"{SD3}::test_folders_and_exports", BY_CORE],
    ),
}  # fmt: skip
#: Words of cells that claim nothing.
NOTHING = ("not tried", "not tested", "not built", "not there")


def rows_of(page: str, head: str) -> list[list[str]]:
    """Cells of the table whose head begins so."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@pytest.mark.parametrize(
    ("page", "head", "claims"),
    [("README.md", "| file | SD 1.x", OF_FILES), ("docs/MODELS.md", "| family | Python", OF_MODELS)],
    ids=["files", "models"],
)
def test_every_cell_has_a_test(page: str, head: str, claims: dict[str, tuple[list[str], ...]]) -> None:
    rows = rows_of(page, head)
    assert len(rows) == len(claims)
    for (row, *cells), (beginning, tests) in zip(rows, claims.items(), strict=True):
        assert row.startswith(beginning)
        assert len(cells) == len(tests)
        for cell, known in zip(cells, tests, strict=True):
            assert bool(known) != cell.startswith(NOTHING), (row, cell)
            for test in known:
                file, _, name = test.partition("::")
                text = (ROOT / "tests" / file).read_text(encoding="utf-8")
                assert re.search(rf"^def {name}\(", text, re.MULTILINE), test
