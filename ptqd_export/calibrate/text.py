"""Text encoders with their tokenizers, in torch: of a pipeline's folder, or of a checkpoint in one file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..bundle.pipeline import POOLED_TEXT, EncoderFolder, Pooled, TokenizerFolder, states_of
from ..bundle.tokenizer import Tokenizer
from ..core.backend import install_hint
from ..core.engine import Array
from ..core.model import TEXT
from ..core.quant import LayerQuant
from ..errors import BackendUnavailable, ModelError
from ..files import digest
from ..typed import brief
from .conditions import POOLED
from .construct import check_sizes
from .folder import CONFIG
from .network import check_finite, one_line, weights_sha256
from .source import Source
from .tokenizer import read_tokenizer
from .weights import read_json

ENCODER, PROJECTING = "CLIPTextModel", "CLIPTextModelWithProjection"
SECOND: EncoderFolder = "text_encoder_2"
TOKENIZER: TokenizerFolder = "tokenizer"
SECOND_TOKENIZER: TokenizerFolder = "tokenizer_2"
PENULTIMATE = -2
"""Layer whose states SDXL takes of both of its encoders, without the last layer norm."""
VIT_L_14: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
"""Of CLIP ViT-L/14, the text encoder of Stable Diffusion 1."""
INNER = "text_model."
"""Before the names of a CLIPTextModel's weights, up to transformers 4 and in checkpoints."""
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextPart:
    """A text encoder.

    Attributes:
        module: ids int64 (B, tokens) to a tuple: states f32 (B, tokens, width), and with `pooled` the
            projected output of the whole text (B, pooled.width).
        tokenizer: that makes the ids.
        files: of the tokenizer, for the bundle.
        digest: of the weights and of the tokenizer's files.
        input, folder, tokenizer_folder, hidden_layer, final_norm, pooled: see `bundle.pipeline.TextEncoder`.
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
    tokenizer_folder: TokenizerFolder = TOKENIZER
    hidden_layer: int = -1
    final_norm: bool = True
    pooled: Pooled | None = None
    layers: Mapping[str, LayerQuant] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the module yields, as a bundle's graph calls it."""
        return states_of(self.hidden_layer), *(() if self.pooled is None else (POOLED_TEXT,))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the network that take it."""
        return self.input, *(() if self.pooled is None else (self.pooled.input,))

    def __call__(self, texts: Sequence[str], batch: int = 16) -> dict[str, F32]:
        """Conditions (N, *shape) of texts, by the network's input."""
        ids = self.tokenizer(texts)[0]
        parts = [self.compute(ids[i : i + batch]) for i in range(0, len(ids), batch)]
        made = (np.concatenate(values) for values in zip(*parts, strict=True))
        return dict(zip(self.inputs, made, strict=True))

    def compute(self, ids: Array) -> tuple[F32, ...]:
        """`outputs` of token ids."""
        with torch.inference_mode():
            return tuple(cast(F32, value.numpy()) for value in self.module(torch.from_numpy(ids)))


def text_part(
    module: nn.Module,
    tokenizer: Tokenizer,
    files: Mapping[str, bytes],
    folder: EncoderFolder = "text_encoder",
    hidden_layer: int = -1,
    pooled: str | None = None,
) -> TextPart:
    """A text encoder of a CLIPTextModel, or of any module with such results; it is tried.

    Args:
        hidden_layer: whose states are taken, -1 for the last one's after the last layer norm.
        pooled: input of the network that takes the projected output; the module is a
            CLIPTextModelWithProjection then.
    Raises:
        ModelError: it does not take the tokenizer's ids.
    """
    encoder = _States(module, hidden_layer, pooled is not None).eval()
    ids, _ = tokenizer(["", "a photo"])
    try:
        with torch.inference_mode():
            made = encoder(torch.from_numpy(ids))
    except Exception as error:
        raise ModelError(
            f"the text encoder does not run on {ids.shape[1]} tokens: {one_line(error)}"
        ) from error
    states, whole = made[0], made[1:]
    shapes = states.ndim == 3 and states.shape[:2] == ids.shape and all(v.ndim == 2 for v in whole)
    if not shapes or not all(bool(torch.isfinite(value).all()) for value in made):
        raise ModelError(f"the text encoder gives {tuple(states.shape)}, or NaN, for ids {ids.shape}")
    about: dict[str, Any] = {"tokens": tokenizer.tokens}
    if hidden_layer != -1:
        about |= {"hidden_layer": hidden_layer, "pooled": pooled}
    held = (part for item in sorted(files.items()) for part in item)
    return TextPart(
        encoder,
        tokenizer,
        files,
        int(states.shape[2]),
        digest(weights_sha256(about, module), *held),
        folder=folder,
        tokenizer_folder=SECOND_TOKENIZER if folder == SECOND else TOKENIZER,
        hidden_layer=hidden_layer,
        final_norm=hidden_layer == -1,
        pooled=None if pooled is None else Pooled(pooled, int(whole[0].shape[1])),
    )


