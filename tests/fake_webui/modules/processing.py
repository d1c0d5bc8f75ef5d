"""One generation, in the hosts' order of calls."""

import re
from types import SimpleNamespace
from typing import ClassVar

import torch

from . import prompt_parser, script_callbacks, sd_models, shared


class InterruptedException(Exception):
    pass


class StableDiffusionProcessing:
    # Shared by all generations, as in the hosts.
    cached_uc: ClassVar = [None, None]
    cached_c: ClassVar = [None, None]

    def __init__(self, prompt="a dog and a cat", n_iter=1, scripts=None, script_args=None, **settings):
        # One prompt, or one for each picture.
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.prompt, self.n_iter, self.scripts, self.script_args = (
            prompts[0],
            n_iter,
            scripts,
            script_args or {},
        )
        self.negative_prompt = settings.pop("negative_prompt", "")
        self.batch_size = settings.pop("batch_size", 1)
        count = n_iter * self.batch_size
        self.all_prompts = prompts * count if len(prompts) == 1 else prompts
        self.begin_batch(0)
        self.size = settings.pop("size", (8, 8))
        self.refiner = settings.pop("refiner", None)
        self.token_merging_ratio = settings.pop("token_merging_ratio", 0.0)
        self.steps = 3
        self.comments = []
        self.extra_generation_params = {}
        self.cached_uc = StableDiffusionProcessing.cached_uc
        self.cached_c = StableDiffusionProcessing.cached_c
        if settings:
            raise TypeError(f"unknown settings {settings}")

    @property
    def sd_model(self):
        return shared.sd_model

    def comment(self, text):
        self.comments.append(text)

    def get_token_merging_ratio(self, for_hr=False):
        return self.token_merging_ratio

    def begin_batch(self, number):
        """The prompts of a batch, without what is not to be encoded."""
        own = self.all_prompts[number * self.batch_size : (number + 1) * self.batch_size]
        self.prompts = [re.sub(r"<lora:[^>]*>", "", prompt).strip() for prompt in own]
        self.negative_prompts = [self.negative_prompt] * len(self.prompts)

    def _encode(self, encode, texts, cache):
        key = (tuple(texts), self.steps, id(shared.sd_model))
        if cache[0] != key:
            cache[1] = encode(shared.sd_model, texts, self.steps)
            cache[0] = key
        return cache[1]

    def _conds(self, cached_uc, cached_c):
        negative = prompt_parser.SdConditioning(self.negative_prompts, is_negative_prompt=True)
        prompts = prompt_parser.SdConditioning(self.prompts)
        self.uc = self._encode(prompt_parser.encode, negative, cached_uc)
        self.c = self._encode(prompt_parser.encode_parts, prompts, cached_c)

    def setup_conds(self):
        self._conds(self.cached_uc, self.cached_c)

    def sample(self, noise):
        return sample_pass(self, noise, self.size)


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_uc: ClassVar = [None, None]
    cached_hr_c: ClassVar = [None, None]

    def __init__(self, *args, hr_size=None, hr_checkpoint=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.hr_size, self.hr_checkpoint = hr_size, hr_checkpoint
        self.enable_hr = hr_size is not None
        self.cached_hr_uc = StableDiffusionProcessingTxt2Img.cached_hr_uc
        self.cached_hr_c = StableDiffusionProcessingTxt2Img.cached_hr_c

    def sample(self, noise):
        latent = super().sample(noise)
        if self.hr_size is None:
            return latent
        if self.hr_checkpoint:
            sd_models.load_model(self.hr_checkpoint)
        self.scripts.run("before_hr", self)
        self._conds(self.cached_hr_uc, self.cached_hr_c)
        larger = torch.nn.functional.interpolate(latent, self.hr_size)
        return sample_pass(self, larger, self.hr_size)


class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    def sample(self, noise):
        return sample_pass(self, 0.5 * noise + 0.1, self.size)


def sample_pass(p, x, size):
    """A few steps of a sampler."""
    p.scripts.run("process_before_every_sampling", p, x=x)
    try:
        for step in range(p.steps):
            if (
                p.refiner is not None
                and step == p.refiner[1]
                and shared.sd_model is not sd_models.checkpoints[p.refiner[0]]
            ):
                sd_models.load_model(p.refiner[0])
                p.setup_conds()
            script_callbacks.call("cfg_denoiser", SimpleNamespace(x=x, sampling_step=step))
            if shared.state.interrupted:
                raise InterruptedException
            x = x - 0.2 * _guided(p, x, 960.0 - 300 * step, step)
    except InterruptedException:
        pass
    return x


def _guided(p, x, time, step):
    """What the UNet makes of all texts, in the order of the host; 5 times as far as from the negative one."""
    parts = [[prompt_parser.at_step(one, step) for one in own] for own in p.c]
    uncond = torch.stack([prompt_parser.at_step(one, step) for one in p.uc])
    numbers = [number for number, own in enumerate(parts) for _ in own]
    cond = [row for own in parts for row in own]
    length = max(len(row) for row in cond)
    cond = torch.stack([torch.cat([row, row[-1:].expand(length - len(row), -1)]) for row in cond])
    if p.batch_size == 1 and cond.shape[1] != uncond.shape[1]:
        # One length after the other, two rows at a time.
        found = [_unet(x[numbers[i : i + 2]], time, cond[i : i + 2]) for i in range(0, len(cond), 2)]
        cond_out, uncond_out = torch.cat(found), _unet(x, time, uncond)
    elif shared.sd_model.conditional_first:
        out = _unet(torch.cat([x[numbers], x]), time, torch.cat([cond, uncond]))
        cond_out, uncond_out = out[: len(cond)], out[len(cond) :]
    else:
        out = _unet(torch.cat([x, x[numbers]]), time, torch.cat([uncond, cond]))
        uncond_out, cond_out = out[: len(x)], out[len(x) :]
    guided = uncond_out.clone()
    for number, row in zip(numbers, cond_out, strict=True):
        guided[number] += 5.0 * (row - uncond_out[number])
    return guided


def _unet(x, time, context):
    return shared.sd_model.unet(x, torch.full((len(x),), time), context=context)


class _Lora:
    """The host's own LoRAs: weights changed while a picture is drawn."""

    def __init__(self, p):
        self._saved = []
        for scale in re.findall(r"<lora:[^:>]*:([^>]*)>", p.prompt):
            weight = shared.sd_model.unet.middle_block[1].transformer_blocks[0].attn1.to_q.weight
            self._saved.append((weight, weight.data.clone()))
            with torch.inference_mode():
                weight.data.add_(0.1 * float(scale))

    def undo(self):
        for weight, value in reversed(self._saved):
            with torch.inference_mode():
                weight.data.copy_(value)


def process_images(p):
    """Everything between the Generate button and the gallery."""
    for method in ("setup", "before_process", "process"):
        p.scripts.run(method, p)
    images, infotexts = [], []
    lora = None
    with torch.inference_mode():
        for number in range(p.n_iter):
            if shared.state.interrupted:
                break
            # A refiner may have taken over.
            sd_models.load_model(next(iter(sd_models.checkpoints)))
            shared.sd_model.new_batch()
            p.begin_batch(number)
            p.scripts.run("before_process_batch", p, batch_number=number)
            lora = lora or _Lora(p)
            p.scripts.run("process_batch", p, batch_number=number)
            p.setup_conds()
            noise = torch.randn(len(p.prompts), 4, *p.size, generator=torch.Generator().manual_seed(number))
            try:
                latent = p.sample(noise)
            except BaseException:
                lora.undo()
                raise
            p.scripts.run("post_sample", p, SimpleNamespace(samples=latent))
            p.scripts.run("postprocess_batch", p, latent, batch_number=number)
            p.scripts.run("postprocess_image", p, SimpleNamespace(image=latent))
            images.append(latent.clone())
            infotexts.append(dict(p.extra_generation_params))
    if lora is not None:
        lora.undo()
    processed = SimpleNamespace(images=images, infotexts=infotexts)
    p.scripts.run("postprocess", p, processed)
    return processed
