"""Tiny pipelines whose texts go through a language model, of the real classes."""

from typing import Any

import torch
from diffusers import (
    AnimaTextConditioner,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from .flux import filled, t5_tokenizer
from .sd import WORDS, make_vae

WIDTH = 16
_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }} "
    "{{ message.content if message.content is string else message.content[0].text }} <|im_end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the tests, and one token for all others; knows how to write a chat."""
    # Marks of turns are several tokens, for Qwen-Image leaves out what its template has with real ones.
    words = dict.fromkeys(["<pad>", "<unk>", "user", "assistant", *WORDS, "zorin", "vim"])
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=_TEMPLATE,
    )


def qwen_settings(vocabulary: int, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }


def make_z_image_components() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[600, 64, 64],
    )
    return {
        "transformer": filled(transformer),
        "vae": make_vae(shift_factor=0.1, latent_channels=16).eval(),
        "text_encoder": filled(Qwen3Model(Qwen3Config(**qwen_settings(len(tokenizer))))),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def make_flux2_components(*, guidance: bool = False) -> dict[str, Any]:
    """A FLUX.2 klein, or with `guidance` a dev; that one's text encoder is another, but of the same use."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    # Pipelines read what its ninth to thirtieth layers say.
    encoder = Qwen3ForCausalLM(Qwen3Config(**qwen_settings(len(tokenizer), layers=31)))
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    with torch.no_grad():
        vae.bn.running_mean.add_(torch.randn(16) * 0.1)
        vae.bn.running_var.mul_(torch.rand(16) + 0.5)
    return {
        "transformer": filled(transformer),
        "vae": vae.eval(),
        "text_encoder": filled(encoder),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def make_video_vae() -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[0.8, 1.2, 1.0, 0.9],
    )
    return vae.eval()


def make_qwen_image_components() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    text = {**qwen_settings(len(tokenizer)), "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    text["rope_parameters"]["mrope_section"] = [1, 1, 2]
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "out_hidden_size": WIDTH})
    return {
        "transformer": filled(transformer),
        "vae": make_video_vae(),
        "text_encoder": filled(Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    }


def make_krea2_components() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )
    text = {**qwen_settings(len(tokenizer)), "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    text["rope_parameters"]["mrope_section"] = [2, 1, 1]
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2}
    vision |= {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    return {
        "transformer": filled(transformer),
        "vae": make_video_vae(),
        "text_encoder": filled(Qwen3VLModel(config)),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        "text_encoder_select_layers": (0, 1, 2),
    }


def make_anima_components() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer, second = chat_tokenizer(), t5_tokenizer()
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        rope_scale=(1.0, 4.0, 4.0),
        extra_pos_embed_type=None,
    )
    adapter = AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=24,
        model_dim=16,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=len(second),
        min_sequence_length=32,
    )
    return {
        "transformer": filled(transformer),
        "vae": make_video_vae(),
        "text_encoder": filled(Qwen3Model(Qwen3Config(**qwen_settings(len(tokenizer))))),
        "tokenizer": tokenizer,
        "t5_tokenizer": second,
        "text_conditioner": filled(adapter),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
