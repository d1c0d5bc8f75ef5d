"""`mixture="auto"` in a denoiser: which places of a picture are whose, by how they look at the words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .attention import Watcher
from .auto import Auto, are_same
from .auto_shares import (
    Counting,
    claimed_places,
    shared_places,
    shared_rest,
    with_everywhere,
)
from .balancing import Balance, Lead, Wanted
from .context import ForwardContext
from .errors import ConfigError
from .laid_out import LaidOut, lengthened
from .networks.base import CONTEXT, EMBEDDING, TOKENS, Forward, Texts
from .regions import RegionMasks
from .seen_places import SeenPlaces, pictures_of
from .styled_shares import StyledShares, beside_others
from .torch_state import is_compiling
from .values import GateValue

logger = logging.getLogger(__name__)

# Samplers go back by less than this within a picture.
_ANEW = 0.1


class PictureShares:
    """Weights of a denoiser's tokens, in the forwards of one picture or batch.

    A text may change in the middle of a picture, and several may draw one: places are remembered by picture
    and expert, and each text has those of the experts that it names.

    Args:
        auto: what the host knows.
        maps: watches the denoiser.
        balance: keeps styles and subjects in balance.
        names: of the experts, in the order of the rows.
        active: indices of those that count.
        regions: where experts count; None for everywhere.
        rewrites: whether the denoiser encodes the texts further, see `Looking`.
    """

    def __init__(
        self,
        auto: Auto,
        maps: Watcher,
        balance: Balance,
        names: tuple[str, ...],
        active: tuple[int, ...],
        regions: RegionMasks | None,
        *,
        rewrites: bool = False,
    ) -> None:
        self._auto, self._maps, self._balance = auto, maps, balance
        self._regions, self._rewrites = regions, rewrites
        self.by_place = auto.shared is not None
        self._blind = False
        self._rows = Counting(auto, names, active)
        self._known: tuple[Texts, Tensor, Tensor, Tensor, Tensor] | None = None
        self._values: dict[tuple[str, int, str], GateValue] = {}
        self._words = self._everywhere = torch.zeros(0)
        self._seen: SeenPlaces | None = None
        self._reading: tuple[list[int | None], Tensor] | None = None
        self._laid: LaidOut | None = None
        self._styles: StyledShares | None = None
        self._alone: Tensor | None = None
        self._begun = False
        self._start = self._last = 0.0

    def remove(self) -> None:
        """Stop watching."""
        self._maps.remove()

    def begin(self, context: ForwardContext, forward: Forward) -> None:
        """A forward begins: take what the last one was seen to look at; find out whose the words are.

        Raises:
            ConfigError: the denoiser is given no text, or one that nobody knows, or does not say where the
                tokens of the picture lie.
            RegionMaskError: a mask is not of the latent's proportions.
        """
        if self._regions is not None and forward.size is not None:
            self._regions.check_aspect(forward.size)
        self._take()
        time = 1.0 if forward.timestep is None else float(torch.as_tensor(forward.timestep).max())
        if forward.text is None:
            raise ConfigError(f"mixture='auto' needs the {context.part} to be called with a text.")
        if forward.grid is None:
            raise ConfigError(
                f"mixture='auto' cannot tell where in the picture the {context.part}'s tokens lie."
            )
        self._words, named, styled, prompts = self._places(forward.text)
        pictures = self._begin_step(time, named, styled, prompts)
        assert self._seen is not None
        self._everywhere = self._rows.everywhere_of(self._seen.styled_in(pictures), self._words.device)
        lacking = self._lacking(pictures, named)
        watched = time > self._auto.settings.until
        reading = self._regions is None and bool(named.any()) and (watched or bool(lacking.any()))
        reading = reading and not self._blind and self._balance.left is None
        self._maps.begin(self._words if reading else None, forward)
        self._reading = (pictures, named if watched else lacking) if reading else None
        self._styles = self._weigh_styles(pictures)
        self._laid = self._lay_out(pictures, named, prompts, watched)
        self._alone = self._find_alone(pictures)
        self._begin_balance(context, prompts, watched)
        self._values.clear()

    def _begin_balance(self, context: ForwardContext, prompts: Tensor, watched: bool) -> None:
        """A style is kept in balance with what it stands beside, where places are known."""
        if self._styles is None or self._laid is None or watched:
            return
        wanted = Wanted(
            prompts,
            self._styles.beside.flatten(1).any(1),
            (self._everywhere != 0).flatten(0, 1).any(0),
            partial(self._in_prediction, context),
            self._last,
            Lead(self._auto.settings.balance_in(joint=self._rewrites)),
        )
        self._balance.begin(context, wanted)

    def _in_prediction(self, context: ForwardContext, prediction: Tensor) -> Tensor:
        """(B, T, N) whose the places of a prediction are."""
        assert self._laid is not None
        if prediction.dim() > 3:
            return self._laid.weights(prediction.shape[-2], prediction.shape[-1])
        return self._image(context, prediction.shape[1])

    def _begin_step(self, time: float, named: Tensor, styled: Tensor, prompts: Tensor) -> list[int | None]:
        """Which picture each row shows; forget the last ones if these are others.

        Args:
            time: the timestep, from 1 to 0.
            named: (B, N) the experts that the prompts name, of those that have places.
            styled: (B, N) the same of those that count in the whole picture.
            prompts: (B,) which rows are prompts.
        """
        anew = time > self._last + _ANEW or time >= self._start > self._last or not self._begun
        if anew:
            self._start, self._begun, self._blind = time, True, False
            if not self._auto.continues:
                self._seen = None
        before = 0 if self._seen is None else len(self._seen.met)
        count = 1 if self._auto.single else int(prompts.sum()) or before
        pictures = pictures_of(prompts.tolist(), count)
        if self._seen is None or len(self._seen.met) != count:
            self._seen = SeenPlaces(count, named.shape[1])
        if bool(prompts.any()):
            if time != self._last:
                self._seen.now.zero_()
                self._seen.styled.zero_()
            for row, picture in enumerate(pictures):
                if picture is not None:
                    self._seen.now[picture] |= named[row]
                    self._seen.styled[picture] |= styled[row]
        self._last = time
        return pictures

    def _weigh_styles(self, pictures: Sequence[int | None]) -> StyledShares | None:
        """What styles count beside others; None for as ever."""
        # Asked of what the host says: what is on a GPU would have to be waited for, in every forward.
        if self._seen is None or not self._auto.everywhere:
            return None
        beside = beside_others(self._everywhere, pictures, self._seen.now)
        return None if beside is None else StyledShares(beside, self._auto.settings, self._last)

    def _find_alone(self, pictures: Sequence[int | None]) -> Tensor | None:
        """(B, 1, N) the expert of a picture that has one alone, beside others in the batch; None for none.

        A prompt that is drawn by itself gives that expert everything, see `Calling.everywhere`.
        """
        if self._seen is None or len(self._seen.now) == 1 or not self._rows.called_only():
            return None
        rows = torch.zeros(len(pictures), self._seen.now.shape[1])
        for row, picture in enumerate(pictures):
            if picture is None or bool(self._seen.styled[picture].any()):
                continue
            if int(self._seen.now[picture].sum()) == 1:
                rows[row] = self._seen.now[picture].float()
        return rows.to(self._words.device)[:, None] if bool(rows.any()) else None

    def _lacking(self, pictures: Sequence[int | None], named: Tensor) -> Tensor:
        """(B, N) the experts that a prompt names and of whose places nothing is known yet."""
        assert self._seen is not None
        met = torch.zeros_like(named)
        for row, picture in enumerate(pictures):
            if picture is not None:
                met[row] = self._seen.met[picture]
        return named & ~met

    def _take(self) -> None:
        """Add the maps of the last forward, of the rows whose text names experts."""
        found = self._maps.taken()
        if found is not None and self._reading is not None and self._seen is not None:
            self._seen.add(found, *self._reading)
        elif found is None and self._reading is not None:
            self._blind = True
            logger.warning(
                "the denoiser's attention to the prompt cannot be read (it is not computed by torch's own"
                " function, or the network is compiled as a whole): the experts that the prompt names have"
                " equal shares everywhere in the picture"
            )
        self._reading = None

    def _places(self, text: Texts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is known of the texts.

        Returns:
            (B, L, N) whose words their tokens are; on the CPU (B, N) the experts that each prompt names, none
            for other texts, of those that have places and of those of the whole picture, and (B,) which are
            prompts.
        """
        if self._known is not None and are_same(self._known[0], text):
            return self._known[1:]
        rows = self._auto.recognise(text)
        if all(one is None for one in rows):
            raise ConfigError(
                "mixture='auto' reads the words of the prompt, and the denoiser was given a text that this "
                "pipeline did not encode: draw with a prompt, or with what its encode_prompt returns inside "
                "composing(mixture='auto')."
            )
        nothing = torch.zeros(len(text[0]), len(self._rows.names))
        places = pad_sequence([nothing if one is None else one.places for one in rows], batch_first=True)
        self._rows.meet(places)
        cpu = places.device
        apart = self._rows.everywhere(cpu) == 0
        styled = (places * ~apart).any(1)
        places = places * self._rows.counting(cpu) * apart
        named = places.any(1)
        kinds = [None if one is None else one.prompt for one in rows]
        decided = zip(kinds, named.any(1).tolist(), strict=True)
        prompts = torch.tensor([own if kind is None else kind for kind, own in decided])
        named, styled = (own & prompts[:, None] for own in (named, styled))
        self._known = text, places.to(text[0].device), named, styled, prompts
        return self._known[1:]

    def value(self, context: ForwardContext, stream: str, tokens: int, place: str) -> GateValue:
        """Weights (B * T, N) of the tokens of a stream; one row per picture where it is "embedding"."""
        if is_compiling():  # a block that finds what an earlier one computed would not be like that one
            return self._value(context, stream, tokens, place)
        key = stream, tokens, place
        if key not in self._values:
            self._values[key] = self._value(context, stream, tokens, place)
        return self._values[key]

    def _value(self, context: ForwardContext, stream: str, tokens: int, place: str) -> GateValue:
        if stream == CONTEXT:
            weights = self._text(context.forward, tokens)
        elif stream == EMBEDDING:
            weights = self._nothing(1) if self._laid is None else self._laid.mean()
        else:
            weights = self._image(context, tokens)
        refining = self._auto.refining
        if refining is not None and stream != EMBEDDING:
            weights = refining.refine(context.part, place, weights, self._last)
        weights = with_everywhere(weights, self._everywhere)
        if self._styles is not None and stream == CONTEXT:
            weights = self._styles.in_words(weights)
        elif self._styles is not None and stream != EMBEDDING:
            weights = self._styles.in_picture(weights, self._claimed(context, tokens))
        if stream == TOKENS and self._regions is not None:
            weights = weights * context.region_masks(self._regions, tokens, weights.device)
        return GateValue(weights.flatten(0, 1), len(weights), None, in_backward=False)

    def _text(self, forward: Forward, tokens: int) -> Tensor:
        """(B, tokens, N) weights of text tokens.

        Networks may lengthen texts, up to the width of their masks, and fold what several layers of a text
        encoder say of a word into as many tokens.
        """
        words = self._rows.in_words(self._words)
        known, mask = words.shape[1], forward.masks.get(CONTEXT)
        if known < tokens and ((mask is not None and tokens <= mask.shape[1]) or tokens % known):
            words = F.pad(words, (0, 0, 0, tokens - known))
        if self._rewrites:
            words = shared_rest(words)
        if self._alone is not None:
            words = torch.where(self._alone.any(-1, keepdim=True), self._alone, words)
        return words if words.shape[1] == tokens else words.repeat_interleave(tokens // known, dim=1)

    def _image(self, context: ForwardContext, tokens: int) -> Tensor:
        """(B, tokens, N) weights of image tokens; those of other pictures have the mean."""
        if self._laid is None:
            return self._nothing(tokens)
        grid = context.token_grid(tokens - context.references(tokens))
        return lengthened(self._laid.weights(*grid), tokens)

    def _claimed(self, context: ForwardContext, tokens: int) -> Tensor:
        """(B, tokens, 1) how far image tokens are some expert's."""
        assert self._laid is not None  # whom a style stands beside has a place
        grid = context.token_grid(tokens - context.references(tokens))
        return lengthened(self._laid.claimed(*grid), tokens)

    def _nothing(self, tokens: int) -> Tensor:
        """(B, tokens, N) where no prompt names an expert."""
        return self._words.new_zeros(len(self._words), tokens, self._words.shape[-1])

    def _lay_out(
        self, pictures: Sequence[int | None], named: Tensor, prompts: Tensor, watched: bool
    ) -> LaidOut | None:
        """Share out the places, once per forward; None where no prompt names an expert.

        Args:
            pictures: which one each row shows.
            named: (B, N) the experts that the prompts name.
            prompts: (B,) which rows are prompts; the others have the places of their picture.
            watched: whether the layout forms.
        """
        assert self._seen is not None
        if not bool(self._seen.now.any()):
            return None
        wanted: dict[tuple[int, tuple[bool, ...]], int] = {}
        order = []
        for row, picture in enumerate(pictures):
            if picture is None:
                order.append(-1)
                continue
            experts = named[row] if bool(prompts[row]) else self._seen.now[picture]
            order.append(wanted.setdefault((picture, tuple(experts.tolist())), len(wanted)))
        if -1 in order and not wanted:
            wanted = {(one, tuple(row.tolist())): one for one, row in enumerate(self._seen.now)}
        asked = torch.tensor([experts for _, experts in wanted])
        theirs = [picture for picture, _ in wanted]
        own, claims = self._shared(theirs, asked, watched), self._claim(theirs, asked, watched)
        if -1 in order:
            own, claims = (torch.cat([maps, maps.mean(0, keepdim=True)]) for maps in (own, claims))
        last = torch.tensor([len(own) - 1 if one < 0 else one for one in order], device=own.device)
        return LaidOut(own, claims, last, self._regions)

    def _shared(self, pictures: list[int], experts: Tensor, watched: bool) -> Tensor:
        """(R, N, H, W) the places of some experts in some pictures.

        Args:
            pictures: R of them.
            experts: (R, N) those that count; on the CPU.
            watched: whether the layout forms.
        """
        assert self._seen is not None
        full = experts.to(self._words)[..., None, None]
        settings = self._auto.settings
        if self._regions is not None:
            return shared_places(full, settings, self._last, inside=1.0)
        if self._blind and self._seen.maps is None:
            return full / full.sum(1, keepdim=True).clamp_min(1.0)
        if watched or self._seen.maps is None:
            # The layout forms, and it forms as the experts have it: without them some subjects never come.
            return full
        own = shared_places(self._seen.maps[pictures] * full, settings, self._last)
        # Those whose places nobody has seen yet are looked for with the experts in full.
        lacking = (experts & ~self._seen.met[pictures]).to(own)[..., None, None]
        return own * (1 - lacking) + lacking

    def _claim(self, pictures: list[int], experts: Tensor, watched: bool) -> Tensor:
        """(R, 1, H, W) how far places are some expert's; none while they are looked for. See `_shared`."""
        assert self._seen is not None
        if self._styles is None or watched or self._seen.maps is None:
            return self._words.new_zeros(len(pictures), 1, 1, 1)
        return claimed_places(self._seen.maps[pictures] * experts.to(self._words)[..., None, None])
