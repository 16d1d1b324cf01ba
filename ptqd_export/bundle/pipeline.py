"""What a bundle holds beside its network, so that prompts go in and pictures come out.

These are text encoders with their tokenizers, and the decoder of the first stage. Each part is a folder; its
graph has the interface that optimum's pipelines expect.

text_encoder/model.onnx     input_ids int64 (B, tokens) -> last_hidden_state f32 (B, tokens, width)
                            states of an earlier layer (SDXL) are called hidden_states; then follows, of the
                            encoder whose pooled output is used, text_embeds f32 (B, width)
vae_decoder/model.onnx      latent_sample f32 (B, C, H, W) -> sample f32 (B, 3, H', W')
*/weights.safetensors       the weights of the graph beside it
tokenizer/                  vocab.json, merges.txt, and what other programs read
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..core.model import MAX_CONDITION, MAX_ELEMENTS, ModelInfo
from ..core.precision import Precision
from ..errors import need
from ..typed import brief
from .tokenizer import MAX_TOKENS, MAX_VOCABULARY, MERGES, VOCABULARY, Special

HIDDEN, POOLED_TEXT = "hidden_states", "text_embeds"
INPUT_IDS, STATES, LATENT, PICTURE = "input_ids", "last_hidden_state", "latent_sample", "sample"
MODEL = "model.onnx"
VAE_DECODER = "vae_decoder"
MAX_FACTOR = 1e6
MAX_LAYERS = 200
DIGEST = re.compile(r"[0-9a-f]{64}")
EncoderFolder = Literal["text_encoder", "text_encoder_2"]
TokenizerFolder = Literal["tokenizer", "tokenizer_2"]
TOKENIZER_FILES = (VOCABULARY, MERGES, "tokenizer_config.json", "special_tokens_map.json")
"""That a bundle takes over from a model; the first two are read."""


@dataclass(frozen=True)
class Tensors:
    """Inputs or outputs of a part's graph: (type, shape per sample) by name."""

    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def positions(self) -> int:
        """Most pixels or tokens of a value."""
        shapes = [shape for _, shape in (*self.inputs.values(), *self.outputs.values())]
        return max(
            math.prod(shape[1:]) if len(shape) == 3 else shape[0] if len(shape) == 2 else 1
            for shape in shapes
        )


@dataclass(frozen=True)
class Pooled:
    """The projected output of a text encoder for a whole text, one vector.

    Attributes:
        input: of the network, which takes it.
        width: its length.
    """

    input: str
    width: int

    def __post_init__(self) -> None:
        need(1 <= self.width <= MAX_CONDITION, f"pooled text of {self.width} numbers")


