"""Tiny transformers of ComfyUI with the weights of those of diffusers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.chroma.model import ChromaParams
from safetensors.torch import load_file
from tiny_models.transformers import asks, placed
from tiny_models.weights import fill
from torch import Tensor


def load_flux(folder: Path, kind: str) -> Any:
    """A MODEL of a diffusers FLUX.1 or Chroma; see `oracle_flux.py`."""
    config = json.loads((folder / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    settings: dict[str, Any] = {
        "image_model": kind,
        "in_channels": config["in_channels"] // 4,
        "out_channels": config["in_channels"] // 4,
        "hidden_size": width,
        "context_in_dim": config["joint_attention_dim"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "mlp_ratio": 4.0,
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
    }
    names = comfy.utils.flux_to_diffusers(settings)
    if kind == "chroma":
        settings |= {"in_dim": 64, "out_dim": width, "hidden_dim": config["approximator_hidden_dim"]}
        settings |= {"n_layers": config["approximator_layers"], "in_channels": config["in_channels"]}
        settings |= {"out_channels": config["in_channels"]}
        settings |= {"vec_in_dim": None} if asks("vec_in_dim", ChromaParams) else {}
        model_config = comfy.supported_models.Chroma(placed(settings, kind=ChromaParams))
        names |= _approximator(config["approximator_layers"])
    else:
        settings |= {"guidance_embed": True, "vec_in_dim": config["pooled_projection_dim"]}
        model_config = comfy.supported_models.Flux(placed(settings))
    return _patcher(model_config, folder, names)


def load_flux2(folder: Path) -> Any:
    """A MODEL of a diffusers FLUX.2."""
    config = json.loads((folder / "config.json").read_text())
    settings = {
        "image_model": "flux2",
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "vec_in_dim": None,
        "context_in_dim": config["joint_attention_dim"],
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "mlp_ratio": config["mlp_ratio"],
        "theta": config["rope_theta"],
        "patch_size": 1,
        "qkv_bias": False,
        "guidance_embed": True,
        "global_modulation": True,
        "mlp_silu_act": True,
        "ops_bias": False,
    }
    names = _flux2_names(config) | comfy.utils.flux_to_diffusers(settings)
    return _patcher(comfy.supported_models.Flux2(placed(settings, 3)), folder, names)


def _flux2_names(config: dict[str, Any]) -> dict[str, Any]:
    """Names of FLUX.2's matrices, of which `flux_to_diffusers` has some: in 0.3.75 few."""
    found = {}
    for block in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{block}", f"double_blocks.{block}"
        for part, stream in (("ff", "img"), ("ff_context", "txt")):
            found[f"{ours}.{part}.linear_in.weight"] = f"{theirs}.{stream}_mlp.0.weight"
            found[f"{ours}.{part}.linear_out.weight"] = f"{theirs}.{stream}_mlp.2.weight"
    for block in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{block}.attn", f"single_blocks.{block}"
        found[f"{ours}.to_qkv_mlp_proj.weight"] = f"{theirs}.linear1.weight"
        found[f"{ours}.to_out.weight"] = f"{theirs}.linear2.weight"
        for x, name in (("q", "query"), ("k", "key")):
            found[f"{ours}.norm_{x}.weight"] = f"{theirs}.norm.{name}_norm.scale"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        found[f"{name}.linear.weight"] = f"{name}.lin.weight"
    for ours, theirs in (("timestep", "time_in"), ("guidance", "guidance_in")):
        for number, layer in enumerate(("in_layer", "out_layer"), 1):
            key = f"time_guidance_embed.{ours}_embedder.linear_{number}.weight"
            found[key] = f"{theirs}.{layer}.weight"
    return found


def load_qwen_image(folder: Path) -> Any:
    """A MODEL of a diffusers Qwen-Image, whose names are the same."""
    config = json.loads((folder / "config.json").read_text())
    shared = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim")
    settings = {name: config[name] for name in (*shared, "num_attention_heads", "joint_attention_dim")}
    settings |= {"image_model": "qwen_image", "axes_dims_rope": list(config["axes_dims_rope"])}
    names = {name: name for name in load_file(folder / "weights.safetensors")}
    return _patcher(comfy.supported_models.QwenImage(settings), folder, names)


