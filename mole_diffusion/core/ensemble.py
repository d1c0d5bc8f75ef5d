"""`Ensemble`: experts and gates on the networks of one model, whichever host runs them."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .auto import Auto
from .bases import check_prediction
from .carrier import Carrier
from .checkpoint import GatesHeader, load_gates, read_gates_header, save_gates
from .config import MoLEConfig
from .counting import by_name
from .dora import BaseWeight, own_weight
from .errors import GateMismatchError, InjectionError
from .experts import Expert
from .gated_balance import Styled
from .mixture import Mixture, mixture_on
from .mixture_set import Choice, Companions, MixtureSet
from .modules import unwrapped
from .networks import map_network
from .reading import BadFileError, parse_json
from .shared_gates import SharedGates

logger = logging.getLogger(__name__)

#: The fact of a base that experts and gates must agree with.
PREDICTION_TYPE = "prediction_type"
# What gates files note of their experts: a JSON list of names.
_STYLES = "styles"


class Ensemble(Carrier):
    """The experts of one model: a mixture on each of its networks that an expert changes.

    Every host holds one: it carries experts, gates, what counts in the next forwards, and records (see
    `Carrier` for what is done with those that are here). Whatever fails leaves everything as it was.

    Args:
        networks: part -> network; an expert's file says which parts it changes.
        facts: what the base is beyond its matrices, such as {"prediction_type": "epsilon"}: experts and gates
            whose files say otherwise are refused. Hosts keep it up to date.
        flatten_tokens: part -> tokens that `pooling="flatten"` is sized for, see `inject`.
        config: the form of the first gates.
        base_weight: the weight of a module without anybody's patches, which DoRA experts are computed from;
            None for the weight as it is.
        attached: whether hooks go on at once; else `unpark` puts them on.

    Attributes:
        networks, facts, flatten_tokens: as given.
        shared: what refines `mixture="auto"`, whichever experts come; None for nothing.
        style_balance: how trained gates keep styles in balance with others, see `gated_balance.Styled`.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        *,
        facts: Mapping[str, str],
        flatten_tokens: Mapping[str, tuple[int, int] | int | None] | None = None,
        config: MoLEConfig | None = None,
        base_weight: BaseWeight | None = None,
        attached: bool = True,
    ) -> None:
        super().__init__(MixtureSet(config=config or MoLEConfig()))
        self.networks = {part: unwrapped(network) for part, network in networks.items()}
        self.facts = dict(facts)
        self.flatten_tokens = dict(flatten_tokens or {})
        self.shared: SharedGates | None = None
        self.style_balance: float | None = None
        self._attached = attached
        self._base_weight = base_weight or own_weight

    def take_shared(self, shared: SharedGates) -> None:
        """Refine `mixture="auto"` by these from now on.

        Raises:
            GateMismatchError: they are for another base; those from before stay.
        """
        if self.mixtures:
            shared.check(self.mixtures)
        self.shared = shared

    @classmethod
    def carrying(cls, networks: Mapping[str, nn.Module]) -> Ensemble | None:
        """The ensemble whose experts are on these very networks, by whatever way they came here."""
        wanted = {part: unwrapped(network) for part, network in networks.items()}
        for network in wanted.values():
            mixture = mixture_on(network)
            owner = None if mixture is None or mixture.owner is None else mixture.owner()
            if isinstance(owner, Ensemble) and owner.networks == wanted:
                return owner
        return None

    def set_experts(
        self,
        experts: Iterable[Expert],
        config: MoLEConfig | None = None,
        *,
        companions: Companions | None = None,
        unchecked: Collection[str] = (),
    ) -> None:
        """Have these experts in place of all earlier ones, with fresh gates; all of them count.

        Args:
            experts: in the order of the gates' rows; none at all takes everything away.
            config: the form of the gates; None as before.
            companions: makes what the experts bring along.
            unchecked: names of experts that are used though their file names another prediction type than
                `facts`; one that is here already is not asked again.

        Raises:
            ExpertLoadError: an expert belongs to a base of another prediction type.
            InjectionError: an expert does not fit its network, or a network carries another mixture.
            ConfigError: two experts have one name.
        """
        chosen = list(experts)
        with self.in_use():
            self._check_base(expert for expert in chosen if expert.name not in unchecked)
            fresh, old = self.build(chosen, config), self.mixtures
            self._replace(fresh, companions or (lambda _: ()))
        if chosen:
            _warn_of_lost_gates(old)

    def configure(self, config: MoLEConfig) -> None:
        """Give the experts fresh gates of another form; trained ones are lost."""
        with self.in_use():
            old = self.mixtures
            self._regate(self.build(self.experts.values(), config))
        _warn_of_lost_gates(old)

    def eject(self) -> None:
        """Take everything away: the networks are bitwise what they were before the first expert."""
        with self.in_use():
            self._replace(MixtureSet(config=self._held.config), lambda _: ())

    def build(
        self,
        experts: Iterable[Expert],
        config: MoLEConfig | None = None,
        configs: Mapping[str, MoLEConfig] | None = None,
    ) -> MixtureSet:
        """Fresh mixtures of these experts for these networks, without their hooks.

        Args:
            experts: in the order of the gates' rows.
            config: the form of the gates; None as they are here, part by part.
            configs: part -> form, where it is another.

        Raises:
            InjectionError, ConfigError: see `set_experts`.
        """
        named = by_name(experts)
        forms = {**(self._held.configs if config is None else {}), **(configs or {})}
        found = MixtureSet(named, config or self._held.config, forms, dict(self.networks))
        for part in self.networks:
            if any(expert.factors.get(part) for expert in named.values()):
                found.mixtures[part] = self._mixture(part, found)
        return found

    def _mixture(self, part: str, of: MixtureSet) -> Mixture:
        network = self.networks[part]
        with torch.inference_mode(False):
            mixture = Mixture(
                network,
                list(of.experts.values()),
                of.configs.get(part, of.config),
                map_network(network, part),
                self.flatten_tokens.get(part),
                self._base_weight,
            )
            mixture.activate()
        mixture.owner = weakref.ref(self)
        return mixture

    def renew(self, part: str) -> None:
        """Build the mixture of a network anew, some of whose modules were replaced; its gates stay.

        Its hooks are off afterwards.
        """
        before = self.mixtures[part]
        self.park([part])
        mixture = self._mixture(part, self._held)
        mixture.gates.load_state_dict(before.gates.state_dict())
        for old, new in zip(before.parameters(), mixture.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        self.choice.apply([mixture])
        self.mixtures[part] = mixture

    def _check_base(self, experts: Iterable[Expert]) -> None:
        predicted = self.facts.get(PREDICTION_TYPE)
        for expert in experts:
            if predicted is not None and self.experts.get(expert.name) is not expert:
                check_prediction(expert, predicted)

    def _replace(self, fresh: MixtureSet, companions: Companions) -> None:
        """Have other experts; what fails on the way leaves those from before."""
        old, attached = self._held, self._held.attached
        self._unwatch()
        old.detach()
        try:
            for companion in companions(list(fresh.experts.values())):
                fresh.companions.append(companion)
            if self._attached:
                fresh.attach()
        except BaseException:
            fresh.detach()
            old.attach(attached)
            self._watch(attached)
            raise
        self._held = fresh
        if self._attached:
            self._watch(fresh.mixtures)

    def _regate(self, fresh: MixtureSet) -> None:
        """Have other gates for the same experts: what they bring along and what counts stay."""
        old, attached = self._held, self._held.attached
        old.choice.apply(fresh.mixtures.values())
        fresh.choice, fresh.companions = old.choice, old.companions
        self.park()
        try:
            self._held = fresh
            self.unpark(attached)
        except BaseException:
            self._held = old
            self.unpark(attached)
            raise

    def take(self) -> MixtureSet:
        """Take everything off, bitwise, and hand it over for `put`; the ensemble has no experts then.

        For hosts that serve several users with one base model, one after the other.
        """
        with self.in_use():
            held = self._held
            self._unwatch()
            held.detach()
            self._held = MixtureSet(config=held.config)
        return held

    def put(self, held: MixtureSet) -> None:
        """Put on what `take` took off the same networks; gates and what counts are as they were.

        Raises:
            InjectionError: there are experts, or these were taken off other networks.
        """
        with self.in_use():
            if self.experts:
                raise InjectionError(f"There are the experts {list(self.experts)}; take() them first.")
            if held.experts and held.networks != self.networks:
                raise InjectionError("These experts were taken off other networks.")
            held.attach()
            for mixture in held.mixtures.values():
                mixture.owner = weakref.ref(self)
            self._held = held
            self._watch(held.mixtures)

    @contextmanager
    def standing_in(self, others: MixtureSet) -> Iterator[None]:
        """Other experts and gates inside the `with` block; afterwards those from before, bitwise.

        What the experts from before bring along stays: their trigger words may stand in the prompts.

        Args:
            others: from `build`; they are of use for several blocks.
        """
        with self.in_use(), self._others(others):
            yield

    @contextmanager
    def _others(self, others: MixtureSet) -> Iterator[None]:
        before, attached = self._held, self._held.attached
        self.park()
        self._held = replace(others, companions=before.companions)
        for mixture in others.mixtures.values():
            mixture.owner = weakref.ref(self)
        try:
            self.activate(Choice())
            self.unpark()
            yield
        finally:
            self.park()
            self._held = before
            self.unpark(attached)
            before.show()

    def load_gates(
        self, path: str | Path, strict: bool = True, *, parts: Sequence[str] | None = None
    ) -> dict[str, str]:
        """Read gates that were trained for these experts; each part takes over the form that the file says.

        Args:
            path: a file of `save_gates`.
            strict: see `checkpoint.load_gates`.
            parts: the only parts of the file to read, where a host cannot offer the others; None for all.

        Returns:
            What the writer added to the header.

        Raises:
            GateMismatchError: the gates do not fit; `differences` lists why.
        """
        with self.in_use():
            header = read_gates_header(path)
            forms, said = self._forms(header), _said(header, path)
            if all(self.mixtures[part].config == form for part, form in forms.items()):
                found = load_gates(path, self.mixtures, strict, parts=parts, facts=self.facts)
            else:
                fresh = self.build(self.experts.values(), configs=forms)
                found = load_gates(path, fresh.mixtures, strict, parts=parts, facts=self.facts)
                fresh.config = next(iter(forms.values()))
                self._regate(fresh)
            self._held.said = said
            return found

    def build_gated(self, path: str | Path) -> MixtureSet:
        """The experts with the gates of a file, without their hooks: to stand in for those that are here.

        Raises:
            GateMismatchError: see `load_gates`.
        """
        header = read_gates_header(path)
        fresh = self.build(self.experts.values(), configs=self._forms(header))
        fresh.said = _said(header, path)
        load_gates(path, fresh.mixtures, facts=self.facts)
        return fresh

    def balanced(self, choice: Choice, texts: Callable[[], Auto | None]) -> Choice:
        """The same choice; where trained gates mix styles with other experts, these are kept in balance.

        Args:
            choice: what is to count.
            texts: makes what knows which texts are prompts; None for nobody.
        """
        counting = [name for name in self.experts if choice.active is None or name in choice.active]
        styles = [name for name in self.styles if name in counting]
        trained = any(mixture.is_trained for mixture in self.mixtures.values())
        if self.style_balance == 0 or not choice.gated or not trained or not 0 < len(styles) < len(counting):
            return choice
        return replace(choice, styled=Styled(styles, self.style_balance, texts()))

    def say_styles(self, names: Iterable[str]) -> None:
        """Note which experts change the whole picture, for gates that are trained or saved from now on."""
        self._held.said = frozenset(names)

    def _forms(self, header: GatesHeader) -> dict[str, MoLEConfig]:
        """Part -> form of its gates in a file, of the parts that are here."""
        return {part: header.config(part) for part in self.mixtures if part in header.parts}

    def save_gates(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the gates, with the names and hashes of their experts and the facts of the base.

        Args:
            path: file to write or replace.
            metadata: more to note in the header.
        """
        said = {_STYLES: json.dumps(sorted(self._held.said))} if self._held.said else {}
        save_gates(path, self.mixtures, metadata={**self.facts, **said, **(metadata or {})})


def _said(header: GatesHeader, path: str | Path) -> frozenset[str]:
    """The experts that a gates file says to change the whole picture.

    Raises:
        GateMismatchError: what it says is no list of names.
    """
    said = header.metadata.get(_STYLES, "[]")
    try:
        names = parse_json(said)
    except BadFileError as error:
        raise GateMismatchError(f"{str(path)!r} is damaged: its header's {_STYLES!r}: {error}.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise GateMismatchError(f"{str(path)!r} is damaged: its header's {_STYLES!r} is {said!r:.60}.")
    return frozenset(names)


def _warn_of_lost_gates(old: Mapping[str, Mixture]) -> None:
    """Say that fresh gates took the place of trained ones."""
    lost = [part for part, mixture in old.items() if mixture.is_trained]
    if lost:
        logger.warning("the gates trained for %s are lost: the expert set or the configuration changed", lost)
