"""Pictures with the extension in the fake host: what changes, and that nothing remains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_diffusion.core.networks import map_network

from .conftest import World, make_lora, make_world

TWO = {"experts": {"dog": 1.0, "cat": 1.0}}
GATED = {**TWO, "gates": "both"}


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def test_off_on_off_gives_the_same_pictures_to_the_bit(world: World) -> None:
    before = world.picture()
    on = world.picture(GATED)
    assert world.is_clean()
    assert not same(on, before)
    assert same(world.picture(), before)
    assert same(world.picture(GATED), on)


def test_both_networks_are_changed_and_prompts_are_encoded_anew(world: World) -> None:
    """The host's cache of encoded prompts knows nothing of experts: stale in either direction."""
    before = world.picture()
    cache = world.host.processing.StableDiffusionProcessing.cached_c
    plain = cache[1][0][0][0][1].clone()
    world.picture(GATED)
    assert set(world.session.last_run.weights) == {"unet", "text_encoder"}
    assert cache[0] is None
    assert not same(cache[1][0][0][0][1], plain)
    world.picture()
    assert same(cache[1][0][0][0][1], plain)
    assert same(world.picture(), before)


def test_gates_uniform_weights_and_each_expert_alone_differ(world: World) -> None:
    pictures = [
        world.picture(),
        world.picture(TWO),
        world.picture(GATED),
        world.picture({**TWO, "gates": "pooled"}),
        world.picture({"experts": [{"name": "dog"}, {"name": "cat", "active": False}], "gates": "both"}),
        world.picture({"experts": {"dog": 0.5, "cat": 1.0}, "gates": "both"}),
        world.picture({"experts": ["animals/fox"]}),
    ]
    for i, one in enumerate(pictures):
        assert not any(same(one, other) for other in pictures[:i]), i


def test_an_inactive_expert_is_as_if_it_were_not_there(world: World) -> None:
    one = world.picture({"experts": [{"name": "dog"}, {"name": "cat", "active": False}]})
    torch.testing.assert_close(one, world.picture({"experts": ["dog"]}))


def test_an_expert_that_the_prompt_does_not_name_is_told_and_its_phrase_inserted(world: World) -> None:
    lora = make_lora(world.models["other"], 30)
    for name, phrase in (("boot", "a zorin boot"), ("clock", "a kipra clock")):
        path = world.folder / "Lora" / f"{name}.safetensors"
        save_file(lora, path, {"modelspec.trigger_phrase": phrase})
    both = {"experts": {"boot": 1.0, "clock": 0.5}}
    drawn = world.processing([both], prompt="a Zorin boot on the beach")
    world.host.processing.process_images(drawn)
    assert [one for one in drawn.comments if "name" in one] == [
        "MoLE: the prompt does not name 'clock': write 'a kipra clock'"
    ]
    library = world.session.library
    written, said = library.with_phrases("the beach, ", ["boot", "clock", "dog"])
    assert written == "the beach, a zorin boot, a kipra clock"
    assert said == "The file of dog names no phrase."
    assert library.with_phrases(written, ["boot", "clock"]) == (written, "The prompt names all experts.")
    assert library.with_phrases("", ["clock"])[0] == "a kipra clock"


def test_img2img(world: World) -> None:
    before = world.picture(img2img=True)
    assert not same(world.picture(GATED, img2img=True), before)
    assert same(world.picture(img2img=True), before)


def test_batches_are_drawn_with_one_attachment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from mole_webui import attachment

    made = []
    kind = attachment.Attachment

    def counted(*args: Any, **options: Any) -> Any:
        made.append(kind(*args, **options))
        return made[-1]

    monkeypatch.setattr(attachment, "Attachment", counted)
    processed = world.draw(GATED, n_iter=3)
    assert len(made) == 1
    assert len(processed.images) == 3
    assert world.is_clean()
    single = world.draw(GATED)
    assert same(single.images[0], processed.images[0])


def test_regions_confine_an_expert_at_any_size(world: World) -> None:
    """Hires fix changes the latent's size in the middle of a generation, not always in proportion."""
    left = {"experts": [{"name": "dog", "region": [0, 0, 0.5, 1]}, {"name": "cat", "region": "right half"}]}
    for gates in ("uniform", "both"):
        settings = {**left, "gates": gates}
        assert not same(world.picture(settings), world.picture({**TWO, "gates": gates}))
        hires = world.picture(settings, hr_size=(12, 14))
        assert hires.shape[-2:] == (12, 14)
        assert not same(hires, world.picture({**TWO, "gates": gates}, hr_size=(12, 14)))
    assert world.is_clean()


