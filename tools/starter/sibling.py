"""The starter's sibling: a small FLUX.1 on the same codec and text encoder, with experts for its subjects.

Trained by flow matching (Lipman et al. 2023; logit-normal times, Esser et al. 2024) on the UNet's scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from mole_diffusion.starter.judge import Judge
from mole_diffusion.starter.location import FLUX, FLUX_STARTER

from . import alone, base, codec, evaluate, expert, loop, text, world
from .scenes import Dice
from .workshop import Workshop, load_codec

SEED = 53
STEPS, RATE = 7600, 1.2e-3
WIDTH, HEADS = 256, 8
SCENES, PRIORS = 480, 160
STYLES = ("blueprint",)
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2", "proj_mlp"),
    *(f"single_transformer_blocks.{number}.proj_out" for number in range(8)),
)
NORMS = (
    *("norm1.linear", "norm1_context.linear"),
    *(f"single_transformer_blocks.{number}.norm.linear" for number in range(8)),
)
SIDE = world.SIZE // 8
"""Of the latents; a token of the network is a square of two by two."""


@dataclass(frozen=True)
class Plan:
    """How an expert is trained.

    Attributes:
        rank: of its LoRA in the transformer.
        text: in the text encoder; 0 for none.
        steps: of training.
        rate: of learning.
        emphasis: how much more objects count than what is around them.
        own: scenes of its own in a batch.
        prior: ordinary ones beside them (prior preservation).
        targets: layers of the transformer.
    """

    rank: int
    text: int
    steps: int
    rate: float
    emphasis: float
    own: int
    prior: int
    targets: tuple[str, ...] = TARGETS


SUBJECT = Plan(4, 0, 240, 3e-3, 3.0, 6, 2)
STYLE = Plan(16, 8, 2000, 3e-3, 0.0, 8, 2, (*TARGETS, *NORMS))
"""The file that ships is of step 1,000. Without norms and text encoder a style comes slowly: after as many
steps in a quarter of the pictures."""


def new_transformer() -> FluxTransformer2DModel:
    """FLUX.1's layout, 256 wide, two double and eight single blocks."""
    network = FluxTransformer2DModel(
        in_channels=4 * codec.CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=192,
        pooled_projection_dim=192,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            # Every block begins as the identity, as in DiT (Peebles and Xie 2023): learns sooner.
            if ".norm" in f".{name}" or name == "proj_out":
                nn.init.zeros_(module.weight)
    return network


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Times as they are, without a shift: pictures are small."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C)."""
    tokens: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return tokens


def flow(rows: Mapping[str, Tensor], dice: Dice) -> loop.Batch:
    """What a training step reads, of rows of clean latents: straight paths from them to noise."""
    latents = rows["latents"]
    slots = torch.arange(len(latents), device=latents.device)
    even = ((slots + dice.uniform(len(latents))) / len(latents)).clamp(1e-4, 1 - 1e-4)
    sigmas = torch.special.ndtri(even).sigmoid()
    noise = dice.normal(*latents.shape)
    part = sigmas.view(-1, 1, 1, 1)
    return {
        "sigmas": sigmas,
        "noisy": packed((1 - part) * latents + part * noise),
        "target": packed(noise - latents),
        "cover": packed(rows["cover"].expand_as(latents)),
        "ids": rows["ids"],
    }


def denoising(
    shop: Workshop, network: nn.Module, encoder: Any, emphasis: float = 2.0
) -> Callable[[loop.Batch], Tensor]:
    """The loss of transformer and text encoder on a batch of `flow`; see `base.denoising_loss`."""
    # Its attention of cuDNN fails in the backward pass of this network (torch 2.11, H100).
    torch.backends.cuda.enable_cudnn_sdp(False)
    side = SIDE // 2
    places = FluxPipeline._prepare_latent_image_ids(1, side, side, shop.device, torch.float32)
    words = torch.zeros(text.MAX_TOKENS, 3, device=shop.device)

    def loss_of(batch: loop.Batch) -> Tensor:
        with shop.mixed_precision():
            told = encoder(batch["ids"])
            predicted = network(
                hidden_states=batch["noisy"],
                timestep=batch["sigmas"],
                encoder_hidden_states=told.last_hidden_state.float(),
                pooled_projections=told.pooler_output.float(),
                img_ids=places,
                txt_ids=words,
            ).sample.float()
        return base.denoising_loss(predicted, batch["target"], batch["cover"], emphasis)

    return loss_of


def train_base(shop: Workshop) -> None:
    """Train the transformer; writes its averaged weights in half precision, and the scheduler."""
    torch.manual_seed(SEED)
    network = new_transformer().train().to(shop.device)
    rows_of, encoder = base.ordinary_batches(shop, SEED), load_encoder(shop)

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 1, step)
        return flow(rows_of(step, dice), dice)

    loop.train(
        "flux",
        shop.work,
        network,
        make,
        denoising(shop, network, encoder),
        steps=shop.steps(STEPS),
        rate=RATE,
        average=0.999,
        checkpoint_every=1000,
        graph=shop.graph,
    )
    folder = shop.out / FLUX
    writer: Any = network.to("cpu", torch.float16)
    writer.save_pretrained(folder / "transformer", safe_serialization=True)
    new_scheduler().save_pretrained(folder / "scheduler")


