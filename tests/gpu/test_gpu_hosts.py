"""Attention kernels, memory formats, compilers, graphs, streams, offloading and training on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from gpu_tools import TOLERANCE, assert_close, differs, dtypes, on_gpu, places, run_on
from tiny.networks import make_clip, make_experts, make_unet, randomise
from tiny.sd import build, drawing, make_components, write_lora
from torch import nn

from mole_diffusion import Mixture, MoLEConfig, StableDiffusionMoLEPipeline, inject
from mole_diffusion.pictures.training import Concept, TrainingConfig

CPU = torch.device("cpu")
CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
PROMPT = "a boot and a cat"


def gated(device: torch.device, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Mixture]:
    unet = make_unet(**settings).to(device, dtype)
    mixture = inject(unet, make_experts(3, unet), MoLEConfig())
    randomise(mixture)
    return unet, mixture


@pytest.fixture
def expected() -> torch.Tensor:
    """What the CPU says in float32."""
    return run_on(gated(CPU)[0], CPU)


@places
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_attention_kernels(
    processor: type, device: torch.device, dtype: torch.dtype, expected: torch.Tensor
) -> None:
    unet, _ = gated(device, dtype)
    unet.set_attn_processor(processor())
    assert_close(run_on(unet, device), expected, dtype)


@on_gpu
@dtypes
def test_xformers(dtype: torch.dtype, expected: torch.Tensor, cuda: torch.device) -> None:
    pytest.importorskip("xformers.ops", reason="xformers is not installed", exc_type=ImportError)
    unet, _ = gated(cuda, dtype)
    unet.set_attn_processor(XFormersAttnProcessor())
    assert_close(run_on(unet, cuda), expected, dtype)


@places
@pytest.mark.parametrize("linear", [True, False])
def test_channels_last(linear: bool, device: torch.device, dtype: torch.dtype) -> None:
    unet, _ = gated(device, dtype, linear=linear)
    unet.to(memory_format=torch.channels_last)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(run_on(unet, device), run_on(gated(CPU, linear=linear)[0], CPU), dtype)


@places
def test_autocast(device: torch.device, dtype: torch.dtype, expected: torch.Tensor) -> None:
    unet, mixture = gated(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = run_on(unet, device)
        run_on(unet, device, grad=True).square().mean().backward()
    assert_close(found, expected, dtype)
    assert all(weights.dtype == torch.float32 for weights in mixture.live_weights().values())
    assert all(
        torch.isfinite(p.grad).all() and p.grad.device.type == device.type for p in mixture.parameters()
    )


@pytest.fixture
def compiler(device: torch.device) -> Iterator[dict[str, Any]]:
    """Arguments of torch.compile: Triton's kernels on a GPU; on the CPU tracing alone."""
    torch._dynamo.reset()
    yield {"backend": "inductor"} if device.type == "cuda" else {"backend": "aot_eager"}
    torch._dynamo.reset()


@places
def test_compiled_blocks(
    device: torch.device, dtype: torch.dtype, expected: torch.Tensor, compiler: dict[str, Any]
) -> None:
    unet, _ = gated(device, dtype)
    run_on(unet, device)
    unet.compile_repeated_blocks(fullgraph=True, **compiler)
    assert_close(run_on(unet, device), expected, dtype)


def test_a_compiled_text_encoder(device: torch.device, compiler: dict[str, Any]) -> None:
    outputs = []
    for where in (CPU, device):
        clip = make_clip().to(where)
        randomise(inject(clip, make_experts(2, clip), MoLEConfig()))
        run_on(clip, where)
        network = clip if where is CPU else torch.compile(clip, fullgraph=True, **compiler)
        outputs.append(run_on(network, where))
    assert_close(outputs[1], outputs[0])


