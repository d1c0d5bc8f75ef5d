"""Sizes of a T5, and the names and order of its parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a T5 with tied embeddings and gated GELU, whose heads together are as wide as the model.

    Raises:
        ValueError: they are not.
    """

    vocabulary: int
    width: int = 192
    inner: int = 512
    heads: int = 4
    head: int = 48
    encoder: int = 4
    decoder: int = 4
    buckets: int = 32
    distance: int = 64

    def __post_init__(self) -> None:
        """Check the heads."""
        if self.heads * self.head != self.width:
            raise ValueError(
                f"heads * head is {self.heads * self.head}; it has to be the width {self.width}."
            )

    def config(self) -> dict[str, object]:
        """Arguments of transformers' `T5Config`."""
        return {
            "vocab_size": self.vocabulary,
            "d_model": self.width,
            "d_ff": self.inner,
            "num_heads": self.heads,
            "d_kv": self.head,
            "num_layers": self.encoder,
            "num_decoder_layers": self.decoder,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.distance,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": True,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }

    def linears(self) -> dict[str, list[str]]:
        """Kind of stack -> names of its matrices, in their order.

        "square" (width, width), "wide" (inner, width) and "narrow" (width, inner). What reads the same input
        lies side by side: q, k and v; wi_0 and wi_1; k and v of all the decoder's readings of the encoder.
        """
        square = [
            f"encoder.block.{block}.layer.0.SelfAttention.{one}"
            for block in range(self.encoder)
            for one in "qkvo"
        ]
        for block in range(self.decoder):
            at = f"decoder.block.{block}.layer"
            square += [f"{at}.0.SelfAttention.{one}" for one in "qkvo"]
            square += [f"{at}.1.EncDecAttention.{one}" for one in "qo"]
        square += [
            f"decoder.block.{block}.layer.1.EncDecAttention.{one}"
            for block in range(self.decoder)
            for one in "kv"
        ]
        feeds = [f"encoder.block.{block}.layer.1.DenseReluDense" for block in range(self.encoder)]
        feeds += [f"decoder.block.{block}.layer.2.DenseReluDense" for block in range(self.decoder)]
        wide = [f"{feed}.{one}" for feed in feeds for one in ("wi_0", "wi_1")]
        return {"square": square, "wide": wide, "narrow": [f"{feed}.wo" for feed in feeds]}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Kind of stack -> (out, in) of its matrices."""
        return {
            "square": (self.width, self.width),
            "wide": (self.inner, self.width),
            "narrow": (self.width, self.inner),
        }

    def norms(self) -> list[str]:
        """Names of the norms' weights, in their order."""
        found = []
        for part, layers, kinds in (("encoder", self.encoder, 2), ("decoder", self.decoder, 3)):
            found += [
                f"{part}.block.{block}.layer.{layer}.layer_norm.weight"
                for block in range(layers)
                for layer in range(kinds)
            ]
            found.append(f"{part}.final_layer_norm.weight")
        return found
