"""The parts around a network, in torch: text encoders (`text`), and the first stage's decoder.

`open_parts` makes them of what a model's files hold; `decoder_part` makes one of a module, wherever it comes
from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..bundle.pipeline import PICTURE, VAE_DECODER
from ..core.engine import Array
from ..core.model import TEXT
from ..core.quant import LayerQuant
from ..errors import ModelError, RecipeError
from ..files import digest
from ..recipe import Recipe
from .network import one_line
from .source import Source
from .text import TextPart, open_texts, text_of_state

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DecoderPart:
    """A first stage's decoder.

    Attributes:
        module: latents f32 (B, C, H, W) to pictures f32 (B, channels, H', W').
        layers: as for TextPart; the others: see `bundle.pipeline.Decoder`.
    """

    module: nn.Module
    kind: Literal["AutoencoderKL", "VQModel"]
    latent_shape: tuple[int, int, int]
    picture_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float
    image_range: tuple[float, float] = (-1.0, 1.0)
    layers: Mapping[str, LayerQuant] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return VAE_DECODER

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name of what the module yields, as a bundle's graph calls it."""
        return (PICTURE,)

    def compute(self, latents: Array) -> tuple[F32, ...]:
        """Pictures of scaled latents, as `outputs`."""
        with torch.inference_mode():
            return (cast(F32, self.module(torch.from_numpy(latents)).numpy()),)


@dataclass(frozen=True)
class Parts:
    """What stands around a network.

    Attributes:
        latent: what it samples is no picture.
        force_zeros: see `bundle.pipeline.Pipeline`.
        notes: what a user should know of what is left out.
    """

    latent: bool = False
    decoder: DecoderPart | None = None
    texts: tuple[TextPart, ...] = ()
    force_zeros: bool = False
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(tokens, width), or of pooled text (width,), of the inputs that text is made for."""
        found: dict[str, tuple[int, ...]] = {}
        for part in self.texts:
            found[part.input] = part.tokenizer.tokens, part.width + found.get(part.input, (0, 0))[1]
            if part.pooled is not None:
                found[part.pooled.input] = (part.pooled.width,)
        return found

    @property
    def digest(self) -> str:
        """Of everything that decides conditions: the text encoders and their tokenizers."""
        return digest(*(part.digest for part in self.texts), *(["zeros"] if self.force_zeros else []))

    def encode(self, texts: Sequence[str]) -> dict[str, F32]:
        """Conditions (N, *shape), by input, of texts."""
        made: dict[str, list[F32]] = {}
        for part in self.texts:
            for name, value in part(texts).items():
                made.setdefault(name, []).append(value)
        return {name: np.concatenate(states, axis=-1) for name, states in made.items()}

    @property
    def null(self) -> dict[str, F32]:
        """What stands for no condition, by input: the empty prompt's embedding, or zeros where nothing is."""
        return {} if self.force_zeros else {name: value[0] for name, value in self.encode([""]).items()}


def open_parts(recipe: Recipe, source: Source) -> Parts:
    """The parts around a model's network that its recipe wants.

    Raises:
        ModelError: a part is damaged, of a class that is not supported, or lacks its tokenizer.
        RecipeError: a tokenizer is named for a model without weights that need it.
        BackendUnavailable: text needs transformers or tokenizers, which are not installed.
    """
    if recipe.pipeline.tokenizer and source.read_text_state is None:
        raise RecipeError(
            f"pipeline.tokenizer is set, but {source.network.info.name} is no Stable Diffusion 1 in one "
            "file, whose text encoder it would be for: leave it out"
        )
    inputs = {spec.name: spec for spec in source.network.info.inputs}
    decoder = None
    if source.read_first_stage is not None and recipe.pipeline.decoder:
        decoder = _open_decoder(source)
    texts, notes = _open_texts(recipe, source) if TEXT in inputs and recipe.pipeline.text else ((), ())
    if recipe.pipeline.weights == "w8a16":
        decoder = None if decoder is None else replace(decoder, layers=round_weights(decoder.module))
        texts = tuple(replace(part, layers=round_weights(part.module)) for part in texts)
    parts = Parts(
        source.read_first_stage is not None, decoder, texts, bool(texts) and source.force_zeros, notes
    )
    for name, shape in parts.shapes.items():
        if inputs[name].shape != shape:
            raise ModelError(
                f"the text encoder gives {name} of shape {list(shape)}, {source.network.info.name} takes "
                f"{list(inputs[name].shape)}: set pipeline.text = false in the recipe, and give it values"
            )
    return parts


