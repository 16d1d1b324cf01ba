"""Names of weights: what a tensor of a diffusers model is called in a CompVis checkpoint.

The names go from diffusers to CompVis, so that a missing tensor can be named as the file would name it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
EMA = "model_ema."
UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."


def ema_name(name: str) -> str:
    """The averaged weight of the UNet's `name` (LitEma: names lose their dots)."""
    return EMA + ("diffusion_model." + name).replace(".", "")


def unet_name(key: str, blocks: int, attends_up: Sequence[bool]) -> tuple[str, int | None]:
    """(name in the checkpoint, part) of a UNet's weight; part 0, 1, 2 is q, k, v of a common `qkv`.

    Args:
        key: the name in UNet2DModel or UNet2DConditionModel.
        blocks: num_res_blocks.
        attends_up: whether each level of the upward path has attention, lowest first.
    """
    for new, old in OUTER.items():
        if key.startswith(new + "."):
            return old + key.removeprefix(new), None
    place = re.fullmatch(r"(mid_block|(?:down|up)_blocks\.(\d+))\.(\w+)\.(\d+)\.(.+)", key)
    if place is None:
        return key, None
    where, level, kind, index = place[1], int(place[2] or 0), place[3], int(place[4])
    inner, part = _inner(kind, place[5])
    per = blocks + 1
    if where == "mid_block":
        return f"{MIDDLE.get(f'{kind}.{index}', where)}.{inner}", part
    if where.startswith("down"):
        row = 1 + level * per + (blocks if kind == "downsamplers" else index)
        return f"input_blocks.{row}.{1 if kind == 'attentions' else 0}.{inner}", part
    row = level * per + (blocks if kind == "upsamplers" else index)
    column = {"resnets": 0, "attentions": 1}.get(kind, 1 + attends_up[level])
    return f"output_blocks.{row}.{column}.{inner}", part


def _inner(kind: str, rest: str) -> tuple[str, int | None]:
    """The name within a block."""
    name, _, last = rest.rpartition(".")
    if kind == "attentions":
        if name in ("to_q", "to_k", "to_v"):
            return f"qkv.{last}", "qkv".index(name[-1])
        return f"{ATTENTION.get(name, name)}.{last}", None
    if name == "conv":
        return (f"op.{last}" if kind == "downsamplers" else rest), None
    return f"{RESNET.get(name, name)}.{last}", None


def first_stage_name(key: str, levels: int) -> str:
    """The name in the checkpoint of a weight of AutoencoderKL or VQModel with so many levels."""
    place = re.fullmatch(r"(encoder|decoder)\.(.+)", key)
    if place is None:
        return key  # quant_conv, post_quant_conv, quantize
    side, rest = place[1], place[2]
    block = re.fullmatch(r"(?:mid_block|(?:down|up)_blocks\.(\d+))\.(\w+)\.(\d+)\.(.+)", rest)
    if block is None:
        return f"{side}.{rest.replace('conv_norm_out', 'norm_out')}"
    level, kind, index, inner = block[1], block[2], int(block[3]), block[4]
    name, _, last = inner.rpartition(".")
    name = (ATTENTION if kind == "attentions" else {"conv_shortcut": "nin_shortcut"}).get(name, name)
    if level is None:
        return f"{side}.mid.{'attn' if kind == 'attentions' else 'block'}_{index + 1}.{name}.{last}"
    # The levels of the decoder are counted from the pictures.
    at = f"down.{level}" if side == "encoder" else f"up.{levels - 1 - int(level)}"
    within = {
        "resnets": f"block.{index}",
        "attentions": f"attn.{index}",
        "downsamplers": "downsample",
        "upsamplers": "upsample",
    }
    return f"{side}.{at}.{within[kind]}.{name}.{last}"
