"""From the tensors of a LoRA file to the factors of each matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .alphas import ADAPTER_CONFIG, NOWHERE, TENSORS, Alphas
from .embeddings import embedding_vectors
from .errors import ExpertLoadError
from .factors import LoraFactors, compress
from .key_table import KeyTable
from .keys import ParsedKey
from .lycoris import build_factors, own_rank
from .networks import by_name
from .reading import FLOATS_OF_8_BITS, LARGEST, finite_values, is_finite
from .scaling import Scaling, Target

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ALLOWED = "float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"


class Collector:
    """Puts together the tensors of each matrix.

    Args:
        table: the file's keys.
        tensors: its tensors.
        alphas: what it says of alphas beside its tensors.
        finite: keys that are known to hold finite numbers only.
        copy: whether to take copies of what is used, and to leave the file's memory.
    Raises:
        ExpertLoadError: tensors do not fit together, hold what are no finite numbers, or an alpha cannot be
            read.
    """

    def __init__(
        self,
        table: KeyTable,
        tensors: Mapping[str, Tensor],
        alphas: Alphas,
        *,
        finite: Collection[str] = (),
        copy: bool = False,
    ) -> None:
        self.table = table
        self.alphas = alphas
        self.factors: dict[str, dict[str, LoraFactors]] = {}
        self._kinds: dict[str, Counter[str]] = {}
        self.provisional: dict[str, dict[str, str]] = {}
        self.embeddings: dict[str, dict[str, Tensor]] = {}
        self.errors: dict[str, float] = {}
        self.sources: Counter[str] = Counter()
        self.notes: list[str] = list(alphas.notes)
        self._tensors = tensors
        self._finite = finite
        self._copy = copy
        self._stacked: dict[str, float] = {}
        self._other_ranks: dict[tuple[str, float], list[str]] = {}
        # Tensors that are made in inference mode (ComfyUI) could not be trained through.
        with torch.inference_mode(False), torch.no_grad():
            for key, (word, network) in table.embeddings.items():
                vectors = embedding_vectors(key, self._numbers(key))
                self.embeddings.setdefault(word, {})[network] = vectors
            for module, roles in table.modules.items():
                self._add(module, roles, table.meanings[module])
        self._note()

    @property
    def architectures(self) -> dict[str, str]:
        """Slot -> name of the kind of network that most of its names were read by."""
        return {network: kinds.most_common(1)[0][0] for network, kinds in self._kinds.items()}

    def compress(self, rank: int) -> None:
        """Bring all deltas to `rank` at most.

        Raises:
            ExpertLoadError: a delta is DoRA's: it is known only together with a base.
        """
        for network, matrices in self.factors.items():
            for matrix, factors in matrices.items():
                if factors.magnitude is not None:
                    raise ExpertLoadError(
                        f"rank={rank} cannot compress DoRA ({network}, {matrix!r}): what it adds depends on "
                        "the base's weights and has full rank. Load it without rank."
                    )
                matrices[matrix], error = compress(factors, rank)
                if matrices[matrix] is not factors:
                    self.errors[f"{network}.{matrix}"] = error

    def _add(self, module: str, roles: Mapping[str, str], meaning: ParsedKey) -> None:
        tensors = {role: self._numbers(key) for role, key in roles.items() if role != "alpha"}
        scaling = None
        if "diff" not in tensors:
            scaling = self._scaling(module, roles, meaning, tensors)
            self.sources[NOWHERE if scaling is None else scaling.source] += 1
        factors = build_factors(module, tensors, scaling)
        network = str(meaning.network)
        own = self.factors.setdefault(network, {})
        for place in meaning.places:
            try:
                rows = place.rows(factors.up.shape[0])
                own[place.matrix] = factors if rows is None else factors.rows_of(rows)
                if place.swapped:
                    own[place.matrix] = own[place.matrix].swapped()
                if own[place.matrix].rank < factors.rank:
                    self._stacked.setdefault(module, own[place.matrix].rank / factors.rank)
            except ValueError as error:
                raise ExpertLoadError(f"{module!r} fuses several matrices: {error}.") from error
            if place.provisional:
                self.provisional.setdefault(network, {})[place.matrix] = meaning.flat
        self._kinds.setdefault(network, Counter())[str(meaning.architecture)] += 1

    def _scaling(
        self, module: str, roles: Mapping[str, str], meaning: ParsedKey, tensors: Mapping[str, Tensor]
    ) -> Scaling | None:
        """The scaling of a matrix; None where the file does not say."""
        if "alpha" in roles:
            return Scaling(self._alpha(roles["alpha"]), TENSORS)
        rank = own_rank(tensors)
        kernels = any(tensor.dim() == 4 and tuple(tensor.shape[2:]) != (1, 1) for tensor in tensors.values())
        found = self.alphas.find(Target(str(meaning.network), _names(module, meaning), rank, kernels))
        if found is not None and found.rank is not None and rank is not None and found.rank != rank:
            self._other_ranks.setdefault((found.source, found.rank), []).append(f"{module!r} has {rank}")
        return found

    def _alpha(self, key: str) -> float:
        tensor = self._tensors[key]
        if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
            kind = f"{_name(tensor.dtype)} of shape {tuple(tensor.shape)}"
            raise ExpertLoadError(f"{key!r} is {kind}; an alpha is one number.")
        value = float(tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor)
        if not abs(value) <= LARGEST:
            raise ExpertLoadError(f"{key!r} is {value}; an alpha is a finite number.")
        return value

    def _numbers(self, key: str) -> Tensor:
        """A tensor of finite floating-point numbers.

        Raises:
            ExpertLoadError: it is something else.
        """
        tensor = self._tensors[key]
        if tensor.dtype in FLOATS_OF_8_BITS:
            tensor = tensor.to(torch.float16)  # which has all their values, and knows all operations
        elif tensor.dtype not in _FLOATS:
            raise ExpertLoadError(f"{key!r} is of type {_name(tensor.dtype)}; allowed are {_ALLOWED}.")
        elif self._copy:
            tensor = tensor.clone()
        if tensor.numel() == 0:
            raise ExpertLoadError(f"{key!r} is empty: its shape is {tuple(tensor.shape)}.")
        if key not in self._finite and not is_finite(tensor):
            value = tensor[~finite_values(tensor)][0].item()
            raise ExpertLoadError(f"{key!r} holds values that are not finite ({value}).")
        return tensor

    def _note(self) -> None:
        """Sentences on what of the file's strength is not as it says."""
        if self._stacked:
            module, share = next(iter(self._stacked.items()))
            self.notes.append(
                f"{len(self._stacked)} fused matrices are stacked of several LoRAs (split_qkv=True; "
                f"{module!r}) under one alpha, which is read as it stands: {share:.2g} of what each had"
            )
        for (source, rank), modules in self._other_ranks.items():
            self.notes.append(
                f"{source} names r={rank:g}, and the factors of {len(modules)} matrices have another "
                f"({modules[0]}), which counts"
            )
        if not self.sources[NOWHERE]:
            return
        self.notes += self.alphas.passed_over(self.sources)
        if any(meaning.dialect.startswith("PEFT") for meaning in self.table.meanings.values()):
            self.notes.append(
                f"PEFT's alpha stands in {ADAPTER_CONFIG}, which was not found beside the file, so alpha is r"
            )


def _names(module: str, meaning: ParsedKey) -> list[str]:
    """What PEFT's patterns may call a matrix: its path inside the network, whatever the class around it."""
    name = module
    for prefix in ("base_model.", "model.", f"{meaning.network}."):
        name = name.removeprefix(prefix)
    canonical = [place.matrix for place in meaning.places]
    architecture = by_name(meaning.architecture or "")
    if architecture is not None:
        canonical += [architecture.write(matrix, "diffusers") for matrix in canonical]
    return list(dict.fromkeys([name, *canonical]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
