"""The conditioning inputs of a UNet: what its config declares, and how they reach its forward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model import LABELS, TEXT, InputSpec
from ..errors import ModelError
from ..recipe import ModelSpec
from ..typed import brief

EXTRA, POOLED, SIZES, GUIDANCE = "extra_channels", "text_embeds", "time_ids", "timestep_cond"
IMAGE, HINT = "image_embeds", "hint"
ADDED = (POOLED, SIZES, IMAGE, HINT)
HINT_CHANNELS, HINT_SCALE = 4, 8
"""Channels that Kandinsky's hint, a picture in pixels, becomes beside the latents; and pixels per latent."""
CONDITION_UNET = "UNet2DConditionModel"
ENCODERS = ("text_proj", "text_image_proj", "image_proj")
ADDITIONS = ("text", "text_time", "text_image", "image", "image_hint")
LABEL_TABLE = "label_table"
"""Name of the submodule that looks class labels up, where they condition by cross-attention."""
LCM_GUIDANCE = 8.5
"""Guidance scale that a model distilled with it is told, as in diffusers' pipeline."""


@dataclass(frozen=True)
class Around:
    """What stands beside a UNet and says what its inputs are.

    Attributes:
        tokens: length of an encoded prompt, or None where nothing says it.
        pooled: width of the pooled prompt (SDXL), or None.
        scale: pixels per latent, along one axis.
    """

    tokens: int | None = None
    pooled: int | None = None
    scale: int = 8


def declare(
    spec: ModelSpec,
    config: Mapping[str, Any],
    shape: tuple[int, int, int],
    where: str,
    around: Around = Around(),
) -> tuple[InputSpec, ...]:
    """The conditioning inputs of a diffusers UNet, from its config, with what the recipe says of them.

    Args:
        shape: (C, H, W) of the samples; further channels that the UNet takes are an input of their own.
        where: the file of the config, for messages.
    Raises:
        ModelError: the config sets a condition that is not supported, or the recipe declares inputs
            otherwise.
    """
    given = {s.name: s for s in spec.inputs}
    inputs: list[InputSpec] = []
    if config["_class_name"] == CONDITION_UNET:
        inputs += _of_text(given, config, shape, where, around)
    more = int(config.get("in_channels", shape[0])) - shape[0]
    if config.get("addition_embed_type") == "image_hint":
        more -= HINT_CHANNELS
    labels = _labels(spec, given, config, where)
    if labels is not None:
        # Beside a picture, a class is the level of noise in it (SD's x4 upscaler).
        inputs.append(replace(labels, kept=True) if inputs and more > 0 else labels)
    if more > 0:
        inputs.append(_merge(given, InputSpec(EXTRA, "float32", (more, *shape[1:]), kept=True), where))
    if given:
        raise ModelError(
            f"model.inputs declares {min(given)!r}, which {config['_class_name']} of {where} does not take: "
            "leave it out"
        )
    return tuple(inputs)


def _of_text(
    given: dict[str, InputSpec],
    config: Mapping[str, Any],
    shape: tuple[int, int, int],
    where: str,
    around: Around,
) -> list[InputSpec]:
    """The inputs of a UNet2DConditionModel: text, and what SDXL, LCM and Kandinsky add."""
    inner, outer = config.get("cross_attention_dim", 1280), config.get("encoder_hid_dim")
    hidden = config.get("encoder_hid_dim_type") or ("text_proj" if outer else None)
    added = config.get("addition_embed_type")
    for name, kind, known in (
        ("encoder_hid_dim_type", hidden, ENCODERS), ("addition_embed_type", added, ADDITIONS),
    ):  # fmt: skip
        if kind is not None and kind not in known:
            raise ModelError(
                f"{where} says {name} {brief(kind)}, which is not supported ({', '.join(known)} are): load "
                "the model by file.py:function"
            )
    inputs: list[InputSpec] = []
    if hidden != "image_proj":
        inputs.append(_text(given, outer if hidden else inner, where, around))
    vectors: dict[str, Any] = {}
    if added == "text_image":
        vectors = {POOLED: inner, IMAGE: inner}
    elif added in ("image", "image_hint"):
        vectors = {IMAGE: outer}
    if hidden in ("text_image_proj", "image_proj"):
        vectors.setdefault(IMAGE, inner if hidden == "text_image_proj" else outer)
    inputs += [_merge(given, InputSpec(n, "float32", (_width(w, where),)), where) for n, w in vectors.items()]
    if added == "image_hint":
        pixels = 3, *(size * HINT_SCALE for size in shape[1:])
        inputs.append(_merge(given, InputSpec(HINT, "float32", pixels, kept=True), where))
    elif added == "text_time":
        inputs += [_merge(given, one, where) for one in _text_time(config, shape, where, around)]
    size = config.get("time_cond_proj_dim")
    if size is not None:
        default = _guidance_embedding(LCM_GUIDANCE - 1, int(size))
        one = InputSpec(GUIDANCE, "float32", (int(size),), default=default, kept=True)
        inputs.append(_merge(given, one, where))
    return inputs


