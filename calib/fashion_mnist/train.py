"""Train the reference model: a class-conditional 32x32 diffusers UNet2DModel on Fashion-MNIST, epsilon
prediction.

    python calib/fashion_mnist/train.py --minutes 100        # resumes from work/checkpoint.pt if it is there

Uses a GPU if there is one, else the CPU in bf16. Writes the EMA weights in the diffusers layout (`unet/`,
`scheduler/`) beside this script, and the training figures to `training.json`. Class 10 is the null class of
classifier-free guidance.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import torch
from data import CLASSES, DEBIAN_PATH, load
from diffusers import DDIMScheduler, UNet2DModel
from tqdm import tqdm

HERE = Path(__file__).parent
NULL_CLASS = len(CLASSES)
P_NULL = 0.1


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
        num_class_embeds=len(CLASSES) + 1,
    )


def make_scheduler() -> DDIMScheduler:
    # clip_sample off: with it on, x0 is clamped inside every step and hides samples that run away.
    return DDIMScheduler(
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=1,
    )


def save_atomic(state: dict, path: Path) -> None:
    tmp = path.with_suffix(".tmp")
    torch.save(state, tmp)
    os.replace(tmp, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEBIAN_PATH, help="folder of the IDX files")
    parser.add_argument("--steps", type=int, default=60_000, help="optimizer steps at most")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="training time at most, all resumed runs together"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    work = HERE / "work"
    work.mkdir(exist_ok=True)
    checkpoint = work / "checkpoint.pt"

    images, labels = load(args.data)
    x_all = (torch.from_numpy(images).float() / 127.5 - 1)[:, None].to(device)
    y_all = torch.from_numpy(labels).to(device)
    abar = make_scheduler().alphas_cumprod.to(device)
    model = make_unet().to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    step, seconds, losses = 0, 0.0, []
    if checkpoint.exists() and not args.fresh:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, losses = state["step"], state["seconds"], state["losses"]

    def save() -> None:
        save_atomic(
            {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "losses": losses,
            },
            checkpoint,
        )

    n, batch = len(x_all), args.batch_size
    generator = torch.Generator(device).manual_seed(args.seed + step)
    permutation = torch.empty(0, dtype=torch.long)
    progress = max(step / args.steps, seconds / (60 * args.minutes))
    last_save, window = time.monotonic(), []
    bar = tqdm(
        total=1.0,
        initial=progress,
        bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}",
        disable=None,
    )
    while progress < 1:
        began = time.monotonic()
        if len(permutation) < batch:
            permutation = torch.randperm(n, generator=generator, device=device)
        index, permutation = permutation[:batch], permutation[batch:]
        x0, y = x_all[index], y_all[index].clone()
        y[torch.rand(batch, generator=generator, device=device) < P_NULL] = NULL_CLASS
        # Stratified timesteps: one per stratum of [0, 1000), less gradient variance than independent draws.
        u = (
            torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
        ) / batch
        t = (u * len(abar)).long()
        noise = torch.randn(x0.shape, generator=generator, device=device)
        a = abar[t].view(-1, 1, 1, 1)
        x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        # 200 steps of warm-up, then a cosine to zero over steps or minutes, whichever ends first.
        lr = args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(x, t, class_labels=y).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for p_ema, p in zip(ema.parameters(), model.parameters(), strict=True):
                p_ema.lerp_(p, 1 - decay)
        step += 1
        window.append(loss.item())
        seconds += time.monotonic() - began
        if len(window) == 100:
            losses.append(sum(window) / len(window))
            window.clear()
            print(
                f"step {step}  loss {losses[-1]:.4f}  lr {lr:.2e}  {seconds / 60:.1f} min", flush=True
            ) if bar.disable else None
        new = min(1.0, max(step / args.steps, seconds / (60 * args.minutes)))
        bar.set_description(f"step {step}", refresh=False)
        bar.set_postfix(
            loss=f"{(losses or [loss.item()])[-1]:.4f}", epoch=f"{step * batch / n:.2f}", refresh=False
        )
        bar.update(new - progress)
        progress = new
        if time.monotonic() - last_save > 120:
            save()
            last_save = time.monotonic()
    bar.close()
    save()
    ema.to(memory_format=torch.contiguous_format).save_pretrained(HERE / "unet", safe_serialization=True)
    make_scheduler().save_pretrained(HERE / "scheduler")
    figures = {
        "steps": step,
        "batch_size": batch,
        "samples_seen": step * batch,
        "epochs": round(step * batch / n, 2),
        "minutes": round(seconds / 60, 1),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in ema.parameters()),
        "loss_per_100_steps": [round(v, 5) for v in losses],
        "lr": args.lr,
        "ema": args.ema,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    (HERE / "training.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
