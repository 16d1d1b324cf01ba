"""A latent diffusion model in CompVis' layout: one checkpoint with all its weights, and a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.model import ModelInfo
from ..core.schedule import NoiseSchedule
from ..errors import ModelError
from ..recipe import Recipe
from ..typed import brief
from .conditions import Around, adapted, declare
from .construct import construct, fill
from .folder import sample_shape, scheduler_config
from .ldm_config import BETA_SCHEDULES, TEXT_ENCODERS, LdmConfig
from .ldm_known import recognise
from .ldm_names import EMA, FIRST_STAGE, UNET, ema_name, first_stage_name, unet_name
from .ldm_networks import UNetParams
from .network import Network, bare, check_finite, weights_sha256
from .source import Source
from .weights import read_checkpoint

CLASS_TABLE = "cond_stage_model.embedding.weight"
TEXT_MODEL = "cond_stage_model.transformer."
SCALE, BETAS, ALPHAS = "scale_factor", "betas", "alphas_cumprod"
IMAGENET_WITH_NULL = 1001
"""Classes of a ClassEmbedder of which the last stands for no class, as in cin256-v2."""
Part = Callable[[Tensor, int], Tensor]


def from_checkpoint(recipe: Recipe, weights: bool = True) -> Source:
    """The model of `model.checkpoint`, by `model.ldm_config` or, without, if it is Stable Diffusion 1.

    Args:
        weights: see `open_source`.
    Raises:
        ModelError: the configuration or the checkpoint cannot be read, or they do not fit.
    """
    spec = recipe.model
    file = recipe.checkpoint
    config = LdmConfig.read(recipe.path(spec.ldm_config)) if spec.ldm_config else None
    held = read_checkpoint(file)
    config = recognise(held, file) if config is None else config
    scheduler = _scheduler(recipe, config, held, file)
    unet_config = config.unet.to_diffusers(config.size)
    shape = sample_shape(spec, unet_config, config.where)
    module = _unet(config, unet_config, held, file, weights)
    by_class = config.condition.kind == "ClassEmbedder"
    declared, table = unet_config, None
    if by_class:
        table = _table(config, held, file)
        # Only the labels are seen from outside.
        declared = unet_config | {"_class_name": "UNet2DModel", "num_class_embeds": table.num_embeddings}
        if spec.null_class is None and table.num_embeddings == IMAGENET_WITH_NULL:
            spec = dataclasses.replace(spec, null_class=IMAGENET_WITH_NULL - 1)
    first = config.first_stage
    factor = 1 if first is None else 2 ** (len(first.ddconfig.ch_mult) - 1)
    around = Around(tokens=config.condition.tokens, scale=factor)
    inputs = declare(spec, declared, shape, config.where, around)
    if not config.unet.use_spatial_transformer and config.unet.num_head_channels == -1:
        unet_config["attention_heads"] = config.unet.num_heads
    module = bare(adapted(module, table if weights or table is None else table.to("meta")))
    info = ModelInfo(recipe.model_name, shape, inputs, weights_sha256(unet_config, module))
    scale = _scale(config, held, file)
    return Source(
        Network(module, info, scheduler),
        None if first is None else lambda: _first_stage(config, scale, file, weights),
        scale,
        read_text_state=_text_state(config, file),
    )


def _unet(
    config: LdmConfig, plain: dict[str, Any], held: dict[str, Tensor], file: Path, weights: bool
) -> nn.Module:
    """The UNet with its weights: the averaged ones where the configuration says so."""
    unet, averaged = config.unet, config.params.use_ema
    if averaged and not any(key.startswith(EMA) for key in held):
        raise ModelError(
            f"{config.where} says use_ema (its default), but {file} holds no {EMA}* weights: if its weights "
            "are averaged already, say use_ema: False"
        )
    module = construct(plain, config.where)
    blocks, attends_up = unet.num_res_blocks, unet.attends[::-1]

    def name(key: str) -> tuple[str, int | None]:
        own, part = unet_name(key, blocks, attends_up)
        return (ema_name(own) if averaged else UNET + own), part

    prefix = ema_name("") if averaged else UNET
    keys = {key for key in held if key.startswith(prefix)}
    split = _splitter(unet)
    if not weights:
        held = {key: held[key].to("meta") for key in keys}
    state = _renamed(module.state_dict(), held, keys, name, split, f"the UNet of {config.where}", file)
    module = fill(module, plain, state, str(file), weights)
    if not unet.use_spatial_transformer:
        for part in module.modules():
            if type(part).__name__ == "Attention":
                _set_heads(part, unet)
    return module


def _set_heads(attention: Any, unet: UNetParams) -> None:
    """UNet2DModel has one head size for all levels; LDM may have one number of heads."""
    channels = attention.to_q.out_features
    attention.heads = attention.sliceable_head_dim = unet.heads(channels)
    attention.scale = (channels // attention.heads) ** -0.5


def _splitter(unet: UNetParams) -> Part:
    """Takes q, k or v out of the weight (3 C, C, 1) or bias (3 C,) of a `qkv`.

    Its rows are (head, qkv, channel), or (qkv, head, channel) in the new order.
    """

    def part(value: Tensor, index: int) -> Tensor:
        channels, rest = value.shape[0] // 3, value.shape[1:]
        if unet.use_new_attention_order:
            return value.reshape(3, channels, *rest)[index]
        heads = unet.heads(channels)
        return value.reshape(heads, 3, channels // heads, *rest)[:, index].reshape(channels, *rest)

    return part


def _renamed(
    expected: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    keys: set[str],
    name: Callable[[str], tuple[str, int | None]],
    split: Part | None,
    what: str,
    file: Path,
) -> dict[str, Tensor]:
    """The tensors `keys` of a checkpoint by diffusers' names, in diffusers' shapes.

    Args:
        name: (name in the checkpoint, part of a `qkv`) of a diffusers name.
    Raises:
        ModelError: tensors are missing, left over or of another shape; named as in the file.
    """
    wanted = {key: name(key) for key in expected}
    names = {own for own, _ in wanted.values()}
    for verb, different in (("lacks", names - keys), ("holds", keys - names)):
        if different:
            raise ModelError(
                f"{file} {verb} {len(different)} tensors{' that are' if verb == 'holds' else ''} of "
                f"{'no part of ' if verb == 'holds' else ''}{what}, such as {brief(min(different))}: "
                "configuration and checkpoint are of different models"
            )
    state: dict[str, Tensor] = {}
    for key, (own, part) in wanted.items():
        value, shape = held[own], expected[key].shape
        whole = shape if part is None else torch.Size((3 * shape[0], *shape[1:]))
        # 1x1 convs in LDM are linear layers here.
        ones = value.shape[len(whole) :]
        if value.shape[: len(whole)] != whole or any(size != 1 for size in ones):
            raise ModelError(
                f"tensor {brief(own)} of {file} has shape {tuple(value.shape)}: {what} expects {tuple(whole)}"
            )
        value = value.reshape(whole)
        state[key] = value if part is None or split is None else split(value, part)
    return state


def _table(config: LdmConfig, held: Mapping[str, Tensor], file: Path) -> nn.Embedding:
    """The class embedder's table (n_classes, embed_dim)."""
    value = held.get(CLASS_TABLE)
    expected = (config.condition.n_classes, config.condition.embed_dim)
    if value is None or tuple(value.shape) != expected:
        got = "no" if value is None else f"{tuple(value.shape)} as"
        raise ModelError(f"{file} holds {got} {CLASS_TABLE}: {config.where} expects {expected}")
    check_finite(CLASS_TABLE, value, str(file))
    weight = value.to(torch.float32, copy=True)
    return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight).requires_grad_(False)