def _width(value: Any, where: str) -> int:
    if isinstance(value, Sequence) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ModelError(f"{where} says cross_attention_dim {value!r}: expected one integer")
    return value


def _text(given: dict[str, InputSpec], value: Any, where: str, around: Around) -> InputSpec:
    """The encoded text, of a width."""
    width = _width(value, where)
    text = given.pop(TEXT, None)
    if text is None and around.tokens is not None:
        text = InputSpec(TEXT, "float32", (around.tokens, width))
    if text is None or text.dtype != "float32" or len(text.shape) != 2 or text.shape[1] != width:
        got = "is not declared" if text is None else f"is declared as {text.dtype} {list(text.shape)}"
        raise ModelError(
            f"input {TEXT} {got}: a {CONDITION_UNET} needs it under model.inputs as float32 with shape "
            f"[tokens, {width}]"
        )
    return text


def _text_time(
    config: Mapping[str, Any], shape: tuple[int, int, int], where: str, around: Around
) -> list[InputSpec]:
    """SDXL's pooled text and its numbers on sizes: (original, crop, target) height and width in pixels.

    The refiner has (original, crop, score): five numbers. The projection takes the pooled text and
    `addition_time_embed_dim` values for each number.
    """
    total, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    if not (isinstance(total, int) and isinstance(each, int) and each > 0):
        raise ModelError(
            f"{where} says addition_embed_type 'text_time' without projection_class_embeddings_input_dim and "
            "addition_time_embed_dim: it is no config of SDXL"
        )
    widths = [around.pooled] if around.pooled else [1280, total - 6 * each]
    pooled = next((w for w in widths if 0 < w < total and (total - w) % each == 0), None)
    if pooled is None:
        raise ModelError(
            f"{where} projects {total} values, {each} for each number on sizes: that leaves no whole pooled "
            f"text{f' of {around.pooled}, the width of the text encoder' if around.pooled else ''}"
        )
    count = (total - pooled) // each
    height, width = (float(size * around.scale) for size in shape[1:])
    known = {6: (height, width, 0.0, 0.0, height, width), 5: (height, width, 0.0, 0.0, 6.0)}
    sizes = InputSpec(SIZES, "float32", (count,), default=known.get(count, ()), kept=True)
    return [InputSpec(POOLED, "float32", (pooled,)), sizes]


def _guidance_embedding(w: float, size: int) -> tuple[float, ...]:
    """sin and cos of 1000 w at `size // 2` frequencies from 1 to 1e-4 (Meng et al. 2023, as in diffusers)."""
    half = size // 2
    angles = [1000 * w * math.exp(-math.log(10000) * i / max(half - 1, 1)) for i in range(half)]
    return (*map(math.sin, angles), *map(math.cos, angles), *([0.0] if size % 2 else []))