class _States(nn.Module):
    def __init__(self, module: nn.Module, hidden_layer: int, pooled: bool) -> None:
        super().__init__()
        self.module, self.hidden_layer, self.pooled = module, hidden_layer, pooled

    def forward(self, ids: Tensor) -> tuple[Any, ...]:
        module = cast(Any, self.module)
        inner = module.text_model if self.pooled else module
        if self.hidden_layer == -1:
            made = inner(input_ids=ids)
            states = made.last_hidden_state
        else:
            made = inner(input_ids=ids, output_hidden_states=True)
            states = made.hidden_states[self.hidden_layer]
        if not self.pooled:
            return (states,)
        # transformers' own choice of the end indexes by a range over the batch, whose size no check of a
        # graph could know. Configs with the id 2 are old: there the end is the highest id.
        end = module.config.eos_token_id
        whole = ids.int()
        at = (whole if end == 2 else (whole == end).int()).argmax(-1, keepdim=True)
        chosen = (torch.arange(ids.shape[1]) == at)[..., None]
        last = torch.where(chosen, made.last_hidden_state, 0.0).sum(1)
        return states, module.text_projection(last)


@dataclass(frozen=True)
class _Encoder:
    """A text encoder's folder, and what is taken of it: see `text_part`."""

    folder: Path
    tokenizer: Path
    hidden_layer: int = -1
    pooled: str | None = None

    @property
    def kind(self) -> str:
        return ENCODER if self.pooled is None else PROJECTING

    @property
    def weights(self) -> tuple[Path, str | None]:
        """The file of its weights, and its variant."""
        whole, half = (self.folder / f"model{kind}.safetensors" for kind in ("", ".fp16"))
        return (half, "fp16") if half.is_file() and not whole.is_file() else (whole, None)

    def read(self) -> tuple[Tokenizer, dict[str, bytes]]:
        """Its tokenizer and the tokenizer's files; its config is checked.

        Raises:
            ModelError: they are damaged or missing, or the encoder's class is not supported.
            BackendUnavailable: tokenizers is not installed.
        """
        file = self.folder / CONFIG
        config = read_json(file)
        check_sizes(config, str(file))
        kind = (config.get("architectures") or [None])[0]
        if kind != self.kind:
            raise ModelError(
                f"{self.folder} is a {brief(kind)}, expected {self.kind}: set pipeline.text = "
                "false in the recipe, and declare the input with values"
            )
        most = config.get("max_position_embeddings", 77)
        if not isinstance(most, int) or most < 3:
            raise ModelError(f"{file} says max_position_embeddings is {brief(most)}")
        tokens, files = read_tokenizer(self.tokenizer, most)
        _check_vocabulary(tokens, config, self.tokenizer)
        return tokens, files


def _encoders(source: Source) -> tuple[_Encoder, ...]:
    """Those that a pipeline takes: for SDXL two, or its refiner's one."""
    folders = source.text_encoders
    if not any(spec.name == POOLED for spec in source.network.info.inputs):
        folder = folders[0]
        return (_Encoder(folder, source.tokenizers[0] if source.tokenizers else folder.with_name(TOKENIZER)),)
    if folders[-1].name != SECOND:
        raise ModelError(
            f"{folders[-1].parent} has no {SECOND}/, which makes the {POOLED} of {source.network.info.name}: "
            "copy it from the model, or set pipeline.text = false in the recipe"
        )
    last = _Encoder(folders[-1], folders[-1].with_name(SECOND_TOKENIZER), PENULTIMATE, POOLED)
    return (*(_Encoder(folder, folder.with_name(TOKENIZER), PENULTIMATE) for folder in folders[:-1]), last)


