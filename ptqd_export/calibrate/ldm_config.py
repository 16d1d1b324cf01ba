"""The configuration file of a latent diffusion model in CompVis' layout, as typed values.

Only what decides the network is read; a setting of the network that is not known is refused, because the
weights alone would not show it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import ModelError, RecipeError
from ..typed import brief, read_typed
from .ldm_networks import FirstStage, UNetParams
from .network import one_line

MAX_BYTES = 2**20
"""Most bytes of a configuration file: far above any model's."""
MAX_LEVELS = 16
"""Most resolutions of a network."""
UNCONDITIONAL = "__is_unconditional__"
MODELS = ("LatentDiffusion", "LatentInpaintDiffusion")
TEXT_ENCODERS = {
    "FrozenCLIPEmbedder": "max_length",
    "FrozenOpenCLIPEmbedder": "max_length",
    "BERTEmbedder": "max_seq_len",
}
"""{class of a text encoder: its parameter for the number of tokens, 77 by default}"""
FIRST_STAGES = ("AutoencoderKL", "VQModelInterface", "IdentityFirstStage")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
"""{beta_schedule: diffusers' name}; LDM's linear is linear in the square root."""


@dataclass(frozen=True)
class Condition:
    """What the network is conditioned on.

    Attributes:
        kind: name of the conditioning stage's class, or "" for none.
        tokens: length of an encoded prompt, for a text encoder.
        n_classes: for ClassEmbedder.
        embed_dim: for ClassEmbedder.
    """

    kind: str = ""
    tokens: int | None = None
    n_classes: int | None = None
    embed_dim: int | None = None


@dataclass(frozen=True)
class ModelParams:
    """Parameters of LatentDiffusion that decide what is computed."""

    timesteps: int = 1000
    beta_schedule: Literal["linear", "sqrt_linear", "cosine", "sqrt"] = "linear"
    linear_start: float = 1e-4
    linear_end: float = 2e-2
    parameterization: Literal["eps", "v", "x0"] = "eps"
    image_size: int | None = None
    channels: int | None = None
    scale_factor: float = 1.0
    scale_by_std: bool = False
    use_ema: bool = True
    conditioning_key: Literal["crossattn", "concat", "hybrid", "adm"] | None = None


