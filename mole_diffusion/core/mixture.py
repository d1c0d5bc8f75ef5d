"""Attach experts and gates to a network: `inject(network, experts, config) -> Mixture`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import functional
from .auto import Auto
from .balancing import ChangeHook
from .block_hook import BlockHook
from .config import MoLEConfig
from .context import Activation, ForwardContext
from .copies import Copies
from .counting import by_name, check_together, checked_masks, counting, fixed_weights
from .dora import BaseWeight, own_weight
from .dora_slots import DoraSlots
from .errors import InjectionError, NoExpertsError, RegionMaskError
from .experts import Expert
from .fitting import build_slots, fingerprint
from .gated_balance import GateBalance, Styled
from .groups import build_groups
from .hooks import MatrixHook, NetworkHook
from .maps import mean_map
from .matrices import build_bundles
from .modules import Arrangement, base_layer, network_device, unwrapped
from .networks import map_network
from .networks.base import DENOISER, Architecture, NetworkMap, Role
from .regions import RegionMasks
from .routing import Route
from .token_shares import shares_of
from .torch_state import is_compiling

# Network -> the mixture whose hooks are on it; a hook keeps the mixture alive.
_carried: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Mixture]] = weakref.WeakKeyDictionary()


class Mixture:
    """Experts and gates attached to one network. Made by `inject`.

    Attributes:
        part: what the host calls the network; gates files have it under this name.
        architecture: what kind of network it is.
        config: the form of the gates.
        network: the network the hooks are on.
        experts: the experts in the order of the gates' rows.
        groups: groups in execution order, each with `.name` and `.matrices`.
        gates: the trainable parameters, and nothing else.
        unmatched: expert name -> its matrices of this part that the network does not have.
        base: what the network is: its class, and a hash of its matrices' names and shapes.
        copies: what it keeps on devices.
        owner: the `Ensemble` it belongs to, if any.
        finds_places: whether there is attention to words, by which `activate(auto=...)` finds places.
    """

    def __init__(
        self,
        network: nn.Module,
        experts: Sequence[Expert],
        config: MoLEConfig,
        layout: NetworkMap,
        flatten_tokens: tuple[int, int] | int | None,
        base_weight: BaseWeight = own_weight,
    ) -> None:
        self.network = network
        self.experts = tuple(experts)
        self.config = config
        self.part = layout.part
        self.architecture: Architecture = layout.architecture
        self.base = fingerprint(network, layout)
        looking = layout.architecture.looking(layout.sites)
        self.finds_places = bool(layout.architecture.text_readers(layout.sites) or looking)
        self._joint = looking is not None and looking.rewrites
        self.owner: weakref.ref[Any] | None = None
        self._context = ForwardContext(self.part, len(self.experts))
        self._handles: list[RemovableHandle] = []
        self._on_matrices: list[RemovableHandle] = []
        self._arrangement = Arrangement(network)
        slots, self.unmatched = build_slots(network, self.experts, layout, base_weight)
        with network_device(network) or nullcontext():
            self.groups = build_groups(network, slots, layout, len(self.experts), config, flatten_tokens)
        self._context.voices = [voice for group in self.groups for voice in group.voices.values()]
        self._bundles = build_bundles(slots, layout)
        self._doras = DoraSlots([slot for slot in slots.values() if slot.doras], base_weight)
        # Names of modules have no dots.
        self.gates = nn.ModuleDict({group.name.replace(".", "__"): group.gate for group in self.groups})
        self.copies = Copies(self.groups, self._bundles, self._context.layouts, len(experts))

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names in the order of the gates' rows."""
        return tuple(expert.name for expert in self.experts)

    @property
    def in_picture(self) -> bool:
        """Whether the network has image tokens, which region masks can weight."""
        return self.role == DENOISER

    @property
    def role(self) -> Role:
        """What the network is for; decides trained strength, timestep and regions."""
        return self.architecture.role

    @property
    def enabled(self) -> bool:
        """Whether the hooks do anything."""
        return self._context.enabled

    @property
    def injected(self) -> bool:
        """Whether the hooks are still attached."""
        return bool(self._handles)

    @property
    def is_trained(self) -> bool:
        """Whether any gate has left the zero projection it starts with, or has a prior."""
        gates = [group.gate for group in self.groups]
        return any(gate.prior is not None or bool(gate.projection.any()) for gate in gates)

    @property
    def prior(self) -> Tensor | None:
        """(N,) the weights that the gates began with, see `Gate.begin_with`; None for equal ones."""
        return self.groups[0].gate.begun_with

    def parameters(self) -> list[nn.Parameter]:
        """The gates' parameters."""
        return list(self.gates.parameters())

    def to(self, device: torch.device | str) -> Mixture:
        """Move the gates, which stay float32, and the numbers of the activation.

        Both follow the network by themselves: when hooks are attached, when experts are activated and, where
        somebody moved the network since, when a forward begins. Factors follow the network's inputs.
        """
        place = torch.device(device)
        with torch.inference_mode(False), torch.no_grad():
            if place != self._device:
                self.gates.to(place)
            self._context.activation = self._context.activation.to(place)
        return self

    def release(self) -> None:
        """Let go of the factors' copies on devices; the next forward makes new ones."""
        for bundle in self._bundles:
            bundle.release()
        for group in self.groups:
            group.gate.cache.clear()
        self._context.release()

    def enable(self) -> None:
        """Let the hooks work again after `disable`."""
        self._context.enabled = True

    def disable(self) -> None:
        """Keep the hooks but let them do nothing: the network is the base model."""
        self._context.enabled = False

    def eject(self) -> None:
        """Remove all hooks; the network is as before. Calling it twice does no harm."""
        for handle in (*self._handles, *self._on_matrices):
            handle.remove()
        self._handles.clear()
        self._on_matrices.clear()
        self._context.activation.remove()
        if mixture_on(self.network) is self:
            del _carried[self.network]

    def activate(
        self,
        active_experts: Sequence[str] | None = None,
        *,
        expert_scales: Mapping[str, float] | None = None,
        region_masks: Mapping[str, Tensor] | None = None,
        latent_size: tuple[int, int] | None = None,
        weights: Mapping[str, float] | None = None,
        route: Route | None = None,
        auto: Auto | None = None,
        styled: Styled | None = None,
    ) -> None:
        """Choose experts, scales, regions and weights for the following forwards, in place of earlier ones.

        Args:
            active_experts: names of the experts to use; None for all. The rest is renormalised in proportion.
            expert_scales: factor per expert, in place of the scale the expert was loaded with. An expert of
                scale 0 is left out, as if `active_experts` did not name it: the gates give its share to the
                others. With any other scale, however small, it keeps its share.
            region_masks: (H, W) in 0..1 per expert, of the picture's or the latent's proportions. Experts
                without a mask are allowed everywhere; tokens under no mask get no expert.
            latent_size: (height, width) of the latent; None to read it off the network's input.
            weights: fixed weights that replace the gates (and their strength): 1 each is linear arithmetic,
                1/N each the normalised form. Experts that are not named get 0. Under region masks a fixed
                weight is multiplied by the mask and not renormalised.
            route: lets each matrix weigh the experts token by token, without gates and without training.
            auto: lets words and image tokens find their experts by the prompt, without training. A single
                expert is that LoRA alone, whatever the prompt says.
            styled: where gates mix the experts, keeps styles in balance with the others; else nothing.
        Raises:
            UnknownExpertError: a name is not among the experts.
            AllExpertsMaskedError: `active_experts` is empty.
            ConfigError: a scale or weight is not finite, or far too large.
            RegionMaskError: a mask has wrong axes, values or proportions, or this is a text encoder.
            ConfigError: a route is asked for beside fixed weights or regions, or block outputs are mixed.
        """
        check_together(auto, weights, route, region_masks, self.config, styled)
        active, scales = counting(self.experts, active_experts, expert_scales or {})
        active, fixed = fixed_weights(self.experts, active, weights)
        regions = self._regions(region_masks, active, latent_size) if region_masks else None
        shares, balance, names = None, None, self.expert_names
        if auto is not None and len(active) > 1:
            layout = map_network(self.network, self.part)
            shares = shares_of(auto, self.network, layout, names, active, regions)
        if styled is not None and self.in_picture and self.config.composition == "delta":
            balance = GateBalance(styled, self.architecture, self._joint, self.groups, names, active)
        self._context.activation.remove()
        self._context.forget()
        self._context.given_size = latent_size
        everybody = len(active) == len(self.experts)
        with torch.inference_mode(False):
            self._context.activation = Activation(
                active,
                torch.tensor(scales) if any(scale != 1.0 for scale in scales) else None,
                None if fixed is None else torch.tensor(fixed),
                regions if shares is None else None,
                None if everybody else functional.active_mask(active, len(self.experts)),
                route if len(active) > 1 else None,
                shares,
                balance,
            )
        self.to(network_device(self.network) or self._device)
        self._renew_doras()
        self._choose()

    def _choose(self) -> None:
        """Let everything know which experts count from now on."""
        for bundle in self._bundles:
            bundle.choose(self._context.activation)
        for group in self.groups:
            group.gate.cache.clear()
        self._context.chosen = True

    def chosen(
        self, active_experts: Sequence[str] | None = None, expert_scales: Mapping[str, float] | None = None
    ) -> tuple[str, ...]:
        """Names of the experts that count with these choices, see `activate`; in the order of the rows."""
        active, _ = counting(self.experts, active_experts, expert_scales or {})
        return tuple(self.expert_names[i] for i in active)

    @property
    def _device(self) -> torch.device:
        """Where the gates are."""
        return self.groups[0].gate.projection.device

    def _renew_doras(self) -> None:
        """Follow weights that somebody changed."""
        if self._doras.renew():
            self.release()

    def _move(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the network: the gates go where its inputs are."""
        # Whoever changed the weights may have done so after the experts were activated.
        if self._doras.due and not is_compiling():
            self._renew_doras()
            self._doras.due = False
        device = self._device
        for x in (*args, *kwargs.values()):  # a generator in `next` does not compile in torch 2.8
            if isinstance(x, Tensor):
                device = x.device
                break
        if device != self._device and device.type != "meta":
            self.to(device)

    def live_weights(self) -> dict[str, Tensor]:
        """Gate weights of the last forward, with gradient: group -> (B, N), mean over tokens.

        The gate of a denoiser's text tokens in a group is named "GROUP.context". Empty with fixed weights.
        """
        return {label: value.mean() for label, value in self._context.live.items()}

    def live_map(self) -> Tensor | None:
        """Where in the picture each expert acted in the last forward, (B, N, h, w); see `mean_map`."""
        return mean_map(self._context, self.groups)

    def _regions(
        self, masks: Mapping[str, Tensor], active: tuple[int, ...], latent_size: tuple[int, int] | None
    ) -> RegionMasks:
        if not self.in_picture:
            raise RegionMaskError("Region masks weight image tokens; a text encoder has none.")
        regions = RegionMasks(checked_masks(self.experts, masks), len(self.experts), active)
        if latent_size is not None:
            regions.check_aspect(latent_size)
        return regions

    def attach(self) -> None:
        """Put the hooks on the network, again after `eject`; gates and activation are as they were.

        Raises:
            InjectionError: the network carries a mixture.
        """
        if self.network in _carried:
            raise InjectionError(
                f"This {type(self.network).__name__} already carries a mixture; eject() that first."
            )
        self._follow()
        start = NetworkHook(self._context, self.groups, self._bundles, self.architecture, self._follow)
        # Before the hooks that hide experts' trigger words from a text encoder; after those of a host that
        # change a denoiser's weights.
        first = not self.in_picture
        for hook in (start, self._move) if first else (self._move, start):
            handle = self.network.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
            self._handles.append(handle)
        if self.in_picture:
            self._handles += ChangeHook(self._context).register(self.network)
        for group in self.groups:
            if group.block is not None:
                block = BlockHook(group, self._context)
                self._handles.append(group.block.register_forward_pre_hook(block.before, with_kwargs=True))
                # Before the hooks of others, which are to see the mixed output.
                after = group.block.register_forward_hook(block.after, with_kwargs=True, prepend=True)
                self._handles.append(after)
        self._hook_matrices()
        _carried[self.network] = weakref.ref(self)
        self.to(network_device(self.network) or self._device)
        self._renew_doras()

    def _hook_matrices(self) -> None:
        by_matrix = {slot.name: bundle for bundle in self._bundles for slot in bundle.slots}
        for group in self.groups:
            for slot in group.slots:
                reading = None if group.reader is None else by_matrix[group.reader.name]
                hook = MatrixHook(slot, group, by_matrix[slot.name], self._context, reading)
                self._on_matrices.append(slot.module.register_forward_hook(hook))

    def _follow(self) -> None:
        """Let the hooks follow a network that has fused or parted its projections since."""
        if not self._arrangement.changed():
            return
        self._arrangement = Arrangement(self.network)
        sites = {site.name: site for site in map_network(self.network, self.part).sites}
        for group in self.groups:
            for slot in group.slots:
                if slot.name not in sites:
                    raise InjectionError(
                        f"This {type(self.network).__name__} does not run {slot.name!r} any more, which "
                        "experts change: eject() and inject again."
                    )
                site = sites[slot.name]
                slot.module, slot.rows = base_layer(self.network.get_submodule(site.path)), site.rows
                slot.swapped = site.swapped
        if self._on_matrices:
            for handle in self._on_matrices:
                handle.remove()
            self._on_matrices.clear()
            self._hook_matrices()


def inject(
    network: nn.Module,
    experts: Sequence[Expert],
    config: MoLEConfig,
    *,
    part: str | None = None,
    flatten_tokens: tuple[int, int] | int | None = None,
) -> Mixture:
    """Attach experts and fresh gates to a network by forward hooks.

    Args:
        network: of any kind in `networks`; its modules and state dict stay as is.
        experts: at least one; their order is the order of the gates' rows.
        config: the form of the gates.
        part: what the host and the experts' files call it; None for the usual name of its kind (a second text
            encoder looks like the first).
        flatten_tokens: for pooling "flatten": the latent's (height, width) for a denoiser (None: its own
            size), the number of tokens for a text encoder (None: 77).
    Raises:
        NoExpertsError: `experts` is empty.
        ConfigError: two experts have one name, or flattened gates are asked for and no size is known.
        InjectionError: the network carries a mixture, is of no known kind, or an expert was made for another.
    """
    network = unwrapped(network)
    if not experts:
        raise NoExpertsError("There are no experts to inject; load at least one.")
    by_name(experts)
    with torch.inference_mode(False):
        mixture = Mixture(network, experts, config, map_network(network, part), flatten_tokens)
        mixture.activate()
        mixture.attach()
    return mixture


def mixture_on(network: nn.Module) -> Mixture | None:
    """The mixture whose hooks are on a network, or None."""
    found = _carried.get(unwrapped(network))
    return None if found is None else found()
