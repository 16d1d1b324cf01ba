"""The parts around a network, in torch: text encoders with their tokenizers, and the first stage's decoder.

`open_parts` makes them of what a model's files hold. `text_part` and `decoder_part` make them of modules,
wherever those come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..bundle.pipeline import VAE_DECODER, EncoderFolder, TokenizerFolder
from ..bundle.tokenizer import Tokenizer
from ..core.backend import install_hint
from ..core.engine import Array
from ..core.model import TEXT
from ..core.quant import LayerQuant
from ..errors import BackendUnavailable, ModelError
from ..files import digest
from ..recipe import Recipe
from ..typed import brief
from .construct import check_sizes
from .folder import CONFIG
from .network import check_finite, one_line, weights_sha256
from .source import Source
from .tokenizer import read_tokenizer
from .weights import read_json

ENCODERS = ("CLIPTextModel",)
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextPart:
    """A text encoder.

    Attributes:
        module: ids int64 (B, tokens) to states f32 (B, tokens, width).
        tokenizer: that makes the ids.
        files: of the tokenizer, for the bundle.
        digest: of the weights and of the tokenizer's files.
        input, folder, tokenizer_folder, hidden_layer, final_norm: see `bundle.pipeline.TextEncoder`.
        layers: those whose weights are stored as integers, by their path in module.module, which has the
            values of these integers.
    """

    module: nn.Module
    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    width: int
    digest: str
    input: str = TEXT
    folder: EncoderFolder = "text_encoder"
    tokenizer_folder: TokenizerFolder = "tokenizer"
    hidden_layer: int = -1
    final_norm: bool = True
    layers: Mapping[str, LayerQuant] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str], batch: int = 16) -> F32:
        """States (N, tokens, width) of texts."""
        ids = self.tokenizer(texts)[0]
        return np.concatenate([self.compute(ids[i : i + batch]) for i in range(0, len(ids), batch)])

    def compute(self, ids: Array) -> F32:
        """States of token ids."""
        return _compute(self.module, ids)


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

    def compute(self, latents: Array) -> F32:
        """Pictures of scaled latents."""
        return _compute(self.module, latents)


def _compute(module: nn.Module, value: Array) -> F32:
    with torch.inference_mode():
        return cast(F32, module(torch.from_numpy(value)).numpy())


@dataclass(frozen=True)
class Parts:
    """What stands around a network; `latent`: what it samples is no picture."""

    latent: bool = False
    decoder: DecoderPart | None = None
    texts: tuple[TextPart, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(tokens, width) of the inputs that text is made for."""
        found: dict[str, tuple[int, int]] = {}
        for part in self.texts:
            width = part.width + found.get(part.input, (0, 0))[1]
            found[part.input] = part.tokenizer.tokens, width
        return found

    @property
    def digest(self) -> str:
        """Of everything that decides conditions: the text encoders and their tokenizers."""
        return digest(*(part.digest for part in self.texts))

    def encode(self, texts: Sequence[str]) -> dict[str, F32]:
        """Conditions (N, *shape), by input, of texts."""
        made: dict[str, list[F32]] = {}
        for part in self.texts:
            made.setdefault(part.input, []).append(part(texts))
        return {name: np.concatenate(states, axis=-1) for name, states in made.items()}


def open_parts(recipe: Recipe, source: Source) -> Parts:
    """The parts around a model's network that its recipe wants.

    Raises:
        ModelError: a part is damaged, of a class that is not supported, or lacks its tokenizer.
        BackendUnavailable: text needs transformers or tokenizers, which are not installed.
    """
    inputs = {spec.name: spec for spec in source.network.info.inputs}
    decoder = None
    if source.read_first_stage is not None and recipe.pipeline.decoder:
        decoder = _open_decoder(source)
    texts: list[TextPart] = []
    if TEXT in inputs and recipe.pipeline.text and source.text_encoders:
        texts.append(_open_text(source.text_encoders[0], source.tokenizers))
    if recipe.pipeline.weights == "w8a16":
        decoder = None if decoder is None else replace(decoder, layers=round_weights(decoder.module))
        texts = [replace(part, layers=round_weights(part.module)) for part in texts]
    parts = Parts(source.read_first_stage is not None, decoder, tuple(texts))
    for name, shape in parts.shapes.items():
        if inputs[name].shape != shape:
            raise ModelError(
                f"the text encoder gives {name} of shape {list(shape)}, {source.network.info.name} takes "
                f"{list(inputs[name].shape)}: set pipeline.text = false in the recipe, and give it values"
            )
    return parts


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


