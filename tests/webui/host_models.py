"""A tiny Stable Diffusion of the real classes as the hosts' model, with a text engine of their kind."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from tiny.copying import clone
from tiny.networks import LDMUNet
from torch import Tensor, nn

#: Tokens of a chunk between its first and its last one; 75 in the hosts, 10 of the tiny text encoder.
CHUNK = 10


class TextEngine:
    """Chunks of tokens, words in parentheses weighed, BREAK: as the hosts have them, in few lines.

    Args:
        tokenizer: of transformers.
        encoder: CLIPTextModel.
        skip: whether the last layer but one speaks, as in SDXL.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, skip: bool = False) -> None:
        self._tokenizer, self._encoder, self._skip = tokenizer, encoder, skip
        self.pooled: Tensor | None = None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, truncation=False, add_special_tokens=False).input_ids

    def process_texts(self, texts: list[str]) -> tuple[list[list[SimpleNamespace]], int]:
        chunks = [self._chunks(text) for text in texts]
        return chunks, max(len(chunk.tokens) for own in chunks for chunk in own)

    def _chunks(self, text: str) -> list[SimpleNamespace]:
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        chunks: list[list[tuple[int, float]]] = [[]]
        for piece in re.split(r"(\([^()]*:[0-9.]+\)|\bBREAK\b)", text):
            if piece == "BREAK":
                chunks.append([])
                continue
            weighed = re.fullmatch(r"\((.*):([0-9.]+)\)", piece)
            words, weight = (weighed[1], float(weighed[2])) if weighed else (piece, 1.0)
            for token in self.tokenize([words])[0]:
                if len(chunks[-1]) == CHUNK:
                    chunks.append([])
                chunks[-1].append((token, weight))
        found = []
        for own in chunks:
            padded = [(start, 1.0), *own, *[(end, 1.0)] * (CHUNK + 1 - len(own))]
            tokens, weights = zip(*padded, strict=True)
            found.append(SimpleNamespace(tokens=list(tokens), multipliers=list(weights)))
        return found

    def __call__(self, texts: list[str]) -> Tensor:
        chunks, _ = self.process_texts(list(texts))
        (empty,) = self._chunks("")
        pieces = []
        for number in range(max(map(len, chunks))):
            row = [own[number] if number < len(own) else empty for own in chunks]
            encoded = self._encode(torch.tensor([one.tokens for one in row]), first=number == 0)
            weights = torch.tensor([one.multipliers for one in row])[..., None]
            weighed = encoded * weights
            if bool((weights != 1).any()):
                weighed = weighed * (encoded.mean() / weighed.mean())
            pieces.append(weighed)
        return torch.hstack(pieces)

    def _encode(self, ids: Tensor, *, first: bool) -> Tensor:
        # Some encoders are used to another token behind the end.
        ended = (ids == self._tokenizer.eos_token_id).cumsum(-1)
        ids = torch.where(ended > 1, self._tokenizer.pad_token_id, ids)
        found = self._encoder(ids, output_hidden_states=self._skip)
        if first:
            self.pooled = found[0]
        return found.hidden_states[-2] if self._skip else found.last_hidden_state


class _Ldm(LDMUNet):
    """LDM's names for the embedding of the timestep too."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        embedding = self.time_embed
        self.time_embed = nn.Sequential(embedding.linear_1, embedding.act, embedding.linear_2)


class _LdmXL(_Ldm):
    """With the embedding of sizes and of the pooled text."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.label_emb = clone(unet.add_embedding)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        handle = self.time_embed.register_forward_hook(lambda module, args, emb: emb + self.label_emb(y))
        try:
            return super().forward(x, timesteps, context)
        finally:
            handle.remove()


class A1111Tiny(nn.Module):
    """`sd_model` of AUTOMATIC1111; its `cond_stage_model` makes tokens and encodes."""

    conditional_first = True

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = _Ldm(pipe.unet)
        self.parameterization = "v"
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.wrapped = nn.Module()
        self.cond_stage_model.wrapped.transformer = clone(pipe.text_encoder)
        self._own = TextEngine(pipe.tokenizer, self.encoder)
        for name in ("tokenize", "process_texts"):
            setattr(self.cond_stage_model, name, getattr(self._own, name))

    @property
    def unet(self) -> nn.Module:
        return self.model.diffusion_model

    @property
    def encoder(self) -> nn.Module:
        return self.cond_stage_model.wrapped.transformer

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        return self._own(texts)

    def new_batch(self) -> None:
        """Nothing changes between batches."""


class ForgeTiny:
    """`sd_model` of Forge: a text engine of its own, patchers that are made anew for every batch."""

    conditional_first = False

    def __init__(self, pipe: Any) -> None:
        self._model, self._clip = nn.Module(), nn.Module()
        self._model.diffusion_model = _Ldm(pipe.unet)
        self._model.predictor = nn.Module()
        self._model.predictor.prediction_type = "v_prediction"
        self._clip.clip_l = nn.Module()
        self._clip.clip_l.transformer = clone(pipe.text_encoder)
        self.text_processing_engine = TextEngine(pipe.tokenizer, self.encoder)
        self.new_batch()

    def new_batch(self) -> None:
        self.forge_objects = SimpleNamespace(
            unet=SimpleNamespace(model=self._model), clip=SimpleNamespace(cond_stage_model=self._clip)
        )

    @property
    def unet(self) -> nn.Module:
        return self._model.diffusion_model

    @property
    def encoder(self) -> nn.Module:
        return self._clip.clip_l.transformer

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        return self.text_processing_engine(texts)


class ForgeTinyXL:
    """The same with SDXL's two text encoders and engines."""

    def __init__(self, pipe: Any) -> None:
        model, clip = nn.Module(), nn.Module()
        model.diffusion_model = _LdmXL(pipe.unet)
        pairs = {"l": (pipe.tokenizer, pipe.text_encoder), "g": (pipe.tokenizer_2, pipe.text_encoder_2)}
        for name, (tokenizer, encoder) in pairs.items():
            holder = nn.Module()
            holder.transformer = clone(encoder)
            setattr(clip, f"clip_{name}", holder)
            engine = TextEngine(tokenizer, holder.transformer, skip=True)
            setattr(self, f"text_processing_engine_{name}", engine)
        self.unet = model.diffusion_model
        self.forge_objects = SimpleNamespace(
            unet=SimpleNamespace(model=model), clip=SimpleNamespace(cond_stage_model=clip)
        )

    def get_learned_conditioning(self, texts: list[str]) -> dict[str, Tensor]:
        both = [self.text_processing_engine_l(texts), self.text_processing_engine_g(texts)]
        return {"crossattn": torch.cat(both, dim=2), "vector": self.text_processing_engine_g.pooled}


TINY = {"a1111": A1111Tiny, "forge": ForgeTiny}