def _open_texts(recipe: Recipe, source: Source) -> tuple[tuple[TextPart, ...], tuple[str, ...]]:
    """The text encoders, and notes on why there are none."""
    name, tokenizer = source.network.info.name, recipe.pipeline.tokenizer
    if source.text_encoders:
        return open_texts(source), ()
    if source.read_text_state is not None and tokenizer:
        return (text_of_state(source.read_text_state(), recipe.path(tokenizer), name),), ()
    if source.read_text_state is not None:
        return (), (
            f"{name} takes no prompts, as its file has a text encoder but no tokenizer: set "
            "pipeline.tokenizer in the recipe to a folder with CLIP's vocab.json and merges.txt",
        )
    if recipe.model.checkpoint:
        return (), (
            f"{name} takes no prompts, as its text encoder is not read from one file: give the diffusers "
            "folder of the model",
        )
    return (), ()


def round_weights(wrapper: nn.Module) -> dict[str, LayerQuant]:
    """Put weights of Conv2d and Linear layers on grids of 8 bits, a scale per output channel, in place.

    Returns:
        their codes, by their path in wrapper.module.
    """
    layers = {}
    for name, module in wrapper.get_submodule("module").named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach().numpy()
        most = np.abs(weight).reshape(len(weight), -1).max(1)
        scale = np.where(most > 0, most / 127, 1).astype(np.float32)
        wide = scale.reshape(-1, *[1] * (weight.ndim - 1))
        codes = np.clip(np.rint(weight / wide), -127, 127).astype(np.int8)
        module.weight.data = torch.from_numpy(codes.astype(np.float32) * wide)
        bias = None if module.bias is None else module.bias.detach().numpy()
        kind: Literal["conv", "linear"] = "conv" if weight.ndim == 4 else "linear"
        layers[name] = LayerQuant(name, kind, codes, scale, 8, None, 16, None, bias, 0)
    return layers


def decoder_part(
    module: nn.Module,
    kind: str,
    latent_shape: tuple[int, int, int],
    where: str,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> DecoderPart:
    """The decoder of an AutoencoderKL or a VQModel, which is tried.

    Args:
        latent_shape: of what the network samples.
    Raises:
        ModelError: it does not decode such latents.
    """
    config: Mapping[str, Any] = getattr(module, "config", {})
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ModelError(
                f"{where} says {name}, which is not supported: set pipeline.decoder = false in the recipe"
            )
    decoder = (_Quantized if kind == "VQModel" else _Plain)(module).eval()
    try:
        with torch.inference_mode():
            picture = decoder(torch.zeros(1, *latent_shape))
    except Exception as error:
        raise ModelError(
            f"the decoder of {where} does not run on latents of {latent_shape}: {one_line(error)}"
        ) from error
    if picture.ndim != 4 or picture.shape[1] not in (1, 3) or not bool(torch.isfinite(picture).all()):
        raise ModelError(f"the decoder of {where} gives {tuple(picture.shape)}, or NaN: expected pictures")
    channels, height, width = picture.shape[1:]
    return DecoderPart(
        decoder,
        cast(Literal["AutoencoderKL", "VQModel"], kind),
        latent_shape,
        (channels, height, width),
        scaling_factor,
        shift_factor,
    )


class _Plain(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, latent: Tensor) -> Any:
        return cast(Any, self.module).decode(latent, return_dict=False)[0]


class _Quantized(_Plain):
    """Takes the nearest code by |e|^2 - 2 z.e, as z^2 is the same for all.

    diffusers' cdist would become a value of (positions, codes, channels).
    """

    def forward(self, latent: Tensor) -> Any:
        module = cast(Any, self.module)
        codes = module.quantize.embedding.weight
        distance = (codes * codes).sum(1) - 2 * (latent.permute(0, 2, 3, 1) @ codes.T)
        nearest = nn.functional.embedding(distance.argmin(-1), codes).permute(0, 3, 1, 2)
        return module.decode(nearest, force_not_quantize=True, return_dict=False)[0]


def _open_decoder(source: Source) -> DecoderPart:
    assert source.read_first_stage is not None
    module, shape = source.read_first_stage(), source.network.info.sample_shape
    where = f"the first stage of {source.network.info.name}"
    factors = source.scaling_factor, source.shift_factor
    return decoder_part(module, type(module).__name__, shape, where, *factors)