@dataclass(frozen=True)
class LdmConfig:
    """A configuration.

    Attributes:
        where: the file, for messages.
    """

    where: str
    params: ModelParams
    unet: UNetParams
    first_stage: FirstStage | None
    condition: Condition

    @property
    def size(self) -> int:
        return self.params.image_size or self.unet.image_size

    @property
    def scheduler(self) -> dict[str, Any]:
        """The diffusers scheduler config of the schedule; of one that has no name there, without betas."""
        p = self.params
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": p.timesteps,
            "beta_schedule": BETA_SCHEDULES.get(p.beta_schedule, "linear"),
            "beta_start": p.linear_start,
            "beta_end": p.linear_end,
            "prediction_type": PREDICTIONS[p.parameterization],
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        }

    @classmethod
    def read(cls, file: Path) -> LdmConfig:
        """From a YAML file, of which nothing but plain data is taken.

        Raises:
            ModelError: it cannot be read, is no such configuration, or sets what is not supported.
        """
        try:
            if file.stat().st_size > MAX_BYTES:
                raise ModelError(f"{file} has {file.stat().st_size} bytes: expected at most {MAX_BYTES}")
            text = file.read_text("utf-8")
            # A few aliases of aliases are a billion values.
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
                raise ModelError(f"{file} holds YAML aliases: write the values out")
            data = yaml.safe_load(text)
        except OSError as error:
            raise ModelError(f"the configuration {file} cannot be read: {one_line(error)}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ModelError(f"{file} is not plain YAML: {one_line(error)}") from error
        return cls.from_plain(data, str(file))

    @classmethod
    def from_plain(cls, data: Any, where: str) -> LdmConfig:
        """From the file's values.

        Raises:
            ModelError: as `read`.
        """
        try:
            return cls._from_plain(data, where)
        except RecipeError as error:  # of read_typed, which names the place
            raise ModelError(str(error)) from error

    @classmethod
    def _from_plain(cls, data: Any, where: str) -> LdmConfig:
        name, params = _stage(data, "model", where)
        _known(name, MODELS, where, "model")
        unet_kind, unet = _stage(params, "unet_config", where)
        _known(unet_kind, ("UNetModel",), where, "unet_config")
        fields = {field.name for field in dataclasses.fields(ModelParams)}
        known = {key: value for key, value in params.items() if key in fields}
        config = cls(
            where,
            typing.cast(ModelParams, read_typed(ModelParams, known, f"{where}: model.params")),
            typing.cast(UNetParams, read_typed(UNetParams, unet, f"{where}: unet_config.params")),
            _first_stage(params, where),
            _condition(params, where),
        )
        _check(config)
        return config


def _stage(data: Any, key: str, where: str) -> tuple[str, dict[str, Any]]:
    """(class, parameters) of a {target, params}."""
    stage = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(stage, dict) or not isinstance(stage.get("target"), str):
        raise ModelError(
            f"{where} has no {key} with a target: expected the .yaml of a latent diffusion model, with "
            "model, unet_config and first_stage_config"
        )
    params = stage.get("params") or {}
    if not isinstance(params, dict):
        raise ModelError(f"{where}: {key}.params is {brief(params)}: expected a table")
    return stage["target"].rpartition(".")[2], params


def _known(name: str, expected: tuple[str, ...], where: str, key: str) -> None:
    if name not in expected:
        raise ModelError(
            f"{where} says {key} {brief(name)}, which is not supported (expected {' or '.join(expected)}): "
            "convert the model to a diffusers folder, or load it by file.py:function"
        )


def _first_stage(params: Mapping[str, Any], where: str) -> FirstStage | None:
    name, own = _stage(params, "first_stage_config", where)
    _known(name, FIRST_STAGES, where, "first_stage_config")
    if name == "IdentityFirstStage":
        return None
    keys = ("embed_dim", "ddconfig") if name == "AutoencoderKL" else ("embed_dim", "ddconfig", "n_embed")
    plain = {key: own[key] for key in keys if key in own}
    stage = read_typed(FirstStage, plain, f"{where}: first_stage_config.params")
    return typing.cast(FirstStage, stage)


def _condition(params: Mapping[str, Any], where: str) -> Condition:
    if params.get("cond_stage_config", UNCONDITIONAL) in (UNCONDITIONAL, "__is_first_stage__"):
        return Condition()
    name, own = _stage(params, "cond_stage_config", where)
    if name == "ClassEmbedder":
        plain = {"n_classes": own.get("n_classes", 1000), "embed_dim": own.get("embed_dim")}
    elif name in TEXT_ENCODERS:
        plain = {"tokens": own.get(TEXT_ENCODERS[name], 77)}
    else:
        return Condition(name)
    condition = read_typed(Condition, {"kind": name, **plain}, f"{where}: cond_stage_config")
    return typing.cast(Condition, condition)


def _check(config: LdmConfig) -> None:
    """Refuse what this import does not build.

    Raises:
        ModelError: names the setting.
    """
    where, c, u = config.where, config.condition, config.unet

    def need(ok: bool, said: str, expected: str) -> None:
        if not ok:
            raise ModelError(f"{where} says {said}: expected {expected}, which alone is supported")

    crosses, levels = u.use_spatial_transformer, len(u.channel_mult)
    need(u.dims == 2, f"dims {u.dims}", "2")
    need(u.conv_resample, "conv_resample false", "true")
    need(u.n_embed is None, f"n_embed {u.n_embed} of the UNet", "none")
    need(u.num_heads_upsample in (-1, u.num_heads), f"num_heads_upsample {u.num_heads_upsample}", "-1")
    need(
        crosses == (u.context_dim is not None),
        f"context_dim {u.context_dim}",
        "one with spatial transformers",
    )
    need(not (crosses and u.resblock_updown), "resblock_updown with spatial transformers", "one of them")
    need(1 <= levels <= MAX_LEVELS, f"channel_mult of {levels} levels", f"1 to {MAX_LEVELS}")
    sizes = [size for size, attends in zip(u.channels, u.attends, strict=True) if attends] + [u.channels[-1]]
    of_head = u.num_head_channels
    fits = all(
        (of_head == -1 or (of_head > 0 and size % of_head == 0)) and u.heads(size) > 0 for size in sizes
    )
    need(
        fits and all(u.heads(size) > 0 and size % u.heads(size) == 0 for size in sizes),
        f"num_heads {u.num_heads} and num_head_channels {of_head} for channels {sizes}",
        "a number that divides them",
    )
    channels = config.params.channels
    need(
        channels in (None, u.out_channels),
        f"channels {channels}",
        f"the UNet's out_channels, {u.out_channels}",
    )
    need(
        c.kind != "ClassEmbedder" or c.embed_dim == u.context_dim,
        f"embed_dim {c.embed_dim} of the class embedder",
        f"context_dim, {u.context_dim}",
    )
    first = config.first_stage
    if first is None:
        return
    d, levels = first.ddconfig, len(first.ddconfig.ch_mult)
    need(1 <= levels <= MAX_LEVELS, f"ch_mult of {levels} levels", f"1 to {MAX_LEVELS}")
    need(d.double_z == (first.n_embed is None), f"double_z {d.double_z}", "true for KL, false for VQ")
    usual = d.resamp_with_conv and not d.tanh_out and not d.use_linear_attn
    need(usual, "resamp_with_conv false, tanh_out or use_linear_attn", "none of them")
    need(first.embed_dim == u.out_channels, f"embed_dim {first.embed_dim}", f"the UNet's {u.out_channels}")
    fits = first.n_embed is not None or d.z_channels == first.embed_dim
    need(fits, f"z_channels {d.z_channels}", f"embed_dim, {first.embed_dim}")
