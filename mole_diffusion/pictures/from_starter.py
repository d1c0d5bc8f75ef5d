"""The starter's two models as pipelines: a small Stable Diffusion, and a small FLUX.1 beside it."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from mole_diffusion.core.errors import UnknownExpertError
from mole_diffusion.pictures.call import P, WithExperts
from mole_diffusion.starter.location import (
    FLUX_GUIDANCE,
    FLUX_STARTER,
    GUIDANCE,
    RESCALE,
    STARTER,
    default_experts,
    gates_of,
    model_dir,
    shared_gates_of,
    starter_experts,
)

_SIDE = 128
"""Of the pictures in pixels; diffusers' pipelines of FLUX.1 do not read it off the network."""

Chosen = Sequence[str] | Literal["all"] | None
"""Names from `mole_diffusion.starter.starter_experts()`; "all"; `[]` for none; None for the default three."""


class StarterMixin(WithExperts):
    """For pipelines with the components of Stable Diffusion 1 and 2, which the starter has."""

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # diffusers warns of a codec of another class and does not hand it on in `from_pipe`, though it draws
        # with it; the starter has one, and others take TAESD in place of their own.
        parent: Any = super()
        types: dict[str, tuple[type, ...]] = parent._get_signature_types()
        return {**types, "vae": (*types["vae"], AutoencoderTiny)}

    @classmethod
    def from_starter(
        cls: type[P], experts: Chosen = None, *, torch_dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> P:
        """The small model that ships with the project, without network access; drawn with its own guidance.

        Args:
            experts: names from `mole_diffusion.starter.starter_experts()`; "all"; `[]` for none; None for
                three concepts, with the gates that were trained for them if the starter has those.
            torch_dtype: type of the weights.
            kwargs: for `from_pretrained`.

        Raises:
            FileNotFoundError: the starter is missing from this installation.
            UnknownExpertError: the starter has no expert of this name.
        """
        folder = model_dir(STARTER)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"the starter is missing: no model_index.json in {folder}")
        names = _names(experts, STARTER)
        options = {"safety_checker": None, "requires_safety_checker": False, **kwargs}
        maker: Any = cls
        pipe: P = maker.from_pretrained(folder, torch_dtype=torch_dtype, **options)
        pipe.call_defaults = MappingProxyType({"guidance_scale": GUIDANCE, "guidance_rescale": RESCALE})
        return _with_experts(pipe, names, STARTER, gates=experts is None)


class FluxStarterMixin(WithExperts):
    """For the pipelines of FLUX.1, of which the starter has a small one."""

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        parent: Any = super()
        types: dict[str, tuple[type, ...]] = parent._get_signature_types()
        # The starter's text encoder stands in for CLIP and for T5.
        own = {"vae": AutoencoderTiny, "text_encoder_2": CLIPTextModel, "tokenizer_2": CLIPTokenizer}
        return {**types, **{name: (*types[name], kind) for name, kind in own.items()}}

    def _get_t5_prompt_embeds(self, *args: Any, max_sequence_length: int = 512, **kwargs: Any) -> Any:
        # A text encoder that is no T5 has as many positions as its tokenizer says.
        parent, pipe = cast(Any, super()), cast(Any, self)
        longest = min(max_sequence_length, pipe.tokenizer_2.model_max_length)
        return parent._get_t5_prompt_embeds(*args, max_sequence_length=longest, **kwargs)

    @classmethod
    def from_starter(cls: type[P], experts: Chosen = None, *, torch_dtype: torch.dtype = torch.float32) -> P:
        """The small FLUX.1 of the repository, with the starter's codec and text encoder; opens offline.

        It is drawn with guidance in two passes (`true_cfg_scale`), as a model that was not distilled.

        Args:
            experts: as in `StableDiffusionMoLEPipeline.from_starter`; the experts have the same names.
            torch_dtype: type of the weights.

        Raises:
            FileNotFoundError: it is missing; wheels leave it out.
            UnknownExpertError: there is no expert of this name.
        """
        folder, shared = model_dir(FLUX_STARTER), model_dir(STARTER)
        names = _names(experts, FLUX_STARTER)
        encoder = CLIPTextModel.from_pretrained(shared / "text_encoder", torch_dtype=torch_dtype)
        tokenizer = CLIPTokenizer.from_pretrained(shared / "tokenizer")
        maker: Any = cls
        pipe: P = maker(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=AutoencoderTiny.from_pretrained(shared / "vae", torch_dtype=torch_dtype),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder,
            tokenizer_2=tokenizer,
            transformer=FluxTransformer2DModel.from_pretrained(
                folder / "transformer", torch_dtype=torch_dtype
            ),
        )
        made: Any = pipe
        made.guided_by, made.default_sample_size = "true_cfg_scale", _SIDE // made.vae_scale_factor
        pipe.call_defaults = MappingProxyType(
            {
                "true_cfg_scale": FLUX_GUIDANCE,
                "negative_prompt": "",
                "max_sequence_length": tokenizer.model_max_length,
            }
        )
        return _with_experts(pipe, names, FLUX_STARTER, gates=experts is None)


def _names(experts: Chosen, model: str) -> list[str]:
    known = starter_experts(model=model)
    names = default_experts() if experts is None else list(known) if experts == "all" else list(experts)
    for name in names:
        if name not in known:
            raise UnknownExpertError(name, list(known))
    return names


def _with_experts(pipe: P, names: Sequence[str], model: str, *, gates: bool) -> P:
    known, file = starter_experts(model=model), gates_of(model)
    for name in names:
        pipe.load_expert(known[name].path, name=name)
    if gates and file.is_file():
        pipe.load_gates(file)
    if (shared := shared_gates_of(model)).is_file():
        pipe.load_shared_gates(shared)
    return pipe
