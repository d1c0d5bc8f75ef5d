"""What a model that draws is to training: one interface, whatever the network and the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: Keyword arguments of a network in a forward that was recorded -> the same with another text.
Replay = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Condition:
    """What a network is told of a batch of pictures: encoded texts, sizes and the like.

    Attributes:
        tensors: by the name that the denoiser gives them; the first axis of each is the batch.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: list[int] | slice) -> Condition:
        """These rows as a batch of their own."""
        return Condition({name: tensor[rows] for name, tensor in self.tensors.items()})

    def detach(self) -> Condition:
        """The same without gradient."""
        return Condition({name: tensor.detach() for name, tensor in self.tensors.items()})

    def after(self, first: Condition) -> Condition:
        """Twice the batch: first another condition (a single row, or as many), then this."""
        return Condition(
            {
                name: torch.cat([first.tensors[name].expand_as(tensor), tensor])
                for name, tensor in self.tensors.items()
            }
        )


class Denoiser(Protocol):
    """A network that predicts, the encoders of its texts, an autoencoder, and a schedule of noise levels.

    Latents are (batch, *latent_shape). Times are the model's own: whole timesteps of a diffusion, shares of
    noise of flow matching; nobody but the denoiser reads anything out of them. Gradient flows through
    everything that does not say otherwise.
    """

    @property
    def network(self) -> nn.Module:
        """The network that predicts."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Every network that takes part, by the host's name of it: that one, text encoders, autoencoder."""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""

    @property
    def dtype(self) -> torch.dtype:
        """What latents are sampled in."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: channels, height, width."""

    def guided(self, scale: float) -> float:
        """Ask for guidance by the prompt in the predictions to come.

        Args:
            scale: of classifier-free guidance, 1 or less for none.

        Returns:
            What is left to do by passes with and without the text: `scale`, or 1 where the network reads it.
        """

    def combined(self, without: Tensor, with_text: Tensor, scale: float) -> Tensor:
        """What guidance makes of the predictions for the empty prompt and for the text.

        Args:
            without, with_text: predictions (batch, *latent_shape).
            scale: what `guided` left to do, above 1.
        """

    def check_trainable(self) -> None:
        """Refuse what no gates can be trained with.

        Raises:
            TrainingError: it cannot.
        """

    def training(self, *, checkpointing: bool, decodes: bool) -> AbstractContextManager[None]:
        """Have the networks as training needs them inside the `with` block; undone afterwards.

        Args:
            checkpointing: recompute activations in the backward pass.
            decodes: the backward pass goes through `decode` too.
        """

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts, and all else that the network is told of a picture of `picture_size`; "" is the
        prompt that classifier-free guidance moves away from.
        """

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """What the network says of noisy latents.

        Args:
            latents: noisy.
            times: a scalar, or (batch,).
            condition: of as many rows.

        Returns:
            The shape of `latents`.
        """

    def random_times(self, count: int, draws: torch.Generator) -> Tensor:
        """Times (count,) to train at, drawn as the model was trained, on the CPU."""

    def times_at(self, shares: Tensor) -> Tensor:
        """Times at shares (n,) of the schedule: near 0 is hardly any noise, near 1 is noise alone."""

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Clean latents as they are with this noise at these times (batch,) or (1,)."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What `predict` should say of `noisy(latents, noise, times)`."""

    def schedule(self, steps: int) -> Tensor:
        """Set the times that `step` goes through, from noise to picture, and return them: (steps,)."""

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The latents at the next time of the schedule, and the clean ones as predicted."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents, the autoencoder's means, float32, of pictures (batch, 3, H, W) in 0..1."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, H, W) in 0..1, float32, of clean latents."""