def test_a_region_of_the_whole_picture_changes_nothing(world: World) -> None:
    everywhere = {"experts": [{"name": n, "region": [0, 0, 1, 1]} for n in ("dog", "cat")], "gates": "both"}
    torch.testing.assert_close(world.picture(everywhere), world.picture(GATED))


def test_the_hosts_own_loras_keep_working(world: World) -> None:
    prompt = "a dog and a cat <lora:style:1>"
    plain, lora = world.picture(), world.picture(prompt=prompt)
    both = world.picture(GATED, prompt=prompt)
    assert not same(lora, plain)
    assert not same(both, world.picture(GATED))
    assert same(world.picture(prompt=prompt), lora)
    assert same(world.picture(), plain)


def write_lora(world: World, name: str, **more: Tensor) -> None:
    state = make_lora(world.models["base"], 33, text=False)
    save_file(state | more, world.folder / "Lora" / f"{name}.safetensors")


def write_dora(world: World) -> None:
    """`dora` in the folder: norms that are not those of the base."""
    network = world.models["base"].unet
    known = make_lora(world.models["base"], 33, text=False)
    magnitudes = {}
    for site in map_network(network, "unet").sites:
        if f"unet.{site.name}.lora_A.weight" in known:
            weight = network.get_submodule(site.path).weight.detach().float()
            magnitudes[f"unet.{site.name}.lora_magnitude_vector"] = weight.flatten(1).norm(dim=1) * 1.3
    write_lora(world, "dora", **magnitudes)


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_a_lora_left_in_the_weights_does_not_change_a_dora(world: World, name: str) -> None:
    """Hosts take the last picture's LoRAs out of the weights when the next forward asks, not before."""
    network = world.models["base"].unet
    write_dora(world) if name == "dora" else write_lora(world, name)
    linear = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2")
    patched = {n: m for n, m in network.named_modules() if n.endswith(linear)}
    backup = {n: module.weight.detach().clone() for n, module in patched.items()}

    def assign(values: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            for n, module in patched.items():
                module.weight.copy_(values[n])

    clean = world.picture({"experts": {name: 1.0}})
    generator = torch.Generator().manual_seed(1)
    assign({n: value + 0.2 * torch.randn(value.shape, generator=generator) for n, value in backup.items()})
    if world.flavour == "a1111":
        for n, module in patched.items():
            module.network_weights_backup = backup[n]
    else:
        loader = world.models["base"].forge_objects.unet.model.lora_loader
        loader.backup.update({f"diffusion_model.{n}.weight": value for n, value in backup.items()})
    restore = network.register_forward_pre_hook(lambda *_: assign(backup), prepend=True)
    found = world.picture({"experts": {name: 1.0}})
    restore.remove()
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert not same(clean, world.picture())


def test_a_dora_follows_weights_that_a_host_changed_without_a_word(world: World) -> None:
    """A host that keeps no backup where we find it: the first forward looks at the weights again."""
    network = world.models["base"].unet
    write_dora(world)
    clean = world.picture({"experts": ["dora"]})
    weight = network.middle_block[1].transformer_blocks[0].attn1.to_q.weight
    before = weight.detach().clone()
    with torch.inference_mode():
        weight.mul_(1.5)

    def put_back(*_: Any) -> None:
        with torch.inference_mode():
            weight.copy_(before)

    handle = network.register_forward_pre_hook(put_back, prepend=True)
    found = world.picture({"experts": ["dora"]})
    handle.remove()
    assert same(found, clean)


def test_an_expert_that_is_also_in_the_prompt_is_named(world: World) -> None:
    p = world.processing([GATED], prompt="a dog <lora:dog:1>")
    world.host.processing.process_images(p)
    assert any("'dog' is an expert and a <lora:...>" in comment for comment in p.comments)


def test_interrupt(world: World) -> None:
    before = world.picture()

    def stop(params: Any) -> None:
        world.host.shared.state.interrupted = params.sampling_step == 1

    world.host.script_callbacks.callbacks["cfg_denoiser"].append(stop)
    world.draw(GATED)
    assert world.host.shared.state.interrupted
    world.host.script_callbacks.callbacks["cfg_denoiser"].remove(stop)
    world.host.shared.state.interrupted = False
    assert world.is_clean()
    assert same(world.picture(), before)


def test_an_exception_inside_the_unet_leaves_nothing(world: World) -> None:
    """`postprocess` is not called then."""
    before = world.picture()
    module = world.models["base"].unet.middle_block[1].transformer_blocks[0].ff
    handle = module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError, match="out of memory"):
        world.draw(GATED)
    handle.remove()
    assert world.session.attachment is None
    module = world.models["base"].unet
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # Whoever uses the UNet next, with no script involved.
        raw = module(x, torch.tensor([500.0]), context=torch.zeros(1, 6, 12))
        assert same(world.picture(), before)
        assert same(module(x, torch.tensor([500.0]), context=torch.zeros(1, 6, 12)), raw)
    assert world.is_clean()