def _labels(
    spec: ModelSpec, given: dict[str, InputSpec], config: Mapping[str, Any], where: str
) -> InputSpec | None:
    """The input `class_labels`: a class, or with class_embed_type a number or a vector."""
    kind, classes = config.get("class_embed_type"), config.get("num_class_embeds")
    labels: InputSpec | None = None
    if kind is not None:
        labels = _merge(given, InputSpec(LABELS, "float32", _vector(kind, config, where)), where)
    elif classes is not None:
        if not isinstance(classes, int):
            raise ModelError(f"{where} says num_class_embeds {classes!r}: expected an integer")
        expected = InputSpec(LABELS, "int64", (), classes)
        one = given.pop(LABELS, expected)
        if replace(one, null_class=None) != expected:
            raise ModelError(
                f"model.inputs declares {LABELS} otherwise than {where}: num_class_embeds is {classes}; "
                "leave it out"
            )
        return with_null(spec, one)
    if spec.null_class is not None:
        raise ModelError(
            f"model.null_class is {spec.null_class}, but {where} has no num_class_embeds: leave null_class "
            "out"
        )
    return labels


def _vector(kind: Any, config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Shape of the input of a class_embed_type."""
    blocks = config.get("block_out_channels")
    if kind == "timestep":
        return ()
    size = None
    if kind == "identity" and isinstance(blocks, Sequence) and blocks:
        size = config.get("time_embedding_dim") or 4 * blocks[0]
    elif kind in ("projection", "simple_projection"):
        size = config.get("projection_class_embeddings_input_dim")
    if not isinstance(size, int):
        raise ModelError(
            f"{where} says class_embed_type {kind!r} of size {size!r}: expected timestep, identity, "
            "projection or simple_projection, of a size that the config says"
        )
    return (size,)


def with_null(spec: ModelSpec, given: InputSpec) -> InputSpec:
    """A class label's input with the recipe's null class, unless it has its own."""
    if given.num_classes is None or given.null_class is not None:
        return given
    return replace(given, null_class=spec.null_class)


def _merge(given: dict[str, InputSpec], expected: InputSpec, where: str) -> InputSpec:
    """An input as the config has it, with the recipe's values and default."""
    one = given.pop(expected.name, expected)
    if (one.dtype, one.shape) != (expected.dtype, expected.shape):
        raise ModelError(
            f"model.inputs declares {expected.name} as {one.dtype} {list(one.shape)}: by {where} it is "
            f"{expected.dtype} {list(expected.shape)}"
        )
    return replace(
        expected,
        values=one.values,
        default=one.default or expected.default,
        kept=one.kept or expected.kept,
    )


def adapted(module: nn.Module, table: nn.Embedding | None = None, channels: int | None = None) -> nn.Module:
    """Make a UNet's forward take the inputs of `declare` by their names, and return its prediction alone.

    Extra channels are appended to the sample, inputs that SDXL and Kandinsky add put into added_cond_kwargs,
    and class labels looked up in `table`, which becomes a submodule, as one token of cross-attention (LDM's
    ClassEmbedder). Of what it returns, the first `channels` count: a learned variance lies behind them.
    The object's class is replaced by a subclass; wrapping the module would change the submodule paths.
    """
    base = type(module)
    if table is not None:
        module.add_module(LABEL_TABLE, table)
    config: Mapping[str, Any] = getattr(module, "config", {})
    conditional = base.__name__ == CONDITION_UNET
    drops = channels is not None and config.get("out_channels") == 2 * channels

    def forward(self: nn.Module, sample: Tensor, timestep: Tensor, **given: Tensor) -> Any:
        conditions: dict[str, Any] = dict(given)
        if EXTRA in conditions:
            sample = torch.cat([sample, conditions.pop(EXTRA)], dim=1)
        added = {name: conditions.pop(name) for name in ADDED if name in conditions}
        if added:
            conditions["added_cond_kwargs"] = added
        if table is not None:
            conditions[TEXT] = self.get_submodule(LABEL_TABLE)(conditions.pop(LABELS))[:, None]
        if conditional:
            conditions.setdefault(TEXT, None)  # Kandinsky makes it of the picture
        output = base.forward(self, sample, timestep, **conditions)
        return output.sample[:, :channels] if drops else output

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return module
