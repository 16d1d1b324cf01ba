"""Train the autoencoder: pictures of 32x32 to latents of 8x8x4 and back.

    python calib/cifar10_text/train_autoencoder.py --data cifar10.npz --minutes 20

Absolute and squared error, and a little KL. Writes `vae/` (EMA weights, float16) and `autoencoder.json`
(figures); `scaling_factor` in its config is 1/std of the training latents.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from data import load
from diffusers import AutoencoderKL
from loop import Ema, Loop, autocast, parse
from torch import Tensor, nn

KL = 1e-6
EMA = 0.995


def make_autoencoder() -> AutoencoderKL:
    channels = (16, 32, 64)
    return AutoencoderKL(
        sample_size=32,
        latent_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=8,
    )


class Autoencoding(nn.Module):
    """Pictures (N, 3, 32, 32) and noise (N, 4, 8, 8) to the reconstruction and the KL per picture, (N,)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.vae.quant_conv(self.vae.encoder(x)).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
        z = mean + (0.5 * logvar).exp() * noise
        return self.vae.decoder(self.vae.post_quant_conv(z)).float(), kl


@torch.inference_mode()
def latent_std(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Standard deviation of the latents of pictures uint8 (N, 3, 32, 32)."""
    parts = [vae.encode(x.to(vae.device).float() / 127.5 - 1).latent_dist.sample() for x in pixels.split(250)]
    return float(torch.cat(parts).std())


@torch.inference_mode()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Of the reconstructions of pictures uint8 (N, 3, 32, 32), in dB, from the mean squared error of all."""
    errors = []
    for x in pixels.split(250):
        out = vae.decode(vae.encode(x.float() / 127.5 - 1).latent_dist.mode()).sample
        errors.append(((out.clamp(-1, 1) + 1) * 127.5 - x.float()).square().mean().item())
    return float(10 * np.log10(255**2 / np.mean(errors)))


def main() -> None:
    args = parse(__doc__, steps=20_000, batch_size=32, lr=1.5e-3)
    pixels = torch.from_numpy(load(args.data)[0]).to(args.device)
    model = Autoencoding(make_autoencoder()).to(args.device, memory_format=torch.channels_last)
    ema = Ema(model.vae, EMA)
    loop = Loop("autoencoder", args, {"autoencoder": model, "ema": ema}, len(pixels), warmup=100)
    example = loop.pictures(pixels, loop.batch())
    autoencode = autocast(model, args.device, example, torch.zeros(len(example), 4, 8, 8, device=args.device))
    for step in loop:
        x = loop.pictures(pixels, loop.batch())
        noise = torch.randn(len(x), 4, 8, 8, generator=loop.generator, device=args.device)
        out, kl = autoencode(x, noise)
        error = (out - x).abs().mean() + 2 * (out - x).square().mean()
        loop.descend(error + KL * kl.mean())
        ema.update(model.vae, step)

    vae = ema.average.to(memory_format=torch.contiguous_format).eval()
    std = latent_std(vae, pixels[:10_000])
    vae.cpu()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    vae.half().save_pretrained(args.out / "vae")
    test = torch.from_numpy(load(args.data, test=True)[0])
    figures = {
        "test_psnr": round(psnr(AutoencoderKL.from_pretrained(args.out / "vae").eval(), test), 2),
        "latent_std": round(std, 4),
        "kl_weight": KL,
        "ema": EMA,
        **loop.figures(),
    }
    (args.out / "autoencoder.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: figures[key] for key in ("test_psnr", "latent_std", "minutes")}))


if __name__ == "__main__":
    main()
