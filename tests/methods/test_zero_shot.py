"""Methods without training, against loops and files written out by hand."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mole_diffusion.core.errors import ConfigError
from mole_diffusion.core.factors import LoraFactors
from mole_diffusion.core.routing import LARGEST, Route
from mole_diffusion.methods import prepare
from mole_diffusion.methods.freefuse import MIXTURE as FREEFUSE_MIXTURE
from mole_diffusion.methods.loratorio import LoRAtorio
from mole_diffusion.methods.merges import LORA_FILE

NAMES = ["boot", "cat", "clock"]
PROMPT = "a zorin boot a vim cat a kipra clock"
CLOSE = {"atol": 2e-4, "rtol": 0.0}
GUIDANCE, STEPS = 3.0, 3


def _loaded(plain: Any, files: dict[str, Path]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name, path in files.items():
            plain.load_lora_weights(path, adapter_name=name)
    return plain


def _deltas(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrix -> (down, up) of a file."""
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if ".lora_A." in key]  # noqa: SIM118
        return {key: (file.get_tensor(key), file.get_tensor(key.replace("lora_A", "lora_B"))) for key in keys}


def test_klora_gives_each_matrix_to_one_expert(pipe, plain, draw, lora_files, tmp_path) -> None:
    ours = draw(pipe, mixture="klora")
    experts = {name: _deltas(path) for name, path in lora_files.items()}
    chosen: dict[str, torch.Tensor] = {}
    picked = set()
    for key in dict.fromkeys(key for own in experts.values() for key in own):
        own = {name: deltas[key] for name, deltas in experts.items() if key in deltas}
        ranks = sorted((len(down) for down, _ in own.values()), reverse=True)
        count = ranks[0] * (ranks[1] if len(ranks) > 1 else 1)
        shares = {}
        for name, (down, up) in own.items():
            entries = (up @ down).abs().flatten().sort(descending=True).values
            shares[name] = float(entries[:count].sum() / entries.sum())
        best = max(shares, key=lambda name: shares[name])
        picked.add(best)
        down, up = own[best]
        # Alphas are twice the ranks in these files; this one has its strength in the factors.
        chosen[key], chosen[key.replace("lora_A", "lora_B")] = down.contiguous(), (2 * up).contiguous()
    assert len(picked) > 1
    save_file(chosen, tmp_path / "picked.safetensors")
    plain.load_lora_weights(tmp_path / "picked.safetensors")
    torch.testing.assert_close(ours, draw(plain), **CLOSE)


def test_klora_lets_styles_win_towards_the_end() -> None:
    strong, flat = torch.zeros(4, 4), torch.ones(4, 4) * 0.1
    strong[0, 0] = 1.0
    ups = strong + flat, flat
    factors = {index: LoraFactors(down=torch.eye(4), up=up, alpha=4.0) for index, up in enumerate(ups)}
    owners = torch.repeat_interleave(torch.eye(2), 4, dim=1)
    plain = Route(LARGEST)
    scores = plain.factors(factors)
    z = torch.zeros(1, 8)
    assert plain.weights(scores, z, owners, 0.0).tolist() == [[1.0, 0.0]]
    style = Route(LARGEST, growing=frozenset({0}))
    assert style.weights(scores, z, owners, 0.0).tolist() == [[1.0, 0.0]]
    style = Route(LARGEST, growing=frozenset({1}))
    shares = (float(scores[0]), float(scores[4]))
    late, early = (style.weights(scores, z, owners, t)[0].argmax().item() for t in (0.0, 1.0))
    assert late == (1 if 2.0 * shares[1] > shares[0] else 0) == 1
    assert early == (1 if 0.5 * shares[1] > shares[0] else 0) == 0


@torch.no_grad()
def test_loratorio_is_the_loop_by_hand(pipe, plain, draw, lora_files) -> None:
    method = LoRAtorio(patch=2, temperature=0.2)
    ours = draw(
        pipe, output_type="latent", num_inference_steps=STEPS, guidance_scale=GUIDANCE, mixture=method
    )
    _loaded(plain, lora_files).set_adapters(NAMES, [1.0] * 3)
    text, empty = plain.encode_prompt(PROMPT, "cpu", 1, True)
    plain.scheduler.set_timesteps(STEPS)
    size = plain.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(7))
    for timestep in plain.scheduler.timesteps:
        predicted = {}
        for branch, words in (("text", text), ("empty", empty)):
            own = []
            for name in NAMES:
                plain.set_adapters([name], [1.0])
                own.append(plain.unet(latents, timestep, encoder_hidden_states=words).sample)
            plain.disable_lora()
            base = plain.unet(latents, timestep, encoder_hidden_states=words).sample
            plain.enable_lora()
            # Each patch of 2 x 2 by itself.
            mixed = torch.zeros_like(base)
            for y in range(0, size, 2):
                for x in range(0, size, 2):
                    window = (slice(None), slice(None), slice(y, y + 2), slice(x, x + 2))
                    here = torch.stack([one[window].flatten() for one in own])
                    cosines = torch.cosine_similarity(base[window].flatten()[None], here, dim=-1)
                    weights = torch.softmax(-cosines / 0.2, 0)
                    mixed[window] = sum(w * one[window] for w, one in zip(weights, own, strict=True))
            predicted[branch] = (mixed + base) / 2 if branch == "empty" else mixed
        guided = predicted["empty"] + GUIDANCE * (predicted["text"] - predicted["empty"])
        latents = plain.scheduler.step(guided, timestep, latents).prev_sample
    torch.testing.assert_close(ours, latents, **CLOSE)


