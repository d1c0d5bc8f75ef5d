"""`MoLEForSeq2SeqLM`: a transformers model, its tokenizer, and experts, in one object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mole_diffusion.core.config import MoLEConfig
from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.records import MeanRecorder
from mole_diffusion.text.composed import MixtureWord
from mole_diffusion.text.experts import Seq2SeqExperts

if TYPE_CHECKING:
    from mole_diffusion.text.export import TextExport
    from mole_diffusion.text.training import TextTrainingConfig, TextTrainingResult

logger = logging.getLogger(__name__)


class MoLEForSeq2SeqLM(Seq2SeqExperts):
    """A T5 with experts and gates; everything that it has not itself is the model's.

    Args:
        model: of the T5 family.
        tokenizer: its tokenizer; None where only tensors come in and go out.
        config: the form of the gates.
        flatten_tokens: see `Seq2SeqExperts`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        config: MoLEConfig | None = None,
        flatten_tokens: int | None = None,
    ) -> None:
        super().__init__(model, config=config, flatten_tokens=flatten_tokens)
        self.tokenizer = tokenizer
        self.flatten_tokens = flatten_tokens

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: MoLEConfig | None = None,
        flatten_tokens: int | None = None,
        **options: Any,
    ) -> MoLEForSeq2SeqLM:
        """Open a model and its tokenizer as transformers does; without experts it answers as there.

        Args:
            source: a folder, or a hub id such as "google/flan-t5-large".
            config: the form of the gates.
            flatten_tokens: see `Seq2SeqExperts`.
            options: for `AutoModelForSeq2SeqLM.from_pretrained` (dtype, device_map, revision, ...).

        Raises:
            InjectionError: the model is not of the T5 family.
        """
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        shared = ("revision", "cache_dir", "local_files_only", "token")
        own: dict[str, Any] = {name: options[name] for name in shared if name in options}
        model = AutoModelForSeq2SeqLM.from_pretrained(source, **options).eval()
        tell_of_wrong_scaling(source, model, own)
        tokenizer = AutoTokenizer.from_pretrained(source, **own)
        return cls(model, tokenizer, config=config, flatten_tokens=flatten_tokens)

    @classmethod
    def from_starter(
        cls, experts: Sequence[str] = (), *, config: MoLEConfig | None = None, **options: Any
    ) -> MoLEForSeq2SeqLM:
        """Open the text starter: a tiny T5 that comes along, and some of its experts.

        Args:
            experts: names; see `starter.text.location.text_experts`.
            config, options: see `from_pretrained`.

        Raises:
            ConfigError: the starter does not lie here.
            UnknownExpertError: it has no expert of a name.
        """
        from mole_diffusion.starter.text.location import text_expert, text_starter

        folder = text_starter()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"there is no text starter in {str(folder)!r}: tools/starter_text makes one")
        # Its weights are stored in half precision.
        model = cls.from_pretrained(folder, config=config, **{"dtype": torch.float32, **options})
        if experts:
            model.load_experts({name: text_expert(name) for name in experts})
        return model

    def generate(
        self,
        *args: Any,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        mixture: MixtureWord = "gates",
        **kwargs: Any,
    ) -> Any:
        """Generate as `model.generate` does; without experts it is that.

        Args:
            args, kwargs: everything of that call: input_ids, attention_mask, num_beams, do_sample, ...
            active_experts, expert_scales, mixture: see `active`.

        Returns:
            The output of `model.generate`.
        """
        with self.active(active_experts, expert_scales=expert_scales, mixture=mixture):
            recorder = MeanRecorder()
            with recorder.watching(self.ensemble.mixtures):
                found = self.model.generate(*args, **kwargs)
        self._recorder = recorder
        return found

    def __call__(
        self,
        *args: Any,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        mixture: MixtureWord = "gates",
        **kwargs: Any,
    ) -> Any:
        """One forward of the model, as `model(...)`: logits, and a loss where there are labels."""
        with self.active(active_experts, expert_scales=expert_scales, mixture=mixture):
            return self.model(*args, **kwargs)

    def answer(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 16,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        mixture: MixtureWord = "gates",
        top_k: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Texts in, texts out.

        Args:
            texts: what the model is to read.
            batch_size: how many at a time; the answers do not depend on it.
            active_experts, expert_scales, mixture: see `active`.
            top_k: how many experts each text is left with, by the encoder's gates (see
                `selection.preselected`); None for all.
            options: for `generate`; by default it is greedy, up to 64 tokens.

        Raises:
            ConfigError: there is no tokenizer, or `top_k` is asked for without gates.
        """
        tokenizer = self.need_tokenizer("answer")
        sources = [texts] if isinstance(texts, str) else list(texts)
        if top_k is not None:
            if mixture != "gates":
                raise ConfigError(f"top_k goes by the gates, and mixture is {mixture!r}")
            return self._answer_by_few(sources, top_k, batch_size, active_experts, expert_scales, options)
        settings = {"max_new_tokens": 64, "do_sample": False, **options}
        found: list[str] = []
        for start in range(0, len(sources), batch_size):
            batch = self.read(sources[start : start + batch_size])
            tokens = self.generate(
                **batch, **settings,
                active_experts=active_experts, expert_scales=expert_scales, mixture=mixture,
            )  # fmt: skip
            found += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return found

    def _answer_by_few(
        self,
        texts: Sequence[str],
        count: int,
        batch_size: int,
        active: Sequence[str] | None,
        scales: Mapping[str, float] | None,
        options: Mapping[str, Any],
    ) -> list[str]:
        """As `answer`, each text with the few experts that are chosen for it."""
        from mole_diffusion.text.selection import grouped, preselected

        self.need_experts("answer with top_k")
        choices: list[tuple[str, ...]] = []
        for start in range(0, len(texts), batch_size):
            own = texts[start : start + batch_size]
            choices += preselected(self, own, count, active=active, scales=scales)
        found = dict[int, str]()
        for names, indices in grouped(choices).items():
            answers = self.answer(
                [texts[index] for index in indices],
                batch_size=batch_size, active_experts=names, expert_scales=_of(scales, names), **options,
            )  # fmt: skip
            found.update(zip(indices, answers, strict=True))
        return [found[index] for index in range(len(texts))]

    def read(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids and mask of texts, padded, where the model is."""
        tokenizer = self.need_tokenizer("read")
        padding: dict[str, Any] = {"padding": True}
        if self.flatten_tokens is not None:
            padding = {"padding": "max_length", "max_length": self.flatten_tokens}
        batch = tokenizer(list(texts), return_tensors="pt", truncation=True, **padding)
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def need_tokenizer(self, what: str) -> Any:
        """The tokenizer.

        Raises:
            ConfigError: there is none.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{what} needs a tokenizer: give one to MoLEForSeq2SeqLM(model, tokenizer)")
        return self.tokenizer

    def train_gates(  # type: ignore[override]
        self,
        examples: Any,
        config: TextTrainingConfig | None = None,
        *,
        validation: Any = None,
        callback: Callable[..., Any] | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool | None = None,
    ) -> TextTrainingResult:
        """Train the gates on examples; model and experts stay as they are.

        Args: see `mole_diffusion.text.training.train_gates`.

        Raises:
            NoExpertsError: no experts are loaded.
        """
        return super().train_gates(
            examples, self.need_tokenizer("train_gates"), config,
            validation=validation, callback=callback, checkpoint_dir=checkpoint_dir, resume=resume,
        )  # fmt: skip

    def begin_gates(self, examples: Any) -> Mapping[str, float]:  # type: ignore[override]
        """Let gates that nobody has trained begin with the experts that know a task, for loops of others.

        `train_gates` does it by itself. Args, result: see `mole_diffusion.text.training.begin_gates`.

        Raises:
            NoExpertsError: no experts are loaded.
            ConfigError: the examples are none.
        """
        return super().begin_gates(examples, self.need_tokenizer("begin_gates"))

    def keep_best(self, examples: Any, count: int) -> tuple[str, ...]:
        """Unload all experts but the few that the gates weigh most on examples.

        The gates of those that stay are fresh. Trained in turn, they cost in every step what few experts
        cost, however many there were to choose from.

        Args:
            examples: of the task, see `train_gates`; a hundred will do.
            count: how many experts stay; where there are no more, nothing changes.

        Returns:
            Their names.

        Raises:
            NoExpertsError: no experts are loaded.
            ConfigError: `count` is below 1, or there are no examples.
        """
        from mole_diffusion.text.selection import weightiest

        self.need_experts("keep_best")
        self.need_tokenizer("keep_best")
        kept = weightiest(self, examples, count)
        if len(kept) == len(self.experts):
            return kept
        self.ensemble.set_experts([expert for name, expert in self.experts.items() if name in kept])
        return kept

    def export(
        self,
        path: str | Path,
        texts: Sequence[str],
        *,
        merged: bool = False,
        rank: int | None = None,
        active_experts: Sequence[str] | None = None,
        expert_scales: Mapping[str, float] | None = None,
        mixture: MixtureWord = "gates",
    ) -> TextExport:
        """Freeze the gates at their mean weights over some texts and write exactly that static mixture.

        Args:
            path: folder to write.
            texts: like those that it will be used for; not needed for fixed mixtures.
            merged: a whole model (`save_pretrained`) in place of a PEFT folder.
            rank: largest rank of a PEFT folder; None keeps everything.
            active_experts, expert_scales, mixture: see `active`.

        Raises:
            NoExpertsError: no experts are loaded.
            ConfigError: there are no texts, and gates to be frozen.
        """
        self.need_experts("export")
        from mole_diffusion.text.export import export

        return export(
            self, Path(path), texts,
            merged=merged, rank=rank, active=active_experts, scales=expert_scales, mixture=mixture,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


def _of(scales: Mapping[str, float] | None, names: Sequence[str]) -> Mapping[str, float] | None:
    """The scales of some experts."""
    return None if scales is None else {name: scale for name, scale in scales.items() if name in names}


def tell_of_wrong_scaling(source: str | Path, model: nn.Module, options: Mapping[str, Any]) -> None:
    """Say where a version of transformers runs a checkpoint wrongly.

    T5 1.1 and Flan do not scale what the decoder gives to its untied output matrix. Some early versions 5 did
    it for all; later ones keep `scale_decoder_outputs` in the configuration.
    """
    import transformers

    config: Any = model.config
    if int(transformers.__version__.partition(".")[0]) < 5 or hasattr(config, "scale_decoder_outputs"):
        return
    written, _ = type(config).get_config_dict(source, **options)
    if written.get("tie_word_embeddings", True) is False:
        logger.warning(
            "transformers %s scales the outputs of %s, whose output matrix is its own: its answers are wrong"
            " (it was mended in February 2026). Use a newer version, or one before 5",
            transformers.__version__,
            source,
        )