def text_part(module: nn.Module, tokenizer: Tokenizer, files: Mapping[str, bytes], **about: Any) -> TextPart:
    """A text encoder of a CLIPTextModel, or of any module whose result has last_hidden_state; it is tried.

    Args:
        about: further fields of TextPart.
    Raises:
        ModelError: it does not take the tokenizer's ids.
    """
    encoder = _States(module).eval()
    ids, _ = tokenizer(["", "a photo"])
    try:
        with torch.inference_mode():
            states = encoder(torch.from_numpy(ids))
    except Exception as error:
        raise ModelError(
            f"the text encoder does not run on {ids.shape[1]} tokens: {one_line(error)}"
        ) from error
    if states.ndim != 3 or states.shape[:2] != ids.shape or not bool(torch.isfinite(states).all()):
        raise ModelError(f"the text encoder gives {tuple(states.shape)}, or NaN, for ids {ids.shape}")
    held = (part for item in sorted(files.items()) for part in item)
    key = digest(weights_sha256({"tokens": tokenizer.tokens}, module), *held)
    return TextPart(encoder, tokenizer, files, int(states.shape[2]), key, **about)


class _States(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> Any:
        return self.module(input_ids=ids).last_hidden_state


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


def _open_text(folder: Path, tokenizers: Sequence[Path]) -> TextPart:
    config, tokens, files = text_files(folder, tokenizers)
    return text_part(_load_text(folder, config), tokens, files)


def text_files(
    folder: Path, tokenizers: Sequence[Path]
) -> tuple[Mapping[str, Any], Tokenizer, dict[str, bytes]]:
    """A text encoder's config, its tokenizer, and the tokenizer's files.

    Raises:
        ModelError: they are damaged or missing, or the encoder's class is not supported.
        BackendUnavailable: tokenizers is not installed.
    """
    config = read_json(folder / CONFIG)
    check_sizes(config, str(folder / CONFIG))
    kind = (config.get("architectures") or [None])[0]
    if kind not in ENCODERS:
        raise ModelError(
            f"{folder} is a {brief(kind)}, expected {' or '.join(ENCODERS)}: set pipeline.text = "
            "false in the recipe, and declare the input with values"
        )
    most = config.get("max_position_embeddings", 77)
    if not isinstance(most, int) or most < 3:
        raise ModelError(f"{folder / CONFIG} says max_position_embeddings is {brief(most)}")
    place = tokenizers[0] if tokenizers else folder.with_name("tokenizer")
    tokens, files = read_tokenizer(place, most)
    return config, tokens, files


def text_weights(folder: Path) -> tuple[Path, str | None]:
    """The file of a text encoder's weights, and its variant."""
    whole, half = (folder / f"model{kind}.safetensors" for kind in ("", ".fp16"))
    return (half, "fp16") if half.is_file() and not whole.is_file() else (whole, None)


def _load_text(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailable(
            f"the text encoder {folder} needs transformers ({error}): {install_hint('build')}"
        ) from error
    _, variant = text_weights(folder)
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        try:
            reader: Any = transformers.CLIPTextModel
            module, told = reader.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # OSErrors, and whatever a wrong config ends in
            raise ModelError(f"{folder} cannot be read as a CLIPTextModel: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in told.get(what, ()) if not str(key).endswith("position_ids"))
        if keys:
            raise ModelError(
                f"the weights in {folder} have {what.replace('_', ' ')}, such as {brief(keys[0])}: config "
                "and weights are of different models"
            )
    for key, value in sorted(module.state_dict().items()):
        check_finite(key, value, str(folder))
    return cast(nn.Module, module.float().eval().requires_grad_(False))


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
