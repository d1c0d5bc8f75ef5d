"""What a network is to the rest of the core: its matrices, what a forward says, how files name it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

#: "denoiser" (has image tokens and timesteps: regions, trained strength), "encoder" (of texts), "language".
Role = Literal["denoiser", "encoder", "language"]
DENOISER: Role = "denoiser"
ENCODER: Role = "encoder"
LANGUAGE: Role = "language"

# Streams: what the tensor that a matrix reads consists of.
TOKENS = "tokens"
CONTEXT = "context"
# Text and image tokens in one sequence.
JOINT = "joint"
# One row per picture: the embedding of the timestep, the pooled text.
EMBEDDING = "embedding"


def streams_of(stream: str) -> tuple[str, ...]:
    """The tokens in a tensor: those of one stream, or image and text tokens in one sequence."""
    return (TOKENS, CONTEXT) if stream == JOINT else (stream,)


# Kinds of matrices: of transformer blocks; of blocks without a module that could run alone; rows inside a
# block that run before its tokens, and therefore have a gate to themselves at every granularity.
ATTENTION = "attention"
RESIDUAL = "residual"
ROW = "row"


#: Encoded texts: (B, L, ...), or (L, d) for each where they differ in length.
Texts = Tensor | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """One matrix of a network.

    Attributes:
        name: canonical dotted name.
        path: dotted path of the module inside the network (a PEFT wrapper keeps the path of what it wraps).
        block: canonical name of the transformer block, or of what takes its place for matrices outside.
        layer: canonical name of the attention or feed-forward layer; the block for matrices without one.
        block_path, layer_path: paths of those modules; None where no module runs the block or layer alone.
        stream: "tokens" (a denoiser's image tokens, an encoder's tokens), "context" (a denoiser's text
            tokens), "joint" (both in one sequence) or "embedding" (one row per picture).
        source: matrices of equal source read the same tensor.
        order: sort key of execution.
        kind: "attention", "residual" or "row".
        returns: streams of the tensors that the module at `block_path` returns; () for one, which is of image
            tokens or joint.
        rows: rows of the module's output that are this matrix, where a module fuses several; None for all.
        swapped: whether the halves of the module's rows stand in the other order than the canonical ones.
        leads: whether it may compute its group's gate where another matrix of the same source could.
        widens: whether variants of the network append inputs to it that an expert need not know.
        identifies: whether it belongs to every network of its base; some hosts add what a base does not have.
        folds: whether its input has other axes than pictures, tokens and features: all but the last are those
            of the pictures one after another.
        amid: whether hosts give it image tokens with others around them, as `Forward.within` says.
    """

    name: str
    path: str
    block: str
    layer: str
    block_path: str | None
    layer_path: str | None
    stream: str
    source: str
    order: tuple[int, ...]
    kind: str = ATTENTION
    returns: tuple[str, ...] = ()
    rows: slice | None = None
    swapped: bool = False
    leads: bool = True
    widens: bool = False
    identifies: bool = True
    folds: bool = False
    amid: bool = False


@dataclass(frozen=True)
class NetworkMap:
    """The matrices of a network in execution order.

    Attributes:
        architecture: what kind of network it is.
        part: what the host calls it.
        sites: the matrices.
    """

    architecture: Architecture
    part: str
    sites: tuple[Site, ...]

    @property
    def role(self) -> Role:
        """What the network is for."""
        return self.architecture.role


@dataclass(frozen=True)
class Looking:
    """Where image tokens look at text, with queries and keys that are changed behind their matrices.

    Attributes:
        modules: paths of the modules inside which they do, in execution order.
        rewrites: whether text and image tokens look at each other there, so that the text is encoded further
            from layer to layer; else the text is only read.
    """

    modules: tuple[str, ...]
    rewrites: bool


@dataclass(frozen=True)
class Place:
    """What a name in a file means: a matrix, or some rows of it.

    Attributes:
        matrix: canonical name.
        share: (start, stop, total): which of `total` equal parts of the file's rows are the matrix; None for
            all of them.
        provisional: whether the name means another matrix in some networks (`Architecture.reader`).
        dialect: whose names of blocks these are, where they are not the canonical ones.
        swapped: whether the halves of its rows stand in the other order than the canonical ones.
    """

    matrix: str
    share: tuple[int, int, int] | None = None
    provisional: bool = False
    dialect: str | None = None
    swapped: bool = False

    def rows(self, out: int) -> slice | None:
        """The rows among `out` rows; None for all.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if self.share is None:
            return None
        start, stop, total = self.share
        if out % total:
            raise ValueError(f"{out} rows cannot be shared out in {total} equal parts")
        return slice(out * start // total, out * stop // total)


@dataclass(frozen=True)
class Base:
    """A guess at a base model.

    Attributes:
        family: the name of a family of base models, or None.
        width: width of the text that the network reads, or None.
    """

    family: str | None
    width: int | None

    def __str__(self) -> str:
        family = self.family or "an unknown base"
        return family if self.width is None else f"{family} (cross-attention to text of width {self.width})"


@dataclass(eq=False)
class Forward:
    """What the inputs of one forward say.

    Attributes:
        time: the timestep in the network's own unit, a number or (B,); None where there is none.
        clean, noise: the `time` of a clean picture and of noise alone.
        size: (height, width) of the latent, or None.
        grid: number of image tokens -> their (height, width), None if it cannot be; None if nothing is known.
        spans: where the streams "tokens" and "context" lie in a joint sequence.
        references: how many of the image tokens, the last ones, show other pictures than the one that is
            drawn, or pad it: they have gates and no regions.
        masks: stream -> (B, L), zero for padding; without an entry all tokens are real.
        pictures: how many, where matrices fold other axes into them; else 0.
        packed: stream -> tokens of each picture, for matrices that read all pictures' tokens one after
            another, as (all tokens, d).
        appended: stream -> how many tokens of padding at its end the network's first matrices do not read.
        within: where the image tokens lie in what matrices are given that are `Site.amid`; nobody reads the
            others behind them.
        memory: (B, L, d) of the context of a causal network, the same tensor in all its steps; else None.
        keeps: whether the network keeps what its blocks computed for steps to come.
        ids: (B, L) tokens that an encoder reads; None where it is given embeddings.
        text: (B, L, ...) encoded texts that a denoiser reads, or B of (L, d).
    """

    time: Tensor | float | None = None
    clean: float = 0.0
    noise: float = 1.0
    size: tuple[int, int] | None = None
    grid: Callable[[int], tuple[int, int] | None] | None = None
    spans: Mapping[str, slice] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    references: int = 0
    pictures: int = 0
    packed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    appended: Mapping[str, int] = field(default_factory=dict)
    within: slice | None = None
    memory: Tensor | None = None
    keeps: bool = False
    ids: Tensor | None = None
    text: Texts | None = None

    @property
    def timestep(self) -> Tensor | float | None:
        """The timestep in 0..1, from the clean picture to noise alone."""
        if self.time is None:
            return None
        time = self.time.float() if isinstance(self.time, Tensor) else self.time
        if self.clean != 0.0:
            time = time - self.clean
        return time / (self.noise - self.clean)


class Architecture(Protocol):
    """One kind of network: everything that the core knows of it."""

    @property
    def name(self) -> str:
        """Of the kind."""

    @property
    def role(self) -> Role:
        """Decides trained strength, timestep and regions."""

    @property
    def slots(self) -> Sequence[str]:
        """What hosts and files call networks of this kind, the usual one first."""

    @property
    def prefixes(self) -> Mapping[str, Sequence[str]]:
        """Slot -> beginnings of the names of its matrices in files, with "_" for "."."""

    @property
    def writers(self) -> Mapping[str, str]:
        """Beginnings of whole keys that only one program writes -> that program."""

    @property
    def families(self) -> Sequence[str]:
        """The base models that such networks belong to."""

    @property
    def example(self) -> str:
        """A module's name, for errors."""

    @property
    def text_gates(self) -> bool:
        """Whether text tokens always have a gate of their own; else only where each token has a gate."""

    @property
    def causal(self) -> bool:
        """Whether it runs token by token, so that gates for all tokens may read only its context."""

    def sites(self, network: nn.Module) -> tuple[Site, ...]:
        """The matrices of a network in execution order, as it runs them now; none if it is not this kind."""

    def read(self, flat: str) -> tuple[Place, ...]:
        """The matrices that a file means by a name, in the most usual network of this kind.

        Args:
            flat: name without its slot's prefix, with "_" for ".".
        """

    def fits(self, flat: str, outputs: int, inputs: int) -> bool:
        """Whether a matrix of this name may have these dimensions, so far as they tell kinds apart.

        Args:
            flat: as for `read`; a name that is read.
            outputs, inputs: of the file's matrix.
        """

    def reader(self, sites: Sequence[Site]) -> Callable[[str], tuple[Place, ...]]:
        """As `read`, for the network with these matrices: the same places in the same order."""

    def why_not(self, flat: str) -> str | None:
        """Reason for a name that such networks have, but that cannot be gated."""

    def text_readers(self, sites: Sequence[Site]) -> tuple[tuple[Site, Site], ...]:
        """Matrices of queries and of keys, by layer, of image tokens that look at text alone."""

    def looking(self, sites: Sequence[Site]) -> Looking | None:
        """Where image tokens look at text, if `text_readers` do not say so; None where they do not."""

    def leaf(self, matrix: str) -> str:
        """A canonical name without the numbered blocks that the matrix lies in."""

    def write(self, matrix: str, dialect: str) -> str:
        """Name of a canonical matrix after its slot's prefix, dotted; "" for one that is none of these."""

    def prefix(self, slot: str, dialect: str, *, several: bool) -> str:
        """What files of a dialect put before the names of a slot.

        Args:
            slot: of the host.
            dialect: one of `keys.DIALECTS`.
            several: whether the base has more than one text encoder.
        """

    def family(self, slot: str, inputs: Mapping[str, int]) -> Base | None:
        """The base model, told by the widths of matrices.

        Args:
            slot: what the host or file calls the network.
            inputs: canonical name -> number of inputs.
        """

    def tokens(self, network: nn.Module, site: Site, stream: str, given: tuple[int, int] | int | None) -> int:
        """Tokens of `stream` that a flattened gate led by `site` reads.

        Args:
            network: the network.
            site: the matrix that computes the gate.
            stream: "tokens" or "context".
            given: `flatten_tokens` of `inject`.
        Raises:
            ConfigError: `given` is not of the kind that such a network needs.
        """

    def forward(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given_size: tuple[int, int] | None
    ) -> Forward:
        """What the inputs of the network's `forward` say.

        Args:
            args, kwargs: the inputs.
            given_size: the latent's size where a host knows it better.
        """