def states_of(hidden_layer: int) -> str:
    """Name of a layer's states in a graph."""
    return STATES if hidden_layer == -1 else HIDDEN


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder, its tokenizer, and what its states are for.

    Attributes:
        input: of the network, which takes its states; those of two encoders for one input lie side by side.
        folder, tokenizer: of its files.
        digest: SHA-256 of what the graph computes.
        precision: of its weights.
        tokens, width: of the states; vocabulary bounds the ids.
        hidden_layer: the layer whose states these are, -1 for the last.
        final_norm: the last layer norm is applied to them.
        special: ids of the tokenizer.
        pooled: what else is taken of it, or None.
    """

    input: str
    folder: EncoderFolder
    tokenizer: TokenizerFolder
    digest: str
    precision: Precision
    tokens: int
    width: int
    vocabulary: int
    hidden_layer: int
    final_norm: bool
    special: Special
    pooled: Pooled | None = None

    def __post_init__(self) -> None:
        need(DIGEST.fullmatch(self.digest) is not None, f"digest {brief(self.digest)} of {self.folder}")
        need(
            3 <= self.tokens <= MAX_TOKENS and self.width >= 1 and self.tokens * self.width <= MAX_CONDITION,
            f"{self.folder} has states of {self.tokens} by {self.width}",
        )
        need(
            2 <= self.vocabulary <= MAX_VOCABULARY and -MAX_LAYERS <= self.hidden_layer < 0,
            f"{self.folder} has {self.vocabulary} tokens and layer {self.hidden_layer}",
        )
        need(
            self.final_norm == (self.hidden_layer == -1),
            f"{self.folder} has layer {self.hidden_layer} with final_norm {self.final_norm}",
        )
        s = self.special
        need(
            all(0 <= i < self.vocabulary for i in (s.begin, s.end, s.pad, s.unknown)),
            f"{self.tokenizer} has special tokens beyond its vocabulary of {self.vocabulary}",
        )

    @property
    def tensors(self) -> Tensors:
        made: dict[str, tuple[str, tuple[int, ...]]] = {
            states_of(self.hidden_layer): ("float32", (self.tokens, self.width))
        }
        if self.pooled is not None:
            made[POOLED_TEXT] = "float32", (self.pooled.width,)
        return Tensors({INPUT_IDS: ("int64", (self.tokens,))}, made)

    @property
    def made(self) -> dict[str, str]:
        """{input of the network: output of the graph}."""
        pooled = {} if self.pooled is None else {self.pooled.input: POOLED_TEXT}
        return {self.input: states_of(self.hidden_layer), **pooled}


@dataclass(frozen=True)
class Decoder:
    """The first stage's decoder: picture = decode(latent / scaling_factor + shift_factor).

    Attributes:
        kind: its class in diffusers.
        digest, precision: as for TextEncoder.
        latent_shape: (C, H, W) of what the network samples.
        picture_shape: (channels, H, W) of what comes out.
        image_range: the values of black and white.
    """

    kind: Literal["AutoencoderKL", "VQModel"]
    digest: str
    precision: Precision
    latent_shape: tuple[int, int, int]
    picture_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float
    image_range: tuple[float, float]

    def __post_init__(self) -> None:
        need(DIGEST.fullmatch(self.digest) is not None, f"digest {brief(self.digest)} of {VAE_DECODER}")
        for shape in (self.latent_shape, self.picture_shape):
            need(
                all(1 <= size <= MAX_ELEMENTS for size in shape) and math.prod(shape) <= MAX_ELEMENTS,
                f"{VAE_DECODER} has a shape {brief(list(shape))}: expected at most {MAX_ELEMENTS} elements",
            )
        need(
            self.picture_shape[0] in (1, 3),
            f"{VAE_DECODER} gives {self.picture_shape[0]} channels: expected 1 or 3",
        )
        need(
            1 / MAX_FACTOR <= abs(self.scaling_factor) <= MAX_FACTOR and abs(self.shift_factor) <= MAX_FACTOR,
            f"factors {self.scaling_factor:g} and {self.shift_factor:g} of {VAE_DECODER}",
        )
        low, high = self.image_range
        need(-MAX_FACTOR <= low < high <= MAX_FACTOR, f"{VAE_DECODER} has pictures from {low:g} to {high:g}")

    @property
    def folder(self) -> str:
        return VAE_DECODER

    @property
    def tensors(self) -> Tensors:
        return Tensors({LATENT: ("float32", self.latent_shape)}, {PICTURE: ("float32", self.picture_shape)})


@dataclass(frozen=True)
class Pipeline:
    """The parts around the network.

    Attributes:
        latent: what the network samples is no picture, but what a decoder makes one of.
        decoder: None where the bundle has none.
        encoders: of text; empty for a network without.
        force_zeros: where no negative prompt is given, zeros stand for no condition, not the empty prompt's
            embedding (force_zeros_for_empty_prompt of diffusers' SDXL pipelines).
    """

    latent: bool = False
    decoder: Decoder | None = None
    encoders: tuple[TextEncoder, ...] = ()
    force_zeros: bool = False

    def __post_init__(self) -> None:
        need(self.latent or self.decoder is None, "a decoder of a network that samples pictures")
        for what, names in (
            ("encoders", [encoder.folder for encoder in self.encoders]),
            ("tokenizers", [encoder.tokenizer for encoder in self.encoders]),
        ):
            need(len(set(names)) == len(names), f"two text {what} in one folder")

    @property
    def parts(self) -> tuple[TextEncoder | Decoder, ...]:
        return (*self.encoders, *(() if self.decoder is None else (self.decoder,)))

    @property
    def text_inputs(self) -> tuple[str, ...]:
        """Inputs of the network that text is made for."""
        return tuple(dict.fromkeys(name for encoder in self.encoders for name in encoder.made))

    @property
    def files(self) -> tuple[str, ...]:
        """What the parts need, besides their weights."""
        read = (VOCABULARY, MERGES)
        return (
            *(graph_file(part) for part in self.parts),
            *(f"{encoder.tokenizer}/{name}" for encoder in self.encoders for name in read),
        )

    def check(self, model: ModelInfo) -> None:
        """Check that the parts go with the network.

        Raises:
            RecipeError: they do not.
        """
        if self.decoder is not None:
            need(
                self.decoder.latent_shape == model.sample_shape,
                f"{VAE_DECODER} takes {self.decoder.latent_shape}, the network samples {model.sample_shape}",
            )
        shapes = {spec.name: spec.shape for spec in model.inputs if spec.dtype == "float32"}
        pooled = [encoder.pooled for encoder in self.encoders if encoder.pooled is not None]
        states = tuple(dict.fromkeys(encoder.input for encoder in self.encoders))
        need(
            len({*states, *(one.input for one in pooled)}) == len(states) + len(pooled),
            "two text encoders make pooled text, or states, for one input",
        )
        for one in pooled:
            need(
                shapes.get(one.input) == (one.width,),
                f"a text encoder gives {(one.width,)} for {brief(one.input)}, the network takes "
                f"{shapes.get(one.input)}",
            )
        for name in states:
            own = [encoder for encoder in self.encoders if encoder.input == name]
            made = (own[0].tokens, sum(encoder.width for encoder in own))
            same = {encoder.tokens for encoder in own} == {own[0].tokens}
            need(
                same and shapes.get(name) == made,
                f"text encoders give {made} for {brief(name)}, the network takes {shapes.get(name)}",
            )


def graph_file(part: TextEncoder | Decoder) -> str:
    return f"{part.folder}/{MODEL}"