def load_sd3(folder: Path) -> Any:
    """A MODEL of a diffusers Stable Diffusion 3.5 medium."""
    config = json.loads((folder / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    settings = {
        "in_channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "depth": config["num_attention_heads"],
        "num_blocks": config["num_layers"],
        "input_size": None,
        "adm_in_channels": config["pooled_projection_dim"],
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": config["joint_attention_dim"], "out_features": width},
        },
        "pos_embed_max_size": config["pos_embed_max_size"],
        "num_patches": config["pos_embed_max_size"] ** 2,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
        "x_block_self_attn_layers": list(config["dual_attention_layers"]),
    }
    names = comfy.utils.mmdit_to_diffusers(settings)
    return _patcher(comfy.supported_models.SD3(settings), folder, names)


def load_z_image(folder: Path) -> Any:
    """A MODEL of a diffusers Z-Image."""
    config = json.loads((folder / "config.json").read_text())
    shared = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim")
    settings = {name: config[name] for name in (*shared, "axes_dims", "axes_lens", "norm_eps", "qk_norm")}
    settings |= {
        "image_model": "lumina2",
        "patch_size": 2,
        "multiple_of": 256,
        "ffn_dim_multiplier": 8 / 3,
        "rope_theta": config["rope_theta"],
        "z_image_modulation": True,
        "time_scale": config["t_scale"],
        "pad_tokens_multiple": 32,
    }
    model_config = comfy.supported_models.ZImage(settings)
    names = comfy.utils.z_image_to_diffusers(settings)

    def as_wide(network: Any) -> None:
        # ComfyUI's is as wide inside as the blocks, at most 1024; that of diffusers always 1024.
        embedder = type(network.t_embedder)
        network.t_embedder = embedder(1024, output_size=256, operations=comfy.ops.disable_weight_init)
        network.norm_final = torch.nn.Identity()  # nobody runs it

    return _patcher(model_config, folder, names, as_wide)


def load_krea2(folder: Path) -> Any:
    """A MODEL of a diffusers Krea 2."""
    config = json.loads((folder / "config.json").read_text())
    settings = {
        "image_model": "krea2",
        "features": config["num_attention_heads"] * config["attention_head_dim"],
        "tdim": config["timestep_embed_dim"],
        "txtdim": config["text_hidden_dim"],
        "heads": config["num_attention_heads"],
        "kvheads": config["num_key_value_heads"],
        "layers": config["num_layers"],
        "channels": config["in_channels"] // 4,
        "txtlayers": config["num_text_layers"],
        "txtheads": config["text_num_attention_heads"],
        "txtkvheads": config["text_num_key_value_heads"],
    }
    names = comfy.utils.krea2_to_diffusers(settings) | _krea2_names(config)
    return _patcher(comfy.supported_models.Krea2(settings), folder, names)


def _krea2_names(config: dict[str, Any]) -> dict[str, Any]:
    """Names of what is no matrix of Krea 2."""
    found: dict[str, Any] = {"final_layer.scale_shift_table": "last.modulation.lin"}
    found["final_layer.norm.weight"], found["txt_in.norm.weight"] = "last.norm.scale", "txtmlp.0.scale"
    for ours, theirs in (
        ("img_in", "first"),
        ("time_embed.linear_1", "tmlp.0"),
        ("time_embed.linear_2", "tmlp.2"),
        ("time_mod_proj", "tproj.1"),
        ("txt_in.linear_1", "txtmlp.1"),
        ("txt_in.linear_2", "txtmlp.3"),
        ("final_layer.linear", "last.linear"),
    ):
        found[f"{ours}.bias"] = f"{theirs}.bias"
    blocks = {f"transformer_blocks.{block}": f"blocks.{block}" for block in range(config["num_layers"])}
    for ours, theirs in blocks.items():
        # Six rows one after another.
        found[f"{ours}.scale_shift_table"] = (f"{theirs}.mod.lin", None, torch.flatten)
    for kind in ("layerwise", "refiner"):
        for block in range(2):
            blocks[f"text_fusion.{kind}_blocks.{block}"] = f"txtfusion.{kind}_blocks.{block}"
    for ours, theirs in blocks.items():
        found[f"{ours}.norm1.weight"] = f"{theirs}.prenorm.scale"
        found[f"{ours}.norm2.weight"] = f"{theirs}.postnorm.scale"
        for x in "qk":
            found[f"{ours}.attn.norm_{x}.weight"] = f"{theirs}.attn.qknorm.{x}norm.scale"
    return found


def load_anima(folder: Path) -> Any:
    """A MODEL of a diffusers Cosmos Predict 2 as Anima's, with a tiny adapter of its language model."""
    from comfy.ldm.anima.model import LLMAdapter

    config = json.loads((folder / "config.json").read_text())
    text, width = config["text_embed_dim"], config["num_attention_heads"] * config["attention_head_dim"]
    frames, height, patches = *config["rope_scale"][:2], config["patch_size"]
    settings = {
        "image_model": "anima",
        "max_img_h": config["max_size"][1],
        "max_img_w": config["max_size"][2],
        "max_frames": config["max_size"][0],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "patch_spatial": patches[1],
        "patch_temporal": patches[0],
        "model_channels": width,
        "num_blocks": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "crossattn_emb_channels": text,
        "pos_emb_cls": "rope3d",
        "use_adaln_lora": True,
        "adaln_lora_dim": config["adaln_lora_dim"],
        "rope_h_extrapolation_ratio": height,
        "rope_w_extrapolation_ratio": height,
        "rope_t_extrapolation_ratio": frames,
        "rope_enable_fps_modulation": False,
    }

    def adapted(network: Any) -> None:
        tiny = {"source_dim": text, "target_dim": text, "model_dim": text, "num_layers": 1, "num_heads": 2}
        network.llm_adapter = LLMAdapter(**tiny, operations=comfy.ops.disable_weight_init)
        fill(network.llm_adapter, 5)

    model_config = comfy.supported_models.Anima(settings)
    return _patcher(model_config, folder, _anima_names(config["num_layers"]), adapted)


def _anima_names(layers: int) -> dict[str, Any]:
    """Names of Anima's weights."""
    found = {
        "patch_embed.proj": "x_embedder.proj.1",
        "time_embed.norm": "t_embedding_norm",
        "proj_out": "final_layer.linear",
    }
    for layer in (1, 2):
        found[f"time_embed.t_embedder.linear_{layer}"] = f"t_embedder.1.linear_{layer}"
        found[f"norm_out.linear_{layer}"] = f"final_layer.adaln_modulation.{layer}"
    for block in range(layers):
        ours, theirs = f"transformer_blocks.{block}", f"blocks.{block}"
        for number, name in enumerate(("self_attn", "cross_attn", "mlp"), 1):
            for layer in (1, 2):
                found[f"{ours}.norm{number}.linear_{layer}"] = f"{theirs}.adaln_modulation_{name}.{layer}"
        for number, name in enumerate(("self_attn", "cross_attn"), 1):
            for x in "qkv":
                found[f"{ours}.attn{number}.to_{x}"] = f"{theirs}.{name}.{x}_proj"
            for x in "qk":
                found[f"{ours}.attn{number}.norm_{x}"] = f"{theirs}.{name}.{x}_norm"
            found[f"{ours}.attn{number}.to_out.0"] = f"{theirs}.{name}.output_proj"
        found[f"{ours}.ff.net.0.proj"] = f"{theirs}.mlp.layer1"
        found[f"{ours}.ff.net.2"] = f"{theirs}.mlp.layer2"
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in found.items()}


