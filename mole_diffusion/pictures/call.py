"""What makes a Stable Diffusion pipeline of diffusers one with experts, whatever it draws from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import torch

from mole_diffusion.core.ensemble import Ensemble
from mole_diffusion.core.experts import Expert
from mole_diffusion.core.export import ExportReport
from mole_diffusion.core.networks.clip import TEXT_ENCODER
from mole_diffusion.core.records import GateWeights, MapRecorder, Recorder
from mole_diffusion.pictures.auto import expect_prompts, reading_prompts, usual_for, usual_mixture
from mole_diffusion.pictures.calibration import Progress, export_lora
from mole_diffusion.pictures.call_defaults import completed, hand_on
from mole_diffusion.pictures.choosing import Engaging, Request, chosen_by
from mole_diffusion.pictures.components import latent_size, networks_of, old_text_model_name, picture_size
from mole_diffusion.pictures.holding import (
    add_expert,
    ensemble_of,
    read_expert,
    remove_expert,
    warn_of_lora_tags,
)
from mole_diffusion.pictures.placing import placing_of
from mole_diffusion.pictures.regions import region_tensors
from mole_diffusion.pictures.sharing import SharesGates
from mole_diffusion.pictures.single_file import check_safetensors, configuration_of
from mole_diffusion.pictures.style_balance import keeping_styles
from mole_diffusion.pictures.transformer_file import ONLY_FOR_FILES, transformer_in

if TYPE_CHECKING:
    from mole_diffusion.pictures.training import Concept, TrainingConfig, TrainingResult

P = TypeVar("P", bound="WithExperts")
GuidedIn = Literal["batch", "batch, prompt first", "turns"]


class WithExperts(SharesGates):
    """Experts for a diffusers pipeline; stands before the diffusers class among the bases.

    Attributes:
        diffusers_class: the diffusers pipeline underneath; what `save_pretrained` writes is one of these.
        guided_in: how the pipeline runs a negative prompt: before the prompt in one "batch", after it in one
            ("batch, prompt first"), or in "turns": the prompt, then the negative.
        guided_by: the argument of a call that says how strongly the prompt guides.
        draws_from_text: whether a prompt is all that it needs.
        as_large_as_its_picture: whether a call without a size takes that of its `image`.
        call_defaults: what a call is drawn with where it does not say, in place of diffusers' defaults: the
            guidance that suits the starter.
    """

    diffusers_class: ClassVar[type]
    guided_in: ClassVar[GuidedIn] = "batch"
    guided_by: ClassVar[str] = "guidance_scale"
    draws_from_text: ClassVar[bool] = False
    as_large_as_its_picture: ClassVar[bool] = False
    _ensemble: Ensemble | None = None
    _recorder: Recorder | None = None
    call_defaults: Mapping[str, Any] = MappingProxyType({})

    @property
    def ensemble(self) -> Ensemble:
        """The experts on this pipeline's networks; pipelines around the same networks share them."""
        # Made on first use: diffusers builds pipelines from the signature of __init__, which stays its own.
        self._ensemble = ensemble_of(self, self._ensemble)
        return self._ensemble

    @classmethod
    def from_pipe(cls: type[P], pipeline: Any, **kwargs: Any) -> P:
        """As in diffusers; experts and gates of a pipeline that shares its networks are shared too."""
        parent: Any = super()
        new: P = parent.from_pipe(pipeline, **kwargs)
        if isinstance(pipeline, WithExperts) and networks_of(new) == networks_of(pipeline):
            new._ensemble = pipeline.ensemble
            hand_on(pipeline, new)
        return new

    @classmethod
    def from_single_file(cls: type[P], pretrained_model_link_or_path: Any, **kwargs: Any) -> P:
        """As in diffusers, of safetensors files; a file on this machine opens without a network.

        Configurations are read off its weights, unless `config` or `original_config` names others. What is a
        transformer alone takes all else from the diffusers folder that `config` names.

        Raises:
            ConfigError: a pickle, or no checkpoint of a Stable Diffusion 1, 2 or XL.
        """
        parent, maker, path = cast(Any, super()), cast(Any, cls), Path(pretrained_model_link_or_path)
        if path.is_file():
            check_safetensors(path)
            if transformer := transformer_in(path, kwargs):
                rest = {name: one for name, one in kwargs.items() if name not in ONLY_FOR_FILES}
                return cast(P, maker.from_pretrained(kwargs["config"], transformer=transformer, **rest))
        named = {"config", "original_config", "original_config_file"} & set(kwargs)
        # Of the families that have a UNet; the others' configurations are as many as their models.
        if not path.is_file() or named or "unet" not in inspect.signature(maker.__init__).parameters:
            return cast(P, parent.from_single_file(pretrained_model_link_or_path, **kwargs))
        with configuration_of(path) as config:
            kwargs |= {"config": config, "local_files_only": True}
            return cast(P, parent.from_single_file(str(path), **kwargs))

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        region_masks: Mapping[str, Any] | None = None,
        mixture: str | Mapping[str, float] | Engaging | None = None,
        record_maps: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Draw pictures. Without experts this is the call of the diffusers pipeline.

        Args:
            args, kwargs: everything of that call: prompt, height, width, image, mask_image, strength,
                num_inference_steps, guidance_scale, generator, callback_on_step_end, ...
            active_experts: the experts that count, the rest is renormalised; None is all. (Expert mask.)
            expert_scales: factor per expert for this call, in place of the one given to `load_expert`. An
                expert of scale 0 is left out, as if `active_experts` did not name it: gates give its share to
                the others. With any other scale, however small, it keeps its share.
            region_masks: where in the picture an expert counts: PIL picture, numpy array or tensor of the
                drawn picture's size (height, width), 0 to 1, or 0 to 255 as uint8. The same for the whole
                batch. (With `padding_mask_crop` the drawn picture is the crop, before it is put back.)
            mixture: None for trained gates where there are any, else "auto" (see `usual_mixture`); "gates",
                trained or not; "auto" (words and places find their experts by the prompt, without training;
                `mole_diffusion.pictures.auto.AutoMixture` has its options); "la" (every expert with weight
                1); "nla" (1/N); "none" (the base model, bitwise); "switch" (one expert per step, in turn);
                "composite" (mean of the experts' predictions, one pass each); a weight per expert, which
                also names the active ones; or what `mole_diffusion.methods.prepare` made.
            record_maps: whether to note where in the picture each expert acts, for `expert_maps`.

        Returns:
            The diffusers pipeline's output, or a tuple with `return_dict=False`.

        Raises:
            NoExpertsError: an expert option was given and no expert is loaded.
            UnknownExpertError: a name that is not loaded.
            AllExpertsMaskedError: `active_experts` is empty (for the base model use `mixture="none"`).
            RegionMaskError: a region mask of the wrong size or range.
            GateMismatchError: a prepared mixture was made for another base or other experts.
            ConfigError: a mixture or scale that makes no sense.
            InUseError: another thread is drawing with this pipeline, or with one that shares its networks.
        """
        parent: Any = super()
        pipe: Any = self
        signature = inspect.signature(parent.__call__)
        given = signature.bind_partial(*args, **kwargs).arguments
        kwargs = completed(self, given, kwargs)
        height, width = picture_size(self, given)
        composing = self.composing(
            active_experts=active_experts,
            expert_scales=expert_scales,
            region_masks=None if region_masks is None else region_tensors(region_masks, height, width),
            latent_size=latent_size(pipe, height, width),
            mixture=usual_for(self.ensemble, given) if mixture is None else mixture,
        )
        with composing, keeping_styles(self):
            expect_prompts(self, given)
            self._recorder = (MapRecorder if record_maps else Recorder)(placing_of(self, given))
            with self._recorder.watching(self.ensemble.mixtures, networks_of(self)):
                return parent.__call__(*args, **kwargs)

    @property
    def usual_mixture(self) -> str:
        """What a call without `mixture` is drawn with; see `auto.usual_mixture`.

        "gates" where any are trained, nothing is to be shared out or attention to words unknown; else "auto".
        """
        return usual_mixture(self.ensemble)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; the text encoders' experts count."""
        parent: Any = super()
        warn_of_lora_tags([*args, *kwargs.values()])
        given = inspect.signature(parent.encode_prompt).bind_partial(*args, **kwargs).arguments
        with (
            reading_prompts(self, given) as note,
            old_text_model_name(networks_of(self).get(TEXT_ENCODER)),
        ):
            encoded = parent.encode_prompt(*args, **kwargs)
            note(encoded)
        return encoded

    def unload_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; the trigger words that experts bring along stay."""
        parent: Any = super()
        with self.ensemble.without_companions():
            parent.unload_textual_inversion(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: the base model, without the trigger words that experts bring along."""
        parent: Any = super()
        with self.composing(mixture="none"):
            parent.save_pretrained(*args, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as diffusers writes it, under the name of the diffusers class.

        What `save_pretrained` writes is a plain Stable Diffusion, and has to open without this package.
        """
        parent: Any = super()
        config = json.loads(parent.to_json_string())
        config["_class_name"] = self.diffusers_class.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def load_expert(
        self,
        source: str | Path,
        name: str | None = None,
        scale: float = 1.0,
        *,
        weight_name: str | None = None,
        rank: int | None = None,
        check_base: bool = True,
        **hub_options: Any,
    ) -> Expert:
        """Load a LoRA file as one more expert.

        Gates belong to a set of experts. A new expert makes fresh gates for the whole set: **gates trained
        so far are lost** (a warning says so). Load all experts first, then train or `load_gates`.

        Args:
            source: a safetensors file, a folder with one, or a hub id ("owner/name").
            name: how prompts and arguments call the expert; None takes it from the file, folder or hub id.
            scale: factor on everything this expert does; with 0 it is left out until a call says otherwise.
            weight_name: which file of a folder or hub repository.
            rank: compress deltas of higher rank to this one; None keeps them exact (`Expert.report.errors`).
            check_base: False loads a file whose header names another prediction type than the base's, for
                headers that are wrong. Shapes are checked in any case.
            hub_options: for `huggingface_hub.snapshot_download` (revision, cache_dir, local_files_only, ...).

        Raises:
            ExpertLoadError: no such file, not a LoRA for these networks, the name is taken, or a trigger
                word is a token already.
            InjectionError: the file's matrices do not fit these networks.
            TypeError: a keyword that is neither one of these nor the hub's.

        Embeddings in the file are added to tokenizer and text encoder under their trigger words, and taken
        away with the expert. With `mixture="none"` the words mean nothing special.

        After an error the pipeline is as it was before.
        """
        options: dict[str, Any] = {"weight_name": weight_name, "rank": rank, "hub_options": hub_options}
        expert = read_expert(source, name, scale, networks=self.ensemble.networks, **options)
        return self.add_expert(expert, check_base=check_base)

    def add_expert(self, expert: Expert, *, check_base: bool = True) -> Expert:
        """`load_expert` for an `Expert` that is in memory already."""
        add_expert(self, self.ensemble, expert, check_base=check_base)
        return expert

    def unload_expert(self, name: str) -> None:
        """Take an expert away. The others get fresh gates: **gates trained so far are lost**.

        To leave an expert out of a picture without losing the gates, use `active_experts` instead.

        Raises:
            UnknownExpertError: no expert has this name.
        """
        remove_expert(self, self.ensemble, name)

    @contextmanager
    def composing(
        self,
        *,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        region_masks: Mapping[str, torch.Tensor] | None = None,
        latent_size: tuple[int, int] | None = None,
        mixture: str | Mapping[str, float] | Engaging = "gates",
    ) -> Iterator[None]:
        """Choose how experts count in every forward inside the `with` block, whoever runs it.

        For pipelines built around the same networks (ControlNet, img2img); `__call__` of this pipeline uses
        it too. Outside, all experts are active with their gates.

        Args:
            active_experts: the experts that count; None is all.
            expert_scales: factors in place of those given to `load_expert`; an expert of 0 is left out.
            region_masks: expert name -> (H, W) tensor in 0..1.
            latent_size: (height, width) of the latents that the masks belong to.
            mixture: see `__call__`.

        Raises:
            NoExpertsError: something was asked of experts and none is loaded.
            GateMismatchError: a prepared mixture was made for another base or other experts.
            UnknownExpertError, AllExpertsMaskedError, RegionMaskError, ConfigError: see `Mixture.activate`.
        """
        request = Request(active_experts, expert_scales, region_masks, latent_size)
        with chosen_by(self, mixture, request):
            yield

    def gate_weights(self) -> GateWeights:
        """The gate weights of the last call: network, group, step, branch, batch entry, expert, weight.

        Empty before the first call and after one in which no gate ran (fixed mixtures, the base model).
        """
        return GateWeights() if self._recorder is None else self._recorder.weights

    def expert_maps(self) -> dict[str, torch.Tensor]:
        """Where in the picture each expert acted in the last call, which was made with `record_maps=True`.

        Returns:
            Expert -> (pictures, height, width) of the latents' size: the share of its gate weights, 0 to 1,
            mean over the denoiser's gates and the steps of the prompt. Empty where no gate ran.
        """
        return self._recorder.maps if isinstance(self._recorder, MapRecorder) else {}

    def train_gates(
        self,
        prompts: str | Sequence[str],
        concepts: Mapping[str, Concept | Mapping[str, Any] | str] | Sequence[Concept] | None = None,
        config: TrainingConfig | None = None,
        callback: Callable[..., Any] | None = None,
        checkpoint_dir: str | Path | None = None,
    ) -> TrainingResult:
        """Train the gates for these prompts; networks and experts stay as they are.

        Arguments and result: see `mole_diffusion.pictures.training.GateTrainer`.

        Raises:
            NoExpertsError: no experts are loaded.
        """
        self.need_experts("train_gates")
        from mole_diffusion.pictures.training import GateTrainer

        return GateTrainer(
            self, prompts, concepts, config, callback=callback, checkpoint_dir=checkpoint_dir
        ).train()

    def export_lora(
        self,
        path: str | Path,
        format: str = "diffusers",
        *,
        prompts: str | Sequence[str],
        steps: int = 20,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        rank: int | None = None,
        active_experts: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        callback: Progress | None = None,
    ) -> ExportReport:
        """Freeze the gates at their mean weights and write exactly that static mixture as one plain LoRA.

        The gates' strength and the experts' scales are inside: load the file with weight 1, in diffusers, in
        this library or in any program that knows the format. Means are taken over all steps and tokens of the
        calibration prompts, per gate and expert. With `composition="output"` the gates mix block outputs,
        which no LoRA can: the report says how far the result is from that.

        Args:
            path: file to write, ending in .safetensors; replaced whole or not at all.
            format: names of the tensors: "diffusers" (PEFT) or "kohya" (web UIs, ComfyUI).
            prompts: calibration prompts, like those the LoRA will be used for.
            steps: denoising steps per prompt.
            guidance_scale: guidance while calibrating; None is 7.5 for UNets (the starter's own for it), and
                for transformers what the pipeline draws with by itself.
            size: height and width in pixels of what is drawn; None for the model's own.
            seed: of the first prompt's noise; the following ones count up.
            rank: largest rank to keep (by SVD, with the error in the report); None keeps everything.
            active_experts: which experts go into the file; None is all.
            dtype: type of the factors in the file.
            callback: called with (UNet forwards done, in total).

        Returns:
            What was written and how far it is from the gates.

        Raises:
            NoExpertsError: no experts are loaded.
            UnknownExpertError, AllExpertsMaskedError: see `active_experts` of `__call__`.
            ConfigError: no prompt, an unknown format, a number out of range, or a pipeline that draws from
                pictures (`StableDiffusionMoLEPipeline.from_pipe(pipe)` shares its experts and gates).
        """
        self.need_experts("export_lora")
        return export_lora(
            self,
            self.ensemble,
            path,
            format,
            prompts=prompts,
            steps=steps,
            guidance_scale=guidance_scale,
            size=size,
            seed=seed,
            rank=rank,
            active_experts=active_experts,
            dtype=dtype,
            callback=callback,
        )
