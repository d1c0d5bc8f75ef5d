"""Nodes that attach experts to a model and choose which of them count where."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from mole_diffusion.core.errors import ConfigError, RegionMaskError
from mole_diffusion.core.records import in_order
from mole_diffusion.training.heat_map import gate_heat_map

from .apply import AUTO, WITHOUT_GATES, applied_to, apply_experts
from .experts import ExpertSet, GatesFile, read_names, read_strengths
from .nodes_load import CATEGORY, Experts, Gates
from .notes import show_text
from .weights import weights_of_gates

#: Masks that Region Masks takes.
MAX_REGIONS = 8


class ApplyMoLE(io.ComfyNode):  # type: ignore[misc]
    """Experts and gates on a MODEL and a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEApply",
            display_name="MoLE Apply",
            category=CATEGORY,
            description="Attaches experts to a MODEL and its CLIP. With gates, every block decides how much "
            "each expert counts there; without, words and places find their experts by the prompt (the "
            "trigger words). LoRA loaders, ControlNet and samplers work as usual.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                Experts.Input("experts"),
                Gates.Input(
                    "gates",
                    optional=True,
                    tooltip="Gates that were trained for these experts, or shared ones, which refine auto "
                    "for any. None: see 'without gates'.",
                ),
                io.Combo.Input(
                    "without_gates",
                    options=list(WITHOUT_GATES),
                    default=AUTO,
                    optional=True,
                    tooltip="auto: each expert has its own words and the places that look at them; Anima "
                    "takes equal shares. equal shares: every expert counts 1/N everywhere.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL"), io.Clip.Output(display_name="CLIP")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        experts: ExpertSet,
        gates: GatesFile | None = None,
        without_gates: str = AUTO,
    ) -> io.NodeOutput:
        tell = partial(show_text, cls.hidden.unique_id)
        return io.NodeOutput(*apply_experts(model, clip, experts, gates, without_gates, tell))


class MaskExperts(io.ComfyNode):  # type: ignore[misc]
    """Which experts count, and how strongly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEMaskExperts",
            display_name="MoLE Mask Experts",
            category=CATEGORY,
            description="Leaves experts out, or changes their strength, without new training: the gates "
            "share what is left among the others in proportion. Put it between the experts and MoLE Apply.",
            inputs=[
                Experts.Input("experts"),
                io.String.Input(
                    "active",
                    default="",
                    placeholder="all",
                    tooltip="Names of the experts that count, separated by commas. Empty: all.",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    multiline=True,
                    placeholder="boot = 0.8",
                    tooltip="One line per expert whose strength is to change: NAME = NUMBER.",
                ),
            ],
            outputs=[Experts.Output(display_name="EXPERTS")],
        )

    @classmethod
    def execute(cls, experts: ExpertSet, active: str = "", strengths: str = "") -> io.NodeOutput:
        return io.NodeOutput(experts.masked(read_names(active), read_strengths(strengths)))


class RegionMasks(io.ComfyNode):  # type: ignore[misc]
    """Where in the picture each expert counts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        masks = [
            io.Mask.Input(
                f"mask_{number}",
                optional=True,
                tooltip=f"Where expert {number} counts (white). It needs the picture's proportions.",
            )
            for number in range(1, MAX_REGIONS + 1)
        ]
        return io.Schema(
            node_id="MoLERegionMasks",
            display_name="MoLE Region Masks",
            category=CATEGORY,
            description="Confines each expert to a part of the picture. An expert without a mask may act "
            "everywhere; where no expert may, the base model draws. Put it between the experts and MoLE "
            "Apply.",
            inputs=[
                Experts.Input("experts"),
                io.String.Input(
                    "names",
                    default="",
                    placeholder="in the order of the experts",
                    tooltip="Whom mask 1, 2, ... belong to, separated by commas. Empty: the experts in "
                    "order.",
                ),
                *masks,
            ],
            outputs=[Experts.Output(display_name="EXPERTS")],
        )

    @classmethod
    def execute(cls, experts: ExpertSet, names: str = "", **masks: Any) -> io.NodeOutput:
        owners = read_names(names) or list(experts.names)
        regions = {}
        for number in range(1, MAX_REGIONS + 1):
            mask = masks.get(f"mask_{number}")
            if mask is None:
                continue
            if number > len(owners):
                raise RegionMaskError(
                    f"mask_{number} belongs to nobody: there are {len(owners)} names, {owners}."
                )
            regions[owners[number - 1]] = _plain_mask(mask)
        if not regions:
            raise RegionMaskError("There is no mask: connect at least mask_1.")
        return io.NodeOutput(experts.in_regions(regions))


def _plain_mask(mask: Any) -> torch.Tensor:
    """ComfyUI's (B, H, W) or (H, W) mask as (H, W), usable outside inference mode; the first of a batch."""
    with torch.inference_mode(False):
        single = mask.reshape(-1, *mask.shape[-2:])[0]
        plain: torch.Tensor = single.detach().float().cpu().clone()
        return plain


class GateHeatMap(io.ComfyNode):  # type: ignore[misc]
    """Gate weights as a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoLEGateHeatMap",
            display_name="MoLE Gate Heat Map",
            category=CATEGORY,
            description="Draws how much each expert (row) counted in each gate (column): of the last run of "
            "a MODEL, or of the training that made the gates.",
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The MODEL of MoLE Apply; its last run is drawn. Connect 'after' too.",
                ),
                io.Latent.Input(
                    "after", optional=True, tooltip="The sampler's LATENT: drawn when that is done."
                ),
                Gates.Input("gates", optional=True, tooltip="Used where no MODEL is connected."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
        )

    @classmethod
    def execute(cls, model: Any = None, after: Any = None, gates: GatesFile | None = None) -> io.NodeOutput:
        if model is not None:
            applied = applied_to(model)
            names = applied.experts.names
            means = in_order(applied.means(), names)
            if not means:
                raise ConfigError(
                    "The gates of this MODEL have not run yet: connect the sampler's LATENT to 'after'."
                )
        elif gates is not None:
            names, means = weights_of_gates(gates)
        else:
            raise ConfigError("Nothing to draw: connect a MODEL or GATES.")
        pixels = np.asarray(gate_heat_map(means, names), dtype=np.float32) / 255
        return io.NodeOutput(torch.from_numpy(pixels)[None])
