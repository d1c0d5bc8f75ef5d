"""`Session`: what happens at each of a host's callbacks. At most one attachment exists at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .host import disturbances, forget_prompts, lora_named_twice, misread
from .library import Library
from .options import CHECK_BASE
from .settings import AUTO, EQUAL, Settings, SettingsError

if TYPE_CHECKING:
    from .reading import Prompt

logger = logging.getLogger("mole_diffusion")

# A change of the settings that the X/Y/Z plot asks of one picture.
Change = Callable[[Settings], Settings]
CHANGES = "mole_changes"
HASHES = "MoLE hashes"
MIXED = "MoLE mixed by"

# What a generation's prompts become, for each pass, where the host says it.
Texts = Callable[[Any], "Sequence[Sequence[Prompt]]"]


class Session:
    """Attaches experts before a batch is drawn and takes them off afterwards.

    Args:
        library: where experts and gates are.
        options: the host's options.
        current_model: the host's model as it is now: refiner and hires fix exchange it while they draw.
        texts_of: what the prompts of a generation's batch become.
    """

    def __init__(
        self, library: Library, options: Any, current_model: Callable[[], Any], texts_of: Texts
    ) -> None:
        self.library = library
        self._options = options
        self._current_model = current_model
        self._texts_of = texts_of
        self._p: Any = None
        self._said: set[str] = set()
        self._attachment: Any = None
        self.last_run: Any = None

    @property
    def attachment(self) -> Any:
        """The `Attachment` or `Refusal` that is on the networks; None between generations."""
        return self._attachment if self._attachment is not None and self._attachment.attached else None

    def process(self, p: Any, args: Sequence[Any]) -> None:
        """A generation begins: take off what an interrupted one left, note the settings in the PNG info."""
        self.clear(p)
        self._said.clear()
        try:
            settings = self._settings(p, args)
        except SettingsError as error:
            self._refuse(p, error)
            return
        p.extra_generation_params.update(settings.to_infotext())

    def process_batch(self, p: Any, args: Sequence[Any]) -> None:
        """A batch begins, its prompts are not encoded yet: attach, unless an earlier batch did."""
        try:
            if self.attachment is None or self._is_stale():
                settings = self._settings(p, args)
                if not settings.enabled:
                    return
                self._attach(p, settings)
            self._begin_batch(p)
        except Exception as error:
            self._refuse(p, error)

    def draw_on(self, p: Any) -> None:
        """The second pass of hires fix begins, perhaps with another checkpoint."""
        self.follow()
        if hasattr(self.attachment, "draw_on"):
            self.attachment.draw_on()

    def follow(self, sd_model: Any = None) -> None:
        """The model may have been exchanged (refiner, hires checkpoint): the experts move with it.

        Args:
            sd_model: what the host draws with from now on; None to ask it.
        """
        before = self.attachment
        if before is None or not hasattr(before, "settings"):
            return
        sd_model = self._current_model() if sd_model is None else sd_model
        if before.is_on(sd_model):
            return
        from mole_diffusion import MoLEError

        self._note_weights()
        before.detach()
        try:
            self._attachment = self._attached_to(sd_model, before.settings)
            if self._p is not None:
                self._begin_batch(self._p)
        except (MoLEError, SettingsError) as error:
            # A refiner of another kind than the base: SDXL's has other matrices. LoRAs are dropped there too.
            logger.warning("MoLE: the model that took over draws without experts: %s", error)

    def postprocess(self, p: Any) -> None:
        """A generation has ended: take everything off."""
        attachment = self.attachment
        if attachment is not None and hasattr(attachment, "settings"):
            self._note_weights()
            run = self.last_run
            if attachment.settings.record and not any(run.forwards.values()):
                self._say(p, "MoLE had no effect: the host ran its UNet elsewhere (TensorRT, ONNX?)")
        self.clear(p)

    def clear(self, p: Any = None) -> None:
        """Take everything off, and let prompts be encoded without the experts."""
        if self._attachment is None:
            return
        self._attachment.detach()
        self._attachment = self._p = None
        if p is not None:
            forget_prompts(p)

    def _attached_to(self, sd_model: Any, settings: Settings) -> Any:
        from .attachment import Attachment

        return Attachment(
            sd_model, settings, self.library, check_base=bool(getattr(self._options, CHECK_BASE, True))
        )

    def _attach(self, p: Any, settings: Settings) -> None:
        self.clear(p)
        attachment = self._attached_to(p.sd_model, settings)
        self._attachment = attachment
        forget_prompts(p)
        found = disturbances(p, self._options)
        if found and attachment.needs_all_tokens():
            raise SettingsError(
                f"{' and '.join(found)} of the web UI is on, and these gates and regions need every image "
                "token: turn it off, or use equal shares without regions"
            )
        self._note_experts(p, settings, attachment)

    def _note_experts(self, p: Any, settings: Settings, attachment: Any) -> None:
        """Say in the PNG info which files they are, and below the picture what is odd about them."""
        names = [expert.name for expert in settings.experts]
        hashes = (f"{name}: {attachment.hashes[name][:12]}" for name in names)
        p.extra_generation_params[HASHES] = " | ".join(hashes)
        for note in attachment.notes:
            self._say(p, f"MoLE: {note}")
        for text in dict.fromkeys(p.all_prompts):
            for name, phrase in attachment.unnamed(text).items():
                self._say(p, f"MoLE: the prompt does not name {name!r}: write {phrase!r}")
        for name in lora_named_twice(p.all_prompts, names):
            self._say(p, f"MoLE: {name!r} is an expert and a <lora:...> of the prompt: it acts twice")

    def _begin_batch(self, p: Any) -> None:
        """Have the prompts read that experts without gates find their words and places by."""
        attachment = self.attachment
        if not getattr(attachment, "seeks", False):
            return
        self._p = p
        attachment.on_fall_back = lambda: self._note_mixture(p)
        found = [*disturbances(p, self._options), *misread(self._options)]
        if attachment.begin_batch(self._texts_of(p), found):
            forget_prompts(p)
        self._note_mixture(p)
        for name in attachment.counting_everywhere():
            self._say(p, f"MoLE: no prompt says {name!r}, and its file names no phrase: it counts everywhere")

    def _note_mixture(self, p: Any) -> None:
        """Say it where something else mixes the picture than was asked for."""
        why = self.attachment.fallen_back
        p.extra_generation_params.pop(MIXED, None)
        if why is not None:
            shares = f"{AUTO}, then {EQUAL}" if self.attachment.halfway else EQUAL
            p.extra_generation_params[MIXED] = f"{shares}, as {why}"
            self._say(p, f"MoLE: equal shares instead of auto: {why}")
        elif beside := self.attachment.unrefined():
            why = f"{' and '.join(map(repr, beside))} counts in the whole picture"
            p.extra_generation_params[MIXED] = f"{AUTO}, as {why}"
            self._say(p, f"MoLE: auto instead of shared gates: {why}")

    def _settings(self, p: Any, args: Sequence[Any]) -> Settings:
        settings = Settings.from_args(args)
        for change in getattr(p, CHANGES, ()):
            settings = change(settings)
        return settings

    def _is_stale(self) -> bool:
        """Whether the attachment is on a model that is no longer there."""
        return hasattr(self._attachment, "settings") and not self._attachment.is_on(self._current_model())

    def _note_weights(self) -> None:
        if self._attachment.settings.record:
            self.last_run = self._attachment.last_run()

    def _refuse(self, p: Any, error: Exception) -> None:
        """Show an error to the user in place of a picture without the experts."""
        from mole_diffusion import MoLEError

        from .hooks import Refusal
        from .host import unet_of

        known = isinstance(error, (MoLEError, SettingsError))
        if not known:
            logger.error("MoLE failed", exc_info=error)
        self.clear(p)
        message = f"MoLE: {error}" if known else f"MoLE failed: {type(error).__name__}: {error}"
        try:
            self._attachment = Refusal(unet_of(p.sd_model), RuntimeError(message))
        except SettingsError:
            # No UNet to speak through.
            self._say(p, message)

    def _say(self, p: Any, text: str) -> None:
        """Below the picture where the host can do that, and in its log; once in a generation."""
        if text in self._said:
            return
        self._said.add(text)
        logger.warning("%s", text)
        comment = getattr(p, "comment", None)
        if comment is not None:
            comment(text)


def add_change(p: Any, change: Change) -> None:
    """Let one picture of an X/Y/Z plot differ; the plot draws each one from a copy of `p`."""
    setattr(p, CHANGES, (*getattr(p, CHANGES, ()), change))
