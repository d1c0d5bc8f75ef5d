"""What denoising transformers have in common: what hosts and files call them, whatever the family."""

from __future__ import annotations

#: What hosts, and gates files, call a transformer that denoises.
TRANSFORMER = "transformer"
#: Beginnings of names in files. kohya and its kin call every denoiser a unet; some double the underscore.
PREFIXES = {
    TRANSFORMER: (
        *("transformer_", "lora_transformer_", "lora_unet_", "lora_unet__", "unet_"),
        *("lycoris_", "diffusion_model_", "model_diffusion_model_", "model_"),
    )
}
#: OneTrainer's names, which ComfyUI reads too.
KOHYA = {TRANSFORMER: ("lora_transformer_", "lora_transformer_")}
#: LyCORIS' names, which ComfyUI reads for families whose names by OneTrainer it does not.
LYCORIS = {TRANSFORMER: ("lycoris_", "lycoris_")}
#: Beginnings of keys that OneTrainer alone writes.
WRITERS = {"lora_transformer_": "OneTrainer"}
#: kohya's own.
KOHYA_UNET = {TRANSFORMER: ("lora_unet_", "lora_unet_")}