def _scale(config: LdmConfig, held: Mapping[str, Tensor], file: Path) -> float:
    """The factor of the latents: the configuration's, or with scale_by_std what training measured."""
    if not config.params.scale_by_std:
        return config.params.scale_factor
    value = held.get(SCALE)
    if value is None or value.numel() != 1 or not 0 < float(value) < float("inf"):
        raise ModelError(
            f"{config.where} says scale_by_std, but {file} holds no positive {SCALE}: give the factor as "
            "scale_factor"
        )
    return float(value)


def _scheduler(recipe: Recipe, config: LdmConfig, held: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The scheduler config, checked against the buffers that the checkpoint was trained with."""
    plain = config.scheduler
    kind = config.params.beta_schedule
    if recipe.model.scheduler:
        plain = scheduler_config(recipe, file.parent)
    elif kind not in BETA_SCHEDULES:
        betas = held.get(BETAS)
        if betas is None or betas.shape != (config.params.timesteps,):
            raise ModelError(
                f"{config.where} says beta_schedule {kind}, and {file} holds no {BETAS} for it: set "
                "model.scheduler to a scheduler config"
            )
        plain["trained_betas"] = betas.double().tolist()
    own = held.get(ALPHAS)
    if own is None:
        return plain
    n = int(plain.get("num_train_timesteps", 1000))
    every = NoiseSchedule.from_config({**plain, "steps_offset": 0, "timestep_spacing": "leading"}, n, 0.0)
    expected, found = every.alphas_cumprod[::-1], own.double().numpy()
    near = max(1e-5, 4 * torch.finfo(own.dtype).eps) if own.is_floating_point() else 1e-5
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=near, atol=1e-6):
        ends = f"{found.flat[0]:.5g} to {found.flat[-1]:.5g} in {found.size} steps" if found.size else "none"
        raise ModelError(
            f"{file} was trained with {ALPHAS} {ends}, but {config.where} gives {expected[0]:.5g} to "
            f"{expected[-1]:.5g} in {n}: the configuration is another model's"
        )
    return plain


def _first_stage(config: LdmConfig, scale: float, file: Path, weights: bool) -> nn.Module:
    """The autoencoder, from the same file."""
    first = config.first_stage
    assert first is not None  # from_checkpoint asks
    plain, held = first.to_diffusers(scale), read_checkpoint(file)
    module = construct(plain, config.where)
    levels = len(first.ddconfig.ch_mult)
    unused = FIRST_STAGE + "loss."
    keys = {key for key in held if key.startswith(FIRST_STAGE) and not key.startswith(unused)}

    def name(key: str) -> tuple[str, int | None]:
        return FIRST_STAGE + first_stage_name(key, levels), None

    what = f"the first stage of {config.where}"
    state = _renamed(module.state_dict(), held, keys, name, None, what, file)
    return fill(module, plain, state, str(file), weights)


def _text_state(config: LdmConfig, file: Path) -> Callable[[], dict[str, Tensor]] | None:
    """Reads CLIP's text model, whose names in the file are transformers' own behind a prefix."""
    if config.condition.kind != next(iter(TEXT_ENCODERS)):
        return None

    def read() -> dict[str, Tensor]:
        held = read_checkpoint(file)
        return {
            key.removeprefix(TEXT_MODEL): value
            for key, value in held.items()
            if key.startswith(TEXT_MODEL) and not key.endswith("position_ids")
        }

    return read
