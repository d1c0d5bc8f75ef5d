"""What ComfyUI asks a node pack for."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import places, routes
from .nodes_apply import ApplyMoLE, GateHeatMap, MaskExperts, RegionMasks
from .nodes_load import ExportLoRA, LoadExpert, LoadGates, SaveGates, StarterLoader, StarterPictures
from .nodes_train import TrainGates

NODES = [
    StarterLoader,
    StarterPictures,
    LoadExpert,
    LoadGates,
    ApplyMoLE,
    MaskExperts,
    RegionMasks,
    TrainGates,
    SaveGates,
    GateHeatMap,
    ExportLoRA,
]


class MoLEExtension(ComfyExtension):  # type: ignore[misc]
    """The nodes of category MoLE."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of the menu."""
        return list(NODES)


async def comfy_entrypoint() -> MoLEExtension:
    """Called by ComfyUI when it loads custom nodes."""
    places.register()
    routes.register()
    return MoLEExtension()