def test_an_exception_elsewhere_is_cleaned_up_at_the_next_start(world: World) -> None:
    before = world.picture()
    p = world.processing([GATED])
    p.scripts.run("process", p)
    p.scripts.run("process_batch", p)
    assert not world.is_clean()
    # The host stopped here and never called `postprocess`; the next picture is drawn with the panel off.
    assert same(world.picture(), before)
    assert world.is_clean()


def watch_carriers(world: World) -> list[str]:
    """At each step: the checkpoints whose UNet and text encoder carry experts."""
    seen: list[str] = []

    def look(params: Any) -> None:
        for name, model in world.models.items():
            carried = [any(m._forward_hooks for m in net.modules()) for net in (model.unet, model.encoder)]
            assert carried[0] == carried[1]
            if carried[0]:
                seen.append(name)

    world.host.script_callbacks.callbacks["cfg_denoiser"].append(look)
    return seen


def test_the_refiner_takes_the_experts_over(world: World) -> None:
    """The checkpoint changes between two steps: experts must leave the first and come to the second."""
    plain = world.picture(refiner=("other", 1))
    seen = watch_carriers(world)
    one = world.picture(GATED, refiner=("other", 1))
    assert world.is_clean()
    assert seen == ["base", "other", "other"]
    assert not same(one, plain)
    # The second time the checkpoint comes back from memory, and no callback says so.
    assert same(world.picture(GATED, refiner=("other", 1)), one)
    assert seen == ["base", "other", "other"] * 2
    assert same(world.picture(refiner=("other", 1)), plain)
    assert world.is_clean()


def test_hires_fix_with_another_checkpoint(world: World) -> None:
    plain = world.picture(hr_size=(12, 12), hr_checkpoint="other")
    seen = watch_carriers(world)
    gated = world.picture(GATED, hr_size=(12, 12), hr_checkpoint="other")
    assert not same(gated, plain)
    assert seen == ["base"] * 3 + ["other"] * 3
    assert same(world.picture(GATED, hr_size=(12, 12), hr_checkpoint="other"), gated)
    assert same(world.picture(hr_size=(12, 12), hr_checkpoint="other"), plain)
    assert world.is_clean()


def test_a_refiner_of_another_kind_draws_without_experts(
    flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(flavour, tmp_path, monkeypatch)
    import toys

    world.models["wide"] = toys.FLAVOURS[flavour](3, width=32)
    world.host.sd_models.checkpoints["wide"] = world.models["wide"]
    picture = world.picture(GATED, refiner=("wide", 1))
    assert not same(picture, world.picture(refiner=("wide", 1)))
    assert world.is_clean()


def test_switching_the_checkpoint_between_pictures(world: World) -> None:
    before = world.picture()
    gated = world.picture(GATED)
    world.host.sd_models.checkpoints.clear()
    world.host.sd_models.checkpoints.update({"other": world.models["other"]})
    world.host.sd_models.load_model("other")
    other = world.picture()
    assert not same(world.picture(GATED), other)
    assert same(world.picture(), other)
    world.host.sd_models.checkpoints.clear()
    world.host.sd_models.checkpoints.update({"base": world.models["base"]})
    world.host.sd_models.load_model("base")
    assert same(world.picture(), before)
    assert same(world.picture(GATED), gated)
    assert world.is_clean()


def test_a_picture_inside_a_picture(world: World) -> None:
    """Detailers call the host from `postprocess_image`, with all scripts."""
    expected = world.draw(GATED, n_iter=2).images

    class Detailer:
        inside = False

        def title(self) -> str:
            return "detailer"

        def postprocess_image(self, p: Any, image: Any, *args: Any) -> None:
            if not Detailer.inside:
                Detailer.inside = True
                world.draw(GATED, size=(6, 6), img2img=True)
                Detailer.inside = False

    p = world.processing([GATED], n_iter=2)
    p.scripts.scripts.append(Detailer())
    found = world.host.processing.process_images(p).images
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert world.is_clean()


def test_a_block_whose_class_changed_is_still_matched(world: World) -> None:
    """Token merging gives transformer blocks another class; names are what counts."""
    expected = world.picture({**TWO, "gates": "pooled"})
    for module in world.models["base"].unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.__class__ = type("ToMeBlock", (type(module),), {})
    assert same(world.picture({**TWO, "gates": "pooled"}), expected)


def test_token_merging_is_refused_where_gates_need_every_token(world: World) -> None:
    with pytest.raises(RuntimeError, match="Token merging of the web UI is on"):
        world.draw(GATED, token_merging_ratio=0.5)
    assert world.is_clean()
    world.picture({**TWO, "gates": "pooled"}, token_merging_ratio=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": ["bird"]}, "there is no LoRA 'bird'"),
        ({"experts": {"dog": 1.0}, "gates": "both"}, "choose 'cat' too"),
        ({"experts": {"dog": 1, "cat": 1, "animals/fox": 1}, "gates": "both"}, "take 'fox' away"),
        ({**TWO, "gates": "nothing"}, "there is no gates file 'nothing'"),
        ({"experts": {"dog": "loud"}}, "scale 'loud' of expert 'dog' is not a number"),
        ({"experts": {"dog": 1.0}, "gate": "both"}, "unknown gate in settings"),
    ],
)
def test_what_is_wrong_is_shown_and_no_picture_is_drawn(
    world: World, settings: dict[str, Any], message: str
) -> None:
    """A host only logs what its callbacks raise and goes on: a picture without experts, and nobody knows."""
    before = world.picture()
    with pytest.raises(RuntimeError, match=f"(?s)MoLE: .*{message}"):
        world.draw(settings)
    assert same(world.picture(), before)
    assert world.is_clean()