def weight_files(source: Source) -> tuple[Path, ...]:
    """The files of the weights that `open_texts` reads, once all else about them is checked.

    Raises:
        ModelError, BackendUnavailable: as `open_texts`.
    """
    encoders = _encoders(source)
    for encoder in encoders:
        encoder.read()
    return tuple(encoder.weights[0] for encoder in encoders)


def open_texts(source: Source) -> tuple[TextPart, ...]:
    """The text encoders of a pipeline's folder, as diffusers takes them.

    Args:
        source: with one at least.
    Raises:
        ModelError: one is damaged, of another class, or lacks its tokenizer.
        BackendUnavailable: text needs transformers or tokenizers, which are not installed.
    """
    texts = tuple(_open(encoder) for encoder in _encoders(source))
    lengths = {part.tokenizer.tokens for part in texts}
    if len(lengths) > 1:
        raise ModelError(
            f"the text encoders of {source.network.info.name} take {' and '.join(map(str, sorted(lengths)))} "
            "tokens, expected the same: see model_max_length in their tokenizers' tokenizer_config.json"
        )
    return texts


def _open(encoder: _Encoder) -> TextPart:
    tokens, files = encoder.read()
    name = cast(EncoderFolder, encoder.folder.name)
    return text_part(_load(encoder), tokens, files, name, encoder.hidden_layer, encoder.pooled)


def text_of_state(state: dict[str, Tensor], tokenizer: Path, where: str) -> TextPart:
    """The text encoder of Stable Diffusion 1 from the weights of a single file.

    Args:
        state: by transformers' names.
        tokenizer: its folder, which such a file lacks.
        where: the file, for messages.
    Raises:
        ModelError: the weights are not CLIP ViT-L/14's, or the folder is no tokenizer's.
        BackendUnavailable: text needs transformers or tokenizers, which are not installed.
    """
    tokens, files = read_tokenizer(tokenizer, VIT_L_14["max_position_embeddings"])
    _check_vocabulary(tokens, VIT_L_14, tokenizer)
    transformers = _transformers(f"the text encoder of {where}")
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**VIT_L_14))
    expected = module.state_dict()
    if not any(key.startswith(INNER) for key in expected):
        state = {key.removeprefix(INNER): value for key, value in state.items()}
    for verb, keys in (("lacks", expected.keys() - state), ("holds unknown", state.keys() - expected.keys())):
        if keys:
            raise ModelError(
                f"{where} {verb} {len(keys)} tensors of CLIP ViT-L/14's text encoder, such as "
                f"{brief(min(keys))}: leave pipeline.tokenizer out, and give text as values"
            )
    for key, value in sorted(state.items()):
        if value.shape != expected[key].shape:
            raise ModelError(
                f"tensor {brief(key)} of the text encoder in {where} has shape {tuple(value.shape)}: CLIP "
                f"ViT-L/14 expects {tuple(expected[key].shape)}"
            )
        check_finite(key, value, where)
    module.load_state_dict({key: value.to(torch.float32) for key, value in state.items()})
    return text_part(module.float().eval().requires_grad_(False), tokens, files)


def _check_vocabulary(tokenizer: Tokenizer, config: Mapping[str, Any], place: Path) -> None:
    known = config.get("vocab_size", VIT_L_14["vocab_size"])
    if isinstance(known, int) and len(tokenizer.vocabulary) > known:
        raise ModelError(
            f"{place} has {len(tokenizer.vocabulary)} tokens, its text encoder knows {known}: it is another "
            "model's tokenizer"
        )


def _load(encoder: _Encoder) -> nn.Module:
    folder, kind = encoder.folder, encoder.kind
    transformers = _transformers(f"the text encoder {folder}")
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        try:
            read: Callable[..., Any] = getattr(transformers, kind).from_pretrained
            module, told = read(
                folder,
                local_files_only=True,
                use_safetensors=True,
                variant=encoder.weights[1],
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # OSErrors, and whatever a wrong config ends in
            raise ModelError(f"{folder} cannot be read as a {kind}: {one_line(error)}") from error
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


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailable(f"{what} needs transformers ({error}): {install_hint('build')}") from error
    return transformers


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
