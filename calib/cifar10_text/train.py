"""Train the UNet and the text encoder, together, on the latents of the trained autoencoder.

    python calib/cifar10_text/train.py --data cifar10.npz --minutes 100

Epsilon prediction on Stable Diffusion's schedule, min-SNR weights; a share of the captions is the empty
prompt, for classifier-free guidance. Writes `unet/`, `text_encoder/` (EMA weights, float16), `tokenizer/`,
`scheduler/` and `model_index.json`, which with `vae/` are a StableDiffusionPipeline, and `training.json`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from captions import MAX_LENGTH, WORDINGS, caption, write_prompts, write_tokenizer
from data import CLASSES, load
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loop import Ema, Loop, autocast, parse
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 128
P_EMPTY = 0.12
GAMMA = 5.0
EMA = 0.999
WORDINGS_PER_STEP = 2


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads it as the number of heads
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Denoiser(nn.Module):
    """Latents (N, 4, 8, 8), timesteps int64 (N,), states (N, 16, WIDTH) to the prediction, (N, 4, 8, 8)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        prediction: Tensor = self.unet(x, t, states, return_dict=False)[0]
        return prediction


@torch.inference_mode()
def latents(vae: AutoencoderKL, pixels: Tensor, cache: Path) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, float16 (2, N, 4, 8, 8), of the scaled latents of pictures uint8
    (N, 3, 32, 32) and of their mirror images; computed once for each autoencoder."""
    weights = b"".join(p.cpu().numpy().tobytes() for p in vae.parameters())
    file = cache / f"latents-{hashlib.sha256(weights).hexdigest()[:12]}.safetensors"
    if not file.exists():
        found: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for images in (pixels, pixels.flip(3)):
            for x in images.split(250):
                with torch.autocast(vae.device.type, torch.bfloat16):
                    posterior = vae.encode(x.to(vae.device).float() / 127.5 - 1).latent_dist
                for key, parts in found.items():
                    scaled = getattr(posterior, key).float() * vae.config.scaling_factor
                    parts.append(scaled.half().cpu().contiguous())
        shape = (2, len(pixels), 4, 8, 8)
        save_file({key: torch.cat(parts).reshape(shape) for key, parts in found.items()}, file)
    arrays = load_file(file)
    return arrays["mean"], arrays["std"]


def caption_ids(tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids int64 (classes * wordings + 1, 16) of every caption, class by class; the last is the empty
    prompt's."""
    texts = [caption(c, w) for c in range(len(CLASSES)) for w in range(len(WORDINGS))]
    padding = {"padding": "max_length", "max_length": MAX_LENGTH}
    return tokenizer([*texts, ""], **padding, return_tensors="pt").input_ids


def main() -> None:
    args = parse(__doc__, steps=60_000, batch_size=128, lr=1e-3)
    images, labels = load(args.data)
    device = torch.device(args.device)
    vae = AutoencoderKL.from_pretrained(args.out / "vae").eval().to(device)
    mean, std = (x.to(device) for x in latents(vae, torch.from_numpy(images), args.work))
    truth = torch.from_numpy(labels).to(device)
    write_tokenizer(args.out / "tokenizer")
    write_prompts(args.out / "prompts.txt")
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    ids = caption_ids(tokenizer).to(device)
    abar = make_scheduler().alphas_cumprod.to(device)
    snr = abar / (1 - abar)
    weight = snr.clamp(max=GAMMA) / snr

    text = make_text_encoder(tokenizer).to(device)
    unet = make_unet().to(device, memory_format=torch.channels_last)
    classes = torch.arange(len(CLASSES), device=device)[:, None]
    emas = {"unet": Ema(unet, EMA), "text": Ema(text, EMA)}
    parts = {"unet": unet, "text_encoder": text, "unet_ema": emas["unet"], "text_ema": emas["text"]}
    loop = Loop("diffusion", args, parts, len(truth))
    n = args.batch_size
    example = torch.zeros(n, 4, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    timesteps = torch.zeros(n, dtype=torch.int64, device=device)
    states = torch.zeros(n, MAX_LENGTH, WIDTH, device=device, requires_grad=True)
    predict = autocast(Denoiser(unet), args.device, example, timesteps, states)
    for step in loop:
        index = loop.batch()
        batch = len(index)
        g: Any = {"generator": loop.generator, "device": device}
        side = torch.randint(2, (batch,), **g)
        z = mean[side, index].float()
        z = z + std[side, index].float() * torch.randn(z.shape, **g)
        # Few wordings a step, so that the text encoder sees few rows: each of them once.
        wordings = torch.randint(len(WORDINGS), (len(CLASSES), WORDINGS_PER_STEP), **g)
        rows = torch.cat(
            [(wordings + classes * len(WORDINGS)).flatten(), torch.tensor([len(ids) - 1], device=device)]
        )
        row = truth[index] * WORDINGS_PER_STEP + torch.randint(WORDINGS_PER_STEP, (batch,), **g)
        row[torch.rand(batch, **g) < P_EMPTY] = len(rows) - 1
        # Stratified timesteps: one per stratum of [0, 1000), less gradient variance than independent draws.
        t = (torch.arange(batch, device=device) + torch.rand(batch, **g)) / batch * len(abar)
        t = t.long().clamp(max=len(abar) - 1)  # the last stratum's end rounds up
        noise = torch.randn(z.shape, **g)
        a = abar[t].view(-1, 1, 1, 1)
        x = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            states = text(ids[rows]).last_hidden_state.float()[row]
        error = (predict(x, t, states).float() - noise).square().mean((1, 2, 3))
        loop.descend((weight[t] * error).mean())
        emas["unet"].update(unet, step)
        emas["text"].update(text, step)

    scheduler = make_scheduler()
    text, unet = emas["text"].average.cpu().half(), emas["unet"].average.cpu().half()
    unet.to(memory_format=torch.contiguous_format).save_pretrained(args.out / "unet")
    text.save_pretrained(args.out / "text_encoder")
    scheduler.save_pretrained(args.out / "scheduler")
    pipeline = StableDiffusionPipeline(
        vae.cpu(), text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_config(args.out)
    figures = {
        **loop.figures(),
        "ema": EMA,
        "empty_prompts": P_EMPTY,
        "min_snr_gamma": GAMMA,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