def test_renamed_files_are_told_by_their_hash(world: World) -> None:
    expected = world.picture(GATED)
    loras = world.folder / "Lora"
    (loras / "dog.safetensors").rename(loras / "my best dog.safetensors")
    assert same(world.picture({"experts": {"my best dog": 1.0, "cat": 1.0}, "gates": "both"}), expected)
    with pytest.raises(RuntimeError, match="choose 'dog' too"):
        world.draw({"experts": {"animals/fox": 1.0, "cat": 1.0}, "gates": "both"})


def test_an_encoder_without_matrices_leaves_the_unet_to_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenCLIP on AUTOMATIC1111 (SD 2, second encoder of SDXL) has fused q, k, v."""
    world = make_world("a1111", tmp_path, monkeypatch, encoder="open_clip")
    before = world.picture()
    p = world.processing([GATED])
    picture = world.host.processing.process_images(p).images[0]
    assert not same(picture, before)
    assert set(world.session.last_run.weights) == {"unet"}
    assert any("text encoder of this model cannot take experts" in comment for comment in p.comments)
    assert same(world.picture(), before)


def test_the_whole_block_form_runs_blocks_that_change_their_input(world: World) -> None:
    """composition="output" runs a block once per expert; Forge's blocks overwrite what they are given."""
    from mole_diffusion import MoLEConfig, inject, load_expert

    experts = [load_expert(world.folder / "Lora" / f"{name}.safetensors") for name in ("dog", "cat")]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = world.models["base"].unet
    mixture = inject(unet, experts, MoLEConfig(composition="output", granularity="block", pooling="mean"))
    mixture.activate(["dog"])

    def run() -> Tensor:
        with torch.inference_mode():
            return unet(x, torch.tensor([500.0]), context=torch.ones(1, 6, 12))

    found = run()
    mixture.eject()
    other = inject(unet, experts, MoLEConfig())
    other.activate(["dog"])
    torch.testing.assert_close(found, run(), rtol=1e-4, atol=1e-5)
    other.eject()


def test_forge_has_no_plain_linear_and_inference_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world("forge", tmp_path, monkeypatch)
    unet = world.models["base"].unet
    linears = [m for m in unet.modules() if type(m).__name__ == "ForgeLinear"]
    assert not any(isinstance(m, torch.nn.Linear) for m in linears)
    assert all(p.is_inference() for p in unet.parameters())


def test_the_last_run_has_weights_of_every_gate(world: World) -> None:
    world.picture(GATED)
    run = world.session.last_run
    assert run.experts == ("dog", "cat")
    assert run.forwards["unet"] == 3
    for gates in run.weights.values():
        for row in gates.values():
            assert sum(row) == pytest.approx(1.0, abs=1e-4)
    world.picture({**GATED, "record": False})
    assert world.session.last_run is run