@on_gpu
def test_compiled_blocks_in_cuda_graphs(expected: torch.Tensor, cuda: torch.device) -> None:
    """What `mode="reduce-overhead"` does."""
    torch._dynamo.reset()
    unet, _ = gated(cuda)
    run_on(unet, cuda)
    compiled = torch.compile(unet, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = run_on(compiled, cuda).clone()
    assert_close(found, expected)
    torch._dynamo.reset()


@on_gpu
@dtypes
def test_a_captured_forward_reads_new_inputs(dtype: torch.dtype, cuda: torch.device) -> None:
    """A whole forward with gates as one CUDA graph: nothing in it waits for the CPU or copies from it."""
    unet, _ = gated(cuda, dtype)
    latent, text = (
        torch.randn(2, 4, 8, 8, device=cuda).to(dtype),
        torch.randn(2, 77, 16, device=cuda).to(dtype),
    )
    timestep = torch.tensor(500, device=cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                unet(latent, timestep, text)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = unet(latent, timestep, text).sample
        for _ in range(2):
            latent.normal_()
            text.normal_()
            graph.replay()
            found = captured.clone()
            assert_close(found, unet(latent, timestep, text).sample, dtype)


@on_gpu
def test_another_stream(expected: torch.Tensor, cuda: torch.device) -> None:
    unet, _ = gated(cuda)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        found = run_on(unet, cuda)
    side.synchronize()
    assert_close(found, expected)


def held(device: torch.device) -> int:
    """Bytes of tensors on a device: what its allocator says, or all tensors that Python knows."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_forwards_leave_nothing_behind_and_release_gives_back(device: torch.device) -> None:
    experts = make_experts(3, make_unet())
    # A GPU's libraries keep workspaces from the first product of a kind on.
    warm = make_unet().to(device)
    inject(warm, experts, MoLEConfig())
    run_on(warm, device)
    del warm
    unet = make_unet().to(device)
    base = run_on(unet, device)
    before = held(device)
    mixture = inject(unet, experts, MoLEConfig()).to(device)
    gates = held(device)
    run_on(unet, device)
    run_on(unet, device)
    kept = held(device)
    for _ in range(3):
        run_on(unet, device)
    assert held(device) == kept > gates > before
    mixture.release()
    assert held(device) <= gates
    assert not mixture.live_weights()
    mixture.eject()
    assert torch.equal(run_on(unet, device), base)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lora_files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_lora(folder / f"{name}.safetensors", components, seed, 2 + seed)
        for seed, name in enumerate(("boot", "cat"))
    }


@pytest.fixture
def pipe(components: dict[str, Any], lora_files: dict[str, Path]) -> StableDiffusionMoLEPipeline:
    """A pipeline on the CPU, with gates that decide."""
    pipe = build(StableDiffusionMoLEPipeline, components)
    for name, path in lora_files.items():
        pipe.load_expert(path, name=name)
    for mixture in pipe.mixtures.values():
        randomise(mixture)
    return pipe


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    # The same noise for all data types: torch draws other numbers in half precision.
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(pipe.unet.dtype)
    pictures = pipe(PROMPT, latents=noise, **CALL, **options).images
    return torch.from_numpy(pictures)


def gate_devices(pipe: Any) -> set[str]:
    return {t.device.type for mixture in pipe.mixtures.values() for t in mixture.gates.state_dict().values()}


@places
def test_a_pipeline_draws_the_same_picture(pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
    expected, base = draw(pipe), draw(pipe, mixture="none")
    assert differs(expected, base)
    pipe.to(device, dtype)
    found = draw(pipe)
    assert gate_devices(pipe) == {device.type}
    assert all(p.dtype == torch.float32 for m in pipe.mixtures.values() for p in m.parameters())
    # Pictures are numbers from 0 to 1.
    torch.testing.assert_close(found.float(), expected, rtol=0.0, atol=5 * TOLERANCE[dtype])


@on_gpu
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("when", ["before experts", "after experts", "after a picture"])
def test_offloading(
    how: str,
    when: str,
    pipe: Any,
    components: dict[str, Any],
    lora_files: dict[str, Path],
    cuda: torch.device,
) -> None:
    expected = draw(pipe)
    gates = {part: mixture.gates.state_dict() for part, mixture in pipe.mixtures.items()}
    if when == "before experts":
        pipe = build(StableDiffusionMoLEPipeline, components)
        getattr(pipe, how)(device=cuda)
        for name, path in lora_files.items():
            pipe.load_expert(path, name=name)
        for part, mixture in pipe.mixtures.items():
            mixture.gates.load_state_dict(gates[part])
    else:
        if when == "after a picture":
            pipe.to(cuda)
            draw(pipe)
            pipe.to("cpu")
        getattr(pipe, how)(device=cuda)
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), expected, rtol=0.0, atol=1e-3)
    assert gate_devices(pipe) == {"cuda"}
    assert pipe.unet.device.type in ("cpu", "meta")


def concepts() -> list[Concept]:
    return [
        Concept(name, f"a {name}", f"a {name}", [drawing(name, x) for x in (12, 18)])
        for name in ("boot", "cat")
    ]


@places
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(
    pipe: Any, device: torch.device, dtype: torch.dtype, checkpointing: bool, tmp_path: Path
) -> None:
    """Gates learn on the device, stop, and go on from the checkpoint."""
    pipe.to(device, dtype)
    settings: dict[str, Any] = {
        "collage_batch": 2,
        "pool_size": 4,
        "collage_background": "sources",
        "checkpoint_every": 1,
        "schedule": "constant",
        "gradient_checkpointing": checkpointing,
        "progress": False,
    }
    before = [p.detach().cpu().clone() for m in pipe.mixtures.values() for p in m.parameters()]
    config = TrainingConfig(iterations=4, **settings)
    stopped = pipe.train_gates(
        PROMPT, concepts(), config, callback=lambda event: event.iteration < 2, checkpoint_dir=tmp_path
    )
    assert stopped.stopped
    result = pipe.train_gates(PROMPT, concepts(), config, checkpoint_dir=tmp_path)
    assert [row["iteration"] for row in result.history] == [1, 2, 3, 4]
    after = [p.detach() for m in pipe.mixtures.values() for p in m.parameters()]
    assert {p.device.type for p in after} == {device.type}
    assert {p.dtype for p in after} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in after)
    assert any((p.cpu() - old).abs().max() > 1e-4 for p, old in zip(after, before, strict=True))
