"""Where the tests of this folder run: on a CUDA device with -m gpu, else on the CPU, as a dry run."""

from collections.abc import Iterator

import pytest
import torch
from gpu_tools import on_gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and a CUDA device that computes in full precision and the same twice."""
    yield from _prepared(request.param)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """A CUDA device, for what no CPU can stand in for; the test needs the mark `gpu`."""
    yield from _prepared("cuda")


def _prepared(name: str) -> Iterator[torch.device]:
    if name == "cpu":
        yield torch.device(name)
        return
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False: this machine has no CUDA device")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield torch.device(name)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before
    torch.cuda.empty_cache()
