"""API prompts that the tests queue; `tools/` writes the example workflows from the first four."""

from __future__ import annotations

from typing import Any

from comfy_server import Prompt

TEXT = "a zorin boot, a vekka monster and a kipra clock on the beach"


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of an API prompt."""
    return {"class_type": class_type, "inputs": inputs}


def starter(*names: str) -> Prompt:
    """The starter (node 1) and experts (the last is "experts")."""
    prompt: Prompt = {"1": node("MoLEStarterLoader")}
    previous: dict[str, Any] = {}
    for number, name in enumerate(names, start=2):
        prompt[str(number)] = node(
            "MoLELoadExpert", lora=f"starter: {name}", strength=1.0, name="", **previous
        )
        previous = {"experts": [str(number), 0]}
    return prompt


def sampling(
    prompt: Prompt,
    model: list[Any],
    clip: list[Any],
    *,
    steps: int = 2,
    seed: int = 1,
    text: Any = TEXT,
    at: int = 50,
    vae: tuple[str, int] = ("1", 2),
) -> Prompt:
    """The prompt with sampler, decoder and picture (nodes `at` to `at + 5`)."""
    names = [str(at + i) for i in range(6)]
    positive, negative, latent, sampler, decoded, saved = names
    prompt = dict(prompt)
    prompt[positive] = node("CLIPTextEncode", text=text, clip=clip)
    prompt[negative] = node("CLIPTextEncode", text="", clip=clip)
    prompt[latent] = node("EmptyLatentImage", width=128, height=128, batch_size=1)
    prompt[sampler] = node(
        "KSampler",
        model=model,
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=[latent, 0],
        seed=seed,
        steps=steps,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    prompt[decoded] = node("VAEDecode", samples=[sampler, 0], vae=list(vae))
    prompt[saved] = node("SaveImage", images=[decoded, 0], filename_prefix="mole")
    return prompt
