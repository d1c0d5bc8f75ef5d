"""UNets of Stable Diffusion 1.x, 2.x and XL: levels, names of diffusers and of LDM, tokens by halving.

Canonical names are those of diffusers. LDM counts all blocks of a side in one row and diffusers within a
level, so what an LDM name means depends on the network's residual blocks per level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ..base import CONTEXT, DENOISER, Base, Forward, Looking, Place, Role, Site
from ..clip import TOKENS_OF_A_TEXT
from ..families import SD1, SD2, SDXL, SDXL_REFINER, STARTER
from .names import BLOCKS, FLAT_NORM, SD_LAYERS, layers_of, read
from .sites import UNetSite, unet_sites

__all__ = ["UNET", "UNet", "halved_grid"]

#: What hosts, and gates files, call a UNet.
UNET = "unet"

# The width of the text that the cross-attention reads tells the families apart.
_FAMILY_OF_WIDTH = {768: SD1, 1024: SD2, 1280: SDXL_REFINER, 2048: SDXL, 192: STARTER}
_QUERIES = ".attn2.to_q"
_TEXT_LEAVES = (".attn2.to_k", ".attn2.to_v")
# Halvings of the latent at most.
_MAX_DEPTH = 8
# Steps of the diffusion that the timestep counts.
_STEPS = 1000.0


class UNet:
    """UNets of Stable Diffusion, under the names of diffusers or LDM."""

    name = UNET
    role: Role = DENOISER
    slots = (UNET,)
    prefixes: Mapping[str, Sequence[str]] = MappingProxyType(
        {
            UNET: (
                *("lora_unet_", "lycoris_unet_", "lycoris_", "unet_"),
                *("model_diffusion_model_", "diffusion_model_"),
            )
        }
    )
    writers: Mapping[str, str] = MappingProxyType({})
    families = tuple(_FAMILY_OF_WIDTH.values())
    example = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    text_gates = False
    causal = False

    def sites(self, network: nn.Module) -> tuple[Site, ...]:
        """See `Architecture`; where projections are fused, the fused modules' rows."""
        return unet_sites(network)

    def read(self, flat: str) -> tuple[Place, ...]:
        """See `Architecture`; LDM's names are read for two residual blocks per level."""
        return read(flat, SD_LAYERS)

    def fits(self, flat: str, outputs: int, inputs: int) -> bool:
        """See `Architecture`: no other kind has these names."""
        return True

    def reader(self, sites: Sequence[Site]) -> Callable[[str], tuple[Place, ...]]:
        """See `Architecture`; LDM's names depend on the network's levels."""
        return partial(read, layers=layers_of(sites) or SD_LAYERS)

    def why_not(self, flat: str) -> str | None:
        """See `Architecture`."""
        if FLAT_NORM.search(flat):
            return "normalisation layers multiply no matrix, so there is nothing to gate"
        return None

    def text_readers(self, sites: Sequence[Site]) -> tuple[tuple[Site, Site], ...]:
        """See `Architecture`."""
        named = {site.name: site for site in sites}
        pairs = ((site, named.get(site.name.replace("to_q", "to_k"))) for site in sites)
        return tuple(
            (queries, keys) for queries, keys in pairs if queries.name.endswith(_QUERIES) and keys is not None
        )

    def looking(self, sites: Sequence[Site]) -> Looking | None:
        """See `Architecture`: `text_readers` say so."""
        return None

    def leaf(self, matrix: str) -> str:
        """See `Architecture`."""
        return BLOCKS.sub("", matrix)

    def write(self, matrix: str, dialect: str) -> str:
        """See `Architecture`."""
        return matrix if any(place.matrix == matrix for place in self.read(matrix.replace(".", "_"))) else ""

    def prefix(self, slot: str, dialect: str, *, several: bool) -> str:
        """See `Architecture`."""
        return "lora_unet_" if dialect == "kohya" else f"{slot}."

    def family(self, slot: str, inputs: Mapping[str, int]) -> Base | None:
        """See `Architecture`: told by the input width of the cross-attention's keys or values."""
        width = next((width for name, width in inputs.items() if name.endswith(_TEXT_LEAVES)), None)
        return None if width is None else Base(_FAMILY_OF_WIDTH.get(width), width)

    def tokens(self, network: nn.Module, site: Site, stream: str, given: tuple[int, int] | int | None) -> int:
        """See `Architecture`; `given` is the latent's (height, width), by default the network's own."""
        if stream == CONTEXT:
            return TOKENS_OF_A_TEXT
        size = given if given is not None else getattr(getattr(network, "config", None), "sample_size", None)
        if isinstance(size, int):
            size = (size, size)
        if not isinstance(size, (tuple, list)):
            raise ConfigError(
                "pooling='flatten' needs the latent's size: pass flatten_tokens=(height, width)."
            )
        height, width = size
        for _ in range(site.depth if isinstance(site, UNetSite) else 0):
            height, width = (height + 1) // 2, (width + 1) // 2
        return int(height * width)

    def forward(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given_size: tuple[int, int] | None
    ) -> Forward:
        """See `Architecture`: (latent (B, C, H, W), timestep, text), by place or by any host's names."""
        latent = args[0] if args else kwargs.get("sample", kwargs.get("x"))
        size = given_size
        if size is None and isinstance(latent, Tensor) and latent.dim() == 4:
            size = (latent.shape[-2], latent.shape[-1])
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states", kwargs.get("context"))
        mask = kwargs.get("encoder_attention_mask")
        return Forward(
            time=args[1] if len(args) > 1 else kwargs.get("timestep", kwargs.get("timesteps")),
            noise=_STEPS,
            size=size,
            grid=None if size is None else partial(halved_grid, size),
            masks={CONTEXT: mask} if isinstance(mask, Tensor) and mask.dim() == 2 else {},
            text=text if isinstance(text, Tensor) and text.dim() == 3 else None,
        )


def halved_grid(size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """(height, width) of image tokens at whichever level has so many of them; None if none has."""
    height, width = size
    for _ in range(_MAX_DEPTH):
        if height * width == tokens:
            return height, width
        height, width = (height + 1) // 2, (width + 1) // 2
    return None