def load_encoder(shop: Workshop) -> Any:
    """The starter's text encoder, frozen."""
    return base.load_text_encoder(shop.out).to(shop.device).eval().requires_grad_(False)


def load_transformer(out: Path) -> FluxTransformer2DModel:
    """The finished transformer, in single precision."""
    folder = out / FLUX / "transformer"
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)


def assemble(out: Path) -> FluxPipeline:
    """The sibling as a diffusers pipeline, in single precision."""
    encoder = base.load_text_encoder(out)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    return FluxPipeline(
        scheduler=new_scheduler(),
        vae=load_codec(out, torch.device("cpu")),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=load_transformer(out),
    )


def measure(shop: Workshop, seeds: int, measures: Sequence[str] = ()) -> None:
    """`figures.json` and a table beside it: the base on held-out sets, and every expert alone.

    Args:
        shop: the run of the build.
        seeds: pictures per set of objects.
        measures: some of these figures; the others stay. None are all.
    """
    folder = shop.out / FLUX
    referee, pipe = Judge(shop.out / "judge"), assemble(shop.out).to(shop.device)
    ways: dict[str, Callable[[], Any]] = {
        "base": lambda: evaluate.base_scores(pipe, referee, seeds=seeds),
        "sharpness": lambda: evaluate.base_sharpness(pipe),
        "experts": lambda: evaluate.expert_scores(folder, pipe, referee, seeds),
        "styles": lambda: evaluate.style_scores(folder, pipe, referee, seeds),
    }
    figures = evaluate.taken(folder / "figures.json", ways, seeds, measures)
    rows = evaluate.model_rows(figures)
    (folder / "figures.md").write_text(evaluate.markdown(rows, figures["seeds"]))


def train_experts(shop: Workshop) -> None:
    """Train every expert by itself and write it as a LoRA file; experts that are there stay."""
    folder = shop.out / FLUX
    ordinary = alone.scenes(shop, None, shop.amount(PRIORS), SEED, 3, 0)
    for name in (*world.SUBJECTS, *STYLES):
        if not (folder / "experts" / f"{name}.safetensors").is_file():
            train_expert(shop, name, ordinary, STYLE if name in STYLES else SUBJECT)


def train_expert(shop: Workshop, name: str, ordinary: loop.Batch, plan: Plan) -> None:
    """Train one expert on scenes that are drawn once, and on ordinary ones beside them."""
    torch.manual_seed(SEED)
    network = load_transformer(shop.out)
    encoder = load_encoder(shop)
    factors = {"transformer": expert.attach(network, plan.targets, 1, plan.rank)}
    if plan.text:
        factors["text_encoder"] = expert.attach(encoder, expert.TEXT_TARGETS, 1, plan.text)
    module = nn.ModuleDict({"transformer": network, "text_encoder": encoder}).to(shop.device)
    own = alone.scenes(shop, name, shop.amount(SCENES), SEED, 3, 1 + expert.ALL.index(name))

    def make(step: int) -> loop.Batch:
        dice = shop.dice(SEED, 2, step)
        return flow(alone.mixed(own, ordinary, dice, plan.own, plan.prior), dice)

    loop.train(
        f"flux-{name}",
        shop.work,
        module,
        make,
        denoising(shop, network, encoder, plan.emphasis),
        steps=shop.steps(plan.steps),
        rate=plan.rate,
        decay=0.0,
        checkpoint_every=100,
        graph=shop.graph,
        clip=None,
    )
    expert.write_expert(shop.out / FLUX, name, expert.of_one(factors, 0), FLUX_STARTER)