def test_freefuse_gives_every_place_to_one_expert(pipe, draw) -> None:
    words = {"boot": "boot", "cat": "cat", "clock": "clock"}
    assert set(words) == set(pipe.experts)
    seen: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    mixture = pipe.mixtures["unet"]

    def look(*_: Any) -> None:
        for label, value in mixture._context.live.items():
            (texts if label.endswith(".context") else seen).append(value.rows)

    handle = pipe.unet.register_forward_hook(look)
    draw(pipe, mixture="freefuse", num_inference_steps=4, guidance_scale=1.0)
    handle.remove()
    late = torch.cat(seen[-2:])
    torch.testing.assert_close(late.sum(-1), torch.ones(len(late)), atol=1e-4, rtol=0)
    assert late.max() == pytest.approx(1.0, abs=1e-4)
    settings = FREEFUSE_MIXTURE.settings
    styled = {name: value for name, value in asdict(settings).items() if name.startswith("style")}
    assert len(styled) == 4
    assert set(styled.values()) == {1.0}
    # Its words are its own in full, where "auto" gives several experts less.
    assert texts
    assert all(rows.max() == 1.0 for rows in texts)


@pytest.mark.parametrize("word", ["arrow", "energy", "klora", "loratorio"])
def test_of_one_expert_it_is_that_expert(pipe, plain, draw, lora_files, word) -> None:
    if word == "loratorio":
        alone = draw(pipe, mixture=LoRAtorio(), active_experts=["cat"], guidance_scale=1.0)
        _loaded(plain, lora_files).set_adapters(["cat"], [1.0])
        torch.testing.assert_close(alone, draw(plain, guidance_scale=1.0), **CLOSE)
        return
    alone = draw(pipe, mixture=word, active_experts=["cat"])
    _loaded(plain, lora_files).set_adapters(["cat"], [1.0])
    torch.testing.assert_close(alone, draw(plain), **CLOSE)


@pytest.mark.parametrize("word", ["arrow", "energy", "klora", "loratorio", "freefuse"])
def test_nothing_remains(pipe, draw, word) -> None:
    before = draw(pipe, mixture="gates")
    hooks = len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)
    different = draw(pipe, mixture=word)
    assert (different - before).abs().max() > 1e-3
    assert torch.equal(draw(pipe, mixture="gates"), before)
    assert (len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)) == hooks


def test_routes_know_no_places(pipe, draw) -> None:
    with pytest.raises(ConfigError, match="mixture='arrow' knows no places: region_masks are not allowed"):
        draw(pipe, mixture="arrow", region_masks={"boot": torch.ones(32, 32)})


def test_ssr_lets_each_experts_signals_through(pipe, plain, draw, tmp_path) -> None:
    concepts = {"boot": "a zorin boot", "cat": "a vim cat", "clock": "a kipra clock"}
    prepared = prepare("ssr", pipe, concepts=concepts, folder=tmp_path / "ssr")
    ours = draw(pipe, mixture=prepared)
    plain.load_lora_weights(tmp_path / "ssr" / LORA_FILE)
    torch.testing.assert_close(ours, draw(plain), **CLOSE)
    plain.unload_lora_weights()
    assert prepared.unet_passes == {"with_gradient": 0, "without_gradient": 30}


def test_ssr_is_least_squares() -> None:
    from mole_diffusion.core.matrices import MatrixSlot
    from mole_diffusion.methods.ssr import _Signals

    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 8)
    factors = {i: LoraFactors(down=torch.randn(2, 12), up=torch.randn(8, 2), alpha=2.0) for i in range(2)}
    signals = _Signals(MatrixSlot("m", layer, "tokens", factors))
    inputs = [torch.randn(1, 40, 12) @ torch.randn(12, 12) for _ in range(2)]
    for index, x in enumerate(inputs):
        handle = signals.watch(index)
        layer(x)
        handle.remove()
    down, up = signals.factors()
    wide = torch.cat([one.down for one in factors.values()])
    z = [x[0] @ wide.T for x in inputs]
    kept = [torch.cat([z[0][:, :2], torch.zeros(40, 2)], 1), torch.cat([torch.zeros(40, 2), z[1][:, 2:]], 1)]
    between = torch.linalg.lstsq(torch.cat(z), torch.cat(kept)).solution
    expected = between @ torch.cat([one.up for one in factors.values()], 1).T
    torch.testing.assert_close((up @ down).T, wide.T @ expected, atol=2e-2, rtol=2e-2)