def _patcher(
    model_config: Any, folder: Path, names: dict[str, Any], change: Callable[[Any], None] = lambda _: None
) -> Any:
    """A MODEL with the weights of a folder; of what diffusers has beside the network, with its own."""
    model_config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = model_config.get_model({}, device=cpu)
    change(model.diffusion_model)
    weights = load_file(folder / "weights.safetensors")
    model.diffusion_model.load_state_dict(converted(weights, names, model.diffusion_model.state_dict()))
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _approximator(layers: int) -> dict[str, Any]:
    """Names of Chroma's approximator, which `flux_to_diffusers` does not have."""
    home, found = "distilled_guidance_layer", {}
    for end in ("weight", "bias"):
        for name in ("in_proj", "out_proj"):
            found[f"{home}.{name}.{end}"] = f"{home}.{name}.{end}"
        for layer in range(layers):
            for ours, theirs in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
                found[f"{home}.layers.{layer}.{theirs}.{end}"] = f"{home}.layers.{layer}.{ours}.{end}"
    for layer in range(layers):
        found[f"{home}.norms.{layer}.weight"] = f"{home}.norms.{layer}.scale"
    return found


def converted(
    weights: dict[str, Tensor], names: dict[str, Any], like: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of diffusers under ComfyUI's names, every one of them used."""
    state = {
        name: value if name.startswith("llm_adapter.") else torch.full_like(value, float("nan"))
        for name, value in like.items()
    }
    for name, value in weights.items():
        place = names[name]
        key, part, change = (*place, None)[:3] if isinstance(place, tuple) else (place, None, None)
        if key.endswith(".scale") and key not in state:
            key = f"{key.removesuffix('scale')}weight"  # as newer cores call it
        value = value if change is None else change(value)
        if part is None:
            state[key] = value
        else:
            state[key].narrow(*part).copy_(value)
    wrong = [name for name, value in state.items() if torch.isnan(value).any()]
    assert not wrong, wrong
    return state
